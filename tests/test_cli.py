"""Claims about the command line: contracts of output, exit codes, and one line for every refusal."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import small_runs
import torch
from safetensors.torch import load_file, save_file
from small_runs import refused, run_json
from transformers import AutoModelForCausalLM, AutoTokenizer
from warm_python import WARM

from fbn_prune.cli.app import EXAMPLES
from fbn_prune.cli.main import _exit_code
from fbn_prune.model.checkpoint import Checkpoint
from fbn_prune.networks.functional_networks import FunctionalNetworks
from fbn_prune.recipe import Recipe


def arguments(model: Path, text: Path, output: Path, *more: str) -> list[str]:
    return small_runs.arguments(model, text, output, "--keep-networks", "2", *more)


@pytest.mark.usefixtures("drawn")
def test_the_main_job_keeps_its_contract(
    tiny: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {p.name: p.read_bytes() for p in tiny.iterdir()}
    output = tmp_path / "out"
    result = run_json(capsys, *arguments(tiny, text, output))
    assert result["perplexity_before"] > 0 < result["perplexity_after"]
    assert result["forward_seconds"] > 0 < result["peak_memory_bytes"]
    assert result["parameters_before"] == Checkpoint.open(tiny).total_parameters
    assert result["output"] == str(output)
    model = AutoModelForCausalLM.from_pretrained(output)
    assert sum(p.numel() for p in model.parameters()) == result["parameters_after"]
    assert result["widths"] == [model.config.intermediate_size] * 3
    assert result["neurons_kept"] == sum(result["widths"]) < result["neurons_total"] == 72
    assert len(result["kept_networks"]) == 2
    assert {"calibration", "ica", "prune", "export"} <= set(result["stages"])
    names = {p.name for p in output.iterdir()}
    assert {"networks.safetensors", "recipe.yaml", "README.md", "tokenizer.json"} <= names
    assert {"result.json", "report.html"} <= names
    assert list(tmp_path.iterdir()) == [output]
    assert {p.name: p.read_bytes() for p in tiny.iterdir()} == before


@pytest.mark.usefixtures("drawn")
def test_the_written_recipe_makes_the_same_bytes_again(
    tiny: Path, text: Path, tmp_path: Path
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    assert _exit_code(arguments(tiny, text, first)) == 0
    assert _exit_code(["run", str(first / "recipe.yaml"), "--output", str(second)]) == 0
    written, again = (
        {path.name: path.read_bytes() for path in out.iterdir() if path.name != "recipe.yaml"}
        for out in (first, second)
    )
    assert again == written


@pytest.mark.parametrize("criterion", ["flap", "wanda", "magnitude"])
def test_every_criterion_meets_the_same_budget(
    criterion: str, tiny: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    extra = ["--criterion", criterion, "--sparsity", "0.33", "--width-multiple", "4"]
    result = run_json(capsys, *arguments(tiny, text, tmp_path / "out", *extra))
    assert result["widths"] == [16, 16, 16]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.isfinite(model(torch.arange(20)[None]).logits).all()


@pytest.mark.parametrize(
    "extra",
    [["--sequential", "--max-shard-size", "5KB"], ["--rank", "knockout"], ["--scope", "layer"]],
)
def test_the_variants_of_the_main_job_run(
    extra: list[str], tiny: Path, text: Path, tmp_path: Path
) -> None:
    assert _exit_code(arguments(tiny, text, tmp_path / "out", *extra)) == 0
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    AutoTokenizer.from_pretrained(tmp_path / "out")


def test_help_is_one_page_and_help_all_holds_every_key(
    capsys: pytest.CaptureFixture[str],
) -> None:
    pages = {}
    for flag in ("--help", "--help-all"):
        assert _exit_code([flag]) == 0
        shown = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
        # A flag stands at the start of its line in a panel.
        pages[flag] = set(re.findall(r"^│ (--[a-z-]+)", shown, re.MULTILINE))
    assert len(pages["--help"]) <= 24
    assert pages["--help"] < pages["--help-all"]
    assert {f"--{key.replace('_', '-')}" for key in Recipe.model_fields} < pages["--help-all"]


def test_help_needs_no_torch() -> None:
    code = "import sys; from fbn_prune.cli.main import _exit_code; " + "; ".join(
        f"assert _exit_code({arguments}) == 0"
        for arguments in (["--help"], ["run", "--help"], ["compare", "--help-all"])
    )
    code += "; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize("example", re.findall(r"^fbn-prune (.*)$", EXAMPLES, re.MULTILINE))
def test_the_examples_of_the_help_run(
    example: str, tiny: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(text, "text.txt")
    Path("examples.jsonl").write_text('{"question": "two and two", "answer": "four"}\n')
    args = [str(tiny) if word == "MODEL" else word for word in example.split()]
    assert _exit_code([*args, "--dry-run"]) == 0


def test_set_gives_any_key_as_its_flag_does(
    tiny: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = arguments(tiny, text, tmp_path / "out", "--sparsity", "0.5", "--dry-run")
    by_flag = run_json(capsys, *args, "--width-multiple", "4")
    by_set = run_json(capsys, *args, "--set", "width-multiple=4", "--set", "refit_damping=1e-2")
    assert by_set["widths"] == by_flag["widths"] == [12, 12, 12]


@pytest.mark.parametrize(
    ("command", "setting", "message"),
    [
        ([], "seeed=3", "unknown key 'seeed'; did you mean 'seed'"),
        ([], "seed", "write KEY=VALUE"),
        ([], "seed=many", "seed = 'many'"),
        ([], "tokens=4", "tokens is given twice"),
        ([], "seed=[", "is not YAML"),
        (["rank"], "sparsity=0.5", "unknown key 'sparsity'"),
    ],
)
def test_a_bad_setting_is_refused_in_one_line(
    command: list[str], setting: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    refused(capsys, [*command, "--tokens", "2000", "--set", setting], message)


def test_without_networks_the_run_says_so_and_its_output_is_whole(
    tiny: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain, reported = tmp_path / "plain", tmp_path / "reported"
    base = ["--sparsity", "0.33", "--width-multiple", "4"]
    assert _exit_code(arguments(tiny, text, plain, *base)) == 0
    assert "no networks are discovered" in capsys.readouterr().err
    assert _exit_code(arguments(tiny, text, reported, *base, "--report-networks")) == 0
    assert "no networks are discovered" not in capsys.readouterr().err
    names = {"networks.safetensors"}
    assert {p.name for p in reported.iterdir()} - {p.name for p in plain.iterdir()} == names
    weights = "model.safetensors"
    assert (plain / weights).read_bytes() == (reported / weights).read_bytes()
    assert "second-order cost" in (plain / "README.md").read_text()
    assert _exit_code(["report", str(plain), "--output", str(tmp_path / "report.html")]) == 0
    assert run_json(capsys, "inspect", str(reported))["networks"]
    refused(capsys, ["inspect", str(plain)], "--report-networks")


def test_discover_inspect_and_reuse(
    tiny: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found, output = tmp_path / "found", tmp_path / "out"
    shown = run_json(capsys, "discover", *small_runs.arguments(tiny, text, found))
    again = run_json(capsys, "inspect", str(found))
    assert shown["networks"] == again["networks"]
    assert len(again["networks"]) == 6
    for card in again["networks"]:
        assert 0 <= card["iou_halves"] <= 1
        assert 0 <= card["iou_seeds"] <= 1
        assert len(card["contexts"]) == 5
        assert card["hubs"] <= card["members"]
    artifact = found / "networks.safetensors"
    base = ["--model", str(tiny), "--calibration", str(text), "--context", "48", "--tokens", "600"]
    reuse = ["--networks-from", str(artifact), "--keep-networks", "2", "--output", str(output)]
    result = run_json(capsys, *base, *reuse, "--width-multiple", "1")
    assert "ica" not in result["stages"]
    kept = FunctionalNetworks.load(artifact).union(result["kept_networks"]).sum()
    assert abs(result["neurons_kept"] - int(kept)) <= 3


def half_a_file(m: Path) -> None:
    data = (m / "model.safetensors").read_bytes()
    (m / "model.safetensors").write_bytes(data[: len(data) // 2])


def edit(m: Path, change: Callable[[torch.Tensor], object]) -> None:
    tensors = load_file(m / "model.safetensors")
    change(tensors["model.layers.1.mlp.up_proj.weight"])
    save_file(tensors, m / "model.safetensors", metadata={"format": "pt"})


# What else is refused on opening a model: test_checkpoint.py.
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shutil.rmtree, "no folder"),
        (half_a_file, "model.safetensors"),
        (lambda m: edit(m, lambda up: up[3].fill_(torch.nan)), "layer 1"),
    ],
)
def test_a_damaged_model_is_refused_in_one_line(
    damage: Callable[[Path], object],
    message: str,
    tiny: Path,
    text: Path,
    tmp_path: Path,
    capsys: Any,
) -> None:
    model = tmp_path / "place" / "model"
    shutil.copytree(tiny, model)
    damage(model)
    refused(capsys, arguments(model, text, tmp_path / "out"), message)
    assert not (tmp_path / "out").exists()
    assert {p.name for p in tmp_path.iterdir()} == {"place"}


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--keep-networks", "0"], "at least one network"),
        (["--keep-networks", "-1"], "at least one network"),
        (["--keep-networks", "7"], "only 6 networks"),
        (["--networks", "600"], "allow at most"),
        (["--networks", "72", "--keep-networks", "2"], "72 neurons"),
        (["--sparsity", "0"], "between 0 and 1"),
        (["--sparsity", "1.5"], "between 0 and 1"),
        (["--context", "65"], "at most 64 tokens"),
        (["--device", "warp"], "write auto, cpu"),
        (["--criterion", "luck"], "luck"),
        (["--width-multiple", "25"], "only 24 neurons"),
        (["--calibration", "nowhere.txt"], "nowhere.txt"),
        (["--no-such-flag"], "--no-such-flag"),
        (["--max-shard-size", "huge"], "huge"),
    ],
)
def test_a_bad_flag_is_refused_in_one_line(
    extra: list[str], message: str, tiny: Path, text: Path, tmp_path: Path, capsys: Any
) -> None:
    refused(capsys, arguments(tiny, text, tmp_path / "out", *extra), message)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_output_is_refused_and_replaced_only_when_asked(
    tiny: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    output.mkdir()
    refused(capsys, arguments(tiny, text, output), "exists")
    (output / "old").write_text("old")
    refused(capsys, arguments(tiny, text, output), "exists")
    assert (output / "old").read_text() == "old"
    assert _exit_code(arguments(tiny, text, output, "--overwrite")) == 0
    assert not (output / "old").exists()
    refused(capsys, arguments(output, text, output, "--overwrite"), "the model itself")


def test_an_output_that_cannot_be_written_is_refused_before_any_work(
    tiny: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file"
    file.write_text("")
    refused(capsys, arguments(tiny, text, file / "out"), "file")
    if Path("/proc").is_dir():
        refused(capsys, arguments(tiny, text, Path("/proc/fbn-prune-out")), "/proc")


def test_a_dead_layer_is_pruned_not_divided_by(tiny: Path, text: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny, model)
    edit(model, torch.Tensor.zero_)
    assert _exit_code(arguments(model, text, tmp_path / "out")) == 0
    for tensor in load_file(tmp_path / "out" / "model.safetensors").values():
        assert torch.isfinite(tensor).all()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_stopped_leaves_nothing(
    number: signal.Signals, tiny: Path, tmp_path: Path
) -> None:
    pipe = tmp_path / "text.txt"
    os.mkfifo(pipe)  # the run waits at it, and is stopped in the middle whatever the load
    process = subprocess.Popen(
        [*WARM, "-m", "fbn_prune", *arguments(tiny, pipe, tmp_path / "out")],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        # A shell's background job ignores interrupts, and its children inherit that.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    with pipe.open("w"):
        process.send_signal(number)
        error = process.communicate(timeout=120)[1]
    assert process.returncode == 128 + number
    words = {signal.SIGTERM: "terminated", signal.SIGINT: "interrupted"}
    assert error == f"fbn-prune: error: {words[number]}; nothing was written\n"
    assert list(tmp_path.iterdir()) == [pipe]


def test_threads_wait_without_spinning_unless_told_to(monkeypatch: pytest.MonkeyPatch) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    done = subprocess.run(
        [sys.executable, "-m", "fbn_prune", "--dry-run", "--keep-networks", "10"],
        env=environment | {"OMP_DISPLAY_ENV": "TRUE"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "OMP_WAIT_POLICY = 'PASSIVE'" in done.stderr
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    assert _exit_code(["--version"]) == 0
    assert os.environ["OMP_WAIT_POLICY"] == "ACTIVE"
