"""Several results as one: what compares with what, the page, the Markdown, the command."""

from __future__ import annotations

import copy
import json
import math
import re
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt
from test_cli import Make, ctxprune
from test_report import result, with_retrieval

from ctxprune.evals.quality.evaluate import OWN_TASKS
from ctxprune.evals.report.charts import accuracy_chart, perplexity_chart
from ctxprune.evals.report.merged import DENSE, OF_TEXT, merge, short_names
from ctxprune.evals.report.report_page import html, markdown
from ctxprune.evals.results import Benchmark, Breakdown, measured
from ctxprune.evals.speed import speed_report
from ctxprune.evals.speed.breakdown import RANGES
from ctxprune.pruner.errors import CtxpruneError

Results = dict[str, Any]
HOSTILE = "<script>alert(1)</script>&"


def evaluation(
    model: str,
    policy: str,
    points: list[tuple[float, float, float]],
    text: str = "books/test.txt",
    **fields: Any,
) -> Results:
    """As `eval --out` writes it."""
    origin = {"text": text, "dtype": "float32", "device": "cpu", "seed": 3, "limit": 100}
    origin |= {"batch_size": 1, "max_rows": None, "date": "2026-11-25T03:39:06+00:00"}
    versions = {"python": "3.11.7", "torch": "2.13.0"}
    command = f"ctxprune eval --policy {policy} --text '{text}'"
    made = result(model, policy, points) | origin | {"versions": versions, "command": command}
    for level in made["levels"]:
        for scores in level["tasks"].values():
            scores["capped"] = 0.0
    return made | fields


def benchmark(contexts: tuple[int, ...] = (256, 512), **fields: Any) -> Results:
    """As `bench --out` writes it."""

    def row(mode: str, context: int, level: float) -> Results:
        reads = mode != "oracle"
        speed = 100.0 + 1000 * level - context / 10
        return {
            "mode": mode,
            "dtype": "float32",
            "compiled": False,
            "batch": 8,
            "context": context,
            "sparsity": level,
            "sparsity_realised": level if reads else None,
            "decode_tokens_per_s": speed,
            "prefill_tokens_per_s": 700.0 if reads else None,
            "ttft_s": 1.5 if reads else None,
            "ttft_ratio": {"median": 1.5, "min": 1.4, "max": 1.6} if reads else None,
            "step_ms": {"median": 8e3 / speed, "min": 7e3 / speed, "max": 9e3 / speed},
            "between_ms": 7.5 if mode == "pruned" else None,
            "eviction_ms": 0.5 if mode == "pruned" else None,
            "interval": {"min": 8, "max": 16} if mode == "pruned" else None,
            "speedup": speed / 100.0,
            "of_oracle": None,
            "kv_bytes": 1e6 * context * (1 - level),
            "peak_bytes": 1e9 if reads else None,
            "rows_kept": context * (1 - level),
            "text_repeated": False,
        }

    modes = (("dense-static", 0.0), ("pruned", 0.8), ("oracle", 0.8))
    made = {
        "model": "runs/tuned",
        "policy": "gate",
        "evicts_every": 16,
        "evict": "reading",
        "unequal": False,
        "extensions": ["AVX-512"],
        "max_rows": None,
        "random_weights": False,
        "text": "embedded",
        "repeats": 5,
        "steps": 16,
        "prefills": 3,
        "seed": 0,
        "dtype": "float32",
        "device": "cpu",
        "machine": "AMD EPYC",
        "threads": 2,
        "versions": {"python": "3.11.7"},
        "date": "2026-11-25T04:39:06+00:00",
        "command": "ctxprune bench --batch 8",
        "rows": [row(mode, context, level) for context in contexts for mode, level in modes],
    }
    return made | fields


def with_row(**fields: Any) -> Results:
    """A benchmark whose first row holds something else."""
    made = benchmark()
    made["rows"][0] |= fields
    return made


