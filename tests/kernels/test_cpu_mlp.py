"""On a CPU the gathered MLP equals the float64 reference, and keeps copies only within bounds."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from kernel_cases import (
    NEURONS,
    SETS,
    TOLERANCE,
    WIDTH,
    neuron_set,
    off_reference,
    random_mlp,
    random_tokens,
)
from torch import Tensor

import fbn_kernels
from fbn_kernels import (
    ACTIVATIONS,
    NeuronBatch,
    NeuronSet,
    NeuronSets,
    ResidentMlp,
    Strategy,
    compact_cache,
    cpu,
    gathered_hidden,
    gathered_mlp,
)
from fbn_kernels.cpu import DEFAULT_LIMIT_BYTES
from fbn_kernels.op import many_sets, one_set

dtypes = pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)


@pytest.fixture(autouse=True)
def empty_cache() -> Iterator[None]:
    compact_cache.clear()
    yield
    compact_cache.clear()
    compact_cache.limit_bytes = DEFAULT_LIMIT_BYTES


@dtypes
@pytest.mark.parametrize("tokens", [1, 7])
@pytest.mark.parametrize("name", SETS)
def test_every_kind_of_set_equals_the_reference(name: str, tokens: int, dtype: torch.dtype) -> None:
    mlp, x = random_mlp(dtype=dtype, biased=True), random_tokens(tokens, WIDTH, dtype=dtype)
    neurons = neuron_set(name)
    found = gathered_mlp(x, mlp.up, mlp.down_t, neurons, **mlp.options())
    assert off_reference(found, x, mlp, neurons) < TOLERANCE[dtype]


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("activation", [*ACTIVATIONS, "gelu_pytorch_tanh"])
def test_every_activation_equals_the_reference(activation: str, gated: bool) -> None:
    mlp, x = random_mlp(gated=gated, out_width=24), random_tokens(2, 3, WIDTH)
    neurons = neuron_set("scattered rows")
    found = gathered_mlp(x, mlp.up, mlp.down_t, neurons, activation=activation, **mlp.options())
    assert found.shape == (2, 3, 24)
    assert off_reference(found, x, mlp, neurons, activation) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("strategy", Strategy)
def test_a_set_a_row_equals_each_row_alone(strategy: Strategy) -> None:
    mlp, x = random_mlp(biased=True), random_tokens(5, 3, WIDTH)
    names = list(SETS)
    batch = NeuronSets.from_sets([neuron_set(name) for name in names]).route(
        [4, 2, 2, 0, 3], tokens_per_row=3, strategy=strategy
    )
    found = gathered_mlp(x, mlp.up, mlp.down_t, batch, **mlp.options())
    for row, number in enumerate([4, 2, 2, 0, 3]):
        alone = gathered_mlp(x[row], mlp.up, mlp.down_t, neuron_set(names[number]), **mlp.options())
        torch.testing.assert_close(found[row], alone, rtol=1e-5, atol=1e-6)


def gradients_are_right(
    neurons: NeuronSet | NeuronBatch, gated: bool = True, activation: str = "silu"
) -> bool:
    mlp = random_mlp(gated=gated, biased=True, neurons=7, width=4).double()
    tensors = [one.requires_grad_() for one in mlp.tensors()]
    x = random_tokens(3, 4).double().requires_grad_()

    def run(x: Tensor, *_: Tensor) -> Tensor:
        return gathered_mlp(x, mlp.up, mlp.down_t, neurons, activation=activation, **mlp.options())

    return torch.autograd.gradcheck(run, (x, *tensors))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("kept", [[0, 1, 2], [1, 4, 5]], ids=["a prefix", "scattered rows"])
def test_gradients_are_those_of_the_function(kept: list[int], gated: bool, activation: str) -> None:
    assert gradients_are_right(NeuronSet.from_indices(kept, 7), gated, activation)


@pytest.mark.parametrize("strategy", Strategy)
def test_gradients_of_a_set_a_row(strategy: Strategy) -> None:
    sets = NeuronSets.from_sets([NeuronSet.from_indices(one, 7) for one in ([0, 1], [1, 4, 5])])
    assert gradients_are_right(sets.route([1, 0, 1], strategy=strategy))


def operator_inputs(
    strategy: Strategy, grad: bool
) -> tuple[torch.library.CustomOpDef, tuple[object, ...]]:
    mlp, x = random_mlp(biased=True), random_tokens(3, WIDTH).requires_grad_(grad)
    for one in mlp.tensors():
        one.requires_grad_(grad)
    sets = NeuronSets.from_sets([neuron_set("a prefix"), neuron_set("scattered rows")])
    batch = sets.route([1, 0, 1])
    shared = (
        *(x, mlp.up, mlp.gate, mlp.down_t, sets.union.indices),
        *(mlp.up_bias, mlp.gate_bias, mlp.down_bias, sets.membership, batch.set_ids),
    )
    union = ("silu", sets.union.count)
    if strategy is Strategy.UNION:
        return one_set, (*shared, *union, sets.union.kind.value, True)
    routed = (sets.indices, sets.table, batch.order, batch.tiles)
    return many_sets, (*shared, *routed, *union, "rows", sets.largest, batch.block_rows, True)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("strategy", Strategy)
def test_the_operators_are_well_behaved(strategy: Strategy, grad: bool) -> None:
    operator, inputs = operator_inputs(strategy, grad)
    torch.library.opcheck(operator, inputs)


@pytest.mark.parametrize("name", ["a prefix", "scattered rows"])
def test_a_compiled_caller_sees_one_graph_and_the_same_numbers(name: str) -> None:
    mlp, x, neurons = random_mlp(), random_tokens(3, WIDTH), neuron_set(name)

    def call(x: Tensor) -> Tensor:
        return gathered_mlp(x + 1, mlp.up, mlp.down_t, neurons, gate=mlp.gate) * 2

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), call(x))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="the default compiler needs g++")
def test_the_default_compiler_gives_the_same_numbers_and_gradients() -> None:
    mlp, x, neurons = random_mlp(), random_tokens(3, WIDTH), neuron_set("scattered rows")
    batch = NeuronSets.from_sets([neurons, neuron_set("a prefix")]).route([0, 1, 1])
    mlp.up.requires_grad_()

    def call(x: Tensor) -> Tensor:
        one = gathered_mlp(x + 1, mlp.up, mlp.down_t, neurons, gate=mlp.gate)
        return gathered_mlp(one, mlp.up, mlp.down_t, batch, gate=mlp.gate) * 2

    compiled = torch.compile(call, fullgraph=True)
    # It would compile a program to see whether the processor can do what it says it can.
    with torch._inductor.config.patch({"cpp.vec_isa_ok": True}):
        torch.testing.assert_close(compiled(x), call(x))
        grads = [torch.autograd.grad(run(x).square().sum(), mlp.up)[0] for run in (compiled, call)]
    torch.testing.assert_close(*grads)


def test_long_runs_are_read_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    mlp, x = random_mlp(), random_tokens(2, WIDTH)
    for name in ("a prefix", "all neurons"):
        gathered_mlp(x, mlp.up, mlp.down_t, neuron_set(name), gate=mlp.gate)
    monkeypatch.setattr(cpu, "LONG_RUN_BYTES", 64 * WIDTH * 4)
    gathered_mlp(x, mlp.up, mlp.down_t, neuron_set("aligned blocks"), gate=mlp.gate)
    assert compact_cache.nbytes == 0


@dtypes
@pytest.mark.parametrize("tokens", [1, 9])
def test_long_runs_and_loose_rows_make_one_set(
    monkeypatch: pytest.MonkeyPatch, tokens: int, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(cpu, "LONG_RUN_BYTES", 30 * WIDTH * dtype.itemsize)
    mlp, x = random_mlp(dtype=dtype, biased=True), random_tokens(tokens, WIDTH, dtype=dtype)
    kept = [1, 3, *range(40, 80), 90, *range(100, 150), 190]
    neurons = NeuronSet.from_indices(kept, NEURONS)
    found = gathered_mlp(x, mlp.up, mlp.down_t, neurons, **mlp.options())
    assert off_reference(found, x, mlp, neurons) < TOLERANCE[dtype]
    assert mlp.gate is not None
    # Four rows are loose; up and gate of each are copied, with their biases.
    assert compact_cache.nbytes == 4 * 2 * (WIDTH + 1) * dtype.itemsize
    inputs = {name: value for name, value in mlp.options().items() if name != "down_bias"}
    hidden = gathered_hidden(x, mlp.up, neurons, **inputs)
    rows = neurons.rows()
    again = torch.nn.functional.linear(hidden, mlp.down_t[rows].t(), mlp.down_bias)
    assert off_reference(again, x, mlp, neurons) < TOLERANCE[dtype]


def test_scattered_rows_are_copied_once_and_the_least_used_copy_goes_first() -> None:
    mlp, x = random_mlp(), random_tokens(2, WIDTH)
    sets = [NeuronSet.from_indices(list(range(n, n + 65, 2)), NEURONS) for n in (1, 21, 41)]
    each = 2 * len(sets[0]) * WIDTH * 4

    def run(number: int) -> None:
        gathered_mlp(x, mlp.up, mlp.down_t, sets[number], gate=mlp.gate)

    compact_cache.limit_bytes = 2 * each
    run(0)
    run(0)
    assert (len(compact_cache), compact_cache.nbytes) == (1, each)
    run(1)
    run(0)
    run(2)
    assert compact_cache.nbytes == 2 * each
    mlp.up.zero_()
    compact_cache.limit_bytes = 0
    assert (len(compact_cache), compact_cache.nbytes) == (0, 0)
    run(1)
    assert compact_cache.nbytes == 0


def test_a_weight_written_in_place_is_copied_again() -> None:
    mlp, x, neurons = random_mlp(), random_tokens(2, WIDTH), neuron_set("scattered rows")
    before = gathered_mlp(x, mlp.up, mlp.down_t, neurons, gate=mlp.gate)
    mlp.up.mul_(2)
    after = gathered_mlp(x, mlp.up, mlp.down_t, neurons, gate=mlp.gate)
    torch.testing.assert_close(after, 2 * before)
    assert len(compact_cache) == 1


def test_weights_being_trained_are_not_kept() -> None:
    mlp, x = random_mlp(), random_tokens(2, WIDTH)
    mlp.up.requires_grad_()
    gathered_mlp(x, mlp.up, mlp.down_t, neuron_set("scattered rows"), gate=mlp.gate)
    assert len(compact_cache) == 0
    with torch.no_grad():
        gathered_mlp(x, mlp.up, mlp.down_t, neuron_set("scattered rows"), gate=mlp.gate)
    assert len(compact_cache) == 1


def test_copies_of_freed_weights_go() -> None:
    x = random_tokens(2, WIDTH)
    for seed in range(4):
        mlp = random_mlp(seed=seed)
        gathered_mlp(x, mlp.up, mlp.down_t, neuron_set("scattered rows"), gate=mlp.gate)
    assert len(compact_cache) == 1


def test_a_resident_mlp_has_room_for_one_set_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "LONG_RUN_BYTES", 30 * WIDTH * 4)
    mlp, x = random_mlp(biased=True), random_tokens(3, WIDTH)
    inputs = {name: value for name, value in mlp.options().items() if name != "down_bias"}
    sets = [neuron_set("a prefix"), neuron_set("scattered rows"), neuron_set("one neuron")]
    sets.append(NeuronSet.from_indices([1, *range(40, 80), 90], NEURONS))
    resident = ResidentMlp(mlp.up, mlp.down_t, sets, **inputs)
    assert resident.copied_bytes == 0
    for number in (0, 1, 3, 2, 1):
        resident.switch(number)
        expected = gathered_mlp(x, mlp.up, mlp.down_t, sets[number], **inputs)
        torch.testing.assert_close(resident(x), expected)
        own = mlp.down_t[resident.order(number)]
        torch.testing.assert_close(resident.hidden(x) @ own, expected)
    assert resident.copied_bytes == resident.room_bytes == len(sets[1]) * 2 * (WIDTH + 1) * 4


def test_down_may_be_a_view_of_an_ordinary_weight() -> None:
    mlp, x = random_mlp(), random_tokens(1, WIDTH)
    ordinary = mlp.down_t.t().contiguous()
    for name in SETS:
        neurons = neuron_set(name)
        stored = gathered_mlp(x, mlp.up, mlp.down_t, neurons, gate=mlp.gate)
        viewed = gathered_mlp(x, mlp.up, ordinary.t(), neurons, gate=mlp.gate)
        torch.testing.assert_close(viewed, stored)


def test_no_rows_give_no_rows() -> None:
    mlp = random_mlp()
    for name in SETS:
        out = gathered_mlp(torch.empty(0, WIDTH), mlp.up, mlp.down_t, neuron_set(name))
        assert out.shape == (0, WIDTH)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 5)}, "does not fit up"),
        ({"neurons": NeuronSet.full(7)}, "an MLP of 7 neurons, up has 192"),
        ({"down_t": torch.zeros(WIDTH, NEURONS)}, "must be down transposed"),
        ({"gate": torch.zeros(3, WIDTH)}, "differs from up"),
        ({"gate_bias": torch.zeros(NEURONS)}, "gate_bias is given without gate"),
        ({"down_bias": torch.zeros(3)}, r"down_bias \[3\] must be \[40\]"),
        ({"activation": "tanh"}, "activation 'tanh' is not one of"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, object], message: str) -> None:
    mlp = random_mlp()
    call = {"x": torch.zeros(2, WIDTH), "up": mlp.up, "down_t": mlp.down_t}
    call |= {"neurons": neuron_set("a prefix")}
    with pytest.raises(ValueError, match=message):
        gathered_mlp(**(call | change))


def test_a_batch_of_another_length_is_refused() -> None:
    mlp = random_mlp()
    batch = NeuronSets.from_sets([neuron_set("a prefix")]).route([0, 0, 0])
    with pytest.raises(ValueError, match="the batch routes 3 rows, x has 2"):
        gathered_mlp(torch.zeros(2, WIDTH), mlp.up, mlp.down_t, batch)


def test_the_package_works_where_triton_is_not_installed() -> None:
    program = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, fbn_kernels as f\n"
        "w = torch.ones(4, 2)\n"
        "print(f.gathered_mlp(torch.ones(1, 2), w, w, f.NeuronSet.from_indices([1, 3], 4),"
        " activation='relu').tolist())"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(fbn_kernels.__file__).parents[1],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "[[4.0, 4.0]]"
