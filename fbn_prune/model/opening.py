"""Which adapter a model gets: the one place that tells mixtures of experts from other models once they are open."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedModel

from fbn_prune.model.adapter import ModelAdapter
from fbn_prune.model.checkpoint import Checkpoint
from fbn_prune.model.experts import mixture
from fbn_prune.model.families import family_of
from fbn_prune.model.family import Family
from fbn_prune.model.mixture_adapter import MixtureAdapter
from fbn_prune.model.mixture_family import MixtureFamily, mixture_family
from fbn_prune.model.streamed_mixture import StreamedMixture
from fbn_prune.model.streaming import StreamedModel


def adapter_of(model: PreTrainedModel) -> ModelAdapter:
    """Return the adapter of a model in memory whose architecture is not known yet.

    Raises
    ------
    InvalidInput
        The architecture is not supported.
    """
    fields = {**model.config.to_dict(), "model_type": model.config.model_type}
    family = family_of(model.config) if mixture(fields) is None else mixture_family(fields)
    return live_adapter(model, family)


def live_adapter(model: PreTrainedModel, family: Family) -> ModelAdapter:
    """Return the adapter of a model in memory."""
    if isinstance(family, MixtureFamily):
        return MixtureAdapter(model, family)
    return ModelAdapter(model, family)


def streamed_adapter(
    checkpoint: Checkpoint,
    device: torch.device,
    dtype: torch.dtype,
    *,
    scratch: Path,
    spill_hidden: bool,
) -> StreamedModel:
    """Return the adapter of a model that is read layer by layer."""
    kind = StreamedMixture if isinstance(checkpoint.family, MixtureFamily) else StreamedModel
    return kind(checkpoint, device, dtype, scratch=scratch, spill_hidden=spill_hidden)