def training() -> Results:
    """As `bench --training --out` writes it."""
    spread = {"median": 2.0, "min": 1.9, "max": 2.1}
    row = {"context": 512, "step_s": spread, "peak_bytes": None}
    return {
        "model": "runs/tuned",
        "batch": 1,
        "train": "lora",
        "bf16": False,
        "machine": "AMD EPYC",
        "threads": 1,
        "rows": [row | {"mode": "dense", "ratio": 1.0}, row | {"mode": "gated", "ratio": 1.31}],
    }


GATE = evaluation("runs/tuned", "gate", [(0.0, 0.0, 30.0), (0.8, 0.79, 33.0)])
SINK = evaluation("runs/tuned", "sink", [(0.0, 0.0, 30.0), (0.5, 0.5, 36.0), (0.8, 0.8, 45.0)])
WIKI = evaluation("runs/tuned", "gate", [(0.8, 0.8, 20.0)], text="wiki/test.txt")
FILES = [("gate.json", GATE), ("demo.json", [SINK, WIKI]), ("speed.json", benchmark())]


class Page(HTMLParser):
    """Elements of a page; refuses tags that are not closed in order."""

    VOID = ("meta", "link", "br")

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.found if name == tag]


def test_what_is_measured_on_other_texts_stands_apart() -> None:
    merged = merge(FILES)
    assert [panel.title for panel in merged.texts] == [
        "books/test.txt, context 512, 51,100 tokens",
        "wiki/test.txt, context 512, 51,100 tokens",
    ]
    assert [panel.title for panel in merged.tasks] == ["hellaswag, 100 documents"]
    shorter = copy.deepcopy(GATE)
    shorter["levels"][1]["tokens"] = 1023
    assert len(merge([("a", GATE), ("b", shorter)]).texts) == 2


def test_rows_are_kept_once_and_other_figures_beside_them() -> None:
    later = GATE | {"date": "2026-12-01T00:00:00+00:00"}  # measurements that were kept
    assert merge([("a", GATE), ("b", later)]).texts == merge([("a", GATE)]).texts
    other = evaluation("runs/tuned", "gate", [(0.8, 0.79, 33.5), (0.9, 0.89, 40.0)])
    (panel,) = merge([("a", GATE), ("b", other)]).texts
    values = [(point.requested, point.figures["perplexity"]) for point in panel.points]
    assert values == [(0.0, 30.0), (0.8, 33.0), (0.8, 33.5), (0.9, 40.0)]
    lines = {label: [point.requested for point in line] for label, line in panel.lines()}
    assert lines == {"dense": [0.0], "gate, run 1": [0.8], "gate, run 2": [0.8, 0.9]}


def test_levels_of_several_runs_make_up_one_line() -> None:
    more = evaluation("runs/tuned", "gate", [(0.5, 0.5, 31.0)])
    (panel,) = merge([("a", GATE), ("b", more)]).texts
    lines = {label: [point.sparsity for point in line] for label, line in panel.lines()}
    assert lines == {"dense": [0.0], "gate": [0.5, 0.79]}


def test_the_same_results_in_two_files_are_one_run() -> None:
    merged = merge([("gate.json", GATE), ("all.json", [GATE, SINK])])
    assert [run.files for run in merged.runs] == [["gate.json", "all.json"], ["all.json"]]
    bench = merge([("a", benchmark()), ("b", benchmark(date="2026-12-01"))]).benches[0]
    assert [number for number, _, _ in bench.parts] == [1]
    fewer_rows = benchmark(max_rows=64)
    bench = merge([("a", benchmark()), ("b", fewer_rows)]).benches[0]
    assert [number for number, _, _ in bench.parts] == [1, 2]
    late = benchmark(evict="prompt")
    bench = merge([("a", benchmark()), ("b", late)]).benches[0]
    assert [number for number, _, _ in bench.parts] == [1, 2]
    # Prompts of other lengths are another measurement.
    assert len(merge([("a", benchmark()), ("b", benchmark(unequal=True))]).benches) == 2


