"""The page of `ctxprune inspect`, in a real browser, against sets counted in Python."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Dialog, Locator, Page, Route, sync_playwright

from ctxprune.evals.inspect.page import render
from ctxprune.pruner import words

HOSTILE = [
    "<script>window.pwned = 1; alert(1)</script>",
    "</script>",
    "<img src=x onerror='window.pwned = 1'>",
    "&amp;",
    "<!--",
    "\u2028",
    "🙂",
    "",
    "\n\n",
    "\t",
    " ",
    "שלום",
    " עולם",
    " مرحبا",
    "\u202e",
    "\ud83d",
    "\x00",
    "__DATA__",
    "${1}`'\"\\",
]
WORDS = (
    " the| old| captain|,| who| had| seen| many| such| days|.|\n| letter| from| his| sister".split(
        "|"
    )
)


def view(
    layers: int,
    tokens: int,
    seed: int = 0,
    label: str = "gate 0.8",
    pieces: Sequence[str] | None = None,
    dense: bool = False,
) -> dict[str, Any]:
    """A consistent view: a token leaves after it came, for one that was read by then."""
    chance = random.Random(seed)
    expires, dropper, attention = [], [], []
    for _ in range(layers):
        ends, droppers = [], []
        for j in range(tokens):
            left = min(tokens, j + 1 + int(chance.expovariate(8 / tokens)))
            stays = dense or left == tokens or chance.random() < 0.1
            ends.append(tokens if stays else left)
            droppers.append(-1 if stays else chance.randrange(j, left))
        expires.append(ends)
        dropper.append(droppers)
        attention.append([chance.random() ** 8 for _ in range(tokens)])
    ages = [2**power for power in range(20) if 2**power < tokens]
    groups = {
        "part of speech": ("noun", "verb", "determiner", "punctuation"),
        "repetition": ("first time", "second time", "later"),
        "frequency": ("100 most frequent words", "1,000 most frequent words", "rarer"),
    }
    kinds = []
    for group, names in groups.items():
        for name in names:
            by_layer = [1.0 if dense else chance.uniform(0.05, 0.5) for _ in range(layers)]
            kept = sum(by_layer) / layers
            kinds.append(
                {
                    "group": group,
                    "kind": name,
                    "count": chance.randrange(2, 200),
                    "kept": kept,
                    "low": max(0.0, kept - 0.03),
                    "high": min(1.0, kept + 0.04),
                    "by_layer": by_layer,
                }
            )
    return {
        "label": label,
        "model": "smollm2-tuned",
        "policy": label.split()[0],
        "requested": 0.0 if dense else 0.8,
        "sparsity": 0.0 if dense else 0.801,
        "evicts_every": 1 if dense else 32,
        "layers": layers,
        "tokens": tokens,
        "dense": dense,
        "pieces": list(pieces) if pieces else [chance.choice(WORDS) for _ in range(tokens)],
        "expires": expires,
        "dropper": dropper,
        "attention": attention,
        "kinds": kinds,
        "survival": {"age": ages, "share": [1.0 if dense else 1 / (1 + age / 64) for age in ages]},
    }


def report(*views: dict[str, Any]) -> dict[str, Any]:
    return {
        "title": "What smollm2-tuned remembers",
        "command": "ctxprune inspect --compare gate:0.8 --text letter.txt --out report.html",
        "created": "2026-11-25T12:00:00Z",
        "versions": {"ctxprune": "0.1.0", "torch": "2.13.0"},
        "views": list(views),
    }


def expected(view: dict[str, Any], k: int, layer: int | None) -> list[tuple[str, float | None]]:
    """(state, share) of every token, from the definition of what is visible."""
    chosen = view["expires"] if layer is None else [view["expires"][layer]]
    found: list[tuple[str, float | None]] = []
    for j in range(view["tokens"]):
        share = sum(row[j] > k for row in chosen) / len(chosen)
        if j > k:
            found.append(("unread", None))
        else:
            found.append(("held" if share == 1 else "part" if share else "gone", share))
    return found


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    if shutil.which("chromium") is None:
        subprocess.run(["apt-get", "update", "-qq"], check=True)
        subprocess.run(["apt-get", "install", "-y", "-qq", "chromium"], check=True)
    with sync_playwright() as driver:
        opened = driver.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        yield opened
        opened.close()


Open = Callable[..., Page]


@pytest.fixture
def load(browser: Browser, tmp_path: Path) -> Iterator[Open]:
    """Opens a report; in the end, nothing may have gone wrong, and nothing been fetched."""
    wrong: list[str] = []
    contexts = []

    def load(data: dict[str, Any], width: int = 1400, height: int = 900, **options: Any) -> Page:
        path = tmp_path / "report.html"
        path.write_text(render(data), encoding="utf-8")
        context = browser.new_context(viewport={"width": width, "height": height}, **options)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: wrong.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: wrong.append(f"error: {error}"))

        def asked(dialog: Dialog) -> None:
            wrong.append("dialog")
            dialog.dismiss()

        page.on("dialog", asked)

        def fetched(route: Route) -> None:
            if route.request.url == path.as_uri():
                route.continue_()
            else:
                wrong.append(f"request: {route.request.url}")
                route.abort()

        page.route("**/*", fetched)
        page.goto(path.as_uri())
        return page

    yield load
    for context in contexts:
        context.close()
    assert wrong == []


def settle(page: Page, position: int, layer: str = "mean") -> None:
    """Waits until the page shows a position and a layer."""
    page.locator(f'#reader[data-position="{position}"][data-layer="{layer}"]').wait_for()


def move(page: Page, position: int, layer: str = "mean") -> None:
    page.locator("#position").fill(str(position))
    settle(page, position, layer)


def assert_shows(page: Page, data: dict[str, Any], k: int, layer: int | None) -> None:
    for index, view in enumerate(data["views"]):
        shown = page.locator(f'.pane[data-view="{index}"] .token').evaluate_all(
            "all => all.map(token => [token.dataset.state, token.dataset.share])"
        )
        known = min(k, view["tokens"] - 1)
        assert len(shown) == view["tokens"]
        for (state, share), (right, value) in zip(shown, expected(view, known, layer), strict=True):
            assert state == right
            assert (
                (share is None) if value is None else float(share) == pytest.approx(value, abs=1e-4)
            )


def token(page: Page, index: int, view: int = 0) -> Locator:
    return page.locator(f'.pane[data-view="{view}"] .token[data-index="{index}"]')


def test_the_slider_shows_what_is_visible(load: Open) -> None:
    data = report(view(6, 120))
    page = load(data)
    settle(page, 59)  # it opens in the middle of the text
    assert_shows(page, data, 59, None)
    for position in (0, 1, 57, 56, 118, 3, 119):
        move(page, position)
        assert_shows(page, data, position, None)
    page.locator("#layer").select_option("2")
    for position in (119, 0, 64, 65):
        move(page, position, "2")
        assert_shows(page, data, position, 2)


def test_the_slider_by_mouse(load: Open) -> None:
    data = report(view(3, 101))
    page = load(data)
    slider = page.locator("#position")
    box = slider.bounding_box()
    assert box is not None
    slider.click(position={"x": box["width"] / 2, "y": box["height"] / 2})
    settle(page, 50)
    assert_shows(page, data, 50, None)


def test_the_slider_and_the_selector_by_keyboard(load: Open) -> None:
    data = report(view(4, 80))
    page = load(data)
    page.locator("#position").focus()
    for key, position in (("ArrowLeft", 38), (",", 37), (".", 38), ("Home", 0), ("ArrowRight", 1)):
        page.keyboard.press(key)
        settle(page, position)
        assert_shows(page, data, position, None)
    page.locator("#position").press("End")
    page.keyboard.press("Tab")
    for layer in ("0", "1"):
        page.keyboard.press("ArrowDown")
        settle(page, 79, layer)
        assert_shows(page, data, 79, int(layer))
    page.keyboard.press("Home")
    settle(page, 79)
    assert_shows(page, data, 79, None)


# Notes every position that is shown, however late the test looks.
RECORD = """() => {
  const reader = document.querySelector("#reader");
  window.seen = [];
  new MutationObserver(() => {
    const shown = Number(reader.dataset.position);
    if (shown !== window.seen.at(-1)) window.seen.push(shown);
  }).observe(reader, { attributeFilter: ["data-position"] });
}"""
SEEN = """(last) => new Promise((done) => {
  const look = () => (window.seen.includes(last) ? done(window.seen) : setTimeout(look, 20));
  look();
})"""


def test_buttons_and_play(load: Open) -> None:
    data = report(view(2, 30))
    page = load(data)
    assert "Press Play" in page.locator("#reading").inner_text()
    move(page, 29)
    assert page.locator("#forward").is_disabled()
    page.locator("#back").click()
    settle(page, 28)
    page.locator("#forward").click()
    settle(page, 29)
    page.evaluate(RECORD)
    page.locator("#position").press("Space")
    seen = page.evaluate(SEEN, 29)
    assert seen[0] == 0 and seen == sorted(seen) and len(seen) > 5  # from the beginning again
    assert page.locator("#play").inner_text() == "Play"
    assert_shows(page, data, 29, None)
    page.locator("#play").click()
    assert page.locator("#play").inner_text() == "Pause"
    page.locator("#play").click()
    assert page.locator("#play").inner_text() == "Play"


def test_the_status_line_counts(load: Open) -> None:
    data = report(view(5, 1500))
    page = load(data)
    move(page, 1200)
    rows = sum(share or 0 for _, share in expected(data["views"][0], 1200, None))
    line = f"position 1,200 of 1,500: {rows:,.0f} of 1,201 tokens in memory (mean over 5 layers), "
    assert page.locator("#status").inner_text() == line + f"{100 * rows / 1201:.1f}%"
    assert page.locator("#position").get_attribute("aria-valuetext") == line + (
        f"{100 * rows / 1201:.1f}%"
    )
    page.locator("#layer").select_option("4")
    settle(page, 1200, "4")
    rows = sum(share or 0 for _, share in expected(data["views"][0], 1200, 4))
    assert f"{rows:.0f} of 1,201 tokens in memory (layer 4)" in page.locator("#status").inner_text()


def assert_detail(page: Page, view: dict[str, Any], index: int) -> None:
    """The panel has the token's life, and lines go to the tokens that evicted it."""
    droppers = life_of(page, view, index)
    lines = page.locator(".links path").evaluate_all("all => all.map(each => each.dataset.dropper)")
    assert set(lines) == droppers and len(lines) == len(droppers)


