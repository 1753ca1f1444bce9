"""The tensors of a GGUF file as parameters of a model of transformers.

The values are those that the `gguf` package gives. What llama.cpp changed is undone: the order of query and key rows,
the offset of norms, transposed matrices.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import init_empty_weights
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from fbn_prune.errors import FbnPruneError, InvalidInput
from fbn_prune.model.family import as_config
from fbn_prune.model.gguf_config import ROTARY_TENSORS, GgufModel
from fbn_prune.model.gguf_header import GgufHeader, GgufTensor
from fbn_prune.model.headers import one_line

SLICE_VALUES = 2**20
"""Values that are dequantized at a time; they need a few temporary arrays of that many four-byte numbers."""

FLOATS = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16}
"""GGUF's numbers of the types that are not quantized."""


@dataclass(frozen=True)
class Source:
    """Where the values of a parameter come from.

    Attributes
    ----------
    tensor
        The tensor in the file.
    offset
        What is subtracted from its values.
    transposed
        Whether it is the transpose of the parameter.
    order
        How to order its rows; None if they are in order.
    """

    tensor: GgufTensor
    offset: int = 0
    transposed: bool = False
    order: Callable[[Tensor], Tensor] | None = None


def package_gguf() -> Any:
    """Return the package `gguf`, which not every installation has; raise InvalidInput if it is missing."""
    try:
        import gguf
    except ImportError:
        raise InvalidInput("reading GGUF files needs the package gguf: pip install gguf") from None
    return gguf


def dtype_of(header: GgufHeader, model: GgufModel) -> torch.dtype:
    """The dtype of the most matrices if none is quantized, otherwise the family's."""
    kinds = [tensor.kind for tensor in header.tensors.values() if len(tensor.shape) > 1]
    if not set(kinds) <= FLOATS.keys():
        dtype: torch.dtype = getattr(torch, model.layout.dtype)
        return dtype
    return FLOATS[max(sorted(set(kinds)), key=kinds.count)]


def require_dequantization(path: Path, header: GgufHeader) -> None:
    """Refuse tensors whose type the gguf package knows, but cannot dequantize."""
    gguf = package_gguf()
    for kind, name in {tensor.kind: tensor.name for tensor in header.tensors.values()}.items():
        numbered = gguf.GGMLQuantizationType(kind)
        block = np.zeros((1, gguf.GGML_QUANT_SIZES[numbered][1]), dtype=np.uint8)
        try:
            gguf.dequantize(block, numbered)
        except NotImplementedError:
            raise InvalidInput(
                f"{path}: {name} is quantized as {numbered.name}, which the gguf package cannot dequantize"
            ) from None


