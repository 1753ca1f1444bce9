"""Claims about the dry run: the sizes it says are those written, and its time is a range or is left out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from small_runs import arguments, run_json
from tiny_models import PATHS, save_tiny

from fbn_prune.cli.main import _exit_code
from fbn_prune.recipe import build_recipe
from fbn_prune.runs import dry_run
from fbn_prune.runs.setup import prepare

SIZES = ("parameters_before", "parameters_after", "bytes_after", "neurons_kept")
HALF = ("--sparsity", "0.5")


def predicted(capsys: pytest.CaptureFixture[str], model: Path, text: Path, *more: str) -> Any:
    return run_json(capsys, *arguments(model, text, model / "out", *HALF, *more, "--dry-run"))


@pytest.mark.parametrize(
    ("flags", "exact"),
    [
        (HALF, (*SIZES, "widths")),
        (("--target-params", "13000"), (*SIZES, "widths")),
        (("--target-params", "13000", "--layout", "ragged", "--keep-layers", "0"), SIZES),
    ],
)
def test_the_sizes_predicted_are_those_written(
    flags: tuple[str, ...],
    exact: tuple[str, ...],
    tiny: Path,
    text: Path,
    tmp_path: Path,
    capsys: Any,
) -> None:
    args = arguments(tiny, text, tmp_path / "out", *flags, "--width-multiple", "1")
    said = run_json(capsys, *args, "--dry-run")
    assert not (tmp_path / "out").exists()
    result = run_json(capsys, *args)
    assert {key: said[key] for key in exact} == {key: result[key] for key in exact}
    assert sum(said["structures"].values()) == said["parameters_before"]


@pytest.mark.parametrize("name", PATHS)
def test_every_architecture_gets_a_range_of_time(
    name: str, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = predicted(capsys, save_tiny(tmp_path, name), text)
    assert 0 < said["seconds_low"] <= said["seconds_high"] < 3600
    assert {"seconds_low", "seconds_high"} <= set(said["estimated"])


@pytest.mark.parametrize(
    "more",
    [
        {"sequential": True},
        {"recover": True},
        {"recover": True, "recover_cuts": 2},
        {"calibration": "generated"},
        {"layout": "auto"},
        {"tokens": 5000},
        {"loss_aware": True},
        {"rank": "knockout", "keep_networks": 2},
    ],
)
def test_what_a_recipe_adds_is_passed_through_the_model(more: dict[str, Any]) -> None:
    base, asked = (
        dry_run.token_passes(prepare(build_recipe({"sparsity": 0.5, "tokens": 4000, **keys})))
        for keys in ({}, more)
    )
    assert asked[0] > base[0]
    assert asked[1] >= base[1]


def test_training_all_weights_has_room_for_what_the_optimizer_keeps_of_them() -> None:
    """Gradients, two moments and the best values, in float32; the layers are most of the embedded model."""

    def stages(**keys: Any) -> dict[str, int]:
        recipe = build_recipe({"sparsity": 0.5, "recover": True, "dtype": "float32", **keys})
        return prepare(recipe).memory.stages

    most = stages(recover_weights="all")["recovery"] - stages(recover_rank=1)["recovery"]
    parameters = prepare(build_recipe({"sparsity": 0.5})).checkpoint.total_parameters
    assert 0.65 * 16 * parameters < most < 16 * parameters


def test_text_that_the_model_writes_has_room_for_its_cache() -> None:
    plans = [
        prepare(build_recipe({"sparsity": 0.5, "calibration": source})).memory.stages
        for source in ("builtin", "generated")
    ]
    assert "writing" in plans[1]
    assert "writing" not in plans[0]


def test_a_layer_that_cannot_be_held_leaves_the_time_out(
    text: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save_tiny(tmp_path / "model")
    there = predicted(capsys, model, text)
    with monkeypatch.context() as patch:
        patch.setattr(dry_run, "free_memory", lambda device: 1000)
        said = predicted(capsys, model, text)
        assert said["seconds_low"] is said["seconds_high"] is None
        assert said["peak_memory_bytes"] == there["peak_memory_bytes"]
        assert said["bytes_after"] == there["bytes_after"]
        assert _exit_code([*arguments(model, text, tmp_path / "out", *HALF), "--dry-run"]) == 0
        assert "unknown" in capsys.readouterr().out
