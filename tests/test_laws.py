"""The invariants: every policy, every family, fp32 and fp64 (docs/architecture.md lists them)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FAMILIES, VOCABULARY, tiny_model
from test_budget import rows_at
from torch import Tensor
from transformers import PreTrainedModel

from ctxprune.pruner import policies
from ctxprune.pruner.checkpoints.checkpoint import load
from ctxprune.pruner.checkpoints.convert import convert
from ctxprune.pruner.checkpoints.export import export
from ctxprune.pruner.config import PruneConfig
from ctxprune.pruner.engine import soft as soft_module
from ctxprune.pruner.engine.cache import PrunedCache
from ctxprune.pruner.engine.handle import Handle, attach, new_gates
from ctxprune.pruner.engine.soft import Level, SoftAttention, prior

POLICIES = policies.names()
DTYPES = {"float32": (torch.float32, 2e-4), "float64": (torch.float64, 1e-10)}
LENGTH = 200
NEVER = torch.iinfo(torch.int64).max

matrix = pytest.mark.parametrize("family", FAMILIES)
every_policy = pytest.mark.parametrize("policy", POLICIES)
every_dtype = pytest.mark.parametrize("dtype", DTYPES)


def pruning_model(family: str, dtype: str = "float64") -> tuple[PreTrainedModel, Handle]:
    """A tiny model whose gates decide by content: trained ones would be slower to come by."""
    model = tiny_model(family).to(DTYPES[dtype][0])  # type: ignore[arg-type]
    levels = {0.5: (0.7, 0.5, 0.3), 0.8: (0.2, 0.34, 0.06)}
    config = PruneConfig(rank=8, protect_first=2, protect_recent=3, context=LENGTH, levels=levels)
    gates = new_gates(model, config).to(torch.float64 if dtype == "float64" else torch.float32)
    torch.manual_seed(1)
    for gate in gates:
        torch.nn.init.normal_(gate.key.weight, std=0.15)
    return model, attach(model, gates, config)


def margin_alone(handle: Handle) -> PruneConfig:
    """The handle's configuration, but for the bonus."""
    return replace(handle.config, attention_bonus=0.0)


def random_ids(batch: int, length: int, seed: int = 0) -> Tensor:
    """(batch, length) ids."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, VOCABULARY, (batch, length), generator=generator)


@torch.no_grad()
def logits_of(model: PreTrainedModel, ids: Tensor, **options: object) -> Tensor:
    """Logits (b, n, vocabulary) in one pass."""
    out: Tensor = model(ids, **options).logits
    return out


@torch.no_grad()
def step_by_step(
    model: PreTrainedModel, ids: Tensor, handle: Handle
) -> tuple[Tensor, list[Tensor]]:
    """Logits token by token, and expires (b, n) a layer."""
    cache = handle.cache(record=True)
    steps = [
        model(ids[:, t : t + 1], past_key_values=cache, use_cache=True).logits
        for t in range(ids.shape[1])
    ]
    assert cache.expires is not None
    return torch.cat(steps, dim=1), cache.expires


@matrix
@every_dtype
@every_policy
def test_dropping_nothing_is_the_dense_model(family: str, dtype: str, policy: str) -> None:
    model, handle = pruning_model(family, dtype)
    ids = random_ids(2, LENGTH)
    dense = logits_of(model, ids)
    handle.use(policy, 0.0)
    assert torch.equal(logits_of(model, ids), dense)
    # Through the engine, at a sparsity that leaves room for all.
    handle.use(policy, 1e-9, context=LENGTH)
    with handle.measure() as usage:
        engine = logits_of(model, ids)
    assert usage.evicted == 0
    torch.testing.assert_close(engine, dense, atol=DTYPES[dtype][1], rtol=0)


@matrix
@pytest.mark.parametrize("side", ["left", "right"])
def test_dropping_nothing_is_the_dense_model_with_padding(family: str, side: str) -> None:
    model, handle = pruning_model(family)
    ids = random_ids(3, 60)
    mask = torch.ones_like(ids)
    mask[1, :25], mask[2, :59] = 0, 0
    if side == "right":
        mask = mask.flip(1)
    dense = logits_of(
        model, ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp_min(0)
    )
    handle.use("window", 1e-9, context=60)
    engine = logits_of(model, ids, attention_mask=mask)
    torch.testing.assert_close(engine[mask == 1], dense[mask == 1], atol=1e-10, rtol=0)


@matrix
@every_dtype
@every_policy
def test_one_pass_is_token_by_token_is_any_block(family: str, dtype: str, policy: str) -> None:
    model, handle = pruning_model(family, dtype)
    handle.use(policy, 0.7, context=LENGTH)
    ids = random_ids(2, LENGTH)
    with handle.measure() as usage:
        whole = logits_of(model, ids)
    assert 0.3 < usage.sparsity < 0.95
    stepped, expires = step_by_step(model, ids, handle)
    torch.testing.assert_close(stepped, whole, atol=DTYPES[dtype][1], rtol=0)
    for block in (1, 7, 1000):
        handle.block = block
        cache = handle.cache(record=True)
        again = logits_of(model, ids, past_key_values=cache)
        torch.testing.assert_close(again, whole, atol=DTYPES[dtype][1], rtol=0)
        assert cache.expires is not None
        for layer, expected in enumerate(expires):
            assert torch.equal(cache.expires[layer], expected)


@dataclass
class Noting(SoftAttention):
    """Training's attention that also notes what the first layer attends with."""

    def attend(self, *args: Any, **options: Any) -> Tensor:
        """As in training."""
        _, _, layer, *attended, _ = args
        if layer == 0:
            self.first = attended
        return super().attend(*args, **options)


