"""Claims about which GPU holds which layer: what fits is found, nothing is too full, and the dry run says it."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations_with_replacement
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import FAMILY_CONFIGS, LAYERS, PATHS, make_model, save_tiny

from fbn_prune.model.checkpoint import Checkpoint
from fbn_prune.model.families import family_of
from fbn_prune.model.placement import device_map, layer_bytes, place_layers
from fbn_prune.recipe import Recipe, build_recipe
from fbn_prune.runs import memory
from fbn_prune.runs.memory import PROCESS_BYTES, MemoryPlan, plan_memory, possible_plans

CUDA = torch.device("cuda")

sizes = st.integers(0, 40)


def spare(
    placement: tuple[int, ...], layers: list[int], rest: int, room: list[int]
) -> dict[int, int]:
    """Bytes left on each device that holds something."""
    left = {device: room[device] for device in {0, *placement}}
    left[0] -= rest
    for device, size in zip(placement, layers, strict=True):
        left[device] -= size
    return left


@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=6),
    sizes,
    st.lists(st.integers(-5, 120), max_size=4),
)
def test_a_placement_is_found_where_there_is_one_and_leaves_the_most_room(
    layers: list[int], rest: int, room: list[int]
) -> None:
    found = place_layers(layers, rest, room)
    possible = [
        min(spare(placement, layers, rest, room).values())
        for placement in combinations_with_replacement(range(len(room)), len(layers))
    ]
    if found is None:
        assert all(left < 0 for left in possible)
        return
    assert len(found) == len(layers)
    assert list(found) == sorted(found)
    assert min(spare(found, layers, rest, room).values()) == max(possible)


@given(st.integers(2, 4), st.integers(2, 30), st.integers(1, 10**10))
def test_equal_layers_on_equal_devices_are_shared_out_evenly(
    devices: int, layers: int, size: int
) -> None:
    found = place_layers([size] * layers, 0, [layers * size] * devices)
    assert found is not None
    counts = [found.count(device) for device in range(devices)]
    assert max(counts) == -(-layers // devices)


@pytest.mark.parametrize("name", FAMILY_CONFIGS)
def test_every_weight_has_its_device_and_a_layer_has_one(name: str) -> None:
    model = make_model(name)
    family = family_of(model.config)
    layers = [torch.device("cuda", index) for index in (0, 1, 1)]
    places = device_map(model, family, layers, torch.device("cuda", 0))
    for parameter, _ in model.named_parameters():
        (module,) = [key for key in places if parameter.startswith(f"{key}.")]
        layer = family.layer_of(parameter)
        assert places[module] == ("cuda:0" if layer is None else str(layers[layer]))


@pytest.mark.parametrize("name", [*PATHS, "llama-tied"])
def test_layers_and_all_else_are_the_whole_checkpoint(name: str, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(save_tiny(tmp_path / "model", name))
    layers, rest = layer_bytes(checkpoint, torch.bfloat16)
    assert len(layers) == LAYERS
    assert len(set(layers)) == 1
    assert sum(layers) + rest == 2 * checkpoint.total_parameters


class Machine:
    """A machine with GPUs of which so many bytes are free, as far as planning asks."""

    def __init__(self, patch: pytest.MonkeyPatch, model: Path) -> None:
        patch.setattr(memory, "PROCESS_BYTES", 0)  # else it is all that counts in a tiny model
        patch.setattr(torch.cuda, "device_count", lambda: len(self.free))
        index = lambda gpu: gpu if isinstance(gpu, int) else gpu.index or 0  # noqa: E731
        patch.setattr(torch.cuda, "mem_get_info", lambda gpu: (self.free[index(gpu)], 10**12))
        self.free: list[int] = [10**12]
        self.model = model
        self.checkpoint = Checkpoint.open(model)

    def recipe(self, **changes: object) -> Recipe:
        small = {"tokens": 400, "network_tokens": 300, "networks": 5, "keep_networks": 3}
        return build_recipe(
            {"model": str(self.model), "calibration": ["builtin"]} | small | changes
        )

    def plan(self, device: torch.device = CUDA, **changes: object) -> MemoryPlan:
        return plan_memory(self.recipe(**changes), self.checkpoint, device, torch.float32, 48)

    def least_whole(self, **changes: object) -> int:
        plans = possible_plans(self.recipe(**changes), self.checkpoint, CUDA, torch.float32, 48)
        return min(p.peak_bytes for p in plans if not p.streamed and p.placement is None)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tiny: Path) -> Machine:
    return Machine(monkeypatch, tiny)


def test_a_model_that_one_gpu_holds_stays_on_it(machine: Machine) -> None:
    machine.free = [machine.least_whole(), 10**12]
    assert machine.plan().placement is None
    assert not machine.plan().streamed


def test_a_model_too_large_for_one_gpu_is_spread_and_the_plan_says_where(machine: Machine) -> None:
    machine.free = [machine.least_whole() - 1] * 2
    planned = machine.plan()
    assert not planned.streamed
    assert planned.placement is not None
    assert planned.words.startswith("the model in memory, spread over several GPUs (")
    assert replace(planned, placement=(0, 0, 1)).words.endswith("(2 layers on GPU 0, 1 on GPU 1)")


def test_a_budget_larger_than_a_gpu_is_for_all_of_them(machine: Machine) -> None:
    least = machine.least_whole()
    machine.free = [least - 1] * 2
    assert machine.plan(memory_budget="1GB").placement is not None
    assert machine.plan(memory_budget=f"{least - 1}B").streamed


def test_a_gpu_that_was_named_is_the_only_one(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.free = [machine.least_whole() - 1] * 2
    assert machine.plan(torch.device("cuda:1")).streamed
    monkeypatch.setenv("WORLD_SIZE", "2")  # a launcher gives each process a GPU of its own
    assert machine.plan().streamed


def test_what_all_gpus_together_do_not_hold_is_streamed(machine: Machine) -> None:
    layers, rest = layer_bytes(machine.checkpoint, torch.float32)
    beside = machine.least_whole() - sum(layers) - rest
    machine.free = [beside + max(layers[0], rest) - 1] * 2
    assert machine.plan().streamed


@pytest.mark.parametrize("changes", [{"loss_aware": True}, {"recover": True}], ids=str)
def test_training_is_spread_too_with_room_for_both_models(
    machine: Machine, changes: dict[str, object]
) -> None:
    machine.free = [machine.least_whole(**changes) - 1] * 2
    planned = machine.plan(**changes)
    assert planned.placement is not None
    layers, rest = layer_bytes(machine.checkpoint, torch.float32)
    copies = 2 if "recover" in changes else 1
    left = spare(planned.placement, [copies * n for n in layers], copies * rest, machine.free)
    stage = max(planned.stages, key=planned.stages.__getitem__)
    weights = (sum(layers) + rest) * (copies if stage == "recovery" else 1)
    assert min(left.values()) >= planned.stages[stage] - weights


def test_a_training_that_does_not_fit_computes_activations_again_before_the_model_is_spread(
    machine: Machine,
) -> None:
    training = {"recover": True, "recover_steps": "distil", "tokens": 2048}
    machine.free = [10**12]
    plan = machine.plan(**training)
    assert not plan.recompute
    assert max(plan.stages, key=plan.stages.__getitem__) == "recovery"
    machine.free = [plan.peak_bytes - PROCESS_BYTES - 1] * 2
    smaller = machine.plan(**training)
    assert smaller.recompute
    assert smaller.placement is None
    assert smaller.stages["recovery"] < plan.stages["recovery"]
    assert "computed again" in smaller.words
    assert not machine.plan(**{**training, "recover_steps": "match"}).recompute
