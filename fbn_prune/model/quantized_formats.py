"""Find the tensors that each quantized weight consists of, from `quantization_config` and the headers.

Supported are fp8 (DeepSeek, Qwen3-FP8, AutoFP8), compressed-tensors (its naive-, int-, float- and pack-quantized
formats) and bitsandbytes (8 bits, nf4, fp4). They store a weight as low-precision numbers with scales;
:mod:`fbn_prune.model.quantized_values` computes the weight from them. Other methods are refused by name.
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch

from fbn_prune.errors import InvalidInput
from fbn_prune.model.quantization import known_method
from fbn_prune.model.quantized_values import Coded, Nested, Read, Scaled, Stored
from fbn_prune.model.shards import TensorInfo

_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_FORMATS = ("naive-quantized", "int-quantized", "float-quantized", "pack-quantized")
_PACKABLE = (1, 2, 4, 8)
"""Bit widths whose numbers never straddle two words. For the others two packings exist that look alike."""

_MOST_STATE_BYTES = 2**16
_CODES = ("nf4", "fp4")
_LONGEST_RUN = 4096
"""Largest block size that bitsandbytes offers, in elements."""

Tensors = Mapping[str, TensorInfo]


def stored_weights(tensors: Tensors, quantization: Any, read: Read) -> dict[str, Stored]:
    """Return the quantized weights of a checkpoint by their plain names.

    Parameters
    ----------
    tensors
        The headers.
    quantization
        The config's quantization settings.
    read
        Returns a stored tensor by name; called only for small tensors that describe others.

    Raises
    ------
    InvalidInput
        The method or format is not supported, or a weight's tensors are missing or have unexpected shapes.
    """
    find = _METHODS[known_method(quantization)](tensors, quantization, read)
    return dict(weight for name in tensors if (weight := find(name)) is not None)


Find = Callable[[str], tuple[str, Stored] | None]
"""Given the name of a tensor that holds a weight's numbers, returns the weight's plain name and storage; else None."""


# Schemes: the block of elements that shares a scale


@dataclass(frozen=True)
class _Scheme:
    """Rows and columns that share a scale (None for all), and the bits of a packed number."""

    rows: int | None
    columns: int | None
    bits: int = 8
    symmetric: bool = True

    def block(self, shape: tuple[int, int]) -> tuple[int, int]:
        rows, columns = (max(1, size) for size in shape)
        return min(self.rows or rows, rows), min(self.columns or columns, columns)


_WHOLE = _Scheme(None, None)
_ROWS = _Scheme(1, None)


def _scaled(
    tensors: Tensors, weight: str, shape: tuple[int, ...], scale: str, schemes: list[_Scheme]
) -> tuple[Scaled, _Scheme]:
    """The only scheme that fits the shape of the scales.

    The config assigns modules to groups by regular expressions. Those of an untrusted config could run forever, so the
    shapes of the scales decide instead.
    """
    if len(shape) != 2:
        raise InvalidInput(f"{weight} has shape {list(shape)}: a quantized weight is a matrix")
    info = _need(tensors, scale, weight)
    if not info.dtype.is_floating_point or info.dtype in _FLOAT8:
        raise InvalidInput(f"{scale} is stored as {info.dtype}: a scale is floating point")
    rows, columns = shape
    found: dict[tuple[int, int], tuple[Scaled, _Scheme]] = {}
    for scheme in schemes:
        candidate = Scaled(weight, (rows, columns), scale, scheme.block((rows, columns)))
        if _is_grid(info.shape, candidate.grid):
            found.setdefault(candidate.block, (candidate, scheme))
    if not found:
        grids = {
            Scaled(weight, (rows, columns), scale, s.block((rows, columns))).grid for s in schemes
        }
        fits = " or ".join(str(list(grid)) for grid in sorted(grids)) or "no quantized weights"
        raise InvalidInput(f"{scale} has shape {list(info.shape)}, but the config implies {fits}")
    if len(found) > 1:
        blocks = " and ".join(str(list(block)) for block in sorted(found))
        raise InvalidInput(f"{scale} fits blocks of {blocks}: the config does not say which")
    return next(iter(found.values()))


def _is_grid(shape: tuple[int, ...], grid: tuple[int, int]) -> bool:
    """Whether a tensor of this shape has one element for each block; trailing dimensions of 1 may be missing."""
    return shape == grid or (grid[1] == 1 and shape == grid[:1]) or (grid == (1, 1) and shape == ())


def _need(tensors: Tensors, name: str, weight: str) -> TensorInfo:
    if name not in tensors:
        raise InvalidInput(f"{weight} is quantized, but its {name} is not in the checkpoint")
    return tensors[name]


def _beside(name: str, end: str, other: str) -> str:
    return name.removesuffix(end) + other


def _positive(value: Any, what: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InvalidInput(f"{what} must be a positive integer, found {reprlib.repr(value)}")
    return value


def _sizes(value: Any, what: str) -> tuple[int, int]:
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise InvalidInput(f"{what} must be two positive integers, found {reprlib.repr(value)}")
    return _positive(value[0], what), _positive(value[1], what)


# fp8


def _fp8(tensors: Tensors, quantization: Mapping[str, Any], read: Read) -> Find:
    schemes = [_WHOLE]
    if "weight_block_size" not in quantization:
        schemes.append(_Scheme(128, 128))  # transformers' default
    elif (block := quantization["weight_block_size"]) is not None:
        schemes = [_Scheme(*_sizes(block, "weight_block_size"))]

    def find(name: str) -> tuple[str, Stored] | None:
        if not name.endswith(".weight") or tensors[name].dtype not in _FLOAT8:
            return None
        scale = f"{name}_scale_inv"  # a factor, in spite of its name
        if scale not in tensors and f"{name}_scale" in tensors:
            scale = f"{name}_scale"  # AutoFP8's name
        return name, _scaled(tensors, name, tensors[name].shape, scale, schemes)[0]

    return find


# compressed-tensors


def _compressed(tensors: Tensors, quantization: Mapping[str, Any], read: Read) -> Find:
    groups = list(_groups(quantization))

    def find(name: str) -> tuple[str, Stored] | None:
        info = tensors[name]
        if name.endswith(".weight_packed"):
            return _beside(name, "weight_packed", "weight"), _packed(tensors, name, groups, read)
        if not name.endswith(".weight") or info.dtype not in (torch.int8, *_FLOAT8):
            return None
        schemes = [scheme for packed, scheme in groups if not packed]
        scaled, scheme = _scaled(tensors, name, info.shape, f"{name}_scale", schemes)
        return name, _completed(tensors, scaled, scheme, name)

    return find


def _groups(quantization: Mapping[str, Any]) -> Iterator[tuple[bool, _Scheme]]:
    """Yield (is packed, scheme) for each group of weights in the config."""
    for key, holds in (("sparsity_config", "format"), ("transform_config", "config_groups")):
        own = quantization.get(key)
        if isinstance(own, Mapping) and own.get(holds) not in (None, "dense", {}):
            raise InvalidInput(f"weights stored with a {key} cannot be dequantized")
    groups = quantization.get("config_groups") or {}
    if not isinstance(groups, Mapping):
        raise InvalidInput(f"config_groups must be an object, found {reprlib.repr(groups)}")
    for name, group in groups.items():
        if not isinstance(group, Mapping):
            raise InvalidInput(f"the quantization's group {reprlib.repr(name)} must be an object")
        weights = group.get("weights")
        if not weights:
            continue
        form = group.get("format") or quantization.get("format")
        if form not in _FORMATS:
            raise InvalidInput(
                f"the compressed-tensors format {reprlib.repr(form)} cannot be dequantized; "
                f"supported: {', '.join(_FORMATS)}"
            )
        yield form == "pack-quantized", _scheme(weights)


def _scheme(weights: Any) -> _Scheme:
    """The scheme of compressed-tensors' quantization arguments."""
    if not isinstance(weights, Mapping):
        raise InvalidInput(f"a group's weights must be an object, found {reprlib.repr(weights)}")
    bits = _positive(weights.get("num_bits", 8), "num_bits")
    if bits > 8:
        raise InvalidInput(f"num_bits is {bits}: compressed-tensors has at most 8")
    symmetric = bool(weights.get("symmetric", True))
    size = weights.get("group_size")
    implied = "tensor" if size is None else "channel" if size == -1 else "group"
    strategy = weights.get("strategy") or implied
    if strategy == "tensor":
        return _Scheme(None, None, bits, symmetric)
    if strategy == "channel":
        return _Scheme(1, None, bits, symmetric)
    if strategy == "group":
        return _Scheme(1, _positive(size, "group_size"), bits, symmetric)
    if strategy == "block":
        block = weights.get("block_structure")
        if isinstance(block, str) and all(part.isdecimal() for part in block.split("x")):
            block = [int(part[:9]) for part in block.split("x")]
        return _Scheme(*_sizes(block, "block_structure"), bits, symmetric)
    raise InvalidInput(f"the quantization's strategy {reprlib.repr(strategy)} is not known")


