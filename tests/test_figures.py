"""The figures: what is drawn is what the views say, and files are whole or not there."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.image import imread

from ctxprune.evals.inspect import figures
from ctxprune.evals.inspect.figures import draw
from ctxprune.evals.inspect.inspection import View
from ctxprune.evals.inspect.kinds import kinds_of, survival_of, survival_over_age
from ctxprune.evals.inspect.trace import Trace
from ctxprune.pruner.errors import CtxpruneError

NAMES = ["life", "context", "survival", "kinds", "layers"]
SENTENCE = ("The", " old", " cap", "tain", ",", " who", " saw", " 3", " ships", ".", " ")


def view(label: str, n: int, layers: int = 3, seed: int = 0) -> View:
    """Tokens of a text that live for some while, drawn at random."""
    torch.manual_seed(seed)
    pieces = tuple(SENTENCE[index % len(SENTENCE)] for index in range(n))
    expires = torch.arange(n) + 1 + (torch.rand(layers, n) ** 4 * n).long()
    expires = expires.clamp_max(n)
    trace = Trace(
        model="m",
        policy="gate",
        requested=0.8,
        evicts_every=64,
        pieces=pieces,
        expires=expires,
        dropper=torch.full((layers, n), -1),
        attention=torch.zeros(layers, n),
    )
    ages = [age for age in (1, 2, 4, 8, 16, 32) if age < n]
    survival = dict(zip(ages, survival_over_age(expires, ages), strict=True))
    return View(label, trace, survival_of(expires, kinds_of(pieces)), survival, {})


@pytest.fixture(scope="module")
def views() -> list[View]:
    return [view("gate 0.8", 60), view("sink 0.8, $m$", 90, layers=5, seed=1)]


def drawn(figure: Figure | None) -> Figure:
    assert figure is not None
    return figure


@pytest.mark.parametrize("count", [1, 2])
def test_every_figure_is_a_picture(views: list[View], count: int, tmp_path: Path) -> None:
    written = draw(views[:count], tmp_path / "new" / "folder")
    assert [path.name for path in written] == [f"{name}.png" for name in NAMES]
    assert sorted(path.name for path in written[0].parent.iterdir()) == sorted(
        path.name for path in written
    )
    for path in written:
        pixels = imread(path)
        assert min(pixels.shape[:2]) > 300
        assert pixels.std() > 0.05


def test_the_heat_map_is_the_life_of_each_token(views: list[View]) -> None:
    *maps, bar = figures._life(views).axes
    for axes, shown in zip(maps, views, strict=True):
        expires, n = shown.trace.expires, shown.trace.tokens
        image = axes.images[0].get_array()
        assert image is not None
        for layer, j in ((0, 0), (1, 7), (2, n - 1)):
            assert image[layer, j] == pytest.approx((int(expires[layer, j]) - j) / (n - j))
    assert "stays" in bar.get_ylabel()


def test_a_heat_map_of_more_tokens_than_columns_averages_them() -> None:
    shown = view("gate 0.8", 2 * figures.MOST_COLUMNS)
    axes, _ = figures._life([shown]).axes
    n = shown.trace.tokens
    life = (shown.trace.expires - torch.arange(n)) / (n - torch.arange(n))
    image = axes.images[0].get_array()
    assert image is not None and image.shape == (3, figures.MOST_COLUMNS)
    assert image[1, 40] == pytest.approx(float(life[1, 80:82].mean()))
    assert axes.get_xlim() == (-0.5, n - 0.5)


def test_the_context_has_a_line_and_a_band_over_layers(views: list[View]) -> None:
    (axes,) = figures._context(views).axes
    for line, band, shown in zip(axes.lines, axes.collections, views, strict=True):
        visible = shown.trace.visible(49).double().mean(dim=1)
        x, y = line.get_data()
        assert (x[49], y[49]) == (50, pytest.approx(float(visible.mean())))
        edge = band.get_paths()[0].vertices
        assert isinstance(edge[edge[:, 0] == 50][:, 1].min(), float)
        assert edge[edge[:, 0] == 50][:, 1].min() == pytest.approx(float(visible.min()))
        assert edge[edge[:, 0] == 50][:, 1].max() == pytest.approx(float(visible.max()))


def test_survival_is_drawn_as_it_is(views: list[View]) -> None:
    (axes,) = drawn(figures._survival(views)).axes
    assert axes.get_xscale() == "log"
    for line, shown in zip(axes.lines, views, strict=True):
        assert dict(zip(*line.get_data(), strict=True)) == shown.survival


def test_kinds_have_a_row_each_with_their_tokens(views: list[View]) -> None:
    figure = drawn(figures._kinds(views))
    assert [axes.get_title(loc="left") for axes in figure.axes] == [
        *("form", "repetition", "frequency", "part of speech")
    ]
    form = figure.axes[0]
    counts = [kind.count for v in views for kind in v.kinds if kind.kind == "digit"]
    ticks = [tick.get_text() for tick in form.get_yticklabels()]
    assert f"digit ({counts[0]} / {counts[1]})" in ticks
    shares = [kind.kept for kind in views[0].kinds if kind.group == "form"]
    assert list(form.lines[0].get_xdata()) == pytest.approx(shares)


def test_kinds_of_fewer_than_five_tokens_are_not_drawn(views: list[View]) -> None:
    kinds = [replace(k, count=4 if k.kind == "digit" else 5) for k in views[0].kinds]
    figure = drawn(figures._kinds([replace(views[0], kinds=kinds), views[1]]))
    ticks = [tick.get_text() for axes in figure.axes for tick in axes.get_yticklabels()]
    assert any(tick.startswith("punctuation (5 / ") for tick in ticks)
    assert not any("digit" in tick for tick in ticks)
    few = [replace(kind, count=4) for kind in views[0].kinds]
    assert figures._kinds([replace(views[0], kinds=few)]) is None


def test_layers_are_told_by_part_of_speech_else_by_form(views: list[View]) -> None:
    figure = drawn(figures._layers(views))
    assert len(figure.axes) == 2
    by_layer = {kind.kind: kind.by_layer for kind in views[1].kinds}
    for line in figure.axes[1].lines:
        assert tuple(line.get_ydata()) == by_layer[str(line.get_label())]
    assert "noun" in {line.get_label() for line in figure.axes[0].lines}
    plain = [
        View(v.label, v.trace, [k for k in v.kinds if k.group == "form"], v.survival, {})
        for v in views
    ]
    labels = {line.get_label() for line in drawn(figures._layers(plain)).axes[0].lines}
    assert {"digit", "other word"} <= labels


@pytest.mark.parametrize(("n", "names"), [(1, NAMES[:2]), (2, NAMES[:2]), (60, NAMES)])
def test_the_shortest_texts(n: int, names: list[str], tmp_path: Path) -> None:
    written = draw([view("gate 0.8", n, layers=1)], tmp_path)
    assert [path.stem for path in written] == names


def test_what_cannot_be_written_is_the_user_s_to_mend(views: list[View], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CtxpruneError, match="cannot be written"):
        draw(views[:1], tmp_path / "file")


def test_a_failure_leaves_the_old_picture(
    views: list[View], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (path, *_) = draw(views[:1], tmp_path)
    before = path.read_bytes()

    def full(self: Figure, file: Path, **_: object) -> None:
        Path(file).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Figure, "savefig", full)
    with pytest.raises(CtxpruneError, match="disk full"):
        draw(views, tmp_path)
    assert path.read_bytes() == before
    assert not list(tmp_path.glob(".*"))
