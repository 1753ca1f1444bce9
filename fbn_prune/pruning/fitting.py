"""A cut that the checkpoint can store, and a record of what had to be damped for it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from fbn_prune.model.surgery import MlpCut
from fbn_prune.pruning.criteria import CRITERIA, LayerEvidence
from fbn_prune.pruning.damping import DampingWarning

STRONGEST_REFIT_DAMPING = 1e3
"""So damped a refit changes next to nothing: the last try where refitted weights do not fit the stored type."""


def fitting_cut(
    evidence: LayerEvidence, width: int, *, criterion: str, stored: torch.dtype
) -> MlpCut:
    """The cut by a criterion, refitted more cautiously where new weights overflow the type they are stored in."""
    asked = evidence.refit_damping
    while True:
        cut = CRITERIA[criterion](evidence, width)
        damping = evidence.refit_damping * 10
        fits = float(cut.down_weight.abs().max()) <= torch.finfo(stored).max
        if fits or damping > STRONGEST_REFIT_DAMPING:
            return cut
        warnings.warn(
            f"refitted weights overflow {stored}: the refit's damping is {damping:g} instead of {asked:g}",
            DampingWarning,
            stacklevel=2,
        )
        evidence = replace(evidence, refit_damping=damping)


class DampingNotes:
    """What was damped otherwise than asked for, a line for each kind, with its layers."""

    def __init__(self) -> None:
        self._layers: dict[str, list[int]] = {}

    @contextmanager
    def heard(self, layer: int) -> Iterator[None]:
        """Collect the :class:`DampingWarning` of the block; other warnings pass."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", DampingWarning)
            yield
        for warning in caught:
            if not issubclass(warning.category, DampingWarning):
                warnings.warn_explicit(
                    warning.message, warning.category, warning.filename, warning.lineno
                )
            elif layer not in (layers := self._layers.setdefault(str(warning.message), [])):
                layers.append(layer)

    def lines(self) -> list[str]:
        return [
            f"warning: layer{'s' if len(layers) > 1 else ''} {', '.join(map(str, layers))}: {message}"
            for message, layers in self._layers.items()
        ]
