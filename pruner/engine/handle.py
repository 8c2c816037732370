"""The handle of a model: what it drops, and how that is told to a forward pass.

`attach` gives a loaded model a `Handle` as `model.ctxprune`, and its gates as submodules. With
nothing chosen the model runs its own attention, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from ctxprune.pruner import policies
from ctxprune.pruner.config import PROTOCOLS, PruneConfig, check_sparsity
from ctxprune.pruner.decoder import Decoder, decoder_of
from ctxprune.pruner.device import device_of
from ctxprune.pruner.engine import hooks
from ctxprune.pruner.engine.cache import BLOCK, PrunedCache
from ctxprune.pruner.engine.dense import DenseCache
from ctxprune.pruner.engine.modes import Evict, Mode, Off
from ctxprune.pruner.engine.usage import Usage
from ctxprune.pruner.errors import CtxpruneError, choose
from ctxprune.pruner.gate import Gate, gate_dtype

GATES = "ctxprune_gates"
# What `running` and `measure` say holds for the code inside them alone, also among threads.
_modes: ContextVar[tuple[tuple[int, Mode], ...]] = ContextVar("modes", default=())
_usages: ContextVar[tuple[tuple[int, Usage], ...]] = ContextVar("usages", default=())


class Handle:
    """What a model drops: a policy and a sparsity, chosen by `use`, or by `running` for a while.

    Attributes:
        decoder: what was derived of the model. config: of its gates.
        sparsity, max_rows, evict: as chosen. static: single tokens are placed by counts on the
            device, so that a compiled step serves all of them. block: queries a pass of attention.
        last_cache: the last one that was made.
    """

    def __init__(self, model: PreTrainedModel, decoder: Decoder, config: PruneConfig) -> None:
        self.decoder = decoder
        self.config = config
        self.model = model
        self.sparsity = 0.0
        self.max_rows: int | None = None
        self.evict: str = PROTOCOLS[0]
        self.static = False
        self.block = BLOCK
        self.last_cache: PrunedCache | None = None
        self._policy: str | policies.Policy = "gate"
        self._compiled: Any = None
        self._mode: Mode = Off()

    @property
    def gates(self) -> nn.ModuleList:
        """The gates in layer order: submodules of the model."""
        gates = getattr(self.model, GATES)
        assert isinstance(gates, nn.ModuleList)
        return gates

    @property
    def gate_list(self) -> list[Gate]:
        """The same, typed."""
        return [gate for gate in self.gates if isinstance(gate, Gate)]

    @property
    def levels(self) -> list[float]:
        """The calibrated levels of sparsity, rising."""
        return list(self.config.levels)

    @property
    def mode(self) -> Mode:
        """What a forward pass that begins now does."""
        for owner, mode in reversed(_modes.get()):
            if owner == id(self):
                return mode
        return self._mode

    @property
    def policy(self) -> policies.Policy | None:
        """Who decides in a forward pass that begins now; None: nobody."""
        mode = self.mode
        return mode.policy if isinstance(mode, Evict) else None

    def use(
        self,
        policy: str | policies.Policy = "gate",
        sparsity: float = 0.0,
        *,
        context: int | Sequence[int] | None = None,
        prompt: int | Sequence[int] | None = None,
        max_rows: int | None = None,
        evict: str = PROTOCOLS[0],
    ) -> None:
        """Choose what the following forward passes and generations drop.

        Args:
            policy: a name of `policies.names()`, or a policy that was made already.
            sparsity: share of the earlier tokens to drop, in [0, 1). At 0, without a cap, the
                model computes its own dense attention.
            context: tokens of the texts to come, for which the sparsity is met: one number, or one
                a sequence of the batch; None: the context that the model was tuned at.
            prompt: how many of them are the prompt, where `evict` asks for it; None: all.
            max_rows: cap on the rows of a sequence in a layer, at every moment; None: the one of
                the model's configuration; 0: none.
            evict: `reading`: rows leave while a prompt is read; `prompt`: not before its end.

        Raises:
            CtxpruneError: unknown policy, sparsity or cap out of range, or gates that were not
                tuned.
        """
        check_sparsity(sparsity)
        choose("value of evict", evict, PROTOCOLS)
        if isinstance(policy, str):
            choose("policy", policy, policies.names())
        max_rows = self.config.cap(max_rows)
        if max_rows is not None and evict == "prompt":
            raise CtxpruneError(
                "a cap on rows holds at every moment, and a prompt that is read whole breaks it",
                "give `--evict reading`, or no cap",
            )
        before = self._policy, self.sparsity, self.max_rows, self.evict
        self._policy, self.sparsity, self.max_rows, self.evict = policy, sparsity, max_rows, evict
        try:
            self._mode = self.at(self.config.context if context is None else context, prompt)
        except CtxpruneError:
            self._policy, self.sparsity, self.max_rows, self.evict = before
            raise

    def at(self, context: int | Sequence[int], prompt: int | Sequence[int] | None = None) -> Mode:
        """The mode of what was chosen, for texts of other lengths; arguments as in `use`."""
        if isinstance(self._policy, policies.Policy):
            return Evict(self._policy, self.dial)
        if self.sparsity == 0.0 and self.max_rows is None:
            return Off()
        contexts = (context,) if isinstance(context, int) else tuple(context)
        prompts: tuple[int, ...] = (0,)
        if self.evict == "prompt":
            whole = contexts if prompt is None else prompt
            prompts = (whole,) if isinstance(whole, int) else tuple(whole)
        request = policies.Request(
            self.sparsity, contexts, self.config, self.gate_list, self.max_rows, prompts
        )
        return Evict(policies.make(self._policy, request), self.dial)

    @property
    def dial(self) -> str:
        """What was chosen, in words."""
        name = self._policy if isinstance(self._policy, str) else type(self._policy).__name__
        cap = "" if self.max_rows is None else f", at most {self.max_rows} rows"
        late = ", after the prompt" if self.evict == "prompt" else ""
        return f"`{name}` at sparsity {self.sparsity:g}{cap}{late}"

    @contextmanager
    def running(self, mode: Mode) -> Iterator[None]:
        """Run forward passes in a mode inside: `Off()`, `Evict(policy)` or a `SoftAttention`."""
        token = _modes.set((*_modes.get(), (id(self), mode)))
        try:
            yield
        finally:
            _modes.reset(token)

    @contextmanager
    def compiled(self) -> Iterator[None]:
        """Run single tokens through `torch.compile` inside, dense or evicting; prompts as they are.

        Shapes are static: a step is compiled once for a batch, and serves until pages change.
        """
        decoder: Any = self.decoder.module
        eager = decoder.forward
        if self._compiled is None:
            self._compiled = torch.compile(eager, dynamic=False)
        step = self._compiled

        def forward(*args: Any, **kwargs: Any) -> Any:
            tokens: Any = kwargs.get("input_ids")
            tokens = kwargs.get("inputs_embeds") if tokens is None else tokens
            return (step if tokens.shape[1] == 1 else eager)(*args, **kwargs)

        decoder.forward, self.static = forward, True
        try:
            yield
        finally:
            decoder.forward, self.static = eager, False

    @contextmanager
    def measure(self) -> Iterator[Usage]:
        """Add up what all forward passes inside attend to.

        A cache sparsity is noted for every forward pass without a cache of the caller's, that is
        for every text scored in one pass.
        """
        usage = Usage()
        token = _usages.set((*_usages.get(), (id(self), usage)))
        try:
            yield usage
        finally:
            _usages.reset(token)

    @property
    def evicts_every(self) -> int:
        """Tokens of a sequence between two eviction steps at most; 0 while nothing is evicted."""
        policy = self.policy
        return 0 if policy is None or policy.rows is None else policy.rows.longest

    def cache(self, *, record: bool = False) -> PrunedCache | DynamicCache:
        """A fresh cache for what was chosen; `record` as in `PrunedCache`."""
        mode = self.mode
        return (
            self.new_cache(mode, record=record) if isinstance(mode, Evict) else self.dense_cache()
        )

    def dense_cache(self) -> DynamicCache:
        """The model's own cache; written in place, where its layers are nothing but rows."""
        own = DynamicCache(config=self.decoder.config)
        return DenseCache() if all(type(layer) is DynamicLayer for layer in own.layers) else own

    def new_cache(self, mode: Evict, *, record: bool = False) -> PrunedCache:
        """A cache for a mode."""
        usage = next((u for owner, u in reversed(_usages.get()) if owner == id(self)), None)
        self.last_cache = PrunedCache(
            mode.policy,
            self.decoder,
            dial=mode.dial,
            block=self.block,
            usage=usage,
            record=record,
        )
        return self.last_cache


