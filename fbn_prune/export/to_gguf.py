"""Write a checkpoint as a GGUF file for llama.cpp, tensor by tensor, with the `gguf` package.

If the layers differ in width or in their heads, the file names an architecture for which llama.cpp reads the sizes of
each layer. Vectors are stored in float32, as llama.cpp requires; matrices keep their dtype or get the requested one.
"""

from __future__ import annotations

import math
import os
import re
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from fbn_prune.errors import InvalidInput
from fbn_prune.export.directory import disk_errors
from fbn_prune.export.gguf_limits import check_config
from fbn_prune.export.gguf_tokenizer import GgufTokenizer, gguf_tokenizer
from fbn_prune.export.llama_cpp import verifier
from fbn_prune.model.checkpoint import Checkpoint
from fbn_prune.model.family import as_config
from fbn_prune.model.gguf_config import llama3_divisors
from fbn_prune.model.gguf_facts import Gguf
from fbn_prune.model.head_groups import has_own_head_groups, head_groups
from fbn_prune.model.streaming import check_tensors

GgufType = Literal["auto", "f32", "f16", "bf16"]
"""Dtype of the matrices; "auto" keeps that of the checkpoint."""

_NAMES_WITH_RULES = ("phi-3", "phi3", "modern-bert")
"""llama.cpp applies its own rules for special tokens to models with these names, or does not load them."""

_DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


def write(
    source: Checkpoint,
    path: Path,
    *,
    dtype: GgufType = "auto",
    progress: Callable[[int], None] | None = None,
    note: Callable[[str], None] | None = None,
    verify: bool | None = False,
) -> str:
    """Write a checkpoint as a GGUF file. If writing fails, no file is left.

    Parameters
    ----------
    source
        The checkpoint, uniform or ragged.
    path
        The file to write; missing parent folders are created.
    dtype
        Of the matrices; "auto" keeps that of the checkpoint.
    progress
        Called with the number of bytes of each written tensor.
    note
        Called with one line for each way in which llama.cpp may tokenize rare text differently, and one on `verify`.
    verify
        Run llama.cpp on the file and compare its answers with those of transformers: True requires this, None does it
        where llama.cpp is installed.

    Returns
    -------
    str
        GGUF's name of the architecture.

    Raises
    ------
    InvalidInput
        The family, its config or its tokenizer cannot be converted, or a package is not installed.
    FbnPruneError
        The file cannot be written, or llama.cpp answers differently.
    """
    gguf = _package()
    facts, arch = _architecture(source)
    config = _OwnAttributes(as_config(source.config))
    check_config(source, arch, facts, config)
    check_tensors(source)
    tokenizer = gguf_tokenizer(
        source.folder,
        source.load_tokenizer(),
        source.family.vocab_size(source.config),
        source.config,
    )
    tensors = _plan(source, _Names(gguf, arch, source), dtype)
    extra = _rope_factors(config)
    note = note or (lambda line: None)
    compare = verifier(source, _DTYPES.get(dtype), verify, note)
    for line in tokenizer.notes:
        note(line)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    writer = gguf.GGUFWriter(partial, arch)
    try:
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            _add_facts(writer, source, config)
            _add_tokenizer(writer, tokenizer)
            for name, stored in tensors.items():
                _add_info(gguf, writer, name, stored.shape, stored.dtype)
            if extra is not None:
                _add_info(gguf, writer, "rope_freqs.weight", tuple(extra.shape), torch.float32)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for stored in tensors.values():
                tensor = source.tensor(stored.name)
                if facts.paired_rope:
                    tensor = _reordered(tensor, stored.name, config)
                writer.write_tensor_data(_array(tensor.to(stored.dtype)))
                if progress is not None:
                    progress(source.tensors[stored.name].nbytes)
            if extra is not None:
                writer.write_tensor_data(_array(extra))
            writer.close()
        if compare is not None:
            compare(partial)
        with disk_errors(path):
            os.replace(partial, path)
    finally:
        writer.close()
        partial.unlink(missing_ok=True)
    return arch


def _package() -> Any:
    try:
        import gguf
    except ImportError:
        raise InvalidInput("writing GGUF files needs the package gguf: pip install gguf") from None
    return gguf


def _architecture(source: Checkpoint) -> tuple[Gguf, str]:
    facts = source.family.gguf
    if facts is None or facts.arch is None:
        raise InvalidInput(
            f"{source.path}: {source.family.name} models are not converted to GGUF by fbn-prune"
        )
    heads = source.family.head_shape(source.config)
    if not facts.own_head_size and heads.heads * heads.size != source.family.hidden_size(
        source.config
    ):
        raise InvalidInput(
            f"{source.path}: for {source.family.name} llama.cpp requires heads * head size = hidden size; "
            "prune without --head-sparsity"
        )
    own_heads = has_own_head_groups(source.family, source.config)
    if len(set(source.family.widths(source.config))) == 1 and not own_heads:
        return facts, facts.arch
    if facts.ragged_arch is None:
        what = "numbers of attention heads" if own_heads else "widths"
        raise InvalidInput(
            f"{source.path}: llama.cpp reads layers of different {what} only with Llama's arithmetic, not that of "
            f"{source.family.name}; prune with --layout uniform"
        )
    if head_groups(source.family, source.config)[0] == 0:
        raise InvalidInput(
            f"{source.path}: its first layer has no attention, from which llama.cpp reads the model's heads; convert a "
            "model whose first layer has some"
        )
    return facts, facts.ragged_arch


