"""The wheel holds what the folder holds."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from setuptools import find_packages

import ctxprune
from ctxprune.pruner import load

ROOT = Path(__file__).parent.parent
TOPS = ("cli", "evals", "pruner", "recipes")


def test_every_package_is_found() -> None:
    found = set(find_packages(str(ROOT / ".package")))
    on_disk = {
        "ctxprune." + ".".join(init.parent.relative_to(ROOT).parts)
        for top in TOPS
        for init in (ROOT / top).rglob("__init__.py")
    }
    assert found == on_disk | {"ctxprune"}


def test_the_package_says_what_it_is() -> None:
    assert ctxprune.__version__ == version("ctxprune")
    assert ctxprune.load is load
    done = subprocess.run(
        [sys.executable, "-m", "ctxprune", "--help"], capture_output=True, text=True, check=True
    )
    assert "convert" in done.stdout


def test_the_embedded_checkpoint_is_small_and_whole() -> None:
    folder = ROOT / "recipes" / "embedded" / "checkpoint"
    assert (folder / "model.safetensors").stat().st_size <= 8_000_000
    assert {"config.json", "tokenizer.json", "README.md"} <= {f.name for f in folder.iterdir()}
    assert not [f for f in folder.iterdir() if f.suffix in (".bin", ".pt", ".pkl")]


def test_each_top_level_package_is_typed() -> None:
    for top in TOPS:
        assert (ROOT / top / "py.typed").is_file()
        assert (ROOT / ".package" / "ctxprune" / top).resolve() == ROOT / top
