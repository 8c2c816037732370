"""Renamed text: each name and number has one replacement in a passage, and nothing else changes."""

from __future__ import annotations

import random
import re

import pytest

from ctxprune.pruner import names
from ctxprune.pruner.errors import CtxpruneError

STORY = (
    "In 1845 the old captain met Hawkins at the inn, and Hawkins paid him 12 pounds. "
    "Hawkins, who had known Smollett since 1845, said that Smollett was gone. The sea was calm; "
    "Smollett sailed for 12 days to Bristol, as Hawkins had told the men of Bristol. "
    "But nobody in Bristol believed Hawkins. "
)
WORDS = re.compile(r"[A-Za-z]+|\d+")


def test_a_name_has_one_replacement_and_the_rest_is_kept() -> None:
    known = ["Hawkins", "Smollett", "Bristol", "Trelawney"]
    text = names.renamed_passage(STORY, known, random.Random(3))
    before, after = WORDS.findall(STORY), WORDS.findall(text)
    pairs = dict(zip(before, after, strict=True))
    assert [pairs[word] for word in before] == after
    assert WORDS.sub("", text) == WORDS.sub("", STORY)
    for number in ("1845", "12"):
        assert len(pairs[number]) == len(number)
    changed = {word for word, other in pairs.items() if word != other}
    assert {"Hawkins", "Smollett", "Bristol"} & changed
    assert changed <= {"Hawkins", "Smollett", "Bristol", "1845", "12"}


def test_names_are_capitalised_inside_sentences() -> None:
    assert set(names._names([STORY])) == {"Hawkins", "Smollett", "Bristol"}
    assert names._names([STORY + "the bristol board and a bristol fashion " * 3]) == [
        "Hawkins",
        "Smollett",
    ]


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_a_share_of_the_passages_is_renamed(monkeypatch: pytest.MonkeyPatch, share: float) -> None:
    monkeypatch.setattr(names, "PASSAGE", len(STORY))
    plain = "the old captain paid at the inn and the sea was calm. ".ljust(len(STORY), ".")
    texts = [STORY] * 2 + [plain] * 14
    mixed = names.mixed(texts, share, seed=0)
    assert mixed == names.mixed(texts, share, seed=0) != names.mixed(texts, share, seed=1)
    assert len(mixed) == len(texts)
    renamed = [text for text in mixed if text not in texts]
    # Those that are renamed are the richest, each time anew.
    assert len(renamed) == round(share * len(texts))
    assert len(set(renamed)) > len(renamed) // 2
    assert all(" paid him " in text for text in renamed)


def test_text_without_names_is_refused() -> None:
    with pytest.raises(CtxpruneError, match="no names to exchange"):
        names.mixed([STORY.lower()], 0.5, seed=0)
