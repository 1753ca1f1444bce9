"""Draw the report's figures with matplotlib as SVG text, always the same for the same data.

The figures are about as wide as a phone's screen, so that their labels are readable there.
"""

from __future__ import annotations

import io
import logging
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from fbn_prune.export.report.facts import Ablation, Comparison, GrowingStep, RunResult
from fbn_prune.export.report.text import visible

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 4.6
"""Width in inches; at 96 pixels an inch a little more than a phone's screen."""
INK, MUTED, PALE, KEPT, ALARM = "#22303c", "#6b7a88", "#d4dbe2", "#0b6e8e", "#c2412d"
OTHER = "#e08e0b"
"""Colour of the principal components."""
_LINES = ("#0b6e8e", "#c2412d", "#7a5195", "#e08e0b", "#3c8d5a", "#8a6a4f", "#6b7a88")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")


@contextmanager
def drawing() -> Iterator[None]:
    """Draw in the report's style, independently of the user's matplotlib settings."""
    import matplotlib

    logger = logging.getLogger("matplotlib")
    level = logger.level
    logger.setLevel(logging.ERROR)  # hides messages about its caches
    try:
        with matplotlib.rc_context():
            matplotlib.rcdefaults()
            matplotlib.rcParams.update(
                {
                    "svg.fonttype": "none",
                    "text.parse_math": False,
                    "font.family": "sans-serif",
                    "font.size": 9,
                    "axes.spines.top": False,
                    "axes.spines.right": False,
                    "axes.edgecolor": MUTED,
                    "axes.labelcolor": INK,
                    "axes.titlesize": 9,
                    "xtick.color": INK,
                    "ytick.color": INK,
                    "text.color": INK,
                    "legend.frameon": False,
                    "legend.fontsize": 8,
                    "lines.linewidth": 1.6,
                    "lines.markersize": 4,
                }
            )
            yield
    finally:
        logger.setLevel(level)


def widths_figure(before: Sequence[int], after: Sequence[int]) -> str:
    """Draw the number of neurons of every layer before and after pruning."""
    figure, axes = _figure(1.9)
    layers = range(len(after))
    axes.bar(layers, before, color=PALE, label="before")
    axes.bar(layers, after, color=KEPT, label="after")
    axes.set(xlabel="layer", ylabel="MLP neurons", xlim=(-0.6, len(after) - 0.4))
    _whole_numbers(axes)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
    return _svg(figure, "widths")


def structures_figure(
    whole: Sequence[tuple[int, int, int]], kept: Sequence[tuple[int, int, int]]
) -> str:
    """Draw what each layer of the source keeps, by structure, as a share of the layer.

    Parameters
    ----------
    whole, kept
        For each layer its neurons, attention and the rest, in one unit of size, before and after.
    """
    figure, axes = _figure(1.9)
    layers = range(len(whole))
    sizes = [sum(parts) for parts in whole]
    axes.bar(layers, [100] * len(whole), color=PALE, label="removed")
    below = [0.0] * len(whole)
    names = zip(("neurons", "attention", "the rest"), (KEPT, OTHER, MUTED), strict=True)
    for part, (name, color) in enumerate(names):
        shares = [100 * parts[part] / size for parts, size in zip(kept, sizes, strict=True)]
        if any(shares):
            axes.bar(layers, shares, bottom=below, color=color, label=name)
        below = [low + share for low, share in zip(below, shares, strict=True)]
    axes.set(xlabel="layer", ylabel="% of its parameters", xlim=(-0.6, len(whole) - 0.4))
    _whole_numbers(axes)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4)
    return _svg(figure, "structures")


def dial_figure(members_kept: Sequence[int], neurons: int, kept: int | None) -> str:
    """Draw the share of neurons that are members of the strongest K networks; `kept` marks the run's K."""
    figure, axes = _figure(1.9)
    numbers = range(1, len(members_kept) + 1)
    shares = [100 * count / neurons for count in members_kept]
    axes.plot(numbers, shares, color=KEPT)
    if kept is not None and 1 <= kept <= len(shares):
        axes.plot([kept], [shares[kept - 1]], "o", color=ALARM, markersize=6)
        axes.annotate(
            f"{kept} networks: {shares[kept - 1]:.0f} %",
            (kept, shares[kept - 1]),
            xytext=(8, -4),
            textcoords="offset points",
            va="top",
        )
    axes.set(xlabel="K, networks kept", ylabel="members, % of neurons", ylim=(0, None))
    axes.set_xlim(left=0)
    return _svg(figure, "dial")


