"""The page against plain dictionaries, over long runs of writing, moving, growing and selecting."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ctxprune.pruner.engine.evict import choose, evict
from ctxprune.pruner.engine.page import Held, New, Page, Queries
from ctxprune.pruner.policies import Policy

HEADS, WIDTH, WAITING = 2, 4, 16


class Scripted(Policy):
    """Keeps the rows of the largest number, which stands in their key."""

    columns = {"number": 1, "vector": 3}

    def fresh(self, column: str) -> float:
        """Other than 0, so that a column which is not set anew shows."""
        return 7.0

    def score(self, layer: int, held: Held, queries: Queries) -> Tensor:
        """Also notes how often a row was judged."""
        held.columns["number"] += 1.0
        held.columns["vector"] += 1.0
        return held.key[:, 0, :, 0].double()


def new_tokens(batch: int, count: int) -> New:
    """Random ones, of all that a page can hold."""
    key, value = torch.randn(2, batch, HEADS, count, WIDTH)
    query = torch.randn(batch, 2 * HEADS, count, WIDTH)
    return New(key, value, query, torch.randn(batch, count, 5))


def rows_of(page: Page, sequence: int, age: list[int]) -> dict[int, tuple[float, ...]]:
    """position -> the key, the value and the columns of the rows that a sequence holds.

    `age`: tokens seen; positions of rows that no step has seen are those of the newest tokens.
    """
    used, settled = page.used[sequence], page.settled[sequence]
    rows = {}
    for slot in range(used):
        position = int(page.position[sequence, slot])
        columns = (
            float(page.columns["number"][sequence, slot]),
            *page.columns["vector"][sequence, slot].tolist(),
        )
        if slot >= settled:
            position, columns = age[sequence] - used + slot, (7.0,) * 4
        pair = (page.key[sequence, :, slot], page.value[sequence, :, slot])
        rows[position] = (*(float(t.sum()) for t in pair), *columns)
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
                expected[b][seen[b] + n] = (*(float(t.sum()) for t in pair), *(7.0,) * 4)
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
            evict(page, Scripted(), 0, members, [seen[b] for b in members], stay, 1.0)
            for b, rows in zip(members, stay, strict=True):
                best = sorted(numbers[b], key=numbers[b].__getitem__, reverse=True)[:rows]
                expected[b] = {
                    p: (*expected[b][p][:2], *(c + 1 for c in expected[b][p][2:])) for p in best
                }
                assert page.used[b] == page.settled[b] == rows
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
def test_who_leaves_and_who_moves(seed: int, slots: int, share: float, ragged: bool) -> None:
    """The least scores leave, among equals the oldest; survivors fill the slots below `stay`."""
    generator = torch.Generator().manual_seed(seed)
    used = [slots, max(slots - 3, 0)] if ragged else [slots, slots]
    stay = [int(share * rows) for rows in used]
    position = torch.full((2, slots), -1)
    for b, rows in enumerate(used):
        position[b, :rows] = torch.randperm(2 * slots, generator=generator)[:rows]
    score = torch.randint(0, 4, (2, slots), generator=generator).double()
    score = torch.where(score == 3, torch.inf, score)
    limit = torch.tensor(stay)[:, None] if ragged else stay[0]
    most = max(u - s for u, s in zip(used, stay, strict=True))
    gone, source, target = choose(score, position, limit, most)
    for b, rows in enumerate(used):
        ranked = sorted(range(rows), key=lambda s: (float(score[b, s]), int(position[b, s])))
        leave = set(ranked[: rows - stay[b]])
        assert {s for s in range(rows) if bool(gone[b, s])} == leave
        after = list(range(slots))
        for of, to in zip(source[b].tolist(), target[b].tolist(), strict=True):
            after[to] = of
        assert sorted(after[: stay[b]]) == sorted(set(range(rows)) - leave)


def test_growing_and_shrinking_keep_what_is_in_use() -> None:
    page = Page(new_tokens(2, 1), 10, 4, Scripted.columns)
    page.write(new_tokens(2, 4), 0, 0)
    page.used = [4, 4]
    page.position[:, :4] = torch.arange(4)
    page.columns["vector"][:, :4] = torch.randn(2, 4, 3)
    before = {name: tensor.clone() for name, tensor in page._tensors().items()}
    assert page.query is not None
    page.grow(9)
    assert page.slots == 10
    page.grow(16)
    assert page.slots == 18 and page.query.shape[2] == 5
    page.resize(5, 3)
    assert (page.slots, page.waiting) == (5, 3)
    for name, tensor in page._tensors().items():
        axis = 1 if name in ("position", "number", "vector") else 2
        assert torch.equal(tensor.narrow(axis, 0, 4), before[name].narrow(axis, 0, 4))


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
    assert page.columns["number"].dtype == torch.float32
    assert page.columns["vector"].dtype == torch.bfloat16
    assert page.query is None and page.features is None and page.waiting is None
    # Four slots (one is for no token): key and value, position, number, vector.
    assert page.nbytes == 4 * (2 * HEADS * WIDTH * 2 + 8 + 4 + 3 * 2)
    assert page.row_nbytes == 2 * HEADS * WIDTH * 2


@pytest.mark.parametrize("ragged", [False, True])
def test_weights_are_the_softmax_over_what_each_query_saw(ragged: bool) -> None:
    torch.manual_seed(0)
    first = [5, 3] if ragged else [5, 5]
    counts = [3, 2] if ragged else [3, 3]
    held = Held(*torch.randn(2, 2, HEADS, 8, WIDTH), torch.zeros(2, 8), {})
    query = torch.randn(2, 2 * HEADS, 3, WIDTH)
    position = torch.tensor([[0, 1, 2] if n == 3 else [0, 1, -1] for n in counts])
    slots = torch.tensor(first)[:, None] if ragged else 5
    queries = Queries(position, slots, None, 1, [0, 1], held, query, 0.5)
    expected = torch.zeros(2, 3, 8)
    for b in range(2):
        for q in range(counts[b]):
            for head in range(2 * HEADS):
                seen = held.key[b, head // 2, : first[b] + q + 1]
                weights = (seen @ query[b, head, q] * 0.5).softmax(dim=0)
                expected[b, q, : len(weights)] += weights / (2 * HEADS)
    torch.testing.assert_close(queries.weights, expected)
    torch.testing.assert_close(queries.received, expected.sum(dim=1))
