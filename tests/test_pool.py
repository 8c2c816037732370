"""Pages in memory that a server hands out hold what a cache of one text holds, in any order."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import zoo
from torch import Tensor
from transformers import PreTrainedModel

from ctxprune.pruner.config import PruneConfig
from ctxprune.pruner.decoder import Layer
from ctxprune.pruner.engine.bounded import Bounded
from ctxprune.pruner.engine.cache import PrunedCache
from ctxprune.pruner.engine.handle import Handle, attach, new_gates
from ctxprune.pruner.engine.modes import Evict
from ctxprune.pruner.engine.pool import Batch, Pool
from ctxprune.pruner.engine.weights import Logits

LENGTHS = (150, 61, 1, 97)
PAGES = (4, 1, 2, 6)
LOGITS = Logits(0.25)

# Model type -> policy, sparsity, cap.
CASES = {
    "plain": ("llama", "gate", 0.7, None),
    "a cap": ("llama", "gate", 0.0, 64),
    "no weights asked for": ("llama", "window", 0.5, None),
    "another policy with weights": ("llama", "h2o", 0.5, None),
    "a window in all layers": ("mistral", "gate", 0.5, None),
    "windows in some layers": ("gemma3_text", "gate", 0.7, None),
    "chunks in some layers": ("llama4_text", "gate", 0.7, None),
}


def evicting(kind: str, policy: str, sparsity: float, cap: int | None) -> Handle:
    """The handle of a tiny model whose gates decide by content."""
    model: PreTrainedModel = zoo.tiny(kind)
    config = PruneConfig(rank=8, protect_first=2, protect_recent=3, context=128)
    config = replace(config, attention_bonus=1.0)
    gates = new_gates(model, config)
    config = replace(config, levels={0.5: (0.5,) * len(gates), 0.8: (0.2,) * len(gates)})
    torch.manual_seed(1)
    for gate in gates:
        torch.nn.init.normal_(gate.key.weight, std=0.15)
    handle = attach(model, gates, config)
    handle.use(policy, sparsity, max_rows=cap)
    return handle


def texts(layer: Layer, width: int) -> list[tuple[Tensor, ...]]:
    """Query, key, value (n, h, 16), input (n, width) of each text."""
    draw = torch.Generator().manual_seed(layer.index)
    shapes = ((4, 16), (2, 16), (2, 16), (width,))
    return [
        tuple(torch.randn(n, *shape, generator=draw, dtype=torch.float64) for shape in shapes)
        for n in LENGTHS
    ]


def alone(handle: Handle, number: int, text: tuple[Tensor, ...]) -> Tensor:
    """What attention gives in a cache of its own, in one pass."""
    mode = handle.mode
    assert isinstance(mode, Evict)
    cache = PrunedCache(mode.policy, handle.decoder)
    *tokens, hidden = text
    asked, key, value = (tensor.transpose(0, 1)[None] for tensor in tokens)
    cache.begin(1, len(hidden), None)
    return cache.attend(number, asked, key, value, hidden[None], LOGITS)[0].transpose(0, 1)


def passes(seed: int) -> list[list[int]]:
    """Tokens of each text in each pass: single ones and chunks of any length, mixed."""
    draw = torch.Generator().manual_seed(seed)
    left, found = list(LENGTHS), []
    while any(left):
        most = 2 if len(found) % 2 else 70
        part = [min(int(torch.randint(0, most, (), generator=draw)), n) for n in left]
        if any(part):
            found.append(part)
        left = [n - taken for n, taken in zip(left, part, strict=True)]
    return found


@torch.no_grad()
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("case", CASES)
def test_any_order_of_passes_gives_what_each_text_gives_alone(case: str, seed: int) -> None:
    """Chunks end anywhere, and the pages were used before."""
    handle = evicting(*CASES[case])
    assert handle.policy is not None
    for number, layer in enumerate(handle.decoder.layers):
        policy, place = handle.policy, layer.gate
        if place is None:
            policy, place = Bounded(layer.sight), 0
        read = texts(layer, handle.decoder.width)
        like = tuple(tensor[:1].transpose(0, 1)[None] for tensor in read[0][:3])
        pool = Pool(policy, place, layer.sight, LOGITS, like, handle.decoder.width, max(LENGTHS))
        pool.bind(torch.full((8, pool.nbytes), 17, dtype=torch.int8))
        wanted = [alone(handle, number, text) for text in read]
        seen = [0] * len(read)
        for part in passes(seed):
            which = [i for i, count in enumerate(part) if count]
            starts = torch.tensor([0, *(part[i] for i in which)]).cumsum(0)
            batch = Batch(
                starts,
                torch.tensor([seen[i] for i in which]),
                torch.tensor([PAGES[i] for i in which]),
            )
            new = [[text[seen[i] : seen[i] + part[i]] for text in read[i]] for i in which]
            out = pool.attend(batch, *(torch.cat(parts) for parts in zip(*new, strict=True)))
            for i, rows in zip(which, out.split([part[i] for i in which]), strict=True):
                expected = wanted[i][seen[i] : seen[i] + part[i]]
                torch.testing.assert_close(rows, expected, rtol=1e-9, atol=1e-9)
                seen[i] += part[i]
        assert seen == list(LENGTHS)
