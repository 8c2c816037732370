"""Settings that check themselves: types, bounds and finite numbers by pydantic, faults in words.

No number is read from a string, nor from true or false. A whole number is a number too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from reprlib import Repr
from typing import Annotated, Any, Self, TypeVar

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    TypeAdapter,
    ValidationError,
    model_validator,
)
from pydantic.dataclasses import dataclass

from ctxprune.pruner.errors import CtxpruneError, choose

Value = TypeVar("Value")

# Built at first use: the help of a command needs defaults alone.
STRICT = ConfigDict(strict=True, allow_inf_nan=False, extra="forbid", defer_build=True)

# No count is larger, and no text is longer, in tokens.
MOST, LONGEST_TEXT = 2**31 - 1, 2**24

Natural = Annotated[int, Field(ge=0, le=MOST)]
Count = Annotated[int, Field(ge=1, le=MOST)]
Tokens = Annotated[int, Field(ge=1, le=LONGEST_TEXT)]
Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]
Positive = Annotated[float, Field(ge=0.0)]
# With more no optimizer can compute in float32.
Rate = Annotated[float, Field(ge=0.0, le=1e36)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
# A sparsity. What is added makes 0.0 of -0.0.
Level = Annotated[float, Field(ge=0.0, lt=1.0), AfterValidator(lambda value: value + 0.0)]
Text = Annotated[str, Field(max_length=2**26)]
# Of a file, a data set, a device; no system takes NUL in one.
Name = Annotated[str, Field(min_length=1, max_length=4096, pattern=r"^[^\x00]*$")]
# Parsed YAML and JSON have lists, and the fields tuples.
LIST = Field(strict=False, max_length=10_000)
# A string alone is a list of itself.
ALONE = BeforeValidator(
    lambda value: (value,) if isinstance(value, str) else value,
    json_schema_input_type=str | list[str],
)
Names = Annotated[tuple[Name, ...], LIST, ALONE]

# What is wrong with a value, by pydantic's name of it.
_WORDS = {
    "missing": "is missing",
    "unexpected_keyword_argument": "is no setting",
    "extra_forbidden": "is no setting",
    "greater_than_equal": "must be at least {ge:.15g}, not {value}",
    "greater_than": "must be more than {gt:.15g}, not {value}",
    "less_than_equal": "must be at most {le:.15g}, not {value}",
    "less_than": "must be less than {lt:.15g}, not {value}",
    "finite_number": "must be a finite number, not {value}",
    "int_type": "must be a whole number, not {value}",
    "float_type": "must be a number, not {value}",
    "bool_type": "must be true or false, not {value}",
    "string_type": "must be text, not {value}",
    "path_type": "must be a path, not {value}",
    "tuple_type": "must be a list, not {value}",
    "list_type": "must be a list, not {value}",
    "dict_type": "must be a mapping, not {value}",
    "literal_error": "must be {expected}, not {value}",
    "string_unicode": "must be whole characters, not {value}",
    "string_too_short": "must not be empty",
    "string_too_long": "must have at most {max_length} characters",
    "string_pattern_mismatch": "must not hold a NUL character",
    "too_short": "must not be an empty list",
    "too_long": "must have at most {max_length} items",
}
# Levels alone have an open end above.
_HINTS = {"less_than": "0.8 drops 80% of the context, 0 drops nothing"}

# Which of several types of a value is meant is said among its keys, too.
_KINDS = {"int", "float", "bool", "str"}

_REPR = Repr()
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = 60


@dataclass(frozen=True, config=STRICT)
class Settings:
    """A dataclass of pydantic whose faults are a CtxpruneError of one sentence."""

    @model_validator(mode="wrap")
    @classmethod
    def _in_one_sentence(cls, given: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        try:
            return handler(given)
        except ValidationError as error:
            raise explained(error, fields=[field.name for field in fields(cls)]) from error

    @classmethod
    def from_mapping(cls, raw: object, source: str) -> Self:
        """Build from parsed YAML or JSON, `source`.

        Raises:
            CtxpruneError: for a key that is no field (with the nearest one) or a value refused.
        """
        try:
            if not isinstance(raw, Mapping):
                raise CtxpruneError(f"a mapping is needed, not {shown(raw)}")
            known = TypeAdapter(cls).json_schema()["properties"]
            return cls(**{choose("key", str(key), known): value for key, value in raw.items()})
        except CtxpruneError as error:
            raise CtxpruneError(f"{source}: {error.message}", error.hint) from error


def check(name: str, kind: Any, value: Value) -> Value:
    """Return a value if it is of a kind such as `Level`, else raise CtxpruneError that names it."""
    try:
        checked: Value = TypeAdapter(kind, config=STRICT).validate_python(value)
    except ValidationError as error:
        raise explained(error, name) from error
    return checked


def conforming(kind: Any, raw: Value, source: str, hint: str = "") -> Value:
    """Return parsed JSON, `source`, if it is of a kind, else raise CtxpruneError with its key."""
    try:
        TypeAdapter(kind).validate_python(raw)
    except ValidationError as error:
        raise CtxpruneError(f"{source}: {explained(error).message}", hint) from error
    return raw


def explained(error: ValidationError, name: str = "", fields: Sequence[str] = ()) -> CtxpruneError:
    """The first fault in one sentence, with its key, or a name in place of it.

    Args:
        fields: by which values were given that are told by their place.
    """
    faults = error.errors(include_url=False)
    fault = faults[0]
    for other in faults:  # of a number or a word, to which a value that is a word is compared
        same = other["input"] is fault["input"] and isinstance(fault["input"], str)
        fault = other if same and other["type"] == "literal_error" else fault
    kind, value, context = fault["type"], fault["input"], fault.get("ctx", {})
    first, *inner = fault["loc"] or ("",)
    key = name or _key((fields[first] if isinstance(first, int) and fields else first, *inner))
    if kind == "literal_error" and isinstance(value, str):
        try:
            choose(f"value of {key}", value, re.findall(r"'(.*?)'", context["expected"]))
        except CtxpruneError as unknown:
            return unknown
    words = _WORDS.get(kind, f"is not understood: {fault['msg']}")
    return CtxpruneError(
        f"{key} {words.format(value=shown(value), **context)}", _HINTS.get(kind, "")
    )


def _key(place: tuple[int | str, ...]) -> str:
    """Where a fault is, as `item 2 of a.b`."""
    words = [part for part in place if isinstance(part, str) and part not in _KINDS]
    key = ".".join(word for word in words if re.fullmatch(r"[\w.]+", word))
    items = [part + 1 for part in place if isinstance(part, int)]
    return f"item {items[-1]} of {key}" if items else key


def shown(value: object) -> str:
    """A value of somebody else as it is written in Python, cut short."""
    try:
        return _REPR.repr(value)
    except ValueError:  # a whole number of thousands of digits
        return f"a {type(value).__name__}"
