"""Long-context retrieval: a fact inside a passage of a book, asked for at its end.

A prompt is read in one forward pass, so the fact has to outlive in the cache all that follows it.
The question repeats the fact's words up to the value, and the answer is the candidate with the
highest logit: copying is all that a model needs to be able to do, and chance is known.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ctxprune.evals.quality.accuracy import accuracy
from ctxprune.evals.quality.scoring import last_logits
from ctxprune.pruner.data import encode
from ctxprune.pruner.engine.handle import handle_of
from ctxprune.pruner.errors import CtxpruneError

NAME = "retrieval"
LENGTHS = (1024, 2048, 4096)
DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)
PER_CELL = 10
CHOICES = 10

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


@dataclass(frozen=True)
class Prompt:
    """One question.

    Attributes:
        ids: passage, fact and question: exactly as many tokens as the length asked for.
        depth: share of the passage that stands before the fact.
        choices: the candidates' tokens.
        answer: the one among them that the fact names.
    """

    ids: tuple[int, ...]
    depth: float
    choices: tuple[int, ...]
    answer: int


def prompts(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    lengths: Sequence[int] = LENGTHS,
    per_cell: int | None = None,
    longest: int | None = None,
    seed: int = 0,
) -> list[Prompt]:
    """Make the questions, for all lengths that can be served, at every depth.

    Args:
        tokenizer: of the model.
        texts: documents; a passage comes from a single one.
        lengths: tokens a prompt.
        per_cell: prompts a length and depth; None: `PER_CELL`. More of them begin with the same.
        longest: tokens that the model has positions for; None: any number.
        seed: of passages, names and values.

    Raises:
        CtxpruneError: no length can be served, or too few values are a single token.
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
    tokens = _single_tokens(tokenizer)
    return [
        # Seeded one by one: a prompt depends neither on the number nor on the other lengths.
        _prompt(tokenizer, documents, tokens, n, depth, random.Random(f"{seed} {n} {depth} {i}"))
        for n in served
        for depth in DEPTHS
        for i in range(per_cell or PER_CELL)
    ]


def _prompt(
    tokenizer: PreTrainedTokenizerBase,
    documents: list[list[int]],
    tokens: dict[str, int],
    length: int,
    depth: float,
    draw: random.Random,
) -> Prompt:
    """One question of `length` tokens, from a document that has as many."""
    name = draw.choice(NAMES)
    choices = draw.sample(sorted(tokens), CHOICES)
    value = draw.choice(choices)
    fact = encode(tokenizer, f"{_question(name)} {value}.\n\n")
    question = encode(tokenizer, _question(name))
    starts = [max(len(document) - length + 1, 0) for document in documents]
    document, count = draw.choices(list(zip(documents, starts, strict=True)), starts)[0]
    start = draw.randrange(count)
    passage = document[start : start + length - len(fact) - len(question)]
    before = round(depth * len(passage))
    ids = (*passage[:before], *fact, *passage[before:], *question)
    return Prompt(ids, depth, tuple(tokens[choice] for choice in choices), tokens[value])


def _question(name: str) -> str:
    return f"\n\nThe password of {name} is"


def _single_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """The values that are one token where they answer the question, each with its token.

    Raises:
        CtxpruneError: fewer than a prompt has candidates.
    """
    question = encode(tokenizer, _question(NAMES[0]))
    found = {}
    for value in VALUES:
        *before, last = encode(tokenizer, f"{_question(NAMES[0])} {value}")
        if before == question:
            found[value] = last
    if len(found) < CHOICES:
        raise CtxpruneError(
            f"`{NAME}` needs {CHOICES} values that are one token each, and this tokenizer has "
            f"{len(found)} of its {len(VALUES)}",
            "use a model with a larger vocabulary of English words",
        )
    return found


def score(
    model: PreTrainedModel,
    questions: Sequence[Prompt],
    *,
    policy: str = "gate",
    sparsity: float = 0.0,
    max_rows: int | None = None,
    evict: str = "reading",
) -> dict[str, Any]:
    """Ask them at one level, with tokens really evicted.

    Args:
        model: a loaded checkpoint, with its handle at `model.ctxprune`.
        questions: from `prompts`.
        policy: name of the eviction policy.
        sparsity: the level asked for.
        max_rows: cap on the rows of a sequence in a layer, as for `Handle.use`.
        evict: as for `Handle.use`; the prompt is all but the last token, which gives the answer.

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
            ((logits,),) = last_logits(model, [prompt.ids], [1])
            best = prompt.choices[int(logits[list(prompt.choices)].argmax())]
            cells.setdefault((len(prompt.ids), prompt.depth), []).append(best == prompt.answer)
    return {
        **accuracy(NAME, [hit for hits in cells.values() for hit in hits], usage, sparsity),
        "chance": 1 / CHOICES,
        "cells": [
            {"length": length, "depth": depth, "acc": sum(hits) / len(hits), "n": len(hits)}
            for (length, depth), hits in cells.items()
        ],
    }
