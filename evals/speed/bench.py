"""The benchmark: speed and memory of prefill and decoding, dense and pruned, on the same text.

For every batch size and context all modes are alive in one process and take turns, so that what
else the machine does meets them all. Decoding is greedy, one token a step.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache
from transformers.cache_utils import Cache, CacheLayerMixin

from ctxprune.evals.provenance import provenance, worker
from ctxprune.evals.report.shapes import DYNAMIC, MODES, ORACLE, PRUNED, STATIC
from ctxprune.evals.speed.breakdown import breakdown
from ctxprune.evals.speed.forced import ForcedPolicy
from ctxprune.evals.speed.peak import peak_of
from ctxprune.evals.speed.subject import check_positions, from_architecture, from_folder, prompts
from ctxprune.evals.state import Finished, digest, stats, text_stats
from ctxprune.pruner.checkpoints.checkpoint import DTYPES
from ctxprune.pruner.config import FromMapping, check_at_least, check_sparsity
from ctxprune.pruner.data import read_texts, windows
from ctxprune.pruner.engine.cache import PrunedCache
from ctxprune.pruner.engine.dense import DenseCache
from ctxprune.pruner.engine.handle import Handle, handle_of
from ctxprune.pruner.errors import CtxpruneError, choose
from ctxprune.pruner.policies import names as policy_names

PACKAGES = ("ctxprune", "torch", "transformers")
# An oracle reads no prompt, so it has none of these.
OF_PREFILL = ("prefill_tokens_per_s", "prefill_s", "ttft_s", "sparsity_realised", "peak_bytes")


@dataclass(frozen=True)
class BenchConfig(FromMapping):
    """One benchmark.

    Attributes:
        architecture: instead of a checkpoint, random weights of this shape: a family's name (its
            default configuration), a config.json, or a folder with one.
        batch, context: sequences, and tokens of their prompts; every pair is measured.
        sparsity: levels of the pruned mode; 0 is our dense cache with the engine off.
        policy: which eviction policy decides.
        modes: of `MODES`; `oracle` is dense attention to as many rows as `pruned` keeps.
        forced: the gate computes its scores, but a token's survival is drawn at random.
        max_rows: cap on the rows of a sequence in a layer; None: that of the model; 0: none.
        repeats: bursts of decode steps a mode. steps: in a burst. prefills: timed ones a mode.
        text: of the prompts: .txt/.jsonl(.gz) file, folder, `datasets` name; None: the embedded
            evaluation sample.
        seed: of random weights. dtype, device: of the model.
    """

    architecture: str | None = None
    batch: tuple[int, ...] = (1, 8)
    context: tuple[int, ...] = (512,)
    sparsity: tuple[float, ...] = (0.0, 0.5, 0.8, 0.9)
    policy: str = "gate"
    modes: tuple[str, ...] = MODES
    forced: bool = False
    max_rows: int | None = None
    repeats: int = 5
    steps: int = 16
    prefills: int = 3
    text: str | None = None
    seed: int = 0
    dtype: str = "float32"
    device: str = "cpu"

    def __post_init__(self) -> None:
        # the command line and recipes give lists, of floats
        object.__setattr__(self, "batch", _whole("batch", self.batch, 1))
        object.__setattr__(self, "context", _whole("context", self.context, 16))
        levels = sorted({check_sparsity(float(level)) for level in self.sparsity})
        object.__setattr__(self, "sparsity", tuple(levels))
        chosen = {choose("mode", mode, MODES) for mode in self.modes}
        object.__setattr__(self, "modes", tuple(mode for mode in MODES if mode in chosen))
        for name in ("batch", "context", "sparsity", "modes"):
            if not getattr(self, name):
                raise CtxpruneError(f"`{name}` is an empty list", "leave it out for the default")
        if ORACLE in chosen and PRUNED not in chosen:
            raise CtxpruneError(
                "mode `oracle` needs mode `pruned`, which sets how many rows it holds"
            )
        choose("policy", self.policy, policy_names())
        choose("dtype", self.dtype, DTYPES)
        if self.forced and self.policy != "gate":
            raise CtxpruneError(f"forced survival is the gate's, not that of `{self.policy}`")
        for name in ("repeats", "steps", "prefills"):
            check_at_least(name, getattr(self, name), 1)
        if self.max_rows is not None:
            check_at_least("max_rows", self.max_rows, 0)

    @property
    def decoded(self) -> int:
        """Tokens that the longest mode decodes: a warm-up, the repeats, and a profiled burst."""
        return self.steps * (self.repeats + 2)


def bench(
    folder: Path | None,
    config: BenchConfig,
    *,
    state: Path | None = None,
    on_event: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Measure a converted checkpoint, or random weights of an architecture.

    Args:
        folder: the checkpoint; None with `config.architecture`.
        config: what to measure.
        state: keeps the finished pairs of batch size and context while the benchmark runs, so that
            a killed one goes on; made if missing.
        on_event: called with one line of text for each measurement.

    Returns:
        What was measured, provenance, and `rows`, ready for JSON. A row is a mode at a batch size
        and context: `prefill_tokens_per_s`, `prefill_s`, `ttft_s` (until the first token);
        `sparsity_realised` on the pairs of the prompts; `cache_sparsity`, `kv_bytes`, `rows_kept`
        (mean over layers and sequences) and `padding` (rows of the longest sequence over the mean)
        after them; `peak_bytes` of the process meanwhile; `decode_tokens_per_s` and `step_ms`;
        `speedup` over the better dense mode, and `of_oracle`, the share of its speed; `breakdown`
        of a step. None stands where a figure has no meaning or the platform cannot tell it.

    Raises:
        CtxpruneError: for bad input.
    """
    say = on_event or (lambda line: None)
    if config.architecture is not None:
        say(f"random weights of {config.architecture}")
        subject = from_architecture(
            config.architecture,
            max(config.context) + config.decoded,
            seed=config.seed,
            dtype=config.dtype,
            device=config.device,
        )
        config = replace(config, forced=config.policy == "gate")
    else:
        assert folder is not None, "a benchmark needs a folder or an architecture"
        subject = from_folder(folder, dtype=config.dtype, device=config.device)
    check_positions(subject.model, max(config.context), config.decoded)
    _check_policy(handle_of(subject.model), config)
    texts = read_texts(config.text, "eval")
    text = {context: windows(subject.tokenizer, texts, context) for context in config.context}
    finished = Finished(state)
    common = [
        str(subject.model.config.to_json_string()),
        [] if folder is None else stats(folder.iterdir()),
        {k: v for k, v in asdict(config).items() if k not in ("batch", "context")},
        text_stats(config.text),
        worker(subject.model.device),
    ]
    rows, keys = [], []
    for batch, context in itertools.product(config.batch, config.context):
        label = f"batch {batch}, context {context}"
        keys.append(digest([*common, batch, context]))
        done = finished.get(keys[-1])
        if done is None:
            ids = prompts(text[context], batch) % subject.model.config.vocab_size
            done = {"rows": Comparison(subject.model, config, ids, say).measure()}
            finished.put(keys[-1], label, done)
        else:
            say(f"{label}: already done, kept")
        repeated = batch > len(text[context])
        rows += [{**row, "text_repeated": repeated} for row in done["rows"]]
    # Kept for a killed run only: figures of another day would be no measurement.
    finished.drop(keys)
    return {
        "model": subject.name,
        "policy": config.policy,
        "evicts_every": _evicts_every(handle_of(subject.model), config),
        "forced": config.forced,
        "max_rows": handle_of(subject.model).cap_of(config.max_rows),
        "random_weights": config.architecture is not None,
        "positions_enlarged": subject.positions_enlarged,
        "text": config.text or "embedded",
        "repeats": config.repeats,
        "steps": config.steps,
        "prefills": config.prefills,
        "seed": config.seed,
        "dtype": config.dtype,
        **worker(subject.model.device),
        **provenance(*PACKAGES),
        "rows": rows,
    }


