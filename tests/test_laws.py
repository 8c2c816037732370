"""The invariants: every policy, every family, fp32 and fp64, rows leaving while a prompt is read or
after it (docs/how/architecture.md lists them).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import naive
import pytest
import torch
from conftest import FAMILIES, VOCABULARY, tiny_model
from torch import Tensor
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from ctxprune.pruner import policies
from ctxprune.pruner.checkpoints.checkpoint import load
from ctxprune.pruner.checkpoints.convert import convert
from ctxprune.pruner.checkpoints.export import export
from ctxprune.pruner.config import PROTOCOLS, PruneConfig
from ctxprune.pruner.engine import soft as soft_module
from ctxprune.pruner.engine.cache import PrunedCache
from ctxprune.pruner.engine.handle import GATES, Handle, attach, new_gates
from ctxprune.pruner.engine.page import Page
from ctxprune.pruner.engine.soft import Level, SoftAttention, prior
from ctxprune.pruner.policies.strided import StridedPolicy
from ctxprune.pruner.rows import Rows

POLICIES = policies.names()
DTYPES = {"float32": (torch.float32, 2e-4), "float64": (torch.float64, 1e-10)}
LENGTH = 200
PROMPT = 120
NEVER = naive.NEVER

matrix = pytest.mark.parametrize("family", FAMILIES)
every_policy = pytest.mark.parametrize("policy", POLICIES)
every_dtype = pytest.mark.parametrize("dtype", DTYPES)
every_protocol = pytest.mark.parametrize("evict", PROTOCOLS)


def pruning_model(family: str, dtype: str = "float64") -> tuple[PreTrainedModel, Handle]:
    """A tiny model whose gates decide by content: trained ones would be slower to come by."""
    model = tiny_model(family)
    levels = {0.5: (0.7, 0.5, 0.3), 0.8: (0.2, 0.34, 0.06)}
    config = PruneConfig(rank=8, protect_first=2, protect_recent=3, context=LENGTH, levels=levels)
    gates = new_gates(model, config)
    torch.manual_seed(1)
    for gate in gates:
        torch.nn.init.normal_(gate.key.weight, std=0.15)
    handle = attach(model, gates, config)
    model.to(DTYPES[dtype][0])  # type: ignore[arg-type]
    return model, handle


def margin_alone(handle: Handle) -> PruneConfig:
    """The handle's configuration, but for the bonus."""
    return replace(handle.config, attention_bonus=0.0)


