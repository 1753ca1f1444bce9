"""The figures of every way to prune stay what they were; `eval/robustness/golden.py` compares two versions by bytes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fbn_prune.api import prune_checkpoint
from fbn_prune.recipe import build_recipe

EXPECTED = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
SMALL = {"tokens": 2048, "network_tokens": 512, "networks": 8}
WAYS = {
    "uniform": {"keep_networks": 3},
    "ragged": {"keep_networks": 3, "layout": "ragged", "widths": "auto", "loss_aware": True},
    "streamed": {"sparsity": 0.5, "memory_budget": "800MB"},
    "recovered": {"sparsity": 0.5, "sequential": True, "recover": True, "recover_passes": 1},
    "heads": {"sparsity": 0.4, "head_sparsity": 0.5},
}


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_the_embedded_model_is_pruned_to_the_same_figures(way: str, tmp_path: Path) -> None:
    recipe = build_recipe({**SMALL, **WAYS[way], "output": tmp_path / "out"})
    result, expected = prune_checkpoint(recipe=recipe).to_json(), EXPECTED[way]
    assert result["widths"] == expected["widths"]
    assert result["parameters_after"] == expected["parameters_after"]
    # Another processor rounds differently, and a recovery trains on.
    tolerance = 0.02 if way == "recovered" else 2e-3
    for key in ("perplexity_before", "perplexity_after"):
        assert result[key] == pytest.approx(expected[key], rel=tolerance)
