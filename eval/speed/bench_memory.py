"""Prune checkpoints that are larger than the memory allowed, and compare a streamed run with one in memory.

    python eval/speed/bench_memory.py cap --shape 7gb --cap 4GB --budget 3GB
    python eval/speed/bench_memory.py compare --shape 1b
    python eval/speed/bench_memory.py reads --shape small --budget 1GB

The checkpoints are Llama-shaped (`mixture`: a Qwen3-MoE) with random float16 weights, and use the tokenizer and the
text of the built-in model; they are made once in --folder. `cap` makes a dry run, then runs the main job in a child
process whose address space is limited (RLIMIT_AS, as `ulimit -v` does), and prints the predicted and the measured
peak of resident memory and the longest time between two lines of progress. `compare` runs the job in memory and
streamed, and compares weights, kept neurons and time. `reads` runs it streamed and counts how often each weight is
read.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import count_reads
import torch
import typer
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig
from transformers.core_model_loading import revert_weight_conversion
from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig

from fbn_prune.data import builtin
from fbn_prune.model.mixture_checkpoint import open_any
from fbn_prune.recipe import parse_size

RESULTS = Path(__file__).parents[1] / "results"
PROGRAM = ("-m", "fbn_prune")
"""Arguments with which a child's Python runs the command line."""

COUNTING = (str(Path(count_reads.__file__)),)
"""The same, for a command line whose last line has the bytes read of each weight."""

COPIED = ("stages", "forward_seconds", "perplexity_before", "perplexity_after", "calibration_tokens",
          "held_out_tokens", "neurons_kept", "neurons_total")  # fmt: skip
"""Keys that are copied from the run's own result."""


@dataclass(frozen=True)
class Shape:
    """The sizes of a Llama, or of a Qwen3-MoE with so many experts of this width, of which a token is sent to four."""

    hidden: int
    width: int
    layers: int
    heads: int
    key_heads: int
    vocabulary: int = 32000
    experts: int = 0


@dataclass(frozen=True)
class Ran:
    """A finished child: its JSON output, its lines on stderr with their time in seconds, and what it used."""

    result: dict[str, Any]
    lines: list[tuple[float, str]]
    seconds: float
    cpu_seconds: float
    peak_bytes: int

    def to_json(self) -> dict[str, Any]:
        times = [0.0, *(moment for moment, _ in self.lines), self.seconds]
        return {
            "peak_bytes": self.peak_bytes,
            "seconds": self.seconds,
            "cpu_seconds": self.cpu_seconds,
            **{key: self.result[key] for key in COPIED},
            "progress_lines": sum("s left" in line for _, line in self.lines),
            "longest_silence_seconds": max(b - a for a, b in pairwise(times)),
        }


SHAPES = {
    "7gb": Shape(
        4096, 2048, 36, 32, 32
    ),  # narrow MLPs: the second order takes time cubic in their width
    "1b": Shape(2048, 5632, 22, 32, 4),  # TinyLlama's
    "wide": Shape(4096, 3584, 3, 32, 32),
    "slim": Shape(1024, 1024, 24, 16, 4),
    "mixture": Shape(1024, 512, 12, 16, 4, experts=32),
    "small": Shape(1024, 2816, 12, 16, 4),
    "tiny": Shape(128, 384, 4, 4, 2),
}

app = typer.Typer(add_completion=False, help=__doc__)
Folder = Annotated[Path, typer.Option(help="Where checkpoints and outputs go.")]
Tokens = Annotated[int, typer.Option(help="Calibration tokens.")]


@app.command()
def cap(
    folder: Folder,
    shape: str = "7gb",
    limit: Annotated[str, typer.Option("--cap", help="Address space of the child.")] = "4GB",
    budget: str = "3GB",
    tokens: Tokens = 2048,
    out: Path | None = None,
) -> None:
    """Prune within a hard limit and compare the peak memory with the prediction."""
    model = make_checkpoint(folder / shape, SHAPES[shape])
    flags = [*_flags(model, tokens), "--memory-budget", budget]
    predicted = run_child([*flags, "--dry-run"]).result
    limit_bytes = parse_size(limit, "--cap")
    ran = run_child([*flags, "--output", str(folder / "pruned")], limit_bytes)
    report = {
        "shape": vars(SHAPES[shape]),
        "checkpoint_bytes": sum(file.stat().st_size for file in model.glob("*.safetensors")),
        "cap_bytes": limit_bytes,
        "budget_bytes": parse_size(budget, "--budget"),
        "tokens": tokens,
        **_predicted(predicted),
        **ran.to_json(),
        "measured_over_predicted": ran.peak_bytes / predicted["peak_memory_bytes"],
    }
    _finish(report, out or RESULTS / f"memory_cap_{shape}.json")
    shutil.rmtree(folder / "pruned")


