"""Where the time of a decode step goes: arXiv 2305.15805, figure 5, with eviction beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function
from transformers.pytorch_utils import Conv1D

from ctxprune.pruner.engine.handle import handle_of

# The engine marks its parts with profiler ranges; the projections are marked here.
RANGES = {
    "projections": "ctxprune.projections",
    "gate": "ctxprune.gate",
    "policy": "ctxprune.policy",
    "attention": "ctxprune.attention",
    "eviction": "ctxprune.eviction",
}


def breakdown(model: nn.Module, burst: Callable[[], float], step_ms: float) -> dict[str, float]:
    """Milliseconds a decode step spends in each part, and in the `rest`; they add up to `step_ms`.

    A part's time is its share of a burst, times `step_ms`: `policy` is what eviction steps take, of
    which only some steps have one. The profiler slows down what it watches, small operations most;
    so parts that consist of many of these (gate, policy, eviction) come out somewhat too large, and
    matrix products too small.

    Args:
        model: its linear layers are the projections, but for those of the gates.
        burst: does some decode steps, and returns their seconds.
        step_ms: of the steps that were not profiled.
    """
    gates = set(handle_of(model).gates.modules())
    linear = [m for m in model.modules() if isinstance(m, nn.Linear | Conv1D) and m not in gates]
    cuda = next(model.parameters()).is_cuda
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with _marked(linear, RANGES["projections"]), profile(activities=activities) as profiled:
        seconds = burst()
    spent = dict.fromkeys(RANGES.values(), 0.0)
    for event in profiled.events() or ():
        if event.name in spent and event.device_type.name == "CPU":
            spent[event.name] += event.device_time_total if cuda else event.cpu_time_total
    parts = {part: step_ms * spent[name] / 1e6 / seconds for part, name in RANGES.items()}
    return {**parts, "rest": step_ms - sum(parts.values())}


@contextmanager
def _marked(modules: Iterable[nn.Module], name: str) -> Iterator[None]:
    """Show the forward passes of leaf modules to the profiler under one name."""
    running: list[record_function] = []

    def enter(*_: object) -> None:
        running.append(record_function(name).__enter__())

    def leave(*_: object) -> None:
        running.pop().__exit__(None, None, None)

    hooks = [module.register_forward_pre_hook(enter) for module in modules]
    hooks += [module.register_forward_hook(leave) for module in modules]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