def random_ids(batch: int, length: int, seed: int = 0) -> Tensor:
    """(batch, length) ids."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, VOCABULARY, (batch, length), generator=generator)


def distinct_ids(batch: int, length: int) -> Tensor:
    """(batch, length) ids, each once: rotated keys of the same token are equally long, so rounding
    would choose between them.
    """
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randperm(VOCABULARY - 1, generator=generator) for _ in range(batch)]
    return torch.stack(drawn)[:, :length] + 1


def padded(mask: Tensor, start: int = 0, stop: int | None = None) -> dict[str, Tensor]:
    """The arguments for columns `start` to `stop` of a batch with a mask (b, n)."""
    position = (mask.cumsum(1) - 1).clamp_min(0)
    return {"attention_mask": mask[:, :stop], "position_ids": position[:, start:stop]}


def mask_of(lengths: Sequence[int], columns: int, side: str = "left") -> Tensor:
    """(b, columns) of texts of these lengths; `both`: with padding on either side."""
    mask = torch.zeros(len(lengths), columns, dtype=torch.int64)
    for b, length in enumerate(lengths):
        first = {"left": columns - length, "right": 0, "both": (columns - length) // 2}[side]
        mask[b, first : first + length] = 1
    return mask


@torch.no_grad()
def logits_of(model: PreTrainedModel, ids: Tensor, **options: object) -> Tensor:
    """Logits (b, n, vocabulary) in one pass."""
    out: Tensor = model(ids, **options).logits
    return out


@torch.no_grad()
def in_parts(
    model: PreTrainedModel,
    ids: Tensor,
    cache: PrunedCache,
    parts: Sequence[int] | int = 1,
    mask: Tensor | None = None,
) -> Tensor:
    """Logits (b, n, vocabulary) in passes that end at the columns `parts`, or of that length."""
    length = ids.shape[1]
    ends = list(range(parts, length, parts)) if isinstance(parts, int) else list(parts)
    outs, start = [], 0
    for stop in [*ends, length]:
        options = {} if mask is None else padded(mask, start, stop)
        part = ids[:, start:stop]
        outs.append(model(part, past_key_values=cache, use_cache=True, **options).logits)
        start = stop
    return torch.cat(outs, dim=1)


def recording(handle: Handle) -> PrunedCache:
    """A fresh cache that records when rows leave."""
    cache = handle.cache(record=True)
    assert isinstance(cache, PrunedCache)
    return cache


def expires_of(cache: PrunedCache) -> list[Tensor]:
    """What a cache has recorded, a layer each."""
    assert cache.expires is not None
    return cache.expires


def held_by(cache: PrunedCache, page: Page, sequence: int) -> list[int]:
    """Positions of the rows that a sequence holds: those that no step has seen are the newest."""
    used, settled, seen = (of[sequence] for of in (page.used, page.settled, cache.seen))
    return page.position[sequence, :settled].tolist() + list(range(seen - used + settled, seen))


def in_order(page: Page, *columns: str) -> list[Tensor]:
    """What a page keeps of the rows that a step has seen, each (b, rows), by position."""
    held = page.held(None, page.settled[0])
    order = held.position.argsort(dim=1)
    return [held.columns[name].gather(1, order) for name in columns]


@matrix
@every_dtype
@every_policy
def test_dropping_nothing_is_the_dense_model(family: str, dtype: str, policy: str) -> None:
    model, handle = pruning_model(family, dtype)
    ids = random_ids(2, LENGTH)
    dense = logits_of(model, ids)
    handle.use(policy, 0.0)
    assert torch.equal(logits_of(model, ids), dense)
    # Through the engine, at a sparsity that leaves room for all, and with a cap that does.
    handle.use(policy, 1e-9, context=LENGTH)
    with handle.measure() as usage:
        engine = logits_of(model, ids)
        stepped = in_parts(model, ids, recording(handle))
    assert usage.evicted == 0
    torch.testing.assert_close(engine, dense, atol=DTYPES[dtype][1], rtol=0)
    torch.testing.assert_close(stepped, dense, atol=DTYPES[dtype][1], rtol=0)
    handle.use(policy, 0.0, max_rows=LENGTH + 16)
    capped = logits_of(model, ids)
    torch.testing.assert_close(capped, dense, atol=DTYPES[dtype][1], rtol=0)


@matrix
@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_dropping_nothing_is_the_dense_model_with_padding(family: str, side: str) -> None:
    model, handle = pruning_model(family)
    ids, mask = random_ids(3, 60), mask_of((60, 35, 1), 60, side)
    dense = logits_of(model, ids, **padded(mask))
    handle.use("window", 1e-9, context=60)
    engine = logits_of(model, ids, **padded(mask))
    torch.testing.assert_close(engine[mask == 1], dense[mask == 1], atol=1e-10, rtol=0)


@matrix
@every_dtype
@every_policy
@every_protocol
def test_one_pass_is_token_by_token_is_any_block(
    family: str, dtype: str, policy: str, evict: str
) -> None:
    model, handle = pruning_model(family, dtype)
    handle.use(policy, 0.7, context=LENGTH, evict=evict, prompt=PROMPT)
    ids = distinct_ids(2, LENGTH)
    with handle.measure() as usage:
        whole = logits_of(model, ids)
    assert 0.3 < usage.sparsity < 0.95
    stepped = recording(handle)
    found = {"step by step": (stepped, in_parts(model, ids, stepped))}
    for parts in (7, (37, 38, PROMPT - 1, PROMPT), (PROMPT, 150)):
        cache = recording(handle)
        found[f"parts {parts}"] = (cache, in_parts(model, ids, cache, parts))
    for block in (1, 7, 1000):
        handle.block = block
        cache = recording(handle)
        found[f"blocks of {block}"] = (cache, in_parts(model, ids, cache, ()))
    for name, (cache, logits) in found.items():
        torch.testing.assert_close(
            logits, whole, atol=DTYPES[dtype][1], rtol=0, msg=lambda m, n=name: f"{n}: {m}"
        )
        for layer, expected in enumerate(expires_of(stepped)):
            assert torch.equal(expires_of(cache)[layer], expected), name
    if evict == "prompt":
        assert all(bool((of >= PROMPT).all()) for of in expires_of(stepped))


@dataclass
class Noting(SoftAttention):
    """Training's attention that also notes what the first layer attends with."""

    def attend(self, *args: Any, **options: Any) -> Tensor:
        """As in training."""
        _, _, layer, *attended, _ = args
        if layer == 0:
            self.first = attended
        return super().attend(*args, **options)


