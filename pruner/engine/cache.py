"""PrunedCache: one page a layer, in the shape that transformers expects of a cache.

It counts the tokens of each sequence on the host, cuts what is read into blocks that end at
eviction steps, and holds the steps. All sequences of a batch need not have read as much: their
tokens are shifted so that their steps coincide.
"""

from __future__ import annotations

import copy
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    LinearAttentionCacheLayerMixin,
    LinearAttentionLayer,
)

from ctxprune.pruner.decoder import Decoder, Layer, Sight
from ctxprune.pruner.engine.attend import span, static_step, step
from ctxprune.pruner.engine.bounded import Bounded
from ctxprune.pruner.engine.evict import evict
from ctxprune.pruner.engine.page import New, Page, take
from ctxprune.pruner.engine.read import read_block, read_steps
from ctxprune.pruner.engine.usage import Usage
from ctxprune.pruner.engine.weights import Logits
from ctxprune.pruner.errors import CtxpruneError
from ctxprune.pruner.policies import Policy
from ctxprune.pruner.rows import OBSERVERS
from ctxprune.pruner.savings import Savings

# Queries a block where no eviction step ends it.
BLOCK = 128
NEVER = torch.iinfo(torch.int64).max
# Tokens of a text that no model reads.
LONGEST_TEXT = 2**30


class PageLayer(CacheLayerMixin):
    """The cache of one layer. Its length is that of the tokens seen, so that positions stay right.

    `update` hands the new keys and values on as they are: the attention writes them to the page.
    Where it is given latents, the page keeps these, and `expand` makes keys and values of them.

    Attributes:
        sight: what its queries may see at all. gate: its number among the layers with a gate; None:
            it is left with its window.
        policy, place: who decides what leaves, and the layer's number there.
        expand, latent: makes keys and values of latents, and those of the new tokens.
        logits: how its weights come of products. read: columns of the pass that it attended to.
    """

    is_compileable = False

    def __init__(self, cache: PrunedCache, layer: Layer) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.cache = cache
        self.sight, self.gate = layer.sight, layer.gate
        self.policy, self.place = cache.policy, layer.gate or 0
        if layer.gate is None or (cache.policy.rows is None and layer.sight.size is not None):
            self.policy, self.place = Bounded(layer.sight), 0
        self.page: Page | None = None
        self.expand: Any = getattr(layer.attention, "expand_kv", None)
        self.latent: tuple[Tensor, Tensor] | None = None
        self.logits = Logits(1.0)
        self.read = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to prepare: the page takes its shape from the first rows."""
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Return the new keys and values alone."""
        if self.expand is not None:
            self.latent = key_states, value_states
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


