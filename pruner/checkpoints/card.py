"""The model card: Hugging Face's metadata, what the model is, how to install it, what was measured.

Names of files, tasks and models are somebody else's words: they stand there as text, never as
markup.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import metadata
from pathlib import Path
from typing import Any

from gguf import GGUFReader
from huggingface_hub import EvalResult, ModelCard, ModelCardData, hf_hub_download

TASK = "text-generation"
TAGS = ("ctxprune", "kv-cache")
# What a card says of the base that holds for all that is made of it.
KEPT = ("license", "license_name", "license_link", "language", "base_model")
# Figures of a task that say how it was measured, and are no scores.
OTHER = ("sparsity", "cache_sparsity", "rows", "capped")


def facts_of(source: str | Path) -> dict[str, Any]:
    """What the card or the header of a base says: license, language, base_model.

    Args:
        source: hub id, folder, or .gguf file. What it does not say is left out.
    """
    path = Path(source)
    try:
        if path.suffix == ".gguf":
            return _of_header(path)
        if path.is_dir():
            readme = path / "README.md"
            return _of_card(readme) if readme.is_file() else {}
        return _of_card(Path(hf_hub_download(str(source), "README.md"))) | {
            "base_model": str(source)
        }
    except Exception:  # other people's headers fail in as many ways, and nothing depends on them
        return {}


def _of_card(path: Path) -> dict[str, Any]:
    found = ModelCard.load(path, ignore_metadata_errors=True).data.to_dict()
    return {name: found[name] for name in KEPT if _is_words(found.get(name))}


def _of_header(path: Path) -> dict[str, Any]:
    fields = GGUFReader(path).fields

    def said(name: str) -> Any:
        field = fields.get(f"general.{name}")
        return None if field is None else field.contents()

    base = str(said("base_model.0.repo_url") or "").removeprefix("https://huggingface.co/")
    found = {"license": said("license"), "language": said("languages"), "base_model": base}
    return {name: value for name, value in found.items() if value and _is_words(value)}


def _is_words(value: Any) -> bool:
    """Whether metadata are a word, or some."""
    return isinstance(value, str) or (
        isinstance(value, list) and all(isinstance(each, str) for each in value)
    )


def model_card(
    about: Mapping[str, Any],
    name: str,
    *,
    source: str = "DIR",
    results: Sequence[Mapping[str, Any]] = (),
    measured: str = "",
) -> ModelCard:
    """The card of a folder.

    Args:
        about: what `checkpoint.describe` returned. name: of the model.
        source: what others give to `load`: a repository of the hub, or a word for the folder.
        results: what `ctxprune eval --json` wrote, for the metadata; of one alone there is a table.
        measured: tables in Markdown, in place of that one.
    """
    evaluated = [each for one in results for each in _evaluated(one)]
    provenance = about["provenance"]
    facts = provenance.get("origin", {})
    data = ModelCardData(
        **{key: facts[key] for key in KEPT if key in facts},
        datasets=_datasets(provenance) or None,
        library_name="transformers",
        pipeline_tag=TASK,
        tags=list(TAGS),
        model_name=name if evaluated else None,
        eval_results=evaluated or None,
    )
    base = str(provenance.get("base", "unknown"))
    lines = [
        f"# {text(base)}, with a cache that forgets",
        "",
        f"A `{about['model_type']}` model of {about['parameters']:,} parameters with "
        f"{about['parameters_added']:,} more in gates that drop tokens from its own KV cache",
        f"(Dynamic Context Pruning, arXiv 2305.15805). Tuned to a sparsity of "
        f"{about['tuned_sparsity']:g} at a context of {about['config']['context']} tokens.",
        *([f"{about['layers'][0].upper()}{about['layers'][1:]}."] if about["layers"] else []),
        "",
        "## Use",
        "",
        "```bash",
        *_install(),
        "```",
        "",
        "```python",
        "from ctxprune import load",
        f'model = load("{source}")  # prunes; load("{source}", sparsity=0.5) dials',
        "```",
        "",
        "With the package installed, transformers and what is built on it prune too, where they "
        "trust the code of this folder:",
        "",
        "```python",
        "from transformers import AutoModelForCausalLM",
        f'AutoModelForCausalLM.from_pretrained("{source}", trust_remote_code=True, sparsity=0.5)',
        "```",
        "",
        "```bash",
        "lm_eval --model hf --tasks piqa --model_args "
        f"pretrained={source},trust_remote_code=True,sparsity=0.5,context=64",
        "```",
        "",
        "The sparsity is met on texts of `context` tokens (here "
        f"{about['config']['context']}, if none are given); of shorter ones less is dropped. "
        "Without",
        "`trust_remote_code`, and without the package, it is a plain, dense model.",
    ]
    if "tune" in provenance:
        lines += ["", "## Training", *_runs(provenance)]
        for other in provenance.get("averaged_with", []):
            lines += ["", "The weights are the mean of these and of those tuned by", *_runs(other)]
    if measured:
        lines += ["", "## Measured", "", measured.rstrip("\n")]
    elif len(results) == 1:
        lines += ["", "## Measured", "", *_table(results[0])]
    body = "\n".join(lines) + "\n"
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}", ignore_metadata_errors=True)


def text(words: Any) -> str:
    """Words of somebody else in one line of Markdown, where they mean nothing else."""
    line = re.sub(r"\s+", " ", "".join(c if c.isprintable() else " " for c in str(words)))
    return re.sub(r"([\\`*_\[\]<>#|~&$])", r"\\\1", line)


def _install() -> list[str]:
    """How to install the package, whose name means another project on PyPI."""
    urls = metadata("ctxprune").get_all("Project-URL") or []
    found = (url.partition(", ")[2] for url in urls if url.lower().startswith("repository,"))
    where = next(found, None)
    if where is None:
        clone = "# in a clone of ctxprune's repository: PyPI has another project of that name"
        return [f"pip install .  {clone}"]
    return [f'pip install "git+{where}"  # PyPI has another project of that name']


def _datasets(provenance: Mapping[str, Any]) -> list[str]:
    """The data sets of the hub that the model was tuned on; of files `tune` tells no folder."""
    runs = [*provenance.get("earlier", []), provenance.get("tune", {})]
    sources = [str(run.get("data") or "").partition(":")[0] for run in runs]
    return sorted({source for source in sources if "/" in source})


def _evaluated(results: Mapping[str, Any]) -> Iterator[EvalResult]:
    """The scores of an evaluation, each with the policy and the level that it is of."""
    source = Path(str(results.get("text", "embedded"))).name
    for level in results["levels"]:
        said = f"{results.get('policy', 'gate')} at sparsity {level['sparsity_requested']:g}"
        measured = [(source, {"perplexity": level.get("perplexity")})]
        for task, scores in (*measured, *level.get("tasks", {}).items()):
            for metric, value in scores.items():
                known = metric in OTHER or metric.endswith("stderr")
                if known or not isinstance(value, float) or not math.isfinite(value):
                    continue
                yield EvalResult(
                    task_type=TASK,
                    dataset_type=task,
                    dataset_name=task,
                    metric_type=metric,
                    metric_name=f"{metric}, {said}",
                    metric_value=value,
                )


def _runs(provenance: Mapping[str, Any]) -> list[str]:
    """A paragraph for each run of `tune`, the first one first."""
    lines = []
    for tuned in (*provenance.get("earlier", []), provenance["tune"]):
        said = [f"{key} {text(value)}" for key, value in tuned.items() if value is not None]
        lines += ["", ", ".join(said)]
    return lines


def _table(results: Mapping[str, Any]) -> list[str]:
    rows = [
        f"Perplexity at a context of {results['context']} tokens; sparsity is the share of the "
        "earlier tokens that were gone when a query looked. Policy "
        f"{text(results.get('policy', 'gate'))}, rows leave "
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
        rows += ["", f"{text(task)}:", "", "| requested | sparsity | acc | acc_norm | stderr | n |"]
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
