"""lm-eval's own tasks on a model that evicts while it scores.

Owns the bridge to lm-eval: the model class, and one task at one level. Knows nothing of where
tasks come from, of levels loops, or of files of results.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.metrics import bits_per_byte, bootstrap_stderr, mean, weighted_perplexity
from lm_eval.api.registry import register_model
from lm_eval.api.task import Task
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.utils import handle_non_serializable
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ctxprune.evals.quality.accuracy import ERROR, VALUES, refuse_dense, used
from ctxprune.evals.quality.scoring import likelihoods, texts_a_pass
from ctxprune.evals.quality.tasks import quiet
from ctxprune.pruner.conversation import as_told
from ctxprune.pruner.data import pad
from ctxprune.pruner.device import AUTO
from ctxprune.pruner.engine.handle import handle_of
from ctxprune.pruner.engine.usage import Usage
from ctxprune.pruner.errors import CtxpruneError
from ctxprune.pruner.files import whole
from ctxprune.pruner.finite import check_numbers

# Of Python, numpy, torch, and the choice of few-shot examples: lm-eval's own.
SEEDS = (0, 1234, 1234, 1234)
# Resamples for the standard error of a metric that is no mean.
RESAMPLES = 1000
# Written texts may be so much longer or shorter than was told beforehand, as a share, which moves
# their sparsity by a hundredth; else they are written again, so often at most.
SLACK, ATTEMPTS = 0.05, 3


@register_model("ctxprune")
class PrunedLM(HFLM):  # type: ignore[misc]  # lm-eval is untyped
    """lm-eval's Hugging Face model, around a loaded checkpoint with its handle.

    Each request is scored in one pass through the evicting engine. HFLM pads a batch on the right
    and passes no mask; a pruned model has to be told which tokens are padding, or they would
    count as tokens seen and kept. And logits of the prompts, which HFLM throws away, are left out:
    a sixth of the time of SmolLM2-135M. A dense model is called exactly as HFLM calls it, so that
    its scores are those of lm-eval's `hf` to the last digit.

    Attributes:
        usage: of the texts that it wrote.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_size: int | str = 1,
        dense: bool = False,
    ) -> None:
        pad(tokenizer)  # lm-eval would add a token that the model has no embedding for
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        self.usage = Usage()
        self._dense = dense
        self._written: int | None = None

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """As HFLM, without its bars: the evaluation has one of its own."""
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return found

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """As HFLM, without its bars."""
        found: list[float] = super().loglikelihood_rolling(requests, disable_tqdm=True)
        return found

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """As HFLM, without its bars."""
        with as_told(self.model):
            found: list[str] = super().generate_until(requests, disable_tqdm=True)
        return found

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation, and whether it is the likeliest."""
        if self._dense:
            dense: list[tuple[float, bool]]
            dense = super()._loglikelihood_tokens(requests, True, override_bs)
            check_numbers(torch.tensor([total for total, _ in dense]), "the model's predictions")
            return dense
        pairs = [(context, continuation) for _, context, continuation in requests]
        found = likelihoods(self.model, pairs, self.batch_size, self.max_length)
        return [(each.total, each.greedy) for each in found]

    def _detect_batch_size(self, requests: Sequence[Any] | None = None, pos: int = 0) -> int:
        """What `auto` stands for: HFLM would try until the memory is full."""
        longest = self.max_length
        if requests:
            _, context, continuation = requests[pos]
            longest = min(len(context) + len(continuation) - 1, longest)
        return texts_a_pass(AUTO, longest)

    def _model_generate(
        self, context: Tensor, max_length: int, stop: list[str], **options: Any
    ) -> Tensor:
        """Continue left-padded prompts (batch, length), each at the sparsity asked for.

        The sparsity is met in texts of a length that is told beforehand: as many new tokens as
        there may be, then as many as were written last. A batch that ends elsewhere is written
        again, for the length that it has.
        """
        write = super()._model_generate
        if self._dense:
            dense: Tensor = write(context, max_length, stop, **options)
            return dense
        handle = handle_of(self.model)
        prompts = options["attention_mask"].sum(dim=1).tolist()
        most = max_length - context.shape[1]
        expected = min(self._written or most, most)
        for _ in range(ATTEMPTS):
            lengths = [length + expected for length in prompts]
            handle.last_cache = None
            with handle.measure() as usage, handle.running(handle.at(lengths, prompts)):
                written: Tensor = write(context, max_length, stop, **options)
            cache = handle.last_cache
            if cache is not None:
                usage.end(cache.rows, cache.seen)
            found = written.shape[1] - context.shape[1]
            off, expected = abs(found - expected), found
            if off <= SLACK * min(lengths):
                break
        self._written = found
        self.usage.add(usage)
        return written


def score(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    *,
    policy: str = "gate",
    sparsity: float = 0.0,
    max_rows: int | None = None,
    evict: str = "reading",
    batch_size: int | str = 1,
    limit: int | None = None,
    seed: int | None = None,
    apply_chat_template: bool = False,
    system_instruction: str | None = None,
    samples: Path | None = None,
) -> dict[str, Any]:
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
        batch_size: requests a forward pass; `auto`: as many as fill it.
        limit: score the first documents only.
        seed: of every generator lm-eval draws from; None: `SEEDS`.
        apply_chat_template: requests are turns of a chat, examples too.
        system_instruction: before each request.
        samples: a .jsonl file to write, with each document, its requests and what came of them.

    Returns:
        every metric of the task by name (`acc`, `acc_norm` ...; `metric,filter` where a task
        filters what was written), `<metric>_stderr`, `stderr` (of the first that is a mean), what
        `accuracy.used` says of this task's own requests, `n` (documents) of `documents`, `shots`,
        and `values` of each document for metrics that are means.

    Raises:
        CtxpruneError: if the level asks for pruning and not one token was evicted, its texts have
            no prompt and rows are to leave after it, or the model has no chat template.
    """
    name = task.task_name
    if evict == "prompt" and task.OUTPUT_TYPE == "loglikelihood_rolling":
        raise CtxpruneError(
            f"`{name}` scores whole texts, which have no prompt", "give `--evict reading`"
        )
    if apply_chat_template:
        check_template(tokenizer)
    handle = handle_of(model)
    handle.use(policy, sparsity, max_rows=max_rows, evict=evict)
    _seed(task, seed)
    with quiet(), handle.measure() as usage:
        lm = PrunedLM(model, tokenizer, batch_size=batch_size, dense=handle.policy is None)
        output: Any = evaluate(
            lm,
            {"tasks": {name: task}},
            limit=limit,
            bootstrap_iters=RESAMPLES,
            apply_chat_template=apply_chat_template,
            fewshot_as_multiturn=True,
            system_instruction=system_instruction,
        )
        figures = _figures(task, output["results"][name], output["samples"][name])
    usage.add(lm.usage)
    refuse_dense(name, usage, sparsity)
    if samples is not None:
        _write(samples, output["samples"][name])
    return {
        **figures,
        **used(usage),
        "n": output["n-samples"][name]["effective"],
        "documents": output["n-samples"][name]["original"],
        "shots": output["n-shot"][name],
    }


