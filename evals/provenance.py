"""Where results come from: machine, versions, date and command."""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
import shlex
import sys
from typing import Any

import torch

from ctxprune.evals.places import without_place
from ctxprune.pruner.device import processor


def provenance(*packages: str) -> dict[str, Any]:
    """`versions` of Python and of the packages, `date` (UTC) and `command`, ready for JSON."""
    return {
        "versions": {
            "python": platform.python_version(),
            **{package: importlib.metadata.version(package) for package in packages},
        },
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join(map(without_place, sys.argv)),
    }


def worker(device: torch.device) -> dict[str, Any]:
    """`device`, the name of its processor as `machine`, and `threads`, ready for JSON."""
    return {
        "device": str(device),
        "machine": processor(device),
        "threads": torch.get_num_threads(),
    }