def dequantized(tensor: GgufTensor, dtype: torch.dtype, offset: int) -> Tensor:
    """Return a tensor in `dtype`, its rows dequantized in slices and rounded once from float32.

    Parameters
    ----------
    tensor
        The tensor.
    dtype
        Dtype of the result.
    offset
        What is subtracted from the values before they are rounded.

    Raises
    ------
    FbnPruneError
        A value is not finite, or too large for `dtype`.
    """
    gguf = package_gguf()
    kind = gguf.GGMLQuantizationType(tensor.kind)
    columns = tensor.shape[-1]
    rows = prod(tensor.shape[:-1])
    result = torch.empty((rows, columns), dtype=dtype)
    stored = np.memmap(
        tensor.part, np.uint8, mode="r", offset=tensor.start, shape=(rows, tensor.nbytes // rows)
    )
    at_once = max(1, SLICE_VALUES // columns)
    for start in range(0, rows, at_once):
        with np.errstate(all="ignore"):  # what is not finite is refused below
            values = gguf.dequantize(np.array(stored[start : start + at_once]), kind)
        part = torch.from_numpy(values)
        rounded = (part - offset if offset else part).to(dtype)
        if not bool(torch.isfinite(rounded).all()):
            if bool(torch.isfinite(part).all()):
                raise FbnPruneError(
                    f"{tensor.part}: {tensor.name} has values too large for {dtype}: "
                    "dequantize the file with --dtype bfloat16 first"
                )
            raise FbnPruneError(
                f"{tensor.part}: {tensor.name} has values that are not finite: the file is damaged"
            )
        result[start : start + at_once] = rounded
    return result.reshape(tensor.shape)


def sources_of(
    path: Path, header: GgufHeader, model: GgufModel, package: Any
) -> dict[str, tuple[Source, tuple[int, ...]]]:
    """Return the source and the shape of each parameter of the model.

    Raises
    ------
    InvalidInput
        The file lacks a parameter, has it in another shape, or has a tensor that is no parameter.
    """
    try:
        with init_empty_weights(include_buffers=True):
            bare = AutoModelForCausalLM.from_config(
                as_config(model.config), trust_remote_code=False
            )
    except Exception as error:  # sizes that contradict each other fail anywhere in the model's code
        raise InvalidInput(
            f"{path}: its metadata describe no {model.arch} model: {one_line(error)}"
        ) from error
    number = next(key for key, name in package.MODEL_ARCH_NAMES.items() if name == model.arch)
    names = package.get_tensor_name_map(number, model.family.num_layers(model.config))
    root = model.family.layers.partition(".")[0] + "."
    sources: dict[str, tuple[Source, tuple[int, ...]]] = {}
    for name, parameter in bare.named_parameters():
        module, _, part = name.rpartition(".")
        stem = names.get_name(module) or names.get_name(module.removeprefix(root))
        found = header.tensors.get(f"{stem}.{part}")
        if stem is None or found is None:
            raise InvalidInput(f"{path} has no tensor for the model's {name} ({stem}.{part})")
        transposed = isinstance(bare.get_submodule(module), Conv1D) and part == "weight"
        shape = found.shape[::-1] if transposed else found.shape
        if shape != tuple(parameter.shape):
            raise InvalidInput(
                f"{path}: {found.name} has shape {list(found.shape)}, "
                f"but the metadata require {list(parameter.shape)} for {name}"
            )
        offset = model.layout.norm_offset if found.name.endswith("norm.weight") else 0
        sources[name] = Source(found, offset, transposed, _order(found.name, model)), shape
    used = {source.tensor.name for source, _ in sources.values()} | {*ROTARY_TENSORS}
    if rest := [name for name in header.tensors if name not in used]:
        more = f" (nor {len(rest) - 1} other tensors of the file)" if len(rest) > 1 else ""
        raise InvalidInput(
            f"{path}: the {model.arch} models of transformers have no {rest[0]}{more}"
        )
    return sources


def _order(name: str, model: GgufModel) -> Callable[[Tensor], Tensor] | None:
    """How to order the rows of an attention tensor as transformers does; None if they are in order."""
    heads = model.family.head_shape(model.config)
    if model.layout.paired_rope and (match := re.search(r"\.attn_([qk])\.", name)):
        groups = heads.heads if match[1] == "q" else heads.groups
        return lambda values: _halves(values, groups)
    if model.layout.heads_apart and ".attn_qkv." in name:
        groups = int(as_config(model.config).num_kv_heads)
        return lambda values: _grouped(values, groups, heads.size)
    return None


def _halves(values: Tensor, heads: int) -> Tensor:
    """Take the rotary pairs, which llama.cpp has as neighbours, apart into the two halves of a head."""
    pairs = values.shape[0] // heads // 2
    return values.reshape(heads, pairs, 2, *values.shape[1:]).transpose(1, 2).reshape(values.shape)


def _grouped(values: Tensor, groups: int, size: int) -> Tensor:
    """Put each group's queries, its key and its value together."""
    rest = values.shape[1:]
    queries = values.shape[0] - 2 * groups * size
    q, k, v = values.split([queries, groups * size, groups * size])
    parts = (
        q.reshape(groups, -1, *rest),
        k.reshape(groups, size, *rest),
        v.reshape(groups, size, *rest),
    )
    return torch.cat(parts, dim=1).reshape(values.shape)
