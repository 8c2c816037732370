"""Gates, policies, the evicting cache and the objective: what ctxprune exists for.

`load(folder)` gives a transformers model that prunes its own context; see docs/how/architecture.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ctxprune.pruner.checkpoints.checkpoint import load

__all__ = ["load"]


def __getattr__(name: str) -> Any:
    # Late, so that the command line can name errors and options without importing torch.
    if name == "load":
        from ctxprune.pruner.checkpoints import checkpoint

        return checkpoint.load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
