"""Refuse a config that says what llama.cpp's model of the same architecture does not compute.

A GGUF file names an architecture, and llama.cpp has the arithmetic of each in its source: an activation function or an
attention window that a config changes is changed for transformers alone. Every key that the config classes declare is
therefore written to the file, checked here, or known to change no logit; any other must have its default value.
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterator
from typing import Any

from transformers import PretrainedConfig

from fbn_prune.errors import InvalidInput
from fbn_prune.model.checkpoint import Checkpoint
from fbn_prune.model.family import Gguf, as_config

SIZES = frozenset(
    {
        *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim"),
        *("num_attention_heads", "num_key_value_heads", "max_position_embeddings", "rms_norm_eps"),
        *("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings", "mlp_bias"),
    }
)
"""Keys whose values are in the file, as fields or as tensors."""

CHECKED = frozenset(
    {
        *("hidden_act", "rope_parameters", "attention_bias"),
        *("use_sliding_window", "sliding_window", "max_window_layers", "layer_types"),
    }
)
"""Keys that :func:`check_config` looks at."""

WITHOUT_EFFECT = frozenset(
    ["initializer_range", "use_cache", "pretraining_tp", "attention_dropout"]
)
"""Keys that matter only in training, or no longer."""


def check_config(source: Checkpoint, arch: str, facts: Gguf, fields: Any) -> None:
    """Refuse what the architecture cannot express.

    Parameters
    ----------
    source
        The checkpoint to convert.
    arch
        llama.cpp's name of the architecture.
    facts
        What llama.cpp computes there.
    fields
        The attributes of the typed config.

    Raises
    ------
    InvalidInput
        The config asks for it; the key, its value and what llama.cpp does are named.
    """
    for key, value, instead in _inexpressible(source, facts, fields):
        raise InvalidInput(
            f"{source.path / 'config.json'}: {key} = {reprlib.repr(value)} cannot be written to GGUF: llama.cpp's "
            f"{arch} models {instead}"
        )


def _inexpressible(
    source: Checkpoint, facts: Gguf, fields: Any
) -> Iterator[tuple[str, object, str]]:
    activation = source.family.activation(source.config)
    if activation not in facts.activations:
        yield "hidden_act", activation, f"compute {facts.activations[0]}"
    rope = fields.rope_parameters or {}
    kind = rope.get("rope_type", "default")
    if kind not in facts.rope_types:
        known = " and ".join(facts.rope_types)
        yield (
            "rope_type",
            kind,
            f"have rotary embeddings of type {known} only, as they are written here",
        )
    if kind != "default" and rope.get("partial_rotary_factor", 1.0) != 1.0:
        yield "partial_rotary_factor", rope["partial_rotary_factor"], "scale all channels of a head"
    if fields.attention_bias and not facts.attention_bias:
        yield "attention_bias", True, "have no biases in their attention"
    window = fields.sliding_window
    if (
        "sliding_attention" in (fields.layer_types or ())
        and window is not None
        and window < fields.max_position_embeddings
    ):
        yield "sliding_window", window, "attend to the whole context"
    if source.config.get("is_causal") is False:
        yield "is_causal", False, "never attend to later tokens"
    looked_up = SIZES | CHECKED | WITHOUT_EFFECT | set(PretrainedConfig().to_dict())
    stated, default = fields.to_dict(), type(as_config(source.config))().to_dict()
    for key in sorted(default.keys() - looked_up):
        if stated.get(key) != default[key]:
            yield key, stated.get(key), "have no such setting that fbn-prune knows"
