"""Files of results and states that are damaged, or hold something else."""

from __future__ import annotations

import copy
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from outcome import ctxprune, files_of, refused
from test_merged import benchmark, evaluation, training
from test_report import with_retrieval

from ctxprune.evals import results as typed
from ctxprune.evals.report.merged import merge
from ctxprune.evals.report.on_card import on_card
from ctxprune.evals.report.report_page import html, markdown
from ctxprune.pruner.errors import CtxpruneError

Json = Any
Damage = Callable[[Json], None]
Keys = tuple[str | int, ...]

EVAL = evaluation("runs/tuned", "gate", [(0.0, 0.0, 30.0), (0.8, 0.79, 33.0)])
EVAL["levels"][1]["against_dense"] = {"nll": {"difference": 0.1, "stderr": 0.01}}
KINDS = {
    "eval": EVAL,
    "bench": benchmark((512,)),
    "training": training(),
    "cells": with_retrieval(),
}
LEVEL: Keys = ("levels", 1)
TASK: Keys = (*LEVEL, "tasks", "hellaswag")
ROW: Keys = ("rows", 1)
GONE = object()


def damaged(kind: str, keys: Keys, value: Any) -> Json:
    """Results with something else at a place, or nothing."""
    made = copy.deepcopy(KINDS[kind])
    inside = made
    for key in keys[:-1]:
        inside = inside[key]
    if value is GONE and isinstance(inside, dict):
        inside.pop(keys[-1], None)
    elif value is GONE:
        del inside[keys[-1]]
    else:
        inside[keys[-1]] = value
    return made


