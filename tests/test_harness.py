"""lm-eval's tasks through the evicting engine, against lm-eval's own model."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from conftest import STORY, write_tasks
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import MaxLengthCriteria, PreTrainedModel, StoppingCriteriaList

from ctxprune.evals.config import EvalConfig
from ctxprune.evals.quality.evaluate import evaluate
from ctxprune.evals.quality.harness import PrunedLM, score
from ctxprune.evals.quality.scoring import passes, texts_a_pass
from ctxprune.evals.quality.tasks import listed, load_tasks, task_manager
from ctxprune.pruner.checkpoints.checkpoint import load, load_tokenizer
from ctxprune.pruner.engine.handle import handle_of
from ctxprune.pruner.errors import CtxpruneError


@pytest.fixture
def five_kinds(tmp_path: Path) -> dict[str, Path]:
    """Documents and definitions of tasks of five kinds, as options of `load_tasks`."""
    write_tasks(tmp_path)
    sums = [
        {
            "question": f"{STORY * (1 + n % 3)} How many are {n} boats and {n}?",
            "answer": f"#### {2 * n}",
        }
        for n in range(6)
    ]
    pages = [{"page": STORY * n} for n in (3, 5, 4)]
    for name, rows in (("gsm8k", sums), ("wikitext", pages)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    definitions = tmp_path / "definitions"
    definitions.mkdir()
    (definitions / "harbour.yaml").write_text(
        "group: harbour\ntask: [hellaswag, piqa]\n"
        "aggregate_metric_list: [{metric: acc, weight_by_size: true}, {metric: acc_norm}]\n"
    )
    return {"data_dir": tmp_path, "include_path": definitions}


KINDS: dict[str, dict[str, Any]] = {
    "hellaswag": {},
    "piqa": {"num_fewshot": 3},
    "gsm8k": {"num_fewshot": 2, "gen_kwargs": {"max_gen_toks": 60}},
    "wikitext": {},
    "harbour": {},
}


@pytest.mark.parametrize("name", KINDS)
def test_dense_scores_of_five_kinds_are_those_of_lm_eval(
    embedded_folder: Path, five_kinds: dict[str, Path], name: str
) -> None:
    """To the last digit; and each kind has the sparsity that is asked for."""
    options: dict[str, Any] = dict(KINDS[name])
    if name != "harbour":  # what lm-eval knows is found without reading all of it
        options["include_path"] = None
    config = EvalConfig(
        tasks=(name,), sparsity=(0.0, 0.8), policy="sink", tokens=512, batch_size=2,
        **{**five_kinds, **options},
    )  # fmt: skip
    dense, pruned = (level["tasks"] for level in evaluate(embedded_folder, config)["levels"])

    given: dict[str, Any] = {**five_kinds, **options}
    loaded = load_tasks([name], given.pop("data_dir"), **given)
    lm = HFLM(str(embedded_folder), device="cpu", dtype="float32", batch_size=2)
    output = simple_evaluate(
        lm,
        tasks=[*(loaded.groups or loaded.tasks).values()],
        task_manager=TaskManager(include_defaults=False),
        bootstrap_iters=1000,
    )
    assert {*dense} == {*output["results"]} == {*loaded.tasks, *loaded.groups}
    for task, theirs in output["results"].items():
        found = {key: value for key, value in theirs.items() if isinstance(value, float)}
        assert found, "no figures to compare"
        for key, value in found.items():
            assert dense[task][key.removesuffix(",none")] == value, key
        # wikitext's metrics are no means, and lm-eval has no errors for them
        metrics = [key for key in theirs if "," in key and "_stderr" not in key]
        for metric, _, filtered in (key.partition(",") for key in metrics):
            of = "" if filtered == "none" else f",{filtered}"
            assert f"{metric}_stderr{of}" in dense[task]
        assert dense[task]["n"] == theirs["sample_len"]
        assert dense[task]["sparsity"] == 0.0
        assert 0.78 <= pruned[task]["sparsity"] <= 0.82
        assert 0 < pruned[task]["rows"] < 120
        for metric, of in pruned[task].get("against_dense", {}).items():
            apart = pruned[task][metric] - dense[task][metric]
            assert of["difference"] == pytest.approx(apart) and of["stderr"] >= 0
    if name != "wikitext":  # of which nothing is a mean over documents
        assert pruned[name]["against_dense"]
    shots = KINDS[name].get("num_fewshot", 0)
    assert dense[name]["shots"] == shots


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_dense_likelihoods_are_those_of_lm_eval(
    tiny_folder: Callable[[str], Path], family: str, batch_size: int
) -> None:
    # A few documents give few accuracies: the log-likelihoods themselves agree to the last bit.
    folder = tiny_folder(family)
    lm = HFLM(str(folder), device="cpu", dtype="float32", batch_size=batch_size)
    requests = [
        Instance("loglikelihood", {}, (STORY * (1 + n % 3), ending), n)
        for n, ending in enumerate([" he sails home", " again!", " no", " the boats, one by one"])
    ]
    model = load(folder, sparsity=0.0)
    lm_ours = PrunedLM(model, load_tokenizer(folder), batch_size=batch_size, dense=True)
    assert lm_ours.loglikelihood(requests) == lm.loglikelihood(requests)


def test_examples_are_of_the_local_documents_and_never_the_one_that_is_asked(
    tmp_path: Path,
) -> None:
    write_tasks(tmp_path, documents=4)
    task = load_tasks(["piqa"], tmp_path, num_fewshot=3).tasks["piqa"]
    task.build_all_requests()
    goals = [json.loads(line)["goal"] for line in (tmp_path / "piqa.jsonl").open()]
    # some goals are the same: it is whole documents that are told apart
    assert len(task.instances) == 8
    for request in task.instances:
        shown = request.args[0].split("\n\n")
        assert len(shown) == 4
        assert all(any(goal in example for goal in goals) for example in shown)
    with pytest.raises(CtxpruneError, match="`piqa` shows 4 examples, and there are 3"):
        load_tasks(["piqa"], tmp_path, num_fewshot=4)


def test_tags_stand_for_their_tasks(tmp_path: Path) -> None:
    row = {
        "question": "What floats?",
        "choices": {"text": ["boats", "stones"], "label": ["A", "B"]},
    }
    line = json.dumps({**row, "answerKey": "A"})
    (tmp_path / "arc_easy.jsonl").write_text(line)
    with pytest.raises(CtxpruneError, match=r"no file `.*arc_challenge\.jsonl`"):
        load_tasks(["ai2_arc"], tmp_path)
    (tmp_path / "arc_challenge.jsonl").write_text(line)
    loaded = load_tasks(["ai2_arc"], tmp_path)
    assert {*loaded.tasks} == {"arc_easy", "arc_challenge"} and loaded.groups == {}


def test_documents_that_do_not_fit_a_task_are_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "piqa.jsonl").write_text('{"goal": "Float"}')
    with pytest.raises(CtxpruneError, match="lm-eval cannot load task `piqa`: ValueError"):
        load_tasks(["piqa"], tmp_path)


def test_requests_are_turns_of_a_chat_after_a_system_instruction(
    embedded_folder: Path, task_folder: Path, tmp_path: Path
) -> None:
    model, tokenizer = load(embedded_folder, sparsity=0.0), load_tokenizer(embedded_folder)
    task = load_tasks(["piqa"], task_folder, num_fewshot=1).tasks["piqa"]
    path = tmp_path / "deep" / "piqa.jsonl"
    with pytest.raises(CtxpruneError, match="no chat template"):
        score(model, tokenizer, task, apply_chat_template=True)
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
    )
    score(
        model,
        tokenizer,
        task,
        apply_chat_template=True,
        system_instruction="Be brief.",
        limit=2,
        samples=path,
    )
    first, _ = map(json.loads, path.read_text().splitlines())
    asked = first["arguments"][0][0]
    assert asked.startswith("<system>Be brief.<user>Question: How does one count boats?")
    assert asked.count("<user>") == 2 and asked.endswith("<assistant>")
    assert (first["doc"]["label"], first["target"]) == (0, 0)
    assert {"acc", "acc_norm", "resps", "filtered_resps"} <= first.keys()


def test_a_pass_is_filled_where_the_batch_size_is_left_to_us(
    tiny_folder: Callable[[str], Path], task_folder: Path
) -> None:
    folder = tiny_folder("gpt2")
    model, tokenizer = load(folder), load_tokenizer(folder)
    task = load_tasks(["piqa"], task_folder).tasks["piqa"]
    shapes = []
    model.register_forward_hook(lambda _, args, out: shapes.append(out.logits.shape[0]))
    for sparsity in (0.0, 0.5):
        score(model, tokenizer, task, policy="sink", sparsity=sparsity, batch_size="auto")
    assert shapes == [6, 6]  # three documents that differ, two requests each
    assert (texts_a_pass("auto", 100), texts_a_pass("auto", 9000)) == (81, 1)
    assert [*passes([3000, 4000, 10, 4000], "auto")] == [[1, 3], [0, 2]]


def test_names_of_all_kinds_are_listed() -> None:
    kinds = dict(listed())
    assert (kinds["hellaswag"], kinds["mmlu"], kinds["ai2_arc"]) == ("task", "group", "tag")
    assert len(kinds) > 5000


@pytest.mark.parametrize("policy", ["h2o", "sink"])
def test_each_request_has_the_sparsity_asked_for(
    tiny_folder: Callable[[str], Path], tmp_path: Path, policy: str
) -> None:
    write_tasks(tmp_path, documents=4)
    folder = tiny_folder("llama")
    task = load_tasks(["hellaswag"], tmp_path).tasks["hellaswag"]
    found = score(load(folder), load_tokenizer(folder), task, policy=policy, sparsity=0.6)
    assert found["sparsity"] == pytest.approx(0.6, abs=0.03)


def test_padding_does_not_count_in_the_sparsity(
    tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    write_tasks(tmp_path)
    folder = tiny_folder("gpt2")
    model, tokenizer = load(folder), load_tokenizer(folder)
    task = load_tasks(["hellaswag"], tmp_path).tasks["hellaswag"]
    alone, batched = (
        score(model, tokenizer, task, policy="sink", sparsity=0.5, batch_size=batch_size)
        for batch_size in (1, 5)
    )
    assert 0.0 < alone["sparsity"] < 1.0
    assert batched["sparsity"] == pytest.approx(alone["sparsity"], abs=1e-12)


def test_pruned_scores_do_not_depend_on_the_batch(tiny_folder: Callable[[str], Path]) -> None:
    folder = tiny_folder("llama")
    model, tokenizer = load(folder, policy="sink", sparsity=0.5), load_tokenizer(folder)
    requests = [
        Instance("loglikelihood", {}, (STORY * n, " he sails home"), n) for n in range(1, 4)
    ]
    alone, batched = (
        PrunedLM(model, tokenizer, batch_size=size).loglikelihood(requests) for size in (1, 3)
    )
    for (one, _), (other, _) in zip(alone, batched, strict=True):
        assert one == pytest.approx(other, abs=1e-4)
    model.ctxprune.use("sink", 0.0)
    dense = PrunedLM(model, tokenizer, dense=True).loglikelihood(requests)
    assert abs(dense[2][0] - alone[2][0]) > 1e-4  # it did evict


def running_at(model: PreTrainedModel, tokens: int, prompt: int | None = None) -> Any:
    handle = handle_of(model)
    return handle.running(handle.at(tokens, prompt))


def test_logits_of_the_prompts_alone_are_left_out(tiny_folder: Callable[[str], Path]) -> None:
    folder = tiny_folder("llama")
    model = load(folder, policy="sink", sparsity=0.5)
    shapes = []
    model.register_forward_hook(lambda _, args, output: shapes.append(output.logits.shape[:2]))
    lm = PrunedLM(model, load_tokenizer(folder), batch_size=3)
    texts = [(range(5, 45), [7, 8]), (range(9, 40), [3]), (range(4, 38), [1, 2, 3, 4])]
    requests = [(("", str(n)), list(read), answer) for n, (read, answer) in enumerate(texts)]
    scores = lm._loglikelihood_tokens(requests)
    # 41, 31 and 37 tokens are read; the first answer, the second text's, is predicted from 30 on
    assert shapes == [(3, 41 - 30)]
    for (found, _), (_, read, answer) in zip(scores, requests, strict=True):
        ids = torch.tensor([read + answer])
        with torch.inference_mode(), running_at(model, ids.shape[1] - 1):
            logits = model(ids[:, :-1]).logits[0, -len(answer) :]
        chosen = logits.log_softmax(-1).gather(1, ids[0, -len(answer) :, None])
        assert found == pytest.approx(float(chosen.sum()), abs=1e-4)


def test_the_context_but_its_last_token_is_the_prompt(tiny_folder: Callable[[str], Path]) -> None:
    folder = tiny_folder("llama")
    model = load(folder, sparsity=0.0)
    model.ctxprune.use("sink", 0.7, evict="prompt")
    lm = PrunedLM(model, load_tokenizer(folder), batch_size=2)
    texts = [(range(5, 65), [7, 8, 9]), (range(9, 50), [3])]
    requests = [(("", str(n)), list(read), answer) for n, (read, answer) in enumerate(texts)]
    scores = lm._loglikelihood_tokens(requests)
    for (found, _), (_, context, answer) in zip(scores, requests, strict=True):
        ids = torch.tensor([context + answer])
        length = ids.shape[1] - 1
        with torch.inference_mode(), running_at(model, length, len(context) - 1):
            with handle_of(model).measure() as usage:
                logits = model(ids[:, :-1]).logits[0, -len(answer) :]
        chosen = logits.log_softmax(-1).gather(1, ids[0, -len(answer) :, None])
        assert found == pytest.approx(float(chosen.sum()), abs=1e-4)
        # The query that predicts the first token is the first one that misses rows.
        gone = usage.evicted
        with torch.inference_mode(), running_at(model, length, len(context)):
            with handle_of(model).measure() as usage:
                model(ids[:, :-1])
        assert 0 <= usage.evicted < gone


def test_continuations_that_share_all_but_the_last_token_are_read_once(
    tiny_folder: Callable[[str], Path],
) -> None:
    folder = tiny_folder("gpt2")
    model = load(folder, policy="sink", sparsity=0.5)
    lm = PrunedLM(model, load_tokenizer(folder), batch_size=4)
    read = []
    model.register_forward_pre_hook(
        lambda _, args, kwargs: read.extend(args[0].tolist()), with_kwargs=True
    )
    context = list(range(5, 45))
    answers = ([3], [4], [7, 8], [7, 9])
    requests = [(("", str(n)), context, answer) for n, answer in enumerate(answers)]
    together = lm._loglikelihood_tokens(requests)
    assert len(read) == 2
    alone = [lm._loglikelihood_tokens([request])[0] for request in requests]
    for (one, _), (other, _) in zip(together, alone, strict=True):
        assert one == pytest.approx(other, abs=1e-4)


@pytest.fixture
def writing_task(tmp_path: Path) -> Any:
    """A task of lm-eval's whose answers are written."""
    rows = [{"text": STORY * (1 + n % 3) + "He", "answer": "sails"} for n in range(4)]
    (tmp_path / "writing.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = {
        "task": "writing",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "writing.jsonl")}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{text}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["never written"], "max_gen_toks": 200, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    }
    return task_manager().load([config])["tasks"]["writing"]


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("policy", ["sink", "tova"])
def test_texts_that_are_written_have_the_sparsity_asked_for(
    tiny_folder: Callable[[str], Path], writing_task: Any, policy: str, batch_size: int
) -> None:
    folder = tiny_folder("llama")
    model = load(folder)
    model.generation_config.suppress_tokens = [0]  # no end of text before the announced length
    found = score(
        model,
        load_tokenizer(folder),
        writing_task,
        policy=policy,
        sparsity=0.8,
        batch_size=batch_size,
    )
    assert found["sparsity"] == pytest.approx(0.8, abs=0.02)
    assert found["n"] == 4 and found["exact_match"] == 0.0
    assert found["rows"] is not None and 10 < found["rows"] < 80


