"""What tuning added to a checkpoint, as one small file: LoRA matrices, gates and calibration.

A safetensors file whose metadata hold the settings, so that `convert --adapter FILE` makes the
tuned model from the published weights.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import (
    LoraConfig,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from ctxprune.pruner.config import PruneConfig
from ctxprune.pruner.engine import new_gates
from ctxprune.pruner.errors import CtxpruneError
from ctxprune.pruner.families import family_of

FILE = "adapter.ctxprune"
LORA, GATES = "lora/", "gates/"
# Settings that can change without tuning again.
DIALS = ("attention_bonus", "max_rows")


def wrap(model: PreTrainedModel, rank: int) -> PreTrainedModel:
    """LoRA of a rank around the projections of a model, which is frozen.

    Its factor is 2 at any rank, so that the matrices of two runs can be stacked. What peft returns
    is a module of its own kind that stands for the model.
    """
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules=list(family_of(model.config).lora_targets),
        fan_in_fan_out=model.config.model_type == "gpt2",
    )
    return get_peft_model(model, config)  # type: ignore[return-value]


def save(
    path: Path,
    model: PreTrainedModel,
    gates: nn.ModuleList,
    config: PruneConfig,
    provenance: Mapping[str, Any],
    *,
    rank: int,
    onto: Path | None = None,
) -> None:
    """Write the adapter of a model that `wrap` made; rank 0: only gates were tuned.

    The LoRA matrices are rounded to bfloat16: half the size, and less than what a step of the
    optimizer changes. The gates stay as they are.

    Args:
        onto: the adapter that had been merged before, if any: the new one holds both, as LoRA of
            the sum of their ranks.
    """
    matrices = get_peft_model_state_dict(model) if rank else {}
    if onto is not None:
        about, before = _read(onto)
        matrices = _stacked(_part(before, LORA), matrices)
        rank += about["lora_rank"]
    tensors = {GATES + name: tensor for name, tensor in gates.state_dict().items()}
    tensors |= {LORA + name: matrix.to(torch.bfloat16) for name, matrix in matrices.items()}
    about = {
        "config": dataclasses.asdict(config),
        "provenance": dict(provenance),
        "lora_rank": rank,
    }
    _write(path, about, tensors)


def copy(path: Path, to: Path, config: PruneConfig) -> None:
    """Write an adapter again, with a configuration that may have changed."""
    about, tensors = _read(path)
    _write(to, {**about, "config": dataclasses.asdict(config)}, tensors)


def check_changes(settings: Mapping[str, Any]) -> None:
    """Raise CtxpruneError for a setting that an adapter was tuned with."""
    for name in settings:
        if name not in DIALS:
            raise CtxpruneError(
                f"the adapter was tuned with a `{name}` of its own", "leave it out here"
            )


def apply(
    path: Path, model: PreTrainedModel, changes: Mapping[str, Any]
) -> tuple[PreTrainedModel, nn.ModuleList, PruneConfig, dict[str, Any]]:
    """Merge an adapter into the weights that it was trained on.

    Args:
        changes: settings to take in place of the adapter's, see `check_changes`.

    Returns:
        the model, its gates, their configuration, and the adapter's provenance.

    Raises:
        CtxpruneError: no adapter, or one of another model.
    """
    about, tensors = _read(path)
    config = PruneConfig.from_mapping({**about["config"], **changes}, str(path))
    gates = new_gates(model, config)
    try:
        gates.load_state_dict(_part(tensors, GATES))
        if about["lora_rank"]:
            model = _merge(model, _part(tensors, LORA), about["lora_rank"])
    except (RuntimeError, KeyError) as error:
        raise CtxpruneError(
            f"`{path}` does not fit this model",
            f"it was trained on {about['provenance'].get('base', 'another one')}",
        ) from error
    return model, gates, config, about["provenance"]


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {})["ctxprune"])
            return about, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise CtxpruneError(
            f"`{path}` is no adapter of ctxprune", f"give the {FILE} that `ctxprune tune` wrote"
        ) from error


def _write(path: Path, about: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, path, metadata={"ctxprune": json.dumps(about)})


def _stacked(first: dict[str, Tensor], second: dict[str, Tensor]) -> dict[str, Tensor]:
    """B1 A1 + B2 A2 = [B1 B2] [A1; A2], A (rank, in) and B (out, rank)."""
    if not (first and second):
        return first or second
    return {
        name: torch.cat([first[name], matrix.to(first[name])], dim=0 if "lora_A" in name else 1)
        for name, matrix in second.items()
    }


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def _merge(model: PreTrainedModel, matrices: dict[str, Tensor], rank: int) -> PreTrainedModel:
    wrapped = wrap(model, rank)
    expected = {name: tensor.shape for name, tensor in get_peft_model_state_dict(wrapped).items()}
    if {name: tensor.shape for name, tensor in matrices.items()} != expected:
        raise KeyError("LoRA matrices of another model")
    set_peft_model_state_dict(wrapped, {n: t.float() for n, t in matrices.items()})
    merged = wrapped.merge_and_unload()  # type: ignore[operator]
    assert isinstance(merged, PreTrainedModel)
    return merged
