"""Compile tiles ahead of time, without the GPU itself, and report the resources that they use.

The compiler accepts tiles that a chip cannot launch and tiles that spill registers. This module reads shared memory,
spills, matrix instructions and asynchronous copies from the binary. The tests check every tile of every table, the
tuner every candidate.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from .kernels import down_kernel, hidden_kernel
from .launch import CHAINS, CUDA_PRECISION, HIP_PRECISION
from .tuning import DownTile, HiddenTile


@dataclass(frozen=True)
class Chip:
    """A compilation target.

    Attributes
    ----------
    name
        Its name in the tuning tables.
    target
        Its Triton target.
    shared_limit
        Bytes of shared memory that a program may use.
    precision
        Precision of float32 products.
    chained
        Whether a kernel may start while the one before it drains.
    """

    name: str
    target: GPUTarget
    shared_limit: int
    precision: str
    chained: bool = False


CHIPS = {
    "sm_80": Chip("sm_80", GPUTarget("cuda", 80, 32), 163 * 1024, CUDA_PRECISION),
    "sm_90": Chip("sm_90", GPUTarget("cuda", 90, 32), 227 * 1024, CUDA_PRECISION, CHAINS),
    "gfx942": Chip("gfx942", GPUTarget("hip", "gfx942", 64), 64 * 1024, HIP_PRECISION),
}

_SIGNATURE_DTYPE = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}

_MATRIX = {
    "sm_80": r"mma\.sync",
    "sm_90": r"wgmma\.mma_async|mma\.sync",
    "gfx942": r"v_mfma_",
}

_INTEGER_TABLES = {"indices": "i32", "set_ids": "i32", "order": "i32", "tiles": "i32"} | {
    "table": "i32",
    "arrivals": "i32",
    "membership": "u8",
}

_UNALIGNED = {"rows", "row_tiles", "column_tiles", "kept", "splits"}


@dataclass(frozen=True)
class Binary:
    """The resources of a compiled kernel.

    Attributes
    ----------
    shared
        Bytes of shared memory a program uses.
    registers
        Vector registers a thread uses.
    spilled
        Bytes of stack (NVIDIA) or registers (AMD) spilled to memory.
    matrix_instructions, wgmma, async_copies
        Number of matrix instructions, of Hopper's asynchronous ones among them, and of asynchronous copies to shared
        memory (NVIDIA).
    columns
        Columns of the widest of Hopper's asynchronous matrix instructions.
    """

    shared: int
    registers: int
    spilled: int
    matrix_instructions: int
    wgmma: int
    async_copies: int
    columns: int


def compile_hidden(
    chip: Chip,
    tile: HiddenTile,
    dtype: torch.dtype,
    *,
    gated: bool = True,
    activation: str = "silu",
    biased: bool = False,
    masked: bool = False,
    routed: bool = False,
    even_width: bool = True,
    arrivals: int = 0,
) -> Binary:
    """Compile the hidden kernel for a chip; `arrivals` is the number of counters it zeroes."""
    constants: dict[str, Any] = {
        "ACTIVATION": activation,
        "GATED": gated,
        "INTERLEAVED": gated and tile.interleaved,
        "UP_BIAS": biased,
        "GATE_BIAS": biased and gated,
        "MASKED": masked,
        "ROUTED": routed,
        "ARRIVALS": arrivals,
        "EVEN_WIDTH": even_width,
        "INTERPRETED": False,
        "PRECISION": chip.precision,
        "CHAINED": chip.chained,
        "BLOCK_ROWS": tile.block_rows,
        "BLOCK_NEURONS": tile.block_neurons,
        "BLOCK_WIDTH": tile.block_width,
        "GROUP_ROWS": 8,
    }
    absent = {
        name
        for name, given in (
            ("gate", gated),
            ("up_bias", biased),
            ("gate_bias", biased and gated),
            ("membership", masked),
            ("set_ids", masked),
            ("order", routed),
            ("tiles", routed),
            ("table", routed),
            ("arrivals", arrivals > 0),
        )
        if not given
    }
    values = {"x", "up", "gate", "up_bias", "gate_bias", "hidden"}
    return _compile(hidden_kernel, chip, values, {}, absent, constants, dtype, tile)


def compile_down(
    chip: Chip,
    tile: DownTile,
    dtype: torch.dtype,
    *,
    split: int = 1,
    biased: bool = False,
    routed: bool = False,
    even_width: bool = True,
) -> Binary:
    """Compile the down kernel for a chip."""
    fixup = tile.fixup and split > 1
    apart = split > 1 and not fixup
    constants: dict[str, Any] = {
        "PARTIAL": split > 1,
        "FIXUP": split if fixup else 0,
        "BIAS": biased and not apart,
        "ROUTED": routed,
        "EVEN_WIDTH": even_width,
        "INTERPRETED": False,
        "PRECISION": chip.precision,
        "CHAINED": chip.chained,
        "BLOCK_ROWS": tile.block_rows,
        "BLOCK_NEURONS": tile.block_neurons,
        "BLOCK_WIDTH": tile.block_width,
        "GROUP_ROWS": 8,
    }
    absent = {
        name
        for name, given in (
            ("order", routed),
            ("tiles", routed),
            ("table", routed),
            ("down_bias", biased and not apart),
            ("arrivals", fixup),
            ("partial", split > 1),
            ("out", not apart),
        )
        if not given
    }
    values = {"hidden", "down_t", "down_bias", "out"}
    return _compile(down_kernel, chip, values, {"partial": "fp32"}, absent, constants, dtype, tile)


def _compile(
    kernel: Any,
    chip: Chip,
    values: set[str],
    pointers: dict[str, str],
    absent: set[str],
    constants: dict[str, Any],
    dtype: torch.dtype,
    tile: HiddenTile | DownTile,
) -> Binary:
    types = dict.fromkeys(values, _SIGNATURE_DTYPE[dtype]) | _INTEGER_TABLES | pointers
    signature, constexprs, aligned = {}, dict(constants), {}
    for position, name in enumerate(kernel.arg_names):
        if name in constants or name in absent:
            signature[name] = "constexpr"
            constexprs.setdefault(name, None)
            continue
        signature[name] = f"*{types[name]}" if name in types else "i32"
        # As at run time: pointers, strides, widths and padded sizes are multiples of 16.
        if name not in _UNALIGNED:
            aligned[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constexprs, aligned)
    options: dict[str, int] = {"num_warps": tile.warps, "num_stages": tile.stages}
    if chip.chained:
        options["launch_pdl"] = True
    compiled = triton.compile(source, target=chip.target, options=options)
    return _inspect(compiled, chip)


def _inspect(compiled: Any, chip: Chip) -> Binary:
    shared = compiled.metadata.shared
    matrix = re.compile(_MATRIX[chip.name])
    if chip.target.backend == "hip":
        text = compiled.asm["amdgcn"]
        spilled = _number(r"\.vgpr_spill_count:\s+(\d+)", text)
        spilled += _number(r"\.sgpr_spill_count:\s+(\d+)", text)
        registers = _number(r"\.vgpr_count:\s+(\d+)", text)
        return Binary(shared, registers, spilled, len(matrix.findall(text)), 0, 0, 0)
    text = compiled.asm["ptx"]
    usage = _resource_usage(compiled.asm["cubin"])
    return Binary(
        shared=shared,
        registers=_number(r"REG:(\d+)", usage),
        spilled=_number(r"STACK:(\d+)", usage) + _number(r"LOCAL:(\d+)", usage),
        matrix_instructions=len(matrix.findall(text)),
        wgmma=len(re.findall(r"wgmma\.mma_async", text)),
        async_copies=len(re.findall(r"cp\.async\.c[ag]\.", text)),
        columns=max(map(int, re.findall(r"wgmma\.mma_async\S*\.m64n(\d+)k", text)), default=0),
    )


def _resource_usage(cubin: bytes) -> str:
    tool = triton.knobs.nvidia.cuobjdump.path
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        return subprocess.run(
            [tool, "--dump-resource-usage", str(path)], check=True, capture_output=True, text=True
        ).stdout


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"the compiler's output does not match {pattern!r}")
    return int(found.group(1))
