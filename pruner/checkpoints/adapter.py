"""What tuning added to a checkpoint, as one small file: LoRA matrices, gates and calibration.

A safetensors file whose metadata hold the settings, so that `convert --adapter FILE` makes the
tuned model from the published weights. LoRA matrices have a folder of peft's own beside it, for
tools that know nothing of gates.
"""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from peft import (
    LoraConfig,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.utils import SAFETENSORS_WEIGHTS_NAME as WEIGHTS
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ctxprune.pruner.checkpoints.hub import FAULTS
from ctxprune.pruner.checkpoints.settings import AdapterSettings, Provenance
from ctxprune.pruner.config import PruneConfig
from ctxprune.pruner.decoder import decoder_of
from ctxprune.pruner.engine.handle import new_gates
from ctxprune.pruner.errors import CtxpruneError, first_line
from ctxprune.pruner.finite import check_finite
from ctxprune.pruner.parsing import json_of
from ctxprune.pruner.untrusted import check_file

FILE = "adapter.ctxprune"
SUFFIX = ".ctxprune"
PEFT = "peft"
# Whose repositories on the hub hold the shipped adapters, by their names.
OWNER = "ctxprune"
LORA, GATES = "lora/", "gates/"
# Settings that can change without tuning again.
DIALS = ("attention_bonus", "max_rows")


@dataclass(frozen=True)
class Adapter:
    """What an adapter file holds.

    Attributes:
        about: settings of the gates, and where it comes from.
        lora, gates: tensors by name. name: of the file, for messages.
    """

    about: AdapterSettings
    lora: dict[str, Tensor]
    gates: dict[str, Tensor]
    name: str


def wrap(model: PreTrainedModel, rank: int) -> PreTrainedModel:
    """LoRA of a rank around the projections of a model, which is frozen.

    Its factor is 2 at any rank, so that the matrices of two runs can be stacked. What peft returns
    is a module of its own kind that stands for the model.

    Raises:
        CtxpruneError: the weights are quantized.
    """
    check_plain(model)
    with _names_as_they_are(model):
        return get_peft_model(model, _lora_config(model, rank))  # type: ignore[return-value]


def _lora_config(model: PreTrainedModel, rank: int) -> LoraConfig:
    targets = list(decoder_of(model).lora_targets)
    return LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules=targets,
        fan_in_fan_out=any(type(model.get_submodule(name)) is Conv1D for name in targets),
    )


def check_plain(model: PreTrainedModel) -> None:
    """Raise CtxpruneError where the weights of a model are quantized: they cannot be changed."""
    if getattr(model, "is_quantized", False):
        raise CtxpruneError(
            "the weights of this model are quantized, and stay as they are",
            "tune with `--train gates`, or convert the checkpoint that they were made from",
        )


def save(
    path: Path,
    model: PreTrainedModel,
    gates: nn.ModuleList,
    config: PruneConfig,
    provenance: Provenance,
    *,
    rank: int,
    onto: Path | None = None,
) -> None:
    """Write the adapter of a model that `wrap` made; rank 0: only gates were tuned.

    The LoRA matrices are rounded to bfloat16: half the size, and less than what a step of the
    optimizer changes. The gates stay as they are. In peft's folder nothing is rounded.

    Args:
        onto: the adapter that had been merged before, if any: the new one holds both, as LoRA of
            the sum of their ranks.
    """
    matrices = get_peft_model_state_dict(model) if rank else {}
    if onto is not None:
        before = read(onto)
        matrices = _stacked({n: matrix.float() for n, matrix in before.lora.items()}, matrices)
        rank += before.about.lora_rank
    write_peft(path.parent / PEFT, model, matrices, rank, provenance)
    matrices = {name: matrix.to(torch.bfloat16) for name, matrix in matrices.items()}
    about = AdapterSettings(config=config, provenance=provenance, lora_rank=rank)
    write(path, Adapter(about, matrices, gates.state_dict(), path.name))


def find(name: str) -> Path:
    """The file of an adapter.

    Args:
        name: a file; a folder with one; the name of a shipped one, which a clone of the repository
            has, and the hub else; or a repository of the hub.

    Raises:
        CtxpruneError: there is none, or the hub cannot be reached.
    """
    path = Path(name)
    shipped = Path(str(files("ctxprune.recipes"))) / "adapters" / f"{name}{SUFFIX}"
    for there in (path, path / FILE, shipped):
        if there.is_file():
            return there
    if path.exists():
        raise CtxpruneError(
            f"`{name}` holds no {FILE}", "give the folder that `ctxprune tune` wrote"
        )
    if name.endswith(SUFFIX) or name.startswith((".", "/", "~")):
        raise CtxpruneError(f"`{name}` does not exist")
    repository = name if "/" in name else f"{OWNER}/{name}"
    try:
        return Path(hf_hub_download(repository, FILE))
    except FAULTS as error:
        raise CtxpruneError(
            f"`{name}` is no file here, and {FILE} of `{repository}` could not be fetched from "
            f"the hub: {first_line(error)}",
            "check the name and the network, or give the file",
        ) from error


def read(path: Path) -> Adapter:
    """Read an adapter file.

    Raises:
        CtxpruneError: there is none, it is something else, or it holds NaN or infinity.
    """
    check_file(path)
    try:
        with safe_open(path, framework="pt") as file:
            said = (file.metadata() or {})["ctxprune"]
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, KeyError) as error:
        raise CtxpruneError(
            f"`{path}` is no adapter of ctxprune", f"give the {FILE} that `ctxprune tune` wrote"
        ) from error
    source = f"`{path}`"
    about = AdapterSettings.from_mapping(json_of(said, source), source)
    lora = _part(tensors, LORA)
    ranks = {matrix.shape[0] for name, matrix in lora.items() if "lora_A" in name} or {0}
    if ranks != {about.lora_rank}:
        raise CtxpruneError(f"{source}: lora_rank must be the rank of its matrices, {max(ranks)}")
    check_finite(tensors.items(), str(path))
    return Adapter(about, lora, _part(tensors, GATES), str(path))


