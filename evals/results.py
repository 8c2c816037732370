"""Results of `eval`, `bench` and `bench --training`: their types, and what is read and written.

The names of attributes are the keys in JSON. What a file holds beside them does not matter, and
what earlier versions did not say has a default. All numbers are finite.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)

from ctxprune.pruner.errors import CtxpruneError, first_line

EVAL, BENCH, TRAINING = ("eval", "bench", "bench --training")
# What `bench` compares.
DYNAMIC, STATIC, PRUNED, ORACLE = MODES = ("dense-dynamic", "dense-static", "pruned", "oracle")
# Where rows leave (`--evict`): the default is what results of earlier versions are of.
READING: Literal["reading"] = "reading"
LATE: Literal["prompt"] = "prompt"
# What the standard error of a metric is called, as lm-eval does.
ERROR = "_stderr"

# Files that are larger hold no results.
MOST_BYTES = 64 * 2**20
# What no measurement comes to, and what would be no figure in a table.
HUGE = 1e100
# Of a perplexity, which is exponential, a loss of 700 nats makes no more.
WORST = 1e305
Share = Annotated[float, Field(ge=0.0, le=1.0)]
Asked = Annotated[float, Field(ge=0.0, lt=1.0)]
Figure = Annotated[float, Field(ge=-HUGE, le=HUGE)]
Amount = Annotated[float, Field(ge=0.0, le=HUGE)]
Count = Annotated[int, Field(ge=0, le=2**53)]
Some = Annotated[int, Field(ge=1, le=2**53)]
Name = Annotated[str, Field(max_length=1000)]
Words = Annotated[str, Field(max_length=100_000)]

Of = TypeVar("Of")


class Part(BaseModel):
    """A part of results, which never changes."""

    model_config = ConfigDict(strict=True, frozen=True, allow_inf_nan=False, extra="ignore")


class Range(Part):
    """The least and the most."""

    min: Figure
    max: Figure


class Spread(Range):
    """Of several measurements."""

    median: Figure


class Difference(Part):
    """The mean difference to the dense model on the same documents, with its standard error."""

    difference: Figure
    stderr: Amount | None = None


class Cell(Part):
    """Of a long-context task: accuracy at a length of the prompt and a depth of the fact."""

    length: Count
    depth: Share
    acc: Share


class Evicted(Part):
    """What was evicted meanwhile.

    Attributes:
        sparsity: share of the earlier tokens that were gone when a query looked; realised.
        cache_sparsity: share of the tokens that were gone at the end of a text.
        rows: that a layer held there; None if dense, and in results of earlier versions.
        not_finite: what metrics were that were no finite numbers; they are null in JSON.
        against_dense: metric -> difference; that of the text is of `nll`.
        date: of the measurement.
    """

    sparsity: Share
    cache_sparsity: Annotated[float, Field(le=1.0, ge=-HUGE)] | None = None
    rows: Amount | None = None
    not_finite: dict[Name, Name] = {}
    against_dense: dict[Name, Difference] = {}
    date: Name = ""


class Scores(Evicted):
    """What a task gave at a level.

    Attributes:
        figures: in JSON they stand among the others: metrics and their standard errors, by name.
        n, documents: how many were scored, of how many. shots: examples before each.
        chance: the accuracy of guessing. cells: of a long-context task.
    """

    figures: dict[Name, float]
    n: Count | None = None
    documents: Count | None = None
    shots: Count | None = None
    chance: Share | None = None
    cells: list[Cell] = Field([], max_length=1000)

    @model_validator(mode="before")
    @classmethod
    def _apart(cls, raw: Any) -> Any:
        if not isinstance(raw, dict):
            return raw
        lost = raw.get("not_finite", {})
        about: dict[str, Any] = {key: raw[key] for key in raw if key in cls.model_fields}
        numbers = {
            key: value
            for key, value in raw.items()
            if key not in (*about, "capped") and type(value) in (int, float)
        }
        figures = {key: value for key, value in numbers.items() if abs(value) <= HUGE}
        if isinstance(lost, dict):  # earlier versions kept them as they were
            left = {key: each for key, each in numbers.items() if key not in figures}
            told = {k: f"{n:.10}" if isinstance(n, float) else "huge" for k, n in left.items()}
            lost = told | lost
        return about | {"figures": figures, "not_finite": lost}

    @field_validator("figures")
    @classmethod
    def _errors(cls, figures: dict[str, float]) -> dict[str, float]:
        negative = [name for name, value in figures.items() if is_error(name) and value < 0]
        if negative:
            raise ValueError(f"`{negative[0]:.60}` is negative")
        return figures


class Level(Evicted):
    """What was measured at a level.

    Attributes:
        sparsity_requested: the level. perplexity: of the text, with its standard error.
        tokens: how many were predicted. tasks: by name.
    """

    sparsity_requested: Asked
    perplexity: Annotated[float, Field(gt=0.0, le=WORST)]
    perplexity_stderr: Annotated[float, Field(ge=0.0, le=WORST)] | None = None
    tokens: Count
    tasks: Annotated[dict[Name, Scores], Field(max_length=10_000)]

    @property
    def figures(self) -> dict[str, float]:
        """As of a task: the perplexity, and its standard error."""
        error = self.perplexity_stderr
        errors = {} if error is None else {f"perplexity{ERROR}": error}
        return {"perplexity": self.perplexity, **errors}

    @property
    def is_dense(self) -> bool:
        """Whether nothing was evicted, nor asked to be: a cap on rows evicts at level 0 too."""
        return self.sparsity_requested == 0 and self.sparsity == 0


class Origin(Part):
    """What results say of where they come from; None and "" where they do not."""

    model: Words
    text: Words = ""
    command: Words = ""
    date: Name = ""
    versions: dict[Name, Name] = {}
    machine: Name = ""
    device: Name = ""
    threads: Count | None = None
    dtype: Name = ""
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None

    @property
    def name(self) -> str:
        """The model without its folders."""
        return Path(self.model).name or self.model


class Decided(Origin):
    """What was measured with a policy that decides."""

    policy: Name
    evict: Literal["reading", "prompt"] = READING
    max_rows: Count | None = None
    evicts_every: Count = 0

    @property
    def decider(self) -> str:
        """Who decided what stays, and when, in words."""
        return decides(self.policy, self.evict, self.max_rows)


class Evaluation(Decided):
    """What `eval` measured: see `evaluate`."""

    context: Count
    prompt: Count | None = None
    limit: Count | None = None
    batch_size: Count | Name | None = None
    apply_chat_template: bool = False
    levels: list[Level] = Field(min_length=1, max_length=1000)

    @property
    def prunes(self) -> bool:
        """Whether a level was asked for at which something is evicted."""
        return any(level.sparsity_requested > 0 for level in self.levels)


class Breakdown(Part):
    """Milliseconds of a decode step, by what they were spent on."""

    projections: Figure
    gate: Figure
    policy: Figure
    attention: Figure
    eviction: Figure
    rest: Figure


class BenchRow(Part):
    """A mode at a dtype, batch size and context: see `bench`."""

    mode: Literal["dense-dynamic", "dense-static", "pruned", "oracle"]
    dtype: Name
    compiled: bool
    batch: Some
    context: Some
    sparsity: Asked
    sparsity_realised: Share | None
    cache_sparsity: Annotated[float, Field(le=1.0, ge=-HUGE)] | None = None
    prefill_tokens_per_s: Amount | None
    ttft_s: Amount | None
    ttft_ratio: Spread | None
    decode_tokens_per_s: Amount
    step_ms: Spread
    between_ms: Amount | None
    eviction_ms: Figure | None
    interval: Range | None
    speedup: Amount | None
    of_oracle: Amount | None
    kv_bytes: Amount | None
    peak_bytes: Amount | None
    rows_kept: Amount
    breakdown: Breakdown | None = None
    text_repeated: bool


class Benchmark(Decided):
    """What `bench` measured."""

    machine: Name
    dtype: Name
    threads: Count
    unequal: bool
    random_weights: bool
    extensions: list[Name] | None
    repeats: Count
    steps: Count
    prefills: Count
    rows: list[BenchRow] = Field(min_length=1, max_length=5000)


class TrainingRow(Part):
    """A step of tuning at a context: see `training_cost`."""

    mode: Name
    context: Some
    step_s: Spread
    ratio: Amount
    peak_bytes: Amount | None


class Training(Origin):
    """What `bench --training` measured."""

    machine: Name
    threads: Count
    train: Name
    bf16: bool
    batch: Some
    rows: list[TrainingRow] = Field(min_length=1, max_length=5000)


Results = Evaluation | Benchmark | Training
_KINDS: dict[type[Results], str] = {Evaluation: EVAL, Benchmark: BENCH, Training: TRAINING}


def is_error(figure: str) -> bool:
    """Whether a figure of a task is the standard error of another."""
    return figure == "stderr" or figure.partition(",")[0].endswith(ERROR)


def kind_of(results: Results) -> str:
    """The command that wrote results."""
    return _KINDS[type(results)]


def decides(policy: str, evict: str, max_rows: int | None) -> str:
    """Who decides what stays, from when on, and under which cap, in words."""
    late = ", after the prompt" if evict == LATE else ""
    cap = f", at most {max_rows} rows" if max_rows else ""
    return f"{policy}{late}{cap}"


def read(path: Path) -> list[Results]:
    """The results in a file.

    Raises:
        CtxpruneError: it cannot be read, or holds none, or some that are not whole.
    """
    hint = "give a file that `eval --out` or `bench --out` wrote"
    return listed(str(path), load_json(path, hint))


def listed(file: str, content: Any) -> list[Results]:
    """Results, or a list of them as recipes leave them.

    Raises:
        CtxpruneError: something else, or some that are not whole.
    """
    if content == []:
        raise _no_results(file)
    if not isinstance(content, list):
        return [typed(file, content)]
    return [typed(file, each, (number,)) for number, each in enumerate(content)]


def typed(file: str, content: Any, at: tuple[int, ...] = ()) -> Results:
    """One result.

    Args:
        file: where it is, and at which place in it, for the error.
        content: parsed JSON, or a result already.

    Raises:
        CtxpruneError: it is none, or something is missing in it.
    """
    if isinstance(content, Results):
        return content
    key = "levels" if isinstance(content, dict) and "levels" in content else "rows"
    parts = content.get(key) if isinstance(content, dict) else None
    if not (isinstance(parts, list) and parts and isinstance(parts[0], dict)):
        raise _no_results(file)
    kind: type[Results]
    kind = Evaluation if key == "levels" else Training if "ratio" in parts[0] else Benchmark
    again = f"write them again with `ctxprune {_KINDS[kind]} --out FILE`"
    return checked(kind, content, f"the results in `{file}` have", again, at)


def measured(kind: type[Of], content: Mapping[str, Any]) -> Of:
    """What was measured just now, or kept, as what it is.

    Raises:
        CtxpruneError: what was kept is damaged.
    """
    return checked(kind, content, "what was measured has", "measure it again with `--fresh`")


def checked(kind: type[Of], content: Any, what: str, hint: str, at: tuple[int, ...] = ()) -> Of:
    """Parsed JSON as what it is meant to be.

    Args:
        what: the beginning of the error: `the results in F have`. hint: what to do about it.
        at: the place of the content in a larger one.

    Raises:
        CtxpruneError: it is something else, naming the first key that is wrong.
    """
    try:
        return TypeAdapter(kind).validate_python(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    message = first["msg"][0].lower() + first["msg"][1:]
    if first["type"] == "less_than_equal":
        message = "it is too large"  # the bound has hundreds of digits
    place: list[int | str] = [*at]
    inside: Any = content
    for key in first["loc"]:
        place.append(key)
        if not _has(inside, key):
            break  # what follows are names of types
        inside = inside[key]
    raise CtxpruneError(f"{what} no usable `{_place(place)}`: {message}", hint)


def load_json(path: Path, hint: str) -> Any:
    """What a file of JSON holds.

    Raises:
        CtxpruneError: it cannot be read, is too large or nested too deep, or says a key twice.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MOST_BYTES + 1)
        if len(content) > MOST_BYTES:
            raise ValueError(f"it is larger than {MOST_BYTES >> 20} MB")
        return json.loads(content.decode("utf-8-sig"), object_pairs_hook=_once)
    except RecursionError:
        told = "it is nested too deep"
    except (OSError, ValueError) as error:
        told = getattr(error, "strerror", None) or first_line(error)
    raise CtxpruneError(f"`{path}` cannot be read as JSON: {told}", hint)


