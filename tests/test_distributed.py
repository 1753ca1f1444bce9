"""Several processes on one job come to what one comes to, and the first of them alone writes and speaks."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from small_runs import arguments
from warm_python import WARM

from fbn_prune import distributed
from fbn_prune.cli.main import _exit_code

TORCHRUN = ["-m", "torch.distributed.run", "--standalone"]

SCRIPT = """
import torch
from fbn_prune import distributed
with distributed.joined(torch.device("cpu")):
    me = distributed.rank()
    assert distributed.world() == 3
    assert distributed.total(me, 1.5) == [3.0, 4.5]
    rows = torch.full((me * 2, 2), float(me))
    assert distributed.joined_rows(rows)[:, 0].tolist() == [1, 1, 2, 2, 2, 2]
    assert distributed.broadcast(b"from the second" if me == 1 else b"other", source=1) == b"from the second"
    assert distributed.broadcast(b"" if me == 0 else None) == b""
    assert distributed.broadcast(None) is None
    mine = list(distributed.share(range(7)))
    seen = torch.zeros(7)
    seen[mine] += 1
    distributed.add_up(seen)
    assert seen.tolist() == [1] * 7
    distributed.wait()
"""


@given(st.integers(0, 40), st.integers(1, 9))
@settings(max_examples=30, deadline=None)
def test_every_item_is_one_processs_and_in_order(items: int, processes: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distributed, "world", lambda: processes)
        shares = []
        for place in range(processes):
            patch.setattr(distributed, "rank", lambda place=place: place)
            shares.append(list(distributed.share(range(items))))
    assert [item for part in shares for item in part] == list(range(items))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_a_process_alone_keeps_what_it_has() -> None:
    rows = torch.ones(2, 3)
    assert distributed.joined_rows(rows) is rows
    assert distributed.broadcast(b"data") == b"data"
    assert distributed.total(2.5, 1) == [2.5, 1.0]
    assert distributed.owner(5) == distributed.rank() == 0


def test_commands_that_processes_cannot_share_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert _exit_code(["discover", "--output", str(tmp_path / "found")]) == 2
    assert "start `discover` without a launcher" in capsys.readouterr().err
    monkeypatch.setenv("RANK", "1")
    assert _exit_code(["discover", "--output", str(tmp_path / "found")]) == 2
    assert capsys.readouterr().err == ""
    assert not (tmp_path / "found").exists()


@pytest.mark.slow
def test_three_processes_hear_of_one_another(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    done = launched(3, [str(script)])
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture
def job(tiny: Path, text: Path, place: Path) -> Callable[..., list[str]]:
    """The arguments of a small job."""
    small = ["--network-tokens=300", "--keep-networks=3", "--width-multiple=4", "--json"]
    small.append("--allow-untrained")  # its weights are random

    def flags(output: str, *more: str) -> list[str]:
        return arguments(tiny, text, place / output, *small, *more)

    return flags


def launched(processes: int, arguments: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        launching(processes, arguments), capture_output=True, text=True, check=False, timeout=300
    )


def launching(processes: int, arguments: list[str]) -> list[str]:
    launcher = [*WARM, *TORCHRUN, f"--nproc-per-node={processes}", "--no-python"]
    return [*launcher, *WARM, *arguments]


def warnings_of(said: str) -> list[str]:
    return [line for line in said.splitlines() if line.startswith("warning: layer")]


TRAINED = "--recover --recover-steps=distil --recover-weights=all --recover-passes=3"
SEARCHED = "--structures=neurons,heads,attention,layers --layout=ragged"


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["--sequential --head-sparsity=0.5", SEARCHED, TRAINED])
def test_two_processes_end_in_the_weights_of_one(
    mode: str, place: Path, job: Callable[..., list[str]], capsys: Any
) -> None:
    # So few tokens that the damping is adapted, and said.
    flags = [*mode.split(), "--tokens=300", "--overwrite"]
    capsys.readouterr()
    assert _exit_code(job("one", *flags)) == 0
    said = warnings_of(capsys.readouterr().err)
    done = launched(2, ["-m", "fbn_prune", *job("two", *flags)])
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["output"] == str(place / "two")
    assert said
    assert warnings_of(done.stderr) == said  # of all layers, whichever process fitted them
    expected, found = (load_file(place / name / "model.safetensors") for name in ("one", "two"))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-5)
    kept = [load_file(place / name / "kept_neurons.safetensors") for name in ("one", "two")]
    assert all(torch.equal(kept[0][name], kept[1][name]) for name in kept[0])


@pytest.mark.slow
def test_a_refusal_is_said_once(place: Path, job: Callable[..., list[str]]) -> None:
    command = [sys.executable, *TORCHRUN, "--nproc-per-node=2", "-m", "fbn_prune"]
    done = subprocess.run(
        [*command, *job("refused", "--sparsity=2")],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode != 0
    assert done.stderr.count("fbn-prune: error:") == 1
    assert not (place / "refused").exists()


@pytest.mark.slow
def test_a_lost_process_ends_the_job_and_the_rest_can_be_gone_on_with(
    place: Path, job: Callable[..., list[str]]
) -> None:
    flags = ["--tokens=1500", "--recover", "--recover-passes=2", "--max-shard-size=6KB"]
    name = "lost"
    command = ["-m", "fbn_prune", *job(name, *flags)]
    running = subprocess.Popen(
        launching(2, command), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    work = place / f".{name}.work"
    deadline = time.monotonic() + 120
    while not list(work.glob("*/match-*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process_of_rank(1, place / name).kill()
    running.communicate(timeout=120)
    assert running.returncode != 0
    assert not (place / name).exists()
    assert list(work.glob("*/dense.json")), "what was finished is kept"
    done = launched(2, command)
    assert done.returncode == 0, done.stderr
    assert "continuing from" in done.stderr
    undisturbed = launched(2, ["-m", "fbn_prune", *job("whole", *flags)])
    assert undisturbed.returncode == 0, undisturbed.stderr
    weights, expected = (
        {path.name: path.read_bytes() for path in (place / folder).glob("model*.safetensors")}
        for folder in (name, "whole")
    )
    assert weights == expected


def process_of_rank(rank: int, output: Path) -> psutil.Process:
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if str(output) in process.cmdline() and process.environ().get("RANK") == str(rank):
                found.append(process)
    (process,) = found
    return process
