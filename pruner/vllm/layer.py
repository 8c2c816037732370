"""The attention of one layer as vLLM runs it, over pages that vLLM hands out."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import get_current_vllm_config
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.v1.attention.backend import AttentionBackend, AttentionMetadataBuilder
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum

from ctxprune.pruner.engine.pool import Batch, Pool
from ctxprune.pruner.errors import CtxpruneError
from ctxprune.pruner.vllm.spec import PageSpec


class PageAttention(nn.Module, MambaBase):
    """In the place of vLLM's `Attention`: it has no weights, and its memory is a pool of pages.

    Args:
        pool: the pages. heads: of queries, of keys; size: of each head, on this rank.
        name: under which vLLM knows the layer.
    """

    def __init__(self, pool: Pool, heads: tuple[int, int], size: int, name: str) -> None:
        super().__init__()
        self.kv_cache: tuple[Tensor, ...] = ()
        self.pool, self.heads, self.size, self.name = pool, heads, size, name
        self._hidden: Tensor | None = None

    def watch(self, module: nn.Module) -> None:
        """Take the input of the attention module that this is a part of, which the gate reads.

        Raises:
            CtxpruneError: the module does not name it.
        """
        signature = inspect.signature(module.forward)
        if "hidden_states" not in signature.parameters:
            raise CtxpruneError(f"`{type(module).__name__}` of vLLM has no input `hidden_states`")

        def take(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._hidden = signature.bind(*args, **kwargs).arguments["hidden_states"]

        module.register_forward_pre_hook(take, with_kwargs=True)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention (n, heads * size) of the new tokens of a pass, to what their pages hold."""
        metadata = get_forward_context().attn_metadata
        hidden, self._hidden = self._hidden, None
        if metadata is None:
            # vLLM looks how much memory a pass takes, before there are any pages.
            return torch.zeros_like(query)
        assert hidden is not None
        batch = metadata[self.name]
        query_heads, key_heads = self.heads
        # Beyond these there may be padding.
        count = int(batch.starts[-1])
        out = self.pool.attend(
            batch,
            query[:count].view(count, query_heads, self.size),
            key[:count].view(count, key_heads, self.size),
            value[:count].view(count, key_heads, self.size),
            hidden[:count],
        )
        return nn.functional.pad(out.flatten(1), (0, 0, 0, len(query) - count))

    # What vLLM asks a layer with a state of constant size.

    @property
    def mamba_type(self) -> Any:
        """The nearest of the kinds that vLLM knows."""
        return MambaAttentionBackendEnum.LINEAR

    def get_state_shape(self) -> tuple[tuple[int, ...], ...]:
        """A page, in bytes: what is in it is the pool's affair."""
        return ((self.pool.nbytes,),)

    def get_state_dtype(self) -> tuple[torch.dtype, ...]:
        """Bytes."""
        return (torch.int8,)

    def get_kv_cache_spec(self, vllm_config: Any) -> PageSpec:
        """A page a request."""
        return PageSpec(
            block_size=vllm_config.cache_config.block_size,
            shapes=self.get_state_shape(),
            dtypes=self.get_state_dtype(),
            mamba_type=self.mamba_type,
        )

    def get_attn_backend(self) -> type[AttentionBackend]:
        """Says which tokens of a pass are whose."""
        return PageBackend

    def bind_kv_cache(self, kv_cache: Tensor) -> None:
        """Take the memory of all pages, (pages, 1, 1, nbytes).

        Raises:
            CtxpruneError: it has gaps, since the server laid pages of other layers between.
        """
        super().bind_kv_cache(kv_cache)
        memory: Tensor = self.kv_cache[0]
        if not memory.is_contiguous():
            raise CtxpruneError(
                "the pages of a layer have to lie next to each other",
                "leave the layout of the KV cache to vLLM",
            )
        self.pool.bind(memory)


class PageBackend(AttentionBackend):
    """What vLLM asks about such layers."""

    @staticmethod
    def get_name() -> str:
        """For its logs."""
        return "CTXPRUNE_PAGES"

    @staticmethod
    def get_builder_cls() -> type[AttentionMetadataBuilder[Batch]]:
        """Who makes the metadata of a pass."""
        return BatchBuilder

    @classmethod
    def is_ssm(cls) -> bool:
        """Its memory is a state."""
        return True


class BatchBuilder(AttentionMetadataBuilder[Batch]):
    """Makes a `Batch` of what vLLM knows about a pass."""

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(
        self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False
    ) -> Batch:
        """The tokens of each request, how many it has read before, and its page."""
        count = common_attn_metadata.num_reqs
        starts = common_attn_metadata.query_start_loc_cpu[: count + 1].long()
        # It is exact but for speculative decoding, which is refused.
        lengths = common_attn_metadata.seq_lens_cpu_upper_bound[:count].long()
        pages = common_attn_metadata.block_table_tensor[:count, 0].cpu().long()
        return Batch(starts, lengths - starts.diff(), pages)


def exchange(attention: nn.Module, name: str, layer: PageAttention) -> None:
    """Put a layer into an attention module of vLLM's, in the place of its part called `name`."""
    setattr(attention, name, layer)
    layer.watch(attention)
    known = get_current_vllm_config().compilation_config.static_forward_context
    known[layer.name] = layer
