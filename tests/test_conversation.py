"""Conversations: what is told and asked, and that a page decides what is known later."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import TEMPLATE, remembering_model
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ctxprune.evals.quality.conversation import (
    CHOICES,
    DISTANCES,
    FACTS,
    TURNS,
    Turn,
    dialogues,
    score,
    work,
)
from ctxprune.evals.quality.long_context import VALUES
from ctxprune.pruner.checkpoints.checkpoint import load_tokenizer
from ctxprune.pruner.config import ChatConfig
from ctxprune.pruner.conversation import Conversation
from ctxprune.pruner.data import encode
from ctxprune.pruner.engine.handle import handle_of
from ctxprune.pruner.errors import CtxpruneError

PLAIN = "It was a bright cold day in the harbour, and the old captain walked slowly. " * 200


@pytest.fixture(scope="module")
def words(embedded_folder: object) -> PreTrainedTokenizerBase:
    tokenizer = copy.deepcopy(load_tokenizer(embedded_folder))  # type: ignore[arg-type]
    tokenizer.chat_template = TEMPLATE.replace(
        "<answer>", "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    return tokenizer


@pytest.fixture(scope="module")
def model(words: PreTrainedTokenizerBase) -> PreTrainedModel:
    """It can tell which of the words stand in what it still sees."""
    known = [ids[0] for v in VALUES if len(ids := encode(words, f" {v}")) == 1]
    made = remembering_model(known, len(words), positions=4096)
    made.generation_config.eos_token_id = None
    return made


def test_each_fact_is_told_once_and_asked_once(
    model: PreTrainedModel, words: PreTrainedTokenizerBase
) -> None:
    made = dialogues(model, words, [PLAIN], limit=3, seed=1)
    assert [len(dialogue) for dialogue in made] == [TURNS] * 3
    for dialogue in made:
        asked = [(n, turn) for n, turn in enumerate(dialogue) if turn.distance is not None]
        assert sorted(turn.distance or 0 for _, turn in asked) == sorted(
            distance for distance in DISTANCES for _ in range(FACTS // len(DISTANCES))
        )
        told = "".join(turn.text for turn in dialogue)
        for number, turn in asked:
            name, value = turn.answer.removeprefix("The password of ")[:-1].split(" is ")
            fact = f"The password of {name} is {value}."
            assert told.count(fact) == 1 and fact in dialogue[number - (turn.distance or 0)].text
            assert turn.text.endswith(f"What is the password of {name}?")
            assert words.decode([turn.right]).strip() == value
            assert encode(words, turn.answer)[turn.at] == turn.right
            # The others were never told: a model that has lost the fact can only guess.
            others = [words.decode([c]).strip() for c in turn.choices if c != turn.right]
            assert len({*others}) == CHOICES - 1 == len(turn.choices) - 1
            assert not any(f"is {other}." in told for other in others)
    assert dialogues(model, words, [PLAIN], limit=1, seed=1) == made[:1]
    assert work(words, made).passes == 3 * TURNS


@pytest.mark.parametrize(("policy", "sparsity"), [("sink", 0.0), ("window", 0.3), ("sink", 0.8)])
def test_the_score_is_a_naive_count_over_the_rows_of_the_page(
    policy: str, sparsity: float, model: PreTrainedModel, words: PreTrainedTokenizerBase
) -> None:
    asked = dialogues(model, words, [PLAIN], limit=3)
    found = score(model, words, asked, policy=policy, sparsity=sparsity)
    hits: dict[int, list[float]] = {distance: [] for distance in sorted(DISTANCES)}
    for dialogue in asked:
        ids = whole(model, words, dialogue)
        expires = None
        if sparsity:
            handle_of(model).use(policy, sparsity)
            cache = handle_of(model).cache(record=True)
            with torch.inference_mode():
                model(torch.tensor([ids]), past_key_values=cache)
            expires = cache.expires[0][0].tolist()  # type: ignore[union-attr, index]
        end = 0
        for number, turn in enumerate(dialogue):
            end = len(whole(model, words, dialogue[: number + 1]))
            if turn.distance is None:
                continue
            at = end - len(encode(words, turn.answer)) + turn.at
            assert ids[at] == turn.right
            left = [i for j, i in enumerate(ids[:at]) if expires is None or expires[j] > at - 1]
            best = max(turn.choices, key=left.count)
            hits[turn.distance].append(float(best == turn.right))
    for distance, expected in hits.items():
        assert found["values"][f"acc_after_{distance}"] == expected
        assert found[f"acc_after_{distance}"] == pytest.approx(sum(expected) / len(expected))
    assert found["n"] == len(asked) * FACTS and found["chance"] == 1 / CHOICES
    if sparsity == 0.0:
        assert found["acc"] == 1.0


def whole(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, dialogue: list[Turn]
) -> list[int]:
    """The ids of a conversation, read turn by turn."""
    handle_of(model).use()
    conversation = Conversation(model, tokenizer, ChatConfig())
    for turn in dialogue:
        conversation.hear(turn.text, turn.answer)
    return conversation.ids


def test_a_page_stays_as_large_as_it_is(
    model: PreTrainedModel, words: PreTrainedTokenizerBase
) -> None:
    (dialogue,) = dialogues(model, words, [PLAIN], limit=1)
    sizes: dict[float, list[int]] = {}
    for sparsity in (0.0, 0.8):
        handle_of(model).use("sink", sparsity)
        conversation = Conversation(model, words, ChatConfig())
        for turn in dialogue:
            conversation.hear(turn.text, turn.answer)
            sizes.setdefault(sparsity, []).append(conversation.nbytes)
    width, tokens = model.config.n_embd, len(conversation.ids)
    assert len({*sizes[0.8]}) == 1
    assert sizes[0.0][-1] == 2 * 4 * width * tokens > sizes[0.8][-1]


def test_what_it_cannot_measure_is_refused(
    model: PreTrainedModel, words: PreTrainedTokenizerBase
) -> None:
    with pytest.raises(CtxpruneError, match="turn by turn"):
        score(model, words, [], evict="prompt")
    with pytest.raises(CtxpruneError, match="needs a document of"):
        dialogues(model, words, [PLAIN[:100]])
    plain = copy.deepcopy(words)
    plain.chat_template = None
    with pytest.raises(CtxpruneError, match="no chat template"):
        dialogues(model, plain, [PLAIN])
    short = remembering_model([5], len(words))
    with pytest.raises(CtxpruneError, match="positions"):
        dialogues(short, words, [PLAIN])
