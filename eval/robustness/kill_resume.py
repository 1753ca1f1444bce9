"""Kill a run with SIGKILL at random moments, resume it each time, and compare its output with an undisturbed run's.

    python eval/robustness/kill_resume.py --kills 20
    python eval/robustness/kill_resume.py --max-shard-size 300KB --aim  # also in the middle of layers and shards
    python eval/robustness/kill_resume.py --max-shard-size 300KB --aim --recover  # of matching and distillation too
    python eval/robustness/kill_resume.py --disk  # as root: fill a small tmpfs while the run computes
    python eval/robustness/kill_resume.py --disk --fill-at shard- --max-shard-size 300KB  # while it writes its output

By default the script prunes the embedded model on few tokens; flags after -- go to fbn-prune. After a kill it checks
that no visible folder loads as a model, and at the end that nothing but the output is left. The moments are drawn from
the time that an undisturbed run takes. With --aim, every other kill comes when the run has just finished one or more
layers, matched layers, training states or shards, which take only a moment on a small model.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch

import fbn_prune.runs.main_job  # noqa: F401 - imported once, before the runs are forked
from fbn_prune.cli.main import main as main_of_tool

SMALL = shlex.split("--tokens 8192 --network-tokens 2048 --context 128 --keep-networks 10")
OUTPUT = "out"
SMALL_PASSES = ("--recover-passes", "3")

MANY = ("layer-", "match-", "distilled-", "shard-")
"""Prefixes of the kept files of stages that keep many files."""


class Run:
    """A run in a process forked from this one, so that it need not import anything again.

    Each run has its own working folder, but the output has the same name in all, because recipe.yaml holds that name.
    """

    def __init__(self, folder: Path, flags: Sequence[str]) -> None:
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - lives as long as the run
        self._code: int | None = None
        sys.stdout.flush()
        self._process = os.fork()
        if self._process == 0:
            os.chdir(folder)
            os.dup2(self._errors.fileno(), 2)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            try:
                main_of_tool([*flags, "--output", OUTPUT])
            except SystemExit as end:
                os._exit(int(end.code or 0))
            os._exit(0)

    def ended(self) -> bool:
        if self._code is None:
            process, status = os.waitpid(self._process, os.WNOHANG)
            if process:
                self._code = os.waitstatus_to_exitcode(status)
        return self._code is not None

    def wait(self, seconds: float = float("inf")) -> bool:
        """Return whether the run ended within `seconds`."""
        end = time.perf_counter() + seconds
        while not self.ended() and time.perf_counter() < end:
            time.sleep(0.005)
        return self.ended()

    def signal(self, number: signal.Signals) -> None:
        os.kill(self._process, number)

    def finish(self) -> tuple[int, str]:
        """Wait for the end; return the exit code and the last line on stderr."""
        self.wait()
        assert self._code is not None
        self._errors.seek(0)
        return self._code, (self._errors.read().strip().splitlines() or [""])[-1]


def complete(folder: Path, flags: Sequence[str]) -> None:
    """Run to the end, and stop the script if the run fails."""
    code, last = Run(folder, flags).finish()
    if code != 0:
        raise SystemExit(f"a run ended with {code}: {last}")


def contents(folder: Path) -> dict[str, bytes]:
    """Return the bytes of every file in a folder, by relative path."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def differences(one: Path, other: Path) -> list[str]:
    """Return what differs: the files that are not the same in both folders."""
    a, b = contents(one), contents(other)
    return [f"{name} differs" for name in sorted(a.keys() | b.keys()) if a.get(name) != b.get(name)]


def loadable_halves(folder: Path) -> list[str]:
    """Return the visible folders with a config and weights, which a loader would take for a model."""
    found = [
        path.parent
        for path in folder.rglob("config.json")
        if not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]
    return [str(path) for path in found if list(path.glob("*.safetensors"))]


def final_faults(base: Path, place: Path, flags: Sequence[str]) -> list[str]:
    """Complete the run and return how its output differs from the undisturbed one, and what else is left."""
    complete(place, flags)
    left = [f"left behind: {path.name}" for path in place.iterdir() if path.name != OUTPUT]
    return differences(place / OUTPUT, base / "undisturbed" / OUTPUT) + left


def undisturbed(folder: Path, flags: Sequence[str]) -> float:
    """Complete a run in a new folder and return its seconds."""
    folder.mkdir()
    start = time.perf_counter()
    complete(folder, flags)
    return time.perf_counter() - start


def kept(place: Path) -> list[str]:
    """Return the names of the files that the unfinished run has kept, in the order in which they were finished."""
    records = list(place.glob(f".{OUTPUT}.work/*/work.json"))
    return list(json.loads(records[0].read_text())["stages"]) if records else []


def wait_for(run: Run, place: Path, kind: str, more: int) -> bool:
    """Wait until the run has kept `more` further files of a kind; return whether it ended before that."""
    before = {name for name in kept(place) if name.startswith(kind)}
    seen: set[str] = set()
    while not run.ended():
        seen |= {path.name for path in place.glob(f".{OUTPUT}.work/*/{kind}*.safetensors")} - before
        if len(seen) >= more:
            return False
        time.sleep(0.001)
    return True


