"""A tiny random copy of an architecture: the same class and the same kinds of layers, with small sizes.

What a config of billions of parameters describes is looked at, and tried out, on such a copy: it is built in well under
a second. Flags, layer kinds and the number of layers are the model's own; sizes of tensors shrink. The sizes are
chosen by the names of config keys, the one place where names count: a copy that does not build or does not run is a
refusal, and a wrong guess is nothing worse than that.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from fbn_prune.model.building import build, quiet_transformers
from fbn_prune.model.family import as_config

HIDDEN, HEADS, HEAD_SIZE, WIDTH, VOCABULARY = 32, 4, 8, 20, 97

_SIZES: tuple[tuple[str, int], ...] = (
    (r"(.+_)?vocab_size(_per_layer_input|_base)?|encoder_hash_byte_group_vocab", VOCABULARY),
    (r"moe_.*intermediate_size|expert_ffn_hidden_size|moe_.*hidden_size", 12),
    (r"shared_experts?_intermediate_size|shared_intermediate_size|dense_intermediate_size", 28),
    (r".*(intermediate_size|ffn_dim|ffn_hidden_size|n_inner|d_inner)(_mlp)?", WIDTH),
    (r"dff|dim_ff|feed_forward_size|d_ff|block_dim|mlp_hidden_size", WIDTH),
    (
        r"hidden_size_per_layer_input|laurel_rank|adapter_rank|pronunciation_embed_dim|shape_embed_dim",
        12,
    ),
    (
        r"attention_hidden_size|hidden_size|d_model|n_embd|n_embed|embedding_size|embedding_dim|emb_dim",
        HIDDEN,
    ),
    (
        r"word_embed_proj_dim|(in|out)put_embedding_size|lru_width|(.+_)?hidden_size|dim_model_base",
        HIDDEN,
    ),
    (r"(text_|output_|projection_|out_)?(embed_dim|hidden_dim|proj_dim|projection_dim)", HIDDEN),
    (r"mamba_d_ssm", 2 * HIDDEN),
    (r"(.*_)?(num_)?key_heads|(.*_)?num_query_groups|index_n_heads|.*num_linear_key_heads", 2),
    (r"mamba_(n|num)_heads", 8),
    (r"n_mamba_heads", 2),
    (r"(.*_)?(num_(.*_)?heads|attention_heads|n_heads?|num_heads_.*)", HEADS),
    (r"num_linear_(value_)?heads", HEADS),
    (r"qk_head_dim", 12),
    (r"(qk_rope|qk_pos)_head_dim", 4),
    (r"rotary_dim", 4),
    (r"(.*_)?(head_dim|headdim|d_head|dim_head|head_size|kv_channels|v_head_dim)", HEAD_SIZE),
    (r"(.*_)?lora_rank|.*_rank|rel_extent|d_rel", HEAD_SIZE),
    (r"(.*_)?(d_state|state_size)|mamba_dt_rank|time_step_rank", HEAD_SIZE),
    (r"max_position_embeddings|n_positions|n_ctx|max_seq_len|context_length|model_max_length", 64),
    (r"max_(source|target)_positions|original_max_position_embeddings|max_sequence_length", 64),
    (r"(.*_)?(sliding_window|window_size|sliding_window_size|local_attention|local_window)", 16),
    (r"(.*_)?chunk_(size|length)|block_size|attn_chunk_size", 8),
    (r"(num_|n_|moe_num_)?(.*_)?experts|num_local_experts", 4),
    (r"num_experts_per_tok(en)?|moe_k|moe_top_?k|top_k|topk_group|n_group|num_expert_groups?", 2),
    (r"num_codebooks|prompt_length|prompt_types|segment_types|block_multiple_of|axial_dim", 4),
    (r"position_bias_(num_buckets|max_distance)|prompt_mid_dim|index_topk(_blocks)?", 8),
    (r"image_size|(.*_)?resolution", 28),
    (r"(vision_)?patch_size", 14),
    (r"patch_embed_dim|position_embedding_size|num_position_embeddings", 16),
)
_OTHER_TOWERS = re.compile(r".*(vision|audio|image|video|speech|vq|encoder|boi|projector).*config")
_DEPTHS = re.compile(r"depth|num_(hidden_)?layers|n_layers?|encoder_layers|num_blocks")


def tiny_config(config: PretrainedConfig, layers: int | None = None) -> PretrainedConfig:
    """Return the config of a tiny copy.

    Parameters
    ----------
    config
        The config of the model.
    layers
        The number of decoder layers; by default the model's own.

    Raises
    ------
    InvalidInput
        transformers rejects the config.
    """
    fields = copy.deepcopy(config.to_dict())
    fields.pop("quantization_config", None)
    small = _shrunk(fields)
    if layers is not None:
        _shorten(small, layers)
    small["model_type"] = config.model_type
    return as_config(small)


def tiny_model(config: PretrainedConfig, seed: int = 0) -> PreTrainedModel:
    """Return a random model of a tiny config in evaluation mode, float32; biases and norms are random too."""
    with _drawing(seed), quiet_transformers():
        model = build(copy.deepcopy(config), torch.float32)
        for parameter in model.parameters():
            parameter.data = parameter.data.float().normal_(0.0, 0.3)
    model.config.use_cache = False
    return model.eval()


@contextmanager
def _drawing(seed: int) -> Iterator[None]:
    """Draw from a seed inside the context, and leave the generator of the caller as it was."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        yield


