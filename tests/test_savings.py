"""What a cache saves: foretold without weights, and said so that nobody takes it for another."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import zoo
from conftest import FAMILIES, tiny_model

from ctxprune.pruner.config import PruneConfig
from ctxprune.pruner.engine.footprint import footprints
from ctxprune.pruner.engine.handle import attach, new_gates
from ctxprune.pruner.gate import Gate
from ctxprune.pruner.savings import Savings

LENGTHS = (40, 200, 333)


def attached(model: Any, gates: Any, **changes: Any) -> Any:
    """The handle of a model whose layers keep unequally much."""
    count = len(gates)
    levels = {0.8: tuple(0.1 + 0.2 * i / max(count - 1, 1) for i in range(count))}
    config = PruneConfig(rank=8, context=128, levels=levels, **changes)
    return attach(model, gates, config)


def sketched(model: Any, **changes: Any) -> Any:
    """The same without numbers."""
    with torch.device("meta"):
        twin = type(model)(model.config)
        gates = torch.nn.ModuleList(Gate(gate.query.in_features, 8) for gate in model_gates(model))
    return attached(twin, gates, **changes)


def model_gates(model: Any) -> Any:
    return new_gates(model, PruneConfig(rank=8))


@pytest.mark.parametrize("policy", ["gate", "h2o", "sink"])
@pytest.mark.parametrize("max_rows", [None, 48])
@pytest.mark.parametrize("name", [*FAMILIES, "gemma3_text", "deepseek_v3", "mistral"])
def test_a_footprint_is_what_a_text_takes(name: str, policy: str, max_rows: int | None) -> None:
    dtype = torch.float32
    model: Any = tiny_model(name) if name in FAMILIES else zoo.tiny(name, dtype=dtype)
    handle, twin = attached(model, model_gates(model)), sketched(model)
    for each in (handle, twin):
        each.use(policy, 0.8, max_rows=max_rows)
    foretold = footprints(twin, LENGTHS, dtype)
    for tokens in LENGTHS:
        ids = torch.randint(1, 200, (1, tokens))
        with torch.no_grad(), handle.running(handle.at(tokens)):
            cache = handle.cache()
            model(ids, past_key_values=cache)
        assert foretold[tokens] == cache.savings


@pytest.mark.parametrize(
    ("kv", "dense", "even", "words"),
    [
        (10, 20, 40, None),
        (20, 20, 40, "from 40 tokens on it is smaller than dense"),
        (30, 20, 40, "from 40 tokens on it is smaller than dense"),
        (30, 20, None, "a page has a constant size"),
    ],
)
def test_more_memory_than_dense_has_a_reason(
    kv: int, dense: int, even: int | None, words: str | None
) -> None:
    savings = Savings(20, 0.75, 15.0, 64.0, kv * 10**6, dense * 10**6, even)
    assert savings.memory.startswith(f"cache {kv}.00 MB, dense {dense}.00 MB")
    if words is None:
        assert "page" not in savings.memory
    else:
        assert words in savings.memory and "room for 64 rows" in savings.memory


def test_a_share_is_said_in_the_terms_of_kvpress() -> None:
    savings = Savings(1000, 0.11, 110.0, 128.0, 1, 2, 3)
    assert savings.left == (
        "110 rows a layer are left of 1,000: 11%; kvpress calls that compression_ratio 0.89"
    )
    assert savings.compression_ratio == pytest.approx(0.89)


def test_from_where_on_a_page_is_smaller() -> None:
    model: Any = tiny_model("llama")
    handle = attached(model, model_gates(model))
    handle.use("gate", 0.8, context=400)
    cache = handle.cache()
    with torch.no_grad():
        model(torch.ones(1, 30, dtype=torch.int64), past_key_values=cache)
    even = cache.savings.even_at
    assert even is not None and even > 30
    assert cache.dense_bytes(even - 1) <= cache.nbytes < cache.dense_bytes(even)
