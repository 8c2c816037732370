"""What a model attended to while it was measured, counted by the host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass
class Usage:
    """Sums over everything attended to, over layers and sequences.

    Attributes:
        pairs: pairs (j < k) of a query k and an earlier token j.
        kept: those among them whose token was still there when the query looked.
        steps: how often the cap on rows was asked. capped: how often it made rows leave.
        ends: rows a layer, and tokens, of each text at its end.
    """

    pairs: int = 0
    kept: int = 0
    steps: int = 0
    capped: int = 0
    ends: list[tuple[float, int]] = field(default_factory=list)

    def read(self, tokens: int, seen: int, used: int) -> None:
        """Note consecutive queries of a sequence, after so many tokens seen and rows in use."""
        within = tokens * (tokens - 1) // 2
        self.pairs += tokens * seen + within
        self.kept += tokens * used + within

    def end(self, rows: float, seen: Sequence[int]) -> None:
        """Note the end of texts of so many tokens, of each of which layers hold so many rows."""
        self.ends += [(rows, tokens) for tokens in seen]

    def add(self, other: Usage) -> None:
        """Note all that another noted."""
        self.pairs += other.pairs
        self.kept += other.kept
        self.steps += other.steps
        self.capped += other.capped
        self.ends += other.ends

    @property
    def evicted(self) -> int:
        """Pairs whose token j was gone when query k looked."""
        return self.pairs - self.kept

    @property
    def sparsity(self) -> float:
        """Share of the earlier tokens that were gone when a query looked."""
        return self.evicted / self.pairs if self.pairs else 0.0

    @property
    def capped_share(self) -> float:
        """Share of the times that the cap on rows was asked at which it made some leave."""
        return self.capped / self.steps if self.steps else 0.0

    @property
    def cache_sparsity(self) -> float:
        """Share of the tokens that were gone at the end of their text."""
        total = sum(tokens for _, tokens in self.ends)
        return 1.0 - sum(rows for rows, _ in self.ends) / total if total else 0.0

    @property
    def rows(self) -> float | None:
        """Rows of a layer at the end of a text, on average; None: nothing was evicting."""
        return sum(rows for rows, _ in self.ends) / len(self.ends) if self.ends else None