def assert_token(page: Page, view: dict[str, Any], index: int) -> None:
    """The panel has the life of the token at the slider, to which no lines go."""
    life_of(page, view, index)
    assert f"Token at the slider, {index:,}" in page.locator("#detail h3").inner_text()
    assert page.locator(".links path").count() == 0


def life_of(page: Page, view: dict[str, Any], index: int) -> set[str]:
    """What evicts the token, other than itself; the panel has its life in every layer."""
    rows = page.locator("#detail tbody tr").evaluate_all(
        "all => all.map(row => [...row.cells].map(cell => cell.textContent))"
    )
    assert len(rows) == view["layers"]
    droppers = set()
    for layer, cells in enumerate(rows):
        end, by = view["expires"][layer][index], view["dropper"][layer][index]
        if by < 0:
            assert cells[:4] == [str(layer), "stays", "", ""]
            continue
        piece = view["pieces"][by].replace("\n", "↵").replace(" ", "·")
        name = "itself" if by == index else piece
        assert cells[:4] == [str(layer), str(end), str(end - index), name]
        droppers |= {str(by)} - {str(index)}
    return droppers


def test_detail_by_hover_and_by_keyboard(load: Open) -> None:
    data = report(view(6, 150))
    (only,) = data["views"]
    page = load(data)
    for position in (74, 20):  # nothing is pointed at
        move(page, position)
        assert_token(page, only, position)
    move(page, 74)
    token(page, 20).hover()
    assert_detail(page, only, 20)
    page.locator("h1").hover()
    page.locator("#layer").focus()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.dataset.index") == "0"
    assert_detail(page, only, 0)
    for key, index in (("ArrowRight", 1), ("ArrowRight", 2), ("ArrowLeft", 1), ("End", 149)):
        page.keyboard.press(key)
        assert page.evaluate("document.activeElement.dataset.index") == str(index)
        assert_detail(page, only, index)
    page.keyboard.press("Home")
    page.keyboard.press("ArrowDown")
    below = page.evaluate("Number(document.activeElement.dataset.index)")
    first, second = token(page, 0).bounding_box(), token(page, below).bounding_box()
    assert first and second and below < 60
    assert second["y"] + second["height"] > first["y"] + first["height"]
    page.keyboard.press("ArrowUp")
    assert page.evaluate("document.activeElement.dataset.index") == "0"
    assert page.locator('.token[tabindex="0"]').count() == 1
    token(page, 30).hover()  # looks, and comes back
    assert_detail(page, only, 30)
    page.locator("h1").hover()
    assert_detail(page, only, 0)
    page.keyboard.press("Escape")
    assert_token(page, only, 74)  # at the slider again, without lines


