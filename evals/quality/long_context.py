"""Long-context tasks on real text: facts inside a passage of a book, asked for at its end.

A prompt is read in one forward pass, so the facts have to outlive in the cache all that follows
them. The answer is the candidate with the highest logit: a model need not know how to answer, and
chance is known. A task is a function that makes a `Case`; all else is the same for all of them.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ctxprune.evals.quality.accuracy import accuracy
from ctxprune.evals.quality.scoring import last_logits
from ctxprune.pruner.data import encode
from ctxprune.pruner.engine.handle import handle_of
from ctxprune.pruner.errors import CtxpruneError

LENGTHS = (1024, 2048, 4096)
DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)
PER_CELL = 10
# Candidates of `retrieval` and of `multi_value`, keys and values that are hidden, and chains of
# variables and the links of each.
CHOICES, KEYS, VALUES_OF_A_KEY, CHAINS, LINKS = 10, 8, 3, 4, 3

NAMES = (
    *("Margaret", "Thomas", "Helen", "Edward", "Clara", "Henry"),
    *("Alice", "Robert", "Martha", "Walter", "Susan", "Philip"),
)
# Plain nouns and colours: many vocabularies have them as one token, small ones at least some.
VALUES = (
    *("amber", "apple", "black", "bread", "bridge", "castle", "eagle", "evening", "fire", "garden"),
    *("glass", "gold", "green", "heart", "horse", "house", "iron", "king", "letter", "light"),
    *("money", "morning", "paper", "red", "river", "road", "salt", "sea", "ship", "silver"),
    *("stone", "sugar", "sun", "table", "tree", "water", "white", "wind", "window", "wood"),
)
NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight")
VARIABLES = "ABCDEFGHJKLMNPQRSTUVWXYZ"
MARKER = "\n\nThe bell rang.\n\n"


@dataclass(frozen=True)
class Ask:
    """One answer that the model gives.

    Attributes:
        text: what is read before it, behind the passage and earlier asks.
        choices: candidates. right: those among them that are right.
    """

    text: str
    choices: Sequence[str]
    right: Sequence[str]


@dataclass(frozen=True)
class Case:
    """What a prompt hides and asks.

    Attributes:
        facts: share of the passage that stands before it, and text, of each; in order.
        asks: all of them have to be answered rightly.
    """

    facts: Sequence[tuple[float, str]]
    asks: Sequence[Ask]


@dataclass(frozen=True)
class Pick:
    """An answer in tokens.

    Attributes:
        behind: tokens of the prompt that follow the one that predicts it.
        choices: the candidates' tokens. right: those among them that are right.
    """

    behind: int
    choices: tuple[int, ...]
    right: frozenset[int]


@dataclass(frozen=True)
class Prompt:
    """One question.

    Attributes:
        ids: passage, facts and question: exactly as many tokens as the length asked for.
        depth: share of the passage that stands before the fact asked for, or the first of them.
        picks: the answers, all of which count.
    """

    ids: tuple[int, ...]
    depth: float
    picks: tuple[Pick, ...]

    @property
    def chance(self) -> float:
        """How often a model that knows nothing is right."""
        return math.prod(len(pick.right) / len(pick.choices) for pick in self.picks)


def _password(name: str) -> str:
    return f"\n\nThe password of {name} is"


def _value(variable: str) -> str:
    return f"\n\nThe value of {variable} is"


def _retrieval(draw: random.Random, depth: float, words: Sequence[str]) -> Case:
    """One fact; most candidates are nowhere in the text."""
    name = draw.choice(NAMES)
    choices = draw.sample(words, CHOICES)
    value = draw.choice(choices)
    asked = _password(name)
    return Case([(depth, f"{asked} {value}.\n\n")], [Ask(asked, choices, [value])])


def _multi_key(draw: random.Random, depth: float, words: Sequence[str]) -> Case:
    """Several facts all over the text, one of which is asked for; the candidates are theirs."""
    names = draw.sample(NAMES, KEYS)
    values = draw.sample(words, KEYS)
    places = [depth, *(draw.random() for _ in range(KEYS - 1))]
    facts = [
        (place, f"{_password(name)} {value}.\n\n")
        for place, name, value in zip(places, names, values, strict=True)
    ]
    choices = draw.sample(values, KEYS)  # in another order
    return Case(sorted(facts), [Ask(_password(names[0]), choices, values[:1])])


def _multi_value(draw: random.Random, depth: float, words: Sequence[str]) -> Case:
    """Several values of one key, all of which are to be given, in any order."""
    asked = f"\n\nOne password of {draw.choice(NAMES)} is"
    choices = draw.sample(words, CHOICES)
    values = draw.sample(choices, VALUES_OF_A_KEY)
    places = _from(depth, len(values), draw)
    facts = [(p, f"{asked} {value}.\n\n") for p, value in zip(places, values, strict=True)]
    asks, before = [], asked
    for number, value in enumerate(values):
        left = [choice for choice in choices if choice not in values[:number]]
        asks.append(Ask(before, left, values[number:]))
        before = f" {value}.{asked}"
    return Case(facts, asks)


def _variable_tracking(draw: random.Random, depth: float, words: Sequence[str]) -> Case:
    """Values that go through several variables each; the last one of a chain is asked for."""
    values = draw.sample(words, CHAINS)
    variables = draw.sample(VARIABLES, CHAINS * LINKS)
    facts = []
    # Each link of a chain comes after the one before, somewhere among those of other chains.
    for link in range(LINKS):
        for chain in draw.sample(range(CHAINS), CHAINS):
            own, before = (variables[n * CHAINS + chain] for n in (link, link - 1))
            known = f"the value of {before}" if link else values[chain]
            facts.append(f"{_value(own)} {known}.\n\n")
    choices = draw.sample(values, CHAINS)
    places = _from(depth, len(facts), draw)
    ask = Ask(_value(variables[-1]), choices, values[-1:])
    return Case(list(zip(places, facts, strict=True)), [ask])


def _counting(draw: random.Random, depth: float, words: Sequence[str]) -> Case:
    """How often a sentence occurred."""
    number = draw.choice(words)
    places = _from(depth, NUMBERS.index(number) + 1, draw)
    asked = "\n\nThe number of times that the bell rang is"
    return Case([(place, MARKER) for place in places], [Ask(asked, words, [number])])


def _from(depth: float, count: int, draw: random.Random) -> list[float]:
    """The depth, and places behind it, in order."""
    return [depth, *sorted(draw.uniform(depth, 1.0) for _ in range(count - 1))]


@dataclass(frozen=True)
class Task:
    """A task: what makes its cases, of which words, and how many of them it needs."""

    case: Callable[[random.Random, float, Sequence[str]], Case]
    words: tuple[str, ...]
    least: int


TASKS = {
    "retrieval": Task(_retrieval, VALUES, CHOICES),
    "multi_key": Task(_multi_key, VALUES, KEYS),
    "multi_value": Task(_multi_value, VALUES, CHOICES),
    "variable_tracking": Task(_variable_tracking, VALUES, CHAINS),
    "counting": Task(_counting, NUMBERS, 4),
}


def prompts(
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    lengths: Sequence[int] = LENGTHS,
    per_cell: int | None = None,
    longest: int | None = None,
    seed: int = 0,
) -> list[Prompt]:
    """Make the questions of a task, for all lengths that can be served, at every depth.

    Args:
        name: of the task, of `TASKS`.
        tokenizer: of the model.
        texts: documents; a passage comes from a single one.
        lengths: tokens a prompt.
        per_cell: prompts a length and depth; None: `PER_CELL`. More of them begin with the same.
        longest: tokens that the model has positions for; None: any number.
        seed: of passages, facts and questions.

    Raises:
        CtxpruneError: no length can be served, a prompt has no room for its facts, or too few
            values are a single token.
    """
    documents = [encode(tokenizer, text) for text in texts]
    most = max(map(len, documents))
    served = [n for n in lengths if n <= most and (longest is None or n <= longest)]
    if not served:
        bounds = f"the longest document of the text has {most} tokens"
        if longest is not None:
            bounds += f", and the model has positions for {longest}"
        raise CtxpruneError(
            f"no length of {', '.join(map(str, lengths))} can be served: {bounds}",
            "give smaller `--lengths`, or longer documents by `--text`",
        )
    task = TASKS[name]
    tokens = single_tokens(name, tokenizer, task.words, task.least)
    found = []
    for n in served:
        for depth in DEPTHS:
            for i in range(per_cell or PER_CELL):
                # Seeded one by one: a prompt depends neither on their number nor on other lengths.
                draw = random.Random(f"{seed} {n} {depth} {i}")
                case = task.case(draw, depth, sorted(tokens))
                found.append(_prompt(name, tokenizer, documents, tokens, n, depth, case, draw))
    return found


def _prompt(
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    documents: list[list[int]],
    tokens: dict[str, int],
    length: int,
    depth: float,
    case: Case,
    draw: random.Random,
) -> Prompt:
    """One question of `length` tokens, from a document that has as many."""
    facts = [(place, encode(tokenizer, text)) for place, text in case.facts]
    asks = [encode(tokenizer, ask.text) for ask in case.asks]
    room = length - sum(len(ids) for _, ids in facts) - sum(map(len, asks))
    if room < 1:
        raise CtxpruneError(
            f"a prompt of {length} tokens has no room for the facts of `{name}`",
            f"it needs {length - room + 1} and more: give longer `--lengths`",
        )
    starts = [max(len(document) - length + 1, 0) for document in documents]
    document, count = draw.choices(list(zip(documents, starts, strict=True)), starts)[0]
    start = draw.randrange(count)
    passage = document[start : start + room]
    ids: list[int] = []
    before = 0
    for place, fact in facts:
        ids += passage[before : round(place * room)] + fact
        before = round(place * room)
    ids += passage[before:]
    picks = []
    for number, ask in enumerate(case.asks):
        choices = tuple(tokens[choice] for choice in ask.choices)
        right = frozenset(tokens[choice] for choice in ask.right)
        picks.append(Pick(sum(map(len, asks[number + 1 :])), choices, right))
    return Prompt((*ids, *(token for ask in asks for token in ask)), depth, tuple(picks))


def single_tokens(
    name: str, tokenizer: PreTrainedTokenizerBase, words: Sequence[str], least: int
) -> dict[str, int]:
    """The words that are one token behind a question, each with its token.

    Raises:
        CtxpruneError: fewer than the least number, which the task `name` needs.
    """
    before = _password(NAMES[0])
    question = encode(tokenizer, before)
    found = {}
    for word in words:
        *rest, last = encode(tokenizer, f"{before} {word}")
        if rest == question:
            found[word] = last
    if len(found) < least:
        raise CtxpruneError(
            f"`{name}` needs {least} values that are one token each, and this tokenizer has "
            f"{len(found)} of its {len(words)}",
            "use a model with a larger vocabulary of English words",
        )
    return found


def score(
    name: str,
    model: PreTrainedModel,
    questions: Sequence[Prompt],
    *,
    policy: str = "gate",
    sparsity: float = 0.0,
    max_rows: int | None = None,
    evict: str = "reading",
) -> dict[str, Any]:
    """Ask the questions of a task at one level, with tokens really evicted.

    Args:
        name: of the task.
        model: a loaded checkpoint, with its handle at `model.ctxprune`.
        questions: from `prompts`.
        policy: name of the eviction policy.
        sparsity: the level asked for.
        max_rows: cap on the rows of a sequence in a layer, as for `Handle.use`.
        evict: as for `Handle.use`; the prompt is all before the token that gives the first answer.

    Returns:
        What `accuracy` gives, `chance`, and `cells`: `length`, `depth`, `acc` and `n` of each.

    Raises:
        CtxpruneError: if the level asks for pruning and not one token was evicted.
    """
    handle = handle_of(model)
    cells: dict[tuple[int, float], list[bool]] = {}
    handle.use(policy, sparsity, max_rows=max_rows, evict=evict)
    with handle.measure() as usage:
        for prompt in questions:
            (logits,) = last_logits(model, [prompt.ids], [prompt.picks[0].behind + 1])
            hits = []
            for pick in prompt.picks:
                among = logits[-1 - pick.behind, list(pick.choices)]
                hits.append(pick.choices[int(among.argmax())] in pick.right)
            cells.setdefault((len(prompt.ids), prompt.depth), []).append(all(hits))
    return {
        **accuracy(name, [hit for hits in cells.values() for hit in hits], usage, sparsity),
        "chance": math.fsum(prompt.chance for prompt in questions) / len(questions),
        "cells": [
            {"length": length, "depth": depth, "acc": sum(hits) / len(hits), "n": len(hits)}
            for (length, depth), hits in cells.items()
        ],
    }
