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
from contextlib import AbstractContextManager, ExitStack, nullcontext
from importlib.metadata import version
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.quantizers.auto import AutoHfQuantizer

from ctxprune.pruner.checkpoints import hub, interop
from ctxprune.pruner.checkpoints.settings import FolderSettings, Provenance
from ctxprune.pruner.config import PruneConfig, check_sparsity
from ctxprune.pruner.decoder import check_type, decoder_of
from ctxprune.pruner.device import AUTO, DeviceMap, Place, place, warn_of_emulation
from ctxprune.pruner.engine.handle import GATES as MODULES
from ctxprune.pruner.engine.handle import attach, handle_of, new_gates
from ctxprune.pruner.errors import CtxpruneError, first_line, translated
from ctxprune.pruner.files import check_name, recover, unlock
from ctxprune.pruner.finite import check_finite
from ctxprune.pruner.gate import Gate
from ctxprune.pruner.parsing import contents, json_of
from ctxprune.pruner.schema import conforming
from ctxprune.pruner.untrusted import (
    CONFIG,
    GENERATION,
    Index,
    check_file,
    check_model_folder,
    read_object,
)

SETTINGS = "ctxprune.json"
GATES = "ctxprune.safetensors"
# What safetensors calls the dtypes that models mostly have.
DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}
OWN = (SETTINGS, GATES)
# Tied weights are stored once, and count once; so no model has so many times what its files hold.
TOO_MANY = 4
DAMAGED = "the files are damaged or incomplete; fetch or convert them again"


