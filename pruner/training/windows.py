"""What a run reads: windows of its text, answers that the model writes itself, held-out text."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ctxprune.pruner import answers, data
from ctxprune.pruner.config import TuneConfig
from ctxprune.pruner.errors import CtxpruneError
from ctxprune.pruner.files import whole
from ctxprune.pruner.training.calibrate import TOKENS

# In the working folder of a run.
ANSWERS = "answers.safetensors"
# Answers that are written at most; then they are read again.
MOST = 128
# A window of fewer tokens has no room for an instruction, a text and an answer.
SHORTEST = 512
# The share of answers in what a chat model reads, if nobody says another.
SHARE = 0.25


@dataclass(frozen=True)
class Windows:
    """Where micro-batches come from.

    Attributes:
        texts: (windows, context) int64. answers: the same, or None.
        share: of the windows read that are answers.
    """

    config: TuneConfig
    texts: Tensor
    answers: Tensor | None = None
    share: float = 0.0

    def batch(self, step: int, place: int, processes: int = 1) -> Tensor:
        """The windows (batch_size, context) of a micro-batch, a function of seed and step alone.

        Args:
            step: counted from 0. place: of the micro-batch in it, over all processes.
        """
        config = self.config
        first = (step * config.accumulate * processes + place) * config.batch_size
        return torch.stack([self._window(n) for n in range(first, first + config.batch_size)])

    def save(self, path: Path) -> None:
        """Write the answers, if there are some: they take minutes, and a resumed run reads them."""
        if self.answers is not None:
            with whole(path) as temporary:
                save_file({"answers": self.answers}, temporary)

    def _window(self, number: int) -> Tensor:
        """One after the other, with answers at even distances among them."""
        if self.answers is None:
            return self._shuffled(self.texts, number)
        before, after = int(number * self.share), int((number + 1) * self.share)
        if after > before:
            return self._shuffled(self.answers, before)
        return self._shuffled(self.texts, number - before)

    def _shuffled(self, windows: Tensor, number: int) -> Tensor:
        """A new shuffle every epoch."""
        epoch, at = divmod(number, len(windows))
        generator = torch.Generator().manual_seed(self.config.seed * 7919 + epoch)
        return windows[torch.randperm(len(windows), generator=generator)[at]]


def read(tokenizer: PreTrainedTokenizerBase, config: TuneConfig) -> tuple[Tensor, Tensor]:
    """Windows (n, context) int64 to train on, and held-out ones for calibration.

    Raises:
        CtxpruneError: no such text, or too little of it.
    """

    def windows(source: str | None, split: str) -> Tensor:
        texts = data.read_texts(source, split, field=config.text_field, tokenizer=tokenizer)
        return data.windows(tokenizer, texts, config.context)

    train = windows(config.data, "tune")
    count = max(2, TOKENS // config.context)
    if config.valid is not None or config.data is None:
        return train, data.spread(windows(config.valid, "calibrate"), count)
    spare = max(1, len(train) // 20)
    if len(train) <= spare:
        raise CtxpruneError(
            f"the text makes {len(train)} window of {config.context} tokens: none is left to "
            "calibrate on",
            "give more text, a smaller `--max-length`, or a text for `--validation-data`",
        )
    return train[:-spare], train[-spare:][:count]


def share_of_answers(tokenizer: PreTrainedTokenizerBase, config: TuneConfig) -> float:
    """The share of windows that are answers, as asked for or as fits the model.

    Raises:
        CtxpruneError: answers are asked for in windows that are too short for them.
    """
    if config.answers:
        if config.context < SHORTEST:
            raise CtxpruneError(
                f"a window of {config.context} tokens has no room for a text and an answer",
                f"use `--max-length {SHORTEST}` or more, or `--answers 0`",
            )
        return config.answers
    fits = tokenizer.chat_template is not None and config.context >= SHORTEST
    wanted = config.answers is None and config.steps > 0 and config.distillation > 0.0
    return SHARE if fits and wanted else 0.0


def mixed(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: TuneConfig,
    texts: Tensor,
    known: Path | None,
    on_answer: Callable[[int, int], None],
) -> Windows:
    """Texts with the answers that a run reads among them, written by the model as it is.

    Args:
        texts: (windows, context) int64.
        known: file of the answers of a run that is resumed; None: of a new one.
        on_answer: told how many are written, and of how many.
    """
    share = share_of_answers(tokenizer, config)
    count = math.ceil(share * config.steps * config.accumulate * config.batch_size)
    if count == 0:
        return Windows(config, texts)
    if known is not None:
        return Windows(config, texts, _saved(known), share)
    about = data.spread(texts, min(count, MOST))
    return Windows(config, texts, answers.windows(model, tokenizer, about, on_answer), share)


def _saved(path: Path) -> Tensor:
    try:
        return load_file(path)["answers"]
    except (SafetensorError, OSError, KeyError) as error:
        raise CtxpruneError(f"`{path}` is damaged", "begin anew with `--force`") from error
