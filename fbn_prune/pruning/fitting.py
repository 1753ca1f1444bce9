"""A cut that the checkpoint can store, and a record of what had to be damped for it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from fbn_prune.model.heads import HeadCut
from fbn_prune.model.surgery import MlpCut
from fbn_prune.pruning.criteria import (
    CRITERIA,
    HeadEvidence,
    LayerEvidence,
    OutputEvidence,
    cuts_to_widths,
    head_cut,
)
from fbn_prune.pruning.damping import DampingWarning

Evidence = TypeVar("Evidence", bound=OutputEvidence)
Cut = TypeVar("Cut", MlpCut, HeadCut)

STRONGEST_REFIT_DAMPING = 1e3
"""So damped a refit changes next to nothing: the last try where refitted weights do not fit the stored type."""


def fitting_cuts(
    evidence: LayerEvidence, widths: Collection[int], *, criterion: str, stored: torch.dtype
) -> dict[int, MlpCut]:
    """The cut to each width by a criterion, refitted more cautiously where new weights overflow the stored type.

    Parameters
    ----------
    widths
        Neurons to keep. Where the second order decides, one removal of all neurons serves every width.
    stored
        The dtype in which the output weights will be stored.

    Warns
    -----
    DampingWarning
        The refit was damped more than asked for.
    """
    made = cuts_to_widths(criterion, evidence, widths)
    return {
        width: _fitting(
            evidence,
            stored,
            made[width],
            lambda damped, width=width: CRITERIA[criterion](damped, width),  # type: ignore[misc]
            lambda cut: cut.down_weight,
        )
        for width in widths
    }


def fitting_head_cut(evidence: HeadEvidence, groups: int, *, stored: torch.dtype) -> HeadCut:
    """The same for the attention heads, which the second order chooses whatever the criterion."""
    return _fitting(
        evidence,
        stored,
        head_cut(evidence, groups),
        lambda damped: head_cut(damped, groups),
        lambda cut: cut.out_weight,
    )


def _fitting(
    evidence: Evidence,
    stored: torch.dtype,
    cut: Cut,
    again: Callable[[Evidence], Cut],
    weight: Callable[[Cut], Tensor],
) -> Cut:
    asked = evidence.refit_damping
    while not float(weight(cut).abs().max()) <= torch.finfo(stored).max:  # NaN does not fit either
        damping = evidence.refit_damping * 10
        if damping > STRONGEST_REFIT_DAMPING:
            break
        warnings.warn(
            f"refitted weights overflow {stored}: the refit's damping is {damping:g} instead of {asked:g}",
            DampingWarning,
            stacklevel=3,
        )
        evidence = replace(evidence, refit_damping=damping)
        cut = again(evidence)
    return cut


class DampingNotes:
    """What was damped otherwise than asked for, a line for each kind, with its layers."""

    def __init__(self) -> None:
        self._layers: dict[str, list[int]] = {}

    def add(self, layer: int, messages: Iterable[str]) -> None:
        """Take down what was heard of a layer elsewhere: in another process, or in an earlier run."""
        for message in messages:
            if layer not in (layers := self._layers.setdefault(message, [])):
                layers.append(layer)

    def of(self, layer: int) -> tuple[str, ...]:
        """What was heard of one layer."""
        return tuple(message for message, layers in self._layers.items() if layer in layers)

    @contextmanager
    def heard(self, layer: int, part: str = "") -> Iterator[None]:
        """Collect the :class:`DampingWarning` of the block, which is about a `part` of it; other warnings pass."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", DampingWarning)
            yield
        for warning in caught:
            if not issubclass(warning.category, DampingWarning):
                warnings.warn_explicit(
                    warning.message, warning.category, warning.filename, warning.lineno
                )
            else:
                self.add(layer, [f"{part}{warning.message}"])

    def lines(self) -> list[str]:
        return [
            f"warning: layer{'s' if len(layers) > 1 else ''} {', '.join(map(str, layers))}: {message}"
            for message, layers in self._layers.items()
        ]