def test_detail_of_one_layer_and_the_way_to_a_dropper(load: Open) -> None:
    data = report(view(6, 150))
    (only,) = data["views"]
    index, layer = next(
        (j, layer)
        for j in range(30)
        for layer in range(6)
        if only["dropper"][layer][j] > j and only["dropper"][layer][j] >= 0
    )
    page = load(data)
    page.locator("#layer").select_option(str(layer))
    settle(page, 74, str(layer))
    token(page, index).click()
    by = only["dropper"][layer][index]
    assert page.locator(".links path").get_attribute("data-dropper") == str(by)
    page.locator(f'#detail tr[data-layer="{layer}"] button').click()
    assert page.evaluate("document.activeElement.dataset.index") == str(by)
    assert f"position {by}" in page.locator("#detail").inner_text()


def test_views_side_by_side(load: Open) -> None:
    views = [
        view(4, 90, seed=1),
        view(4, 90, seed=2, label="sink 0.8"),
        view(2, 60, seed=3, label="window <b>0.8</b>"),
        view(4, 90, label="dense", dense=True),
    ]
    data = report(*views)
    page = load(data, width=1800)
    for position in (89, 70, 12):
        move(page, position)
        assert_shows(page, data, position, None)
    page.locator("#layer").select_option("1")
    settle(page, 12, "1")
    assert_shows(page, data, 12, 1)
    token(page, 5, view=1).click()
    assert "sink 0.8" in page.locator("#detail h3").inner_text()
    token(page, 7, view=2).hover()
    assert "window <b>0.8</b>" in page.locator("#detail h3").inner_text()
    assert page.locator('.token[tabindex="0"]').count() == 4  # one stop a text
    assert page.locator('.series[data-view="3"]').count() == 3
    status = page.locator("#status").inner_text()
    assert all(each["label"] in status for each in views)


