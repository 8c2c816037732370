"""How attention that evicts gets into a transformers model, and what a caller may ask of it.

A hook on the decoder reads the arguments of a forward pass, sees to its cache, and hands the mode
on as one more keyword argument, `turn`; a hook on each attention module adds the layer and its
input; the registered attention function takes the turn. Nothing is noted on modules and nothing is
switched on the configuration, so threads, copies and recomputed layers do not meet.
"""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer, StaticCache
from transformers.masking_utils import AttentionMaskInterface, eager_mask, sdpa_mask

from ctxprune.pruner.engine.cache import PrunedCache
from ctxprune.pruner.engine.dense import DenseCache, DenseLayer, dense_attention
from ctxprune.pruner.engine.modes import Evict, Off, Turn
from ctxprune.pruner.engine.soft import SoftAttention
from ctxprune.pruner.errors import CtxpruneError

if TYPE_CHECKING:
    from ctxprune.pruner.engine.handle import Handle

PREFIX = "ctxprune-"
# What transformers calls the cache of a forward pass before 5.24, and takes ever after.
OLD_NAME = "past_key_values"
MASKS: dict[str, Callable[..., Any]] = {"sdpa": sdpa_mask, "eager": eager_mask}


def enroll(config: PreTrainedConfig) -> None:
    """Have a model run our attention in the place of its own, `sdpa` or `eager`.

    Raises:
        CtxpruneError: it runs another one.
    """
    dense = str(config._attn_implementation)
    if dense.startswith(PREFIX):
        return
    if dense not in MASKS:
        raise CtxpruneError(
            f"attention implementation `{dense}` is not supported", "load the model with `sdpa`"
        )
    name = f"{PREFIX}{dense}"
    AttentionInterface.register(name, {"sdpa": _sdpa, "eager": _eager}[dense])
    AttentionMaskInterface.register(name, {"sdpa": _sdpa_mask, "eager": _eager_mask}[dense])
    config._attn_implementation = name


