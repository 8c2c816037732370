"""What a model forgot of a text, when, and which token made it: one forward pass of the engine.

The policy runs as it always does, with somebody watching: nothing of it is computed a second way.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ctxprune.pruner.engine.cache import PrunedCache
from ctxprune.pruner.engine.handle import handle_of
from ctxprune.pruner.engine.table import Table
from ctxprune.pruner.errors import CtxpruneError
from ctxprune.pruner.files import whole
from ctxprune.pruner.policies import Block, Policy

TENSORS = ("expires", "dropper", "attention")


@dataclass(frozen=True)
class Trace:
    """The life of every token in every layer.

    Attributes:
        model: name of its folder. policy: its name, `dense` at sparsity 0.
        requested: the sparsity asked for. evicts_every: tokens between two evictions at most.
        pieces: the text of each of the n tokens, together the text; empty for a token that only
            goes on with the bytes of a character.
        expires: (layers, n) int64, position of the first query that does not see token j any more;
            n if all do.
        dropper: (layers, n) int64, position of the query that token j left for: the one that
            scored it least, if the policy judges by query (gate), decided by itself (window, sink,
            strided), else the last one read before it left; -1 if it did not.
        attention: (layers, n) float32, mean attention a query, over heads, that token j got in the
            last block of queries that saw it.
    """

    model: str
    policy: str
    requested: float
    evicts_every: int
    pieces: tuple[str, ...]
    expires: Tensor
    dropper: Tensor
    attention: Tensor

    @property
    def layers(self) -> int:
        """Layers of the model."""
        return self.expires.shape[0]

    @property
    def tokens(self) -> int:
        """Tokens n of the text."""
        return self.expires.shape[1]

    @property
    def sparsity(self) -> float:
        """Share of the earlier tokens that were gone when a query looked."""
        pairs = self.layers * self.tokens * (self.tokens - 1) // 2
        after = self.expires - 1 - torch.arange(self.tokens)
        return 1.0 - int(after.sum()) / pairs if pairs else 0.0

    def visible(self, query: int) -> Tensor:
        """(layers, query + 1) bool: the tokens up to a query that it sees, itself among them."""
        return self.expires[:, : query + 1] > query

    def save(self, path: Path) -> None:
        """Write it as one safetensors file, whole or not at all."""
        about = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name not in TENSORS
        }
        tensors = {name: getattr(self, name).contiguous() for name in TENSORS}
        with whole(path) as temporary:
            try:
                save_file(tensors, temporary, metadata={"trace": json.dumps(about)})
            except SafetensorError as error:
                raise CtxpruneError(f"`{path}` cannot be written: {error}") from error

    @classmethod
    def load(cls, path: Path) -> Trace:
        """Read what `save` wrote.

        Raises:
            CtxpruneError: no trace.
        """
        try:
            with safe_open(path, framework="pt") as file:
                about = json.loads(file.metadata()["trace"])
                tensors = {name: file.get_tensor(name) for name in TENSORS}
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise CtxpruneError(f"`{path}` is no trace: {error}") from error
        return cls(**{**about, "pieces": tuple(about["pieces"])}, **tensors)


def pieces_of(
    tokenizer: PreTrainedTokenizerBase, text: str, tokens: int | None = None
) -> tuple[list[int], tuple[str, ...]]:
    """Ids of a text, at most `tokens` of them, and the piece of text that each stands for.

    Raises:
        CtxpruneError: there is no text.
    """
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids: list[int] = encoded["input_ids"][:tokens]
    if not ids:
        raise CtxpruneError("the text is empty", "give a text of at least one token")
    pieces, done = [], 0
    for _, end in encoded["offset_mapping"][: len(ids)]:
        end = max(end, done)  # tokens of one character share its place: the first one has it
        pieces.append(text[done:end])
        done = end
    return ids, tuple(pieces)


@torch.no_grad()
def trace(
    model: PreTrainedModel,
    ids: Sequence[int],
    pieces: Sequence[str],
    policy: str = "gate",
    sparsity: float = 0.8,
    *,
    name: str = "",
) -> Trace:
    """Read a text once, in a batch of its own, and note what leaves.

    Args:
        model: from `load`; its handle is left switched to this policy, without a cap on rows.
        ids, pieces: of `pieces_of`. policy: which one decides. sparsity: level in [0, 1).
        name: what the trace calls the model.

    Raises:
        CtxpruneError: unknown policy, sparsity out of range, or more tokens than positions.
    """
    handle = handle_of(model)
    handle.use(policy, sparsity, context=len(ids), max_rows=0)
    evicts_every = handle.evicts_every
    dense = handle.policy is None
    watched = _Watched(handle.policy or Policy(), len(handle.gates), len(ids))
    handle.use(watched, sparsity, max_rows=0)
    cache = handle.cache(record=True)
    model(torch.tensor([list(ids)], device=model.device), past_key_values=cache, logits_to_keep=1)
    assert isinstance(cache, PrunedCache) and cache.expires is not None
    expires = torch.cat(cache.expires).cpu().clamp_max(len(ids))
    dropper = watched.dropper.cpu()
    if not watched.digests:
        # A budget is kept after a token, the other policies decide before a query looks.
        dropper = expires - (0 if watched.budget is None else 1)
    return Trace(
        model=name,
        policy="dense" if dense else policy,
        requested=sparsity,
        evicts_every=evicts_every,
        pieces=tuple(pieces),
        expires=expires,
        dropper=dropper.masked_fill(expires == len(ids), -1),
        attention=watched.attention.cpu(),
    )


class _Watched(Policy):
    """A policy that decides what another one decides, and notes why; for a single sequence.

    Args:
        policy: the one that decides. layers: of the model. tokens: of the text.
    """

    needs_weights = True

    def __init__(self, policy: Policy, layers: int, tokens: int) -> None:
        self._policy = policy
        self.columns = policy.columns
        self.digests = policy.digests
        self.budget = policy.budget
        self.dropper = torch.full((layers, tokens), -1)
        self.attention = torch.zeros(layers, tokens)

    def annotate(self, layer: int, hidden: Tensor) -> dict[str, Tensor]:
        """As the policy does."""
        return self._policy.annotate(layer, hidden)

    def keep(self, layer: int, table: Table, block: Block) -> Tensor | None:
        """As the policy does."""
        return self._policy.keep(layer, table, block)

    def observe(self, layer: int, table: Table, block: Block, weights: Tensor) -> None:
        """Note the mean attention of the queries that see each row."""
        if self._policy.needs_weights:
            self._policy.observe(layer, table, block, weights)
        seeing = (weights > 0).sum(dim=1)
        mean = weights.sum(dim=1) / seeing.clamp_min(1)
        seen = seeing[0] > 0
        self.attention[layer, table.held[0, seen].cpu()] = mean[0, seen].float().cpu()

    def digest(self, layer: int, table: Table, block: Block) -> None:
        """Query by query, to see which one lowers a row's score."""
        newest = block.position.amax(dim=1, keepdim=True)
        before = self._policy.score(layer, table, newest, newest).clone()
        for query in range(block.position.shape[1]):
            part = slice(query, query + 1)
            notes = {name: note[:, part] for name, note in block.notes.items()}
            one = Block(block.position[:, part], notes, block.seen, block.padded)
            self._policy.digest(layer, table, one)
            after = self._policy.score(layer, table, newest, newest)
            lowered = (after < before)[0] & (table.held[0] >= 0)
            self.dropper[layer, table.held[0, lowered].cpu()] = int(one.position)
            before = after.clone()

    def score(self, layer: int, table: Table, newest: Tensor, limit: Tensor) -> Tensor:
        """As the policy does."""
        return self._policy.score(layer, table, newest, limit)


def overlap(one: Trace, other: Trace) -> float:
    """How alike two memories of a text are: pairs of query and token in both, over those in either.

    1 if both see the same; the pairs (j < k) are counted over all layers.

    Raises:
        CtxpruneError: they have not the same tokens and layers.
    """
    if one.expires.shape != other.expires.shape:
        raise CtxpruneError("two traces can only be compared on the same tokens and layers")
    start = torch.arange(one.tokens) + 1
    both = torch.minimum(one.expires, other.expires) - start
    either = torch.maximum(one.expires, other.expires) - start
    return int(both.sum()) / int(either.sum()) if int(either.sum()) else 1.0
