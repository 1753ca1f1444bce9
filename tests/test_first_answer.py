"""Claims about what is refused at once, who may read an output, and what a run says before and while it works."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import arguments, refused

from fbn_prune.cli.main import _exit_code
from fbn_prune.data.text_files import require_readable
from fbn_prune.errors import InvalidInput, counted
from fbn_prune.export.published import public_name, without_paths
from fbn_prune.model.kept_neurons import KeptNeurons
from fbn_prune.networks import discovery, ica
from fbn_prune.networks.functional_networks import FunctionalNetworks
from fbn_prune.recipe import build_recipe
from fbn_prune.runs import stages
from fbn_prune.runs.budget import Budget, rounding_note
from fbn_prune.runs.second_run import output_locked, refuse_second_run
from fbn_prune.runs.unfinished import clean_runs
from fbn_prune.store import LOCK, RECORD, Store, locked


def test_what_needs_no_torch_is_refused_before_it_is_imported(tiny: Path, tmp_path: Path) -> None:
    for name in ("broken", "cut"):
        shutil.copytree(tiny, tmp_path / name)
    (tmp_path / "broken" / "config.json").write_text('{"model_type": "llama",')
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:2000])
    (tmp_path / "out").mkdir()
    (tmp_path / "recipe.yaml").write_text("sparsity: [0.5\n")
    job = ["--model", str(tiny), "--sparsity", "0.5", "--output", str(tmp_path / "new")]
    nowhere, new = str(tmp_path / "nowhere"), str(tmp_path / "new")
    refusals = [
        [*job, "--sparsty", "0.5"],
        [*job, "--calibration", nowhere],
        [*job, "--task", nowhere],
        [*job, "--networks-from", nowhere],
        ["run", str(tmp_path / "recipe.yaml")],
        ["run", nowhere],
        [*job[:4], "--output", str(tmp_path / "out")],
        ["convert", "--model", str(tiny), "--output", str(tmp_path / "out")],
        ["discover", "--model", str(tiny)],
        ["evaluate", "--model", nowhere],
        ["bundle", f"a={nowhere}", "--model", str(tiny), "--output", str(tmp_path / "out")],
        *(
            [*command, "--model", str(tmp_path / model), *more]
            for model in ("nowhere", "broken", "cut")
            for command, more in (([], job[2:]), (["rank"], []), (["compare"], []))
        ),
        *(
            [command, "--model", str(tmp_path / model), "--output", new]
            for model in ("nowhere", "broken")
            for command in ("convert", "dequantize", "discover")
        ),
        ["ablate", "--model", nowhere],
        ["ablate", "--model", str(tiny), "--text", nowhere],
        ["ablate", "--model", str(tiny), "--text", f"name={nowhere}"],
        ["ablate", "--model", str(tiny), "--tasks", "nowhere.jsonl"],
        ["evaluate", "--model", str(tiny), "--tasks", "nowhere.jsonl"],
        ["evaluate", "--model", str(tiny), "--output-path", f"{nowhere}/results.json"],
        ["compare", "--model", str(tiny), "--output-path", f"{nowhere}/results.json"],
        ["bundle", f"a={nowhere}", "--model", str(tiny), "--output", new],
        ["bundle", f"a={nowhere}.safetensors:1,2", "--model", str(tiny), "--output", new],
        *(
            [*command, "--model", model]
            for model in ("no--id", "owner/name.git", "a..b", "x" * 97, "owner/-name", "no.gguf")
            for command in ([*job[2:]], ["evaluate"], ["convert", "--output", new])
        ),
        [*job, "--calibration", "hf:no--id:train"],
        ["trim-vocabulary", "--model", nowhere, "--texts", __file__, "--output", new],
        ["trim-vocabulary", "--model", str(tiny), "--texts", nowhere, "--output", new],
    ]
    program = (
        "import json, sys; from fbn_prune.cli.main import _exit_code\n"
        "for arguments in json.loads(sys.argv[1]):\n"
        "    code = _exit_code(arguments)\n"
        "    assert code == 2, (arguments, code)\n"
        "    slow = {'torch', 'transformers'} & set(sys.modules)\n"
        "    assert not slow, (arguments, slow)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, json.dumps(refusals)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stderr.splitlines()) == len(refusals)


@contextmanager
def nobody() -> Iterator[None]:
    """Without the rights of root, which may read every file."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_a_missing_permission_is_not_called_damage(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    for parent in tmp_path.parents:
        if parent.stat().st_uid == os.geteuid() and parent != Path("/"):
            parent.chmod(parent.stat().st_mode | 0o011)
    file = tmp_path / "kept_neurons.safetensors"
    file.write_bytes(b"")
    file.chmod(0o200)
    with nobody():
        for read in (require_readable, KeptNeurons.load, FunctionalNetworks.load):
            with pytest.raises(InvalidInput, match=r"cannot read .*: Permission denied"):
                read(file)


