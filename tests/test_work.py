"""How much work an evaluation is: what is announced is what the model reads."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import STORY, write_tasks

from ctxprune.cli import main as cli
from ctxprune.evals.config import EvalConfig
from ctxprune.evals.quality.evaluate import evaluate
from ctxprune.evals.quality.harness import SEEDS, PrunedLM, score
from ctxprune.evals.quality.tasks import load_tasks
from ctxprune.evals.quality.work import (
    Meter,
    Progress,
    Speed,
    Work,
    duration,
    of_task,
    reading,
    summary,
)
from ctxprune.pruner.checkpoints.checkpoint import load, load_tokenizer
from ctxprune.pruner.errors import CtxpruneError


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("hellaswag", {}),
        ("piqa", {"num_fewshot": 2}),
        ("gsm8k", {"num_fewshot": 1, "gen_kwargs": {"max_gen_toks": 12}}),
        ("wikitext", {}),
    ],
)
def test_the_work_of_a_task_is_what_the_model_reads(
    tiny_folder: Callable[[str], Path],
    tmp_path: Path,
    name: str,
    options: dict[str, Any],
    batch_size: int,
) -> None:
    write_tasks(tmp_path)
    rows: dict[str, list[dict[str, str]]] = {
        "gsm8k": [{"question": STORY * n, "answer": str(n)} for n in (1, 2, 4)],
        "wikitext": [{"page": STORY * n} for n in (3, 1, 4)],
    }
    for task, documents in rows.items():
        (tmp_path / f"{task}.jsonl").write_text("\n".join(map(json.dumps, documents)))
    folder = tiny_folder("llama")
    model, tokenizer = load(folder), load_tokenizer(folder)
    model.generation_config.suppress_tokens = [0]  # as many tokens are written as may be
    task = load_tasks([name], tmp_path, **options).tasks[name]
    task.set_fewshot_seed(SEEDS[-1])
    found = of_task(PrunedLM(model, tokenizer), task, None, batch_size)
    read: list[int] = []
    hook = model.register_forward_hook(
        lambda _, args, kwargs, out: read.append((args or (kwargs.get("input_ids"),))[0].numel()),
        with_kwargs=True,
    )
    score(model, tokenizer, task, batch_size=batch_size)
    hook.remove()
    # the last token that is written is not read
    unread = found.passes // 13 if name == "gsm8k" else 0
    assert len(read) == found.passes - unread
    if batch_size == 1:  # else there is padding
        assert sum(read) == found.tokens - (len(rows["gsm8k"]) if name == "gsm8k" else 0)
    documents = found.requests
    assert documents == {"hellaswag": 24, "piqa": 12, "gsm8k": 3, "wikitext": 3}[name]


def test_some_documents_tell_the_work_of_all(
    tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    write_tasks(tmp_path, documents=400)
    documents = tmp_path / "hellaswag.jsonl"
    rows = [json.loads(line) for line in documents.read_text().splitlines()]
    apart = [row | {"ctx_a": f"{n}. {row['ctx_a']}"} for n, row in enumerate(rows)]
    documents.write_text("\n".join(map(json.dumps, apart)))
    folder = tiny_folder("llama")
    lm = PrunedLM(load(folder), load_tokenizer(folder))
    task = load_tasks(["hellaswag"], tmp_path).tasks["hellaswag"]
    task.set_config("num_fewshot", 0)
    task.build_all_requests()
    exact = sum(len(lm.tok_encode("".join(request.args))) - 1 for request in task.instances)
    found = of_task(lm, task, None, 8)
    assert found.requests == 1600
    assert found.tokens == pytest.approx(exact, rel=0.1)
    assert of_task(lm, task, 10, 8).requests == 40


def test_the_meter_counts_what_is_read_up_to_what_was_planned(
    tiny_folder: Callable[[str], Path],
) -> None:
    model = load(tiny_folder("gpt2"), sparsity=0.0)
    shown: list[Progress] = []
    speed = Speed(a_pass=1.0, a_token=0.1)
    plan = {"first": (speed, Work(2, 20, 2)), "second": (speed, Work(1, 40, 2))}
    meter = Meter(model, plan, shown.append)
    assert meter.total == pytest.approx(4.0 + 6.0)
    ids = torch.ones(1, 10, dtype=torch.int64)
    with meter.measuring("first"):
        for _ in range(3):  # one more than planned
            model(ids)
    model(ids)  # of nobody
    with meter.measuring("second"):
        model(ids)
    assert [one.label for one in shown] == ["first"] * 3 + ["second"]
    assert [one.share for one in shown] == pytest.approx([0.2, 0.4, 0.4, 0.6])
    assert all(one.left for one in shown)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.2, "1 s"),
        (59, "59 s"),
        (61, "2 min"),
        (3599, "1 h 0 min"),
        (5400, "1 h 30 min"),
        (200000, "2 d 7 h"),
    ],
)
def test_durations(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_what_takes_long_comes_with_a_hint() -> None:
    work = reading([100] * 80, 8)
    assert work == Work(80, 8000, 10)
    short = {"a": (Speed(0.0, 0.001), work)}
    (told,) = summary(short, None)
    assert told == "1 measurement: 80 requests of 8,000 tokens altogether, about 8 s"
    long = {"a": (Speed(1.0, 0.1), work), "b": (Speed(1.0, 0.1), work)}
    told, hint = summary(long, None)
    assert told == "2 measurements: 160 requests of 16,000 tokens altogether, about 27 min"
    assert "--limit 200" in hint and "--batch-size auto" in hint
    assert "a smaller `--limit`" in summary(long, 1000)[1]


def test_progress_ends_with_all_of_the_work(embedded_folder: Path, task_folder: Path) -> None:
    shown: list[Progress] = []
    config = EvalConfig(
        tasks=("piqa", "last_word"), sparsity=(0.0, 0.5), policy="sink", tokens=1024, limit=3,
        data_dir=task_folder,
    )  # fmt: skip
    evaluate(embedded_folder, config, on_progress=shown.append)
    shares = [one.share for one in shown]
    assert shares == sorted(shares) and 0.9 < shares[-1] <= 1.0
    assert [*dict.fromkeys(one.label for one in shown)] == [
        f"{name} at sparsity {level}"
        for level in ("0", "0.5")
        for name in ("perplexity", "last_word", "piqa")
    ]


LINES = (
    r"loading the documents of piqa, gsm8k in `.*`",
    r"loading the model: .*",
    r"gsm8k: written .*",
    r"\d+ measurements: \d+ requests of [\d,]+ tokens altogether, about \d+ \w+",
    r"(perplexity|piqa|gsm8k) at sparsity 0(\.5)?: (running|done)",
    r"wrote results\.json",
)


def test_a_log_has_our_lines_alone(
    embedded_folder: Path, task_folder: Path, tmp_path: Path
) -> None:
    rows = [{"question": STORY * n, "answer": str(n)} for n in (1, 2, 4)]
    (task_folder / "gsm8k.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = [
        *("--model", str(embedded_folder), "--tasks", "piqa,gsm8k", "--data-dir", str(task_folder)),
        *("--num-fewshot", "2", "--gen-kwargs", "max_gen_toks=8", "--limit", "2"),
        *("--policy", "sink", "--sparsity", "0,0.5", "--max-tokens", "512"),
        *("--out", "results.json", "--log-samples", "samples"),
    ]
    done = subprocess.run(
        [sys.executable, "-m", "ctxprune.cli.main", "eval", *options],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for line in done.stderr.splitlines():
        assert any(re.fullmatch(pattern, line) for pattern in LINES), line
    assert "exact_match,strict-match" in done.stdout.replace("\n", "")
    results = json.loads((tmp_path / "results.json").read_text())
    assert (results["num_fewshot"], results["gen_kwargs"]) == (2, {"max_gen_toks": 8})
    assert {path.name for path in (tmp_path / "samples").iterdir()} == {
        f"{task}-{level}.jsonl" for task in ("piqa", "gsm8k") for level in ("0", "0.5")
    }


def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str
) -> tuple[int, str, str]:
    """The command in this process: exit code, stdout, stderr."""
    monkeypatch.setattr(sys, "argv", ["ctxprune", "eval", *arguments])
    with pytest.raises(SystemExit) as left:
        cli.main()
    out, err = capsys.readouterr()
    return int(left.value.code or 0), out, err


def test_a_device_without_room_is_a_sentence(
    embedded_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr("ctxprune.evals.quality.evaluate.perplexity", full)
    with pytest.raises(CtxpruneError, match="perplexity at sparsity 0: the device is out of mem"):
        evaluate(embedded_folder, EvalConfig(sparsity=(0.0,), tokens=512))


def test_old_names_of_options_are_understood(
    embedded_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    model = ("--model", str(embedded_folder), "--sparsity", "0", "--out", "r.json")
    code, _, err = run(monkeypatch, capsys, *model, "--context", "64", "--tokens", "640")
    assert code == 0, err
    results = json.loads(Path("r.json").read_text())
    assert (results["context"], results["levels"][0]["tokens"]) == (64, 630)
    code, _, err = run(monkeypatch, capsys, *model, "--max-length", "64", "--max-tokens", "640")
    assert code == 0 and "already done, kept" in err


def test_tasks_are_listed_as_data(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run(monkeypatch, capsys, "--list-tasks")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert {"retrieval\ttask of ctxprune", "hellaswag\ttask", "mmlu\tgroup"} <= {*lines}


def test_an_include_path_that_is_no_folder_is_refused(
    embedded_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = run(
        monkeypatch, capsys, "--model", str(embedded_folder), "--tasks", "piqa",
        "--include-path", "nowhere",
    )  # fmt: skip
    assert code == 2 and "error: `nowhere` is no folder" in err
