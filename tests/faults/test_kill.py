"""A small campaign of kills; the whole one is `make test-kill`."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from kill import campaign


@pytest.mark.parametrize("name", ["convert", "export", "tune"])
def test_a_kill_leaves_the_earlier_output_whole(name: str, workplace: Path, tmp_path: Path) -> None:
    assert campaign(name, workplace, 3, random.Random(name), tmp_path).is_good
