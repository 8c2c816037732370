"""The laws for any decoder: tiny models of every type, texts longer than two windows, in double.

One of each way to attend runs always, all other types with `-m zoo` (`make test-all`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import zoo
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerFast
from zoo import MECHANISMS, VOCABULARY, WINDOW, tiny

from ctxprune.pruner.checkpoints import adapter
from ctxprune.pruner.checkpoints.agreement import check_agreement
from ctxprune.pruner.checkpoints.checkpoint import describe, load
from ctxprune.pruner.checkpoints.convert import convert
from ctxprune.pruner.config import PruneConfig, TuneConfig
from ctxprune.pruner.decoder import Sight, decoder_of
from ctxprune.pruner.engine import hooks
from ctxprune.pruner.engine.cache import PrunedCache
from ctxprune.pruner.engine.handle import Handle, attach, handle_of, new_gates
from ctxprune.pruner.engine.modes import Evict
from ctxprune.pruner.engine.soft import Level, SoftAttention
from ctxprune.pruner.errors import CtxpruneError
from ctxprune.pruner.policies import Policy
from ctxprune.pruner.training.tune import Trainee, tune

LENGTH, PROMPT, SHORT = 56, 36, 41
KEEP = Evict(Policy())
# Largest difference of logits: some models have a softmax in single precision, or a cache of their
# own that is not exact.
EXACT, SINGLE, OWN = 1e-9, 3e-5, 8.0

# Types that are refused, and why.
REFUSED = {
    "axk2": "indexed_attention",
    "bloom": "transformers' interface",
    "codegen": "transformers' interface",
    "deepseek_v32": "indexed_attention",
    "deepseek_v4": "compressed_attention",
    "diffllama": "more than once",
    "doge": "masks more than",
    "falcon": "transformers' interface",
    "glm_moe_dsa": "indexed_attention",
    "gpt_neo": "transformers' interface",
    "gpt_neox_japanese": "transformers' interface",
    "gptj": "transformers' interface",
    "hrm_text": "share a place in the cache",
    "hy_v4": "indexed_attention",
    "inkling_text": "position_bias",
    "longcat_flash": "several attention modules",
    "minimax": "has no attribute",
    "minimax_m3_vl_text": "minimax_m3_sparse",
    "mpt": "transformers' interface",
    "zamba2": "no attention layers",
}
# Types whose configuration makes no tiny model, or none in double precision.
UNBUILT = (
    "cohere_compass_text",
    "dbrx",
    "dots3_note_text",
    "inkling2_text",
    "qwen4_exp_text",
    "zamba",
)

mechanisms = pytest.mark.parametrize("name", MECHANISMS)
others = [name for name in zoo.every() if name not in (*MECHANISMS, *REFUSED, *UNBUILT)]
served = pytest.mark.parametrize(
    "name", [*MECHANISMS, *(pytest.param(name, marks=pytest.mark.zoo) for name in others)]
)
Folder = Callable[[str], Path]


def pruning(name: str) -> tuple[PreTrainedModel, Handle]:
    """A tiny model whose gates decide by content."""
    model = tiny(name)
    layers = len(decoder_of(model).gated)
    levels = {0.5: tuple(0.7 if n == 0 else 0.45 for n in range(layers))}
    config = PruneConfig(rank=8, protect_first=1, protect_recent=2, context=LENGTH, levels=levels)
    gates = new_gates(model, config).to(torch.float64)
    torch.manual_seed(1)
    for gate in gates:
        torch.nn.init.normal_(gate.key.weight, std=0.15)
    return model, attach(model, gates, config)


def random_ids(batch: int = 2, length: int = LENGTH) -> Tensor:
    """(batch, length) ids."""
    draw = torch.Generator().manual_seed(0)
    return torch.randint(3, VOCABULARY, (batch, length), generator=draw)


@torch.no_grad()
def logits_of(model: PreTrainedModel, ids: Tensor, **options: Any) -> Tensor:
    """Logits (b, n, vocabulary) in one pass."""
    logits: Tensor = model(ids, **options).logits
    return logits


@torch.no_grad()
def in_parts(model: PreTrainedModel, ids: Tensor, cache: Any, first: int = PROMPT) -> Tensor:
    """The same in two passes, and then token by token."""
    ends = [first, first + 5, *range(first + 6, ids.shape[1] + 1)]
    starts = [0, *ends[:-1]]
    parts = [
        model(ids[:, start:end], past_key_values=cache, use_cache=True).logits
        for start, end in zip(starts, ends, strict=True)
    ]
    return torch.cat(parts, dim=1)


def tolerance(name: str, ids: Tensor, dense: Tensor) -> float:
    """What may differ: where a model's own cache is not exact, a few times what it is off by."""
    own = tiny(name)
    found = in_parts(own, ids, DynamicCache(config=own.config))
    single = own.config._attn_implementation == "eager"
    return max(SINGLE if single else EXACT, OWN * float((found - dense).abs().max()))


