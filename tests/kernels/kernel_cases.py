"""Random MLPs and sets that the tests of every path share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fbn_kernels import NeuronBatch, NeuronSet, Strategy, reference_mlp
from fbn_kernels.tuning import Tile

NEURONS = 192
WIDTH = 40

SETS = {
    "one neuron": [131],
    "all neurons": list(range(NEURONS)),
    "a prefix": list(range(70)),
    "aligned blocks": [*range(64), *range(128, 192)],
    "scattered rows": [*range(3, 60, 2), 77, *range(90, 191, 3)],
}

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}


@dataclass(frozen=True)
class Mlp:
    """The weights of a small MLP."""

    up: Tensor
    down_t: Tensor
    gate: Tensor | None
    up_bias: Tensor | None
    gate_bias: Tensor | None
    down_bias: Tensor | None

    def options(self) -> dict[str, Tensor | None]:
        """The keyword arguments of `gathered_mlp`."""
        return {
            "gate": self.gate,
            "up_bias": self.up_bias,
            "gate_bias": self.gate_bias,
            "down_bias": self.down_bias,
        }

    def tensors(self) -> list[Tensor]:
        """All that are present."""
        return [self.up, self.down_t, *(one for one in self.options().values() if one is not None)]

    def double(self) -> Mlp:
        """The same weights in float64."""
        values = vars(self).values()
        return Mlp(*(None if one is None else one.detach().double() for one in values))


def random_mlp(
    *,
    gated: bool = True,
    biased: bool = False,
    dtype: torch.dtype = torch.float32,
    neurons: int = NEURONS,
    width: int = WIDTH,
    out_width: int | None = None,
    seed: int = 0,
) -> Mlp:
    """Draw an MLP whose hidden values are of order one."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator) * scale).to(dtype)

    up = draw(neurons, width, scale=width**-0.5)
    gate = draw(neurons, width, scale=width**-0.5) if gated else None
    down_t = draw(neurons, out_width or width, scale=neurons**-0.5)
    biases = [draw(neurons), draw(neurons) if gated else None, draw(out_width or width)]
    return Mlp(up, down_t, gate, *(biases if biased else [None] * 3))


def random_tokens(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    """Draw activations."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def neuron_set(name: str) -> NeuronSet:
    """One of `SETS`."""
    return NeuronSet.from_indices(SETS[name], NEURONS)


def through_tile(
    x: Tensor,
    mlp: Mlp,
    neurons: NeuronSet | NeuronBatch,
    tile: Tile,
    activation: str = "silu",
) -> Tensor:
    """What the kernels compute with this very tile."""
    from fbn_kernels.launch import Membership, Route, Weights, launch_mlp  # needs triton

    weights = Weights(mlp.up, mlp.gate, mlp.down_t, mlp.up_bias, mlp.gate_bias, mlp.down_bias)
    how = {"activation": activation, "tile": tile}
    if isinstance(neurons, NeuronSet):
        how |= {"count": neurons.count, "kind": neurons.kind}
        return launch_mlp(x, weights, neurons.indices, **how)
    batch, sets, union = neurons, neurons.sets, neurons.sets.union
    if batch.strategy is Strategy.UNION:
        how["membership"] = Membership(sets.membership, batch.set_ids)
        return launch_mlp(x, weights, union.indices, count=union.count, kind=union.kind, **how)
    how["route"] = Route(batch.order, batch.tiles, sets.table, batch.block_rows, sets.largest)
    return launch_mlp(x, weights, sets.indices, count=sets.largest, kind=sets.kind, **how)


def off_reference(
    found: Tensor,
    x: Tensor,
    mlp: Mlp,
    neurons: NeuronSet | NeuronBatch,
    activation: str = "silu",
) -> float:
    """The relative error of `found` against the float64 reference."""
    assert found.dtype == x.dtype
    wide = mlp.double()
    expected = reference_mlp(
        x.double(), wide.up, wide.down_t, neurons, activation=activation, **wide.options()
    )
    return relative_error(found, expected)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what was expected; NaN stays NaN."""
    return float((found.double() - expected).norm() / expected.norm())
