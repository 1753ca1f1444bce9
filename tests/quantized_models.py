"""Tiny checkpoints quantised in every form that can be undone, each with the values that it stands for.

The values are computed as the formats' descriptions say, by code that shares nothing with the package's.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from math import ceil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tiny_models import save_tiny
from torch import Tensor

WEIGHTS = "model.safetensors"
NF4 = [-1.0, -0.6961928, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0.0]
NF4 += [0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0]
FP4 = [0.0, 0.0052083, 0.6666667, 1.0, 0.3333333, 0.5, 0.1666667, 0.25]
FP4 += [-value for value in FP4]

Parts = dict[str, Tensor]
"""What lies in a module beside its bias: "weight", "weight_scale", ..."""

Quantize = Callable[[Tensor], tuple[Parts, Tensor]]
"""[rows, columns] float32 -> the stored tensors, and the values that they stand for, float32."""


def _scale_of(weight: Tensor, block: tuple[int, int], largest: float) -> Tensor:
    rows = [part.split(block[1], dim=1) for part in weight.split(block[0])]
    return torch.tensor([[part.abs().max() / largest for part in row] for row in rows])


def _spread(grid: Tensor, block: tuple[int, int], shape: torch.Size) -> Tensor:
    """A block's number for each of its elements."""
    spread = grid.float().repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    return spread[: shape[0], : shape[1]]


def _block(weight: Tensor, block: tuple[int, int]) -> tuple[int, int]:
    return min(block[0], weight.shape[0]), min(block[1], weight.shape[1])


def blocks(
    block: tuple[int, int],
    *,
    dtype: torch.dtype = torch.float8_e4m3fn,
    name: str = "weight_scale",
    asymmetric: bool = False,
    scalar: bool = False,
) -> Quantize:
    def quantize(weight: Tensor) -> tuple[Parts, Tensor]:
        own = _block(weight, block)
        largest = 448.0 if dtype.is_floating_point else 100.0
        scale = _scale_of(weight, own, largest)
        zero = torch.randint(-20, 20, scale.shape) if asymmetric else torch.zeros_like(scale)
        scales, zeros = (_spread(grid, own, weight.shape) for grid in (scale, zero))
        stored = weight / scales + zeros
        stored = stored.to(dtype) if dtype.is_floating_point else stored.round().to(dtype)
        parts = {"weight": stored, name: scale.reshape(()) if scalar else scale}
        if asymmetric:
            parts["weight_zero_point"] = zero.to(torch.int8)
        return parts, (stored.float() - zeros) * scales

    return quantize


def _pack(numbers: Tensor, bits: int) -> Tensor:
    """Whole numbers into int32 along the rows: the first into the lowest bits, half the range added."""
    words = []
    for row in (numbers.long() + 2 ** (bits - 1)).tolist():
        whole = sum(number << (j * bits) for j, number in enumerate(row))
        words.append([whole >> (32 * i) & (2**32 - 1) for i in range(ceil(len(row) * bits / 32))])
    unsigned = torch.tensor(words)
    return torch.where(unsigned >= 2**31, unsigned - 2**32, unsigned).to(torch.int32)


def packed(
    group: int, bits: int = 4, *, asymmetric: bool = False, shuffled: bool = False
) -> Quantize:
    def quantize(weight: Tensor) -> tuple[Parts, Tensor]:
        block = _block(weight, (1, group))
        scale = _scale_of(weight, block, 2 ** (bits - 1) - 1)
        low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        zero = torch.randint(low, high, scale.shape) if asymmetric else torch.zeros_like(scale)
        groups = torch.arange(weight.shape[1]) // block[1]
        if shuffled:
            groups = groups[torch.randperm(len(groups))]
        stored = (weight / scale[:, groups] + zero[:, groups]).round().clamp(low, high)
        parts = {
            "weight_packed": _pack(stored, bits),
            "weight_shape": torch.tensor(weight.shape),
            "weight_scale": scale.to(torch.bfloat16),
        }
        if asymmetric:
            parts["weight_zero_point"] = _pack(zero.T, bits).T.contiguous()
        if shuffled:
            parts["weight_g_idx"] = groups.to(torch.int32)
        values = (stored - zero[:, groups]) * scale.to(torch.bfloat16).float()[:, groups]
        return parts, values

    return quantize


