"""What a benchmark measures: a checkpoint, or random weights of an architecture; the prompts."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ctxprune.pruner.checkpoints.checkpoint import (
    architecture,
    check_folder,
    load_off,
    load_tokenizer,
)
from ctxprune.pruner.checkpoints.convert import embedded_folder
from ctxprune.pruner.config import PruneConfig
from ctxprune.pruner.decoder import check_type
from ctxprune.pruner.device import Place
from ctxprune.pruner.engine.handle import attach, handle_of, new_gates
from ctxprune.pruner.errors import CtxpruneError, choose, translated
from ctxprune.pruner.untrusted import check_config, read_object


@dataclass(frozen=True)
class Subject:
    """A model with its engine attached, switched off.

    Attributes:
        name: the folder or the architecture.
        tokenizer: makes the prompts; its ids may exceed the vocabulary of random weights.
        positions_enlarged: the model has more positions than its architecture says.
    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    positions_enlarged: bool = False


def from_folder(folder: Path, where: Place, on_event: Callable[[str], None]) -> Subject:
    """The converted checkpoint in a folder; arguments as in `checkpoint.load_off`."""
    check_folder(folder)
    return Subject(str(folder), load_off(folder, where, on_event), load_tokenizer(folder))


def from_architecture(name: str, positions: int, where: Place, *, seed: int) -> Subject:
    """Random weights and new gates, which give every layer as many rows.

    Args:
        name: a model type, whose default configuration gets as many `positions` as are needed; or
            a config.json or a folder with one, which is taken as it is.

    Raises:
        CtxpruneError: no such architecture, or one that is not supported.
    """
    config, enlarged = _configuration(name, positions)
    torch.manual_seed(seed)
    kind: Any = check_type(config)
    dtype = where.dtype or config.dtype or torch.get_default_dtype()
    with translated(f"no model can be made of `{name}`"):
        model = kind.from_config(config, dtype=dtype)
    model.to(where.device).eval()
    gates = new_gates(model, PruneConfig(), seed)
    # Not tuned, but calibrated evenly: the rows and the cost of a gate that was.
    attach(model, gates, PruneConfig(levels={0.5: (0.5,) * len(gates)}))
    with embedded_folder() as folder:
        tokenizer = load_tokenizer(folder)
    return Subject(name, model, tokenizer, enlarged)


def _configuration(name: str, positions: int) -> tuple[PretrainedConfig, bool]:
    """The configuration, and whether its positions were enlarged."""
    path = Path(name)
    if not path.exists():
        known = list(CONFIG_MAPPING.keys())
        near = difflib.get_close_matches(name, known) or ["gpt2", "llama", "qwen3"]
        choose("architecture", name, known if name in known else near)
        config = AutoConfig.for_model(name)
        check_type(config)
        text = config.get_text_config(decoder=True)
        enlarged = positions > getattr(text, "max_position_embeddings", positions)
        if enlarged:
            text.max_position_embeddings = positions
        return config, enlarged
    if path.is_dir():
        return architecture(path)[1], False
    check_config(read_object(path), path)
    with translated(f"`{name}` is no architecture"):
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    check_type(config)
    return config, False


def check_positions(model: PreTrainedModel, context: int, decoded: int) -> None:
    """Raise CtxpruneError unless the model has positions for a context and what is decoded."""
    limit = handle_of(model).decoder.positions
    if limit is not None and context + decoded > limit:
        raise CtxpruneError(
            f"a context of {context} and {decoded} decoded tokens need {context + decoded} "
            f"positions, this model has {limit}",
            "measure a shorter context, fewer steps or fewer repeats",
        )


def prompts(text: Tensor, batch: int) -> Tensor:
    """`batch` of the windows (count, context), spread over the text, and used again if too few."""
    count = len(text)
    chosen = [n * count // batch if count >= batch else n % count for n in range(batch)]
    return text[chosen]


def unequal(batch: int, context: int) -> list[int]:
    """Lengths of the prompts of a batch, spread evenly from half of the context to all of it."""
    shortest = context // 2
    return [context - (context - shortest) * n // max(batch - 1, 1) for n in reversed(range(batch))]
