"""Imports point one way: cli -> recipes -> evals -> pruner."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent
ALLOWED = {
    "pruner": {"pruner"},
    "evals": {"evals", "pruner"},
    "recipes": {"recipes", "evals", "pruner"},
    "cli": {"cli", "evals", "pruner", "recipes"},
}


def imported_packages(source: str) -> set[str]:
    """The packages of ours that a module imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        found |= {name.split(".")[1] for name in names if name.startswith("ctxprune.")}
    return found


def test_imports_point_one_way() -> None:
    for package, allowed in ALLOWED.items():
        modules = list((ROOT / package).rglob("*.py"))
        assert modules
        for module in modules:
            assert imported_packages(module.read_text()) <= allowed, module


def test_a_planted_import_is_found() -> None:
    assert imported_packages("def f():\n    from ctxprune import cli\n") == {"cli"}
    assert imported_packages("import ctxprune.evals.report.report as r") == {"evals"}


def test_every_file_is_named_in_the_architecture_page() -> None:
    page = (ROOT / "docs" / "how" / "architecture.md").read_text()
    for package in ALLOWED:
        for module in (ROOT / package).rglob("*.py"):
            if module.name != "__init__.py":
                assert f"{module.name}" in page, module
