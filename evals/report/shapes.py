"""What files of results hold: told apart by content, and refused where something is missing."""

from __future__ import annotations

from typing import Any

from ctxprune.pruner.errors import CtxpruneError

EVAL, BENCH, TRAINING = ("eval", "bench", "bench --training")
# What `bench` compares.
DYNAMIC, STATIC, PRUNED, ORACLE = MODES = ("dense-dynamic", "dense-static", "pruned", "oracle")

# A shape is a type, types that are all right, or the keys that must be there and their shapes.
# Lists are looked into by `kind_of`: of levels, of rows.
FIGURE = (int, float)
MAYBE = (int, float, type(None))
RANGE = {"min": FIGURE, "max": FIGURE}
SPREAD = {"median": FIGURE, **RANGE}
SHAPES: dict[str, dict[str, Any]] = {
    EVAL: {"model": str, "policy": str, "context": FIGURE},
    BENCH: {
        **dict.fromkeys(("model", "policy", "evict", "dtype", "machine"), str),
        **dict.fromkeys(("unequal", "random_weights"), bool),
        "extensions": (list, type(None)),
        **dict.fromkeys(("evicts_every", "threads", "repeats", "steps", "prefills"), FIGURE),
        "max_rows": MAYBE,
    },
    TRAINING: {"model": str, "machine": str, "train": str, "bf16": bool}
    | dict.fromkeys(("batch", "threads"), FIGURE),
}
PARTS: dict[str, dict[str, Any]] = {
    EVAL: dict.fromkeys(
        ("sparsity_requested", "sparsity", "cache_sparsity", "perplexity", "tokens"), FIGURE
    )
    | {"tasks": dict},
    BENCH: {
        **dict.fromkeys(("mode", "dtype"), str),
        "step_ms": SPREAD,
        **dict.fromkeys(("text_repeated", "compiled"), bool),
        **dict.fromkeys(
            ("batch", "context", "sparsity", "decode_tokens_per_s", "rows_kept"), FIGURE
        ),
        **dict.fromkeys(
            ("sparsity_realised", "prefill_tokens_per_s", "ttft_s", "speedup", "of_oracle"), MAYBE
        ),
        **dict.fromkeys(("between_ms", "eviction_ms", "kv_bytes", "peak_bytes"), MAYBE),
        **dict.fromkeys(("ttft_ratio", "interval"), (dict, type(None))),
    },
    TRAINING: {
        "mode": str,
        "step_s": SPREAD,
        **dict.fromkeys(("context", "ratio"), FIGURE),
        "peak_bytes": MAYBE,
    },
}
# Where results come from: shown if it is there.
ORIGIN = {
    **dict.fromkeys(("date", "command", "text", "evict", "dtype", "device", "machine"), str),
    **dict.fromkeys(("seed", "limit", "batch_size", "max_rows", "evicts_every", "threads"), MAYBE),
    "prompt": MAYBE,
    "versions": dict,
}
SCORES = {"sparsity": FIGURE}
# Of a level, and of a task at it: earlier versions did not say, and a dense model has none.
ROWS = {"rows": MAYBE}
# The parts of a decode step.
BREAKDOWN = dict.fromkeys(
    ("projections", "gate", "policy", "attention", "eviction", "rest"), FIGURE
)
# What a row of `bench` may have.
PERHAPS = {"breakdown": BREAKDOWN, "ttft_ratio": SPREAD, "interval": RANGE}
CELL = dict.fromkeys(("length", "depth", "acc"), FIGURE)


def kind_of(file: str, results: Any) -> str:
    """The command that wrote results.

    Raises:
        CtxpruneError: none did, or something is missing in them.
    """
    key = "levels" if isinstance(results, dict) and "levels" in results else "rows"
    parts = results.get(key) if isinstance(results, dict) else None
    if not (isinstance(parts, list) and parts and isinstance(parts[0], dict)):
        raise no_results(file)
    kind = EVAL if key == "levels" else TRAINING if "ratio" in parts[0] else BENCH
    lacks = _lacks(results, SHAPES[kind])
    lacks += _lacks(results, {name: kind for name, kind in ORIGIN.items() if name in results})
    for part in parts:
        lacks += _lacks(part, PARTS[kind])
        if kind == BENCH and not lacks:
            there = {key: shape for key, shape in PERHAPS.items() if part.get(key) is not None}
            lacks += _lacks(part, there)
        if kind == EVAL and not lacks:
            lacks += _lacks({"rows": None, **part}, ROWS)
            for scores in part["tasks"].values():
                lacks += _lacks(scores, SCORES)
                lacks += _lacks({"rows": None, **scores}, ROWS) if not lacks else []
                for cell in scores.get("cells", []) if isinstance(scores, dict) else []:
                    lacks += _lacks(cell, CELL)
    if lacks:
        raise CtxpruneError(
            f"the results in `{file}` have no usable `{lacks[0]}`",
            f"write them again with `ctxprune {kind} --out FILE`",
        )
    return kind


def no_results(file: str) -> CtxpruneError:
    """The error for a file of something else."""
    return CtxpruneError(
        f"`{file}` holds no results of `ctxprune eval` or `ctxprune bench`",
        "give what their `--out` wrote, or the report.json of `ctxprune run`",
    )


def _lacks(value: Any, shape: dict[str, Any]) -> list[str]:
    """The keys that are missing, or hold something else."""
    if not isinstance(value, dict):
        return list(shape)
    lacks = []
    for key, wanted in shape.items():
        if isinstance(wanted, dict):
            lacks += [f"{key} {inner}" for inner in _lacks(value.get(key), wanted)]
        elif key not in value or not isinstance(value[key], wanted):
            lacks.append(key)
    return lacks
