"""The fine-tuning loop: soft survival, sampled levels, checkpoints that resume bit for bit.

While it runs, its state is one safetensors file in `.<out>.tuning/`, replaced atomically; `out`
itself appears when all is done. Data order, levels and dropout depend on the seed and the step
alone, so a resumed run repeats what an uninterrupted one does.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.tracking import get_available_trackers
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    LoggerType,
    ProjectConfiguration,
    broadcast_object_list,
)
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ctxprune.pruner.checkpoints import adapter, checkpoint
from ctxprune.pruner.config import PruneConfig, TuneConfig
from ctxprune.pruner.device import Place, place, warn_of_emulation
from ctxprune.pruner.engine.handle import Handle, handle_of
from ctxprune.pruner.engine.modes import Mode, Off
from ctxprune.pruner.engine.soft import Level, SoftAttention, prior
from ctxprune.pruner.errors import CtxpruneError, Interrupted, choose
from ctxprune.pruner.files import (
    beside,
    check_room,
    claimed,
    refuse_existing,
    remove,
    staged,
    whole,
    writing,
)
from ctxprune.pruner.finite import first_non_finite
from ctxprune.pruner.interrupts import deferred, understood
from ctxprune.pruner.rows import ceiling
from ctxprune.pruner.training import windows
from ctxprune.pruner.training.calibrate import calibrate, passes_of
from ctxprune.pruner.training.local import LocalAttention
from ctxprune.pruner.training.metrics import BOARD, Metrics, scalars
from ctxprune.pruner.training.objective import (
    distillation_loss,
    hardening,
    learning_rate_factor,
    lm_loss,
    local_loss,
    sample_level,
    sparsity_penalty,
)
from ctxprune.pruner.training.windows import Windows

STATE = "state.safetensors"
# What a run that diverged may be resumed with less of.
RATES = ("gate_lr", "local_lr", "lr")
# What attention modules call the dropout of their weights; any other is refused when it is met.
DROPOUTS = (
    "attention_dropout",
    "attn_dropout",
    "attn_drop",
    "dropout",
    "dropout_p",
    "dropout_prob",
)

# Micro-batches take as long as this many passes of calibration: a guess, until one was made.
PASSES_OF_A_BATCH = 4.0

OnStep = Callable[[dict[str, Any]], None]
OnPhase = Callable[[str], None]
OnProgress = Callable[[int, int, float], None]


@dataclasses.dataclass(frozen=True)
class _Listeners:
    """Who is told of a run; see `tune`."""

    on_step: OnStep
    on_phase: OnPhase
    on_answers: OnProgress
    on_calibration: OnProgress


class Trainee(nn.Module):
    """A model with its gates as a module whose forward pass is the loss of a micro-batch.

    Attributes:
        dropout: of the model's attention weights, which is switched off.
    """

    def __init__(self, model: PreTrainedModel, handle: Handle, config: TuneConfig) -> None:
        super().__init__()
        self.model = model
        self.handle = handle
        self.config = config
        self.dropout = _still(handle)

    def forward(
        self, ids: Tensor, level: float, sharpness: float, alpha: float, local: bool = False
    ) -> tuple[Tensor, dict[str, Any]]:
        """Loss and figures of ids (b, n) at a level, 0 being dense; local: of the gates alone."""
        mode: Mode = Off()
        if level > 0.0:
            mode = (LocalAttention if local else SoftAttention)(
                Level(prior(level, ids.shape[1]), 0.0),
                self.handle.config,
                sharpness=sharpness,
                alpha=alpha,
            )
        if isinstance(mode, LocalAttention):
            return self._local(ids, level, mode)
        teacher = self._teach(ids, level)
        with self.handle.running(mode):
            logits = self.model(ids, use_cache=False).logits
        task = lm_loss(logits, ids)
        loss, seen = task, {"lm_loss": task.detach()}
        if teacher is not None:
            divergence = distillation_loss(logits, teacher)
            loss = torch.lerp(task, divergence, self.config.distillation)
            seen["divergence"] = divergence.detach()
        if isinstance(mode, SoftAttention):
            loss = loss + self.config.penalty * sparsity_penalty(_mean(mode.kept), level)
            seen |= _realised(mode, level)
        return loss, seen

    def _local(
        self, ids: Tensor, level: float, soft: LocalAttention
    ) -> tuple[Tensor, dict[str, Any]]:
        model = self.handle.model
        with soft.watch(self.handle.decoder), self.handle.running(soft):
            model(ids, use_cache=False, logits_to_keep=1)
        errors = torch.stack([soft.errors[layer] for layer in sorted(soft.errors)])
        penalty = self.config.penalty * sparsity_penalty(_mean(soft.kept), level)
        loss = local_loss(errors) + penalty
        return loss, {"local_error": errors.detach().mean(), **_realised(soft, level)}

    @torch.no_grad()
    def _teach(self, ids: Tensor, level: float) -> Tensor | None:
        """Logits to learn from: no second copy of the weights makes them.

        They are those of the model as it was before the run, where LoRA alone changes it; else of
        this very model with its gates off, which has nothing to teach itself at level 0.
        """
        adapted = self.model if isinstance(self.model, PeftModel) else None
        if self.config.distillation == 0.0 or (level == 0.0 and adapted is None):
            return None
        before = nullcontext() if adapted is None else adapted.disable_adapter()
        with self.handle.running(Off()), before:
            return self.model(ids, use_cache=False).logits  # type: ignore[no-any-return]


def _mean(shares: dict[int, Tensor]) -> Tensor:
    return torch.stack([shares[layer] for layer in sorted(shares)]).mean()


def _realised(soft: SoftAttention, level: float) -> dict[str, Any]:
    """What was dropped, softly and hard, beside the level that was asked for."""
    layers = sorted(soft.hard_kept)
    return {
        "target": level,
        "sparsity_soft": 1.0 - float(_mean(soft.kept).detach()),
        "sparsity_hard": 1.0 - float(sum(soft.hard_kept.values())) / len(layers),
        "layers_hard": [1.0 - float(soft.hard_kept[layer]) for layer in layers],
        "layers_live": [float(soft.live[layer]) for layer in layers],
    }


def tune(
    folder: Path,
    out: Path,
    config: TuneConfig,
    *,
    resume: bool = False,
    force: bool = False,
    on_step: OnStep | None = None,
    on_phase: OnPhase | None = None,
    on_answers: OnProgress | None = None,
    on_calibration: OnProgress | None = None,
) -> Path:
    """Fine-tune a converted model to prune, calibrate it, and write it to `out`.

    Args:
        folder: a converted model. out: folder to make; force: replace it. config: the run.
        resume: go on from the state that an interrupted run of the same configuration left; without
            it and without `force` such a state is not touched.
        on_step: receives each step's figures, those of metrics.jsonl; `eta_s` are the seconds left
            with calibration. on_phase: what happens now.
        on_answers, on_calibration: answers written and passes done, of how many, and the seconds
            left.

    Raises:
        CtxpruneError: bad input, divergence, nothing to resume, or another process writes `out`.
        Interrupted: after a KeyboardInterrupt, with the state saved.
    """
    refuse_existing(out, force=force)
    work = beside(out, ".tuning")
    where = place(config.device, "float32")
    if where.device.index is not None:
        torch.accelerator.set_device_index(where.device.index)
    # It would hold to the precision of the first run of a process.
    AcceleratorState._reset_state()
    accelerator = Accelerator(
        cpu=where.device.type == "cpu",
        mixed_precision="bf16" if config.bf16 else "no",
        gradient_accumulation_steps=config.accumulate,
        log_with=_trackers(config) or None,
        project_config=ProjectConfiguration(logging_dir=str(work / BOARD)),
        # A dense micro-batch uses no gate.
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )
    if accelerator.distributed_type is DistributedType.FSDP:
        raise CtxpruneError(
            "tuning cannot be sharded by FSDP: its state and its adapter are whole tensors",
            "leave FSDP off; `--train lora --gradient-checkpointing` saves memory on every process",
        )
    listeners = _Listeners(
        on_step or _say_nothing,
        on_phase or _say_nothing,
        on_answers or _say_nothing,
        on_calibration or _say_nothing,
    )
    if not accelerator.is_main_process:
        listeners = _Listeners(_say_nothing, _say_nothing, _say_nothing, _say_nothing)
    with claimed(out) if accelerator.is_main_process else nullcontext():
        _tune(folder, out, work, config, accelerator, where, resume, force, listeners)
    return out


def _tune(
    folder: Path,
    out: Path,
    work: Path,
    config: TuneConfig,
    accelerator: Accelerator,
    where: Place,
    resume: bool,
    force: bool,
    listeners: _Listeners,
) -> None:
    on_phase = listeners.on_phase
    interrupted = (work / STATE).is_file()
    if resume and not interrupted:
        raise CtxpruneError(
            f"there is no interrupted run for `{out}` to resume", "leave out `--resume`"
        )
    if interrupted and not resume:
        if not force:
            raise CtxpruneError(
                f"a run for `{out}` was interrupted, and its state is kept",
                "go on with `--resume`, or begin anew with `--force`",
            )
        on_phase(f"the state of an interrupted run for {out} is dropped")
    model = checkpoint.load_off(
        folder, dataclasses.replace(where, device=accelerator.device), on_phase
    )
    handle = handle_of(model)
    tokenizer = checkpoint.load_tokenizer(folder)
    _check_context(model, handle, config)
    if config.bf16:
        warn_of_emulation(accelerator.device, torch.bfloat16, on_phase)
    tokens = config.context * config.batch_size * config.accumulate * accelerator.num_processes
    if config.max_tokens is not None:
        within = config.max_tokens // tokens - config.ahead
        steps = min(config.steps, max(within, 0 if config.ahead else 1))
        config = dataclasses.replace(config, steps=steps)
    on_phase("reading the text")
    texts, held_out = windows.read(tokenizer, config)
    known = work / windows.ANSWERS if resume else None
    on_answer = _watch(listeners.on_answers)
    mixture = windows.mixed(model, tokenizer, config, texts, known, on_answer)
    model, parameters = trainable(model, handle, config)
    trainee = Trainee(model, handle, config)
    if trainee.dropout:
        on_phase(f"attention dropout of {trainee.dropout:g} is off: soft attention has none")
    # A state has what is trained and its two moments; it is replaced by another.
    state = 3 * sum(4 * each.numel() for group in parameters for each in group["params"])
    check_room(out, checkpoint.size(model), state, state)
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.99), weight_decay=0.0)
    run = _Run(work, folder, config, trainee, optimizer)
    start = run.restore() if resume else 0
    if run.rates:
        on_phase(f"going on from step {start} with lower learning rates")
    total_steps = config.total_steps
    try:
        if accelerator.is_main_process:
            run.begin(start, mixture)
            told = {k: v for k, v in _told(config).items() if isinstance(v, int | float | str)}
            accelerator.init_trackers(
                "ctxprune", config=told, init_kwargs={"tensorboard": {"purge_step": start + 1}}
            )
        accelerator.wait_for_everyone()
        prepared, prepared_optimizer = accelerator.prepare(trainee, optimizer)
        passes = passes_of(model, held_out, config.sparsity) if config.sparsity > 0.0 else 0
        on_phase(_plan(config, mixture, passes))
        clock, before = time.monotonic(), run.seconds
        for step in range(start, total_steps):
            with ExitStack() as update:
                figures = _step(
                    step,
                    prepared,
                    prepared_optimizer,
                    accelerator,
                    run,
                    config,
                    mixture,
                    update,
                )
                here = time.monotonic() - clock
                run.seconds = before + here
                pace = (step + 1 - start) / here
                figures["tokens_per_s"] = pace * tokens
                per_pass = here / (step + 1 - start) / config.accumulate / PASSES_OF_A_BATCH
                figures["eta_s"] = (total_steps - step - 1) / pace + passes * per_pass
                last = step + 1 == total_steps or _time_is_up(run.seconds, config)
                run.done = step + 1
                if accelerator.is_main_process:
                    run.metrics.log(figures)
                    accelerator.log(scalars(figures), step=step + 1)
                    listeners.on_step(figures)
                    if last or _is_due(step + 1, config):
                        run.check(step, mixture)
                        run.save()
            if last:
                break
        _end_tracking(accelerator)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            prune = handle.config
            if passes:
                on_phase(f"calibrating on {held_out.numel():,} held-out tokens")
                watch = _watch(listeners.on_calibration)
                prune = calibrate(model.train(False), held_out, config.sparsity, watch)
            on_phase(f"writing {out}")
            _write(run, model, handle, prune, tokenizer, out, force)
    except KeyboardInterrupt as stop:
        with deferred():
            understood()
            if accelerator.is_main_process and run.done > run.saved and run.is_finite:
                run.save()
            _end_tracking(accelerator)
        raise run.stopped() from stop
    finally:
        if accelerator.is_main_process and not run.saved:
            remove(work)
    accelerator.wait_for_everyone()


def _plan(config: TuneConfig, mixture: Windows, passes: int) -> str:
    """What is about to be done, in words."""
    if config.total_steps == 0:
        return f"calibrating alone: {passes} passes over the model"
    what = {"gates": "the gates alone", "lora": "the gates and LoRA", "full": "all weights"}
    read = f"{len(mixture.texts)} windows of {config.context}"
    if mixture.answers is not None:
        read += f", a share of {mixture.share:g} its own answers"
    steps = config.total_steps
    tokens = steps * config.batch_size * config.accumulate * config.context
    text = "the embedded sample" if config.data is None else config.data
    return (
        f"training {what[config.train]}: {steps} steps, {tokens:,} tokens of {text} "
        f"({read}), then {passes} passes to calibrate"
    )


def _watch(told: OnProgress) -> Callable[[int, int], None]:
    """A listener that knows the time left."""
    began = time.monotonic()
    return lambda done, total: told(done, total, (time.monotonic() - began) / done * (total - done))


def _trackers(config: TuneConfig) -> list[str]:
    """The experiment trackers of a run; accelerate would leave out in silence what is missing."""
    known = [str(tracker) for tracker in LoggerType if tracker is not LoggerType.ALL]
    there = [str(tracker) for tracker in get_available_trackers()]
    for name in config.report_to:
        choose("value of report_to", name, known)
        if name not in there:
            raise CtxpruneError(f"{name} is not installed", f"`pip install {name}`")
    return list(config.report_to)


def _end_tracking(accelerator: Accelerator) -> None:
    """See that trackers have written everything: `end_training` would part the processes too."""
    for tracker in accelerator.trackers:
        tracker.finish()


def _say_nothing(*_: object) -> None:
    pass


def _time_is_up(seconds: float, config: TuneConfig) -> bool:
    """Whether the budget of time is spent; the main process's clock counts for all."""
    if config.max_minutes is None:
        return False
    spent: list[float] = broadcast_object_list([seconds])
    return spent[0] >= 60.0 * config.max_minutes