def test_a_cap_at_sparsity_0_is_not_called_dense() -> None:
    capped = evaluation("runs/tuned", "gate", [(0.0, 0.6, 35.0)], max_rows=64)
    (panel,) = merge([("a", GATE), ("b", capped)]).texts
    told = [point.subject.decides for point in panel.points]
    assert told == [DENSE, "gate", "gate, at most 64 rows"]


def test_names_are_short_unless_they_clash() -> None:
    assert short_names(["a/m", "b/n"], 1) == {"a/m": "m", "b/n": "n"}
    assert short_names(["a/m", "b/m"], 1) == {"a/m": "a/m", "b/m": "b/m"}
    assert short_names(["/x/a/m", "/x/b/m", "/x/n"], 1) == {
        "/x/a/m": "a/m",
        "/x/b/m": "b/m",
        "/x/n": "n",
    }
    assert short_names(["/x/data/t.txt", "embedded", "."], 2) == {
        "/x/data/t.txt": "data/t.txt",
        "embedded": "embedded",
        ".": ".",
    }


def test_names_that_are_repeated_here_to_stay_without_torch() -> None:
    assert OF_TEXT == OWN_TASKS
    assert set(Breakdown.model_fields) == {*RANGES, "rest"}


def test_pages_say_nothing_of_where_files_are() -> None:
    made = result("/home/me/tuned", "gate", [(0.8, 0.8, 33.0)])
    made |= {"command": "ctxprune eval --text=/home/me/t.txt", "text": "/home/me/a/t.txt"}
    other = result("/home/me/b/tuned", "gate", [(0.8, 0.8, 32.0)])
    merged = merge([("/home/me/one.json", made), ("/home/me/two.json", other)])
    for page in (html(merged), markdown(merged)):
        assert "/home" not in page
        assert "ctxprune eval --text=t.txt" in page and "one.json" in page
        assert "me/tuned" in page and "b/tuned" in page


def test_the_tables_in_markdown() -> None:
    lines = markdown(merge(FILES)).splitlines()
    start = lines.index("### books/test.txt, context 512, 51,100 tokens")
    assert lines[start + 2 : start + 9] == [
        "| model | policy | sparsity | realised | rows left | perplexity | over dense | run |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| tuned | dense | 0 | 0.000 |  | 30.00 |  | 1 |",
        "| tuned | gate | 0.8 | 0.790 | 108 (21%) | 33.00 | +10.0% | 1 |",
        "| tuned | sink | 0.5 | 0.500 | 256 (50%) | 36.00 | +20.0% | 2 |",
        "| tuned | sink | 0.8 | 0.800 | 102 (20%) | 45.00 | +50.0% | 2 |",
        "",
    ]
    start = lines.index("### hellaswag, 100 documents")
    assert lines[start + 2 : start + 6] == [
        "| model | policy | sparsity | realised | rows left | acc | acc_norm | run |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| tuned | gate | 0.8 | 0.310 | 44 | 0.420 ± 0.049 | 0.450 | 1 |",
        "| tuned | sink | 0.5 | 0.310 | 44 | 0.420 ± 0.049 | 0.450 | 2 |",
    ]
    start = lines.index("### tuned, float32 on AMD EPYC, 2 threads")
    own = speed_report.markdown(measured(Benchmark, benchmark())).splitlines()
    assert lines[start + 2] == own[0] == "Reading the prompts:"
    assert lines[start + 4] == own[2] + " run |"
    assert lines[start + 6] == own[4] + " 4 |"
    assert "| gate 0.8 | 8 | 256 | 0.800 | 700 | 1500.0 | 1.50 (1.40-1.60) | 1000 | 4 |" in lines
    assert "runs 1-3: python 3.11.7, torch 2.13.0" in lines
    assert "    ctxprune eval --policy gate --text 'books/test.txt'" in lines


