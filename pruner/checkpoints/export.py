"""A self-contained folder for others, with a model card, here or in a repository of the hub."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import EvalResult

from ctxprune.pruner.checkpoints import adapter, checkpoint, hub
from ctxprune.pruner.checkpoints.card import model_card
from ctxprune.pruner.device import AUTO, stored
from ctxprune.pruner.engine.handle import handle_of
from ctxprune.pruner.files import check_room, claimed, refuse_existing, staged


def export(
    folder: Path,
    out: Path,
    *,
    force: bool = False,
    scores: Sequence[EvalResult] = (),
    measured: str = "",
    dtype: str = AUTO,
    repository: str | None = None,
) -> Path:
    """Write `folder` again to `out`, with a model card, and with the adapter if it has one.

    Args:
        folder: a converted or tuned model. out: the folder to make; force: replace it.
        scores, measured: for the card: metadata, and tables in Markdown.
        dtype: of the weights; `auto`: as `folder` has them.
        repository: of the hub, made if need be, to send the folder to.

    Raises:
        CtxpruneError: `folder` is no converted model, `out` cannot be written, the weights are
            quantized and a dtype is given, or the hub does not take the folder.
    """
    if repository is not None:
        hub.check_name(repository)
    with claimed(out):
        refuse_existing(out, force=force)
        _export(folder, out, force, scores, measured, dtype, repository)
    if repository is not None:
        hub.push(out, repository)
    return out


def _export(
    folder: Path,
    out: Path,
    force: bool,
    scores: Sequence[EvalResult],
    measured: str,
    dtype: str,
    repository: str | None,
) -> None:
    about = checkpoint.describe(folder)
    model = checkpoint.load_off(folder, stored(dtype))
    if dtype != AUTO:
        adapter.check_plain(model)
    check_room(out, checkpoint.size(model))
    handle = handle_of(model)
    tokenizer = checkpoint.load_tokenizer(folder)
    with staged(out, force=force) as target:
        checkpoint.write(target, model, handle.gates, handle.config, tokenizer, about["provenance"])
        if (folder / adapter.FILE).is_file():
            shutil.copy(folder / adapter.FILE, target)
        if (folder / adapter.PEFT).is_dir():
            shutil.copytree(folder / adapter.PEFT, target / adapter.PEFT)
        card = model_card(
            about,
            (repository or out.resolve().name).rpartition("/")[2],
            source=repository or "DIR",
            scores=scores,
            measured=measured,
        )
        card.save(target / "README.md")
