"""Leave the attention of single layers out of a model that runs, and try other numbers of heads in a layer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from fbn_prune.errors import InvalidInput
from fbn_prune.model.family import Family
from fbn_prune.model.head_groups import require_equal_groups
from fbn_prune.model.live_layers import WithAttention
from fbn_prune.model.modeling_ragged import NoHeads


def leave_out_attention(adapter: WithAttention, layers: Iterable[int]) -> None:
    """Let the attention of these layers of a live or streamed model return zeros; its weights stay.

    Layers whose attention is left out already are passed over.
    """
    for layer in set(layers) - adapter.attention_left_out.keys():
        module: Any = adapter.attention_module(layer)
        # What accelerate has put in place of the method comes back afterwards.
        adapter.attention_left_out[layer] = module, vars(module).get("forward")
        module.forward = NoHeads(module.layer_idx).forward


def put_back_attention(adapter: WithAttention, layers: Iterable[int]) -> None:
    """Let attention that was left out compute again."""
    for layer in layers:
        module, before = adapter.attention_left_out.pop(layer)
        del module.forward
        if before is not None:
            module.forward = before


@contextmanager
def leaving_out_attention(adapter: WithAttention, layers: Iterable[int]) -> Iterator[None]:
    """Leave the attention of these layers out within the context only."""
    layers = set(layers) - adapter.attention_left_out.keys()
    leave_out_attention(adapter, layers)
    try:
        yield
    finally:
        put_back_attention(adapter, layers)


@contextmanager
def trying_head_groups(adapter: WithAttention, layer: int, groups: int) -> Iterator[None]:
    """Let a layer's attention module compute with so many head groups within the context; weights are the caller's."""
    if groups == 0:
        with leaving_out_attention(adapter, [layer]):
            yield
        return
    attributes = vars(adapter.attention_module(layer))
    before = dict(attributes)
    adapter.set_head_groups(layer, groups)
    try:
        yield
    finally:
        attributes.update(before)


def require_attention(family: Family, config: Any) -> None:
    """Raise InvalidInput unless the layers of this model can keep different numbers of attention heads, or none.

    Raises
    ------
    InvalidInput
        The architecture's heads cannot be cut, the layers differ in them already, or there is a single layer.
    """
    if type(family) is not Family or family.attention is None:
        raise InvalidInput(
            f"{family.name}: attention heads cannot be cut in this architecture: use --structures neurons"
        )
    require_equal_groups(family, config)
    if family.num_layers(config) < 2:
        raise InvalidInput(
            "the model has a single layer, whose attention must stay: use --structures neurons"
        )
