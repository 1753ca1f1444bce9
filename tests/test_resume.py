"""A run that died goes on from its last finished stage, and ends in the bytes of an undisturbed one."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import recipe, run_json
from tiny_models import save_tiny

from fbn_prune import store
from fbn_prune.cli.main import _exit_code
from fbn_prune.errors import FbnPruneError, InvalidInput
from fbn_prune.progress import StageClock
from fbn_prune.recipe import Recipe
from fbn_prune.runs import prune
from fbn_prune.runs.kept import numbers, tensors
from fbn_prune.runs.main_job import run_prune
from fbn_prune.runs.memory import MemoryPlan, plan_memory
from fbn_prune.runs.setup import prepare
from fbn_prune.runs.unfinished import clean_runs, unfinished_runs
from fbn_prune.store import Store, locked, owned, store_in

MODES: dict[str, dict[str, Any]] = {
    "sequential": {"sequential": True},
    "searched": {
        "structures": "neurons,heads,attention,layers",
        "layout": "ragged",
        "target_params": 10_600,
        "sparsity": None,
    },
    "widths searched": {"layout": "ragged", "widths": "search"},
    "loss-aware ragged": {"layout": "ragged", "widths": "loss", "loss_aware": True},
    "task": {"task": "task.jsonl", "rank": "task"},
    "streamed": {},
    "recovered": {"recover": True, "max_shard_size": "6KB"},
    "cut in steps": {"recover": True, "recover_cuts": 2, "recover_weights": "all"},
}

SHARDED = {"max_shard_size": "6KB"}


class Killed(BaseException):
    """As a signal would, it ends the run between two instructions."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model, the text and the task of every run."""
    folder = tmp_path_factory.mktemp("resume")
    text = "".join(f"{i} apples, {i * 3} pence, {i % 7} pears. " for i in range(200))
    (folder / "text.txt").write_text(text)
    (folder / "task.jsonl").write_text(
        "".join(json.dumps({"text": f"{i} pears, {i} apples. " * 3}) + "\n" for i in range(4))
    )
    save_tiny(folder / "model")
    return folder


def job(place: Path, output: Path, **changes: Any) -> Recipe:
    if "task" in changes:
        changes["task"] = str(place / changes["task"])
    fixed = {"report_networks": True, "keep_networks": None, "sparsity": 0.4}
    return recipe(place / "model", place / "text.txt", output, **{**fixed, **changes})


def run(place: Path, output: Path, **changes: Any) -> None:
    run_prune(job(place, output, **changes), StageClock())


def contents(output: Path) -> dict[str, bytes]:
    files = {path.name: path.read_bytes() for path in output.iterdir()}
    del files["recipe.yaml"]  # it names the output
    return files


@contextmanager
def killed_after(writes: int) -> Iterator[list[str]]:
    """The run is killed when it has kept so many stages."""
    kept: list[str] = []
    write = Store.write

    def count(self: Store, name: str, *others: Any, **more: Any) -> None:
        write(self, name, *others, **more)
        kept.append(name)
        if len(kept) == writes:
            raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Store, "write", count)
        yield kept


def _streamed(recipe: Recipe, *others: Any) -> MemoryPlan:
    return replace(plan_memory(recipe, *others), streamed=True)


