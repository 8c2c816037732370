"""The model card: Hugging Face's metadata, what the model is, how to install it, what was measured.

Names of files, tasks and models are somebody else's words: they stand there as text, never as
markup.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import metadata
from pathlib import Path
from typing import Any

from gguf import GGUFReader
from huggingface_hub import EvalResult, ModelCard, ModelCardData, hf_hub_download

from ctxprune.pruner import words

TASK = "text-generation"
TAGS = ("ctxprune", "kv-cache")
# What makes vLLM take the class of the plugin.
VLLM = '{"architectures": ["CtxpruneForCausalLM"]}'
# What a card says of the base that holds for all that is made of it.
KEPT = ("license", "license_name", "license_link", "language", "base_model")


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


def _said(value: Any) -> Any:
    """Metadata, in one line each."""
    return [words.line(each) for each in value] if isinstance(value, list) else words.line(value)


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
    scores: Sequence[EvalResult] = (),
    measured: str = "",
) -> ModelCard:
    """The card of a folder.

    Args:
        about: what `checkpoint.describe` returned. name: of the model.
        source: what others give to `load`: a repository of the hub, or a word for the folder.
        scores: for the metadata. measured: tables in Markdown.
    """
    provenance = about["provenance"]
    facts = provenance.get("origin", {})
    data = ModelCardData(
        **{key: _said(facts[key]) for key in KEPT if key in facts},
        datasets=_datasets(provenance) or None,
        library_name="transformers",
        pipeline_tag=TASK,
        tags=list(TAGS),
        model_name=words.line(name) if scores else None,
        eval_results=list(scores) or None,
    )
    base = str(provenance.get("base", "unknown"))
    lines = [
        f"# {words.markdown(base)}, with a cache that forgets",
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
        "",
        "vLLM serves it dense, and evicting where the package is installed beside it, which knows "
        "some types of models:",
        "",
        "```bash",
        f"vllm serve {source} --hf-overrides '{VLLM}'",
        "```",
    ]
    if "tune" in provenance:
        lines += ["", "## Training", *_runs(provenance)]
        for other in provenance.get("averaged_with", []):
            lines += ["", "The weights are the mean of these and of those tuned by", *_runs(other)]
    if measured:
        lines += ["", "## Measured", "", measured.rstrip("\n")]
    body = "\n".join(lines) + "\n"
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}", ignore_metadata_errors=True)


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
    return sorted({words.line(source) for source in sources if "/" in source})


def _runs(provenance: Mapping[str, Any]) -> list[str]:
    """A paragraph for each run of `tune`, the first one first."""
    lines = []
    for tuned in (*provenance.get("earlier", []), provenance["tune"]):
        said = [f"{key} {value}" for key, value in tuned.items() if value is not None]
        lines += ["", words.paragraph(", ".join(said))]
    return lines
