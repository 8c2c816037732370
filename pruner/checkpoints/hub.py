"""Model folders as repositories of the hub: fetched, and sent there."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from ctxprune.pruner.errors import CtxpruneError, first_line
from ctxprune.pruner.files import recover

# What the hub's library raises where a name, the network or the hub is at fault.
FAULTS = (OSError, ValueError, HTTPError)
# What is fetched of a repository: no code, no pickles, no adapters.
PARTS = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt")
REST = ("peft/*",)


def fetched(source: str | Path) -> Path:
    """A folder as it is; that of a repository `OWNER/NAME` of the hub, fetched if need be.

    Raises:
        CtxpruneError: the repository is not there, or the hub cannot be reached.
    """
    name, folder = str(source), Path(source)
    recover(folder)
    if folder.exists() or name.startswith((".", "/", "~")) or name.count("/") != 1:
        return folder
    try:
        return Path(snapshot_download(name, allow_patterns=list(PARTS), ignore_patterns=list(REST)))
    except FAULTS as error:
        raise CtxpruneError(
            f"`{name}` is no folder here, and it could not be fetched from the hub: "
            f"{first_line(error)}",
            "check the name and the network, or give a folder",
        ) from error


def check_name(repository: str) -> None:
    """Raise CtxpruneError for what cannot be the name of a repository."""
    try:
        validate_repo_id(repository)
    except ValueError as error:
        raise CtxpruneError(
            f"`{repository}` is no name of a repository: {first_line(error)}",
            "write it like `user/model`",
        ) from error


def push(folder: Path, repository: str) -> None:
    """Send a folder to a repository, which is made if need be.

    Raises:
        CtxpruneError: the hub cannot be reached, or does not take it.
    """
    api = HfApi()
    try:
        api.create_repo(repository, exist_ok=True)
        api.upload_folder(folder_path=folder, repo_id=repository, commit_message="ctxprune export")
    except FAULTS as error:
        raise CtxpruneError(
            f"`{folder}` is written, but could not be sent to `{repository}` on the hub: "
            f"{first_line(error)}",
            "log in with `hf auth login` and check the network, then "
            f"`hf upload {repository} {folder}`",
        ) from error
