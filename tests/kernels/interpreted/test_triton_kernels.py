"""Under Triton's interpreter the kernels equal the float64 reference, whatever the tile."""

from __future__ import annotations

import pytest
import torch
import triton
from kernel_cases import (
    NEURONS,
    SETS,
    TOLERANCE,
    WIDTH,
    neuron_set,
    off_reference,
    random_mlp,
    random_tokens,
    through_tile,
)
from torch import Tensor

from fbn_kernels import (
    ACTIVATIONS,
    NeuronSet,
    NeuronSets,
    ResidentMlp,
    Strategy,
    gathered_mlp,
    reference_mlp,
)
from fbn_kernels.op import one_set
from fbn_kernels.tuning import INTERPRETED, DownTile, HiddenTile, Tile, load_table

dtypes = pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)

SMALL = HiddenTile(16, 64, 32, warps=4, stages=2)
WIDE = HiddenTile(16, 128, 64, warps=4, stages=2)
INTERLEAVED = HiddenTile(16, 64, 32, warps=4, stages=2, interleaved=True)


def test_the_interpreter_is_on() -> None:
    assert INTERPRETED
    assert triton.knobs.runtime.interpret


@dtypes
@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("name", SETS)
def test_every_kind_of_set_equals_the_reference(name: str, tokens: int, dtype: torch.dtype) -> None:
    mlp, x = random_mlp(dtype=dtype), random_tokens(tokens, WIDTH, dtype=dtype)
    neurons = neuron_set(name)
    found = gathered_mlp(x, mlp.up, mlp.down_t, neurons, gate=mlp.gate)
    assert off_reference(found, x, mlp, neurons) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("gated", "biased"), [(True, False), (True, True), (False, True)])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_equals_the_reference(
    activation: str, gated: bool, biased: bool, dtype: torch.dtype
) -> None:
    mlp = random_mlp(gated=gated, biased=biased, dtype=dtype, out_width=24)
    x, neurons = random_tokens(3, WIDTH, dtype=dtype), neuron_set("scattered rows")
    found = gathered_mlp(x, mlp.up, mlp.down_t, neurons, activation=activation, **mlp.options())
    assert off_reference(found, x, mlp, neurons, activation) < TOLERANCE[dtype]


@dtypes
@pytest.mark.parametrize("name", ["one neuron", "aligned blocks", "scattered rows"])
def test_a_callers_own_down_takes_the_hidden_vector(name: str, dtype: torch.dtype) -> None:
    mlp, x = random_mlp(dtype=dtype, biased=True), random_tokens(5, WIDTH, dtype=dtype)
    inputs = {key: value for key, value in mlp.options().items() if key != "down_bias"}
    alone = neuron_set(name)
    resident = ResidentMlp(mlp.up, mlp.down_t, [NeuronSet.full(NEURONS), alone], **inputs)
    resident.switch(1)
    assert resident.copied_bytes == 0
    own = mlp.down_t[resident.order(1)]
    found = resident.hidden(x) @ own + mlp.down_bias
    assert off_reference(found, x, mlp, alone) < TOLERANCE[dtype]
    sets = NeuronSets.from_sets([alone, neuron_set("a prefix")])
    batch = sets.route([1, 0, 1, 1, 0], strategy=Strategy.UNION)
    found = resident.mixed_hidden(x, batch) @ mlp.down_t[sets.union.rows()] + mlp.down_bias
    assert off_reference(found, x, mlp, batch) < TOLERANCE[dtype]


@pytest.mark.parametrize("fixup", [True, False], ids=["fixup", "reduce"])
@pytest.mark.parametrize("split", [2, 4])
@pytest.mark.parametrize("name", ["one neuron", "aligned blocks", "scattered rows"])
@pytest.mark.parametrize("hidden", [SMALL, WIDE], ids=["small", "wide"])
def test_the_splits_add_up(hidden: HiddenTile, name: str, split: int, fixup: bool) -> None:
    # With one neuron most splits are empty and must still write their zeros.
    mlp, x = random_mlp(biased=hidden is WIDE), random_tokens(19, WIDTH)
    neurons = neuron_set(name)
    down = DownTile(16, 32, 32, warps=4, stages=2, split=split, fixup=fixup)
    found = through_tile(x, mlp, neurons, Tile(hidden, down))
    assert off_reference(found, x, mlp, neurons) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
@pytest.mark.parametrize("name", ["one neuron", "a prefix", "scattered rows"])
def test_interleaving_up_and_gate_changes_nothing(
    name: str, gated: bool, dtype: torch.dtype
) -> None:
    mlp, x = random_mlp(gated=gated, biased=True, dtype=dtype), random_tokens(5, WIDTH, dtype=dtype)
    neurons = neuron_set(name)
    down = DownTile(16, 32, 32, warps=4, stages=2, split=1)
    apart, together = (
        through_tile(x, mlp, neurons, Tile(hidden, down), "gelu_tanh")
        for hidden in (SMALL, INTERLEAVED)
    )
    assert off_reference(together, x, mlp, neurons, "gelu_tanh") < TOLERANCE[dtype]
    # The interpreter multiplies with numpy: on some processors, products of another shape round otherwise.
    torch.testing.assert_close(together, apart, rtol=1e-5, atol=1e-6)


@dtypes
@pytest.mark.parametrize("strategy", Strategy)
def test_a_set_a_row_takes_every_form_of_tile(strategy: Strategy, dtype: torch.dtype) -> None:
    mlp, x = random_mlp(biased=True, dtype=dtype), random_tokens(9, WIDTH, dtype=dtype)
    sets = NeuronSets.from_sets([neuron_set(name) for name in SETS])
    batch = sets.route([4, 2, 2, 0, 3, 4, 1, 4, 4], strategy=strategy)
    down = DownTile(16, 32, 32, warps=4, stages=2, split=4, fixup=True)
    found = through_tile(x, mlp, batch, Tile(INTERLEAVED, down))
    assert off_reference(found, x, mlp, batch) < TOLERANCE[dtype]


