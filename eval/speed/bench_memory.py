"""Prune checkpoints larger than the memory allowed, and compare a streamed run with one in memory.

    python eval/speed/bench_memory.py cap --shape 7gb --cap 4GB --budget 3GB
    python eval/speed/bench_memory.py compare --shape 1b
    python eval/speed/bench_memory.py reads --shape small --budget 1GB

The checkpoints are Llama-shaped, random, in float16, with the tokenizer and the text of the built-in model; they are
made once in --folder. `cap` runs the dry run, then the main job in a child process whose address space is limited
(RLIMIT_AS, what `ulimit -v` sets), and prints predicted and measured peak of resident memory and the longest silence
between two lines of progress. `compare` runs the job twice, whole and streamed, and compares weights, neurons and time.
`reads` streams it and counts how often each weight is read.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import threading
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

from fbn_prune.data import builtin
from fbn_prune.model.checkpoint import Checkpoint
from fbn_prune.recipe import parse_size

RESULTS = Path(__file__).parents[1] / "results"
PROGRAM = ("-m", "fbn_prune")
"""What a child's Python runs."""

COUNTING = (str(Path(count_reads.__file__)),)
"""The same, with the bytes that it reads of each weight in its last line."""

COPIED = ("stages", "forward_seconds", "perplexity_before", "perplexity_after", "calibration_tokens",
          "held_out_tokens", "neurons_kept", "neurons_total")  # fmt: skip
"""What is kept of a run's own result."""


@dataclass(frozen=True)
class Shape:
    """A Llama's sizes."""

    hidden: int
    width: int
    layers: int
    heads: int
    key_heads: int
    vocabulary: int = 32000


