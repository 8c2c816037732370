"""Perplexity of the embedded checkpoint on books-test, beside a unigram and a trigram model.

    python -m ctxprune.recipes.embedded.evaluate --data DIR --model DIR

DIR holds books-train, books-valid and books-test.jsonl.gz. The n-gram models are counted on the
tokens of books-train; the trigram is interpolated with bigram, unigram and uniform, with weights
chosen on books-valid. Prints JSON.
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from ctxprune.recipes.embedded.pretrain import CONTEXT, VOCABULARY, encode, read_books

Ids = npt.NDArray[np.int64]
Probabilities = npt.NDArray[np.float64]

HELD_OUT_WINDOWS = 96
WEIGHTS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)


class Trigram:
    """Maximum-likelihood estimates of order 1 to 3, by sorted n-gram codes."""

    def __init__(self, ids: Ids) -> None:
        self.grams = []
        for order in (1, 2, 3):
            codes, counts = np.unique(_codes(ids, order), return_counts=True)
            self.grams.append((codes, counts))

    def estimates(self, ids: Ids) -> list[Probabilities]:
        """For each token from the third on: its estimate by order 1, 2, 3 (0 where unseen)."""
        total = float(self.grams[0][1].sum())
        counts = [self._count(ids, order)[3 - order :] for order in (1, 2, 3)]
        # The history of an n-gram ending at a token is the (n-1)-gram that ends just before it.
        histories = [self._count(ids, order)[2 - order : -1] for order in (1, 2)]
        result = [counts[0] / total]
        for count, history in zip(counts[1:], histories, strict=True):
            result.append(np.divide(count, history, where=history > 0, out=np.zeros(len(count))))
        return result

    def _count(self, ids: Ids, order: int) -> Probabilities:
        known, counts = self.grams[order - 1]
        wanted = _codes(ids, order)
        place = np.searchsorted(known, wanted).clip(max=len(known) - 1)
        return np.where(known[place] == wanted, counts[place], 0).astype(np.float64)


def _codes(ids: Ids, order: int) -> Ids:
    """One integer for each n-gram."""
    code = ids[: len(ids) - order + 1].copy()
    for shift in range(1, order):
        code = code * VOCABULARY + ids[shift : len(ids) - order + 1 + shift]
    return code


def mixed(estimates: list[Probabilities], trigram: float, bigram: float) -> float:
    """Perplexity of the interpolation; the uniform distribution has one part in a thousand."""
    one, two, three = estimates
    lower = bigram * two + (1 - bigram) * (0.999 * one + 0.001 / VOCABULARY)
    return float(np.exp(-np.log(trigram * three + (1 - trigram) * lower).mean()))


@torch.no_grad()
def model_perplexity(folder: Path, windows: torch.Tensor) -> float:
    """Perplexity of the checkpoint on windows (count, CONTEXT), but for their first tokens."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    losses = [float(model(w[None], labels=w[None], use_cache=False).loss) for w in windows]
    return float(np.exp(np.mean(losses)))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of books-*.jsonl.gz")
    parser.add_argument("--model", type=Path, required=True, help="the checkpoint")
    options = parser.parse_args()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(options.model)
    ids = {}
    for split in ("train", "valid", "test"):
        books = read_books(options.data / f"books-{split}.jsonl.gz")
        ids[split] = encode(tokenizer, books).long()
    test = ids["test"][: len(ids["test"]) // CONTEXT * CONTEXT].view(-1, CONTEXT)
    chosen = test[torch.linspace(0, len(test) - 1, HELD_OUT_WINDOWS).long()]
    ngrams = Trigram(ids["train"].numpy())
    valid = ngrams.estimates(ids["valid"].numpy())
    weights = min(itertools.product(WEIGHTS, WEIGHTS), key=lambda pair: mixed(valid, *pair))
    # The windows in one row: an n-gram across a border costs nothing worth a rule.
    estimates = ngrams.estimates(chosen.flatten().numpy())
    figures = {
        "tokens": chosen.numel(),
        "unigram": mixed(estimates, 0.0, 0.0),
        "trigram": mixed(estimates, *weights),
        "trigram_weights": weights,
        "checkpoint": model_perplexity(options.model, chosen),
    }
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
