"""The trace: what it says of each token is what the engine did, one token at a time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import TEXT
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ctxprune.evals.inspect.trace import Trace, overlap, pieces_of, trace
from ctxprune.pruner import policies
from ctxprune.pruner.checkpoints.checkpoint import load, load_tokenizer
from ctxprune.pruner.config import PruneConfig
from ctxprune.pruner.engine.cache import PrunedCache
from ctxprune.pruner.engine.handle import handle_of
from ctxprune.pruner.engine.page import Page
from ctxprune.pruner.errors import CtxpruneError
from ctxprune.pruner.gate import free_pairs

SPARSITY = 0.7


@pytest.fixture(scope="module")
def model(embedded_folder: Path) -> PreTrainedModel:
    """The embedded checkpoint in float64, with gates that say something and levels to go by."""
    model = load(embedded_folder, sparsity=0.0, dtype="float64")
    handle = handle_of(model)
    torch.manual_seed(3)
    for gate in handle.gate_list:
        torch.nn.init.normal_(gate.key.weight, std=0.3)
    rising = torch.linspace(0.5, 1.5, len(handle.gates)) * (1 - SPARSITY)
    handle.config = PruneConfig(context=128, levels={SPARSITY: tuple(rising.tolist())})
    return model


@pytest.fixture(scope="module")
def tokenizer(embedded_folder: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(embedded_folder)


@pytest.fixture(scope="module")
def read(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], tuple[str, ...]]:
    """130 tokens: two and more blocks of one pass."""
    return pieces_of(tokenizer, TEXT * 4, 130)


def positions(cache: PrunedCache, page: Page) -> set[int]:
    """Those of the rows that a page holds of its only sequence."""
    (seen,), (used,), (settled,) = cache.seen, page.used, page.settled
    return {*page.position[0, :settled].tolist(), *range(seen - used + settled, seen)}


@torch.no_grad()
def decoded(model: PreTrainedModel, ids: list[int], policy: str) -> list[list[set[int]]]:
    """Positions that each layer holds after each token, read one by one by the plain policy."""
    handle = handle_of(model)
    handle.use(policy, SPARSITY, context=len(ids), max_rows=0)
    cache = handle.cache()
    assert isinstance(cache, PrunedCache)
    held = []
    for token in ids:
        model(torch.tensor([[token]]), past_key_values=cache)
        held.append([positions(cache, page) for page in cache.pages])
    handle.use(sparsity=0.0)
    return held


@pytest.mark.parametrize("policy", policies.names())
def test_it_agrees_with_decoding_token_by_token(
    model: PreTrainedModel, read: tuple[list[int], tuple[str, ...]], policy: str
) -> None:
    ids, pieces = read
    found = trace(model, ids, pieces, policy, SPARSITY)
    held = decoded(model, ids, policy)
    for query in range(len(ids) - 1):
        # What is held after a token is what its successor sees beside itself.
        seen = found.visible(query + 1)
        for layer in range(found.layers):
            expected = set(seen[layer].nonzero()[:, 0].tolist()) - {query + 1}
            assert held[query][layer] == expected
    assert abs(found.sparsity - SPARSITY) < 0.05
    assert (found.expires < len(ids)).any()


@torch.no_grad()
@pytest.mark.parametrize("tokens", [40, 128, 130])
@pytest.mark.parametrize("policy", policies.names())
def test_whoever_watches_changes_nothing(
    model: PreTrainedModel, read: tuple[list[int], tuple[str, ...]], policy: str, tokens: int
) -> None:
    ids, pieces = (of[:tokens] for of in read)
    found = trace(model, ids, pieces, policy, SPARSITY)
    handle = handle_of(model)
    watched = handle.last_cache
    handle.use(policy, SPARSITY, context=tokens, max_rows=0)
    cache = handle.cache(record=True)
    model(torch.tensor([ids]), past_key_values=cache)
    assert isinstance(cache, PrunedCache) and cache.expires is not None
    assert torch.equal(found.expires, torch.cat(cache.expires).clamp_max(tokens))
    assert bool((found.expires < tokens).any())
    if tokens == 128:  # a whole number of intervals: both end with the same step
        assert watched is not None
        for one, other in zip(watched.pages, cache.pages, strict=True):
            rows = slice(0, other.used[0])
            assert one.used == one.settled == other.used == other.settled
            assert torch.equal(one.position[:, rows], other.position[:, rows])
            torch.testing.assert_close(one.numbers[:, rows], other.numbers[:, rows])
            for name, vector in other.vectors.items():
                assert torch.equal(one.vectors[name][:, rows], vector[:, rows])
    handle.use(sparsity=0.0)


def test_the_gates_dropper_is_the_query_that_scored_a_token_least(
    model: PreTrainedModel, read: tuple[list[int], tuple[str, ...]]
) -> None:
    ids, pieces = read
    found = trace(model, ids, pieces, "gate", SPARSITY)
    handle = handle_of(model)
    noted: dict[int, list[torch.Tensor]] = {layer: [] for layer in range(found.layers)}
    hooks = [
        of_layer.attention.register_forward_pre_hook(
            lambda module, args, kwargs, layer=layer: noted[layer].append(
                args[0] if args else kwargs["hidden_states"]
            ),
            with_kwargs=True,
        )
        for layer, of_layer in enumerate(handle.decoder.gated)
    ]
    try:
        trace(model, ids, pieces, "gate", SPARSITY)
    finally:
        for hook in hooks:
            hook.remove()
    place = torch.arange(len(ids))[None]
    free = free_pairs(place, place, handle.config.protect_first, handle.config.protect_recent)[0]
    checked = 0
    for layer, gate in enumerate(handle.gate_list):
        query, key = gate.interact(noted[layer][0])
        scores = gate.scores(query, key, place, place, 0.0, 0.0)[0].masked_fill(~free, torch.inf)
        for token in range(len(ids)):
            gone = int(found.expires[layer, token])
            if gone < len(ids):
                assert int(found.dropper[layer, token]) == int(scores[:gone, token].argmin())
                checked += 1
            else:
                assert int(found.dropper[layer, token]) == -1
    assert checked > 100


@pytest.mark.parametrize("policy", ["window", "sink", "tova"])
def test_other_policies_name_the_last_query_before_a_token_left(
    model: PreTrainedModel, read: tuple[list[int], tuple[str, ...]], policy: str
) -> None:
    found = trace(model, *read, policy, SPARSITY)
    left = found.expires < found.tokens
    assert torch.equal(found.dropper[left], found.expires[left] - 1) and bool(left.any())
    assert bool((found.dropper[~left] == -1).all())


def test_attention_is_that_of_the_last_queries_which_saw_a_token(
    model: PreTrainedModel, read: tuple[list[int], tuple[str, ...]]
) -> None:
    ids, pieces = read
    found = trace(model, ids, pieces, "window", 0.0)
    assert found.policy == "dense" and bool((found.expires == len(ids)).all())
    model.config._attn_implementation = "eager"
    weights = model(torch.tensor([ids]), output_attentions=True).attentions
    for layer, attention in enumerate(weights):
        # Queries are judged 16 at a time: the last two see all tokens but the last.
        mean = attention[0].mean(dim=0)
        expected = torch.cat([mean[128:, :129].mean(dim=0), mean[129:, 129]])
        torch.testing.assert_close(found.attention[layer].double(), expected, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(
    "text",
    [
        "<script>alert('x')</script> & more",
        "two\n\nlines\tand a tab",
        "smile \U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467 end",
        "\u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628\u0627 mixed",
        "a",
        "a b",
    ],
)
def test_pieces_make_up_the_text(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str
) -> None:
    ids, pieces = pieces_of(tokenizer, text)
    assert len(ids) == len(pieces) and "".join(pieces) == text
    for policy in ("gate", "sink"):
        found = trace(model, ids, pieces, policy, SPARSITY)
        assert found.expires.shape == (found.layers, len(ids))
        assert bool((found.expires > torch.arange(len(ids))).all())


def test_a_character_of_several_tokens_is_one_piece_and_empty_ones(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    _, pieces = pieces_of(tokenizer, "\U0001f600")
    assert len(pieces) > 1 and pieces == ("\U0001f600", *[""] * (len(pieces) - 1))


def test_an_empty_text_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(CtxpruneError, match="empty"):
        pieces_of(tokenizer, "")


def test_saved_and_loaded(
    model: PreTrainedModel, read: tuple[list[int], tuple[str, ...]], tmp_path: Path
) -> None:
    found = trace(model, *read, "gate", SPARSITY, name="m")
    found.save(tmp_path / "new" / "trace.safetensors")
    again = Trace.load(tmp_path / "new" / "trace.safetensors")
    for name in ("model", "policy", "requested", "evicts_every", "pieces"):
        assert getattr(again, name) == getattr(found, name)
    for name in ("expires", "dropper", "attention"):
        assert torch.equal(getattr(again, name), getattr(found, name))
    (tmp_path / "other").write_text("{}")
    with pytest.raises(CtxpruneError, match="no trace"):
        Trace.load(tmp_path / "other")


def test_overlap_is_the_pairs_in_both_over_those_in_either(
    model: PreTrainedModel, read: tuple[list[int], tuple[str, ...]]
) -> None:
    one, other = (trace(model, *read, policy, SPARSITY) for policy in ("gate", "window"))
    both = either = 0
    for query in range(one.tokens):
        here, there = one.visible(query)[:, :query], other.visible(query)[:, :query]
        both += int((here & there).sum())
        either += int((here | there).sum())
    assert overlap(one, other) == both / either < 1.0 == overlap(one, one)
    with pytest.raises(CtxpruneError, match="same tokens"):
        overlap(one, trace(model, read[0][:9], read[1][:9], "window", SPARSITY))