def read_settings(folder: str | Path) -> FolderSettings:
    """What `ctxprune.json` of a converted folder says.

    Raises:
        CtxpruneError: no such folder, one that was not converted, or something else in the file.
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
    source = f"`{path}`"
    return FolderSettings.from_mapping(json_of(contents(path), source), source)


def check_folder(folder: str | Path) -> None:
    """Raise CtxpruneError unless `folder` is a converted model."""
    read_settings(folder)


def read_config(folder: str | Path) -> PruneConfig:
    """The PruneConfig of a converted folder."""
    return read_settings(folder).config


def write(
    folder: Path,
    model: PreTrainedModel,
    gates: nn.ModuleList,
    config: PruneConfig,
    tokenizer: PreTrainedTokenizerBase | None,
    provenance: Provenance,
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
    provenance: Provenance,
) -> None:
    """Add to what transformers saved of a model: gates, settings, and what other tools read."""
    save_file(
        {name: tensor.detach().contiguous() for name, tensor in gates.state_dict().items()},
        folder / GATES,
    )
    settings = FolderSettings(
        version=version("ctxprune"),
        config=config,
        layers=decoder_of(model).describe(),
        provenance=provenance,
    )
    text = json.dumps(dataclasses.asdict(settings), indent=2) + "\n"
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
    handle_of(model).use(policy, config.level(sparsity), max_rows=max_rows)
    return model


def load_off(
    folder: str | Path, where: Place, on_event: Callable[[str], None] | None = None
) -> PreTrainedModel:
    """The same at sparsity 0 and without a cap, for who chooses later what is dropped.

    Args:
        where: it runs; `on_event` is called with lines of text that say so.

    Raises:
        CtxpruneError: as `load`.
    """
    non_finite = read_settings(folder).provenance.get("non_finite", False)
    if on_event is not None:
        on_event(f"loading the model: {where}")
        warn_of_emulation(where.device, where.dtype, on_event)
    model = load_dense(Path(folder), where)
    if not non_finite:
        check_finite(model.state_dict().items(), str(folder))
    attach_gates(Path(folder), model)
    return model


def sketch(folder: str | Path) -> PreTrainedModel:
    """The model and gates of a folder without their numbers, on the device `meta`.

    Raises:
        CtxpruneError: not a converted folder, or of a model that is not understood.
    """
    config = read_config(folder)
    kind, about = architecture(folder)
    with translated(f"no model can be made from the {CONFIG} in `{folder}`", DAMAGED):
        model = _without_numbers(kind, about)
    _check_size(model, Path(folder))
    with torch.device("meta"):
        gates = new_gates(model, config)
    config.check_layers(len(gates), f"`{Path(folder) / SETTINGS}`")
    attach(model, gates, config)
    return model


def architecture(source: str | Path, **options: Any) -> tuple[Any, PreTrainedConfig]:
    """The class that loads a model, and its configuration; no weights are read.

    Args:
        source: a folder, or what else transformers takes; options: as of `from_pretrained`. Code
            of the folder runs where they say `trust_remote_code`, and nobody is asked.

    Raises:
        CtxpruneError: a damaged configuration in a folder, or one of a model that writes no text.
    """
    reading: AbstractContextManager[None] = nullcontext()
    if Path(source).is_dir() and "gguf_file" not in options:
        check_model_folder(Path(source))
        reading = translated(f"`{source}` is not a model that transformers knows")
    with reading:
        config = AutoConfig.from_pretrained(source, **{"trust_remote_code": False, **options})
    return check_type(config), config


def _without_numbers(kind: Any, about: PreTrainedConfig) -> PreTrainedModel:
    with torch.device("meta"):
        model: PreTrainedModel = kind.from_config(about)
    return model


def _check_size(model: PreTrainedModel, folder: Path) -> None:
    """Raise CtxpruneError where a configuration asks for far more numbers than the files hold.

    transformers would fill memory with random ones before it says that some are missing.
    """
    asked = sum(parameter.numel() for parameter in model.parameters())
    held = sum(count for file in weights_of(folder) for _, count in _shapes(file))
    if asked > TOO_MANY * held:
        raise CtxpruneError(
            f"the {CONFIG} in `{folder}` speaks of {asked:,} parameters, and its files hold "
            f"{held:,}",
            "the files do not belong together; fetch them again",
        )


def attach_gates(folder: Path, model: PreTrainedModel) -> None:
    """Give a model the gates of its folder, switched off; it is in eval mode then.

    Raises:
        CtxpruneError: as `load`.
    """
    config = read_config(folder)
    gates = load_gates(folder, model, config)
    config.check_layers(len(gates), f"`{folder / SETTINGS}`")
    attach(model, gates, config)
    model.eval()


def load_dense(folder: Path, where: Place, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """The folder's transformers model, from safetensors alone.

    Args:
        trust_remote_code: let the folder run its own code.

    Raises:
        CtxpruneError: weights missing, damaged, or only there as a pickle; too large for a device.
    """
    kind, about = architecture(folder, trust_remote_code=trust_remote_code)
    check_weights(folder)
    if (folder / GENERATION).exists():
        with translated(f"the {GENERATION} in `{folder}` is refused", "mend or remove it"):
            GenerationConfig.from_pretrained(folder)
    options: dict[str, Any] = {
        "dtype": where.dtype or AUTO,
        "trust_remote_code": trust_remote_code,
        "use_safetensors": True,
        "output_loading_info": True,
    }
    with ExitStack() as stack:
        if where.parts is not None:
            # What fits into no memory is read from files of its own, pass by pass.
            kept = stack.enter_context(TemporaryDirectory(prefix="ctxprune-"))
            options |= {"device_map": where.parts, "offload_folder": kept}
        quantized = check_quantization(about, str(folder))
        stack.enter_context(translated(f"the weights in `{folder}` cannot be read", DAMAGED))
        if not quantized:
            _check_size(_without_numbers(kind, about), folder)
            options["ignore_mismatched_sizes"] = True  # told below, with names
        try:
            model, report = kind.from_pretrained(folder, **options)
        except ImportError as error:
            raise CtxpruneError(
                f"`{folder}` needs a library that is not installed: {first_line(error)}"
            ) from error
        if where.parts is not None:
            # They are needed for as long as the model is.
            weakref.finalize(model, stack.pop_all().close)
    _check_report(report, folder)
    assert isinstance(model, PreTrainedModel)
    if quantized:
        settle_quantization(model)
    if where.parts is None and not getattr(model, "is_quantized", False):
        model.to(where.device)  # type: ignore[arg-type]
    return model


def _check_report(report: Mapping[str, Any], folder: Path) -> None:
    """Raise CtxpruneError where transformers did not find what a model consists of."""
    for name, found, asked in sorted(report["mismatched_keys"]):
        raise CtxpruneError(
            f"`{name}` in `{folder}` has the shape {tuple(found)}, and its {CONFIG} asks for "
            f"{tuple(asked)}",
            "the files do not belong together; fetch them again",
        )
    missing = sorted(report["missing_keys"])
    if missing:
        raise CtxpruneError(
            f"the weights in `{folder}` lack `{missing[0]}` and {len(missing) - 1} more",
            f"the files do not belong to this {CONFIG}; fetch them again",
        )


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


def weights_of(folder: Path) -> list[Path]:
    """The files with the weights of a folder's model, those of the gates left out."""
    return [file for file in sorted(folder.glob("*.safetensors")) if file.name != GATES]


def check_weights(folder: Path) -> None:
    """Raise CtxpruneError unless a folder holds whole safetensors files."""
    weights = weights_of(folder)
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
        _shapes(file)


