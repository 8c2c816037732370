"""Retrieval: what the prompts are made of, and that the rows of the cache decide the answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import remembering_model
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ctxprune.evals.quality.retrieval import CHOICES, DEPTHS, NAMES, VALUES, Prompt, prompts, score
from ctxprune.pruner.checkpoints.checkpoint import load, load_tokenizer
from ctxprune.pruner.data import read_texts
from ctxprune.pruner.engine.handle import Handle
from ctxprune.pruner.engine.modes import Mode
from ctxprune.pruner.errors import CtxpruneError

# Not one of the values is in it.
PLAIN = "It was a bright cold day in the harbour, and the old captain walked slowly. " * 200


@pytest.fixture(scope="module")
def words(embedded_folder: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(embedded_folder)


@pytest.fixture(scope="module")
def books() -> list[str]:
    return read_texts(None, "eval")


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def test_a_prompt_is_a_passage_with_the_fact_at_its_depth_and_the_question_at_its_end(
    words: PreTrainedTokenizerBase, books: list[str]
) -> None:
    made = prompts(words, books, lengths=(200, 1024), per_cell=4)
    assert [(len(p.ids), p.depth) for p in made] == [
        (length, depth) for length in (200, 1024) for depth in DEPTHS for _ in range(4)
    ]
    names = set()
    for prompt in made:
        text = words.decode(prompt.ids)
        value = words.decode([prompt.answer])
        assert value.strip() in VALUES and value.startswith(" ")
        name = next(name for name in NAMES if text.endswith(f"\n\nThe password of {name} is"))
        names.add(name)
        fact = f"\n\nThe password of {name} is{value}.\n\n"
        before, after = text.removesuffix(f"\n\nThe password of {name} is").split(fact)
        assert any(before + after in book for book in books)
        first, rest = len(encode(words, before)), len(encode(words, after))
        assert first / (first + rest) == pytest.approx(prompt.depth, abs=0.02)
    assert len(names) > 5
    assert len({p.answer for p in made}) > 10


def test_candidates_are_single_tokens_and_the_answer_is_any_of_them(
    words: PreTrainedTokenizerBase, books: list[str]
) -> None:
    made = prompts(words, books, lengths=(128,), per_cell=100)
    places = [prompt.choices.index(prompt.answer) for prompt in made]
    for prompt in made:
        assert len(set(prompt.choices)) == CHOICES
        assert {words.decode([choice]).strip() for choice in prompt.choices} <= set(VALUES)
    # A model that knows nothing is right in one of ten: each place within 4 standard deviations.
    assert all(abs(places.count(place) - 50) < 4 * 45**0.5 for place in range(CHOICES))


def test_prompts_depend_on_the_seed_alone(words: PreTrainedTokenizerBase, books: list[str]) -> None:
    few = prompts(words, books, lengths=(128,), per_cell=2, seed=3)
    many = prompts(words, books, lengths=(128, 256), per_cell=5, seed=3)
    cells = [[p for p in many if (len(p.ids), p.depth) == (128, depth)] for depth in DEPTHS]
    assert few == [prompt for cell in cells for prompt in cell[:2]]
    assert len({p.ids for p in many}) == len(many)
    other = prompts(words, books, lengths=(128,), per_cell=2, seed=4)
    assert all(one.ids != two.ids for one, two in zip(few, other, strict=True))


def test_lengths_that_cannot_be_served_are_left_out(words: PreTrainedTokenizerBase) -> None:
    short, long = PLAIN[:1000], PLAIN[:4000]
    tokens = len(encode(words, long))
    assert 600 < tokens < 1400
    lengths = (128, 512, tokens, tokens + 1)
    made = prompts(words, [short, long], lengths=lengths, per_cell=1)
    assert {len(p.ids) for p in made} == {128, 512, tokens}
    made = prompts(words, [short, long], lengths=lengths, per_cell=1, longest=512)
    assert {len(p.ids) for p in made} == {128, 512}
    with pytest.raises(CtxpruneError, match=f"longest document of the text has {tokens} tokens"):
        prompts(words, [short, long], lengths=(4096,))
    with pytest.raises(CtxpruneError, match="the model has positions for 100"):
        prompts(words, [long], lengths=(128,), longest=100)


def test_a_tokenizer_that_cuts_the_values_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(CtxpruneError, match="10 values that are one token each.* has 1 of its 40"):
        prompts(tokenizer, [PLAIN], lengths=(128,))


def test_the_highest_logit_among_the_candidates_answers(
    embedded_folder: Path, words: PreTrainedTokenizerBase, books: list[str]
) -> None:
    model = load(embedded_folder, sparsity=0.0)
    made = prompts(words, books, lengths=(128,), per_cell=2)
    read: list[tuple[int, ...]] = []
    bias = torch.zeros(model.config.vocab_size)

    def push(module: Any, args: tuple[torch.Tensor], out: Any) -> None:
        read.extend(tuple(row) for row in args[0].tolist())
        out.logits += bias

    model.register_forward_hook(push)
    # Pushed above all: no candidate of any prompt, then one value, then the values in an order.
    bias[encode(words, " captain")] = 1e6
    untouched = score(model, made)["acc"]
    assert read == [prompt.ids for prompt in made]
    favourite = made[0].answer
    bias[favourite] = 1e5
    expected = [p.answer == favourite for p in made if favourite in p.choices]
    hits = sum(expected) + sum(_right_alone(model, p) for p in made if favourite not in p.choices)
    assert score(model, made)["acc"] == pytest.approx(hits / len(made))
    bias[:] = torch.arange(model.config.vocab_size) * 1e4
    ordered = score(model, made)
    assert ordered["acc"] == sum(max(p.choices) == p.answer for p in made) / len(made)
    assert {untouched, ordered["acc"]} != {1.0}


def _right_alone(model: Any, prompt: Prompt) -> bool:
    hit: bool = score(model, [prompt])["acc"] == 1.0
    return hit


def test_a_policy_that_drops_the_fact_loses_the_answer(words: PreTrainedTokenizerBase) -> None:
    known = [encode(words, f" {value}") for value in VALUES]
    model = remembering_model([ids[0] for ids in known if len(ids) == 1], len(words))
    made = prompts(words, [PLAIN], lengths=(256, 512), per_cell=4)
    dense = score(model, made)
    assert (dense["acc"], dense["stderr"], dense["sparsity"]) == (1.0, 0.0, 0.0)
    assert (dense["n"], dense["chance"]) == (40, 0.1)
    assert dense["cells"] == [
        {"length": length, "depth": depth, "acc": 1.0, "n": 4}
        for length in (256, 512)
        for depth in DEPTHS
    ]
    pruned = score(model, made, policy="window", sparsity=0.5)
    assert pruned["sparsity"] == pytest.approx(0.5, abs=0.02)
    acc = {depth: [c["acc"] for c in pruned["cells"] if c["depth"] == depth] for depth in DEPTHS}
    # The window holds 0.29 of the tokens. Without the fact all logits are 0: the first one wins.
    guesses = [p.choices[0] == p.answer for p in made if p.depth <= 0.5]
    assert acc[0.9] == [1.0, 1.0]
    assert 4 * sum(sum(acc[depth]) for depth in (0.1, 0.3, 0.5)) == sum(guesses) < 12
    mean = sum(c["acc"] * c["n"] for c in pruned["cells"]) / 40
    assert pruned["acc"] == pytest.approx(mean)
    assert pruned["stderr"] == pytest.approx((mean * (1 - mean) / 39) ** 0.5)


def test_after_the_prompt_the_answer_comes_from_what_is_left(
    words: PreTrainedTokenizerBase,
) -> None:
    known = [encode(words, f" {value}") for value in VALUES]
    model = remembering_model([ids[0] for ids in known if len(ids) == 1], len(words))
    made = prompts(words, [PLAIN], lengths=(256, 512), per_cell=4)
    reading, late = (
        score(model, made, policy="window", sparsity=0.5, evict=evict)
        for evict in ("reading", "prompt")
    )
    assert late["cells"] == reading["cells"]  # a window forgets the same, whenever it does
    assert late["rows"] == pytest.approx(reading["rows"], abs=8)  # an eviction interval
    assert 0.0 < late["sparsity"] < 0.01


def test_the_policy_is_told_the_length_of_the_prompt(
    words: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = remembering_model([5], len(words))
    made = prompts(words, [PLAIN], lengths=(128, 256), per_cell=1)
    chosen, told = [], []
    use, at = Handle.use, Handle.at

    def choosing(self: Handle, *args: Any, **kwargs: Any) -> None:
        chosen.append((args, kwargs))
        use(self, *args, **kwargs)

    def announced(self: Handle, context: Any, prompt: Any = None) -> Mode:
        told.append((context, prompt))
        return at(self, context, prompt)

    monkeypatch.setattr(Handle, "use", choosing)
    monkeypatch.setattr(Handle, "at", announced)
    capped = score(model, made, policy="sink", sparsity=0.3, max_rows=64)
    assert chosen == [(("sink", 0.3), {"max_rows": 64, "evict": "reading"})]
    # `use` asks once; the last token, whose logits answer, is no part of the prompt.
    assert told[1:] == [([len(p.ids)], [len(p.ids) - 1]) for p in made]
    assert capped["capped"] > 0.0


def test_a_level_without_eviction_is_refused(
    words: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = remembering_model([5], len(words))
    made = prompts(words, [PLAIN], lengths=(128,), per_cell=1)
    # As if the engine did not reach the model: every level would repeat the dense score.
    monkeypatch.setattr(Handle, "use", lambda *args, **kwargs: None)
    with pytest.raises(CtxpruneError, match="not one token was evicted on `retrieval`"):
        score(model, made, policy="sink", sparsity=0.5)
