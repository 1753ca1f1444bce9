"""`gathered_mlp`: run an MLP through the neurons of a set, without changing or copying its weights on a GPU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .activations import activate, canonical_activation
from .neuron_set import Kind, NeuronSet
from .op import many_sets, one_set
from .routing import NeuronBatch, Strategy

_FEW_ROWS = 32
_FEW_BYTES = 256 << 20


def gathered_mlp(
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
    """Compute `down(act(x gateᵀ) * (x upᵀ))` over the kept neurons, or `down(act(x upᵀ))`.

    Runs Triton kernels on a GPU, and views and cached compact weights on a CPU. Differentiable, traceable by
    `torch.compile` and capturable in a CUDA graph.

    Parameters
    ----------
    x
        [..., width], float32, bfloat16 or float16; on a CPU also float64.
    up, gate
        [neurons, width]: the unpruned weights. Without `gate` the MLP is not gated.
    down_t
        [neurons, width out]: the transpose of `down`; on a GPU it must be contiguous in this form.
    neurons
        A set for all rows, or a batch with one set for each row (`NeuronSets.route`).
    activation
        silu, gelu, gelu_tanh or relu, or transformers' name for one of them.
    up_bias, gate_bias
        [neurons], or None.
    down_bias
        [width out], or None.

    Returns
    -------
    Tensor
        [..., width out], in the dtype of x.

    Raises
    ------
    ValueError
        Shapes or devices do not match, or the activation is not supported.
    """
    name = canonical_activation(activation)
    _check(x, up, down_t, neurons, gate, up_bias, gate_bias, down_bias)
    flat = x.reshape(-1, x.shape[-1])
    biases = (up_bias, gate_bias, down_bias)
    trained = any(one is not None and one.requires_grad for one in (up, gate, down_t, *biases))
    frozen = not (trained and torch.is_grad_enabled())
    if isinstance(neurons, NeuronSet):
        count = len(neurons.listed)
        if neurons.kind is Kind.PREFIX and _better_dense(flat, count, frozen):
            out = _prefix(flat, up, gate, down_t, biases, count, name, None)
        else:
            out = one_set(
                flat,
                up,
                gate,
                down_t,
                neurons.indices,
                *biases,
                None,
                None,
                name,
                count,
                neurons.kind.value,
                frozen,
            )
        return out.reshape(*x.shape[:-1], out.shape[-1])
    sets, union = neurons.sets, neurons.sets.union
    first = neurons.strategy is Strategy.UNION and union.kind is Kind.PREFIX
    if first and _better_dense(flat, union.count, frozen):
        mask = sets.membership[:, : union.count].to(x.dtype).index_select(0, neurons.set_ids)
        out = _prefix(flat, up, gate, down_t, biases, union.count, name, mask)
    elif neurons.strategy is Strategy.UNION:
        out = one_set(
            flat,
            up,
            gate,
            down_t,
            union.indices,
            *biases,
            sets.membership,
            neurons.set_ids,
            name,
            union.count,
            union.kind.value,
            frozen,
        )
    else:
        out = many_sets(
            flat,
            up,
            gate,
            down_t,
            union.indices,
            *biases,
            sets.membership,
            neurons.set_ids,
            sets.indices,
            sets.table,
            neurons.order,
            neurons.tiles,
            name,
            union.count,
            sets.kind.value,
            sets.largest,
            neurons.block_rows,
            frozen,
        )
    return out.reshape(*x.shape[:-1], out.shape[-1])


def _better_dense(x: Tensor, count: int, frozen: bool) -> bool:
    """Return whether cuBLAS runs the first `count` neurons faster, as a smaller dense MLP.

    The fused and chained kernels are faster where launch overhead matters: for few rows and small two-byte weights
    (`bench/results/h200.json`: through consecutive rows 0.72 to 1.00 of cuBLAS's time up to 32 tokens at 0.3 to 0.7 of
    an MLP of 352 MB, and 0.96 to 1.10 for all of it).
    """
    small = x.element_size() == 2 and 6 * count * x.shape[1] <= _FEW_BYTES
    return x.is_cuda and not (frozen and small and x.shape[0] <= _FEW_ROWS)


def _prefix(
    x: Tensor,
    up: Tensor,
    gate: Tensor | None,
    down_t: Tensor,
    biases: tuple[Tensor | None, Tensor | None, Tensor | None],
    count: int,
    activation: str,
    mask: Tensor | None,
) -> Tensor:
    """Run a prefix of the neurons as a smaller dense MLP over views."""
    up_bias, gate_bias, down_bias = biases
    hidden = F.linear(x, up[:count], None if up_bias is None else up_bias[:count])
    if gate is None:
        hidden = activate(activation, hidden)
    else:
        opened = F.linear(x, gate[:count], None if gate_bias is None else gate_bias[:count])
        hidden = activate(activation, opened) * hidden
    if mask is not None:
        hidden = hidden * mask
    out = hidden @ down_t[:count]
    return out if down_bias is None else out + down_bias


def _check(
    x: Tensor,
    up: Tensor,
    down_t: Tensor,
    neurons: NeuronSet | NeuronBatch,
    gate: Tensor | None,
    up_bias: Tensor | None,
    gate_bias: Tensor | None,
    down_bias: Tensor | None,
) -> None:
    if up.dim() != 2 or x.dim() < 1 or x.shape[-1] != up.shape[1]:
        raise ValueError(
            f"x {list(x.shape)} does not fit up {list(up.shape)}, which is [neurons, width]"
        )
    count = up.shape[0]
    if neurons.width != count:
        raise ValueError(f"the set is for an MLP of {neurons.width} neurons, up has {count}")
    if down_t.dim() != 2 or down_t.shape[0] != count:
        raise ValueError(
            f"down_t {list(down_t.shape)} must be down transposed, [{count} neurons, width out]"
        )
    if gate is not None and gate.shape != up.shape:
        raise ValueError(f"gate {list(gate.shape)} differs from up {list(up.shape)}")
    if gate is None and gate_bias is not None:
        raise ValueError("gate_bias is given without gate")
    for label, bias, length in (
        ("up_bias", up_bias, count),
        ("gate_bias", gate_bias, count),
        ("down_bias", down_bias, down_t.shape[1]),
    ):
        if bias is not None and tuple(bias.shape) != (length,):
            raise ValueError(f"{label} {list(bias.shape)} must be [{length}]")
    held = neurons.indices if isinstance(neurons, NeuronSet) else neurons.set_ids
    if held.device != x.device:
        raise ValueError(f"the set is on {held.device}, x on {x.device}; move it with .to")
    if isinstance(neurons, NeuronBatch):
        rows = x.numel() // x.shape[-1]
        if neurons.set_ids.shape[0] != rows:
            raise ValueError(f"the batch routes {neurons.set_ids.shape[0]} rows, x has {rows}")