@pytest.mark.parametrize("mask", [0o022, 0o027])
def test_every_file_of_an_output_follows_the_umask(
    mask: int, tiny: Path, text: Path, tmp_path: Path
) -> None:
    before = os.umask(mask)
    try:
        output, bundle = tmp_path / "out", tmp_path / "bundle"
        assert _exit_code(arguments(tiny, text, output, "--keep-networks", "2")) == 0
        job = ["bundle", f"a={output}", "--model", str(tiny), "--output", str(bundle)]
        assert _exit_code(job) == 0
    finally:
        os.umask(before)
    files = [file for folder in (output, bundle) for file in folder.rglob("*")]
    assert {"kept_neurons.safetensors", "down.safetensors"} <= {file.name for file in files}
    for file in files:
        expected = (0o777 if file.is_dir() else 0o666) & ~mask
        assert stat.S_IMODE(file.stat().st_mode) == expected, file
    if mask == 0o022:  # what is passed on names no folder of this machine
        for file in output.rglob("*"):
            if file.suffix in (".md", ".json", ".html", ".safetensors"):
                assert str(tmp_path.parent).encode() not in file.read_bytes(), file


def test_what_is_published_has_names_only() -> None:
    assert public_name("/home/me/secret/text.jsonl:body") == "text.jsonl:body"
    assert public_name("lm_eval:/home/me/task.yaml") == "lm_eval:task.yaml"
    assert public_name("hf:org/data:config:train") == "hf:org/data:config:train"
    recipe = {"model": "/a/b", "calibration": ["/c/d.txt", "builtin"], "seed": 1, "output": "/x"}
    assert without_paths(recipe) == {"model": "b", "calibration": ["d.txt", "builtin"], "seed": 1}