@pytest.mark.parametrize("batch_size", [1, 4])
def test_texts_that_end_early_have_the_sparsity_asked_for(
    tiny_folder: Callable[[str], Path], writing_task: Any, batch_size: int
) -> None:
    folder = tiny_folder("llama")
    model = load(folder)
    model.generation_config.suppress_tokens = [0]
    until = StoppingCriteriaList([MaxLengthCriteria(130)])
    options = {"policy": "sink", "sparsity": 0.8, "batch_size": batch_size}
    writing_task.set_config("generation_kwargs", {"max_gen_toks": 900}, update=True)
    with mock.patch("lm_eval.models.huggingface.stop_sequences_criteria", lambda *args: until):
        found = score(model, load_tokenizer(folder), writing_task, **options)
    assert found["sparsity"] == pytest.approx(0.8, abs=0.02)
    assert found["rows"] is not None and found["rows"] < 40


def test_a_task_without_prompts_cannot_evict_after_them(
    tiny_folder: Callable[[str], Path], writing_task: Any
) -> None:
    folder = tiny_folder("llama")
    writing_task.OUTPUT_TYPE = "loglikelihood_rolling"
    with pytest.raises(CtxpruneError, match="`writing` scores whole texts"):
        score(load(folder), load_tokenizer(folder), writing_task, evict="prompt")


