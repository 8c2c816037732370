"""vLLM with the plugin writes what our own `generate` writes; without `--hf-overrides` it is dense.

These run in an environment of their own: `make test-vllm`.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import engines
import pytest
from vllm.engine.arg_utils import EngineArgs

from ctxprune.pruner import load
from ctxprune.pruner.checkpoints.checkpoint import load_tokenizer
from ctxprune.pruner.errors import CtxpruneError
from ctxprune.pruner.vllm import ARCHITECTURE
from ctxprune.pruner.vllm.configuration import MODEL_TYPES

PROMPTS = (600, 333, 60)
TOKENS = 20
CHUNKS = {"max_num_batched_tokens": 256, "max_num_seqs": 8, "max_model_len": 1024}
EVICTING = {"architectures": [ARCHITECTURE]}


def test_without_overrides_it_is_the_dense_model(tmp_path: Path) -> None:
    # vLLM's own attention has no kernel for narrower heads on a CPU.
    folder = engines.write("llama", tmp_path / "llama", head_dim=32)
    asked = engines.prompts(PROMPTS)
    dense = engines.expected(folder, asked, TOKENS, sparsity=0.0)
    assert dense != engines.expected(folder, asked, TOKENS)
    with engines.Serving(folder, hf_overrides={}, **CHUNKS) as server:
        assert server.write(asked, TOKENS) == dense


@pytest.mark.parametrize("kind", MODEL_TYPES)
def test_three_prompts_at_once_in_chunks(kind: str, tmp_path: Path) -> None:
    """Chunks of 256 tokens of several prompts, and single tokens between them."""
    folder = engines.write(kind, tmp_path / kind)
    asked = engines.prompts(PROMPTS)
    with engines.Serving(folder, **CHUNKS) as server:
        assert server.write(asked, TOKENS) == engines.expected(folder, asked, TOKENS)


def test_settings_of_the_command_line(tmp_path: Path) -> None:
    """Another level and a cap; and nine prompts have three pages, which were used before."""
    folder = engines.write("llama", tmp_path / "llama")
    asked = engines.prompts([40 * n + 17 for n in range(9)])
    overrides = {**EVICTING, "ctxprune": {"sparsity": 0.5, "max_rows": 48}}
    options = {**CHUNKS, "num_gpu_blocks_override": 4}
    with engines.Serving(folder, hf_overrides=overrides, **options) as server:
        found = server.write(asked, TOKENS)
    assert found == engines.expected(folder, asked, TOKENS, sparsity=0.5, max_rows=48)
    assert found != engines.expected(folder, asked, TOKENS)


REFUSED: dict[str, tuple[Mapping[str, Any], Mapping[str, Any]]] = {
    "speculative decoding": (
        {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}},
        {},
    ),
    "a quantized KV cache": ({"kv_cache_dtype": "fp8"}, {}),
    "pipeline parallelism": ({"pipeline_parallel_size": 2}, {}),
    "LoRA adapters": ({"enable_lora": True}, {}),
    "pooling": ({"runner": "pooling"}, {}),
    "sparsity": ({}, {"sparsity": 1.5}),
    "sparsty": ({}, {"sparsty": 0.5}),
    "nothing is evicted": ({}, {"sparsity": 0.0}),
    "too small": ({}, {"max_rows": 2}),
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_cannot_be_done_is_refused_in_a_sentence(words: str, tmp_path: Path) -> None:
    options, settings = REFUSED[words]
    folder = engines.write("llama", tmp_path / "llama")
    overrides = {**EVICTING, "ctxprune": settings}
    args = EngineArgs(str(folder), skip_tokenizer_init=True, hf_overrides=overrides, **options)
    with pytest.raises(CtxpruneError, match=words):
        args.create_engine_config()


def test_a_model_without_gates_is_refused(tmp_path: Path) -> None:
    engines.zoo.tiny("llama").float().save_pretrained(tmp_path)
    args = EngineArgs(str(tmp_path), skip_tokenizer_init=True, hf_overrides=EVICTING)
    with pytest.raises(CtxpruneError, match="has no gates"):
        args.create_engine_config()


@contextmanager
def server(folder: Path, *options: str) -> Iterator[str]:
    """The address of vLLM's OpenAI server of a folder, which ends with the block."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    command += ["--served-model-name", "m", "--port", str(port), "--host", "127.0.0.1", *options]
    command += ["--dtype", "float32", "--kv-cache-memory-bytes", str(2**28)]
    address = f"http://127.0.0.1:{port}"
    process = subprocess.Popen(command, env={**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"})
    try:
        for _ in range(300):
            assert process.poll() is None, "the server has ended"
            try:
                urlopen(f"{address}/health", timeout=5).close()
                break
            except OSError:
                time.sleep(1)
        yield address
    finally:
        process.terminate()
        process.wait(60)


def completion(address: str, prompt: str) -> str:
    """What a server writes, greedily."""
    body = {"model": "m", "prompt": prompt, "max_tokens": TOKENS, "temperature": 0}
    headers = {"Content-Type": "application/json"}
    request = Request(f"{address}/v1/completions", json.dumps(body).encode(), headers)
    with urlopen(request, timeout=300) as answer:
        text: str = json.load(answer)["choices"][0]["text"]
    return text


@pytest.mark.parametrize("replicas", [1, 2])
def test_nine_clients_of_the_openai_server(replicas: int, embedded_folder: Path) -> None:
    """A replica has three pages. Before it is tuned a checkpoint has no levels, but takes a cap."""
    tokenizer, model = load_tokenizer(embedded_folder), load(embedded_folder, max_rows=64)
    story = "The captain walked slowly along the empty shore and counted the boats. "
    prompts = [f"Chapter {n}. " + story * (1 + n % 4 * 3) for n in range(9)]
    expected = []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        made = model.generate(ids, max_new_tokens=TOKENS, do_sample=False)  # type: ignore[operator]
        expected.append(tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True))
    overrides = json.dumps({**EVICTING, "ctxprune": {"max_rows": 64}})
    options = ["--num-gpu-blocks-override", "4", "--max-num-batched-tokens", "256"]
    options += ["--data-parallel-size", str(replicas)]
    with (
        server(embedded_folder, "--hf-overrides", overrides, *options) as address,
        ThreadPoolExecutor(len(prompts)) as clients,
    ):
        found = list(clients.map(lambda prompt: completion(address, prompt), prompts))
    assert found == expected
