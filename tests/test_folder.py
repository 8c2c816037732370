"""A model folder where people run models: trusted it evicts, else it is dense, in every tool."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from conftest import TEXT, tiny_model
from gguf import GGUFWriter
from huggingface_hub import ModelCard
from local_hub import local_hub
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file
from test_tune import run_config
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from ctxprune.evals.report.merged import merge
from ctxprune.evals.report.on_card import on_card
from ctxprune.pruner import words
from ctxprune.pruner.checkpoints import adapter, card, checkpoint, interop
from ctxprune.pruner.checkpoints.checkpoint import GATES, SETTINGS, load
from ctxprune.pruner.checkpoints.convert import convert
from ctxprune.pruner.checkpoints.export import export
from ctxprune.pruner.engine.handle import handle_of
from ctxprune.pruner.errors import CtxpruneError
from ctxprune.pruner.training.tune import tune
from ctxprune.pruner.vllm import ARCHITECTURE

Make = Callable[[str], Path]
NEW = 24
CODE = (interop.MODELING, interop.GENERATE)


def read(folder: Path) -> tuple[Any, Tensor]:
    """The tokenizer of a folder, and a text in its tokens."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return tokenizer, tokenizer(TEXT, return_tensors="pt").input_ids


def written(model: Any, ids: Tensor) -> list[int]:
    """What a model writes, greedily."""
    found = model.generate(ids, max_new_tokens=NEW, do_sample=False, pad_token_id=0)
    return list(found[0, ids.shape[1] :].tolist())


def test_a_trusting_tool_says_what_is_dropped(exported: Make) -> None:
    folder = exported("llama")
    _, ids = read(folder)
    trust: dict[str, Any] = {"trust_remote_code": True}
    chosen: list[dict[str, Any]] = [
        {"sparsity": 0.5},
        {"sparsity": 0.0},
        {"sparsity": 0.7, "policy": "knorm"},
        {"policy": "window", "max_rows": 64},
    ]
    for options in chosen:
        model = AutoModelForCausalLM.from_pretrained(folder, **trust, **options)
        own = load(folder, **options)
        assert model.ctxprune.dial == handle_of(own).dial
        with torch.no_grad():
            assert torch.equal(model(ids).logits, own(ids).logits)
    # Texts shorter than what it was tuned at: the level is met where they are announced.
    few, rows = ids[:, :40], []
    for context in (None, 40):
        model = AutoModelForCausalLM.from_pretrained(folder, **trust, context=context)
        cache = model.ctxprune.cache()
        model(few, past_key_values=cache)
        rows.append(cache.rows)
    own.ctxprune.use("gate", 0.5, context=40)
    cache = own.ctxprune.cache()
    own(few, past_key_values=cache)
    assert rows[0] - 5 > rows[1] == cache.rows
    with pytest.raises(CtxpruneError, match="less than 1"):
        AutoModelForCausalLM.from_pretrained(folder, **trust, sparsity=1.5)
    model, info = AutoModelForCausalLM.from_pretrained(folder, **trust, output_loading_info=True)
    assert model.ctxprune.sparsity == 0.5 and not info["missing_keys"]


def test_other_dtypes_and_devices_of_parts(exported: Make) -> None:
    """Gates are where the model is, and compute in float32 at least."""
    folder = exported("llama")
    _, ids = read(folder)
    model = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, dtype=torch.bfloat16, device_map="auto"
    )
    assert {p.dtype for p in model.ctxprune.gates.parameters()} == {torch.float32}
    assert len(written(model, ids.to(model.device))) == NEW


def test_resaving_keeps_everything(exported: Make, tmp_path: Path) -> None:
    """Byte for byte, once and again; what is saved where the code was not trusted is dense."""
    folder = exported("gpt2")
    tokenizer, ids = read(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    for again in (tmp_path / "first", tmp_path / "second"):
        model.save_pretrained(again)
        for name in ("config.json", "model.safetensors", interop.INDEX, *CODE, GATES, SETTINGS):
            assert (again / name).read_bytes() == (folder / name).read_bytes(), name
        assert written(load(again), ids) == written(model, ids)
        model = AutoModelForCausalLM.from_pretrained(again, trust_remote_code=True)
    with pytest.raises(CtxpruneError, match="save it, then|not pushed"):
        model.save_pretrained(tmp_path / "third", push_to_hub=True)
    wrapped = get_peft_model(model, LoraConfig(r=4, target_modules=["c_attn"]))
    wrapped.save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter" / GATES).exists()
    wrapped.merge_and_unload().save_pretrained(tmp_path / "merged")
    assert written(load(tmp_path / "merged"), ids) == written(load(folder), ids)


def test_a_folder_whose_gates_are_gone(exported: Make) -> None:
    folder = exported("llama")
    (folder / GATES).unlink()
    with pytest.raises(CtxpruneError, match="has no gates"):
        AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)


