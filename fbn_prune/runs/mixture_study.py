"""Open a mixture of experts to study its functional networks: `discover`, `rank` and `ablate`.

The neurons of all experts of a layer, one after another, are the layer's neurons. An expert's activations are taken
times its gate, and are zero for the tokens that it does not get.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from fbn_prune.errors import InvalidInput
from fbn_prune.model.checkpoint import Checkpoint
from fbn_prune.networks.functional_networks import FunctionalNetworks
from fbn_prune.progress import StageClock
from fbn_prune.recipe import Recipe
from fbn_prune.runs.memory import MemoryPlan
from fbn_prune.runs.mixture import BATCH_TOKENS, checked_mixture, open_mixture_run
from fbn_prune.runs.opening import OpenRun
from fbn_prune.runs.setup import Prepared


def open_mixture_study(
    recipe: Recipe, clock: StageClock, checkpoint: Checkpoint | None = None
) -> OpenRun:
    """Load a recipe's texts and its mixture of experts, as :func:`fbn_prune.runs.opening.open_run` does for others.

    Parameters
    ----------
    checkpoint
        What :func:`fbn_prune.runs.mixture.checked_mixture` returned for the recipe; by default it is called.

    Raises
    ------
    InvalidInput
        Something cannot be used, or is not done on mixtures of experts.
    """
    checkpoint = checkpoint or checked_mixture(recipe, networks=True)
    networks = None
    widths = checkpoint.family.widths(checkpoint.config)
    if recipe.networks_from is not None:
        networks = FunctionalNetworks.load(recipe.networks_from)
        if list(networks.widths) != widths:
            raise InvalidInput(
                f"{recipe.networks_from} was found in layers of widths {networks.widths}; the experts of the model's "
                f"layers have {tuple(widths)} neurons: discover the networks of this model"
            )
    elif recipe.networks > sum(widths) - 1:
        raise InvalidInput(
            f"networks = {recipe.networks}: the model has {sum(widths)} neurons: lower it"
        )
    on = open_mixture_run(recipe, checkpoint, clock)
    memory = MemoryPlan(
        streamed=False,
        batch_tokens=BATCH_TOKENS,
        keep_activations=True,
        keep_hidden=True,
        stages={},
        scratch=Path(tempfile.gettempdir()),
    )
    prepared = Prepared(
        recipe,
        checkpoint,
        on.adapter.device,
        on.adapter.dtype,
        on.data.calibrating.context,
        1,
        networks,
        None,
        frozenset(),
        memory,
    )
    return OpenRun(prepared, checkpoint.load_tokenizer(), on.data, None, on.adapter, clock)
