"""Draws a result file of `bench_gpu.py`: time against tokens, and time against the share kept.

Usage: python kernels/bench/plot.py results.json [--output FOLDER]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt


def times_by_tokens(report: dict[str, Any], share: float, kind: str, path: Path) -> None:
    """Draw every method's time against the number of tokens."""
    figure, axis = plt.subplots(figsize=(7, 4.5))
    chosen = [
        one
        for one in report["one_set"]
        if one["share"] == share and one["kind"] in (kind, "prefix")
    ]
    for method in dict.fromkeys(one["method"] for one in chosen):
        points = [(one["tokens"], one["microseconds"]) for one in chosen if one["method"] == method]
        axis.plot(*zip(*points, strict=True), marker="o", label=method)
    floor = 3 * report["shape"]["width"] * report["shape"]["neurons"] * share * 2
    axis.axhline(
        floor / report["copy_bytes_a_second"] * 1e6, color="grey", linestyle=":", label="copy floor"
    )
    axis.set(xscale="log", yscale="log", xlabel="tokens", ylabel="microseconds a call")
    axis.set_title(f"{report['environment']['device']}, {share:.0%} kept, {kind}")
    axis.legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def times_by_share(report: dict[str, Any], tokens: int, path: Path) -> None:
    """Draw the gathered kernel's time against the share kept, beside proportionality."""
    figure, axis = plt.subplots(figsize=(7, 4.5))
    chosen = [one for one in report["one_set"] if one["tokens"] == tokens]
    for method in ("gathered, rows", "gathered, block64", "compact, pre-gathered"):
        points = sorted(
            {one["share"]: one["microseconds"] for one in chosen if one["method"] == method}.items()
        )
        if points:
            axis.plot(*zip(*points, strict=True), marker="o", label=method)
    axis.set(xlim=(0, 1.05), ylim=(0, None), xlabel="share kept", ylabel="microseconds a call")
    axis.set_title(f"{report['environment']['device']}, {tokens} tokens")
    axis.legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def main() -> None:
    """Draw all plots of a result file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("--output", type=Path, default=Path("plots"))
    options = parser.parse_args()
    report = json.loads(options.results.read_text())
    options.output.mkdir(parents=True, exist_ok=True)
    for kind in ("rows", "block64"):
        times_by_tokens(report, 0.5, kind, options.output / f"tokens_{kind}.svg")
    for tokens in (1, 64):
        times_by_share(report, tokens, options.output / f"share_{tokens}_tokens.svg")


if __name__ == "__main__":
    main()