def test_a_text_that_ends_in_token_0_is_not_taken_for_padding(
    tiny_folder: Callable[[str], Path],
) -> None:
    folder = tiny_folder("gpt2")
    model = load(folder, policy="sink", sparsity=0.5)
    lm = PrunedLM(model, load_tokenizer(folder), batch_size=2)
    seen = []
    model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["attention_mask"].tolist()), with_kwargs=True
    )
    long, ends_in_0 = [5] * 40, [5] * 30 + [0]
    requests = [(("", ""), long, [7]), (("", "x"), ends_in_0, [7])]
    lm._loglikelihood_tokens(requests)
    assert seen == [[[1] * 40, [1] * 31 + [0] * 9]]


def test_a_level_without_eviction_is_refused(
    tiny_folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tasks(tmp_path, documents=1)
    folder = tiny_folder("gpt2")
    task = load_tasks(["hellaswag"], tmp_path).tasks["hellaswag"]
    # As if the engine did not reach the model: every level would repeat the dense scores.
    monkeypatch.setattr("ctxprune.pruner.engine.handle.Handle.use", lambda *args, **kwargs: None)
    with pytest.raises(CtxpruneError, match="not one token was evicted on `hellaswag`"):
        score(load(folder), load_tokenizer(folder), task, policy="sink", sparsity=0.5)


def test_unknown_task_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(CtxpruneError, match="unknown task `helaswag`, did you mean `hellaswag`"):
        load_tasks(["helaswag"])


def test_missing_file_in_data_dir(tmp_path: Path) -> None:
    with pytest.raises(CtxpruneError, match=r"no file .*piqa\.jsonl"):
        load_tasks(["piqa"], tmp_path)


def test_malformed_file_in_data_dir(tmp_path: Path) -> None:
    (tmp_path / "piqa.jsonl").write_text("not json\n")
    with pytest.raises(CtxpruneError, match="documents of task `piqa` cannot be read"):
        load_tasks(["piqa"], tmp_path)


def test_offline_without_data_dir(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*args: object, **kwargs: object) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr("datasets.load_dataset", offline)
    with pytest.raises(CtxpruneError) as caught:
        load_tasks(["piqa"])
    assert "--data-dir" in caught.value.hint
