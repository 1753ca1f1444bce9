"""The figures of a report as the data that they show: drawing them takes nearly half the time of a run on a tiny model.

All tests get their figures so, and still see whether two runs show the same; a test of the drawing itself asks for
`drawn`. Everything up to the drawing is done.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from html import escape
from typing import TYPE_CHECKING

import pytest

from fbn_prune.export.report import figures

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_native = figures._file


def as_data(figure: Figure, name: str) -> str:
    """Return what stands in for the SVG file: every number and word that would be drawn."""
    shown: list[object] = [name]
    for axes in figure.axes:
        shown += [axes.get_title(), axes.get_xlabel(), axes.get_ylabel(), axes.get_yscale()]
        shown += [axes.get_xlim(), axes.get_ylim()]
        shown += [line.get_xydata().tolist() for line in axes.lines]
        shown += [patch.get_window_extent().bounds for patch in axes.patches]
        shown += [image.get_array().tolist() for image in axes.images]
        shown += [collection.get_offsets().tolist() for collection in axes.collections]
        texts = [*axes.texts, *axes.get_xticklabels(), *axes.get_yticklabels()]
        shown += [text.get_text() for text in texts]
        if (legend := axes.get_legend()) is not None:
            shown += [text.get_text() for text in legend.get_texts()]
    return f"<svg><desc>{escape(repr(shown))}</desc></svg>\n"


@contextmanager
def not_drawn() -> Iterator[None]:
    """Make every figure its data."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "_file", as_data)
        yield


@contextmanager
def drawn() -> Iterator[None]:
    """Draw figures as users get them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "_file", _native)
        yield
