"""Claims about the recipes that come with the project: each runs as it stands and does what its comments say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import arguments, run_json
from tiny_models import FAMILY_CONFIGS, save_tiny
from transformers import AutoModelForCausalLM

from fbn_prune.data import builtin
from fbn_prune.model.checkpoint import Checkpoint
from fbn_prune.networks.functional_networks import FunctionalNetworks
from fbn_prune.recipe import load_recipe

RECIPES = Path(__file__).parents[1] / "recipes"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of eight layers, so that there are inner ones."""
    config = FAMILY_CONFIGS["llama"]()
    config.num_hidden_layers, config.intermediate_size = 8, 40
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny", config=config)


def run(
    capsys: pytest.CaptureFixture[str], name: str, model: Path, text: Path, output: Path, *more: str
) -> dict[str, Any]:
    job = arguments(model, text, output, *more)
    return run_json(capsys, "run", RECIPES / f"{name}.yaml", *job)


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_recipe_is_valid_and_says_how_to_run_it(path: Path) -> None:
    load_recipe(path)
    assert f"fbn-prune run recipes/{path.name} --model MODEL --output FOLDER" in path.read_text()


def test_the_general_recipe_removes_its_share_and_loads_anywhere(
    tiny: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--width-multiple", "4"]
    result = run(capsys, "general-30-percent", tiny, text, tmp_path / "out", *more)
    assert result["widths"] == [28] * 8
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_the_quality_recipe_searches_the_widths(
    tiny: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = run(capsys, "quality-first", tiny, text, tmp_path / "out")
    assert {"uniform", "search", "loss"} < set(result["layout_trials"])
    assert sum(result["widths"]) == round(0.7 * 320)
    AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)


def test_the_size_recipe_stays_within_the_size(
    tiny: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--width-multiple", "1", "--target-size", "120KB"]
    result = run(capsys, "fits-a-size", tiny, text, tmp_path / "out", *more)
    assert 110_000 < (tmp_path / "out" / "model.safetensors").stat().st_size <= 120_000
    assert {"uniform", "networks"} < set(result["layout_trials"])


def test_the_paper_recipe_keeps_by_threshold_and_leaves_the_outer_layers_whole(
    tiny: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Against a straightforward implementation: the kept neurons are those at or above one threshold on abs z."""
    result = run(capsys, "paper-layerwise", tiny, text, tmp_path / "out")
    outer = (0, 1, 2, 6, 7)
    assert all(result["widths"][layer] == 40 for layer in outer)
    assert sum(result["widths"]) == round(0.8 * 320)
    networks = FunctionalNetworks.load(tmp_path / "out" / "networks.safetensors")
    assert len(networks.maps) == 6 * 8
    strongest = networks.maps.abs().amax(0)
    inner = torch.cat([strongest[networks.layer_slice(layer)] for layer in (3, 4, 5)])
    threshold = inner.sort(descending=True).values[sum(result["widths"]) - 5 * 40 - 1]
    before, after = Checkpoint.open(tiny), Checkpoint.open(tmp_path / "out")
    for layer in range(8):
        stays = strongest[networks.layer_slice(layer)] >= threshold
        if layer in outer:
            stays[:] = True
        for part, axis in (("gate_proj", 0), ("up_proj", 0), ("down_proj", 1)):
            name = f"model.layers.{layer}.mlp.{part}.weight"
            expected = before.tensor(name).index_select(axis, stays.nonzero()[:, 0])
            assert torch.equal(after.tensor(name), expected), name


def test_the_task_recipe_takes_the_users_task_and_keeps_a_quarter(
    tiny: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {"task": range(3), "test": range(3, 6)}
    for name, numbers in files.items():
        lines = [{"question": f"{i} + {i} is", "answer": f" {2 * i}"} for i in numbers]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    task = ["--task", str(tmp_path / "task.jsonl"), "--task-test", str(tmp_path / "test.jsonl")]
    few = ["--keep-networks", "2", "--width-multiple", "1"]
    result = run(capsys, "one-task", tiny, text, tmp_path / "out", *few, *task)
    assert result["widths"] == [10] * 8
    assert (result["task"]["examples"], result["task"]["test_questions"]) == (3, 3)


@pytest.mark.slow
def test_the_task_recipe_makes_a_calculator_that_errs_no_more_than_the_whole_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a quarter of the neurons; its questions are held out of training and calibration."""
    pytest.importorskip("lm_eval")
    output = tmp_path / "out"
    command = ["run", str(RECIPES / "one-task.yaml"), "--model", "builtin", "--output", str(output)]
    result = run_json(capsys, *command, "--tokens", "24576")
    assert result["neurons_kept"] <= 0.25 * result["neurons_total"]
    questions = str(builtin.question_files()["arithmetic"])
    evaluate = ["evaluate", "--model", str(output), "--compare", "builtin", "--tasks", questions]
    evaluated = run_json(capsys, *evaluate, "--batch-size", "100")
    cut, dense = (
        one["tasks"]["arithmetic"]["exact_match"] for one in (evaluated, evaluated["compare"])
    )
    assert dense["value"] > 0.95
    assert cut["value"] >= dense["value"] - max(cut["stderr"], dense["stderr"])
