"""Prediction of a passage's last word, as LAMBADA asks for it, on any text.

The word stands earlier in the passage too, so what was said before helps to find it.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ctxprune.evals.quality.accuracy import accuracy, perplexity_of
from ctxprune.evals.quality.scoring import likelihoods
from ctxprune.pruner.data import encode
from ctxprune.pruner.engine.handle import handle_of
from ctxprune.pruner.errors import CtxpruneError

NAME = "last_word"
LIMIT = 500
LEAST_WORDS, MOST_WORDS = 50, 250

# The end of a sentence: two small letters before the stop, so not `Mr.`, an initial or a number.
# `word` is there where the last word will do as an answer.
_END = re.compile(
    r"(?:(?<=\s)(?P<word>[a-z]{4,})|[a-z]{2}(?<!\bMrs))[.!?][\"'”’)]*"
    r"(?=\s+[\"'“‘(]*[A-Z]|\s*\Z)"
)


@dataclass(frozen=True)
class Passage:
    """A passage that ends in the word to be predicted.

    Attributes:
        ids: its tokens, the word's included.
        answer: how many of them, at the end, are the word's.
    """

    ids: tuple[int, ...]
    answer: int


def passages(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    limit: int | None = None,
    longest: int | None = None,
    seed: int = 0,
) -> list[Passage]:
    """Choose passages all over the texts, `LEAST_WORDS` to `MOST_WORDS` words each.

    Args:
        tokenizer: of the model.
        texts: documents; a passage comes from a single one.
        limit: at most so many, and as many as there are if fewer; None: `LIMIT`. More of them
            begin with the same.
        longest: tokens that the model has positions for; None: any number.
        seed: of the choice.

    Raises:
        CtxpruneError: there is none.
    """
    found = []
    for before, word in _cut(texts, random.Random(seed)):
        context = encode(tokenizer, before)
        ids = encode(tokenizer, f"{before} {word}")
        if longest is None or len(ids) <= longest:
            found.append(Passage(tuple(ids), len(ids) - len(context)))
        if len(found) == (limit or LIMIT):
            break
    if not found:
        raise CtxpruneError(
            f"the text has no passage for `{NAME}`: whole sentences, {LEAST_WORDS} to "
            f"{MOST_WORDS} words, that end in a word said before",
            "give a book or the like by `--text`",
        )
    return found


def _cut(texts: Sequence[str], draw: random.Random) -> Iterator[tuple[str, str]]:
    """All passages in a drawn order: the text before the last word, and that word.

    Each has a drawn number of words, or what whole sentences leave of it. The first sentence of a
    document serves none: a sample may begin in the middle of it.
    """
    ends = [list(_END.finditer(text)) for text in texts]
    lasts = [
        (t, e) for t, found in enumerate(ends) for e in range(1, len(found)) if found[e]["word"]
    ]
    draw.shuffle(lasts)
    for t, last in lasts:
        room = draw.randint(LEAST_WORDS, MOST_WORDS)
        word, stop = ends[t][last]["word"], ends[t][last].start()
        before = ""
        for first in reversed(range(last)):
            longer = texts[t][ends[t][first].end() : stop].strip()
            if len(longer.split()) >= room:
                break
            before = longer
        if len(before.split()) >= LEAST_WORDS - 1 and re.search(rf"\b{word}\b", before):
            yield before, word


def score(
    model: PreTrainedModel,
    questions: Sequence[Passage],
    *,
    policy: str = "gate",
    sparsity: float = 0.0,
    max_rows: int | None = None,
    evict: str = "reading",
    batch_size: int | str = 1,
) -> dict[str, Any]:
    """Have the words predicted at one level, with tokens really evicted.

    Args:
        model: a loaded checkpoint, with its handle at `model.ctxprune`.
        questions: from `passages`.
        policy: name of the eviction policy.
        sparsity: the level asked for.
        max_rows: cap on the rows of a sequence in a layer, as for `Handle.use`.
        evict: as for `Handle.use`; the prompt is all that is read before the word is predicted.
        batch_size: passages a forward pass, of about the same length; `auto`: as many as fill it.

    Returns:
        What `accuracy` gives, right being that the likeliest tokens are the word's, and what
        `perplexity_of` does: of a whole word.

    Raises:
        CtxpruneError: if the level asks for pruning and not one token was evicted.
    """
    handle = handle_of(model)
    handle.use(policy, sparsity, max_rows=max_rows, evict=evict)
    pairs = [(p.ids[: -p.answer], p.ids[-p.answer :]) for p in questions]
    with handle.measure() as usage:
        found = likelihoods(model, pairs, batch_size)
    figures = accuracy(NAME, [each.greedy for each in found], usage, sparsity)
    return {**figures, **perplexity_of([-each.total for each in found])}