def test_protocols_compare_at_the_level_asked_for() -> None:
    protocol = {"context": 1280, "prompt": 1024}
    points = [(0.0, 0.0, 30.0), (0.8, 0.79, 36.0)]
    early = evaluation("m", "h2o", points, **protocol)
    late = evaluation("m", "h2o", [(0.8, 0.15, 33.0)], evict="prompt", **protocol)
    elsewhere = evaluation("m", "gate", [(0.8, 0.79, 31.0)], context=1280)
    merged = merge([("a", early), ("b", late), ("c", elsewhere)])
    both, other = merged.texts
    assert both.facts == ("context 1,280", "after 1,024", "51,100 tokens")
    assert other.facts == ("context 1,280", "51,100 tokens")
    assert [label for label, _ in both.lines()] == ["dense", "h2o", "h2o, after the prompt"]
    note = "h2o evicts every 16 tokens at most; h2o: while reading, where the papers evict after "
    assert both.note() == f"{note}the prompt"
    chart = perplexity_chart(both, merged.subjects, "text")
    assert chart is not None and "sparsity asked for" in chart.svg
    told = "dense: 30.00; h2o: 36.00 at 0.80; h2o, after the prompt: 33.00 at 0.80."
    assert told in chart.svg
    page = markdown(merged)
    assert "| m | h2o, after the prompt | 0.8 | 0.150 | 435 (85%) | 33.00 | +10.0% | 2 |" in page
    assert page.count("h2o: while reading, where") == 2  # of the text and of the task


def test_retrieval_and_training_have_their_tables() -> None:
    page = markdown(merge([("a", with_retrieval()), ("b", training())]))
    assert "| tuned | gate | 0.8 | 2048 | 0.41 | 0.49 |" in page
    assert "### tuned, lora, 1 window a step, on AMD EPYC, 1 thread" in page
    assert "| gated | 512 | 2.00 | 1.31 |  |" in page


def test_markdown_for_a_card_has_no_page_around_it() -> None:
    page = markdown(merge(FILES), level=0, provenance=False)
    assert page.startswith("### Perplexity\n")
    assert "ctxprune eval" not in page and "| run |" not in page
    assert "| tuned | gate | 0.8 | 0.790 | 108 (21%) | 33.00 | +10.0% |\n" in page


def test_the_page_is_whole_and_alone() -> None:
    merged = merge([*FILES, ("t.json", training())])
    page = html(merged)
    parsed = Page(page)
    figures, charts = parsed.all("figure"), parsed.all("svg")
    # two texts, a task, and four measures of a batch size
    assert len(figures) == len(charts) == len(parsed.all("figcaption")) == 7
    alternatives = [chart["aria-label"] or "" for chart in charts]
    assert alternatives[0] == (
        "Perplexity over realised sparsity. dense: 30.00; gate: 33.00 at 0.79; "
        "sink: 36.00 at 0.50, 45.00 at 0.80."
    )
    assert all(chart["role"] == "img" for chart in charts)
    assert len(parsed.all("table")) == len(parsed.all("caption"))
    assert all(cell["scope"] in ("row", "col") for cell in parsed.all("th"))
    names = Counter(attributes["id"] for _, attributes in parsed.found if "id" in attributes)
    assert set(names.values()) == {1}
    references = re.findall(r'(?:href="|url\(|aria-labelledby=")#?([^")]+)', page)
    assert references and set(references) <= set(names)
    assert "http" not in page and "src=" not in page and "@import" not in page
    for told in ("ctxprune eval --policy sink", "2026-11-25T04:39:06", "AMD EPYC", "2.13.0"):
        assert told in parsed.text
    assert html(merged) == page


def test_charts_take_the_colours_of_the_page() -> None:
    page = html(merge(FILES))
    body = page[page.index("<svg") :]
    assert "var(--series-1)" in body and "var(--ink)" in body
    drawn = re.findall(r"(?:fill|stroke): (#[0-9a-f]{6})", body)
    assert drawn == []
    declared = set(re.findall(r"(--[a-z0-9-]+):", page))
    assert set(re.findall(r"var\((--[a-z0-9-]+)\)", page)) <= declared