# Kind of results, place, what stands there: refused, with the place in the sentence.
VALUES: list[tuple[str, Keys, Any]] = [
    ("eval", ("model",), GONE),
    ("eval", ("model",), None),
    ("eval", ("model",), 5),
    ("eval", ("model",), "m" * 200_000),
    ("eval", ("model",), "\ud800"),
    ("eval", ("policy",), GONE),
    ("eval", ("policy",), ["gate"]),
    ("eval", ("policy",), "g" * 10**6),
    ("eval", ("evict",), "later"),
    ("eval", ("evict",), None),
    ("eval", ("max_rows",), -1),
    ("eval", ("max_rows",), 10**400),
    ("eval", ("max_rows",), 1.5),
    ("eval", ("context",), GONE),
    ("eval", ("context",), -512),
    ("eval", ("context",), 512.5),
    ("eval", ("context",), "512"),
    ("eval", ("context",), True),
    ("eval", ("prompt",), "all"),
    ("eval", ("evicts_every",), -3),
    ("eval", ("evicts_every",), None),
    ("eval", ("text",), {}),
    ("eval", ("date",), 20261128),
    ("eval", ("command",), ["ctxprune", "eval"]),
    ("eval", ("versions",), ["1"]),
    ("eval", ("versions",), {"torch": 2.13}),
    ("eval", ("threads",), "two"),
    ("eval", ("seed",), 10**30),
    ("eval", ("seed",), 0.5),
    ("eval", ("limit",), -1),
    ("eval", ("batch_size",), [8]),
    ("eval", ("batch_size",), -8),
    ("eval", ("apply_chat_template",), "yes"),
    ("eval", ("levels", 1), None),
    ("eval", ("levels", 1), []),
    ("eval", (*LEVEL, "sparsity_requested"), GONE),
    ("eval", (*LEVEL, "sparsity_requested"), 1.0),
    ("eval", (*LEVEL, "sparsity_requested"), -0.1),
    ("eval", (*LEVEL, "sparsity_requested"), "0.8"),
    ("eval", (*LEVEL, "sparsity"), GONE),
    ("eval", (*LEVEL, "sparsity"), 1.5),
    ("eval", (*LEVEL, "sparsity"), math.nan),
    ("eval", (*LEVEL, "sparsity"), {}),
    ("eval", (*LEVEL, "cache_sparsity"), math.inf),
    ("eval", (*LEVEL, "cache_sparsity"), 2),
    ("eval", (*LEVEL, "rows"), -5),
    ("eval", (*LEVEL, "rows"), 10**400),
    ("eval", (*LEVEL, "rows"), "many"),
    ("eval", (*LEVEL, "perplexity"), GONE),
    ("eval", (*LEVEL, "perplexity"), None),
    ("eval", (*LEVEL, "perplexity"), 0),
    ("eval", (*LEVEL, "perplexity"), -33.0),
    ("eval", (*LEVEL, "perplexity"), math.nan),
    ("eval", (*LEVEL, "perplexity"), math.inf),
    ("eval", (*LEVEL, "perplexity"), 1e308),
    ("eval", (*LEVEL, "perplexity"), False),
    ("eval", (*LEVEL, "tokens"), -1),
    ("eval", (*LEVEL, "tokens"), 1.5),
    ("eval", (*LEVEL, "tasks"), GONE),
    ("eval", (*LEVEL, "tasks"), []),
    ("eval", (*LEVEL, "tasks", "hellaswag"), 0.5),
    ("eval", (*TASK, "sparsity"), GONE),
    ("eval", (*TASK, "sparsity"), -math.inf),
    ("eval", (*TASK, "n"), -100),
    ("eval", (*TASK, "n"), "all"),
    ("eval", (*TASK, "n"), 1e400),
    ("eval", (*TASK, "shots"), [5]),
    ("eval", (*TASK, "chance"), 7),
    ("eval", (*TASK, "against_dense"), [1]),
    ("eval", (*TASK, "against_dense"), {"acc": {"difference": None}}),
    ("eval", (*TASK, "against_dense"), {"acc": {"difference": math.nan}}),
    ("eval", (*TASK, "cells"), {"length": 1}),
    ("eval", (*TASK, "not_finite"), "nan"),
    ("eval", (*TASK, "stderr"), -1.0),
    ("eval", (*TASK, "acc_stderr,none"), -0.5),
    ("cells", (*LEVEL, "tasks", "retrieval", "cells", 0), 1),
    ("cells", (*LEVEL, "tasks", "retrieval", "cells", 0, "depth"), GONE),
    ("cells", (*LEVEL, "tasks", "retrieval", "cells", 0, "length"), -1),
    ("cells", (*LEVEL, "tasks", "retrieval", "cells", 0, "acc"), math.nan),
    ("bench", ("rows", 1), "row"),
    ("bench", ("threads",), GONE),
    ("bench", ("machine",), None),
    ("bench", ("extensions",), "AVX"),
    ("bench", ("extensions",), [1]),
    ("bench", ("unequal",), 1),
    ("bench", ("random_weights",), None),
    ("bench", ("max_rows",), "none"),
    ("bench", ("repeats",), -1),
    ("bench", (*ROW, "mode"), "dense"),
    ("bench", (*ROW, "mode"), None),
    ("bench", (*ROW, "batch"), 0),
    ("bench", (*ROW, "context"), -1),
    ("bench", (*ROW, "context"), 10**400),
    ("bench", (*ROW, "dtype"), ["float32"]),
    ("bench", (*ROW, "step_ms"), 8.0),
    ("bench", (*ROW, "step_ms"), {"median": 8.0, "min": 7.0}),
    ("bench", (*ROW, "ttft_ratio"), {"median": math.nan, "min": 1.0, "max": 1.0}),
    ("bench", (*ROW, "interval"), {"min": "8", "max": 16}),
    ("bench", (*ROW, "breakdown"), {"gate": 1.0}),
    ("bench", (*ROW, "kv_bytes"), -1),
    ("bench", (*ROW, "kv_bytes"), 1e308),
    ("bench", (*ROW, "peak_bytes"), "much"),
    ("bench", (*ROW, "speedup"), GONE),
    ("bench", (*ROW, "decode_tokens_per_s"), None),
    ("bench", (*ROW, "text_repeated"), "no"),
    ("training", ("train",), None),
    ("training", ("bf16",), "yes"),
    ("training", ("batch",), 0),
    ("training", (*ROW, "ratio"), GONE),
    ("training", (*ROW, "ratio"), math.inf),
    ("training", (*ROW, "step_s"), None),
    ("training", (*ROW, "context"), "512"),
]


