"""Compare `fbn-prune evaluate` with a plain `lm_eval run` of the same task files.

    python eval/quality/compare_with_harness.py --model DIR --task FILE.jsonl [--limit 60] [--output RESULT.json]

The harness gets each file as the YAML task that `fbn_prune.data.harness_files` makes, and runs in a process of its own
that loads nothing of fbn-prune. Every metric and standard error must be the same number, or the script ends with exit
code 1. An existing result file is extended.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import protocol
import typer
import yaml
from rich.console import Console
from rich.table import Table

from fbn_prune.data.harness_files import task_from_file


def ours(model: Path, task: Path, *options: str) -> dict[str, dict[str, Any]]:
    """Return each metric's value and standard error from `fbn-prune evaluate`."""
    command = [sys.executable, "-m", "fbn_prune", "evaluate", "--model", str(model)]
    run = subprocess.run(
        [*command, "--tasks", str(task), "--dtype", "float32", "--json", *options],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    (metrics,) = json.loads(run.stdout)["tasks"].values()
    return metrics


def plain(
    model: Path, task: Path, folder: Path, more: str, *options: str
) -> dict[str, dict[str, Any]]:
    """Return the same from the harness's own command; `more` is appended to the model's arguments."""
    config = folder / f"{task.stem}.yaml"
    config.write_text(yaml.safe_dump(task_from_file(task)), encoding="utf-8")
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--tasks", str(config)]
    arguments = ["--model_args", f"pretrained={model},dtype=float32{more}"]
    output = folder / task.stem
    subprocess.run(
        [*command, *arguments, "--device", "cpu", "--output_path", str(output), *options],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    (written,) = output.rglob("results_*.json")
    results = json.loads(written.read_text(encoding="utf-8"))["results"][task.stem]
    return {
        key.removesuffix(",none"): {
            "value": value,
            "stderr": results[f"{key.removesuffix(',none')}_stderr,none"],
        }
        for key, value in results.items()
        if key.endswith(",none") and not key.endswith("_stderr,none")
    }


def main(
    model: protocol.Model,
    task: Annotated[list[Path], typer.Option(help="Question file; repeat for several.")],
    limit: Annotated[int | None, typer.Option(help="Questions of each; default all.")] = None,
    batch_size: int = 8,
    max_length: Annotated[
        int | None, typer.Option(help="Longest prompt, if not the model's context.")
    ] = None,
    output: protocol.Output = None,
) -> None:
    few = [] if limit is None else ["--limit", str(limit)]
    longest = [] if max_length is None else ["--max-length", str(max_length)]
    more = "" if max_length is None else f",max_length={max_length}"
    table = Table("task", "questions", "metric", "fbn-prune evaluate", "lm_eval run", "same")
    facts: dict[str, Any] = {"model": model.name, "tasks": {}}
    if output is not None and output.is_file():
        facts = json.loads(output.read_text(encoding="utf-8"))
    all_same = True
    for path in task:
        lines = sum(1 for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
        questions = lines if limit is None else min(limit, lines)
        own = ours(model, path, "--batch-size", str(batch_size), *longest, *few)
        with tempfile.TemporaryDirectory() as folder:
            harness_run = plain(
                model, path, Path(folder), more, "--batch_size", str(batch_size), *few
            )
        entry: dict[str, Any] = {"questions": questions, "batch_size": batch_size}
        entry |= {"max_length": max_length, "metrics": {}}
        for metric in sorted(own.keys() | harness_run.keys()):
            pair = [
                {key: found[metric][key] for key in ("value", "stderr")}
                if metric in found
                else None
                for found in (own, harness_run)
            ]
            same = pair[0] == pair[1]
            all_same &= same
            entry["metrics"][metric] = {"ours": pair[0], "lm_eval": pair[1], "same": same}
            shown = [
                "missing" if one is None else f"{one['value']!r} ± {one['stderr']!r}"
                for one in pair
            ]
            table.add_row(path.stem, str(questions), metric, *shown, "yes" if same else "NO")
        facts["tasks"][path.stem] = entry
        protocol.save_json(output, facts)
    Console(width=160).print(table)
    if not all_same:
        raise SystemExit(1)


if __name__ == "__main__":
    typer.run(main)
