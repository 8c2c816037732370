"""The documents: links lead somewhere, printed commands exist, tables are as computed."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

from ctxprune.cli.main import app

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    path
    for path in ROOT.rglob("*.md")
    if not {part for part in path.relative_to(ROOT).parts if part.startswith(".")}
    and path.relative_to(ROOT).parts[0] != "runs"
)
# What a user reads first: its commands are run as printed, its lines are read in a terminal.
GUIDES = [ROOT / "README.md", *sorted((ROOT / "docs" / "guide").glob("*.md"))]
PROSE = [*GUIDES, ROOT / "docs" / "glossary.md", ROOT / "CONTRIBUTING.md"]
COLUMNS = 100
LINK = re.compile(r"\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    found = re.findall(r"^#+ (.*)$", FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", each).strip().lower().replace(" ", "-") for each in found}


def broken(page: Path, text: str) -> Iterator[str]:
    """The relative links of a page that lead nowhere."""
    for link in LINK.findall(FENCE.sub("", text)):
        target, _, anchor = link.partition("#")
        if re.match(r"[a-z]+:", link):
            continue
        path = page.parent / target if target else page
        if not path.exists():
            yield link
        elif anchor and anchor not in anchors(path.read_text(encoding="utf-8")):
            yield link


def commands(text: str) -> list[list[str]]:
    """The arguments of every `ctxprune ...` that a page prints, in a block or in its prose."""
    text = re.sub(r"\\\n\s*", " ", text)
    lines = re.findall(r"^ {4}(ctxprune .*)$", text, re.MULTILINE)
    for block in re.findall(r"^```(?:bash|sh|console|text)?\n(.*?)^```$", text, re.M | re.S):
        lines += re.findall(r"^(?:\$ )?(ctxprune .*)$", block, re.MULTILINE)
    lines += re.findall(r"`(ctxprune [^`]*)`", FENCE.sub("", text))
    split = [shlex.split(line.partition("  (")[0], comments=True) for line in lines]
    return [arguments[1:] for arguments in split if "..." not in arguments]


def misspelled(arguments: list[str]) -> str | None:
    """What is wrong with a command, None if it has a subcommand and options that exist."""
    group = typer.main.get_command(app)
    known = group.commands  # type: ignore[attr-defined]
    words = [argument for argument in arguments if not argument.startswith("-")]
    options = {argument.partition("=")[0] for argument in arguments if argument.startswith("--")}
    if words and not re.fullmatch(r"[A-Z]+", words[0]):
        if words[0] not in known:
            return f"no command `{words[0]}`"
        group = known[words[0]]
    allowed = {"--help"}
    for parameter in group.params:
        allowed |= {*parameter.opts, *parameter.secondary_opts}
    wrong = options - allowed
    return f"no option {', '.join(sorted(wrong))}" if wrong else None


def long_lines(text: str) -> list[str]:
    """Lines of prose that are too long; tables, and lines that a link makes so, may be."""
    return [
        line
        for line in text.splitlines()
        if len(LINK.sub("]", line)) > COLUMNS and not line.lstrip().startswith("|")
    ]


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_relative_links_lead_somewhere(page: Path) -> None:
    assert list(broken(page, page.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize("page", GUIDES, ids=name)
def test_printed_commands_exist(page: Path) -> None:
    found = commands(page.read_text(encoding="utf-8"))
    assert found
    wrong = {shlex.join(each): misspelled(each) for each in found}
    assert {command: why for command, why in wrong.items() if why} == {}


@pytest.mark.parametrize("page", PROSE, ids=name)
def test_no_line_of_prose_is_too_long(page: Path) -> None:
    assert long_lines(page.read_text(encoding="utf-8")) == []


def test_the_table_of_sparsities_is_what_its_code_prints(
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    exec(code, {})
    printed = capsys.readouterr().out
    assert len(printed.splitlines()) == 4 and printed in text


def test_every_entry_of_the_log_has_its_heads_and_a_line_in_the_index() -> None:
    log = ROOT / "docs" / "log"
    index = (log / "README.md").read_text(encoding="utf-8")
    entries = [path for path in log.glob("*.md") if path.name != "README.md"]
    assert len(entries) > 20
    for entry in entries:
        heads = re.findall(r"^\*\*(\w+)\.\*\*", entry.read_text(encoding="utf-8"), re.MULTILINE)
        wanted = ["Verdict", "Question", "Setup", "Result", "Decision", "Code"]
        assert [head for head in heads if head in wanted] == wanted, entry.name
        assert f"({entry.name})" in index, entry.name


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("[a](none.md)", ["none.md"]),
        ("[a](README.md#no-such-heading)", ["README.md#no-such-heading"]),
        ("[a](README.md) [b](https://example.org/x) [c](#here)\n\n# Here", []),
        ("![figure](docs/none.png)", ["docs/none.png"]),
        ("```\n[a](none.md)\n```", []),
    ],
)
def test_a_broken_link_is_seen(text: str, found: list[str], tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(text)
    (tmp_path / "README.md").write_text("# Title")
    assert list(broken(page, text)) == found


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("    ctxprune eval --sparsity 0.8 \\\n        --max-tokens 9\n", [None]),
        ("    ctxprune evil --sparsity 0.8\n", ["no command `evil`"]),
        ("`ctxprune eval --sparcity=0.8` in prose", ["no option --sparcity"]),
        ("```bash\nctxprune tune --bf16 --nothing\n```", ["no option --nothing"]),
        ("    ctxprune --version\n", [None]),
    ],
)
def test_a_wrong_command_is_seen(text: str, wrong: list[str | None]) -> None:
    assert [misspelled(each) for each in commands(text)] == wrong
