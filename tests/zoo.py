"""Tiny random models of every model type of transformers that writes text: four layers of width 64,
windows of 24 tokens, double precision.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
)

transformers.logging.set_verbosity_error()

VOCABULARY = 300
WINDOW = 24

# Whatever a configuration has of these is set.
SIZES: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), VOCABULARY),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "word_embed_proj_dim"), 64),
    **dict.fromkeys(
        ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"), 4
    ),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("intermediate_size", "intermediate_size_mlp", "ffn_dim", "n_inner"), 64),
    **dict.fromkeys(("decoder_ffn_dim",), 64),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 32),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len"), 512),
    **dict.fromkeys(("initializer_range", "init_std"), 0.2),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token"), 2),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace", "n_shared_experts"), 1),
    **dict.fromkeys(("sliding_window", "attention_chunk_size"), WINDOW),
    "num_key_value_heads": 2,
    "head_dim": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "rotary_dim": 8,
    "max_window_layers": 2,
    "block_size": 16,
    # Latent attention.
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "qk_head_dim": 24,
    "v_head_dim": 16,
    # States.
    "mamba_d_state": 16,
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_n_groups": 1,
    "mamba_expand": 2,
    "mamba_d_ssm": 128,
    "mamba_d_conv": 4,
    "mamba_chunk_size": 16,
    "mamba_num_heads": 8,
    "mamba_head_dim": 16,
    "ssm_state_size": 16,
    "n_groups": 1,
    "chunk_size": 16,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4,
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "expert_layer_period": 2,
    "expert_layer_offset": 1,
    # Gemma.
    "hidden_size_per_layer_input": 16,
    "global_head_dim": 32,
    "num_global_key_value_heads": 1,
    "num_kv_shared_layers": 0,
}
# Lists of a configuration's own length are made anew by it, unless they are given below.
LISTS = ("layer_types", "no_rope_layers", "layers_block_type", "mlp_layer_types")

MIXED = ["sliding_attention", "full_attention"] * 2
STATES = ["linear_attention", "full_attention"] * 2
LATENT = {"head_dim": 8, "num_key_value_heads": 4}

# Name -> model type, and what differs from SIZES.
SPECIAL: dict[str, tuple[str, dict[str, Any]]] = {
    "mistral without a window": ("mistral", {"sliding_window": None}),
    "qwen2 with windows": ("qwen2", {"use_sliding_window": True}),
    "gemma4_text without sharing": ("gemma4_text", {"layer_types": MIXED}),
    "bamba": ("bamba", {"attn_layer_indices": [1, 3]}),
    "gemma2": ("gemma2", {"query_pre_attn_scalar": 16}),
    "gemma3_text": (
        "gemma3_text",
        {"query_pre_attn_scalar": 16, "layer_types": ["sliding_attention"] * 3 + MIXED[1:2]},
    ),
    "gemma3n_text": (
        "gemma3n_text",
        {
            "num_kv_shared_layers": 2,
            "layer_types": MIXED,
            "laurel_rank": 8,
            "activation_sparsity_pattern": [0.0] * 4,
            "altup_num_inputs": 2,
        },
    ),
    "gemma4_text": ("gemma4_text", {"layer_types": MIXED, "num_kv_shared_layers": 2}),
    "gpt_neo": (
        "gpt_neo",
        {"num_layers": 4, "attention_types": [[["global", "local"], 2]], "window_size": WINDOW},
    ),
    "granitemoehybrid": ("granitemoehybrid", {"layer_types": ["mamba", "attention"] * 2}),
    "lfm2": ("lfm2", {"layer_types": ["conv", "full_attention"] * 2}),
    "lfm2_moe": ("lfm2_moe", {"layer_types": ["conv", "full_attention"] * 2}),
    "llama4_text": (
        "llama4_text",
        {
            "layer_types": ["chunked_attention", "full_attention"] * 2,
            "no_rope_layers": [1, 0, 1, 0],
            "interleave_moe_layer_step": 2,
            "moe_layers": [1, 3],
        },
    ),
    "minimax_m3_vl_text": (
        "minimax_m3_vl_text",
        {"layer_types": ["full_attention", "minimax_m3_sparse"] * 2},
    ),
    "mimo_v2_flash": ("mimo_v2_flash", {"layer_types": MIXED}),
    "nemotron_h": ("nemotron_h", {"layers_block_type": ["mamba", "attention"] * 2}),
    "zamba2": ("zamba2", {"layers_block_type": ["mamba", "hybrid"] * 2}),
    **{
        name: (name, {"layer_types": STATES})
        for name in (
            "minimax",
            "qwen3_5_moe_text",
            "qwen3_5_text",
            "qwen3_next",
        )
    },
    **{
        name: (name, {**LATENT, "layer_types": STATES})
        for name in ("bailing_hybrid", "kimi_linear")
    },
    "zaya": ("zaya", {"num_experts_per_tok": 1}),
    **{
        name: (name, LATENT)
        for name in ("deepseek_v2", "deepseek_v3", "glm4_moe_lite", "youtu", "minicpm3", "axk1")
    },
}

# One of each way to attend, for the tests that run always.
MECHANISMS = {
    "llama": "plain",
    "opt": "learned positions, and a decoder inside of a decoder",
    "mistral": "a window in all layers",
    "gemma3_text": "windows in some layers",
    "gemma2": "a soft cap, and windows in some layers",
    "gpt_oss": "sinks, and windows in some layers",
    "llama4_text": "chunks in some layers",
    "gemma4_text": "shared keys",
    "deepseek_v3": "latent keys",
    "qwen3_next": "linear attention in some layers",
    "falcon_h1": "a state beside attention in each layer",
    "qwen3_moe": "experts",
    "stablelm": "a block that withholds arguments from its attention",
}

# Types that are no decoders of text, read more than text, or need the network to be made.
OTHERS = frozenset(
    """bart bert bert-generation big_bird bigbird_pegasus biogpt-mt blenderbot blenderbot-small blt
    camembert cpmant ctrl data2vec-text dots3_note electra emu3 ernie falcon_mamba fuyu gemma3
    gemma3n gemma4 gemma4_assistant gemma4_unified gemma4_unified_assistant git got_ocr2 gpt-sw3
    llama4 mamba mamba2 marian mbart megatron-bert mllama moshi moss_transcribe_diarize musicgen
    musicgen_melody mvp openai-gpt pegasus phi4_multimodal plbart prophetnet qwen3_5 qwen3_5_moe
    qwen4_exp recurrent_gemma reformer rembert roberta roberta-prelayernorm roc_bert roformer rwkv
    trocr whisper xglm xlm xlm-roberta xlm-roberta-xl xlnet xlstm xmod""".split()
)


def every() -> list[str]:
    """Names of all models that there are."""
    types = [name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if name not in OTHERS]
    return sorted({*types, *SPECIAL})


def configuration(name: str) -> PreTrainedConfig:
    """The configuration of a tiny model."""
    kind, special = SPECIAL.get(name, (name, {}))
    made = CONFIG_MAPPING[kind]
    plain = made()
    own = plain.to_dict()
    known = {*own, *getattr(plain, "attribute_map", {})}
    sizes = {key: value for key, value in SIZES.items() if key in known}
    lists = {key: None for key in LISTS if isinstance(own.get(key), list)}
    config: PreTrainedConfig = made(**{**sizes, **lists, **special})
    return config


def tiny(name: str, seed: int = 0, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    """A random model whose attention is sharp enough to matter."""
    return filled(configuration(name), seed).to(dtype).eval()  # type: ignore[arg-type]


ROTARY = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
# Models of text and images: the type of the text inside, and its own settings.
WITH_IMAGES: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma3": ("gemma3_text", {}),
    "qwen2_5_vl": (
        "qwen2_5_vl_text",
        {"rope_parameters": ROTARY},
    ),
    "mistral3": ("mistral", {}),
}


def with_images(name: str) -> PreTrainedModel:
    """One of `WITH_IMAGES`, with an encoder of images as small as can be; single precision."""
    kind, settings = WITH_IMAGES[name]
    text = configuration(kind).to_dict()
    made = CONFIG_MAPPING[name]
    encoder = type(made().vision_config)
    sizes = {**dict.fromkeys(("hidden_size", "intermediate_size"), 32), "out_hidden_size": 64}
    sizes |= dict.fromkeys(("num_hidden_layers", "depth"), 1)
    sizes |= dict.fromkeys(("num_attention_heads", "num_heads"), 2)
    sizes |= {"image_size": 16, "patch_size": 8}
    vision = encoder(**{key: size for key, size in sizes.items() if key in encoder().to_dict()})
    return filled(made(text_config={**text, **settings}, vision_config=vision)).eval()


def filled(config: PreTrainedConfig, seed: int = 0) -> PreTrainedModel:
    """The model of a configuration, with nothing left as it was initialised."""
    kinds = MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    kind: Any = next(mapping[type(config)] for mapping in kinds if type(config) in mapping)
    # Grouped products of experts are not there in double precision.
    config._experts_implementation = "eager"  # type: ignore[attr-defined]
    torch.manual_seed(seed)
    # Before 5.23 transformers runs Gemma 2 with `sdpa` and without its soft cap.
    capped = getattr(config, "attn_logit_softcapping", None) is not None
    model: PreTrainedModel = kind._from_config(
        config, attn_implementation="eager" if capped else None
    )
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if parameter.dim() >= 2:
                parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.15)
            elif "sink" in path or not torch.isfinite(parameter).all():
                parameter.copy_(torch.randn(parameter.shape, generator=draw))
    return model
