"""How attention that evicts gets into a transformers model, and what a caller may ask of it.

A hook on the decoder reads the arguments of a forward pass, sees to its cache, and hands the mode
on as one more keyword argument, `turn`; a hook on each attention module adds the layer and its
input; the registered attention function takes the turn. Blocks that withhold keyword arguments from
their attention have a hook too. Nothing is noted on modules and nothing is switched on the
configuration, so threads, copies and recomputed layers do not meet.
"""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer, StaticCache
from transformers.masking_utils import AttentionMaskInterface, eager_mask, sdpa_mask

from ctxprune.pruner.decoder import Sight
from ctxprune.pruner.engine.cache import PrunedCache
from ctxprune.pruner.engine.dense import DenseCache, DenseLayer, dense_attention
from ctxprune.pruner.engine.modes import Evict, Off, Turn
from ctxprune.pruner.engine.soft import SoftAttention
from ctxprune.pruner.engine.weights import Logits
from ctxprune.pruner.errors import CtxpruneError

if TYPE_CHECKING:
    from ctxprune.pruner.engine.handle import Handle

PREFIX = "ctxprune-"
# What transformers calls the cache of a forward pass before 5.24, and takes ever after.
OLD_NAME = "past_key_values"
MASKS: dict[str, Callable[..., Any]] = {"sdpa": sdpa_mask, "eager": eager_mask}
# Options that models hand to their attention function and that change nothing of what it computes:
# outputs that are wanted, and arguments of `generate` and of the whole pass that are passed on.
HARMLESS = frozenset(
    (
        "cache",
        "cache_position",
        "input_ids",
        "logits_to_keep",
        "num_items_in_batch",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "past_key_values",
        "position_embeddings",
        "position_ids",
        "return_dict",
        "tokenizer",
        "use_cache",
    )
)
# Types whose blocks take keyword arguments and do not hand them on: an oversight of transformers.
WITHHOLDING = ("nemotron", "stablelm")


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
            f"attention implementation `{dense}` is not supported",
            "load the model with `sdpa` or `eager`",
        )
    name = f"{PREFIX}{dense}"
    AttentionInterface.register(name, {"sdpa": _sdpa, "eager": _eager}[dense])
    AttentionMaskInterface.register(name, {"sdpa": _sdpa_mask, "eager": _eager_mask}[dense])
    config._attn_implementation = name


