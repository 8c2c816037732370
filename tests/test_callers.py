"""What a caller of a model may do, at sparsity 0 against plain transformers, at 0.8 against one
pass over the whole text (which tests/test_laws.py holds against pure Python).

Every test runs on the oldest and on the newest transformers of pyproject.toml (`make test-all`).
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import pytest
import torch
from conftest import FAMILIES, VOCABULARY, tiny_model
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, StaticCache

from ctxprune.pruner.config import PruneConfig
from ctxprune.pruner.engine.handle import attach, new_gates
from ctxprune.pruner.errors import CtxpruneError

LENGTH = 96
PROMPT = 60
LEVELS = (0.0, 0.8)
CHUNKS = ((0, 37), (37, 38), (38, 70), (70, LENGTH))
STEPS = ((0, PROMPT), *((t, t + 1) for t in range(PROMPT, LENGTH)))
CLOSE = {"rtol": 0.0, "atol": 1e-10}

families = pytest.mark.parametrize("family", FAMILIES)
levels = pytest.mark.parametrize("sparsity", LEVELS)


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def plain_model(family: str, attention: str = "sdpa") -> Any:
    """The model as transformers has it, float64, nothing of ours near it."""
    model: Any = tiny_model(family).double()
    model.set_attn_implementation(attention)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def model_at(sparsity: float, family: str, attention: str = "sdpa") -> Any:
    """The same model with gates that decide by content, at a sparsity."""
    model = plain_model(family, attention)
    shares = {0.5: (0.7, 0.5, 0.3), 0.8: (0.2, 0.34, 0.06)}
    config = PruneConfig(rank=8, protect_first=2, protect_recent=3, context=LENGTH, levels=shares)
    gates = new_gates(model, config).double()
    torch.manual_seed(1)
    for gate in gates:
        torch.nn.init.normal_(gate.key.weight, std=0.15)
    attach(model, gates, config)
    model.ctxprune.use("gate", sparsity)
    return model


def random_ids(batch: int = 1, length: int = LENGTH, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, VOCABULARY, (batch, length), generator=generator)


@cache
def reference(sparsity: float, family: str, attention: str = "sdpa") -> Any:
    """What has to come out: plain transformers at 0, else a model that is only asked for logits."""
    return model_at(sparsity, family, attention) if sparsity else plain_model(family, attention)


def logits_of(model: Any, ids: Tensor | None = None, **options: Any) -> Tensor:
    """Logits of one pass, without any cache."""
    out: Tensor = model(ids, use_cache=False, **options).logits
    return out


def is_greedy(text: Tensor, model: Any, prompt: Tensor, new: int = LENGTH - PROMPT) -> bool:
    """Whether a text is the greedy continuation of a prompt, by one pass over the whole of it."""
    start = prompt.shape[1]
    best = logits_of(model, text)[:, start - 1 : -1].argmax(dim=-1)
    continued = torch.equal(text[:, :start], prompt) and text.shape[1] == start + new
    return continued and torch.equal(text[:, start:], best)


def read(model: Any, ids: Tensor, past: Any, parts: Any = STEPS, **options: Any) -> Tensor:
    """Logits of parts, one after the other, with one cache object."""
    return torch.cat(
        [model(ids[:, a:b], past_key_values=past, **options).logits for a, b in parts], dim=1
    )


def held(model: Any) -> float:
    """Share of the tokens that the last cache has lost."""
    last = model.ctxprune.last_cache
    return 0.0 if last is None else float(last.sparsity)


def caches(model: Any) -> dict[str, Any]:
    """Every cache that a caller may bring."""
    return {
        "dynamic": DynamicCache(),
        "configured": DynamicCache(config=model.config),
        "static": StaticCache(config=model.config, max_cache_len=LENGTH),
        "ours": model.ctxprune.cache(),
    }


kinds = pytest.mark.parametrize("kind", ["dynamic", "configured", "static", "ours"])


# A loop of one's own.


@families
@levels
@kinds
@pytest.mark.parametrize("parts", [STEPS, CHUNKS], ids=["steps", "chunks"])
def test_a_loop_of_ones_own_fills_the_cache_it_brings(
    family: str, sparsity: float, kind: str, parts: Any
) -> None:
    model, ids = model_at(sparsity, family), random_ids()
    past = caches(model)[kind]
    out = read(model, ids, past, parts)
    torch.testing.assert_close(out, logits_of(reference(sparsity, family), ids), **CLOSE)
    assert int(past.get_seq_length()) == LENGTH
    assert held(model) > 0.5 if sparsity else not getattr(past, "pages", None)


@families
@levels
def test_a_loop_on_the_cache_that_the_first_pass_returned(family: str, sparsity: float) -> None:
    model, ids = model_at(sparsity, family), random_ids()
    out = model(ids[:, :PROMPT])
    logits = [out.logits]
    with model.ctxprune.measure() as usage:
        for t in range(PROMPT, LENGTH):
            out = model(ids[:, t : t + 1], past_key_values=out.past_key_values)
            logits.append(out.logits)
    expected = logits_of(reference(sparsity, family), ids)
    torch.testing.assert_close(torch.cat(logits, dim=1), expected, **CLOSE)
    assert not usage.ends, "none of these passes is a whole text"


@families
@levels
@pytest.mark.parametrize("parts", [STEPS, CHUNKS], ids=["steps", "chunks"])
@pytest.mark.parametrize("positions", [True, False], ids=["positions", "no-positions"])
def test_left_padding(family: str, sparsity: float, parts: Any, positions: bool) -> None:
    model, ids = model_at(sparsity, family), random_ids(3)
    mask = torch.ones_like(ids)
    mask[1, :23] = mask[2, :41] = 0
    place = (mask.cumsum(1) - 1).clamp_min(0)
    past = DynamicCache()
    logits = []
    for a, b in parts:
        options = {"position_ids": place[:, a:b]} if positions else {}
        out = model(ids[:, a:b], attention_mask=mask[:, :b], past_key_values=past, **options)
        logits.append(out.logits)
    options = {"position_ids": place} if positions else {}
    model = reference(sparsity, family)
    expected = logits_of(model, ids, attention_mask=mask, **options)
    torch.testing.assert_close(torch.cat(logits, dim=1)[mask == 1], expected[mask == 1], **CLOSE)
    if positions:
        alone = logits_of(model, ids[2:, 41:])
        torch.testing.assert_close(expected[2:, 41:], alone, **CLOSE)


@families
@levels
def test_a_mask_given_by_position(family: str, sparsity: float) -> None:
    model, ids = model_at(sparsity, family), random_ids(2)
    mask = torch.ones_like(ids)
    mask[1, :23] = 0
    place = list(inspect.signature(type(model).forward).parameters).index("attention_mask") - 1
    by_position = model(ids, *[None] * (place - 1), mask).logits
    expected = logits_of(reference(sparsity, family), ids, attention_mask=mask)
    torch.testing.assert_close(by_position[mask == 1], expected[mask == 1], **CLOSE)


# Forms of a forward pass.


@families
@levels
def test_inputs_embeds(family: str, sparsity: float) -> None:
    model, ids = model_at(sparsity, family), random_ids(2)
    vectors = model.get_input_embeddings()(ids)
    expected = logits_of(reference(sparsity, family), ids)
    torch.testing.assert_close(logits_of(model, inputs_embeds=vectors), expected, **CLOSE)
    past = DynamicCache()
    parts = [model(inputs_embeds=vectors[:, a:b], past_key_values=past).logits for a, b in CHUNKS]
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, **CLOSE)


@families
@levels
def test_without_a_cache_none_comes_back(family: str, sparsity: float) -> None:
    model, ids = model_at(sparsity, family), random_ids()
    out = model(ids, use_cache=False)
    assert out.past_key_values is None
    parts = model(ids, use_cache=False, return_dict=False)
    assert len(parts) == len(reference(0.0, family)(ids, use_cache=False, return_dict=False)) == 1
    torch.testing.assert_close(parts[0], out.logits, **CLOSE)
    model.config.use_cache = False
    assert model(ids).past_key_values is None


@families
@levels
def test_tuples_and_hidden_states(family: str, sparsity: float) -> None:
    model, ids = model_at(sparsity, family), random_ids()
    out = model(ids, output_hidden_states=True)
    expected = reference(sparsity, family)(ids, output_hidden_states=True)
    assert len(out.hidden_states) == 4
    torch.testing.assert_close(out.hidden_states, expected.hidden_states, **CLOSE)
    past = DynamicCache()
    for a, b in CHUNKS:
        logits, back = model(ids[:, a:b], past_key_values=past, return_dict=False)[:2]
        assert back is past
        torch.testing.assert_close(logits, expected.logits[:, a:b], **CLOSE)


@families
@levels
def test_the_decoder_alone(family: str, sparsity: float) -> None:
    model, ids = model_at(sparsity, family), random_ids()
    decoder = model.base_model
    expected = logits_of(reference(sparsity, family), ids)
    whole = decoder(input_ids=ids).last_hidden_state
    torch.testing.assert_close(model.lm_head(whole), expected, **CLOSE)
    past = DynamicCache()
    for a, b in CHUNKS:
        out = decoder(input_ids=ids[:, a:b], past_key_values=past)
        torch.testing.assert_close(model.lm_head(out.last_hidden_state), expected[:, a:b], **CLOSE)
    assert past.get_seq_length() == LENGTH


@families
@levels
def test_inference_mode_may_end_and_begin(family: str, sparsity: float) -> None:
    model, ids = model_at(sparsity, family), random_ids()
    past = DynamicCache()
    logits = []
    for index, (a, b) in enumerate([*CHUNKS[:2], *((t, t + 1) for t in range(38, LENGTH))]):
        with torch.inference_mode(index % 5 < 2):
            logits.append(model(ids[:, a:b], past_key_values=past).logits.clone())
    expected = logits_of(reference(sparsity, family), ids)
    torch.testing.assert_close(torch.cat(logits, dim=1), expected, **CLOSE)


@families
@levels
def test_eager_attention(family: str, sparsity: float) -> None:
    model, ids = model_at(sparsity, family, "eager"), random_ids()
    out, loop = logits_of(model, ids), read(model, ids, DynamicCache())
    if sparsity:
        expected = logits_of(reference(sparsity, family), ids)
        torch.testing.assert_close(out, expected, **CLOSE)
        torch.testing.assert_close(loop, expected, **CLOSE)
    else:
        plain = reference(0.0, family, "eager")
        assert torch.equal(out, logits_of(plain, ids))
        assert torch.equal(loop, read(plain, ids, DynamicCache()))


@families
@levels
def test_the_attention_may_be_set_later(family: str, sparsity: float) -> None:
    model, ids = model_at(sparsity, family), random_ids()
    for attention in ("eager", "sdpa"):
        model.set_attn_implementation(attention)
        out = logits_of(model, ids)
        expected = logits_of(reference(sparsity, family, attention), ids)
        torch.testing.assert_close(out, expected, **CLOSE)


@families
@levels
def test_attention_matrices(family: str, sparsity: float) -> None:
    """At 0 as plain transformers: matrices from eager, and as many None from sdpa."""
    ids = random_ids()
    for attention in ("eager", "sdpa"):
        model = model_at(sparsity, family, attention)
        if sparsity:
            with pytest.raises(CtxpruneError, match="no attention matrix"):
                model(ids, output_attentions=True)
            continue
        out = model(ids, output_attentions=True).attentions
        expected = reference(0.0, family, attention)(ids, output_attentions=True).attentions
        assert out is not None and len(out) == len(expected)
        for ours, theirs in zip(out, expected, strict=True):
            assert (ours is None and theirs is None) or torch.equal(ours, theirs)


# `generate`.


@families
@levels
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"cache_implementation": "static"},
        {"cache_implementation": "dynamic"},
        {"use_cache": False},
        {"prefill_chunk_size": 16},
        {"generation_config": {"cache_implementation": "static"}},
        {"generation_config": {"use_cache": False}},
    ],
    ids=["bare", "static", "dynamic", "no-cache", "chunks", "config-static", "config-no-cache"],
)
def test_generate(family: str, sparsity: float, options: dict[str, Any]) -> None:
    model, prompt = model_at(sparsity, family), random_ids(length=PROMPT)
    new = {"max_new_tokens": LENGTH - PROMPT}
    if "generation_config" in options:
        options = {"generation_config": GenerationConfig(**options["generation_config"], **new)}
    else:
        options = {**options, **new}
    text = model.generate(prompt, do_sample=False, **options)
    assert is_greedy(text, reference(sparsity, family), prompt)


@families
@levels
@kinds
def test_generate_on_a_cache_that_the_caller_brings(
    family: str, sparsity: float, kind: str
) -> None:
    model, prompt = model_at(sparsity, family), random_ids(length=PROMPT)
    past = caches(model)[kind]
    text = model.generate(prompt, past_key_values=past, max_new_tokens=LENGTH - PROMPT)
    assert is_greedy(text, reference(sparsity, family), prompt)
    assert int(past.get_seq_length()) == LENGTH - 1


@families
@levels
def test_generate_from_vectors(family: str, sparsity: float) -> None:
    model, prompt = model_at(sparsity, family), random_ids(length=PROMPT)
    vectors = model.get_input_embeddings()(prompt)
    text = model.generate(inputs_embeds=vectors, max_new_tokens=LENGTH - PROMPT)
    assert is_greedy(torch.cat([prompt, text], dim=1), reference(sparsity, family), prompt)


@families
@levels
@pytest.mark.parametrize("chunk", [None, 16], ids=["whole", "chunks"])
def test_generate_from_prompts_of_different_lengths(
    family: str, sparsity: float, chunk: int | None
) -> None:
    model, prompt = model_at(sparsity, family), random_ids(2, PROMPT)
    mask = torch.ones_like(prompt)
    mask[1, :23] = 0
    options = {} if chunk is None else {"prefill_chunk_size": chunk}
    text = model.generate(prompt, attention_mask=mask, max_new_tokens=20, **options)
    for row, start in ((0, 0), (1, 23)):
        alone = prompt[row : row + 1, start:]
        assert is_greedy(text[row : row + 1, start:], reference(sparsity, family), alone, 20)


@families
@levels
def test_beams(family: str, sparsity: float) -> None:
    model, prompt = model_at(sparsity, family), random_ids(2, PROMPT)
    options: dict[str, Any] = {"max_new_tokens": 24, "num_beams": 3, "do_sample": False}
    text = model.generate(prompt, **options)
    expected = reference(sparsity, family).generate(prompt, use_cache=False, **options)
    assert torch.equal(text, expected)


@families
@levels
@pytest.mark.parametrize("kind", ["dynamic", "static", "returned"])
def test_a_cache_carried_over_turns(family: str, sparsity: float, kind: str) -> None:
    model, text = model_at(sparsity, family), random_ids(length=30)
    past = caches(model).get(kind)
    for turn in range(3):
        # Without a mask `generate` takes a written token 0, our padding, for padding.
        options = {"attention_mask": torch.ones_like(text)}
        options |= {} if past is None else {"past_key_values": past}
        out = model.generate(text, max_new_tokens=12, return_dict_in_generate=True, **options)
        assert is_greedy(out.sequences, reference(sparsity, family), text, 12)
        past = out.past_key_values
        text = torch.cat([out.sequences, random_ids(length=9, seed=turn + 1)], dim=1)


@levels
@pytest.mark.parametrize(
    "length",
    [
        {"max_new_tokens": 1000},
        {"max_length": 1100},
        {"generation_config": GenerationConfig(max_new_tokens=1000)},
    ],
    ids=["new", "length", "config"],
)
def test_learned_positions_are_enough_or_nothing_is_written(
    sparsity: float, length: dict[str, Any]
) -> None:
    model, prompt = model_at(sparsity, "gpt2"), random_ids(length=PROMPT)
    vectors = model.get_input_embeddings()(prompt)
    passes = []
    model.base_model.register_forward_pre_hook(lambda *_: passes.append(1))
    for inputs in (
        {"inputs": prompt},
        {"input_ids": prompt},
        {"inputs_embeds": vectors} if "max_length" not in length else {"inputs": prompt},
    ):
        with pytest.raises(CtxpruneError, match="positions for 1024 tokens"):
            model.generate(**inputs, **length)
    with pytest.raises(CtxpruneError, match="positions for 1024 tokens"):
        model.generate(random_ids(length=1025))
    assert not passes
    model.generate(prompt, max_new_tokens=2)
    assert passes


# Copies, threads, dials.


@families
@levels
@pytest.mark.parametrize("kind", ["dynamic", "static", "ours"])
def test_a_copy_of_a_cache_goes_its_own_way(family: str, sparsity: float, kind: str) -> None:
    model, ids, others = model_at(sparsity, family), random_ids(), random_ids(seed=7)
    others[:, :PROMPT] = ids[:, :PROMPT]
    past = caches(model)[kind]
    read(model, ids, past, STEPS[:1])
    twin = copy.deepcopy(past)
    expected = [logits_of(reference(sparsity, family), tokens) for tokens in (ids, others)]
    for a, b in STEPS[1:]:
        for tokens, one, whole in ((ids, past, expected[0]), (others, twin, expected[1])):
            out = model(tokens[:, a:b], past_key_values=one).logits
            torch.testing.assert_close(out, whole[:, a:b], **CLOSE)


@families
def test_a_copy_of_a_model_has_a_dial_of_its_own(family: str) -> None:
    model, ids = model_at(0.8, family), random_ids()
    twin = copy.deepcopy(model)
    assert twin.ctxprune is not model.ctxprune and twin.ctxprune.model is twin
    pruned, dense = (logits_of(reference(level, family), ids) for level in (0.8, 0.0))
    torch.testing.assert_close(logits_of(twin, ids), pruned, **CLOSE)
    twin.ctxprune.use(sparsity=0.0)
    torch.testing.assert_close(logits_of(twin, ids), dense, **CLOSE)
    torch.testing.assert_close(logits_of(model, ids), pruned, **CLOSE)
    # The copy decides by gates of its own.
    twin.ctxprune.use("gate", 0.8)
    for gate in model.ctxprune.gates:
        gate.key.weight.data.zero_()
    torch.testing.assert_close(read(twin, ids, DynamicCache()), pruned, **CLOSE)
    text = twin.generate(ids[:, :PROMPT], max_new_tokens=9)
    assert is_greedy(text, reference(0.8, family), ids[:, :PROMPT], 9)


@families
def test_threads_do_not_meet(family: str) -> None:
    model = model_at(0.0, family)
    handle, jobs = model.ctxprune, []
    for index, sparsity in enumerate((0.0, 0.3, 0.5, 0.8, 0.9, 0.0, 0.8, 0.7)):
        handle.use("gate", sparsity)
        jobs.append((random_ids(length=40 + 3 * index, seed=index), handle.at(LENGTH)))
    handle.use(sparsity=0.0)

    def write(job: Any) -> Tensor:
        prompt, mode = job
        with torch.no_grad(), handle.running(mode), handle.measure():
            text: Tensor = model.generate(prompt, max_new_tokens=24)
        return text

    alone = [write(job) for job in jobs]
    assert any(not torch.equal(a[:, 40:50], alone[0][:, 40:50]) for a in alone[1:])
    for _ in range(3):
        with ThreadPoolExecutor(len(jobs)) as pool:
            together = list(pool.map(write, jobs))
        assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))
    assert handle.mode == handle.at(LENGTH), "no thread has changed what was chosen"


@families
@pytest.mark.parametrize("sparsity", [0.0, 0.5])
@pytest.mark.parametrize("kind", ["dynamic", "ours"])
def test_another_level_on_a_half_read_cache_is_refused(
    family: str, sparsity: float, kind: str
) -> None:
    model, ids = model_at(0.8, family), random_ids()
    past = caches(model)[kind]
    read(model, ids, past, STEPS[:1])
    model.ctxprune.use("gate", sparsity)
    with pytest.raises(CtxpruneError, match="begun with `gate` at sparsity 0.8"):
        model(ids[:, PROMPT:], past_key_values=past)
    with pytest.raises(CtxpruneError, match="begun with `gate` at sparsity 0.8"):
        model.generate(ids, past_key_values=past, max_new_tokens=3)
    # Back at the level it was begun with it goes on as if nothing had been.
    model.ctxprune.use("gate", 0.8)
    out = read(model, ids, past, STEPS[1:])
    expected = logits_of(reference(0.8, family), ids)[:, PROMPT:]
    torch.testing.assert_close(out, expected, **CLOSE)


@families
def test_a_half_read_dense_cache_is_refused_by_an_evicting_model(family: str) -> None:
    model, ids = model_at(0.0, family), random_ids()
    for past in caches(model).values():
        read(model, ids, past, STEPS[:1])
        model.ctxprune.use("gate", 0.8)
        with pytest.raises(CtxpruneError, match="cannot be pruned after the fact"):
            model(ids[:, PROMPT:], past_key_values=past)
        model.ctxprune.use(sparsity=0.0)


@families
@levels
def test_an_empty_cache_of_another_level_is_used(family: str, sparsity: float) -> None:
    model, ids = model_at(0.5, family), random_ids()
    empty = [model.ctxprune.cache()]
    model.ctxprune.use(sparsity=0.0)
    empty.append(model.ctxprune.cache())
    model.ctxprune.use("gate", sparsity)
    for past in empty:
        out = read(model, ids, past)
        torch.testing.assert_close(out, logits_of(reference(sparsity, family), ids), **CLOSE)
        assert past.get_seq_length() == LENGTH


# Training.


def loss_of(model: Any, ids: Tensor) -> Tensor:
    out: Tensor = model(input_ids=ids, labels=ids).loss
    return out


@families
@torch.enable_grad()
def test_gradients_at_sparsity_0_are_those_of_plain_transformers(family: str) -> None:
    model, plain, ids = model_at(0.0, family), plain_model(family), random_ids()
    for one in (model, plain):
        loss_of(one, ids).backward()
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(model.get_parameter(name).grad, parameter.grad, **CLOSE)


@families
@pytest.mark.parametrize("what", ["all", "gates", "attention"])
@torch.enable_grad()
def test_an_evicting_model_has_no_gradient(family: str, what: str) -> None:
    model, ids = model_at(0.8, family), random_ids()
    model.requires_grad_(what == "all")
    if what == "gates":
        model.ctxprune.gates.requires_grad_(True)
    if what == "attention":
        layer = model.ctxprune.decoder.layers[0].attention
        layer.requires_grad_(True)
    with pytest.raises(CtxpruneError, match=r"no gradient.*"):
        loss_of(model, ids).backward()
    model.train()
    with pytest.raises(CtxpruneError, match="no gradient"):
        loss_of(model, ids).backward()
    model.gradient_checkpointing_enable()
    with pytest.raises(CtxpruneError, match="no gradient"):
        loss_of(model, ids).backward()


@families
@torch.enable_grad()
def test_gradient_checkpointing_at_sparsity_0(family: str) -> None:
    model, ids = model_at(0.0, family), random_ids()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    loss_of(model, ids).backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.train()
    model.gradient_checkpointing_enable()
    loss_of(model, ids).backward()
    for name, gradient in expected.items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient, **CLOSE)


# What is refused while rows leave, and is plain transformers at 0.


@families
@levels
def test_packed_positions(family: str, sparsity: float) -> None:
    model, ids = model_at(sparsity, family), random_ids()
    packed = torch.cat([torch.arange(40), torch.arange(LENGTH - 40)])[None]
    if sparsity:
        with pytest.raises(CtxpruneError, match="one text a row"):
            model(ids, position_ids=packed)
    else:
        expected = logits_of(reference(0.0, family), ids, position_ids=packed)
        torch.testing.assert_close(logits_of(model, ids, position_ids=packed), expected, **CLOSE)


@families
@levels
def test_masks_of_four_dimensions(family: str, sparsity: float) -> None:
    model, ids = model_at(sparsity, family), random_ids()
    mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril_()[None, None]
    mask[..., 3] = False
    mask[..., 3, 3] = True
    if sparsity:
        with pytest.raises(CtxpruneError, match=r"masks of shape \(batch, tokens\)"):
            model(ids, attention_mask=mask)
    else:
        expected = logits_of(reference(0.0, family), ids, attention_mask=mask)
        torch.testing.assert_close(logits_of(model, ids, attention_mask=mask), expected, **CLOSE)


@families
@levels
def test_masks_that_hide_what_was_read(family: str, sparsity: float) -> None:
    model, ids = model_at(sparsity, family), random_ids()
    mask = torch.ones_like(ids)
    mask[:, 5:9] = 0
    past = DynamicCache()
    read(model, ids, past, STEPS[:1])
    options = {"attention_mask": mask, "past_key_values": past}
    if sparsity:
        with pytest.raises(CtxpruneError, match="hides tokens that were read"):
            model(ids[:, PROMPT:], **options)
        with pytest.raises(CtxpruneError, match="is about 95 tokens; 60 were read"):
            model(ids[:, PROMPT:], attention_mask=mask[:, 1:], past_key_values=past)
    else:
        out = model(ids[:, PROMPT:], **options).logits
        plain, theirs = reference(0.0, family), DynamicCache()
        plain(ids[:, :PROMPT], past_key_values=theirs)
        options["past_key_values"] = theirs
        torch.testing.assert_close(out, plain(ids[:, PROMPT:], **options).logits, **CLOSE)


@families
def test_another_number_of_texts_on_a_cache_is_refused(family: str) -> None:
    """Plain transformers fails in torch.cat, at sparsity 0 as without us."""
    model, past = model_at(0.8, family), DynamicCache()
    model(random_ids(2, PROMPT), past_key_values=past)
    with pytest.raises(CtxpruneError, match="holds 2 sequences, not 3"):
        model(random_ids(3, 1), past_key_values=past)


@families
def test_nothing_to_read_is_refused(family: str) -> None:
    with pytest.raises(CtxpruneError, match="give either `input_ids` or `inputs_embeds`"):
        model_at(0.8, family)()


# Wrapped, cast.


@families
@levels
def test_a_model_with_lora_still_evicts(family: str, sparsity: float) -> None:
    model, ids = model_at(sparsity, family), random_ids()
    targets = list(model.ctxprune.decoder.lora_targets)
    wrapped: Any = get_peft_model(model, LoraConfig(target_modules=targets, r=2)).eval()
    expected = logits_of(reference(sparsity, family), ids)
    torch.testing.assert_close(logits_of(wrapped, ids), expected, rtol=0.0, atol=1e-6)
    torch.testing.assert_close(
        read(wrapped, ids, DynamicCache()), logits_of(wrapped, ids), rtol=0.0, atol=1e-6
    )
    text = wrapped.generate(input_ids=ids[:, :PROMPT], max_new_tokens=9)
    assert is_greedy(text, reference(sparsity, family), ids[:, :PROMPT], 9)
    assert held(model) > 0.5 if sparsity else held(model) == 0.0


@families
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gates_stay_wide_where_a_model_is_cast(family: str, dtype: torch.dtype) -> None:
    model, ids = model_at(0.8, family), random_ids()
    model.ctxprune.gates.float()
    model.to(dtype)
    assert {p.dtype for p in model.ctxprune.gates.parameters()} == {torch.float32}
    assert model.lm_head.weight.dtype == dtype
    # A rounded score may let another row go, which moves single logits.
    difference = read(model, ids, DynamicCache()).float() - logits_of(model, ids).float()
    assert float(difference.abs().mean()) < 0.1
    assert held(model) > 0.5


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("length", [1, 30])
def test_a_pass_that_broke_off_is_not_gone_on_from(family: str, length: int) -> None:
    model = model_at(0.8, family)
    handle = model.ctxprune
    cache, ids = handle.cache(), random_ids(length=60)
    logits_of(model, ids[:, :20], past_key_values=cache)

    def broken(*_: Any) -> None:
        raise KeyboardInterrupt

    hook = handle.decoder.layers[1].block.register_forward_pre_hook(broken)
    with pytest.raises(KeyboardInterrupt):
        logits_of(model, ids[:, 20 : 20 + length], past_key_values=cache)
    hook.remove()
    with pytest.raises(CtxpruneError, match="broke off"):
        logits_of(model, ids[:, 20 : 20 + length], past_key_values=cache)
    cache.reset()
    again = logits_of(model, ids, past_key_values=cache)
    torch.testing.assert_close(again, logits_of(model, ids), atol=0, rtol=0)
