"""The levels loop: one loaded model, perplexity and tasks at each level of sparsity.

Every finished (level, measurement) pair is written to a state file at once, so that a killed
evaluation goes on where it was.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any

import torch
from lm_eval.api.task import Task
from pydantic import Field
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ctxprune.evals.config import OWN_TASKS, EvalConfig
from ctxprune.evals.places import nearby
from ctxprune.evals.provenance import provenance, worker
from ctxprune.evals.quality import conversation, fidelity, last_word, long_context
from ctxprune.evals.quality.accuracy import ERROR, VALUES, against, finite, mean_and_error
from ctxprune.evals.quality.groups import summed
from ctxprune.evals.quality.harness import PrunedLM, check_template, score
from ctxprune.evals.quality.perplexity import perplexity
from ctxprune.evals.quality.tasks import listed, load_tasks, quiet
from ctxprune.evals.quality.work import (
    Meter,
    Progress,
    Speed,
    Work,
    of_task,
    reading,
    speed,
    summary,
)
from ctxprune.evals.results import Figure, Part, Share
from ctxprune.evals.state import Finished, Kept, code, digest, stats, text_stats
from ctxprune.pruner.checkpoints.checkpoint import (
    check_folder,
    load_off,
    load_tokenizer,
    read_settings,
)
from ctxprune.pruner.data import read_texts, windows
from ctxprune.pruner.device import dtype_name, input_device, place
from ctxprune.pruner.engine.handle import handle_of
from ctxprune.pruner.errors import CtxpruneError, choose

PERPLEXITY = "perplexity"
PACKAGES = ("ctxprune", "torch", "transformers", "lm_eval")


class Figures(Part):
    """What is kept of a measurement, as far as the evaluation reads it: see `Measure`."""

    sparsity: Share
    values: dict[str, Annotated[list[Figure], Field(min_length=1)]]


@dataclass(frozen=True)
class Measure:
    """Something that is measured at every level.

    Attributes:
        run: called with a level, gives the figures and `values` of each document.
        work: how much that is.
        depends: settings and files that the figures depend on, beside the model and the level.
        afresh: it is never taken from the state, since it writes a file too.
    """

    run: Callable[[float], dict[str, Any]]
    work: Callable[[], Work]
    depends: list[Any]
    afresh: bool = False


def evaluate(
    folder: Path,
    config: EvalConfig,
    *,
    state: Path | None = None,
    fresh: bool = False,
    on_event: Callable[[str], None] | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> dict[str, Any]:
    """Measure a converted checkpoint at every level.

    Args:
        folder: the checkpoint.
        config: what to measure.
        state: file that keeps finished measurements over runs; made if missing.
        fresh: measure anew what it holds.
        on_event: called with one line of text: how much work there is, and when a measurement
            starts, ends or is skipped.
        on_progress: called after every forward pass.

    Returns:
        `model`, `layers` (those that the sparsity is of), `policy`, `evict`, `context`, `prompt`,
        `levels` and provenance, ready for JSON. Each level has `sparsity_requested`, what
        `Perplexity` has, its `date`, and `tasks`: name -> what `harness.score` or one of our own
        tasks gives, and `date`. Where the dense model was measured too, `against_dense` has the
        paired difference of each metric that is a mean over the same documents; that of the text
        is of `nll`, the negative log-likelihood of a token in nats. A metric that came to no
        number is None, and `not_finite` says what it was.

    Raises:
        CtxpruneError: for bad input, a state that another process writes, or a pruned level at
            which nothing was evicted.
        Interrupted: after Ctrl-C or SIGTERM; what was measured is kept in the state.
    """
    with Finished.opened(state) as finished:
        say = on_event or (lambda line: None)
        return _evaluate(folder, config, finished, fresh, say, on_progress)


def _evaluate(
    folder: Path,
    config: EvalConfig,
    finished: Finished,
    fresh: bool,
    say: Callable[[str], None],
    on_progress: Callable[[Progress], None] | None,
) -> dict[str, Any]:
    check_folder(folder)
    official = _official(config)
    if official:
        where = " from the hub" if config.data_dir is None else f" in `{config.data_dir}`"
        say(f"loading the documents of {', '.join(official)}{where}")
    loaded = load_tasks(
        official,
        config.data_dir,
        include_path=config.include_path,
        num_fewshot=config.num_fewshot,
        gen_kwargs=config.gen_kwargs,
    )
    for name, task in loaded.tasks.items():
        if config.num_fewshot and task.get_config("num_fewshot") != config.num_fewshot:
            say(f"{name}: defined without examples, as which it is scored")
    tokenizer = load_tokenizer(folder)
    if config.apply_chat_template and loaded.tasks:
        check_template(tokenizer)
    texts = read_texts(config.text, "eval")
    text = windows(tokenizer, texts, config.context)
    if config.tokens is not None:
        text = text[: max(1, config.tokens // config.context)]
    model = load_off(folder, place(config.device, config.dtype, config.device_map), say)
    handle = handle_of(model)
    levels = config.sparsity or tuple(sorted({0.0, *handle.levels}))
    measures = {
        PERPLEXITY: _of_text(config, model, text),
        **_own_tasks(config, folder, model, tokenizer, texts, say),
        **{
            name: _official_task(config, model, tokenizer, task)
            for name, task in loaded.tasks.items()
        },
    }
    weights = stats(folder.iterdir())
    versions = provenance(*PACKAGES)["versions"]
    evicts_every = 0
    keys: dict[tuple[float, str], str] = {}
    todo: dict[tuple[float, str], Measure] = {}
    for level in levels:
        _choose(model, config, level)
        evicts_every = max(evicts_every, handle.evicts_every)
        # A dense model is the same whoever would decide.
        decides = (config.policy, config.evict, config.max_rows) if handle.policy else ()
        sources = code(config.policy if handle.policy else None)
        for name, measure in measures.items():
            keys[level, name] = key = digest(
                [weights, versions, sources, level, name, decides, _common(config), measure.depends]
            )
            if fresh or measure.afresh or finished.get(key, Figures) is None:
                todo[level, name] = measure
    meter = Meter(model, _plan(model, config, text, todo), on_progress or (lambda progress: None))
    if todo:
        for line in summary(meter.plan, config.limit):
            say(line)

    def measured(level: float, name: str) -> Kept:
        label, key = _label(name, level), keys[level, name]
        if (level, name) in todo:
            say(f"{label}: running")
            try:
                with meter.measuring(label):
                    result = finite(measures[name].run(level))
            except torch.OutOfMemoryError as error:
                raise CtxpruneError(
                    f"{label}: the device is out of memory", "give a smaller `--batch-size`"
                ) from error
            for metric, was in result.get("not_finite", {}).items():
                say(f"{label}: `{metric}` came to {was}, which is no figure")
            say(f"{label}: done")
            return finished.put(key, label, result)
        kept = finished.get(key, Figures)
        assert kept is not None
        say(f"{label}: already done, kept ({kept.date[:10]})")
        return kept

    rows: list[dict[str, Any]] = []
    dense: dict[str, dict[str, list[float]]] = {}
    for level in levels:
        found: dict[str, dict[str, Any]] = {}
        for name in measures:
            kept = measured(level, name)
            figures = {**kept.result, "date": kept.date}
            values = figures.pop(VALUES)
            if level > 0 and name in dense:
                figures["against_dense"] = against(values, dense[name])
            elif level == 0 and not figures["sparsity"]:  # a cap on rows evicts at 0 too
                dense[name] = values
            found[name] = figures
        row = {"sparsity_requested": level, **found.pop(PERPLEXITY)}
        for name, group in loaded.groups.items():
            found[name] = summed(group, found)
        rows.append({**row, "tasks": found})
    return {
        "model": nearby(str(folder)),
        "layers": handle.decoder.describe(),
        "policy": config.policy,
        "evict": config.evict,
        "max_rows": config.max_rows,
        "evicts_every": evicts_every,
        "context": config.context,
        "prompt": config.prompt,
        "levels": rows,
        "text": nearby(config.text or "embedded"),
        "limit": config.limit,
        "num_fewshot": config.num_fewshot,
        "apply_chat_template": config.apply_chat_template,
        "system_instruction": config.system_instruction,
        "gen_kwargs": None if config.gen_kwargs is None else dict(config.gen_kwargs),
        "batch_size": config.batch_size,
        "seed": config.seed,
        "dtype": dtype_name(model),
        **worker(input_device(model)),
        **provenance(*PACKAGES),
    }


def _official(config: EvalConfig) -> list[str]:
    """The tasks that are lm-eval's.

    Raises:
        CtxpruneError: for one that is not, and nearly is called like one of ours.
    """
    official = [name for name in config.tasks if name not in OWN_TASKS]
    for name in official:
        near = difflib.get_close_matches(name, OWN_TASKS, cutoff=0.8)
        if near and name not in dict(listed(config.include_path)):
            choose("task", name, near)
    return official


def _label(name: str, level: float) -> str:
    return f"{name} at sparsity {level:g}"


def _choose(model: PreTrainedModel, config: EvalConfig, level: float) -> None:
    """Set the model to a level, for windows of the context.

    As in tasks, the last token of a prompt sees what is left of the others: it predicts the first
    one that is scored.
    """
    handle_of(model).use(
        config.policy,
        level,
        context=config.context,
        prompt=(config.prompt or 1) - 1,
        max_rows=config.max_rows,
        evict=config.evict,
    )


def _plan(
    model: PreTrainedModel,
    config: EvalConfig,
    text: Tensor,
    todo: dict[tuple[float, str], Measure],
) -> dict[str, tuple[Speed, Work]]:
    """Label of each measurement to come -> its work, and how fast the model does it."""
    work = {name: measure.work() for name, measure in {n: m for (_, n), m in todo.items()}.items()}
    ids = text[0].tolist()
    speeds: dict[bool, Speed] = {}
    plan = {}
    for level, name in todo:
        _choose(model, config, level)
        dense = handle_of(model).policy is None
        if dense not in speeds:
            requests = sum(each.requests for each in work.values())
            typical = sum(each.tokens for each in work.values()) // max(requests, 1)
            length = min(max(typical, 1), config.context)
            speeds[dense] = speed(model, ids, config.batch_size, length, dense)
        plan[_label(name, level)] = speeds[dense], work[name]
    return plan


def _chosen(config: EvalConfig, level: float) -> dict[str, Any]:
    """What the `score` of a task is told of a level."""
    return {
        "policy": config.policy,
        "sparsity": level,
        "max_rows": config.max_rows,
        "evict": config.evict,
    }


def _common(config: EvalConfig) -> list[Any]:
    """The settings that every measurement depends on."""
    where = place(config.device, config.dtype, config.device_map)
    return [config.batch_size, config.seed, str(where)]


def _of_text(config: EvalConfig, model: PreTrainedModel, text: Tensor) -> Measure:
    """Perplexity, which is met in windows of the context."""

    def run(level: float) -> dict[str, Any]:
        torch.manual_seed(config.seed or 0)
        _choose(model, config, level)
        result = perplexity(model, text, config.batch_size, config.prompt or 1)
        if level > 0 and result.sparsity == 0.0:
            raise CtxpruneError(
                f"not one token was evicted at sparsity {level:g}, so the perplexity would be the "
                "dense model's",
                "the context may be shorter than the protected tokens",
            )
        figures = asdict(result)
        losses = list(figures.pop("nll"))
        _, stderr = mean_and_error(losses)
        errors = {} if stderr is None else {f"{PERPLEXITY}{ERROR}": result.perplexity * stderr}
        return {**figures, **errors, VALUES: {"nll": losses}}

    window = [config.context, config.prompt, config.tokens]
    lengths = [config.context] * len(text)
    return Measure(
        run,
        lambda: reading(lengths, config.batch_size),
        [config.text, *window, text_stats(config.text)],
    )


def _own_tasks(
    config: EvalConfig,
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: list[str],
    say: Callable[[str], None],
) -> dict[str, Measure]:
    """Those of our own that are asked for."""
    measures: dict[str, Measure] = {}
    depends = [config.text, config.limit, text_stats(config.text)]
    for name in config.tasks:
        if name in long_context.TASKS:
            measures[name] = _long_context(name, config, model, tokenizer, texts, say)
    if conversation.NAME in config.tasks:
        dialogues = conversation.dialogues(
            model, tokenizer, texts, limit=config.limit, seed=config.seed or 0
        )
        measures[conversation.NAME] = Measure(
            lambda level: conversation.score(model, tokenizer, dialogues, **_chosen(config, level)),
            lambda: conversation.work(tokenizer, dialogues),
            depends,
        )
    if last_word.NAME in config.tasks:
        passages = last_word.passages(
            tokenizer,
            texts,
            limit=config.limit,
            longest=handle_of(model).decoder.positions,
            seed=config.seed or 0,
        )
        measures[last_word.NAME] = Measure(
            lambda level: last_word.score(
                model, passages, **_chosen(config, level), batch_size=config.batch_size
            ),
            partial(_read, passages, config.batch_size),
            depends,
        )
    if fidelity.NAME in config.tasks:
        check_reference(folder, config.reference)
        measures[fidelity.NAME] = _fidelity(config, model, tokenizer, texts, say)
    return measures


def _long_context(
    name: str,
    config: EvalConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: list[str],
    say: Callable[[str], None],
) -> Measure:
    """One of the long-context tasks."""
    prompts = long_context.prompts(
        name,
        tokenizer,
        texts,
        lengths=config.lengths,
        per_cell=config.limit,
        longest=handle_of(model).decoder.positions,
        seed=config.seed or 0,
    )
    unserved = sorted(set(config.lengths) - {len(prompt.ids) for prompt in prompts})
    if unserved:
        say(f"{name}: length {', '.join(map(str, unserved))} cannot be served")
    return Measure(
        lambda level: long_context.score(name, model, prompts, **_chosen(config, level)),
        partial(_read, prompts, 1),
        [config.text, config.limit, text_stats(config.text), config.lengths],
    )


def check_reference(folder: Path, reference: Path | None) -> None:
    """Raise CtxpruneError if a model would be compared with one that is not the published one."""
    if reference is not None:
        check_folder(reference)
        return
    provenance = read_settings(folder).provenance
    runs = [provenance.get("tune"), *provenance.get("earlier", [])]
    if any(run and run.get("train") != "gates" for run in runs):
        raise CtxpruneError(
            "the weights of this model were trained, so at sparsity 0 it is not the published one",
            "convert the published model to a folder, and give that by `--reference`",
        )


def _fidelity(
    config: EvalConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: list[str],
    say: Callable[[str], None],
) -> Measure:
    """The distance from the published model, which is loaded, and writes, once it is needed."""

    @cache
    def reference() -> PreTrainedModel:
        if config.reference is None:
            return model
        return load_off(
            config.reference, place(config.device, config.dtype, config.device_map), say
        )

    @cache
    def asked() -> list[fidelity.Sample]:
        say(f"{fidelity.NAME}: the published model writes its answers")
        return fidelity.samples(
            reference(), tokenizer, texts, limit=config.limit, batch_size=config.batch_size
        )

    def work() -> Work:
        # Each is read by both models.
        return reading([len(sample.ids) for sample in asked() for _ in range(2)], 1)

    published = [] if config.reference is None else stats(config.reference.iterdir())
    return Measure(
        lambda level: fidelity.score(model, reference(), asked(), **_chosen(config, level)),
        work,
        [config.text, config.limit, text_stats(config.text), published],
    )


def _read(
    asked: Sequence[long_context.Prompt] | Sequence[last_word.Passage], batch_size: int | str
) -> Work:
    return reading([len(each.ids) for each in asked], batch_size)


def _official_task(
    config: EvalConfig, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task
) -> Measure:
    """A task of lm-eval's."""
    prompting: dict[str, Any] = {
        "apply_chat_template": config.apply_chat_template,
        "system_instruction": config.system_instruction,
    }

    def run(level: float) -> dict[str, Any]:
        folder = config.log_samples
        samples = None if folder is None else folder / f"{task.task_name}-{level:g}.jsonl"
        return score(
            model,
            tokenizer,
            task,
            **_chosen(config, level),
            **prompting,
            batch_size=config.batch_size,
            limit=config.limit,
            seed=config.seed,
            samples=samples,
        )

    def work() -> Work:
        with quiet():
            lm = PrunedLM(model, tokenizer)
        return of_task(lm, task, config.limit, config.batch_size, **prompting)

    data, definitions = config.data_dir, config.include_path
    files = [] if data is None else [data / f"{task.task_name}.jsonl"]
    files += [] if definitions is None else list(definitions.rglob("*"))
    depends = [config.limit, task.get_config("num_fewshot"), prompting, stats(files)]
    settings = task.get_config("generation_kwargs")
    return Measure(run, work, [*depends, settings], afresh=config.log_samples is not None)
