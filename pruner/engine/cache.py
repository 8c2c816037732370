"""PrunedCache: one page a layer, in the shape that transformers expects of a cache.

It counts the tokens of each sequence on the host, cuts what is read into blocks that end at
eviction steps, and holds the steps. All sequences of a batch need not have read as much: their
tokens are shifted so that their steps coincide.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from ctxprune.pruner.engine.attend import span, static_step, step
from ctxprune.pruner.engine.evict import evict
from ctxprune.pruner.engine.page import New, Page, take
from ctxprune.pruner.engine.read import read_block, read_steps
from ctxprune.pruner.engine.usage import Usage
from ctxprune.pruner.errors import CtxpruneError
from ctxprune.pruner.policies import Policy
from ctxprune.pruner.rows import OBSERVERS

# Queries a block where no eviction step ends it.
BLOCK = 128
NEVER = torch.iinfo(torch.int64).max


class PageLayer(CacheLayerMixin):
    """The cache of one layer. Its length is that of the tokens seen, so that positions stay right.

    `update` hands the new keys and values on as they are: the attention writes them to the page.
    """

    is_compileable = False

    def __init__(self, cache: PrunedCache) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.cache = cache
        self.page: Page | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to prepare: the page takes its shape from the first rows."""
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Return the new keys and values alone."""
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """No length at all: what may be seen is in the page, and no mask has to be made."""
        return 0, 0

    def get_seq_length(self) -> int:
        """Columns read, evicted tokens and padding included; on the device for a static step."""
        # Mistyped as transformers' own StaticLayer has it: a compiled step guards on any number.
        return self.cache.columns if self.cache.length is None else self.cache.length  # type: ignore[return-value]

    def get_max_length(self) -> int:
        """No maximum."""
        return -1

    def reset(self) -> None:
        """Forget everything."""
        self.page = None
        self.cache.forget()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows follow their beam."""
        if self.page is not None:
            self.page.reorder(beam_idx)

    def crop(self, tokens_to_remove: int) -> None:
        """Refuse: an evicted row cannot come back.

        Raises:
            CtxpruneError: always.
        """
        raise CtxpruneError(
            "a pruned cache cannot go back to an earlier token, so assisted decoding and prompt "
            "lookup do not work with it",
            "generate without an assistant, or at sparsity 0",
        )


@dataclass(frozen=True)
class Block:
    """Columns of a pass that are attended to at once.

    Attributes:
        start, stop: its columns, after the shift of `Schedule`.
        counts, first: tokens of each sequence in it, and the column of the first one.
        due: the sequences that reach an eviction step at its end.
    """

    start: int
    stop: int
    counts: list[int]
    first: list[int]
    due: list[int]


@dataclass(frozen=True)
class Schedule:
    """How a layer reads the tokens of a pass.

    Attributes:
        blocks: one after the other.
        source: (b, columns) int64, where the token of each column stands in the pass; None: there.
        back: (b, n) int64, the column of each token of the pass; None: the same.
    """

    blocks: list[Block]
    source: Tensor | None
    back: Tensor | None


