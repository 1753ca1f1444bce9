"""What counts as an MLP is decided by what modules compute, not by their names or shapes."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import silu
from transformers import Qwen2Config, SmolLM3Config

from fbn_prune.errors import InvalidInput
from fbn_prune.model.decoder_layers import NotFound
from fbn_prune.model.experts import mixture
from fbn_prune.model.families import family_of, refuse_obstacles
from fbn_prune.model.identities import failed_step
from fbn_prune.model.mlp_search import Mlp, find_structure
from fbn_prune.model.structure import find_family
from fbn_prune.model.tiny_copy import HIDDEN, VOCABULARY, tiny_config

WIDTH = 6


class Layer(nn.Module):
    """A layer with maps of meaningless names; `compute` makes what the last one reads from the others."""

    def __init__(self, compute: Callable[[Layer, Tensor], Tensor], sizes: dict[str, int]) -> None:
        super().__init__()
        self.compute = compute
        for name, size in sizes.items():
            self.add_module(name, nn.Linear(HIDDEN, size))
        self.z = nn.Linear(WIDTH, HIDDEN)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.z(self.compute(self, hidden))


class Model(nn.Module):
    def __init__(self, compute: Callable[[Layer, Tensor], Tensor], sizes: dict[str, int]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCABULARY, HIDDEN)
        self.blocks = nn.ModuleList(Layer(compute, sizes) for _ in range(2))

    def forward(self, input_ids: Tensor, use_cache: bool) -> SimpleNamespace:
        hidden = self.embed(input_ids)
        for block in self.blocks:
            hidden = block(hidden)
        return SimpleNamespace(logits=hidden)


def found(compute: Callable[[Layer, Tensor], Tensor], **sizes: int) -> Mlp:
    """The MLP that is found in each layer, the same in both."""
    structure = find_structure(Model(compute, sizes))  # type: ignore[arg-type]
    assert structure.layers == "blocks"
    (one,), (other,) = structure.mlps
    assert one == other
    return one


def halves(layer: Layer, hidden: Tensor) -> tuple[Tensor, Tensor]:
    first, second = layer.a(hidden).chunk(2, dim=-1)
    return first, second


def test_an_mlp_is_found_with_its_gate_whatever_its_maps_are_called() -> None:
    plain = found(lambda m, x: torch.relu(m.a(x)), a=WIDTH)
    assert [one.path for one in plain.inputs] == ["a"]
    assert (plain.output.path, plain.width, plain.biased) == ("z", WIDTH, (True, True))
    for gate, compute in (
        ("a", lambda m, x: silu(m.a(x)) * m.b(x)),
        ("b", lambda m, x: silu(m.b(x)) * m.a(x)),
    ):
        gated = found(compute, a=WIDTH, b=WIDTH)
        assert [one.path for one in gated.inputs] == sorted("ab", reverse=gate == "b")
        torch.testing.assert_close(silu(gated.computed[0]) * gated.computed[1], gated.activation)


@pytest.mark.parametrize("up_first", [False, True])
def test_a_fused_map_is_found_in_either_order(up_first: bool) -> None:
    def compute(layer: Layer, hidden: Tensor) -> Tensor:
        first, second = halves(layer, hidden)
        return silu(second) * first if up_first else silu(first) * second

    mlp = found(compute, a=2 * WIDTH)
    assert (mlp.inputs[0].stacked, mlp.up_first, mlp.width) == (2, up_first, WIDTH)
    torch.testing.assert_close(silu(mlp.computed[0]) * mlp.computed[1], mlp.activation)


NO_MLPS: dict[str, Callable[[Layer, Tensor], Tensor]] = {
    "a norm over the neurons": lambda m, x: nn.functional.rms_norm(torch.relu(m.a(x)), (WIDTH,)),
    "neurons that mix tokens": lambda m, x: torch.relu(m.a(x)).cumsum(1),
    "a gate on something else": lambda m, x: silu(m.a(x)) * x[..., :WIDTH],
    "no activation": lambda m, x: m.a(x),
    "channels in another order": lambda m, x: torch.relu(m.a(x)).flip(-1),
}


@pytest.mark.parametrize("compute", NO_MLPS.values(), ids=NO_MLPS)
def test_what_looks_like_an_mlp_and_is_none_is_not_found(
    compute: Callable[[Layer, Tensor], Tensor],
) -> None:
    with pytest.raises(NotFound, match="no MLP of neurons"):
        find_structure(Model(compute, {"a": WIDTH}))  # type: ignore[arg-type]


def test_a_model_that_fails_a_step_is_refused_with_its_name() -> None:
    small = tiny_config(SmolLM3Config(), 2)
    family = find_family(small.to_dict())
    assert failed_step(family, small) is None
    wrong = type(family)(**{**vars(family), "inputs": family.inputs[:1]})
    assert "the neurons are put into another order" in str(failed_step(wrong, small))
    wrong = type(family)(**{**vars(family), "width_key": "max_position_embeddings"})
    assert "the cut model is saved and loaded" in str(failed_step(wrong, small))


def test_a_declared_entry_wins_and_a_mixture_is_refused_by_its_config() -> None:
    assert family_of(Qwen2Config()).name == "Qwen2"
    fields = {"model_type": "granitemoehybrid", "num_local_experts": 32}
    with pytest.raises(InvalidInput, match=r"mixture of experts \(num_local_experts=32\)"):
        refuse_obstacles(fields)
    refuse_obstacles({**fields, "num_local_experts": 0})
    assert mixture({"text_config": {"n_routed_experts": 8}}) == "n_routed_experts=8"
    assert mixture({"n_routed_experts": 8, "layers_block_type": ["mlp", "mamba"]}) is None
