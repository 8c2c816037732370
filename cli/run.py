"""`ctxprune run`: a recipe, step by step; finished steps are kept."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

from ctxprune import recipes
from ctxprune.cli.console import data, say, tuning_progress, write_text
from ctxprune.cli.console import out as stdout
from ctxprune.pruner.errors import choose
from ctxprune.recipes import Recipe, Step

EXAMPLES = """
Examples:

  ctxprune run demo

  ctxprune run ./my-recipe.yaml --out ./runs/mine --json
"""

# Options that a step has beside the fields of its configuration.
EXTRA = {
    "convert": ("source", "trust_remote_code"),
    "tune": ("model",),
    "eval": ("model",),
    "export": ("model", "results"),
    "generate": ("model", "prompt", "sparsity", "max_new_tokens"),
    "report": ("of",),
}


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
    _check(plan)
    if fresh and work.out.exists():
        shutil.rmtree(work.out)
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


def _check(plan: Recipe) -> None:
    """Refuse unknown options, and references to steps that do not come before."""
    from ctxprune.evals.evaluate import EvalConfig
    from ctxprune.pruner.config import FromMapping, PruneConfig, TuneConfig

    configs: dict[str, type[FromMapping]] = {
        "convert": PruneConfig,
        "tune": TuneConfig,
        "eval": EvalConfig,
    }
    for step in plan.steps:
        known = set(EXTRA[step.command])
        if step.command in configs:
            known |= set(configs[step.command].__dataclass_fields__)
        for key in step.options:
            choose(f"option of `{step.command}` in recipe `{plan.name}`", key, known)
        if step.command in configs:
            fields = {k: v for k, v in step.options.items() if k not in EXTRA[step.command]}
            configs[step.command].from_mapping(fields, f"step `{step.name}`")


@dataclass
class Work:
    """The folder of a run, and the results so far, by step name."""

    out: Path
    results: dict[str, dict[str, Any]] = field(default_factory=dict)

    def do(self, step: Step) -> None:
        """Do a step unless it is done: a note beside its output keeps its options and inputs."""
        note = self.out / f"{step.name}.done"
        stamp = self._stamp(step)
        if step.command != "eval" and note.is_file() and note.read_text() == stamp:
            say("already done, kept")
            return
        perform: Callable[[Step, Mapping[str, Any]], None] = getattr(self, f"_{step.command}")
        perform(step, step.options)
        write_text(note, stamp)

    def _stamp(self, step: Step) -> str:
        """Changes with the step's options and with the steps that it builds on."""
        used = [step.options.get("model"), step.options.get("results")]
        notes = [self.out / f"{name}.done" for name in used if name]
        before = "".join(note.read_text() for note in notes if note.is_file())
        text = json.dumps([step.command, step.options], sort_keys=True, default=str) + before
        return hashlib.sha256(text.encode()).hexdigest() + "\n"

    def _folder(self, name: Any) -> Path:
        """The output of an earlier step, or a folder of the user's."""
        inside = self.out / str(name)
        return inside if inside.is_dir() else Path(str(name))

    def _convert(self, step: Step, options: Mapping[str, Any]) -> None:
        from ctxprune.pruner.config import PruneConfig
        from ctxprune.pruner.convert import convert

        rest = {k: v for k, v in options.items() if k not in EXTRA["convert"]}
        convert(
            options.get("source"),
            self.out / step.name,
            PruneConfig.from_mapping(rest, f"step `{step.name}`"),
            force=True,
            trust_remote_code=bool(options.get("trust_remote_code", False)),
        )

    def _tune(self, step: Step, options: Mapping[str, Any]) -> None:
        from ctxprune.pruner.config import TuneConfig
        from ctxprune.pruner.tune import tune

        rest = {k: v for k, v in options.items() if k != "model"}
        config = TuneConfig.from_mapping(rest, f"step `{step.name}`")
        target = self.out / step.name
        with tuning_progress() as (on_step, on_phase):
            tune(
                self._folder(options["model"]),
                target,
                config,
                force=True,
                on_step=on_step,
                on_phase=on_phase,
            )

    def _export(self, step: Step, options: Mapping[str, Any]) -> None:
        from ctxprune.pruner.export import export

        results = self.results.get(str(options.get("results")))
        export(self._folder(options["model"]), self.out / step.name, force=True, results=results)

    def _generate(self, step: Step, options: Mapping[str, Any]) -> None:
        from ctxprune.cli.generate import generate

        generate(
            options["prompt"],
            model=self._folder(options["model"]),
            sparsity=options.get("sparsity"),
            max_new_tokens=options.get("max_new_tokens", 64),
        )

    def _eval(self, step: Step, options: Mapping[str, Any]) -> None:
        from ctxprune.evals.evaluate import EvalConfig, evaluate

        rest = {k: v for k, v in options.items() if k != "model"}
        results = evaluate(
            self._folder(options["model"]),
            EvalConfig.from_mapping(rest, f"step `{step.name}`"),
            state=self.out / "eval-state.json",
            on_event=say,
        )
        self.results[step.name] = results
        write_text(self.out / f"{step.name}.json", json.dumps(results, indent=2) + "\n")

    def _report(self, step: Step, options: Mapping[str, Any]) -> None:
        from ctxprune.evals.report import markdown, plot, rich_table

        chosen = [self.results[choose("eval step", name, self.results)] for name in options["of"]]
        write_text(self.out / f"{step.name}.json", json.dumps(chosen, indent=2) + "\n")
        write_text(self.out / f"{step.name}.md", markdown(chosen))
        plot(chosen, self.out / f"{step.name}.png")
        stdout.print(rich_table(chosen))
        say(f"wrote {self.out / step.name}.json, .md and .png")
