"""The plugin for vLLM: `register` is its entry point, and runs in each of vLLM's processes."""

from __future__ import annotations

# What `--hf-overrides` names in the place of the model's own architecture.
ARCHITECTURE = "CtxpruneForCausalLM"


def register() -> None:
    """Make vLLM know the architecture that evicts, what it may be asked for, and its pages."""
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from ctxprune.pruner.vllm import spec
    from ctxprune.pruner.vllm.configuration import Configuration

    spec.register()
    MODELS_CONFIG_MAP[ARCHITECTURE] = Configuration
    ModelRegistry.register_model(ARCHITECTURE, f"{__name__}.model:{ARCHITECTURE}")
