"""What views of a text show, as PNGs: life of its tokens, cache over context, kinds that stay."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ctxprune.evals.inspect.inspection import View
from ctxprune.evals.inspect.kinds import FEWEST, FORM, SPEECH, Kind, kept_over_context
from ctxprune.evals.report.charts import drawing
from ctxprune.pruner import words
from ctxprune.pruner.files import whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which colour-blind people tell apart; without yellow, faint on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9")
MARKERS = "osD^vPX"
MOST_LINES = len(COLOURS)
MOST_COLUMNS = 900
WIDTH = 8.0


def draw(views: Sequence[View], folder: Path) -> list[Path]:
    """Write the figures, each whole or not at all.

    Args:
        views: of one text or of several, at least one. folder: made if it is not there.

    Returns:
        life.png, context.png, survival.png, kinds.png, layers.png; those that a text of few tokens
        says nothing for are left out.

    Raises:
        CtxpruneError: they cannot be written.
    """
    figures: dict[str, Callable[[Sequence[View]], Figure | None]] = {
        "life": _life,
        "context": _context,
        "survival": _survival,
        "kinds": _kinds,
        "layers": _layers,
    }
    written = []
    with drawing():
        for name, figure_of in figures.items():
            figure = figure_of(views)
            if figure is not None:
                written.append(_save(figure, folder / f"{name}.png"))
    return written


def _figure(width: float, height: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)  # draws to memory: no display, no global state
    return figure


def _save(figure: Figure, path: Path) -> Path:
    with whole(path) as temporary:
        figure.savefig(temporary, format="png")
    return path


def _life(views: Sequence[View]) -> Figure:
    """A heat map a view: how long each token stays in each layer, of the time that it could."""
    heights = [max(1.6, 0.5 + 0.12 * view.trace.layers) for view in views]
    figure = _figure(WIDTH, 0.8 + sum(heights))
    rows = figure.subplots(len(views), squeeze=False, gridspec_kw={"height_ratios": heights})
    panels = [row[0] for row in rows]
    for axes, view in zip(panels, views, strict=True):
        n = view.trace.tokens
        position = torch.arange(n)
        life = (view.trace.expires.clamp_max(n) - position) / (n - position)
        if n > MOST_COLUMNS:  # else tokens fall between the pixels
            life = torch.nn.functional.adaptive_avg_pool1d(life, MOST_COLUMNS)
        image = axes.imshow(
            life.numpy(),
            aspect="auto",
            origin="lower",
            extent=(-0.5, n - 0.5, -0.5, view.trace.layers - 0.5),
            cmap="cividis",
            vmin=0.0,
            vmax=1.0,
            interpolation="nearest",
        )
        axes.set_title(_title(view), fontsize="medium", loc="left")
        axes.set_ylabel("layer")
        _whole_numbers(axes)
    panels[-1].set_xlabel("position in the text (tokens)")
    bar = figure.colorbar(image, ax=panels, pad=0.015)
    bar.set_label("share of the rest of the text\nthat a token stays for")
    return figure


def _context(views: Sequence[View]) -> Figure:
    """Kept share of the context as it grows."""
    figure = _figure(WIDTH, 4.4)
    axes = figure.add_subplot()
    for view, colour in zip(views, itertools.cycle(COLOURS), strict=False):
        kept = kept_over_context(view.trace.expires)
        tokens = range(1, view.trace.tokens + 1)
        axes.plot(tokens, kept.mean(dim=0), color=colour, label=_title(view))
        axes.fill_between(
            tokens, kept.amin(dim=0), kept.amax(dim=0), color=colour, alpha=0.15, linewidth=0
        )
    axes.set_xlabel("context length (tokens)")
    axes.set_ylabel("share of the context in memory\n(mean over layers; band: least to most)")
    axes.set_xlim(left=1)
    axes.set_ylim(0.0, 1.02)
    _finish(axes)
    axes.legend(fontsize="small")
    return figure


def _survival(views: Sequence[View]) -> Figure | None:
    """Share of tokens that are still there at a distance."""
    if not any(len(view.survival) > 1 for view in views):
        return None
    figure = _figure(WIDTH, 4.4)
    axes = figure.add_subplot()
    looks = zip(itertools.cycle(COLOURS), itertools.cycle(MARKERS), strict=False)
    for view, (colour, marker) in zip(views, looks, strict=False):
        # A logarithmic axis has no place for age 0, at which every token is there.
        points = [(age, share) for age, share in sorted(view.survival.items()) if age > 0]
        if points:
            ages, shares = zip(*points, strict=True)
            axes.plot(ages, shares, color=colour, marker=marker, ms=4, label=_title(view))
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_xlabel("distance from token to query (tokens)")
    axes.set_ylabel("share of tokens still in memory")
    axes.set_ylim(0.0, 1.02)
    _finish(axes)
    axes.legend(fontsize="small")
    return figure


def _kinds(views: Sequence[View]) -> Figure | None:
    """How long each kind stays, with its interval: a panel a group, a row a kind.

    Those of which some view has too few tokens are left out.
    """
    groups: dict[str, list[str]] = {}
    all_kinds = list(itertools.chain.from_iterable(view.kinds for view in views))
    few = {(kind.group, kind.kind) for kind in all_kinds if kind.count < FEWEST}
    for kind in all_kinds:
        if (kind.group, kind.kind) not in few:
            names = groups.setdefault(kind.group, [])
            if kind.kind not in names:
                names.append(kind.kind)
    if not groups:
        return None
    heights = [len(names) + 1.2 for names in groups.values()]
    per_row = 0.2 + 0.06 * len(views)
    figure = _figure(WIDTH, 1.0 + 0.2 * len(views) + per_row * sum(heights))
    panels = figure.subplots(
        len(groups), squeeze=False, sharex=True, gridspec_kw={"height_ratios": heights}
    )[:, 0]
    looks = list(zip(views, itertools.cycle(zip(COLOURS, MARKERS, strict=True)), strict=False))
    for axes, (group, names) in zip(panels, groups.items(), strict=True):
        counts: dict[str, list[int]] = {name: [] for name in names}
        for number, (view, (colour, marker)) in enumerate(looks):
            kinds = [k for k in view.kinds if k.group == group and k.kind in names]
            offset = 0.7 * ((number + 0.5) / len(views) - 0.5)
            kept = [kind.kept for kind in kinds]
            axes.errorbar(
                kept,
                [names.index(kind.kind) + offset for kind in kinds],
                # A share of few blocks may lie outside of what was drawn from them.
                xerr=[
                    [max(0.0, kind.kept - kind.low) for kind in kinds],
                    [max(0.0, kind.high - kind.kept) for kind in kinds],
                ],
                fmt=marker,
                color=colour,
                markersize=4,
                elinewidth=1.2,
                capsize=2,
                label=_title(view),
            )
            for kind in kinds:
                if kind.count not in counts[kind.kind]:
                    counts[kind.kind].append(kind.count)
        axes.set_yticks(
            range(len(names)),
            [f"{name} ({' / '.join(f'{each:,}' for each in counts[name])})" for name in names],
            fontsize="small",
        )
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.set_title(group, fontsize="medium", loc="left")
        _finish(axes)
    panels[-1].set_xlim(0.0, 1.0)
    panels[-1].set_xlabel("share of later queries that still see a token (95% interval)")
    figure.supylabel("token category (tokens of it in the text)", fontsize="medium")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=2)
    return figure


def _layers(views: Sequence[View]) -> Figure | None:
    """Which kinds stay in which layer: a panel a view, a line a kind."""
    spoken = any(kind.group == SPEECH for view in views for kind in view.kinds)
    group = SPEECH if spoken else FORM
    names = _commonest([kind for view in views for kind in view.kinds if kind.group == group])
    if not names:
        return None
    figure = _figure(WIDTH + 1.2, 0.6 + 3.0 * len(views))
    panels = figure.subplots(len(views), squeeze=False)[:, 0]
    looks = dict(zip(names, zip(COLOURS, MARKERS, strict=True), strict=False))
    for axes, view in zip(panels, views, strict=True):
        shares = {kind.kind: kind.by_layer for kind in view.kinds if kind.group == group}
        for name, (colour, marker) in looks.items():
            if name in shares:
                axes.plot(shares[name], color=colour, marker=marker, markersize=4, label=name)
        axes.set_title(_title(view), fontsize="medium", loc="left")
        axes.set_ylabel("share of later queries\nthat still see a token")
        axes.set_ylim(0.0, 1.02)
        _whole_numbers(axes)
        _finish(axes)
    panels[-1].set_xlabel("layer")
    handles = {
        label: handle
        for axes in panels
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        [handles[name] for name in names],
        names,
        loc="outside right upper",
        title=f"{group}\n(most frequent first)",
        fontsize="small",
        title_fontsize="small",
    )
    return figure


def _commonest(kinds: Sequence[Kind]) -> list[str]:
    """The names of the kinds with the most tokens: more lines than these are told apart by none."""
    counts: dict[str, int] = {}
    for kind in kinds:
        if kind.count >= FEWEST:
            counts[kind.kind] = counts.get(kind.kind, 0) + kind.count
    return sorted(counts, key=lambda name: -counts[name])[:MOST_LINES]


def _title(view: View) -> str:
    """The view and what it realised, which is no formula whatever a model is called."""
    return words.figure(f"{view.label} (sparsity {view.trace.sparsity:.3f})")


def _whole_numbers(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    for axis in (axes.xaxis, axes.yaxis):
        if axis is axes.xaxis or axes.images:
            axis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def _finish(axes: Axes) -> None:
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