def test_hostile_text_is_only_text(load: Open) -> None:
    pieces = HOSTILE * 3
    hostile = view(3, len(pieces), pieces=pieces, label=HOSTILE[0])
    hostile["model"] = hostile["policy"] = hostile["kinds"][0]["kind"] = HOSTILE[2]
    hostile["kinds"][0]["group"] = HOSTILE[1]
    data = report(hostile, view(3, len(pieces), pieces=pieces, label=HOSTILE[2]))
    data["title"], data["command"] = HOSTILE[0], HOSTILE[2]
    data["versions"][HOSTILE[2]] = HOSTILE[0]
    page = load(data)
    shown = page.locator('.pane[data-view="0"] .token').evaluate_all(
        "all => all.map(each => JSON.stringify(each.textContent))"
    )
    assert [json.loads(each) for each in shown] == [words.terminal(piece) for piece in pieces]
    for index in range(len(HOSTILE)):
        token(page, index).evaluate("each => each.focus()")
        assert page.locator("#detail tbody tr").count() == 3
    page.locator("summary").evaluate_all("all => all.forEach(each => each.click())")
    page.locator("details table").last.wait_for()
    assert page.locator("details table").count() == page.locator("figure").count()
    assert page.title() == HOSTILE[0]
    assert page.locator("h1").inner_text() == HOSTILE[0]
    assert page.locator("#command").inner_text() == HOSTILE[2]
    assert page.evaluate("window.pwned") is None
    assert page.locator("img").count() == 0 and page.locator("script").count() == 2


def test_line_breaks_break_lines(load: Open) -> None:
    page = load(report(view(2, 5, pieces=["one", "\n", "two", "\n\n", "three"])))
    tops = [
        token(page, index).evaluate("each => each.getBoundingClientRect().top")
        for index in (0, 2, 4)
    ]
    assert tops[1] - tops[0] == pytest.approx((tops[2] - tops[1]) / 2, abs=1)


