"""Whether the engine computes what the model does: tried on the model itself, once, at conversion.

What a model declares may be less than what it does. With everything kept the engine has to give the
model's own logits, beyond its windows too, in one pass and token by token.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from ctxprune.pruner.decoder import refusal
from ctxprune.pruner.device import input_device
from ctxprune.pruner.engine.handle import Handle, handle_of
from ctxprune.pruner.engine.modes import Evict, Off
from ctxprune.pruner.policies import Policy

# Tokens read, where no layer has a window; twice a window, and at most so many, where one has.
TOKENS, MOST = 128, 2048
# The last of them are read one by one.
STEPS = 8
# The error of nine tokens in ten, in standard deviations of a token's logits: what rounding may do.
# Experts that are chosen by a hair may differ for the others.
TOLERANCE = {torch.bfloat16: 0.1, torch.float16: 0.02}
EXACT, SHARE = 1e-3, 0.9
# Where a model's own cache gives other logits than one pass, so many times that is no error.
OWN = 3.0


@torch.no_grad()
def check_agreement(model: PreTrainedModel) -> None:
    """Read random tokens with everything kept, and compare with the model's own logits.

    Args:
        model: with a `Handle`, in eval mode.

    Raises:
        CtxpruneError: they differ by more than rounding.
    """
    handle = handle_of(model)
    ids = _tokens(model, handle)
    with handle.running(Off()):
        dense = _read(model, ids)
        tolerance = TOLERANCE.get(dense.dtype, EXACT)
    with handle.running(Evict(Policy())):
        try:
            whole = _error(_read(model, ids), dense)
            steps = _error(_read(model, ids, handle.cache()), dense)
        except (ValueError, AttributeError) as error:
            # Models with a cache of their own take no other.
            raise refusal(model.config, str(error).splitlines()[0].rstrip(".")) from error
    if whole <= tolerance and not steps <= tolerance:
        with handle.running(Off()):
            tolerance = OWN * _error(_read(model, ids, handle.cache()), dense)
    if not max(whole, steps) <= tolerance:
        raise refusal(
            model.config,
            f"with all rows kept, logits differ from its own by {max(whole, steps):.2g} "
            "standard deviations, so it attends in a way that it does not declare",
        )


def _tokens(model: PreTrainedModel, handle: Handle) -> Tensor:
    """(1, n) random ids, none of which has a meaning of its own."""
    config = handle.decoder.config
    windows = [layer.sight.size for layer in handle.decoder.layers if layer.sight.size is not None]
    count = max(TOKENS, min(2 * max(windows, default=0), MOST))
    count = min(count, handle.decoder.positions or count)
    named = {**model.config.to_dict(), **config.to_dict()}
    special = [v for name, v in named.items() if "token" in name and isinstance(v, int)]
    allowed = torch.ones(config.vocab_size, dtype=torch.bool)
    allowed[[token for token in special if 0 <= token < config.vocab_size]] = False
    draw = torch.Generator().manual_seed(0)
    ids = torch.multinomial(allowed.float(), count, replacement=True, generator=draw)
    return ids[None].to(input_device(model))


def _read(model: PreTrainedModel, ids: Tensor, cache: Cache | None = None) -> Tensor:
    """Logits (n, vocabulary): in one pass, or with a cache, the last tokens one by one."""
    if cache is None:
        logits: Tensor = model(ids, use_cache=False).logits
        return logits[0]
    parts = [ids[:, :-STEPS], *ids[:, -STEPS:].split(1, dim=1)]
    return torch.cat([model(p, past_key_values=cache, use_cache=True).logits[0] for p in parts])


def _error(found: Tensor, expected: Tensor) -> float:
    """What SHARE of the tokens do not exceed: the root of the mean square, as above."""
    found, expected = found.double(), expected.double()
    # A token of a padded vocabulary may have no embedding, and then no logits but 0.
    spread = expected.std(dim=-1).clamp_min(torch.finfo(torch.float64).tiny)
    errors = (found - expected).square().mean(dim=-1).sqrt() / spread
    return float(errors.quantile(SHARE))