def by_hand(policy: str, handle: Handle) -> naive.Score:
    """What rows are worth to a policy, in plain loops."""
    config = handle.config
    if policy == "strided":
        assert isinstance(handle.policy, StridedPolicy)
        return naive.strided(int(handle.policy.strides))
    made: dict[str, naive.Score] = {
        "gate": naive.gate(config.attention_bonus, config.protect_first),
        "h2o": naive.h2o,
        "knorm": naive.knorm,
        "random": naive.random(config.protect_first, config.protect_recent),
        "sink": naive.window(config.protect_first),
        "snapkv": naive.snapkv,
        "tova": naive.tova,
        "window": naive.window(0),
    }
    return made[policy]


def rows_of(handle: Handle) -> Rows:
    """Of the policy that was chosen."""
    assert handle.policy is not None and handle.policy.rows is not None
    return handle.policy.rows


@matrix
@every_protocol
@pytest.mark.parametrize(("policy", "bonus"), [("gate", 0.0), *((name, 1.0) for name in POLICIES)])
def test_eviction_is_the_ranking_written_out(
    family: str, policy: str, bonus: float, evict: str
) -> None:
    """The first layer, whose input no eviction changes, by the equations and Python loops."""
    model, handle = pruning_model(family)
    handle.config = replace(handle.config, attention_bonus=bonus)
    ids = distinct_ids(2, LENGTH)
    soft = Noting(Level(prior(0.8, LENGTH)), margin_alone(handle), hard=True)
    soft.scores = {}
    with handle.running(soft):
        logits_of(model, ids, use_cache=False)
    handle.use(policy, 0.8, context=LENGTH, evict=evict, prompt=PROMPT)
    cache = recording(handle)
    logits_of(model, ids, past_key_values=cache)
    rows = rows_of(handle)
    interval = rows.interval(0, 0)
    steps = set(range(interval, LENGTH + 1, interval))
    if evict == "prompt":
        # The last 64 tokens of the prompt observe it.
        steps = {PROMPT - 64, PROMPT, *(step for step in steps if step > PROMPT)}

    def stay(seen: int) -> int:
        return seen if evict == "prompt" and seen < PROMPT else rows.after(0, 0, seen)

    for sequence, margins in enumerate(soft.scores[0]):
        layer = naive.Layer(*(t[sequence] for t in soft.first), margins)
        expected = naive.expires(layer, by_hand(policy, handle), steps, stay)
        assert int((expected < NEVER).sum()) > LENGTH // 2
        assert torch.equal(expires_of(cache)[0][sequence], expected)


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
    cache = recording(handle)
    engine = logits_of(model, ids, past_key_values=cache)
    torch.testing.assert_close(parallel, engine, atol=1e-10, rtol=0)
    for layer, least in soft.scores.items():
        page = cache.pages[layer]
        seen = page.settled[0]
        assert seen > LENGTH - 64
        (margins,) = in_order(page, "margin")
        constant = handle.gate_list[layer].slope * level.log_window + level.shift
        # Attention sinks have no margin in training; at inference they are spared by `score`.
        torch.testing.assert_close((margins + constant)[:, 2:], least[:, seen - 1, 2:seen])


