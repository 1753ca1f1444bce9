"""Try cuts on a model in memory: each layer is cut when it is called and restored when it returns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from fbn_prune.model.attention_blocks import trying_head_groups
from fbn_prune.model.live_layers import CuttableLayers
from fbn_prune.model.modeling_ragged import set_features
from fbn_prune.model.surgery import MlpCut, require_bias


@contextmanager
def live_trial(
    adapter: CuttableLayers,
    cuts: Sequence[MlpCut],
    alone: int | None,
    round_to: torch.dtype | None,
) -> Iterator[None]:
    """Let a model in memory compute with cuts; see :meth:`fbn_prune.model.adapter.ModelAdapter.trying`."""
    restores = ExitStack()

    def cut(layer: int) -> None:
        restores.close()  # an interrupted forward pass may have left a layer cut
        chosen = cuts[layer]
        for projection in adapter.projections_of(chosen):
            module = adapter.module(layer, projection)
            restores.callback(_restore, module, dict(module._parameters))
        if chosen.down_bias is not None and adapter.down_bias(layer) is None:
            require_bias(adapter.family, adapter.config)
            adapter.add_biases(layer)
        if chosen.heads is not None:
            restores.enter_context(trying_head_groups(adapter, layer, len(chosen.heads.kept)))
        adapter.cut_layer(layer, chosen, round_to)

    with ExitStack() as hooks:
        hooks.callback(restores.close)
        for layer, module in enumerate(adapter.layers):
            if alone not in (None, layer):
                continue
            before = module.register_forward_pre_hook(lambda _, args, layer=layer: cut(layer))
            hooks.callback(before.remove)
            after = module.register_forward_hook(lambda _, args, output: restores.close())
            hooks.callback(after.remove)
        yield


def _restore(module: nn.Linear, parameters: dict[str, nn.Parameter | None]) -> None:
    for part, parameter in parameters.items():
        setattr(module, part, parameter)
    set_features(module)