class _OwnAttributes:
    """The attributes of a config, including those that a ragged config gives only for single layers."""

    def __init__(self, config: Any) -> None:
        self._fields = config.to_dict()
        self._config = config

    def to_dict(self) -> dict[str, Any]:
        return dict(self._fields)

    def __getattr__(self, name: str) -> Any:
        return self._fields[name] if name in self._fields else getattr(self._config, name, None)


class _Names:
    """Maps the names of a checkpoint's tensors to GGUF's names."""

    def __init__(self, gguf: Any, arch: str, source: Checkpoint) -> None:
        number = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
        self._map = gguf.get_tensor_name_map(number, source.family.num_layers(source.config))
        self._root = source.family.layers.partition(".")[0] + "."

    def __call__(self, name: str) -> str | None:
        """Return the GGUF name of a tensor; None if it has none."""
        for spelled in (name, self._root + name):
            if (
                found := self._map.get_name(spelled, try_suffixes=(".weight", ".bias"))
            ) is not None:
                return str(found)
        return None


@dataclass(frozen=True)
class _Stored:
    """A tensor of the checkpoint, and its dtype in the GGUF file."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype


def _plan(source: Checkpoint, names: _Names, matrices: GgufType) -> dict[str, _Stored]:
    """Return the tensors by GGUF name, in the order of the file.

    Where a layer has no attention, llama.cpp has no norm before it either.
    """
    groups = head_groups(source.family, source.config)
    unused = {f"blk.{layer}.attn_norm.weight" for layer, kept in enumerate(groups) if kept == 0}
    plan: dict[str, _Stored] = {}
    for stored, info in source.tensors.items():
        if stored.endswith("rotary_emb.inv_freq"):
            continue
        name = names(stored)
        if name is None:
            raise InvalidInput(f"{source.path}: GGUF has no tensor for {stored}")
        if name in unused:
            continue
        dtype = info.dtype if matrices == "auto" else _DTYPES[matrices]
        plan[name] = _Stored(stored, info.shape, torch.float32 if len(info.shape) == 1 else dtype)
    return plan


def _add_info(
    gguf: Any, writer: Any, name: str, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    kind = {
        torch.float32: gguf.GGMLQuantizationType.F32,
        torch.float16: gguf.GGMLQuantizationType.F16,
        torch.bfloat16: gguf.GGMLQuantizationType.BF16,
    }.get(dtype)
    if kind is None:
        raise InvalidInput(
            f"{name} is stored as {dtype}, which GGUF does not have: choose a type with --gguf-type"
        )
    size = math.prod(shape) * dtype.itemsize
    writer.add_tensor_info(name, shape, np.dtype(np.float32), size, raw_dtype=kind)


def _array(tensor: Tensor) -> Any:
    return tensor.contiguous().view(torch.uint8).numpy()


def _reordered(tensor: Tensor, name: str, config: _OwnAttributes) -> Tensor:
    """Reorder query and key rows, whose rotary pairs are the halves of a head, so that pairs are neighbours."""
    if re.search(r"self_attn\.[qk]_proj\.", name) is None:
        return tensor
    size = config.head_dim or config.hidden_size // config.num_attention_heads
    split = tensor.reshape(-1, 2, size // 2, *tensor.shape[1:])
    return split.swapaxes(1, 2).reshape(tensor.shape)


def _add_facts(writer: Any, source: Checkpoint, config: _OwnAttributes) -> None:
    family = source.family
    widths = family.widths(source.config)
    groups, shape = head_groups(family, source.config), family.head_shape(source.config)
    heads = [shape.queries * each for each in groups]
    ragged = len(set(widths)) > 1 or has_own_head_groups(family, source.config)
    name = source.path.resolve().name
    if not any(word in name.lower() for word in _NAMES_WITH_RULES):
        writer.add_name(name)
    writer.add_block_count(len(widths))
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(widths if ragged else widths[0])
    writer.add_head_count(heads if ragged else heads[0])
    writer.add_head_count_kv(groups if ragged else groups[0])
    writer.add_key_length(shape.size)
    writer.add_value_length(shape.size)
    writer.add_rope_dimension_count(shape.size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_freq_base(_rope(config)["rope_theta"])


def _rope(config: _OwnAttributes) -> dict[str, Any]:
    rope: dict[str, Any] = config.rope_parameters or {"rope_type": "default", "rope_theta": 10000.0}
    return rope


def _rope_factors(config: _OwnAttributes) -> Tensor | None:
    """Return the divisors of the rotary frequencies, float32 [head / 2]; None for the default embedding."""
    rope = _rope(config)
    if rope["rope_type"] != "llama3":
        return None
    head = config.head_dim or config.hidden_size // config.num_attention_heads
    return llama3_divisors(rope, head)


def _add_tokenizer(writer: Any, tokenizer: GgufTokenizer) -> None:
    writer.add_tokenizer_model(tokenizer.model)
    writer.add_tokenizer_pre(tokenizer.split)
    writer.add_token_list([token.encode("utf-8") for token in tokenizer.tokens])
    writer.add_token_types(tokenizer.types)
    if tokenizer.scores:
        writer.add_token_scores(tokenizer.scores)
    if tokenizer.merges:
        writer.add_token_merges(tokenizer.merges)
    for key, index in tokenizer.special.items():
        getattr(writer, f"add_{key}_token_id")(index)
    writer.add_add_bos_token(tokenizer.adds_bos)
    writer.add_add_eos_token(tokenizer.adds_eos)
    writer.add_add_space_prefix(tokenizer.adds_space)
    if tokenizer.chat_template is not None:
        writer.add_chat_template(tokenizer.chat_template)
