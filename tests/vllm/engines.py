"""Tiny models of each type, and greedy tokens of vLLM and of our own `generate`. One process."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo

# Before vLLM is imported: one process, one thread, a small pool, no network.
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
}

from ctxprune.pruner import load
from ctxprune.pruner.checkpoints import checkpoint
from ctxprune.pruner.config import PruneConfig
from ctxprune.pruner.engine.handle import new_gates
from ctxprune.pruner.vllm import ARCHITECTURE


@pytest.fixture
def folder_of(tmp_path: Path) -> Callable[[str], Path]:
    """Make the folder of a tiny model, whose gates decide by content."""

    def make(kind: str) -> Path:
        return write(kind, tmp_path / kind)

    return make


def write(kind: str, out: Path) -> Path:
    """The same, at a place."""
    configuration = zoo.configuration(kind)
    for name in ("max_position_embeddings", "n_positions"):
        if name in configuration.to_dict():
            setattr(configuration, name, 1024)
    model = zoo.filled(configuration).float().eval()
    config = PruneConfig(rank=8, protect_first=2, protect_recent=3, context=256, tuned=0.8)
    gates = new_gates(model, config)
    shares = {0.8: (0.2,) * len(gates)}
    config = PruneConfig(**{**vars(config), "levels": shares})
    torch.manual_seed(1)
    for gate in gates:
        torch.nn.init.normal_(gate.key.weight, std=0.15)
    with checkpoint.staged(out, force=False) as target:
        checkpoint.write(target, model, gates, config, None, {})
    return out


def prompts(lengths: Sequence[int], vocabulary: int = zoo.VOCABULARY) -> list[list[int]]:
    """Random ids, without those of special tokens."""
    draw = torch.Generator().manual_seed(0)
    return [torch.randint(5, vocabulary, (n,), generator=draw).tolist() for n in lengths]


@contextmanager
def serving(folder: Path, **options: Any) -> Iterator[Callable[..., list[list[int]]]]:
    """A vLLM of a folder, that evicts unless `hf_overrides` says otherwise.

    Gives a function: what it writes to all prompts at once, so many tokens each, greedily.
    """
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    chosen = {
        "dtype": "float32",
        "enforce_eager": True,
        "hf_overrides": {"architectures": [ARCHITECTURE]},
        "skip_tokenizer_init": True,
        **options,
    }
    llm: Any = LLM(str(folder), **chosen)

    def write(asked: Sequence[Sequence[int]], tokens: int) -> list[list[int]]:
        greedy = SamplingParams(
            temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False
        )
        given = [{"prompt_token_ids": list(ids)} for ids in asked]
        return [list(each.outputs[0].token_ids) for each in llm.generate(given, greedy)]

    try:
        yield write
    finally:
        # It takes its processes' group with it, which must not be that of the next one.
        del llm, write
        gc.collect()
        cleanup_dist_env_and_memory()


def expected(
    folder: Path, asked: Sequence[Sequence[int]], tokens: int, **options: Any
) -> list[list[int]]:
    """What our own `generate` writes to each prompt alone."""
    model: Any = load(folder, **options)
    found = []
    for ids in asked:
        given = torch.tensor([list(ids)])
        made = model.generate(
            given, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, use_cache=True
        )
        found.append(made[0, len(ids) :].tolist())
    return found
