"""All modes at one batch size and context, which take turns in one process.

So what else the machine does meets them all. Decoding is greedy, one token a step.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from statistics import mean, median
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer

from ctxprune.evals.config import BenchConfig
from ctxprune.evals.results import DYNAMIC, ORACLE, PRUNED, STATIC
from ctxprune.evals.speed.breakdown import breakdown
from ctxprune.evals.speed.peak import peak_of
from ctxprune.evals.speed.stopwatch import Stopwatch, spread, wait
from ctxprune.evals.speed.subject import unequal
from ctxprune.pruner.device import input_device
from ctxprune.pruner.engine.cache import PrunedCache
from ctxprune.pruner.engine.dense import DenseCache, DenseLayer
from ctxprune.pruner.engine.handle import handle_of
from ctxprune.pruner.rows import Rows

# An oracle reads no prompt, so it has none of these.
OF_PREFILL = (
    *("prefill_tokens_per_s", "prefill_s", "ttft_s", "ttft_ratio"),
    *("sparsity_realised", "peak_bytes"),
)
# Steps after which an oracle goes back to the rows that it began with.
REWIND = 8


class PlainLayer(DynamicLayer):
    """transformers' own layer: the engine replaces a `DynamicLayer` by one written in place."""


class PlainCache(DynamicCache):
    """transformers' own dynamic cache, which copies all rows for every token."""

    def __init__(self) -> None:
        super().__init__()
        self.layer_class_to_replicate = PlainLayer


@dataclass(eq=False)
class Lane:
    """One mode of a comparison.

    Attributes:
        compiled: its steps are.
        pruned: the lane that sets the rows of an oracle.
        cache, token: what it has read, and (b, 1) int64 what it reads next.
        decoded: steps so far.
        read_s, first_s: seconds of each prefill, and until the first token.
        step_s: seconds of a step, the mean of each burst. between_s: of each step of the bursts
            at which no row could leave, where rows leave at all.
        facts: of its row, beside the times.
    """

    mode: str
    sparsity: float = 0.0
    compiled: bool = False
    pruned: Lane | None = None
    cache: Cache | None = None
    token: Tensor | None = None
    decoded: int = 0
    read_s: list[float] = field(default_factory=list)
    first_s: list[float] = field(default_factory=list)
    step_s: list[float] = field(default_factory=list)
    between_s: list[float] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """What progress calls it."""
        level = f" {self.sparsity:g}" if self.mode in (PRUNED, ORACLE) else ""
        return f"{self.mode}{level}{', compiled' if self.compiled else ''}"