class _Dynamic(DynamicCache):
    """transformers' cache as it is: the engine replaces a plain one by `DenseCache`."""


@dataclass(eq=False)
class _Lane:
    """One mode of a comparison.

    Attributes:
        pruned: the lane that sets the rows of an oracle.
        forced: stands in for the policy.
        cache, token: what it has read, and (b, 1) int64 what it reads next.
        decoded: steps so far.
        read_s, first_s, step_s: seconds of a prefill, until the first token, and of a step.
        facts: of its row, beside the times.
    """

    mode: str
    sparsity: float = 0.0
    pruned: _Lane | None = None
    forced: ForcedPolicy | None = None
    cache: Cache | None = None
    token: Tensor | None = None
    decoded: int = 0
    read_s: list[float] = field(default_factory=list)
    first_s: list[float] = field(default_factory=list)
    step_s: list[float] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """What progress calls it."""
        return f"{self.mode} {self.sparsity:g}" if self.mode in (PRUNED, ORACLE) else self.mode


class Comparison:
    """All modes at one batch size and context.

    Args:
        ids: (b, context) int64, the prompts.
        on_event: called with one line of text for each round of measurements.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        config: BenchConfig,
        ids: Tensor,
        on_event: Callable[[str], None],
    ) -> None:
        self.model = model
        self.handle = handle_of(model)
        self.config = config
        self.max_rows = self.handle.cap_of(config.max_rows) or 0
        self.ids = ids.to(model.device)
        self.batch, self.context = ids.shape
        self.positions = torch.arange(self.context + config.decoded, device=model.device)[None]
        self.on_event = on_event
        self.lanes = [_Lane(mode) for mode in (DYNAMIC, STATIC) if mode in config.modes]
        if PRUNED in config.modes:
            pruned = [_Lane(PRUNED, level) for level in config.sparsity]
            self.lanes += pruned
            if ORACLE in config.modes:
                self.lanes += [_Lane(ORACLE, p.sparsity, p) for p in pruned if self._evicts(p)]

    @torch.inference_mode()
    def measure(self) -> list[dict[str, Any]]:
        """The rows of this batch size and context."""
        readers = [lane for lane in self.lanes if lane.mode != ORACLE]
        self._say("warming up")
        for lane in readers:
            self._warm_up(lane)
        for repeat in range(self.config.prefills):
            self._say(f"prefill {repeat + 1} of {self.config.prefills}")
            for lane in readers:
                self._prefill(lane)
        for lane in readers:
            lane.facts |= {
                "prefill_tokens_per_s": self.ids.numel() / median(lane.read_s),
                "prefill_s": spread(lane.read_s),
                "ttft_s": median(lane.first_s),
            }
        # The first burst warms up.
        for repeat in range(self.config.repeats + 1):
            if repeat:
                self._say(f"decoding {repeat} of {self.config.repeats}")
            for lane in self.lanes:
                seconds = self._decode(lane, self.config.steps)
                if repeat:
                    lane.step_s.append(seconds / self.config.steps)
        for lane in self.lanes:
            step_ms = median(lane.step_s) * 1e3
            if self._evicts(lane):
                lane.facts["breakdown"] = breakdown(
                    self.model, partial(self._decode, lane, 1), self.config.steps, step_ms
                )
            self._say(f"{lane.label}: {step_ms:.2f} ms a step")
        self.handle.use(self.config.policy, 0.0, max_rows=0)
        return self._rows()

    def _say(self, line: str) -> None:
        self.on_event(f"batch {self.batch}, context {self.context}: {line}")

    def _evicts(self, lane: _Lane) -> bool:
        """Whether the engine is on: else `pruned` is our dense cache."""
        return lane.mode == PRUNED and (lane.sparsity > 0.0 or self.max_rows > 0)

    def _enter(self, lane: _Lane) -> None:
        """Switch the engine to what a lane runs."""
        if not self._evicts(lane):
            self.handle.use(self.config.policy, 0.0, max_rows=0)
            return
        if self.config.forced and lane.forced is None:
            lane.forced = ForcedPolicy(self.handle, lane.sparsity, self.context)
        self.handle.use(
            lane.forced or self.config.policy,
            lane.sparsity,
            context=self.context,
            max_rows=self.max_rows,
        )

    def _new_cache(self, lane: _Lane) -> Cache:
        if lane.mode == DYNAMIC:
            return _Dynamic(config=self.model.config)
        if lane.mode == STATIC:
            length = self.context + self.config.steps * (self.config.repeats + 1)
            return StaticCache(config=self.model.config, max_cache_len=length)
        return self.handle.cache()

    def _warm_up(self, lane: _Lane) -> None:
        """A prefill that is not timed: it notes what the lane holds, and its peak memory alone."""
        with self.handle.measure() as usage:
            peak = peak_of(partial(self._prefill, lane), self.ids.device)
        cache = lane.cache
        assert cache is not None
        lane.read_s.clear()
        lane.first_s.clear()
        rows, padding = float(self.context), 1.0
        if isinstance(cache, PrunedCache):
            rows, padding = _rows_kept(cache)
        lane.facts = {
            "sparsity_realised": usage.sparsity,
            "cache_sparsity": 1.0 - rows / self.context,
            "kv_bytes": kv_bytes(cache),
            "peak_bytes": peak,
            "rows_kept": rows,
            "padding": padding,
        }
        lane.cache = None

    def _prefill(self, lane: _Lane) -> None:
        """Read the prompts into a fresh cache."""
        lane.cache = None  # the old one goes before the new one comes
        self._enter(lane)
        lane.cache, lane.decoded = self._new_cache(lane), 0
        self._wait()
        began = time.perf_counter()
        logits = self.model(
            self.ids, past_key_values=lane.cache, use_cache=True, logits_to_keep=1
        ).logits
        self._wait()
        lane.read_s.append(time.perf_counter() - began)
        lane.token = logits[:, -1:].argmax(dim=-1)
        self._wait()
        lane.first_s.append(time.perf_counter() - began)

    def _decode(self, lane: _Lane, steps: int) -> float:
        """A burst of greedy steps; returns seconds."""
        if lane.pruned is not None:
            self._fill_oracle(lane, lane.pruned)
        self._enter(lane)
        token, start = lane.token, self.context + lane.decoded
        self._wait()
        began = time.perf_counter()
        for position in range(start, start + steps):
            logits = self.model(
                token,
                position_ids=self.positions[:, position : position + 1],
                past_key_values=lane.cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits
            token = logits[:, -1:].argmax(dim=-1)
        self._wait()
        seconds = time.perf_counter() - began
        lane.token = token
        lane.decoded += steps
        return seconds

    def _fill_oracle(self, lane: _Lane, pruned: _Lane) -> None:
        """Give an oracle a cache that holds, on the mean of a burst, the rows that `pruned` keeps.

        They are random: time does not depend on what a row holds.
        """
        assert isinstance(pruned.cache, PrunedCache)
        kept = math.ceil(_rows_kept(pruned.cache)[0])
        rows = max(kept - self.config.steps // 2, 1)
        lane.cache = None
        cache = DenseCache()
        for layer, table in enumerate(pruned.cache.tables()):
            key, value = table.column("key"), table.column("value")
            cache.update(_random_rows(key, rows), _random_rows(value, rows), layer)
        lane.cache = cache
        if not lane.facts:
            row_bytes = sum(table.dense_row_nbytes for table in pruned.cache.tables())
            rows_kept = math.ceil(pruned.facts["rows_kept"])
            lane.token = pruned.token
            lane.facts = {
                **dict.fromkeys(OF_PREFILL),
                "cache_sparsity": 1.0 - rows_kept / self.context,
                "kv_bytes": rows_kept * self.batch * row_bytes,
                "rows_kept": rows_kept,
                "padding": 1.0,
            }

    def _wait(self) -> None:
        if self.ids.device.type == "cuda":
            torch.cuda.synchronize(self.ids.device)

    def _rows(self) -> list[dict[str, Any]]:
        """The measurements of all lanes, and how they compare."""
        pace = {lane: self.batch / median(lane.step_s) for lane in self.lanes}
        dense = [pace[lane] for lane in self.lanes if lane.mode in (DYNAMIC, STATIC)]
        limits = {lane.pruned: pace[lane] for lane in self.lanes if lane.pruned is not None}
        return [
            {
                "mode": lane.mode,
                "batch": self.batch,
                "context": self.context,
                "sparsity": lane.sparsity,
                "decode_tokens_per_s": pace[lane],
                "step_ms": spread([seconds * 1e3 for seconds in lane.step_s]),
                "speedup": pace[lane] / max(dense) if dense else None,
                "of_oracle": pace[lane] / limits[lane] if lane in limits else None,
                **lane.facts,
            }
            for lane in self.lanes
        ]


def kv_bytes(cache: Cache) -> int:
    """Bytes that a cache takes, slack and columns beside keys and values included."""
    if isinstance(cache, PrunedCache | DenseCache):
        return cache.nbytes
    layers = [layer for layer in cache.layers if isinstance(layer, CacheLayerMixin)]
    tensors = [tensor for layer in layers for tensor in (layer.keys, layer.values)]
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors if tensor is not None)


def _rows_kept(cache: PrunedCache) -> tuple[float, float]:
    """Rows, mean over layers and sequences; and what the longest sequence makes of that."""
    rows = torch.stack([table.rows() for table in cache.tables()]).double()
    return rows.mean().item(), (rows.amax(dim=1).mean() / rows.mean()).item()


def _random_rows(like: Tensor, rows: int) -> Tensor:
    """(b, heads, rows, width) of a column (b, heads, r, width)."""
    return torch.randn(*like.shape[:2], rows, like.shape[3], dtype=like.dtype, device=like.device)


def spread(values: list[float]) -> dict[str, float]:
    """Median, least and most."""
    return {"median": median(values), "min": min(values), "max": max(values)}


def _whole(name: str, values: Any, least: int) -> tuple[int, ...]:
    """Numbers from a list, as rising whole numbers of at least `least`."""
    for value in values:
        if not float(value).is_integer():
            raise CtxpruneError(f"{name} must be whole numbers, not {value:g}")
        check_at_least(name, value, least)
    return tuple(sorted({int(value) for value in values}))


def _evicts_every(handle: Handle, config: BenchConfig) -> int:
    """Tokens between two evictions at most, 0 without any."""
    # Forced survival evicts as `random` does, and needs no calibration either.
    policy = "random" if config.forced else config.policy
    every = 0
    for level in config.sparsity:
        handle.use(policy, level, context=max(config.context), max_rows=config.max_rows)
        every = max(every, handle.evicts_every)
    handle.use(config.policy, 0.0, max_rows=0)
    return every


def _check_policy(handle: Handle, config: BenchConfig) -> None:
    """Raise CtxpruneError if the policy could not be used later."""
    capped = handle.cap_of(config.max_rows) is not None
    pruned = PRUNED in config.modes and (max(config.sparsity) > 0.0 or capped)
    if pruned and config.policy == "gate" and not config.forced and not handle.levels:
        raise CtxpruneError(
            "this model was converted but not tuned, so its gates prune nothing yet",
            "run `ctxprune tune --sparsity 0.8` first, use `--policy sink`, or measure a random "
            "survival at the gate's cost with `--forced`",
        )
