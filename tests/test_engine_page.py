"""The page against plain dictionaries, over long runs of writing, moving, growing and selecting."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ctxprune.pruner.engine.evict import evict, staying
from ctxprune.pruner.engine.page import Held, New, Page, Queries
from ctxprune.pruner.engine.weights import Logits
from ctxprune.pruner.policies import Policy

HEADS, WIDTH, WAITING = 2, 4, 16


class Scripted(Policy):
    """Keeps the rows whose keys have the largest first number; its columns move with them."""

    columns = {"number": 1, "other": 1, "vector": 3}
    fresh = {"number": 7.0}

    def score(self, layer: int, held: Held, queries: Queries) -> Tensor:
        """Also notes how often a row was judged, and what its value begins with."""
        held.columns["number"] += 1.0
        held.columns["other"].copy_(held.value[:, 0, :, 0])
        queries.put("vector", queries.own(held.value)[:, 0, :, :3])
        return held.key[:, 0, :, 0].double()


def new_tokens(batch: int, count: int) -> New:
    """Random ones, of all that a page can hold."""
    key, value = torch.randn(2, batch, HEADS, count, WIDTH)
    query = torch.randn(batch, 2 * HEADS, count, WIDTH)
    return New(key, value, query, torch.randn(batch, count, 5))


def rows_of(page: Page, sequence: int, age: list[int]) -> dict[int, tuple[float, ...]]:
    """position -> sums of key and value of the rows held, and how often they were judged.

    `age`: tokens seen; positions of rows that no step has seen are those of the newest tokens.
    """
    used, settled = page.used[sequence], page.settled[sequence]
    rows = {}
    for slot in range(used):
        position = int(page.position[sequence, slot])
        value = page.value[sequence, :, slot]
        judged = 0.0
        if slot >= settled:
            position = age[sequence] - used + slot
        else:
            columns = page.held(None, used).columns
            judged = float(columns["number"][sequence, slot]) - 7.0
            assert float(columns["other"][sequence, slot]) == float(value[0, 0])
            assert torch.equal(columns["vector"][sequence, slot], value[0, :3])
        rows[position] = (float(page.key[sequence, :, slot].sum()), float(value.sum()), judged)
    assert len(rows) == used
    return rows


@settings(max_examples=30, deadline=None)
@given(
    st.integers(0, 10_000),
    st.lists(
        st.tuples(
            st.lists(st.integers(0, WAITING), min_size=3, max_size=3),
            st.lists(st.floats(0.0, 1.0), min_size=3, max_size=3),
            st.lists(st.booleans(), min_size=3, max_size=3),
        ),
        min_size=3,
        max_size=25,
    ),
)
def test_a_page_holds_what_a_dictionary_holds(
    seed: int, steps: list[tuple[list[int], list[float], list[bool]]]
) -> None:
    """Ragged writes, and steps of some of the sequences at a time."""
    torch.manual_seed(seed)
    page = Page(new_tokens(3, 1), 40, WAITING, Scripted.columns)
    nbytes = page.nbytes
    expected: list[dict[int, tuple[float, ...]]] = [{}, {}, {}]
    seen = [0, 0, 0]
    for counts, shares, asked in steps:
        # No more than there are slots for, and than may wait.
        counts = [
            min(count, 40 - used, WAITING - used + settled)
            for count, used, settled in zip(counts, page.used, page.settled, strict=True)
        ]
        new = new_tokens(3, WAITING)
        used, settled, count = torch.tensor([page.used, page.settled, counts])[:, :, None]
        rank = torch.arange(WAITING)
        real = rank < count
        page.write(
            new,
            torch.where(real, used + rank, page.slots),
            torch.where(real, used - settled + rank, WAITING),
        )
        for b in range(3):
            for n in range(counts[b]):
                pair = (new.key[b, :, n], new.value[b, :, n])
                expected[b][seen[b] + n] = (*(float(t.sum()) for t in pair), 0.0)
                assert torch.equal(
                    page.query[b, :, page.used[b] - page.settled[b] + n], new.query[b, :, n]
                )
            page.used[b] += counts[b]
            seen[b] += counts[b]
        members = [b for b in range(3) if asked[b] and page.used[b] > page.settled[b]]
        if members:
            stay = [int(shares[b] * page.used[b]) for b in members]
            numbers = {
                b: {p: float(page.key[b, 0, s, 0]) for p, s in slots_of(page, b, seen).items()}
                for b in members
            }
            evict(page, Scripted(), 0, members, [seen[b] for b in members], stay, Logits(1.0))
            for b, most in zip(members, stay, strict=True):
                best = sorted(numbers[b], key=numbers[b].__getitem__, reverse=True)[:most]
                rows = {p: expected[b][p] for p in best}
                expected[b] = {p: (key, value, n + 1) for p, (key, value, n) in rows.items()}
                assert page.used[b] == page.settled[b] == most
        found = [rows_of(page, b, seen) for b in range(3)]
        for ours, theirs in zip(found, expected, strict=True):
            assert ours.keys() == theirs.keys()
            for position, row in theirs.items():
                assert ours[position] == pytest.approx(row)
        assert (page.slots, page.waiting, page.nbytes) == (40, WAITING, nbytes)


def slots_of(page: Page, sequence: int, seen: list[int]) -> dict[int, int]:
    """position -> slot."""
    used, settled = page.used[sequence], page.settled[sequence]
    known = page.position[sequence].tolist()
    return {
        known[slot] if slot < settled else seen[sequence] - used + slot: slot
        for slot in range(used)
    }


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 30), st.floats(0.0, 1.0), st.booleans())
def test_the_last_of_an_order_stay(seed: int, slots: int, share: float, ragged: bool) -> None:
    """They stand as they stood before; who keeps fewer has the slot of no row behind them."""
    generator = torch.Generator().manual_seed(seed)
    stay = [int(share * slots), int(share * slots / 2) if ragged else int(share * slots)]
    order = torch.stack([torch.randperm(slots, generator=generator) for _ in range(2)])
    limit = torch.tensor(stay)[:, None] if ragged else stay[0]
    kept = staying(order, limit, max(stay)).tolist()
    for b, rows in enumerate(stay):
        wanted = sorted(order[b, slots - rows :].tolist())
        assert kept[b] == wanted + [slots] * (max(stay) - rows)


def test_growing_and_shrinking_keep_what_is_in_use() -> None:
    page = Page(new_tokens(2, 1), 10, 4, Scripted.columns)
    new = new_tokens(2, 4)
    page.write(new, 0, 0)
    page.used = [4, 4]
    evict(page, Scripted(), 0, [0, 1], [4, 4], [4, 4], Logits(1.0))
    before = [rows_of(page, b, [4, 4]) for b in range(2)]

    def same() -> bool:
        return [rows_of(page, b, [4, 4]) for b in range(2)] == before

    page.grow(9)
    assert (page.slots, page.waiting) == (10, 4) and same()
    page.grow(16)
    assert (page.slots, page.waiting) == (18, 4) and same()
    page.resize(5, 3)
    assert (page.slots, page.waiting) == (5, 3) and same()
    assert page.query is not None and new.query is not None
    assert torch.equal(page.query, new.query)  # three of them, and the slot of no token


def test_rows_and_counts_follow_their_beam() -> None:
    page = Page(new_tokens(2, 1), 10, 4, Scripted.columns)
    new = new_tokens(2, 3)
    page.write(new, 0, 0)
    page.used, page.settled = [3, 2], [1, 0]
    page.reorder(torch.tensor([1, 1, 0]))
    assert page.used == [2, 2, 3] and page.settled == [0, 0, 1]
    assert page.features is not None
    for of, now in enumerate((1, 1, 0)):
        assert torch.equal(page.key[of, :, :3], new.key[now])
        assert torch.equal(page.features[of, 0, :3], new.features[now])  # type: ignore[index]


def test_columns_are_numbers_in_full_precision_or_vectors_as_keys_are() -> None:
    like = new_tokens(1, 1)
    half = New(like.key.bfloat16(), like.value.bfloat16(), None, None)
    page = Page(half, 3, 2, Scripted.columns)
    columns = page.held(None, 3).columns
    assert columns["number"].dtype == torch.float32
    assert columns["vector"].dtype == torch.bfloat16
    assert page.query is None and page.features is None and page.waiting is None
    # Four slots (one is for no token): key and value, position, two numbers, a vector.
    assert page.nbytes == 4 * (2 * HEADS * WIDTH * 2 + 8 + 2 * 4 + 3 * 2)
    assert page.row_nbytes == 2 * HEADS * WIDTH * 2


@pytest.mark.parametrize("ragged", [False, True])
def test_weights_are_the_softmax_over_what_each_query_saw(ragged: bool) -> None:
    torch.manual_seed(0)
    first = [5, 3] if ragged else [5, 5]
    counts = [3, 2] if ragged else [3, 3]
    held = Held(*torch.randn(2, 2, HEADS, 8, WIDTH), torch.zeros(2, 8), {}, torch.empty(2, 8, 0))
    query = torch.randn(2, 2 * HEADS, 3, WIDTH)
    position = torch.tensor([[0, 1, 2] if n == 3 else [0, 1, -1] for n in counts])
    slots = torch.tensor(first)[:, None] if ragged else 5
    queries = Queries(position, slots, None, 1, [0, 1], held, query, Logits(0.5))
    expected = torch.zeros(2, 3, 8)
    for b in range(2):
        for q in range(counts[b]):
            for head in range(2 * HEADS):
                seen = held.key[b, head // 2, : first[b] + q + 1]
                weights = (seen @ query[b, head, q] * 0.5).softmax(dim=0)
                expected[b, q, : len(weights)] += weights / (2 * HEADS)
    torch.testing.assert_close(queries.weights, expected)
    torch.testing.assert_close(queries.received, 2 * HEADS * expected.sum(dim=1))
