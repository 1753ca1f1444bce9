"""Kill a run at random moments with SIGKILL, start it again each time, and compare what it ends in with an
undisturbed run.

    python eval/robustness/kill_resume.py --kills 20
    python eval/robustness/kill_resume.py --max-shard-size 300KB --aim  # also in the middle of layers and shards
    python eval/robustness/kill_resume.py --max-shard-size 300KB --aim --recover  # of matching and distillation too
    python eval/robustness/kill_resume.py --disk  # as root: a small tmpfs is filled while the run is at work
    python eval/robustness/kill_resume.py --disk --fill-at shard- --max-shard-size 300KB  # while it writes its output

All use the embedded model on few tokens unless told otherwise (flags behind -- go to fbn-prune), check after every
kill that no folder in sight loads as a model, and at the end that nothing but the output is left. Moments are drawn
over the time that an undisturbed run takes. With --aim every other kill comes instead when a run has just finished
some more layers, matched layers, training states or shards: what lasts a moment only on a small model is hit too.
"""

from __future__ import annotations

import argparse
import json
import os
import random
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

import fbn_prune.runs.prune  # noqa: F401 - so that a run need not
from fbn_prune.cli.main import main as main_of_tool

SMALL = (
    "--tokens",
    "8192",
    "--network-tokens",
    "2048",
    "--context",
    "128",
    "--keep-networks",
    "10",
)
OUTPUT = "out"
SMALL_PASSES = ("--recover-passes", "3")

MANY = ("layer-", "match-", "distilled-", "shard-")
"""What the names of kept files begin with of which a run has many."""


class Run:
    """A run in a process of its own, forked from this one, which has already imported what takes seconds to import.

    It has its own working folder and an output of the same name everywhere: recipe.yaml holds the name.
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
        """Whether it ended within so many seconds."""
        end = time.perf_counter() + seconds
        while not self.ended() and time.perf_counter() < end:
            time.sleep(0.005)
        return self.ended()

    def kill(self) -> None:
        os.kill(self._process, signal.SIGKILL)
        self.wait()

    def pause(self) -> None:
        os.kill(self._process, signal.SIGSTOP)

    def go_on(self) -> None:
        os.kill(self._process, signal.SIGCONT)

    def finish(self) -> tuple[int, str]:
        """Exit code, and what it said last."""
        self.wait()
        assert self._code is not None
        self._errors.seek(0)
        return self._code, (self._errors.read().strip().splitlines() or [""])[-1]


def completed(folder: Path, flags: Sequence[str]) -> None:
    """A run that has to end well."""
    code, last = Run(folder, flags).finish()
    if code != 0:
        raise SystemExit(f"a run ended with {code}: {last}")


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def differences(one: Path, other: Path) -> list[str]:
    """Names of files that are not the same in both folders."""
    a, b = contents(one), contents(other)
    return sorted(name for name in a.keys() | b.keys() if a.get(name) != b.get(name))


def loadable_halves(folder: Path) -> list[str]:
    """Visible folders with a config and weights, which a loader would take for a model."""
    found = [
        path.parent
        for path in folder.rglob("config.json")
        if not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]
    return [str(path) for path in found if list(path.glob("*.safetensors"))]


def undisturbed(folder: Path, flags: Sequence[str]) -> float:
    """An undisturbed run in `folder`; its seconds."""
    folder.mkdir()
    start = time.perf_counter()
    completed(folder, flags)
    return time.perf_counter() - start


def kept(place: Path) -> list[str]:
    """Names of the files that the unfinished run has kept, in the order in which they were finished."""
    records = list(place.glob(f".{OUTPUT}.work/*/work.json"))
    return list(json.loads(records[0].read_text())["stages"]) if records else []


def wait_for(run: Run, place: Path, kind: str, more: int) -> bool:
    """Wait until the run has kept so many more files of a kind; whether it ended before that."""
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
    """What went wrong, nothing if all is as it should be; and how many kills came when what had been finished last."""
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
            run.kill()
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
                shutil.rmtree(place / OUTPUT)  # killed on its way out, the output whole
            continue
        code, words = run.finish()
        if code != 0:
            return [*wrong, f"a resumed run failed: {words}"], dict(last)
        wrong += [
            f"{name} differs" for name in differences(place / OUTPUT, base / "undisturbed" / OUTPUT)
        ]
        finished += 1
        shutil.rmtree(place / OUTPUT)
    completed(place, flags)
    wrong += [
        f"{name} differs" for name in differences(place / OUTPUT, base / "undisturbed" / OUTPUT)
    ]
    wrong += [f"left behind: {path.name}" for path in place.iterdir() if path.name != OUTPUT]
    print(f"{done} kills, {finished + 1} runs that ended", flush=True)
    return wrong, dict(last)


def shards(folder: Path) -> dict[str, int]:
    """Inodes of the kept shards, by their names in the output."""
    return {
        path.name.removeprefix("shard-"): path.stat().st_ino
        for path in folder.glob(f".{OUTPUT}.work/*/shard-*")
    }


def fill_and_resume(base: Path, flags: Sequence[str], megabytes: int, fill_at: str) -> list[str]:
    """The same with a disk that fills up when the first layer or shard is finished, and gets room again."""
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
        run.pause()
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
        run.go_on()
        code, last = run.finish()
        print(f"exit {code}: {last}", flush=True)
        if code != 1 or "No space left on device" not in last:
            wrong.append("a full disk was not told")
        wrong += [f"a half: {half}" for half in loadable_halves(place)]
        wrong += [f"left: {path}" for path in place.rglob("*.partial")]
        finished = shards(place)
        print(f"{len(finished)} shards kept", flush=True)
        if fill_at == "shard-" and not finished:
            wrong.append("no shard was kept")
        filler.unlink()
        completed(place, flags)
        for name, inode in finished.items():
            if (place / OUTPUT / name).stat().st_ino != inode:
                wrong.append(f"{name} was written again")
        wrong += [
            f"{name} differs" for name in differences(place / OUTPUT, base / "undisturbed" / OUTPUT)
        ]
        wrong += [f"left behind: {path.name}" for path in place.iterdir() if path.name != OUTPUT]
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
        "--aim", action="store_true", help="every other kill in a stage of many parts"
    )
    parser.add_argument("--recover", action="store_true", help="with recovery, in three passes")
    parser.add_argument("--max-shard-size", help="of the output, as 300KB")
    parser.add_argument("--json", type=Path, help="write the outcome here")
    parser.add_argument("flags", nargs="*", default=SMALL, help="flags of fbn-prune, behind --")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # a forked process has none of its parent's threads
    if arguments.disk and os.geteuid() != 0:
        print("skipped: mounting a small disk takes root")
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
