"""The pages of one layer for all sequences that a server serves, in memory that it hands out.

The server numbers the pages, and says which tokens of which sequence are new. Nothing is counted
here from one pass to the next: what a page holds follows from the tokens its sequence has read.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ctxprune.pruner.decoder import Sight
from ctxprune.pruner.engine.attend import static_step
from ctxprune.pruner.engine.evict import evict
from ctxprune.pruner.engine.page import New, Page
from ctxprune.pruner.engine.read import read_block, read_steps
from ctxprune.pruner.engine.weights import Logits
from ctxprune.pruner.policies import Policy

# Queries that are attended to at once; no eviction interval is longer.
BLOCK = 128


@dataclass(frozen=True)
class Batch:
    """The new tokens of a pass, those of a sequence next to each other; int64 on the CPU.

    Attributes:
        starts: (s + 1,), the first one of each sequence, and how many there are.
        seen: (s,), tokens of each sequence that were read before. pages: (s,), their numbers.
    """

    starts: Tensor
    seen: Tensor
    pages: Tensor

    @cached_property
    def single(self) -> Tensor:
        """The sequences with one new token, rising."""
        return (self.starts.diff() == 1).nonzero()[:, 0]

    @cached_property
    def several(self) -> list[int]:
        """The sequences with more."""
        several: list[int] = (self.starts.diff() > 1).nonzero()[:, 0].tolist()
        return several


class Pool:
    """The pages of a layer.

    Args:
        policy, place: who decides what leaves, and the layer's number there.
        sight: what queries may see at all. logits: how weights come of products.
        like: query, key and value of one token, (1, h, 1, d) each, on their device.
        width: of the attention's input. longest: tokens of a sequence at most.

    Attributes:
        nbytes: of a page.
    """

    def __init__(
        self,
        policy: Policy,
        place: int,
        sight: Sight,
        logits: Logits,
        like: tuple[Tensor, Tensor, Tensor],
        width: int,
        longest: int,
    ) -> None:
        assert policy.rows is not None, "without a number of rows a page has no size"
        self.policy, self.place, self.sight, self.logits = policy, place, sight, logits
        self._interval = policy.rows.interval(place, 0)
        limit = policy.rows.limit(place, 0)
        limits = [longest if limit is None else limit]
        if sight.size is not None:
            # At a step no more stay than are in sight.
            limits.append(sight.size + self._interval)
        key = like[1]
        new = self._new(*like, key.new_zeros(1, 1, width), torch.zeros(1, 1, dtype=torch.int64))
        self._like = Page(new, min(limits), self._interval, policy.columns)
        self.nbytes = self._like.aligned_nbytes
        # Rows that stay after 0, 1, 2 ... steps.
        stay = [0]
        for seen in range(self._interval, longest + 1, self._interval):
            most = min(policy.rows.after(place, 0, seen), sight.held(seen))
            stay.append(min(most, stay[-1] + self._interval))
        self._stay = torch.tensor(stay)
        self._page: Page | None = None

    def bind(self, memory: Tensor) -> None:
        """Have the pages lie in memory (pages, nbytes) int8, zero and without gaps."""
        self._page = Page.over(self._like, memory)

    def attend(
        self, batch: Batch, query: Tensor, key: Tensor, value: Tensor, hidden: Tensor
    ) -> Tensor:
        """Attend to the rows held, and hold the eviction steps that sequences reach.

        Args:
            query: (n, h, d); key, value: (n, h_kv, d), rotated already, of n new tokens.
            hidden: (n, hidden_size), the input of the attention module.

        Returns:
            (n, h, d), d of the values.
        """
        if not batch.several:
            return self._step(batch, query, key, value, hidden)
        out = query.new_empty(*query.shape[:2], value.shape[2])
        for i in batch.several:
            part = slice(*batch.starts[i : i + 2].tolist())
            out[part] = self._read(batch, i, query[part], key[part], value[part], hidden[part])
        if len(batch.single):
            at = batch.starts[batch.single].to(query.device)
            out[at] = self._step(batch, query[at], key[at], value[at], hidden[at])
        return out

    def _step(
        self, batch: Batch, query: Tensor, key: Tensor, value: Tensor, hidden: Tensor
    ) -> Tensor:
        """The same for the sequences with one new token, all at once."""
        page = self._page
        assert page is not None
        seen, pages = batch.seen[batch.single], batch.pages[batch.single]
        settled = self._stay[seen // self._interval]
        waiting = seen % self._interval
        place = torch.stack([settled + waiting, waiting]).to(query.device)
        bounded = self.sight.bounds(int(seen.max()) + 1)
        # (s, heads, 1, width) each.
        asked, key, value = (tensor[:, :, None] for tensor in (query, key, value))
        new = self._new(asked, key, value, hidden[:, None], seen[:, None])
        out = static_step(
            page,
            new,
            asked,
            self.logits,
            self.sight if bounded else None,
            place,
            int((settled + waiting).max()) + 1,
            pages.to(query.device),
        )
        due = waiting == self._interval - 1
        if due.any():
            members, read, stood = (each[due].tolist() for each in (pages, seen + 1, settled))
            if len(members) == 1:
                # Views of its own rows, where those of several have to be copied.
                alone = page.alone(members[0], stood[0] + self._interval, stood[0])
                self._evict(alone, [0], read)
            else:
                for number, rows in zip(members, stood, strict=True):
                    page.used[number], page.settled[number] = rows + self._interval, rows
                self._evict(page, members, read)
        return out[:, :, 0]

    def _read(
        self, batch: Batch, i: int, query: Tensor, key: Tensor, value: Tensor, hidden: Tensor
    ) -> Tensor:
        """The same for one sequence with several new tokens, in blocks that end at its steps."""
        assert self._page is not None
        seen, count = int(batch.seen[i]), len(query)
        settled, waiting = int(self._stay[seen // self._interval]), seen % self._interval
        page = self._page.alone(int(batch.pages[i]), settled + waiting, settled)
        position = torch.arange(seen, seen + count)[None]
        # (1, heads, n, width) each.
        asked, key, value = (tensor.transpose(0, 1)[None] for tensor in (query, key, value))
        new = self._new(asked, key, value, hidden[None], position)
        sight = self.sight if self.sight.bounds(seen + count + 1) else None
        outputs, start = [], 0
        while start < count:
            steps = self._steps(seen + start, count - start) if sight is None else []
            stop = start + (steps[-1][0] if steps else self._until(seen + start, count - start))
            part, turn = new.part(start, stop), asked[:, :, start:stop]
            if steps:
                before = [seen + start]
                read = read_steps(
                    page, self.policy, self.place, part, turn, self.logits, steps, before, None
                )
            else:
                read = read_block(page, part, turn, self.logits, sight, [stop - start], [0])
                page.used[0] += stop - start
                if (seen + stop) % self._interval == 0:
                    self._evict(page, [0], [seen + stop])
            outputs.append(read)
            start = stop
        return torch.cat(outputs, dim=2)[0].transpose(0, 1)

    def _steps(self, seen: int, count: int) -> list[tuple[int, int]]:
        """The next steps within a block, as `read_steps` takes them; none where queries wait."""
        if seen % self._interval:
            return []
        stops = range(self._interval, min(count, BLOCK) + 1, self._interval)
        return [(stop, int(self._stay[(seen + stop) // self._interval])) for stop in stops]

    def _until(self, seen: int, count: int) -> int:
        """Tokens until the next step, or until the last one of so many."""
        return min(self._interval - seen % self._interval, count)

    def _evict(self, page: Page, members: list[int], seen: list[int]) -> None:
        """Hold the step that some sequences of a page have reached after so many tokens."""
        stay = [int(self._stay[n // self._interval]) for n in seen]
        sight = None if self.sight.size is None else self.sight
        evict(page, self.policy, self.place, members, seen, stay, self.logits, None, sight)

    def _new(
        self, query: Tensor, key: Tensor, value: Tensor, hidden: Tensor, position: Tensor
    ) -> New:
        """What is written for tokens (b, n), with their positions where queries ask for them."""
        features = self.policy.annotate(self.place, hidden)
        asked = query if self.policy.watches else None
        known = None if self.sight.size is None else position.to(key.device)
        return New(key, value, asked, features, known)