class PrunedCache(Cache):
    """A KV cache whose rows leave when the policy says so.

    Args:
        policy: decides. layers: of the model. dial: what was asked for, in words.
        block: queries that are attended to at once at most.
        usage: counts what it attends to. record: also keep `expires`, a (b, n) int64 tensor a
            layer: the position of the first query that does not see token j any more, or the
            largest int64 if all do.
    """

    def __init__(
        self,
        policy: Policy,
        layers: int,
        *,
        dial: str = "",
        block: int = BLOCK,
        usage: Usage | None = None,
        record: bool = False,
    ) -> None:
        super().__init__(layers=[PageLayer(self) for _ in range(layers)])
        self.policy = policy
        self.dial = dial
        self.block = block
        self.usage = usage
        self.columns = 0
        self.seen: list[int] = []
        self.expires: list[Tensor] | None = [] if record else None
        self.length: Tensor | None = None
        self._static = False
        self._scale: list[float] = [1.0] * layers
        self._begun = 0  # columns of the pass that runs
        self._single = False
        self._real: list[tuple[int, ...] | range] = []
        self._schedules: dict[tuple[int, ...], Schedule] = {}
        self._places: Tensor | None = None
        self._count = torch.zeros((), dtype=torch.int64)

    @classmethod
    def adopt(cls, other: Cache, like: PrunedCache) -> PrunedCache:
        """Make a caller's empty cache a pruned one: the object that the caller holds is filled."""
        other.__class__ = cls
        other.__dict__.clear()
        other.__dict__.update(like.__dict__)
        assert isinstance(other, PrunedCache)
        for layer in other.layers:
            layer.cache = other  # type: ignore[union-attr]
        return other

    def __deepcopy__(self, memo: dict[int, Any]) -> PrunedCache:
        """A copy with pages of its own; policy and usage are shared."""
        twin = self.__class__.__new__(self.__class__)
        memo[id(self)] = twin
        for name, value in self.__dict__.items():
            shared = name in ("policy", "usage")
            twin.__dict__[name] = value if shared else copy.deepcopy(value, memo)
        return twin

    def forget(self) -> None:
        """Be as new."""
        self.columns, self.seen = 0, []
        if self.expires is not None:
            self.expires = []

    def begin(self, batch: int, length: int, mask: Tensor | None, *, static: bool = False) -> None:
        """Get ready for a forward pass of `length` columns.

        Args:
            mask: (b, length) of 1 for real tokens and 0 for padding; None: all real.
            static: single tokens are placed by counts on the device (`attend.static_step`).
        """
        if not self.seen:
            self.seen = [0] * batch
        if len(self.seen) != batch:
            raise CtxpruneError(f"this cache holds {len(self.seen)} sequences, not {batch}")
        self._begun = length
        self._real = [range(length)] * batch
        if mask is not None:
            self._real = [tuple(row.nonzero()[0].tolist()) for row in mask.cpu().numpy()]
        padded = not all(map(len, self._real))
        self._single = length == 1 and not (padded and not self.pages)
        if self.expires is not None:
            pairs = zip(self.seen, self._real, strict=True)
            self._lengthen_record(max(seen + len(real) for seen, real in pairs))
        self._schedules = {}
        if self._single:
            self._prepare_step(static)

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, hidden: Tensor, scale: float
    ) -> Tensor:
        """Attend to the rows held, and let others go while a prompt is read.

        Args:
            query: (b, h, n, d); key, value: (b, h_kv, n, d), rotated already, of n new tokens.
            hidden: (b, n, hidden_size), the input of the attention module.

        Returns:
            (b, h, n, d) of query's dtype; arbitrary but finite at padding.
        """
        policy = self.policy
        with span("gate"):
            # A model that is spread over devices brings it here no sooner than for a projection.
            features = policy.annotate(layer, hidden.to(key.device))
        new = New(key, value, query if policy.watches else None, features)
        page = self.page(layer)
        if page is None:
            page = self._open(layer, new)
        self._scale[layer] = scale
        if not self._single:
            return self._read(layer, page, new, query)
        if self._places is None:
            return step(page, new, query, scale)
        stop = None if self._static else max(page.used) + 1
        place = self._places[layer].to(query.device)
        return static_step(page, new, query, scale, place, stop)

    def finish(self) -> None:
        """End a forward pass: single tokens are counted, and the steps that are due are held."""
        counts = [len(real) for real in self._real]
        before = self.seen
        self.seen = [n + count for n, count in zip(before, counts, strict=True)]
        if self._single:
            for layer, page in enumerate(self.pages):
                _, page.used = self._note_read(counts, before, page.used)
                self._evict(layer, [i for i, count in enumerate(counts) if count], self.seen)
                rows = self.policy.rows
                if rows is not None and any(n == rows.prompt(i) for i, n in enumerate(self.seen)):
                    self._settle_room(layer, page, self.seen)
        self.columns += self._begun
        self.length = None

    def page(self, layer: int) -> Page | None:
        """The page of a layer, None before its first token."""
        of_layer = self.layers[layer]
        assert isinstance(of_layer, PageLayer)
        return of_layer.page

    @property
    def pages(self) -> list[Page]:
        """All pages, in layer order."""
        return [page for layer in range(len(self.layers)) if (page := self.page(layer))]

    @property
    def nbytes(self) -> int:
        """Bytes of all pages: rows, free slots, the policy's columns, waiting queries."""
        return sum(page.nbytes for page in self.pages)

    @property
    def dense_nbytes(self) -> int:
        """Bytes of the keys and values that a dense cache would hold for the tokens seen."""
        tokens = max(self.seen, default=0) * len(self.seen)
        return sum(page.row_nbytes for page in self.pages) * tokens

    @property
    def rows(self) -> float:
        """Rows that a layer holds of a sequence, the mean over layers and sequences."""
        used = [rows for page in self.pages for rows in page.used]
        return sum(used) / len(used) if used else 0.0

    @property
    def sparsity(self) -> float:
        """Share of the tokens seen that are gone, over layers and sequences."""
        seen = sum(self.seen)
        return 1.0 - self.rows * len(self.seen) / seen if seen else 0.0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows, counts and records follow their beam, beam_idx (b',) int64."""
        super().reorder_cache(beam_idx)  # type: ignore[arg-type]
        if self.seen:
            self.seen = [self.seen[i] for i in beam_idx.tolist()]
        if self.expires:
            self.expires = [of[beam_idx.cpu()] for of in self.expires]

    def batch_select_indices(self, indices: Tensor) -> None:
        """These sequences alone, indices (b',) int64."""
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each sequence `repeats` times."""
        if self.seen:
            self.reorder_cache(torch.arange(len(self.seen)).repeat_interleave(repeats))

    def _open(self, layer: int, new: New) -> Page:
        """The page of a layer, made for all that it will ever hold, as far as that is known."""
        if self.policy.rows is None:
            page = Page(New(new.key, new.value, None, None), self._longest, 0, {})
        else:
            page = Page(new, *self._room(layer, self.seen), self.policy.columns)
        of_layer = self.layers[layer]
        assert isinstance(of_layer, PageLayer)
        of_layer.page = page
        return page

    @property
    def _longest(self) -> int:
        """Tokens of the longest sequence in the pass that runs."""
        return max(map(len, self._real))

    def _room(self, layer: int, seen: Sequence[int]) -> tuple[int, int]:
        """Slots of a layer, and queries that may wait, once so many tokens are seen."""
        rows, batch = self.policy.rows, range(len(seen))
        assert rows is not None
        limits = [rows.limit(layer, i) for i in batch]
        waiting = max(rows.interval(layer, i) for i in batch)
        if any(n < rows.prompt(i) for i, n in enumerate(seen)):
            limits += [rows.prompt(i) for i in batch]
            waiting = max(waiting, OBSERVERS)
        return max(self._longest if limit is None else limit for limit in limits), waiting

    def _settle_room(self, layer: int, page: Page, seen: Sequence[int]) -> None:
        """Give back slots that served to read a prompt."""
        rows = self.policy.rows
        if rows is not None and rows.limit(layer, 0) is not None:
            slots, waiting = self._room(layer, seen)
            page.resize(max(slots, *page.used), waiting)

    def _prepare_step(self, static: bool) -> None:
        """Choose how single tokens are placed: by numbers of the host, or counts on the device."""
        pages = self.pages
        for page in pages:
            page.grow(max(page.used) + 1)
        even = all(self._real) and all(_alike(page.used) and _alike(page.settled) for page in pages)
        self._static = static and bool(pages)
        self.length = None
        if even and not self._static:
            self._places = None
            return
        places = torch.tensor([[self._slots(page), self._waits(page)] for page in pages])
        known, device = self._places, pages[0].key.device
        if not self._static or known is None or known.shape != places.shape:
            self._places = places.to(device)
        else:
            # In place: a captured graph reads this very memory.
            known.copy_(places)
        if self._static:
            self._count = self._count.to(device).fill_(self.columns)
            self.length = self._count

    def _slots(self, page: Page) -> list[int]:
        pairs = zip(page.used, self._real, strict=True)
        return [used if real else page.slots for used, real in pairs]

    def _waits(self, page: Page) -> list[int]:
        triples = zip(page.used, page.settled, self._real, strict=True)
        last = page.waiting or 0
        return [used - settled if real else last for used, settled, real in triples]

    def _read(self, layer: int, page: Page, new: New, query: Tensor) -> Tensor:
        """Attend block by block, with the eviction steps in between."""
        schedule = self._schedule(layer, query.device)
        if schedule.source is not None:
            source = schedule.source.to(query.device)
            new, query = new.taken(source), take(query, source)
        seen, outputs, blocks = list(self.seen), [], schedule.blocks
        scale, record = self._scale[layer], None if self.expires is None else self.expires[layer]
        while blocks:
            steps = self._together(layer, page, blocks, seen)
            read, blocks = blocks[: len(steps) or 1], blocks[len(steps) or 1 :]
            start, stop = read[0].start, read[-1].stop
            part, asked = new.part(start, stop), query[:, :, start:stop]
            if steps:
                before, used = seen, page.used
                for block, (_, stay) in zip(read, steps, strict=True):
                    seen, used = self._note_read(block.counts, seen, used)
                    self._note_capped(used)
                    used = [stay] * len(used)
                outputs.append(
                    read_steps(page, self.policy, layer, part, asked, scale, steps, before, record)
                )
            else:
                block = read[0]
                outputs.append(read_block(page, part, asked, scale, block.counts, block.first))
                seen, page.used = self._note_read(block.counts, seen, page.used)
                self._evict(layer, block.due, seen)
        if self.policy.rows is not None and self.policy.rows.prompted:
            self._settle_room(layer, page, seen)
        joined = torch.cat(outputs, dim=2) if len(outputs) > 1 else outputs[0]
        return joined if schedule.back is None else take(joined, schedule.back.to(joined.device))

    def _together(
        self, layer: int, page: Page, blocks: Sequence[Block], seen: Sequence[int]
    ) -> list[tuple[int, int]]:
        """The steps at the ends of the first blocks, as far as `read_steps` can read them."""
        steps: list[tuple[int, int]] = []
        rows, used, everyone = self.policy.rows, page.used[0], list(range(len(seen)))
        if rows is None or not _alike(page.used) or page.used != page.settled:
            return steps
        for block in blocks:
            tokens, length = block.stop - blocks[0].start, block.stop - block.start
            whole = _alike([*block.counts, length]) and block.due == everyone
            stay = {min(rows.after(layer, i, seen[i] + tokens), used + length) for i in everyone}
            if tokens > self.block or not whole or len(stay) > 1:
                break
            used = stay.pop()
            steps.append((tokens, used))
        return steps

    def _schedule(self, layer: int, device: torch.device) -> Schedule:
        """The blocks of a layer; layers whose steps coincide share one."""
        rows, batch = self.policy.rows, len(self.seen)
        key = () if rows is None else tuple(rows.interval(layer, i) for i in range(batch))
        if key not in self._schedules:
            self._schedules[key] = self._cut(layer, device)
        return self._schedules[key]

    def _cut(self, layer: int, device: torch.device) -> Schedule:
        rows, counts = self.policy.rows, [len(real) for real in self._real]
        steps: list[list[int]] = [[] for _ in counts]
        lead = [0] * len(counts)
        if rows is not None:
            until = [rows.step(layer, i, seen) - seen for i, seen in enumerate(self.seen)]
            # The first steps of all sequences fall on one column, and so do all others as a rule.
            lead = [max(until) - first for first in until]
            for i, seen in enumerate(self.seen):
                at = until[i]
                while at <= counts[i]:
                    steps[i].append(lead[i] + at)
                    at = rows.step(layer, i, seen + at) - seen
        last = max(start + count for start, count in zip(lead, counts, strict=True))
        ends = sorted({end for some in steps for end in some} | {last})
        blocks, start = [], min(lead)
        for end in ends:
            while start < end:
                stop = min(start + self.block, end)
                due = [i for i, some in enumerate(steps) if stop in some]
                first = [max(begin - start, 0) for begin in lead]
                within = [
                    max(min(begin + count, stop) - max(begin, start), 0)
                    for begin, count in zip(lead, counts, strict=True)
                ]
                blocks.append(Block(start, stop, within, first, due))
                start = stop
        if _alike(lead) and set(counts) == {self._begun}:
            return Schedule(blocks, None, None)
        source = torch.zeros(len(counts), last, dtype=torch.int64)
        back = torch.zeros(len(counts), self._begun, dtype=torch.int64)
        for i, real in enumerate(self._real):
            where = torch.tensor(real, dtype=torch.int64)
            source[i, lead[i] : lead[i] + len(where)] = where
            back[i, where] = torch.arange(len(where)) + lead[i]
        return Schedule(blocks, source.to(device), back.to(device))

    def _note_read(
        self, counts: Sequence[int], seen: Sequence[int], used: Sequence[int]
    ) -> tuple[list[int], list[int]]:
        """Note that each sequence reads so many tokens; returns tokens seen and rows afterwards."""
        if self.usage is not None:
            for count, n, rows in zip(counts, seen, used, strict=True):
                self.usage.read(count, n, rows)
        add = [list(map(sum, zip(counts, before, strict=True))) for before in (seen, used)]
        return add[0], add[1]

    def _note_capped(self, used: Sequence[int]) -> None:
        """Note that sequences with so many rows are at a step."""
        rows = self.policy.rows
        if self.usage is not None and rows is not None and rows.room is not None:
            self.usage.steps += len(used)
            self.usage.capped += sum(n > rows.room for n in used)

    def _evict(self, layer: int, due: Sequence[int], seen: Sequence[int]) -> None:
        """Hold the step of those sequences of a layer that have reached one."""
        rows, page = self.policy.rows, self.page(layer)
        assert page is not None
        if rows is None:
            return
        members = [i for i in due if rows.step(layer, i, seen[i] - 1) == seen[i]]
        if not members:
            return
        self._note_capped([page.used[i] for i in members])
        stay = [rows.after(layer, i, seen[i]) for i in members]
        record = None if self.expires is None else self.expires[layer]
        read, scale = [seen[i] for i in members], self._scale[layer]
        with span("policy"):
            evict(page, self.policy, layer, members, read, stay, scale, record)

    def _lengthen_record(self, total: int) -> None:
        assert self.expires is not None
        old = self.expires or [torch.empty(len(self.seen), 0, dtype=torch.int64)] * len(self.layers)
        # `F.pad` would take the number through a float, which does not hold it.
        more = torch.full((len(self.seen), max(total - old[0].shape[1], 0)), NEVER)
        self.expires = [torch.cat([of, more], dim=1) for of in old]


def _alike(numbers: Sequence[int]) -> bool:
    return len(set(numbers)) == 1
