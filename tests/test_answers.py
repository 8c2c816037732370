"""Answers of the model itself: what they are, where they stand in a run, and that it resumes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ctxprune.pruner import answers, data
from ctxprune.pruner.checkpoints.checkpoint import GATES
from ctxprune.pruner.config import TuneConfig
from ctxprune.pruner.errors import CtxpruneError, Interrupted
from ctxprune.pruner.training import windows
from ctxprune.pruner.training.tune import tune

LENGTH = 512
RUN = TuneConfig(sparsity=0.7, steps=3, context=LENGTH, batch_size=2, answers=0.5, save_every=1)


@pytest.fixture(scope="module")
def texts(words: PreTrainedTokenizerBase) -> torch.Tensor:
    return data.windows(words, data.read_texts(None, "tune"), LENGTH)[:3]


@pytest.mark.parametrize("of_chat", [False, True])
def test_a_window_is_a_request_its_answer_and_text(
    model: PreTrainedModel,
    words: PreTrainedTokenizerBase,
    chatty: PreTrainedTokenizerBase,
    texts: torch.Tensor,
    of_chat: bool,
) -> None:
    told: list[tuple[int, int]] = []
    tokenizer = chatty if of_chat else words
    made = answers.windows(model, tokenizer, texts, lambda *done: told.append(done))
    assert made.shape == texts.shape and told[-1] == (3, 3)
    for number, (row, text) in enumerate(zip(made.tolist(), texts.tolist(), strict=True)):
        instruction, first = answers.INSTRUCTIONS[number // 2], number % 2 == 0
        end = f"{instruction}</s><answer>" if of_chat else f"{instruction}\n\nAnswer:"
        begin = f"<user>{instruction}" if of_chat else instruction
        written = str(tokenizer.decode(row))
        assert written.startswith(begin) == first
        assert (end in written) == (not first)
        prompt = next(
            n
            for n in range(LENGTH, 0, -1)
            if str(tokenizer.decode(row[:n])).endswith("<answer>" if of_chat else "Answer:")
        )
        with torch.no_grad():
            likeliest = model(torch.tensor([row])).logits[0].argmax(-1).tolist()
        own = [a == b for a, b in zip(row[1:], likeliest, strict=False)][prompt - 1 :]
        length = own.index(False, answers.LEAST) if False in own[answers.LEAST :] else len(own)
        assert length >= answers.LEAST
        # What is behind it is the text, where the request left off.
        rest = row[prompt + answers.MOST :]
        assert not rest or str(rest)[1:-1] in str(text)


def test_answers_stand_at_even_distances_and_no_text_is_left_out() -> None:
    of_text = torch.arange(10)[:, None].expand(-1, 4)
    of_answers = 100 + torch.arange(3)[:, None].expand(-1, 4)
    config = dataclasses.replace(RUN, batch_size=3, accumulate=2)
    mixture = windows.Windows(config, of_text, of_answers, 0.25)
    read = [mixture.batch(step, place)[:, 0] for step in range(4) for place in range(2)]
    order = torch.cat(read).tolist()
    places = [n for n, window in enumerate(order) if window >= 100]
    assert places == [3, 7, 11, 15, 19, 23]
    assert sorted(order[n] for n in places) == sorted([100, 101, 102] * 2)
    rest = [window for window in order if window < 100]
    assert sorted(rest[:10]) == list(range(10))
    # Two processes read in a step what one reads in two micro-batches.
    several = [mixture.batch(0, place, 2) for place in range(4)]
    assert torch.equal(torch.cat(several)[:, 0], torch.tensor(order[:12]))


@pytest.mark.parametrize(
    ("changes", "of_chat", "share"),
    [
        ({}, True, windows.SHARE),
        ({}, False, 0.0),
        ({"context": 256}, True, 0.0),
        ({"train": "lora"}, True, windows.SHARE),
        ({"train": "full"}, True, 0.0),
        ({"distill": 0.0}, True, 0.0),
        ({"steps": 0}, True, 0.0),
        ({"answers": 0.0}, True, 0.0),
        ({"answers": 0.4}, False, 0.4),
    ],
)
def test_the_share_that_nobody_asked_for(
    words: PreTrainedTokenizerBase,
    chatty: PreTrainedTokenizerBase,
    changes: dict[str, object],
    of_chat: bool,
    share: float,
) -> None:
    config = dataclasses.replace(RUN, answers=None)
    config = dataclasses.replace(config, **changes)  # type: ignore[arg-type]
    assert windows.share_of_answers(chatty if of_chat else words, config) == share


def test_short_windows_have_no_room(words: PreTrainedTokenizerBase) -> None:
    config = dataclasses.replace(RUN, context=256)
    with pytest.raises(CtxpruneError, match="no room for a text and an answer"):
        windows.share_of_answers(words, config)


def test_a_run_with_answers_resumes_bit_for_bit(
    embedded_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tune(embedded_folder, tmp_path / "whole", RUN)
    steps: Iterator[int] = iter(range(9))

    def stop(_: object) -> None:
        if next(steps) == 1:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted):
        tune(embedded_folder, tmp_path / "parts", RUN, on_step=stop)
    monkeypatch.setattr(answers, "windows", None)  # they are written once
    parts = tune(embedded_folder, tmp_path / "parts", RUN, resume=True)
    a, b = load_file(whole / GATES), load_file(parts / GATES)
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_damaged_answers_are_told_in_one_sentence(embedded_folder: Path, tmp_path: Path) -> None:
    def stop(_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(Interrupted):
        tune(embedded_folder, tmp_path / "out", RUN, on_step=stop)
    (tmp_path / ".out.tuning" / windows.ANSWERS).write_bytes(b"nothing")
    with pytest.raises(CtxpruneError, match="is damaged"):
        tune(embedded_folder, tmp_path / "out", RUN, resume=True)
