"""The torch operators behind `gathered_mlp`, with fake versions and gradients.

There are two operators: one index list for all rows (optionally with a mask for each row), and one list for each tile
of rows. The backward pass recomputes the hidden vector instead of keeping it, and computes the weight gradients only
for the kept rows before it puts them into zeros of the weight's shape.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._ops import add_op_namespace_prefix
from .activations import activate, activation_backward
from .cpu import cpu_mlp
from .neuron_set import Kind
from .tuning import INTERPRETED


def on_triton(x: Tensor) -> bool:
    """Return whether the kernels run on x: on a GPU, or on any device under Triton's interpreter."""
    return x.is_cuda or INTERPRETED


@torch.library.custom_op(add_op_namespace_prefix("one_set"), mutates_args=())
def one_set(
    x: Tensor,
    up: Tensor,
    gate: Tensor | None,
    down_t: Tensor,
    indices: Tensor,
    up_bias: Tensor | None,
    gate_bias: Tensor | None,
    down_bias: Tensor | None,
    membership: Tensor | None,
    set_ids: Tensor | None,
    activation: str,
    count: int,
    kind: str,
    frozen: bool,
) -> Tensor:
    """Run x [rows, width] through the first `count` rows of `indices`.

    `frozen` means that the weights are not being trained, so that copies of them may be cached.
    With `membership` uint8 [sets, padded] and `set_ids` int32 [rows], a row uses neuron j only
    where `membership[set_ids[row], j]` is 1.
    """
    if on_triton(x):
        from .launch import Membership, Weights, launch_mlp

        masked = None
        if membership is not None and set_ids is not None:
            masked = Membership(membership, set_ids)
        return launch_mlp(
            x,
            Weights(up, gate, down_t, up_bias, gate_bias, down_bias),
            indices,
            activation=activation,
            count=count,
            kind=Kind(kind),
            membership=masked,
        )
    return cpu_mlp(
        x,
        up,
        gate,
        down_t,
        indices,
        up_bias,
        gate_bias,
        down_bias,
        mask_of(membership, set_ids, count, x.dtype),
        activation=activation,
        count=count,
        frozen=frozen,
    )


@torch.library.custom_op(add_op_namespace_prefix("many_sets"), mutates_args=())
def many_sets(
    x: Tensor,
    up: Tensor,
    gate: Tensor | None,
    down_t: Tensor,
    indices: Tensor,
    up_bias: Tensor | None,
    gate_bias: Tensor | None,
    down_bias: Tensor | None,
    membership: Tensor,
    set_ids: Tensor,
    set_indices: Tensor,
    table: Tensor,
    order: Tensor,
    tiles: Tensor,
    activation: str,
    count: int,
    kind: str,
    largest: int,
    block_rows: int,
    frozen: bool,
) -> Tensor:
    """Run each tile of rows through the index list of its set.

    `indices`, `membership` and `count` describe the union of the sets; `set_indices`, `table`,
    `order`, `tiles`, `largest` and `block_rows` are those of `NeuronSets` and `NeuronBatch`;
    `frozen` has the meaning that it has in `one_set`.
    """
    if on_triton(x):
        from .launch import Route, Weights, launch_mlp

        return launch_mlp(
            x,
            Weights(up, gate, down_t, up_bias, gate_bias, down_bias),
            set_indices,
            activation=activation,
            count=largest,
            kind=Kind(kind),
            route=Route(order, tiles, table, block_rows, largest),
        )
    out = x.new_empty(x.shape[0], down_t.shape[1])
    for number, (start, kept) in enumerate(table.tolist()):
        mine = torch.nonzero(set_ids == number).flatten()
        if mine.numel():
            out[mine] = cpu_mlp(
                x[mine],
                up,
                gate,
                down_t,
                set_indices[start:],
                up_bias,
                gate_bias,
                down_bias,
                None,
                activation=activation,
                count=kept,
                frozen=frozen,
            )
    return out


@one_set.register_fake
def _(x: Tensor, up: Tensor, gate: Tensor | None, down_t: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape[0], down_t.shape[1])


@many_sets.register_fake
def _(x: Tensor, up: Tensor, gate: Tensor | None, down_t: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape[0], down_t.shape[1])


def mask_of(
    membership: Tensor | None, set_ids: Tensor | None, count: int, dtype: torch.dtype
) -> Tensor | None:
    """Return each row's factor of the union's hidden vector, [rows, count], or None."""
    if membership is None or set_ids is None:
        return None
    return membership[:, :count].to(dtype).index_select(0, set_ids)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    # Both operators take the same first ten tensors, and the activation followed by the union's count.
    ctx.save_for_backward(*inputs[:10])
    first_option = next(n for n, one in enumerate(inputs) if isinstance(one, str))
    ctx.activation, ctx.count = inputs[first_option], inputs[first_option + 1]
    ctx.input_count = len(inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, up, gate, down_t, indices, up_bias, gate_bias, _, membership, set_ids = ctx.saved_tensors
    needs = ctx.needs_input_grad
    name: str = ctx.activation
    rows = indices[: ctx.count].to(torch.int64)
    kept_up = up.index_select(0, rows)
    kept_gate = None if gate is None else gate.index_select(0, rows)
    risen = x @ kept_up.t()
    if up_bias is not None:
        risen = risen + up_bias.index_select(0, rows)
    opened = None
    if kept_gate is not None:
        opened = x @ kept_gate.t()
        if gate_bias is not None:
            opened = opened + gate_bias.index_select(0, rows)
    mask = mask_of(membership, set_ids, ctx.count, x.dtype)

    grad_hidden = grad @ down_t.index_select(0, rows).t()
    if mask is not None:
        grad_hidden = grad_hidden * mask
    if opened is None:
        active = activate(name, risen)
        hidden = active
        grad_risen, grad_opened = activation_backward(name, grad_hidden, risen), None
    else:
        active = activate(name, opened)
        hidden = active * risen
        grad_risen = grad_hidden * active
        grad_opened = activation_backward(name, grad_hidden * risen, opened)
    if mask is not None:
        hidden = hidden * mask

    def spread(like: Tensor | None, kept: Tensor) -> Tensor:
        assert like is not None
        shape = (like.shape[0], *kept.shape[1:])
        return kept.new_zeros(shape).index_copy(0, rows, kept)

    grads: list[Tensor | None] = [None] * ctx.input_count
    if needs[0]:
        grads[0] = grad_risen @ kept_up
        if grad_opened is not None and kept_gate is not None:
            grads[0] = grads[0] + grad_opened @ kept_gate
    if needs[1]:
        grads[1] = spread(up, grad_risen.t() @ x)
    if needs[2] and grad_opened is not None:
        grads[2] = spread(gate, grad_opened.t() @ x)
    if needs[3]:
        grads[3] = spread(down_t, hidden.t() @ grad)
    if needs[5]:
        grads[5] = spread(up_bias, grad_risen.sum(0))
    if needs[6] and grad_opened is not None:
        grads[6] = spread(gate_bias, grad_opened.sum(0))
    if needs[7]:
        grads[7] = grad.sum(0)
    return tuple(grads)


one_set.register_autograd(_backward, setup_context=_setup)
many_sets.register_autograd(_backward, setup_context=_setup)
