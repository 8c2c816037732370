"""What a recipe may say, in types: the file, the options of its steps, its figures, its schema."""

import json
from collections.abc import Mapping
from dataclasses import fields
from typing import Annotated, Any

from pydantic import Field, TypeAdapter
from pydantic.dataclasses import dataclass

from ctxprune.evals.config import OWN_TASKS, EvalConfig
from ctxprune.evals.quality.perplexity import Perplexity
from ctxprune.pruner.config import GenerateConfig, PruneConfig, TuneConfig
from ctxprune.pruner.errors import choose
from ctxprune.pruner.schema import ALONE, LIST, STRICT, Level, Name, Names, Settings, Text, check
from ctxprune.recipes.grid import MOST_STEPS, NAME


@dataclass(frozen=True, config=STRICT)
class File(Settings):
    """A recipe as it is written."""

    steps: Annotated[
        tuple[dict[str, Any], ...], Field(strict=False, min_length=1, max_length=MOST_STEPS)
    ]
    expect: Annotated[tuple[Text, ...], LIST] | None = None


@dataclass(frozen=True, config=STRICT, kw_only=True)
class Convert(PruneConfig):
    """Options of `convert`."""

    source: Name | None = None
    adapter: Names = ()
    gates_only: bool = False
    trust_remote_code: bool = False


@dataclass(frozen=True, config=STRICT, kw_only=True)
class Tune(TuneConfig):
    """Options of `tune`; model: an earlier step, or a folder, as of all others."""

    model: Name


@dataclass(frozen=True, config=STRICT, kw_only=True)
class Eval(EvalConfig):
    """Options of `eval`."""

    model: Name


@dataclass(frozen=True, config=STRICT, kw_only=True)
class Export(Settings):
    """Options of `export`; results: an eval step, for the card."""

    model: Name
    results: Name | None = None


@dataclass(frozen=True, config=STRICT, kw_only=True)
class Generate(GenerateConfig):
    """Options of `generate`."""

    model: Name


@dataclass(frozen=True, config=STRICT, kw_only=True)
class Report(Settings):
    """Options of `report`; of: eval steps."""

    of: Annotated[tuple[Name, ...], Field(strict=False, min_length=1, max_length=1000), ALONE]


OPTIONS: dict[str, type[Settings]] = {
    "convert": Convert,
    "tune": Tune,
    "export": Export,
    "generate": Generate,
    "eval": Eval,
    "report": Report,
}
# What a level of an evaluation has; of tasks and differences there is more below.
FIGURES = (
    *(field.name for field in fields(Perplexity) if field.name != "nll"),
    *("sparsity_requested", "perplexity_stderr", "tasks", "against_dense"),
)


def check_figure(text: str, config: EvalConfig, level: float, metric: str) -> None:
    """Raise CtxpruneError for a figure of an expectation that an evaluation will not have."""
    check(f"the level of `{text}`", Level, level)
    if config.sparsity is not None and level not in config.sparsity:
        choose(f"level in `{text}`", f"{level:g}", [f"{each:g}" for each in config.sparsity])
    first, _, rest = metric.partition(".")
    choose(f"figure in `{text}`", first, FIGURES)
    # What groups and tags of lm-eval stand for is not known before they are loaded.
    if first == "tasks" and set(config.tasks) <= {*OWN_TASKS}:
        choose(f"task in `{text}`", rest.partition(".")[0], config.tasks)


def schema() -> str:
    """The JSON schema of recipes, by which editors complete and check them."""
    name = {"type": "string", "pattern": f"^{NAME}$"}
    step = {
        "type": "object",
        "properties": {"name": name, **{command: _options(command) for command in OPTIONS}},
        "additionalProperties": False,
        "oneOf": [{"required": [command]} for command in OPTIONS],
    }
    file = TypeAdapter(File).json_schema()
    steps = {**file["properties"]["steps"], "items": step}
    told = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **file,
        "title": "Recipe of ctxprune",
        "properties": {**file["properties"], "steps": steps},
    }
    return json.dumps(_without_titles(told), indent=1) + "\n"


def _options(command: str) -> dict[str, Any]:
    """The schema of a command's options, alone or as lists in a grid."""
    told = TypeAdapter(OPTIONS[command]).json_schema()
    lists = {
        key: {"type": "array", "minItems": 1, "items": value}
        for key, value in told["properties"].items()
    }
    grid = {
        "type": "object",
        "properties": lists,
        "additionalProperties": False,
        "minProperties": 1,
    }
    needed = told.pop("required", [])
    if needed:
        told["anyOf"] = [{"required": needed}, {"required": ["grid"]}]
    return {
        **told,
        "type": "object" if needed else ["object", "null"],
        "properties": {**told["properties"], "grid": grid},
    }


def _without_titles(told: Any) -> Any:
    """A schema without the titles that say a key again."""
    if isinstance(told, list):
        return [_without_titles(each) for each in told]
    if not isinstance(told, Mapping):
        return told
    return {
        key: _without_titles(value)
        for key, value in told.items()
        if key != "title" or "$schema" in told
    }
