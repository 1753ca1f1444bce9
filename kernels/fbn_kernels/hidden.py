"""`gathered_hidden`: the activations of the kept neurons, for callers with their own output weights."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor

from ._ops import add_op_namespace_prefix
from .activations import canonical_activation
from .cpu import cpu_hidden
from .neuron_set import Kind, NeuronSet
from .op import mask_of, on_triton
from .routing import NeuronBatch


def gathered_hidden(
    x: Tensor,
    up: Tensor,
    neurons: NeuronSet | NeuronBatch,
    *,
    gate: Tensor | None = None,
    activation: str = "silu",
    up_bias: Tensor | None = None,
    gate_bias: Tensor | None = None,
) -> Tensor:
    """Return the activations that `gathered_mlp` multiplies with `down`. Not differentiable.

    The parameters are those of `gathered_mlp`.

    Returns
    -------
    Tensor
        For a set [..., kept], in the order of the set. For a batch over several sets [..., kept by any], in the order
        of their union, with zeros for neurons outside the row's own set.
    """
    sets = neurons.sets if isinstance(neurons, NeuronBatch) else None
    union = neurons if isinstance(neurons, NeuronSet) else neurons.sets.union
    count = len(union.listed)
    out = hidden_of(
        x.reshape(-1, x.shape[-1]),
        up,
        gate,
        union.indices,
        up_bias,
        gate_bias,
        None if sets is None else sets.membership,
        neurons.set_ids if isinstance(neurons, NeuronBatch) else None,
        canonical_activation(activation),
        count,
        union.kind.value,
    )
    return out.reshape(*x.shape[:-1], count)


@torch.library.custom_op(add_op_namespace_prefix("hidden_of"), mutates_args=())
def hidden_of(
    x: Tensor,
    up: Tensor,
    gate: Tensor | None,
    indices: Tensor,
    up_bias: Tensor | None,
    gate_bias: Tensor | None,
    membership: Tensor | None,
    set_ids: Tensor | None,
    activation: str,
    count: int,
    kind: str,
) -> Tensor:
    """Return the activations of x [rows, width], [rows, count]; the arguments are those of `one_set`."""
    if not on_triton(x):
        mask = mask_of(membership, set_ids, count, x.dtype)
        return cpu_hidden(
            x,
            up,
            gate,
            indices,
            up_bias,
            gate_bias,
            mask,
            activation=activation,
            count=count,
            frozen=True,
        )
    masked = None
    if membership is not None and set_ids is not None:
        masked = (membership, set_ids)
    weights = (up, gate, up_bias, gate_bias)
    return _launch(x, weights, indices, masked, activation, count, Kind(kind))


@hidden_of.register_fake
def _(
    x: Tensor,
    up: Tensor,
    gate: Tensor | None,
    indices: Tensor,
    up_bias: Tensor | None,
    gate_bias: Tensor | None,
    membership: Tensor | None,
    set_ids: Tensor | None,
    activation: str,
    count: int,
    kind: str,
) -> Tensor:
    return x.new_empty(x.shape[0], count)


def _launch(
    x: Tensor,
    weights: tuple[Tensor, Tensor | None, Tensor | None, Tensor | None],
    indices: Tensor,
    masked: tuple[Tensor, Tensor] | None,
    activation: str,
    count: int,
    kind: Kind,
) -> Tensor:
    """Run only the hidden kernel."""
    from . import launch

    rows, width = x.shape
    if rows == 0:
        return x.new_empty(0, count)
    x = x if x.stride(1) == 1 else x.contiguous()
    up, gate, up_bias, gate_bias = weights
    # The kernel does not read `down`; any tensor of the right dtype passes the check.
    held = launch.Weights(up, gate, up, up_bias, gate_bias, None)
    membership = None if masked is None else launch.Membership(*masked)
    tile = launch.table_for(x.device).find(rows, count, width, x.dtype, kind)
    with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
        hidden = launch.launch_hidden(
            x, held, indices, activation, count, membership, None, tile.hidden
        )
    return hidden[:, :count].contiguous()
