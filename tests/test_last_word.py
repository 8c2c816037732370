"""Last words: how passages are cut, and that the model's logits are what is scored."""

from __future__ import annotations

import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import remembering_model
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ctxprune.evals.quality.last_word import Passage, passages, score
from ctxprune.pruner.checkpoints.checkpoint import load
from ctxprune.pruner.data import read_texts
from ctxprune.pruner.engine.handle import Handle
from ctxprune.pruner.errors import CtxpruneError


@pytest.fixture(scope="module")
def books() -> list[str]:
    return read_texts(None, "eval")


def split(words: PreTrainedTokenizerBase, passage: Passage) -> tuple[str, str]:
    """The text before the last word, and that word with the space before it."""
    ids = list(passage.ids)
    return words.decode(ids[: -passage.answer]), words.decode(ids[-passage.answer :])


def test_passages_are_whole_sentences_that_end_in_a_word_said_before(
    words: PreTrainedTokenizerBase, books: list[str]
) -> None:
    found = passages(words, books)
    assert 100 < len(found) < 500  # all that the sample has
    counts = []
    for passage in found:
        before, word = split(words, passage)
        assert re.fullmatch(" [a-z]{4,}", word)
        assert re.search(rf"\b{word.strip()}\b", before)
        counts.append(len(before.split()) + 1)
        where = rf"[.!?][\"'”’)]*\s+{re.escape(before)}\s{word.strip()}[.!?]"
        assert any(re.search(where, book) for book in books), before
    assert 50 <= min(counts) < 70 and 230 < max(counts) <= 250


def test_what_is_no_end_of_a_sentence() -> None:
    tale = (
        "Of this nothing. Then Mr. Brown met Mrs. Green at 5. It was J. Smith, he said, who sold "
        f"{'very ' * 60}old lamps. The well-lamps! No oil for Mr. Lamps"
    )
    asked: list[str] = []

    def tokenizer(text: str, **_: Any) -> dict[str, list[int]]:
        asked.append(text)
        return {"input_ids": list(range(len(text)))}

    # From `Mrs.` on the second would do; its sentences are too long.
    endless = f"Nothing. {'So ' * 250}said Mrs. Green of {'very ' * 50}old lamps. He saw old lamps."
    for text in (tale, endless):
        with pytest.raises(CtxpruneError, match="the text has no passage for `last_word`"):
            passages(tokenizer, [text])  # type: ignore[arg-type]
    (passage,) = passages(tokenizer, [f"{tale}. He saw old\nlamps.”"])  # type: ignore[arg-type]
    assert asked[1] == f"{asked[0]} lamps"
    assert asked[0].startswith("Then Mr. Brown met") and asked[0].endswith("Mr. Lamps. He saw old")
    assert passage.answer == len(" lamps")


def test_passages_depend_on_the_seed_alone(
    words: PreTrainedTokenizerBase, books: list[str]
) -> None:
    few = passages(words, books, limit=10, seed=1)
    assert len(few) == 10
    assert few == passages(words, books, limit=30, seed=1)[:10]
    assert set(few).isdisjoint(passages(words, books, limit=10, seed=2))


def test_passages_fit_the_positions_of_the_model(
    words: PreTrainedTokenizerBase, books: list[str]
) -> None:
    everything = passages(words, books)
    short = passages(words, books, longest=150)
    assert short == [passage for passage in everything if len(passage.ids) <= 150]
    assert 0 < len(short) < len(everything)


