"""What a measurement is told: frozen, self-checking, refusing unknown keys."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ctxprune.evals.report.shapes import MODES, ORACLE, PRUNED
from ctxprune.pruner.config import PROTOCOLS, FromMapping, check_at_least, check_sparsity
from ctxprune.pruner.device import AUTO, place
from ctxprune.pruner.errors import CtxpruneError, choose
from ctxprune.pruner.policies import names as policy_names


@dataclass(frozen=True)
class BenchConfig(FromMapping):
    """One benchmark.

    Attributes:
        architecture: instead of a checkpoint, random weights of this shape: a model type (its
            default configuration), a config.json, or a folder with one.
        batch, context: sequences, and tokens of their prompts; every pair is measured.
        unequal: the prompts of a batch are of unequal lengths, padded on the left: spread evenly
            from half of the context to all of it.
        sparsity: levels of the pruned mode; 0 is our dense cache with the engine off.
        policy: which eviction policy decides. evict: when, of `PROTOCOLS`.
        modes: of `MODES`; `oracle` is dense attention to as many rows as `pruned` attends to.
        compile: measure compiled steps beside, of the static cache and of the pruned mode.
        max_rows: cap on the rows of a sequence in a layer; None: that of the model; 0: none.
        repeats: bursts of decode steps a mode. steps: in a burst, at least; it is rounded up to
            whole eviction intervals, so that every burst has its part of eviction steps.
        prefills: timed ones a mode.
        text: of the prompts: .txt/.jsonl(.gz) file, folder, `datasets` name; None: the embedded
            evaluation sample.
        seed: of random weights. device: of the model. dtype: measured one after the other.
    """

    architecture: str | None = None
    batch: tuple[int, ...] = (1, 8)
    context: tuple[int, ...] = (512,)
    unequal: bool = False
    sparsity: tuple[float, ...] = (0.0, 0.5, 0.8, 0.9)
    policy: str = "gate"
    evict: str = PROTOCOLS[0]
    modes: tuple[str, ...] = MODES
    compile: bool = False
    max_rows: int | None = None
    repeats: int = 5
    steps: int = 32
    prefills: int = 3
    text: str | None = None
    seed: int = 0
    dtype: tuple[str, ...] = (AUTO,)
    device: str = AUTO

    def __post_init__(self) -> None:
        # the command line and recipes give lists, of floats
        object.__setattr__(self, "batch", _whole("batch", self.batch, 1))
        object.__setattr__(self, "context", _whole("context", self.context, 16))
        levels = sorted({check_sparsity(float(level)) for level in self.sparsity})
        object.__setattr__(self, "sparsity", tuple(levels))
        chosen = {choose("mode", mode, MODES) for mode in self.modes}
        object.__setattr__(self, "modes", tuple(mode for mode in MODES if mode in chosen))
        object.__setattr__(self, "dtype", tuple(dict.fromkeys(self.dtype)))
        for dtype in self.dtype:
            place(self.device, dtype)
        for name in ("batch", "context", "sparsity", "modes", "dtype"):
            if not getattr(self, name):
                raise CtxpruneError(f"`{name}` is an empty list", "leave it out for the default")
        if ORACLE in chosen and PRUNED not in chosen:
            raise CtxpruneError(
                "mode `oracle` needs mode `pruned`, which sets how many rows it holds"
            )
        choose("policy", self.policy, policy_names())
        choose("value of evict", self.evict, PROTOCOLS)
        if self.compile and self.unequal:
            raise CtxpruneError(
                "a compiled step is measured without padding",
                "measure `--unequal` and `--compile` one after the other",
            )
        for name in ("repeats", "steps", "prefills"):
            check_at_least(name, getattr(self, name), 1)
        if self.max_rows is not None:
            check_at_least("max_rows", self.max_rows, 0)

    def burst(self, interval: int) -> int:
        """Steps in a burst, where rows leave after every so many tokens at most; 0: never."""
        every = max(interval, 1)
        return math.ceil(self.steps / every) * every

    def decoded(self, steps: int) -> int:
        """Tokens that the longest mode decodes: a warm-up, the repeats, and a profiled burst."""
        return steps * (self.repeats + 2)


def _whole(name: str, values: Any, least: int) -> tuple[int, ...]:
    """Numbers from a list, as rising whole numbers of at least `least`."""
    for value in values:
        if not float(value).is_integer():
            raise CtxpruneError(f"{name} must be whole numbers, not {value:g}")
        check_at_least(name, value, least)
    return tuple(sorted({int(value) for value in values}))
