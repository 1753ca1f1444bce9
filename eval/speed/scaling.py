"""How time and memory of the main job grow with parameters and tokens: measured, fitted, predicted.

    python eval/speed/scaling.py measure --folder SCRATCH [--shapes 7m,30m]
    python eval/speed/scaling.py fit [--write fbn_prune/runs/rates.py]
    python eval/speed/scaling.py table [--write docs/scaling.md]
    python eval/speed/scaling.py plot [--out docs/figures/scaling.svg]

`measure` makes random Llama-shaped float16 checkpoints and runs the job on each in a child process; the results of
parts are merged into one file. The others work from that file alone. The law is no power law: the operations of each
stage are counted by kind (`fbn_prune/runs/cost.py`), and one rate a kind is fitted to all stages of all runs by non-negative
least squares on relative errors. Time the whole grid on a quiet machine.
"""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from bench_memory import (
    PROGRAM,
    RESULTS,
    Shape,
    config_of,
    make_checkpoint,
    measured_run,
    run_child,
)
from bench_memory import tensor_shapes as shapes_of
from scipy.optimize import nnls

from fbn_prune.model.checkpoint import Checkpoint
from fbn_prune.model.families import family_of
from fbn_prune.model.shards import TensorInfo
from fbn_prune.networks.functional_networks import FunctionalNetworks
from fbn_prune.recipe import build_recipe
from fbn_prune.runs.cost import (
    KINDS,
    Amounts,
    Job,
    ModelSizes,
    exchanges,
    of_one_process,
    operations,
)
from fbn_prune.runs.dry_run import job_of, model_sizes
from fbn_prune.runs.memory import MemoryPlan, possible_plans
from fbn_prune.runs.rates import BASES, FACTORS, measured_rates, seconds, seconds_of_each
from fbn_prune.runs.setup import Prepared

SHAPES = {
    "7m": Shape(256, 768, 8, 8, 4, 2048),
    "30m": Shape(512, 1376, 8, 8, 8, 4096),
    "110m": Shape(768, 2048, 12, 12, 12, 16384),
    "350m": Shape(1024, 2816, 24, 16, 8, 16384),
    "1b": Shape(2048, 5632, 22, 32, 4, 32000),  # TinyLlama's
    "1b-half": Shape(
        2048, 5632, 11, 32, 4, 32000
    ),  # its layers are alike: half of them, half the time
    "tiny": Shape(64, 160, 2, 4, 2, 2048),
}
GRID: list[tuple[str, int, bool]] = [
    ("7m", 8192, False),
    ("7m", 32768, False),
    ("7m", 65536, False),
    ("30m", 8192, False),
    ("30m", 32768, False),
    ("110m", 4096, False),
    ("110m", 16384, False),
    ("350m", 1024, False),
    ("350m", 4096, False),
    ("350m", 1024, True),
    ("1b-half", 1024, True),
    ("1b", 1024, False),
]
"""Shape, calibration tokens, whether weights are streamed."""

PAPER = {
    "8B": Shape(4096, 14336, 32, 32, 8, 128256),  # Llama-3.1-8B's
    "70B": Shape(8192, 28672, 80, 64, 8, 128256),
}
WITH_NETWORKS = {"report_networks": True}  # a stated size alone needs none
PAPER_TOKENS, PAPER_CONTEXT = 131072, 2048

GPU_BYTES = 76e9
"""What an 80 GB card has for a process."""

GPU = {
    "forward": (989e12, 0.4, "bfloat16 tensor cores, without sparsity"),
    "gram": (67e12, 0.7, "float32"),
    "token gram": (67e12, 0.7, "float32"),
    "ica": (67e12, 0.3, "float32, thin matrices"),
    "double": (67e12, 0.5, "float64 tensor cores"),
    "eigen": (67e12, 0.002, "float64, a cubed size counted as one operation"),
    "gathered": (3.35e12, 0.3, "memory, by row and column"),
    "moved": (3.35e12, 0.6, "memory"),
    "called": (1e5, 1.0, "kernel launches, a guess"),
    "read": (2e9, 1.0, "a solid-state disk or its cache, a guess"),
    "written": (1.5e9, 1.0, "a solid-state disk, a guess"),
    "exchanged": (450e9, 0.3, "NVLink, one direction"),
    "told": (1e9, 1.0, "packed and sent through the host, a guess"),
}
"""Of an H100 (SXM), from NVIDIA's public data sheet, with the share of it that we suppose to be reached."""

