"""What a run is told: frozen, self-checking, refusing unknown keys; the only home of defaults."""

from collections.abc import Mapping
from dataclasses import KW_ONLY, field, replace
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic.dataclasses import dataclass

from ctxprune.pruner.errors import CtxpruneError, choose
from ctxprune.pruner.schema import (
    ALONE,
    LIST,
    STRICT,
    Count,
    Level,
    Name,
    Names,
    Natural,
    Positive,
    Rate,
    Seed,
    Settings,
    Share,
    Text,
    Tokens,
    check,
    shown,
)

# Tokens of a sequence between two times that a cap on rows is enforced, at most. More are cheaper
# to read, since they make a block of queries; fewer leave less room unused.
PERIOD = 16
# Logits divided by less leave the numbers of a float16.
LEAST_TEMPERATURE = 0.001
Trained = Literal["gates", "lora", "full"]
TRAINABLE: tuple[Trained, ...] = get_args(Trained)
# What `--evict` takes: rows leave while a prompt is read, or not before its end.
Protocol = Literal["reading", "prompt"]
PROTOCOLS: tuple[Protocol, ...] = get_args(Protocol)


def check_sparsity(value: float) -> float:
    """Return `value` if it is a share in [0, 1), else raise CtxpruneError."""
    return check("sparsity", Level, value)


def _known_policy(name: str) -> str:
    return choose("policy", name, _policies())


def _policies() -> list[str]:
    from ctxprune.pruner.policies import names  # late: a policy imports torch

    return list(names())


def _list_policies(schema: dict[str, Any]) -> None:
    schema["enum"] = _policies()


Rank = Annotated[int, Field(ge=1, le=4096)]
Bonus = Annotated[float, Field(ge=0.0, le=1e6)]
Beams = Annotated[int, Field(ge=1, le=4096)]
Prompts = Annotated[tuple[Text, ...], LIST, ALONE]
Policy = Annotated[str, AfterValidator(_known_policy), Field(json_schema_extra=_list_policies)]
# Shares of a layer each, of which one at least is above 0.
Shares = Annotated[tuple[Share, ...], Field(strict=False, min_length=1, max_length=10_000)]


def _read_levels(raw: Any) -> Any:
    """Levels as JSON has them, whose keys are text."""
    if not isinstance(raw, Mapping):
        return raw
    try:
        return {float(level): shares for level, shares in raw.items()}
    except (TypeError, ValueError) as error:
        raise CtxpruneError(f"the levels are not numbers, but {shown(list(raw))}") from error


def _rising(levels: dict[float, tuple[float, ...]]) -> dict[float, tuple[float, ...]]:
    if any(not sum(shares) for shares in levels.values()):
        raise CtxpruneError("at a level of `levels` no layer keeps anything")
    if len({len(shares) for shares in levels.values()}) > 1:
        raise CtxpruneError("the levels of `levels` are not of equally many layers")
    return dict(sorted(levels.items()))


@dataclass(frozen=True, config=STRICT)
class PruneConfig(Settings):
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

    rank: Rank = 32
    protect_first: Natural = 1
    protect_recent: Count = 1
    attention_bonus: Bonus = 1.0
    context: Annotated[Tokens, Field(ge=2)] = 512
    levels: Annotated[
        dict[Level, Shares],
        Field(max_length=1000),
        BeforeValidator(_read_levels),
        AfterValidator(_rising),
    ] = field(default_factory=dict)
    tuned: Level = 0.0
    max_rows: Count | None = None

    def __post_init__(self) -> None:
        self.cap(None)

    def level(self, sparsity: float | None) -> float:
        """The level that is asked for; the tuned one where none is."""
        return self.tuned if sparsity is None else sparsity

    def cap(self, max_rows: int | None) -> int | None:
        """The cap that is asked for, None where there is none.

        Args:
            max_rows: None: the one of the model; 0: none.

        Raises:
            CtxpruneError: it leaves no room for protected tokens and those to be read.
        """
        rows = (self.max_rows if max_rows is None else max_rows) or None
        protected = self.protect_first + self.protect_recent
        least = protected + 2 * PERIOD
        if rows is not None and rows < least:
            raise CtxpruneError(
                f"a cap of {rows} rows is too small: {protected} tokens are protected, and "
                f"{PERIOD} are read between two evictions",
                f"give `--max-rows {least}` or more",
            )
        return rows

    def check_layers(self, layers: int, source: str) -> None:
        """Raise CtxpruneError unless the levels are of as many layers as have a gate."""
        of = next((len(shares) for shares in self.levels.values()), layers)
        if of != layers:
            raise CtxpruneError(
                f"`levels` in {source} are of {of} layers, and the model has {layers} with a gate",
                "the settings belong to another model; convert it again",
            )


