"""How much work measurements are, how long they will take, and how much of it is done.

A pass of the model takes a time of its own and a time for each token that it reads; both are
measured beforehand, and what is done corrects them.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from lm_eval.api.task import Task
from lm_eval.models.huggingface import HFLM
from transformers import PreTrainedModel

from ctxprune.evals.quality.scoring import last_logits, passes, texts_a_pass
from ctxprune.evals.quality.tasks import quiet
from ctxprune.pruner.device import input_device

# Documents of a task that are made into requests to tell how many there are, and how long.
SAMPLE = 64
# Tokens of the shortest pass that is timed, and seconds that the longest may be expected to take.
FEW, PATIENCE = 8, 1.0
# From this many seconds on, there are hints how to have it sooner.
LONG = 600.0


@dataclass(frozen=True)
class Work:
    """What a measurement reads: requests, tokens altogether, and passes of the model."""

    requests: int
    tokens: int
    passes: int


@dataclass(frozen=True)
class Speed:
    """Seconds that a pass takes, and beside them those for each of its tokens."""

    a_pass: float
    a_token: float

    def seconds(self, work: Work) -> float:
        """How long a measurement takes."""
        return self.a_pass * work.passes + self.a_token * work.tokens


@dataclass(frozen=True)
class Progress:
    """How far an evaluation is.

    Attributes:
        label: what is being measured. share: of all the work, done, in [0, 1].
        left: how long the rest takes, in words.
    """

    label: str
    share: float
    left: str


def reading(lengths: Sequence[int], batch_size: int | str) -> Work:
    """The work of texts of so many tokens that are read."""
    return Work(len(lengths), sum(lengths), sum(1 for _ in passes(lengths, batch_size)))


def of_task(
    lm: HFLM, task: Task, limit: int | None, batch_size: int | str, **prompting: Any
) -> Work:
    """The work of an lm-eval task, told from some of its documents.

    What is written is counted with as many tokens as it may have.

    Args:
        lm: that makes tokens of requests.
        task: from `load_tasks`.
        limit: documents; None: all. batch_size: requests a pass.
        prompting: what `Task.build_all_requests` is told of system and chat.
    """
    total = len(task.eval_docs)
    count = total if limit is None else min(limit, total)
    chosen = sorted(random.Random(0).sample(range(count), min(count, SAMPLE)))
    with quiet():
        task.build_all_requests(samples=chosen, **prompting)
    reads: list[int] = []
    written = 0
    seen: set[tuple[int, ...]] = set()
    for request in task.instances:
        if request.request_type == "loglikelihood":
            context, continuation = request.args
            ids = lm._encode_pair(context, continuation) if context else ([0], [])
            read = (*ids[0], *(ids[1] or lm.tok_encode(continuation)))[:-1]
            if read not in seen:
                seen.add(read)
                reads.append(min(len(read), lm.max_length))
        else:
            reads.append(len(lm.tok_encode(request.args[0])))
        if request.request_type == "generate_until":
            reads[-1] = min(reads[-1], lm.max_length)
            written = request.args[1].get("max_gen_toks", lm.max_gen_toks)
    scale = count / len(chosen)
    requests = round(len(task.instances) * scale)
    work = reading([reads[n % len(reads)] for n in range(round(len(reads) * scale))], batch_size)
    return Work(requests, work.tokens + requests * written, work.passes * (1 + written))


def speed(
    model: PreTrainedModel, ids: Sequence[int], batch_size: int | str, length: int, dense: bool
) -> Speed:
    """Time passes of few tokens, of one text, and of a batch, or as much of it as patience has.

    Args:
        model: at the level to time, with its handle at `model.ctxprune`.
        ids: tokens of any text. batch_size: texts a pass. length: tokens of a typical text.
        dense: the model evicts nothing, and is called as such.
    """

    def timed(texts: int, tokens: int) -> float:
        several = [[ids[n % len(ids)] for n in range(tokens)]] * texts
        start = time.perf_counter()
        if dense:
            with torch.inference_mode():
                given = torch.tensor(several).to(input_device(model))
                float(model(given, use_cache=False).logits[-1, -1, 0])
        else:
            float(last_logits(model, several, [1] * texts)[-1][-1, 0])
        return time.perf_counter() - start

    few, texts = min(FEW, length), texts_a_pass(batch_size, length)
    timed(1, few)  # the first pass makes what the others find
    least, many, most = timed(1, few), length, timed(1, length)
    if (some := min(texts, int(PATIENCE / most))) > 1:
        many, most = some * length, timed(some, length)
    if many == few:
        return Speed(0.0, most / many)
    a_token = max(most - least, 0.0) / (many - few)
    return Speed(max(least - a_token * few, 0.0), a_token)


@dataclass
class Meter:
    """Counts what the model reads, and tells how far that is.

    Attributes:
        model: whose passes are counted.
        plan: label of each measurement to come -> its speed and work.
        show: what is called after a pass.
    """

    model: PreTrainedModel
    plan: Mapping[str, tuple[Speed, Work]]
    show: Callable[[Progress], None]
    _done: float = 0.0
    _began: float = field(default_factory=time.perf_counter)

    @property
    def total(self) -> float:
        """Seconds that all of it takes, as far as is known beforehand."""
        return sum(speed.seconds(work) for speed, work in self.plan.values())

    @contextmanager
    def measuring(self, label: str) -> Iterator[None]:
        """Count the passes inside as those of a measurement that is planned."""
        rate, work = self.plan[label]
        before, whole = self._done, rate.seconds(work)

        def count(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
            ids = args[0] if args else kwargs.get("input_ids")
            tokens = 0 if ids is None else ids.numel()
            self._done = min(self._done + rate.a_pass + rate.a_token * tokens, before + whole)
            self.show(Progress(label, self._done / max(self.total, 1e-9), self._left()))

        hook = self.model.register_forward_hook(count, with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()
            self._done = before + whole

    def _left(self) -> str:
        """How long the rest takes: the more is done, the more what it took is what counts."""
        slack = 0.02 * self.total
        slower = (time.perf_counter() - self._began + slack) / (self._done + slack + 1e-9)
        return duration((self.total - self._done) * slower)


def summary(plan: Mapping[str, tuple[Speed, Work]], limit: int | None) -> list[str]:
    """What is to be done, and about how long it takes; a hint, where that is long."""
    every = [work for _, work in plan.values()]
    seconds = sum(speed.seconds(work) for speed, work in plan.values())
    requests, tokens = sum(w.requests for w in every), sum(w.tokens for w in every)
    lines = [
        f"{len(plan)} measurement{'s' * (len(plan) != 1)}: {requests:,} requests of "
        f"{tokens:,} tokens altogether, about {duration(seconds)}"
    ]
    if seconds > LONG:
        fewer = "a smaller `--limit`" if limit else "`--limit 200` scores 200 documents a task"
        lines.append(f"to have it sooner: {fewer}; `--batch-size auto` fills each pass")
    return lines


def duration(seconds: float) -> str:
    """Seconds in words that are as exact as they can be taken."""
    if seconds < 60:
        return f"{math.ceil(seconds)} s"
    minutes = math.ceil(seconds / 60)
    hours, minutes = divmod(minutes, 60)
    if hours == 0:
        return f"{minutes} min"
    days, hours = divmod(hours, 24)
    return f"{days} d {hours} h" if days else f"{hours} h {minutes} min"
