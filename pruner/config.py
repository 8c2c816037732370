"""What a run is told: frozen, self-checking, refusing unknown keys; the only home of defaults."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from types import NoneType, UnionType
from typing import Any, ClassVar, Self, get_args, get_type_hints

from ctxprune.pruner.errors import CtxpruneError, choose

# Tokens of a sequence between two times that a cap on rows is enforced, at most. More are cheaper
# to read, since they make a block of queries; fewer leave less room unused.
PERIOD = 16
TRAINABLE = ("gates", "lora", "full")
# What `--evict` takes: rows leave while a prompt is read, or not before its end.
PROTOCOLS = ("reading", "prompt")


def check_sparsity(value: float) -> float:
    """Return `value` if it is a share in [0, 1), else raise CtxpruneError."""
    if not 0.0 <= value < 1.0:
        raise CtxpruneError(
            f"sparsity {value:g} is outside [0, 1)", "0.8 drops 80% of the context, 0 drops nothing"
        )
    return value


def check_at_least(name: str, value: float, least: float) -> None:
    """Raise CtxpruneError if an option lies below its least value."""
    if value < least:
        raise CtxpruneError(f"{name} must be at least {least:g}, not {value:g}")


def check_max_rows(rows: int, protected: int) -> None:
    """Raise CtxpruneError unless a cap leaves room for protected tokens and those to be read."""
    least = protected + 2 * PERIOD
    if rows < least:
        raise CtxpruneError(
            f"a cap of {rows} rows is too small: {protected} tokens are protected, and {PERIOD} "
            "are read between two evictions",
            f"give `--max-rows {least}` or more",
        )


class FromMapping:
    """A dataclass that can be read from YAML or JSON, key by key."""

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]

    @classmethod
    def from_mapping(cls, raw: Mapping[str, Any], source: str) -> Self:
        """Build from parsed YAML or JSON.

        Raises:
            CtxpruneError: for a key that is no field (with the nearest one) or a value refused.
        """
        hints = get_type_hints(cls)
        for key, value in raw.items():
            choose(f"key in {source}", str(key), cls.__dataclass_fields__)
            _check_scalar(f"`{key}` of {source}", value, hints[key])
        try:
            return cls(**raw)
        except TypeError as error:
            raise CtxpruneError(f"{source}: {error}") from error


def _check_scalar(name: str, value: Any, hint: Any) -> None:
    """Raise CtxpruneError unless a value fits a hint that consists of scalar types."""
    types = get_args(hint) if isinstance(hint, UnionType) else (hint,)
    fits = type(value) in types or (type(value) is int and float in types)
    if set(types) <= {int, float, bool, str, NoneType} and not fits:
        wanted = " or ".join(t.__name__ for t in types if t is not NoneType)
        raise CtxpruneError(f"{name} must be of type {wanted}, not {value!r}")


def _names(value: str | Sequence[str]) -> tuple[str, ...]:
    """A list of strings; one alone stands for itself."""
    return (value,) if isinstance(value, str) else tuple(value)


@dataclass(frozen=True)
class PruneConfig(FromMapping):
    """What is stored with a converted checkpoint, in `ctxprune.json`.

    Attributes:
        rank: width r of the interaction query and key.
        protect_first: first tokens of a sequence that are never dropped (attention sinks).
        protect_recent: newest tokens that are never dropped.
        attention_bonus: weight of what a row was good for so far (log of the attention that it
            received, times the norm of its value) beside its margin of survival, in training as at
            inference, until tuning ends and picks the one to evict by (`calibrate`); 0: the
            margin alone, and attention weights need not be computed apart.
        context: length in tokens that the gates were tuned and calibrated at.
        levels: sparsity -> share of the pairs j < k that each layer keeps; empty until tuned.
        tuned: the sparsity asked for at tuning, 0 until then; what `load` uses by default.
        max_rows: cap on the rows of a sequence in a layer; None: no cap.
    """

    rank: int = 32
    protect_first: int = 1
    protect_recent: int = 1
    attention_bonus: float = 1.0
    context: int = 512
    levels: Mapping[float, tuple[float, ...]] = field(default_factory=dict)
    tuned: float = 0.0
    max_rows: int | None = None

    def __post_init__(self) -> None:
        check_at_least("rank", self.rank, 1)
        check_at_least("protect_first", self.protect_first, 0)
        check_at_least("protect_recent", self.protect_recent, 1)
        check_at_least("attention_bonus", self.attention_bonus, 0.0)
        check_at_least("context", self.context, 2)
        check_sparsity(self.tuned)
        if self.max_rows is not None:
            check_max_rows(self.max_rows, self.protect_first + self.protect_recent)
        if any(not isinstance(shares, list | tuple) for shares in self.levels.values()):
            raise CtxpruneError(
                "this model was calibrated by an earlier version of ctxprune", "tune it again"
            )
        levels = {
            check_sparsity(float(level)): tuple(float(share) for share in shares)
            for level, shares in self.levels.items()
        }
        object.__setattr__(self, "levels", dict(sorted(levels.items())))


@dataclass(frozen=True)
class TuneConfig(FromMapping):
    """One fine-tuning run.

    Attributes:
        sparsity: the level asked for; the others are trained and calibrated beside it. 0 leaves
            the gates alone: the control that a pruned model is compared with.
        data: training text: a file (txt, jsonl, json, csv, parquet), a folder of such files, or a
            name for `datasets`; None: the embedded sample.
        text_field: the field of each row with the text, or with the messages of a conversation;
            None: "text" or "messages".
        valid: held-out text for calibration; None: embedded sample if `data` is, else the last
            twentieth of the training windows, which training then leaves out.
        steps: optimizer steps of the model and its gates; 0 where the local phase is all, or where
            a tuned model is only calibrated anew (`train` is then `gates`).
        local_steps: steps before these, in which each gate learns alone, against the dense output
            of its own layer. local_lr: peak learning rate of the gates in them.
        train: `gates`, which leaves the model's weights as they are; `lora` (gates and LoRA); or
            `full` (gates and all weights).
        context: tokens a window. batch_size: windows a micro-batch. accumulate: micro-batches a
            step.
        lr, gate_lr: peak learning rates of the weights and of the gates.
        warmup: share of the steps over which the learning rates rise.
        ramp: share of the steps over which the trained level rises from 0.
        penalty: weight of the squared log-ratio of soft kept share to its target.
        sharpness: factor on the scores at the end, rising from 1, so soft decisions become hard.
        alpha: alpha of alpha_sigmoid at the end, rising by a cosine from 1 (the paper's schedule).
        distill: weight in [0, 1] of the divergence from the same model with its gates off,
            against the LM loss; None: 1 where gates alone are trained, else 0.
        dense_share: share of the micro-batches that are read with the gates off.
        spread: share of the others whose level is drawn from the whole range, and not `sparsity`:
            what makes one checkpoint serve all levels.
        lora_rank: rank of the LoRA matrices.
        seed: of the data order, the sampled levels and dropout.
        max_tokens: of training text; fewer steps than `steps` then make the whole schedule.
        max_minutes: of training; the run then ends where it is, with what it has learned.
        save_every: steps between two resumable checkpoints.
        report_to: experiment trackers of accelerate, such as `tensorboard` and `wandb`.
        bf16: autocast to bfloat16. checkpointing: recompute activations in the backward pass.
        device: torch device; `auto`: the accelerator if there is one, else the CPU.
    """

    sparsity: float = 0.8
    data: str | None = None
    text_field: str | None = None
    valid: str | None = None
    steps: int = 300
    local_steps: int = 0
    local_lr: float = 1e-2
    train: str = "gates"
    context: int = 512
    batch_size: int = 2
    accumulate: int = 1
    lr: float = 2e-5
    gate_lr: float = 3e-3
    warmup: float = 0.05
    ramp: float = 0.25
    penalty: float = 1.0
    sharpness: float = 4.0
    alpha: float = 1.0
    distill: float | None = None
    dense_share: float = 0.5
    spread: float = 0.5
    lora_rank: int = 16
    seed: int = 0
    max_tokens: int | None = None
    max_minutes: float | None = None
    save_every: int = 50
    report_to: tuple[str, ...] = ()
    bf16: bool = False
    checkpointing: bool = False
    device: str = "auto"

    def __post_init__(self) -> None:
        object.__setattr__(self, "report_to", _names(self.report_to))
        check_sparsity(self.sparsity)
        if self.sparsity == 0.0 and self.train == "gates":
            raise CtxpruneError(
                "sparsity 0 leaves the gates nothing to learn",
                "give a level such as `--sparsity 0.8`, or `--train full` for a dense control",
            )
        choose("value of train", self.train, TRAINABLE)
        check_at_least("steps", self.steps, 0 if self.ahead or self.train == "gates" else 1)
        for name in ("batch_size", "accumulate", "lora_rank", "save_every"):
            check_at_least(name, getattr(self, name), 1)
        check_at_least("context", self.context, 16)
        for name, least in (("max_tokens", 1), ("max_minutes", 0)):
            if getattr(self, name) is not None:
                check_at_least(name, getattr(self, name), least)
        for name in ("alpha", "sharpness"):
            check_at_least(name, getattr(self, name), 1.0)
        for name in ("local_steps", "local_lr", "lr", "gate_lr", "penalty", "warmup", "ramp"):
            check_at_least(name, getattr(self, name), 0.0)
        for name in ("distillation", "dense_share", "spread"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise CtxpruneError(f"{name} is a share in [0, 1], not {getattr(self, name):g}")

    @property
    def distillation(self) -> float:
        """Weight of the divergence from the dense model, in [0, 1]."""
        if self.distill is not None:
            return self.distill
        return 1.0 if self.train == "gates" else 0.0

    @property
    def ahead(self) -> int:
        """Steps of the local phase: none where the gates are left alone."""
        return self.local_steps if self.sparsity > 0.0 else 0

    @property
    def total_steps(self) -> int:
        """Optimizer steps of both phases."""
        return self.ahead + self.steps

    @property
    def local(self) -> TuneConfig:
        """The local phase as a run of its own: pruned at every step, from the first one on."""
        return replace(
            self, steps=self.local_steps, gate_lr=self.local_lr, dense_share=0.0, ramp=0.0
        )


@dataclass(frozen=True, kw_only=True)
class ChatConfig(FromMapping):
    """How a model answers.

    Attributes:
        sparsity: level in [0, 1); None: the tuned one.
        policy: which eviction policy decides.
        max_rows: cap on the rows of a sequence in a layer; None: the one of the model; 0: none.
        system: what the model is told before the first message; None: what its template says.
        max_new_tokens: tokens to write, at most.
        temperature: of sampling; 0 is greedy. top_k, top_p: sample among the likeliest only.
        stop: strings that end a text.
        seed: of sampling.
        dtype, device, device_map: of the model, see `checkpoint.load`.
    """

    sparsity: float | None = None
    policy: str = "gate"
    max_rows: int | None = None
    system: str | None = None
    max_new_tokens: int = 512
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    stop: tuple[str, ...] = ()
    seed: int = 0
    dtype: str = "auto"
    device: str = "auto"
    device_map: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", _names(self.stop))
        if self.sparsity is not None:
            check_sparsity(self.sparsity)
        check_at_least("temperature", self.temperature, 0.0)
        for name in ("max_new_tokens", "top_k"):
            value = getattr(self, name)
            if value is not None:
                check_at_least(name, value, 1)
        if self.top_p is not None and not 0.0 < self.top_p <= 1.0:
            raise CtxpruneError(f"top_p is a share in (0, 1], not {self.top_p:g}")
        if not self.temperature and (self.top_k is not None or self.top_p is not None):
            raise CtxpruneError(
                "top_k and top_p only matter to sampling", "give a temperature such as 0.8"
            )

    @property
    def sampling(self) -> dict[str, Any]:
        """What transformers' `generate` is told of it."""
        if not self.temperature:
            return {"do_sample": False, "max_new_tokens": self.max_new_tokens}
        return {
            "do_sample": True,
            "max_new_tokens": self.max_new_tokens,
            "temperature": self.temperature,
            "top_k": self.top_k or 0,
            "top_p": 1.0 if self.top_p is None else self.top_p,
        }


@dataclass(frozen=True)
class GenerateConfig(ChatConfig):
    """Texts to write; what is not listed is as in `ChatConfig`.

    Attributes:
        prompt: texts to continue, as one batch; a single string is a batch of one.
        chat: the prompts are messages of a user, in the model's chat template; None: if the model
            is trained to answer in it.
        evict: `reading`: rows leave while a prompt is read; `prompt`: not before its end.
        num_beams: beams of the search; 1: none.
        num_return_sequences: texts a prompt.
    """

    prompt: tuple[str, ...] = ()
    _: KW_ONLY
    chat: bool | None = None
    evict: str = PROTOCOLS[0]
    max_new_tokens: int = 128
    num_beams: int = 1
    num_return_sequences: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        prompt = (self.prompt,) if isinstance(self.prompt, str) else tuple(self.prompt)
        object.__setattr__(self, "prompt", prompt)
        if not self.prompt or not all(text.strip() for text in self.prompt):
            raise CtxpruneError("the prompt is empty", 'give some text: ctxprune generate "It was"')
        choose("value of evict", self.evict, PROTOCOLS)
        for name in ("num_beams", "num_return_sequences"):
            check_at_least(name, getattr(self, name), 1)
        if self.system is not None and self.chat is False:
            raise CtxpruneError(
                "a system message is part of a chat", "leave out `--system` or `--no-chat`"
            )
        if not self.temperature and self.num_return_sequences > self.num_beams:
            raise CtxpruneError(
                f"greedy search finds {self.num_beams} texts a prompt, not "
                f"{self.num_return_sequences}",
                "give a temperature, or as many beams",
            )
