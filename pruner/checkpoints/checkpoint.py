"""Model folders: a plain Hugging Face folder + `ctxprune.json` + `ctxprune.safetensors`.

`interop` tells what else is in them, for other tools.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import weakref
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from importlib.metadata import version
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.quantizers.auto import AutoHfQuantizer

from ctxprune.pruner.checkpoints import hub, interop
from ctxprune.pruner.config import PruneConfig, check_sparsity
from ctxprune.pruner.decoder import check_type, decoder_of
from ctxprune.pruner.device import AUTO, DeviceMap, Place, place
from ctxprune.pruner.engine.handle import GATES as MODULES
from ctxprune.pruner.engine.handle import attach, handle_of, new_gates
from ctxprune.pruner.errors import CtxpruneError, first_line
from ctxprune.pruner.files import check_name, recover, unlock
from ctxprune.pruner.gate import Gate

SETTINGS = "ctxprune.json"
GATES = "ctxprune.safetensors"
# What safetensors calls the dtypes that models mostly have.
DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}
OWN = (SETTINGS, GATES)


def read_settings(folder: str | Path) -> dict[str, Any]:
    """The parsed `ctxprune.json` of a converted folder.

    Raises:
        CtxpruneError: no such folder, or one that was not converted.
    """
    folder = Path(folder)
    recover(folder)
    check_name(folder)
    if not folder.is_dir():
        raise CtxpruneError(
            f"there is no folder `{folder}`", "make one with `ctxprune convert MODEL --out DIR`"
        )
    path = folder / SETTINGS
    if not path.is_file():
        raise CtxpruneError(
            f"`{folder}` has no {SETTINGS}, so it was not converted",
            f"run `ctxprune convert {folder} --out DIR` first",
        )
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CtxpruneError(f"`{path}` is not valid JSON: {error}", "convert again") from error
    if not isinstance(settings, dict) or "config" not in settings:
        raise CtxpruneError(f"`{path}` has no `config`", "convert again")
    return settings


def check_folder(folder: str | Path) -> None:
    """Raise CtxpruneError unless `folder` is a converted model."""
    read_settings(folder)


def read_config(folder: str | Path) -> PruneConfig:
    """The PruneConfig of a converted folder."""
    raw = read_settings(folder)["config"]
    return PruneConfig.from_mapping(raw, str(Path(folder) / SETTINGS))


def write(
    folder: Path,
    model: PreTrainedModel,
    gates: nn.ModuleList,
    config: PruneConfig,
    tokenizer: PreTrainedTokenizerBase | None,
    provenance: Mapping[str, Any],
) -> None:
    """Write a model folder in place (use inside `files.staged`)."""
    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    complete(folder, model, gates, config, provenance)


def size(model: nn.Module) -> int:
    """Bytes that the weights of a model take in a folder, without its gates."""
    weights = (each for name, each in model.named_parameters() if f"{MODULES}." not in name)
    return sum(each.numel() * each.element_size() for each in weights)


def complete(
    folder: Path,
    model: PreTrainedModel,
    gates: nn.ModuleList,
    config: PruneConfig,
    provenance: Mapping[str, Any],
) -> None:
    """Add to what transformers saved of a model: gates, settings, and what other tools read."""
    save_file(
        {name: tensor.detach().contiguous() for name, tensor in gates.state_dict().items()},
        folder / GATES,
    )
    raw = dataclasses.asdict(config)
    settings = {
        "format": 1,
        "version": version("ctxprune"),
        "config": raw,
        "layers": decoder_of(model).describe(),
        "provenance": dict(provenance),
    }
    text = json.dumps(settings, indent=2) + "\n"
    (folder / SETTINGS).write_text(text, encoding="utf-8")
    interop.write_index(folder)
    interop.write_code(folder, model)
    unlock(folder.glob("*.safetensors"))


def load(
    folder: str | Path,
    *,
    sparsity: float | None = None,
    policy: str = "gate",
    max_rows: int | None = None,
    dtype: str = AUTO,
    device: str = AUTO,
    device_map: DeviceMap | None = None,
) -> PreTrainedModel:
    """Load a converted folder, ready to score and to generate with eviction.

    Args:
        folder: what `convert`, `tune` or `export` wrote, or a repository of the hub with that.
        sparsity: level in [0, 1); None: the one it was tuned to, 0 if it was not.
        policy: who decides; see `ctxprune.pruner.policies.names`.
        max_rows: cap on the rows of a sequence; None: the one of `ctxprune.json`; 0: none.
        dtype: of the weights and the cache: float32, bfloat16, float16 or float64; `auto`: float32
            on a CPU, else the checkpoint's own.
        device: torch device; `auto`: the accelerator if there is one, else the CPU.
        device_map: the devices of a model that is too large for one, as accelerate takes it:
            `auto`, or part -> device; then there is no `device`.

    Returns:
        The transformers model in eval mode, with a `Handle` as `model.ctxprune`.

    Raises:
        CtxpruneError: not a converted folder, damaged files, gates that do not fit, a device that
            cannot be used, a hub out of reach.
    """
    folder = hub.fetched(folder)
    config = read_config(folder)
    if sparsity is not None:
        check_sparsity(sparsity)
    model = load_off(folder, place(device, dtype, device_map))
    level = config.tuned if sparsity is None else sparsity
    handle_of(model).use(policy, level, max_rows=max_rows)
    return model


def load_off(
    folder: str | Path, where: Place, on_event: Callable[[str], None] | None = None
) -> PreTrainedModel:
    """The same at sparsity 0 and without a cap, for who chooses later what is dropped.

    Args:
        where: it runs; `on_event` is called with one line of text that says so.

    Raises:
        CtxpruneError: as `load`.
    """
    read_config(folder)
    if on_event is not None:
        on_event(f"loading the model: {where}")
    model = load_dense(Path(folder), where)
    attach_gates(Path(folder), model)
    return model


def sketch(folder: str | Path) -> PreTrainedModel:
    """The model and gates of a folder without their numbers, on the device `meta`.

    Raises:
        CtxpruneError: not a converted folder, or of a model that is not understood.
    """
    config = read_config(folder)
    try:
        about = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CtxpruneError(
            f"the config.json in `{folder}` cannot be read: {first_line(error)}",
            "fetch it or convert it again",
        ) from error
    kind: Any = check_type(about)
    with torch.device("meta"):
        model: PreTrainedModel = kind.from_config(about)
        gates = new_gates(model, config)
    attach(model, gates, config)
    return model


def attach_gates(folder: Path, model: PreTrainedModel) -> None:
    """Give a model the gates of its folder, switched off; it is in eval mode then.

    Raises:
        CtxpruneError: as `load`.
    """
    config = read_config(folder)
    attach(model, _load_gates(folder, model, config), config)
    model.eval()


def load_dense(folder: Path, where: Place) -> PreTrainedModel:
    """The folder's transformers model, from safetensors alone.

    Raises:
        CtxpruneError: weights missing, damaged, or only there as a pickle; too large for a device.
    """
    check_weights(folder)
    options: dict[str, Any] = {"dtype": where.dtype or AUTO, "trust_remote_code": False}
    with ExitStack() as stack:
        if where.parts is not None:
            # What fits into no memory is read from files of its own, pass by pass.
            kept = stack.enter_context(TemporaryDirectory(prefix="ctxprune-"))
            options |= {"device_map": where.parts, "offload_folder": kept}
        try:
            about = AutoConfig.from_pretrained(folder, trust_remote_code=False)
            kind: Any = check_type(about)
            quantized = check_quantization(about, str(folder))
            loaded: Any = kind.from_pretrained(
                folder, use_safetensors=True, output_loading_info=True, **options
            )
        except ImportError as error:
            raise CtxpruneError(
                f"`{folder}` needs a library that is not installed: {first_line(error)}"
            ) from error
        except (SafetensorError, OSError, RuntimeError, ValueError) as error:
            raise CtxpruneError(
                f"the weights in `{folder}` cannot be read: {first_line(error)}",
                "the files are damaged or incomplete; fetch or convert them again",
            ) from error
        model, report = loaded
        if where.parts is not None:
            # They are needed for as long as the model is.
            weakref.finalize(model, stack.pop_all().close)
    missing = sorted(report["missing_keys"])
    if missing:
        raise CtxpruneError(
            f"the weights in `{folder}` lack `{missing[0]}` and {len(missing) - 1} more",
            "the files do not belong to this config.json; fetch them again",
        )
    assert isinstance(model, PreTrainedModel)
    if quantized:
        settle_quantization(model)
    if where.parts is None and not getattr(model, "is_quantized", False):
        model.to(where.device)  # type: ignore[arg-type]
    return model


def check_quantization(config: PreTrainedConfig, source: str) -> bool:
    """Whether the weights of a configuration are quantized; refuses what cannot be read here.

    transformers reads those of a method that it does not know as if they were plain numbers.

    Args:
        config: as it was read. source: what it is of, for the message.

    Raises:
        CtxpruneError: a library or a device is missing, or the method is not known.
    """
    text = config.get_text_config(decoder=True)
    owns = (getattr(part, "quantization_config", None) for part in (config, text))
    own = copy.deepcopy(next((each for each in owns if each is not None), None))
    if own is None:
        return False
    method = own.get("quant_method") or "an unnamed method"
    try:
        known = AutoHfQuantizer.supports_quant_method(own)
        if known:
            AutoHfQuantizer.from_config(own, pre_quantized=True).validate_environment(
                device_map=None
            )
    except Exception as error:  # each method raises what it likes where something is missing
        raise CtxpruneError(
            f"`{source}` is quantized by {method}, which does not work here: {first_line(error)}",
            "install what is missing, or take the checkpoint that it was made from",
        ) from error
    if not known:
        raise CtxpruneError(
            f"`{source}` is quantized by {method}, which transformers does not read",
            "take the checkpoint that it was made from",
        )
    return True


def settle_quantization(model: PreTrainedModel) -> None:
    """Have weights that were quantized saved as they are now, expanded or not.

    transformers reverses what it did to read them, which has no reverse, or gives plain numbers the
    names of quantized ones.
    """
    object.__setattr__(model, "_weight_conversions", None)


def check_weights(folder: Path) -> None:
    """Raise CtxpruneError unless a folder holds whole safetensors files."""
    files = sorted(folder.glob("*.safetensors"))
    weights = [file for file in files if file.name != GATES]
    if not weights:
        pickles = [*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")]
        if pickles:
            raise CtxpruneError(
                f"`{folder}` has its weights only as a pickle (`{pickles[0].name}`), which could "
                "run any code",
                "save them as safetensors first: `model.save_pretrained(DIR)`",
            )
        raise CtxpruneError(f"`{folder}` has no weights (*.safetensors)")
    _check_shards(folder)
    for file in weights:
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise CtxpruneError(
                f"`{file}` is damaged: {first_line(error)}", "fetch or convert it again"
            ) from error


def _check_shards(folder: Path) -> None:
    """Raise CtxpruneError unless all files are there that an index of weights names."""
    index = folder / interop.INDEX
    if not index.is_file():
        return
    try:
        named = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise CtxpruneError(f"`{index}` is damaged", "fetch it again") from error
    missing = sorted(name for name in named if not (folder / name).is_file())
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CtxpruneError(
            f"`{folder}` lacks `{missing[0]}`{more} of its weights", "fetch it again"
        )


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder.

    Raises:
        CtxpruneError: there is none, or it knows no tokens.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise CtxpruneError(f"`{folder}` has no tokenizer: {first_line(error)}") from error
    if len(tokenizer) < 2:
        raise CtxpruneError(f"the tokenizer in `{folder}` is empty")
    loaded: PreTrainedTokenizerBase = tokenizer
    return loaded


def _load_gates(folder: Path, model: PreTrainedModel, config: PruneConfig) -> nn.ModuleList:
    try:
        tensors = load_file(folder / GATES)
    except (SafetensorError, OSError) as error:
        raise CtxpruneError(
            f"`{folder / GATES}` is missing or damaged: {first_line(error)}", "convert again"
        ) from error
    decoder = decoder_of(model)
    layers, width = len(decoder.gated), decoder.width
    gates = nn.ModuleList(Gate(width, config.rank) for _ in range(layers))
    expected = {name: tensor.shape for name, tensor in gates.state_dict().items()}
    if {name: tensor.shape for name, tensor in tensors.items()} != expected:
        raise CtxpruneError(
            f"the gates in `{folder}` do not fit its model: {layers} layers of width {width} and "
            f"rank {config.rank} are needed",
            "convert the model again",
        )
    gates.load_state_dict(tensors)
    return gates


def describe(folder: str | Path) -> dict[str, Any]:
    """What a converted folder holds, for `ctxprune info`.

    Raises:
        CtxpruneError: it was not converted, or is damaged.
    """
    settings, config = read_settings(folder), read_config(folder)
    check_weights(Path(folder))
    try:
        raw = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
        kind = raw["model_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CtxpruneError(
            f"the config.json in `{folder}` cannot be read: {first_line(error)}",
            "fetch it or convert it again",
        ) from error
    files = [file for file in Path(folder).glob("*.safetensors") if file.name != GATES]
    weights = [shape for file in files for shape in _shapes(file)]
    dtypes = Counter[str]()
    for dtype, count in weights:
        dtypes[dtype] += count
    return {
        "folder": str(folder),
        "model_type": kind,
        "architecture": next(iter(raw.get("architectures") or ["unknown"])),
        "layers": settings.get("layers"),
        "parameters": sum(count for _, count in weights),
        "parameters_added": sum(count for _, count in _shapes(Path(folder) / GATES)),
        "dtype": dtypes.most_common(1)[0][0] if dtypes else None,
        "disk_bytes": sum(file.stat().st_size for file in Path(folder).iterdir()),
        "policy": "gate",
        "tuned_sparsity": config.tuned,
        "config": dataclasses.asdict(config),
        "version": settings.get("version"),
        "provenance": settings.get("provenance", {}),
    }


def _shapes(file: Path) -> list[tuple[str, int]]:
    """Of each tensor of a file, its dtype as torch names it, and how many numbers it has.

    Raises:
        CtxpruneError: the file is missing or damaged.
    """
    try:
        with safe_open(file, framework="pt") as tensors:
            slices = [tensors.get_slice(name) for name in tensors.keys()]  # noqa: SIM118
            return [(DTYPES.get(s.get_dtype(), s.get_dtype()), prod(s.get_shape())) for s in slices]
    except (SafetensorError, OSError) as error:
        raise CtxpruneError(
            f"`{file}` is missing or damaged: {first_line(error)}", "fetch or convert it again"
        ) from error
