"""Conversations: a fact that the user tells in one turn, and asks for some turns later.

In every turn the user shows some text, so that the conversation goes on for longer than its page
has rows. All that is said is the same at every level: the model's answers are given to it, and it
is asked for one word of them, among candidates.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ctxprune.evals.quality.accuracy import ERROR, VALUES, accuracy, mean_and_error
from ctxprune.evals.quality.long_context import NAMES, single_tokens
from ctxprune.evals.quality.long_context import VALUES as WORDS
from ctxprune.evals.quality.work import Work
from ctxprune.pruner.config import ChatConfig
from ctxprune.pruner.conversation import ChatTemplate, Conversation
from ctxprune.pruner.data import by_template, encode
from ctxprune.pruner.engine.handle import handle_of
from ctxprune.pruner.errors import CtxpruneError

NAME = "conversation"
# Conversations.
LIMIT = 16
# Turns between telling and asking. Fact k is told in turn k and asked in turn k + distance: no two
# are asked in the same turn, since k and the distance that belongs to it make every remainder of 3.
DISTANCES = (10, 1, 4)
FACTS = 6
ASKED = {fact + DISTANCES[fact % len(DISTANCES)]: fact for fact in range(FACTS)}
TURNS = max(ASKED) + 1
# Candidates of an answer: what was told, and words that were not.
CHOICES = 10
# Tokens of text that the user shows in a turn.
SHOWN = 64
MEBIBYTE = 2**20


@dataclass(frozen=True)
class Turn:
    """What the user says, and what the model is given as its answer.

    Attributes:
        distance: turns since the fact that is asked for was told; None: nothing is asked.
        at: the token of the answer that names the fact's value.
        choices: the candidates' tokens. right: the one among them that was told.
    """

    text: str
    answer: str
    distance: int | None = None
    at: int = 0
    choices: tuple[int, ...] = ()
    right: int = 0


def dialogues(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    limit: int | None = None,
    seed: int = 0,
) -> list[list[Turn]]:
    """Conversations about passages of the texts, of `TURNS` turns.

    Args:
        model: with its handle at `model.ctxprune`. tokenizer: its own.
        texts: documents; the passages of a conversation come from a single one.
        limit: conversations; None: `LIMIT`. More of them begin with the same.
        seed: of passages, names and values.

    Raises:
        CtxpruneError: no chat template, too short texts, too few positions, or too few values are
            a single token.
    """
    ChatTemplate(model, tokenizer)
    tokens = single_tokens(NAME, tokenizer, WORDS, FACTS + CHOICES - 1)
    documents = [encode(tokenizer, text) for text in texts]
    starts = [max(len(document) - TURNS * SHOWN + 1, 0) for document in documents]
    if not any(starts):
        raise CtxpruneError(
            f"`{NAME}` needs a document of {TURNS * SHOWN} tokens, and the longest has "
            f"{max(map(len, documents))}",
            "give a longer one by `--text`",
        )
    found = []
    for number in range(limit or LIMIT):
        draw = random.Random(f"{seed} {number}")
        document, count = draw.choices(list(zip(documents, starts, strict=True)), starts)[0]
        start = draw.randrange(count)
        passage = document[start : start + TURNS * SHOWN]
        shown = [
            str(tokenizer.decode(passage[at : at + SHOWN])).strip()
            for at in range(0, len(passage), SHOWN)
        ]
        found.append(_dialogue(tokenizer, tokens, shown, draw))
    longest = handle_of(model).decoder.positions
    most = max(_length(tokenizer, dialogue) for dialogue in found)
    if longest is not None and longest < most:
        raise CtxpruneError(f"`{NAME}` reads {most} tokens, and this model has {longest} positions")
    return found


def _dialogue(
    tokenizer: PreTrainedTokenizerBase,
    tokens: dict[str, int],
    shown: Sequence[str],
    draw: random.Random,
) -> list[Turn]:
    """One conversation."""
    names = draw.sample(NAMES, FACTS)
    values = draw.sample(sorted(tokens), FACTS)
    others = [word for word in sorted(tokens) if word not in values]
    turns = []
    for number, text in enumerate(shown):
        told = ""
        if number < FACTS:
            told = f"\n\nThe password of {names[number]} is {values[number]}."
        if number not in ASKED:
            turns.append(Turn(f"{text}{told}", "I have read it."))
            continue
        fact = ASKED[number]
        before = f"The password of {names[fact]} is"
        answer = f"{before} {values[fact]}."
        among = [values[fact], *draw.sample(others, CHOICES - 1)]
        choices = tuple(tokens[value] for value in draw.sample(among, CHOICES))
        at, right = len(encode(tokenizer, before)), tokens[values[fact]]
        said = f"{text}{told}\n\nWhat is the password of {names[fact]}?"
        turns.append(Turn(said, answer, number - fact, at, choices, right))
    return turns


def _length(tokenizer: PreTrainedTokenizerBase, dialogue: Sequence[Turn]) -> int:
    """Tokens of a conversation."""
    messages = [
        {"role": role, "content": content}
        for turn in dialogue
        for role, content in (("user", turn.text), ("assistant", turn.answer))
    ]
    return len(encode(tokenizer, by_template(tokenizer, messages)))


def work(tokenizer: PreTrainedTokenizerBase, asked: Sequence[Sequence[Turn]]) -> Work:
    """How much the conversations are to read: a turn a pass."""
    passes = sum(map(len, asked))
    return Work(len(asked), sum(_length(tokenizer, dialogue) for dialogue in asked), passes)


def score(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    asked: Sequence[Sequence[Turn]],
    *,
    policy: str = "gate",
    sparsity: float = 0.0,
    max_rows: int | None = None,
    evict: str = "reading",
) -> dict[str, Any]:
    """Hold the conversations at one level, each in one cache: a page as large as in a chat.

    Args:
        model: a loaded checkpoint, with its handle at `model.ctxprune`. tokenizer: its own.
        asked: from `dialogues`.
        policy, sparsity, max_rows, evict: as for `Handle.use`.

    Returns:
        What `accuracy` gives, `acc_after_N` with its standard error for each of `DISTANCES`,
        `cache_mib`: of the cache at the end of a conversation, on average, and `chance`.

    Raises:
        CtxpruneError: rows are to leave after the prompt, or the level asks for pruning and not
            one token was evicted.
    """
    if evict != "reading":
        raise CtxpruneError(
            f"`{NAME}` is read turn by turn, and has no prompt to leave whole",
            "give `--evict reading`",
        )
    handle = handle_of(model)
    handle.use(policy, sparsity, max_rows=max_rows)
    hits: dict[int, list[float]] = {distance: [] for distance in sorted(DISTANCES)}
    size = 0
    with handle.measure() as usage:
        for dialogue in asked:
            handle.last_cache = None
            conversation = Conversation(model, tokenizer, ChatConfig())
            for turn in dialogue:
                logits = conversation.hear(turn.text, turn.answer)
                if turn.distance is not None:
                    best = int(logits[turn.at, list(turn.choices)].argmax())
                    hits[turn.distance].append(float(turn.choices[best] == turn.right))
            size += conversation.nbytes
            if (cache := handle.last_cache) is not None:
                usage.end(cache.rows, cache.seen)
    every = [hit > 0 for of_distance in hits.values() for hit in of_distance]
    figures = accuracy(NAME, every, usage, sparsity)
    for distance, of_distance in hits.items():
        metric = f"acc_after_{distance}"
        figures[metric], error = mean_and_error(of_distance)
        if error is not None:
            figures[metric + ERROR] = error
        figures[VALUES][metric] = of_distance
    mib = size / len(asked) / MEBIBYTE
    return {**figures, "cache_mib": mib, "chance": 1 / CHOICES}
