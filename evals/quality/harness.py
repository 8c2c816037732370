"""lm-eval's own tasks on a model that evicts while it scores.

Owns the bridge to lm-eval: the model class, the loading of official tasks (from the hub, or on
local files), and one task at one level. Knows nothing of levels loops or of files of results.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import logging
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets.exceptions import DatasetGenerationError
from lm_eval import simple_evaluate
from lm_eval.api.metrics import mean_stderr
from lm_eval.api.registry import register_model
from lm_eval.api.task import Task
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ctxprune.evals.quality.accuracy import refuse_dense, used
from ctxprune.evals.quality.batch import last_logits
from ctxprune.pruner.engine.handle import handle_of
from ctxprune.pruner.errors import CtxpruneError, choose

COMMON_TASKS = ("arc_easy", "hellaswag", "lambada_openai", "openbookqa", "piqa")


@register_model("ctxprune")
class PrunedLM(HFLM):  # type: ignore[misc]  # lm-eval is untyped
    """lm-eval's Hugging Face model, around a loaded checkpoint with its handle.

    Each request is scored in one pass through the evicting engine. HFLM pads a batch on the right
    and passes no mask; a pruned model has to be told which tokens are padding, or they would
    count as tokens seen and kept. And logits of the prompts, which HFLM throws away, are left out:
    a sixth of the time of SmolLM2-135M. A dense model is called exactly as HFLM calls it, so that
    its scores are those of lm-eval's `hf` to the last digit.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_size: int = 1,
        dense: bool = False,
    ) -> None:
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        self._dense = dense

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        *args: Any,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation, and whether it is the likeliest.

        Continuations that differ in their last token alone are read once, as HFLM does it.
        """
        if self._dense:
            dense: list[tuple[float, bool]]
            dense = super()._loglikelihood_tokens(requests, *args, **kwargs)
            return dense
        shared: dict[tuple[int, ...], list[int]] = {}
        for number, (_, context, continuation) in enumerate(requests):
            read = tuple((context + continuation)[-(self.max_length + 1) : -1])
            shared.setdefault(read, []).append(number)
        reads = sorted(shared, key=len, reverse=True)
        found = [(0.0, False)] * len(requests)
        for start in range(0, len(reads), self.batch_size):
            some = reads[start : start + self.batch_size]
            answers = [max(len(requests[n][2]) for n in shared[read]) for read in some]
            for read, logits in zip(some, last_logits(self.model, some, answers), strict=True):
                predicted = logits.float().log_softmax(dim=-1).cpu()
                for number in shared[read]:
                    said = torch.tensor(requests[number][2])
                    own = predicted[-len(said) :]
                    likely = float(own.gather(1, said[:, None]).sum())
                    found[number] = likely, torch.equal(own.argmax(dim=-1), said)
        return found

    def _model_generate(
        self, context: Tensor, max_length: int, stop: list[str], **options: Any
    ) -> Tensor:
        """Continue left-padded prompts (batch, length), each at the sparsity asked for."""
        handle = handle_of(self.model)
        prompts = options["attention_mask"].sum(dim=1).tolist()
        new = max_length - context.shape[1]
        handle.last_cache = None
        with handle.running(handle.at([length + new for length in prompts], prompts)):
            written: Tensor = super()._model_generate(context, max_length, stop, **options)
        cache = handle.last_cache
        if cache is not None and cache.usage is not None:
            cache.usage.end(cache.rows, cache.seen)
        return written


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep lm-eval's remarks away, and its prints out of stdout, which belongs to results."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        logger.setLevel(level)


@functools.cache
def task_manager() -> TaskManager:
    """The index of lm-eval's tasks, made once: it takes seconds to read."""
    with _quiet():
        return TaskManager()