def rows_of_int8(weight: Tensor) -> tuple[Parts, Tensor]:
    """bitsandbytes' eight bits."""
    peaks = weight.abs().amax(dim=1)
    stored = (weight * 127 / peaks[:, None]).round().to(torch.int8)
    parts = {"weight": stored, "SCB": peaks, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    return parts, stored.float() * peaks[:, None] / 127


def codes(table: list[float], name: str, run: int = 32, *, nested: bool = False) -> Quantize:
    """bitsandbytes' four bits."""

    def quantize(weight: Tensor) -> tuple[Parts, Tensor]:
        flat = weight.flatten()
        runs = ceil(len(flat) / run)
        peaks = torch.stack([part.abs().max() for part in flat.split(run)])
        state: dict[str, Any] = {"quant_type": name, "blocksize": run, "dtype": "float32"}
        state["shape"] = list(weight.shape)
        parts: Parts = {"weight.quant_map": torch.tensor(table), "weight.absmax": peaks}
        if nested:
            offset = float(peaks.mean())
            inner = torch.linspace(-1, 1, 256)
            outer = torch.stack([part.abs().max() for part in (peaks - offset).split(4)]) + 1e-6
            chosen = torch.empty(runs, dtype=torch.uint8)
            for i in range(runs):
                wanted = (peaks[i] - offset) / outer[i // 4]
                chosen[i] = (inner - wanted).abs().argmin()
                peaks[i] = inner[int(chosen[i])] * outer[i // 4] + offset
            state |= {"nested_blocksize": 4, "nested_offset": offset, "nested_dtype": "float32"}
            parts |= {"weight.absmax": chosen, "weight.nested_absmax": outer}
            parts["weight.nested_quant_map"] = inner
        choices = torch.tensor(table) * peaks.repeat_interleave(run)[: len(flat), None]
        numbers = (choices - flat[:, None]).abs().argmin(dim=1)
        values = choices[torch.arange(len(flat)), numbers]
        parts["weight"] = (16 * numbers[::2] + numbers[1::2]).to(torch.uint8)[:, None]
        text = json.dumps(state).encode()
        parts[f"weight.quant_state.bitsandbytes__{name}"] = torch.tensor(
            list(text), dtype=torch.uint8
        )
        return parts, values.reshape(weight.shape)

    return quantize


def compressed(form: str, *weights: dict[str, Any]) -> dict[str, Any]:
    """A compressed-tensors config with a group for each of these weights."""
    scheme = {"targets": ["Linear"], "input_activations": None, "output_activations": None}
    groups = {f"group_{i}": {**scheme, "weights": one} for i, one in enumerate(weights)}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "config_groups": groups,
    }


def weights(strategy: str, kind: str = "int", bits: int = 8, **more: Any) -> dict[str, Any]:
    """compressed-tensors' quantization arguments."""
    plain = {"num_bits": bits, "type": kind, "symmetric": True, "strategy": strategy}
    return {**plain, "group_size": None, "block_structure": None, "dynamic": False, **more}


_FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}
_GROUP = {"group_size": 8}

_BITS4 = {"quant_method": "bitsandbytes", "load_in_4bit": True}
_ALL = (99, 99)
_EACH_ROW = (1, 99)
_BLOCKS = {"block_structure": [16, 16]}  # does not divide 24: blocks are cut off
_INT8 = torch.int8

KINDS: dict[str, tuple[dict[str, Any], Quantize]] = {
    "fp8-blocks": (
        {**_FP8, "weight_block_size": [16, 16]},
        blocks((16, 16), name="weight_scale_inv"),
    ),
    "fp8-tensor": (
        {**_FP8, "weight_block_size": None},
        blocks(_ALL, name="weight_scale_inv", scalar=True),
    ),
    "autofp8": (
        {"quant_method": "fp8", "activation_scheme": "static"},
        blocks(_ALL, scalar=True),
    ),
    "naive-channel": (
        compressed("naive-quantized", weights("channel")),
        blocks(_EACH_ROW, dtype=_INT8),
    ),
    "int-tensor": (compressed("int-quantized", weights("tensor")), blocks(_ALL, dtype=_INT8)),
    "int-group-zero": (
        compressed("int-quantized", weights("group", symmetric=False, **_GROUP)),
        blocks((1, 8), dtype=_INT8, asymmetric=True),
    ),
    "float-tensor": (compressed("float-quantized", weights("tensor", "float")), blocks(_ALL)),
    "float-channel": (
        compressed("float-quantized", weights("channel", "float")),
        blocks(_EACH_ROW),
    ),
    "float-block": (
        compressed("float-quantized", weights("block", "float", **_BLOCKS)),
        blocks((16, 16)),
    ),
    "pack-group": (compressed("pack-quantized", weights("group", bits=4, **_GROUP)), packed(8)),
    "pack-group-zero": (
        compressed("pack-quantized", weights("group", bits=4, symmetric=False, **_GROUP)),
        packed(8, asymmetric=True),
    ),
    "pack-channel-8": (compressed("pack-quantized", weights("channel", bits=8)), packed(99, 8)),
    "pack-channel-2-zero": (
        compressed("pack-quantized", weights("channel", bits=2, symmetric=False)),
        packed(99, 2, asymmetric=True),
    ),
    "pack-order": (
        compressed("pack-quantized", weights("group", bits=4, actorder="group", **_GROUP)),
        packed(8, shuffled=True),
    ),
    "bitsandbytes-8": ({"quant_method": "bitsandbytes", "load_in_8bit": True}, rows_of_int8),
    "bitsandbytes-nf4": (_BITS4, codes(NF4, "nf4")),
    "bitsandbytes-nf4-nested": (_BITS4, codes(NF4, "nf4", nested=True)),
    "bitsandbytes-fp4": (_BITS4, codes(FP4, "fp4", run=64)),
}
"""Name -> `quantization_config` and the function that quantises one weight."""

ACTIVATIONS = {
    "self_attn.q_proj.input_scale": torch.tensor(0.5),
    "self_attn.k_proj.k_scale": torch.tensor([0.25]),
    "self_attn.v_proj.output_zero_point": torch.tensor([3]),
    "mlp.down_proj.activation_scale": torch.tensor(0.5),
}
"""Scales of activations and of the key-value cache, as they lie in a layer."""


def save_quantized(
    directory: Path, kind: str, *, dtype: torch.dtype = torch.float32, **more: Any
) -> dict[str, Tensor]:
    """Write a tiny llama whose layers' matrices are quantised; returns all its plain tensors, float32 where they were.

    The embeddings, the norms, the head and the first layer's q_proj are not quantised.
    """
    save_tiny(directory, dtype=dtype, **more)
    config, quantize = KINDS[kind]
    stored: dict[str, Tensor] = {}
    plain: dict[str, Tensor] = {}
    torch.manual_seed(1)
    for name, tensor in load_file(directory / WEIGHTS).items():
        if "_proj." not in name or name == "model.layers.0.self_attn.q_proj.weight":
            stored[name] = plain[name] = tensor
            continue
        parts, plain[name] = quantize(tensor.float())
        module = name.removesuffix(".weight")
        stored |= {f"{module}.{part}": value.contiguous() for part, value in parts.items()}
    if not kind.startswith("bitsandbytes"):
        stored |= {f"model.layers.1.{name}": scale for name, scale in ACTIVATIONS.items()}
    save_file(stored, directory / WEIGHTS, {"format": "pt"})
    edit_config(directory, lambda settings: settings.update(quantization_config=config))
    return plain


def edit_config(directory: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    path = directory / "config.json"
    settings = json.loads(path.read_text())
    edit(settings)
    path.write_text(json.dumps(settings))


def edit_tensors(directory: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(directory / WEIGHTS)
    edit(tensors)
    save_file(tensors, directory / WEIGHTS, {"format": "pt"})