@matrix
@pytest.mark.parametrize("chunk", [16, 128])
def test_training_sees_the_bonus_of_inference(
    family: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where nothing is dropped: what it adds to the margins of a query, but for its mean."""
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
    cache = recording(handle)
    logits_of(model, ids, past_key_values=cache)
    for layer, page in enumerate(cache.pages):
        received, size = in_order(page, "received", "size")
        used = (received * size).log()
        expected = 0.5 * (used - used[:, 2:].mean(dim=1, keepdim=True))
        last = page.settled[0] - 1
        added = (scores[1][layer] - scores[0][layer])[:, last, : last + 1]
        # Sinks and the newest are protected, by a margin that is infinite.
        torch.testing.assert_close(added[:, 2:-3], expected[:, 2:-3])


@matrix
def test_soft_attention_hardens_to_the_threshold(family: str) -> None:
    model, handle = pruning_model(family)
    ids = random_ids(2, 80)
    level = Level(prior(0.7, 80))
    with handle.running(SoftAttention(level, handle.config, hard=True)):
        hard = logits_of(model, ids, use_cache=False)
    distances = []
    for sharpness in (1.0, 30.0, 1e9):
        with handle.running(SoftAttention(level, handle.config, sharpness=sharpness)):
            distances.append(float((logits_of(model, ids, use_cache=False) - hard).abs().max()))
    assert distances[0] > distances[2]
    assert distances[2] < 1e-3


@pytest.mark.parametrize("length", [40, 80, 200, 1000])
@every_policy
def test_a_sparsity_is_met_at_any_length(policy: str, length: int) -> None:
    model, handle = pruning_model("llama", "float32")
    handle.use(policy, 0.8, context=length)
    with handle.measure() as usage:
        logits_of(model, random_ids(2, length))
    # Two sinks and the three newest never leave: a good part of a short text.
    least = 5 if policy in ("gate", "random") else 0
    kept = sum(min(k, least) for k in range(length)) / (length * (length - 1) / 2)
    assert usage.sparsity == pytest.approx(min(0.8, 1 - kept), abs=0.003 if length > 50 else 0.03)


@matrix
@every_protocol
def test_each_sequence_meets_the_sparsity_at_its_own_length(family: str, evict: str) -> None:
    model, handle = pruning_model(family)
    lengths = (LENGTH, 131, 80)
    ids, mask = random_ids(3, LENGTH), mask_of(lengths, LENGTH)
    prompts = [length // 2 for length in lengths]
    handle.use("gate", 0.8, context=lengths, evict=evict, prompt=prompts)
    cache = recording(handle)
    logits_of(model, ids, past_key_values=cache, **padded(mask))
    for b, length in enumerate(lengths):
        age = torch.arange(length) - torch.arange(length)[:, None]
        alive = torch.stack([of[b, :length] for of in expires_of(cache)])
        kept = (alive[..., None] > torch.arange(length)) & (age > 0)
        sparsity = 1 - float(kept.sum()) / (3 * length * (length - 1) / 2)
        if evict == "reading":
            assert sparsity == pytest.approx(0.8, abs=0.01)
        else:
            # All of the first half is dense, and the rest as sparse as ever.
            first = kept[:, :, : length // 2]
            assert int(first.sum()) == 3 * (length // 2) * (length // 2 - 1) / 2
            assert 0.5 < sparsity < 0.75


@matrix
@every_policy
@every_protocol
def test_a_page_is_as_large_for_life(
    family: str, policy: str, evict: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From its first token to three times the length that was announced; small, and never full."""
    model, handle = pruning_model(family, "float32")
    handle.use(policy, 0.8, context=100, evict=evict, prompt=40)
    rows = rows_of(handle)
    sizes: dict[Page, set[tuple[int, int]]] = {}
    write = Page.write

    def watched(page: Page, *args: Any) -> None:
        write(page, *args)
        if evict == "reading" or len(sizes.get(page, ())) or cache.columns >= 40:
            sizes.setdefault(page, set()).add((page.slots, page.nbytes))

    monkeypatch.setattr(Page, "write", watched)
    cache = recording(handle)
    in_parts(model, random_ids(2, 300), cache, (13, 14, *range(40, 140), 180))
    for layer, page in enumerate(cache.pages):
        assert sizes[page] == {(page.slots, page.nbytes)}
        assert page.slots == rows.limit(layer, 0) and max(page.used) <= page.slots
        interval = rows.interval(layer, 0)
        assert page.waiting in (None, interval)
        assert (page.waiting is None) == (policy not in ("gate", "h2o", "snapkv", "tova"))
        assert page.slots <= max(rows.after(layer, 0, seen) for seen in range(300)) + interval
        assert page.slots < 60
    # What a policy keeps beside the keys and values of its rows is not much.
    assert cache.nbytes < 0.4 * cache.dense_nbytes


@matrix
@every_policy
@every_protocol
@pytest.mark.parametrize("ragged", [False, True])
def test_a_dropped_row_is_gone(family: str, policy: str, evict: str, ragged: bool) -> None:
    """Free slots hold the remains of rows: whatever stands there must not matter."""
    model, handle = pruning_model(family)
    lengths = (LENGTH, LENGTH - 45) if ragged else (LENGTH, LENGTH)
    handle.use(policy, 0.8, context=lengths, evict=evict, prompt=PROMPT)
    ids, more = random_ids(2, LENGTH), random_ids(2, 40, seed=3)
    mask = mask_of([length + 40 for length in lengths], LENGTH + 40)
    cache = recording(handle)
    in_parts(model, ids, cache, (150,), mask)
    for page in cache.pages:
        spoil(page, masked=ragged)
    whole = logits_of(model, torch.cat([ids, more], dim=1), **padded(mask))[:, LENGTH:]
    after = []
    for stop in (1, 2, 3, 25, *range(26, 41)):
        start = cache.columns - LENGTH
        options = {"past_key_values": cache, **padded(mask, LENGTH + start, LENGTH + stop)}
        after.append(logits_of(model, more[:, start:stop], **options))
    torch.testing.assert_close(torch.cat(after, dim=1), whole, atol=1e-10, rtol=0)


def spoil(page: Page, masked: bool) -> None:
    """Overwrite all that is not in use, that slot included which takes what is no token.

    Where sequences differ, free slots are read under a mask, so they must stay finite.
    """
    for b, (used, settled) in enumerate(zip(page.used, page.settled, strict=True)):
        page.position[b, used:] = 3
        tensors = {"key": page.key, "value": page.value}
        waiting = {"query": page.query, "features": page.features}
        free = [(tensor[b], used, 1) for tensor in tensors.values()]
        free += [(t[b], used - settled, 1) for t in waiting.values() if t is not None]
        # Columns of rows that no step has seen have no meaning yet.
        columns = page.held(None, page.slots + 1).columns
        free += [(column[b], settled, 0) for column in columns.values()]
        for tensor, first, axis in free:
            part = tensor.narrow(axis, first, tensor.shape[axis] - first)
            part.copy_(1e3 * torch.randn_like(part) if masked else torch.full_like(part, torch.nan))
        page.position[b, settled:used] = 5


@matrix
@every_protocol
@pytest.mark.parametrize(
    ("policy", "side"),
    [
        *((policy, "left") for policy in POLICIES),
        *((policy, side) for policy in ("gate", "snapkv", "strided") for side in ("right", "both")),
    ],
)
def test_a_ragged_batch_is_each_text_alone(family: str, policy: str, evict: str, side: str) -> None:
    """Each text has its own length to come and its own prompt; read at once, in parts, in steps."""
    model, handle = pruning_model(family)
    lengths, prompts = (LENGTH, 131, 40), (PROMPT, 70, 30)
    ids, mask = random_ids(3, LENGTH), mask_of(lengths, LENGTH, side)
    handle.use(policy, 0.7, context=lengths, evict=evict, prompt=prompts)
    with handle.measure() as usage:
        together = logits_of(model, ids, **padded(mask))
    caches = [recording(handle) for _ in range(3)]
    ends = [(), (1, 50, 51, 170, *range(171, LENGTH)), (90, *range(91, 140))]
    parts = [
        in_parts(model, ids, cache, end, mask) for cache, end in zip(caches, ends, strict=True)
    ]
    pairs = evicted = 0
    for b, (length, prompt) in enumerate(zip(lengths, prompts, strict=True)):
        own = mask[b] == 1
        handle.use(policy, 0.7, context=length, evict=evict, prompt=prompt)
        one = recording(handle)
        with handle.measure() as apart:
            alone = logits_of(model, ids[b : b + 1, own])[0]
        pairs, evicted = pairs + apart.pairs, evicted + apart.evicted
        in_parts(model, ids[b : b + 1, own], one, 11)
        torch.testing.assert_close(together[b, own], alone, atol=1e-10, rtol=0)
        for cache, logits in zip(caches, parts, strict=True):
            torch.testing.assert_close(logits[b, own], alone, atol=1e-10, rtol=0)
            assert cache.seen[b] == length
            for layer, expected in enumerate(expires_of(one)):
                assert torch.equal(expires_of(cache)[layer][b, :length], expected[0])
    assert (usage.pairs, usage.evicted) == (pairs, evicted)


@matrix
@every_policy
@every_protocol
def test_texts_of_unequal_length_to_come_are_each_alone(
    family: str, policy: str, evict: str
) -> None:
    """Read in step without padding, but some reach their eviction steps where others do not."""
    model, handle = pruning_model(family)
    contexts, prompts = (400, 60, 130), (70, 90, 50)
    ids = random_ids(3, 110)
    handle.use(policy, 0.7, context=contexts, evict=evict, prompt=prompts)
    cache = recording(handle)
    together = logits_of(model, ids)
    parts = in_parts(model, ids, cache, (80, *range(81, 100)))
    for b, (context, prompt) in enumerate(zip(contexts, prompts, strict=True)):
        handle.use(policy, 0.7, context=context, evict=evict, prompt=prompt)
        one = recording(handle)
        alone = logits_of(model, ids[b : b + 1], past_key_values=one)[0]
        torch.testing.assert_close(together[b], alone, atol=1e-10, rtol=0)
        torch.testing.assert_close(parts[b], alone, atol=1e-10, rtol=0)
        for ours, theirs in zip(expires_of(cache), expires_of(one), strict=True):
            assert torch.equal(ours[b], theirs[0])


@matrix
@every_policy
@every_protocol
def test_generating_is_scoring(family: str, policy: str, evict: str) -> None:
    model, handle = pruning_model(family)
    handle.use(policy, 0.7, context=(170, 150), evict=evict, prompt=(50, 30))
    prompts, mask = random_ids(2, 50), mask_of((170, 150), 170)
    out = model.generate(
        prompts, attention_mask=mask[:, :50], max_new_tokens=120, do_sample=False,
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    scored = logits_of(model, out, **padded(mask))[:, 49:-1].argmax(dim=-1)
    assert torch.equal(scored, out[:, 50:])
    assert handle.last_cache is not None and handle.last_cache.sparsity > 0.3


@matrix
@every_protocol
def test_a_long_run_stays_right(family: str, evict: str) -> None:
    """Single steps, far beyond the length that was announced."""
    model, handle = pruning_model(family)
    handle.use("gate", 0.8, evict=evict, prompt=PROMPT)
    ids = random_ids(2, 700)
    stepped = in_parts(model, ids, recording(handle))
    torch.testing.assert_close(stepped, logits_of(model, ids), atol=1e-10, rtol=0)


@matrix
def test_convert_save_load_export_load_is_exact(
    family: str, tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    converted = tiny_folder(family)
    first = load(converted)
    second = load(export(converted, tmp_path / "exported", force=True))
    original = tiny_model(family).state_dict()
    gates, again = first.ctxprune.gates.state_dict(), second.ctxprune.gates.state_dict()
    assert set(gates) == {
        f"{layer}.{name}"
        for layer in range(3)
        for name in ("query.weight", "key.weight", "slope", "bias")
    }
    assert set(first.state_dict()) == {*original, *(f"{GATES}.{name}" for name in gates)}
    for name, tensor in original.items():
        assert torch.equal(tensor, first.state_dict()[name])
        assert torch.equal(tensor, second.state_dict()[name])
    fresh = new_gates(tiny_model(family), first.ctxprune.config).state_dict()
    for name, tensor in gates.items():
        assert torch.equal(tensor, fresh[name]) and torch.equal(tensor, again[name])
    ids = random_ids(1, 50)
    assert torch.equal(logits_of(first, ids), logits_of(second, ids))


@matrix
@every_policy
@every_protocol
def test_later_tokens_change_nothing_before_them(family: str, policy: str, evict: str) -> None:
    model, handle = pruning_model(family)
    handle.use(policy, 0.7, context=LENGTH, evict=evict, prompt=40)
    ids = random_ids(1, LENGTH)
    other = torch.cat([ids[:, :90], random_ids(1, LENGTH - 90, seed=9)], dim=1)
    first, second = logits_of(model, ids)[:, :90], logits_of(model, other)[:, :90]
    torch.testing.assert_close(first, second, atol=1e-10, rtol=0)


@matrix
@every_policy
@every_protocol
def test_what_was_dropped_stays_dropped(family: str, policy: str, evict: str) -> None:
    """Rows of a layer at each step: those of the step before, or fewer, and the new one."""
    model, handle = pruning_model(family)
    handle.use(policy, 0.7, context=LENGTH, evict=evict, prompt=30)
    cache = recording(handle)
    ids = random_ids(2, 120)
    held: dict[tuple[int, int], set[int]] = {}
    dropped = 0
    for at in range(120):
        logits_of(model, ids[:, at : at + 1], past_key_values=cache)
        for layer, page in enumerate(cache.pages):
            for b in range(2):
                positions = held_by(cache, page, b)
                now = set(positions)
                assert len(now) == len(positions) == page.used[b]
                before = held.get((layer, b), set())
                assert now <= before | {at}
                dropped += len((before | {at}) - now)
                held[layer, b] = now
                gone = expires_of(cache)[layer][b, : at + 1] <= at + 1
                assert now == set((~gone).nonzero()[:, 0].tolist())
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
        assert max(page.slots for page in cache.pages) <= 64
    assert torch.equal(*logits)
    assert not torch.equal(logits[0], logits_of(load(folder, sparsity=0.0, max_rows=0), ids))


@matrix
def test_a_layer_of_more_rows_evicts_less_often(family: str) -> None:
    """Rows leave at the steps of their layer, which also hold where the text comes in pieces."""
    model, handle = pruning_model(family)
    handle.use("gate", 0.8, context=LENGTH)
    rows = rows_of(handle)
    intervals = [rows.interval(layer, 0) for layer in range(3)]
    held = [rows.after(layer, 0, LENGTH) for layer in range(3)]
    most, *_, fewest = sorted(range(3), key=held.__getitem__, reverse=True)
    assert intervals[most] > intervals[fewest]
    cache = recording(handle)
    in_parts(model, random_ids(2, LENGTH), cache, 7)
    for interval, expires in zip(intervals, expires_of(cache), strict=True):
        left = expires[expires < NEVER]
        assert len(left) and not (left % interval).any()
        assert (left % (2 * interval)).any()


class Reads(TorchDispatchMode):
    """Counts what Python or an operation reads from tensors: a device would be waited for."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.seen: list[str] = []
        for name in ("item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__"):
            real = getattr(Tensor, name)

            def watched(tensor: Tensor, *args: Any, name: str = name, real: Any = real) -> Any:
                self.seen.append(name)
                return real(tensor, *args)

            patch.setattr(Tensor, name, watched)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note operations whose result's shape or value the host has to know."""
        if any(name in str(func) for name in ("_local_scalar_dense", "nonzero", "masked_select")):
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@matrix
@every_policy
@every_protocol
def test_decoding_never_waits_for_the_device(
    family: str, policy: str, evict: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a mask nothing is read back, not even at eviction steps."""
    model, handle = pruning_model(family, "float32")
    handle.use(policy, 0.7, context=LENGTH, evict=evict, prompt=60)
    cache = handle.cache()
    ids = random_ids(2, LENGTH)
    logits_of(model, ids[:, :60], past_key_values=cache)
    with Reads(monkeypatch) as reads:
        bool(torch.zeros(1)[0]), torch.ones(2).nonzero(), torch.ones(1).item()
        assert len(reads.seen) >= 3
        reads.seen.clear()
        for at in range(60, LENGTH):
            logits_of(model, ids[:, at : at + 1], past_key_values=cache)
    assert reads.seen == []


@matrix
@pytest.mark.parametrize("ragged", [False, True])
def test_a_compiled_step_is_the_eager_step(family: str, ragged: bool) -> None:
    model, handle = pruning_model(family, "float32")
    lengths = (80, 62) if ragged else (80, 80)
    ids, mask = random_ids(2, 80), mask_of(lengths, 80)
    handle.use("gate", 0.7, context=lengths)
    steps = (40, *range(41, 80))
    eager, compiled = recording(handle), recording(handle)
    expected = in_parts(model, ids, eager, steps, mask)
    torch.compiler.reset()
    counters.clear()
    with handle.compiled():
        found = in_parts(model, ids, compiled, steps, mask)
    # Compiled once; many times would end in running it as it is.
    assert counters["stats"]["unique_graphs"] == 1
    real = mask == 1
    torch.testing.assert_close(found[real], expected[real], atol=2e-4, rtol=0)
    for ours, theirs in zip(expires_of(compiled), expires_of(eager), strict=True):
        assert torch.equal(ours, theirs)