def test_accuracy_has_error_bars() -> None:
    page = html(merge([("a", GATE)]))
    text, task = page.split("<svg ")[1:]
    assert "LineCollection" in task and "LineCollection" not in text
    certain = copy.deepcopy(GATE)
    certain["levels"][1]["tasks"]["hellaswag"]["stderr"] = 0.0
    assert "LineCollection" not in html(merge([("a", certain)]))


@pytest.mark.parametrize("name", [HOSTILE, "a|b\n# c", "$x_{", "_hidden", 'a" onload="b', "-->"])
def test_names_from_files_stay_text(name: str) -> None:
    made = evaluation(name, name, [(0.0, 0.0, 30.0), (0.8, 0.8, 33.0)], name, command=name)
    made["levels"][1]["tasks"] = {name: made["levels"][1]["tasks"]["hellaswag"]}
    merged = merge([(name, made), ("b", benchmark(model=name, policy=name, machine=name))])
    parsed = Page(html(merged))
    assert parsed.all("script") == [] and name in parsed.text
    assert not any("onload" in attributes for _, attributes in parsed.found)
    page = markdown(merged)
    tokens = MarkdownIt("commonmark").enable("table").parse(page)
    kinds = {token.type for token in tokens}
    kinds |= {kid.type for token in tokens for kid in token.children or ()}
    assert not {kind for kind in kinds if kind.startswith(("html", "em", "strong", "link"))}
    heads = [token.tag for token in tokens if token.type == "heading_open"]
    assert heads.count("h1") == 1


def test_speed_is_drawn_over_what_was_varied() -> None:
    assert "tokens of context" in html(merge([("a", benchmark())]))
    batches = benchmark((512,))
    batches["rows"] += [row | {"batch": 1} for row in batches["rows"]]
    assert ">batch<" in html(merge([("a", batches)]))
    alone = html(merge([("a", benchmark((512,)))]))
    assert "Decoded tokens a second: context 512, batch 8" in alone


def test_lines_say_what_they_differ_in() -> None:
    both = benchmark((512,), dtype="float32, bfloat16")
    both["rows"] += [row | {"dtype": "bfloat16", "compiled": True} for row in both["rows"]]
    page = html(merge([("a", both), ("b", benchmark((512,), evict="prompt"))]))
    for told in ("gate 0.8, float32", "gate 0.8, compiled, bfloat16", "gate 0.8, after the prompt"):
        assert told in page


def test_figures_that_are_none_are_not_drawn() -> None:
    lost = evaluation("m", "gate", [(0.8, 0.8, 33.0), (0.9, 0.9, 34.0)])
    for level, acc in zip(lost["levels"], (math.inf, math.nan), strict=True):
        level["tasks"]["hellaswag"] = {"acc": acc, "acc_norm": 0.5, "sparsity": 0.5}
    merged = merge([("a", lost)])
    assert accuracy_chart(merged.tasks[0], merged.subjects, "a") is None
    page = markdown(merged)
    assert "| 0.500 |  | 0.500 | inf | 1 |" in page and "| 0.500 |  | 0.500 | nan | 1 |" in page
    Page(html(merged))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "holds no results"),
        ([], "holds no results"),
        ([1], "holds no results"),
        ("text", "holds no results"),
        ({"levels": []}, "holds no results"),
        ({"levels": [{}]}, "no usable `model`"),
        (GATE | {"levels": [{"sparsity": "a"}]}, "no usable `levels[0].sparsity`"),
        (GATE | {"levels": [*GATE["levels"], 3]}, "no usable `levels[2]`"),
        (GATE | {"versions": "1"}, "no usable `versions`"),
        (with_retrieval() | {"context": None}, "no usable `context`"),
        (benchmark() | {"machine": None}, "no usable `machine`"),
        (benchmark() | {"rows": [{"ttft_ratio": 1}]}, "no usable `rows[0].mode`"),
        (with_row(ttft_ratio={"median": 1.0}), "no usable `rows[0].ttft_ratio.min`"),
        (with_row(interval={"min": 8}), "no usable `rows[0].interval.max`"),
        ({"rows": [{"ratio": 1.0}]}, "no usable `model`"),
    ],
)
def test_other_files_are_refused(content: Any, message: str) -> None:
    with pytest.raises(CtxpruneError, match=re.escape("`x.json`")) as caught:
        merge([("x.json", content)])
    assert message in caught.value.message and "--out" in caught.value.hint


