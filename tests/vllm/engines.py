"""Tiny models of each type, and the greedy tokens of vLLM, and of our own `generate`."""

from __future__ import annotations

import gc
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import zoo

# Before vLLM is imported: one process, which stays where it is put, and no network.
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",
    "VLLM_NO_USAGE_STATS": "1",
}

from ctxprune.pruner import load
from ctxprune.pruner.checkpoints import checkpoint
from ctxprune.pruner.config import PruneConfig
from ctxprune.pruner.engine.handle import new_gates
from ctxprune.pruner.vllm import ARCHITECTURE


def write(kind: str, out: Path, **settings: int) -> Path:
    """The folder of a tiny model, whose gates decide by content."""
    configuration = zoo.configuration(kind)
    # GPT-2 has another name for it, and takes this one too.
    for name, value in {"max_position_embeddings": 1024, **settings}.items():
        setattr(configuration, name, value)
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


class Serving:
    """A vLLM of a folder in this process, that evicts unless `hf_overrides` says otherwise."""

    def __init__(self, folder: Path, **options: Any) -> None:
        from vllm import LLM

        chosen = {
            "dtype": "float32",
            "enforce_eager": True,
            "hf_overrides": {"architectures": [ARCHITECTURE]},
            "skip_tokenizer_init": True,
            "kv_cache_memory_bytes": 2**28,
            **options,
        }
        self.llm: Any = LLM(str(folder), **chosen)

    def __enter__(self) -> Serving:
        return self

    def __exit__(self, *_: object) -> None:
        from vllm.distributed import cleanup_dist_env_and_memory

        # It takes its group of processes with it, which must not be that of the next one.
        self.llm = None
        gc.collect()
        cleanup_dist_env_and_memory()

    def write(self, asked: Sequence[Sequence[int]], tokens: int) -> list[list[int]]:
        """What it writes to all prompts at once, so many tokens each, greedily."""
        given = [{"prompt_token_ids": list(ids)} for ids in asked]
        made = self.llm.generate(given, greedy(tokens), use_tqdm=False)
        return [list(each.outputs[0].token_ids) for each in made]


def greedy(tokens: int) -> Any:
    """How vLLM is to write so many tokens."""
    from vllm import SamplingParams

    return SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False)


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
