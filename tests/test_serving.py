"""Generating for real: caps that hold, conversations, beams, stop strings, half precision."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FAMILIES, tiny_model
from test_laws import (
    POLICIES,
    every_protocol,
    held_by,
    in_parts,
    logits_of,
    mask_of,
    padded,
    pruning_model,
    random_ids,
    recording,
)
from transformers import PreTrainedTokenizerFast

from ctxprune.pruner.checkpoints.checkpoint import load, load_tokenizer
from ctxprune.pruner.checkpoints.convert import convert
from ctxprune.pruner.config import GenerateConfig
from ctxprune.pruner.data import read_texts, windows
from ctxprune.pruner.engine.handle import Handle
from ctxprune.pruner.engine.page import Held, Page
from ctxprune.pruner.errors import CtxpruneError
from ctxprune.pruner.generation import generate

matrix = pytest.mark.parametrize("family", FAMILIES)
every_policy = pytest.mark.parametrize("policy", POLICIES)


def greedy(model: Any, prompt: torch.Tensor, count: int, **options: Any) -> torch.Tensor:
    """Ids (b, prompt + count) of a continuation without an end."""
    # Without a mask, a text that has the padding token in it would be taken for padded.
    options = {"do_sample": False, "attention_mask": torch.ones_like(prompt), **options}
    ids: torch.Tensor = model.generate(
        prompt, max_new_tokens=count, eos_token_id=None, pad_token_id=0, **options
    )
    return ids


class Watched:
    """Pages: how many slots they have, how often they are written to, and rows that a step sees."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.slots: set[int] = set()
        self.nbytes: dict[Page, int] = {}
        self.writes = 0
        self.rows = 0
        write, front = Page.write, Held.front

        def watched(page: Page, *args: Any) -> None:
            write(page, *args)
            self.slots.add(page.slots)
            assert max(page.used) <= page.slots
            assert self.nbytes.setdefault(page, page.nbytes) == page.nbytes
            self.writes += 1

        def seen(held: Held, stop: int) -> Held:
            visible = front(held, stop)
            self.rows = max(self.rows, int((visible.position >= 0).sum(dim=1).max()))
            return visible

        patch.setattr(Page, "write", watched)
        patch.setattr(Held, "front", seen)


