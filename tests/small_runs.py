"""Small jobs on a tiny model: their recipes, the command line in this process, and what they leave."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import HIDDEN
from torch import Tensor
from transformers import PreTrainedModel

from fbn_prune.cli.main import _exit_code
from fbn_prune.data.calibration import TokenBlocks
from fbn_prune.export.writer import verify_export, write_checkpoint
from fbn_prune.model.adapter import ModelAdapter
from fbn_prune.model.checkpoint import Checkpoint
from fbn_prune.model.surgery import MlpCut
from fbn_prune.recipe import Recipe, build_recipe


def recipe(model: Path, text: Path, output: Path | None = None, **changes: Any) -> Recipe:
    """A recipe of about a second; `changes` go over its fields."""
    small = {"tokens": 400, "network_tokens": 300, "networks": 5, "keep_networks": 3}
    base = {"model": str(model), "calibration": [str(text)], "context": 48, "output": output}
    return build_recipe({**base, **small, "width_multiple": 4, "seed": 1, **changes})


def arguments(model: Path, text: Path, output: Path | None = None, *more: str) -> list[str]:
    """The flags of such a job for the command line."""
    small = "--tokens 600 --network-tokens 400 --networks 6 --context 48"
    places = ["--model", str(model), "--calibration", str(text)]
    return [*places, *(["--output", str(output)] if output else []), *small.split(), *more]


def run_json(capsys: pytest.CaptureFixture[str], *args: object) -> dict[str, Any]:
    """What a command that succeeds prints with --json."""
    capsys.readouterr()
    assert _exit_code([*map(str, args), "--json"]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def refused(capsys: pytest.CaptureFixture[str], args: list[str], message: str) -> None:
    """A command refuses bad input: exit code 2, nothing on stdout, and one line that has `message`."""
    capsys.readouterr()
    code = _exit_code(args)
    said = capsys.readouterr()
    assert (code, said.out) == (2, ""), said.err
    (line,) = said.err.splitlines()
    assert "error:" in line
    assert message in line


def blocks(*lengths: int, context: int = 48) -> TokenBlocks:
    """Blocks of random tokens, of these lengths."""
    generator = torch.Generator().manual_seed(3)
    drawn = tuple(torch.randint(0, 256, (n,), generator=generator) for n in lengths)
    return TokenBlocks(drawn, context, ("x",))


def tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, by file and name."""
    return {
        f"{file.name} {key}": tensor
        for file in sorted(folder.glob("*.safetensors"))
        for key, tensor in load_file(file).items()
    }


def random_cuts(source: Checkpoint, widths: Sequence[int], *, bias: bool = False) -> list[MlpCut]:
    """Cuts with output weights that no neuron had before, as a refit gives them."""
    generator = torch.Generator().manual_seed(0)
    full = source.family.width(source.config)
    return [
        MlpCut(
            torch.randperm(full, generator=generator)[:width].sort().values,
            torch.randn(HIDDEN, width, generator=generator, dtype=torch.float64),
            torch.randn(HIDDEN, generator=generator) if bias else None,
        )
        for width in widths
    ]


def cut_live(
    source: Checkpoint, cuts: Sequence[MlpCut], dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """The model in memory, cut as the export will be."""
    adapter = ModelAdapter(source.load_model("cpu", dtype))
    for layer, cut in enumerate(cuts):
        adapter.cut(layer, cut, round_to=source.storage_dtype)
    return adapter.model


def export(source: Checkpoint, cuts: Sequence[MlpCut], directory: Path, **more: Any) -> Path:
    """Write the cut checkpoint and verify it."""
    directory.mkdir()
    write_checkpoint(source, cuts, directory, **more)
    verify_export(directory)
    return directory
