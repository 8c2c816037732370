"""Imports point one way: cli -> recipes -> evals -> pruner."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

from ctxprune.pruner import schema

ROOT = Path(__file__).parent.parent
ALLOWED = {
    "pruner": {"pruner"},
    "evals": {"evals", "pruner"},
    "recipes": {"recipes", "evals", "pruner"},
    "cli": {"cli", "evals", "pruner", "recipes"},
}


def imported(source: str) -> set[str]:
    """What a module imports, wherever in it, by full names."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


def imported_packages(source: str) -> set[str]:
    """The packages of ours among that."""
    return {name.split(".")[1] for name in imported(source) if name.startswith("ctxprune.")}


def test_imports_point_one_way() -> None:
    for package, allowed in ALLOWED.items():
        modules = list((ROOT / package).rglob("*.py"))
        assert modules
        for module in modules:
            assert imported_packages(module.read_text()) <= allowed, module


def test_vllm_is_imported_by_its_plugin_alone_and_the_plugin_by_nobody() -> None:
    importing = set()
    for package in ALLOWED:
        for module in (ROOT / package).rglob("*.py"):
            names = imported(module.read_text())
            if any(f"{name}.".startswith(("vllm.", "ctxprune.pruner.vllm.")) for name in names):
                importing.add(module.parent.relative_to(ROOT))
    assert importing == {Path("pruner/vllm")}


def test_a_planted_import_is_found() -> None:
    assert imported_packages("def f():\n    from ctxprune import cli\n") == {"cli"}
    assert imported_packages("import ctxprune.evals.report.report as r") == {"evals"}


def test_every_file_is_named_in_the_architecture_page() -> None:
    page = (ROOT / "docs" / "how" / "architecture.md").read_text()
    for package in ALLOWED:
        for module in (ROOT / package).rglob("*.py"):
            if module.name != "__init__.py":
                assert f"{module.name}" in page, module


def test_settings_have_types_and_no_names_of_types() -> None:
    """pydantic builds them at first use, and would look names up in the caller's module."""
    modules = ("evals.inspect.inspection", "evals.speed.training_cost", "recipes.steps")
    for module in ("pruner.checkpoints.settings", *modules):
        importlib.import_module(f"ctxprune.{module}")
    found, left = [], [schema.Settings]
    while left:
        left += (kinds := left.pop().__subclasses__())
        found += kinds
    assert len(found) > 10
    for kind in found:
        for name, hint in vars(kind).get("__annotations__", {}).items():
            assert not isinstance(hint, str), f"{kind.__name__}.{name}"