def near(found: Tensor, expected: Tensor, most: float) -> None:
    """Assert that two tensors differ by no more."""
    assert float((found - expected).abs().max()) <= most


@served
def test_keeping_all_is_dense_beyond_the_window(name: str) -> None:
    ids = random_ids()
    dense = logits_of(tiny(name), ids, use_cache=False)
    model, handle = pruning(name)
    assert torch.equal(logits_of(model, ids, use_cache=False), dense)
    most = tolerance(name, ids, dense)
    near(in_parts(model, ids, handle.cache()), dense, most)
    with handle.running(KEEP):
        near(logits_of(model, ids), dense, SINGLE)
        near(in_parts(model, ids, handle.new_cache(KEEP)), dense, most)
        handle.block = 7
        near(logits_of(model, ids), dense, SINGLE)
    soft = SoftAttention(Level(1e9), handle.config, hard=True)
    with handle.running(soft):
        near(logits_of(model, ids, use_cache=False), dense, SINGLE)


# Types that repeat the heads of their keys before attention sees them, and how often.
REPEATED = {"jetmoe": 2}


@served
def test_a_row_is_what_the_models_own_cache_keeps_of_a_token(name: str) -> None:
    """Latents where it keeps these, and not the keys and values that are made of them."""
    ids, times = random_ids(), REPEATED.get(name, 1)
    own = tiny(name)
    dense = DynamicCache(config=own.config)
    logits_of(own, ids, past_key_values=dense)
    model, handle = pruning(name)
    with handle.running(KEEP):
        cache = handle.new_cache(KEEP)
        logits_of(model, ids, past_key_values=cache)
    for layer in handle.decoder.layers:
        # Layers that share keys have pages of their own.
        kept = dense.layers[layer.index] if layer.index < len(dense.layers) else None
        if kept is not None and getattr(kept, "keys", None) is not None:
            page = cache.layers[layer.index].page
            for mine, its in ((page.key, kept.keys), (page.value, kept.values)):
                assert mine.shape[1::2] == (times * its.shape[1], its.shape[3])


@served
@pytest.mark.parametrize("policy", ["gate", "h2o", "sink"])
def test_one_pass_is_steps_and_blocks_and_each_text_alone(name: str, policy: str) -> None:
    model, handle = pruning(name)
    ids = random_ids()
    most = tolerance(name, ids, logits_of(model, ids, use_cache=False))
    handle.use(policy, 0.5, context=LENGTH)
    with handle.measure() as usage:
        whole = logits_of(model, ids)
    assert usage.sparsity == pytest.approx(0.5, abs=0.01)
    near(in_parts(model, ids, handle.cache()), whole, most)
    handle.block = 7
    near(logits_of(model, ids), whole, most)
    handle.use(policy, 0.5, context=[LENGTH, SHORT])
    mask = torch.ones_like(ids)
    mask[1, : LENGTH - SHORT] = 0
    position = (mask.cumsum(1) - 1).clamp_min(0)
    ragged = logits_of(model, ids, attention_mask=mask, position_ids=position)
    near(ragged[:1], whole[:1], most)
    handle.use(policy, 0.5, context=SHORT)
    near(ragged[1:, -SHORT:], logits_of(model, ids[1:, -SHORT:]), most)