def _step(
    step: int,
    trainee: nn.Module,
    optimizer: torch.optim.Optimizer,
    accelerator: Accelerator,
    run: _Run,
    config: TuneConfig,
    mixture: Windows,
    update: ExitStack,
) -> dict[str, Any]:
    """One optimizer step; returns its figures. Each phase counts its own steps.

    Args:
        update: entered from the update of the weights on, which is not to be interrupted.
    """
    local = step < config.ahead
    phase, at = (config.local, step) if local else (config, step - config.ahead)
    factor = learning_rate_factor(at, phase)
    for group in run.optimizer.param_groups:
        group["lr"] = factor * getattr(phase, group["rate"])
    sharpness, alpha = hardening(at, phase)
    torch.manual_seed(config.seed * 1_000_003 + at)
    figures: dict[str, Any] = {}
    total = 0.0
    trainee.train(not local)
    for index in range(config.accumulate):
        # N processes do in a step what one does that accumulates N times as often.
        place = index * accelerator.num_processes + accelerator.process_index
        ids = mixture.batch(at, place, accelerator.num_processes)
        level = sample_level(at, place, phase)
        with accelerator.accumulate(trainee):
            loss, seen = trainee(ids.to(accelerator.device), level, sharpness, alpha, local)
            accelerator.backward(loss)
            total += float(loss.detach()) / config.accumulate
            if accelerator.sync_gradients:
                update.enter_context(deferred())
                norm = float(accelerator.clip_grad_norm_(trainee.parameters(), 1.0))
                if not math.isfinite(total + norm):
                    raise run.diverged(step, f"its loss is {total:g}, of gradients {norm:g}")
            optimizer.step()
            optimizer.zero_grad()
        figures.update({k: float(v) if isinstance(v, Tensor) else v for k, v in seen.items()})
    return {
        "step": step + 1,
        "steps": config.total_steps,
        "loss": total,
        "lr": run.optimizer.param_groups[-1]["lr"],
        "sharpness": sharpness,
        "alpha": alpha,
        **figures,
    }


