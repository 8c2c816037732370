"""Folders of tiny models for the tables of faults, made once, and ways to damage a copy."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from conftest import TEXT, tiny_model
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast

from ctxprune.pruner.checkpoints.checkpoint import SETTINGS
from ctxprune.pruner.checkpoints.convert import convert

# What stands for the damaged model, a text and an output in the arguments of a command.
MODEL, TEXT_FILE, TASKS, OUT = "MODEL", "TEXT", "TASKS", "OUT"
COMMANDS: Mapping[str, tuple[str, ...]] = {
    "convert": ("convert", MODEL, "--out", OUT),
    "info": ("info", MODEL),
    "eval": ("eval", "--model", MODEL, "--text", TEXT_FILE, "--sparsity", "0.5", "--out", OUT),
    "generate": ("generate", "--model", MODEL, "--max-new-tokens", "2", "The captain"),
    "chat": ("chat", "--model", MODEL, "--max-new-tokens", "2"),
    "inspect": ("inspect", "--model", MODEL, "--text", TEXT_FILE, "--tokens", "50", "--out", OUT),
    "tune": ("tune", "--model", MODEL, "--out", OUT, "--steps", "1", "--data", TEXT_FILE),
    "export": ("export", "--model", MODEL, "--out", OUT),
    "bench": ("bench", "--model", MODEL, "--context-length", "64", "--steps", "1", "--out", OUT),
    "tasks": (
        *("eval", "--model", MODEL, "--text", TEXT_FILE, "--max-tokens", "512"),
        *("--sparsity", "0.5", "--tasks", "written", "--include-path", TASKS),
    ),
    "architecture": ("bench", "--architecture", MODEL, "--out", OUT),
}
# A task for which a text is written.
WRITTEN = {
    "task": "written",
    "dataset_path": "json",
    "test_split": "test",
    "output_type": "generate_until",
    "doc_to_text": "{{text}}",
    "doc_to_target": "{{answer}}",
    "generation_kwargs": {"until": ["never"], "max_gen_toks": 4, "do_sample": False},
    "metric_list": [{"metric": "exact_match"}],
}
USING = ("info", "eval", "generate", "chat", "inspect", "tune", "export", "bench")

Damage = Callable[[Path], object]


@dataclass(frozen=True)
class Folders:
    """A folder of transformers, the same converted and calibrated by hand, and a text."""

    plain: Path
    tuned: Path
    text: Path


def make(root: Path, tokenizer: PreTrainedTokenizerFast) -> Folders:
    """Both folders, and the text."""
    plain, tuned, text = root / "plain", root / "tuned", root / "text.txt"
    tiny_model("llama").save_pretrained(plain)
    tokenizer.save_pretrained(plain)
    convert(str(plain), tuned, {"rank": 8, "context": 128})
    config = json.loads((tuned / SETTINGS).read_text())["config"]
    levels = {"0.5": [0.5, 0.5, 0.5]}
    edit(SETTINGS, config={**config, "tuned": 0.5, "levels": levels})(tuned)
    text.write_text("\n".join(f"Chapter {n}. {TEXT}" for n in range(60)), encoding="utf-8")
    tasks = root / "tasks"
    tasks.mkdir()
    (tasks / "written.jsonl").write_text('{"text": "It was a dark night", "answer": "and"}')
    task = WRITTEN | {"dataset_kwargs": {"data_files": {"test": str(tasks / "written.jsonl")}}}
    (tasks / "written.yaml").write_text(json.dumps(task))
    return Folders(plain, tuned, text)


def arguments(command: str, model: Path, text: Path, out: Path) -> list[str]:
    """The arguments of a command, with what the words in it stand for."""
    given = {MODEL: str(model), TEXT_FILE: str(text), OUT: str(out)}
    given[TASKS] = str(text.with_name("tasks"))
    return [given.get(word, word) for word in COMMANDS[command]]


def write(name: str, content: str | bytes) -> Damage:
    """Replace a file."""
    raw = content.encode() if isinstance(content, str) else content
    return lambda folder: (folder / name).write_bytes(raw)


def edit(name: str, **changes: Any) -> Damage:
    """Change keys of a JSON file; None removes one."""

    def change(folder: Path) -> None:
        path = folder / name
        value = json.loads(path.read_text()) if path.is_file() else {}
        value |= {key.replace("__", "-"): given for key, given in changes.items()}
        path.write_text(json.dumps({k: v for k, v in value.items() if v is not ABSENT}))

    return change


ABSENT = object()


def remove(name: str) -> Damage:
    """Remove a file."""
    return lambda folder: (folder / name).unlink()


def cut(name: str, share: float = 0.5) -> Damage:
    """Keep the beginning of a file."""

    def change(folder: Path) -> None:
        raw = (folder / name).read_bytes()
        (folder / name).write_bytes(raw[: int(len(raw) * share)])

    return change


def pipe(name: str) -> Damage:
    """Put a pipe that nobody writes into in a file's place."""

    def change(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return change


def link(name: str, target: str) -> Damage:
    """Put a symbolic link in a file's place."""

    def change(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(target)

    return change


def directory(name: str) -> Damage:
    """Put a folder in a file's place."""

    def change(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).mkdir()

    return change


def tensors(name: str, change: Callable[[dict[str, torch.Tensor]], object]) -> Damage:
    """Change the tensors of a safetensors file."""

    def damage(folder: Path) -> None:
        found = load_file(folder / name)
        change(found)
        save_file(found, folder / name, metadata={"format": "pt"})

    return damage


def set_number(name: str, tensor: str, value: float) -> Damage:
    """Put a number into a tensor."""

    def change(found: dict[str, torch.Tensor]) -> None:
        found[tensor].flatten()[-1] = value

    return tensors(name, change)


def copied(folder: Path, target: Path, *damages: Damage) -> Path:
    """A damaged copy of a folder."""
    shutil.copytree(folder, target)
    for damage in damages:
        damage(target)
    return target
