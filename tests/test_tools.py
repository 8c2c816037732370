"""One exported folder in every tool: trusted it evicts, else it is dense, with our own text."""

from __future__ import annotations

import importlib
import json
import re
import sys
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import sleep
from typing import Any

import pytest
import torch
import transformers
from conftest import TEXT
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from optimum.exporters.tasks import TasksManager
from peft import LoraConfig, PeftModel, get_peft_model
from test_folder import NEW, read, written
from transformers import AutoModelForCausalLM, pipeline
from transformers.cli.serve import Serve
from typer.testing import CliRunner

from ctxprune.cli.main import app
from ctxprune.pruner.checkpoints.checkpoint import load

Make = Callable[[str], Path]
GREEDY: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False}
SERVE_MD = Path(__file__).parents[1] / "docs/guide/serve.md"


def text_of(folder: Path, model: Any) -> str:
    """What a model writes after `TEXT`, greedily."""
    tokenizer, ids = read(folder)
    return str(tokenizer.decode(written(model, ids), skip_special_tokens=True))


def named_class(folder: Path) -> Any:
    """The class that `transformers serve` loads: by the name in the configuration."""
    config = json.loads((folder / "config.json").read_text())
    return getattr(transformers, config["architectures"][0])


def by_auto_class(folder: Path, **trust: bool) -> str:
    return text_of(folder, AutoModelForCausalLM.from_pretrained(folder, **trust))


def by_class_name(folder: Path, **trust: bool) -> str:
    return text_of(folder, named_class(folder).from_pretrained(folder, **trust))


def by_pipeline(folder: Path, **trust: bool) -> str:
    found: Any = pipeline("text-generation", str(folder), **trust)(
        TEXT, return_full_text=False, **GREEDY
    )
    return str(found[0]["generated_text"])


@contextmanager
def serving(folder: Path, **options: bool) -> Iterator[str]:
    """The address of `transformers serve`, inside."""
    server = Serve(
        str(folder), host="127.0.0.1", port=0, device="cpu", non_blocking=True, **options
    )
    try:
        while not server.server.started:
            sleep(0.01)
        port = server.server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}/v1/completions"
    finally:
        server.kill_server()


