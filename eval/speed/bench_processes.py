"""Run the same job in one process and in several, and compare neurons, weights and the time of each stage.

    python eval/speed/bench_processes.py --model MODEL --calibrate FILE ... [--processes 2 4] [--float32]

Every process computes with one thread. The calibration stages are those that run tokens through the model: for the cut,
including its second order (`prune`), and for the networks (`activations`). Weights are compared as stored: float16
weights can differ in the last place where float32 ones differ by 1e-7; `--float32` prunes a copy stored in float32.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from fbn_prune.data import builtin
from fbn_prune.model.checkpoint import Checkpoint

STAGES = ("activations", "prune")


def run(processes: int, arguments: list[str], output: Path) -> dict[str, Any]:
    """Run the job and return its `--json` output."""
    launcher = [sys.executable]
    if processes > 1:
        launcher += f"-m torch.distributed.run --standalone --nproc-per-node {processes}".split()
    command = [*launcher, "-m", "fbn_prune", *arguments, "--json", "--output", str(output)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
    return dict(json.loads(done.stdout))


def in_float32(model: str, folder: Path) -> str:
    """Store a copy of a model in float32 and return its folder."""
    source = str(builtin.model_path()) if model == "builtin" else model
    AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return str(folder)


def main() -> None:
    """Run the job with each number of processes, print the comparison and write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="builtin")
    parser.add_argument("--calibrate", nargs="+", default=["builtin"], metavar="FILE")
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--tokens", type=int, default=131072)
    parser.add_argument("--float32", action="store_true", help="prune a copy stored in float32")
    parser.add_argument("--keep-networks", type=int, default=10)
    parser.add_argument("--output", type=Path, default=Path("processes.json"))
    args = parser.parse_args()
    job = ["--tokens", str(args.tokens), "--keep-networks", str(args.keep_networks)]
    job += [word for file in args.calibrate for word in ("--calibration", file)]
    with tempfile.TemporaryDirectory() as scratch:
        model = in_float32(args.model, Path(scratch) / "model") if args.float32 else args.model
        job += ["--model", model]
        one = run(1, job, Path(scratch) / "1")
        before = Checkpoint.open(Path(scratch) / "1")
        neurons = load_file(Path(scratch) / "1" / "kept_neurons.safetensors")
        rows = []
        for processes in args.processes:
            folder = Path(scratch) / str(processes)
            many = run(processes, job, folder)
            after, kept = Checkpoint.open(folder), load_file(folder / "kept_neurons.safetensors")
            same = all(torch.equal(kept[name], neurons[name]) for name in neurons)
            spent = [sum(result["stages"][stage] for stage in STAGES) for result in (one, many)]
            largest = None
            if same:
                largest = max(
                    float((after.tensor(name).double() - before.tensor(name).double()).abs().max())
                    for name in before.names
                )
            row = {
                "processes": processes,
                "same_neurons": same,
                "largest_difference": largest,
                "stages": many["stages"],
                "calibration_speed_up": spent[0] / spent[1],
                "total_speed_up": sum(one["stages"].values()) / sum(many["stages"].values()),
                "peak_memory_bytes_first": many["peak_memory_bytes"],
            }
            rows.append(row)
            print(
                f"{processes} processes: same neurons {same}, largest difference "
                f"{largest}, calibration {row['calibration_speed_up']:.2f} times as fast, "
                f"all stages {row['total_speed_up']:.2f}",
                flush=True,
            )
    report = {"model": Path(args.model).name, "float32": args.float32, "tokens": args.tokens}
    report |= {"cores": os.cpu_count(), "one": one["stages"], "many": rows}
    args.output.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