def _is_due(step: int, config: TuneConfig) -> bool:
    """Whether the state after a step is saved: it is early on too, when most runs diverge."""
    return step % config.save_every == 0 or (step < config.save_every and step.bit_count() == 1)


def _check_context(model: PreTrainedModel, handle: Handle, config: TuneConfig) -> None:
    limit = handle.decoder.positions
    if limit is not None and config.context > limit:
        raise CtxpruneError(
            f"a context of {config.context} is beyond the {limit} positions of this model",
            f"use `--max-length {limit}` or less",
        )
    least = 1.0 - handle.decoder.sight.kept(config.context)
    if 0.0 < config.sparsity <= least:
        raise CtxpruneError(
            f"the windows of this model drop {least:.2f} of the pairs of {config.context} tokens "
            f"by themselves, so sparsity {config.sparsity:g} asks for nothing",
            "use a shorter `--max-length`, or a higher level",
        )
    most = ceiling(handle.config, config.context)
    if config.sparsity >= most:
        raise CtxpruneError(
            f"sparsity {config.sparsity:g} cannot be reached at a context of {config.context}: the "
            f"protected tokens leave {most:.2f} at most",
            "use a longer `--max-length`, or convert with fewer protected tokens",
        )


def _still(handle: Handle) -> float:
    """Switch the dropout of attention weights off, which soft attention has not; returns it."""
    found = 0.0
    for layer in handle.decoder.layers:
        for name in DROPOUTS:
            dropout = getattr(layer.attention, name, None)
            if isinstance(dropout, nn.Dropout):
                found, dropout.p = max(found, dropout.p), 0.0
            elif isinstance(dropout, float):
                found = max(found, dropout)
                setattr(layer.attention, name, 0.0)
    return found


