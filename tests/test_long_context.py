"""Long-context tasks: what prompts are made of, and that the rows of the cache decide answers."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import remembering_model
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ctxprune.evals.quality.long_context import (
    CHOICES,
    DEPTHS,
    MARKER,
    NAMES,
    NUMBERS,
    TASKS,
    VALUES,
    Pick,
    Prompt,
    prompts,
    score,
)
from ctxprune.pruner.checkpoints.checkpoint import load
from ctxprune.pruner.data import read_texts
from ctxprune.pruner.engine.cache import PrunedCache
from ctxprune.pruner.engine.handle import Handle, handle_of
from ctxprune.pruner.engine.modes import Mode
from ctxprune.pruner.errors import CtxpruneError

# Not one of the values is in it.
PLAIN = "It was a bright cold day in the harbour, and the old captain walked slowly. " * 200


@pytest.fixture(scope="module")
def books() -> list[str]:
    return read_texts(None, "eval")


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def answer_of(prompt: Prompt) -> int:
    """The answer to a question that has one."""
    ((answer,),) = (pick.right for pick in prompt.picks)
    return answer


def test_a_prompt_is_a_passage_with_the_fact_at_its_depth_and_the_question_at_its_end(
    words: PreTrainedTokenizerBase, books: list[str]
) -> None:
    made = prompts("retrieval", words, books, lengths=(200, 1024), per_cell=4)
    assert [(len(p.ids), p.depth) for p in made] == [
        (length, depth) for length in (200, 1024) for depth in DEPTHS for _ in range(4)
    ]
    names = set()
    for prompt in made:
        text = words.decode(prompt.ids)
        value = words.decode([answer_of(prompt)])
        assert value.strip() in VALUES and value.startswith(" ")
        name = next(name for name in NAMES if text.endswith(f"\n\nThe password of {name} is"))
        names.add(name)
        fact = f"\n\nThe password of {name} is{value}.\n\n"
        before, after = text.removesuffix(f"\n\nThe password of {name} is").split(fact)
        assert any(before + after in book for book in books)
        first, rest = len(encode(words, before)), len(encode(words, after))
        assert first / (first + rest) == pytest.approx(prompt.depth, abs=0.02)
    assert len(names) > 5
    assert len({answer_of(p) for p in made}) > 10


def test_candidates_are_single_tokens_and_the_answer_is_any_of_them(
    words: PreTrainedTokenizerBase, books: list[str]
) -> None:
    made = prompts("retrieval", words, books, lengths=(128,), per_cell=100)
    places = [prompt.picks[0].choices.index(answer_of(prompt)) for prompt in made]
    for prompt in made:
        assert len(set(prompt.picks[0].choices)) == CHOICES
        assert {words.decode([choice]).strip() for choice in prompt.picks[0].choices} <= set(VALUES)
    # A model that knows nothing is right in one of ten: each place within 4 standard deviations.
    assert all(abs(places.count(place) - 50) < 4 * 45**0.5 for place in range(CHOICES))


def test_prompts_depend_on_the_seed_alone(words: PreTrainedTokenizerBase, books: list[str]) -> None:
    few = prompts("retrieval", words, books, lengths=(128,), per_cell=2, seed=3)
    many = prompts("retrieval", words, books, lengths=(128, 256), per_cell=5, seed=3)
    cells = [[p for p in many if (len(p.ids), p.depth) == (128, depth)] for depth in DEPTHS]
    assert few == [prompt for cell in cells for prompt in cell[:2]]
    assert len({p.ids for p in many}) == len(many)
    other = prompts("retrieval", words, books, lengths=(128,), per_cell=2, seed=4)
    assert all(one.ids != two.ids for one, two in zip(few, other, strict=True))


def test_lengths_that_cannot_be_served_are_left_out(words: PreTrainedTokenizerBase) -> None:
    short, long = PLAIN[:1000], PLAIN[:4000]
    tokens = len(encode(words, long))
    assert 600 < tokens < 1400
    lengths = (128, 512, tokens, tokens + 1)
    made = prompts("retrieval", words, [short, long], lengths=lengths, per_cell=1)
    assert {len(p.ids) for p in made} == {128, 512, tokens}
    made = prompts("retrieval", words, [short, long], lengths=lengths, per_cell=1, longest=512)
    assert {len(p.ids) for p in made} == {128, 512}
    with pytest.raises(CtxpruneError, match=f"longest document of the text has {tokens} tokens"):
        prompts("retrieval", words, [short, long], lengths=(4096,))
    with pytest.raises(CtxpruneError, match="the model has positions for 100"):
        prompts("retrieval", words, [long], lengths=(128,), longest=100)


def test_a_tokenizer_that_cuts_the_values_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(CtxpruneError, match="10 values that are one token each.* has 1 of its 40"):
        prompts("retrieval", tokenizer, [PLAIN], lengths=(128,))


def test_the_highest_logit_among_the_candidates_answers(
    embedded_folder: Path, words: PreTrainedTokenizerBase, books: list[str]
) -> None:
    model = load(embedded_folder, sparsity=0.0)
    made = prompts("retrieval", words, books, lengths=(128,), per_cell=2)
    read: list[tuple[int, ...]] = []
    bias = torch.zeros(model.config.vocab_size)

    def push(module: Any, args: tuple[torch.Tensor], out: Any) -> None:
        read.extend(tuple(row) for row in args[0].tolist())
        out.logits += bias

    model.register_forward_hook(push)
    # Pushed above all: no candidate of any prompt, then one value, then the values in an order.
    bias[encode(words, " captain")] = 1e6
    untouched = score("retrieval", model, made)["acc"]
    assert read == [prompt.ids for prompt in made]
    favourite = answer_of(made[0])
    bias[favourite] = 1e5
    expected = [answer_of(p) == favourite for p in made if favourite in p.picks[0].choices]
    hits = sum(expected) + sum(
        _right_alone(model, p) for p in made if favourite not in p.picks[0].choices
    )
    assert score("retrieval", model, made)["acc"] == pytest.approx(hits / len(made))
    bias[:] = torch.arange(model.config.vocab_size) * 1e4
    ordered = score("retrieval", model, made)
    assert ordered["acc"] == sum(max(p.picks[0].choices) == answer_of(p) for p in made) / len(made)
    assert {untouched, ordered["acc"]} != {1.0}


def _right_alone(model: Any, prompt: Prompt) -> bool:
    hit: bool = score("retrieval", model, [prompt])["acc"] == 1.0
    return hit


def test_a_policy_that_drops_the_fact_loses_the_answer(words: PreTrainedTokenizerBase) -> None:
    known = [encode(words, f" {value}") for value in VALUES]
    model = remembering_model([ids[0] for ids in known if len(ids) == 1], len(words))
    made = prompts("retrieval", words, [PLAIN], lengths=(256, 512), per_cell=4)
    dense = score("retrieval", model, made)
    assert (dense["acc"], dense["stderr"], dense["sparsity"]) == (1.0, 0.0, 0.0)
    assert (dense["n"], dense["chance"]) == (40, 0.1)
    assert dense["cells"] == [
        {"length": length, "depth": depth, "acc": 1.0, "n": 4}
        for length in (256, 512)
        for depth in DEPTHS
    ]
    pruned = score("retrieval", model, made, policy="window", sparsity=0.5)
    assert pruned["sparsity"] == pytest.approx(0.5, abs=0.02)
    acc = {depth: [c["acc"] for c in pruned["cells"] if c["depth"] == depth] for depth in DEPTHS}
    # The window holds 0.29 of the tokens. Without the fact all logits are 0: the first one wins.
    guesses = [p.picks[0].choices[0] == answer_of(p) for p in made if p.depth <= 0.5]
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
    made = prompts("retrieval", words, [PLAIN], lengths=(256, 512), per_cell=4)
    reading, late = (
        score("retrieval", model, made, policy="window", sparsity=0.5, evict=evict)
        for evict in ("reading", "prompt")
    )
    assert late["cells"] == reading["cells"]  # a window forgets the same, whenever it does
    assert late["rows"] == pytest.approx(reading["rows"], abs=8)  # an eviction interval
    assert 0.0 < late["sparsity"] < 0.01


def test_the_policy_is_told_the_length_of_the_prompt(
    words: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = remembering_model([5], len(words))
    made = prompts("retrieval", words, [PLAIN], lengths=(128, 256), per_cell=1)
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
    capped = score("retrieval", model, made, policy="sink", sparsity=0.3, max_rows=64)
    assert chosen == [(("sink", 0.3), {"max_rows": 64, "evict": "reading"})]
    # `use` asks once; the last token, whose logits answer, is no part of the prompt.
    assert told[1:] == [([len(p.ids)], [len(p.ids) - 1]) for p in made]
    assert capped["capped"] > 0.0


def test_a_level_without_eviction_is_refused(
    words: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = remembering_model([5], len(words))
    made = prompts("retrieval", words, [PLAIN], lengths=(128,), per_cell=1)
    # As if the engine did not reach the model: every level would repeat the dense score.
    monkeypatch.setattr(Handle, "use", lambda *args, **kwargs: None)
    with pytest.raises(CtxpruneError, match="not one token was evicted on `retrieval`"):
        score("retrieval", model, made, policy="sink", sparsity=0.5)


def facts_of(text: str) -> list[tuple[str, str]]:
    """What the prompt says of each key, in its order: the key and its value, or its other name."""
    said = re.findall(r"(?:password of|value of|One password of) (\w+) is ([\w ]+)\.\n", text)
    return [(key, value.split()[-1]) for key, value in said]


def words_of(tokenizer: PreTrainedTokenizerBase, tokens: Iterable[int]) -> set[str]:
    return {tokenizer.decode([token]).strip() for token in tokens}


@pytest.mark.parametrize("name", TASKS)
def test_the_text_of_a_prompt_answers_its_question(
    name: str, words: PreTrainedTokenizerBase, books: list[str]
) -> None:
    """Solved by reading: no answer is one that the text does not give, and none is missing."""
    made = prompts(name, words, books, lengths=(512,), per_cell=3)
    assert [(len(p.ids), p.depth) for p in made] == [(512, d) for d in DEPTHS for _ in range(3)]
    for prompt in made:
        asked = prompt.picks[0]
        passage = words.decode(prompt.ids[: len(prompt.ids) - asked.behind])
        assert words_of(words, asked.right) == solved(name, passage)
        assert asked.right <= set(asked.choices) and len(set(asked.choices)) == len(asked.choices)


def solved(name: str, passage: str) -> set[str]:
    """The answers to the question that a passage ends with."""
    if name == "counting":
        return {NUMBERS[passage.count("The bell rang.") - 1]}
    question = re.findall(r"(?:password|value) of (\w+) is", passage)[-1]
    facts = facts_of(passage)
    if name == "multi_value":
        return {value for key, value in facts if key == question}
    known = dict(facts)
    assert len(known) == len(facts)
    value = known[question]
    while value in known:
        value = known[value]
    return {value}


@pytest.mark.parametrize(
    ("name", "chance"),
    [
        ("retrieval", 1 / 10),
        ("multi_key", 1 / 8),
        ("multi_value", 3 / 10 * 2 / 9 * 1 / 8),
        ("variable_tracking", 1 / 4),
        ("counting", 1 / 6),  # as many of the numbers are one token each
    ],
)
def test_chance_is_what_a_model_that_knows_nothing_gets(
    name: str, chance: float, words: PreTrainedTokenizerBase
) -> None:
    made = prompts(name, words, [PLAIN], lengths=(384,), per_cell=200)
    assert all(prompt.chance == pytest.approx(chance) for prompt in made)
    draw = random.Random(0)
    hits = sum(
        all(draw.choice(pick.choices) in pick.right for pick in prompt.picks) for prompt in made
    )
    # Within 4 standard deviations; so is the first candidate, where there is one answer.
    most = 4 * (len(made) * chance * (1 - chance)) ** 0.5
    assert abs(hits - len(made) * chance) < most
    if name != "multi_value":
        firsts = sum(prompt.picks[0].choices[0] in prompt.picks[0].right for prompt in made)
        assert abs(firsts - len(made) * chance) < most


def test_all_values_of_a_key_count(words: PreTrainedTokenizerBase) -> None:
    """Each answer is looked for behind those before it, among the values not given yet."""
    for prompt in prompts("multi_value", words, [PLAIN], lengths=(256,), per_cell=2):
        text = words.decode(prompt.ids)
        first, second, third = prompt.picks
        assert third.behind == 0 and first.behind > second.behind > 0
        assert [len(pick.choices) for pick in prompt.picks] == [10, 9, 8]
        assert [len(pick.right) for pick in prompt.picks] == [3, 2, 1]
        # The token behind each pick is the value that it leaves out for the next one.
        for one, two in ((first, second), (second, third)):
            given = prompt.ids[-one.behind]
            assert set(one.choices) - set(two.choices) == one.right - two.right == {given}
        assert text.endswith(" is") and text.count("One password of") == 6


@pytest.mark.parametrize("name", ["retrieval", "multi_key", "multi_value", "variable_tracking"])
@pytest.mark.parametrize(("policy", "sparsity"), [("window", 0.0), ("window", 0.6), ("sink", 0.3)])
def test_the_score_is_a_naive_count_over_the_rows_that_are_left(
    name: str, policy: str, sparsity: float, words: PreTrainedTokenizerBase
) -> None:
    """The candidate that occurs most often among the tokens that the model can still see.

    Some tokens weigh a little more than others, so that no two are equal.
    """
    tokens = {i for v in VALUES if len(ids := encode(words, f" {v}")) == 1 for i in ids}
    weights = {token: 1.0 + 0.01 * n for n, token in enumerate(sorted(tokens))}
    model = remembering_model([*weights], len(words))
    width = model.config.n_embd
    with torch.no_grad():
        values = model.transformer.h[0].attn.c_attn.weight[:, 2 * width :]
        values[:, : len(weights)] *= torch.tensor([*weights.values()])
    made = prompts(name, words, [PLAIN], lengths=(384,), per_cell=4)
    found = score(name, model, made, policy=policy, sparsity=sparsity)
    hits = []
    for prompt in made:
        seen = seen_by(model, prompt, policy, sparsity)
        best = [most_seen(pick, seen(pick.behind), weights) for pick in prompt.picks]
        hits.append(all(b in pick.right for b, pick in zip(best, prompt.picks, strict=True)))
    assert found["values"]["acc"] == [float(hit) for hit in hits]
    assert found["chance"] == pytest.approx(made[0].chance)
    assert (found["sparsity"] > 0) == (sparsity > 0)


def seen_by(
    model: PreTrainedModel, prompt: Prompt, policy: str, sparsity: float
) -> Callable[[int], list[int]]:
    """What the model's one layer sees from so many tokens before the end of the prompt."""
    handle, n = handle_of(model), len(prompt.ids)
    handle.use(policy, sparsity, context=n)
    if sparsity == 0.0:
        return lambda behind: list(prompt.ids[: n - behind])
    cache = handle.cache(record=True)
    with torch.inference_mode():
        model(torch.tensor([prompt.ids]), past_key_values=cache)
    assert isinstance(cache, PrunedCache) and cache.expires is not None
    expires = cache.expires[0][0].tolist()
    return lambda behind: [
        token for j, token in enumerate(prompt.ids[: n - behind]) if expires[j] > n - 1 - behind
    ]