def kill_and_resume(
    base: Path, flags: Sequence[str], kills: int, seed: int, aim: bool
) -> tuple[list[str], dict[str, int]]:
    """Return the faults found, and how many kills came right after each kind of stage."""
    seconds = undisturbed(base / "undisturbed", flags)
    print(f"undisturbed: {seconds:.1f} s", flush=True)
    place = base / "killed"
    place.mkdir()
    moments = random.Random(seed)
    wrong: list[str] = []
    last: Counter[str] = Counter()
    kinds = [kind for kind in MANY if "--recover" in flags or kind in ("layer-", "shard-")]
    done = finished = 0
    while done < kills:
        start = time.perf_counter()
        run = Run(place, flags)
        if aim and done % 2:
            ended = wait_for(run, place, moments.choice(kinds), moments.randint(1, 4))
        else:
            ended = run.wait(moments.uniform(0.0, 1.1 * seconds))
        if not ended:
            run.signal(signal.SIGKILL)
            run.wait()
            done += 1
            halves = [
                half
                for half in loadable_halves(place)
                if differences(Path(half), base / "undisturbed" / OUTPUT)
            ]
            wrong += [f"kill {done} left {half}" for half in halves]
            name = (kept(place) or ["nothing"])[-1].partition(".")[0]
            last[next((kind.rstrip("-") for kind in MANY if name.startswith(kind)), name)] += 1
            after = time.perf_counter() - start
            print(f"kill {done:2d} after {after:5.1f} s; finished last: {name}", flush=True)
            if (place / OUTPUT).exists():
                shutil.rmtree(place / OUTPUT)  # killed after the output was complete
            continue
        code, words = run.finish()
        if code != 0:
            return [*wrong, f"a resumed run failed: {words}"], dict(last)
        wrong += differences(place / OUTPUT, base / "undisturbed" / OUTPUT)
        finished += 1
        shutil.rmtree(place / OUTPUT)
    wrong += final_faults(base, place, flags)
    print(f"{done} kills, {finished + 1} runs that ended", flush=True)
    return wrong, dict(last)


def shards(folder: Path) -> dict[str, int]:
    """Return the inodes of the kept shards, by their names in the output."""
    return {
        path.name.removeprefix("shard-"): path.stat().st_ino
        for path in folder.glob(f".{OUTPUT}.work/*/shard-*")
    }


def fill_and_resume(base: Path, flags: Sequence[str], megabytes: int, fill_at: str) -> list[str]:
    """Fill the disk when the run has finished its first layer or shard, free it again, and return the faults found."""
    undisturbed(base / "undisturbed", flags)
    place = base / "small"
    place.mkdir()
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(place)], check=True
    )
    wrong: list[str] = []
    try:
        run = Run(place, flags)
        while not run.ended() and not any(name.startswith(fill_at) for name in kept(place)):
            time.sleep(0.001)
        if run.ended():
            raise SystemExit(f"the run ended before the disk was full: {run.finish()}")
        run.signal(signal.SIGSTOP)
        held = shutil.disk_usage(place)
        print(f"{held.used / 1e6:.1f} of {held.total / 1e6:.1f} MB in use", flush=True)
        filler = place / "filler"
        with filler.open("wb", buffering=0) as file:
            try:
                file.write(bytes(shutil.disk_usage(place).free))
                while True:
                    file.write(bytes(4096))
            except OSError:
                pass
        run.signal(signal.SIGCONT)
        code, last = run.finish()
        print(f"exit {code}: {last}", flush=True)
        if code != 1 or "No space left on device" not in last:
            wrong.append("the run did not report the full disk")
        wrong += [f"an incomplete model: {half}" for half in loadable_halves(place)]
        wrong += [f"left: {path}" for path in place.rglob("*.partial")]
        finished = shards(place)
        print(f"{len(finished)} shards kept", flush=True)
        if fill_at == "shard-" and not finished:
            wrong.append("no shard was kept")
        filler.unlink()
        wrong += final_faults(base, place, flags)
        for name, inode in finished.items():
            if (place / OUTPUT / name).stat().st_ino != inode:
                wrong.append(f"{name} was written again")
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--disk", action="store_true", help="fill a small disk instead")
    parser.add_argument("--megabytes", type=int, default=24, help="size of the small disk")
    parser.add_argument("--fill-at", choices=("layer-", "shard-"), default="layer-")
    parser.add_argument(
        "--aim", action="store_true", help="every other kill within a stage that keeps many files"
    )
    parser.add_argument("--recover", action="store_true", help="with recovery, in three passes")
    parser.add_argument("--max-shard-size", help="of the output, for example 300KB")
    parser.add_argument("--json", type=Path, help="write the outcome to this file")
    parser.add_argument("flags", nargs="*", default=SMALL, help="flags of fbn-prune, after --")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # a forked process does not have its parent's threads
    if arguments.disk and os.geteuid() != 0:
        print("skipped: mounting a small disk needs root")
        return
    flags = list(arguments.flags)
    if arguments.recover:
        flags += ["--recover", *SMALL_PASSES]
    if arguments.max_shard_size is not None:
        flags += ["--max-shard-size", arguments.max_shard_size]
    last: dict[str, int] = {}
    with tempfile.TemporaryDirectory(prefix="kill-resume-") as folder:
        base = Path(folder)
        if arguments.disk:
            wrong = fill_and_resume(base, flags, arguments.megabytes, arguments.fill_at)
        else:
            wrong, last = kill_and_resume(
                base, flags, arguments.kills, arguments.seed, arguments.aim
            )
    outcome = {
        "flags": " ".join(flags),
        "disk": arguments.fill_at if arguments.disk else None,
        "kills": 0 if arguments.disk else arguments.kills,
        "aimed": arguments.aim,
        "seed": arguments.seed,
        "finished_last": last,
        "wrong": wrong,
    }
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(outcome, indent=1) + "\n", encoding="utf-8")
    print("nothing wrong" if not wrong else "\n".join(wrong))
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
