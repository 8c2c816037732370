"""What a sparsity means, and what a cache saves by it, in numbers and in words.

Three figures are easily taken for each other. The sparsity is a mean over all positions of a text.
What is gone at its end is more, since early tokens see all that is before them. And kvpress calls
the share that is gone `compression_ratio`.
"""

from __future__ import annotations

from dataclasses import dataclass

MEANING = (
    "mean share of the earlier tokens that a token no longer sees, over all positions of a text"
)


@dataclass(frozen=True)
class Savings:
    """What a cache holds at the end of a text, beside what a dense one would.

    Attributes:
        tokens: of the longest sequence that was read.
        share: of the tokens read whose rows are left, the mean over layers with a gate.
        rows: left of a sequence in such a layer, on average. room: rows that a page has slots for.
        kv_bytes: of the cache. dense_kv_bytes: of a dense one.
        even_at: tokens from which on a dense one takes more than this one; None: it never does.
    """

    tokens: int
    share: float
    rows: float
    room: float
    kv_bytes: int
    dense_kv_bytes: int
    even_at: int | None

    @property
    def compression_ratio(self) -> float:
        """What kvpress calls so: the share of the tokens read whose rows are gone."""
        return 1.0 - self.share

    @property
    def left(self) -> str:
        """Rows and share left at the end, in words."""
        return (
            f"{self.rows:,.0f} rows a layer are left of {self.tokens:,}: {share_left(self.share)}"
        )

    @property
    def brief(self) -> str:
        """Rows left and memory, in words."""
        return f"{self.rows:,.0f} rows a layer for {self.tokens:,} tokens; {self.memory}"

    @property
    def memory(self) -> str:
        """Memory beside that of a dense cache, in words; says why, where it is not less."""
        beside = f"cache {megabytes(self.kv_bytes)}, dense {megabytes(self.dense_kv_bytes)}"
        if self.kv_bytes < self.dense_kv_bytes:
            return beside
        page = f"a page has a constant size, with room for {self.room:,.0f} rows a layer"
        if self.even_at is None:
            return f"{beside}: {page}"
        return f"{beside}: {page}; from {self.even_at:,} tokens on it is smaller than dense"


def in_words(sparsity: float) -> str:
    """A sparsity that was realised, in words."""
    return (
        f"sparsity {sparsity:.2f}: on average a token did not see {sparsity:.0%} of those before it"
    )


def share_left(share: float) -> str:
    """The share of the rows that is left at the end of a text, in words."""
    return f"{share:.0%}; kvpress calls that compression_ratio {1.0 - share:.2f}"


def megabytes(size: int) -> str:
    """Bytes in words."""
    return f"{size / 1e6:,.2f} MB"