class Comparison:
    """The lanes, and what they measure.

    Args:
        ids: (b, context) int64, the prompts. steps: in a burst.
        on_event: called with one line of text for each round of measurements.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        config: BenchConfig,
        ids: Tensor,
        steps: int,
        on_event: Callable[[str], None],
    ) -> None:
        self.model = model
        self.handle = handle_of(model)
        self.config = config
        self.max_rows = self.handle.config.cap(config.max_rows) or 0
        self.ids = ids.to(input_device(model))
        self.batch, self.context = ids.shape
        self.lengths = unequal(self.batch, self.context) if config.unequal else [self.context]
        self.tokens = sum(self.lengths) if config.unequal else ids.numel()
        self.steps = steps
        columns = torch.arange(self.context + config.decoded(steps), device=self.ids.device)[None]
        padding = self.context - torch.tensor(self.lengths, device=self.ids.device)[:, None]
        self.positions = (columns - padding).clamp_min(0)
        self.mask = (columns >= padding).long() if config.unequal else None
        self.on_event = on_event
        self.lanes = list(self._chosen(config))

    def _chosen(self, config: BenchConfig) -> Iterator[Lane]:
        """The lanes; an oracle comes after the one that it follows."""
        yield from (Lane(mode) for mode in (DYNAMIC, STATIC) if mode in config.modes)
        if config.compile and STATIC in config.modes:
            yield Lane(STATIC, compiled=True)
        if PRUNED not in config.modes:
            return
        pruned = [Lane(PRUNED, level) for level in config.sparsity]
        yield from pruned
        evicting = [lane for lane in pruned if self._evicts(lane)]
        if config.compile:
            yield from (Lane(PRUNED, lane.sparsity, compiled=True) for lane in evicting)
        if ORACLE not in config.modes:
            return
        if isinstance(self.handle.dense_cache(), DenseCache):
            yield from (Lane(ORACLE, lane.sparsity, pruned=lane) for lane in evicting)
        else:
            self.on_event("no oracle: some layers of this model have windows or states")

    @torch.inference_mode()
    def measure(self) -> list[dict[str, Any]]:
        """The rows of this batch size and context."""
        if self.config.compile:
            torch._dynamo.reset()  # it compiles for few shapes, and others are done with
        readers = [lane for lane in self.lanes if lane.mode != ORACLE]
        self._say("warming up")
        for lane in readers:
            self._warm_up(lane)
        for repeat in range(self.config.prefills):
            self._say(f"prefill {repeat + 1} of {self.config.prefills}")
            for lane in readers:
                self._prefill(lane)
        # The first burst warms up.
        for repeat in range(self.config.repeats + 1):
            if repeat:
                self._say(f"decoding {repeat} of {self.config.repeats}")
            for lane in self.lanes:
                self._burst(lane, timed=repeat > 0)
        for lane in self.lanes:
            step_ms = median(lane.step_s) * 1e3
            if self._evicts(lane) and not lane.compiled:
                burst = partial(self._seconds, lane)
                lane.facts["breakdown"] = breakdown(self.model, burst, step_ms)
            self._say(f"{lane.label}: {step_ms:.2f} ms a step")
        self.handle.use(self.config.policy, 0.0, max_rows=0)
        return self._rows(readers)

    def _say(self, line: str) -> None:
        self.on_event(f"batch {self.batch}, context {self.context}: {line}")

    def _evicts(self, lane: Lane) -> bool:
        """Whether the engine is on: else `pruned` is our dense cache."""
        return lane.mode == PRUNED and (lane.sparsity > 0.0 or self.max_rows > 0)

    def _enter(self, lane: Lane) -> None:
        """Switch the engine to what a lane runs."""
        if not self._evicts(lane):
            self.handle.use(self.config.policy, 0.0, max_rows=0)
            return
        self.handle.use(
            self.config.policy,
            lane.sparsity,
            context=self.lengths,
            max_rows=self.max_rows,
            evict=self.config.evict,
        )

    def _new_cache(self, lane: Lane) -> Cache:
        if lane.mode == DYNAMIC:
            return PlainCache()
        if lane.mode == STATIC:
            length = self.context + self.steps * (self.config.repeats + 1)
            return StaticCache(config=self.model.config, max_cache_len=length)
        return self.handle.cache()

    def _warm_up(self, lane: Lane) -> None:
        """A prefill that is not timed: it notes what the lane holds, and its peak memory alone."""
        with self.handle.measure() as usage:
            peak = peak_of(partial(self._prefill, lane), self.ids.device)
        cache = lane.cache
        assert cache is not None
        lane.read_s.clear()
        lane.first_s.clear()
        lane.facts = {
            "sparsity_realised": usage.sparsity,
            "cache_sparsity": 0.0,
            "kv_bytes": kv_bytes(cache),
            "peak_bytes": peak,
            "rows_kept": float(self.context),
            "interval": None,
        }
        if isinstance(cache, PrunedCache):
            lane.facts |= {
                "cache_sparsity": cache.sparsity,
                "rows_kept": attended(cache),
                "interval": _interval(cache),
            }
        lane.cache = None

    def _prefill(self, lane: Lane) -> None:
        """Read the prompts into a fresh cache."""
        lane.cache = None  # the old one goes before the new one comes
        self._enter(lane)
        lane.cache, lane.decoded = self._new_cache(lane), 0
        wait(self.ids.device)
        began = time.perf_counter()
        logits = self._logits(lane, self.ids, 0)
        wait(self.ids.device)
        lane.read_s.append(time.perf_counter() - began)
        lane.token = logits.argmax(dim=-1)
        wait(self.ids.device)
        lane.first_s.append(time.perf_counter() - began)

    def _burst(self, lane: Lane, timed: bool) -> None:
        """Some steps of a lane; notes how long they took."""
        if lane.pruned is not None:
            self._fill_oracle(lane, lane.pruned)
        before = lane.decoded
        laps = self._decode(lane, self.steps)
        if not timed:
            return
        lane.step_s.append(mean(laps))
        if isinstance(lane.cache, PrunedCache):
            assert lane.cache.policy.rows is not None
            seen = [n - lane.decoded + before for n in lane.cache.seen]
            at = eviction_steps(lane.cache.policy.rows, len(lane.cache.pages), seen, len(laps))
            lane.between_s += [lap for lap, due in zip(laps, at, strict=True) if not due]

    def _seconds(self, lane: Lane) -> float:
        return sum(self._decode(lane, self.steps))

    def _decode(self, lane: Lane, steps: int) -> list[float]:
        """Greedy steps; returns the seconds of each."""
        self._enter(lane)
        token, first = lane.token, self.context + lane.decoded
        assert token is not None
        rows = lane.cache.get_seq_length() if lane.pruned is not None and lane.cache else 0
        watch = Stopwatch(self.ids.device)
        with self.handle.compiled() if lane.compiled else nullcontext():
            watch.mark()
            for step in range(steps):
                if lane.pruned is not None and step and step % REWIND == 0:
                    _rewind(lane.cache, rows)
                token = self._logits(lane, token, first + step).argmax(dim=-1)
                watch.mark()
        lane.token = token
        lane.decoded += steps
        return watch.laps()

    def _logits(self, lane: Lane, ids: Tensor, start: int) -> Tensor:
        """Read ids (b, n) from a column on; returns the last logits, (b, 1, vocabulary)."""
        stop = start + ids.shape[1]
        mask = None if lane.mode == ORACLE else self.mask  # an oracle holds no padding
        logits: Tensor = self.model(
            ids,
            attention_mask=None if mask is None else mask[:, :stop],
            position_ids=self.positions[:, start:stop],
            past_key_values=lane.cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits
        return logits

    def _fill_oracle(self, lane: Lane, pruned: Lane) -> None:
        """Give an oracle a cache that holds, on the mean of a burst, what `pruned` attends to.

        Its rows are random: time does not depend on what a row holds.
        """
        assert isinstance(pruned.cache, PrunedCache)
        rows = attended(pruned.cache)
        begin = max(round(rows - (REWIND + 1) / 2), 1)
        lane.cache = None
        cache = DenseCache()
        for layer, page in enumerate(pruned.cache.pages):
            cache.update(_random_rows(page.key, begin), _random_rows(page.value, begin), layer)
        lane.cache = cache
        if not lane.facts:
            row_bytes = sum(page.row_nbytes for page in pruned.cache.pages)
            lane.token = pruned.token
            lane.facts = {
                **dict.fromkeys(OF_PREFILL),
                "cache_sparsity": 1.0 - rows * self.batch / self.tokens,
                "kv_bytes": round(rows * self.batch * row_bytes),
                "rows_kept": rows,
                "interval": None,
            }

    def _rows(self, readers: Sequence[Lane]) -> list[dict[str, Any]]:
        """The measurements of all lanes, and how they compare."""
        pace = {lane: self.batch / median(lane.step_s) for lane in self.lanes}
        dense = [lane for lane in self.lanes if lane.mode in (DYNAMIC, STATIC)]
        limits = {lane.pruned: pace[lane] for lane in self.lanes if lane.pruned is not None}
        # A prompt is never compiled.
        first = min((lane.first_s for lane in dense if not lane.compiled), key=median, default=None)
        for lane in readers:
            ratios = [own / best for own, best in zip(lane.first_s, first or [], strict=False)]
            lane.facts |= {
                "prefill_tokens_per_s": self.tokens / median(lane.read_s),
                "prefill_s": spread(lane.read_s),
                "ttft_s": median(lane.first_s),
                "ttft_ratio": spread(ratios) if ratios else None,
            }
        rows = []
        for lane in self.lanes:
            # What is not compiled is compared with what is not.
            rivals = [pace[other] for other in dense if lane.compiled or not other.compiled]
            step_ms = spread([seconds * 1e3 for seconds in lane.step_s])
            between_ms = median(lane.between_s) * 1e3 if lane.between_s else None
            rows.append(
                {
                    "mode": lane.mode,
                    "compiled": lane.compiled,
                    "batch": self.batch,
                    "context": self.context,
                    "sparsity": lane.sparsity,
                    "decode_tokens_per_s": pace[lane],
                    "step_ms": step_ms,
                    "between_ms": between_ms,
                    "eviction_ms": None if between_ms is None else step_ms["median"] - between_ms,
                    "speedup": pace[lane] / max(rivals) if rivals else None,
                    "of_oracle": pace[lane] / limits[lane] if lane in limits else None,
                    **lane.facts,
                }
            )
        return rows


def kv_bytes(cache: Cache) -> int:
    """Bytes that a cache takes, slack and columns beside keys and values included."""
    if isinstance(cache, PrunedCache | DenseCache):
        return cache.nbytes
    layers = [layer for layer in cache.layers if isinstance(layer, CacheLayerMixin)]
    tensors = [tensor for layer in layers for tensor in (layer.keys, layer.values)]
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors if tensor is not None)


def attended(cache: PrunedCache) -> float:
    """Rows that a new token attends to, its own among them.

    The mean over layers, sequences and a whole eviction interval.
    """
    rows = cache.policy.rows
    assert rows is not None
    return mean(
        settled + (rows.interval(layer, sequence) + 1) / 2
        for layer, page in enumerate(cache.pages)
        for sequence, settled in enumerate(page.settled)
    )


def eviction_steps(rows: Rows, layers: int, seen: Sequence[int], steps: int) -> list[bool]:
    """For each of some steps of a batch that has read so many tokens: do rows leave after it?"""
    return [
        any(
            rows.step(layer, sequence, before + step) == before + step + 1
            for layer in range(layers)
            for sequence, before in enumerate(seen)
        )
        for step in range(steps)
    ]


def _interval(cache: PrunedCache) -> dict[str, int]:
    """Tokens between two eviction steps, the fewest and the most of a layer."""
    rows = cache.policy.rows
    assert rows is not None
    layers, batch = range(len(cache.pages)), range(len(cache.seen))
    every = [rows.interval(layer, sequence) for layer in layers for sequence in batch]
    return {"min": min(every), "max": max(every)}


def _rewind(cache: Cache | None, rows: int) -> None:
    """Let a dense cache forget all but its first rows."""
    assert cache is not None
    for layer in cache.layers:
        assert isinstance(layer, DenseLayer)
        layer.keys, layer.values = (t[:, :, :rows] for t in layer.storage if t is not None)


def _random_rows(like: Tensor, rows: int) -> Tensor:
    """(b, heads, rows, width) of the slots (b, heads, r, width)."""
    return torch.randn(*like.shape[:2], rows, like.shape[3], dtype=like.dtype, device=like.device)