def test_activations_may_be_a_strided_view() -> None:
    mlp, neurons = random_mlp(), neuron_set("scattered rows")
    x = random_tokens(5, 2 * WIDTH)[:, :WIDTH]
    found = gathered_mlp(x, mlp.up, mlp.down_t, neurons, gate=mlp.gate)
    assert off_reference(found, x, mlp, neurons) < TOLERANCE[torch.float32]


@dtypes
@pytest.mark.parametrize("strategy", Strategy)
@pytest.mark.parametrize("names", [list(SETS), ["aligned blocks", "aligned blocks"]], ids=len)
def test_a_set_a_row_equals_the_reference(
    names: list[str], strategy: Strategy, dtype: torch.dtype
) -> None:
    mlp, x = random_mlp(biased=True, dtype=dtype), random_tokens(9, WIDTH, dtype=dtype)
    sets = NeuronSets.from_sets([neuron_set(name) for name in names])
    ids = [number % len(names) for number in (4, 2, 2, 0, 3, 4, 4, 4, 4)]
    batch = sets.route(ids, strategy=strategy)
    found = gathered_mlp(x, mlp.up, mlp.down_t, batch, **mlp.options())
    assert off_reference(found, x, mlp, batch) < TOLERANCE[dtype]


@pytest.mark.parametrize("strategy", [None, *Strategy])
def test_gradients_are_the_references(strategy: Strategy | None) -> None:
    mlp, x = random_mlp(biased=True), random_tokens(3, WIDTH).requires_grad_()
    neurons = neuron_set("scattered rows")
    if strategy is not None:
        sets = NeuronSets.from_sets([neurons, neuron_set("a prefix")])
        neurons = sets.route([0, 1, 0], strategy=strategy)
    tensors = [x, *(one.requires_grad_() for one in mlp.tensors())]
    weight = random_tokens(3, WIDTH, seed=2)
    grads = []
    for run in (gathered_mlp, reference_mlp):
        out = run(x, mlp.up, mlp.down_t, neurons, **mlp.options())
        grads.append(torch.autograd.grad((out * weight).sum(), tensors))
    for found, expected in zip(*grads, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_the_operator_is_well_behaved() -> None:
    mlp, neurons = random_mlp(), neuron_set("scattered rows")
    x = random_tokens(3, WIDTH).requires_grad_()
    none = (None,) * 5
    inputs = (x, mlp.up, mlp.gate, mlp.down_t, neurons.indices, *none)
    torch.library.opcheck(one_set, (*inputs, "silu", neurons.count, neurons.kind.value, True))


def test_a_compiled_caller_sees_one_graph_and_the_same_numbers() -> None:
    mlp, x, neurons = random_mlp(), random_tokens(3, WIDTH), neuron_set("scattered rows")

    def call(x: Tensor) -> Tensor:
        return gathered_mlp(x + 1, mlp.up, mlp.down_t, neurons, gate=mlp.gate) * 2

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), call(x))


def test_what_the_kernels_cannot_take_is_refused() -> None:
    mlp, x, neurons = random_mlp(), random_tokens(3, WIDTH), neuron_set("scattered rows")
    with pytest.raises(TypeError, match=r"float32, bfloat16 or float16, got torch\.float64"):
        gathered_mlp(x.double(), mlp.up, mlp.down_t, neurons)
    with pytest.raises(TypeError, match=r"up is torch\.float32, x is torch\.bfloat16"):
        gathered_mlp(x.bfloat16(), mlp.up, mlp.down_t, neurons)
    with pytest.raises(ValueError, match="down_t must be stored row by row"):
        gathered_mlp(x, mlp.up, mlp.down_t.t().contiguous().t(), neurons)


def test_no_rows_give_no_rows() -> None:
    mlp = random_mlp()
    out = gathered_mlp(torch.empty(0, WIDTH), mlp.up, mlp.down_t, neuron_set("a prefix"))
    assert out.shape == (0, WIDTH)


@pytest.mark.slow
@pytest.mark.parametrize("device", ["sm_80", "sm_90", "gfx942"])
@pytest.mark.parametrize("tokens", [3, 31, 130])
@dtypes
def test_every_tile_of_the_tables_equals_the_reference(
    dtype: torch.dtype, tokens: int, device: str
) -> None:
    neurons_total, width = 512, 320
    mlp = random_mlp(dtype=dtype, neurons=neurons_total, width=width)
    neurons = NeuronSet.from_indices(list(range(1, neurons_total, 3)), neurons_total)
    x = random_tokens(tokens, width, dtype=dtype)
    tile = load_table(device).find(tokens, neurons.count, width, dtype, neurons.kind)
    found = through_tile(x, mlp, neurons, tile)
    assert off_reference(found, x, mlp, neurons) < TOLERANCE[dtype]


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [200, 400])
def test_many_rows_over_many_sets(tokens: int) -> None:
    mlp, x = random_mlp(), random_tokens(tokens, WIDTH)
    sets = NeuronSets.from_sets(
        [NeuronSet.from_indices(list(range(n, n + 40)), NEURONS) for n in (0, 50, 60)]
    )
    batch = sets.route(torch.arange(tokens) % 3, strategy=Strategy.ROUTED)
    found = gathered_mlp(x, mlp.up, mlp.down_t, batch, gate=mlp.gate)
    assert off_reference(found, x, mlp, batch) < TOLERANCE[torch.float32]
