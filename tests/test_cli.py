"""The command line: help without torch, bad input as one sentence and exit code 2, the main job."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

Make = Callable[[str], Path]
PAGES = Path(__file__).parent.parent / "docs" / "commands"
COMMANDS = (
    "convert",
    "tune",
    "eval",
    "bench",
    "report",
    "export",
    "generate",
    "chat",
    "inspect",
    "run",
    "info",
)


def ctxprune(
    *arguments: str, cwd: Path, code: int = 0, **env: str
) -> subprocess.CompletedProcess[str]:
    """Run the command as a user does, and check its exit code."""
    done = subprocess.run(
        [sys.executable, "-m", "ctxprune.cli.main", *arguments],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "100", **env},
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        check=False,
    )
    assert done.returncode == code, done.stderr
    if code == 2:
        assert "Traceback" not in done.stderr
    return done


def test_help_needs_no_torch(tmp_path: Path) -> None:
    script = (
        "import sys\n"
        "from typer.testing import CliRunner\n"
        "from ctxprune.cli.main import app\n"
        "for name in sys.argv[1:]:\n"
        "    result = CliRunner().invoke(app, [name, '--help'])\n"
        "    assert result.exit_code == 0 and 'Examples' in result.output, name\n"
        "assert not {'torch', 'transformers', 'lm_eval'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", script, *COMMANDS], check=True, cwd=tmp_path)


@pytest.mark.parametrize("name", COMMANDS)
def test_the_page_of_a_command_is_its_help(name: str, tmp_path: Path) -> None:
    shown = ctxprune(name, "--help", cwd=tmp_path, NO_COLOR="1").stdout
    lines = [line.rstrip() for line in shown.splitlines() if line.strip()]
    page = (PAGES / f"{name}.md").read_text().splitlines()
    assert [line for line in page if line.strip()][2:-1] == lines, "run `make docs`"


def test_the_three_lines(
    dense_folder: Make, text_file: Path, tmp_path: Path, task_folder: Path
) -> None:
    """The interface, verbatim but for a local model, a text, and few steps."""
    model = str(dense_folder("gpt2"))
    ctxprune("convert", model, "--out", "./m", cwd=tmp_path)
    quick = ["--data", str(text_file), "--steps", "4", "--context", "128", "--sparsity", "0.8"]
    tuned = ctxprune("tune", *quick, cwd=tmp_path)
    assert "model: m" in tuned.stderr and "0.8" in tuned.stderr
    done = ctxprune(
        "eval", "--tasks", "hellaswag,piqa", "--data-dir", str(task_folder), "--limit", "2",
        "--sparsity", "0,0.8", "--context", "128", "--text", str(text_file), "--tokens", "2048",
        "--out", "r.json", cwd=tmp_path,
    )  # fmt: skip
    assert "model: m-tuned" in done.stderr and "perplexity" in done.stdout
    results = json.loads((tmp_path / "r.json").read_text())
    assert [level["sparsity_requested"] for level in results["levels"]] == [0.0, 0.8]
    assert set(results["levels"][1]["tasks"]) == {"hellaswag", "piqa"}
    again = ctxprune(
        "eval", "--sparsity", "0.8", "--context", "128", "--text", str(text_file), "--tokens",
        "2048", cwd=tmp_path,
    )  # fmt: skip
    assert "already done" in again.stderr
    about = json.loads(ctxprune("info", "--json", cwd=tmp_path).stdout)
    assert about["tuned_sparsity"] == 0.8 and about["model_type"] == "gpt2"
    ctxprune("export", "--out", "card", "--results", "r.json", cwd=tmp_path)
    assert "| 0.8 |" in (tmp_path / "card" / "README.md").read_text()
    spoken = ctxprune("generate", "--max-new-tokens", "40", "It was a bright day", cwd=tmp_path)
    assert spoken.stdout.startswith("It was a bright day")
    assert "cache " in spoken.stderr and "compression_ratio" in spoken.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tune", "--sparsity", "0.8"], "no current model"),
        (["eval", "--sparsity", "0.8"], "no current model"),
        (["tune", "--model", "none", "--sparsity", "0.8"], "there is no folder `none`"),
        (["tune", "--sparsity", "1.5"], "must be less than 1, not 1.5"),
        (["eval", "--model", "none", "--sparsity", "a"], "not a list of numbers"),
        (["eval", "--model", ".", "--policy", "gat"], "did you mean `gate`"),
        (["eval", "--model", "none", "--lengths", "1024.5"], "not a list of whole numbers"),
        (["convert", "./none", "--out", "o"], "does not exist"),
        (["run", "dmo"], "did you mean `demo`"),
        (["info", "."], "was not converted"),
        (["generate", "--model", ".", " "], "the prompt is empty"),
        (["generate", "--model", ".", "--max-new-tokens", "-1", "a"], "must be at least 1"),
        (["generate", "--model", ".", "--temperature", "-1", "a"], "must be at least 0"),
        (["eval", "--model", ".", "--out", "."], "cannot be written"),
        (["eval", "--model", ".", "--evict", "prompt"], "give `--prompt N`"),
        (["eval", "--model", ".", "--evict", "late"], "unknown value of evict `late`"),
    ],
)
def test_bad_input_is_one_sentence(arguments: list[str], message: str, tmp_path: Path) -> None:
    done = ctxprune(*arguments, cwd=tmp_path, code=2)
    assert message in done.stderr
    assert done.stdout == ""
    assert [f for f in tmp_path.iterdir() if f.name != ".ctxprune"] == []


def test_unknown_tasks_are_named(tiny_folder: Make, text_file: Path, tmp_path: Path) -> None:
    folder = str(tiny_folder("gpt2"))
    done = ctxprune(
        "eval", "--model", folder, "--tasks", "hellaswagg", "--text", str(text_file),
        cwd=tmp_path, code=2,
    )  # fmt: skip
    assert "hellaswag" in done.stderr


def test_our_own_tasks_from_the_command_line(embedded_folder: Path, tmp_path: Path) -> None:
    done = ctxprune(
        "eval", "--model", str(embedded_folder), "--tasks", "retrieval,last_word", "--lengths",
        "128,192", "--limit", "1", "--tokens", "512", "--sparsity", "0", "--out", "r.json",
        cwd=tmp_path,
    )  # fmt: skip
    assert "Accuracy of retrieval" in done.stdout and "lm-eval" not in done.stderr
    (level,) = json.loads((tmp_path / "r.json").read_text())["levels"]
    assert {cell["length"] for cell in level["tasks"]["retrieval"]["cells"]} == {128, 192}
    assert level["tasks"]["last_word"]["n"] == 1


def test_rows_that_leave_after_the_prompt(embedded_folder: Path, tmp_path: Path) -> None:
    done = ctxprune(
        "eval", "--model", str(embedded_folder), "--policy", "tova", "--evict", "prompt", "--tasks",
        "last_word", "--context", "160", "--prompt", "128", "--tokens", "640", "--limit", "2",
        "--sparsity", "0,0.7", "--out", "r.json", cwd=tmp_path,
    )  # fmt: skip
    assert "tova, after the prompt" in done.stdout and "scored after 128" in done.stdout
    results = json.loads((tmp_path / "r.json").read_text())
    assert (results["evict"], results["prompt"]) == ("prompt", 128)
    assert results["levels"][1]["tokens"] == 4 * 32 and results["levels"][1]["rows"] < 60
    model = ["--model", str(embedded_folder), "--policy", "snapkv", "--sparsity", "0.7"]
    text = ["--max-new-tokens", "40", "It was a bright cold day in the harbour, and the captain"]
    late = ctxprune("generate", *model, "--evict", "prompt", *text, cwd=tmp_path)
    assert "rows a layer" in late.stderr
    refused = ctxprune(
        "generate", *model, "--evict", "prompt", "--max-rows", "64", *text, cwd=tmp_path, code=2
    )
    assert "a cap on rows holds at every moment" in refused.stderr


def test_a_text_that_is_shorter_than_a_page_saves_nothing(
    embedded_folder: Path, tmp_path: Path
) -> None:
    done = ctxprune(
        "generate", "--model", str(embedded_folder), "--policy", "sink", "--sparsity", "0.5",
        "--max-new-tokens", "900", "--stop", " ", "It was a", cwd=tmp_path,
    )  # fmt: skip
    assert "a page has a constant size, with room for " in done.stderr
    assert "tokens on it is smaller than dense" in done.stderr


def test_the_hub_offline_is_one_sentence(tmp_path: Path) -> None:
    done = ctxprune("convert", "gpt2", "--out", "./m", cwd=tmp_path, code=2, HF_HUB_OFFLINE="1")
    assert "could not be fetched from the hub" in done.stderr
    assert not (tmp_path / "m").exists()


def test_a_missed_expectation_exits_with_1(
    dense_folder: Make, text_file: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(
        f"""
steps:
  - name: converted
    convert: {{source: "{dense_folder("llama")}"}}
  - name: measured
    eval: {{model: converted, text: "{text_file}", context: 128, tokens: 1024, sparsity: [0]}}
  - report: {{of: measured}}
expect:
  - measured 0 perplexity <= 1.0
"""
    )
    done = ctxprune("run", str(recipe), cwd=tmp_path, code=1)
    assert "MISSED measured 0 perplexity <= 1.0" in done.stderr
    again = ctxprune("run", str(recipe), "--json", cwd=tmp_path, code=1)
    assert again.stderr.count("already done") == 2
    assert "Perplexity at context 128" in done.stdout and "Perplexity" in again.stderr
    assert json.loads(again.stdout)["measured"]["levels"][0]["tokens"] == 1016