def test_a_page_needs_no_torch(tmp_path: Path) -> None:
    for name, content in FILES:
        (tmp_path / name).write_text(json.dumps(content))
    script = (
        "import sys\n"
        "from typer.testing import CliRunner\n"
        "from ctxprune.cli.main import app\n"
        "result = CliRunner().invoke(app, ['report', *sys.argv[1:]])\n"
        "assert result.exit_code == 0, result.output\n"
        "assert not {'torch', 'transformers', 'lm_eval'} & set(sys.modules)\n"
    )
    names = [name for name, _ in FILES]
    subprocess.run([sys.executable, "-c", script, *names], check=True, cwd=tmp_path)


def test_the_command_writes_what_the_suffix_says(tmp_path: Path) -> None:
    for name, content in FILES:
        (tmp_path / name).write_text(json.dumps(content))
    names = [name for name, _ in FILES]
    done = ctxprune("report", *names, "--out", "pages/r.html", cwd=tmp_path)
    assert "wrote pages/r.html" in done.stderr and done.stdout == ""
    Page((tmp_path / "pages" / "r.html").read_text(encoding="utf-8"))
    ctxprune("report", *names, "--out", "r.md", cwd=tmp_path)
    assert (tmp_path / "r.md").read_text(encoding="utf-8") == markdown(merge(FILES))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no results were given"),
        (["none.json"], "`none.json` cannot be read"),
        (["broken.json"], "`broken.json` cannot be read as JSON"),
        (["other.json"], "`other.json` holds no results of `ctxprune eval` or `ctxprune bench`"),
        (["gate.json", "--out", "r.pdf"], "`r.pdf` ends in neither .html nor .md"),
        (["gate.json", "--out", "gate.json/r.md"], "cannot be written"),
    ],
)
def test_bad_input_is_one_sentence(arguments: list[str], message: str, tmp_path: Path) -> None:
    files = {"gate.json": json.dumps(GATE), "broken.json": "{", "other.json": "{}"}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    done = ctxprune("report", *arguments, cwd=tmp_path, code=2)
    assert message in done.stderr and "hint: " in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(files)


def test_several_results_on_a_model_card(tiny_folder: Make, tmp_path: Path) -> None:
    folder = str(tiny_folder("gpt2"))
    for name, content in FILES:
        (tmp_path / name).write_text(json.dumps(content))
    given = [part for name, _ in FILES for part in ("--results", name)]
    ctxprune("export", "--model", folder, "--out", "card", *given, cwd=tmp_path)
    card = (tmp_path / "card" / "README.md").read_text(encoding="utf-8")
    measured = markdown(merge(FILES), level=0, provenance=False)
    assert card.endswith(f"\n\n## Measured\n\n{measured}") and card.count("## Measured") == 1
    ctxprune("export", "--model", folder, "--out", "one", *given[:2], cwd=tmp_path)
    alone = markdown(merge(FILES[:1]), level=0, provenance=False)
    assert (tmp_path / "one" / "README.md").read_text().endswith(f"## Measured\n\n{alone}")
    done = ctxprune(
        "export", "--model", folder, "--out", "no", "--results", "none", cwd=tmp_path, code=2
    )
    assert "`none` cannot be read" in done.stderr and not (tmp_path / "no").exists()