def test_the_files_of_a_folder(
    tiny_folder: Make, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Converted, tuned, exported: gates are apart, files readable, code is in two small files."""
    before = os.umask(0o022)
    try:
        converted = tiny_folder("llama")
        tuned = tune(converted, tmp_path / "tuned", run_config(text_file, train="lora"))
        folders = [converted, tuned, export(tuned, tmp_path / "exported")]
    finally:
        os.umask(before)
    for folder in folders:
        index = json.loads((folder / interop.INDEX).read_text())
        with safe_open(folder / "model.safetensors", framework="pt") as weights:
            names = set(weights.keys())
        assert set(index["weight_map"]) == names
        assert set(index["weight_map"].values()) == {"model.safetensors"}
        size = sum(t.nbytes for t in load_file(folder / "model.safetensors").values())
        assert index["metadata"]["total_size"] == size
        files = [path for path in folder.rglob("*") if path.is_file()]
        assert {path.stat().st_mode & 0o777 for path in files} == {0o644}
        assert not (folder / "adapter_config.json").exists()
        code = {str(path.relative_to(folder)) for path in files if path.suffix == ".py"}
        assert code == set(CODE)
    for name in (adapter.FILE, "peft/adapter_config.json", "peft/adapter_model.safetensors"):
        assert (folders[2] / name).read_bytes() == (tuned / name).read_bytes()


def test_weights_in_several_files_keep_their_index(exported: Make, tmp_path: Path) -> None:
    folder = exported("llama")
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    model.save_pretrained(tmp_path / "shards", max_shard_size="40KB")
    index = json.loads((tmp_path / "shards" / interop.INDEX).read_text())
    assert len(set(index["weight_map"].values())) > 2
    assert GATES not in index["weight_map"].values()
    _, ids = read(folder)
    assert written(load(tmp_path / "shards"), ids) == written(model, ids)


def test_settings_of_generation_and_the_template_are_kept(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    model = tiny_model("llama")
    model.generation_config.repetition_penalty = 1.25
    model.generation_config.eos_token_id = [0, 5]
    model.save_pretrained(source)
    other = AutoTokenizer.from_pretrained(_saved(tokenizer, tmp_path / "tokens"))
    other.chat_template = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
    other.add_special_tokens({"additional_special_tokens": ["<|user|>"]}, False)
    other.save_pretrained(source)
    out = export(convert(str(source), tmp_path / "made", {"rank": 4}), tmp_path / "out")
    again, config = AutoTokenizer.from_pretrained(out), load(out).generation_config
    assert config.repetition_penalty == 1.25 and config.eos_token_id == [0, 5]
    said = [{"role": "user", "content": "The letter"}]
    assert again.apply_chat_template(said) == other.apply_chat_template(said)
    assert again.tokenize("<|user|>") == ["<|user|>"] and again.eos_token == other.eos_token


def _saved(tokenizer: PreTrainedTokenizerFast, folder: Path) -> Path:
    tokenizer.save_pretrained(folder)
    return folder


def test_dtypes(dense_folder: Make, tmp_path: Path) -> None:
    """The source's own unless another is asked for, from conversion to export."""
    dense, half = dense_folder("llama"), tmp_path / "half"
    model = AutoModelForCausalLM.from_pretrained(dense).to(torch.bfloat16)
    model.save_pretrained(half)
    AutoTokenizer.from_pretrained(dense).save_pretrained(half)

    def dtype_of(folder: Path) -> str:
        kinds = {str(t.dtype) for t in load_file(folder / "model.safetensors").values()}
        assert kinds == {"torch." + json.loads((folder / "config.json").read_text())["dtype"]}
        return kinds.pop()

    for source, own in ((dense, "torch.float32"), (half, "torch.bfloat16")):
        made = convert(str(source), tmp_path / f"made-{own}", {"rank": 4})
        assert dtype_of(made) == own
        weights = load_file(source / "model.safetensors")
        kept = load_file(export(made, tmp_path / f"out-{own}") / "model.safetensors")
        assert all(torch.equal(kept[name], weight) for name, weight in weights.items())
        other = convert(str(source), tmp_path / f"other-{own}", {"rank": 4}, dtype="float16")
        assert dtype_of(other) == "torch.float16"
        again = export(made, tmp_path / f"again-{own}", dtype="bfloat16")
        assert dtype_of(again) == "torch.bfloat16"
        assert load_file(again / GATES)["0.query.weight"].dtype == torch.float32
    with pytest.raises(CtxpruneError, match="unknown dtype"):
        convert(str(dense), tmp_path / "no", {}, dtype="int3")


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_peft_loads_what_lora_tuned(
    tiny_folder: Make, dense_folder: Make, text_file: Path, tmp_path: Path, family: str
) -> None:
    """Dense, with the logits of the tuned model; also where a run followed on another."""
    untuned = tiny_folder(family)
    tuned = tune(untuned, tmp_path / "a", run_config(text_file, train="lora"))
    twice = tune(tuned, tmp_path / "b", run_config(text_file, train="lora", lora_rank=8, seed=1))
    source = dense_folder(family)
    made = convert(str(source), tmp_path / "c", {}, adapter=[tuned / adapter.FILE])
    ids = torch.arange(1, 90)[None]
    # What an earlier run added is in the file alone, which is rounded to bfloat16.
    for folder, rounding in ((tuned, 1e-5), (twice, 2e-2), (made, 1e-5)):
        base = AutoModelForCausalLM.from_pretrained(source)
        with torch.no_grad():
            before = base(ids).logits
            peft = PeftModel.from_pretrained(base, folder / adapter.PEFT).eval()
            expected = load(folder, sparsity=0.0)(ids).logits
            torch.testing.assert_close(peft(ids).logits, expected, atol=rounding, rtol=0)
        assert (before - expected).abs().max() > 5e-2
    gates = tune(untuned, tmp_path / "d", run_config(text_file, train="gates"))
    assert not (gates / adapter.PEFT).exists()


def test_the_card_has_the_metadata_of_the_hub(
    dense_folder: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = dense_folder("llama")
    (source / "README.md").write_text(
        "---\nlicense: apache-2.0\nlanguage: [en, de]\nbase_model: someone/base\n"
        "datasets: [their/text]\ntags: [old]\n---\n\n# Theirs\n"
    )
    made = convert(str(source), tmp_path / "made", {"rank": 4})
    settings = json.loads((made / SETTINGS).read_text())
    settings["provenance"]["tune"] = {"data": "wiki/text:raw", "sparsity": 0.5}
    (made / SETTINGS).write_text(json.dumps(settings))
    level: dict[str, Any] = {"sparsity_requested": 0.5, "sparsity": 0.51, "cache_sparsity": 0.6}
    level |= {
        "perplexity": 12.5,
        "tasks": {"piqa": {"acc": 0.75, "stderr": 0.01, "sparsity": 0.5, "n": 4}},
    }
    level["tokens"] = 63
    results = {"context": 64, "text": "/home/someone/book.txt", "policy": "gate", "levels": [level]}
    results["model"] = str(tmp_path)
    out = export(made, tmp_path / "named", **on_card(merge([("r.json", results)])))
    data = ModelCard.load(out / "README.md").data
    assert (data.license, data.language, data.base_model) == (
        "apache-2.0",
        ["en", "de"],
        "someone/base",
    )
    assert data.datasets == ["wiki/text"] and data.pipeline_tag == "text-generation"
    assert data.library_name == "transformers" and data.tags == ["ctxprune", "kv-cache"]
    assert data.model_name == "named"
    said = {(e.dataset_name, e.metric_name): e.metric_value for e in data.eval_results}
    assert said == {
        ("book.txt", "perplexity, gate at sparsity 0.5"): 12.5,
        ("piqa", "acc, gate at sparsity 0.5"): 0.75,
    }
    words = (out / "README.md").read_text()
    assert "/home/someone" not in words and str(tmp_path) not in words
    assert "another project" in words and "trust_remote_code=True" in words
    assert f'vllm serve DIR --hf-overrides \'{{"architectures": ["{ARCHITECTURE}"]}}\'' in words


def test_the_header_of_a_gguf_file_is_a_card_too(tmp_path: Path) -> None:
    path = tmp_path / "base.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_license("mit")
    writer.add_languages(["en"])
    writer.add_base_model_count(1)
    writer.add_base_model_repo_url(0, "https://huggingface.co/someone/base")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    facts = {"license": "mit", "language": ["en"], "base_model": "someone/base"}
    assert card.facts_of(path) == facts
    path.write_bytes(b"GGUF but not really")
    assert card.facts_of(path) == {}


@pytest.mark.parametrize(
    "name",
    [
        "a<b>bold</b>",
        "a [link](http://x)",
        "a\n# head",
        "a | b | c",
        "a `code` *b* __c__",
        "a\x1b[31m\x00",
        "---\nlicense: mit",
        "![i](x) &lt;",
    ],
)
def test_names_on_a_card_are_words(dense_folder: Make, tmp_path: Path, name: str) -> None:
    """Rendered by a Markdown reader, a name is the text that it was, in one line."""
    from markdown_it import MarkdownIt

    made = convert(str(dense_folder("gpt2")), tmp_path / "made", {"rank": 4})
    about = checkpoint.describe(made)
    about["provenance"] = {"base": name, "tune": {"data": name}}
    level = {"sparsity_requested": 0.5, "sparsity": 0.5, "cache_sparsity": 0.5, "perplexity": 9.5}
    level = {**level, "tokens": 63, "tasks": {name: {"acc": 0.5, "sparsity": 0.5}}}
    results = {"model": name, "context": 64, "text": name, "policy": name, "levels": [level]}
    shown = card.model_card(about, name, **on_card(merge([(name, results)])))
    again = ModelCard(str(shown))
    assert again.data.license is None and again.data.eval_results[0].metric_value == 9.5
    tokens = MarkdownIt("commonmark").enable("table").parse(again.text)
    heads = [tokens[i + 1] for i, token in enumerate(tokens) if token.type == "heading_open"]
    found = [each.content for each in heads[1:]]
    assert found[:4] == ["Use", "Training", "Measured", "Perplexity"] and len(found) == 7
    children = heads[0].children or []
    assert {each.type for each in children} <= {"text", "text_special"}
    plain = words.line(name)
    assert "".join(each.content for each in children).startswith(plain)
    inline = [kid.type for token in tokens for kid in token.children or []]
    assert not {"html_inline", "image", "link_open", "strong_open", "em_open"} & set(inline)
    assert not any(token.type == "html_block" for token in tokens)


HUB = """
import sys
from pathlib import Path
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner
from ctxprune import load
from ctxprune.cli.main import app
from ctxprune.pruner.errors import CtxpruneError

def run(*words):
    result = CliRunner().invoke(app, [str(word) for word in words])
    if isinstance(result.exception, CtxpruneError):
        print(result.exception.message)
    else:
        assert result.exit_code == 0, (result.output, result.exception)

folder, out, source = map(Path, sys.argv[1:])
name = "someone/model"
run("export", "--model", folder, "--out", out, "--push-to-hub", name)
ids = torch.arange(1, 90)[None]
kinds = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True)
with torch.no_grad():
    own, there, trusted = load(out)(ids).logits, load(name)(ids).logits, kinds(ids).logits
assert torch.equal(own, there) and torch.equal(own, trusted)
made = out.with_name("made")
run("convert", source, "--adapter", name, "--out", made)
assert (made / "ctxprune.safetensors").read_bytes() == (out / "ctxprune.safetensors").read_bytes()
run("convert", name, "--out", out.with_name("again"))
run("convert", source, "--adapter", "someone/else", "--out", "no")
run("convert", "someone/else", "--out", "no")
try:
    load("someone/else")
except CtxpruneError as error:
    print(error.message)
"""


def test_a_folder_goes_to_the_hub_and_comes_back(
    tiny_folder: Make, dense_folder: Make, text_file: Path, tmp_path: Path
) -> None:
    """Through the hub's own library and protocol, on a stand-in; in a process with its address."""
    tuned = tune(tiny_folder("llama"), tmp_path / "tuned", run_config(text_file, train="lora"))
    with local_hub("someone/model") as hub:
        told = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": "hf_none"}
        folders = [str(tuned), str(tmp_path / "out"), str(dense_folder("llama"))]
        done = subprocess.run(
            [sys.executable, "-c", HUB, *folders],
            env={**os.environ, **told},
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
    assert done.returncode == 0, done.stderr
    refused = done.stdout.splitlines()
    assert len(refused) == 3 and all("fetched from the hub" in line for line in refused)
    sent = {str(p.relative_to(tmp_path / "out")): p for p in (tmp_path / "out").rglob("*.*")}
    assert {n for n, p in sent.items() if p.is_file()} <= hub.files.keys()
    assert all(sent[name].read_bytes() == content for name, content in hub.files.items())


def test_offline_a_name_is_one_sentence(
    tiny_folder: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, name = tiny_folder("gpt2"), "someone/not-here"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    calls: list[Callable[[], object]] = [
        lambda: load(name),
        lambda: convert(name, tmp_path / "a", {}),
        lambda: convert(None, tmp_path / "b", {}, adapter=[name]),
        lambda: export(folder, tmp_path / "c", repository=name),
    ]
    for call in calls:
        with pytest.raises(CtxpruneError, match="hub") as caught:
            call()
        assert "\n" not in caught.value.message
    with pytest.raises(CtxpruneError, match="no name of a repository"):
        export(folder, tmp_path / "d", repository="a/b/c")
    assert not (tmp_path / "d").exists()
