"""The wheel holds what the folder holds."""

from __future__ import annotations

import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_every_package_is_listed() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    on_disk = {
        "ctxprune." + ".".join(init.parent.relative_to(ROOT).parts)
        for top in ("cli", "evals", "pruner", "recipes")
        for init in (ROOT / top).rglob("__init__.py")
    }
    assert set(listed) == on_disk


def test_the_embedded_checkpoint_is_small_and_whole() -> None:
    folder = ROOT / "recipes" / "embedded" / "checkpoint"
    assert (folder / "model.safetensors").stat().st_size <= 8_000_000
    assert {"config.json", "tokenizer.json", "README.md"} <= {f.name for f in folder.iterdir()}
    assert not [f for f in folder.iterdir() if f.suffix in (".bin", ".pt", ".pkl")]


def test_each_top_level_package_is_typed() -> None:
    for top in ("cli", "evals", "pruner", "recipes"):
        assert (ROOT / top / "py.typed").is_file()
        assert (ROOT / ".typecheck" / "ctxprune" / top).resolve() == ROOT / top