def trainable(
    model: PreTrainedModel, handle: Handle, config: TuneConfig
) -> tuple[PreTrainedModel, list[dict[str, Any]]]:
    """Freeze what is not trained; returns the model, LoRA wrapped around it or not, and groups.

    Raises:
        CtxpruneError: weights are to be trained that are quantized.
    """
    if config.train == "full":
        adapter.check_plain(model)
    model.requires_grad_(config.train == "full")
    if config.train == "lora":
        torch.manual_seed(config.seed)
        model = adapter.wrap(model, config.lora_rank)
    # Gates are submodules of the model, so this comes after all that concerns its weights.
    handle.gates.requires_grad_(config.sparsity > 0.0)
    if config.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    own = set(handle.gates.parameters())
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p in own], "rate": "gate_lr"},
        {"params": [p for p in trained if p not in own], "rate": "lr"},
    ]
    return model, [group for group in groups if group["params"]]


def _write(
    run: _Run,
    model: PreTrainedModel,
    handle: Handle,
    prune: PruneConfig,
    tokenizer: PreTrainedTokenizerBase,
    out: Path,
    force: bool,
) -> None:
    """Merge LoRA, write the folder with the adapter, clear the state away."""
    config = run.config
    provenance = checkpoint.read_settings(run.source).provenance
    earlier = [*provenance.get("earlier", []), provenance["tune"]] if "tune" in provenance else []
    told = _told(config) | ({"rates_before": run.rates} if run.rates else {})
    provenance = {**provenance, "tune": told, "earlier": earlier}
    onto = run.source / adapter.FILE if earlier else None
    with staged(out, force=force) as folder:
        # An adapter is for published weights; where all of them were tuned before, none can be.
        if config.train != "full" and (onto is None or onto.is_file()):
            rank = config.lora_rank if config.train == "lora" else 0
            file = folder / adapter.FILE
            adapter.save(file, model, handle.gates, prune, provenance, rank=rank, onto=onto)
        if config.train == "lora":
            model = model.merge_and_unload()  # type: ignore[operator]
        checkpoint.write(folder, model, handle.gates, prune, tokenizer, provenance)
        run.metrics.copy(folder)
    remove(run.work)