@pytest.mark.parametrize(("kind", "keys", "value"), VALUES)
def test_a_damaged_value_is_refused_by_its_place(kind: str, keys: Keys, value: Any) -> None:
    content = damaged(kind, keys, value)
    with pytest.raises(CtxpruneError) as caught:
        merge([("x.json", content)])
    told = caught.value.message
    assert "`x.json`" in told and "\n" not in told and len(told) < 400
    last = keys[-1] if value is not GONE or kind != "training" else "ratio"
    place = f"[{last}]" if isinstance(last, int) else str(last)[:60]
    assert place in told


# Bytes of a file, and words of the sentence.
FILES: list[tuple[bytes, str]] = [
    (b"", "cannot be read as JSON"),
    (b"\0", "cannot be read as JSON"),
    (b"{", "cannot be read as JSON"),
    (b"\xff\xfe{\0}\0", "cannot be read as JSON"),
    (b'{"model": "\xe9"}', "cannot be read as JSON"),
    (b'{"model": "a", "model": "b"}', "it says `model` twice"),
    (b'{"\\ud800": 1}', "cannot be read as JSON"),
    (b"[" * 10**6, "nested too deep"),
    (b"[" * 10**5 + b"]" * 10**5, "nested too deep"),
    (b'{"a":' * 10**5 + b"1" + b"}" * 10**5, "nested too deep"),
    (b'{"levels": ' + b"9" * 5000 + b"}", "cannot be read as JSON"),
    (b"null", "holds no results"),
    (b"true", "holds no results"),
    (b"NaN", "holds no results"),
    (b'"text"', "holds no results"),
    (b"[]", "holds no results"),
    (b"[[]]", "holds no results"),
    (b"[1, 2]", "holds no results"),
    (b"{}", "holds no results"),
    (b'{"levels": []}', "holds no results"),
    (b'{"levels": {}}', "holds no results"),
    (b'{"rows": [[]]}', "holds no results"),
    (b'{"levels": [{}]}', "no usable `model`"),
    (b'{"rows": [{}]}', "no usable `model`"),
    (b'{"rows": [{"ratio": 1}]}', "no usable `model`"),
    (json.dumps([EVAL, EVAL | {"context": None}]).encode(), "no usable `[1].context`"),
    (json.dumps(EVAL | {"levels": EVAL["levels"] * 501}).encode(), "no usable `levels`"),
    (json.dumps(EVAL | {"levels": EVAL["levels"] * 500_000}).encode(), "larger than 64 MB"),
    (json.dumps(EVAL).encode()[:-40], "cannot be read as JSON"),
    (json.dumps(EVAL).encode() * 2, "cannot be read as JSON"),
]


