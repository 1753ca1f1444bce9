"""What functions that change the layers of a running model need of it; :class:`ModelAdapter` has all of it."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from fbn_prune.model.family import Family, Projection
from fbn_prune.model.heads import HeadProjection
from fbn_prune.model.surgery import MlpCut


class WithAttention(Protocol):
    """A model whose attention modules can be replaced.

    Attributes
    ----------
    attention_left_out
        The attention modules that return zeros, by layer, with the `forward` that each had in its own dictionary.
    """

    attention_left_out: dict[int, tuple[nn.Module, Any]]

    def attention_module(self, layer: int) -> nn.Module: ...

    def set_head_groups(self, layer: int, groups: int) -> None: ...


class CuttableLayers(WithAttention, Protocol):
    """A model in memory whose layers can be cut."""

    family: Family

    @property
    def config(self) -> PretrainedConfig: ...

    @property
    def layers(self) -> nn.ModuleList: ...

    def module(self, layer: int, projection: Projection | HeadProjection) -> nn.Linear: ...

    def projections_of(self, cut: MlpCut) -> list[Projection | HeadProjection]: ...

    def down_bias(self, layer: int) -> Tensor | None: ...

    def add_biases(self, layer: int) -> None: ...

    def cut_layer(self, layer: int, cut: MlpCut, round_to: torch.dtype | None) -> None: ...