def most_seen(pick: Pick, seen: list[int], weights: dict[int, float]) -> int:
    """The candidate that occurs most often, by weight; the first one where nothing is known.

    Layer norms take the mean over the 64 axes from each.
    """
    known = sum(token in weights for token in seen)
    return max(pick.choices, key=lambda i: weights[i] * (seen.count(i) - known / 64))


def counting_model(marker: int, last: int, numbers: dict[int, int], size: int) -> PreTrainedModel:
    """A model made by hand that says how often it can still see a marker.

    The marker is one axis and the last token of the question another, each as +1 and -1 so that
    layer norms take nothing away. Number n has n on the one and -n * n / 2 on the other: the best
    n is how many markers there are to each last token.
    """
    model = remembering_model([marker, last], size)
    axes = torch.zeros(4, model.config.n_embd)
    for axis, row in enumerate(axes[:2]):
        row[2 * axis], row[2 * axis + 1] = 1.0, -1.0
    with torch.no_grad():
        weight = model.transformer.wte.weight
        weight[marker], weight[last] = axes[0], axes[1]
        for n, token in numbers.items():
            weight[token] = n * axes[0] - n * n / 2 * axes[1]
        # The last position is what it has read, and not what it is.
        model.transformer.h[0].attn.c_proj.weight.mul_(1e4)
    return model


