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

from ctxprune.pruner.device import input_device
from ctxprune.pruner.engine.handle import handle_of
from ctxprune.pruner.engine.modes import Evict
from ctxprune.pruner.engine.page import Held, Queries
from ctxprune.pruner.errors import CtxpruneError, translated
from ctxprune.pruner.files import whole
from ctxprune.pruner.policies import Policy
from ctxprune.pruner.rows import Rows, unlimited
from ctxprune.pruner.untrusted import check_text

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
            scored it least, if the policy judges by query (gate), else the last one read before
            it left; -1 if it did not.
        attention: (layers, n) float32, mean attention a query, over heads, that token j got from
            the last queries that saw it: those between two eviction steps, or up to the end.
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
            save_file(tensors, temporary, metadata={"trace": json.dumps(about)})

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
    check_text(text, "the text")
    with translated("this tokenizer does not tell which piece of the text a token stands for"):
        encoded = tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
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
    mode = Evict(watched)
    cache = handle.new_cache(mode, record=True)
    with handle.running(mode):
        tokens = torch.tensor([list(ids)], device=input_device(model))
        model(tokens, past_key_values=cache, logits_to_keep=1)
    assert cache.expires is not None
    expires = torch.cat(cache.expires).cpu().clamp_max(len(ids))
    # A row that no query gave a margin before it left did so for the last one.
    dropper = torch.where(watched.dropper >= 0, watched.dropper, expires - 1)
    return Trace(
        model=name,
        policy="dense" if dense else policy,
        requested=sparsity,
        evicts_every=evicts_every,
        pieces=tuple(pieces),
        expires=expires,
        dropper=dropper.masked_fill(expires == len(ids), -1),
        attention=watched.attention,
    )


class _ToTheEnd(Rows):
    """The rows of a policy; after the last token it is asked once more, and all of them stay."""

    def __init__(self, rows: Rows, tokens: int) -> None:
        self.__dict__.update(vars(rows))
        self._tokens = tokens

    def step(self, layer: int, sequence: int, seen: int) -> int:
        """As the rows have it, and at the last token."""
        step = super().step(layer, sequence, seen)
        return min(step, self._tokens) if seen < self._tokens else step

    def after(self, layer: int, sequence: int, seen: int) -> int:
        """As the rows have it; all of them, where they have no step."""
        due = super().step(layer, sequence, seen - 1) == seen
        return super().after(layer, sequence, seen) if due else seen


class _Watched(Policy):
    """A policy that decides what another one decides, and notes why; for a single sequence.

    Args:
        policy: the one that decides. layers: of the model. tokens: of the text.
    """

    watches = True

    def __init__(self, policy: Policy, layers: int, tokens: int) -> None:
        self._policy = policy
        self.columns = policy.columns
        self.fresh = policy.fresh
        self.rows = _ToTheEnd(policy.rows or Rows([unlimited(layers)]), tokens)
        self.dropper = torch.full((layers, tokens), -1)
        self.attention = torch.zeros(layers, tokens)

    def annotate(self, layer: int, hidden: Tensor) -> Tensor | None:
        """As the policy does."""
        return self._policy.annotate(layer, hidden)

    def remember(self, layer: int, held: Held, queries: Queries) -> None:
        """As the policy does."""
        self._policy.remember(layer, held, queries)

    def score(self, layer: int, held: Held, queries: Queries) -> Tensor:
        """As the policy does; notes attention, and who lowered margins."""
        seeing = (queries.position[0, :, None] >= held.position[0]).sum(dim=0)
        mean = queries.weights[0].sum(dim=0) / seeing
        rows = held.position[0] >= 0
        self.attention[layer, held.position[0, rows].cpu()] = mean[rows].float().cpu()
        if "margin" in held.columns:
            self._judge(layer, held, queries)
        return self._policy.score(layer, held, queries)

    def _judge(self, layer: int, held: Held, queries: Queries) -> None:
        """Ask query by query, to see which one lowers a margin, and leave the columns as before."""
        columns = {name: column.clone() for name, column in held.columns.items()}
        before = columns["margin"]
        for query in range(queries.position.shape[1]):
            self._policy.score(layer, held, queries.part(query, query + 1))
            after = held.columns["margin"].clone()
            lowered = held.position[0, ((after < before) & (held.position >= 0))[0]]
            self.dropper[layer, lowered.cpu()] = int(queries.position[0, query])
            before = after
        for name, column in columns.items():
            held.columns[name].copy_(column)


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