def _check_shards(folder: Path) -> None:
    """Raise CtxpruneError unless all files are there that an index of weights names."""
    index = folder / interop.INDEX
    if not (index.exists() or index.is_symlink()):
        return
    named = conforming(Index, read_object(index), f"`{index}`", "fetch it again")
    files = sorted(set(named["weight_map"].values()))
    for name in files:
        if Path(name).name != name:
            raise CtxpruneError(
                f"`{index}` names `{name}`, which is outside its folder", "fetch it again"
            )
    missing = [name for name in files if not (folder / name).is_file()]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CtxpruneError(
            f"`{folder}` lacks `{missing[0]}`{more} of its weights", "fetch it again"
        )


def load_tokenizer(
    folder: str | Path, *, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder.

    Raises:
        CtxpruneError: there is none, it is damaged, or it knows no tokens, or more than its model.
    """
    config = check_model_folder(Path(folder))
    with translated(f"`{folder}` has no tokenizer that can be read"):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=trust_remote_code
        )
        count = len(tokenizer)
    if count < 2:
        raise CtxpruneError(f"the tokenizer in `{folder}` is empty")
    text = config.get("text_config")
    rows = (text if isinstance(text, dict) else config).get("vocab_size")
    if isinstance(rows, int):
        check_vocabulary(tokenizer, rows, str(folder))
    return tokenizer


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, rows: int, source: str) -> None:
    """Raise CtxpruneError if a tokenizer makes ids that its model has no embedding for.

    Special tokens that no text holds are left out, but for those that texts are ended or padded
    by: Gemma 3 of one billion parameters has a token for images and no row for it.
    """
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    special -= {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    beyond = [i for i in tokenizer.get_vocab().values() if i >= rows and i not in special]
    if beyond:
        raise CtxpruneError(
            f"the tokenizer of `{source}` has ids up to {max(beyond)}, and its model {rows} "
            "embeddings",
            "they do not belong together; or resize the model: `model.resize_token_embeddings(N)`",
        )


def load_gates(folder: Path, model: PreTrainedModel, config: PruneConfig) -> nn.ModuleList:
    """The gates in a folder, on the CPU.

    Raises:
        CtxpruneError: missing, damaged, or not those of the model.
    """
    file = folder / GATES
    check_file(file)
    with translated(f"`{file}` is damaged", "convert again"):
        tensors = load_file(file)
    decoder = decoder_of(model)
    layers, width = len(decoder.gated), decoder.width
    with torch.device("meta"):
        sketched = nn.ModuleList(Gate(width, config.rank) for _ in range(layers))
    expected = {name: tensor.shape for name, tensor in sketched.state_dict().items()}
    if {name: tensor.shape for name, tensor in tensors.items()} != expected:
        raise CtxpruneError(
            f"the gates in `{folder}` do not fit its model: {layers} layers of width {width} and "
            f"rank {config.rank} are needed",
            "convert the model again",
        )
    check_finite(tensors.items(), str(file))
    gates = nn.ModuleList(Gate(width, config.rank) for _ in range(layers))
    gates.load_state_dict(tensors)
    return gates


def describe(folder: str | Path) -> dict[str, Any]:
    """What a converted folder holds, for `ctxprune info`.

    Raises:
        CtxpruneError: it was not converted, or is damaged.
    """
    settings = read_settings(folder)
    raw = check_model_folder(Path(folder))
    check_weights(Path(folder))
    weights = [shape for file in weights_of(Path(folder)) for shape in _shapes(file)]
    dtypes = Counter[str]()
    for dtype, count in weights:
        dtypes[dtype] += count
    return {
        "folder": str(folder),
        "model_type": raw["model_type"],
        "architecture": next(iter(raw.get("architectures") or ["unknown"])),
        "layers": settings.layers,
        "parameters": sum(count for _, count in weights),
        "parameters_added": sum(count for _, count in _shapes(Path(folder) / GATES)),
        "dtype": dtypes.most_common(1)[0][0] if dtypes else None,
        "disk_bytes": sum(f.stat().st_size for f in Path(folder).iterdir() if f.is_file()),
        "policy": "gate",
        "tuned_sparsity": settings.config.tuned,
        "config": dataclasses.asdict(settings.config),
        "version": settings.version,
        "provenance": settings.provenance,
    }


def _shapes(file: Path) -> list[tuple[str, int]]:
    """Of each tensor of a file, its dtype as torch names it, and how many numbers it has.

    Raises:
        CtxpruneError: the file is missing or damaged.
    """
    check_file(file)
    with (
        translated(f"`{file}` is damaged", "fetch or convert it again"),
        safe_open(file, framework="pt") as tensors,
    ):
        slices = [tensors.get_slice(name) for name in tensors.keys()]  # noqa: SIM118
        return [(DTYPES.get(s.get_dtype(), s.get_dtype()), prod(s.get_shape())) for s in slices]
