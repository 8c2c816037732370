"""The engine in a model: hooks that let a transformers model evict while it reads and writes.

`attach` gives a loaded model a `Handle` as `model.ctxprune`. Nothing in the model's own modules
or weights changes: with the engine off it runs its own attention, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, DynamicCache, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from ctxprune.pruner import policies
from ctxprune.pruner.config import PruneConfig, check_max_rows, check_sparsity
from ctxprune.pruner.engine.attend import BLOCK, Tally, attend
from ctxprune.pruner.engine.cache import PrunedCache
from ctxprune.pruner.engine.dense import DenseCache, dense_attention
from ctxprune.pruner.engine.soft import SoftAttention
from ctxprune.pruner.errors import CtxpruneError, choose
from ctxprune.pruner.families import Family, family_of
from ctxprune.pruner.gate import Gate

NAME = "ctxprune"
OFF = "ctxprune-off"
DENSE = "sdpa"


class Usage:
    """What the model attended to while it was measured."""

    def __init__(self) -> None:
        self.tally = Tally()
        self.cache_sparsities: list[tuple[float, int]] = []

    @property
    def pairs(self) -> int:
        """Pairs (j < k), over layers and sequences."""
        return int(self.tally.pairs)

    @property
    def evicted(self) -> int:
        """Pairs whose token j was gone when query k looked."""
        return self.pairs - int(self.tally.kept)

    @property
    def sparsity(self) -> float:
        """Share of the earlier tokens that were gone when a query looked (design: hard I)."""
        return self.evicted / self.pairs if self.pairs else 0.0

    @property
    def capped(self) -> float:
        """Share of the times that the cap on rows was asked at which it made some leave."""
        borders = int(self.tally.borders)
        return int(self.tally.capped) / borders if borders else 0.0

    @property
    def cache_sparsity(self) -> float:
        """Share of the tokens that were gone at the end of their text, weighted by tokens."""
        total = sum(tokens for _, tokens in self.cache_sparsities)
        return sum(s * n for s, n in self.cache_sparsities) / total if total else 0.0


@dataclass
class _Call:
    """What the attention function needs to know of the module it runs in, noted by a hook."""

    handle: Handle
    layer: int
    hidden: Tensor | None = None
    cache: PrunedCache | None = None


class Handle:
    """The switch of a model: which policy it runs, at which sparsity."""

    def __init__(
        self, model: PreTrainedModel, family: Family, gates: nn.ModuleList, config: PruneConfig
    ) -> None:
        self.family = family
        self.gates = gates
        self.config = config
        self.policy: policies.Policy | None = None
        self._chosen: str | policies.Policy = "gate"
        self.sparsity = 0.0
        self.max_rows: int | None = None
        self.soft: SoftAttention | None = None
        self.last_cache: PrunedCache | None = None
        self.block = BLOCK
        self.model = model
        self._usage: Usage | None = None
        self._scored: PrunedCache | None = None  # the cache that this forward pass brought itself

    @property
    def levels(self) -> list[float]:
        """The calibrated levels of sparsity, rising."""
        return list(self.config.levels)

    @property
    def gate_list(self) -> list[Gate]:
        """The gates in layer order."""
        return [gate for gate in self.gates if isinstance(gate, Gate)]

    def use(
        self,
        policy: str | policies.Policy = "gate",
        sparsity: float = 0.0,
        *,
        context: int | Sequence[int] | None = None,
        max_rows: int | None = None,
    ) -> None:
        """Choose what the following forward passes and generations drop.

        Args:
            policy: a name of `policies.names()`, or a policy that was made already.
            sparsity: share of the earlier tokens to drop, in [0, 1). At 0, without a cap, the
                engine is off and the model computes its own dense attention.
            context: tokens of the texts to come, for which the sparsity is met: one number, or one
                a sequence of the batch; None: the context that the model was tuned at.
            max_rows: cap on the rows of a sequence in a layer, at every moment; None: the one of
                the model's configuration; 0: none.

        Raises:
            CtxpruneError: unknown policy, sparsity or cap out of range, or gates that were not
                tuned.
        """
        check_sparsity(sparsity)
        self.max_rows = self.cap_of(max_rows)
        self.sparsity = sparsity
        self._chosen = policy
        if isinstance(policy, str):
            choose("policy", policy, policies.names())
        self.policy = self._policy_for(self.config.context if context is None else context)
        self._switch()

    @contextmanager
    def fitted(self, context: int | Sequence[int]) -> Iterator[None]:
        """Meet the chosen sparsity at another length of text, as `use` has it, inside."""
        with self.trying(self._policy_for(context)):
            yield

    @contextmanager
    def trying(self, policy: policies.Policy | None) -> Iterator[None]:
        """Run another policy than the chosen one inside; None: the model's own dense attention."""
        chosen, self.policy = self.policy, policy
        self._switch()
        try:
            yield
        finally:
            self.policy = chosen
            self._switch()

    def _policy_for(self, context: int | Sequence[int]) -> policies.Policy | None:
        if isinstance(self._chosen, policies.Policy):
            return self._chosen
        if self.sparsity == 0.0 and self.max_rows is None:
            return None
        contexts = (context,) if isinstance(context, int) else tuple(context)
        request = policies.Request(self.sparsity, contexts, self.config, self.gate_list)
        return policies.make(self._chosen, request)

    def cap_of(self, max_rows: int | None) -> int | None:
        """The cap that a `max_rows` of `use` stands for, None where there is none.

        Raises:
            CtxpruneError: it is too small.
        """
        rows = (self.config.max_rows if max_rows is None else max_rows) or None
        if rows is not None:
            check_max_rows(rows, self.config.protect_first + self.config.protect_recent)
        return rows

    @property
    def evicts_every(self) -> int:
        """Tokens of a sequence between two evictions at most; 0 while nothing is evicted."""
        if self.policy is None:
            return 0
        budget = self.policy.budget
        return 1 if budget is None else max(max(periods) for periods in budget.periods)

    def cache(self, *, record: bool = False) -> PrunedCache | DenseCache:
        """A fresh cache for what was chosen; `record` as in `PrunedCache`."""
        if self.policy is None:
            return DenseCache()
        return self._pruned_cache(self.policy, record=record)

    def _pruned_cache(self, policy: policies.Policy, *, record: bool = False) -> PrunedCache:
        self.last_cache = PrunedCache(
            policy,
            len(self.gates),
            block=self.block,
            max_rows=self.max_rows,
            tally=self._usage.tally if self._usage else None,
            record=record,
        )
        return self.last_cache

    @contextmanager
    def measure(self) -> Iterator[Usage]:
        """Add up what all forward passes inside attend to.

        A cache sparsity is noted for every forward pass without a cache of the caller's, that is
        for every text scored in one pass.
        """
        assert self._usage is None, "measure() is not reentrant"
        self._usage = Usage()
        try:
            yield self._usage
        finally:
            self._usage = None

    @contextmanager
    def training(self, soft: SoftAttention | None) -> Iterator[None]:
        """Run forward passes with all pairs at once, as training does; None: dense."""
        policy, self.policy, self.soft = self.policy, None, soft
        self._switch()
        try:
            yield
        finally:
            self.policy, self.soft = policy, None
            self._switch()

    def _switch(self) -> None:
        active = self.policy is not None or self.soft is not None
        self.model.config._attn_implementation = NAME if active else OFF

    def before_forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Hook: see that a pruned forward pass has a cache, and that the cache knows positions."""
        past = kwargs.get("past_key_values")
        if self.policy is None:
            if type(past) is DynamicCache and past.get_seq_length() == 0:
                kwargs["past_key_values"] = DenseCache()
            return
        ids = args[0] if args else kwargs.get("input_ids")
        tokens = ids if ids is not None else kwargs["inputs_embeds"]
        batch, length = tokens.shape[:2]
        mask = kwargs.get("attention_mask")
        if mask is not None and mask.dim() != 2:
            raise CtxpruneError("a pruned model takes attention masks of shape (batch, tokens)")
        if isinstance(past, PrunedCache):
            cache = past
        else:
            if past is not None and past.get_seq_length() > 0:
                raise CtxpruneError(
                    "a dense cache cannot be pruned after the fact",
                    "start from an empty cache, or pass `model.ctxprune.cache()`",
                )
            cache = self._pruned_cache(self.policy)
            kwargs["past_key_values"] = self._scored = cache
            kwargs["use_cache"] = True
        if self.family.bounded:
            limit = self.model.config.max_position_embeddings
            if cache.get_seq_length() + length > limit:
                raise CtxpruneError(
                    f"this model has positions for {limit} tokens, not "
                    f"{cache.get_seq_length() + length}",
                    "shorten the text, or use a model with rotary positions",
                )
        cache.advance(batch, length, mask, tokens.device)
        if mask is not None and "position_ids" not in kwargs and cache.get_seq_length() == 0:
            # Left padding: as `generate` does, count from the first real token.
            kwargs["position_ids"] = (mask.long().cumsum(-1) - 1).clamp_min(0)

    def after_forward(self) -> None:
        """Hook: note how much of a text is left at its end."""
        cache, self._scored = self._scored, None
        if self._usage is not None and cache is not None and cache.tokens is not None:
            self._usage.cache_sparsities.append((cache.sparsity, int(cache.tokens.sum())))


def attach(model: PreTrainedModel, gates: nn.ModuleList, config: PruneConfig) -> Handle:
    """Give a model its gates, and make it able to evict. Returns `model.ctxprune`, switched off.

    Raises:
        CtxpruneError: the family is not supported, or the gates do not fit the model.
    """
    family = family_of(model.config)
    attentions = family.attentions(model)
    hidden_size = model.config.hidden_size
    widths = {gate.query.in_features for gate in gates if isinstance(gate, Gate)}
    if len(gates) != len(attentions) or widths != {hidden_size}:
        raise CtxpruneError(
            f"these gates do not fit the model: {len(gates)} gates of width "
            f"{sorted(widths)} for {len(attentions)} layers of width {hidden_size}",
            "convert the model again",
        )
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, _no_mask)
    AttentionInterface.register(OFF, dense_attention)
    AttentionMaskInterface.register(OFF, sdpa_mask)
    handle = Handle(model, family, gates, config)
    for layer, attention in enumerate(attentions):
        object.__setattr__(attention, "_ctxprune_call", _Call(handle, layer))
        attention.register_forward_pre_hook(_note_call, with_kwargs=True)
    model.register_forward_pre_hook(_model_hook(handle), with_kwargs=True)
    model.register_forward_hook(lambda *_: handle.after_forward())
    object.__setattr__(model, "ctxprune", handle)
    return handle


def handle_of(model: nn.Module) -> Handle:
    """The handle that `attach` gave a model, typed."""
    handle = model.ctxprune
    assert isinstance(handle, Handle), "the model was not attached"
    return handle


def new_gates(model: PreTrainedModel, config: PruneConfig, seed: int = 0) -> nn.ModuleList:
    """Fresh gates for a model, float32: their margins are those of "sinks + window" until tuned."""
    count = len(family_of(model.config).attentions(model))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.ModuleList(Gate(model.config.hidden_size, config.rank) for _ in range(count))


def _model_hook(handle: Handle) -> Callable[..., tuple[tuple[Any, ...], dict[str, Any]]]:
    def hook(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        handle.before_forward(args, kwargs)
        return args, kwargs

    return hook


def _call_of(module: nn.Module) -> _Call:
    call = module._ctxprune_call
    assert isinstance(call, _Call)
    return call


def _note_call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    call = _call_of(module)
    call.hidden = args[0] if args else kwargs["hidden_states"]
    cache = kwargs.get("past_key_values")
    call.cache = cache if isinstance(cache, PrunedCache) else None


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """Masks come from the tables, layer by layer."""


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """The attention function that transformers calls: shapes (b, h, n, d); returns (b, n, h, d)."""
    call = _call_of(module)
    handle = call.handle
    hidden, cache = call.hidden, call.cache
    call.hidden = call.cache = None
    assert hidden is not None
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if handle.soft is not None:
        gate = handle.gate_list[call.layer]
        soft = handle.soft
        out = soft.attend(module, gate, call.layer, query, key, value, hidden, scale=scale)
    else:
        assert cache is not None and cache.reading is not None
        out = attend(
            cache.table(call.layer),
            cache.policy,
            call.layer,
            query,
            key,
            value,
            hidden,
            cache.reading,
            scale=scale,
            waiting=cache.layer(call.layer).waiting,
            expires=cache.expiry(call.layer),
        )
    return out.transpose(1, 2).contiguous(), None