def dumps(value: Any, indent: int | None = None) -> str:
    """JSON, without NaN and infinity.

    Raises:
        CtxpruneError: there is one.
    """
    try:
        return json.dumps(value, indent=indent, allow_nan=False)
    except ValueError:
        place, number = next(_not_finite(value))
        raise CtxpruneError(
            f"`{_place(place)}` came to {number}, which is no figure",
            "the weights of the model may hold numbers that are not finite",
        ) from None


def _not_finite(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], float]]:
    """Places and numbers that JSON cannot say."""
    if isinstance(value, float) and not math.isfinite(value):
        yield place, value
    pairs = value.items() if isinstance(value, Mapping) else ()
    for key, each in enumerate(value) if isinstance(value, list | tuple) else pairs:
        yield from _not_finite(each, (*place, key))


def _has(content: Any, key: int | str) -> bool:
    if isinstance(content, dict):
        return key in content
    return isinstance(content, list) and isinstance(key, int)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON whose keys are texts, each said once.

    Raises:
        ValueError: they are not.
    """
    found: dict[str, Any] = {}
    for key, value in pairs:
        key.encode()  # refuses half a character
        if key in found:
            raise ValueError(f"it says `{key:.60}` twice")
        found[key] = value
    return found


def _place(keys: Sequence[Any]) -> str:
    """Where something stands in JSON, as `levels[0].tasks.piqa.n`."""
    words = [f"[{key}]" if isinstance(key, int) else f".{key:.60}" for key in keys]
    return "".join(words).removeprefix(".")


def _no_results(file: str) -> CtxpruneError:
    """The error for a file of something else."""
    return CtxpruneError(
        f"`{file}` holds no results of `ctxprune eval` or `ctxprune bench`",
        "give what their `--out` wrote, or the report.json of `ctxprune run`",
    )
