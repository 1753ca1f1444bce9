"""The supported architectures, one declarative entry each, and the choice of the entry for a config.

The facts come from the modeling files of transformers. Everything that differs between architectures is in these
entries.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from fbn_prune.errors import InvalidInput
from fbn_prune.model.family import Family, Gguf, Projection, per_layer
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
        ),
    ),
    _gated("Mistral", "mistral"),
    _gated("OLMo 2", "olmo2", attention=None),
    _gated("Qwen2", "qwen2", gguf=Gguf("qwen2", own_head_size=False)),
    _gated("Qwen3", "qwen3", gguf=Gguf("qwen3")),
    _gated(
        "Gemma",
        "gemma",
        "gemma2",
        "gemma3_text",
        activation_keys=("hidden_activation", "hidden_act"),
    ),
    _gated("Granite", "granite", bias_key="mlp_bias"),
    Family(
        "Phi-3",
        ("phi3",),
        layers="model.layers",
        inputs=(Projection("mlp.gate_up_proj", 0, stacked=2),),
        output=Projection("mlp.down_proj", 1),
        attention=_FUSED,
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
        The model cannot be pruned: it is a mixture of experts, encoder-decoder, multimodal or quantized, its layers
        differ in more than their width, or its architecture has no entry in `FAMILIES`.
    """
    fields = config if isinstance(config, Mapping) else config.to_dict()
    model_type = fields.get("model_type") or getattr(config, "model_type", None)
    supported = f"supported: {', '.join(_BY_MODEL_TYPE)}"
    if not isinstance(model_type, str):
        raise InvalidInput(f"no model_type in the config ({model_type!r}); {supported}")
    if obstacle := _obstacle(fields):
        raise InvalidInput(f"model_type {model_type!r} {obstacle}; {supported}")
    if model_type not in _BY_MODEL_TYPE:
        raise InvalidInput(f"model_type {model_type!r} is not known; {supported}")
    family = _BY_MODEL_TYPE[model_type]
    for key, value in _own_values(fields):
        if key != family.width_key and value != fields.get(key):
            raise InvalidInput(
                f"the config's per_layer_config gives layers their own {key}: only {family.width_key} may differ; "
                f"{supported}"
            )
    return family


def _obstacle(fields: Mapping[str, Any]) -> str | None:
    """Why a model of this config cannot be pruned, as a predicate that follows the model_type; None if it can."""
    for key in ("text_config", "vision_config", "audio_config"):
        if fields.get(key):
            return f"is multimodal or nested ({key})"
    for key, value in fields.items():
        if "expert" in key and value:
            return f"is a mixture of experts ({key}={value})"
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
