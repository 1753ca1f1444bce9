"""Run the same commands with two versions of the code and compare what they write, byte for byte.

    python eval/robustness/golden.py --against REVISION [--model DIR --calibration FILE ...] [--output FILE]

REVISION is any git revision; its tree is checked out beside this one. Each command prunes in another way: uniform,
ragged, streamed, recovered, with heads, for a task, in two processes. Weights, configs, kept neurons and networks have
to be equal; recipes, cards and reports may change. Ends with code 1 where a file differs. A command whose options the
other revision spells differently counts as different: give `--skip NAME`.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import typer

ROOT = Path(__file__).parents[2]
SMALL = ("--tokens", "16384", "--network-tokens", "2048", "--networks", "32")
COMMANDS: Mapping[str, Sequence[str]] = {
    "uniform": ("--keep-networks", "10"),
    "sparsity": ("--sparsity", "0.5"),
    "ragged": (
        *("--keep-networks", "10", "--layout", "ragged"),
        *("--widths", "auto", "--loss-aware"),
    ),
    "streamed": ("--keep-networks", "10", "--memory-budget", "900MB"),
    "recovered": ("--sparsity", "0.6", "--sequential", "--recover", "--recover-passes", "1"),
    "heads": ("--sparsity", "0.4", "--head-sparsity", "0.5"),
    "two processes": ("--keep-networks", "10"),
}
COMPARED = ("*.safetensors", "config.json", "*.index.json")


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of each file of an output that has to stay the same."""
    files = sorted({file for pattern in COMPARED for file in folder.glob(pattern)})
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def written(tree: Path, name: str, options: Sequence[str], output: Path) -> dict[str, str]:
    """What one command writes with the code in `tree`."""
    command = [sys.executable, "-m"]
    if name == "two processes":
        command += ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    command += ["fbn_prune", *SMALL, *COMMANDS[name], *options, "--output", str(output)]
    paths = [str(tree), str(tree / "kernels"), str(tree / "eval")]
    threads = "1" if name == "two processes" else "2"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": threads}
    done = subprocess.run(
        command, env=environment, cwd=output.parent, capture_output=True, text=True
    )
    if done.returncode != 0:
        return {"failed": done.stderr.strip().splitlines()[-1] if done.stderr else "no message"}
    return digests(output)


def main(
    against: Annotated[str, typer.Option(help="The git revision to compare with.")],
    model: Annotated[str, typer.Option(help="Checkpoint to prune.")] = "builtin",
    calibration: Annotated[list[str] | None, typer.Option(help="Its text.")] = None,
    skip: Annotated[list[str] | None, typer.Option(help="Commands to leave out.")] = None,
    output: Annotated[Path | None, typer.Option(help="Write the comparison here, as JSON.")] = None,
) -> None:
    """Compare two versions of the code."""
    options = ["--model", model]
    for source in calibration or ():
        options += ["--calibration", source]
    found: dict[str, dict[str, bool | str]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        other = Path(scratch) / "other"
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "--detach", "--quiet", str(other), against], check=True)
        try:
            for name in COMMANDS:
                if name in (skip or ()):
                    continue
                before = written(other, name, options, Path(scratch) / f"{name}-before")
                after = written(ROOT, name, options, Path(scratch) / f"{name}-after")
                # Networks that the result does not depend on are no longer looked for.
                files = after.keys() if after.keys() <= before.keys() else before.keys()
                found[name] = {file: after.get(file) == before[file] for file in sorted(files)}
                if "failed" in before | after:
                    found[name] = {"failed": before.get("failed") or after["failed"]}
                print(f"{name}: {found[name]}", flush=True)
        finally:
            subprocess.run([*git, "remove", "--force", str(other)], check=False)
    if output is not None:
        facts = {"against": against, "model": Path(model).name, "files": found}
        output.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    if not all(same is True for files in found.values() for same in files.values()):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