def _told(config: TuneConfig) -> dict[str, Any]:
    """The run as it is told to others: of its files, the names alone."""
    told = dataclasses.asdict(config)
    for name in ("data", "valid"):
        if told[name] is not None and Path(told[name]).exists():
            told[name] = Path(told[name]).name
    return told


class _Run:
    """The resumable state of a run, in its working folder.

    Attributes:
        done: steps that are done. saved: those whose outcome is on the disk.
    """

    def __init__(
        self,
        work: Path,
        source: Path,
        config: TuneConfig,
        trainee: Trainee,
        optimizer: torch.optim.Optimizer,
    ) -> None:
        self.work = work
        self.source = source
        self.config = config
        self.optimizer = optimizer
        self.metrics = Metrics(work)
        self.seconds = 0.0  # spent on steps so far
        self.done = self.saved = 0
        self.rates: list[dict[str, float]] = []  # that were higher, up to so many steps
        self._trainee = trainee
        self._trained = {n: p for n, p in trainee.named_parameters() if p.requires_grad}

    def begin(self, step: int, mixture: Windows) -> None:
        """Open the working folder: at step 0 a new one, with the answers that are read."""
        if step == 0:
            remove(self.work)
        with writing(self.work):
            self.work.mkdir(parents=True, exist_ok=True)
            if step == 0:
                mixture.save(self.work / windows.ANSWERS)
        self.metrics.begin(step)

    @torch.no_grad()
    def check(self, step: int, mixture: Windows) -> None:
        """See that weights and the loss at the level asked for are finite after a step.

        Finite weights may be so large that what follows of them is not.

        Args:
            step: counted from 0. mixture: whose next windows are read.

        Raises:
            CtxpruneError: training diverged.
        """
        broken = first_non_finite(self._trained.items())
        if broken is not None:
            raise self.diverged(step, f"`{broken}` holds NaN or infinity")
        sharpness, alpha = hardening(max(step - self.config.ahead, 0), self.config)
        ids = mixture.batch(step + 1, 0)
        level = self.config.sparsity
        device = next(self._trainee.parameters()).device
        loss, _ = self._trainee.eval()(ids.to(device), level, sharpness, alpha)
        if not torch.isfinite(loss):
            raise self.diverged(step, f"the loss after it is {float(loss):g}")

    @property
    def is_finite(self) -> bool:
        """Whether what is trained holds neither NaN nor infinity."""
        return first_non_finite(self._trained.items()) is None

    def diverged(self, step: int, what: str) -> CtxpruneError:
        """The error that says where training diverged, and what is left of it."""
        rates = "`--local-lr`" if step < self.config.ahead else "`--lr` or `--gate-lr`"
        kept = f"; the state after step {self.saved} is kept" if self.saved else ""
        return CtxpruneError(
            f"training diverged at step {step + 1}: {what}{kept}",
            f"go on from there with `--resume` and a lower {rates}"
            if self.saved
            else f"start again with a lower {rates}",
        )

    def save(self) -> None:
        """Write parameters and optimizer state after the steps that are done."""
        tensors = {f"parameter/{n}": p.detach().clone() for n, p in self._trained.items()}
        for index, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer/{index}/{key}": value for key, value in state.items()}
        about = {"step": str(self.done), "seconds": str(self.seconds), "run": self._identity()}
        about["rates"] = json.dumps(self.rates)
        with whole(self.work / STATE) as temporary:
            save_file(tensors, temporary, metadata=about)
        self.saved = self.done

    def restore(self) -> int:
        """Load the saved state; returns the number of steps done."""
        path = self.work / STATE
        try:
            with safe_open(path, framework="pt") as file:
                about = file.metadata()
            tensors = load_file(path)
        except (SafetensorError, OSError) as error:
            raise CtxpruneError(f"`{path}` is damaged", "begin anew with `--force`") from error
        self._check_same(json.loads(about["run"]), int(about["step"]))
        self.rates = json.loads(about.get("rates", "[]")) + self.rates
        with torch.no_grad():
            for name, parameter in self._trained.items():
                parameter.copy_(tensors[f"parameter/{name}"])
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            if name.startswith("optimizer/"):
                _, index, key = name.split("/")
                state.setdefault(int(index), {})[key] = tensor
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})
        self.seconds = float(about["seconds"])
        self.done = self.saved = int(about["step"])
        return self.done

    def stopped(self) -> Interrupted:
        """What to say after an interruption."""
        if not self.saved:
            return Interrupted("stopped before anything was done to go on from")
        total = self.config.total_steps
        return Interrupted(
            f"stopped after step {self.saved} of {total}; the state is saved",
            "go on with `--resume`",
        )

    def _check_same(self, before: dict[str, Any], step: int) -> None:
        """Raise CtxpruneError unless the interrupted run had these settings, or higher rates."""
        now = json.loads(self._identity())
        other = sorted(key for key in now if now[key] != before.get(key))
        lowered = [key for key in other if key in RATES and now[key] < before.get(key, 0.0)]
        if other != lowered:
            raise CtxpruneError(
                f"the interrupted run had other settings ({', '.join(other)}), so it cannot be "
                "resumed with these",
                "repeat its options exactly, but for learning rates, which may be lower; or begin "
                "anew with `--force`",
            )
        if lowered:
            self.rates = [{"steps": step, **{key: before[key] for key in lowered}}]

    def _identity(self) -> str:
        """What a resumed run has to share with the interrupted one; its device may differ."""
        told = dataclasses.asdict(self.config) | {"device": None, "report_to": None}
        return json.dumps({"source": str(self.source.resolve()), **told})
