"""The gate's equations against entmax, against finite differences, and against naive loops."""

from __future__ import annotations

import math

import pytest
import torch
from entmax import entmax_bisect
from torch import Tensor

from ctxprune.pruner.gate import Gate, alpha_sigmoid, free_pairs, log_survival, margin

ALPHAS = (1.0, 1.01, 1.25, 1.5, 2.0, 3.0, 5.0, 8.0)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_alpha_sigmoid_is_the_first_component_of_entmax(alpha: float) -> None:
    scores = torch.linspace(-6, 6, 401, dtype=torch.float64)
    pairs = torch.stack([scores, torch.zeros_like(scores)], dim=-1)
    if alpha == 1.0:
        expected = torch.softmax(pairs, dim=-1)[..., 0]
    else:
        expected = entmax_bisect(pairs, alpha, dim=-1, n_iter=80)[..., 0]
    torch.testing.assert_close(alpha_sigmoid(scores, alpha), expected, atol=1e-6, rtol=0)


def test_alpha_sigmoid_just_above_one_is_the_sigmoid_in_single_precision() -> None:
    scores = torch.linspace(-4, 4, 9)
    torch.testing.assert_close(alpha_sigmoid(scores, 1 + 1e-8), scores.sigmoid())


@pytest.mark.parametrize("alpha", ALPHAS)
def test_alpha_sigmoid_gradient(alpha: float) -> None:
    # Inside the band where it is smooth, away from the saturated ends.
    edge = 0.9 / max(alpha - 1.0, 0.3)
    scores = torch.linspace(-edge, edge, 21, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda s: alpha_sigmoid(s, alpha), (scores,), atol=1e-4)


@pytest.mark.parametrize("alpha", [1.5, 2.0, 8.0])
def test_alpha_sigmoid_saturates_exactly(alpha: float) -> None:
    edge = 1.0 / (alpha - 1.0)
    scores = torch.tensor([-edge - 0.01, edge + 0.01], requires_grad=True)
    kept = alpha_sigmoid(scores, alpha)
    assert kept.tolist() == [0.0, 1.0]
    kept.sum().backward()  # type: ignore[no-untyped-call]
    assert scores.grad is not None and scores.grad.tolist() == [0.0, 0.0]


def naive_survival(scores: Tensor, alpha: float, first: int, recent: int) -> Tensor:
    """I[k, j] = alpha_sigmoid(min over i in (j, k] of s[i, j]), written out."""
    n = scores.shape[-1]
    survived = torch.zeros_like(scores)
    for b in range(len(scores)):
        for k in range(n):
            for j in range(k + 1):
                votes = [
                    scores[b, i, j] for i in range(j + 1, k + 1) if j >= first and i - j >= recent
                ]
                survived[b, k, j] = alpha_sigmoid(min(votes), alpha) if votes else 1.0
    return survived


@pytest.mark.parametrize("alpha", [1.0, 1.5, 4.0])
@pytest.mark.parametrize(("first", "recent"), [(0, 1), (2, 3)])
def test_survival_is_decided_by_the_least_score(alpha: float, first: int, recent: int) -> None:
    torch.manual_seed(0)
    scores = torch.randn(2, 9, 9, dtype=torch.float64) + 1.0
    position = torch.arange(9)[None]
    least = margin(scores, free_pairs(position, position, first, recent))
    survived = log_survival(least, alpha).exp().tril()
    torch.testing.assert_close(survived, naive_survival(scores, alpha, first, recent))


def test_hard_survival_is_the_product_of_the_paper() -> None:
    """With hard decisions the paper's product of keep decisions is the sign of the margin."""
    torch.manual_seed(0)
    scores = torch.randn(3, 40, 40, dtype=torch.float64) + 1.5
    position = torch.arange(40)[None]
    free = free_pairs(position, position, 1, 2)
    product = torch.where(free, scores > 0, True).long().cumprod(dim=-2).bool()
    assert torch.equal(margin(scores, free) > 0, product)


def test_soft_survival_hardens_to_the_sign_of_the_margin() -> None:
    torch.manual_seed(0)
    scores = torch.randn(3, 40, 40, dtype=torch.float64) + 1.5
    position = torch.arange(40)[None]
    least = margin(scores, free_pairs(position, position, 1, 2))
    for sharpness, alpha in ((1e3, 4096.0), (1e7, 1.0), (1e5, 64.0)):
        soft = log_survival(least * sharpness, alpha).exp()
        torch.testing.assert_close(soft, (least > 0).double(), atol=1e-3, rtol=0)


def test_survival_of_a_very_negative_score_keeps_its_gradient() -> None:
    scores = torch.full((1, 8, 8), -60.0, requires_grad=True)
    position = torch.arange(8)[None]
    least = margin(scores, free_pairs(position, position, 0, 1))
    log_survival(least).tril(-1).sum().backward()  # type: ignore[no-untyped-call]
    assert scores.grad is not None and float(scores.grad[0, :, 0].sum()) == 7.0
    assert bool(scores.grad.isfinite().all())


def test_scores_follow_their_equation() -> None:
    torch.manual_seed(0)
    gate = Gate(12, 5).double()
    torch.nn.init.normal_(gate.key.weight)
    gate.slope.data.fill_(1.7)
    gate.bias.data.fill_(0.3)
    hidden = torch.randn(1, 6, 12, dtype=torch.float64)
    position = torch.arange(6)[None]
    scores = gate.scores(*gate.interact(hidden), position, position, math.log(3.0), -0.2)
    for k in range(6):
        for j in range(k):
            content = (gate.query.weight @ hidden[0, k]) @ (gate.key.weight @ hidden[0, j])
            expected = content / math.sqrt(5) + 1.7 * math.log(3.0 / (k - j)) + 0.3 - 0.2
            torch.testing.assert_close(scores[0, k, j], expected)


def test_a_new_gate_is_sinks_and_window() -> None:
    gate = Gate(12, 5)
    hidden = torch.randn(1, 50, 12)
    position = torch.arange(50)[None]
    scores = gate.scores(*gate.interact(hidden), position, position, math.log(7.5), 0.0)
    alive = margin(scores, free_pairs(position, position, 2, 1)) > 0
    age = position[0][:, None] - position[0][None]
    torch.testing.assert_close(alive[0].tril(), ((age <= 7) | (position < 2)).tril())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_gates_move_with_a_model_but_stay_single_precision_at_least(dtype: torch.dtype) -> None:
    model = torch.nn.ModuleDict({"weights": torch.nn.Linear(12, 12), "gate": Gate(12, 5)})
    before = {name: tensor.clone() for name, tensor in model["gate"].state_dict().items()}
    model.to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    assert {p.dtype for p in model["weights"].parameters()} == {dtype}
    for name, tensor in model["gate"].state_dict().items():
        assert tensor.dtype == wide and torch.equal(tensor, before[name].to(wide))
    assert {p.device.type for p in model.to("meta").parameters()} == {"meta"}
