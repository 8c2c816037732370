"""A self-contained folder for others: weights, gates, calibration, tokenizer, model card."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ctxprune.pruner.checkpoints import checkpoint
from ctxprune.pruner.device import place
from ctxprune.pruner.engine.handle import handle_of


def export(
    folder: Path,
    out: Path,
    *,
    force: bool = False,
    results: Mapping[str, Any] | None = None,
    measured: str = "",
) -> Path:
    """Write `folder` again to `out`, with a model card.

    Args:
        folder: a converted or tuned model. out: the folder to make; force: replace it.
        results: what `ctxprune eval --out` wrote, for the card's table.
        measured: tables in Markdown for the card, in place of `results`.

    Raises:
        CtxpruneError: `folder` is no converted model, or `out` cannot be written.
    """
    about = checkpoint.describe(folder)
    model = checkpoint.load_off(folder, place("cpu", "float32"))
    handle = handle_of(model)
    tokenizer = checkpoint.load_tokenizer(folder)
    with checkpoint.staged(out, force=force) as target:
        checkpoint.write(target, model, handle.gates, handle.config, tokenizer, about["provenance"])
        card = model_card(about, results, measured)
        (target / "README.md").write_text(card, encoding="utf-8")
    return out


def model_card(
    about: Mapping[str, Any], results: Mapping[str, Any] | None, measured: str = ""
) -> str:
    """The card in Markdown: what it is, how to use it, what was measured."""
    base = about["provenance"].get("base", "unknown")
    context = about["config"]["context"]
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags: [ctxprune, kv-cache]",
        "---",
        "",
        f"# {base}, with a cache that forgets",
        "",
        f"A `{about['model_type']}` model of {about['parameters']:,} parameters with "
        f"{about['parameters_added']:,} more in gates that drop tokens from its own KV cache",
        f"(Dynamic Context Pruning, arXiv 2305.15805). Tuned to a sparsity of "
        f"{about['tuned_sparsity']:g} at a context of {context} tokens.",
        *([f"{about['layers'][0].upper()}{about['layers'][1:]}."] if about["layers"] else []),
        "",
        "```python",
        "from ctxprune import load",
        'model = load("DIR")  # prunes; load("DIR", sparsity=0.5) dials',
        "```",
        "",
        "`transformers.AutoModelForCausalLM.from_pretrained` loads the same folder as a plain,",
        "dense model.",
    ]
    provenance = about["provenance"]
    if "tune" in provenance:
        lines += ["", "## Training", *_runs(provenance)]
        for other in provenance.get("averaged_with", []):
            lines += ["", "The weights are the mean of these and of those tuned by", *_runs(other)]
    if results:
        lines += ["", "## Measured", "", *_table(results)]
    elif measured:
        lines += ["", "## Measured", "", measured.rstrip("\n")]
    return "\n".join(lines) + "\n"


def _runs(provenance: Mapping[str, Any]) -> list[str]:
    """A paragraph for each run of `tune`, the first one first."""
    lines = []
    for tuned in (*provenance.get("earlier", []), provenance["tune"]):
        lines += ["", ", ".join(f"{k} {value}" for k, value in tuned.items() if value is not None)]
    return lines


def _table(results: Mapping[str, Any]) -> list[str]:
    rows = [
        f"Perplexity at a context of {results['context']} tokens; sparsity is the share of the "
        "earlier tokens that were gone when a query looked. Policy "
        f"`{results.get('policy', 'gate')}`, rows leave "
        f"{'after' if results.get('evict') == 'prompt' else 'while reading'} a prompt.",
        "",
        "| requested | sparsity | cache sparsity | perplexity |",
        "| --- | --- | --- | --- |",
    ]
    for level in results["levels"]:
        perplexity = level.get("perplexity")
        rows.append(
            f"| {level['sparsity_requested']:g} | {level['sparsity']:.3f} "
            f"| {level['cache_sparsity']:.3f} "
            f"| {'' if perplexity is None else format(perplexity, '.2f')} |"
        )
    tasks = sorted({name for level in results["levels"] for name in level.get("tasks", {})})
    for task in tasks:
        rows += ["", f"`{task}`:", "", "| requested | sparsity | acc | acc_norm | stderr | n |"]
        rows.append("| --- | --- | --- | --- | --- | --- |")
        for level in results["levels"]:
            score = level.get("tasks", {}).get(task)
            if score:
                cells = [level["sparsity_requested"], *(_get(score, k) for k in _SCORES)]
                rows.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    return rows


_SCORES = ("sparsity", "acc", "acc_norm", "stderr", "n")


def _get(score: Mapping[str, Any], key: str) -> str:
    value = score.get(key)
    return "" if value is None else f"{value:.4g}"
