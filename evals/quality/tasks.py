"""lm-eval's tasks: their names, and their definitions with the documents that they score.

Documents come from the hub, as lm-eval has it, or from files of the user's.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import datasets
import lm_eval.tasks
from datasets.exceptions import DatasetGenerationError
from lm_eval.api.group import Group
from lm_eval.api.task import ConfigurableTask, Task
from lm_eval.tasks import TaskManager

from ctxprune.pruner.errors import CtxpruneError, choose

COMMON_TASKS = ("arc_easy", "hellaswag", "lambada_openai", "openbookqa", "piqa")


@dataclass(frozen=True)
class Loaded:
    """What the names of tasks, groups and tags stand for.

    Attributes:
        tasks: each with its documents. groups: that sum up some of them.
    """

    tasks: dict[str, Task]
    groups: dict[str, Group]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep lm-eval's remarks and prints away, and its pools of processes."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    bars = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        with (
            open(os.devnull, "w", encoding="utf-8") as nowhere,
            contextlib.redirect_stdout(nowhere),
            mock.patch.dict(os.environ, DISABLE_MULTIPROC="1"),
        ):
            yield
    finally:
        logger.setLevel(level)
        if not bars:
            datasets.enable_progress_bars()


@functools.cache
def task_manager(include_path: Path | None = None) -> TaskManager:
    """The index of all tasks, made once: it takes seconds to read.

    Args:
        include_path: a folder with definitions of the user's, which come before lm-eval's.

    Raises:
        CtxpruneError: there is no such folder.
    """
    if include_path is not None and not include_path.is_dir():
        raise CtxpruneError(
            f"`{include_path}` is no folder", "give one with lm-eval's .yaml definitions of tasks"
        )
    with quiet():
        return TaskManager(include_path=None if include_path is None else str(include_path))


def listed(include_path: Path | None = None) -> list[tuple[str, str]]:
    """Every name that `load_tasks` knows, and what it is: a `task`, a `group` or a `tag`."""
    manager = task_manager(include_path)
    kinds = {
        "group": manager.all_groups,
        "tag": manager.all_tags,
        "task": manager.all_subtasks,
    }
    return sorted((name, kind) for kind, names in kinds.items() for name in names)


def _index(names: Sequence[str], include_path: Path | None) -> TaskManager:
    """An index that has all of these names: that of the folders that define them, if it does.

    Raises:
        CtxpruneError: a name is nowhere, or `include_path` is no folder.
    """
    if include_path is None:
        root = Path(lm_eval.tasks.__file__).parent
        any_name = "|".join(map(re.escape, names)).encode()
        defines = re.compile(rb"^task:\s*[\"']?(?:" + any_name + rb")[\"']?\s*$", re.MULTILINE)
        found = {path.parent for path in root.rglob("*.yaml") if defines.search(path.read_bytes())}
        with quiet():
            few = TaskManager(include_defaults=False, include_path=sorted(map(str, found)))
        if set(names) <= set(few.all_subtasks):
            return few
    manager = task_manager(include_path)
    for name in names:
        if name not in manager.all_tasks:
            # the nearest few: lm-eval has thousands
            near = difflib.get_close_matches(name, manager.all_tasks, n=5)
            choose("task", name, near or COMMON_TASKS)
    return manager


def load_tasks(
    names: Sequence[str],
    data_dir: Path | None = None,
    *,
    include_path: Path | None = None,
    num_fewshot: int | None = None,
    gen_kwargs: Mapping[str, Any] | None = None,
) -> Loaded:
    """Load tasks with their documents; groups and tags stand for their tasks.

    Args:
        names: as lm-eval knows them.
        data_dir: folder with a `<task>.jsonl` for each task, in the layout of the task's own
            dataset. The official definition is run on it, without network, and takes its few-shot
            examples from it too, never the document that is asked. None: from the hub.
        include_path: a folder with definitions of the user's.
        num_fewshot: examples before each document; None: as many as the task has. As in lm-eval, a
            task that is defined with 0 keeps it.
        gen_kwargs: settings of generation that come before those of a task.

    Raises:
        CtxpruneError: for an unknown task, a missing or malformed file, documents out of reach, a
            definition that does not fit them.
    """
    if not names:
        return Loaded({}, {})
    manager = _index(names, include_path)
    tasks: dict[str, Task] = {}
    groups: dict[str, Group] = {}
    for name in names:
        found = _load(manager, name, data_dir)
        tasks |= found["tasks"]
        groups |= {key: group for key, group in found["groups"].items() if group.has_aggregation}
    for name, task in tasks.items():
        shots = task.get_config("num_fewshot")
        if shots is None or (num_fewshot is not None and shots != 0):
            task.set_config("num_fewshot", num_fewshot or 0)
        if gen_kwargs and task.OUTPUT_TYPE == "generate_until":
            task.set_config("generation_kwargs", dict(gen_kwargs), update=True)
        _check_shots(name, task)
    return Loaded(tasks, groups)


def _load(manager: TaskManager, name: str, data_dir: Path | None) -> Any:
    """One name, loaded by lm-eval. Raises as `load_tasks`."""
    local: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
    if data_dir is not None:
        local = mock.patch.object(ConfigurableTask, "download", _from_file(data_dir))
    try:
        with quiet(), local:
            return manager.load([name])
    except CtxpruneError:
        raise
    except DatasetGenerationError as error:
        raise CtxpruneError(
            f"the documents of task `{name}` cannot be read", "is each line a JSON object?"
        ) from error
    except OSError as error:  # also ConnectionError, and what is not in the offline cache
        raise CtxpruneError(
            f"the documents of task `{name}` cannot be downloaded",
            f"give a folder with `{name}.jsonl` by `--data-dir`",
        ) from error
    except Exception as error:  # a definition runs templates and functions on its documents
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise CtxpruneError(
            f"lm-eval cannot load task `{name}`: {reason}",
            "do its documents have the fields of the task's own dataset?",
        ) from error


def _from_file(data_dir: Path) -> Callable[..., None]:
    """What a task does instead of a download: all that it is given is a file of this folder."""

    def download(task: ConfigurableTask, *args: Any, **kwargs: Any) -> None:
        config, few = task.config, task.fewshot_cfg
        path = data_dir / f"{config.task}.jsonl"
        if not path.is_file():
            raise CtxpruneError(
                f"no file `{path}` for task `{config.task}`",
                "`--data-dir` needs a `<task>.jsonl` for each",
            )
        # Examples of the split that is scored: lm-eval then leaves out the document that is asked.
        split = few.split or "test"
        if few.samples is None:
            few.split = split
        config.training_split = config.validation_split = None
        config.test_split = split
        task.dataset = datasets.load_dataset("json", data_files={split: str(path)})

    return download


def _check_shots(name: str, task: Task) -> None:
    """Raise CtxpruneError if a task has fewer examples than it is to show.

    The document that is asked is none of its own examples.
    """
    shots, sampler = task.get_config("num_fewshot"), getattr(task, "sampler", None)
    if not shots or sampler is None:
        return
    own = task.fewshot_cfg.split is not None and task.fewshot_cfg.split == task.config.test_split
    available = len(sampler.df) - own
    if shots > available:
        raise CtxpruneError(
            f"task `{name}` shows {shots} examples, and there are {max(available, 0)}",
            "give fewer by `--num-fewshot`, or more documents",
        )
