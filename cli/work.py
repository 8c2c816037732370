"""The steps of a recipe, done in one folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ctxprune.cli.console import out as stdout
from ctxprune.cli.console import say, write_json
from ctxprune.cli.generate import write
from ctxprune.cli.progress import evaluation_progress, tuning_progress
from ctxprune.pruner.errors import CtxpruneError
from ctxprune.pruner.files import beside, remove, write_text
from ctxprune.recipes import BUILDS_ON, MAKERS, Recipe, Step


@dataclass
class Work:
    """The folder of a run, and the results so far, by step name.

    Beside each folder that a step makes lies a note of what it was made from: before the step
    begins that it is ours, after it that it is whole.
    """

    out: Path
    results: dict[str, dict[str, Any]] = field(default_factory=dict)

    def do(self, step: Step) -> None:
        """Do a step, unless it made a folder before from the same options and inputs."""
        perform: Callable[[Step], None] = getattr(self, f"_{step.command}")
        if step.command not in MAKERS:
            perform(step)
            return
        stamp, folder, note = self._stamp(step), self.out / step.name, self._note(step.name)
        before = note.read_text(encoding="utf-8") if note.is_file() else None
        if before == f"{stamp} done\n" and folder.is_dir():
            say("already done, kept")
            return
        if before is None and folder.exists():
            raise CtxpruneError(
                f"`{folder}` is there, but no recipe made it", "give another `--out`"
            )
        if before is not None and not before.startswith(stamp):
            remove(self._state(step.name))
        write_text(note, f"{stamp} begun\n")
        perform(step)
        write_text(note, f"{stamp} done\n")

    def forget(self, plan: Recipe) -> None:
        """Remove what the steps of a recipe made in this folder, and nothing else."""
        for step in plan.steps:
            note = self._note(step.name)
            if note.is_file():
                write_text(note, "going\n")  # what follows may be cut off: none of it is kept
                remove(self.out / step.name)
                remove(self._state(step.name))
                note.unlink()
        self._eval_state.unlink(missing_ok=True)

    @property
    def _eval_state(self) -> Path:
        return self.out / "eval-state.json"

    def _note(self, name: str) -> Path:
        return self.out / f".{name}.step"

    def _state(self, name: str) -> Path:
        """Where `tune` keeps the state of an unfinished run."""
        return beside(self.out / name, ".tuning")

    def _stamp(self, step: Step) -> str:
        """Changes with the step's options, with the folders it builds on, and with its results."""
        parts = [json.dumps([step.command, step.options], sort_keys=True, default=str)]
        for key in BUILDS_ON:
            notes = [self._note(name) for name in step.named(key)]
            parts += [note.read_text(encoding="utf-8") for note in notes if note.is_file()]
        for name in step.results:
            parts.append(json.dumps(self.results[name]["levels"], sort_keys=True))
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def _made(self, name: str) -> Path | None:
        """The folder that an earlier step of this name made, if one did."""
        return self.out / name if self._note(name).is_file() else None

    def _model(self, step: Step, key: str = "model") -> Path:
        """The output of an earlier step, or a folder of the user's."""
        name = str(step.options[key])
        return self._made(name) or Path(name)

    def _adapters(self, step: Step) -> list[Path]:
        """The adapters that earlier steps wrote, or files of the user's."""
        from ctxprune.pruner.checkpoints.adapter import FILE

        return [
            made / FILE if (made := self._made(name)) else Path(name)
            for name in step.named("adapter")
        ]

    def _convert(self, step: Step) -> None:
        from ctxprune.pruner.checkpoints.convert import convert
        from ctxprune.pruner.config import PruneConfig

        convert(
            step.options.get("source"),
            self.out / step.name,
            step.given(PruneConfig),
            adapter=self._adapters(step),
            gates_only=bool(step.options.get("gates_only", False)),
            force=True,
            trust_remote_code=bool(step.options.get("trust_remote_code", False)),
        )

    def _tune(self, step: Step) -> None:
        from ctxprune.pruner.config import TuneConfig
        from ctxprune.pruner.training.tune import STATE, tune

        with tuning_progress() as progress:
            tune(
                self._model(step),
                self.out / step.name,
                step.config(TuneConfig),
                resume=(self._state(step.name) / STATE).is_file(),
                force=True,
                **vars(progress),
            )

    def _export(self, step: Step) -> None:
        from ctxprune.pruner.checkpoints.export import export

        told: dict[str, Any] = {}
        if used := self._used(step):
            from ctxprune.evals.report.merged import merge
            from ctxprune.evals.report.on_card import on_card

            told = on_card(merge([(step.name, used)]))
        export(self._model(step), self.out / step.name, force=True, **told)

    def _generate(self, step: Step) -> None:
        from ctxprune.pruner.config import GenerateConfig

        write(self._model(step), step.config(GenerateConfig))

    def _used(self, step: Step) -> list[dict[str, Any]]:
        """The results that a step reads."""
        return [self.results[name] for name in step.results]

    def _eval(self, step: Step) -> None:
        from ctxprune.evals.config import EvalConfig
        from ctxprune.evals.quality.evaluate import evaluate

        config = step.config(EvalConfig)
        if config.reference is not None:
            config = replace(config, reference=self._model(step, "reference"))
        with evaluation_progress() as on_progress:
            results = evaluate(
                self._model(step),
                config,
                state=self._eval_state,
                on_event=say,
                on_progress=on_progress,
            )
        self.results[step.name] = results
        write_json(self.out / f"{step.name}.json", results)

    def _report(self, step: Step) -> None:
        from ctxprune.evals.report.report import markdown, plot, rich_tables
        from ctxprune.evals.results import Evaluation, measured

        used = self._used(step)
        write_json(self.out / f"{step.name}.json", used)
        chosen = [measured(Evaluation, each) for each in used]
        write_text(self.out / f"{step.name}.md", markdown(chosen))
        plot(chosen, self.out / f"{step.name}.png")
        for table in rich_tables(chosen):
            stdout.print(table)
        say(f"wrote {self.out / step.name}.json, .md and .png")