def answering(model: PreTrainedModel, logits: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the model give the last of these logits (tokens, vocabulary)."""

    def forward(*args: Any, logits_to_keep: int, **kwargs: Any) -> SimpleNamespace:
        return SimpleNamespace(logits=logits[None, -logits_to_keep:])

    monkeypatch.setattr(model, "forward", forward)


def test_all_tokens_of_the_word_have_to_be_the_likeliest(
    embedded_folder: Path,
    words: PreTrainedTokenizerBase,
    books: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = load(embedded_folder, sparsity=0.0)
    long = next(p for p in passages(words, books) if p.answer == 3)
    right = torch.zeros(3, model.config.vocab_size)
    right[torch.arange(3), list(long.ids[-3:])] = 5.0
    each = math.log(math.exp(5.0) + model.config.vocab_size - 1) - 5.0
    answering(model, right, monkeypatch)
    told = score(model, [long])
    assert told["acc"] == 1.0 and "stderr" not in told
    assert told["perplexity"] == pytest.approx(math.exp(3 * each), rel=1e-4)
    for wrong in range(3):
        logits = right.clone()
        logits[wrong, (long.ids[-3 + wrong] + 1) % model.config.vocab_size] = 6.0
        answering(model, logits, monkeypatch)
        assert score(model, [long])["acc"] == 0.0


def test_scores_are_those_of_one_naive_pass(
    embedded_folder: Path, words: PreTrainedTokenizerBase, books: list[str]
) -> None:
    model = load(embedded_folder, sparsity=0.0)
    found = passages(words, books, limit=12)
    hits, losses = [], []
    for passage in found:
        with torch.no_grad():
            logits = model(torch.tensor([passage.ids])).logits[0].double().log_softmax(-1)
        at = range(len(passage.ids) - passage.answer, len(passage.ids))
        losses.append(-sum(logits[i - 1, passage.ids[i]].item() for i in at))
        hits.append(all(int(logits[i - 1].argmax()) == passage.ids[i] for i in at))
    told = score(model, found)
    assert told["acc"] == sum(hits) / 12
    assert told["perplexity"] == pytest.approx(math.exp(sum(losses) / 12), rel=1e-4)
    assert (told["n"], told["sparsity"]) == (12, 0.0)
    pruned = score(model, found, policy="window", sparsity=0.5)
    assert pruned["perplexity"] != pytest.approx(told["perplexity"], rel=1e-3)
    # Each window was made for its own passage.
    assert pruned["sparsity"] == pytest.approx(0.5, abs=0.02)
    several = score(model, found, batch_size=5)
    assert (several.pop("rows"), told.pop("rows")) == (None, None)
    assert several.pop("values") == told.pop("values") == {"acc": [float(hit) for hit in hits]}
    pruned.pop("values")
    assert several == pytest.approx(told, rel=1e-4)
    several = score(model, found, policy="window", sparsity=0.5, batch_size=5)
    several.pop("values")
    assert several == pytest.approx(pruned, rel=1e-4)
    late = {"policy": "window", "sparsity": 0.5, "evict": "prompt"}
    after = score(model, found, **late)
    assert 0.0 < after["sparsity"] < 0.05
    assert after["rows"] == pytest.approx(pruned["rows"], abs=8)  # an eviction interval
    assert after["perplexity"] != pytest.approx(told["perplexity"], rel=1e-3)
    several = score(model, found, **late, batch_size="auto")
    assert several.pop("values") == after.pop("values")
    assert several == pytest.approx(after, rel=1e-4)


def test_a_policy_that_drops_the_word_loses_it(words: PreTrainedTokenizerBase) -> None:
    known = ["water", "horse", "money", "window", "king", "fire", "light", "wood", "table", "road"]
    filler = "so it was and so it had been " * 15  # no two of these sentences fit
    tale = "".join(f"Of all the {word} {filler}he saw the {word}. " for word in known)
    tokens = [words(f" {word}")["input_ids"][0] for word in known]
    model = remembering_model(tokens, len(words))
    found = passages(words, [tale])
    assert len(found) >= 4
    assert score(model, found)["acc"] == 1.0
    pruned = score(model, found, policy="window", sparsity=0.8)
    assert pruned["acc"] == 0.0 < pruned["sparsity"]


def test_a_level_without_eviction_is_refused(
    embedded_folder: Path,
    words: PreTrainedTokenizerBase,
    books: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = load(embedded_folder, sparsity=0.0)
    # As if the engine did not reach the model: every level would repeat the dense score.
    monkeypatch.setattr(Handle, "use", lambda *args, **kwargs: None)
    with pytest.raises(CtxpruneError, match="not one token was evicted on `last_word`"):
        score(model, passages(words, books, limit=2), policy="sink", sparsity=0.5)
