"""Names and texts of others, wherever they are shown: they are words, and nothing else."""

from __future__ import annotations

import dataclasses
import io
import json
import re
import unicodedata
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from outcome import ctxprune
from rich.table import Table
from test_figures import view as view_of
from test_merged import Page, benchmark, evaluation
from test_report import with_retrieval

from ctxprune.cli import console, progress
from ctxprune.evals.inspect.figures import draw
from ctxprune.evals.inspect.inspection import page_data, rich_kinds
from ctxprune.evals.inspect.page import render
from ctxprune.evals.places import nearby
from ctxprune.evals.report import report, report_page
from ctxprune.evals.report.merged import merge
from ctxprune.evals.report.on_card import on_card
from ctxprune.evals.results import Benchmark, Evaluation, measured
from ctxprune.evals.speed import speed_report
from ctxprune.pruner import words
from ctxprune.pruner.checkpoints.card import model_card
from ctxprune.pruner.errors import CtxpruneError

NAMES = [
    "m[bold]b",
    "m[/]b",
    "[link=http://x]y[/link]",
    ":smile:",
    "\x1b[31mred",
    "\x1b]0;title\x07",
    "\x9b2J",
    "a\rb",
    "a\x08\x08b",
    "a\0b",
    "\u202egpj.exe",
    "\u2066a\u2069",
    "a\nb",
    "a\n\n# head",
    "a\u2028b",
    "\x85",
    "a | b",
    "`code`",
    "*a* **b** _c_ __d__ ~~e~~",
    "![i](http://x) [l](http://x)",
    "<script>alert(1)</script>",
    "</title></svg><img src=x onerror=alert(1)>",
    "<!-- a -->",
    "&lt;b&gt; &amp;",
    '" onload="x',
    "---\nlicense: mit",
    "{{ jinja }} ${x} $main",
    "$x_{$ $\\frac$ \\alpha",
    "_hidden",
    "- a",
    "1. a",
    "===",
    "\ufffe\uffff",
    "\ufeffa",
    "🙂 שלום नमस्ते",
    "n" * 900,
]
# What no target lets through: controls but for lines and tabs, and what turns the direction.
OBEYED = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ufffe\uffff]")
MARKUP = ("html", "em", "strong", "link", "image", "code_inline", "s_", "list", "ordered", "hr")


@pytest.mark.parametrize("name", NAMES)
def test_a_name_means_nothing_to_a_terminal(name: str) -> None:
    """In a line, a cell, a title, a caption, a header and a rule."""
    shown = console.Plain(file=io.StringIO(), width=4000, force_terminal=True, color_system=None)
    table = Table(title=name, caption=name)
    table.add_column(name)
    table.add_row(name)
    shown.print(name)
    shown.print(table)
    shown.rule(name)
    shown.print(console.shaded([name], [1.0]))
    file = shown.file
    assert isinstance(file, io.StringIO)
    printed = re.sub("\x1b\\[[0-9;]*m", "", file.getvalue())  # rich's own styles
    assert not OBEYED.search(printed)
    first = words.terminal(name).splitlines()[0].expandtabs()
    assert printed.count(first.strip()) >= 6