@app.command()
def compare(
    folder: Folder,
    shape: str = "1b",
    budget: Annotated[str, typer.Option(help="Too little for the model in memory.")] = "3GB",
    tokens: Tokens = 2048,
    out: Path | None = None,
) -> None:
    """Prune in memory and streamed, and compare the checkpoints and the time."""
    model = make_checkpoint(folder / shape, SHAPES[shape])
    flags = _flags(model, tokens)
    runs: dict[str, Any] = {}
    for name, memory in (("whole", "1000GB"), ("streamed", budget)):
        limited = [*flags, "--memory-budget", memory]
        predicted = run_child([*limited, "--dry-run"]).result
        ran = run_child([*limited, "--output", str(folder / name)])
        runs[name] = {**_predicted(predicted), **ran.to_json()}
    difference, neurons = _differences(folder / "whole", folder / "streamed")
    report = {
        "shape": vars(SHAPES[shape]),
        "tokens": tokens,
        "runs": runs,
        "largest_weight_difference": difference,
        "input_weights_equal": neurons,
        "time_ratio": runs["streamed"]["seconds"] / runs["whole"]["seconds"],
        "cpu_time_ratio": runs["streamed"]["cpu_seconds"] / runs["whole"]["cpu_seconds"],
    }
    _finish(report, out or RESULTS / f"memory_compare_{shape}.json")
    for name in runs:
        shutil.rmtree(folder / name)


@app.command()
def reads(
    folder: Folder,
    shape: str = "small",
    budget: Annotated[str, typer.Option(help="Too little for the model in memory.")] = "1GB",
    tokens: Tokens = 2048,
    out: Path | None = None,
) -> None:
    """Prune streamed; print the bytes of weights read, and how often each kind of weight was read."""
    model = make_checkpoint(folder / shape, SHAPES[shape])
    flags = [*_flags(model, tokens), "--memory-budget", budget]
    plan = run_child([*flags, "--dry-run"]).result["memory"]
    if "streamed" not in plan:
        raise SystemExit(f"--budget {budget}: {plan}; give less")
    child = run_child([*flags, "--output", str(folder / "streamed")], program=COUNTING)
    ran = child.to_json()
    counted = next(line for _, line in child.lines if line.startswith(count_reads.PREFIX))
    found: dict[str, int] = json.loads(counted.removeprefix(count_reads.PREFIX))
    tensors = open_any(model).tensors
    times: dict[str, list[float]] = {}
    for name, info in tensors.items():
        kind = "layer 0" if ".layers.0." in name else "other layers"
        kind = kind if ".layers." in name else "embeddings and the rest"
        kind += ": output weights" if "down_proj" in name else ""
        times.setdefault(kind, []).append(found.get(name, 0) / info.nbytes)
    report = {
        "shape": vars(SHAPES[shape]),
        "tokens": tokens,
        "checkpoint_bytes": sum(info.nbytes for info in tensors.values()),
        "bytes_read": sum(found.values()),
        "times_read": {kind: sum(each) / len(each) for kind, each in times.items()},
        "seconds_between_stages": ran["seconds"] - sum(ran["stages"].values()),
        **ran,
    }
    _finish(report, out or RESULTS / f"memory_reads_{shape}.json")
    shutil.rmtree(folder / "streamed")