@served
def test_generating_is_scoring(name: str) -> None:
    model, handle = pruning(name)
    handle.use("gate", 0.5, context=LENGTH)
    prompt = random_ids()[:, :PROMPT]
    text = model.generate(  # type: ignore[operator]
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=12,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
    )
    scored = logits_of(model, text[:, :-1])[:, PROMPT - 1 :].argmax(dim=-1)
    assert torch.equal(text[:, PROMPT:], scored)


@mechanisms
def test_hard_decisions_of_training_are_those_of_the_engine(name: str) -> None:
    """The margins of all gates, where nothing is dropped; out of sight there is none."""
    model, handle = pruning(name)
    ids = random_ids()
    handle.config = replace(handle.config, attention_bonus=0.0)
    soft = SoftAttention(Level(1.0, 1e3), handle.config, hard=True)
    soft.scores = {}
    with handle.running(soft):
        logits_of(model, ids, use_cache=False)
    handle.use("gate", 1e-9, context=LENGTH)
    cache = handle.cache(record=True)
    assert isinstance(cache, PrunedCache) and soft.scores
    logits_of(model, ids, past_key_values=cache)
    single = handle.decoder.config._attn_implementation == "ctxprune-eager"
    for layer, page in zip(handle.decoder.gated, cache.pages, strict=True):
        assert layer.gate is not None
        seen, gate = cache.seen[0] - page.used[0] + page.settled[0], handle.gate_list[layer.gate]
        seen = LENGTH - (page.used[0] - page.settled[0])
        held = page.held(None, page.settled[0])
        margins = held.columns["margin"] + gate.slope + 1e3
        expected = soft.scores[layer.gate][:, seen - 1].gather(1, held.position)
        real = torch.isfinite(expected) & torch.isfinite(margins) & (held.position > 0)
        assert int(real.sum()) > 8
        near(margins[real], expected[real], SINGLE if single else 1e-8)


@pytest.mark.parametrize("sight", [Sight(6), Sight(6, chunked=True), Sight()])
def test_what_a_sight_says_of_itself_agrees(sight: Sight) -> None:
    position = torch.arange(40)
    if sight.size is None:
        assert sight.held(17) == 17 and not sight.bounds(10**6) and sight.kept(40) == 1.0
        return
    seen = sight.sees(position[:, None], position).tril()
    for now in range(1, 40):
        assert sight.held(now) == int(seen[now, :now].sum())
        assert sight.bounds(now + 1) == (
            not bool(seen[: now + 1].sum(1).eq(position[: now + 1] + 1).all())
        )
    until = sight.until(position)
    for j in range(20):
        assert not seen[until[j], j] and seen[until[j] - 1, j]
    pairs = int(seen.sum()) - 40
    assert sight.kept(40) == pytest.approx(pairs / (40 * 39 / 2))


@pytest.mark.parametrize("name", ["gemma3_text", "mistral", "llama4_text"])
def test_rows_out_of_sight_leave(name: str) -> None:
    """Their pages stop growing, and a record says when they were last seen."""
    model, handle = pruning(name)
    cache = handle.new_cache(KEEP, record=True)
    with handle.running(KEEP):
        logits_of(model, random_ids(length=200), past_key_values=cache)
    for layer, of_cache in zip(handle.decoder.layers, cache.attentions, strict=True):
        assert of_cache.page is not None
        bounded = layer.sight.size is not None
        assert (max(of_cache.page.used) <= WINDOW + 8) == bounded
        assert (of_cache.page.slots < 50) == bounded
    assert cache.expires is not None
    sight, position = handle.decoder.sight, torch.arange(100)
    for record in cache.expires:
        expected = torch.full((100,), 2**63 - 1) if sight.size is None else sight.until(position)
        assert torch.equal(record[0, :100], expected)


