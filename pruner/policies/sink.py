"""Attention sinks and a window: StreamingLLM, arXiv 2309.17453.

It differs from the paper in that keys keep the position at which they were written.
"""

from __future__ import annotations

from ctxprune.pruner.policies import Request
from ctxprune.pruner.policies.window import WindowPolicy


def make(request: Request) -> WindowPolicy:
    """The window with the protected first tokens of the model's configuration, at least one."""
    return WindowPolicy(request, sinks=max(request.config.protect_first, 1))
