"""Adding gates to a pretrained checkpoint: hub id, folder, .gguf file, or the embedded one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ctxprune.pruner.checkpoints import adapter as adapters
from ctxprune.pruner.checkpoints import checkpoint
from ctxprune.pruner.checkpoints.agreement import check_agreement
from ctxprune.pruner.checkpoints.card import facts_of
from ctxprune.pruner.checkpoints.settings import Provenance
from ctxprune.pruner.config import PruneConfig
from ctxprune.pruner.decoder import decoder_of
from ctxprune.pruner.device import AUTO, Place, stored
from ctxprune.pruner.engine.handle import attach, new_gates
from ctxprune.pruner.errors import CtxpruneError, translated
from ctxprune.pruner.files import check_room, claimed, refuse_existing, staged
from ctxprune.pruner.finite import check_finite, first_non_finite
from ctxprune.pruner.untrusted import check_file


def convert(
    source: str | None,
    out: Path,
    settings: Mapping[str, Any],
    *,
    adapter: Sequence[str | Path] = (),
    gates_only: bool = False,
    force: bool = False,
    trust_remote_code: bool = False,
    allow_non_finite: bool = False,
    dtype: str = AUTO,
    on_event: Callable[[str], None] | None = None,
) -> Path:
    """Write a converted copy of `source` to `out`: it prunes nothing until it is tuned.

    Args:
        source: hub id, folder, or .gguf file; None: the embedded checkpoint.
        out: folder to make. force: replace it if it exists.
        settings: fields of `PruneConfig` that are given; the others keep their defaults.
        adapter: what `tune` added to this very source, whose settings are then the defaults: a
            file, or a name (`adapter.find`); of several the weights are averaged (`adapter.mean`).
        gates_only: take the gates of the adapter, and leave its LoRA out.
        trust_remote_code: let a folder or a hub repository run its own code.
        allow_non_finite: take weights with NaN or infinity, for models that never use them.
        dtype: of the weights; `auto`: the source's own, and float32 for .gguf files, as fewer bits
            would not hold what is packed in them.
        on_event: called with a line of text where something is left behind.

    Raises:
        CtxpruneError: missing, damaged or unsupported source, or one whose attention is not what
            was derived of it (`agreement`); `out` exists or cannot be written.
    """
    with claimed(out):
        refuse_existing(out, force=force)
        return _convert(
            source,
            out,
            settings,
            adapter,
            gates_only,
            force,
            trust_remote_code,
            allow_non_finite,
            stored(dtype),
            on_event,
        )


def _convert(
    source: str | None,
    out: Path,
    settings: Mapping[str, Any],
    adapter: Sequence[str | Path],
    gates_only: bool,
    force: bool,
    trust_remote_code: bool,
    allow_non_finite: bool,
    where: Place,
    on_event: Callable[[str], None] | None,
) -> Path:
    config = PruneConfig(**settings)
    if gates_only and len(adapter) != 1:
        raise CtxpruneError(
            f"there are {len(adapter)} adapters to take the gates alone of", "give one `--adapter`"
        )
    tuned = _adapter(adapter) if adapter else None
    if tuned is not None and gates_only:
        tuned = adapters.gates_alone(tuned)
    if tuned is not None:
        adapters.check_changes(settings)
    if source is None:
        with embedded_folder() as folder:
            model, tokenizer = _from_folder(folder, where)
            facts = facts_of(folder)
        name = "the embedded checkpoint"
    elif source.endswith(".gguf"):
        model, tokenizer = _from_gguf(Path(source), where)
        name, facts = Path(source).name, facts_of(source)
    elif Path(source).is_dir():
        model, tokenizer = _from_folder(Path(source), where, trust_remote_code=trust_remote_code)
        _say_what_is_lost(Path(source), on_event)
        name, facts = Path(source).resolve().name, facts_of(source)
    elif Path(source).exists() or source.startswith((".", "/", "~")) or source.count("/") > 1:
        what = "is not a model" if Path(source).exists() else "does not exist"
        raise CtxpruneError(f"`{source}` {what}", "give a hub id, a model folder, or a .gguf file")
    else:
        model, tokenizer = _from_hub(source, where, trust_remote_code=trust_remote_code)
        name, facts = source, facts_of(source)
    if where.dtype is not None:
        adapters.check_plain(model)
    check_room(out, checkpoint.size(model))
    # Of training there is none here, and dropout would differ from pass to pass.
    model.eval()
    rows = decoder_of(model).config.vocab_size
    checkpoint.check_vocabulary(tokenizer, rows, name)
    provenance = Provenance(base=name, origin=facts)
    if not allow_non_finite:
        check_finite(model.state_dict().items(), name)
    elif first_non_finite(model.state_dict().items()):
        provenance["non_finite"] = True
    if tuned is None:
        gates = new_gates(model, config)
    else:
        model, gates, config = adapters.apply(tuned, model, settings)
        provenance = {**tuned.about.provenance, **provenance}
        tuned = replace(tuned, about=replace(tuned.about, config=config))
    attach(model, gates, config)
    if "non_finite" not in provenance:  # where random tokens may meet them
        check_agreement(model)
    with staged(out, force=force) as folder:
        checkpoint.write(folder, model, gates, config, tokenizer, provenance)
        if tuned is not None:
            adapters.write(folder / adapters.FILE, tuned)
            rank = tuned.about.lora_rank
            adapters.write_peft(folder / adapters.PEFT, model, tuned.lora, rank, provenance)
    return out


def _adapter(names: Sequence[str | Path]) -> adapters.Adapter:
    """The adapter of these names, or the mean of several."""
    return adapters.mean([adapters.read(adapters.find(str(name))) for name in names])


def embedded_folder() -> AbstractContextManager[Path]:
    """The folder of the checkpoint that is shipped, as a file system has it."""
    return as_file(files("ctxprune.recipes").joinpath("embedded", "checkpoint"))


def _say_what_is_lost(folder: Path, on_event: Callable[[str], None] | None) -> None:
    """Say it where a folder was tuned already: new gates take the place of those that it has."""
    if on_event is not None and (folder / checkpoint.SETTINGS).is_file():
        tuned = checkpoint.read_config(folder).tuned
        if tuned:
            on_event(
                f"`{folder}` is tuned to sparsity {tuned:g} already: its gates and their levels "
                "are left behind, and its weights taken as they are"
            )


def _from_folder(
    folder: Path, where: Place, *, trust_remote_code: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    model = checkpoint.load_dense(folder, where, trust_remote_code=trust_remote_code)
    return model, checkpoint.load_tokenizer(folder, trust_remote_code=trust_remote_code)


def _from_gguf(path: Path, where: Place) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    check_file(path)
    options: dict[str, Any] = {"gguf_file": path.name, "trust_remote_code": False}
    with translated(
        f"`{path}` cannot be read as GGUF",
        "the file is damaged, or of an architecture that transformers does not read",
    ):
        kind, _ = checkpoint.architecture(path.parent, **options)
        dtype = where.dtype or torch.float32
        model = kind.from_pretrained(path.parent, dtype=dtype, **options)
        tokenizer = AutoTokenizer.from_pretrained(path.parent, **options)
    # The weights are plain numbers by now; the leftovers would forbid saving them.
    object.__setattr__(model, "hf_quantizer", None)
    object.__setattr__(model, "is_quantized", False)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return model, tokenizer


def _from_hub(
    source: str, where: Place, *, trust_remote_code: bool
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    with translated(
        f"`{source}` is no folder here, and it could not be fetched from the hub",
        "check the name and the network, or give a folder or a .gguf file",
    ):
        kind, about = checkpoint.architecture(source, **options)
        quantized = checkpoint.check_quantization(about, source)
        dtype = where.dtype or AUTO
        model = kind.from_pretrained(source, dtype=dtype, use_safetensors=True, **options)
        if quantized:
            checkpoint.settle_quantization(model)
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
    return model, tokenizer
