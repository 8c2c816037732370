"""Books whose people and places are others: what a passage says can then only be remembered.

A pretrained model knows much of a novel by heart or by its kind, so a gate that is tuned on novels
rarely pays for forgetting a name. Here the names and numbers of a passage are exchanged, each for
one of another book, an invented one, or another number, and always for the same one. The language
stays as it was, and the next occurrence of a name can only come from the cache. It asks for a
teacher that stays (`TuneConfig.teacher`), as the text is not what the model should learn to write.

A name is a capitalised word inside a sentence, so texts in scripts without capitals have none.
"""

from __future__ import annotations

import random
import re
from collections import Counter

from ctxprune.pruner.errors import CtxpruneError

# Characters of a passage, within which a name has one replacement: about four windows of 1,024
# tokens of English.
PASSAGE = 18_000
# Renamed passages come from this share of the text, where names and numbers are most frequent.
RICH = 1 / 8
# Share of the replacements that are names of the texts; the others are invented.
REAL = 0.7
# A name occurs at least so often, and without its capital this many times less.
COMMON, SELDOM = 3, 5

_INSIDE = re.compile(r"(?<=[a-z,;] )[A-Z][a-z]{2,}\b")
_LOWER = re.compile(r"\b[a-z]{3,}\b")
_NUMBER = re.compile(r"\d+")
_EXCHANGED = re.compile(r"\b[A-Z][a-z]{2,}\b|\d+")
_SYLLABLES = (
    "ba be bi bo bu da de do dra el en fa fi ga gor ha hi ja ka kel la len lo mar mi mo na ner no "
    "or pa pel ra ri ro sa sel ta tho tri u va vor wen wi ya zan zo"
).split()


def mixed(texts: list[str], share: float, seed: int) -> list[str]:
    """The passages of `texts`, a share of them replaced by renamed ones, shuffled.

    Args:
        texts: documents. share: in (0, 1]. seed: of the choice and of the replacements.

    Raises:
        CtxpruneError: the texts have no names.
    """
    names = _names(texts)
    if not names:
        raise CtxpruneError(
            "the text has no names to exchange: words that are capitalised inside sentences",
            "give other text, or leave out `--rename`",
        )
    known = frozenset(names)
    passages = [text[at : at + PASSAGE] for text in texts for at in range(0, len(text), PASSAGE)]
    richest = sorted(passages, key=lambda passage: -_density(passage, known))
    richest = richest[: max(1, round(RICH * len(passages)))]
    source = random.Random(seed)
    count = round(share * len(passages))
    plain = source.sample(passages, len(passages) - count)
    renamed = [renamed_passage(source.choice(richest), names, source) for _ in range(count)]
    together = plain + renamed
    source.shuffle(together)
    return together


def renamed_passage(passage: str, names: list[str], source: random.Random) -> str:
    """The passage with each of its `names` and numbers exchanged, everywhere alike."""
    chosen: dict[str, str] = {}
    here = sorted(set(_INSIDE.findall(passage)).intersection(names))
    for name in here:
        chosen[name] = source.choice(names) if source.random() < REAL else _invented(source)
    for number in sorted(set(_NUMBER.findall(passage))):
        chosen[number] = str(source.randrange(10 ** (len(number) - 1), 10 ** len(number)))
    return _EXCHANGED.sub(lambda found: chosen.get(found[0], found[0]), passage)


def _names(texts: list[str]) -> list[str]:
    """Words that are capitalised inside sentences and hardly ever written without the capital."""
    capital, lower = Counter[str](), Counter[str]()
    for text in texts:
        capital.update(_INSIDE.findall(text))
        lower.update(_LOWER.findall(text))
    return [
        name
        for name, times in capital.items()
        if times >= COMMON and SELDOM * lower[name.lower()] < times
    ]


def _density(passage: str, names: frozenset[str]) -> float:
    """Names and numbers a word."""
    found = sum(name in names for name in _INSIDE.findall(passage))
    return (found + len(_NUMBER.findall(passage))) / max(1, len(passage.split()))


def _invented(source: random.Random) -> str:
    syllables = (source.choice(_SYLLABLES) for _ in range(source.randint(2, 3)))
    return "".join(syllables).capitalize()
