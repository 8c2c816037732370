"""ctxprune: teach a pretrained causal LM to forget.

`load(folder)` gives a transformers model that evicts from its own KV cache.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ctxprune.pruner import load

    __version__: str

__all__ = ["__version__", "load"]


def __getattr__(name: str) -> Any:
    # Late, so that the command line answers without importing torch, or what reads metadata.
    if name == "load":
        from ctxprune import pruner

        return pruner.load
    if name == "__version__":
        from importlib.metadata import version

        return version("ctxprune")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
