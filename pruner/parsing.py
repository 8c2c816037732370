"""Plain data from the bytes of somebody else: JSON and YAML, refused where they would do harm.

What is read is finite in every way: in bytes, in depth, in its numbers, and in what its aliases
stand for. No key of a mapping is given twice.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ctxprune.pruner.errors import CtxpruneError, first_line

if TYPE_CHECKING:
    from yaml.nodes import Node

MOST_BYTES = 2**22
MOST_DEPTH = 32
# Values of a YAML file, each alias written out.
MOST_VALUES = 20_000

_TAG = "tag:yaml.org,2002:"
_PLAIN = {_TAG + kind for kind in ("null", "bool", "int", "float", "str", "seq", "map", "merge")}
_HALF = re.compile("[\\ud800-\\udfff]")
# A number in YAML 1.2, and everywhere else, but a word to PyYAML.
_POWER_OF_TEN = re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+")


def contents(path: Path) -> bytes:
    """The bytes of a file that settings are in.

    Raises:
        CtxpruneError: it cannot be read, or is far too large.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise CtxpruneError(f"`{path}` cannot be read: {error.strerror}") from error
    if len(raw) > MOST_BYTES:
        raise CtxpruneError(f"`{path}` is larger than {MOST_BYTES:,} bytes")
    return raw


def json_of(raw: bytes | str, source: str) -> Any:
    """What JSON says; `source` names it in messages.

    Raises:
        CtxpruneError: it is something else, or refused.
    """
    text = _decoded(raw, source)
    try:
        data = json.loads(
            text, object_pairs_hook=_unique, parse_float=_finite, parse_constant=_finite
        )
    except RecursionError as error:
        raise _too_deep(source) from error
    except ValueError as error:
        raise CtxpruneError(f"{source} is not valid JSON: {_cause(error)}") from error
    _check_tree(data, source)
    return data


def yaml_of(raw: bytes | str, source: str) -> Any:
    """What YAML says; `source` names it in messages.

    Raises:
        CtxpruneError: it is something else, or refused.
    """
    import yaml  # late, so that the command line answers sooner

    text = _decoded(raw, source)
    try:
        _check_events(yaml.parse(text, yaml.SafeLoader), source)
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _Checked(source).measure(node)
        data = loader.construct_document(node)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = "" if mark is None else f", line {mark.line + 1}"
        problem = getattr(error, "problem", None) or first_line(error)
        raise CtxpruneError(f"{source} is not valid YAML{line}: {problem}") from error
    except (ValueError, LookupError) as error:  # a tag that its value does not have
        raise CtxpruneError(f"{source} is not valid YAML: {_cause(error)}") from error
    _check_tree(data, source)
    return data


class _Checked:
    """Walks the nodes of YAML before anything is made of them."""

    def __init__(self, source: str) -> None:
        self._source = source
        self._sizes: dict[Node, tuple[int, int]] = {}
        self._open: set[Node] = set()

    def measure(self, node: Node) -> tuple[int, int]:
        """Values under a node, each alias written out, and how deep they are nested."""
        if node in self._sizes:
            return self._sizes[node]
        if node in self._open:
            raise self._fault(node, "holds itself")
        self._open.add(node)
        children = self._children(node)
        sizes = [self.measure(child) for child in children]
        size = 1 + sum(size for size, _ in sizes)
        depth = 1 + max((depth for _, depth in sizes), default=0)
        if size > MOST_VALUES:
            raise self._fault(node, f"stands for more than {MOST_VALUES:,} values")
        if depth > MOST_DEPTH:
            raise _too_deep(self._source)
        self._sizes[node] = size, depth
        return size, depth

    def _children(self, node: Node) -> list[Node]:
        value = node.value
        if isinstance(value, str):
            if node.tag == f"{_TAG}timestamp":
                node.tag = f"{_TAG}str"
            elif getattr(node, "style", None) is None and _POWER_OF_TEN.fullmatch(value):
                node.tag = f"{_TAG}float"
        if node.tag not in _PLAIN:
            raise self._fault(node, f"has the tag `{node.tag.removeprefix(_TAG)}`")
        if not isinstance(value, list):
            return []
        children = []
        seen = set()
        for each in value:
            if not isinstance(each, tuple):
                children.append(each)
                continue
            key, _ = each
            name = (key.tag, key.value) if isinstance(key.value, str) else key
            if name in seen:
                raise self._fault(key, f"is a second `{key.value}`")
            seen.add(name)
            children += each
        return children

    def _fault(self, node: Node, what: str) -> CtxpruneError:
        return CtxpruneError(f"{self._source}, line {node.start_mark.line + 1}: a value {what}")


def _cause(error: Exception) -> str:
    """The first line of an error, without what it tells programmers."""
    return first_line(error).partition("; use sys.")[0]


def _decoded(raw: bytes | str, source: str) -> str:
    try:
        return raw if isinstance(raw, str) else raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise CtxpruneError(
            f"{source} is not UTF-8: byte {error.start} is no part of a character",
            "save it as UTF-8",
        ) from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r} is there twice")
    return found


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is no finite number")
    return number


def _check_events(events: Iterable[Any], source: str) -> None:
    """Raise CtxpruneError where values are too many or too deep, before they are put together."""
    depth = 0
    for number, event in enumerate(events):
        kind = type(event).__name__
        depth += kind.endswith("StartEvent") - kind.endswith("EndEvent")
        if depth > MOST_DEPTH + 2:  # of the stream and of the document
            raise _too_deep(source)
        if number > 2 * MOST_VALUES:
            raise CtxpruneError(f"{source} has more than {MOST_VALUES:,} values")


def _check_tree(data: Any, source: str) -> None:
    """Raise CtxpruneError for what is nested too deeply, and for halves of characters."""
    level = [data]
    for _ in range(MOST_DEPTH):
        words = (each for each in level if isinstance(each, str) and not each.isascii())
        if any(_HALF.search(word) for word in words):
            raise CtxpruneError(f"{source} holds half a character, a lone surrogate")
        inner = [[*each, *each.values()] if isinstance(each, dict) else each for each in level]
        level = [each for values in inner if isinstance(values, list) for each in values]
        if not level:
            return
    raise _too_deep(source)


def _too_deep(source: str) -> CtxpruneError:
    return CtxpruneError(f"{source} is nested more than {MOST_DEPTH} levels deep")