@pytest.fixture
def folder_of(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Iterator[Folder]:
    """Make the converted folder of a tiny model."""

    def make(name: str) -> Path:
        dense = tmp_path / f"dense {name}"
        tiny(name, dtype=torch.float32).save_pretrained(dense)
        tokenizer.save_pretrained(dense)
        return convert(str(dense), tmp_path / name, {"rank": 8, "context": 64})

    yield make


TRAINED = ["mistral", "gemma3_text", "gpt_oss", "llama4_text"]
REST = [
    pytest.param(name, marks=pytest.mark.zoo)
    for name in MECHANISMS
    if name not in (*TRAINED, "llama")
]


@pytest.mark.parametrize("name", [*TRAINED, *REST])
def test_tuning_and_its_adapter(
    name: str, folder_of: Folder, text_file: Path, tmp_path: Path, tokenizer: Any
) -> None:
    """Two steps with LoRA, calibrated; the adapter on the first weights is the tuned model."""
    folder = folder_of(name)
    said: list[str] = []
    config = TuneConfig(data=str(text_file), steps=2, local_steps=1, context=48, train="lora")
    tuned = tune(folder, tmp_path / "tuned", config, on_phase=said.append)
    again = convert(
        str(tmp_path / f"dense {name}"), tmp_path / "again", {}, adapter=[tuned / adapter.FILE]
    )
    ids = random_ids()
    first, second = (load(path, sparsity=0.5) for path in (tuned, again))
    for model in (first, second):
        handle_of(model).use("gate", 0.5, context=LENGTH)
    near(logits_of(first, ids), logits_of(second, ids), 0.2)
    assert describe(again)["layers"] == decoder_of(first).describe()
    assert not any("dropout" in line for line in said)


@pytest.mark.parametrize("name", ["gpt2", "deepseek_v3", "qwen3_next"])
def test_lora_adapts_what_was_derived_and_nothing_else(name: str) -> None:
    model = tiny(name)
    targets, kind = decoder_of(model).lora_targets, model.config.model_type
    wrapped = adapter.wrap(model, 4)
    adapted = [path for path, part in wrapped.named_modules() if hasattr(part, "lora_A")]
    assert sorted(adapted) == sorted(f"base_model.model.{target}" for target in targets)
    assert model.config.model_type == kind


def test_tuning_switches_the_dropout_of_attention_off() -> None:
    model, handle = pruning("gpt2")
    block: Any = handle.decoder.layers[0].block
    assert block.attn.attn_dropout.p == block.attn.resid_dropout.p == 0.1
    soft = SoftAttention(Level(1e9), handle.config)
    with handle.running(soft), pytest.raises(CtxpruneError, match="drops some of its weights"):
        model.train()(random_ids(), use_cache=False)
    assert Trainee(model, handle, TuneConfig()).dropout == 0.1
    assert block.attn.attn_dropout.p == 0.0 and block.attn.resid_dropout.p == 0.1
    with handle.running(soft):
        model.train()(random_ids(), use_cache=False)


@pytest.mark.parametrize("name", ["llama", "nemotron", "stablelm"])
@torch.enable_grad()
def test_a_layer_that_is_recomputed_has_its_turn(name: str) -> None:
    """Gradients with checkpointing are those without, also where a block withholds arguments."""
    model, handle = pruning(name)
    ids, found = random_ids(), []
    model.train()
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        with handle.running(SoftAttention(Level(3.0), handle.config)):
            model(ids, labels=ids, use_cache=False).loss.backward()
        gradients = [part.grad for part in (*handle.gates.parameters(), *model.parameters())]
        found.append([grad.clone() for grad in gradients if grad is not None])
    assert len(found[0]) == len(found[1]) and any(grad.any() for grad in found[0][:2])
    for grad, again in zip(*found, strict=True):
        near(again, grad, EXACT)


@pytest.mark.parametrize("name", zoo.WITH_IMAGES)
def test_a_wrapper_of_text_and_images_reads_text(name: str) -> None:
    """As the dense model reads it, and with rows that leave token by token as in one pass."""
    model = zoo.with_images(name).double()
    ids = random_ids()
    dense = logits_of(model, ids, use_cache=False)
    gates = new_gates(model, PruneConfig(rank=8)).double()
    handle = attach(model, gates, PruneConfig(rank=8))
    check_agreement(model)
    with handle.running(KEEP):
        near(logits_of(model, ids), dense, SINGLE)
    handle.use("h2o", 0.5, context=LENGTH)
    near(in_parts(model, ids, handle.cache()), logits_of(model, ids), EXACT)
    assert len(handle.gate_list) == (1 if name == "gemma3" else 4)
    assert not [path for path in handle.decoder.lora_targets if "visi" in path or "visual" in path]


# Refusals.


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.zoo) for n in REFUSED])
def test_what_is_not_understood_is_refused(name: str) -> None:
    model = tiny(name)
    with pytest.raises(CtxpruneError, match=REFUSED[name]):
        config = PruneConfig(rank=8)
        attach(model, new_gates(model, config).double(), config)
        check_agreement(model)


