"""The config of the model in a GGUF file, from its metadata and the names and shapes of its tensors."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

from fbn_prune.errors import InvalidInput
from fbn_prune.model.families import FAMILIES
from fbn_prune.model.family import Family, as_config
from fbn_prune.model.gguf_facts import Gguf
from fbn_prune.model.gguf_header import GgufHeader

ROTARY_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
"""Divisors of the rotary frequencies, which transformers has in the config."""

_SETTINGS = {
    "context_length": ("max_position_embeddings",),
    "embedding_length": ("hidden_size",),
    "block_count": ("num_hidden_layers",),
    "attention.head_count": ("num_attention_heads",),
    "attention.head_count_kv": ("num_key_value_heads", "num_kv_heads"),
    "attention.key_length": ("head_dim",),
    "attention.layer_norm_rms_epsilon": ("rms_norm_eps",),
    "attention.layer_norm_epsilon": ("layer_norm_epsilon", "layer_norm_eps"),
    "attention.sliding_window": ("sliding_window",),
    "attn_logit_softcapping": ("attn_logit_softcapping",),
    "final_logit_softcapping": ("final_logit_softcapping",),
    "rope.scaling.original_context_length": ("original_max_position_embeddings",),
}
"""GGUF's keys, and the attributes of config classes that mean the same; a class has at most one of them."""

_COUNTS = ("context_length", "embedding_length", "block_count", "attention.head_count")
_LLAMA_3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
_ORIGINAL_LENGTHS = tuple(2**power for power in range(10, 18))


@dataclass(frozen=True)
class GgufModel:
    """What model a GGUF file holds.

    Attributes
    ----------
    arch
        llama.cpp's name of the architecture.
    family, layout
        The family, and its form in GGUF files.
    config
        The `config.json` object.
    """

    arch: str
    family: Family
    layout: Gguf
    config: dict[str, Any]


def model_of(path: Path, header: GgufHeader, read: Callable[[str], Tensor]) -> GgufModel:
    """Return what model a file holds.

    Parameters
    ----------
    path
        The file, for messages.
    header
        Its header; that of a split file with the tensors of all parts.
    read
        Returns a tensor in float32; called for the divisors of rotary frequencies.

    Raises
    ------
    InvalidInput
        The architecture or one of its settings is not supported, or a setting is missing or invalid.
    """
    arch = header.metadata.get("general.architecture")
    known = {
        name: (family, family.gguf, model_type)
        for family in FAMILIES
        if family.gguf is not None
        for name, model_type in family.gguf.read_as.items()
    }
    if not isinstance(arch, str) or arch not in known:
        shown = reprlib.repr(arch) if arch is not None else "that it does not name"
        raise InvalidInput(
            f"{path}: GGUF files of the architecture {shown} are not read; supported: {', '.join(known)}"
        )
    family, layout, model_type = known[arch]
    settings = _Settings(path, arch, header.metadata)
    if settings.get("expert_count"):
        raise InvalidInput(f"{path} is a mixture of experts, which cannot be read from GGUF files")
    _check_layers(path, header, settings.count("block_count"))
    try:
        fields = _fields(header, settings, family, model_type)
        layout.complete(fields, header.tensors)
        fields |= _rotary(header, settings, fields, layout, read)
        config = as_config(fields)
    except (TypeError, ValueError, KeyError, ArithmeticError) as error:
        raise InvalidInput(
            f"{path}: its metadata describe no {arch} model: {reprlib.repr(str(error))}"
        ) from error
    except InvalidInput as error:
        raise InvalidInput(f"{path}: {error}") from error
    stock: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    return GgufModel(arch, family, layout, {**config.to_dict(), "architectures": [stock.__name__]})


class _Settings:
    """The settings of the architecture in a file's metadata."""

    def __init__(self, path: Path, arch: str, metadata: Mapping[str, Any]) -> None:
        self._path, self._arch, self._metadata = path, arch, metadata

    def get(self, key: str) -> Any:
        """Return a setting, None if there is none; a list with one value for each layer must have equal values."""
        value = self._metadata.get(f"{self._arch}.{key}")
        if isinstance(value, list):
            if len(set(value)) != 1:
                raise InvalidInput(
                    f"{self._path}: {self._arch}.{key} differs between layers, which cannot be read from GGUF files"
                )
            return value[0]
        return value

    def count(self, key: str) -> int:
        value = self.get(key)
        if not isinstance(value, int) or value < 1:
            raise InvalidInput(
                f"{self._path}: {self._arch}.{key} is {reprlib.repr(value)}: not a positive integer"
            )
        return value


def _check_layers(path: Path, header: GgufHeader, layers: int) -> None:
    """Refuse a number of layers that the tensors do not have, before lists of that length are made."""
    found = {name.split(".")[1] for name in header.tensors if name.startswith("blk.")}
    if layers > len(found):
        raise InvalidInput(
            f"{path} says {layers} layers, but has tensors of {len(found)}: it is damaged, or a part of a split file"
        )


