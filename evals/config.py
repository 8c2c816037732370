"""What a measurement is told: frozen, self-checking, refusing unknown keys."""

import math
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic.dataclasses import dataclass

from ctxprune.evals.quality import conversation, fidelity, last_word, long_context
from ctxprune.evals.results import ORACLE, PRUNED
from ctxprune.pruner.config import Policy, Protocol
from ctxprune.pruner.device import AUTO, place
from ctxprune.pruner.errors import CtxpruneError
from ctxprune.pruner.parsing import json_of
from ctxprune.pruner.schema import (
    LIST,
    STRICT,
    Count,
    Level,
    Name,
    Names,
    Natural,
    Seed,
    Settings,
    Text,
    Tokens,
)


def _settings(given: Any) -> Any:
    """`temperature=0.7,top_p=0.9`, or a JSON object, as lm-eval takes them, parsed.

    Raises:
        CtxpruneError: it is neither.
    """
    if not isinstance(given, str):
        return given
    if given.strip().startswith("{"):
        return json_of(given, "`gen_kwargs`")
    pairs = [pair.partition("=") for pair in given.split(",")]
    if not all(name.strip() and equals for name, equals, _ in pairs):
        raise CtxpruneError(
            f"`{given}` is no list of settings", "write it like `temperature=0.7,do_sample=true`"
        )
    return {name.strip(): _value(value) for name, _, value in pairs}


def _value(text: str) -> Any:
    """A number, true or false, or the words themselves."""
    for read in (int, float, _BOOLS.__getitem__):
        try:
            return read(text.strip().lower())
        except (ValueError, KeyError):
            continue
    return text.strip()


def _in_order(modes: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(mode for mode in get_args(Mode) if mode in modes)


_BOOLS = {"true": True, "false": False}
# What lists become: rising, or in their order, each value once; and none of them is empty.
RISING = AfterValidator(lambda values: tuple(sorted(set(values))))
ONCE = AfterValidator(lambda values: tuple(dict.fromkeys(values)))
SOME = Field(strict=False, min_length=1, max_length=1000)
Context = Annotated[Tokens, Field(ge=16)]
# Room for a fact, its question and a passage, even if letters are tokens.
Length = Annotated[Tokens, Field(ge=128)]
Mode = Literal["dense-dynamic", "dense-static", "pruned", "oracle"]
Folder = Annotated[Path, Field(strict=False)]
Setting = float | int | bool | str | list[str] | None
Generation = Annotated[
    dict[Name, Setting], BeforeValidator(_settings, json_schema_input_type=str | dict[str, Any])
]
OWN_TASKS = (fidelity.NAME, *long_context.TASKS, conversation.NAME, last_word.NAME)


@dataclass(frozen=True, config=STRICT)
class BenchConfig(Settings):
    """One benchmark.

    Attributes:
        architecture: instead of a checkpoint, random weights of this shape: a model type (its
            default configuration), a config.json, or a folder with one.
        batch, context: sequences, and tokens of their prompts; every pair is measured.
        unequal: the prompts of a batch are of unequal lengths, padded on the left: spread evenly
            from half of the context to all of it.
        sparsity: levels of the pruned mode; 0 is our dense cache with the engine off.
        policy: which eviction policy decides. evict: when, of `PROTOCOLS`.
        modes: of `Mode`; `oracle` is dense attention to as many rows as `pruned` attends to.
        compile: measure compiled steps beside, of the static cache and of the pruned mode.
        max_rows: cap on the rows of a sequence in a layer; None: that of the model; 0: none.
        repeats: bursts of decode steps a mode. steps: in a burst, at least; it is rounded up to
            whole eviction intervals, so that every burst has its part of eviction steps.
        prefills: timed ones a mode.
        text: of the prompts: .txt/.jsonl(.gz) file, folder, `datasets` name; None: the embedded
            evaluation sample.
        seed: of random weights. device: of the model. dtype: measured one after the other.
    """

    architecture: Name | None = None
    batch: Annotated[tuple[Count, ...], SOME, RISING] = (1, 8)
    context: Annotated[tuple[Context, ...], SOME, RISING] = (512,)
    unequal: bool = False
    sparsity: Annotated[tuple[Level, ...], SOME, RISING] = (0.0, 0.5, 0.8, 0.9)
    policy: Policy = "gate"
    evict: Protocol = "reading"
    modes: Annotated[tuple[Mode, ...], SOME, AfterValidator(_in_order)] = get_args(Mode)
    compile: bool = False
    max_rows: Natural | None = None
    repeats: Count = 5
    steps: Count = 32
    prefills: Count = 3
    text: Name | None = None
    seed: Seed = 0
    dtype: Annotated[tuple[Name, ...], SOME, ONCE] = (AUTO,)
    device: Name = AUTO

    def __post_init__(self) -> None:
        for dtype in self.dtype:
            place(self.device, dtype)
        if ORACLE in self.modes and PRUNED not in self.modes:
            raise CtxpruneError(
                "mode `oracle` needs mode `pruned`, which sets how many rows it holds"
            )
        if self.compile and self.unequal:
            raise CtxpruneError(
                "a compiled step is measured without padding",
                "measure `--unequal` and `--compile` one after the other",
            )

    def burst(self, interval: int) -> int:
        """Steps in a burst, where rows leave after every so many tokens at most; 0: never."""
        every = max(interval, 1)
        return math.ceil(self.steps / every) * every

    def decoded(self, steps: int) -> int:
        """Tokens that the longest mode decodes: a warm-up, the repeats, and a profiled burst."""
        return steps * (self.repeats + 2)


@dataclass(frozen=True, config=STRICT)
class EvalConfig(Settings):
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

    tasks: Annotated[Names, ONCE] = ()
    sparsity: Annotated[tuple[Level, ...], LIST, RISING] | None = None
    policy: Policy = "gate"
    evict: Protocol = "reading"
    max_rows: Natural | None = None
    text: Name | None = None
    context: Annotated[Tokens, Field(ge=2)] = 512
    prompt: Annotated[Tokens, Field(ge=2)] | None = None
    tokens: Count | None = None
    lengths: Annotated[tuple[Length, ...], SOME, RISING] = long_context.LENGTHS
    reference: Folder | None = None
    limit: Count | None = None
    batch_size: Count | Literal["auto"] = 8
    seed: Seed | None = None
    data_dir: Folder | None = None
    include_path: Folder | None = None
    num_fewshot: Natural | None = None
    apply_chat_template: bool = False
    system_instruction: Text | None = None
    gen_kwargs: Generation | None = None
    log_samples: Folder | None = None
    dtype: Name = AUTO
    device: Name = AUTO
    device_map: Name | None = None

    def __post_init__(self) -> None:
        place(self.device, self.dtype, self.device_map)
        if self.prompt is None and self.evict == "prompt":
            raise CtxpruneError(
                "rows that leave after a prompt need one in the windows of perplexity too",
                "give `--prompt N`: so many tokens of each are read, and the rest is scored",
            )
        if self.prompt is not None and self.context <= self.prompt:
            raise CtxpruneError(
                f"context must be at least {self.prompt + 1}, one more than the prompt, "
                f"not {self.context}"
            )
