"""The gathered MLP in a few lines of plain PyTorch, as the reference for the faster implementations."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .activations import activate, canonical_activation
from .neuron_set import NeuronSet
from .routing import NeuronBatch


def reference_mlp(
    x: Tensor,
    up: Tensor,
    down_t: Tensor,
    neurons: NeuronSet | NeuronBatch,
    *,
    gate: Tensor | None = None,
    activation: str = "silu",
    up_bias: Tensor | None = None,
    gate_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
) -> Tensor:
    """Compute the result of `gathered_mlp` by gathering the rows; differentiable, for any floating dtype.

    The parameters are those of `fbn_kernels.gathered_mlp`.
    """
    if isinstance(neurons, NeuronBatch):
        flat = x.reshape(-1, x.shape[-1])
        out = flat.new_empty(flat.shape[0], down_t.shape[1])
        for number, one in enumerate(neurons.sets.sets):
            mine = neurons.set_ids == number
            out[mine] = reference_mlp(
                flat[mine],
                up,
                down_t,
                one,
                gate=gate,
                activation=activation,
                up_bias=up_bias,
                gate_bias=gate_bias,
                down_bias=down_bias,
            )
        return out.reshape(*x.shape[:-1], -1)
    name = canonical_activation(activation)
    rows = neurons.rows().to(x.device)

    def kept(values: Tensor | None) -> Tensor | None:
        return None if values is None else values[rows]

    hidden = F.linear(x, up[rows], kept(up_bias))
    if gate is None:
        hidden = activate(name, hidden)
    else:
        hidden = activate(name, F.linear(x, gate[rows], kept(gate_bias))) * hidden
    return F.linear(hidden, down_t[rows].t(), down_bias)