class Entry:
    """The hooks of a decoder, which begin and end a forward pass, and of `generate`.

    Where a decoder is inside of another module, both have them: the one that is called first
    begins the pass.
    """

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
        if "turn" in kwargs:
            return args, kwargs
        kwargs = self._named({**dict(zip(self.names, args, strict=False)), **kwargs})
        past = kwargs.get(self.past)
        if kwargs.get("logits_to_keep") is not None:
            # Gemma 4 drops the other queries before its last layers, unless attention has a name
            # that it knows; the head drops them too.
            kwargs["logits_to_keep"] = 0
        if isinstance(mode, Off):
            _write_in_place(handle, past)
            return (), kwargs
        enroll(handle.decoder.config)
        cache = None
        if isinstance(mode, Evict):
            _check_training(decoder)
            cache = kwargs[self.past] = _begin(handle, mode, past, kwargs)
            if cache.length is not None and kwargs.get("position_ids") is not None:
                # The pages know what may be seen, and a compiled step guards on a mask's length.
                kwargs["attention_mask"] = None
        layers = handle.decoder.layers
        turn = Turn(mode, handle.gate_list, layers, cache, scored=past is None, root=decoder)
        return (), {**kwargs, "turn": turn}

    def after(
        self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        """Hold the eviction steps that single tokens reached."""
        turn = kwargs.get("turn")
        if turn is None or turn.root is not decoder:
            return output
        if isinstance(turn.mode, SoftAttention) and len(turn.mode.kept) != len(turn.gates):
            raise _bypassed()
        if turn.cache is None:
            return output
        cache = turn.cache
        cache.finish()
        if turn.scored and cache.usage is not None:
            cache.usage.end(cache.rows, cache.seen)
        wanted = kwargs.get("use_cache")
        if wanted is None:
            wanted = self.handle.decoder.config.use_cache
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


@dataclass(frozen=True)
class Carried:
    """The rotary embeddings on their way through a block, and the turn with them.

    Attributes:
        rotary: cosines and sines. turn: of the pass.
    """

    rotary: tuple[Tensor, Tensor]
    turn: Turn


def carry_turn(
    block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Hook of a block that withholds keyword arguments: the turn goes with an argument it needs.

    A layer that is recomputed has it again, with its arguments; a variable would be gone by then.
    """
    if "turn" in kwargs:
        carried = Carried(kwargs["position_embeddings"], kwargs["turn"])
        kwargs = {**kwargs, "position_embeddings": carried}
    return args, kwargs


def give_turn(
    number: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Hook of an attention module: the number of its layer, and its input (b, n, hidden_size)."""
    carried = kwargs.get("position_embeddings")
    if isinstance(carried, Carried):
        kwargs = {**kwargs, "position_embeddings": carried.rotary, "turn": carried.turn}
    turn = kwargs.get("turn")
    if turn is None:
        return args, kwargs
    hidden = args[0] if args else kwargs["hidden_states"]
    return args, {**kwargs, "turn": turn.at(number, hidden)}


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
    if kwargs.get("output_attentions") or handle.decoder.config.output_attentions:
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
        if not torch.is_inference_mode_enabled() and past.is_inference:
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


def _write_in_place(handle: Handle, past: Any) -> None:
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
        dense = handle.dense_cache()
        past.__class__ = type(dense)  # type: ignore[assignment]
        past.__dict__ = vars(dense)
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
    limit = handle.decoder.positions
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
    dense: Callable[[], Tensor],
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    options: Mapping[str, Any],
) -> Tensor:
    """Attention (b, n, h, d) of a layer's turn; `dense` gives that of the model itself.

    Raises:
        CtxpruneError: the model asks for something that is not understood.
    """
    if turn.number is None:
        # Of an encoder of images beside the decoder.
        return dense()
    layer, hidden = turn.layers[turn.number], turn.hidden
    assert hidden is not None
    if not query.shape[2] == key.shape[2] == hidden.shape[1]:
        raise _misfit(module, "attends to keys that are not those of its own tokens")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    logits = _understood(module, layer.sight, scale, options)
    if isinstance(turn.mode, SoftAttention):
        if layer.gate is None:
            return dense()
        _check_mask(turn, module, layer.sight, mask, query.shape[2])
        out = turn.mode.attend(
            module,
            turn.gates[layer.gate],
            layer.gate,
            query,
            key,
            value,
            hidden,
            logits=logits,
            sight=layer.sight,
            dense=dense,
        )
        return out.transpose(1, 2).contiguous()
    assert turn.cache is not None
    if mask is not None:
        raise _misfit(module, "brings a mask of its own")
    with torch.no_grad():
        out = turn.cache.attend(turn.number, query, key, value, hidden, logits)
        out = out.transpose(1, 2).contiguous()
    if torch.is_grad_enabled():
        gate = [] if layer.gate is None else turn.gates[layer.gate].parameters()
        out = _NoGradient.apply(out, query, key, value, *gate)  # type: ignore[no-untyped-call]
    return out


def _understood(
    module: nn.Module, sight: Sight, scale: float, options: Mapping[str, Any]
) -> Logits:
    """How weights come of products, by the options of an attention call.

    Raises:
        CtxpruneError: an option is not understood, or contradicts what the layer may see.
    """
    known = ("softcap", "s_aux", "sliding_window", "is_causal", "dropout")
    for name, value in options.items():
        if value is not None and value is not False and name not in (*known, *HARMLESS):
            raise _misfit(module, f"attends with an option `{name}`, which is not known here")
    window = options.get("sliding_window")
    if window is not None and (sight.chunked or window != sight.size):
        raise _misfit(module, f"asks for a window of {window}, not of {sight.size}")
    if options.get("is_causal") is False or not getattr(module, "is_causal", True):
        raise _misfit(module, "is not causal")
    if options.get("dropout"):
        raise _misfit(module, "drops some of its weights, as in training")
    return Logits(scale, options.get("softcap"), options.get("s_aux"))


def _check_mask(
    turn: Turn, module: nn.Module, sight: Sight, mask: Tensor | None, length: int
) -> None:
    """Raise CtxpruneError for a mask (b, 1, n, n) that hides other than what is out of sight."""
    if mask is None or any(mask is known for known in turn.masks):
        return
    place = torch.arange(length, device=mask.device)
    visible = place[:, None] >= place
    if sight.bounds(length):
        visible = visible & sight.sees(place[:, None], place)
    shown = mask if mask.dtype == torch.bool else mask == 0
    if shown.shape[-2:] != visible.shape or not bool((shown == visible).all()):
        raise _misfit(module, "brings a mask of its own")
    turn.masks.append(mask)


def _misfit(module: nn.Module, what: str) -> CtxpruneError:
    return CtxpruneError(
        f"`{type(module).__name__}` {what}, so its attention cannot be exchanged",
        "use the model at sparsity 0",
    )


def _bypassed() -> CtxpruneError:
    return CtxpruneError(
        "a layer of this model does not call the attention function with what the pass gave it",
        "use the model at sparsity 0",
    )


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
    tensors = module, query, key, value, attention_mask

    def dense() -> Tensor:
        return dense_attention(*tensors, scaling=scaling, **options)[0]

    return (dense() if turn is None else _attend(turn, dense, *tensors, scaling, options)), None


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
    tensors = module, query, key, value, attention_mask
    own: Mapping[str, Any] = vars(sys.modules[type(module).__module__])
    attend = own["eager_attention_forward"]
    if turn is None:
        out: tuple[Tensor, Tensor | None] = attend(*tensors, scaling=scaling, **options)
        return out

    def dense() -> Tensor:
        attended: Tensor = attend(*tensors, scaling=scaling, **options)[0]
        return attended

    return _attend(turn, dense, *tensors, scaling, options), None


def _sdpa_mask(kv_length: int, **options: Any) -> Tensor | None:
    """The dense mask; none where the pages know what may be seen (`PageLayer.get_mask_sizes`)."""
    return None if _is_left_out(kv_length, options) else sdpa_mask(kv_length=kv_length, **options)


def _eager_mask(kv_length: int, **options: Any) -> Tensor | None:
    return None if _is_left_out(kv_length, options) else eager_mask(kv_length=kv_length, **options)


def _is_left_out(length: int, options: Mapping[str, Any]) -> bool:
    """Whether a mask is left out, which has to be causal, or of a window or of chunks.

    Raises:
        CtxpruneError: it is another one.
    """
    if not isinstance(length, int) or length != 0:
        return False
    # What hides or shows more than these may not be skipped, or has a function of its own.
    if options.get("use_vmap") or not options.get("allow_is_causal_skip", True):
        raise CtxpruneError(
            "this model masks more than later tokens and those beyond a window, which cannot be "
            "done to rows that were evicted",
            "use it at sparsity 0; images are not read by an evicting model",
        )
    return True