def test_a_model_that_attends_otherwise_than_it_declares_is_refused() -> None:
    """Its configuration has a window which its layers know nothing of."""
    model = tiny("llama")
    model.config.layer_types = ["sliding_attention"] * 4
    model.config.sliding_window = WINDOW
    config = PruneConfig(rank=8)
    attach(model, new_gates(model, config).double(), config)
    with pytest.raises(CtxpruneError, match="standard deviations"):
        check_agreement(model)


def test_a_model_that_attends_as_it_declares_agrees() -> None:
    model, _ = pruning("gemma3_text")
    check_agreement(model)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"position_bias": torch.ones(1)}, "option `position_bias`"),
        ({"sliding_window": WINDOW + 1}, "asks for a window"),
        ({"is_causal": False}, "not causal"),
        ({"dropout": 0.1}, "drops some of its weights"),
    ],
)
def test_options_of_the_attention_call_are_understood_or_refused(
    options: dict[str, Any], why: str
) -> None:
    with pytest.raises(CtxpruneError, match=why):
        hooks._understood(torch.nn.Identity(), Sight(WINDOW), 1.0, options)
    known = {"sliding_window": WINDOW, "position_ids": torch.ones(1), "unknown": None}
    logits = hooks._understood(torch.nn.Identity(), Sight(WINDOW), 0.5, known)
    assert logits.scale == 0.5 and logits.plain


def test_a_module_that_is_not_causal_is_refused() -> None:
    module = torch.nn.Identity()
    module.is_causal = False  # type: ignore[assignment]
    with pytest.raises(CtxpruneError, match="not causal"):
        hooks._understood(module, Sight(), 1.0, {})


def test_masks_that_hide_more_are_refused() -> None:
    """One of an evicting pass by how it is made, one of training by what it hides."""
    model, handle = pruning("llama")
    ids = random_ids()
    with handle.running(KEEP), pytest.raises(CtxpruneError, match="masks more than"):
        hooks._sdpa_mask(0, use_vmap=True)
    mask = torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool).tril()
    soft = SoftAttention(Level(1e9), handle.config, hard=True)
    with handle.running(soft):
        logits_of(model, ids, use_cache=False, attention_mask=mask)
        mask[..., 9, 3] = False
        with pytest.raises(CtxpruneError, match="mask of its own"):
            logits_of(model, ids, use_cache=False, attention_mask=mask)
    with handle.running(KEEP), pytest.raises(CtxpruneError, match="attention masks of shape"):
        logits_of(model, ids, attention_mask=mask)


def test_a_layer_attends_to_each_token_once() -> None:
    model, handle = pruning("llama")
    attention = handle.decoder.layers[1].attention
    once: Any = attention.forward

    def twice(*args: Any, **kwargs: Any) -> Any:
        once(*args, **kwargs)
        return once(*args, **kwargs)

    def never(hidden_states: Tensor, **kwargs: Any) -> Any:
        return hidden_states, None

    with handle.running(KEEP):
        attention.forward = twice  # type: ignore[method-assign]
        with pytest.raises(CtxpruneError, match="more than once"):
            logits_of(model, random_ids())
        attention.forward = never  # type: ignore[method-assign]
        with pytest.raises(CtxpruneError, match="did not attend"):
            logits_of(model, random_ids())
    soft = SoftAttention(Level(1e9), handle.config, hard=True)
    with handle.running(soft), pytest.raises(CtxpruneError, match="does not call"):
        logits_of(model, random_ids(), use_cache=False)


def test_keys_of_other_tokens_are_refused() -> None:
    _, handle = pruning("llama")
    turn = SimpleNamespace(number=0, layers=handle.decoder.layers, hidden=torch.ones(1, 3, 64))
    tensors = [torch.ones(1, 2, n, 16) for n in (3, 4, 4)]
    with pytest.raises(CtxpruneError, match="keys that are not those"):
        hooks._attend(turn, None, torch.nn.Identity(), *tensors, None, None, {})  # type: ignore[arg-type]