def gates_alone(adapter: Adapter) -> Adapter:
    """The same gates without LoRA, for weights that stay as they were published."""
    provenance = Provenance(gates_of=adapter.about.provenance.get("tune"))
    about = dataclasses.replace(adapter.about, lora_rank=0, provenance=provenance)
    return dataclasses.replace(adapter, about=about, lora={})


def mean(adapters: Sequence[Adapter]) -> Adapter:
    """The adapter that gives the mean of the weights that several give ("Model soups", arXiv
    2203.05482), as LoRA of the sum of their ranks.

    Gates, calibration and settings are those of the first.

    Raises:
        CtxpruneError: they are of different models.
    """
    first, *others = adapters
    matrices: dict[str, Tensor] = {}
    for adapter in adapters:
        scaled = {
            name: matrix / len(adapters) if "lora_B" in name else matrix
            for name, matrix in adapter.lora.items()
        }
        try:
            matrices = _stacked(matrices, scaled)
        except (RuntimeError, KeyError) as error:
            raise CtxpruneError(
                f"`{first.name}` and `{adapter.name}` are adapters of different models",
                "give adapters of one model",
            ) from error
    provenance = first.about.provenance
    if others:
        with_these = [adapter.about.provenance for adapter in others]
        provenance = {**provenance, "averaged_with": with_these}
    rank = sum(adapter.about.lora_rank for adapter in adapters)
    about = dataclasses.replace(first.about, lora_rank=rank, provenance=provenance)
    return Adapter(about, matrices, first.gates, first.name)


def write(path: Path, adapter: Adapter) -> None:
    """Write an adapter."""
    tensors = {GATES + name: tensor for name, tensor in adapter.gates.items()}
    tensors |= {LORA + name: matrix for name, matrix in adapter.lora.items()}
    contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    said = json.dumps(dataclasses.asdict(adapter.about))
    save_file(contiguous, path, metadata={"ctxprune": said})


def write_peft(
    folder: Path,
    model: PreTrainedModel,
    matrices: Mapping[str, Tensor],
    rank: int,
    provenance: Provenance,
) -> None:
    """Write LoRA matrices as the folder that `PeftModel.from_pretrained` loads; none without any.

    Args:
        model: that they are of, wrapped or not.
    """
    if not matrices:
        return
    wrapped = getattr(model, "peft_config", None)
    config = _lora_config(model, rank) if wrapped is None else copy.copy(wrapped["default"])
    config.r, config.lora_alpha, config.inference_mode = rank, 2 * rank, True
    config.task_type = "CAUSAL_LM"
    config.base_model_name_or_path = str(provenance.get("base", ""))
    config.save_pretrained(str(folder))
    tensors = {name: matrix.detach().contiguous() for name, matrix in matrices.items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def check_changes(settings: Mapping[str, Any]) -> None:
    """Raise CtxpruneError for a setting that an adapter was tuned with."""
    for name in settings:
        if name not in DIALS:
            raise CtxpruneError(
                f"the adapter was tuned with a `{name}` of its own", "leave it out here"
            )


def apply(
    adapter: Adapter, model: PreTrainedModel, changes: Mapping[str, Any]
) -> tuple[PreTrainedModel, nn.ModuleList, PruneConfig]:
    """Merge an adapter into the weights that it was trained on.

    Args:
        changes: settings to take in place of the adapter's, see `check_changes`.

    Returns:
        the model, its gates and their configuration.

    Raises:
        CtxpruneError: it is of another model.
    """
    about = adapter.about
    config = dataclasses.replace(about.config, **changes)
    gates = new_gates(model, config)
    config.check_layers(len(gates), f"`{adapter.name}`")
    try:
        gates.load_state_dict(adapter.gates)
        if about.lora_rank:
            model = _merge(model, adapter.lora, about.lora_rank)
    except (RuntimeError, KeyError) as error:
        raise CtxpruneError(
            f"`{adapter.name}` does not fit this model",
            f"it was trained on {about.provenance.get('base', 'another one')}",
        ) from error
    return model, gates, config


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


@contextmanager
def _names_as_they_are(model: PreTrainedModel) -> Iterator[None]:
    """Keep peft from reading names of projections as transformers 4 had them, inside.

    By the type of a model with experts it takes a `gate_proj` for one of a single expert, adapts
    all experts instead, and leaves out the projections that have this name.
    """
    config: Any = model.config
    kind = config.model_type
    config.model_type = ""
    try:
        yield
    finally:
        config.model_type = kind


def _merge(model: PreTrainedModel, matrices: dict[str, Tensor], rank: int) -> PreTrainedModel:
    wrapped = wrap(model, rank)
    expected = {name: tensor.shape for name, tensor in get_peft_model_state_dict(wrapped).items()}
    if {name: tensor.shape for name, tensor in matrices.items()} != expected:
        raise KeyError("LoRA matrices of another model")
    with _names_as_they_are(model):
        set_peft_model_state_dict(wrapped, {n: t.float() for n, t in matrices.items()})
    merged = wrapped.merge_and_unload()  # type: ignore[operator]
    assert isinstance(merged, PreTrainedModel)
    return merged