@pytest.mark.parametrize(("content", "words"), FILES, ids=[str(n) for n in range(len(FILES))])
def test_a_file_of_something_else_is_refused(content: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(CtxpruneError) as caught:
        merge([("x.json", typed.read(tmp_path / "x.json"))])
    assert "x.json" in caught.value.message and words in caught.value.message
    assert "\n" not in caught.value.message


COMMANDS: list[tuple[tuple[str, ...], str]] = [
    (("report", "x.json"), "no usable `levels[1].sparsity`"),
    (("report", "good.json", "x.json", "--out", "r.md"), "no usable `levels[1].sparsity`"),
    (("report", "nan.json"), "finite"),
    (("report", "deep.json"), "nested too deep"),
    (("report", "."), "`.` cannot be read as JSON: Is a directory"),
    (("report", "secret.json"), "`secret.json` cannot be read"),
    (("export", "--model", "none", "--out", "o", "--results", "x.json"), "`levels[1].sparsity`"),
    (("export", "--model", "none", "--out", "o", "--results", "deep.json"), "nested too deep"),
    (("export", "--model", "none", "--out", "o", "--results", "none.json"), "cannot be read"),
]


@pytest.mark.parametrize(("arguments", "words"), COMMANDS)
def test_commands_refuse_them_and_write_nothing(
    arguments: tuple[str, ...], words: str, tmp_path: Path
) -> None:
    if "secret.json" in arguments and os.geteuid() == 0:
        pytest.skip("root reads everything")
    bad = damaged("eval", (*LEVEL, "sparsity"), "much")
    (tmp_path / "x.json").write_text(json.dumps(bad))
    (tmp_path / "good.json").write_text(json.dumps(EVAL))
    lost = damaged("eval", (*LEVEL, "perplexity"), math.nan)
    (tmp_path / "nan.json").write_text(json.dumps(lost))
    (tmp_path / "deep.json").write_text("[" * 10**6)
    (tmp_path / "secret.json").touch(mode=0)
    before = sorted(files_of(tmp_path)) if os.geteuid() == 0 else None
    refused(ctxprune(*arguments, cwd=tmp_path), words)
    assert before is None or sorted(files_of(tmp_path)) == before


# What is right, however it looks: kind, place, value, and what the page says.
RIGHT: list[tuple[str, Keys, Any, str]] = [
    ("eval", ("batch_size",), "auto", "auto"),
    ("eval", ("seed",), 1234567, "1234567"),
    ("eval", ("evicts_every",), GONE, "33.00"),
    ("eval", ("text",), GONE, "a text"),
    ("eval", ("versions",), GONE, "33.00"),
    ("eval", (*LEVEL, "rows"), None, "33.00"),
    ("eval", (*LEVEL, "rows"), GONE, "33.00"),
    ("eval", (*LEVEL, "unknown"), [[[1]]], "33.00"),
    ("eval", (*LEVEL, "tasks"), {}, "33.00"),
    ("eval", (*TASK, "acc"), math.nan, "nan"),
    ("eval", (*TASK, "acc"), -math.inf, "-inf"),
    ("eval", (*TASK, "acc"), 10**400, "huge"),
    ("eval", (*TASK, "acc"), 1e200, "1e+200"),
    ("eval", (*TASK, "acc"), "none", "0.450"),
    ("eval", (*TASK, "acc"), None, "0.450"),
    ("eval", (*TASK, "stderr"), math.nan, "0.420"),
    ("eval", (*TASK, "shots"), 10**15, "1000000000000000-shot"),
    ("eval", (*TASK, "alias"), "a", "0.420"),
    ("eval", (*LEVEL, "perplexity"), 1e305, ".0%"),
    ("eval", (*LEVEL, "perplexity"), 5e-324, "0.00"),
    ("eval", (*LEVEL, "tasks", "x" * 900), {"sparsity": 0.5, "acc": 0.25}, "x" * 900),
    ("bench", (*ROW, "kv_bytes"), None, "700"),
    ("bench", (*ROW, "cache_sparsity"), GONE, "700"),
    ("bench", (*ROW, "breakdown"), None, "700"),
    ("bench", (*ROW, "decode_tokens_per_s"), 0, "0.0"),
    ("bench", (*ROW, "decode_tokens_per_s"), 1e100, "700"),
    ("bench", (*ROW, "batch"), 2**53, f"{2**53}"),
    ("bench", (*ROW, "context"), 2**53, f"{2**53}"),
    ("bench", (*ROW, "eviction_ms"), -0.5, "-0.50"),
    ("bench", (*ROW, "of_oracle"), 0.0, "0.00"),
    ("training", ("dtype",), "float32", "1.31"),
    ("training", (*ROW, "peak_bytes"), 0, "0.00"),
]


@pytest.mark.parametrize(("kind", "keys", "value", "shown"), RIGHT)
def test_what_is_strange_and_right_is_shown(kind: str, keys: Keys, value: Any, shown: str) -> None:
    merged = merge([("x.json", damaged(kind, keys, value))])
    assert shown in markdown(merged)
    assert shown in html(merged)


def places(content: Json, keys: Keys = ()) -> list[Keys]:
    """Every place in JSON."""
    pairs = content.items() if isinstance(content, dict) else enumerate(content)
    found = []
    for key, each in pairs:
        found.append((*keys, key))
        if isinstance(each, (dict, list)):
            found += places(each, (*keys, key))
    return found


PLACES = st.sampled_from([*KINDS, "training"]).flatmap(  # which has no charts: they take the time
    lambda kind: st.tuples(st.just(kind), st.sampled_from(places(KINDS[kind])))
)
# Charts take most of the time: they are drawn of a part.
DRAWN = st.sampled_from((True, False, False))
STRANGE = st.one_of(
    st.just(GONE),
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([10**400, -(10**400), 2**63, -1, 0, 1e308, -1e308, 5e-324, -0.0]),
    st.floats(),
    st.text(),
    st.sampled_from(["", "\0", "\x1b[31m", "\ud800", "$x_{", "_", "m" * 10**4, "[/]", "</svg>"]),
    st.recursive(
        st.none() | st.floats() | st.text(max_size=3),
        lambda inner: (
            st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
        ),
        max_leaves=6,
    ),
)


@settings(
    max_examples=1000,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
@given(PLACES, STRANGE, DRAWN)
def test_no_damage_is_an_error_of_ours(place: tuple[str, Keys], value: Any, drawn: bool) -> None:
    kind, keys = place
    try:
        merged = merge([("x.json", damaged(kind, keys, value))])
    except CtxpruneError as error:
        assert "x.json" in error.message and "\n" not in error.message
        return
    on_card(merged)
    if drawn:
        html(merged)


STATES: list[tuple[bytes, str]] = [
    (b"", "cannot be read as JSON"),
    (b"{", "cannot be read as JSON"),
    (b"\xff", "cannot be read as JSON"),
    (b"[" * 10**5, "nested too deep"),
    (b"[]", "no usable"),
    (b"5", "no usable"),
    (b'{"a": 1}', "no usable `a`"),
    (b'{"a": {"label": "x", "date": "d"}}', "no usable `a.result`"),
    (b'{"a": {"label": "x", "date": 5, "result": {}}}', "no usable `a.date`"),
    (b'{"a": {"label": "x", "date": "d", "result": []}}', "no usable `a.result`"),
]


@pytest.mark.parametrize(("content", "words"), STATES)
def test_a_damaged_state_is_refused(content: bytes, words: str, tmp_path: Path) -> None:
    from ctxprune.evals.state import Finished

    path = tmp_path / "state.json"
    path.write_bytes(content)
    with pytest.raises(CtxpruneError) as caught:
        Finished(path)
    assert "state.json" in caught.value.message and words in caught.value.message
    assert "delete it" in caught.value.hint


KEPT: list[tuple[Any, str]] = [
    ({}, "sparsity"),
    ({"sparsity": 0.5}, "values"),
    ({"sparsity": "0.5", "values": {}}, "sparsity"),
    ({"sparsity": 0.5, "values": {"nll": 3}}, "values.nll"),
    ({"sparsity": 0.5, "values": {"nll": []}}, "values.nll"),
    ({"sparsity": 0.5, "values": {"nll": [None]}}, "values.nll[0]"),
    ({"sparsity": 0.5, "values": {"nll": [math.nan]}}, "values.nll[0]"),
]


@pytest.mark.parametrize(("result", "words"), KEPT)
def test_a_kept_result_that_is_damaged_is_refused(result: Any, words: str, tmp_path: Path) -> None:
    from ctxprune.evals.quality.evaluate import Figures
    from ctxprune.evals.state import Finished

    path = tmp_path / "state.json"
    path.write_text(json.dumps({"a": {"label": "x", "date": "d", "result": result}}))
    finished = Finished(path)
    with pytest.raises(CtxpruneError, match="state.json") as caught:
        finished.get("a", Figures)
    assert f"`{words}`" in caught.value.message


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_json_never_holds_what_is_no_number(number: float) -> None:
    from ctxprune.evals.quality.accuracy import finite

    with pytest.raises(CtxpruneError) as caught:
        typed.dumps({"levels": [{"tasks": {"x": {"acc": number}}}]})
    assert "levels[0].tasks.x.acc" in caught.value.message
    values = {"acc": [1.0], "mcc": [0.0, number]}
    told = finite({"acc": 1.0, "mcc": number, "n": 2, "values": values})
    assert told == {
        **{"acc": 1.0, "mcc": None, "n": 2, "not_finite": {"mcc": str(number)}},
        "values": {"acc": [1.0]},
    }
    json.loads(typed.dumps(told))