def contribution_by_hand(
    query: Tensor, key: Tensor, value: Tensor, k: int, held: list[int]
) -> Tensor:
    """What query k takes from each token that is held: its attention times the norm of its value.

    query (h, n, d), key and value (h_kv, n, d); returns (held,), both factors means over heads.
    """
    key = key.repeat_interleave(len(query) // len(key), dim=0)
    logits = key[:, held] @ query[:, k, :, None] * query.shape[-1] ** -0.5
    attention = logits.softmax(dim=1).mean(dim=0)[:, 0]
    return attention * value[:, held].norm(dim=-1).mean(dim=0)


def ranked_by_hand(
    margins: Tensor,
    contribution: Callable[[int, list[int]], Tensor],
    bonus: float,
    rows: Callable[[int], int],
    period: int,
    first: int,
) -> Tensor:
    """expires (n,) of one layer and sequence, from the rule as docs/method.md writes it.

    Args:
        margins: (n, n), [k, j] the least score of token j over the queries up to k.
        contribution: of the held tokens to a query k, (held,).
        rows: that stay after so many tokens.
    """
    length = len(margins)
    held: list[int] = []
    received = torch.zeros(length, dtype=margins.dtype)
    expires = torch.full((length,), NEVER)
    for k in range(length):
        held.append(k)
        received[held] += contribution(k, held)
        if (k + 1) % period == 0:
            score = (margins[k] + bonus * received.log()).tolist()
            worth = sorted(held, key=lambda j: (j >= first, -score[j], -j))
            stay = rows(k + 1)
            for j in worth[stay:]:
                expires[j] = k + 1
            held = sorted(worth[:stay])
    return expires


@matrix
@pytest.mark.parametrize("bonus", [0.0, 1.0])
def test_eviction_is_the_ranking_written_out(family: str, bonus: float) -> None:
    """The first layer, whose input no eviction changes, by the equations and a Python loop."""
    model, handle = pruning_model(family)
    handle.config = replace(handle.config, attention_bonus=bonus)
    ids = random_ids(2, LENGTH)
    soft = Noting(Level(prior(0.8, LENGTH)), margin_alone(handle), hard=True)
    soft.scores = {}
    with handle.running(soft):
        logits_of(model, ids, use_cache=False)
    handle.use("gate", 0.8, context=LENGTH)
    assert handle.policy is not None and handle.policy.budget is not None
    budget = handle.policy.budget
    cache = handle.cache(record=True)
    logits_of(model, ids, past_key_values=cache)
    assert cache.expires is not None
    for sequence, margins in enumerate(soft.scores[0]):
        contribution = partial(contribution_by_hand, *(t[sequence] for t in soft.first))
        expected = ranked_by_hand(
            margins, contribution, bonus, partial(rows_at, budget, 0), int(budget.period(0)), 2
        )
        assert torch.equal(cache.expires[0][sequence], expected)


@matrix
def test_training_with_hard_decisions_is_inference(family: str) -> None:
    """A threshold low enough to drop nothing: the margins of all layers are those of the engine."""
    model, handle = pruning_model(family)
    ids = random_ids(2, LENGTH)
    level = Level(prior(0.8, LENGTH), 1e3)
    soft = SoftAttention(level, margin_alone(handle), hard=True)
    soft.scores = {}
    with handle.running(soft):
        parallel = logits_of(model, ids, use_cache=False)
    handle.use("gate", 1e-9, context=LENGTH)
    cache = handle.cache()
    engine = logits_of(model, ids, past_key_values=cache)
    torch.testing.assert_close(parallel, engine, atol=1e-10, rtol=0)
    seen = LENGTH // 16 * 16  # what the engine has digested
    for layer, least in soft.scores.items():
        table = cache.table(layer)
        order = table.held.argsort(dim=1)
        margins = table.vector("margin").gather(1, order)[:, :seen]
        constant = handle.gate_list[layer].slope * level.log_window + level.shift
        # Attention sinks have no margin in training; at inference they are spared by `score`.
        torch.testing.assert_close((margins + constant)[:, 2:], least[:, seen - 1, 2:seen])


@matrix
@pytest.mark.parametrize("chunk", [16, 128])
def test_training_sees_the_bonus_of_inference(
    family: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where nothing is dropped: what it adds to the margins of the last query, but for its mean."""
    monkeypatch.setattr(soft_module, "CHUNK", chunk)
    model, handle = pruning_model(family)
    ids = random_ids(2, LENGTH)
    scores = []
    for bonus in (0.0, 0.5):
        level = Level(prior(0.8, LENGTH), 1e3)
        config = replace(handle.config, attention_bonus=bonus)
        soft = SoftAttention(level, config, hard=True)
        soft.scores = {}
        with handle.running(soft):
            logits_of(model, ids, use_cache=False)
        scores.append(soft.scores)
    handle.use("gate", 1e-9, context=LENGTH)
    cache = handle.cache()
    logits_of(model, ids, past_key_values=cache)
    for layer in range(len(handle.gate_list)):
        table = cache.table(layer)
        size = table.column("value").norm(dim=-1).mean(dim=1)
        used = (table.vector("attention") * size).log()
        used = used.gather(1, table.held.argsort(dim=1))[:, :LENGTH]
        expected = 0.5 * (used - used[:, 2:].mean(dim=1, keepdim=True))
        added = (scores[1][layer] - scores[0][layer])[:, -1]
        # Sinks and the newest are protected, by a margin that is infinite.
        torch.testing.assert_close(added[:, 2:-3], expected[:, 2:-3])


@matrix
def test_soft_attention_hardens_to_the_threshold(family: str) -> None:
    model, handle = pruning_model(family)
    ids = random_ids(2, 80)
    level = Level(prior(0.7, 80))
    with handle.training(SoftAttention(level, handle.config, hard=True)):
        hard = logits_of(model, ids, use_cache=False)
    distances = []
    for sharpness in (1.0, 30.0, 1e9):
        with handle.training(SoftAttention(level, handle.config, sharpness=sharpness)):
            distances.append(float((logits_of(model, ids, use_cache=False) - hard).abs().max()))
    assert distances[0] > distances[2]
    assert distances[2] < 1e-3


@pytest.mark.parametrize("length", [40, 80, 200, 1000])
@pytest.mark.parametrize("policy", ["gate", "h2o", "random", "window", "sink"])
def test_a_sparsity_is_met_at_any_length(policy: str, length: int) -> None:
    model, handle = pruning_model("llama")
    handle.use(policy, 0.8, context=length)
    with handle.measure() as usage:
        logits_of(model, random_ids(2, length))
    assert usage.sparsity == pytest.approx(0.8, abs=0.01 if length > 50 else 0.04)


@matrix
@every_policy
def test_a_dropped_row_is_gone(family: str, policy: str) -> None:
    model, handle = pruning_model(family)
    handle.use(policy, 0.8, context=LENGTH)
    handle.block = LENGTH  # all rows at once: the table is as large as a dense cache, then shrinks
    ids = random_ids(2, LENGTH)
    cache = handle.cache()
    with torch.no_grad():
        model(ids, past_key_values=cache, use_cache=True)
    dense_bytes = 2 * 2 * LENGTH * model.config.num_hidden_layers * 8
    dense_bytes *= model.config.hidden_size if family == "gpt2" else 16
    assert cache.nbytes < 0.75 * dense_bytes
    before = cache.nbytes
    # Free slots hold the remains of evicted rows: whatever stands there must not matter.
    for table in cache.tables():
        assert table.position is not None and bool((table.position < 0).any())
        for column in table.columns.values():
            free = (table.position < 0)[:, None, :, None].expand_as(column)
            column[free] = 1e3 * torch.randn(int(free.sum()), dtype=column.dtype)
    more = random_ids(2, 12, seed=3)
    with torch.no_grad():
        poisoned = model(more, past_key_values=cache, use_cache=True).logits
    whole = logits_of(model, torch.cat([ids, more], dim=1))[:, LENGTH:]
    torch.testing.assert_close(poisoned, whole, atol=1e-10, rtol=0)
    assert before == pytest.approx(cache.nbytes, rel=0.5)


@matrix
@every_policy
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_ragged_batch_is_each_text_alone(family: str, policy: str, side: str) -> None:
    model, handle = pruning_model(family)
    handle.use(policy, 0.7, context=LENGTH)
    lengths = (LENGTH, 131, 40)
    ids = random_ids(3, LENGTH)
    mask = torch.zeros_like(ids)
    for b, length in enumerate(lengths):
        mask[b, -length:] = 1
    if side == "right":
        mask = mask.flip(1)
    with handle.measure() as usage:
        together = logits_of(model, ids, attention_mask=mask)
    with handle.measure() as apart:
        for b, _ in enumerate(lengths):
            own = mask[b] == 1
            alone = logits_of(model, ids[b : b + 1, own])[0]
            torch.testing.assert_close(together[b, own], alone, atol=1e-10, rtol=0)
    assert (usage.pairs, usage.evicted) == (apart.pairs, apart.evicted)


@matrix
@every_policy
def test_generating_is_scoring(family: str, policy: str) -> None:
    model, handle = pruning_model(family)
    handle.use(policy, 0.7, context=LENGTH)
    prompts = random_ids(2, 50)
    mask = torch.ones_like(prompts)
    mask[1, :20] = 0
    out = model.generate(
        prompts, attention_mask=mask, max_new_tokens=120, do_sample=False, eos_token_id=None,
        pad_token_id=0,
    )  # fmt: skip
    full = torch.cat([mask, torch.ones(2, 120, dtype=mask.dtype)], dim=1)
    scored = logits_of(model, out, attention_mask=full)[:, 49:-1].argmax(dim=-1)
    assert torch.equal(scored, out[:, 50:])
    assert handle.last_cache is not None and handle.last_cache.sparsity > 0.3


@matrix
def test_a_long_run_stays_right(family: str) -> None:
    """Growth, slot reuse and compaction over a thousand single steps."""
    model, handle = pruning_model(family)
    handle.use("gate", 0.8)
    ids = random_ids(2, 1000)
    stepped, _ = step_by_step(model, ids, handle)
    torch.testing.assert_close(stepped, logits_of(model, ids), atol=1e-10, rtol=0)


@matrix
def test_convert_save_load_export_load_is_exact(
    family: str, tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    converted = tiny_folder(family)
    first = load(converted)
    second = load(export(converted, tmp_path / "exported", force=True))
    original = tiny_model(family).state_dict()
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, original[name])
        assert torch.equal(tensor, second.state_dict()[name])
    gates, again = first.ctxprune.gates.state_dict(), second.ctxprune.gates.state_dict()
    assert set(gates) == {
        f"{layer}.{name}"
        for layer in range(3)
        for name in ("query.weight", "key.weight", "slope", "bias")
    }
    fresh = new_gates(tiny_model(family), first.ctxprune.config).state_dict()
    for name, tensor in gates.items():
        assert torch.equal(tensor, fresh[name]) and torch.equal(tensor, again[name])
    ids = random_ids(1, 50)
    assert torch.equal(logits_of(first, ids), logits_of(second, ids))


@matrix
@every_policy
def test_later_tokens_change_nothing_before_them(family: str, policy: str) -> None:
    model, handle = pruning_model(family)
    handle.use(policy, 0.7, context=LENGTH)
    ids = random_ids(1, LENGTH)
    other = torch.cat([ids[:, :90], random_ids(1, LENGTH - 90, seed=9)], dim=1)
    first, second = logits_of(model, ids)[:, :90], logits_of(model, other)[:, :90]
    torch.testing.assert_close(first, second, atol=1e-10, rtol=0)


@matrix
@every_policy
def test_what_was_dropped_stays_dropped(family: str, policy: str) -> None:
    """Rows of a layer at each step: those of the step before, or fewer, and the new one."""
    model, handle = pruning_model(family)
    handle.use(policy, 0.7, context=LENGTH)
    cache = handle.cache()
    assert isinstance(cache, PrunedCache)
    ids = random_ids(2, 120)
    held: dict[tuple[int, int], set[int]] = {}
    dropped = 0
    with torch.no_grad():
        for at in range(120):
            model(ids[:, at : at + 1], past_key_values=cache, use_cache=True)
            for layer, table in enumerate(cache.tables()):
                for b in range(2):
                    now = {p for p in table.held[b].tolist() if p >= 0}
                    assert len(now) == int((table.held[b] >= 0).sum())
                    before = held.get((layer, b), set())
                    assert now <= before | {at}
                    dropped += len((before | {at}) - now)
                    held[layer, b] = now
    assert dropped > 3 * 2 * 120 * 0.4


@every_policy
def test_a_saved_model_prunes_as_before(
    policy: str, dense_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    settings = {"rank": 8, "context": 128, "levels": {0.5: (0.5,) * 3}, "tuned": 0.5}
    folder = convert(str(dense_folder("llama")), tmp_path / "a", {**settings, "max_rows": 64})
    again = export(folder, tmp_path / "b")
    ids = random_ids(1, 150)
    logits = []
    for saved in (folder, again):
        model = load(saved, policy=policy)
        cache = model.ctxprune.cache()
        logits.append(logits_of(model, ids, past_key_values=cache))
        assert max(int(table.rows().max()) for table in cache.tables()) <= 64
    assert torch.equal(*logits)
    assert not torch.equal(logits[0], logits_of(load(folder, sparsity=0.0, max_rows=0), ids))


@every_policy
def test_no_more_blocks_wait_than_a_period_has(policy: str) -> None:
    """What was read and digested, or never will be, is not kept."""
    model, handle = pruning_model("llama")
    handle.use(policy, 0.7, context=LENGTH)
    cache = handle.cache()
    assert isinstance(cache, PrunedCache) and handle.policy is not None
    budget = handle.policy.budget
    periods = [1, 1, 1] if budget is None else [of_one for (of_one,) in budget.periods]
    ids = random_ids(1, 100)
    with torch.no_grad():
        for at in range(100):
            model(ids[:, at : at + 1], past_key_values=cache, use_cache=True)
            for layer, period in enumerate(periods):
                assert len(cache.layer(layer).waiting) < period


@matrix
def test_a_layer_of_more_rows_evicts_less_often(family: str) -> None:
    """Rows leave at the borders of their layer, which also hold where the text comes in pieces."""
    model, handle = pruning_model(family)
    handle.use("gate", 0.8, context=LENGTH)
    assert handle.policy is not None and handle.policy.budget is not None
    budget = handle.policy.budget
    periods = [of_one for (of_one,) in budget.periods]
    rows = [rows_at(budget, layer, LENGTH) for layer in range(3)]
    most, *_, fewest = sorted(range(3), key=rows.__getitem__, reverse=True)
    assert periods[most] > periods[fewest]
    ids = random_ids(2, LENGTH)
    cache = handle.cache(record=True)
    for part in ids.split(7, dim=1):
        logits_of(model, part, past_key_values=cache)
    assert cache.expires is not None
    never = torch.iinfo(torch.int64).max
    for period, expires in zip(periods, cache.expires, strict=True):
        left = expires[expires < never]
        assert len(left) and not (left % period).any()
        assert (left % (2 * period)).any()
