"""On a GPU the compiled kernels equal the float64 reference, also from a CUDA graph and torch.compile."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import (
    NEURONS,
    SETS,
    TOLERANCE,
    WIDTH,
    Mlp,
    neuron_set,
    off_reference,
    random_mlp,
    random_tokens,
    through_tile,
)
from torch import Tensor

from fbn_kernels import ACTIVATIONS, NeuronSet, NeuronSets, Strategy, gathered_mlp, reference_mlp
from fbn_kernels.op import one_set
from fbn_kernels.tuning import DownTile, HiddenTile, Tile

if not torch.cuda.is_available():
    pytest.skip("there is no GPU", allow_module_level=True)

dtypes = pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)


@pytest.fixture(autouse=True)
def undetermined() -> None:
    # cuBLAS, in the backward pass, asks for a setting of the environment otherwise.
    torch.use_deterministic_algorithms(False)


def on_gpu(mlp: Mlp) -> Mlp:
    return Mlp(*(None if one is None else one.cuda() for one in vars(mlp).values()))


@dtypes
@pytest.mark.parametrize("tokens", [1, 5, 16, 33, 100, 300])
@pytest.mark.parametrize("name", SETS)
def test_every_kind_of_set_equals_the_reference(name: str, tokens: int, dtype: torch.dtype) -> None:
    mlp = on_gpu(random_mlp(dtype=dtype))
    x, neurons = random_tokens(tokens, WIDTH, dtype=dtype).cuda(), neuron_set(name).to("cuda")
    found = gathered_mlp(x, mlp.up, mlp.down_t, neurons, gate=mlp.gate)
    assert off_reference(found, x, mlp, neurons) < TOLERANCE[dtype]


@dtypes
@pytest.mark.parametrize("tokens", [3, 700])
def test_a_wide_mlp_equals_the_reference(tokens: int, dtype: torch.dtype) -> None:
    # Wide enough for the pipelined, unmasked form of the kernels.
    mlp = on_gpu(random_mlp(dtype=dtype, neurons=2048, width=1024))
    neurons = NeuronSet.from_indices(list(range(5, 2048, 2)), 2048).to("cuda")
    x = random_tokens(tokens, 1024, dtype=dtype).cuda()
    found = gathered_mlp(x, mlp.up, mlp.down_t, neurons, gate=mlp.gate)
    assert off_reference(found, x, mlp, neurons) < TOLERANCE[dtype]
    again = gathered_mlp(x, mlp.up, mlp.down_t, neurons, gate=mlp.gate)
    torch.testing.assert_close(found, again, rtol=0, atol=0)


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_equals_the_reference(activation: str, gated: bool, biased: bool) -> None:
    dtype = torch.bfloat16
    mlp = on_gpu(random_mlp(gated=gated, biased=biased, dtype=dtype, out_width=24))
    x = random_tokens(3, WIDTH, dtype=dtype).cuda()
    neurons = neuron_set("scattered rows").to("cuda")
    found = gathered_mlp(x, mlp.up, mlp.down_t, neurons, activation=activation, **mlp.options())
    assert off_reference(found, x, mlp, neurons, activation) < TOLERANCE[dtype]


@dtypes
@pytest.mark.parametrize("rows", [9, 400])
@pytest.mark.parametrize("strategy", Strategy)
def test_a_set_a_row_equals_the_reference(
    strategy: Strategy, rows: int, dtype: torch.dtype
) -> None:
    mlp = on_gpu(random_mlp(biased=True, dtype=dtype))
    x = random_tokens(rows, WIDTH, dtype=dtype).cuda()
    sets = NeuronSets.from_sets([neuron_set(name) for name in SETS]).to("cuda")
    batch = sets.route(torch.arange(rows, device="cuda") * 7 % len(SETS), strategy=strategy)
    found = gathered_mlp(x, mlp.up, mlp.down_t, batch, **mlp.options())
    assert off_reference(found, x, mlp, batch) < TOLERANCE[dtype]


def test_gradients_are_the_references() -> None:
    mlp, x = on_gpu(random_mlp(biased=True)), random_tokens(3, WIDTH).cuda().requires_grad_()
    neurons = neuron_set("scattered rows").to("cuda")
    tensors = [x, *(one.requires_grad_() for one in mlp.tensors())]
    grads = []
    for run in (gathered_mlp, reference_mlp):
        out = run(x, mlp.up, mlp.down_t, neurons, **mlp.options())
        grads.append(torch.autograd.grad((out * out).sum(), tensors))
    for found, expected in zip(*grads, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("strategy", [None, *Strategy])
def test_a_graph_replays_the_same_numbers(strategy: Strategy | None) -> None:
    mlp, x = on_gpu(random_mlp(dtype=torch.bfloat16)), random_tokens(6, WIDTH).cuda().bfloat16()
    one = neuron_set("scattered rows").to("cuda")
    sets = NeuronSets.from_sets([one, NeuronSet.full(NEURONS, "cuda")])
    ids = torch.tensor([0, 1, 1, 0, 1, 0], device="cuda")

    def call() -> Tensor:
        neurons = one if strategy is None else sets.route(ids, strategy=strategy)
        return gathered_mlp(x, mlp.up, mlp.down_t, neurons, gate=mlp.gate)

    expected = call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = call()
    found.fill_(float("nan"))
    graph.replay()
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_the_operator_is_well_behaved() -> None:
    mlp, neurons = on_gpu(random_mlp()), neuron_set("scattered rows").to("cuda")
    x = random_tokens(3, WIDTH).cuda().requires_grad_()
    inputs = (x, mlp.up, mlp.gate, mlp.down_t, neurons.indices, *(None,) * 5)
    torch.library.opcheck(one_set, (*inputs, "silu", neurons.count, neurons.kind.value, True))


def test_a_compiled_caller_sees_one_graph_and_the_same_numbers() -> None:
    mlp, neurons = on_gpu(random_mlp()), neuron_set("scattered rows").to("cuda")
    x = random_tokens(3, WIDTH).cuda()

    def call(x: Tensor) -> Tensor:
        return gathered_mlp(x + 1, mlp.up, mlp.down_t, neurons, gate=mlp.gate) * 2

    compiled = torch.compile(call, fullgraph=True)
    torch.testing.assert_close(compiled(x), call(x))


@pytest.mark.parametrize("tokens", [3, 33])
def test_a_prefix_is_the_same_through_the_kernels_and_through_views(tokens: int) -> None:
    mlp, neurons = on_gpu(random_mlp(biased=True, dtype=torch.bfloat16)), neuron_set("a prefix")
    x = random_tokens(tokens, WIDTH, dtype=torch.bfloat16).cuda()
    for one in mlp.tensors():
        one.requires_grad_()
    neurons = neurons.to("cuda")
    views = gathered_mlp(x, mlp.up, mlp.down_t, neurons, **mlp.options())
    with torch.no_grad():
        found = gathered_mlp(x, mlp.up, mlp.down_t, neurons, **mlp.options())
    assert off_reference(views, x, mlp, neurons) < TOLERANCE[torch.bfloat16]
    assert off_reference(found, x, mlp, neurons) < TOLERANCE[torch.bfloat16]


@dtypes
@pytest.mark.parametrize("strategy", [None, *Strategy])
@pytest.mark.parametrize(
    ("rows", "split", "fixup"), [(16, 4, True), (64, 8, True), (128, 1, False)]
)
def test_every_form_of_tile_equals_the_reference_and_itself(
    rows: int, split: int, fixup: bool, strategy: Strategy | None, dtype: torch.dtype
) -> None:
    # Run again and again: a race between the programs that add up would show.
    width, total, tokens = 512, 1024, 150
    mlp = on_gpu(random_mlp(dtype=dtype, neurons=total, width=width))
    x = random_tokens(tokens, width, dtype=dtype).cuda()
    sets = NeuronSets.from_sets(
        [NeuronSet.from_indices(range(n, total, 3), total) for n in range(3)]
    ).to("cuda")
    ids = torch.arange(tokens, device="cuda") % 3
    batch = sets.route(ids, strategy=strategy)
    through = sets.sets[0] if strategy is None else batch
    half = 32 if dtype is torch.float32 else 64
    tile = Tile(
        HiddenTile(rows, half, half, warps=4, stages=2, interleaved=True),
        DownTile(rows, half, half, warps=4, stages=2, split=split, fixup=fixup),
    )
    outputs = [through_tile(x, mlp, through, tile) for _ in range(20)]
    for found in outputs:
        assert off_reference(found, x, mlp, through) < TOLERANCE[dtype]
        torch.testing.assert_close(found, outputs[0], rtol=0, atol=0)
