"""How far an evicting model is from the dense one, on the same held-out text."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from ctxprune.pruner import policies
from ctxprune.pruner.config import PruneConfig
from ctxprune.pruner.device import input_device
from ctxprune.pruner.engine.handle import handle_of
from ctxprune.pruner.engine.modes import Evict, Mode, Off
from ctxprune.pruner.finite import check_numbers

# Tokens a pass, at least one window.
PASS = 1024


def passes(windows: Tensor) -> int:
    """Passes over windows (count, n) that `Reference` needs for itself, and for each question."""
    return len(_batches(windows))


class Reference:
    """What the dense model predicts at some places of held-out text.

    Args:
        model: with a `Handle`. windows: (count, n) int64.
        places: (m,) int64, positions in each window, the same in all.
        on_pass: called after each pass.

    Only the logits at the places are made: with a large vocabulary those of all positions would
    take more memory and time than the model itself.
    """

    def __init__(
        self, model: PreTrainedModel, windows: Tensor, places: Tensor, on_pass: Callable[[], None]
    ) -> None:
        self._model = model
        self._batches = _batches(windows)
        self._places = places
        self._on_pass = on_pass
        self._dense = [self._log_probabilities(Off(), batch) for batch in self._batches]

    def divergence(self, level: float, config: PruneConfig) -> Tensor:
        """Kullback-Leibler divergence in nats from the dense predictions, by the gate policy.

        Returns:
            (count, m) float64, in each window at each place.
        """
        found: list[Tensor] = []
        gates = handle_of(self._model).gate_list
        for batch, dense in zip(self._batches, self._dense, strict=True):
            request = policies.Request(level, (batch.shape[1],), config, gates)
            mode = Evict(policies.make("gate", request))
            pruned = self._log_probabilities(mode, batch)
            apart = F.kl_div(pruned, dense, log_target=True, reduction="none")
            found.append(apart.sum(dim=-1).double().cpu())
        return torch.cat(found)

    @torch.no_grad()
    def _log_probabilities(self, mode: Mode, batch: Tensor) -> Tensor:
        """(b, m, vocabulary) float32, of the tokens after each place."""
        device = input_device(self._model)
        places = self._places.to(device)
        with handle_of(self._model).running(mode):
            logits = self._model(batch.to(device), use_cache=False, logits_to_keep=places).logits
        self._on_pass()
        # A few architectures know no `logits_to_keep` and give all of them.
        chosen = logits if logits.shape[1] == len(places) else logits[:, places.to(logits.device)]
        log_probabilities: Tensor = chosen.float().log_softmax(dim=-1)
        check_numbers(log_probabilities, "the model's predictions on held-out text")
        return log_probabilities


def _batches(windows: Tensor) -> tuple[Tensor, ...]:
    batches: tuple[Tensor, ...] = windows.split(max(1, PASS // windows.shape[1]))
    return batches