def _shrunk(fields: dict[str, Any], tower: bool = False) -> dict[str, Any]:
    small = {key: _small(key, value, tower) for key, value in fields.items()}
    _fit_together(fields, small)
    return small


def _small(key: str, value: Any, tower: bool) -> Any:
    if isinstance(value, dict):
        if key in ("rope_parameters", "rope_scaling"):
            return _plain_rope(value)
        if key in ("id2label", "label2id"):
            return value
        return _shrunk(value, tower or bool(_OTHER_TOWERS.fullmatch(key)))
    if isinstance(value, list) and value and all(type(each) is int for each in value):
        return [_small(key, each, tower) for each in value]
    if type(value) is not int or value <= 0:
        return value
    if key.endswith("token_id") or key.endswith("token_index") or key.endswith("_id"):
        return min(value, 1) if value >= VOCABULARY else value
    if tower and _DEPTHS.fullmatch(key):
        return min(value, 2)
    for pattern, size in _SIZES:
        if re.fullmatch(pattern, key):
            return min(value, size)
    return value


def _plain_rope(rope: Mapping[str, Any]) -> dict[str, Any]:
    """Return rotary settings of the default kind: the kind is nothing to an MLP, and its lists depend on sizes."""
    if any(isinstance(each, Mapping) for each in rope.values()):
        return {
            key: _plain_rope(each) if isinstance(each, Mapping) else each
            for key, each in rope.items()
        }
    lists = ("mrope_section",)
    plain = {k: value for k, value in rope.items() if k in lists or not isinstance(value, list)}
    plain["rope_type"] = "default"
    if isinstance(section := plain.get("mrope_section"), list):
        half = max(1, int(HEAD_SIZE * plain.get("partial_rotary_factor", 1.0)) // 2)
        share = half // len(section)
        plain["mrope_section"] = [half - share * (len(section) - 1)] + [share] * (len(section) - 1)
    return plain


def _fit_together(old: Mapping[str, Any], small: dict[str, Any]) -> None:
    """Keep what several sizes must agree on: groups of query heads, heads of state, and sizes that are derived."""
    for queries, keys in (
        ("num_attention_heads", "num_key_value_heads"),
        ("num_attention_heads", "num_kv_heads"),
        ("swa_num_attention_heads", "swa_num_key_value_heads"),
        ("n_head", "num_kv_heads"),
        ("decoder_attention_heads", "num_key_value_heads"),
    ):
        if type(old.get(queries)) is int and type(old.get(keys)) is int:
            groups = old[keys]
            small[keys] = HEADS if groups == old[queries] else 1 if groups == 1 else 2
    for key, same in (("head_dim", "qk_rope_head_dim"), ("head_dim", "qk_head_dim")):
        if type(old.get(key)) is int and old[key] == old.get(same):
            small[key] = small[same]
    size, heads = old.get("attention_head_dim"), old.get("num_attention_heads")
    if type(size) is int and type(heads) is int and size * heads == 2 * old.get("hidden_size", 0):
        small["attention_head_dim"] = 2 * HEAD_SIZE
    if "mamba_headdim" in old and type(old.get("n_mamba_heads")) is int:  # Zamba 2
        small["n_mamba_heads"] = 2 * HIDDEN // HEAD_SIZE
    if "state_size" in old and "expand" in old and type(old.get("num_heads")) is int:  # Mamba 2
        small["num_heads"] = old["expand"] * HIDDEN // HEAD_SIZE


def _shorten(small: dict[str, Any], layers: int) -> None:
    """Cut the lists that have one entry a layer, and what counts layers."""
    owner = small
    for key in ("text_config", "decoder_config"):
        if isinstance(small.get(key), dict):
            owner = small[key]
    found = [
        (key, owner[key])
        for key in (
            "num_hidden_layers",
            "n_layer",
            "n_layers",
            "num_layers",
            "decoder_layers",
            "num_blocks",
        )
        if type(owner.get(key)) is int
    ]
    if not found:
        return
    deep = max(count for _, count in found)
    for key, count in found:
        owner[key] = min(count, layers)
    for key, value in list(owner.items()):
        if isinstance(value, list) and len(value) == deep:
            owner[key] = value[:layers]
        elif isinstance(value, list) and value and all(type(each) is int for each in value):
            if key.endswith(("_ids", "_idxs", "_layers")):
                owner[key] = [each for each in value if each < layers]
        elif key == "per_layer_config" and isinstance(value, dict):
            owner[key] = {index: own for index, own in value.items() if int(index) < layers}
    for key in ("num_kv_shared_layers", "max_window_layers", "first_k_dense_replace"):
        if type(owner.get(key)) is int:
            owner[key] = min(owner[key], layers // 2)
