"""Heads on two ranks: both drop the rows that one rank with all heads drops."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing import spawn

from ctxprune.pruner.config import PruneConfig
from ctxprune.pruner.decoder import Sight
from ctxprune.pruner.engine.pool import Batch, Pool
from ctxprune.pruner.engine.weights import Logits
from ctxprune.pruner.gate import Gate
from ctxprune.pruner.policies import Request
from ctxprune.pruner.policies.gate import make
from ctxprune.pruner.vllm.ranks import RankedGatePolicy

RANKS, WIDTH, TOKENS = 2, 32, 150


def attended(rank: int, ranks: int) -> Tensor:
    """(tokens, own heads, 16), of a rank with its part of four heads of queries and two of keys."""
    torch.manual_seed(0)
    gate = Gate(WIDTH, 8).double().requires_grad_(False)
    torch.nn.init.normal_(gate.key.weight, std=0.15)
    config = PruneConfig(rank=8, context=128, levels={0.8: (0.2,)}, attention_bonus=2.0)
    policy = make(Request(0.8, (128,), config, [gate]))
    if ranks > 1:
        policy = RankedGatePolicy(policy, total, ranks)
    query, key, value = (torch.randn(TOKENS, n, 16, dtype=torch.float64) for n in (4, 2, 2))
    hidden = torch.randn(TOKENS, WIDTH, dtype=torch.float64)
    own = [tensor.chunk(ranks, dim=1)[rank] for tensor in (query, key, value)]
    like = tuple(tensor[:1].transpose(0, 1)[None] for tensor in own)
    pool = Pool(policy, 0, Sight(), Logits(0.25), like, WIDTH, TOKENS)
    pool.bind(torch.zeros(2, pool.nbytes, dtype=torch.int8))
    outputs, seen = [], 0
    for count in (70, *[1] * 40, 40):
        part = slice(seen, seen + count)
        batch = Batch(torch.tensor([0, count]), torch.tensor([seen]), torch.tensor([1]))
        outputs.append(pool.attend(batch, *(tensor[part] for tensor in own), hidden[part]))
        seen += count
    return torch.cat(outputs)


def total(tensor: Tensor) -> Tensor:
    """The sum over all ranks."""
    summed = tensor.clone()
    dist.all_reduce(summed)
    return summed


def work(rank: int, folder: str) -> None:
    """One of the ranks."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=RANKS)
    torch.save(attended(rank, RANKS), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_drop_the_rows_that_one_drops(tmp_path: Path) -> None:
    spawn(work, (str(tmp_path),), nprocs=RANKS)
    found = torch.cat([torch.load(tmp_path / f"{rank}.pt") for rank in range(RANKS)], dim=1)
    torch.testing.assert_close(found, attended(0, 1), rtol=1e-9, atol=1e-9)
