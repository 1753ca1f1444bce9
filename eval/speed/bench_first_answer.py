"""How long the command line takes to refuse what needs no torch, beside `--help` and `import torch`.

    python eval/speed/bench_first_answer.py

Prints the median seconds of each case over interleaved repetitions, and its ratio to `python -c "import torch"` and to
`--help`, so that the load of the machine affects all alike.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from fbn_prune.data.builtin import model_path


def cases(folder: Path) -> dict[str, list[str]]:
    """Return the arguments of each case; the files that they name are made in `folder`."""
    model = str(model_path())
    (folder / "output").mkdir()
    (folder / "recipe.yaml").write_text("sparsity: [0.5\n")
    broken = folder / "broken"
    shutil.copytree(model, broken)
    (broken / "config.json").write_text('{"model_type": "llama",')
    job = ["--sparsity", "0.5", "--output", str(folder / "new")]
    return {
        "--help": ["--help"],
        "unknown flag": [*job, "--sparsty", "0.5"],
        "missing model folder": [*job, "--model", str(folder / "nowhere")],
        "impossible Hub id": [*job, "--model", "owner/no--id"],
        "missing GGUF file": [*job, "--model", str(folder / "nowhere.gguf")],
        "missing calibration file": [*job, "--model", model, "--calibration", "nowhere.txt"],
        "broken recipe": ["run", str(folder / "recipe.yaml")],
        "existing output folder": [*job[:2], "--model", model, "--output", str(folder / "output")],
        "broken config.json": [*job, "--model", str(broken)],
    }


def seconds(command: list[str], expected: int) -> float:
    """Return the wall time of a command; its exit code must be the expected one."""
    start = time.perf_counter()
    done = subprocess.run([sys.executable, *command], capture_output=True, check=False)
    took = time.perf_counter() - start
    if done.returncode != expected:
        raise SystemExit(f"{command}: exit code {done.returncode}: {done.stderr.decode()}")
    return took


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        commands = {
            name: ["-m", "fbn_prune", *given] for name, given in cases(Path(folder)).items()
        }
        commands["import torch"] = ["-c", "import torch"]
        measured: dict[str, list[float]] = {name: [] for name in commands}
        for _ in range(options.repeats):
            for name, command in commands.items():
                expected = 0 if name in ("--help", "import torch") else 2
                measured[name].append(seconds(command, expected))
    medians = {name: statistics.median(times) for name, times in measured.items()}
    rows = {
        name: {
            "seconds": round(median, 3),
            "of_import_torch": round(median / medians["import torch"], 3),
            "of_help": round(median / medians["--help"], 3),
        }
        for name, median in medians.items()
    }
    print(f"{'case':<26}{'seconds':>9}{'/ import torch':>16}{'/ --help':>10}")
    for name, row in rows.items():
        figures = (row["seconds"], row["of_import_torch"], row["of_help"])
        print("{:<26}{:>9.2f}{:>16.2f}{:>10.2f}".format(name, *figures))
    if options.json is not None:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