SHAPES = {
    "7gb": Shape(4096, 2048, 36, 32, 32),  # narrow MLPs: the second order takes their third power
    "1b": Shape(2048, 5632, 22, 32, 4),  # TinyLlama's
    "wide": Shape(4096, 3584, 3, 32, 32),
    "slim": Shape(1024, 1024, 24, 16, 4),
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
    """Prune within a hard limit and compare the peak with the prediction."""
    model = make_checkpoint(folder / shape, SHAPES[shape])
    flags = [*_flags(model, tokens), "--memory-budget", budget]
    predicted = json.loads(run_child([*flags, "--dry-run"], None)[0])
    ran = measured_run([*flags, "--output", str(folder / "pruned")], parse_size(limit, "--cap"))
    stored = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    report = {
        "shape": vars(SHAPES[shape]),
        "checkpoint_bytes": stored,
        "cap_bytes": parse_size(limit, "--cap"),
        "budget_bytes": parse_size(budget, "--budget"),
        "tokens": tokens,
        "predicted_peak_bytes": predicted["peak_memory_bytes"],
        "predicted_seconds": [predicted["seconds_low"], predicted["seconds_high"]],
        "plan": predicted["memory"],
        **ran,
        "measured_over_predicted": ran["peak_bytes"] / predicted["peak_memory_bytes"],
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
    """Prune in memory and streamed; compare what is written, and time."""
    model = make_checkpoint(folder / shape, SHAPES[shape])
    flags = _flags(model, tokens)
    runs: dict[str, Any] = {}
    for name, more in (("whole", ["1000GB"]), ("streamed", [budget])):
        output = ["--memory-budget", *more, "--output", str(folder / name)]
        predicted = json.loads(run_child([*flags, *output[:2], "--dry-run"], None)[0])
        runs[name] = {
            "plan": predicted["memory"],
            "predicted_peak_bytes": predicted["peak_memory_bytes"],
            "predicted_seconds": [predicted["seconds_low"], predicted["seconds_high"]],
            **measured_run([*flags, *output], None),
        }
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
    output = ["--memory-budget", budget, "--output", str(folder / "streamed")]
    flags = _flags(model, tokens)
    plan = json.loads(run_child([*flags, *output[:2], "--dry-run"], None)[0])["memory"]
    if "streamed" not in plan:
        raise SystemExit(f"--budget {budget}: {plan}; give less")
    heard: list[str] = []
    ran = measured_run([*flags, *output], None, COUNTING, heard)
    said = next(line for line in heard if line.startswith(count_reads.SAID))
    found: dict[str, int] = json.loads(said.removeprefix(count_reads.SAID))
    tensors = Checkpoint.open(model).tensors
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
    """Write a random checkpoint, a layer a shard, unless it is there already."""
    if (path / "config.json").is_file():
        return path
    path.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    parts = tensor_shapes(shape)
    weight_map: dict[str, str] = {}
    drawn: dict[tuple[int, ...], torch.Tensor] = {}
    for index, part in enumerate(parts):
        file = f"model-{index:05d}.safetensors"
        tensors = {}
        for place, (name, size) in enumerate(part.items()):
            if size not in drawn:  # drawn once, and turned by a few rows for each further tensor
                random = torch.randn(size, generator=generator) * 0.7 / size[-1] ** 0.5
                drawn[size] = (torch.ones(size) if len(size) == 1 else random).half()
            tensors[name] = drawn[size].roll(31 * index + 7 * place, 0)
        save_file(tensors, path / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index_file = {"metadata": {}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index_file))
    for given in builtin.model_path().glob("*token*"):
        shutil.copyfile(given, path / given.name)
    (path / "config.json").write_text(json.dumps(config_of(shape)))
    return path


def tensor_shapes(shape: Shape) -> list[dict[str, tuple[int, ...]]]:
    """The tensors of a checkpoint by name: the embeddings, then each layer."""
    keys = shape.hidden // shape.heads * shape.key_heads
    embedding = (shape.vocabulary, shape.hidden)
    parts: list[dict[str, tuple[int, ...]]] = [
        {
            "model.embed_tokens.weight": embedding,
            "lm_head.weight": embedding,
            "model.norm.weight": (shape.hidden,),
        }
    ]
    for layer in range(shape.layers):
        sizes = {
            "self_attn.q_proj": (shape.hidden, shape.hidden),
            "self_attn.k_proj": (keys, shape.hidden),
            "self_attn.v_proj": (keys, shape.hidden),
            "self_attn.o_proj": (shape.hidden, shape.hidden),
            "mlp.gate_proj": (shape.width, shape.hidden),
            "mlp.up_proj": (shape.width, shape.hidden),
            "mlp.down_proj": (shape.hidden, shape.width),
            "input_layernorm": (shape.hidden,),
            "post_attention_layernorm": (shape.hidden,),
        }
        parts.append({f"model.layers.{layer}.{k}.weight": size for k, size in sizes.items()})
    return parts


def config_of(shape: Shape) -> dict[str, Any]:
    """What `config.json` holds."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "float16",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.width,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.key_heads,
        "vocab_size": shape.vocabulary,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
    }


def measured_run(
    flags: list[str],
    limit: int | None,
    program: Sequence[str] = PROGRAM,
    heard: list[str] | None = None,
) -> dict[str, Any]:
    """Run the main job in a child; its peak memory, time, and how it spoke of its progress.

    `heard` gets the lines of its stderr.
    """
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    printed, said, peak = run_child(flags, limit, program)
    after, seconds = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter() - start
    result = json.loads(printed)
    if heard is not None:
        heard.extend(line for _, line in said)
    times = [0.0, *(moment for moment, _ in said), seconds]
    return {
        "peak_bytes": peak,
        "seconds": seconds,
        "cpu_seconds": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        **{key: result[key] for key in COPIED},
        "progress_lines": sum("s left" in line for _, line in said),
        "longest_silence_seconds": max(b - a for a, b in pairwise(times)),
    }


def run_child(
    flags: list[str], limit: int | None, program: Sequence[str] = PROGRAM
) -> tuple[str, list[tuple[float, str]], int]:
    """The command line in a child: stdout, lines of stderr with their seconds, highest resident memory in bytes."""

    def restrict() -> None:
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

    child = subprocess.Popen(
        [sys.executable, *program, *flags, "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=restrict,
    )
    assert child.stdout is not None
    assert child.stderr is not None
    start, said, peak = time.perf_counter(), [], [0]

    def watch() -> None:
        status = Path(f"/proc/{child.pid}/status")
        while child.poll() is None:
            try:
                fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
            except (OSError, ValueError):
                break
            if "VmHWM" in fields:
                peak[0] = max(peak[0], int(fields["VmHWM"].split()[0]) * 1024)
            time.sleep(0.1)

    def listen() -> None:
        assert child.stderr is not None
        for line in child.stderr:
            said.append((time.perf_counter() - start, line.rstrip()))
            print(line, end="", file=sys.stderr, flush=True)

    threads = [threading.Thread(target=work) for work in (watch, listen)]
    for thread in threads:
        thread.start()
    printed = child.stdout.read()
    status = child.wait()
    for thread in threads:
        thread.join()
    if status != 0:
        raise SystemExit(f"fbn-prune {' '.join(flags)} ended with {status}")
    return printed, said, peak[0]


def _flags(model: Path, tokens: int) -> list[str]:
    return [
        *("--model", str(model), "--keep-networks", "10", "--networks", "16", "--context", "128"),
        *("--tokens", str(tokens), "--network-tokens", str(min(tokens // 2, 1024))),
        *("--device", "cpu", "--max-shard-size", "500MB"),
    ]


def _differences(first: Path, second: Path) -> tuple[float, bool]:
    """The largest difference of any weight, and whether all but the refitted weights are equal to the bit."""
    a, b = Checkpoint.open(first), Checkpoint.open(second)
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