def test_a_count_is_that_of_the_markers_that_are_left(words: PreTrainedTokenizerBase) -> None:
    made = prompts("counting", words, [PLAIN], lengths=(384,), per_cell=4)
    numbers = [encode(words, f" {number}") for number in NUMBERS]
    known = {n: ids[0] for n, ids in enumerate(numbers, start=1) if len(ids) == 1}
    *_, last = made[0].ids
    assert all(prompt.ids.count(last) == 1 for prompt in made)
    plain, sentence = {*encode(words, PLAIN)}, encode(words, MARKER)
    marker = next(i for i in sentence if i not in plain and sentence.count(i) == 1)
    asked = encode(words, "\n\nThe number of times that the bell rang is").count(marker)
    model = counting_model(marker, last, {n + asked: i for n, i in known.items()}, len(words))
    assert score("counting", model, made)["acc"] == 1.0
    pruned = score("counting", model, made, policy="window", sparsity=0.5)
    hits = []
    for prompt in made:
        left = seen_by(model, prompt, "window", 0.5)(0).count(marker) - asked
        # Two numbers are as near where one between them is no token: the smaller comes first.
        nearest = min(known, key=lambda n: (abs(n - left), n))
        hits.append(known[nearest] in prompt.picks[0].right)
    assert pruned["values"]["acc"] == [float(hit) for hit in hits]
    assert 0 < sum(hits) < len(hits)


def test_a_prompt_without_room_for_its_facts_is_refused(words: PreTrainedTokenizerBase) -> None:
    with pytest.raises(CtxpruneError, match="128 tokens has no room for the facts of `multi_key`"):
        prompts("multi_key", words, [PLAIN], lengths=(128,))
