"""What a server is asked for: settings of the folder and of the command line, and refusals."""

from pathlib import Path
from typing import Any

from pydantic.dataclasses import dataclass
from transformers.utils.hub import cached_file
from vllm.logger import init_logger
from vllm.model_executor.models.config import VerifyAndUpdateConfig

from ctxprune.pruner.checkpoints import checkpoint
from ctxprune.pruner.checkpoints.hub import FAULTS
from ctxprune.pruner.config import PruneConfig, check_max_rows
from ctxprune.pruner.errors import CtxpruneError, first_line
from ctxprune.pruner.schema import STRICT, Level, Natural, Settings, Tokens

logger = init_logger(__name__)

KEY = "ctxprune"
# Model types whose tokens were compared with those of our own `generate`.
MODEL_TYPES = ("gemma3_text", "gpt2", "llama", "mistral", "qwen2", "qwen3")


@dataclass(frozen=True, config=STRICT)
class Asked(Settings):
    """What `--hf-overrides '{"ctxprune": {...}}'` may say; without it the folder decides.

    Attributes:
        sparsity: level in [0, 1); None: the one that the model was tuned to.
        max_rows: cap on the rows of a layer; None: the one of the folder; 0: none.
        context: tokens of a text for which the sparsity is met; None: those of tuning.
    """

    sparsity: Level | None = None
    max_rows: Natural | None = None
    context: Tokens | None = None

    def level(self, config: PruneConfig) -> float:
        """The sparsity for a model."""
        return config.tuned if self.sparsity is None else self.sparsity

    def cap(self, config: PruneConfig) -> int | None:
        """The cap on rows for a model, None where there is none.

        Raises:
            CtxpruneError: it is too small, or nothing bounds the rows at all.
        """
        rows = (config.max_rows if self.max_rows is None else self.max_rows) or None
        if rows is not None:
            check_max_rows(rows, config.protect_first + config.protect_recent)
        elif self.level(config) == 0.0:
            raise CtxpruneError(
                "at sparsity 0, without a cap on rows, nothing is evicted",
                "leave `--hf-overrides` out to serve the dense model",
            )
        return rows


def settings_of(hf_config: Any) -> Asked:
    """What the command line asks for.

    Raises:
        CtxpruneError: a key that is not known, or a value that is refused.
    """
    raw = getattr(hf_config, KEY, {})
    if not isinstance(raw, dict):
        raise CtxpruneError(f"`{KEY}` of `--hf-overrides` is no mapping of settings: {raw!r}")
    return Asked.from_mapping(raw, "`--hf-overrides`")


def folder_of(model_config: Any) -> Path:
    """The folder with the gates of a model, fetched if it is in a repository of the hub.

    Raises:
        CtxpruneError: it has none.
    """
    where = {"revision": model_config.revision}
    try:
        files = [cached_file(model_config.model, name, **where) for name in checkpoint.OWN]
    except FAULTS as error:
        raise CtxpruneError(
            f"`{model_config.model}` has no gates: {first_line(error)}",
            "leave `--hf-overrides` out to serve the dense model",
        ) from error
    return Path(str(files[0])).parent


class Configuration(VerifyAndUpdateConfig):
    """vLLM asks it about a configuration before anything is loaded."""

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        """Refuse what cannot be done, and switch off what does not fit.

        Raises:
            CtxpruneError: for the first of these things.
        """
        model, cache, parallel = (
            vllm_config.model_config,
            vllm_config.cache_config,
            vllm_config.parallel_config,
        )
        config = checkpoint.read_config(folder_of(model))
        settings_of(model.hf_config).cap(config)
        kind = model.hf_text_config.model_type
        refused = {
            f"the model type `{kind}`": kind not in MODEL_TYPES,
            "speculative decoding": vllm_config.speculative_config is not None,
            "a quantized KV cache": cache.cache_dtype not in ("auto", *_names(model.dtype)),
            "pipeline parallelism": parallel.pipeline_parallel_size > 1,
            "context parallelism": parallel.decode_context_parallel_size > 1,
            "a KV connector": vllm_config.kv_transfer_config is not None,
            "LoRA adapters": vllm_config.lora_config is not None,
            "embeddings and other pooling": model.runner_type != "generate",
        }
        for what, asked in refused.items():
            if asked:
                raise CtxpruneError(
                    f"a model that evicts cannot be served with {what}",
                    "leave it out, or leave `--hf-overrides` out to serve the dense model",
                )
        if cache.enable_prefix_caching:
            logger.info("Prefix caching is off: what a page holds depends on all that was read.")
            cache.enable_prefix_caching = False
        if not model.enforce_eager:
            logger.info("torch.compile and CUDA graphs are off: eviction steps are no fixed graph.")
            model.enforce_eager = True


def _names(dtype: object) -> tuple[str, ...]:
    """What vLLM calls a KV cache in the dtype of the model."""
    return (str(dtype).removeprefix("torch."),)
