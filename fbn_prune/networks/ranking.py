"""Rank networks: by the output energy that they carry, or by the loss rise when they are knocked out.

The energy of a network is its engagement (the mean square of its time course) times the squared MLP output for one
unit of the time course: the sum over layers of ``||W_l (z_l * std_l)||²``. Knock-out (arXiv 2502.20408) masks a
network's hubs and measures the rise of the loss: the causal test, at one pass per network.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from fbn_prune.data.calibration import Batch
from fbn_prune.errors import counted
from fbn_prune.model.adapter import ModelAdapter
from fbn_prune.model.perplexity import mean_loss
from fbn_prune.networks.functional_networks import FunctionalNetworks
from fbn_prune.networks.interventions import masked
from fbn_prune.progress import StageClock


def output_energy(networks: FunctionalNetworks, down_weights: Iterable[Tensor]) -> Tensor:
    """Return the output energy of each network, float64 [networks].

    Parameters
    ----------
    down_weights
        Output projection [d, neurons] of each layer.
    """
    energy = torch.zeros(len(networks.maps), dtype=torch.float64)
    for layer, weight in enumerate(down_weights):
        span = networks.layer_slice(layer)
        directions = networks.maps[:, span] * networks.std[span]
        energy += (weight.cpu().float() @ directions.T).double().square().sum(0)
    return energy * networks.engagement.double()


def knockout_rise(
    adapter: ModelAdapter,
    networks: FunctionalNetworks,
    batches: Sequence[Batch],
    clock: StageClock,
    *,
    on_dense: Callable[[float], None] = lambda loss: None,
) -> Tensor:
    """Return the rise of the mean loss, in nats a token, when each network's hubs are masked; float64 [networks].

    Parameters
    ----------
    on_dense
        Called with the mean loss of the unchanged model before any network is masked; may raise to end the search.
    """
    count = len(networks.maps)
    clock.note(f"rank: knock-out of {counted(count, 'network')}, one at a time")
    tokens = sum(batch.tokens for batch in batches)
    with clock.stage("rank", (count + 1) * tokens, "tokens") as advance:
        start = time.perf_counter()
        dense = mean_loss(adapter, batches, advance)
        clock.note_time("rank", "the unchanged model", time.perf_counter() - start, count)
        on_dense(dense)
        rises = torch.zeros(count, dtype=torch.float64)
        for network in range(count):
            with masked(adapter, networks.by_layer(networks.hubs(network))):
                rises[network] = mean_loss(adapter, batches, advance) - dense
    return rises


def strongest_first(scores: Tensor) -> list[int]:
    """Return network indices by decreasing score; for equal scores, the lower index comes first."""
    return torch.argsort(scores, descending=True, stable=True).tolist()
