"""The levels loop: one loaded model, perplexity and tasks at each level of sparsity.

Every finished (level, measurement) pair is written to a state file at once, so that a killed
evaluation goes on where it was.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ctxprune.evals.provenance import provenance, worker
from ctxprune.evals.quality import last_word, retrieval
from ctxprune.evals.quality.harness import load_tasks, score, task_manager
from ctxprune.evals.quality.perplexity import perplexity
from ctxprune.evals.state import Finished, digest, stats, text_stats
from ctxprune.pruner.checkpoints.checkpoint import check_folder, load_off, load_tokenizer
from ctxprune.pruner.config import PROTOCOLS, FromMapping, check_at_least, check_sparsity
from ctxprune.pruner.data import read_texts, windows
from ctxprune.pruner.device import AUTO, dtype_name, input_device, place
from ctxprune.pruner.engine.handle import handle_of
from ctxprune.pruner.errors import CtxpruneError, choose
from ctxprune.pruner.policies import names as policy_names

PERPLEXITY = "perplexity"
OWN_TASKS = (retrieval.NAME, last_word.NAME)
PACKAGES = ("ctxprune", "torch", "transformers", "lm_eval")


@dataclass(frozen=True)
class EvalConfig(FromMapping):
    """One evaluation.

    Attributes:
        tasks: run beside perplexity: `OWN_TASKS` and names of lm-eval tasks.
        sparsity: the levels asked for; None: 0 and every level the model was calibrated at.
        policy: which eviction policy decides.
        evict: `reading`: rows leave while a text is read; `prompt`: not before the end of its
            prompt. The rows are as many.
        max_rows: cap on the rows of a sequence in a layer; None: the one of the model; 0: none.
        text: for perplexity and our own tasks: .txt/.jsonl(.gz) file, folder, `datasets` name;
            None: the embedded evaluation sample.
        context: tokens a window of that text, for perplexity.
        prompt: how many of them are read and not scored; None: the first.
        tokens: at most this many tokens of it; None: all.
        lengths: tokens a prompt of `retrieval`; those that the text or the model's positions
            cannot serve are left out.
        limit: documents a task, prompts a length and depth of `retrieval`; None: all of lm-eval's,
            and `retrieval.PER_CELL`, `last_word.LIMIT`.
        batch_size: windows, requests or passages a forward pass, at most; `retrieval` takes one
            text a pass.
        seed: of lm-eval's generators, and of the choice of texts of our own tasks.
        data_dir: folder of `<task>.jsonl`, the tasks' documents; None: from the hub.
        dtype, device, device_map: of the model, see `checkpoint.load`.
    """

    tasks: tuple[str, ...] = ()
    sparsity: tuple[float, ...] | None = None
    policy: str = "gate"
    evict: str = PROTOCOLS[0]
    max_rows: int | None = None
    text: str | None = None
    context: int = 512
    prompt: int | None = None
    tokens: int | None = None
    lengths: tuple[int, ...] = retrieval.LENGTHS
    limit: int | None = None
    batch_size: int = 8
    seed: int = 0
    data_dir: Path | None = None
    dtype: str = AUTO
    device: str = AUTO
    device_map: str | None = None

    def __post_init__(self) -> None:
        # recipes give lists and strings
        object.__setattr__(self, "tasks", tuple(dict.fromkeys(self.tasks)))
        if self.sparsity is not None:
            levels = tuple(sorted({check_sparsity(float(level)) for level in self.sparsity}))
            object.__setattr__(self, "sparsity", levels)
        if self.data_dir is not None:
            object.__setattr__(self, "data_dir", Path(self.data_dir))
        choose("policy", self.policy, policy_names())
        choose("value of evict", self.evict, PROTOCOLS)
        place(self.device, self.dtype, self.device_map)
        check_at_least("context", self.context, 2)
        if self.prompt is not None:
            check_at_least("prompt", self.prompt, 2)
            check_at_least("context", self.context, self.prompt + 1)
        elif self.evict == "prompt":
            raise CtxpruneError(
                "rows that leave after a prompt need one in the windows of perplexity too",
                "give `--prompt N`: so many tokens of each are read, and the rest is scored",
            )
        check_at_least("batch_size", self.batch_size, 1)
        if not self.lengths or {type(length) for length in self.lengths} != {int}:
            raise CtxpruneError("lengths must be whole numbers, at least one of them")
        object.__setattr__(self, "lengths", tuple(sorted(set(self.lengths))))
        # room for a fact, its question and a passage, even if letters are tokens
        check_at_least("lengths", self.lengths[0], 128)
        for name in ("tokens", "limit"):
            value = getattr(self, name)
            if value is not None:
                check_at_least(name, value, 1)


def evaluate(
    folder: Path,
    config: EvalConfig,
    *,
    state: Path | None = None,
    on_event: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Measure a converted checkpoint at every level.

    Args:
        folder: the checkpoint.
        config: what to measure.
        state: file that keeps finished measurements over runs; made if missing.
        on_event: called with one line of text when a measurement starts, ends or is skipped.

    Returns:
        `model`, `layers` (those that the sparsity is of), `policy`, `evict`, `context`, `prompt`,
        `levels` and provenance, ready for JSON. Each level has `sparsity_requested`, what
        `Perplexity` has, and `tasks`: name -> metrics, `stderr`, `sparsity` and `rows` (on its own
        requests), `n`, and what else the task gives.

    Raises:
        CtxpruneError: for bad input, or a pruned level at which nothing was evicted.
    """
    say = on_event or (lambda line: None)
    check_folder(folder)
    official = _official(config.tasks)
    if official:
        say("loading lm-eval's tasks")
    tasks = load_tasks(official, config.data_dir)
    tokenizer = load_tokenizer(folder)
    texts = read_texts(config.text, "eval")
    text = windows(tokenizer, texts, config.context)
    if config.tokens is not None:
        text = text[: max(1, config.tokens // config.context)]
    model = load_off(folder, place(config.device, config.dtype, config.device_map), say)
    handle = handle_of(model)
    levels = config.sparsity or tuple(sorted({0.0, *handle.levels}))
    runs = _own_tasks(config, model, tokenizer, texts, say)
    for name, task in tasks.items():
        runs[name] = partial(
            score,
            model,
            tokenizer,
            task,
            batch_size=config.batch_size,
            limit=config.limit,
            seed=config.seed,
        )
    finished = Finished(state)
    weights = stats(folder.iterdir())

    def measure(level: float, name: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        label = f"{name} at sparsity {level:g}"
        key = digest([weights, level, name, _dependencies(config, name)])
        result = finished.get(key)
        if result is None:
            say(f"{label}: running")
            result = work()
            finished.put(key, label, result)
            say(f"{label}: done")
        else:
            say(f"{label}: already done, kept")
        return result

    rows = []
    evicts_every = 0
    for level in levels:
        handle.use(config.policy, level, context=config.context, max_rows=config.max_rows)
        evicts_every = max(evicts_every, handle.evicts_every)
        row = measure(level, PERPLEXITY, partial(_perplexity, model, text, config, level))
        chosen = {
            "policy": config.policy,
            "sparsity": level,
            "max_rows": config.max_rows,
            "evict": config.evict,
        }
        scores = {name: measure(level, name, partial(run, **chosen)) for name, run in runs.items()}
        rows.append({"sparsity_requested": level, **row, "tasks": scores})
    return {
        "model": str(folder),
        "layers": handle.decoder.describe(),
        "policy": config.policy,
        "evict": config.evict,
        "max_rows": config.max_rows,
        "evicts_every": evicts_every,
        "context": config.context,
        "prompt": config.prompt,
        "levels": rows,
        "text": config.text or "embedded",
        "limit": config.limit,
        "batch_size": config.batch_size,
        "seed": config.seed,
        "dtype": dtype_name(model),
        **worker(input_device(model)),
        **provenance(*PACKAGES),
    }


def _official(names: Sequence[str]) -> list[str]:
    """The tasks that are lm-eval's.

    Raises:
        CtxpruneError: for one that is not, and nearly is called like one of ours.
    """
    official = [name for name in names if name not in OWN_TASKS]
    for name in official:
        near = difflib.get_close_matches(name, OWN_TASKS, cutoff=0.8)
        if near and name not in task_manager().all_tasks:
            choose("task", name, near)
    return official


def _own_tasks(
    config: EvalConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: list[str],
    say: Callable[[str], None],
) -> dict[str, Callable[..., dict[str, Any]]]:
    """Those of our own that are asked for: name -> `score`, but for the level and the policy."""
    longest = handle_of(model).decoder.positions
    runs: dict[str, Callable[..., dict[str, Any]]] = {}
    if retrieval.NAME in config.tasks:
        prompts = retrieval.prompts(
            tokenizer,
            texts,
            lengths=config.lengths,
            per_cell=config.limit,
            longest=longest,
            seed=config.seed,
        )
        unserved = sorted(set(config.lengths) - {len(prompt.ids) for prompt in prompts})
        if unserved:
            say(f"{retrieval.NAME}: length {', '.join(map(str, unserved))} cannot be served")
        runs[retrieval.NAME] = partial(retrieval.score, model, prompts)
    if last_word.NAME in config.tasks:
        passages = last_word.passages(
            tokenizer, texts, limit=config.limit, longest=longest, seed=config.seed
        )
        runs[last_word.NAME] = partial(
            last_word.score, model, passages, batch_size=config.batch_size
        )
    return runs


def _perplexity(
    model: PreTrainedModel, text: Tensor, config: EvalConfig, level: float
) -> dict[str, Any]:
    """Perplexity at one level, which is met in windows of the context.

    As in tasks, the last token of a prompt sees what is left of the others: it predicts the first
    one that is scored.
    """
    torch.manual_seed(config.seed)
    prompt = config.prompt or 1
    handle_of(model).use(
        config.policy,
        level,
        context=config.context,
        prompt=prompt - 1,
        max_rows=config.max_rows,
        evict=config.evict,
    )
    result = perplexity(model, text, config.batch_size, prompt)
    if level > 0 and result.sparsity == 0.0:
        raise CtxpruneError(
            f"not one token was evicted at sparsity {level:g}, so the perplexity would be the "
            "dense model's",
            "the context may be shorter than the protected tokens",
        )
    return asdict(result)


def _dependencies(config: EvalConfig, name: str) -> list[Any]:
    """The settings and files that one measurement depends on, beside the model."""
    common = [
        config.policy,
        config.evict,
        config.max_rows,
        config.batch_size,
        config.seed,
        str(place(config.device, config.dtype, config.device_map)),
    ]
    if name == PERPLEXITY:
        window = [config.context, config.prompt, config.tokens]
        return [*common, config.text, *window, text_stats(config.text)]
    if name in OWN_TASKS:
        lengths = config.lengths if name == retrieval.NAME else ()
        return [*common, config.text, lengths, config.limit, text_stats(config.text)]
    documents = [] if config.data_dir is None else [config.data_dir / f"{name}.jsonl"]
    return [*common, config.limit, stats(documents)]
