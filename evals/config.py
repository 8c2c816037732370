"""What a measurement is told: frozen, self-checking, refusing unknown keys."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ctxprune.evals.quality import conversation, fidelity, last_word, long_context
from ctxprune.evals.results import MODES, ORACLE, PRUNED
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


OWN_TASKS = (fidelity.NAME, *long_context.TASKS, conversation.NAME, last_word.NAME)


@dataclass(frozen=True)
class EvalConfig(FromMapping):
    """One evaluation.

    Attributes:
        tasks: run beside perplexity: `OWN_TASKS` and names of lm-eval tasks.
        sparsity: the levels asked for; None: 0 and every level the model was calibrated at.
        policy: which eviction policy decides.
        evict: `reading`: rows leave while a text is read; `prompt`: not before the end of its
            prompt. The rows are as many.
        max_rows: cap on the rows of a sequence in a layer; None: the one of the model; 0: none.
        text: for perplexity and our own tasks: .txt/.jsonl(.gz) file, folder, `datasets` name;
            None: the embedded evaluation sample.
        context: tokens a window of that text, for perplexity.
        prompt: how many of them are read and not scored; None: the first.
        tokens: at most this many tokens of it; None: all.
        lengths: tokens a prompt of the long-context tasks; those that the text or the model's
            positions cannot serve are left out.
        reference: folder of the published model, converted, that `fidelity` compares with; None:
            the model itself at sparsity 0, if its weights were left alone.
        limit: documents a task, prompts a length and depth of a long-context task, texts of each
            kind of `fidelity`; None: all of lm-eval's, `long_context.PER_CELL`, and the `LIMIT` of
            `conversation`, `last_word` and `fidelity`.
        batch_size: windows, requests or passages a forward pass, at most; `auto`: as many as make
            8,192 tokens. Long-context tasks and conversations take one text a pass.
        seed: of lm-eval's generators, and of the choice of texts of our own tasks; None: those
            that lm-eval's command takes, and 0.
        data_dir: folder of `<task>.jsonl`, the tasks' documents; None: from the hub.
        include_path: folder of lm-eval definitions of tasks, beside its own.
        num_fewshot: examples before each document of a task; None: as the task has it.
        apply_chat_template: requests are turns of a chat. system_instruction: before each.
        gen_kwargs: settings of generation, before those of a task: a mapping, or as lm-eval's
            command takes them.
        log_samples: folder for each task's documents, requests and answers at each level.
        dtype, device, device_map: of the model, see `checkpoint.load`.
    """

    tasks: tuple[str, ...] = ()
    sparsity: tuple[float, ...] | None = None
    policy: str = "gate"
    evict: str = PROTOCOLS[0]
    max_rows: int | None = None
    text: str | None = None
    context: int = 512
    prompt: int | None = None
    tokens: int | None = None
    lengths: tuple[int, ...] = long_context.LENGTHS
    reference: Path | None = None
    limit: int | None = None
    batch_size: int | str = 8
    seed: int | None = None
    data_dir: Path | None = None
    include_path: Path | None = None
    num_fewshot: int | None = None
    apply_chat_template: bool = False
    system_instruction: str | None = None
    gen_kwargs: Mapping[str, Any] | None = None
    log_samples: Path | None = None
    dtype: str = AUTO
    device: str = AUTO
    device_map: str | None = None

    def __post_init__(self) -> None:
        # recipes give lists and strings
        object.__setattr__(self, "tasks", tuple(dict.fromkeys(self.tasks)))
        if self.sparsity is not None:
            levels = tuple(sorted({check_sparsity(float(level)) for level in self.sparsity}))
            object.__setattr__(self, "sparsity", levels)
        for name in ("reference", "data_dir", "include_path", "log_samples"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, Path(getattr(self, name)))
        settings = self.gen_kwargs
        if isinstance(settings, str):
            object.__setattr__(self, "gen_kwargs", _settings(settings))
        elif not isinstance(settings, Mapping | None):
            raise CtxpruneError(f"gen_kwargs is a mapping, not {settings!r}")
        choose("policy", self.policy, policy_names())
        choose("value of evict", self.evict, PROTOCOLS)
        place(self.device, self.dtype, self.device_map)
        check_at_least("context", self.context, 2)
        if self.prompt is not None:
            check_at_least("prompt", self.prompt, 2)
            check_at_least("context", self.context, self.prompt + 1)
        elif self.evict == "prompt":
            raise CtxpruneError(
                "rows that leave after a prompt need one in the windows of perplexity too",
                "give `--prompt N`: so many tokens of each are read, and the rest is scored",
            )
        if isinstance(self.batch_size, str):
            choose("batch size", self.batch_size, (AUTO,))
        else:
            check_at_least("batch_size", self.batch_size, 1)
        if self.num_fewshot is not None:
            check_at_least("num_fewshot", self.num_fewshot, 0)
        if not self.lengths or {type(length) for length in self.lengths} != {int}:
            raise CtxpruneError("lengths must be whole numbers, at least one of them")
        object.__setattr__(self, "lengths", tuple(sorted(set(self.lengths))))
        # room for a fact, its question and a passage, even if letters are tokens
        check_at_least("lengths", self.lengths[0], 128)
        for name in ("tokens", "limit"):
            value = getattr(self, name)
            if value is not None:
                check_at_least(name, value, 1)


def _settings(text: str) -> dict[str, Any]:
    """`temperature=0.7,top_p=0.9`, or a JSON object, as lm-eval takes them.

    Raises:
        CtxpruneError: it is neither.
    """
    try:
        if text.strip().startswith("{"):
            return dict(json.loads(text))
        pairs = [pair.split("=", 1) for pair in text.split(",")]
        return {name.strip(): _value(value) for name, value in pairs}
    except ValueError as error:
        raise CtxpruneError(
            f"`{text}` is no list of settings", "write it like `temperature=0.7,do_sample=true`"
        ) from error


def _value(text: str) -> Any:
    """A number, true or false, or the words themselves."""
    try:
        return json.loads(text.strip().lower())
    except ValueError:
        return text.strip()


def _whole(name: str, values: Any, least: int) -> tuple[int, ...]:
    """Numbers from a list, as rising whole numbers of at least `least`."""
    for value in values:
        if not float(value).is_integer():
            raise CtxpruneError(f"{name} must be whole numbers, not {value:g}")
        check_at_least(name, value, least)
    return tuple(sorted({int(value) for value in values}))