def asked(address: str, folder: Path, *, stream: bool) -> str:
    """The text that a server completes, whole or in parts."""
    body = {"model": str(folder), "prompt": TEXT, "max_tokens": NEW, "stream": stream}
    request = urllib.request.Request(
        address, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as reply:
        lines = reply.read().decode().split("\n\n") if stream else [reply.read().decode()]
    parts = [json.loads(line.removeprefix("data: ")) for line in lines if line.strip()]
    return "".join(part["choices"][0]["text"] for part in parts)


def by_server(folder: Path, **options: bool) -> str:
    with serving(folder, **options) as address:
        whole, parts = (asked(address, folder, stream=stream) for stream in (False, True))
    assert whole == parts
    return whole


def by_lm_eval(folder: Path, **trust: bool) -> str:
    """As its command line makes the model and asks it."""
    said = "".join(f",{name}={value}" for name, value in trust.items())
    model = get_model("hf").create_from_arg_string(f"pretrained={folder}{said}", {"device": "cpu"})
    options = {"until": [], "do_sample": False, "max_gen_toks": NEW}
    request = Instance("generate_until", {}, (TEXT, options), 0)
    return str(model.generate_until([request], disable_tqdm=True)[0])


def by_peft(folder: Path, **trust: bool) -> str:
    """With an adapter on top, which changes nothing yet."""
    model = AutoModelForCausalLM.from_pretrained(folder, **trust)
    names = ["c_attn"] if model.config.model_type == "gpt2" else ["q_proj"]
    adapter = folder.with_name("on-top")
    get_peft_model(model, LoraConfig(r=4, target_modules=names)).save_pretrained(adapter)
    base = AutoModelForCausalLM.from_pretrained(folder, **trust)
    return text_of(folder, PeftModel.from_pretrained(base, adapter).eval())


def by_optimum(folder: Path, **trust: bool) -> str:
    """As its exporters load a model."""
    model = TasksManager.get_model_from_task("text-generation", str(folder), **trust)
    return text_of(folder, model)


# By the lines of the table in docs/guide/serve.md; `by_class_name` is how the server loads.
TOOLS: dict[str, list[Callable[..., str]]] = {
    "`AutoModelForCausalLM`, `pipeline`": [by_auto_class, by_class_name, by_pipeline],
    "`transformers serve`": [by_server],
    "`lm_eval --model hf`": [by_lm_eval],
    "peft on top of it": [by_peft],
    "optimum": [by_optimum],
}
# The other lines, and the tests that they have.
ELSEWHERE = {
    "Python": "test_folder.py:test_a_folder_goes_to_the_hub_and_comes_back",
    "vLLM": "vllm/test_vllm.py:test_",
    "peft, the adapter alone": "test_folder.py:test_peft_loads_what_lora_tuned",
    "anything that reads safetensors": "test_folder.py:test_the_files_of_a_folder",
}


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_every_tool_evicts_where_it_trusts_and_is_dense_where_not(
    exported: Make, family: str
) -> None:
    folder = exported(family)
    evicting, dense = (text_of(folder, load(folder, sparsity=s)) for s in (0.5, 0.0))
    assert evicting != dense
    for tool in [tool for tools in TOOLS.values() for tool in tools]:
        assert tool(folder, trust_remote_code=False) == dense, tool
        assert tool(folder, trust_remote_code=True) == evicting, tool


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_our_own_command_writes_the_same(exported: Make, family: str) -> None:
    """It meets the level on the request's own length, which others are told as `context`."""
    folder = exported(family)
    tokenizer, ids = read(folder)
    length = ids.shape[1] + NEW
    for sparsity in (0.5, 0.0):
        command = ["generate", "--model", str(folder), "--sparsity", str(sparsity)]
        command += ["--max-new-tokens", str(NEW), "--json", TEXT]
        found = json.loads(CliRunner().invoke(app, command).stdout)
        model = AutoModelForCausalLM.from_pretrained(
            folder, trust_remote_code=True, sparsity=sparsity, context=length
        )
        whole = [*ids[0].tolist(), *written(model, ids)]
        assert found["texts"] == [tokenizer.decode(whole, skip_special_tokens=True)]


def test_each_line_of_the_table_has_a_test() -> None:
    rows = re.findall(r"^\| (.+?) \| (?:yes|no) \|", SERVE_MD.read_text(encoding="utf-8"), re.M)
    assert rows and set(rows) == TOOLS.keys() | ELSEWHERE.keys()
    for where in ELSEWHERE.values():
        name, _, test = where.partition(":")
        assert f"def {test}" in (Path(__file__).parent / name).read_text(encoding="utf-8")


def test_without_the_package_a_sentence_says_what_it_is(
    exported: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody is told to install what PyPI has under our name, and dense it works."""
    folder = exported("llama")
    name = "ctxprune.pruner.checkpoints.remote"
    importlib.import_module(name)
    monkeypatch.setitem(sys.modules, name, None)
    for kind in (AutoModelForCausalLM, named_class(folder)):
        with pytest.raises(ImportError) as caught:
            kind.from_pretrained(folder, trust_remote_code=True)
        said = str(caught.value)
        assert "another project" in said and "pip install" not in said
    assert by_auto_class(folder)


def test_lm_eval_takes_the_level_as_a_model_argument(
    exported: Make, task_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By lm-eval's own command line; requests are as long as the context, so that rows leave."""
    from lm_eval.__main__ import cli_evaluate

    folder, seen = exported("llama"), []
    before = torch.nn.Module.__call__

    def note(module: Any, *args: Any, **kwargs: Any) -> Any:
        if hasattr(module, "ctxprune"):
            seen.append(module.ctxprune.dial)
        return before(module, *args, **kwargs)

    monkeypatch.setattr(torch.nn.Module, "__call__", note)
    tasks = task_folder / "yaml"
    tasks.mkdir()
    (tasks / "boats.yaml").write_text(
        "task: boats\ndataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {task_folder / 'piqa.jsonl'}}}}}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{goal}}'\n"
        "doc_to_choice: '{{[sol1, sol2]}}'\ndoc_to_target: label\n"
        "metric_list: [{metric: acc}]\n"
    )
    chosen = f"pretrained={folder},trust_remote_code=True,sparsity=0.5,policy=knorm"
    command = ["lm_eval", "run", "--model", "hf", "--device", "cpu", "--include_path", str(tasks)]
    command += ["--tasks", "boats", "--model_args", chosen, "--limit", "2"]
    monkeypatch.setattr(sys, "argv", command)
    cli_evaluate()
    assert set(seen) == {"`knorm` at sparsity 0.5"} and len(seen) >= 4
