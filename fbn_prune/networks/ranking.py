"""The order in which networks are kept: by the output energy they carry, or by what their absence costs.

Energy of a network: sum over layers of ``||W_l (z_l * std_l)||²``, the squared MLP output that a unit of its time
course moves, times its engagement, the mean square of that time course.
Knock-out (arXiv 2502.20408): silence its hubs, measure the rise of the loss; the causal test, one pass a network.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from fbn_prune.data.calibration import Batch
from fbn_prune.model.adapter import ModelAdapter
from fbn_prune.model.perplexity import mean_loss
from fbn_prune.networks.functional_networks import FunctionalNetworks
from fbn_prune.networks.interventions import masked
from fbn_prune.progress import StageClock


def output_energy(networks: FunctionalNetworks, down_weights: Iterable[Tensor]) -> Tensor:
    """Output energy of each network, float64 [networks].

    Parameters
    ----------
    down_weights
        For each layer the output projection [d, neurons].
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
) -> Tensor:
    """Rise of the mean loss, in nats, when each network's hubs are silent; float64 [networks]."""
    count = len(networks.maps)
    with clock.stage("rank", count + 1, "networks") as advance:
        dense = mean_loss(adapter, batches)
        advance(1)
        rises = torch.zeros(count, dtype=torch.float64)
        for network in range(count):
            with masked(adapter, networks.by_layer(networks.hubs(network))):
                rises[network] = mean_loss(adapter, batches) - dense
            advance(1)
    return rises


def strongest_first(scores: Tensor) -> list[int]:
    """Network indices by falling score; ties go to the lower index."""
    return torch.argsort(scores, descending=True, stable=True).tolist()
