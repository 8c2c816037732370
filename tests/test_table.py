"""The table against a plain dictionary, over long runs with growth, reuse and compaction."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ctxprune.pruner.engine.table import TIDY_EVERY, Table


def held(table: Table, sequence: int) -> dict[int, tuple[float, float]]:
    """position -> (key, value) of the rows that a sequence holds."""
    assert table.position is not None
    rows = {}
    for slot, position in enumerate(table.position[sequence].tolist()):
        if position >= 0:
            key = float(table.columns["key"][sequence, 0, slot, 0])
            rows[position] = (key, float(table.columns["value"][sequence, 0, slot, 0]))
    return rows


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 10_000),
    st.lists(
        st.tuples(st.just(1) | st.integers(1, 70), st.floats(0.0, 1.0)), min_size=5, max_size=60
    ),
)
def test_a_table_holds_what_a_dictionary_holds(seed: int, steps: list[tuple[int, float]]) -> None:
    torch.manual_seed(seed)
    table, batch = Table(), 3
    expected: list[dict[int, tuple[float, float]]] = [{} for _ in range(batch)]
    seen = torch.zeros(batch, dtype=torch.int64)
    for count, share in steps:
        real = torch.rand(batch, count) < 0.8
        position = (seen[:, None] + real.cumsum(1) - 1).masked_fill(~real, -1)
        seen += real.sum(1)
        key, value = torch.randn(batch, 2, count, 4), torch.randn(batch, 2, count, 4)
        table.append(position, key=key, value=value)
        for b in range(batch):
            for n in range(count):
                if real[b, n]:
                    expected[b][int(position[b, n])] = (
                        float(key[b, 0, n, 0]),
                        float(value[b, 0, n, 0]),
                    )
        keep = torch.rand(batch, table.live) < share
        for b in range(batch):
            for slot, row in enumerate(table.held[b].tolist()):
                if row >= 0 and not keep[b, slot]:
                    del expected[b][row]
        table.evict(keep)
        assert [held(table, b) for b in range(batch)] == expected
        most = max(len(rows) for rows in expected)
        assert table.rows().tolist() == [len(rows) for rows in expected]
        # Single tokens are tidied up after from time to time only.
        if count > 1:
            assert table.capacity <= (most + 16) * 1.25 + 32


def test_bytes_shrink_with_the_rows() -> None:
    table = Table()
    position = torch.arange(1000)[None]
    column = torch.randn(1, 1, 1000, 8)
    table.append(position, key=column, value=column)
    full = table.nbytes
    table.evict(table.held % 10 == 0)
    assert table.nbytes < 0.2 * full
    assert table.nbytes >= 100 * (8 + 8) * 4


def test_single_tokens_keep_the_table_small() -> None:
    """A window of 20 rows over a thousand tokens: slots are reused, and the live ones are few."""
    table = Table()
    column = torch.randn(2, 1, 300, 8)
    position = torch.arange(300).expand(2, -1)
    table.append(position, key=column, value=column)
    table.evict(table.held >= 280)
    for at in range(300, 1300):
        one = torch.full((2, 1), at)
        table.append(one, key=column[:, :, :1], value=column[:, :, :1])
        table.evict(table.held > at - 20)
        assert table.live <= 20 + TIDY_EVERY and table.capacity <= 64
        assert sorted(table.held[0][table.held[0] >= 0].tolist()) == list(range(at - 19, at + 1))


def test_rows_follow_their_beam() -> None:
    table = Table()
    column = torch.tensor([[[[1.0]]], [[[2.0]]]])
    table.append(torch.zeros(2, 1, dtype=torch.int64), key=column, value=column)
    table.reorder(torch.tensor([1, 1, 0]))
    assert [held(table, b)[0][0] for b in range(3)] == [2.0, 2.0, 1.0]
