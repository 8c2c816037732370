"""Folders and files of models that are damaged, odd or hostile, in every command."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from outcome import ctxprune, files_of, refused
from strangers import (
    ABSENT,
    USING,
    Damage,
    Folders,
    arguments,
    copied,
    cut,
    directory,
    edit,
    link,
    make,
    pipe,
    remove,
    tensors,
    write,
)
from transformers import PreTrainedTokenizerFast

CONFIG, WEIGHTS, GATES = "config.json", "model.safetensors", "ctxprune.safetensors"
INDEX, TOKENIZER = "model.safetensors.index.json", "tokenizer.json"
TOKENIZER_CONFIG, GENERATION = "tokenizer_config.json", "generation_config.json"
NORM = "model.norm.weight"

READERS = ("convert", "info", "generate")
LOADERS = ("convert", "eval", "generate")

# name -> damage, the commands that meet it, what they say
DAMAGED: dict[str, tuple[Damage, tuple[str, ...], str]] = {
    # config.json
    "config: no JSON": (write(CONFIG, "{"), (*READERS, "export", "architecture"), "not valid JSON"),
    "config: empty": (write(CONFIG, ""), READERS, "not valid JSON"),
    "config: a list": (write(CONFIG, "[]"), (*READERS, "inspect"), "an object is needed, not []"),
    "config: a number": (write(CONFIG, "7"), READERS, "an object is needed, not 7"),
    "config: null": (write(CONFIG, "null"), ("info",), "an object is needed, not None"),
    "config: not UTF-8": (write(CONFIG, b"\xff\xfe{}"), READERS, "not valid JSON"),
    "config: NUL": (write(CONFIG, b"\0" * 64), READERS, "not valid JSON"),
    "config: deep": (write(CONFIG, "[" * 100_000), READERS, "nested too deeply"),
    "config: gone": (remove(CONFIG), (*READERS, *USING[1:]), "has no config.json"),
    "config: no type": (edit(CONFIG, model_type=ABSENT), (*READERS, "architecture"), "model_type"),
    "config: null type": (
        edit(CONFIG, model_type=None),
        READERS,
        "type must be text, not None",
    ),
    "config: odd type": (edit(CONFIG, model_type=[1]), READERS, "model_type must be text, not [1]"),
    "config: no such type": (
        edit(CONFIG, model_type="unheard-of"),
        (*READERS, "architecture"),
        "is not a model that transformers knows",
    ),
    "config: an encoder": (edit(CONFIG, model_type="bert"), READERS, "is not supported"),
    "config: another type": (edit(CONFIG, model_type="gpt2"), LOADERS, CONFIG),
    "config: layers a word": (edit(CONFIG, num_hidden_layers="3"), READERS, "num_hidden_layers"),
    "config: layers a word, of GPT-2": (
        edit(CONFIG, model_type="gpt2", n_layer="4"),
        READERS,
        "n_layer",
    ),
    "config: layers negative": (edit(CONFIG, num_hidden_layers=-1), READERS, "which no model has"),
    "config: no layers": (edit(CONFIG, num_hidden_layers=0), READERS, ""),
    "config: endless layers": (
        edit(CONFIG, num_hidden_layers=10**12),
        (*READERS, "architecture"),
        "which no model has",
    ),
    "config: more layers": (edit(CONFIG, num_hidden_layers=4), ("convert", "eval"), "lack"),
    "config: vocabulary null": (edit(CONFIG, vocab_size=None), READERS, ""),
    "config: vocabulary negative": (edit(CONFIG, vocab_size=-5), READERS, ""),
    "config: vocabulary zero": (edit(CONFIG, vocab_size=0), READERS, ""),
    "config: vocabulary endless": (edit(CONFIG, vocab_size=10**12), READERS, "parameters"),
    "config: vocabulary larger": (edit(CONFIG, vocab_size=301), LOADERS, "has the shape (300, 32)"),
    "config: width a word": (edit(CONFIG, hidden_size="wide"), READERS, "hidden_size"),
    "config: width zero": (edit(CONFIG, hidden_size=0), READERS, ""),
    "config: width endless": (edit(CONFIG, hidden_size=10**12), READERS, ""),
    "config: width beyond": (edit(CONFIG, hidden_size=10**30), READERS, ""),
    "config: heads zero": (edit(CONFIG, num_attention_heads=0), READERS, ""),
    "config: heads odd": (edit(CONFIG, num_attention_heads=5), READERS, ""),
    "config: feed-forward endless": (edit(CONFIG, intermediate_size=10**11), READERS, "parameters"),
    "config: architectures": (
        edit(CONFIG, architectures=5),
        READERS,
        "must be a list, not 5",
    ),
    "config: positions a list": (edit(CONFIG, max_position_embeddings=[1]), READERS, ""),
    "config: text part": (edit(CONFIG, model_type="gemma3", text_config=7), READERS, ""),
    "config: dtype": (edit(CONFIG, dtype="float7"), READERS, ""),
    "config: quantization": (edit(CONFIG, quantization_config=[]), LOADERS, ""),
    "config: quantized": (
        edit(CONFIG, quantization_config={"quant_method": "gptq", "bits": 4}),
        LOADERS,
        "quantized by gptq",
    ),
    "config: quantized otherwise": (
        edit(CONFIG, quantization_config={"quant_method": "awq", "bits": 4}),
        LOADERS,
        "quantized by awq",
    ),
    "config: quantized by bitsandbytes": (
        edit(CONFIG, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}),
        LOADERS,
        "",
    ),
    "config: a pipe": (pipe(CONFIG), (*READERS, "tune", "bench"), "is a pipe, not a file"),
    "config: a folder": (directory(CONFIG), READERS, "is a folder, not a file"),
    "config: a device": (link(CONFIG, "/dev/zero"), READERS, "is a device, not a file"),
    "config: dangling": (link(CONFIG, "nowhere"), READERS, "cannot be read"),
    "config: a loop": (link(CONFIG, CONFIG), READERS, "cannot be read"),
    # weights
    "weights: empty": (write(WEIGHTS, ""), (*READERS, "bench"), "is damaged"),
    "weights: half": (cut(WEIGHTS), (*READERS, *USING[1:]), "is damaged"),
    "weights: header of 2^60": (
        write(WEIGHTS, struct.pack("<Q", 1 << 60) + b"{}"),
        READERS,
        "is damaged",
    ),
    "weights: header is no JSON": (
        write(WEIGHTS, struct.pack("<Q", 4) + b"nope"),
        READERS,
        "is damaged",
    ),
    "weights: offsets beyond": (
        write(
            WEIGHTS,
            struct.pack("<Q", 64)
            + b'{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,36]}}'.ljust(64),
        ),
        READERS,
        "is damaged",
    ),
    "weights: gone": (remove(WEIGHTS), READERS, "has no weights"),
    "weights: a pipe": (pipe(WEIGHTS), READERS, "is a pipe, not a file"),
    "weights: a folder": (directory(WEIGHTS), READERS, "is a folder, not a file"),
    "weights: dangling": (link(WEIGHTS, "nowhere"), READERS, "cannot be read"),
    "weights: one is missing": (
        tensors(WEIGHTS, lambda found: found.pop(NORM)),
        LOADERS,
        f"lack `{NORM}`",
    ),
    "weights: a shape": (
        tensors(WEIGHTS, lambda found: found.update({NORM: torch.ones(31)})),
        LOADERS,
        f"`{NORM}`",
    ),
    "weights: a dimension": (
        tensors(WEIGHTS, lambda found: found.update({NORM: torch.ones(1, 32)})),
        LOADERS,
        f"`{NORM}`",
    ),
    "index: outside": (
        edit(INDEX, weight_map={NORM: "../plain/model.safetensors"}),
        READERS,
        "is outside its folder",
    ),
    "index: absolute": (edit(INDEX, weight_map={NORM: "/etc/passwd"}), READERS, "is outside"),
    "index: no such file": (edit(INDEX, weight_map={NORM: "b.safetensors"}), READERS, "lacks `b"),
    "index: odd": (edit(INDEX, weight_map=[1]), READERS, "weight_map must be a mapping"),
    "index: no JSON": (write(INDEX, "{"), READERS, "not valid JSON"),
    "index: a pipe": (pipe(INDEX), READERS, "is a pipe, not a file"),
    # tokenizer
    "tokenizer: gone": (remove(TOKENIZER), LOADERS, "tokenizer"),
    "tokenizer: empty": (write(TOKENIZER, ""), LOADERS, "tokenizer"),
    "tokenizer: no JSON": (cut(TOKENIZER), (*LOADERS, "chat", "inspect", "tune"), "tokenizer"),
    "tokenizer: a list": (write(TOKENIZER, "[]"), LOADERS, "tokenizer"),
    "tokenizer: no model": (edit(TOKENIZER, model=None), LOADERS, "tokenizer"),
    "tokenizer: odd model": (edit(TOKENIZER, model={"type": "None"}), LOADERS, "tokenizer"),
    "tokenizer: a pipe": (pipe(TOKENIZER), LOADERS, "is a pipe, not a file"),
    "tokenizer: its config": (write(TOKENIZER_CONFIG, "{"), LOADERS, "not valid JSON"),
    "tokenizer: its class": (
        edit(TOKENIZER_CONFIG, tokenizer_class=5),
        LOADERS,
        "has no tokenizer that can be read",
    ),
    # generation_config.json
    "generation: no JSON": (write(GENERATION, "{"), (*READERS, "eval"), "not valid JSON"),
    "generation: a list": (write(GENERATION, "[]"), READERS, "an object is needed"),
    "generation: temperature": (
        edit(GENERATION, temperature="hot"),
        READERS,
        "temperature must be a number, not 'hot'",
    ),
    "generation: ends": (
        edit(GENERATION, eos_token_id="</s>"),
        (*READERS, "chat", "export", "tasks"),
        "eos_token_id must be a whole number, not '</s>'",
    ),
    "generation: huge end": (edit(GENERATION, eos_token_id=10**30), READERS, "must be less than"),
    "generation: ends of ends": (edit(GENERATION, eos_token_id=[[1]]), READERS, "a whole number"),
    "generation: no penalty": (
        edit(GENERATION, repetition_penalty=0),
        (*READERS, "chat", "export", "tasks"),
        "repetition_penalty must be more than 0",
    ),
    "generation: a penalty of NaN": (
        edit(GENERATION, repetition_penalty=float("nan")),
        READERS,
        "must be a finite number",
    ),
    "generation: odd words": (edit(GENERATION, bad_words_ids=5), READERS, "must be a list"),
    "generation: no words": (edit(GENERATION, bad_words_ids=[]), READERS, "an empty list"),
    "generation: odd tokens": (edit(GENERATION, suppress_tokens="a"), READERS, "must be a list"),
    "generation: odd n-grams": (edit(GENERATION, no_repeat_ngram_size="a"), READERS, "no_repeat"),
    "generation: odd cache": (
        edit(GENERATION, cache_implementation="odd"),
        LOADERS,
        "generation_config.json in",
    ),
    "generation: greedy, thrice": (edit(GENERATION, num_return_sequences=3), LOADERS, "is refused"),
    "generation: odd watermark": (edit(GENERATION, watermarking_config=5), LOADERS, "is refused"),
    "generation: a pipe": (pipe(GENERATION), READERS, "is a pipe, not a file"),
    # adapters of others
    "adapter of peft beside it": (
        edit("adapter_config.json", peft_type="LORA", base_model_name_or_path="gpt2"),
        READERS,
        "beside the weights",
    ),
    # what ours holds
    "gates: gone": (remove(GATES), USING, "does not exist"),
    "gates: empty": (write(GATES, ""), USING, "is damaged"),
    "gates: half": (cut(GATES), ("info", "eval", "generate"), "is damaged"),
    "gates: a pipe": (pipe(GATES), ("info", "eval", "generate"), "is a pipe"),
    "gates: of other names": (
        tensors(GATES, lambda found: found.pop("0.bias")),
        ("eval", "generate", "export"),
        "do not fit",
    ),
    "gates: of other shapes": (
        tensors(GATES, lambda found: found.update({"0.query.weight": torch.ones(4, 32)})),
        ("eval", "generate", "export"),
        "do not fit",
    ),
    "levels: of other layers": (
        edit("ctxprune.json", config={"rank": 8, "levels": {"0.5": [0.5]}, "tuned": 0.5}),
        ("eval", "generate", "export"),
        "the model has 3 with a gate",
    ),
}
CASES = [(name, command) for name, (_, some, _) in DAMAGED.items() for command in some]
PLAIN = ("convert", "architecture")


@pytest.fixture(scope="module")
def folders(
    tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast
) -> Folders:
    return make(tmp_path_factory.mktemp("strangers"), tokenizer)


@pytest.mark.parametrize(("name", "command"), CASES, ids=[f"{c}, {n}" for n, c in CASES])
def test_a_damaged_folder_is_refused(
    name: str, command: str, folders: Folders, tmp_path: Path
) -> None:
    damage, _, said = DAMAGED[name]
    source = folders.plain if command in PLAIN else folders.tuned
    model, cwd = copied(source, tmp_path / "m", damage), tmp_path / "here"
    cwd.mkdir()
    done = ctxprune(*arguments(command, model, folders.text, cwd / "out"), cwd=cwd)
    refused(done, said)
    assert not done.out and not files_of(cwd)


# What other settings of generation say does not matter: these would be refused by transformers,
# ask for its code on the hub, or change what is returned.
UNHEEDED: dict[str, Any] = {
    "max_length": "long",
    "min_length": "a",
    "max_time": "a",
    "num_beams": [2],
    "stop_strings": ["a"],
    "token_healing": True,
    "forced_eos_token_id": "x",
    "guidance_scale": "a",
    "penalty_alpha": 0.6,
    "dola_layers": "high",
    "constraints": 5,
    "force_words_ids": [[1]],
    "sequence_bias": 5,
    "exponential_decay_length_penalty": [1],
    "prompt_lookup_num_tokens": "a",
    "is_assistant": 1,
    "return_dict_in_generate": True,
    "output_attentions": True,
    "custom_generate": "someone/code",
    "trust_remote_code": True,
    "nobody knows": {"a": [1]},
}


@pytest.mark.parametrize("command", ["generate", "chat", "tasks"])
def test_texts_are_written_as_the_options_say(
    command: str, folders: Folders, tmp_path: Path
) -> None:
    said = set()
    for name, settings in (("none", {}), ("all", UNHEEDED), ("greedy", {"top_k": 4})):
        model = copied(
            folders.tuned,
            tmp_path / name,
            edit(GENERATION, **settings),
            edit(TOKENIZER_CONFIG, chat_template="{{ messages[-1].content }}"),
        )
        given = arguments(command, model, folders.text, tmp_path / "out")
        done = ctxprune(*given, cwd=tmp_path, stdin=b"Hello\n")
        assert done.code == 0, done.err
        said.add(done.out)
    assert len(said) == 1


# What is no damage: odd, and taken.
ODD: dict[str, Damage] = {
    "an extra tensor": tensors(WEIGHTS, lambda found: found.update({"more": torch.ones(3)})),
    "no generation config": remove(GENERATION),
    "a padded vocabulary": tensors(
        WEIGHTS,
        lambda found: found.update(
            {
                name: torch.cat([found[name], torch.zeros(20, 32)])
                for name in ("model.embed_tokens.weight", "lm_head.weight")
            }
        ),
    ),
    "no end and no padding": edit(
        TOKENIZER_CONFIG, eos_token=ABSENT, bos_token=ABSENT, pad_token=ABSENT
    ),
    "a token for images alone": edit(
        TOKENIZER,
        added_tokens=[
            {
                "id": n,
                "content": content,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for n, content in ((0, "<|endoftext|>"), (300, "<image>"))
        ],
    ),
}


ODD_CASES = [(name, command) for name in ODD for command in ("convert", "generate", "info")]
ODD_CASES += [("no end and no padding", each) for each in ("eval", "inspect", "tune", "chat")]


@pytest.mark.parametrize(("name", "command"), ODD_CASES, ids=[f"{c}, {n}" for n, c in ODD_CASES])
def test_an_odd_folder_is_taken(name: str, command: str, folders: Folders, tmp_path: Path) -> None:
    source = folders.plain if command == "convert" else folders.tuned
    padded = [edit(CONFIG, vocab_size=320)] if name == "a padded vocabulary" else []
    model = copied(source, tmp_path / "m", ODD[name], *padded)
    if command == "chat":
        edit(TOKENIZER_CONFIG, chat_template="{{ messages[-1].content }}")(model)
    given = arguments(command, model, folders.text, tmp_path / "out")
    extra = ["A letter from his sister"] if command == "generate" else []
    done = ctxprune(*given, *extra, cwd=tmp_path, stdin=b"Hello\n")
    assert done.code == 0, done.err


def test_a_tokenizer_with_more_tokens_than_embeddings(folders: Folders, tmp_path: Path) -> None:
    model = copied(folders.plain, tmp_path / "m")
    larger = PreTrainedTokenizerFast.from_pretrained(model)
    larger.add_tokens(["harbourmaster", "quayside"])
    larger.add_tokens([f"word{n}" for n in range(300)])
    larger.save_pretrained(model)
    refused(ctxprune("convert", str(model), "--out", "out", cwd=tmp_path), "300 embeddings")
    mixed = copied(folders.tuned, tmp_path / "mixed")
    larger.save_pretrained(mixed)
    refused(ctxprune("generate", "--model", str(mixed), "a word7", cwd=tmp_path), "300 embeddings")


GGUF: dict[str, bytes] = {
    "empty": b"",
    "magic alone": b"GGUF",
    "no version": b"GGUF" + b"\0" * 8,
    "absurd counts": b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 1 << 60),
    "absurd key": b"GGUF" + struct.pack("<IQQQ", 3, 1, 1, 1 << 60),
    "many keys of nothing": b"GGUF" + struct.pack("<IQQ", 3, 0, 1 << 40) + b"\0" * 4096,
    "another file": b"PK\3\4" + b"\0" * 100,
    "half a header": b"GGUF" + struct.pack("<IQQ", 3, 2, 2) + struct.pack("<Q", 20) + b"general",
}


@pytest.mark.parametrize("name", GGUF)
def test_a_damaged_gguf_file(name: str, tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(GGUF[name])
    before = files_of(tmp_path)
    done = ctxprune("convert", "m.gguf", "--out", "out", cwd=tmp_path)
    refused(done, "`m.gguf` cannot be read as GGUF")
    assert files_of(tmp_path) == before


@pytest.mark.parametrize(
    ("put", "said"),
    [
        (pipe("m.gguf"), "is a pipe"),
        (directory("m.gguf"), "m.gguf"),
        (link("m.gguf", "/dev/zero"), "is a device"),
        (link("m.gguf", "m.gguf"), "cannot be read"),
    ],
)
def test_what_is_no_gguf_file(put: Damage, said: str, tmp_path: Path) -> None:
    put(tmp_path)
    refused(ctxprune("convert", "m.gguf", "--out", "out", cwd=tmp_path), said)


def test_an_adapter_of_peft_is_no_model(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    edit("adapter_config.json", base_model_name_or_path="gpt2", peft_type="LORA")(folder)
    refused(ctxprune("convert", str(folder), "--out", "out", cwd=tmp_path), "an adapter of peft")


def test_what_a_conversion_leaves_behind_is_said(folders: Folders, tmp_path: Path) -> None:
    done = ctxprune("convert", str(folders.tuned), "--out", "out", cwd=tmp_path)
    assert done.code == 0 and "is tuned to sparsity 0.5 already" in done.err


# Code of a stranger: each of these writes a file when it is run.
CODE = """
import pathlib
pathlib.Path({marker!r}).write_text("ran")
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class Config(LlamaConfig):
    model_type = "evil"
