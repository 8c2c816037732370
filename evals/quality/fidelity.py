"""How far a pruned model is from the published one, in what it predicts.

It is measured where models are used: on running text, and on answers that the published model
itself writes about texts, with the instruction before the text or behind it. An instruction that
stands before is the harder one: the model has to remember it while it reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ctxprune.evals.quality.accuracy import ERROR, VALUES, mean_and_error, refuse_dense, used
from ctxprune.evals.quality.scoring import last_logits, passes
from ctxprune.pruner.answers import MOST, answered, request
from ctxprune.pruner.data import encode
from ctxprune.pruner.engine.handle import handle_of
from ctxprune.pruner.errors import CtxpruneError

NAME = "fidelity"
# Texts of each kind.
LIMIT = 32
# Tokens of a running text, and of one that an answer is about.
RUNNING, READ = 1024, 650
KINDS = ("running", "instruction_first", "instruction_last")
INSTRUCTIONS = (
    "Summarize the text in three sentences.",
    "Which persons and places does the text name, and what does it say about each?",
    "Explain to a child what happens in the text.",
    "Write down the three most important facts of the text, and why they matter.",
    "What is the mood of the text? Give examples from it.",
    "Retell the end of the text in your own words.",
    "Write a short letter to a friend about what the text tells.",
    "Which questions does the text leave open?",
)


@dataclass(frozen=True)
class Sample:
    """A text to predict.

    Attributes:
        ids: its tokens. scored: how many of them, at the end, are predicted. kind: of `KINDS`.
    """

    ids: tuple[int, ...]
    scored: int
    kind: str


def samples(
    reference: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    limit: int | None = None,
    batch_size: int | str = 8,
) -> list[Sample]:
    """Running texts, and answers that the reference writes, greedily, about other texts.

    Args:
        reference: the published model, with its handle at `model.ctxprune`.
        tokenizer: its own; by its chat template, if it has one, the instructions are given.
        texts: documents. limit: samples of each kind; None: `LIMIT`.
        batch_size: answers that are written at once.

    Raises:
        CtxpruneError: too little text, or a model with too few positions.
    """
    longest = handle_of(reference).decoder.positions
    if longest is not None and longest < READ + 2 * MOST:
        raise CtxpruneError(
            f"`{NAME}` reads {READ + 2 * MOST} tokens, and this model has {longest} positions"
        )
    running = min(RUNNING, longest or RUNNING)
    ids = [token for text in texts for token in encode(tokenizer, text)]
    count = min(limit or LIMIT, len(ids) // running)
    if count == 0:
        raise CtxpruneError(
            f"`{NAME}` needs {running} tokens of text, and there are {len(ids)}",
            "give a longer text by `--text`",
        )
    # All over the text, and not its beginning.
    starts = [(len(ids) - running) * n // max(count - 1, 1) for n in range(count)]
    found = [Sample(tuple(ids[at : at + running]), running - 1, KINDS[0]) for at in starts]
    asked: list[tuple[str, list[int]]] = []
    for number, at in enumerate(starts):
        text = str(tokenizer.decode(ids[at : at + READ])).strip()
        instruction = INSTRUCTIONS[number % len(INSTRUCTIONS)]
        for kind in KINDS[1:]:
            asked.append((kind, request(tokenizer, instruction, text, first=kind == KINDS[1])))
    prompts = [prompt for _, prompt in asked]
    answers: dict[int, list[int]] = {}
    for some in passes([len(prompt) for prompt in prompts], batch_size):
        written = answered(reference, tokenizer, [prompts[n] for n in some])
        answers |= dict(zip(some, written, strict=True))
    for number, (kind, prompt) in enumerate(asked):
        found.append(Sample((*prompt, *answers[number]), len(answers[number]), kind))
    return found


def score(
    model: PreTrainedModel,
    reference: PreTrainedModel,
    asked: Sequence[Sample],
    *,
    policy: str = "gate",
    sparsity: float = 0.0,
    max_rows: int | None = None,
    evict: str = "reading",
) -> dict[str, Any]:
    """Compare a model at one level with the reference, both reading the same tokens.

    One text is read at a time: the logits of more take much memory.

    Args:
        model: with its handle at `model.ctxprune`. reference: the same model, or another one.
        asked: from `samples`.
        policy, sparsity, max_rows, evict: as for `Handle.use`.

    Returns:
        For each of `KINDS`, KIND_divergence: the Kullback-Leibler divergence in nats a token from
        the reference, and KIND_agreement: the share of tokens at which both have the same
        likeliest next one; their mean over the texts, with its standard error. Then what `used`
        says, `n`, and `values` of each text.

    Raises:
        CtxpruneError: if the level asks for pruning and not one token was evicted.
    """
    values: dict[str, list[float]] = {}
    with handle_of(model).measure() as usage:
        for sample in asked:
            # One after the other: both may be the same model, and read at another level.
            handle_of(reference).use(sparsity=0.0, max_rows=0)
            dense = _predicted(reference, sample)
            handle_of(model).use(policy, sparsity, max_rows=max_rows, evict=evict)
            divergence, agreement = _apart(_predicted(model, sample), dense)
            values.setdefault(f"{sample.kind}_divergence", []).append(divergence)
            values.setdefault(f"{sample.kind}_agreement", []).append(agreement)
    refuse_dense(NAME, usage, sparsity)
    figures: dict[str, float] = {}
    for name, of_texts in values.items():
        figures[name], error = mean_and_error(of_texts)
        if error is not None:
            figures[f"{name}{ERROR}"] = error
    return {**figures, **used(usage), "n": len(asked), VALUES: values}


def _predicted(model: PreTrainedModel, sample: Sample) -> Tensor:
    """Logits (scored, vocabulary) for the scored tokens: what the tokens before each predict."""
    return last_logits(model, [sample.ids[:-1]], [sample.scored])[0]


def _apart(pruned: Tensor, dense: Tensor) -> tuple[float, float]:
    """Mean divergence, and share of equal likeliest tokens, of logits (tokens, vocabulary)."""
    target = dense.float().log_softmax(dim=-1)
    divergence = F.kl_div(
        pruned.float().log_softmax(dim=-1), target, log_target=True, reduction="batchmean"
    )
    agreement = (pruned.argmax(dim=-1) == dense.argmax(dim=-1)).double().mean()
    return float(divergence), float(agreement)