def _fields(
    header: GgufHeader, settings: _Settings, family: Family, model_type: str
) -> dict[str, Any]:
    """The config without its rotary embedding."""
    default = CONFIG_MAPPING[model_type]()
    counts = {key: settings.count(key) for key in _COUNTS}
    stated = {key: settings.get(key) for key in _SETTINGS} | counts
    if stated["attention.key_length"] is None:  # llama.cpp's default
        stated["attention.key_length"] = (
            counts["embedding_length"] // counts["attention.head_count"]
        )
    if stated["attention.head_count_kv"] is None:
        stated["attention.head_count_kv"] = counts["attention.head_count"]
    fields: dict[str, Any] = {"model_type": model_type}
    for key, attributes in _SETTINGS.items():
        for attribute in attributes:
            computed = isinstance(getattr(type(default), attribute, None), property)
            if stated[key] is not None and hasattr(default, attribute) and not computed:
                fields[attribute] = stated[key]
    fields[family.width_key] = settings.count("feed_forward_length")
    names = header.tensors
    if "token_embd.weight" not in names:
        raise ValueError("there is no token_embd.weight")
    fields["vocab_size"] = names["token_embd.weight"].shape[0]
    fields["tie_word_embeddings"] = "output.weight" not in names
    if family.bias_key is not None:
        fields[family.bias_key] = "blk.0.ffn_down.bias" in names
    if hasattr(default, "attention_bias"):
        fields["attention_bias"] = "blk.0.attn_q.bias" in names
    for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        fields[f"{ours}_token_id"] = header.metadata.get(f"tokenizer.ggml.{theirs}_token_id")
    return fields


def _rotary(
    header: GgufHeader,
    settings: _Settings,
    fields: Mapping[str, Any],
    layout: Gguf,
    read: Callable[[str], Tensor],
) -> dict[str, Any]:
    """The config's keys for the rotary embedding."""
    head = fields.get("head_dim") or fields["hidden_size"] // fields["num_attention_heads"]
    theta = settings.get("rope.freq_base") or 10000.0
    rotary: dict[str, Any] = {"rope_theta": theta}
    if (local := settings.get("rope.freq_base_swa")) is not None:
        rotary["rope_local_base_freq"] = local
    rotated = settings.get("rope.dimension_count") or head
    if layout.partly_rotated:
        rotary["partial_rotary_factor"] = rotated / head
    elif rotated != head:
        raise InvalidInput(f"{rotated} of a head's {head} channels are rotated: not supported")
    kind = settings.get("rope.scaling.type") or "none"
    factor, original = (
        settings.get("rope.scaling.factor"),
        settings.get("rope.scaling.original_context_length"),
    )
    scaling: dict[str, Any] | None = None
    present = [name for name in ROTARY_TENSORS if name in header.tensors]
    if "rope_freqs.weight" in present and kind == "none":
        scaling = _llama3(read("rope_freqs.weight"), head, theta, original)
    elif present == list(ROTARY_TENSORS[1:]):
        scaling = {
            "rope_type": "longrope",
            "long_factor": read(ROTARY_TENSORS[1]).tolist(),
            "short_factor": read(ROTARY_TENSORS[2]).tolist(),
            "original_max_position_embeddings": original,
        }
    elif present or kind not in ("none", "linear", "yarn"):
        raise InvalidInput(f"its rotary embedding is of a kind that is not read ({kind})")
    elif kind != "none":
        scaling = {"rope_type": kind, "factor": factor}
        if kind == "yarn":
            scaling["original_max_position_embeddings"] = original
    return rotary if scaling is None else {**rotary, "rope_scaling": scaling}


def _llama3(
    divisors: Tensor, head: int, theta: float, original: int | None
) -> dict[str, Any] | None:
    """The settings of Llama 3's rotary embedding that give these divisors, float32 [head / 2]; None if all are 1."""
    factor = round(float(divisors.max()), 4)
    if factor == 1 and bool((divisors == 1).all()):
        return None
    for length in (original, *_ORIGINAL_LENGTHS):
        if length is None:
            continue
        rope = {
            "rope_type": "llama3",
            "rope_theta": theta,
            "factor": factor,
            **_LLAMA_3,
            "original_max_position_embeddings": length,
        }
        if torch.allclose(llama3_divisors(rope, head), divisors, rtol=1e-5):
            return {key: value for key, value in rope.items() if key != "rope_theta"}
    raise InvalidInput(
        "rope_freqs.weight divides the rotary frequencies in a way that transformers cannot represent"
    )


def llama3_divisors(rope: Mapping[str, Any], head: int) -> Tensor:
    """Return what Llama 3's rotary embedding divides the frequencies by, float32 [head / 2].

    Parameters
    ----------
    rope
        The config's `rope_parameters`.
    head
        Channels of a head.
    """
    plain = rope["rope_theta"] ** (-torch.arange(0, head, 2, dtype=torch.float64) / head)
    wavelength = 2 * math.pi / plain
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    smooth = (rope["original_max_position_embeddings"] / wavelength - low) / (high - low)
    share = smooth.clamp(0, 1)  # 1 keeps the frequency, 0 divides it by the whole factor
    return (1 / (share + (1 - share) / rope["factor"])).float()