class Model(LlamaForCausalLM):
    config_class = Config
class Tokenizer(PreTrainedTokenizerFast):
    pass
def generate(model, *args, **kwargs):
    return model.generate(*args, **kwargs)
"""
MAP = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
HOSTILE: dict[str, list[Damage]] = {
    "a known type": [edit(CONFIG, auto_map=MAP)],
    "a type of its own": [edit(CONFIG, auto_map=MAP, model_type="evil")],
    "a tokenizer": [
        edit(TOKENIZER_CONFIG, auto_map={"AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"]})
    ],
    "an odd map": [edit(CONFIG, auto_map=[["evil.Config"]], model_type="evil")],
    "a map elsewhere": [
        edit(CONFIG, auto_map={"AutoConfig": "someone/else--evil.Config"}, model_type="evil")
    ],
}


def hostile(folders: Folders, tmp_path: Path, name: str, *, plain: bool) -> tuple[Path, Path]:
    """A folder with code, and the file that shows that it ran."""
    marker = tmp_path / "ran"
    code = CODE.format(marker=str(marker))
    model = copied(
        folders.plain if plain else folders.tuned,
        tmp_path / "m",
        write("evil.py", code),
        *HOSTILE[name],
    )
    (model / "custom_generate").mkdir(exist_ok=True)
    write("custom_generate/generate.py", code)(model)
    return model, marker


@pytest.mark.parametrize("command", ["convert", "architecture", *USING])
@pytest.mark.parametrize("name", HOSTILE)
def test_nothing_runs_and_nobody_is_asked(
    name: str, command: str, folders: Folders, tmp_path: Path
) -> None:
    model, marker = hostile(folders, tmp_path, name, plain=command in PLAIN)
    given = arguments(command, model, folders.text, tmp_path / "out")
    if command in ("bench", "tune"):
        given += ["--sparsity", "0.5"]
    done = ctxprune(*given, cwd=tmp_path, stdin=b"y\n" * 9)
    assert not marker.exists()
    assert "[y/N]" not in done.out + done.err
    if done.code:
        refused(done)
    elif name in ("a type of its own", "an odd map", "a map elsewhere"):
        raise AssertionError(f"{name} was loaded")


def test_code_of_a_folder_runs_where_it_is_trusted(folders: Folders, tmp_path: Path) -> None:
    model, marker = hostile(folders, tmp_path, "a type of its own", plain=True)
    given = ["convert", str(model), "--out", "out", "--trust-remote-code"]
    ctxprune(*given, cwd=tmp_path, env={"HF_MODULES_CACHE": str(tmp_path / "modules")})
    assert marker.exists()


TEMPLATES: dict[str, tuple[Any, str]] = {
    "it raises": ("{{ raise_exception('no') }}", "chat template refuses this"),
    "no jinja": ("{% for %}", "chat template refuses this"),
    "not closed": ("{{ messages", "chat template refuses this"),
    "an undefined name": ("{{ messages[0].a.b.c }}", "chat template refuses this"),
    "too far": ("{% for i in range(10**9) %}{% endfor %}", "chat template refuses this"),
    "it loops": (
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "it takes more than",
    ),
    "it escapes": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "chat template refuses this"),
    "a number": (7, "chat template"),
}


@pytest.mark.parametrize("command", ["chat", "generate"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_chat_template_that_will_not_do(
    name: str, command: str, folders: Folders, tmp_path: Path
) -> None:
    template, said = TEMPLATES[name]
    damage = edit(TOKENIZER_CONFIG, chat_template=template)
    model = copied(folders.tuned, tmp_path / "m", damage)
    given = arguments(command, model, folders.text, tmp_path / "out")
    extra = ["--chat"] if command == "generate" else []

    def hurry() -> None:
        from ctxprune.pruner import data

        data.PATIENCE = 0.2  # type: ignore[misc]

    done = ctxprune(*given, *extra, cwd=tmp_path, stdin=b"Hello\n", prepare=hurry)
    refused(done, said)


def test_a_broken_template_leaves_the_rest_alone(folders: Folders, tmp_path: Path) -> None:
    damage = edit(TOKENIZER_CONFIG, chat_template="{% for %}")
    model = copied(folders.tuned, tmp_path / "m", damage)
    given = arguments("generate", model, folders.text, tmp_path)
    assert ctxprune(*given, "--no-chat", cwd=tmp_path).code == 0


ADAPTERS: dict[str, bytes] = {
    "empty": b"",
    "no safetensors": b"hello" * 100,
    "no settings": struct.pack("<Q", 2) + b"{}",
    "settings are no JSON": struct.pack("<Q", 40)
    + json.dumps({"__metadata__": {"ctxprune": "{"}}).encode().ljust(40),
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_damaged_adapter(name: str, folders: Folders, tmp_path: Path) -> None:
    (tmp_path / "a.ctxprune").write_bytes(ADAPTERS[name])
    given = ["convert", str(folders.plain), "--adapter", "a.ctxprune", "--out", "out"]
    refused(ctxprune(*given, cwd=tmp_path), "`a.ctxprune`")
    assert list(files_of(tmp_path)) == ["a.ctxprune"]


def test_an_adapter_that_is_a_pipe(folders: Folders, tmp_path: Path) -> None:
    pipe("a.ctxprune")(tmp_path)
    given = ["convert", str(folders.plain), "--adapter", "a.ctxprune", "--out", "out"]
    refused(ctxprune(*given, cwd=tmp_path), "a.ctxprune")