def check_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise CtxpruneError if a model has no chat template."""
    if not tokenizer.chat_template:
        raise CtxpruneError("the model has no chat template", "leave out `--apply-chat-template`")


def _seed(task: Task, seed: int | None) -> None:
    """Seed all that lm-eval draws from."""
    python, array, tensor, shots = SEEDS if seed is None else (seed,) * 4
    random.seed(python)
    numpy.random.seed(array)
    torch.manual_seed(tensor)
    task.set_fewshot_seed(shots)


def _figures(task: Task, results: dict[str, Any], samples: list[dict[str, Any]]) -> dict[str, Any]:
    """All metrics with their standard errors, and `values`, from lm-eval's `metric,filter`."""
    figures: dict[str, Any] = {}
    values: dict[str, list[float]] = {}
    for key, value in results.items():
        metric, _, filtered = key.partition(",")
        if not filtered or metric.endswith(ERROR) or not isinstance(value, (int, float)):
            continue
        of = "" if filtered == "none" else f",{filtered}"
        figures[metric + of] = float(value)
        found = [each[metric] for each in samples if each["filter"] == filtered and metric in each]
        aggregation = task.aggregation().get(metric)
        error = results.get(f"{metric}{ERROR},{filtered}")
        if aggregation in (weighted_perplexity, bits_per_byte) and len(found) > 1:
            error = bootstrap_stderr(aggregation, found, RESAMPLES)  # lm-eval has none for them
        if isinstance(error, (int, float)):
            figures[metric + ERROR + of] = float(error)
        if aggregation is mean:
            values[metric + of] = [float(each) for each in found]
            if isinstance(error, (int, float)):
                figures.setdefault("stderr", float(error))
    return {**figures, VALUES: values}


def _write(path: Path, samples: list[dict[str, Any]]) -> None:
    """Write lm-eval's samples, a JSON object a line.

    Raises:
        CtxpruneError: they cannot be written.
    """
    with whole(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for sample in samples:
            line = json.dumps(sample, default=handle_non_serializable)
            whole_line = json.loads(line, parse_constant=lambda _: None)  # no NaN, no infinity
            file.write(json.dumps(whole_line, ensure_ascii=False) + "\n")
