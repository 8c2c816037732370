"""Numbers, words and lists in options: of each command, refused in one sentence or right."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from commands import copied, replace
from hypothesis import given, settings
from hypothesis import strategies as st
from outcome import ctxprune, files_of, refused

from ctxprune.evals.config import BenchConfig, EvalConfig
from ctxprune.evals.inspect.inspection import InspectConfig, Subject
from ctxprune.evals.speed.training_cost import TrainingCostConfig
from ctxprune.pruner.config import ChatConfig, GenerateConfig, PruneConfig, TuneConfig
from ctxprune.pruner.errors import CtxpruneError
from ctxprune.pruner.schema import Settings

HUGE = "99999999999999999999"
# Arguments of a command, and words of the sentence that refuses them.
COMMANDS: list[tuple[str, str]] = [
    ("tune --sparsity nan", "sparsity must be a finite number, not nan"),
    ("tune --sparsity inf", "sparsity must be a finite number, not inf"),
    ("tune --sparsity 1", "sparsity must be less than 1"),
    ("tune --sparsity 80", "0.8 drops 80% of the context"),
    ("tune --sparsity 0", "nothing to learn"),
    ("tune --sparsity -0.0", "nothing to learn"),
    ("tune --lr nan", "lr must be a finite number"),
    ("tune --lr inf", "lr must be a finite number"),
    ("tune --lr -1", "lr must be at least 0"),
    ("tune --lr 1e999", "lr must be a finite number, not inf"),
    ("tune --gate-lr nan", "gate_lr must be a finite number"),
    ("tune --local-lr=-inf", "local_lr must be a finite number"),
    (f"tune --steps {HUGE}", "steps must be at most 2147483647"),
    ("tune --steps -1", "steps must be at least 0"),
    ("tune --steps 0 --train full", "steps must be at least 1"),
    (f"tune --local-steps {HUGE}", "local_steps must be at most"),
    ("tune --batch-size 0", "batch_size must be at least 1"),
    ("tune --gradient-accumulation-steps 0", "accumulate must be at least 1"),
    ("tune --max-length 15", "context must be at least 16"),
    (f"tune --max-length {HUGE}", "context must be at most"),
    ("tune --lora-rank 0", "lora_rank must be at least 1"),
    ("tune --lora-rank 1000000000000", "lora_rank must be at most 4096"),
    ("tune --seed -1", "seed must be at least 0"),
    (f"tune --seed {HUGE}", "seed must be at most"),
    ("tune --save-every 0", "save_every must be at least 1"),
    ("tune --max-minutes nan", "max_minutes must be a finite number"),
    ("tune --max-minutes -1", "max_minutes must be at least 0"),
    ("tune --max-tokens 0", "max_tokens must be at least 1"),
    ("tune --distill 1.5", "distill must be at most 1"),
    ("tune --distill nan", "distill must be a finite number"),
    ("tune --dense-share 2", "dense_share must be at most 1"),
    ("tune --ramp 1.5", "ramp must be at most 1"),
    ("tune --entmax-alpha 0.5", "alpha must be at least 1"),
    ("tune --entmax-alpha 1e308", "alpha must be at most 10"),
    ("tune --train gate", "did you mean `gates`"),
    ("convert --rank 0 --out m", "rank must be at least 1"),
    ("convert --rank 1000000000000 --out m", "rank must be at most 4096"),
    (f"convert --rank {HUGE} --out m", "rank must be at most 4096"),
    ("convert --attention-score nan --out m", "attention_bonus must be a finite number"),
    ("convert --max-rows 1 --out m", "cap of 1 rows is too small"),
    (f"convert --max-rows {HUGE} --out m", "max_rows must be at most"),
    ("convert --dtype float7 --out m", "unknown dtype"),
    ("generate --sparsity nan a", "sparsity must be a finite number"),
    ("generate --temperature nan a", "temperature must be a finite number"),
    ("generate --temperature inf a", "temperature must be a finite number"),
    ("generate --temperature 1e-320 a", "temperature must be 0, or at least 0.001"),
    ("generate --temperature -1 a", "temperature must be at least 0"),
    ("generate --top-k 3 a", "only matter to sampling"),
    ("generate --temperature 1 --top-k 0 a", "top_k must be at least 1"),
    ("generate --temperature 1 --top-p 0 a", "top_p must be more than 0"),
    ("generate --temperature 1 --top-p nan a", "top_p must be a finite number"),
    ("generate --temperature 1 --top-p 1.1 a", "top_p must be at most 1"),
    (f"generate --max-new-tokens {HUGE} a", "max_new_tokens must be at most"),
    ("generate --max-new-tokens 0 a", "max_new_tokens must be at least 1"),
    (f"generate --num-beams {HUGE} a", "num_beams must be at most"),
    ("generate --num-beams 0 a", "num_beams must be at least 1"),
    ("generate --seed -1 a", "seed must be at least 0"),
    ("generate --policy gat a", "did you mean `gate`"),
    ("generate --evict late a", "unknown value of evict `late`"),
    ("chat --sparsity 1", "sparsity must be less than 1"),
    ("chat --temperature nan", "temperature must be a finite number"),
    (f"chat --max-new-tokens {HUGE}", "max_new_tokens must be at most"),
    ("chat --policy snapkw", "did you mean `snapkv`"),
    ("eval --sparsity nan", "sparsity must be a finite number"),
    ("eval --sparsity 0,inf", "item 2 of sparsity must be a finite number"),
    ("eval --sparsity 0,1", "item 2 of sparsity must be less than 1"),
    ("eval --sparsity -0.5", "sparsity must be at least 0"),
    ("eval --sparsity x", "is not a list of numbers"),
    ("eval --max-length 1", "context must be at least 2"),
    (f"eval --max-length {HUGE}", "context must be at most"),
    ("eval --prompt 1", "prompt must be at least 2"),
    ("eval --prompt 600", "context must be at least 601"),
    ("eval --max-tokens 0", "tokens must be at least 1"),
    ("eval --lengths 64", "lengths must be at least 128"),
    ("eval --lengths nan", "is not a list of whole numbers"),
    (f"eval --lengths {HUGE}", "lengths must be at most"),
    ("eval --limit 0", "limit must be at least 1"),
    (f"eval --limit {HUGE}", "limit must be at most"),
    ("eval --batch-size 0", "batch_size must be at least 1"),
    ("eval --batch-size autoo", "did you mean `auto`"),
    (f"eval --batch-size {HUGE}", "batch_size must be at most"),
    ("eval --num-fewshot -1", "num_fewshot must be at least 0"),
    ("eval --gen-kwargs hot", "is no list of settings"),
    ("eval --gen-kwargs temperature=nan", "must be a finite number"),
    ('eval --gen-kwargs {"temperature":NaN}', "is not valid JSON"),
    ("eval --gen-kwargs [1]", "is no list of settings"),
    ("eval --dtype int8", "unknown dtype"),
    ("eval --seed -1", "seed must be at least 0"),
    ("eval --evict prompt", "need one in the windows"),
    ("bench --sparsity nan", "sparsity must be a finite number"),
    ("bench --batch-size 0", "batch must be at least 1"),
    ("bench --batch-size 1.5", "is not a list of whole numbers"),
    ("bench --batch-size nan", "is not a list of whole numbers"),
    (f"bench --batch-size {HUGE}", "batch must be at most"),
    ("bench --context-length 8", "context must be at least 16"),
    (f"bench --context-length {HUGE}", "context must be at most"),
    ("bench --repeats 0", "repeats must be at least 1"),
    (f"bench --steps {HUGE}", "steps must be at most"),
    ("bench --prefills 0", "prefills must be at least 1"),
    ("bench --modes prund", "did you mean `pruned`"),
    ("bench --modes oracle", "needs mode `pruned`"),
    ("bench --max-rows -1", "max_rows must be at least 0"),
    ("bench --training --context-length 8", "context must be at least 16"),
    ("bench --training --train gates", "trains no gates"),
    ("inspect --text a --tokens 0", "tokens must be at least 1"),
    (f"inspect --text a --tokens {HUGE}", "tokens must be at most"),
    ("inspect --text a --sparsity nan", "sparsity must be a finite number"),
    ("inspect --text a --compare gate:nan", "sparsity must be a finite number"),
    ("inspect --text a --compare gat:0.5", "did you mean `gate`"),
    ("inspect --text a --seed -1", "seed must be at least 0"),
]


@pytest.mark.parametrize(("line", "words"), COMMANDS, ids=[line for line, _ in COMMANDS])
def test_an_option_is_refused(line: str, words: str, tmp_path: Path) -> None:
    refused(ctxprune(*line.split(), cwd=tmp_path), words)
    assert not files_of(tmp_path)


# The least numbers that there are, and what they would be rounded to.
DENORMAL = [
    ("tune --steps 1 --max-length 64 --train lora --lr 1e-320 --gate-lr 5e-324", 0),
    ("tune --steps 1 --max-length 64 --sparsity 1e-320", 0),
    ("tune --steps 1 --max-length 64 --max-minutes 1e-320", 0),
    ("convert dense --attention-score 1e-320 --out made", 0),
    ("generate --no-chat --max-new-tokens 2 --policy sink --sparsity 1e-320 It", 0),
    ("generate --no-chat --max-new-tokens 2 --temperature 1 --top-p 1e-320 It", 0),
    ("generate --no-chat --temperature 5e-324 It", 2),
    ("eval --text text.txt --max-tokens 64 --max-length 64 --policy sink --sparsity 1e-320", 2),
    ("inspect --text text.txt --tokens 32 --policy sink --sparsity 1e-320", 0),
]


@pytest.mark.parametrize(("line", "code"), DENORMAL, ids=[line for line, _ in DENORMAL])
def test_a_denormal_number_is_right_or_refused(
    line: str, code: int, workplace: Path, tmp_path: Path
) -> None:
    place = copied(workplace, tmp_path)
    text = ["--data", "text.txt"] if line.startswith("tune") else []
    done = ctxprune(*line.split(), *text, cwd=place)
    if code:
        refused(done)
    assert done.code == code and "Traceback" not in done.err, done.err


EMULATED = [
    ("tune --steps 1 --max-length 64 --data text.txt --bf16", "pruner.training.tune._step"),
    ("generate --no-chat --dtype bfloat16 It", "pruner.generation.generate"),
    ("eval --text text.txt --dtype bfloat16", "evals.quality.evaluate.perplexity"),
    ("inspect --text text.txt --dtype bfloat16", "evals.inspect.inspection.trace"),
    ("bench --policy sink --dtype bfloat16", "evals.speed.bench.Comparison"),
    ("bench --architecture gpt2.json --dtype bfloat16", "evals.speed.bench.Comparison"),
    ("bench --training --train lora --bf16", "evals.speed.training_cost.Trainee"),
]


@pytest.mark.parametrize(("line", "work"), EMULATED, ids=[line for line, _ in EMULATED])
def test_an_emulated_dtype_is_told_before_the_work(
    line: str, work: str, workplace: Path, tmp_path: Path
) -> None:
    """However slow the processor is, what it does and how fast stands there when it begins."""
    place = copied(workplace, tmp_path)
    config = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 99}
    (place / "gpt2.json").write_text(json.dumps(config))
    (place / "cpuinfo").write_text("flags\t\t: fpu avx2\n")

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    def prepare() -> None:
        replace("pruner.device.CPUINFO", place / "cpuinfo")
        replace(work, stop)

    done = ctxprune(*line.split(), cwd=place, prepare=prepare)
    refused(done, code=130)
    assert done.err.count("emulates bfloat16, at ") == 1
    assert "training the gates alone: 1 steps" in done.err or not line.startswith("tune")


# What cannot come from a command line: types, as Python and recipes give them.
TYPES: list[tuple[Callable[..., Settings], dict[str, Any], str]] = [
    (TuneConfig, {"steps": True}, "steps must be a whole number, not True"),
    (TuneConfig, {"steps": "3"}, "steps must be a whole number, not '3'"),
    (TuneConfig, {"steps": 3.0}, "steps must be a whole number, not 3.0"),
    (TuneConfig, {"steps": None}, "steps must be a whole number, not None"),
    (TuneConfig, {"steps": 10**5000}, "steps must be at most 2147483647, not a int"),
    (TuneConfig, {"lr": "1e-3"}, "lr must be a number, not '1e-3'"),
    (TuneConfig, {"lr": False}, "lr must be a number, not False"),
    (TuneConfig, {"lr": 10**400}, "lr must be a number"),
    (TuneConfig, {"bf16": 1}, "bf16 must be true or false, not 1"),
    (TuneConfig, {"bf16": "yes"}, "bf16 must be true or false, not 'yes'"),
    (TuneConfig, {"data": 5}, "data must be text, not 5"),
    (TuneConfig, {"data": ""}, "data must not be empty"),
    (TuneConfig, {"data": "a\0b"}, "data must not hold a NUL"),
    (TuneConfig, {"data": "a" * 5000}, "data must have at most 4096 characters"),
    (TuneConfig, {"data": "\ud800"}, "data must be whole characters"),
    (TuneConfig, {"train": 1}, "train must be 'gates', 'lora' or 'full', not 1"),
    (TuneConfig, {"report_to": 5}, "report_to must be a list, not 5"),
    (TuneConfig, {"report_to": [5]}, "item 1 of report_to must be text, not 5"),
    (PruneConfig, {"levels": 5}, "levels must be a mapping, not 5"),
    (PruneConfig, {"levels": {"x": [1]}}, "the levels are not numbers"),
    (PruneConfig, {"levels": {"0.5": 1}}, "levels.0.5 must be a list"),
    (PruneConfig, {"levels": {"0.5": []}}, "levels.0.5 must not be an empty list"),
    (PruneConfig, {"levels": {"0.5": [2.0]}}, "item 1 of levels.0.5 must be at most 1"),
    (PruneConfig, {"levels": {"0.5": ["1"]}}, "item 1 of levels.0.5 must be a number"),
    (PruneConfig, {"levels": {"0.5": [0.0]}}, "no layer keeps anything"),
    (PruneConfig, {"levels": {"0.5": [1], "0.6": [1, 1]}}, "not of equally many layers"),
    (PruneConfig, {"levels": {"1.5": [1]}}, "must be less than 1"),
    (PruneConfig, {"levels": {"nan": [1]}}, "must be a finite number"),
    (PruneConfig, {"tuned": math.nan}, "tuned must be a finite number"),
    (EvalConfig, {"batch_size": 1.5}, "batch_size must be a whole number, not 1.5"),
    (EvalConfig, {"batch_size": None}, "batch_size must be a whole number, not None"),
    (EvalConfig, {"sparsity": 0.5}, "sparsity must be a list, not 0.5"),
    (EvalConfig, {"tasks": [1]}, "item 1 of tasks must be text"),
    (EvalConfig, {"reference": 5}, "reference must be a path, not 5"),
    (EvalConfig, {"gen_kwargs": 5}, "gen_kwargs must be a mapping, not 5"),
    (BenchConfig, {"dtype": []}, "dtype must not be an empty list"),
    (BenchConfig, {"modes": "pruned"}, "modes must be a list, not 'pruned'"),
    (BenchConfig, {"batch": list(range(1, 2000))}, "batch must have at most 1000 items"),
    (ChatConfig, {"stop": [""]}, "item 1 of stop must not be empty"),
    (GenerateConfig, {"prompt": 5}, "prompt must be a list, not 5"),
    (GenerateConfig, {"prompt": ["a", 5]}, "item 2 of prompt must be text"),
    (InspectConfig, {"tokens": "5"}, "tokens must be a whole number"),
    (TrainingCostConfig, {"batch": [1]}, "batch must be a whole number"),
    (Subject, {"policy": "gate", "sparsity": "0.5"}, "sparsity must be a number"),
]


@pytest.mark.parametrize(("kind", "options", "words"), TYPES, ids=[case[2] for case in TYPES])
def test_a_type_is_refused(
    kind: Callable[..., Settings], options: dict[str, Any], words: str
) -> None:
    with pytest.raises(CtxpruneError) as caught:
        kind(**options)
    assert words in caught.value.message and "\n" not in caught.value.message


def test_what_is_right_stays_as_it_is() -> None:
    config = TuneConfig(lr=1, sparsity=5e-324, gate_lr=5e-324, report_to=["wandb"])  # type: ignore[arg-type]
    assert (config.lr, config.sparsity, config.report_to) == (1.0, 5e-324, ("wandb",))
    assert math.copysign(1.0, PruneConfig(tuned=-0.0).tuned) == 1.0
    assert EvalConfig(sparsity=(0.8, 0, 0.8)).sparsity == (0.0, 0.8)
    assert EvalConfig(gen_kwargs="temperature=0.7,do_sample=true,until=.").gen_kwargs == {  # type: ignore[arg-type]
        "temperature": 0.7,
        "do_sample": True,
        "until": ".",
    }


NUMBERS = st.one_of(
    st.integers(),
    st.integers(-3, 600),
    st.floats(),
    st.floats(0, 1),
    st.sampled_from([10**30, -0.0, 5e-324, 1e308]),
)
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, st.text(max_size=5), st.just("auto")),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=3), inner, max_size=2)
    ),
    max_leaves=4,
)
KINDS: list[type[Settings]] = [
    PruneConfig,
    TuneConfig,
    ChatConfig,
    GenerateConfig,
    EvalConfig,
    BenchConfig,
    InspectConfig,
    TrainingCostConfig,
]


def _mutated(kind: type[Settings]) -> st.SearchStrategy[tuple[type[Settings], dict[str, Any]]]:
    known = sorted(kind.__dataclass_fields__)  # type: ignore[attr-defined]
    keys = st.one_of(st.sampled_from(known), st.sampled_from(known), st.text(max_size=4))
    return st.tuples(st.just(kind), st.dictionaries(keys, VALUES, max_size=3))


@settings(max_examples=1000, deadline=None)
@given(st.sampled_from(KINDS).flatmap(_mutated))
def test_any_options_are_taken_or_refused(case: tuple[type[Settings], dict[str, Any]]) -> None:
    kind, options = case
    try:
        kind.from_mapping(options, "the options")
    except CtxpruneError as error:
        assert error.message.startswith("the options: ")
