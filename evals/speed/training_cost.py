"""What a step of tuning costs beside a step of dense fine-tuning of the same weights."""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from ctxprune.evals.config import SOME, Context
from ctxprune.evals.places import nearby
from ctxprune.evals.provenance import provenance, worker
from ctxprune.evals.speed.peak import peak_of
from ctxprune.evals.speed.stopwatch import spread
from ctxprune.evals.speed.subject import check_positions, from_folder, prompts
from ctxprune.pruner.config import Trained, TuneConfig
from ctxprune.pruner.data import read_texts, windows
from ctxprune.pruner.device import input_device, place, warn_of_emulation
from ctxprune.pruner.engine.handle import handle_of
from ctxprune.pruner.errors import CtxpruneError
from ctxprune.pruner.schema import STRICT, Count, Name, Settings
from ctxprune.pruner.training.tune import Trainee, trainable

DENSE, GATED, DISTILLED, LOCAL = "dense", "gated", "gated, distilled", "gates, local"
PACKAGES = ("ctxprune", "torch", "transformers")


@dataclass(frozen=True, config=STRICT)
class TrainingCostConfig(Settings):
    """One measurement.

    Attributes:
        context: lengths of the windows; all are measured. batch: windows a step.
        train: `lora` or `full`: a dense step has no gates to train. bf16: autocast to bfloat16.
        repeats: timed steps a mode.
        text: of the windows, as for `EvalConfig`.
    """

    context: Annotated[tuple[Context, ...], SOME] = (512, 1024, 2048)
    batch: Count = 1
    train: Trained = "full"
    bf16: bool = False
    repeats: Count = 5
    text: Name | None = None

    def __post_init__(self) -> None:
        if self.train == "gates":
            raise CtxpruneError(
                "a dense step trains no gates, so there is nothing to compare with",
                "give `--train lora` or `--train full`",
            )

    def tuning(self, distill: float = 0.0) -> TuneConfig:
        """The run that a step is taken from."""
        return TuneConfig(
            distill=distill,
            train=self.train,
            bf16=self.bf16,
            context=min(self.context),
        )


def training_cost(
    folder: Path,
    config: TrainingCostConfig,
    on_event: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Time forward and backward passes (the optimizer costs all modes the same), and their memory.

    Returns:
        `rows`, one a context and mode: `step_s` (median, min, max), `ratio` to the dense step,
        `peak_bytes` of the process or device in such a step; and provenance.
    """
    say = on_event or (lambda line: None)
    subject = from_folder(folder, place(dtype="float32"), say)
    if config.bf16:
        warn_of_emulation(input_device(subject.model), torch.bfloat16, say)
    handle = handle_of(subject.model)
    check_positions(subject.model, max(config.context), 0)
    model, _ = trainable(subject.model, handle, config.tuning())
    plain = Trainee(model, handle, config.tuning())
    distilled = Trainee(model, handle, config.tuning(distill=0.5))
    lanes: dict[str, tuple[nn.Module, float, bool]] = {
        DENSE: (plain, 0.0, False),
        GATED: (plain, 0.8, False),
        DISTILLED: (distilled, 0.8, False),
        LOCAL: (plain, 0.8, True),
    }
    texts = read_texts(config.text, "eval")
    rows = []
    for context in config.context:
        ids = prompts(windows(subject.tokenizer, texts, context), config.batch)
        seconds: dict[str, list[float]] = {mode: [] for mode in lanes}
        peaks = {}
        for mode, lane in lanes.items():
            say(f"context {context}: {mode}")
            peaks[mode] = peak_of(partial(_step, ids, config.bf16, *lane), ids.device)
        # In turns, so that what else the machine does meets all of them.
        for _ in range(config.repeats):
            for mode, lane in lanes.items():
                began = time.perf_counter()
                _step(ids, config.bf16, *lane)
                seconds[mode].append(time.perf_counter() - began)
        dense = median(seconds[DENSE])
        rows += [
            {
                "mode": mode,
                "context": context,
                "step_s": spread(times),
                "ratio": median(times) / dense,
                "peak_bytes": peaks[mode],
            }
            for mode, times in seconds.items()
        ]
    return {
        "model": nearby(subject.name),
        "batch": config.batch,
        "train": config.train,
        "bf16": config.bf16,
        "repeats": config.repeats,
        **worker(input_device(subject.model)),
        **provenance(*PACKAGES),
        "rows": rows,
    }


def _step(ids: Tensor, bf16: bool, trainee: nn.Module, level: float, local: bool) -> None:
    with torch.autocast(ids.device.type, dtype=torch.bfloat16, enabled=bf16):
        loss, _ = trainee(ids, level, 2.0, 1.0, local)
    loss.backward()
    trainee.zero_grad(set_to_none=True)