def load_tasks(names: Sequence[str], data_dir: Path | None = None) -> dict[str, Task]:
    """Load lm-eval tasks with their documents; a group or tag becomes its tasks.

    Args:
        names: as lm-eval knows them.
        data_dir: folder with a `<task>.jsonl` for each, in the layout of the task's own dataset.
            The official definition is run on it, without network. None: from the hub.

    Raises:
        CtxpruneError: for an unknown task, a missing or malformed file, documents out of reach.
    """
    if not names:
        return {}
    manager = task_manager()
    known = manager.all_tasks if data_dir is None else manager.all_subtasks
    for name in names:
        if name not in known:
            # the nearest few: lm-eval has thousands
            choose("task", name, difflib.get_close_matches(name, known, n=5) or COMMON_TASKS)
    tasks: dict[str, Task] = {}
    for name in names:
        spec = name if data_dir is None else _on_file(name, data_dir / f"{name}.jsonl")
        try:
            with _quiet():
                tasks |= manager.load([spec])["tasks"]
        except DatasetGenerationError as error:
            raise CtxpruneError(
                f"the documents of task `{name}` cannot be read", "is each line a JSON object?"
            ) from error
        except OSError as error:  # also ConnectionError, and what is not in the offline cache
            raise CtxpruneError(
                f"the documents of task `{name}` cannot be downloaded",
                f"give a folder with `{name}.jsonl` by `--data-dir`",
            ) from error
    return tasks


def _on_file(name: str, path: Path) -> dict[str, Any]:
    """The official task with a local file as the split that it scores."""
    if not path.is_file():
        raise CtxpruneError(
            f"no file `{path}` for task `{name}`", "`--data-dir` needs a `<task>.jsonl` for each"
        )
    splits = {"training_split": None, "validation_split": None, "test_split": "test"}
    source = {
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {"test": str(path)}},
    }
    # an inline group: lm-eval merges overrides into a task's own definition only inside a group
    return {"group": "ctxprune_local", "task": [{"task": name, **source, **splits}]}


def score(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    *,
    policy: str = "gate",
    sparsity: float = 0.0,
    max_rows: int | None = None,
    evict: str = "reading",
    batch_size: int = 1,
    limit: int | None = None,
    seed: int = 0,
) -> dict[str, float | None]:
    """Run one task at one level.

    Args:
        model: a loaded checkpoint, with its handle at `model.ctxprune`.
        tokenizer: its tokenizer.
        task: from `load_tasks`.
        policy: name of the eviction policy.
        sparsity: the level asked for.
        max_rows: cap on the rows of a sequence in a layer, as for `Handle.use`.
        evict: as for `Handle.use`; the prompt is a request's context, but for its last token where
            a continuation is scored: that one predicts the first token.
        batch_size: requests a forward pass.
        limit: score the first documents only.
        seed: of every generator lm-eval draws from.

    Returns:
        the task's metrics (`acc`, `acc_norm`, `perplexity` ...), `stderr` (standard error of the
        mean of the first of them that is a mean over documents), what `accuracy.used` says of this
        task's own requests, and `n` (documents).

    Raises:
        CtxpruneError: if the level asks for pruning and not one token was evicted, or its texts
            have no prompt and rows are to leave after it.
    """
    name = task.task_name
    if evict == "prompt" and task.OUTPUT_TYPE == "loglikelihood_rolling":
        raise CtxpruneError(
            f"`{name}` scores whole texts, which have no prompt", "give `--evict reading`"
        )
    handle = handle_of(model)
    handle.use(policy, sparsity, max_rows=max_rows, evict=evict)
    dense = handle.policy is None
    with _quiet(), handle.measure() as usage:
        lm = PrunedLM(model, tokenizer, batch_size=batch_size, dense=dense)
        output: Any = simple_evaluate(
            lm,
            tasks=[task],
            task_manager=task_manager(),
            limit=limit,
            batch_size=batch_size,
            bootstrap_iters=0,  # would fork a pool; the mean's error has a closed form
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
    refuse_dense(name, usage, sparsity)
    metrics = _metrics(output["results"][name], output["samples"][name])
    return {
        **metrics,
        **used(usage),
        "n": output["n-samples"][name]["effective"],
    }


def _metrics(results: dict[str, Any], samples: list[dict[str, Any]]) -> dict[str, float]:
    """Metric -> value, and the standard error, from lm-eval's `metric,filter` -> value."""
    metrics: dict[str, float] = {}
    for key, value in results.items():
        metric, _, filtered = key.partition(",")
        if metric in metrics or metric.endswith("_stderr") or not isinstance(value, float):
            continue
        metrics[metric] = value
        values = [sample[metric] for sample in samples if sample["filter"] == filtered]
        is_mean = all(isinstance(v, (int, float)) for v in values) and metric != "perplexity"
        if is_mean and "stderr" not in metrics and len(values) > 1:
            metrics["stderr"] = mean_stderr(values)
    return metrics