def search_figure(
    curve: Sequence[tuple[float, float]], share: float, measured: Sequence[float], chosen: float
) -> str:
    """Draw the divergence that a search predicts against size, with the measured candidates.

    Parameters
    ----------
    curve
        Shares of the size, and the predicted divergence in nats a token.
    share
        The share that the run keeps.
    measured, chosen
        The divergence of every candidate, and of the chosen one.
    """
    figure, axes = _figure(1.9)
    shares, divergence = zip(*curve, strict=True)
    axes.plot([100 * each for each in shares], divergence, color=KEPT, label="predicted")
    axes.plot([100 * share] * len(measured), measured, "o", color=PALE, label="measured")
    axes.plot([100 * share], [chosen], "o", color=ALARM, markersize=6, label="chosen")
    axes.set(xlabel="size, % of what can be cut", ylabel="loss set aside, nats", ylim=(0, None))
    axes.legend(loc="upper right")
    return _svg(figure, "search")


def recovery_figure(curve: Sequence[tuple[int, float]]) -> str:
    """Draw the loss on text set aside, in nats a token, against the tokens that the recovery trained on."""
    figure, axes = _figure(1.9)
    tokens, losses = zip(*curve, strict=True)
    axes.plot([count / 1000 for count in tokens], losses, "o-", color=KEPT)
    axes.set(xlabel="tokens, thousands", ylabel="divergence, nats", ylim=(0, None))
    axes.set_xlim(left=0)
    return _svg(figure, "recovery")


def quality_figure(
    comparison: Comparison, *, run: RunResult | None, networks: Sequence[float | None] | None = None
) -> str:
    """Draw the perplexity of every criterion against size.

    Parameters
    ----------
    comparison
        The output of `compare`.
    run
        A run on the same text, to mark in the figure.
    networks
        For each budget the K with as many members; draws against K instead of the share of neurons.
    """
    figure, axes = _figure(2.9)
    _quality(axes, comparison, run, networks)
    return _svg(figure, "quality" if networks is None else "quality by K")


def comparison_svg(comparison: Comparison) -> str:
    """Return the plot of `compare` as an SVG file."""
    with drawing():
        figure, axes = _figure(3.2)
        _quality(axes, comparison, None, None)
        axes.set_title(f"{len(comparison.criteria)} criteria on one calibration sample", pad=34)
        return _file(figure, "comparison")


def _quality(
    axes: Axes,
    comparison: Comparison,
    run: RunResult | None,
    networks: Sequence[float | None] | None,
) -> None:
    places = [
        100 * budget.kept if networks is None else networks[i]
        for i, budget in enumerate(comparison.budgets)
    ]
    highest = 0.0
    for i, name in enumerate(comparison.criteria):
        points = sorted(
            (place, value)
            for place, budget in zip(places, comparison.budgets, strict=True)
            if place is not None and math.isfinite(value := budget.perplexity.get(name, math.nan))
        )
        if not points:
            continue
        x, y = zip(*points, strict=True)
        highest = max(highest, *y)
        look = {"color": _LINES[i % len(_LINES)], "marker": _MARKERS[i % len(_MARKERS)]}
        wide = 2.2 if name == "second-order" else 1.2
        axes.plot(x, y, label=visible(name), linewidth=wide, **look)  # type: ignore[arg-type]
    axes.axhline(comparison.dense, color=MUTED, linestyle="--", linewidth=1, label="dense")
    if run is not None and networks is None:
        share = 100 * run.neurons_kept / run.neurons_total
        axes.plot(
            [share], [run.perplexity_after], "*", color=ALARM, markersize=11, label="this run"
        )
    _log_scale(axes, comparison.dense, highest)
    _whole_numbers(axes)
    axes.set_xlabel("MLP neurons kept, %" if networks is None else "K, networks kept")
    axes.set_ylabel("perplexity")
    axes.legend(loc="lower center", bbox_to_anchor=(0.45, 1.0), ncols=3)


def knockout_figure(ablation: Ablation) -> str:
    """Draw the perplexity with each network ablated, strongest first, and with random sets of the strongest's size."""
    figure, axes = _figure(2.4)
    values = [one.perplexity for one in ablation.strongest_first]
    places = np.arange(1, len(values) + 1)
    shown = [value if math.isfinite(value) else math.nan for value in values]
    wide = max(1.0, 140 / len(values))
    axes.vlines(places, ablation.dense, shown, color=KEPT, linewidth=wide, label="networks")
    if ablation.components:
        others = sorted(
            (one.perplexity for one in ablation.components), reverse=ablation.action != "retain"
        )
        axes.plot(
            np.arange(1, len(others) + 1),
            others,
            ".",
            color=OTHER,
            label="principal components",
        )
    mean, std = ablation.random.mean, ablation.random.std
    axes.axhspan(mean - std, mean + std, color=ALARM, alpha=0.25, linewidth=0)
    axes.axhline(
        mean, color=ALARM, linewidth=1.2, label=f"random, {ablation.random.n} draws, ± 1 s.d."
    )
    axes.axhline(ablation.dense, color=MUTED, linestyle="--", linewidth=1, label="unchanged")
    _log_scale(axes, ablation.dense, max((v for v in values if math.isfinite(v)), default=1.0))
    axes.set(xlabel="networks, by effect", ylabel="perplexity", xlim=(0, len(values) + 1))
    axes.legend(loc="lower center", bbox_to_anchor=(0.45, 1.0), ncols=2)
    return _svg(figure, "knockout")