def _packed(tensors: Tensors, name: str, groups: list[tuple[bool, _Scheme]], read: Read) -> Scaled:
    info = tensors[name]
    shape_name = _beside(name, "weight_packed", "weight_shape")
    shape_info = _need(tensors, shape_name, name)
    if shape_info.shape != (2,) or shape_info.dtype not in (torch.int64, torch.int32):
        raise InvalidInput(f"{shape_name} must hold two integers, the shape of a matrix")
    rows, columns = (int(size) for size in read(shape_name))
    if info.dtype != torch.int32 or len(info.shape) != 2 or info.shape[0] != rows:
        raise InvalidInput(
            f"{name} is {info.dtype} {list(info.shape)}, not {[rows, columns]} packed in int32"
        )
    widths = {scheme.bits for packed, scheme in groups if packed}
    fitting = sorted(bits for bits in widths if -(-columns * bits // 32) == info.shape[1])
    if columns < 0 or len(fitting) != 1:
        raise InvalidInput(
            f"{name} has {info.shape[1]} words a row for {columns} numbers, "
            f"but the config implies {' or '.join(map(str, sorted(widths))) or 'no'} bits"
        )
    bits = fitting[0]
    if bits not in _PACKABLE:
        raise InvalidInput(f"{name} packs numbers of {bits} bits, which cannot be dequantized")
    schemes = [scheme for packed, scheme in groups if packed and scheme.bits == bits]
    scale = _beside(name, "weight_packed", "weight_scale")
    scaled, scheme = _scaled(tensors, name, (rows, columns), scale, schemes)
    packed = replace(scaled, bits=bits, beside=(shape_name,))
    return _completed(tensors, packed, scheme, _beside(name, "weight_packed", "weight"))


def _completed(tensors: Tensors, scaled: Scaled, scheme: _Scheme, name: str) -> Scaled:
    """Add the zero points and the order of the columns, if the weight has them."""
    order, bits = f"{name}_g_idx", scaled.bits
    if order in tensors:
        _expect(tensors, order, scaled.weight, scaled.shape[1:])
        scaled = replace(scaled, groups=order)
    zero = f"{name}_zero_point"
    if zero not in tensors:
        if not scheme.symmetric:
            _need(tensors, zero, scaled.weight)
        return scaled
    shape, (down, across) = tensors[zero].shape, scaled.grid
    words = None if bits is None else (-(-down * bits // 32), across)
    if tensors[zero].dtype == torch.int32 and shape == words:
        return replace(scaled, zero=zero, zero_packed=True)
    if not _is_grid(shape, scaled.grid):
        raise InvalidInput(f"{zero} has shape {list(shape)}, the scales {list(scaled.grid)}")
    return replace(scaled, zero=zero)


# bitsandbytes


def _bitsandbytes(tensors: Tensors, quantization: Mapping[str, Any], read: Read) -> Find:
    def find(name: str) -> tuple[str, Stored] | None:
        if not name.endswith(".weight"):
            return None
        for code in _CODES:
            if _state_name(name, code) in tensors:
                return name, _coded(tensors, name, _state_name(name, code), read)
        info = tensors[name]
        if info.dtype != torch.int8:
            return None
        form = _beside(name, "weight", "weight_format")
        if form in tensors and (tensors[form].parameters != 1 or int(read(form)) != 0):
            raise InvalidInput(f"{form} is not 0: a device-specific order cannot be undone")
        scaled, _ = _scaled(tensors, name, info.shape, _beside(name, "weight", "SCB"), [_ROWS])
        return name, replace(scaled, factor=1 / 127, beside=(form,))

    return find


def _state_name(weight: str, code: str) -> str:
    return f"{weight}.quant_state.bitsandbytes__{code}"


def _coded(tensors: Tensors, name: str, state_name: str, read: Read) -> Coded:
    state = _state(tensors[state_name], state_name, read)
    shape = state.get("shape")
    if not isinstance(shape, list) or len(shape) != 2:
        raise InvalidInput(f"{state_name} gives the shape {reprlib.repr(shape)}: not a matrix")
    shape = _sizes(shape, "shape")
    run = _positive(state.get("blocksize"), "blocksize")
    count, packed = prod(shape), tensors[name]
    if packed.nbytes != -(-count // 2) or run % 2 or run > _LONGEST_RUN:
        raise InvalidInput(
            f"{name} has {packed.nbytes} bytes, which is not a matrix {list(shape)} of four bits in blocks of {run}"
        )
    runs = -(-count // run)
    nested = None
    if f"{name}.nested_absmax" in tensors:
        inner = _positive(state.get("nested_blocksize"), "nested_blocksize")
        offset = state.get("nested_offset")
        if not isinstance(offset, float):
            raise InvalidInput(f"{state_name} gives the offset {reprlib.repr(offset)}: not a float")
        inner = min(inner, runs)
        nested = Nested(f"{name}.nested_quant_map", f"{name}.nested_absmax", inner, float(offset))
        _expect(tensors, nested.table, name, (256,))
        _expect(tensors, nested.peaks, name, (-(-runs // inner),))
    table, peaks = f"{name}.quant_map", f"{name}.absmax"
    coded = Coded(name, shape, table, peaks, run, nested, beside=(state_name,))
    _expect(tensors, coded.table, name, (16,))
    codes = _expect(tensors, coded.peaks, name, (runs,))
    if (codes.dtype == torch.uint8) != (nested is not None):
        raise InvalidInput(f"{coded.peaks} is {codes.dtype}, which contradicts {state_name}")
    return coded


def _expect(tensors: Tensors, name: str, weight: str, shape: tuple[int, ...]) -> TensorInfo:
    info = _need(tensors, name, weight)
    if info.shape != shape:
        raise InvalidInput(f"{name} has shape {list(info.shape)}, {weight} requires {list(shape)}")
    return info


def _state(info: TensorInfo, name: str, read: Read) -> dict[str, Any]:
    """The JSON object that bitsandbytes stores as a tensor of bytes."""
    if info.dtype != torch.uint8 or info.nbytes > _MOST_STATE_BYTES:
        raise InvalidInput(f"{name} is {info.dtype}, {info.nbytes} bytes: not a bitsandbytes state")
    try:
        state = json.loads(read(name).flatten().numpy().tobytes())
    except (ValueError, RecursionError) as error:
        raise InvalidInput(f"{name} is not readable JSON") from error
    if not isinstance(state, dict):
        raise InvalidInput(f"{name} must hold a JSON object")
    return state


_METHODS: dict[str, Callable[[Tensors, Mapping[str, Any], Read], Find]] = {
    "fp8": _fp8,
    "compressed-tensors": _compressed,
    "bitsandbytes": _bitsandbytes,
}
