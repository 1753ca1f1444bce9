"""Gathered sparse MLPs: run an unpruned MLP through a subset of its neurons.

The weights are in memory once, whatever the number of subsets, and a subset is a list of neurons. The package needs
torch, and Triton on a GPU.
"""

from __future__ import annotations

from .activations import ACTIVATIONS
from .cpu import compact_cache
from .hidden import gathered_hidden
from .mlp import gathered_mlp
from .neuron_set import BLOCK, Kind, NeuronSet
from .reference import reference_mlp
from .resident import ResidentMlp, mark_varying
from .routing import NeuronBatch, NeuronSets, Strategy

__all__ = [
    "ACTIVATIONS",
    "BLOCK",
    "Kind",
    "NeuronBatch",
    "NeuronSet",
    "NeuronSets",
    "ResidentMlp",
    "Strategy",
    "compact_cache",
    "gathered_hidden",
    "gathered_mlp",
    "mark_varying",
    "reference_mlp",
]