@pytest.fixture(scope="module")
def undisturbed(place: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What the plain run ends in."""
    output = tmp_path_factory.mktemp("undisturbed") / "out"
    run(place, output)
    return contents(output)


@pytest.mark.parametrize("mode", MODES)
def test_killed_again_and_again_it_ends_in_the_same_bytes(
    mode: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = MODES[mode]
    if mode == "streamed":
        monkeypatch.setattr("fbn_prune.runs.setup.plan_memory", _streamed)
    run(place, tmp_path / "undisturbed", **changes)
    kills = 0
    for step in (3, 5):
        with suppress(Killed), killed_after(step):
            run(place, tmp_path / "out", **changes)
        if (tmp_path / "out").exists():
            break
        kills += 1
    if not (tmp_path / "out").exists():
        run(place, tmp_path / "out", **changes)
    assert kills == 2
    assert contents(tmp_path / "out") == contents(tmp_path / "undisturbed")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "undisturbed"]


def test_what_is_finished_is_not_done_again(
    place: Path, tmp_path: Path, undisturbed: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(Killed), killed_after(3) as kept:
        run(place, tmp_path / "out")
    assert kept[-1] == "networks.safetensors"
    again = lambda *_, **__: pytest.fail("done again")  # noqa: E731
    monkeypatch.setattr("fbn_prune.runs.stages.output_energy", again)
    with pytest.raises(Killed), killed_after(4) as kept:
        run(place, tmp_path / "out")
    assert (kept[0], kept[-1]) == ("ranking.json", "layer-00001.safetensors")
    for stage in ("find_networks", "rank_networks", "chosen_layout", "dense_perplexity"):
        monkeypatch.setattr(prune, stage, again)
    with killed_after(99) as kept:
        run(place, tmp_path / "out")
    assert kept == ["layer-00002.safetensors", "pruned.json", "shard-model.safetensors"]
    assert contents(tmp_path / "out") == undisturbed


def test_a_refused_input_leaves_nothing(place: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("short")
    with pytest.raises(InvalidInput, match=r"too short|every document"):
        run(place, tmp_path / "deep" / "out", calibration=[str(tmp_path / "short.txt")])
    assert [path.name for path in tmp_path.iterdir()] == ["short.txt"]


def test_other_settings_and_other_text_do_not_go_on_from_it(place: Path, tmp_path: Path) -> None:
    source = tmp_path / "text.txt"
    source.write_text((place / "text.txt").read_text())
    changes = {"calibration": [str(source)]}
    with pytest.raises(Killed), killed_after(6):
        run(place, tmp_path / "out", **changes)
    with pytest.raises(Killed), killed_after(1) as kept:
        run(place, tmp_path / "out", **changes, seed=2)
    assert kept == ["dense.json"]
    source.write_text("Another text. " + source.read_text())
    with pytest.raises(Killed), killed_after(1) as kept:
        run(place, tmp_path / "out", **changes)
    assert kept == ["dense.json"]


def test_a_stage_whose_file_is_damaged_is_done_again_and_no_work_is_left(
    place: Path, tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    work = tmp_path / "work"
    work.mkdir()
    with pytest.raises(Killed), killed_after(7):
        run(place, tmp_path / "out", work_dir=work)
    (damaged,) = work.glob("*/layer-00000.safetensors")
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    with killed_after(99) as kept:
        run(place, tmp_path / "out", work_dir=work)
    assert kept[0] == "layer-00000.safetensors"
    assert contents(tmp_path / "out") == undisturbed
    assert "work_dir" not in (tmp_path / "out" / "recipe.yaml").read_text()
    assert work.is_dir()  # as it was named, it stays
    assert not list(work.iterdir())


# Shards


@pytest.fixture(scope="module")
def sharded(place: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What an undisturbed run with several shards ends in."""
    output = tmp_path_factory.mktemp("sharded") / "out"
    run(place, output, **SHARDED)
    files = contents(output)
    assert sum(name.startswith("model-") for name in files) > 5
    return files


@contextmanager
def killed_at_shard(number: int) -> Iterator[list[str]]:
    """The run is killed when it has kept that shard, from 1."""
    with killed_after(9 + number) as kept:
        yield kept
    assert kept[-1].startswith(f"shard-model-{number:05d}-of-")


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*/shard-*"))


def resumed(place: Path, output: Path, **changes: Any) -> list[str]:
    """What a run that goes on has to keep anew."""
    with killed_after(99) as kept:
        run(place, output, **{**SHARDED, **changes})
    return kept


def test_a_run_killed_between_shards_writes_the_rest_and_its_shards_are_listed(
    place: Path, tmp_path: Path, sharded: dict[str, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    with killed_at_shard(4), pytest.raises(Killed):
        run(place, tmp_path / "out", **SHARDED)
    names = [f"shard-{name}" for name in sorted(sharded) if name.startswith("model-")]
    kept = shards(tmp_path / ".out.work")
    assert [file.name for file in kept] == names[:4]
    (row,) = run_json(capsys, "work", "list", tmp_path)["runs"]
    assert row["shards"] == 4
    assert row["bytes"] > sum(file.stat().st_size for file in kept)
    assert resumed(place, tmp_path / "out") == names[4:]
    assert contents(tmp_path / "out") == sharded
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("name", ["dense.json", "layer-00001", "shard-model-00004"])
def test_a_full_disk_is_told_and_the_run_goes_on_when_there_is_room(
    name: str,
    place: Path,
    tmp_path: Path,
    sharded: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    put = store.os.replace

    def full(source: Path, target: Path) -> None:
        if target.name.startswith(name):
            raise OSError(28, "No space left on device")
        put(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(store.os, "replace", full)
        with pytest.raises(FbnPruneError, match="No space left on device; finished"):
            run(place, tmp_path / "out", **SHARDED)
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.rglob("*.tmp"))
    assert len(shards(tmp_path / ".out.work")) == (3 if name.startswith("shard") else 0)
    assert resumed(place, tmp_path / "out")[0].startswith(name)
    assert contents(tmp_path / "out") == sharded


@contextmanager
def killed_before_it_is_in_place() -> Iterator[None]:
    """The run is killed when the output's folder has all shards, and is not the output yet; where both lie on one file
    system, a shard has two names there and takes its room once."""

    def killed(folder: Path) -> None:
        kept = shards(folder.parent / ".out.work")
        assert all(one.samefile(folder / one.name.removeprefix("shard-")) for one in kept)
        raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fbn_prune.runs.output.verify_export", killed)
        yield


def test_where_a_file_has_one_name_only_the_shards_are_moved(
    place: Path, tmp_path: Path, sharded: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*names: Any) -> None:
        raise OSError(1, "Operation not permitted")

    def look(folder: Path) -> None:
        assert not shards(tmp_path / ".out.work")

    monkeypatch.setattr(store.os, "link", refused)
    monkeypatch.setattr("fbn_prune.runs.output.verify_export", look)
    run(place, tmp_path / "out", **SHARDED)
    assert contents(tmp_path / "out") == sharded


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "a byte is another": lambda data: data[:-1] + bytes([data[-1] ^ 1]),
    "longer": lambda data: data + b"0",
    "empty": lambda data: b"",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_of_the_shards_in_an_output_that_was_not_in_place_a_damaged_one_is_written_anew(
    damage: str, place: Path, tmp_path: Path, sharded: dict[str, bytes]
) -> None:
    with killed_before_it_is_in_place(), pytest.raises(Killed):
        run(place, tmp_path / "out", **SHARDED)
    damaged = shards(tmp_path / ".out.work")[2]
    damaged.write_bytes(DAMAGES[damage](damaged.read_bytes()))
    assert resumed(place, tmp_path / "out") == [damaged.name]
    assert contents(tmp_path / "out") == sharded


def test_shards_of_another_size_are_let_go(place: Path, tmp_path: Path) -> None:
    with killed_at_shard(4), pytest.raises(Killed):
        run(place, tmp_path / "out", **SHARDED)
    before = {file.name for file in shards(tmp_path / ".out.work")}
    with killed_after(1) as kept, pytest.raises(Killed):
        run(place, tmp_path / "out", max_shard_size="12KB")
    assert [file.name for file in shards(tmp_path / ".out.work")] == kept
    assert not before & set(kept)


def test_shards_do_not_outlive_a_stage_that_is_done_again(
    place: Path, tmp_path: Path, sharded: dict[str, bytes]
) -> None:
    with killed_at_shard(4), pytest.raises(Killed):
        run(place, tmp_path / "out", **SHARDED)
    (damaged,) = tmp_path.glob(".out.work/*/layer-00002.safetensors")
    damaged.write_bytes(b"?")
    kept = resumed(place, tmp_path / "out")
    assert kept[0] == damaged.name
    assert sum(name.startswith("shard-") for name in kept) == sum(
        name.startswith("model-") and name.endswith("tensors") for name in sharded
    )
    assert contents(tmp_path / "out") == sharded


@pytest.fixture
def elsewhere(tmp_path: Path) -> Iterator[Path]:
    """A folder on another file system."""
    memory = Path("/dev/shm")
    if not memory.is_dir() or memory.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is no second file system")
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        yield Path(folder)


def test_the_work_directory_may_be_on_another_file_system(
    place: Path, tmp_path: Path, elsewhere: Path, sharded: dict[str, bytes]
) -> None:
    with killed_at_shard(4), pytest.raises(Killed):
        run(place, tmp_path / "out", work_dir=elsewhere, **SHARDED)
    assert len(shards(elsewhere)) == 4
    with killed_before_it_is_in_place(), pytest.raises(Killed):
        run(place, tmp_path / "out", work_dir=elsewhere, **SHARDED)
    assert resumed(place, tmp_path / "out", work_dir=elsewhere) == []
    assert contents(tmp_path / "out") == sharded
    assert not list(elsewhere.iterdir())


def test_a_disk_that_fills_up_while_shards_are_copied_leaves_no_half(
    place: Path, tmp_path: Path, elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = store.shutil.copyfile

    def full(source: Path, target: Path) -> None:
        if "00003-of" in target.name:
            target.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        copy(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(store.shutil, "copyfile", full)
        with pytest.raises(
            FbnPruneError, match=r"cannot write .*: No space left on device; finished"
        ):
            run(place, tmp_path / "out", work_dir=elsewhere, **SHARDED)
    assert not list(tmp_path.iterdir())
    assert resumed(place, tmp_path / "out", work_dir=elsewhere) == []


@pytest.mark.parametrize("where", ["beside", "elsewhere"])
def test_finished_shards_need_no_room_again(
    where: str, place: Path, tmp_path: Path, elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {} if where == "beside" else {"work_dir": elsewhere}
    with killed_at_shard(2), pytest.raises(Killed):
        run(place, tmp_path / "out", **SHARDED, **changes)
    folder = tmp_path / ".out.work" if where == "beside" else elsewhere
    kept = sum(file.stat().st_size for file in shards(folder))
    needed = sum(file.stat().st_size for file in (place / "model").glob("*.safetensors"))
    usage = shutil.disk_usage(tmp_path)

    def with_free(full: Path, free: int) -> None:
        def tell(path: Path) -> Any:
            on_it = path.stat().st_dev == full.stat().st_dev
            return usage._replace(free=free if on_it else 10**15)

        monkeypatch.setattr("fbn_prune.export.directory.shutil.disk_usage", tell)
        prepare(job(place, tmp_path / "out", **SHARDED, **changes))

    with_free(folder, needed - kept)
    with pytest.raises(InvalidInput, match="free: make room"):
        with_free(folder, needed - kept - 10_000)
    if where == "elsewhere":
        with pytest.raises(InvalidInput, match=r"the output .* needs"):
            with_free(tmp_path, needed - kept)


def test_what_a_killed_run_left_half_is_removed(place: Path, tmp_path: Path) -> None:
    with killed_at_shard(1), pytest.raises(Killed):
        run(place, tmp_path / "out", **SHARDED)
    (folder,) = (tmp_path / ".out.work").iterdir()
    (folder / "shard-model-00002-of-00009.safetensors.tmp").write_bytes(b"half")
    (folder / "distilled-00000001.safetensors").write_bytes(b"not recorded")
    with killed_after(1), pytest.raises(Killed):
        run(place, tmp_path / "out", **SHARDED)
    named = json.loads((folder / store.RECORD).read_text())["stages"]
    assert {file.name for file in folder.iterdir()} == {store.RECORD, store.LOCK, *named}


# States on the way


def test_of_a_stages_states_the_last_undamaged_one_is_kept(tmp_path: Path) -> None:
    kept = Store(tmp_path)
    assert kept.read_last("x-") is None
    for number in (b"01", b"02", b"10"):
        kept.write(f"x-{number.decode()}", lambda put: put(number), replaces=kept.names("x-"))  # noqa: B023
    assert {file.name for file in tmp_path.glob("x-*")} == {"x-10"}
    assert Store(tmp_path).read_last("x-") == b"10"
    (tmp_path / "x-10").write_bytes(b"")
    assert Store(tmp_path).read_last("x-") is None


# Two runs


def test_the_same_run_is_refused_while_one_is_at_work(place: Path, tmp_path: Path) -> None:
    with pytest.raises(Killed), killed_after(1):
        run(place, tmp_path / "out")
    (folder,) = (tmp_path / ".out.work").iterdir()
    with (
        locked(folder, store.LOCK, "x"),
        pytest.raises(
            InvalidInput, match=r"is in use by process \d+: another run is writing the output"
        ),
    ):
        run(place, tmp_path / "out")
    assert not owned(folder / store.LOCK)


def test_a_lock_ends_with_its_block_and_its_folder_may_be_removed_meanwhile(tmp_path: Path) -> None:
    with store_in(tmp_path / "w", "key", {}) as first:
        assert not first.started
    assert not (tmp_path / "w").exists()
    with store_in(tmp_path / "w", "key", {}):
        assert owned(tmp_path / "w" / "key" / store.LOCK)


# The command


def test_unfinished_runs_are_listed_and_cleaned(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(Killed), killed_after(6):
        run(place, tmp_path / "out")
    (row,) = run_json(capsys, "work", "list", tmp_path)["runs"]
    assert (row["model"], row["output"]) == (str(place / "model"), str(tmp_path / "out"))
    assert (row["stages"], row["layers"], row["in_use"]) == (5, 1, False)
    assert (row["matched_layers"], row["shards"]) == (0, 0)
    assert _exit_code(["work", "list", str(tmp_path)]) == 0
    assert "unfinished runs" in capsys.readouterr().out
    assert _exit_code(["work", "clean", str(tmp_path)]) == 0
    assert "removed 1 unfinished run," in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_a_run_at_work_is_not_cleaned_away(tmp_path: Path) -> None:
    with store_in(tmp_path / "w", "key", {"model": "m", "output": "o"}) as mine:
        mine.bind("text")
        numbers(mine, "dense", lambda: 1.5)
        removed, left = clean_runs(tmp_path / "w")
        assert (removed, [run.in_use for run in left]) == ([], [True])
        assert numbers(mine, "dense", lambda: pytest.fail("done again")) == 1.5
    assert unfinished_runs(tmp_path) == []
    with pytest.raises(InvalidInput, match="there is no folder"):
        unfinished_runs(tmp_path / "nowhere")


@pytest.mark.parametrize("value", [0.1, 1e-300, float("inf"), [1, 2], {"a": 1 / 3}, None])
def test_numbers_come_back_as_they_were(value: Any, tmp_path: Path) -> None:
    numbers(Store(tmp_path), "x", lambda: value)
    assert numbers(Store(tmp_path), "x", lambda: pytest.fail("done again")) == value


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int64])
def test_tensors_come_back_bit_for_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    tensor = (torch.randn(5, 3, dtype=torch.float64) * 100).to(dtype).T
    tensors(Store(tmp_path), "x", lambda: {"x": tensor})
    again = tensors(Store(tmp_path), "x", lambda: pytest.fail("done again"))["x"]
    assert again.dtype == dtype
    assert again.equal(tensor)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"format": 99}', f'{{"format": {store.FORMAT}}}', "\xff"]
)
def test_a_damaged_record_is_no_work(text: str, tmp_path: Path) -> None:
    (tmp_path / "key").mkdir()
    (tmp_path / "key" / store.RECORD).write_text(text, encoding="latin-1")
    assert not Store(tmp_path / "key").started
    assert unfinished_runs(tmp_path) == []
