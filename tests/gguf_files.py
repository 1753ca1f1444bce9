"""GGUF files as llama.cpp's converter writes them for tiny models, in any quantization type.

Written from llama.cpp's `convert_hf_to_gguf.py` and not with `fbn_prune.export.to_gguf`, so that the reader is held
against something else than its own counterpart.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from tiny_models import HIDDEN, make_merging_tokenizer
from tokenizers import pre_tokenizers
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

Kind = gguf.GGMLQuantizationType
ARCHES = {"gemma3_text": "gemma3"}
VOCAB = 264


def random_blocks(kind: Kind, rows: int, columns: int, seed: int = 0) -> np.ndarray:
    """Valid random bytes of a type that the gguf package cannot quantize: all numbers small and finite."""
    values, nbytes = gguf.GGML_QUANT_SIZES[kind]
    random = np.random.default_rng(seed)
    blocks = random.integers(0, 256, (rows * columns // values, nbytes), dtype=np.uint8)
    scales = {"Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "Q2_K": (80, 82), "Q3_K": (108,)}
    for place in scales.get(kind.name, (0,)):
        scale = random.uniform(1e-4, 2e-3, len(blocks)).astype(np.float16)
        blocks[:, place : place + 2] = scale.view(np.uint8).reshape(-1, 2)
    return blocks.reshape(rows, -1)


def quantized(values: np.ndarray, kind: Kind) -> np.ndarray:
    try:
        return gguf.quantize(values, kind)
    except NotImplementedError:
        return random_blocks(kind, *values.shape)


def as_llama_cpp(model: PreTrainedModel, name: str, values: torch.Tensor) -> torch.Tensor:
    """A weight as the converter changes it."""
    config: Any = model.config
    kind, (module, _, part) = config.model_type, name.rpartition(".")
    if kind == "llama" and (match := re.search(r"self_attn\.([qk])_proj", name)):
        heads = config.num_attention_heads if match[1] == "q" else config.num_key_value_heads
        halves = values.reshape(heads, 2, -1, *values.shape[1:])
        return halves.transpose(1, 2).reshape(values.shape)
    if kind.startswith("gemma") and name.endswith("norm.weight"):
        return values + 1
    if isinstance(model.get_submodule(module), Conv1D) and part == "weight":
        return values.T
    if kind == "falcon" and "query_key_value" in name:
        groups = config.num_kv_heads if config.new_decoder_architecture else 1
        size = config.hidden_size // config.num_attention_heads
        rows = values.reshape(groups, -1, size, *values.shape[1:])
        split = (rows[:, :-2], rows[:, -2:-1], rows[:, -1:])
        return torch.cat([one.reshape(-1, *values.shape[1:]) for one in split])
    return values


def settings_of(model: PreTrainedModel) -> dict[str, Any]:
    """The metadata that the converter writes about a model, without the architecture's prefix."""
    config: Any = model.config
    fields = config.to_dict()
    kind = config.model_type
    heads = config.num_attention_heads
    head = fields.get("head_dim") or config.hidden_size // heads
    width = (
        fields.get("intermediate_size") or fields.get("ffn_hidden_size") or 4 * config.hidden_size
    )
    shared = fields.get("num_key_value_heads") or heads
    if kind == "falcon":
        shared = config.num_kv_heads if config.new_decoder_architecture else 1
    found = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": width,
        "attention.head_count": heads,
        "attention.head_count_kv": shared,
    }
    if "rms_norm_eps" in fields:
        found["attention.layer_norm_rms_epsilon"] = config.rms_norm_eps
    else:
        key = "layer_norm_eps" if kind == "stablelm" else "layer_norm_epsilon"
        found["attention.layer_norm_epsilon"] = fields[key]
    if kind not in ("gpt2", "falcon"):
        found |= {"attention.key_length": head, "attention.value_length": head}
    if kind != "gpt2":
        rope = config.rope_parameters
        found["rope.freq_base"] = float(rope.get("full_attention", rope)["rope_theta"])
        found["rope.dimension_count"] = int(head * rope.get("partial_rotary_factor", 1))
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        if fields.get(key):
            found[key] = fields[key]
    if kind.startswith("gemma"):
        found["attention.sliding_window"] = config.sliding_window
    if kind == "phi3":
        found["rope.scaling.original_context_length"] = config.original_max_position_embeddings
    return found