@pytest.mark.parametrize("name", NAMES)
def test_messages_are_one_line_of_words(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    made = console.Plain(stderr=True)
    made.print(f"error: `{words.line(name)}` does not exist", soft_wrap=True)
    told = capsys.readouterr().err
    assert told == f"error: `{words.line(name)}` does not exist\n"
    assert not OBEYED.search(told) and told.count("\n") == 1


@pytest.mark.parametrize("name", NAMES)
def test_a_name_in_markdown_is_text(name: str) -> None:
    reader = MarkdownIt("commonmark").enable(["table", "strikethrough"])
    for text, wanted in (
        (f"# {words.markdown(name)}\n", words.line(name)),
        (f"{words.paragraph(name)}\n", words.line(name)),
        (f"| a |\n| --- |\n| {words.markdown(name)} |\n", f"a{words.line(name)}"),
    ):
        tokens = reader.parse(text)
        inline = [kid for token in tokens for kid in token.children or ()]
        assert not [each.type for each in (*tokens, *inline) if each.type.startswith(MARKUP)]
        assert "".join(kid.content for kid in inline).split() == wanted.split()
        assert not OBEYED.search(text)


@pytest.mark.parametrize("name", NAMES)
def test_a_name_in_html_is_text(name: str) -> None:
    page = Page(f'<p title="{words.html(name)}">{words.html(name)}</p>')
    assert page.text == words.terminal(name)
    assert page.found == [("p", {"title": words.terminal(name)})]


def hostile(name: str) -> list[tuple[str, Any]]:
    """Results in which everything that has a name has this one."""
    made = evaluation(name, name, [(0.0, 0.0, 30.0), (0.8, 0.8, 33.0)], name, command=name)
    made |= {"machine": name, "device": name, "dtype": name, "date": name, "threads": 1}
    made["versions"] = {name: name}
    scores = made["levels"][1]["tasks"]["hellaswag"]
    scores = {**scores, name: 0.5, "not_finite": {f"{name}2": name}}
    cells = with_retrieval()["levels"][0]["tasks"]["retrieval"]["cells"]
    made["levels"][1]["tasks"] = {name: {**scores, "cells": cells}}
    bench = benchmark(model=name, policy=name, machine=name, text=name, extensions=[name])
    bench["dtype"] = bench["rows"][0]["dtype"] = name
    return [(name, made), (f"{name}2", bench)]


@pytest.mark.parametrize("name", NAMES)
def test_the_page_of_a_report_shows_words(name: str) -> None:
    page = Page(report_page.html(merge(hostile(name))))
    assert page.all("script") == [] and page.all("img") == []
    assert not any({"onload", "onerror"} & {*attributes} for _, attributes in page.found)
    assert not OBEYED.search(page.text)
    assert words.terminal(name).split() <= page.text.split() or words.terminal(name) in page.text


@pytest.mark.parametrize("name", NAMES)
def test_the_markdown_of_a_report_shows_words(name: str) -> None:
    page = report_page.markdown(merge(hostile(name)))
    assert not OBEYED.search(page)
    tokens = MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(page)
    inline = [kid for token in tokens for kid in token.children or ()]
    ours = {kid.content for kid in inline if kid.type == "code_inline"}
    assert ours <= {"compression_ratio"}
    found = {each.type for each in (*tokens, *inline)} - {"code_inline"}
    assert not {kind for kind in found if kind.startswith(MARKUP)}
    heads = [tokens[n + 1].content for n, t in enumerate(tokens) if t.type == "heading_open"]
    assert heads[0] == "What was measured" and len(heads) == 9
    widths = [
        sum(each.type in ("th_open", "td_open") for each in tokens[n : tokens.index(end, n)])
        for n, each in enumerate(tokens)
        if each.type == "tr_open"
        for end in [next(t for t in tokens[n:] if t.type == "tr_close")]
    ]
    assert len(set(widths)) <= 7  # as many kinds of tables as there are, whatever is in a cell


@pytest.mark.parametrize("name", NAMES)
def test_tables_of_a_terminal_show_words(name: str) -> None:
    (_, one), (_, other) = hostile(name)
    made, bench = measured(Evaluation, one), measured(Benchmark, other)
    shown = console.Plain(file=io.StringIO(), width=6000, force_terminal=False)
    for table in report.rich_tables([made]):
        shown.print(table)
    shown.print(speed_report.rich_table(bench))
    file = shown.file
    assert isinstance(file, io.StringIO)
    assert not OBEYED.search(file.getvalue())
    first = words.terminal(name).splitlines()[0].strip()
    assert first in file.getvalue()


@pytest.mark.parametrize("name", NAMES)
def test_figures_show_words(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is a formula, and no label that begins with `_` is left out."""
    from matplotlib import mathtext

    def formula(*_: Any, **__: Any) -> None:
        raise AssertionError("a name was taken for a formula")

    monkeypatch.setattr(mathtext.MathTextParser, "parse", formula)
    (_, one), (_, other) = hostile(name)
    report.plot([measured(Evaluation, one)], tmp_path / "eval.png")
    speed_report.plot(measured(Benchmark, other), tmp_path / "bench.png")
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in tmp_path.iterdir())
    label = words.figure(name)
    assert not OBEYED.search(label) and not label.startswith("_") and "\n" not in label


CARD: dict[str, Any] = {
    "model_type": "gpt2",
    "parameters": 1,
    "parameters_added": 1,
    "tuned_sparsity": 0.8,
    "config": {"context": 64},
    "layers": "3 of 3 attention layers have a gate",
}


@pytest.mark.parametrize("name", NAMES)
def test_a_model_card_shows_words(name: str) -> None:
    origin = {"license": name, "language": [name], "base_model": name}
    tuned = {"data": f"a/{name}", "steps": 3}
    about = CARD | {"provenance": {"base": name, "origin": origin, "tune": tuned}}
    shown = str(model_card(about, name, **on_card(merge(hostile(name)[:1]))))
    assert not OBEYED.search(shown)
    _, front, body = shown.split("---\n", 2)
    data = yaml.safe_load(front)
    said = words.line(name)
    assert (data["license"], data["language"], data["base_model"]) == (said, [said], said)
    assert data["library_name"] == "transformers" and "model-index" in data
    assert ModelCard(shown, ignore_metadata_errors=True).data.license == said
    tokens = MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(body)
    inline = [kid for token in tokens for kid in token.children or ()]
    kinds = {each.type for each in (*tokens, *inline)} - {"code_inline"}
    assert not {kind for kind in kinds if kind.startswith(MARKUP)}
    heads = [tokens[n + 1] for n, t in enumerate(tokens) if t.type == "heading_open"]
    assert [head.content for head in heads[1:5]] == ["Use", "Training", "Measured", "Perplexity"]


@pytest.mark.parametrize("name", NAMES)
def test_the_page_and_the_figures_of_inspect_show_words(name: str, tmp_path: Path) -> None:
    view = view_of(name, 60)
    trace = dataclasses.replace(
        view.trace, model=name, policy=name, pieces=(name, *view.trace.pieces[1:])
    )
    view = dataclasses.replace(view, trace=trace)
    page = render(page_data([view], name))
    assert not OBEYED.search(page)
    held = json.loads(page.partition('id="data">')[2].partition("<")[0])
    assert held["title"] == held["views"][0]["pieces"][0] == words.terminal(name)
    shown = console.Plain(file=io.StringIO(), width=4000, force_terminal=False)
    shown.print(rich_kinds([view]))
    file = shown.file
    assert isinstance(file, io.StringIO) and not OBEYED.search(file.getvalue())


@pytest.mark.parametrize("name", ["$x_{$", "_hidden", "a\0b"])
def test_the_figures_of_inspect_show_words(name: str, tmp_path: Path) -> None:
    assert draw([view_of(name, 60), view_of("other", 60, seed=1)], tmp_path)


TYPED: list[tuple[tuple[str, ...], str]] = [
    (("report", "{}"), "cannot be read"),
    (("report", "--out", "{}"), "ends in neither"),
    (("report", "--{}"), "No such option"),
    (("{}",), "No such command"),
    (("eval", "--model", "{}"), "there is no folder"),
    (("eval", "--model", "m", "--policy", "{}"), "unknown policy"),
    (("eval", "--model", "m", "--sparsity", "{}"), "not a list of numbers"),
    (("run", "{}"), "unknown recipe"),
    (("run", "{}.yaml"), "does not exist"),
    (("info", "{}"), ""),
    (("convert", "./{}", "--out", "o"), ""),
    (("bench", "--architecture", "{}"), "unknown architecture"),
    (("inspect", "--model", "m", "--compare", "gate:{}"), "is no sparsity"),
]


@pytest.mark.parametrize("name", ["\x1b[31mred\x1b]0;x\x07", "[bold]b[/x]", "a\u202eb\x9bm"])
@pytest.mark.parametrize(("arguments", "message"), TYPED)
def test_what_was_typed_is_quoted_as_words(
    arguments: tuple[str, ...], message: str, name: str, tmp_path: Path
) -> None:
    done = ctxprune(
        *(each.format(name) for each in arguments), cwd=tmp_path, env={"COLUMNS": "300"}
    )
    assert done.code == 2 and "Traceback" not in done.err, done.err
    assert message in done.err
    assert not OBEYED.search(done.err) and not OBEYED.search(done.out)
    assert words.line(name) in done.err


def test_a_bar_shows_words(monkeypatch: pytest.MonkeyPatch) -> None:
    from ctxprune.evals.quality.work import Progress

    shown = console.Plain(file=io.StringIO(), force_terminal=True, width=200)
    monkeypatch.setattr(progress, "err", shown)
    with progress.evaluation_progress() as on_pass:
        on_pass(Progress("\x1b]0;x\x07[bold]task", 0.5, "1 s"))
    file = shown.file
    assert isinstance(file, io.StringIO)
    assert "\\x1b]0;x\\x07[bold]task" in file.getvalue() and "\x07" not in file.getvalue()


def test_a_terminal_obeys_nothing_of_a_generated_text(monkeypatch: pytest.MonkeyPatch) -> None:
    for at_terminal, wanted in ((True, "a\\x1b[2Jb\n"), (False, "a\x1b[2Jb\n")):
        file = io.StringIO()
        monkeypatch.setattr(file, "isatty", lambda it=at_terminal: it, raising=False)
        monkeypatch.setattr("sys.stdout", file)
        console.stream("a\x1b[2Jb\n")
        assert file.getvalue() == wanted


def test_a_refusal_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    console.fail(CtxpruneError("`a\nb\x1b[m` is\r\nwrong", "give `c\nd`"))
    assert capsys.readouterr().err == "error: `a b\\x1b[m` is wrong\n\nhint: give `c d`\n"


@pytest.mark.parametrize(
    ("path", "shared"),
    [
        ("/home/me/tuned", "tuned"),
        ("/home/me/runs/demo/tuned", "demo/tuned"),
        ("/home/me", "/"),
        ("/Users/me/tuned", "tuned"),
        ("/data/books/test.txt", "books/test.txt"),
        ("/data/wiki/test.txt", "wiki/test.txt"),
        ("/tuned", "tuned"),
        ("~/a/b/tuned", "b/tuned"),
        (r"C:\Users\me\tuned", "tuned"),
        (r"D:\runs\a\tuned", "a/tuned"),
        ("/root/secret/tuned", "secret/tuned"),
        ("/root/tuned", "tuned"),
        ("runs/tuned", "runs/tuned"),
        ("../tuned", "../tuned"),
        ("embedded", "embedded"),
        ("gpt2", "gpt2"),
    ],
)
def test_results_say_of_a_place_what_tells_it_apart(
    path: str, shared: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/root")
    assert nearby(path) == shared


def test_no_character_that_is_obeyed_is_left() -> None:
    every = "".join(map(chr, range(0x110000)))
    for target in (words.terminal, words.line, words.markdown, words.html, words.figure):
        left = {c for c in target(every) if unicodedata.category(c) in ("Cc", "Cs")}
        assert left <= {"\n", "\t"}, target
