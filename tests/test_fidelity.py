"""Fidelity: what is compared, and that the figures are those of the equations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ctxprune.evals.config import EvalConfig
from ctxprune.evals.quality.evaluate import check_reference, evaluate
from ctxprune.evals.quality.fidelity import INSTRUCTIONS, KINDS, Sample, samples, score
from ctxprune.pruner.answers import LEAST, MOST
from ctxprune.pruner.data import encode, read_texts
from ctxprune.pruner.engine.handle import handle_of
from ctxprune.pruner.errors import CtxpruneError


@pytest.fixture(scope="module")
def asked(model: PreTrainedModel, words: PreTrainedTokenizerBase) -> list[Sample]:
    return samples(model, words, read_texts(None, "eval"), limit=2)


def test_each_kind_is_there_and_answers_are_the_models_own(
    asked: list[Sample], model: PreTrainedModel, words: PreTrainedTokenizerBase
) -> None:
    assert [sample.kind for sample in asked] == [KINDS[0]] * 2 + [*KINDS[1:]] * 2
    assert asked[0].scored == len(asked[0].ids) - 1 and asked[0].ids != asked[1].ids
    for number, sample in enumerate(asked[2:]):
        prompt = words.decode(list(sample.ids[: -sample.scored]))
        instruction, first = INSTRUCTIONS[number // 2], sample.kind == KINDS[1]
        assert prompt.startswith(instruction) == first
        assert prompt.endswith(f"{instruction}\n\nAnswer:") == (not first)
        assert LEAST < sample.scored <= MOST
        with torch.no_grad():
            logits = model(torch.tensor([sample.ids])).logits[0]
        likeliest = logits[-sample.scored - 1 : -1].argmax(-1).tolist()
        # Before the least length an end is left out.
        free = slice(LEAST, None)
        assert likeliest[free] == list(sample.ids[-sample.scored :])[free]


def test_a_chat_template_asks_where_there_is_one(
    model: PreTrainedModel, chatty: PreTrainedTokenizerBase
) -> None:
    last = samples(model, chatty, read_texts(None, "eval"), limit=1)[-1]
    prompt = chatty.decode(list(last.ids[: -last.scored]))
    assert prompt.startswith("<user>") and prompt.endswith(f"{INSTRUCTIONS[0]}</s><answer>")


@pytest.mark.parametrize("evict", ["reading", "prompt"])
def test_the_figures_are_those_of_the_equations(
    asked: list[Sample], model: PreTrainedModel, evict: str
) -> None:
    found = score(model, model, asked, policy="sink", sparsity=0.6, evict=evict)
    assert found["sparsity"] > 0.3 and found["n"] == len(asked)
    for kind in KINDS:
        divergences, agreements = [], []
        for sample in (s for s in asked if s.kind == kind):
            ids = torch.tensor([sample.ids[:-1]])
            prompt = ids.shape[1] - sample.scored
            dense, pruned = _logits(model, ids, "sink", 0.0), None
            handle_of(model).use("sink", 0.6, context=ids.shape[1], prompt=prompt, evict=evict)
            with torch.no_grad():
                pruned = model(ids, use_cache=False).logits[0]
            p, q = (x[-sample.scored :].double().softmax(-1) for x in (dense, pruned))
            divergences.append(float((p * (p.log() - q.log())).sum(-1).mean()))
            agreements.append(float((p.argmax(-1) == q.argmax(-1)).double().mean()))
        values = found["values"]
        assert values[f"{kind}_divergence"] == pytest.approx(divergences, rel=1e-3)
        assert values[f"{kind}_agreement"] == pytest.approx(agreements)
        assert found[f"{kind}_divergence"] == pytest.approx(sum(divergences) / 2, rel=1e-3)
        assert found[f"{kind}_divergence_stderr"] > 0.0


def _logits(
    model: PreTrainedModel, ids: torch.Tensor, policy: str, sparsity: float
) -> torch.Tensor:
    handle_of(model).use(policy, sparsity)
    with torch.no_grad():
        logits: torch.Tensor = model(ids, use_cache=False).logits[0]
    return logits


def test_a_model_at_sparsity_0_is_itself(asked: list[Sample], model: PreTrainedModel) -> None:
    found = score(model, model, asked)
    for kind in KINDS:
        assert found[f"{kind}_divergence"] == 0.0 and found[f"{kind}_agreement"] == 1.0


def test_eval_measures_it(embedded_folder: Path, tmp_path: Path) -> None:
    config = EvalConfig(
        tasks=("fidelity",), sparsity=(0.0, 0.5), policy="window", limit=1, tokens=1024
    )
    dense, pruned = evaluate(embedded_folder, config)["levels"]
    assert dense["tasks"]["fidelity"]["running_divergence"] == 0.0
    assert pruned["tasks"]["fidelity"]["running_divergence"] > 0.0
    other = EvalConfig(
        tasks=("fidelity",), sparsity=(0.0,), limit=1, tokens=1024, reference=embedded_folder
    )
    of_other = evaluate(embedded_folder, other)["levels"][0]["tasks"]["fidelity"]
    assert of_other["running_divergence"] == 0.0


@pytest.mark.parametrize(
    ("provenance", "allowed"),
    [
        ({}, True),
        ({"tune": {"train": "gates"}}, True),
        ({"tune": {"train": "lora"}}, False),
        ({"tune": {"train": "full"}}, False),
        ({"tune": {"train": "gates"}, "earlier": [{"train": "lora"}]}, False),
    ],
)
def test_a_trained_model_is_not_its_own_reference(
    provenance: dict[str, Any], allowed: bool, embedded_folder: Path, tmp_path: Path
) -> None:
    settings = json.loads((embedded_folder / "ctxprune.json").read_text())
    (tmp_path / "ctxprune.json").write_text(json.dumps({**settings, "provenance": provenance}))
    check_reference(tmp_path, embedded_folder)
    if allowed:
        check_reference(tmp_path, None)
    else:
        with pytest.raises(CtxpruneError, match="weights of this model were trained"):
            check_reference(tmp_path, None)


def test_too_little_text_is_refused(model: PreTrainedModel, words: PreTrainedTokenizerBase) -> None:
    few = words.decode(encode(words, read_texts(None, "eval")[0])[:500])
    with pytest.raises(CtxpruneError, match="needs 1024 tokens of text"):
        samples(model, words, [few])