class StatefulPageLayer(LinearAttentionLayer, PageLayer):
    """The same where a layer also has a state, of Mamba or the like, beside its attention."""

    is_compileable = False
    is_croppable = False

    def __init__(self, cache: PrunedCache, layer: Layer, states: int) -> None:
        PageLayer.__init__(self, cache, layer)
        LinearAttentionLayer.__init__(self, number_of_states=states)

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Prepare the state, which is given by name; the page needs nothing."""
        if kwargs:
            LinearAttentionLayer.lazy_initialization(self, **kwargs)

    def reset(self) -> None:
        """Forget everything."""
        LinearAttentionLayer.reset(self)
        PageLayer.reset(self)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """State and rows follow their beam."""
        LinearAttentionLayer.reorder_cache(self, beam_idx)  # type: ignore[arg-type]
        PageLayer.reorder_cache(self, beam_idx)

    def crop(self, tokens_to_remove: int) -> None:
        """Refuse, as a page does."""
        PageLayer.crop(self, tokens_to_remove)


def _layers(cache: PrunedCache, decoder: Decoder) -> list[Any]:
    """The layers of a model's own cache, with pages in the place of keys and values."""
    layers: list[Any] = list(DynamicCache(config=decoder.config).layers)
    for layer in decoder.layers:
        own = layers[layer.index] if layer.index < len(layers) else None
        page = PageLayer(cache, layer)
        if isinstance(own, LinearAttentionCacheLayerMixin):
            page = StatefulPageLayer(cache, layer, own.number_of_states)
        layers[layer.index : layer.index + 1] = [page]
    return layers


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
        position: (b, columns) int64, of the token of each column, where some layer asks for it.
    """

    blocks: list[Block]
    source: Tensor | None
    back: Tensor | None
    position: Tensor | None


class PrunedCache(Cache):
    """A KV cache whose rows leave when the policy says so.

    Args:
        policy: decides. decoder: of the model. dial: what was asked for, in words.
        block: queries that are attended to at once at most.
        usage: counts what it attends to. record: also keep `expires`, a (b, n) int64 tensor a
            layer: the position of the first query that does not see token j any more, or the
            largest int64 if all do.
    """

    def __init__(
        self,
        policy: Policy,
        decoder: Decoder,
        *,
        dial: str = "",
        block: int = BLOCK,
        usage: Usage | None = None,
        record: bool = False,
    ) -> None:
        self.policy = policy
        super().__init__(layers=_layers(self, decoder))
        self._attentions = tuple(layer.index for layer in decoder.layers)
        self.dial = dial
        self.block = block
        self.usage = usage
        self.columns = 0
        self.seen: list[int] = []
        self.expires: list[Tensor] | None = [] if record else None
        self.length: Tensor | None = None
        self._static = False
        self._begun = 0  # columns of the pass that runs, 0 where none does
        self._single = False
        self._real: list[tuple[int, ...] | range] = []
        self._schedules: dict[tuple[int, ...], Schedule] = {}
        self._places: Tensor | None = None
        self._newest: Tensor | None = None  # (b, 1) positions of single tokens
        self._count = torch.zeros((), dtype=torch.int64)

    @classmethod
    def adopt(cls, other: Cache, like: PrunedCache) -> PrunedCache:
        """Make a caller's empty cache a pruned one: the object that the caller holds is filled."""
        other.__class__ = cls
        other.__dict__.clear()
        other.__dict__.update(like.__dict__)
        assert isinstance(other, PrunedCache)
        for layer in other.attentions:
            layer.cache = other
        return other

    def __deepcopy__(self, memo: dict[int, Any]) -> PrunedCache:
        """A copy with pages of its own; policy and usage are shared."""
        twin = self.__class__.__new__(self.__class__)
        memo[id(self)] = twin
        shared = [self.policy, *(layer.logits for layer in self.attentions)]
        shared += [layer.expand.__self__ for layer in self.attentions if layer.expand is not None]
        memo |= {id(known): known for known in shared}
        for name, value in self.__dict__.items():
            twin.__dict__[name] = value if name == "usage" else copy.deepcopy(value, memo)
        return twin

    def forget(self) -> None:
        """Be as new."""
        self.columns, self.seen, self._begun = 0, [], 0
        if self.expires is not None:
            self.expires = []

    def begin(self, batch: int, length: int, mask: Tensor | None, *, static: bool = False) -> None:
        """Get ready for a forward pass of `length` columns.

        Args:
            mask: (b, length) of 1 for real tokens and 0 for padding; None: all real.
            static: single tokens are placed by counts on the device (`attend.static_step`).

        Raises:
            CtxpruneError: another number of sequences, or a pass that broke off before.
        """
        if self._begun:
            raise CtxpruneError(
                "a forward pass with this cache broke off, so some of its layers have read more "
                "than others",
                "start with an empty cache",
            )
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
        for layer in self.attentions:
            layer.read = 0
        if self._single:
            self._prepare_step(static)

    def reserve(self, tokens: int, news: Sequence[tuple[New, Tensor]]) -> None:
        """Make the pages of a text of so many tokens, and count as if it had been read.

        Args:
            news: of each layer with attention, what one token writes, and the input (1, 1,
                hidden_size) of its attention; tensors without data will do.
        """
        self.begin(1, tokens, None)
        for layer, (new, hidden) in zip(self.attentions, news, strict=True):
            features = layer.policy.annotate(layer.place, hidden)
            query = new.query if layer.policy.watches else None
            page = self._open(layer, replace(new, query=query, features=features))
            rows = layer.policy.rows
            if rows is not None:
                last = tokens - tokens % rows.interval(layer.place, 0)
                stay = min(rows.after(layer.place, 0, last), layer.sight.held(last))
                page.used = [min(stay, last) + tokens - last]
            else:
                page.used = [tokens]
        self.seen, self._begun = [tokens], 0

    def attend(
        self, number: int, query: Tensor, key: Tensor, value: Tensor, hidden: Tensor, logits: Logits
    ) -> Tensor:
        """Attend to the rows held, and let others go while a prompt is read.

        Args:
            number: of the layer, among those with attention. logits: how weights come of products.
            query: (b, h, n, d); key, value: (b, h_kv, n, d), rotated already, of n new tokens.
            hidden: (b, n, hidden_size), the input of the attention module.

        Returns:
            (b, h, n, d) of query's dtype; arbitrary but finite at padding.

        Raises:
            CtxpruneError: the layer does not attend once to each token of the pass.
        """
        layer: Any = self.layers[self._attentions[number]]
        layer.read += query.shape[2]
        if layer.read > self._begun:
            raise CtxpruneError("a layer of this model attends more than once to a token")
        policy = layer.policy
        with span("gate"):
            # A model that is spread over devices brings it here no sooner than for a projection.
            features = policy.annotate(layer.place, hidden.to(key.device))
        if layer.latent is not None:
            (key, value), layer.latent = layer.latent, None
        new = New(key, value, query if policy.watches else None, features)
        page = layer.page
        if page is None:
            page = self._open(layer, new)
        layer.logits = logits
        if not self._single:
            return self._read(layer, page, new, query)
        sight = self._sight(layer)
        if layer.sight.size is not None:
            assert self._newest is not None
            new = replace(new, position=self._newest.to(key.device))
        if self._places is None:
            return step(page, new, query, logits, sight)
        stop = None if self._static else max(page.used) + 1
        place = self._places[number].to(query.device)
        return static_step(page, new, query, logits, sight, place, stop)

    def finish(self) -> None:
        """End a forward pass: single tokens are counted, and the steps that are due are held.

        Raises:
            CtxpruneError: a layer did not attend to all of it.
        """
        if any(layer.read != self._begun for layer in self.attentions):
            raise CtxpruneError(
                "a layer of this model did not attend to the tokens that it was given",
                "its attention cannot be exchanged; use it at sparsity 0",
            )
        counts = [len(real) for real in self._real]
        before = self.seen
        self.seen = [n + count for n, count in zip(before, counts, strict=True)]
        if self._single:
            for layer in self.attentions:
                page, rows = layer.page, layer.policy.rows
                assert page is not None
                _, page.used = self._note_read(layer, counts, before, page.used)
                self._evict(layer, [i for i, count in enumerate(counts) if count], self.seen)
                if rows is not None and any(n == rows.prompt(i) for i, n in enumerate(self.seen)):
                    self._settle_room(layer, page, self.seen)
        self.columns += self._begun
        self._begun = 0
        self.length = None

    @property
    def attentions(self) -> list[PageLayer]:
        """The layers with attention, in order."""
        layers: list[Any] = [self.layers[index] for index in self._attentions]
        return layers

    @property
    def pages(self) -> list[Page]:
        """The pages of the layers with a gate, in order."""
        return [layer.page for layer in self.attentions if layer.page and layer.gate is not None]

    @property
    def is_inference(self) -> bool:
        """Whether it was made in inference mode, and cannot be written outside of it."""
        return any(layer.page.key.is_inference() for layer in self.attentions if layer.page)

    @property
    def nbytes(self) -> int:
        """Bytes of all pages: rows, free slots, the policy's columns, waiting queries.

        States of layers without attention are not counted.
        """
        return sum(layer.page.nbytes for layer in self.attentions if layer.page)

    @property
    def dense_nbytes(self) -> int:
        """Bytes of the keys and values that a dense cache would hold for the tokens seen."""
        return self.dense_bytes(max(self.seen, default=0))

    def dense_bytes(self, tokens: int) -> int:
        """The same for so many tokens of each sequence."""
        rows = sum(
            layer.page.row_nbytes
            * (tokens if layer.sight.size is None else min(tokens, layer.sight.size))
            for layer in self.attentions
            if layer.page
        )
        return rows * len(self.seen)

    @property
    def rows(self) -> float:
        """Rows that a layer with a gate holds of a sequence, the mean over them and sequences."""
        used = [rows for page in self.pages for rows in page.used]
        return sum(used) / len(used) if used else 0.0

    @property
    def sparsity(self) -> float:
        """Share of the tokens seen that are gone, over layers with a gate and sequences."""
        seen = sum(self.seen)
        return 1.0 - self.rows * len(self.seen) / seen if seen else 0.0

    @property
    def savings(self) -> Savings:
        """What it holds, beside what a dense cache would hold."""
        nbytes, slots = self.nbytes, [page.slots for page in self.pages]
        even = bisect_right(range(LONGEST_TEXT), nbytes, key=self.dense_bytes)
        return Savings(
            tokens=max(self.seen, default=0),
            share=1.0 - self.sparsity,
            rows=self.rows,
            room=sum(slots) / max(len(slots), 1),
            kv_bytes=nbytes,
            dense_kv_bytes=self.dense_nbytes,
            even_at=even if even < LONGEST_TEXT else None,
        )

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

    @property
    def _bounded(self) -> bool:
        return any(layer.sight.size is not None for layer in self.attentions)

    def _sight(self, layer: PageLayer) -> Sight | None:
        """What a layer may see, where that may not be all in the pass that runs."""
        if layer.sight.size is None:
            return None
        longest = max(n + len(real) for n, real in zip(self.seen, self._real, strict=True))
        return layer.sight if layer.sight.bounds(longest) or self._static else None

    def _open(self, layer: PageLayer, new: New) -> Page:
        """The page of a layer, made for all that it will ever hold, as far as that is known."""
        if layer.policy.rows is None:
            dense = New(new.key, new.value, None, None)
            page = Page(dense, self._longest, 0, {}, layer.expand)
        else:
            room = self._room(layer, self.seen)
            page = Page(new, *room, layer.policy.columns, layer.expand)
        layer.page = page
        return page

    @property
    def _longest(self) -> int:
        """Tokens of the longest sequence in the pass that runs."""
        return max(map(len, self._real))

    def _room(self, layer: PageLayer, seen: Sequence[int]) -> tuple[int, int]:
        """Slots of a layer, and queries that may wait, once so many tokens are seen."""
        rows, batch = layer.policy.rows, range(len(seen))
        assert rows is not None
        limits = [rows.limit(layer.place, i) for i in batch]
        waiting = max(rows.interval(layer.place, i) for i in batch)
        if any(n < rows.prompt(i) for i, n in enumerate(seen)):
            limits += [rows.prompt(i) for i in batch]
            waiting = max(waiting, OBSERVERS)
        slots = max(self._longest if limit is None else limit for limit in limits)
        if layer.sight.size is not None:
            # At a step no more stay than are in sight.
            slots = min(slots, layer.sight.size + waiting)
        return slots, waiting

    def _settle_room(self, layer: PageLayer, page: Page, seen: Sequence[int]) -> None:
        """Give back slots that served to read a prompt."""
        rows = layer.policy.rows
        if rows is not None and rows.limit(layer.place, 0) is not None:
            slots, waiting = self._room(layer, seen)
            page.resize(max(slots, *page.used), waiting)

    def _prepare_step(self, static: bool) -> None:
        """Choose how single tokens are placed: by numbers of the host, or counts on the device."""
        pages = [layer.page for layer in self.attentions if layer.page]
        for page in pages:
            page.grow(max(page.used) + 1)
        even = all(self._real) and all(_alike(page.used) and _alike(page.settled) for page in pages)
        self._static = static and bool(pages)
        self.length = None
        self._place_newest(pages)
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

    def _place_newest(self, pages: Sequence[Page]) -> None:
        """Note the positions of single tokens, where some layer asks for them."""
        if not self._bounded:
            return
        newest = torch.tensor(self.seen)[:, None]
        known = self._newest
        if self._static and known is not None and known.shape == newest.shape:
            known.copy_(newest)
        else:
            self._newest = newest.to(pages[0].key.device) if pages else newest

    def _slots(self, page: Page) -> list[int]:
        pairs = zip(page.used, self._real, strict=True)
        return [used if real else page.slots for used, real in pairs]

    def _waits(self, page: Page) -> list[int]:
        triples = zip(page.used, page.settled, self._real, strict=True)
        last = page.waiting or 0
        return [used - settled if real else last for used, settled, real in triples]

    def _read(self, layer: PageLayer, page: Page, new: New, query: Tensor) -> Tensor:
        """Attend block by block, with the eviction steps in between."""
        schedule = self._schedule(layer, query.device)
        if schedule.source is not None:
            source = schedule.source.to(query.device)
            new, query = new.taken(source), take(query, source)
        if layer.sight.size is not None:
            assert schedule.position is not None
            new = replace(new, position=schedule.position.to(query.device))
        seen, outputs, blocks = list(self.seen), [], schedule.blocks
        policy, logits, sight = layer.policy, layer.logits, self._sight(layer)
        while blocks:
            steps = self._together(layer, page, blocks, seen)
            read, blocks = blocks[: len(steps) or 1], blocks[len(steps) or 1 :]
            start, stop = read[0].start, read[-1].stop
            part, asked = new.part(start, stop), query[:, :, start:stop]
            if steps:
                before, used = seen, page.used
                for block, (_, stay) in zip(read, steps, strict=True):
                    seen, used = self._note_read(layer, block.counts, seen, used)
                    self._note_capped(layer, used)
                    used = [stay] * len(used)
                record = self._record(layer)
                outputs.append(
                    read_steps(
                        page, policy, layer.place, part, asked, logits, steps, before, record
                    )
                )
            else:
                counts = read[0].counts
                outputs.append(read_block(page, part, asked, logits, sight, counts, read[0].first))
                seen, page.used = self._note_read(layer, counts, seen, page.used)
                self._evict(layer, read[0].due, seen)
        if policy.rows is not None and policy.rows.prompted:
            self._settle_room(layer, page, seen)
        joined = torch.cat(outputs, dim=2) if len(outputs) > 1 else outputs[0]
        return joined if schedule.back is None else take(joined, schedule.back.to(joined.device))

    def _together(
        self, layer: PageLayer, page: Page, blocks: Sequence[Block], seen: Sequence[int]
    ) -> list[tuple[int, int]]:
        """The steps at the ends of the first blocks, as far as `read_steps` can read them."""
        steps: list[tuple[int, int]] = []
        rows, used, everyone = layer.policy.rows, page.used[0], list(range(len(seen)))
        if rows is None or not _alike(page.used) or page.used != page.settled:
            return steps
        if layer.sight.bounds(max(self.seen) + self._begun + 1):
            return steps
        for block in blocks:
            tokens, length = block.stop - blocks[0].start, block.stop - block.start
            whole = _alike([*block.counts, length]) and block.due == everyone
            after = [rows.after(layer.place, i, seen[i] + tokens) for i in everyone]
            stay = {min(most, used + length) for most in after}
            if tokens > self.block or not whole or len(stay) > 1:
                break
            used = stay.pop()
            steps.append((tokens, used))
        return steps

    def _schedule(self, layer: PageLayer, device: torch.device) -> Schedule:
        """The blocks of a layer; layers whose steps coincide share one."""
        rows, batch = layer.policy.rows, len(self.seen)
        key: tuple[int, ...] = ()
        if rows is not None:
            key = (rows.prompted, *(rows.interval(layer.place, i) for i in range(batch)))
        if key not in self._schedules:
            self._schedules[key] = self._cut(layer, device)
        return self._schedules[key]

    def _cut(self, layer: PageLayer, device: torch.device) -> Schedule:
        rows, place = layer.policy.rows, layer.place
        counts = [len(real) for real in self._real]
        steps: list[list[int]] = [[] for _ in counts]
        lead = [0] * len(counts)
        if rows is not None:
            until = [rows.step(place, i, seen) - seen for i, seen in enumerate(self.seen)]
            # The first steps of all sequences fall on one column, and so do all others as a rule.
            lead = [max(until) - first for first in until]
            for i, seen in enumerate(self.seen):
                at = until[i]
                while at <= counts[i]:
                    steps[i].append(lead[i] + at)
                    at = rows.step(place, i, seen + at) - seen
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
        position = None
        if self._bounded:
            begin = torch.tensor([self.seen, lead], device=device)[:, :, None]
            position = begin[0] - begin[1] + torch.arange(last, device=device)
        if _alike(lead) and set(counts) == {self._begun}:
            return Schedule(blocks, None, None, position)
        source = torch.zeros(len(counts), last, dtype=torch.int64)
        back = torch.zeros(len(counts), self._begun, dtype=torch.int64)
        for i, real in enumerate(self._real):
            where = torch.tensor(real, dtype=torch.int64)
            source[i, lead[i] : lead[i] + len(where)] = where
            back[i, where] = torch.arange(len(where)) + lead[i]
        return Schedule(blocks, source.to(device), back.to(device), position)

    def _note_read(
        self, layer: PageLayer, counts: Sequence[int], seen: Sequence[int], used: Sequence[int]
    ) -> tuple[list[int], list[int]]:
        """Note that each sequence reads so many tokens; returns tokens seen and rows afterwards."""
        if self.usage is not None and layer.gate is not None:
            for count, n, rows in zip(counts, seen, used, strict=True):
                self.usage.read(count, n, rows)
        add = [list(map(sum, zip(counts, before, strict=True))) for before in (seen, used)]
        return add[0], add[1]

    def _note_capped(self, layer: PageLayer, used: Sequence[int]) -> None:
        """Note that sequences with so many rows are at a step."""
        rows = layer.policy.rows
        if self.usage is not None and rows is not None and rows.room is not None:
            self.usage.steps += len(used)
            self.usage.capped += sum(n > rows.room for n in used)

    def _record(self, layer: PageLayer) -> Tensor | None:
        """Where it is noted when rows of a layer leave."""
        return None if self.expires is None or layer.gate is None else self.expires[layer.gate]

    def _evict(self, layer: PageLayer, due: Sequence[int], seen: Sequence[int]) -> None:
        """Hold the step of those sequences of a layer that have reached one."""
        rows, page, place = layer.policy.rows, layer.page, layer.place
        assert page is not None
        if rows is None:
            return
        members = [i for i in due if rows.step(place, i, seen[i] - 1) == seen[i]]
        if not members:
            return
        self._note_capped(layer, [page.used[i] for i in members])
        stay = [min(rows.after(place, i, seen[i]), layer.sight.held(seen[i])) for i in members]
        read, record = [seen[i] for i in members], self._record(layer)
        sight = None if layer.sight.size is None else layer.sight
        with span("policy"):
            evict(page, layer.policy, place, members, read, stay, layer.logits, record, sight)

    def _lengthen_record(self, total: int) -> None:
        assert self.expires is not None
        gated = [layer for layer in self.attentions if layer.gate is not None]
        old = self.expires or [torch.empty(len(self.seen), 0, dtype=torch.int64)] * len(gated)
        position = torch.arange(old[0].shape[1], total)
        # `F.pad` would take the number through a float, which does not hold it.
        never = torch.full_like(position, NEVER)
        more = [
            (never if layer.sight.size is None else layer.sight.until(position)).repeat(
                len(self.seen), 1
            )
            for layer in gated
        ]
        self.expires = [torch.cat(pair, dim=1) for pair in zip(old, more, strict=True)]


def _alike(numbers: Sequence[int]) -> bool:
    return len(set(numbers)) == 1
