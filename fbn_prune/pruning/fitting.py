"""Make cuts whose weights fit the checkpoint's dtype, and record each change of damping."""

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
    erasure,
    head_cut,
)
from fbn_prune.pruning.damping import DampingWarning

Evidence = TypeVar("Evidence", bound=OutputEvidence)
Cut = TypeVar("Cut", MlpCut, HeadCut)

STRONGEST_REFIT_DAMPING = 1e3
"""The last try if refitted weights overflow the stored dtype; a refit damped so strongly changes almost nothing."""


def fitting_cuts(
    evidence: LayerEvidence, widths: Collection[int], *, criterion: str, stored: torch.dtype
) -> dict[int, MlpCut]:
    """Cut a layer to each width, with more damping in the refit if new weights overflow the stored dtype.

    Parameters
    ----------
    widths
        Numbers of neurons to keep. The second order serves all of them by one removal of all neurons.
    criterion
        Name in :data:`fbn_prune.pruning.criteria.CRITERIA`.
    stored
        The dtype in which the output weights will be stored.

    Warns
    -----
    DampingWarning
        The refit has more damping than requested.
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


def fitting_erasure(evidence: LayerEvidence, strength: float, *, stored: torch.dtype) -> MlpCut:
    """Erase a skill from a layer's output weights; the damping rises as in :func:`fitting_cuts`."""
    return _fitting(
        evidence,
        stored,
        erasure(evidence, strength),
        lambda damped: erasure(damped, strength),
        lambda cut: cut.down_weight,
    )


def fitting_head_cut(evidence: HeadEvidence, groups: int, *, stored: torch.dtype) -> HeadCut:
    """Cut the attention as :func:`fitting_cuts` cuts the MLP; the second order always chooses the groups."""
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
    requested = evidence.refit_damping
    while not float(weight(cut).abs().max()) <= torch.finfo(stored).max:  # NaN does not fit either
        damping = evidence.refit_damping * 10
        if damping > STRONGEST_REFIT_DAMPING:
            break
        warnings.warn(
            f"refitted weights overflow {stored}: the refit's damping is {damping:g} instead of {requested:g}",
            DampingWarning,
            stacklevel=3,
        )
        evidence = replace(evidence, refit_damping=damping)
        cut = again(evidence)
    return cut


class DampingNotes:
    """Collects messages about changed damping; each message keeps the list of its layers."""

    def __init__(self) -> None:
        self._layers: dict[str, list[int]] = {}

    def add(self, layer: int, messages: Iterable[str]) -> None:
        """Record messages about a layer that come from another process or from an earlier run."""
        for message in messages:
            if layer not in (layers := self._layers.setdefault(message, [])):
                layers.append(layer)

    def of(self, layer: int) -> tuple[str, ...]:
        """Return the messages about one layer."""
        return tuple(message for message, layers in self._layers.items() if layer in layers)

    @contextmanager
    def heard(self, layer: int, part: str = "") -> Iterator[None]:
        """Record each :class:`DampingWarning` issued inside the context, prefixed by `part`; pass other warnings on."""
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
        """Return one line for each message, with its layers."""
        return [
            f"warning: layer{'s' if len(layers) > 1 else ''} {', '.join(map(str, layers))}: {message}"
            for message, layers in self._layers.items()
        ]
