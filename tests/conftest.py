"""Tiny real models and a real tokenizer, made on the spot: no network, width 32."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from ctxprune.pruner.checkpoints.checkpoint import load, load_tokenizer
from ctxprune.pruner.checkpoints.convert import convert
from ctxprune.pruner.checkpoints.export import export
from ctxprune.pruner.config import PruneConfig
from ctxprune.pruner.engine.handle import attach, new_gates

FAMILIES = ("gpt2", "llama")
VOCABULARY = 300
END = "<|endoftext|>"
TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>{% endfor %}<answer>"

TEXT = (
    "It was a bright cold day in the harbour, and the old captain, who had seen many such days, "
    "walked slowly along the quay with a letter in his hand. The letter was from his sister.\n"
    "She wrote of the garden, of the two dogs, and of the winter that would not end. "
)


@pytest.fixture(autouse=True)
def _few_threads() -> None:
    torch.set_num_threads(1)


def tiny_model(family: str, seed: int = 0) -> PreTrainedModel:
    """A random model of width 32 with three layers; its attention is sharp enough to matter."""
    torch.manual_seed(seed)
    if family == "gpt2":
        return GPT2LMHeadModel(
            GPT2Config(
                vocab_size=VOCABULARY,
                n_positions=1024,
                n_embd=32,
                n_layer=3,
                n_head=4,
                initializer_range=0.2,
                bos_token_id=0,
                eos_token_id=0,
            )
        ).eval()
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=2048,
            initializer_range=0.2,
            bos_token_id=0,
            eos_token_id=0,
        )
    ).eval()


def remembering_model(
    known: Sequence[int], vocabulary: int, positions: int = 1024
) -> PreTrainedModel:
    """A model made by hand: its logits rise with each of the known tokens that it can still see.

    One layer attends to all rows alike. Known tokens are axes of the embedding, others are zero,
    so nothing but rows of the cache tells the last position of a known token before it.
    """
    width = 64
    assert len(known) < width
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=vocabulary,
            n_positions=positions,
            n_embd=width,
            n_layer=1,
            n_head=1,
            bos_token_id=0,
            eos_token_id=0,
        )
    ).eval()
    block = model.transformer.h[0]
    with torch.no_grad():
        for parameter in (model.transformer.wte.weight, model.transformer.wpe.weight):
            parameter.zero_()
        for linear in (block.attn.c_attn, block.mlp.c_fc, block.mlp.c_proj):
            linear.weight.zero_()
        model.transformer.wte.weight[list(known)] = torch.eye(width)[: len(known)]
        block.attn.c_attn.weight[:, 2 * width :] = torch.eye(width)
        block.attn.c_proj.weight.copy_(torch.eye(width))
    config = PruneConfig(rank=8)
    attach(model, new_gates(model, config), config)
    return model


@pytest.fixture(scope="session")
def embedded_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded checkpoint, converted: its tokenizer knows words."""
    return convert(None, tmp_path_factory.mktemp("embedded") / "converted", {})


@pytest.fixture(scope="module")
def model(embedded_folder: Path) -> PreTrainedModel:
    """The same, loaded, dense."""
    return load(embedded_folder, sparsity=0.0)


@pytest.fixture(scope="module")
def words(embedded_folder: Path) -> PreTrainedTokenizerBase:
    """Its tokenizer."""
    return load_tokenizer(embedded_folder)


@pytest.fixture(scope="module")
def chatty(words: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The same, with a chat template."""
    other = copy.deepcopy(words)
    other.chat_template = TEMPLATE
    return other


def made_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE trained on a paragraph."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([TEXT], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=END, eos_token=END)
    assert len(fast) <= VOCABULARY
    return fast


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """The same, made once."""
    return made_tokenizer()


@pytest.fixture
def dense_folder(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Callable[[str], Path]:
    """Make the plain Hugging Face folder of a tiny model."""

    def make(family: str) -> Path:
        folder = tmp_path / f"dense-{family}"
        tiny_model(family).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return make


@pytest.fixture
def tiny_folder(dense_folder: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    """Make the converted folder of a tiny model."""

    def make(family: str) -> Path:
        out = tmp_path / f"converted-{family}"
        return convert(str(dense_folder(family)), out, {"rank": 8, "context": 128})

    return make


@pytest.fixture
def own_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers copies trusted code to a cache: here to one of this test."""
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "c"))
    monkeypatch.setattr(sys, "path", [*sys.path])


@pytest.fixture
def exported(
    dense_folder: Callable[[str], Path], tmp_path: Path, own_modules: None
) -> Callable[[str], Path]:
    """Make an exported folder that is tuned to 0.5, by name of a family."""

    def make(family: str) -> Path:
        settings = {"rank": 8, "context": 128, "levels": {0.5: (0.5,) * 3}, "tuned": 0.5}
        folder = convert(str(dense_folder(family)), tmp_path / f"converted-{family}", settings)
        return export(folder, tmp_path / f"exported-{family}")

    return make


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    """A few thousand tokens of text."""
    path = tmp_path / "text.txt"
    path.write_text("\n".join(f"Chapter {n}. {TEXT}" for n in range(60)), encoding="utf-8")
    return path


STORY = "The captain walked slowly along the empty shore and counted the boats. "


def write_tasks(folder: Path, documents: int = 6) -> None:
    """HellaSwag and PIQA documents of different lengths, so that the batches are padded."""
    endings = ["sails home.", "counts them once again!", "sleeps.", "eats the boats."]
    hellaswag, piqa = [], []
    for index in range(documents):
        story = STORY * (1 + index % 3)
        context = {"ctx_a": story, "ctx_b": "he", "ctx": STORY + "he"}
        about = {"ind": index, "activity_label": "Sailing", "label": str(index % 4)}
        hellaswag.append(about | context | {"endings": endings})
        solutions = {"sol1": "Count them.", "sol2": "Eat them all at once.", "label": index % 2}
        piqa.append({"goal": f"How does one count boats? {story}"} | solutions)
    for name, rows in (("hellaswag", hellaswag), ("piqa", piqa)):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))


@pytest.fixture
def task_folder(tmp_path: Path) -> Path:
    """A folder for `--data-dir`."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    write_tasks(folder)
    return folder


@pytest.fixture(scope="session")
def workplace(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """What `make_workplace` makes."""
    return make_workplace(tmp_path_factory.mktemp("workplace"), tokenizer)


def make_workplace(place: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A working folder: a dense model, its conversion `m`, which is current, texts and a recipe."""
    tiny_model("llama").save_pretrained(place / "dense")
    tokenizer.save_pretrained(place / "dense")
    convert(str(place / "dense"), place / "m", {"rank": 8, "context": 128})
    (place / ".ctxprune").mkdir()
    (place / ".ctxprune" / "current").write_text("m\n")
    (place / "text.txt").write_text("\n".join(f"Chapter {n}. {TEXT}" for n in range(20)))
    (place / "short.txt").write_text(TEXT * 2)
    tune = "data: text.txt, valid: short.txt, steps: 3, context: 64, batch_size: 1, save_every: 2"
    evaluate = "text: text.txt, context: 64, tokens: 256, sparsity: [0, 0.5], policy: window"
    (place / "recipe.yaml").write_text(
        "steps:\n"
        "  - {name: c, convert: {source: dense, rank: 8}}\n"
        f"  - {{name: t, tune: {{model: c, sparsity: 0.5, {tune}}}}}\n"
        f"  - {{name: e, eval: {{model: t, {evaluate}}}}}\n"
    )
    return place