def write_gguf_file(
    path: Path,
    model: PreTrainedModel,
    kind_of: Callable[[str], Kind] = lambda name: Kind.F32,
    *,
    arch: str | None = None,
    changes: Mapping[str, Any] | None = None,
    extra: Mapping[str, np.ndarray] | None = None,
    keep: Callable[[str], bool] = lambda name: True,
    parts: int = 1,
) -> Path:
    """Write a tiny model as one GGUF file, or as several parts.

    Parameters
    ----------
    kind_of
        The quantization type of a matrix, by its GGUF name.
    arch
        The architecture that the file names. Default: the model's.
    changes
        Metadata that replace the model's, None to leave a key out.
    extra
        More tensors.
    keep
        Which tensors are written.

    Returns
    -------
    Path
        The file, or the first part.
    """
    kind = model.config.model_type
    own = ARCHES.get(kind, kind)
    number = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == own)
    names = gguf.get_tensor_name_map(number, model.config.num_hidden_layers)
    tensors: dict[str, tuple[np.ndarray, Kind]] = {}
    for name, parameter in model.named_parameters():
        found = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert found is not None, name
        values = as_llama_cpp(model, name, parameter.detach().float()).contiguous().numpy()
        stored = kind_of(found) if values.ndim > 1 else Kind.F32
        tensors[found] = quantized(values, stored), stored
    tensors |= {name: (values, Kind.F32) for name, values in (extra or {}).items()}
    tensors = {name: tensor for name, tensor in tensors.items() if keep(name)}
    arch = arch or own
    fields = {f"{arch}.{key}": value for key, value in settings_of(model).items()}
    fields |= tokenizer_fields() | dict(changes or {})
    paths = [path] if parts == 1 else [_part(path, i, parts) for i in range(parts)]
    for index, place in enumerate(paths):
        writer = gguf.GGUFWriter(place, arch)
        if parts > 1:
            writer.add_uint16("split.no", index)
            writer.add_uint16("split.count", parts)
        if index == 0:
            _add(writer, {key: value for key, value in fields.items() if value is not None})
        for name in list(tensors)[index::parts]:
            values, stored = tensors[name]
            writer.add_tensor(name, values, raw_dtype=stored)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return paths[0]


def _part(path: Path, index: int, parts: int) -> Path:
    return path.with_name(f"{path.stem}-{index + 1:05}-of-{parts:05}.gguf")


def tokenizer_fields() -> dict[str, Any]:
    """A byte-level tokenizer: a token for each byte, <s>, </s> and one merge."""
    tokenizer = make_merging_tokenizer()
    tokens = [text for text, _ in sorted(tokenizer.get_vocab().items(), key=lambda one: one[1])]
    assert len(tokens) == len(pre_tokenizers.ByteLevel.alphabet()) + 3
    tokens += [f"[PAD{index}]" for index in range(len(tokens), VOCAB)]
    control = [
        3 if text in ("<s>", "</s>") else 5 if text.startswith("[PAD") else 1 for text in tokens
    ]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": control,
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.bos_token_id": 256,
        "tokenizer.ggml.eos_token_id": 257,
        "tokenizer.ggml.padding_token_id": 257,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": "{% for m in messages %}<s>{{ m.content }}</s>{% endfor %}",
        "general.license": "apache-2.0",
    }


def _add(writer: Any, fields: Mapping[str, Any]) -> None:
    for key, value in fields.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, Sequence):
            writer.add_array(key, list(value))
        else:
            raise TypeError(key)


assert HIDDEN % 16 == 0