@matrix
@every_policy
@pytest.mark.parametrize("sparsity", [0.0, 0.3])
def test_the_cap_holds_at_every_moment(
    family: str, policy: str, sparsity: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ragged prompts, then single tokens, in pages of that many slots; one pass: the same text."""
    model, handle = pruning_model(family)
    handle.use(policy, sparsity, max_rows=48)
    prompts, mask = random_ids(2, 150), mask_of((250, 183), 250)
    watched = Watched(monkeypatch)
    with handle.measure() as usage:
        out = greedy(model, prompts, 100, attention_mask=mask[:, :150])
    assert max(watched.slots) == 48 >= watched.rows
    assert 0.4 < usage.capped_share <= 1.0
    assert handle.last_cache is not None
    for page in handle.last_cache.pages:
        assert all(page.slots - 8 < used <= page.slots for used in page.used)
    scored = logits_of(model, out, **padded(mask))[:, 149:-1].argmax(dim=-1)
    assert torch.equal(scored, out[:, 150:])


def test_the_cap_holds_over_16k_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    model, handle = pruning_model("llama", "float32")
    model.config.max_position_embeddings = 20_000
    handle.use("gate", 0.5, max_rows=64)
    watched = Watched(monkeypatch)
    out = greedy(model, random_ids(1, 14_336), 2048)
    assert out.shape[1] == 16_384
    # One token at a time after the prompt, in each of three layers.
    assert watched.writes == 3 * 2047
    assert max(watched.slots) == watched.rows == 64
    assert handle.last_cache is not None
    assert handle.last_cache.nbytes < 0.02 * handle.last_cache.dense_nbytes


@matrix
def test_a_cap_alone_prunes_a_model_at_sparsity_0(family: str) -> None:
    """As a window with sinks does, as long as the gate has learned nothing and no bonus counts."""
    model, handle = pruning_model(family)
    handle.config = replace(handle.config, attention_bonus=0.0)
    for gate in handle.gate_list:
        torch.nn.init.zeros_(gate.key.weight)
    handle.use("gate", 0.0, max_rows=40)
    cache = recording(handle)
    logits_of(model, random_ids(1, 160), past_key_values=cache)
    for page in cache.pages:
        assert sorted(held_by(cache, page, 0)) == [0, 1, *range(160 - 36, 160)]


def test_caps_that_are_too_small() -> None:
    _, handle = pruning_model("gpt2")
    with pytest.raises(CtxpruneError, match="a cap of 20 rows is too small"):
        handle.use("gate", 0.7, max_rows=20)


@matrix
@every_policy
@every_protocol
def test_a_conversation_goes_on_with_the_same_cache(family: str, policy: str, evict: str) -> None:
    """Prefill, decode, prefill again, decode: the text is that of one pass over all ids."""
    model, handle = pruning_model(family)
    handle.use(policy, 0.7, context=200, evict=evict, prompt=70)
    cache = handle.cache()
    first = greedy(model, random_ids(2, 70), 40, past_key_values=cache)
    asked = torch.cat([first, random_ids(2, 33, seed=5)], dim=1)
    second = greedy(model, asked, 30, past_key_values=cache)
    scored = logits_of(model, second).argmax(dim=-1)
    assert torch.equal(scored[:, 69:109], second[:, 70:110])
    assert torch.equal(scored[:, -31:-1], second[:, -30:])
    assert cache.get_seq_length() == second.shape[1] - 1


@matrix
@every_policy
@every_protocol
def test_turns_of_unequal_texts_go_on_too(family: str, policy: str, evict: str) -> None:
    """Each turn of a batch is padded on the left, as a tokenizer pads it."""
    model, handle = pruning_model(family)
    turns = ((50, 29, 44), (20, 60, 26), (1, 15, 1))
    mask = torch.cat([mask_of(turn, max(turn)) for turn in turns], dim=1)
    total = [sum(lengths) for lengths in zip(*turns, strict=True)]
    handle.use(policy, 0.7, context=total, evict=evict, prompt=turns[0])
    ids = random_ids(3, mask.shape[1])
    parts = in_parts(model, ids, recording(handle), (50, 110), mask)
    for b in range(3):
        handle.use(policy, 0.7, context=total[b], evict=evict, prompt=turns[0][b])
        own = mask[b] == 1
        alone = logits_of(model, ids[b : b + 1, own])[0]
        torch.testing.assert_close(parts[b, own], alone, atol=1e-10, rtol=0)


@matrix
@every_policy
@every_protocol
def test_beams_keep_their_rows(family: str, policy: str, evict: str) -> None:
    model, handle = pruning_model(family)
    handle.use(policy, 0.7, context=70, evict=evict, prompt=21)
    prompts, mask = random_ids(2, 30), mask_of((70, 61), 70)
    out: Any = model.generate(
        prompts, attention_mask=mask[:, :30], max_new_tokens=40, num_beams=3,
        num_return_sequences=2, do_sample=False, eos_token_id=None, pad_token_id=0,
        return_dict_in_generate=True, output_scores=True,
    )  # fmt: skip
    ids, mask = out.sequences, mask.repeat_interleave(2, 0)
    chosen = logits_of(model, ids, **padded(mask))[:, 29:-1].log_softmax(dim=-1)
    total = chosen.gather(2, ids[:, 30:, None]).sum(dim=(1, 2))
    torch.testing.assert_close(out.sequences_scores.double() * 40, total, atol=1e-3, rtol=0)


@matrix
@every_policy
@every_protocol
def test_sequences_can_be_repeated_and_selected(family: str, policy: str, evict: str) -> None:
    """Their rows, counts and records follow them, so that they go on as if they had come alone."""
    model, handle = pruning_model(family)
    handle.use(policy, 0.7, context=100, evict=evict, prompt=30)
    ids, more, mask = random_ids(2, 60), random_ids(3, 40, seed=4), mask_of((60, 39), 60)
    cache = recording(handle)
    logits_of(model, ids, past_key_values=cache, **padded(mask))
    cache.batch_repeat_interleave(2)
    chosen = torch.tensor([3, 0, 2])
    cache.batch_select_indices(chosen)
    of = chosen // 2
    whole = torch.cat([ids[of], more], dim=1)
    mask = torch.cat([mask[of], torch.ones_like(more)], dim=1)
    after = [
        logits_of(model, whole[:, t : t + 1], past_key_values=cache, **padded(mask, t, t + 1))
        for t in range(60, 100)
    ]
    assert cache.seen == [79, 100, 79]
    alone = recording(handle)
    expected = logits_of(model, whole, past_key_values=alone, **padded(mask))[:, 60:]
    torch.testing.assert_close(torch.cat(after, dim=1), expected, atol=1e-10, rtol=0)
    assert cache.expires is not None and alone.expires is not None
    for ours, theirs in zip(cache.expires, alone.expires, strict=True):
        assert torch.equal(ours, theirs)


@matrix
def test_sampled_texts_of_a_prompt_have_their_own_rows(family: str) -> None:
    model, handle = pruning_model(family)
    handle.use("gate", 0.7)
    torch.manual_seed(0)
    options = {"num_return_sequences": 4, "do_sample": True, "output_logits": True}
    out: Any = greedy(model, random_ids(1, 40), 60, return_dict_in_generate=True, **options)
    assert len({tuple(row) for row in out.sequences.tolist()}) == 4
    logits = torch.stack(out.logits, dim=1).double()
    expected = logits_of(model, out.sequences)[:, 39:-1]
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


def test_half_a_thousand_tokens_in_a_fraction_of_the_memory(tmp_path: Path) -> None:
    """The embedded model, four prompts of 512 tokens, 512 more: bytes, and the text of one pass."""
    folder = convert(None, tmp_path / "m", {"levels": {0.8: (0.2,) * 4}, "tuned": 0.8})
    model = load(folder, dtype="float64")
    text = windows(load_tokenizer(folder), read_texts(None, "eval"), 512)
    out = greedy(model, text[::20][:4], 512)
    cache = model.ctxprune.last_cache
    dense = 4 * 2 * 1023 * model.config.hidden_size * model.config.num_hidden_layers * 8
    assert cache.dense_nbytes == dense
    assert cache.nbytes < 0.3 * dense
    scored = logits_of(model, out)[:, 511:-1].argmax(dim=-1)
    assert torch.equal(scored, out[:, 512:])


@matrix
def test_assisted_decoding_is_refused(family: str) -> None:
    model, handle = pruning_model(family)
    handle.use("gate", 0.7)
    with pytest.raises(CtxpruneError, match="assisted decoding"):
        greedy(model, random_ids(1, 40).repeat(1, 2), 20, prompt_lookup_num_tokens=3)


@matrix
def test_at_sparsity_0_generating_is_dense(family: str) -> None:
    """The cache is written in place: the same numbers, without a copy a token."""
    model, handle = pruning_model(family, "float32")
    prompts = random_ids(2, 30)
    mask = torch.ones_like(prompts)
    mask[1, :9] = 0
    options = {
        "attention_mask": mask,
        "return_dict_in_generate": True,
        "output_logits": True,
        "num_beams": 2,
    }
    ours: Any = greedy(model, prompts, 60, past_key_values=handle.cache(), **options)
    assert type(ours.past_key_values).__name__ == "DenseCache"
    by_itself: Any = greedy(model, prompts, 60, **options)
    layers = {type(layer).__name__ for layer in by_itself.past_key_values.layers}
    assert layers == {"DenseLayer"}
    theirs: Any = greedy(tiny_model(family), prompts, 60, **options)
    assert type(theirs.past_key_values).__name__ == "DynamicCache"
    # Grouped queries are folded here: the same sums, in another order.
    error = 0.0 if family == "gpt2" else 1e-4
    for one, two, three in zip(ours.logits, by_itself.logits, theirs.logits, strict=True):
        torch.testing.assert_close(one, three, atol=error, rtol=0)
        assert torch.equal(one, two)


@matrix
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@every_policy
def test_half_precision_follows_full_precision(
    family: str, dtype: torch.dtype, policy: str
) -> None:
    """A flipped decision moves logits; most of them have to stay where they are."""
    model, handle = pruning_model(family, "float32")
    handle.use(policy, 0.6, context=200)
    ids = random_ids(2, 200)
    with handle.measure() as usage:
        full = logits_of(model, ids)
    model.to(dtype)  # type: ignore[arg-type]
    with handle.measure() as half_usage:
        half = logits_of(model, ids)
    assert half.dtype == dtype
    assert half_usage.sparsity == pytest.approx(usage.sparsity, abs=0.03)
    error = (half.float() - full).abs().median() / full.abs().median()
    assert float(error) < 0.2


@pytest.fixture
def served(
    tiny_folder: Callable[[str], Path],
) -> tuple[Any, PreTrainedTokenizerFast, Handle]:
    """A loaded model that prunes as a window with sinks does."""
    folder = tiny_folder("llama")
    model = load(folder, policy="sink", sparsity=0.5)
    return model, load_tokenizer(folder), model.ctxprune  # type: ignore[return-value]


def test_unequal_prompts_are_written_as_alone(served: Any) -> None:
    model, tokenizer, _ = served
    prompts = ("It was a bright cold day in the harbour, and the old captain", "The letter")
    together = generate(model, tokenizer, GenerateConfig(prompts, max_new_tokens=40))
    for prompt, text in zip(prompts, together.texts, strict=True):
        alone = generate(model, tokenizer, GenerateConfig((prompt,), max_new_tokens=40))
        assert alone.texts == [text] and text.startswith(prompt)
    assert 0.0 < together.sparsity < 1.0 and together.savings is not None
    assert 0 < together.savings.kv_bytes < together.savings.dense_kv_bytes


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"temperature": 1.0}], ids=str)
def test_copies_of_a_prompt_have_its_rows(served: Any, options: dict[str, Any]) -> None:
    """Beams and samples of unequal prompts; afterwards the model serves any other batch."""
    model, tokenizer, handle = served
    handle.use("knorm", 0.5)
    prompts = ("It was a bright cold day in the harbour, and the old captain", "The letter")
    config = GenerateConfig(prompts, max_new_tokens=30, num_return_sequences=3, **options)
    done = generate(model, tokenizer, config)
    assert done.savings is not None and len(done.texts) == 6
    assert done.sparsity == pytest.approx(0.5, abs=0.1) and done.savings.compression_ratio > 0.5
    logits_of(model, random_ids(4, 30))


def test_stop_strings_end_a_text(served: Any) -> None:
    model, tokenizer, _ = served
    whole = generate(model, tokenizer, GenerateConfig(("The letter",), max_new_tokens=40)).texts[0]
    stop = whole[len("The letter") + 10 :][:2]
    config = GenerateConfig(("The letter",), max_new_tokens=40, stop=(stop,))
    cut = generate(model, tokenizer, config).texts[0]
    assert len(cut) < len(whole) and stop in cut[len("The letter") :] and whole.startswith(cut)


def test_text_streams_as_it_is_written(served: Any) -> None:
    model, tokenizer, _ = served
    pieces: list[str] = []
    config = GenerateConfig(("The old captain",), max_new_tokens=30)
    done = generate(model, tokenizer, config, pieces.append)
    assert len(pieces) > 3 and "".join(pieces).strip() == done.texts[0].strip()


@pytest.mark.parametrize("sparsity", [0.0, 0.5])
def test_memory_is_told_token_by_token(served: Any, sparsity: float) -> None:
    """The share of the layers that a token is in is what the tables hold at that moment."""
    model, tokenizer, handle = served
    handle.use("knorm", sparsity)
    told: list[tuple[list[str], list[float]]] = []

    def note(pieces: list[str], shares: list[float]) -> None:
        told.append((list(pieces), shares))
        cache = handle.last_cache
        if cache is not None and cache.seen:
            held = torch.zeros(len(shares))
            for page in cache.pages:
                held[held_by(cache, page, 0)] += 1 / 3
            held[cache.seen[0] :] = 1.0  # the newest token is still to be read
            torch.testing.assert_close(torch.tensor(shares), held)

    config = GenerateConfig(("The old captain \U0001f600",), max_new_tokens=30)
    done = generate(model, tokenizer, config, on_memory=note)
    assert len(told) == 1 + 30 and "".join(told[0][0]) == config.prompt[0]
    # Random bytes may end within a character.
    assert done.texts[0].rstrip("\ufffd") == "".join(told[-1][0]).rstrip("\ufffd")
    assert (min(told[-1][1]) < 1.0) == (sparsity > 0)
    rows = 0.0 if done.savings is None else done.savings.rows
    assert rows == 0.0 if sparsity == 0 else 1 < rows < len(told[-1][0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": ()}, "the prompt is empty"),
        ({"prompt": "a", "num_beams": 0}, "at least 1"),
        ({"prompt": "a", "num_return_sequences": 3}, "greedy search finds 1"),
        ({"prompt": "a", "top_p": 0.5}, "only matter to sampling"),
        ({"prompt": "a", "top_p": 1.5, "temperature": 1.0}, "top_p must be at most 1, not 1.5"),
        ({"prompt": "a", "sparsity": 1.0}, "less than 1"),
    ],
)
def test_bad_settings_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(CtxpruneError, match=message):
        GenerateConfig.from_mapping(options, "a test")
