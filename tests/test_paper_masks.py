"""Claims about the published layer-wise procedure, against an implementation that shares no code with ours."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import paper_masks
import pytest
import torch
from small_runs import refused
from tiny_models import save_tiny
from transformers import AutoModelForCausalLM

from fbn_prune.cli.main import _exit_code
from fbn_prune.data import builtin
from fbn_prune.model.checkpoint import Checkpoint
from fbn_prune.recipe import load_recipe
from fbn_prune.runs.opening import read_texts
from fbn_prune.runs.setup import prepare

NETWORKS, LAYERS, WIDTH, CUT = 8, 6, 768, 3
"""Of the embedded model's six layers the recipe leaves three and two whole."""


@pytest.mark.parametrize("criterion", ["membership", "membership-bias"])
def test_the_recipe_keeps_exactly_what_a_plain_implementation_of_the_paper_keeps(
    criterion: str, tmp_path: Path
) -> None:
    given = {
        "tokens": 1500,
        "network_tokens": 3000,
        "context": 128,
        "networks": NETWORKS,
        "sparsity": 0.06,
        "criterion": criterion,
        "dtype": "float32",
    }
    recipe = load_recipe(paper_masks.RECIPE, given)
    path, out = tmp_path / "recipe.yaml", tmp_path / "out"
    path.write_text(recipe.to_yaml())
    assert _exit_code(["run", str(path), "--output", str(out)]) == 0
    before, after = Checkpoint.open(builtin.model_path()), Checkpoint.open(out)
    ours = [paper_masks.kept_in_checkpoint(before, after, layer) for layer in range(LAYERS)]
    assert [int(layer.sum()) for layer in ours] == [768, 768, 768, 768 - 276, 768, 768]

    blocks = read_texts(prepare(recipe), before.load_tokenizer())[0].calibrating
    model = AutoModelForCausalLM.from_pretrained(before.path, dtype=torch.float32).eval()
    activations = paper_masks.layer_activations(model, blocks)[CUT]
    strongest = paper_masks.strongest_z(activations, NETWORKS, seed=0)
    theirs = paper_masks.kept_by_threshold([strongest], 768 - 276)
    assert paper_masks.overlap([ours[CUT]], theirs) > 0.99

    name = f"model.layers.{CUT}.mlp.down_proj"
    assert (f"{name}.bias" in after.tensors) == (criterion == "membership-bias")
    if criterion == "membership-bias":
        removed = ~ours[CUT]
        weight = before.tensor(f"{name}.weight").float().numpy()
        shift = weight[:, removed] @ activations.mean(0)[removed]
        written = after.tensor(f"{name}.bias").float().numpy()
        np.testing.assert_allclose(written, shift, rtol=2e-3, atol=1e-4)
        for layer in set(range(LAYERS)) - {CUT}:
            assert not after.tensor(f"model.layers.{layer}.mlp.down_proj.bias").any()


def test_a_bias_that_the_architecture_cannot_store_is_refused_before_any_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save_tiny(tmp_path / "model", "phi3")
    args = ["--model", str(model), "--output", str(tmp_path / "out"), "--sparsity", "0.5"]
    said = "does not support an MLP output bias"
    refused(capsys, [*args, "--criterion", "membership-bias"], said)
