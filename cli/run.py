"""`ctxprune run`: a recipe, step by step; finished steps are kept."""

from __future__ import annotations

import sys
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import Annotated

import typer

from ctxprune import recipes
from ctxprune.cli.console import data, say
from ctxprune.cli.work import Work, check

EXAMPLES = """
Examples:

  ctxprune run demo

  ctxprune run ./my-recipe.yaml --out ./runs/mine --json
"""


def run(
    recipe: Annotated[str, typer.Argument(help="Name of a shipped recipe, or a .yaml file.")],
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder for everything; default: runs/RECIPE.")
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Do finished steps again.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print all results as JSON.")] = False,
) -> None:
    """Run a recipe; exit code 1 if one of its expectations is missed."""
    plan = recipes.load(recipe)
    work = Work(out or Path("runs") / plan.name)
    check(plan)
    if fresh:
        work.forget(plan)
    # Where stdout is for the JSON, the tables and texts of the steps go to stderr.
    with redirect_stdout(sys.stderr) if as_json else nullcontext():
        for number, step in enumerate(plan.steps, start=1):
            say(f"[{number}/{len(plan.steps)}] {step.name}")
            work.do(step)
    if as_json:
        data(work.results)
    missed = 0
    for expectation in plan.expect:
        holds, figures = expectation.check(work.results)
        missed += not holds
        say(f"{'met   ' if holds else 'MISSED'} {figures}")
    if missed:
        say(f"{missed} of {len(plan.expect)} expectations missed")
        raise typer.Exit(1)