PRIOR = {
    "forward": 1.0,
    "gram": 1.1,
    "token gram": 0.6,
    "ica": 0.5,
    "eigen": 25.0,
    "double": 1.15,
    "gathered": 20.0,
    "moved": 6.0,
    "called": 5e-5,
    "read": 2e-9,
    "written": 2e-9,
    "exchanged": 1e-9,
    "told": 2e-9,
    "tokenised": 2e-5,
    "started": 8.0,
    "described": 0.8,
}
"""What the operations took by themselves on one thread, roughly; what passes between processes is a guess."""

PRIOR_WEIGHT = 0.2
"""Of being wrong about a factor by all of it, beside being wrong by all of a stage's time."""

STAGES = ("rest", "calibration", "load", "dense perplexity", "activations", "ica", "prune",
          "pruned perplexity", "export")  # fmt: skip

BY_PROCESSOR = (
    "-c",
    "import time; time.perf_counter = time.process_time; from fbn_prune.cli.main import main; main()",
)
"""The command line with a clock that stands still while others have the processor."""

app = typer.Typer(add_completion=False, help=__doc__)
Results = Annotated[Path, typer.Option(help="The measurements.")]
RESULT_FILE = RESULTS / "scaling.json"


@dataclass(frozen=True)
class Law:
    """Factors of :data:`fbn_prune.runs.rates.FACTORS`' kind, and how far they are from what was measured.

    Attributes
    ----------
    ratios
        Predicted over measured seconds of each run, in the order of the runs.
    left_out
        The same, predicted from the runs of the other shapes alone.
    """

    factors: dict[str, float]
    ratios: list[float]
    left_out: list[float]


@app.command()
def measure(
    folder: Annotated[Path, typer.Option(help="Where checkpoints and outputs go.")],
    shapes: Annotated[str, typer.Option(help="Shapes to run, by commas; default: the grid.")] = "",
    most_tokens: Annotated[int, typer.Option(help="Leave out what takes more tokens.")] = 10**9,
    processor: Annotated[
        bool, typer.Option(help="One thread, its processor's seconds: for a machine that is busy.")
    ] = False,
    results: Results = RESULT_FILE,
) -> None:
    """Run the grid, or the part of it that `--shapes` names, and merge what is measured into the file."""
    names = shapes.split(",") if shapes else list(dict.fromkeys(name for name, *_ in GRID))
    for name in names:
        if name not in SHAPES:
            raise typer.BadParameter(f"{name}: choose from {', '.join(SHAPES)}")
    points = [point for point in GRID if point[0] in names and point[1] <= most_tokens]
    points += [(name, 1024, False) for name in names if name not in [p[0] for p in GRID]]
    folder.mkdir(parents=True, exist_ok=True)
    if processor:
        os.environ["OMP_NUM_THREADS"] = "1"
        torch.set_num_threads(1)
    for name, tokens, streamed in points:
        record = measured(folder, name, tokens, streamed, processor=processor)
        report = _read(results) if results.is_file() else {"runs": {}}
        report["runs"][f"{name}/{tokens}/{'streamed' if streamed else 'whole'}"] = record
        order = list(SHAPES)
        report["runs"] = dict(
            sorted(
                report["runs"].items(),
                key=lambda run: (
                    order.index(run[1]["shape"]),
                    run[1]["streamed"],
                    run[1]["tokens"],
                ),
            )
        )
        results.parent.mkdir(parents=True, exist_ok=True)
        results.write_text(json.dumps(report, indent=1) + "\n")
        print(f"{name} {tokens} {'streamed' if streamed else 'whole'}: {_line(record)}", flush=True)


