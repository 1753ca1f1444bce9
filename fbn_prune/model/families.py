"""The supported architectures, one declarative entry each, and the choice of the entry for a config.

The facts come from the modeling files of transformers. Everything that differs between architectures is in these
entries.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from fbn_prune.errors import InvalidInput
from fbn_prune.model.experts import mixture
from fbn_prune.model.family import Family, Projection, per_layer
from fbn_prune.model.gguf_facts import Gguf
from fbn_prune.model.head_groups import KEY_HEADS, has_own_head_groups, head_groups
from fbn_prune.model.heads import Attention, HeadProjection
from fbn_prune.model.quantization import can_undo

if TYPE_CHECKING:
    from fbn_prune.model.family import Config

_SEPARATE = Attention(
    "self_attn",
    inputs=(
        HeadProjection("self_attn.q_proj", ("query",)),
        HeadProjection("self_attn.k_proj", ("key",)),
        HeadProjection("self_attn.v_proj", ("key",)),
    ),
    output=HeadProjection("self_attn.o_proj", ("query",), reads=True),
)
_FUSED = Attention(
    "self_attn",
    inputs=(HeadProjection("self_attn.qkv_proj", ("query", "key", "key")),),
    output=_SEPARATE.output,
)


def _gated(name: str, *model_types: str, bias_key: str | None = None, **facts: Any) -> Family:
    """An architecture with Llama's names for the projections of its MLP and, by default, its attention."""
    return Family(
        name,
        model_types,
        layers="model.layers",
        inputs=(Projection("mlp.gate_proj", 0), Projection("mlp.up_proj", 0)),
        output=Projection("mlp.down_proj", 1),
        biased=bias_key or False,
        bias_key=bias_key,
        **{"attention": _SEPARATE, **facts},
    )


def _gemma_scale(fields: dict[str, Any], names: Collection[str]) -> None:
    """Set the scale of the attention scores: llama.cpp knows the 27B models, which differ, by their depth."""
    large = {"gemma2": 46, "gemma3_text": 62}[fields["model_type"]]
    whole = fields["hidden_size"] // fields["num_attention_heads"]
    is_large = fields["num_hidden_layers"] == large
    fields["query_pre_attn_scalar"] = whole if is_large else fields["head_dim"]


def _falcon_form(fields: dict[str, Any], names: Collection[str]) -> None:
    """Tell Falcon's forms apart: one key head for all queries, or groups of heads with one or two norms a layer."""
    fields["multi_query"] = fields["num_kv_heads"] == 1
    fields["new_decoder_architecture"] = not fields["multi_query"]
    fields["num_ln_in_parallel_attn"] = 2 if "blk.0.attn_norm_2.weight" in names else 1
    fields["bias"] = "blk.0.ffn_up.bias" in names


def _stablelm_form(fields: dict[str, Any], names: Collection[str]) -> None:
    """Tell StableLM's forms apart: biases of queries, keys and values, and one norm a layer or two."""
    if "blk.0.attn_q_norm.weight" in names:
        raise InvalidInput("its queries and keys have a norm for each head, which is not read")
    fields["use_qkv_bias"] = "blk.0.attn_q.bias" in names
    fields["use_parallel_residual"] = "blk.0.ffn_norm.weight" not in names


FAMILIES: tuple[Family, ...] = (
    _gated(  # SmolLM and SmolLM2 have this type too
        "Llama",
        "llama",
        bias_key="mlp_bias",
        gguf=Gguf(
            "llama",
            "deci",
            paired_rope=True,
            rope_types=("default", "llama3"),
            attention_bias=True,
            read_as={"llama": "llama"},
        ),
    ),
    _gated("Mistral", "mistral"),
    _gated("OLMo 2", "olmo2", attention=None),
    _gated("Qwen2", "qwen2", gguf=Gguf("qwen2", own_head_size=False, read_as={"qwen2": "qwen2"})),
    _gated("Qwen3", "qwen3", gguf=Gguf("qwen3", read_as={"qwen3": "qwen3"})),
    _gated(
        "Gemma",
        "gemma",
        "gemma2",
        "gemma3_text",
        activation_keys=("hidden_activation", "hidden_act"),
        gguf=Gguf(
            None,
            read_as={"gemma2": "gemma2", "gemma3": "gemma3_text"},
            norm_offset=1,
            dtype="bfloat16",
            complete=_gemma_scale,
        ),
    ),
    _gated("Granite", "granite", bias_key="mlp_bias"),
    _gated(
        "StableLM",
        "stablelm",
        attention=None,
        gguf=Gguf(
            None,
            read_as={"stablelm": "stablelm"},
            partly_rotated=True,
            complete=_stablelm_form,
        ),
    ),
    Family(
        "Phi-3",
        ("phi3",),
        layers="model.layers",
        inputs=(Projection("mlp.gate_up_proj", 0, stacked=2),),
        output=Projection("mlp.down_proj", 1),
        attention=_FUSED,
        gguf=Gguf(None, read_as={"phi3": "phi3"}, partly_rotated=True),
    ),
    Family(
        "GPT-2",
        ("gpt2",),
        layers="transformer.h",
        inputs=(Projection("mlp.c_fc", 1),),
        output=Projection("mlp.c_proj", 0),
        width_key="n_inner",
        biased=True,
        activation_keys=("activation_function",),
        gguf=Gguf(None, read_as={"gpt2": "gpt2"}),
    ),
    Family(
        "GPT-NeoX",
        ("gpt_neox",),
        layers="gpt_neox.layers",
        inputs=(Projection("mlp.dense_h_to_4h", 0),),
        output=Projection("mlp.dense_4h_to_h", 1),
        biased=True,
        stored_as=("lm_head.", "embed_out."),
    ),
    Family(  # OPT's `enable_bias` and Falcon's `bias` also control the attention: hence no bias_key
        "OPT",
        ("opt",),
        layers="model.decoder.layers",
        inputs=(Projection("fc1", 0),),
        output=Projection("fc2", 1),
        width_key="ffn_dim",
        biased="enable_bias",
        activation_keys=("activation_function",),
        mlp_modules=("fc1", "activation_fn", "fc2"),
    ),
    Family(
        "Falcon",
        ("falcon",),
        layers="transformer.h",
        inputs=(Projection("mlp.dense_h_to_4h", 0),),
        output=Projection("mlp.dense_4h_to_h", 1),
        width_key="ffn_hidden_size",
        biased="bias",
        activation_keys=("activation",),
        gguf=Gguf(None, read_as={"falcon": "falcon"}, heads_apart=True, complete=_falcon_form),
    ),
)

