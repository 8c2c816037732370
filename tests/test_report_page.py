"""`ctxprune report`: results of several runs become one page that escapes what they hold."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from test_cli import ctxprune
from test_report import result

from ctxprune.evals.merged import merge
from ctxprune.evals.report_page import html, markdown

HOSTILE = "<script>alert(1)<!--&"
VOID = {"meta", "br", "hr", "img", "link", "input", "col"}


class Structure(HTMLParser):
    """Checks that elements close in order, and collects what matters."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.scripts, self.captions, self.labels = 0, 0, [""]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        self.scripts += tag == "script"
        self.captions += tag == "caption"
        if tag == "svg":
            self.labels.append(dict(attrs).get("aria-label") or "")
        for name, value in attrs:
            # An address of a namespace fetches nothing; a source or a link would.
            assert name not in ("src", "srcset") and not (name == "href" and "//" in (value or ""))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def results() -> list[tuple[str, Any]]:
    """Two policies of one model, its control, and the first of them once more."""
    gate = result("runs/tuned", "gate", [(0.0, 0.0, 30.1), (0.8, 0.79, 32.3)])
    window = result("runs/tuned", "window", [(0.8, 0.8, 220.0)])
    control = result("runs/control", "gate", [(0.0, 0.0, 29.7)])
    return [("a.json", [gate, window]), ("b.json", control), ("c.json", gate)]


def test_rows_are_merged_and_none_is_told_twice() -> None:
    page = markdown(merge(results()))
    for row in (
        "| tuned | dense | 0 | 0.000 | 0.000 | 30.10 |  |",
        "| tuned | gate | 0.8 | 0.790 | 0.790 | 32.30 | +7.3% |",
        "| tuned | window | 0.8 | 0.800 | 0.800 | 220.00 | +630.9% |",
        "| control | dense | 0 | 0.000 | 0.000 | 29.70 |  |",
        "| tuned | gate | 0.8 | 0.310 | 0.420 ± 0.049 | 0.450 |",
    ):
        assert page.count(row) == 1


def test_the_page_is_whole_and_fetches_nothing() -> None:
    page = html(merge(results()))
    structure = Structure()
    structure.feed(page)
    assert structure.open == [] and structure.scripts == 0 and structure.captions >= 3
    labels = structure.labels[1:]
    assert len(labels) == 2 and all(labels)
    assert "gate, tuned: 32.30" in labels[0] and labels[1].startswith("Accuracy")


def test_what_a_file_says_is_text() -> None:
    page = html(merge([("x.json", result(HOSTILE, "gate", [(0.0, 0.0, 3.0), (0.8, 0.8, 4.0)]))]))
    structure = Structure()
    structure.feed(page)
    assert structure.scripts == 0 and "alert(1)" in page


def test_the_command(tmp_path: Path) -> None:
    for name, value in results():
        (tmp_path / name).write_text(json.dumps(value))
    done = ctxprune("report", "a.json", "b.json", "--out", "new/page.html", cwd=tmp_path)
    assert "wrote new/page.html" in done.stderr
    assert (tmp_path / "new" / "page.html").read_text().startswith("<!DOCTYPE html>")
    ctxprune("report", "a.json", "c.json", "--out", "page.md", cwd=tmp_path)
    assert "| tuned | window |" in (tmp_path / "page.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no results were given"),
        (["none.json"], "`none.json`"),
        (["broken.json"], "`broken.json` cannot be read as JSON"),
        (["other.json"], "`other.json` holds no results"),
        (["good.json", "--out", "page.pdf"], "neither .html nor .md"),
    ],
)
def test_bad_input_is_one_sentence(arguments: list[str], message: str, tmp_path: Path) -> None:
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "other.json").write_text('{"a": 1}')
    (tmp_path / "good.json").write_text(json.dumps(results()[1][1]))
    done = ctxprune("report", *arguments, cwd=tmp_path, code=2)
    assert message in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.glob("*.html"))