@dataclass(frozen=True, config=STRICT)
class TuneConfig(Settings):
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
        distill: weight in [0, 1] of the divergence from the model as it was before the run (from
            itself with its gates off, where all weights are trained), against the LM loss; None: 1
            where gates alone are trained, 0.5 with LoRA, else 0.
        answers: share of the windows that are answers of the model itself, dense, to instructions
            about the text; None: a quarter where it has a chat template, is distilled from itself,
            and reads windows of 512 tokens or more, else 0.
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

    sparsity: Level = 0.8
    data: Name | None = None
    text_field: Name | None = None
    valid: Name | None = None
    steps: Natural = 300
    local_steps: Natural = 0
    local_lr: Rate = 1e-2
    train: Trained = "gates"
    context: Annotated[Tokens, Field(ge=16)] = 512
    batch_size: Count = 2
    accumulate: Count = 1
    lr: Rate = 2e-5
    gate_lr: Rate = 3e-3
    warmup: Share = 0.05
    ramp: Share = 0.25
    penalty: Positive = 1.0
    sharpness: Annotated[float, Field(ge=1.0, le=1000.0)] = 4.0
    alpha: Annotated[float, Field(ge=1.0, le=10.0)] = 1.0
    distill: Share | None = None
    answers: Share | None = None
    dense_share: Share = 0.5
    spread: Share = 0.5
    lora_rank: Rank = 16
    seed: Seed = 0
    max_tokens: Annotated[int, Field(ge=1, le=2**62)] | None = None
    max_minutes: Positive | None = None
    save_every: Count = 50
    report_to: Names = ()
    bf16: bool = False
    checkpointing: bool = False
    device: Name = "auto"

    def __post_init__(self) -> None:
        if self.sparsity == 0.0 and self.train == "gates":
            raise CtxpruneError(
                "sparsity 0 leaves the gates nothing to learn",
                "give a level such as `--sparsity 0.8`, or `--train full` for a dense control",
            )
        if not (self.steps or self.ahead or self.train == "gates"):
            raise CtxpruneError(f"steps must be at least 1 with `--train {self.train}`")

    @property
    def distillation(self) -> float:
        """Weight of the divergence from the dense model, in [0, 1]."""
        if self.distill is not None:
            return self.distill
        return {"gates": 1.0, "lora": 0.5, "full": 0.0}[self.train]

    @property
    def ahead(self) -> int:
        """Steps of the local phase: none where the gates are left alone."""
        return self.local_steps if self.sparsity > 0.0 else 0

    @property
    def total_steps(self) -> int:
        """Optimizer steps of both phases."""
        return self.ahead + self.steps

    @property
    def local(self) -> "TuneConfig":
        """The local phase as a run of its own: pruned at every step, from the first one on."""
        return replace(
            self, steps=self.local_steps, gate_lr=self.local_lr, dense_share=0.0, ramp=0.0
        )


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ChatConfig(Settings):
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

    sparsity: Level | None = None
    policy: Policy = "gate"
    max_rows: Natural | None = None
    system: Text | None = None
    max_new_tokens: Tokens = 512
    temperature: Annotated[float, Field(ge=0.0, le=1000.0)] = 0.0
    top_k: Count | None = None
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    stop: Names = ()
    seed: Seed = 0
    dtype: Name = "auto"
    device: Name = "auto"
    device_map: Name | None = None

    def __post_init__(self) -> None:
        if 0.0 < self.temperature < LEAST_TEMPERATURE:
            raise CtxpruneError(
                f"temperature must be 0, or at least {LEAST_TEMPERATURE:g}, "
                f"not {self.temperature:g}",
                "0 takes the likeliest token",
            )
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


@dataclass(frozen=True, config=STRICT)
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

    prompt: Prompts = ()
    _: KW_ONLY
    chat: bool | None = None
    evict: Protocol = "reading"
    max_new_tokens: Tokens = 128
    num_beams: Beams = 1
    num_return_sequences: Beams = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.prompt or not all(text.strip() for text in self.prompt):
            raise CtxpruneError("the prompt is empty", 'give some text: ctxprune generate "It was"')
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