@app.command("fit")
def fit_command(
    results: Results = RESULT_FILE,
    write: Annotated[Path | None, typer.Option(help="Module to put the factors into.")] = None,
) -> None:
    """Fit the factors and print them; with `--write` put them into `fbn_prune/runs/rates.py`."""
    runs = _runs(results)
    law = fit(runs)
    text = "".join(f'    "{kind}": {law.factors[kind]:.3g},\n' for kind in KINDS)
    print(f"FACTORS = {{\n{text}}}")
    print(f"runs predicted / measured: {_spread(law.ratios)}; {_spread(law.left_out)} left out")
    if write is not None:
        module = write.read_text("utf-8")
        module = re.sub(r"(?<=^FACTORS = \{\n)[^}]*(?=^\})", text, module, flags=re.MULTILINE)
        write.write_text(module, "utf-8")


@app.command()
def table(
    results: Results = RESULT_FILE,
    write: Annotated[Path | None, typer.Option(help="Page to put the tables into.")] = None,
) -> None:
    """Print all tables as Markdown; with `--write` put each between its markers in a page."""
    parts = tables(_runs(results))
    if write is None:
        print("\n\n".join(parts.values()))
        return
    page = write.read_text("utf-8")
    for name, text in parts.items():
        opening, closing = f"<!-- begin {name} -->", f"<!-- end {name} -->"
        head, found, rest = page.partition(opening)
        _, ended, tail = rest.partition(closing)
        if not found or not ended:
            raise SystemExit(f"{write} has no {opening} ... {closing}")
        page = f"{head}{opening}\n\n{text}\n\n{closing}{tail}"
    write.write_text(page, "utf-8")


