"""Exports of every family, in both layouts, tied and untied, are the cut model where this package is not installed."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import cut_live
from tiny_models import FAMILY_CONFIGS, HIDDEN, LAYERS, PATHS, logits, save_tiny
from warm_python import WARM

from fbn_prune.export.writer import write_checkpoint
from fbn_prune.model.checkpoint import Checkpoint
from fbn_prune.model.heads import HeadCut
from fbn_prune.model.surgery import MlpCut

pytestmark = pytest.mark.slow

WIDTHS = {"uniform": [8] * LAYERS, "ragged": [4, 9, 7]}
CASES = [
    (name, layout, tied)
    for name in FAMILY_CONFIGS
    for layout in WIDTHS
    for tied in (True, False)
    if name != "llama-tied" and (name in PATHS or tied == (layout == "uniform"))
]


def export(name: str, layout: str, tied: bool, root: Path) -> None:
    """A cut checkpoint and, beside it, the logits of the cut live model."""
    config = FAMILY_CONFIGS[name]()
    config.tie_word_embeddings = tied
    folder = root / f"{name} {layout} {'tied' if tied else 'untied'}"
    source = Checkpoint.open(save_tiny(root / "sources" / folder.name, config=config))
    generator = torch.Generator().manual_seed(0)
    heads = None
    if tied and source.family.attention is not None:  # both layouts, with and without
        shape = source.family.head_shape(source.config)
        new = 0.3 * torch.randn(HIDDEN, shape.width, generator=generator)
        heads = HeadCut(torch.tensor([shape.groups - 1]), new)
    cuts = [
        MlpCut(
            torch.arange(width),
            0.3 * torch.randn(HIDDEN, width, generator=generator),
            heads=heads,
        )
        for width in WIDTHS[layout]
    ]
    folder.mkdir()
    write_checkpoint(source, cuts, folder)
    expected = {}
    for dtype in (torch.float32, torch.bfloat16):
        expected[str(dtype).removeprefix("torch.")] = logits(cut_live(source, cuts, dtype))
    torch.save(expected, folder / "expected.pt")


def seen(root: Path) -> dict[str, dict[str, Any]]:
    """What one process without this package sees of the exports of all cases."""
    (root / "sources").mkdir()
    for case in CASES:
        export(*case, root)
    script = Path(__file__).with_name("reload_elsewhere.py")
    done = subprocess.run(
        [*WARM, str(script), str(root)],
        env={**os.environ, "HF_MODULES_CACHE": str(root / "modules"), "PYTHONPATH": ""},
        cwd=root,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    assert len(found) == len(CASES)
    return found


def test_every_export_reloads_generates_and_saves_again(tmp_path: Path) -> None:
    for case, facts in seen(tmp_path).items():
        assert facts.pop("tied") == case.endswith(" tied"), case
        assert facts.pop("generated") == 5, case
        assert facts.keys() == {"loaded", "saved again", "device_map auto", "bfloat16"}, case
        assert max(facts.values()) <= 1e-5, (case, facts)
