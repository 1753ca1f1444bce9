"""How functional networks relate to one another, to tokens, and to the networks of another search.

Functional connectivity is the correlation of time courses, as in functional MRI. Recurrence is the overlap of members
after matching networks one to one (arXiv 2502.20408 compares inputs in this way; here also seeds, tasks, and models
of equal shape). To show which overlap arises by chance, the maps are also matched after shuffling the neurons within
each layer. This module is independent of models.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fbn_prune.errors import InvalidInput
from fbn_prune.networks import ica
from fbn_prune.networks.fastica import fastica
from fbn_prune.networks.functional_networks import MEMBER_Z, FunctionalNetworks

STARTS = 8
"""Number of further ICA starts that look for each network; whether only two starts share a map is partly luck."""
SHARED_CORRELATION = 0.9
"""Two maps with at least this abs correlation count as the same network."""
SHUFFLES = 20
CHANCE_QUANTILE = 0.99
LEAST_OCCURRENCES = 3
"""A token with fewer occurrences is left out: its activity reflects its contexts more than the token."""


def connectivity(time_courses: Tensor) -> Tensor:
    """Return the Pearson correlation of all pairs of time courses [T, k], float64 [k, k] in [-1, 1].

    A network with constant activity correlates with itself only.
    """
    courses = time_courses.double() - time_courses.double().mean(0)
    unit = torch.nn.functional.normalize(courses, dim=0)
    matrix = (unit.T @ unit).clamp(-1, 1)
    matrix.fill_diagonal_(1.0)
    return matrix


def driving_tokens(time_courses: Tensor, tokens: Tensor, count: int) -> list[list[dict[str, Any]]]:
    """Return for each network the vocabulary entries at which its activity is most unusual, strongest first.

    Parameters
    ----------
    time_courses
        [T, k].
    tokens
        int64 [T]; the token id of each row.
    count
        Largest number of entries for each network.

    Returns
    -------
    list of list of dict
        For each network, dicts of `token` (id), `activity` (mean in standard deviations of the time course) and
        `count` (occurrences), ordered by abs(activity) * sqrt(count), the z-score of that mean.
    """
    ids, place, seen = torch.unique(tokens, return_inverse=True, return_counts=True)
    courses = time_courses.double() - time_courses.double().mean(0)
    courses = courses / courses.square().mean(0).sqrt().clamp_min(torch.finfo(torch.float64).tiny)
    means = torch.zeros(len(ids), courses.shape[1], dtype=torch.float64)
    means.index_add_(0, place, courses)
    means /= seen[:, None]
    surprise = means.abs() * seen[:, None].double().sqrt()
    surprise[seen < LEAST_OCCURRENCES] = -1.0
    best = torch.argsort(surprise, dim=0, descending=True, stable=True)[:count]
    return [
        [
            {"token": int(ids[i]), "activity": float(means[i, network]), "count": int(seen[i])}
            for i in best[:, network].tolist()
            if surprise[i, network] > 0
        ]
        for network in range(courses.shape[1])
    ]


def recurrence_between_starts(
    maps: Tensor,
    spans: Sequence[slice],
    seeds: Sequence[int],
    on_step: Callable[[bool], None] = lambda solved: None,
) -> dict[str, list[float]]:
    """Measure how often ICA finds each map again from other random starts.

    The maps are a whitened basis of their own space, so a new start only repeats the FastICA iterations in it.

    Parameters
    ----------
    maps
        [k, N] z-scored maps; each span contributes the same number, in order.
    spans
        Neurons of each ICA; its maps are 0 outside them.
    seeds
        One for each further start.
    on_step
        Called after each iteration with False, and after each solved start of an ICA with True.

    Returns
    -------
    dict of str to list of float
        For each network, over the starts: `shared_seeds`, the share of starts with a partner that correlates at least
        0.9; `correlation_seeds` and `iou_seeds`, the mean abs correlation and mean overlap of members with the
        partner.
    """
    found = [part[:, span] for part, span in zip(maps.chunk(len(spans)), spans, strict=True)]
    shared, correlation, overlap = [], [], []
    for seed in seeds:
        pairs = [(part, _from_start(part, seed, on_step)) for part in found]
        correlation.append(torch.cat([ica.matched_correlation(a, b).cpu() for a, b in pairs]))
        overlap.append(torch.cat([ica.spatial_overlap(a, b).cpu() for a, b in pairs]))
        shared.append((correlation[-1] >= SHARED_CORRELATION).double())
    return {
        "shared_seeds": torch.stack(shared).mean(0).tolist(),
        "correlation_seeds": torch.stack(correlation).mean(0).tolist(),
        "iou_seeds": torch.stack(overlap).mean(0).tolist(),
    }


def _from_start(maps: Tensor, seed: int, on_step: Callable[[bool], None]) -> Tensor:
    """The maps that another start finds in the space of `maps`."""
    unmixing = fastica(maps.T.contiguous(), seed=seed, on_step=lambda: on_step(False))
    on_step(True)
    return unmixing.W.to(maps.dtype) @ maps


@dataclass(frozen=True)
class Recurrence:
    """Networks of A beside their partners in B, matched one to one by the correlation of maps.

    Attributes
    ----------
    partner
        int64 [k]; index of the matched network in B.
    correlation, overlap
        float64 [k]; abs correlation of the maps, and shared members / members of either.
    chance
        The overlap that one in a hundred networks reaches when the neurons of each layer are shuffled.
    connectivity
        Correlation between the two connectivity matrices after matching, over pairs of networks; None where either is
        unknown.
    """

    partner: Tensor
    correlation: Tensor
    overlap: Tensor
    chance: float
    connectivity: float | None

    @property
    def recurs(self) -> Tensor:
        """Bool [k]: whether the overlap is above chance."""
        return self.overlap > self.chance

    def to_json(self) -> dict[str, Any]:
        columns = zip(
            self.partner.tolist(),
            self.overlap.tolist(),
            self.correlation.tolist(),
            self.recurs.tolist(),
            strict=True,
        )
        return {
            "networks": [
                {"id": i, "partner": p, "iou": o, "correlation": c, "recurs": r}
                for i, (p, o, c, r) in enumerate(columns)
            ],
            "recurring": int(self.recurs.sum()),
            "same": int((self.correlation >= SHARED_CORRELATION).sum()),
            "mean_iou": float(self.overlap.mean()),
            "chance_iou": self.chance,
            "connectivity_correlation": self.connectivity,
        }


def recurrence(a: FunctionalNetworks, b: FunctionalNetworks, *, seed: int = 0) -> Recurrence:
    """Compare the networks of two artifacts: from other text, another task, or another model of the same shape.

    Parameters
    ----------
    seed
        Seed of the shuffles that estimate the overlap by chance.

    Raises
    ------
    InvalidInput
        The layers differ in width, or the artifacts hold different numbers of networks.
    """
    if a.widths != b.widths:
        raise InvalidInput(
            f"the networks are of layers x neurons {_widths(a)} and {_widths(b)}: compare networks of models with "
            "equal widths"
        )
    if a.maps.shape != b.maps.shape:
        raise InvalidInput(
            f"{len(a.maps)} and {len(b.maps)} networks cannot be compared: discover as many in both models"
        )
    partner, correlations = ica.match(a.maps, b.maps)
    return Recurrence(
        partner,
        correlations.gather(1, partner[:, None])[:, 0],
        ica.spatial_overlap(a.maps, b.maps),
        _chance(a, b, seed),
        _same_connectivity(a, b, partner),
    )


def _chance(a: FunctionalNetworks, b: FunctionalNetworks, seed: int) -> float:
    """The overlap that few networks reach when B's neurons are shuffled within each layer, in all maps alike."""
    generator = torch.Generator().manual_seed(seed)
    overlaps = []
    for _ in range(SHUFFLES):
        order = torch.cat(
            [
                start + torch.randperm(width, generator=generator)
                for start, width in zip(_starts(b.widths), b.widths, strict=True)
            ]
        )
        overlaps.append(ica.spatial_overlap(a.maps, b.maps[:, order], MEMBER_Z))
    return float(torch.quantile(torch.cat(overlaps), CHANCE_QUANTILE))


def _starts(widths: Sequence[int]) -> list[int]:
    return [sum(widths[:layer]) for layer in range(len(widths))]


def _same_connectivity(
    a: FunctionalNetworks, b: FunctionalNetworks, partner: Tensor
) -> float | None:
    if a.connectivity is None or b.connectivity is None or len(a.maps) < 3:
        return None
    # The sign of a map is a convention; partners' maps of opposite sign have time courses of opposite sign.
    signs = torch.sign((a.maps.double() * b.maps[partner].double()).sum(1))
    turned = b.connectivity[partner][:, partner] * signs[:, None] * signs
    rows, columns = torch.triu_indices(len(a.maps), len(a.maps), 1)
    pairs = torch.stack([a.connectivity[rows, columns], turned[rows, columns]])
    value = float(torch.corrcoef(pairs)[0, 1])
    return value if value == value else None


def _widths(networks: FunctionalNetworks) -> str:
    distinct = sorted(set(networks.widths))
    listed = str(distinct[0]) if len(distinct) == 1 else f"{distinct[0]} to {distinct[-1]}"
    return f"{len(networks.widths)} x {listed}"
