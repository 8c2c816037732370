"""The benchmark: speed and memory of prefill and decoding, dense and pruned, on the same text.

Batch sizes, contexts and dtypes one after the other; what is compared at each is in
`comparison.py`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ctxprune.evals.config import BenchConfig
from ctxprune.evals.places import nearby
from ctxprune.evals.provenance import provenance, worker
from ctxprune.evals.results import PRUNED, Part
from ctxprune.evals.speed.comparison import Comparison
from ctxprune.evals.speed.subject import (
    Subject,
    check_positions,
    from_architecture,
    from_folder,
    prompts,
)
from ctxprune.evals.state import Finished, digest, stats, text_stats
from ctxprune.pruner.data import read_texts, windows
from ctxprune.pruner.device import (
    dtype_name,
    extensions,
    input_device,
    place,
    warn_of_emulation,
)
from ctxprune.pruner.engine.handle import Handle, handle_of
from ctxprune.pruner.rows import LONGEST

PACKAGES = ("ctxprune", "torch", "transformers")

Say = Callable[[str], None]


class Rows(Part):
    """What is kept of a dtype, batch size and context."""

    rows: list[dict[str, Any]]


def bench(
    folder: Path | None,
    config: BenchConfig,
    *,
    state: Path | None = None,
    on_event: Say | None = None,
) -> dict[str, Any]:
    """Measure a converted checkpoint, or random weights of an architecture.

    Args:
        folder: the checkpoint; None with `config.architecture`.
        config: what to measure.
        state: keeps what is finished of dtypes, batch sizes and contexts while the benchmark runs,
            so that a killed one goes on; made if missing.
        on_event: called with one line of text for each measurement.

    Returns:
        What was measured, provenance, and `rows`, ready for JSON. A row is a mode at a dtype, batch
        size and context. Of reading the prompts: `prefill_tokens_per_s`, `prefill_s`, `ttft_s`
        (until the first token), `ttft_ratio` (of it to that of the better dense mode, round by
        round), `sparsity_realised` on their pairs, `peak_bytes` of the process meanwhile. After
        them: `cache_sparsity`; `kv_bytes`, all tensors of the cache counted. Of decoding:
        `decode_tokens_per_s`; `step_ms`, the mean of a burst; `between_ms`, a step at which no row
        leaves; `eviction_ms`, what the others add to the mean; `interval`, tokens between two
        eviction steps of a layer; `rows_kept`, rows that a token attends to, the mean over layers,
        sequences and an interval; `speedup` over the better dense mode, a compiled one where the
        row's is; `of_oracle`, the share of its speed; `breakdown` of a step. None stands where a
        figure has no meaning or the platform cannot tell it.

    Raises:
        CtxpruneError: for bad input, or a state that another process writes.
        Interrupted: after Ctrl-C or SIGTERM; what was measured is kept in the state.
    """
    with Finished.opened(state) as finished:
        return _bench(folder, config, finished, on_event or (lambda line: None))


def _bench(
    folder: Path | None, config: BenchConfig, finished: Finished, say: Say
) -> dict[str, Any]:
    keys, rows = [], []
    for dtype in config.dtype:
        about, found = _measure(folder, config, dtype, finished, say)
        for key, some in found.items():
            keys.append(key)
            rows += [{"dtype": about["dtype"], **row} for row in some]
    # Kept for a killed run only: figures of another day would be no measurement.
    finished.drop(keys)
    return {
        **about,
        "policy": config.policy,
        "evict": config.evict,
        "unequal": config.unequal,
        "random_weights": config.architecture is not None,
        "text": nearby(config.text or "embedded"),
        "repeats": config.repeats,
        "prefills": config.prefills,
        "seed": config.seed,
        "dtype": ", ".join(dict.fromkeys(row["dtype"] for row in rows)),
        **provenance(*PACKAGES),
        "rows": rows,
    }


def _measure(
    folder: Path | None, config: BenchConfig, dtype: str, finished: Finished, say: Say
) -> tuple[dict[str, Any], dict[str, list[dict[str, Any]]]]:
    """All batch sizes and contexts of a dtype: what the model is, and rows by their digest."""
    subject = _subject(folder, config, dtype, say)
    model = subject.model
    handle, dtype, device = handle_of(model), dtype_name(model), input_device(model)
    interval = _longest_interval(handle, config)
    steps = config.burst(interval)
    check_positions(model, max(config.context), config.decoded(steps))
    texts = read_texts(config.text, "eval")
    text = {context: windows(subject.tokenizer, texts, context) for context in config.context}
    told = {k: v for k, v in asdict(config).items() if k not in ("batch", "context", "dtype")}
    common = [
        str(model.config.to_json_string()),
        [] if folder is None else stats(folder.iterdir()),
        {**told, "steps": steps},
        text_stats(config.text),
        worker(device),
    ]
    found = {}
    for batch, context in itertools.product(config.batch, config.context):
        label = f"{dtype}, batch {batch}, context {context}"
        key = digest([*common, dtype, batch, context])
        kept = finished.get(key, Rows)
        if kept is None:
            ids = prompts(text[context], batch) % handle.decoder.config.vocab_size
            compared = Comparison(model, config, ids, steps, lambda line: say(f"{dtype}, {line}"))
            done = {"rows": compared.measure()}
            kept = finished.put(key, label, done)
        else:
            say(f"{label}: already done, kept")
        repeated = batch > len(text[context])
        found[key] = [{**row, "text_repeated": repeated} for row in kept.result["rows"]]
    about = {
        "model": nearby(subject.name),
        "positions_enlarged": subject.positions_enlarged,
        "evicts_every": interval,
        "max_rows": handle.config.cap(config.max_rows),
        "steps": steps,
        "extensions": extensions(device),
        "dtype": dtype,
        **worker(device),
    }
    return about, found


def _subject(folder: Path | None, config: BenchConfig, dtype: str, say: Say) -> Subject:
    where = place(config.device, dtype)
    if config.architecture is None:
        assert folder is not None, "a benchmark needs a folder or an architecture"
        return from_folder(folder, where, say)
    say(f"random weights of {config.architecture}: {where}")
    warn_of_emulation(where.device, where.dtype, say)
    positions = max(config.context) + config.decoded(config.burst(LONGEST))
    return from_architecture(config.architecture, positions, where, seed=config.seed)


def _longest_interval(handle: Handle, config: BenchConfig) -> int:
    """Tokens between two eviction steps at most, 0 without any.

    Raises:
        CtxpruneError: the policy could not be used later.
    """
    every = 0
    levels = config.sparsity if PRUNED in config.modes else ()
    for level, context in itertools.product(levels, config.context):
        handle.use(
            config.policy, level, context=context, max_rows=config.max_rows, evict=config.evict
        )
        every = max(every, handle.evicts_every)
    handle.use(config.policy, 0.0, max_rows=0)
    return every