@pytest.mark.parametrize(("layers", "tokens"), [(1, 1), (1, 2), (3, 1), (2, 2), (1, 40)])
@pytest.mark.parametrize("dense", [False, True])
def test_edges(load: Open, layers: int, tokens: int, dense: bool) -> None:
    small = view(layers, tokens, dense=dense)
    small["kinds"] = []
    data = report(small)
    page = load(data)
    for position in sorted({0, tokens // 2, tokens - 1}):
        move(page, position)
        assert_shows(page, data, position, None)
    page.locator("#layer").select_option("0")
    settle(page, tokens - 1, "0")
    assert_shows(page, data, tokens - 1, 0)
    token(page, 0).hover()
    assert_detail(page, small, 0)
    assert not page.locator("svg").evaluate_all(
        "all => all.some(each => /NaN|Infinity|undefined/.test(each.outerHTML))"
    )


def test_charts_have_words(load: Open) -> None:
    page = load(report(view(6, 200), view(6, 200, seed=5, label="sink 0.8")))
    page.locator("figure").last.scroll_into_view_if_needed()
    figures = page.locator("figure")
    assert figures.count() == 8  # 2 heat maps, 4 charts of both, 2 of kinds by layer
    for index in range(8):
        image = figures.nth(index).locator('svg[role="img"]')
        assert len(image.get_attribute("aria-label") or "") > 60
        figures.nth(index).locator("summary").click()
        figures.nth(index).locator("details tbody tr").nth(3).wait_for()
    rows = figures.nth(6).locator("details tbody tr").first
    before = rows.inner_text()
    move(page, 3)
    assert rows.inner_text() != before  # an open table follows the slider


# Rows of a figure of categories: the name, and the number of its tokens.
LABELS = """figure => [...figure.querySelectorAll("text.count")].map(
  count => [count.previousSibling.textContent, count.textContent])"""


def test_what_differs_most_comes_first_with_its_number_of_tokens(load: Open) -> None:
    one, other = view(3, 50), view(3, 50, seed=1, label="h2o 0.8")
    for each, share in ((one, 0.1), (other, 0.12)):
        for kind in each["kinds"]:
            kind.update(count=20, kept=share, low=share, high=share)
    one["kinds"][5].update(kept=0.5, high=0.5, count=7)
    other["kinds"][5].update(count=7)
    one["kinds"][8].update(kept=0.3, high=0.3, count=1200)
    other["kinds"][8].update(count=1234)
    one["kinds"][9].update(kept=0.9, high=0.9, count=4)
    other["kinds"][9].update(count=4)
    page = load(report(one, other))
    page.locator(".bar").first.wait_for()
    first = page.locator("#charts figure").first
    labels = first.evaluate(LABELS)
    assert labels[0] == ["second time", "7"] and labels[3][1] == "1,200 / 1,234"
    assert len(labels) == 9 and "rarer" not in dict(labels)  # of four tokens
    assert "rarer (4)" in first.locator("figcaption").inner_text()
    first.locator("summary").click()
    assert "rarer" in first.locator("details table").inner_text()


def test_an_interval_that_says_nothing_is_not_drawn(load: Open) -> None:
    data = view(3, 50)
    for kind in data["kinds"]:
        kind["count"] = 20
    data["kinds"][0].update(low=0.0, high=1.0)
    page = load(report(data))
    page.locator(".bar").first.wait_for()
    assert page.locator(".bar").count() == page.locator(".whisker").count() + 1 == 10


CONTRAST = """() => {
  const canvas = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
  const luminance = (...layers) => {
    for (const each of layers) { canvas.fillStyle = each; canvas.fillRect(0, 0, 1, 1); }
    const parts = [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3).map((part) => {
      const value = part / 255;
      return value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2];
  };
  const found = {};
  for (const token of document.querySelectorAll(".token")) {
    const surface = getComputedStyle(token.closest(".pane")).backgroundColor;
    const style = getComputedStyle(token);
    const ground = luminance(surface, style.backgroundColor);
    const text = luminance(surface, style.backgroundColor, style.color);
    const ratio = (Math.max(ground, text) + 0.05) / (Math.min(ground, text) + 0.05);
    found[token.dataset.state] = Math.min(found[token.dataset.state] ?? 99, ratio);
  }
  return found;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_state_is_readable(load: Open, scheme: str) -> None:
    page = load(report(view(5, 200)), color_scheme=scheme)
    move(page, 150)
    ratios = page.evaluate(CONTRAST)
    assert set(ratios) == {"held", "part", "gone", "unread"}
    assert all(ratio >= 4.5 for ratio in ratios.values()), ratios


@pytest.mark.parametrize("width", [360, 800, 1400])
def test_nothing_sticks_out(load: Open, width: int, tmp_path: Path) -> None:
    data = report(view(12, 600), view(12, 600, seed=5, label="sink 0.8"))
    for scheme in ("light", "dark"):
        page = load(data, width=width, color_scheme=scheme)
        move(page, 450)
        token(page, 60).click()
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        page.screenshot(path=tmp_path / f"{scheme}-{width}.png")
        assert (tmp_path / f"{scheme}-{width}.png").stat().st_size > 0


def test_a_narrow_screen_shows_one_policy_at_a_time(load: Open) -> None:
    data = report(view(4, 400), view(4, 300, seed=1, label="h2o 0.8"))
    page = load(data, width=390)
    panes = page.locator(".pane")
    assert panes.nth(0).is_visible() and not panes.nth(1).is_visible()
    token(page, 150).click()
    place = panes.nth(0).locator(".text").evaluate("box => box.scrollTop")
    assert place > 0
    page.locator("#views label").nth(1).click()
    assert panes.nth(1).is_visible() and not panes.nth(0).is_visible()
    assert panes.nth(1).locator(".text").evaluate("box => box.scrollTop") == place
    assert_detail(page, data["views"][1], 150)  # the same token of the other one
    assert "h2o 0.8" in page.locator("#detail h3").inner_text()
    page.keyboard.press("Escape")
    page.keyboard.press("ArrowLeft")
    assert panes.nth(0).is_visible()
    assert_token(page, data["views"][0], 199)
    wide = load(data, width=1280)
    assert wide.locator(".pane:visible").count() == 2
    assert not wide.locator("#views").is_visible()
    assert not load(report(view(2, 9)), width=390).locator("#views").is_visible()


def test_landmarks_and_names(load: Open) -> None:
    page = load(report(view(3, 50)))
    for element in ("header", "main", "h1", "aside"):
        assert page.locator(f"body {element}").first.is_visible()
    assert page.locator("html").get_attribute("lang") == "en"
    assert page.get_by_label("Position", exact=True).get_attribute("id") == "position"
    assert page.get_by_label("Layers", exact=True).get_attribute("id") == "layer"
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "reader"


def test_calm_motion_plays_in_large_steps(load: Open) -> None:
    page = load(report(view(2, 100)), reduced_motion="reduce")
    page.evaluate(RECORD)
    page.locator("#play").click()
    seen = page.evaluate(SEEN, 59)
    assert seen[:2] == [54, 59]


def test_the_file_is_small() -> None:
    assert len(render(report(view(30, 2000)))) < 3_000_000


def test_numbers_that_are_none_are_refused() -> None:
    broken = view(2, 4)
    broken["attention"][0][0] = float("nan")
    with pytest.raises(ValueError):
        render(report(broken))


STEP = """async (position) => {
  const slider = document.querySelector("#position");
  const frame = () => new Promise((done) => requestAnimationFrame(done));
  await frame();
  const start = performance.now();
  slider.value = position;
  slider.dispatchEvent(new Event("input"));
  await frame();
  const script = performance.now() - start;
  await frame();  // the one in between has been laid out and painted
  return [script, performance.now() - start];
}"""


def test_a_long_text_follows_the_slider(load: Open) -> None:
    data = report(view(30, 4000))
    page = load(data)
    token(page, 2100).click()  # with its lines, which follow the slider too
    times = {}
    for name, positions in {
        "step": [2000 + step for step in range(60)],
        "jump": [3999, 0, 3000, 100, 2500],
    }.items():
        found = [page.evaluate(STEP, position)[1] for position in positions]
        times[name] = f"{sorted(found)[len(found) // 2]:.0f} ms, at most {max(found):.0f}"
    print(f"4,000 tokens x 30 layers, input to the second frame: {times}")
    settle(page, 2500)
    assert_shows(page, data, 2500, None)