def make_checkpoint(path: Path, shape: Shape) -> Path:
    """Write a random checkpoint, one layer a shard, unless it is there already."""
    if (path / "config.json").is_file():
        return path
    path.mkdir(parents=True, exist_ok=True)
    config = _config(shape)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
        empty = revert_weight_conversion(model, model.state_dict())  # experts apiece, as on a disk
    parts: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, tensor in empty.items():
        layer = name.split(".")[2] if ".layers." in name else "embeddings"
        parts.setdefault(layer, {})[name] = tuple(tensor.shape)
    generator = torch.Generator().manual_seed(0)
    weight_map: dict[str, str] = {}
    drawn: dict[tuple[int, ...], torch.Tensor] = {}
    for index, part in enumerate(parts.values()):
        file = f"model-{index:05d}.safetensors"
        tensors = {}
        for place, (name, size) in enumerate(part.items()):
            if (
                size not in drawn
            ):  # drawn once for each shape, and rolled by a few rows for each further tensor
                random = torch.randn(size, generator=generator) * 0.7 / size[-1] ** 0.5
                drawn[size] = (torch.ones(size) if len(size) == 1 else random).half()
            tensors[name] = drawn[size].roll(31 * index + 7 * place, 0)
        save_file(tensors, path / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index_file = {"metadata": {}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index_file))
    for given in builtin.model_path().glob("*token*"):
        shutil.copyfile(given, path / given.name)
    config.save_pretrained(path)
    return path


def _config(shape: Shape) -> PretrainedConfig:
    sizes: dict[str, Any] = {
        "hidden_size": shape.hidden,
        "intermediate_size": shape.width,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.key_heads,
        "vocab_size": shape.vocabulary,
        "dtype": "float16",
    }
    if not shape.experts:
        return LlamaConfig(**sizes, architectures=["LlamaForCausalLM"])
    routed = {
        "moe_intermediate_size": shape.width,
        "num_experts": shape.experts,
        "num_experts_per_tok": 4,
        "head_dim": shape.hidden // shape.heads,
    }
    return Qwen3MoeConfig(**sizes, **routed, architectures=["Qwen3MoeForCausalLM"])


def run_child(flags: list[str], limit: int | None = None, program: Sequence[str] = PROGRAM) -> Ran:
    """Run the command line in a child process whose address space is limited to `limit` bytes."""

    def restrict() -> None:
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

    command, lines = [sys.executable, *program, *flags, "--json"], []
    with tempfile.TemporaryFile("w+") as printed:
        start = time.perf_counter()
        child = subprocess.Popen(
            command, stdout=printed, stderr=subprocess.PIPE, text=True, preexec_fn=restrict
        )
        assert child.stderr is not None
        for line in child.stderr:
            lines.append((time.perf_counter() - start, line.rstrip()))
            print(line, end="", file=sys.stderr, flush=True)
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        if status != 0:
            raise SystemExit(f"fbn-prune {' '.join(flags)} ended with {child.returncode}")
        seconds = time.perf_counter() - start
        printed.seek(0)
        cpu = usage.ru_utime + usage.ru_stime
        return Ran(json.load(printed), lines, seconds, cpu, usage.ru_maxrss * 1024)


def _predicted(dry_run: dict[str, Any]) -> dict[str, Any]:
    return {
        "predicted_peak_bytes": dry_run["peak_memory_bytes"],
        "predicted_seconds": [dry_run["seconds_low"], dry_run["seconds_high"]],
        "plan": dry_run["memory"],
    }


def _flags(model: Path, tokens: int) -> list[str]:
    return [
        *("--model", str(model), "--keep-networks", "10", "--networks", "16", "--context", "128"),
        *("--tokens", str(tokens), "--network-tokens", str(min(tokens // 2, 1024))),
        "--allow-untrained",  # random weights
        *("--device", "cpu", "--max-shard-size", "500MB"),
    ]


def _differences(first: Path, second: Path) -> tuple[float, bool]:
    """Return the largest difference of any weight, and whether all but the refitted weights are bit-equal."""
    a, b = open_any(first), open_any(second)
    largest, equal = 0.0, True
    for name in a.names:
        one, other = a.tensor(name), b.tensor(name)
        if one.shape != other.shape:
            raise SystemExit(f"{name}: {one.shape} and {other.shape}")
        largest = max(largest, float((one.float() - other.float()).abs().max()))
        if "down_proj" not in name:
            equal = equal and torch.equal(one, other)
    return largest, equal


def _finish(report: dict[str, Any], out: Path) -> None:
    report["machine"] = {"cpus": os.cpu_count(), "threads": torch.get_num_threads()}
    report["torch"] = torch.__version__
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    app()
