"""Results on disk: the keys and types that they have, from one version to the next."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import write_tasks
from outcome import ctxprune

GOLDEN = Path(__file__).parent / "results.json"
QUICK = ("--sparsity", "0,0.8", "--policy", "sink")
COMMANDS = {
    "eval": (
        *("eval", *QUICK, "--max-length", "128", "--max-tokens", "512", "--limit", "2"),
        *("--tasks", "hellaswag,retrieval,last_word,fidelity", "--lengths", "128"),
        *("--data-dir", "tasks", "--text", "text.txt"),
    ),
    "bench": (
        *("bench", *QUICK, "--batch", "1", "--context", "64", "--steps", "4", "--repeats", "1"),
        *("--prefills", "1", "--text", "text.txt"),
    ),
    "training": (
        *("bench", "--training", "--context", "32", "--repeats", "1", "--text", "text.txt"),
    ),
}


def shape(value: Any) -> Any:
    """What JSON holds, with the names of types in place of figures and words."""
    if isinstance(value, dict):
        return {key: shape(each) for key, each in value.items()}
    if isinstance(value, list):
        shapes = [shape(each) for each in value]
        return [each for n, each in enumerate(shapes) if each not in shapes[:n]]
    return type(value).__name__


@pytest.mark.parametrize("command", COMMANDS)
def test_json_on_disk_has_the_keys_and_types_that_it_had(
    command: str, embedded_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "tasks").mkdir()
    write_tasks(tmp_path / "tasks")
    told = ("--model", str(embedded_folder), "--out", "r.json")
    done = ctxprune(*COMMANDS[command], *told, cwd=tmp_path)
    assert done.code == 0, done.err
    results = json.loads((tmp_path / "r.json").read_text())
    assert shape(results) == json.loads(GOLDEN.read_text())[command]
