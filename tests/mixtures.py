"""Tiny configs of mixtures of experts, one for each type that is tried out."""

from __future__ import annotations

from collections.abc import Callable

from tiny_models import CONTEXT, VOCAB
from transformers import PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

HIDDEN, WIDTH = 16, 16

_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": CONTEXT,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 257,
}
_INNER = {"moe_intermediate_size": WIDTH, "intermediate_size": 20}
_ROUTED = {**_INNER, "n_routed_experts": 6, "n_shared_experts": 1, "num_hidden_layers": 3}

MIXTURES: dict[str, dict[str, object]] = {
    "qwen2_moe": {"num_experts": 6, **_INNER, "shared_expert_intermediate_size": 12},
    "qwen3_moe": {"num_experts": 6, **_INNER, "head_dim": 4, "norm_topk_prob": True},
    "mixtral": {"num_local_experts": 6, "intermediate_size": WIDTH},
    "olmoe": {"num_experts": 6, "intermediate_size": WIDTH},
    "gpt_oss": {
        "num_local_experts": 6,
        "intermediate_size": WIDTH,
        "head_dim": 4,
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    },
    "deepseek_v3": {
        **_ROUTED,
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "num_key_value_heads": 4,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "q_lora_rank": 8,
        "kv_lora_rank": 8,
        "qk_nope_head_dim": 4,
        "qk_rope_head_dim": 4,
        "v_head_dim": 4,
    },
    "granitemoe": {"num_local_experts": 6, "intermediate_size": WIDTH},
    "glm4_moe": {**_ROUTED, "head_dim": 4, "first_k_dense_replace": 1},
    "lfm2_moe": {
        **_INNER,
        "num_experts": 6,
        "num_hidden_layers": 3,
        "num_dense_layers": 1,
        "layer_types": ["conv", "full_attention", "conv"],
    },
}
"""What each type's config says, beside sizes that all have."""


def mixture_config(name: str, **changes: object) -> PretrainedConfig:
    """Return a type's tiny config, with other values."""
    config: Callable[..., PretrainedConfig] = CONFIG_MAPPING[name]
    return config(**{**_COMMON, **MIXTURES[name], **changes})
