"""How far a pruned model is from the published one, in what it predicts.

It is measured where models are used: on running text, and on answers that the published model
itself writes about texts, with the instruction before the text or behind it. An instruction that
stands before is the harder one: the model has to remember it while it reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ctxprune.evals.quality.accuracy import ERROR, VALUES, mean_and_error, refuse_dense, used
from ctxprune.evals.quality.scoring import last_logits, passes
from ctxprune.pruner.data import by_template, encode
from ctxprune.pruner.device import input_device
from ctxprune.pruner.engine.handle import handle_of
from ctxprune.pruner.errors import CtxpruneError

NAME = "fidelity"
# Texts of each kind.
LIMIT = 32
# Tokens of a running text, and of one that an answer is about.
RUNNING, READ = 1024, 650
# Tokens that an answer has at least, and at most.
LEAST, MOST = 60, 160
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
        for kind, parts in ((KINDS[1], (instruction, text)), (KINDS[2], (text, instruction))):
            asked.append((kind, _prompt(tokenizer, "\n\n".join(parts))))
    answers = _answers(reference, tokenizer, [prompt for _, prompt in asked], batch_size)
    for (kind, prompt), answer in zip(asked, answers, strict=True):
        found.append(Sample((*prompt, *answer), len(answer), kind))
    return found


def _prompt(tokenizer: PreTrainedTokenizerBase, request: str) -> list[int]:
    """A request as the model is used to be asked."""
    if tokenizer.chat_template is None:
        return encode(tokenizer, f"{request}\n\nAnswer:")
    turn = [{"role": "user", "content": request}]
    return encode(tokenizer, by_template(tokenizer, turn, ask=True))


def _answers(
    reference: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    batch_size: int | str,
) -> list[list[int]]:
    """What the reference, dense, answers to each: its likeliest tokens, the last one its end."""
    handle_of(reference).use(sparsity=0.0, max_rows=0)
    padding = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    written: dict[int, list[int]] = {}
    for some in passes([len(prompt) for prompt in prompts], batch_size):
        width = max(len(prompts[n]) for n in some)
        padded = [[padding or 0] * (width - len(prompts[n])) + prompts[n] for n in some]
        mask = [[0] * (width - len(prompts[n])) + [1] * len(prompts[n]) for n in some]
        device = input_device(reference)
        with torch.inference_mode():
            output: Any = reference.generate(  # type: ignore[operator]
                torch.tensor(padded, device=device),
                attention_mask=torch.tensor(mask, device=device),
                do_sample=False,
                min_new_tokens=LEAST,
                max_new_tokens=MOST,
                pad_token_id=padding,
            )
        for n, tokens in zip(some, output[:, width:].tolist(), strict=True):
            written[n] = _until_end(tokens, reference)
    return [written[n] for n in range(len(prompts))]


def _until_end(tokens: list[int], model: PreTrainedModel) -> list[int]:
    """Tokens up to the first one that ends a text, that one included."""
    ends = model.generation_config.eos_token_id
    known = set(ends) if isinstance(ends, list) else {ends}
    last = next((n for n, token in enumerate(tokens) if token in known), len(tokens) - 1)
    return tokens[: last + 1]


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
