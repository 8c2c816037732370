"""What is wrong with a command before any file is read."""

from __future__ import annotations

from pathlib import Path

import pytest
from outcome import ctxprune, files_of, refused

CASES = [
    (("tune", "--sparsity", "1"), "sparsity must be less than 1, not 1.0"),
    (("tune", "--sparsity", "-0.1"), "sparsity must be at least 0, not -0.1"),
    (("bench", "--architecture", "gpt2", "--policy", "gat"), "did you mean `gate`"),
    (("generate", ""), "prompt is empty"),
]


@pytest.mark.parametrize(("arguments", "words"), CASES, ids=[" ".join(case[0]) for case in CASES])
def test_is_refused(arguments: tuple[str, ...], words: str, tmp_path: Path) -> None:
    refused(ctxprune(*arguments, cwd=tmp_path), words)
    assert not files_of(tmp_path)
