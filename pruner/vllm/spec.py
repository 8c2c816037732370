"""What vLLM is told of a layer's memory: one page a request, constant in size, as a Mamba state."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vllm.v1.core.single_type_kv_cache_manager import CircularBufferManager
from vllm.v1.kv_cache_interface import MambaSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry


@dataclass(frozen=True, kw_only=True)
class PageSpec(MambaSpec):
    """A page of one layer. Pages of different layers may differ in size."""

    def is_uniform_with_collection(self, kv_cache_specs: dict[str, Any]) -> bool:
        """Whether one number of a page serves all of these layers."""
        return all(isinstance(spec, PageSpec) for spec in kv_cache_specs.values())

    @property
    def prefix_cacheable(self) -> bool:
        """No: what a page holds depends on all that was read."""
        return False


def register() -> None:
    """Tell vLLM who hands pages out: one a request, for as long as it lasts."""
    KVCacheSpecRegistry._ensure_registered()
    KVCacheSpecRegistry.register(PageSpec, CircularBufferManager, uniform_type_base_spec=PageSpec)