class Entry:
    """The hooks of a decoder, which begin and end a forward pass, and of `generate`."""

    def __init__(self, handle: Handle, decoder: nn.Module) -> None:
        self.handle = handle
        self.names = [
            name
            for name, parameter in inspect.signature(decoder.forward).parameters.items()
            if parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
        ]
        self.past = "cache" if "cache" in self.names else OLD_NAME

    def before(
        self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """See to the cache, and add the turn."""
        handle, mode = self.handle, self.handle.mode
        kwargs = self._named({**dict(zip(self.names, args, strict=False)), **kwargs})
        past = kwargs.get(self.past)
        if isinstance(mode, Off):
            _write_in_place(past)
            return (), kwargs
        enroll(handle.model.config)
        cache = None
        if isinstance(mode, Evict):
            _check_training(decoder)
            cache = kwargs[self.past] = _begin(handle, mode, past, kwargs)
            if cache.length is not None and kwargs.get("position_ids") is not None:
                # The pages know what may be seen, and a compiled step guards on a mask's length.
                kwargs["attention_mask"] = None
        turn = Turn(mode, handle.gate_list, cache, scored=past is None)
        return (), {**kwargs, "turn": turn}

    def after(
        self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        """Hold the eviction steps that single tokens reached."""
        turn = kwargs.get("turn")
        if turn is None or turn.cache is None:
            return output
        cache = turn.cache
        cache.finish()
        if turn.scored and cache.usage is not None:
            cache.usage.end(cache.rows, cache.seen)
        wanted = kwargs.get("use_cache")
        if wanted is None:
            wanted = self.handle.model.config.use_cache
        if turn.scored and not wanted:
            # The caller wants none, and `generate` would go on with one that it gets.
            if isinstance(output, tuple):
                return tuple(part for part in output if part is not cache)
            setattr(output, self.past, None)
        return output

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own `generate`, on a cache of ours where rows leave.

        Raises:
            CtxpruneError: the text would go beyond the learned positions.
        """
        handle, mode, kwargs = self.handle, self.handle.mode, self._named(kwargs)
        sources = kwargs.get("generation_config"), handle.model.generation_config

        def setting(name: str) -> Any:
            values = [kwargs.get(name), *(getattr(source, name, None) for source in sources)]
            return next((value for value in values if value is not None), None)

        given = [*args[:1], *(kwargs.get(n) for n in ("inputs", "input_ids", "inputs_embeds"))]
        tokens = next((tensor.shape[1] for tensor in given if tensor is not None), 0)
        new = setting("max_new_tokens")
        longest = (setting("max_length") or 0) if new is None else tokens + new
        # The last token is written, but not read.
        _check_positions(handle, max(longest - 1, tokens))
        if isinstance(mode, Evict) and setting("use_cache") is not False:
            # Ours from the start: transformers makes masks of its own for a static one.
            kwargs[self.past] = _pruned(handle, mode, kwargs.get(self.past))
            if setting("cache_implementation") is not None:
                kwargs["cache_implementation"] = None
        own: Any = type(handle.model)
        return own.generate(handle.model, *args, **kwargs)

    def _named(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The same, with the cache under the name that this version of transformers has for it."""
        return {self.past if name == OLD_NAME else name: value for name, value in kwargs.items()}


def give_turn(
    layer: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Hook of an attention module: its layer and its input (b, n, hidden_size)."""
    turn = kwargs.get("turn")
    if turn is None:
        return args, kwargs
    hidden = args[0] if args else kwargs["hidden_states"]
    return args, {**kwargs, "turn": turn.at(layer, hidden)}


def _begin(handle: Handle, mode: Evict, past: Any, kwargs: dict[str, Any]) -> PrunedCache:
    """The cache of an evicting pass, begun; checks what the caller asks for.

    Raises:
        CtxpruneError: for what an evicting model cannot do.
    """
    ids = kwargs.get("input_ids")
    tokens = ids if ids is not None else kwargs.get("inputs_embeds")
    if tokens is None:
        raise CtxpruneError("give either `input_ids` or `inputs_embeds`")
    batch, length = tokens.shape[:2]
    if kwargs.get("output_attentions") or handle.model.config.output_attentions:
        raise CtxpruneError(
            "an evicting model has no attention matrix to give: its rows are not all tokens",
            "ask for `output_attentions` at sparsity 0, or see `ctxprune inspect`",
        )
    cache = _pruned(handle, mode, past)
    _check_positions(handle, cache.columns + length)
    mask = _new_part(kwargs.get("attention_mask"), cache, length)
    _check_packing(kwargs.get("position_ids"), mask, length)
    cache.begin(batch, length, mask, static=handle.static)
    return cache


def _pruned(handle: Handle, mode: Evict, past: Any) -> PrunedCache:
    """A pruned cache, in the object that the caller brought, if any."""
    if past is None:
        return handle.new_cache(mode)
    if isinstance(past, PrunedCache) and (past.seen or past.dial == mode.dial):
        if past.dial != mode.dial:
            raise CtxpruneError(
                f"this cache was begun with {past.dial}, not with {mode.dial}",
                "go on as it was begun, or start with an empty cache",
            )
        if not torch.is_inference_mode_enabled() and any(p.key.is_inference() for p in past.pages):
            # What was made in that mode cannot be written outside of it.
            PrunedCache.adopt(past, copy.deepcopy(past))
        return past
    if type(past) not in (DynamicCache, StaticCache, DenseCache, PrunedCache):
        raise CtxpruneError(
            f"an evicting model cannot use a `{type(past).__name__}`",
            "leave the cache out, or pass `model.ctxprune.cache()`",
        )
    if past.layers and int(past.get_seq_length()) > 0:
        raise CtxpruneError(
            "a dense cache cannot be pruned after the fact",
            "start from an empty cache, or pass `model.ctxprune.cache()`",
        )
    handle.last_cache = PrunedCache.adopt(past, handle.new_cache(mode))
    return handle.last_cache


def _write_in_place(past: Any) -> None:
    """Have the cache of a dense pass written in place.

    Raises:
        CtxpruneError: it has rows missing.
    """
    if isinstance(past, PrunedCache):
        if past.seen:
            raise CtxpruneError(
                f"this cache was begun with {past.dial}; at sparsity 0 its missing rows cannot "
                "come back",
                "go on as it was begun, or start with an empty cache",
            )
        past.__class__ = DenseCache  # type: ignore[assignment]
        past.__dict__ = vars(DenseCache())
    elif isinstance(past, DynamicCache) and not past.offloading:
        if past.layer_class_to_replicate is DynamicLayer:
            past.layer_class_to_replicate = DenseLayer
        past.layers = [
            DenseLayer() if type(layer) is DynamicLayer and not layer.is_initialized else layer
            for layer in past.layers
        ]


def _check_training(decoder: nn.Module) -> None:
    """Raise CtxpruneError where a model that evicts is trained."""
    if decoder.training and torch.is_grad_enabled():
        raise _no_gradient()


def _no_gradient() -> CtxpruneError:
    return CtxpruneError(
        "an evicting model has no gradient: what it dropped is gone",
        "train with `ctxprune tune`, or at sparsity 0",
    )


def _check_positions(handle: Handle, tokens: int) -> None:
    """Raise CtxpruneError beyond the learned positions of a model."""
    limit = handle.positions
    if limit is not None and tokens > limit:
        raise CtxpruneError(
            f"this model has positions for {limit} tokens, not {tokens}",
            "shorten the text, or use a model with rotary positions",
        )


def _new_part(mask: Any, cache: PrunedCache, length: int) -> Tensor | None:
    """The part (b, length) of an attention mask that is about the new tokens; None: all are real.

    Raises:
        CtxpruneError: the mask has another shape, or hides tokens that were read before.
    """
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        raise CtxpruneError("a pruned model takes attention masks of shape (batch, tokens)")
    earlier = mask.shape[1] - length
    if earlier not in (0, cache.columns):
        raise CtxpruneError(
            f"the attention mask is about {mask.shape[1]} tokens; {cache.columns} were read, and "
            f"{length} are new"
        )
    real = mask.bool()
    whole = bool(real.all())
    shown = [earlier] * len(cache.seen) if whole else real[:, :earlier].sum(dim=1).tolist()
    if earlier and shown != cache.seen:
        raise CtxpruneError(
            "the attention mask hides tokens that were read before, or shows padding",
            "pass the mask with which they were read, and what is new behind it",
        )
    return None if whole else real[:, earlier:]


def _check_packing(position_ids: Any, mask: Tensor | None, length: int) -> None:
    """Raise CtxpruneError where positions start anew within a row: texts that are packed."""
    if length == 1 or not isinstance(position_ids, Tensor) or position_ids.dim() != 2:
        return
    steps = position_ids.diff(dim=1)
    odd = steps != 1
    if mask is not None:
        odd = odd & (mask[:, 1:] & mask[:, :-1])
    if bool(odd.any()):
        raise CtxpruneError(
            "an evicting model reads one text a row, and these positions do not rise by one",
            "give each text a row of its own, with an attention mask for the padding",
        )


class _NoGradient(torch.autograd.Function):
    """Lets a value through, and says so if somebody wants a gradient of it."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, *sources: Tensor) -> Tensor:
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise _no_gradient()


def _attend(
    turn: Turn,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float | None,
) -> Tensor:
    """Attention (b, n, h, d) of a layer's turn."""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    hidden = turn.hidden
    assert hidden is not None
    if isinstance(turn.mode, SoftAttention):
        gate = turn.gates[turn.layer]
        out = turn.mode.attend(module, gate, turn.layer, query, key, value, hidden, scale=scale)
        return out.transpose(1, 2).contiguous()
    assert turn.cache is not None
    with torch.no_grad():
        out = turn.cache.attend(turn.layer, query, key, value, hidden, scale)
        out = out.transpose(1, 2).contiguous()
    if torch.is_grad_enabled():
        sources = query, key, value, *turn.gates[turn.layer].parameters()
        out = _NoGradient.apply(out, *sources)  # type: ignore[no-untyped-call]
    return out


def _sdpa(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    turn: Turn | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention of a model that runs `sdpa` otherwise: (b, h, n, d) in, (b, n, h, d) out."""
    if turn is not None:
        return _attend(turn, module, query, key, value, scaling), None
    return dense_attention(module, query, key, value, attention_mask, scaling=scaling, **options)


def _eager(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    turn: Turn | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """The same where it runs `eager`: the function of the model's own module."""
    if turn is not None:
        return _attend(turn, module, query, key, value, scaling), None
    own: Mapping[str, Any] = vars(sys.modules[type(module).__module__])
    out: tuple[Tensor, Tensor | None] = own["eager_attention_forward"](
        module, query, key, value, attention_mask, scaling=scaling, **options
    )
    return out


def _sdpa_mask(kv_length: int, **options: Any) -> Tensor | None:
    """The dense mask; none where the pages know what may be seen (`PageLayer.get_mask_sizes`)."""
    return None if _is_nothing(kv_length) else sdpa_mask(kv_length=kv_length, **options)


def _eager_mask(kv_length: int, **options: Any) -> Tensor | None:
    return None if _is_nothing(kv_length) else eager_mask(kv_length=kv_length, **options)


def _is_nothing(length: int) -> bool:
    return isinstance(length, int) and length == 0
