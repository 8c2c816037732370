"""Gates, policies, the evicting cache and the objective: what ctxprune exists for.

`load(folder)` gives a transformers model that prunes its own context; see docs/architecture.md.
"""

from ctxprune.pruner.checkpoint import load

__all__ = ["load"]
