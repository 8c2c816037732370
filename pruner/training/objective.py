"""The objective: language modelling or distillation, and the pull towards the asked sparsity.

Pure functions of tensors and step numbers.
"""

from __future__ import annotations

import math
import random

from torch import Tensor
from torch.nn import functional as F

from ctxprune.pruner.config import TuneConfig
from ctxprune.pruner.rows import sparsity_of


def lm_loss(logits: Tensor, ids: Tensor) -> Tensor:
    """Mean cross-entropy in nats of every token but the first; logits (b, n, vocab), ids (b, n)."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


def distillation_loss(logits: Tensor, teacher: Tensor) -> Tensor:
    """Mean Kullback-Leibler divergence in nats from the teacher's next-token distribution."""
    student = F.log_softmax(logits[:, :-1].flatten(0, 1).float(), dim=-1)
    target = F.log_softmax(teacher[:, :-1].flatten(0, 1).float(), dim=-1)
    return F.kl_div(student, target, log_target=True, reduction="batchmean")


def sparsity_penalty(kept: Tensor, sparsity: float) -> Tensor:
    """(log of the soft kept share over its target)^2: the same pull at every level.

    The paper adds gamma times the kept share, which sets no level; this one has its minimum at
    the level that was asked for.
    """
    return (kept.clamp_min(1e-6) / (1.0 - sparsity)).log().square()


def local_loss(errors: Tensor) -> Tensor:
    """Log of the mean of the layers' errors (layers,), see `local.LocalAttention`.

    Errors grow with the level of sparsity; their logarithms make all levels count alike.
    """
    return errors.mean().log()


def progress(step: int, start: float, end: float) -> float:
    """How far `step` is on the way from start to end, in [0, 1]."""
    return min(max((step - start) / max(end - start, 1e-9), 0.0), 1.0)


def learning_rate_factor(step: int, config: TuneConfig) -> float:
    """Linear warm-up, then a cosine down to a tenth."""
    warmup = max(1.0, config.warmup * config.steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.55 + 0.45 * math.cos(math.pi * progress(step, warmup, config.steps))


def hardening(step: int, config: TuneConfig) -> tuple[float, float]:
    """Sharpness and alpha at a step: both wait for the ramp, so sparsity comes before hardness."""
    start = config.ramp * config.steps
    share = (1.0 - math.cos(math.pi * progress(step, start, 0.9 * config.steps))) / 2.0
    return 1.0 + share * (config.sharpness - 1.0), 1.0 + share * (config.alpha - 1.0)


def sample_level(step: int, index: int, config: TuneConfig) -> float:
    """The level that micro-batch `index` of a step is trained at; 0 is dense.

    A `dense_share` is dense, so that the dense end of the dial stays the best one (gates alone
    learn nothing there); a `spread` of the others have a window drawn evenly by its logarithm
    between 1/128 and 1/2 of the context, the rest are the level asked for. All are scaled down
    during the ramp. It is a function of the seed and the step alone, so that a resumed run draws
    the same.
    """
    if config.sparsity == 0.0:
        return 0.0
    draw = random.Random(f"{config.seed}/{step}/{index}")
    if draw.random() < config.dense_share and config.train != "gates":
        return 0.0
    level = config.sparsity
    if draw.random() < config.spread:
        widest, narrowest = math.log(config.context / 2), math.log(max(config.context / 128, 4))
        level = sparsity_of(math.exp(draw.uniform(narrowest, widest)), config.context)
    return level * progress(step + 1, 0, config.ramp * config.steps)