def attach(model: PreTrainedModel, gates: nn.ModuleList, config: PruneConfig) -> Handle:
    """Give a model its gates, and make it able to evict. Returns `model.ctxprune`, switched off.

    Each gate goes to the device of its layer, and computes in float32 at least.

    Raises:
        CtxpruneError: the model is not supported, or the gates do not fit it.
    """
    decoder = decoder_of(model)
    count, width = len(decoder.gated), decoder.width
    widths = {gate.query.in_features for gate in gates if isinstance(gate, Gate)}
    if len(gates) != count or widths != {width}:
        raise CtxpruneError(
            f"these gates do not fit the model: {len(gates)} gates of width "
            f"{sorted(widths)} for {count} layers of width {width}",
            "convert the model again",
        )
    for gate, layer in zip(gates, decoder.gated, strict=True):
        gate.to(device=device_of(layer.attention), dtype=gate_dtype(model.dtype))
    hooks.enroll(decoder.config)
    handle = Handle(model, decoder, config)
    model.add_module(GATES, gates)
    # The gates have a file of their own: any other tool loads the folder as a plain dense model.
    ignored = [
        *(model._keys_to_ignore_on_save or []),
        *(f"{GATES}.{n}" for n in gates.state_dict()),
    ]
    object.__setattr__(model, "_keys_to_ignore_on_save", ignored)
    for module in dict.fromkeys((decoder.module, model.base_model)):
        entry = hooks.Entry(handle, module)
        module.register_forward_pre_hook(entry.before, with_kwargs=True)
        module.register_forward_hook(entry.after, with_kwargs=True)
    for number, layer in enumerate(decoder.layers):
        if decoder.config.model_type in hooks.WITHHOLDING:
            layer.block.register_forward_pre_hook(hooks.carry_turn, with_kwargs=True)
        hook = partial(hooks.give_turn, number)
        layer.attention.register_forward_pre_hook(hook, with_kwargs=True)
    object.__setattr__(model, "ctxprune", handle)
    object.__setattr__(model, "generate", entry.generate)
    return handle


def handle_of(model: nn.Module) -> Handle:
    """The handle that `attach` gave a model, typed."""
    handle = model.ctxprune
    assert isinstance(handle, Handle), "the model was not attached"
    return handle


def new_gates(model: PreTrainedModel, config: PruneConfig, seed: int = 0) -> nn.ModuleList:
    """Fresh gates for a model, float32: their margins are those of "sinks + window" until tuned."""
    decoder = decoder_of(model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.ModuleList(Gate(decoder.width, config.rank) for _ in decoder.gated)
