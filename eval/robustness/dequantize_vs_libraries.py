"""Check that dequantising gives the same weights, bit for bit, as the libraries that define the formats.

    pip install compressed-tensors bitsandbytes
    python eval/robustness/dequantize_vs_libraries.py [--rows 200] [--columns 256]

Each library quantises a random weight. The script stores the library's state dict as a checkpoint, and compares the
library's dequantised weight with the one that `fbn_prune.model` reads from the file. It prints a line for each format
and ends with exit code 1 if one differs.
"""

from __future__ import annotations

import importlib.metadata
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from safetensors.torch import load_file, save_file
from torch import Tensor

from fbn_prune.model.headers import SINGLE_FILE
from fbn_prune.model.quantized_formats import stored_weights
from fbn_prune.model.quantized_values import plain
from fbn_prune.model.shards import read_headers

NAME = "model.layers.0.mlp.up_proj"

_GROUP = {"strategy": "group", "group_size": 32}
_CHANNEL = {"strategy": "channel"}
_BLOCKS = {"strategy": "block", "block_structure": [128, 128]}
_ZEROS = {"symmetric": False}
_FORMS: list[tuple[str, str, dict[str, Any]]] = [
    ("int8 by tensor", "int-quantized", {"strategy": "tensor"}),
    ("int8 by channel", "naive-quantized", _CHANNEL),
    ("int8 by group, zero points", "int-quantized", {**_GROUP, "group_size": 64, **_ZEROS}),
    ("float8 by tensor", "float-quantized", {"strategy": "tensor", "type": "float"}),
    ("float8 by channel", "float-quantized", {**_CHANNEL, "type": "float"}),
    ("float8 by blocks", "float-quantized", {**_BLOCKS, "type": "float"}),
    ("4 bits by group", "pack-quantized", {**_GROUP, "num_bits": 4}),
    ("4 bits by group, zero points", "pack-quantized", {**_GROUP, "num_bits": 4, **_ZEROS}),
    ("8 bits by channel, zero points", "pack-quantized", {**_CHANNEL, "num_bits": 8, **_ZEROS}),
    ("2 bits by group", "pack-quantized", {**_GROUP, "num_bits": 2}),
]

Case = tuple[str, dict[str, Any], dict[str, Tensor], Tensor]
"""The format in words, the quantisation config, the stored tensors, and the library's dequantised weight."""


def compressed_cases(weight: Tensor) -> Iterator[Case]:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    for form, kind, settings in _FORMS:
        args = QuantizationArgs(**settings)
        scheme = QuantizationScheme(targets=["Linear"], weights=args)
        block = {
            "tensor": weight.shape,
            "channel": (1, weight.shape[1]),
            "group": (1, args.group_size),
            "block": args.block_structure,
        }[str(args.strategy)]
        low, high = _ends(weight, tuple(block))
        if args.strategy == "tensor":
            low, high = low.reshape(1), high.reshape(1)
        scale, zero = calculate_qparams(low, high, args)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            state = {"weight": weight.to(dtype), "weight_scale": scale.to(dtype)}
            if not args.symmetric:
                state["weight_zero_point"] = zero
            library: Any = BaseCompressor.get_value_from_registry(kind)
            stored = library.compress(state, scheme)
            config = {
                "quant_method": "compressed-tensors",
                "format": kind,
                "config_groups": {"group_0": {"weights": args.model_dump(mode="json")}},
            }
            values = library.decompress(stored, scheme)["weight"]
            yield f"{kind}, {form}, scales in {dtype}", config, stored, values


def _ends(weight: Tensor, block: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Return the smallest and the largest value of each block."""
    rows = [
        [(part.min(), part.max()) for part in strip.split(block[1], dim=1)]
        for strip in weight.split(block[0], dim=0)
    ]
    low, high = (torch.tensor([[pair[i] for pair in row] for row in rows]) for i in (0, 1))
    return low, high


def bitsandbytes_cases(weight: Tensor) -> Iterator[Case]:
    import bitsandbytes.functional as bnb

    config = {"quant_method": "bitsandbytes"}
    numbers, peaks, _ = bnb.int8_vectorwise_quant(weight.half())
    stored = {"weight": numbers, "SCB": peaks, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    yield "bitsandbytes, 8 bits", config, stored, bnb.int8_vectorwise_dequant(numbers, peaks)
    for code in ("nf4", "fp4"):
        for nested in (False, True):
            for storage in (torch.uint8, torch.bfloat16):
                packed, state = bnb.quantize_4bit(
                    weight, quant_type=code, compress_statistics=nested, quant_storage=storage
                )
                beside = {f"weight.{k}": v for k, v in state.as_dict(packed=True).items()}
                values = bnb.dequantize_4bit(packed, state)
                words = f"bitsandbytes, {code}{', nested' * nested}, stored as {storage}"
                yield words, config, {"weight": packed, **beside}, values


def ours(config: dict[str, Any], stored: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
    with tempfile.TemporaryDirectory() as folder:
        named = {f"{NAME}.{key}": tensor.contiguous() for key, tensor in stored.items()}
        save_file(named, Path(folder, SINGLE_FILE))
        tensors = load_file(Path(folder, SINGLE_FILE))
        headers = read_headers(Path(folder))
        ((name, weight),) = stored_weights(headers, config, tensors.__getitem__).items()
        assert name == f"{NAME}.weight"
        return plain(name, weight, tensors.__getitem__, dtype)


def main(
    rows: Annotated[int, typer.Option(min=1)] = 200,
    columns: Annotated[int, typer.Option(min=64)] = 256,
) -> None:
    """Compare every format on one random weight."""
    for library in ("compressed-tensors", "bitsandbytes"):
        print(library, importlib.metadata.version(library))
    torch.manual_seed(0)
    weight = torch.randn(rows, columns) * torch.rand(rows, 1)
    failed = 0
    for cases in (compressed_cases, bitsandbytes_cases):
        for words, config, stored, values in cases(weight):
            result = ours(config, stored, values.dtype)
            same = torch.equal(result, values)
            failed += not same
            off = (result.double() - values.double()).abs().max() / values.double().abs().max()
            print(f"{words}: {'equal' if same else f'differs by {off:.1e} of the largest'}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    typer.run(main)