@app.command()
def plot(
    results: Results = RESULT_FILE,
    out: Annotated[Path, typer.Option(help="SVG to write.")] = RESULTS.parents[1]
    / "docs/figures/scaling.svg",
) -> None:
    """Draw measured and predicted time and memory. The same results give the same bytes."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    matplotlib.rcParams.update({"svg.hashsalt": "fbn-prune", "svg.fonttype": "none"})
    matplotlib.rcParams.update({"font.family": "sans-serif", "font.size": 9})
    runs = _runs(results)
    law = fit(runs)
    drawing, (time, share, memory) = plt.subplots(1, 3, figsize=(12, 4), layout="constrained")
    took = [run["seconds"] for run in runs]
    for ratios, colour, label in (
        (law.ratios, "#1f5fa8", "fitted to all runs"),
        (law.left_out, "#c4622d", "fitted to the other shapes"),
    ):
        said = [ratio * run for ratio, run in zip(ratios, took, strict=True)]
        time.plot(took, said, "o", color=colour, label=label, markersize=4)
    ends = [min(took) / 2, max(took) * 2]
    time.plot(ends, ends, color="black", linewidth=0.8)
    time.fill_between(
        ends, [e / 2 for e in ends], [e * 2 for e in ends], color="#8a8a8a", alpha=0.2
    )
    time.set(xscale="log", yscale="log", xlabel="measured seconds", ylabel="predicted seconds")
    time.set_title("time, within twice and half")
    time.legend(fontsize=7, frameon=False)
    labels = [_name(run) for run in runs]
    bottom = np.zeros(len(runs))
    for stage in STAGES:
        parts = np.array([measured_stages(run).get(stage, 0.0) / run["seconds"] for run in runs])
        share.barh(labels, parts, left=bottom, label=stage)
        bottom += parts
    share.invert_yaxis()
    share.set(title="share of each stage, measured", xlim=(0, 1))
    share.legend(
        fontsize=6, frameon=False, loc="upper center", bbox_to_anchor=(0.4, -0.08), ncols=5
    )
    peaks = [run["peak_bytes"] / 1e9 for run in runs]
    planned = [run["predicted_peak_bytes"] / 1e9 for run in runs]
    for streamed, mark in ((False, "o"), (True, "s")):
        of = [index for index, run in enumerate(runs) if run["streamed"] == streamed]
        memory.plot([peaks[i] for i in of], [planned[i] for i in of], mark, color="#1f5fa8",
                    markersize=4, label="streamed" if streamed else "in memory")  # fmt: skip
    ends = [min(peaks) / 1.5, max(peaks) * 1.5]
    memory.plot(ends, ends, color="black", linewidth=0.8)
    memory.set(xscale="log", yscale="log", xlabel="measured GB", ylabel="predicted GB")
    memory.set_title("peak memory")
    memory.legend(fontsize=7, frameon=False)
    out.parent.mkdir(parents=True, exist_ok=True)
    drawing.savefig(out, format="svg", metadata={"Date": None})


def measured(
    folder: Path, name: str, tokens: int, streamed: bool, *, processor: bool = False
) -> dict[str, Any]:
    """One run: predicted by the dry run, measured, and what its data decided.

    `processor`: all seconds are those of a processor at work on it.
    """
    program = BY_PROCESSOR if processor else PROGRAM
    model, output = make_checkpoint(folder / name, SHAPES[name]), folder / "pruned"
    shutil.rmtree(output, ignore_errors=True)
    device = torch.device("cpu")
    with _clock(processor):
        rates = measured_rates(device, torch.float32)
    flags = ["--model", str(model), "--device", "cpu", "--output", str(output)]
    for key, value in _recipe(tokens).items():
        flags += ["--set", f"{key}={json.dumps(value)}"]
    plan = _memory_plan(_on_paper(SHAPES[name]), tokens, streamed)
    if plan is not None:
        flags += ["--memory-budget", f"{plan.peak_bytes if streamed else 10**15}B"]
    predicted = json.loads(run_child([*flags, "--dry-run"], None, program)[0])
    run = measured_run(flags, None, program)
    if processor:
        run["seconds"] = run["cpu_seconds"]
    found = FunctionalNetworks.load(output / "networks.safetensors").header["convergence"][0]
    shutil.rmtree(output)
    if predicted["memory"].startswith("the model") == streamed:
        raise SystemExit(f"{name}: {predicted['memory']}, which was not asked for")
    return {
        "shape": name,
        "sizes": vars(SHAPES[name]),
        "tokens": tokens,
        "streamed": streamed,
        "parameters": predicted["parameters_before"],
        "predicted_seconds": predicted["seconds"],
        "predicted_stages": predicted["stages"],
        "predicted_peak_bytes": predicted["peak_memory_bytes"],
        "eigen_products": found["eigen_iterations"],
        "ica_iterations": found["ica_iterations"],
        "clock": "processor" if processor else "wall",
        "rates": rates,
        "machine": {"cpus": os.cpu_count(), "threads": torch.get_num_threads()},
        "torch": torch.__version__,
        **run,
    }


@contextmanager
def _clock(processor: bool) -> Iterator[None]:
    """Inside the context `time.perf_counter` counts the seconds of the processor, if so."""
    before = time.perf_counter
    if processor:
        time.perf_counter = time.process_time
    try:
        yield
    finally:
        time.perf_counter = before


def counted(run: dict[str, Any], *, known: bool) -> dict[str, Amounts]:
    """The operations of a measured run; `known`: with the iterations that its data took, else with typical ones."""
    model, job = _facts(Shape(**run["sizes"]), run["tokens"], run["streamed"])
    job = replace(
        job,
        tokens=run["calibration_tokens"],
        held_out=run["held_out_tokens"],
        kept=run["neurons_kept"] / model.layers,
    )
    if known:
        job = replace(
            job, eigen_products=run["eigen_products"], ica_iterations=run["ica_iterations"]
        )
    return operations(model, job)


@functools.cache
def _facts(shape: Shape, tokens: int, streamed: bool) -> tuple[ModelSizes, Job]:
    prepared = prepared_on_paper(shape, tokens, streamed)
    return model_sizes(prepared.checkpoint, prepared.dtype), job_of(prepared, shape.width / 2)


def measured_stages(run: dict[str, Any]) -> dict[str, float]:
    """Seconds of each stage, and what is in none as `rest`."""
    rest = run["seconds"] - sum(run["stages"].values())
    return {"rest": max(rest, 0.0), **run["stages"]}


def fit(runs: Sequence[dict[str, Any]]) -> Law:
    """One factor a kind, from every stage of every run.

    A stage's error counts relative to its seconds, or to a twentieth of the run's where it takes less. Of a kind that
    the runs tell little about, :data:`PRIOR` is believed; it weighs next to nothing elsewhere.
    """
    factors = _factors(runs)
    others = {
        shape: _factors([run for run in runs if run["shape"] != shape])
        for shape in {run["shape"] for run in runs}
        if any(run["shape"] != shape for run in runs)
    }
    return Law(
        factors,
        [_predicted(run, factors) / run["seconds"] for run in runs],
        [_predicted(run, others.get(run["shape"], factors)) / run["seconds"] for run in runs],
    )


def _factors(runs: Sequence[dict[str, Any]]) -> dict[str, float]:
    rows, took = [], []
    for run in runs:
        unit = seconds_of_each(run["rates"], dict.fromkeys(KINDS, 1.0))
        stages = measured_stages(run)
        for stage, kinds in counted(run, known=True).items():
            weight = 1 / max(stages[stage], run["seconds"] / 20)
            rows.append([weight * kinds.get(kind, 0.0) * unit[kind] for kind in KINDS])
            took.append(weight * stages[stage])
    for kind in KINDS:
        rows.append([PRIOR_WEIGHT / PRIOR[kind] if other == kind else 0.0 for other in KINDS])
        took.append(PRIOR_WEIGHT)
    matrix = np.array(rows)
    scale = matrix.max(0)
    solution, _ = nnls(matrix / scale, np.array(took))
    return dict(zip(KINDS, (solution / scale).tolist(), strict=True))


def _predicted(run: dict[str, Any], factors: dict[str, float]) -> float:
    return sum(seconds(counted(run, known=True), seconds_of_each(run["rates"], factors)).values())


def dry_run_ratios(runs: Iterable[dict[str, Any]]) -> list[float]:
    """What the dry run says with the present factors, over the measured seconds."""
    return [
        sum(seconds(counted(run, known=False), seconds_of_each(run["rates"])).values())
        / run["seconds"]
        for run in runs
    ]


def one_rate_ratios(runs: Sequence[dict[str, Any]]) -> list[float]:
    """What a law with one rate for all products and a constant would say, fitted in the same way."""
    products = ("forward", "gram", "token gram", "ica", "double")
    totals = [
        sum(
            kinds.get(kind, 0.0) for kinds in counted(run, known=True).values() for kind in products
        )
        / run["rates"]["float32"]
        for run in runs
    ]
    took = np.array([run["seconds"] for run in runs])
    matrix = np.array([[total, 1.0] for total in totals])
    solution, _ = nnls(matrix / took[:, None], np.ones(len(runs)))
    return list(matrix @ solution / took)


def tables(runs: Sequence[dict[str, Any]]) -> dict[str, str]:
    """All tables of the page as Markdown, by the names of their markers."""
    law = fit(runs)
    return {
        "measured": _measured_table(runs, law),
        "law": _law_table(law),
        "residuals": _residuals_table(runs, law),
        "memory": _memory_table(runs),
        "predicted": _predicted_table(),
        "predicted stages": _predicted_stages_table(),
        "rates": _rates_table(),
    }


def _measured_table(runs: Sequence[dict[str, Any]], law: Law) -> str:
    rows = [
        [
            _name(run),
            f"{run['parameters'] / 1e6:.0f}",
            f"{run['calibration_tokens']:,}",
            _time(run["seconds"]),
            *(
                _time(measured_stages(run).get(stage, 0.0))
                for stage in ("activations", "ica", "prune", "export")
            ),
            _time(run["forward_seconds"]),
            f"{run['seconds'] * run['machine']['threads'] / run['cpu_seconds']:.2f}",
            f"{ratio:.2f}",
        ]
        for run, ratio in zip(runs, law.ratios, strict=True)
    ]
    heads = ["run", "M parameters", "tokens", "s", "activations", "ica", "prune", "export",
             "one forward pass", "waiting", "law / measured"]  # fmt: skip
    return _markdown(heads, rows)


def _law_table(law: Law) -> str:
    rows = [
        [
            kind,
            KINDS[kind],
            f"{law.factors[kind]:.2f} × measured {BASES[kind]} rate"
            if kind in BASES
            else f"{law.factors[kind]:.2g} s each",
        ]
        for kind in KINDS
        if kind not in ("exchanged", "told")
    ]
    return _markdown(["kind", "counted", "time of one"], rows, left=3)


def _residuals_table(runs: Sequence[dict[str, Any]], law: Law) -> str:
    rows = [
        ["the law, fitted to these runs", *_extremes(law.ratios)],
        ["the law, each shape from the others", *_extremes(law.left_out)],
        ["the dry run (factors in `fbn_prune/runs/rates.py`)", *_extremes(dry_run_ratios(runs))],
        ["one rate for all products, and a constant", *_extremes(one_rate_ratios(runs))],
    ]
    each = [
        seconds(counted(run, known=True), seconds_of_each(run["rates"], law.factors))
        for run in runs
    ]
    for stage in STAGES:
        pairs = [
            (said[stage], measured_stages(run)[stage])
            for said, run in zip(each, runs, strict=True)
            if stage in said and measured_stages(run).get(stage, 0.0) > run["seconds"] / 20
        ]
        if pairs:
            rows.append([f"the law, stage {stage}", *_extremes([a / b for a, b in pairs])])
    return _markdown(["predicted / measured", "median", "least", "most", "worst", "n"], rows)


def _memory_table(runs: Sequence[dict[str, Any]]) -> str:
    rows = [
        [
            _name(run),
            f"{run['predicted_peak_bytes'] / 1e9:.2f}",
            f"{run['peak_bytes'] / 1e9:.2f}",
            f"{run['peak_bytes'] / run['predicted_peak_bytes']:.2f}",
        ]
        for run in runs
    ]
    return _markdown(["run", "predicted GB", "measured GB", "measured / predicted"], rows)


def on_gpus(shape: Shape, processes: int) -> tuple[dict[str, float], MemoryPlan]:
    """Seconds of each stage on so many GPUs of :data:`GPU`, and what one of them holds."""
    device, dtype = torch.device("cuda"), torch.bfloat16
    recipe = {"tokens": PAPER_TOKENS, "context": PAPER_CONTEXT, "sparsity": 0.5} | WITH_NETWORKS
    prepared = prepared_on_paper(shape, 0, None, recipe=recipe, device=device, dtype=dtype)
    model, job = model_sizes(prepared.checkpoint, dtype), job_of(prepared, shape.width / 2)
    counts = of_one_process(operations(model, job), processes, shape.layers)
    each = {kind: 1 / (rate * share) for kind, (rate, share, _) in GPU.items()}
    each |= {kind: FACTORS[kind] for kind in KINDS if kind not in each}
    stages = seconds(counts, each)
    if processes > 1:
        stages |= seconds({"exchange": exchanges(model, job)}, each)
    return stages, prepared.memory


def _predicted_table() -> str:
    rows = []
    for name, shape in PAPER.items():
        square = 8 * shape.width**2
        for processes in (1, 8):
            stages, plan = on_gpus(shape, processes)
            rows.append(
                [
                    name,
                    str(processes),
                    "streamed" if plan.streamed else "in memory",
                    f"{plan.peak_bytes / 1e9:.0f}",
                    f"{square / 1e9:.1f}",
                    f"{sum(stages.values()) / 60:.1f}",
                ]
            )
    return _markdown(
        ["model", "GPUs", "weights", "GB a GPU", "one float64 square, GB", "minutes"], rows
    )


def _predicted_stages_table() -> str:
    columns = [(name, count) for name in PAPER for count in (1, 8)]
    found = [on_gpus(PAPER[name], count)[0] for name, count in columns]
    rows = [
        [stage, *(_time(one.get(stage, 0.0)) for one in found)] for stage in (*STAGES, "exchange")
    ]
    return _markdown(["seconds", *(f"{name}, {count} GPU" for name, count in columns)], rows)


def _rates_table() -> str:
    rows = [[kind, f"{rate:.3g}", f"{share:g}", what] for kind, (rate, share, what) in GPU.items()]
    return _markdown(["kind", "a second", "share reached (supposed)", "what it is"], rows)


def prepared_on_paper(
    shape: Shape,
    tokens: int,
    streamed: bool | None,
    *,
    recipe: dict[str, Any] | None = None,
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float32,
) -> Prepared:
    """A recipe for a checkpoint of which only the headers are thought of.

    Parameters
    ----------
    streamed
        Which memory plan; None for the first that a GPU of :data:`GPU_BYTES` has room for.
    """
    checkpoint = _on_paper(shape)
    facts = build_recipe(recipe or _recipe(tokens))
    device = device or torch.device("cpu")
    context = facts.context or PAPER_CONTEXT
    plans = list(possible_plans(facts, checkpoint, device, dtype, context))
    if streamed is None:
        plan = next((plan for plan in plans if plan.peak_bytes <= GPU_BYTES), plans[-1])
    else:
        plan = next(plan for plan in plans if plan.streamed == streamed)
    return Prepared(
        recipe=facts,
        checkpoint=checkpoint,
        device=device,
        dtype=dtype,
        context=context,
        width_multiple=8,
        networks=None,
        budget=None,
        whole=frozenset(),
        memory=plan,
    )


def _memory_plan(checkpoint: Checkpoint, tokens: int, streamed: bool) -> MemoryPlan:
    recipe = build_recipe(_recipe(tokens))
    assert recipe.context is not None
    cpu = torch.device("cpu")
    plans = list(possible_plans(recipe, checkpoint, cpu, torch.float32, recipe.context))
    return next(plan for plan in plans if plan.streamed == streamed)


def _recipe(tokens: int) -> dict[str, Any]:
    """Half of the neurons go: what the networks would say differs from shape to shape."""
    found_on = min(8192, max(256, tokens // 4))
    sizes = {"tokens": tokens, "network_tokens": found_on, "context": 128}
    return {**sizes, "sparsity": 0.5, **WITH_NETWORKS}


@functools.cache
def _on_paper(shape: Shape) -> Checkpoint:
    config = config_of(shape)
    tensors = {
        name: TensorInfo(f"model-{index:05d}.safetensors", size, torch.float16)
        for index, part in enumerate(shapes_of(shape))
        for name, size in part.items()
    }
    return Checkpoint(Path("."), config, family_of(config), tensors)


def _runs(results: Path) -> list[dict[str, Any]]:
    return list(_read(results)["runs"].values())


def _read(results: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads(results.read_text("utf-8"))
    return report


def _line(run: dict[str, Any]) -> str:
    parts = ", ".join(f"{name} {took:.1f}" for name, took in measured_stages(run).items())
    return (
        f"{run['seconds']:.1f} s (dry run {run['predicted_seconds']:.1f}): {parts}; peak "
        f"{run['peak_bytes'] / 1e9:.2f} GB (dry run {run['predicted_peak_bytes'] / 1e9:.2f})"
    )


def _name(run: dict[str, Any]) -> str:
    return f"{run['shape']}, {run['tokens']:,}{', streamed' if run['streamed'] else ''}"


def _time(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.1f}"


def _worst(ratios: Iterable[float]) -> float:
    return max(max(ratio, 1 / ratio) for ratio in ratios)


def _spread(ratios: Sequence[float]) -> str:
    return f"median {statistics.median(ratios):.2f}, worst by a factor of {_worst(ratios):.2f}"


def _extremes(ratios: Sequence[float]) -> list[str]:
    figures = (statistics.median(ratios), min(ratios), max(ratios), _worst(ratios))
    return [*(f"{figure:.2f}" for figure in figures), str(len(ratios))]


def _markdown(heads: Sequence[str], rows: Iterable[Sequence[str]], *, left: int = 1) -> str:
    marks = ["---" if index < left else "---:" for index in range(len(heads))]
    return "\n".join(f"| {' | '.join(row)} |" for row in (heads, marks, *rows))


if __name__ == "__main__":
    app()