_BY_MODEL_TYPE: dict[str, Family] = {}


def register_family(family: Family) -> None:
    """Make an architecture known that has no entry in `FAMILIES`; it replaces one of the same model types."""
    _BY_MODEL_TYPE.update(dict.fromkeys(family.model_types, family))


for _family in FAMILIES:
    register_family(_family)


def family_of(config: Config) -> Family:
    """Return the family of a model.

    Parameters
    ----------
    config
        A loaded config, or the object in `config.json`.

    Raises
    ------
    InvalidInput
        The model cannot be pruned: it is a mixture of experts, encoder-decoder or quantized, its layers differ in more
        than their width, or its architecture has no entry in `FAMILIES` and no MLPs are found in it.
    """
    fields = config if isinstance(config, Mapping) else config.to_dict()
    model_type = fields.get("model_type") or getattr(config, "model_type", None)
    refuse_obstacles({**fields, "model_type": model_type})
    assert isinstance(model_type, str)
    if model_type not in _BY_MODEL_TYPE:
        from fbn_prune.model.decoder_layers import NotFound  # these need torch
        from fbn_prune.model.structure import find_family

        try:
            return find_family({**fields, "model_type": model_type})
        except NotFound as reason:
            raise refusal(model_type, str(reason)) from reason
    family = _BY_MODEL_TYPE[model_type]
    may_differ = {family.width_key}
    if has_own_head_groups(family, fields):
        head_groups(family, fields)  # refuses what is malformed
        may_differ.add(KEY_HEADS)
    for key, value in _own_values(fields):
        if key not in may_differ and value != fields.get(key):
            raise InvalidInput(
                f"the config's per_layer_config gives layers their own {key}: only {family.width_key} may differ; "
                f"{_supported()}"
            )
    return family


def refuse_obstacles(fields: Mapping[str, Any], *, mixtures: bool = False) -> None:
    """Refuse a `config.json` object that says by itself that its model cannot be pruned; needs no torch.

    Parameters
    ----------
    fields
        The object.
    mixtures
        Whether mixtures of experts can be pruned here.

    Raises
    ------
    InvalidInput
        It names no type, is a mixture of experts, an encoder-decoder or quantized, or has a declared text model's type
        and another model around it.
    """
    model_type = fields.get("model_type")
    if not isinstance(model_type, str):
        raise InvalidInput(f"no model_type in the config ({model_type!r}); {_supported()}")
    if obstacle := _obstacle(fields, declared=model_type in _BY_MODEL_TYPE, mixtures=mixtures):
        raise refusal(model_type, obstacle)


def refusal(model_type: str, reason: str) -> InvalidInput:
    """Return the error for an architecture that cannot be pruned; `reason` is a predicate."""
    return InvalidInput(f"model_type {model_type!r} {reason}; {_supported()}")


def _supported() -> str:
    return (
        f"supported: {', '.join(_BY_MODEL_TYPE)}, and every causal model of transformers whose MLPs are found by "
        "structure"
    )


def _obstacle(fields: Mapping[str, Any], declared: bool, mixtures: bool) -> str | None:
    """Why a model of this config cannot be pruned, as a predicate that follows the model_type; None if it can."""
    if declared:
        for key in ("text_config", "vision_config", "audio_config"):
            if fields.get(key):
                return f"is multimodal or nested ({key})"
        for key, value in fields.items():
            if "expert" in key and value:
                return f"is a mixture of experts ({key}={value})"
    elif not mixtures and (experts := mixture(fields)):
        return f"is a mixture of experts ({experts})"
    for key in ("is_encoder_decoder", "add_cross_attention"):
        if fields.get(key):
            return f"is an encoder-decoder ({key}=true)"
    if quantization := fields.get("quantization_config"):
        method = quantization.get("quant_method") if isinstance(quantization, Mapping) else None
        advice = "prune first, quantize afterwards"
        if can_undo(quantization):
            advice = "make a plain checkpoint of it with `fbn-prune dequantize`"
        return f"is quantized ({method or 'quantization_config'}): {advice}"
    return None


def _own_values(fields: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the keys and values that `per_layer_config` gives to single layers."""
    for values in per_layer(fields).values():
        yield from values.items()
