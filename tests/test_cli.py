"""Claims about the command line: contracts of output, exit codes, and one line for every refusal."""

from __future__ import annotations

import json
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
import torch
from safetensors.torch import load_file, save_file
from tiny_models import save_tiny
from transformers import AutoModelForCausalLM, AutoTokenizer

from fbn_prune.cli.main import EXAMPLES, _exit_code
from fbn_prune.networks.functional_networks import FunctionalNetworks
from fbn_prune.recipe import Recipe

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(
        "".join(f"{i} apples cost {i * 3} pence, and {i % 7} pears. " for i in range(400))
    )
    return path


def arguments(model: Path, text: Path, output: Path, *more: str) -> list[str]:
    small = "--tokens 1000 --network-tokens 600 --networks 6 --keep-networks 2 --context 48"
    head = ["--model", str(model), "--calibration", str(text), "--output", str(output)]
    return [*head, *small.split(), *more]


def run_json(capsys: pytest.CaptureFixture[str], *args: str) -> dict[str, Any]:
    capsys.readouterr()
    assert _exit_code([*args, "--json"]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def test_the_main_job_keeps_its_contract(
    tiny: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {p.name: p.read_bytes() for p in tiny.iterdir()}
    output = tmp_path / "out"
    result = run_json(capsys, *arguments(tiny, text, output))
    for key in [
        "parameters_before",
        "parameters_after",
        "perplexity_before",
        "perplexity_after",
        "neurons_kept",
        "neurons_total",
        "widths",
        "kept_networks",
        "stages",
        "forward_seconds",
        "peak_memory_bytes",
        "output",
    ]:
        assert key in result, key
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


def test_the_written_recipe_makes_the_same_bytes_again(
    tiny: Path, text: Path, tmp_path: Path
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    assert _exit_code(arguments(tiny, text, first)) == 0
    assert _exit_code(["run", str(first / "recipe.yaml"), "--output", str(second)]) == 0
    for name in (
        "model.safetensors",
        "model.safetensors.index.json",
        "networks.safetensors",
        "config.json",
        "result.json",
        "report.html",
    ):
        assert (first / name).read_bytes() == (second / name).read_bytes(), name


@pytest.mark.parametrize(
    "criterion", ["second-order", "flap", "wanda", "membership", "magnitude", "random"]
)
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
    [["--sequential"], ["--rank", "knockout"], ["--scope", "layer"], ["--max-shard-size", "5KB"]],
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


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["compare", "--help-all"]])
def test_help_needs_no_torch(arguments: list[str]) -> None:
    code = (
        "import sys; from fbn_prune.cli.main import _exit_code; "
        f"assert _exit_code({arguments}) == 0; assert 'torch' not in sys.modules"
    )
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
    _refused(capsys, [*command, "--tokens", "2000", "--set", setting], message)


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
    _refused(capsys, ["inspect", str(plain)], "--report-networks")


def test_discover_inspect_and_reuse(
    tiny: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found, output = tmp_path / "found", tmp_path / "out"
    base = ["--model", str(tiny), "--calibration", str(text), "--context", "48"]
    small = ["--tokens", "1000", "--network-tokens", "600", "--networks", "6"]
    shown = run_json(capsys, "discover", *base, *small, "--output", str(found))
    again = run_json(capsys, "inspect", str(found))
    assert shown["networks"] == again["networks"]
    assert len(again["networks"]) == 6
    for card in again["networks"]:
        assert 0 <= card["iou_halves"] <= 1
        assert 0 <= card["iou_seeds"] <= 1
        assert len(card["contexts"]) == 5
        assert card["hubs"] <= card["members"]
    artifact = found / "networks.safetensors"
    reuse = ["--networks-from", str(artifact), "--keep-networks", "2", "--output", str(output)]
    result = run_json(capsys, *base, *small[:2], *reuse, "--width-multiple", "1")
    assert "ica" not in result["stages"]
    kept = FunctionalNetworks.load(artifact).union(result["kept_networks"]).sum()
    assert abs(result["neurons_kept"] - int(kept)) <= 3


def _missing(m: Path) -> None:
    shutil.rmtree(m)


def _empty(m: Path) -> None:
    for file in m.iterdir():
        file.unlink()


def _truncated(m: Path) -> None:
    data = (m / "model.safetensors").read_bytes()
    (m / "model.safetensors").write_bytes(data[: len(data) // 2])


def _corrupt(m: Path) -> None:
    data = bytearray((m / "model.safetensors").read_bytes())
    data[8:40] = b"\xff" * 32
    (m / "model.safetensors").write_bytes(bytes(data))


def _pickle_only(m: Path) -> None:
    (m / "model.safetensors").rename(m / "pytorch_model.bin")


def _no_tokenizer(m: Path) -> None:
    for file in m.glob("*token*"):
        file.unlink()


def _absent_shard(m: Path) -> None:
    _index(m, "model-00001-of-00001.safetensors")


def _outside_shard(m: Path) -> None:
    shutil.copy(m / "model.safetensors", m.parent / "outside.safetensors")
    _index(m, "../outside.safetensors")


def _index(m: Path, shard: str) -> None:
    names = load_file(m / "model.safetensors")
    (m / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, shard)}
    (m / "model.safetensors.index.json").write_text(json.dumps(index))


def _nan(m: Path) -> None:
    tensors = load_file(m / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 3] = float("nan")
    save_file(tensors, m / "model.safetensors", metadata={"format": "pt"})


def _mixture(m: Path) -> None:
    config = json.loads((m / "config.json").read_text())
    config |= {"model_type": "mixtral", "num_local_experts": 8}
    (m / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_missing, "no folder"),
        (_empty, "is empty"),
        (_truncated, "model.safetensors"),
        (_corrupt, "model.safetensors"),
        (_pickle_only, "safetensors"),
        (_no_tokenizer, "tokenizer"),
        (_absent_shard, "model-00001-of-00001.safetensors"),
        (_outside_shard, "outside"),
        (_nan, "layer 1"),
        (_mixture, "mixture of experts"),
    ],
)
def test_a_damaged_model_is_refused_in_one_line(
    damage: Callable[[Path], None],
    message: str,
    tiny: Path,
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = tmp_path / "place" / "model"
    shutil.copytree(tiny, model)
    damage(model)
    _refused(capsys, arguments(model, text, tmp_path / "out"), message)
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
    extra: list[str],
    message: str,
    tiny: Path,
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    _refused(capsys, arguments(tiny, text, tmp_path / "out", *extra), message)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", ["", "hi"])
def test_calibration_text_that_is_no_block_is_refused(
    content: str, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = tmp_path / "short.txt"
    short.write_text(content)
    _refused(capsys, arguments(tiny, short, tmp_path / "out"), "short.txt")
    assert not (tmp_path / "out").exists()


def test_an_existing_output_is_refused_and_replaced_only_when_asked(
    tiny: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    output.mkdir()
    _refused(capsys, arguments(tiny, text, output), "exists")
    (output / "old").write_text("old")
    _refused(capsys, arguments(tiny, text, output), "exists")
    assert (output / "old").read_text() == "old"
    assert _exit_code(arguments(tiny, text, output, "--overwrite")) == 0
    assert not (output / "old").exists()
    _refused(capsys, arguments(output, text, output, "--overwrite"), "the model itself")


def test_an_output_that_cannot_be_written_is_refused_before_any_work(
    tiny: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file"
    file.write_text("")
    _refused(capsys, arguments(tiny, text, file / "out"), "file")
    if Path("/proc").is_dir():
        _refused(capsys, arguments(tiny, text, Path("/proc/fbn-prune-out")), "/proc")


def test_a_recipe_with_an_unknown_key_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("keep_netwroks: 3\n")
    _refused(capsys, ["run", str(path)], "keep_netwroks")


def test_a_dead_layer_is_pruned_not_divided_by(tiny: Path, text: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny, model)
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"].zero_()
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    assert _exit_code(arguments(model, text, tmp_path / "out")) == 0
    for tensor in load_file(tmp_path / "out" / "model.safetensors").values():
        assert torch.isfinite(tensor).all()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_stopped_leaves_nothing(
    number: signal.Signals, tiny: Path, tmp_path: Path
) -> None:
    pipe = tmp_path / "text.txt"
    os.mkfifo(
        pipe
    )  # the run waits at it, so that it is stopped in the middle whatever the machine's load
    process = subprocess.Popen(
        [sys.executable, "-m", "fbn_prune", *arguments(tiny, pipe, tmp_path / "out")],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        # A shell's background job ignores interrupts, and its children inherit that.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    with pipe.open("w"):
        process.send_signal(number)
        error = process.communicate(timeout=120)[1]
    assert process.returncode != 0
    assert "Traceback" not in error
    assert list(tmp_path.iterdir()) == [pipe]


def _refused(capsys: pytest.CaptureFixture[str], args: list[str], message: str) -> None:
    capsys.readouterr()
    code = _exit_code(args)
    captured = capsys.readouterr()
    assert code == 2, captured.err
    assert captured.out == ""
    lines = [line for line in captured.err.splitlines() if "error:" in line]
    assert len(lines) == 1
    assert message in lines[0]
    assert len(captured.err.splitlines()) == 1, captured.err


@pytest.mark.parametrize("given", [None, "ACTIVE"])
def test_threads_wait_without_spinning_unless_told_to(given: str | None) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    if given is not None:
        environment["OMP_WAIT_POLICY"] = given
    done = subprocess.run(
        [sys.executable, "-m", "fbn_prune", "--dry-run", "--keep-networks", "10"],
        env=environment | {"OMP_DISPLAY_ENV": "TRUE"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert f"OMP_WAIT_POLICY = '{given or 'PASSIVE'}'" in done.stderr