def growing_figure(name: str, steps: Sequence[GrowingStep], dense: float) -> str:
    """Draw the perplexity with the first n networks masked, or only them retained, and with random sets."""
    figure, axes = _figure(2.1)
    numbers = [step.n for step in steps]
    mean = np.array([step.random.mean for step in steps])
    std = np.array([step.random.std for step in steps])
    values = [step.perplexity for step in steps]
    axes.fill_between(
        numbers, np.maximum(mean - std, 1), mean + std, color=ALARM, alpha=0.25, linewidth=0
    )
    axes.plot(numbers, mean, "s-", color=ALARM, label="random, ± 1 s.d.")
    axes.plot(numbers, values, "o-", color=KEPT, label=f"{name} the top n")
    others = [(step.n, step.components.perplexity) for step in steps if step.components is not None]
    if others:
        axes.plot(*zip(*others, strict=True), ".:", color=OTHER, label="principal components")
    axes.axhline(dense, color=MUTED, linestyle="--", linewidth=1, label="unchanged")
    finite = [v for v in (*values, *mean, *(y for _, y in others)) if math.isfinite(v)]
    _log_scale(axes, dense, max(finite, default=1.0))
    _whole_numbers(axes)
    axes.set(xlabel="n, networks", ylabel="perplexity")
    axes.legend(loc="lower center", bbox_to_anchor=(0.45, 1.0), ncols=2)
    return _svg(figure, f"growing {name}")


def connectivity_figure(matrix: Tensor) -> str:
    """Draw the correlations of time courses, [k, k], with correlated networks side by side."""
    values = matrix.double().numpy()
    order = _side_by_side(values)
    figure, axes = _figure(3.6)
    shown = values[np.ix_(order, order)].copy()
    np.fill_diagonal(shown, np.nan)  # self-correlations of 1 would dominate the colour scale
    bound = max(0.1, float(np.nanmax(np.abs(shown), initial=0.0)))
    image = axes.imshow(shown, cmap="RdBu_r", vmin=-bound, vmax=bound)
    step = max(1, len(order) // 16)
    axes.set_xticks(range(0, len(order), step), [str(i) for i in order[::step]], rotation=90)
    axes.set_yticks(range(0, len(order), step), [str(i) for i in order[::step]])
    axes.tick_params(labelsize=7, length=2)
    bar = figure.colorbar(image, ax=axes, shrink=0.8)
    bar.set_label("correlation of time courses")
    bar.outline.set_visible(False)
    return _svg(figure, "connectivity")


def _side_by_side(values: np.ndarray) -> list[int]:
    """Return the order of average-linkage clustering with optimal leaf ordering."""
    if len(values) < 3:
        return list(range(len(values)))
    from scipy.cluster.hierarchy import leaves_list, linkage
    from scipy.spatial.distance import squareform

    distance = 1 - np.abs(values)
    distance = np.clip((distance + distance.T) / 2, 0, None)
    np.fill_diagonal(distance, 0)
    tree = linkage(squareform(distance, checks=False), "average", optimal_ordering=True)
    return [int(i) for i in leaves_list(tree)]


def _figure(height: float) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.subplots()


def _whole_numbers(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=12))


def _log_scale(axes: Axes, low: float, high: float) -> None:
    """Use a logarithmic axis above a factor of three, with plain numbers at the ticks."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    if not high > 3 * low:
        return
    axes.set_yscale("log")
    few = high > 100 * low
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0,) if few else (1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(
        FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 10 else f"{value:g}")
    )
    axes.yaxis.set_minor_formatter(NullFormatter())


def _file(figure: Figure, name: str) -> str:
    """Return the figure as an SVG file; `name` makes its ids differ from those of other figures."""
    import matplotlib

    buffer = io.StringIO()
    nothing: dict[str, Any] = {"Date": None, "Creator": None, "Format": None, "Type": None}
    with matplotlib.rc_context({"svg.hashsalt": f"fbn-prune {name}"}):
        figure.savefig(buffer, format="svg", metadata=nothing)
    return buffer.getvalue()


def _svg(figure: Figure, name: str) -> str:
    """Return the figure as an `svg` element for a page with several figures."""
    return _embedded(_file(figure, name))


def _embedded(text: str) -> str:
    """Return the `svg` element without its size and without ids that nothing refers to."""
    text = text[text.index("<svg") :]
    head, rest = text.split(">", 1)
    head = re.sub(r' (?:width|height)="[^"]*"', "", head)
    used = set(re.findall(r'(?:url\(#|href="#)([^)"]+)', rest))
    rest = re.sub(r' id="([^"]*)"', lambda m: m[0] if m[1] in used else "", rest)
    return f'{head} aria-hidden="true">{rest}'.rstrip()
