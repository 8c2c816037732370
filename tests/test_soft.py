"""The chunked attention of training, forwards and backwards, against the equations written out."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ctxprune.pruner.config import PruneConfig
from ctxprune.pruner.decoder import Sight
from ctxprune.pruner.engine import soft as soft_module
from ctxprune.pruner.engine.soft import Level, SoftAttention, soft_attend
from ctxprune.pruner.engine.weights import Logits
from ctxprune.pruner.gate import Gate, free_pairs, log_survival, margin

HEADS, KEY_HEADS, WIDTH, HIDDEN = 6, 2, 4, 12
PLAIN = Sight()


def written_out(
    soft: SoftAttention,
    gate: Gate,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    hidden: Tensor,
    scale: float = 0.5,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    sight: Sight = PLAIN,
) -> tuple[Tensor, Tensor]:
    """softmax(Q K^T scale + log I) V with n x n tensors, and the mean of I over j < k."""
    batch, length = hidden.shape[:2]
    position = torch.arange(length)[None]
    free = free_pairs(position, position, soft.config.protect_first, soft.config.protect_recent)
    scores = gate.scores(
        *gate.interact(hidden), position, position, soft.level.log_window, soft.level.shift
    )
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    if sight.size is not None:
        causal &= sight.sees(position[0][:, None], position)
    groups = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(groups, dim=1) for t in (key, value))
    product = query @ key.transpose(-1, -2) * scale
    if softcap is not None:
        product = softcap * (product / softcap).tanh()
    product = product.masked_fill(~causal, -torch.inf)
    if sinks is None:
        sinks = product.new_full((query.shape[1],), -torch.inf)
    # A column more, of a token that nobody reads.
    sink = sinks[None, :, None, None].expand(batch, -1, length, 1)
    least = margin(scores, free)
    attended = torch.cat([product, sink], dim=-1).detach()
    bonus = bonus_written_out(soft, least.detach(), attended, value.detach())
    log_kept = log_survival((least + bonus) * soft.sharpness, soft.alpha)
    kept = (log_kept.exp() * causal).sum() - batch * length
    logits = product + log_kept.clamp_min(-1e4)[:, None]
    weights = torch.cat([logits, sink], dim=-1).softmax(dim=-1)[..., :-1]
    return weights @ value, kept / (batch * length * (length - 1) / 2)


def bonus_written_out(
    soft: SoftAttention, margins: Tensor, product: Tensor, value: Tensor
) -> Tensor:
    """The bonus of all queries (b, n, n), one after another; product is -inf for rows not seen,
    and its last column is the sinks'.

    Within a chunk of queries the attention received is that under the bonus of the query before it.
    """
    size = value.norm(dim=-1).mean(dim=1)
    bonus = torch.zeros_like(margins)
    stale = torch.zeros_like(size)
    final, running = torch.zeros_like(size), torch.zeros_like(size)
    for k in range(margins.shape[1]):
        if k % soft_module.CHUNK == 0:
            running = final.clone()
            if k > 0:
                stale = bonus[:, k - 1]

        def received(score: Tensor, k: int = k) -> Tensor:
            log_kept = log_survival(score * soft.sharpness, soft.alpha).clamp_min(-1e4)
            logits = product[:, :, k] + F.pad(log_kept, (0, 1))[:, None]
            return logits.softmax(dim=-1)[..., :-1].mean(dim=1)

        running = running + received(margins[:, k] + stale)
        seen = product[0, 0, k, :-1] > -torch.inf
        rows = seen & (torch.arange(len(seen)) >= soft.config.protect_first)
        worth = (running * size)[:, rows].log()
        usual = worth.mean(dim=1, keepdim=True) if worth.shape[1] else 0.0
        bonus[:, k, rows] = soft.config.attention_bonus * (worth - usual)
        final = final + received(margins[:, k] + bonus[:, k])
    return bonus


def case(length: int) -> tuple[Gate, list[Tensor]]:
    """A gate whose content speaks, and query, key, value, hidden, in double precision."""
    torch.manual_seed(0)
    gate = Gate(HIDDEN, 5).double()
    torch.nn.init.normal_(gate.key.weight, std=0.5)
    shapes = [(2, heads, length, WIDTH) for heads in (HEADS, KEY_HEADS, KEY_HEADS)]
    tensors = [torch.randn(shape, dtype=torch.float64) for shape in [*shapes, (2, length, HIDDEN)]]
    return gate, [tensor.requires_grad_() for tensor in tensors]


@pytest.mark.parametrize("alpha", [1.0, 1.5])
@pytest.mark.parametrize("bonus", [0.0, 0.8])
@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_values_and_gradients_are_those_of_the_equations(
    chunk: int, bonus: float, alpha: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(soft_module, "CHUNK", chunk)
    gate, tensors = case(24)
    config = PruneConfig(protect_first=2, protect_recent=3, attention_bonus=bonus)
    soft = SoftAttention(Level(1.5, 0.1), config, sharpness=1.7, alpha=alpha)
    found = soft_attend(soft, gate, 0, *tensors, logits=Logits(0.5), sight=Sight())
    expected, kept = written_out(soft, gate, *tensors)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(soft.kept[0], kept)
    probe = torch.linspace(-1, 1, found.numel(), dtype=torch.float64).view_as(found)
    inputs = [*tensors, *gate.parameters()]
    gradients = [
        torch.autograd.grad((out * probe).sum() + 3 * share, inputs)
        for out, share in ((found, soft.kept[0]), (expected, kept))
    ]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("chunk", [7, 64])
@pytest.mark.parametrize("bonus", [0.0, 0.8])
@pytest.mark.parametrize(
    ("softcap", "has_sinks", "sight"),
    [
        (0.7, False, PLAIN),
        (None, True, PLAIN),
        (None, False, Sight(6)),
        (None, False, Sight(6, chunked=True)),
        (0.7, True, Sight(9)),
    ],
    ids=["cap", "sinks", "window", "chunks", "all"],
)
def test_caps_sinks_and_windows_too(
    softcap: float | None,
    has_sinks: bool,
    sight: Sight,
    bonus: float,
    chunk: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also the gradient of the sinks."""
    monkeypatch.setattr(soft_module, "CHUNK", chunk)
    gate, tensors = case(24)
    sinks = torch.linspace(-1, 2, HEADS, dtype=torch.float64).requires_grad_()
    logits = Logits(0.5, softcap, sinks if has_sinks else None)
    config = PruneConfig(protect_first=2, protect_recent=3, attention_bonus=bonus)
    soft = SoftAttention(Level(1.5, 0.1), config, sharpness=1.7)
    found = soft_attend(soft, gate, 0, *tensors, logits=logits, sight=sight)
    expected, kept = written_out(
        soft, gate, *tensors, softcap=softcap, sinks=logits.sinks, sight=sight
    )
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(soft.kept[0], kept)
    probe = torch.linspace(-1, 1, found.numel(), dtype=torch.float64).view_as(found)
    inputs = [*tensors, *gate.parameters(), *([sinks] if has_sinks else [])]
    gradients = [
        torch.autograd.grad((out * probe).sum() + 3 * share, inputs)
        for out, share in ((found, soft.kept[0]), (expected, kept))
    ]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("backward", [True, False])
def test_nothing_of_a_pass_outlives_it(backward: bool) -> None:
    """Also without a backward pass, as where a checkpointed layer is computed again."""
    gate, tensors = case(24)
    soft = SoftAttention(Level(1.5), PruneConfig())
    out = soft_attend(soft, gate, 0, *tensors, logits=Logits(0.5), sight=Sight())
    if backward:
        out.sum().backward()
    noted = weakref.ref(soft.kept[0])
    del soft, out
    assert noted() is None


def test_what_is_kept_for_the_backward_pass_grows_linearly() -> None:
    """Floats saved by the layer at 512 tokens: fewer than a single n x n matrix."""
    gate, tensors = case(512)
    saved: list[int] = []
    soft = SoftAttention(Level(3.0), PruneConfig())
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: (saved.append(tensor.numel()), tensor)[1], lambda tensor: tensor
    ):
        soft_attend(soft, gate, 0, *tensors, logits=Logits(0.5), sight=Sight())
    assert sum(saved) < 512 * 512