def test_a_second_run_into_one_output_is_refused_before_its_work(
    tiny: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    place = tmp_path / ".out.work" / "of-another-recipe"
    with locked(place, LOCK, ""):
        Store(place, {"model": "m", "output": str(output)}).bind("text")
        job = arguments(tiny, text, output, "--keep-networks", "2")
        refused(capsys, job, f"in use by process {os.getpid()}: another run is writing the output")
    assert {file.name for file in place.iterdir()} == {LOCK, RECORD}
    assert [path.name for path in place.parent.iterdir()] == [place.name]


@pytest.mark.parametrize("command", ["", "discover"])
@pytest.mark.parametrize("first", ["beside", "elsewhere"])
def test_a_second_run_into_one_output_is_refused_whatever_work_directories_the_two_have(
    command: str,
    first: str,
    tiny: Path,
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    output, seen = tmp_path / "new" / "out", []
    job = arguments(tiny, text, output)
    dial = ["--keep-networks", "2", "--work-dir"]
    elsewhere = [*job, *dial, str(tmp_path / "b")]
    others = [elsewhere, job, ["discover", *job]]
    if command == "discover" or first == "beside":
        mine = [command, *job] if command else job
    else:
        mine = [*job, *dial, str(tmp_path / "a")]
    find = stages.discover

    def while_at_work(*about: Any, **how: Any) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(stages, "discover", lambda *about, **how: pytest.fail("both at work"))
            for other in others:
                words = f"in use by process {os.getpid()}: another run is writing the output"
                refused(capsys, other, words)
                seen.append(other)
        return find(*about, **how)

    monkeypatch.setattr(stages, "discover", while_at_work)
    assert _exit_code(mine) == 0, capsys.readouterr().err
    assert len(seen) == 3
    assert [path.name for path in output.parent.iterdir()] == ["out"]
    assert not (tmp_path / "b").exists()


def test_a_lock_of_a_killed_run_holds_up_nobody_and_is_cleaned(tmp_path: Path) -> None:
    place = tmp_path / ".out.work"
    (place / "key").mkdir(parents=True)
    (place / LOCK).write_text("1\n")
    Store(place / "key", {"model": "m", "output": str(tmp_path / "out")}).bind("text")
    refuse_second_run(tmp_path / "out")
    with output_locked(tmp_path / "out"):
        with pytest.raises(InvalidInput, match="another run is writing"):
            refuse_second_run(tmp_path / "out", tmp_path / "elsewhere")
        assert clean_runs(place.parent)[1] == []
        assert place.is_dir()
    assert not place.exists()


def test_a_cut_that_rounding_makes_much_larger_is_said_before_the_work(
    tiny: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = arguments(tiny, text, tmp_path / "out", "--sparsity", "0.2", "--width-multiple", "16")
    job += ["--criterion", "magnitude"]
    assert _exit_code(job) == 0
    said = capsys.readouterr().err
    assert (
        "asked to remove 19.4% of the MLP neurons, but widths are multiples of 16: each layer keeps "
        "16 of 24, which removes 33.3%" in said
    )
    recipe = build_recipe({"sparsity": 0.5})
    assert rounding_note(recipe, Budget(36, most=False), [24] * 3, 4) is None


@pytest.mark.parametrize(
    ("count", "words"), [(1, "1 tensor"), (0, "0 tensors"), (2000, "2,000 tensors")]
)
def test_one_is_no_plural(count: int, words: str) -> None:
    assert counted(count, "tensor") == words


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_the_bar_of_ica_moves_with_each_layer_and_each_iteration(scope: str) -> None:
    generator = torch.Generator().manual_seed(0)
    layers = [torch.randn(64, 40, generator=generator) for _ in range(3)]
    groups = [layers] if scope == "global" else [[layer] for layer in layers]
    steps: list[int] = []
    course = discovery._Course(steps.append, len(groups), 3 // len(groups))
    iterations = 0
    for group in groups:
        standard = [ica.standardise(layer)[0] for layer in group]
        found = ica.spatial_ica(lambda z=standard: iter(z), 4, on_step=course.step)  # type: ignore[misc]
        iterations += found.ica_iterations
        course.solved()
    assert sum(steps) == discovery.PARTS
    assert len(steps) >= 3 + min(iterations, 50)
    assert all(step > 0 for step in steps)


def test_a_trial_says_what_it_will_try_and_its_bar_moves_within_a_layout(
    tiny: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fbn_prune.cli import console
    from fbn_prune.progress import SilentDisplay
    from fbn_prune.pruning import layout

    notes: list[str] = []
    moves: dict[str, list[int]] = {}
    totals: dict[str, int] = {}

    class Seen(SilentDisplay):
        @contextmanager
        def stage(self, name: str, total: int, unit: str) -> Iterator[Any]:  # type: ignore[override]
            totals[name] = total
            yield moves.setdefault(name, []).append

        def note(self, line: str) -> None:
            notes.append(line)

    clock = iter(range(0, 10**6, 7))
    monkeypatch.setattr(console, "display", Seen)
    monkeypatch.setattr(layout.time, "perf_counter", lambda: float(next(clock)))
    job = arguments(tiny, text, tmp_path / "out", "--keep-networks", "2", "--layout", "ragged")
    assert _exit_code(job) == 0
    tried = "trial of 4 layouts: uniform, networks 0.5, networks 0.75, networks"
    assert tried in notes
    assert any(
        line.startswith("trial: uniform widths took") and "other 3" in line for line in notes
    )
    assert sum(moves["trial"]) == totals["trial"]
    assert len(moves["trial"]) >= 5
