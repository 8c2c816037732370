"""What the code in a folder imports, where another tool trusts it: the model evicts there too.

Exported folders name `Evicting` and `generate` of this module, so both keep their names.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from transformers.utils.hub import cached_file

from ctxprune.pruner.checkpoints import checkpoint
from ctxprune.pruner.checkpoints.hub import FAULTS
from ctxprune.pruner.engine.handle import handle_of
from ctxprune.pruner.errors import CtxpruneError, first_line

# Arguments of `from_pretrained` that say where the files of a repository are.
HUB = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")


class Evicting:
    """Mixin of a folder's own class: it evicts when loaded, and is saved with all that it needs."""

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *args: Any,
        sparsity: float | None = None,
        policy: str = "gate",
        max_rows: int | None = None,
        context: int | None = None,
        **options: Any,
    ) -> Any:
        """As of transformers; `sparsity`, `policy` and `max_rows` as of `ctxprune.load`.

        Args:
            context: tokens of the texts for which the sparsity is met, as of `Handle.use`.

        Raises:
            CtxpruneError: as `ctxprune.load`.
        """
        parent: Any = super()
        loaded = parent.from_pretrained(source, *args, **options)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        where = {name: options[name] for name in HUB if options.get(name) is not None}
        chosen = {"sparsity": sparsity, "policy": policy, "max_rows": max_rows, "context": context}
        attach_from(model, source, chosen, **where)
        return loaded

    def save_pretrained(self, save_directory: str | Path, *args: Any, **options: Any) -> None:
        """As of transformers, with gates, settings and the code of the folder.

        Raises:
            CtxpruneError: it is to be pushed at once, which would leave them behind.
        """
        if options.get("push_to_hub"):
            raise CtxpruneError(
                "a model with gates is not pushed while it is saved",
                "save it, then call `push_to_hub(NAME)`",
            )
        parent: Any = super()
        parent.save_pretrained(save_directory, *args, **options)
        folder = Path(save_directory)
        handle = getattr(self, "ctxprune", None)
        # Without a configuration transformers has written the adapter of a model, and no model.
        if handle is not None and (folder / "config.json").is_file():
            assert isinstance(self, PreTrainedModel)
            provenance = vars(self)["ctxprune_provenance"]
            checkpoint.complete(folder, self, handle.gates, handle.config, provenance)


def generate(*args: Any, model: Any, **kwargs: Any) -> Any:
    """The model's own `generate`, at the sparsity that its folder was tuned to.

    transformers gives the model by its name alone, and the prompt in the first place or by name.
    """
    if not hasattr(model, "ctxprune"):
        revision = getattr(model.config, "_commit_hash", None)
        attach_from(model, model.name_or_path, {}, revision=revision)
    return model.generate(*args, **kwargs)


def attach_from(
    model: PreTrainedModel, source: str | Path, chosen: Mapping[str, Any], **where: Any
) -> None:
    """Give a model that transformers loaded the gates of its folder or repository, and switch on.

    Args:
        source: what it was loaded from; `where` as `HUB`.
        chosen: arguments of `Handle.use`; without a sparsity it is the one that was tuned to.

    Raises:
        CtxpruneError: as `ctxprune.load`.
    """
    try:
        files = [cached_file(source, name, **where) for name in checkpoint.OWN]
    except FAULTS as error:
        raise CtxpruneError(
            f"`{source}` has no gates: {first_line(error)}",
            "load it without `trust_remote_code` to run it dense",
        ) from error
    folder = Path(str(files[0])).parent
    checkpoint.attach_gates(folder, model)
    handle = handle_of(model)
    handle.use(**{**chosen, "sparsity": handle.config.level(chosen.get("sparsity"))})
    provenance = checkpoint.read_settings(folder).provenance
    object.__setattr__(model, "ctxprune_provenance", provenance)
