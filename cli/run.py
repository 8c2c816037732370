"""`ctxprune run`: a recipe, step by step; finished steps are kept."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ctxprune.cli.console import complain, data, only_data, say
from ctxprune.cli.options import OUTPUT, Json
from ctxprune.pruner.errors import Interrupted
from ctxprune.pruner.files import claimed

EXAMPLES = """
Examples:

  ctxprune run demo

  ctxprune run ./my-recipe.yaml --out ./runs/mine --json
"""


def run(
    recipe: Annotated[str, typer.Argument(help="Name of a shipped recipe, or a .yaml file.")],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            help="Folder for everything; default: runs/RECIPE.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Do finished steps again.")] = False,
    as_json: Json = False,
) -> None:
    """Run a recipe; exit code 1 if one of its expectations is missed."""
    from ctxprune import recipes
    from ctxprune.cli.work import Work

    plan = recipes.load(recipe)
    work = Work(out or Path("runs") / plan.name)
    recipes.check(plan)
    with claimed(work.out / "recipe"), only_data(as_json):
        if fresh:
            work.forget(plan)
        for number, step in enumerate(plan.steps, start=1):
            say(f"[{number}/{len(plan.steps)}] {step.name}")
            try:
                work.do(step)
            except (KeyboardInterrupt, Interrupted) as stop:
                raise Interrupted(
                    f"interrupted in step `{step.name}`; what was done is kept",
                    "repeat the command to go on",
                ) from stop
    if as_json:
        data(work.results)
    missed = 0
    for expectation in plan.expect:
        holds, figures = expectation.check(work.results)
        missed += not holds
        (say if holds else complain)(f"{'met   ' if holds else 'MISSED'} {figures}")
    if missed:
        complain(f"{missed} of {len(plan.expect)} expectations missed")
        raise typer.Exit(1)
