"""Results of `bench --training` as a table."""

from __future__ import annotations

from ctxprune.evals.report.tables import Table
from ctxprune.evals.results import Training


def table(results: Training) -> Table:
    """A row per context and mode."""
    rows = []
    for row in results.rows:
        peak = "" if row.peak_bytes is None else f"{row.peak_bytes / 1e9:.2f}"
        cells = [f"{row.step_s.median:.2f}", f"{row.ratio:.2f}", peak]
        rows.append([row.mode, str(row.context), *cells])
    return Table(
        ["mode", "context", "step, s", "of dense", "peak, GB"],
        rows,
        texts=1,
        title="A step of tuning, beside a dense one of the same weights",
    )
