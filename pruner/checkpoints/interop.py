"""What other tools find in a folder: an index of the model's weights, and code that they may trust.

The index names the model's own files, so that tools which load every safetensors file leave those
of the gates alone. The code evicts where a tool is told to trust it; else the model is dense.
"""

from __future__ import annotations

import json
from pathlib import Path

import transformers
from transformers import PreTrainedModel

from ctxprune.pruner.decoder import check_type

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
MODELING = "modeling_ctxprune.py"
GENERATE = "custom_generate/generate.py"

# transformers looks for imports outside of `try`, and tells people to `pip install` those that it
# misses: what PyPI has under our name is another project.
_IMPORT = """
try:
    from ctxprune.pruner.checkpoints.remote import {name}
except ImportError as error:
    raise ImportError(
        "This model drops tokens from its own cache by `ctxprune`, which is not installed here "
        "(what PyPI has under that name is another project). Install it from its repository, or "
        "load the model without `trust_remote_code` to run it dense."
    ) from error
"""
# The class has the name of its base: tools look that name up in lists of what can write text.
_MODELING = '''"""The model of this folder, which drops tokens from its own KV cache."""

from transformers import {base} as Base
{imported}

class {base}(Evicting, Base):
    """`from_pretrained` takes `sparsity`, `policy` and `max_rows` too."""
'''
_GENERATE = '''"""`generate` that evicts, for tools which load the model's class by its own name."""
{imported}
__all__ = ["generate"]
'''


def write_index(folder: Path) -> None:
    """Name the tensors of `WEIGHTS` and their file; weights in several files have an index."""
    weights = folder / WEIGHTS
    if not weights.is_file():
        return
    with weights.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    header.pop("__metadata__", None)
    total = sum(end - start for start, end in (each["data_offsets"] for each in header.values()))
    _write_json(
        folder / INDEX,
        {"metadata": {"total_size": total}, "weight_map": dict.fromkeys(sorted(header), WEIGHTS)},
    )


def write_code(folder: Path, model: PreTrainedModel) -> None:
    """Write both files of code, and name the class in `config.json`.

    A model whose class is no class of transformers brings code of its own: it is left with that.
    """
    base = type(model).__name__
    known = getattr(transformers, base, None)
    if known is None or not isinstance(model, known):
        return
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["auto_map"] = {check_type(model.config).__name__: f"{Path(MODELING).stem}.{base}"}
    _write_json(path, config)
    modeling = _MODELING.format(base=base, imported=_IMPORT.format(name="Evicting"))
    (folder / MODELING).write_text(modeling, encoding="utf-8")
    generate = folder / GENERATE
    generate.parent.mkdir(exist_ok=True)
    generate.write_text(
        _GENERATE.format(imported=_IMPORT.format(name="generate")), encoding="utf-8"
    )


def _write_json(path: Path, content: object) -> None:
    text = json.dumps(content, indent=2, sort_keys=True) + "\n"
    path.write_text(text, encoding="utf-8")
