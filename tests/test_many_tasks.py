"""Claims about serving: every task is the model with the other neurons silent, and nothing is left behind."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import FAMILY_CONFIGS, HIDDEN, LAYERS, PATHS, make_model
from torch import Tensor
from transformers import PreTrainedModel

from fbn_kernels import cpu
from fbn_prune.errors import InvalidInput
from fbn_prune.model.adapter import ModelAdapter
from fbn_prune.model.families import family_of
from fbn_prune.model.kept_neurons import KeptNeurons
from fbn_prune.networks.interventions import retained
from fbn_prune.serving import FullDown, LowRankDown, TaskSet, attach, attachment
from fbn_prune.serving.arrangement import inverse, together

PROMPTS = torch.arange(3, 21).view(2, 9)


@torch.no_grad()
def logits(model: PreTrainedModel, ids: Tensor = PROMPTS, **more: Any) -> Tensor:
    return model(ids, use_cache=False, **more).logits


def three_tasks(model: PreTrainedModel) -> dict[str, list[Tensor]]:
    width = family_of(model.config).width(model.config)
    generator = torch.Generator().manual_seed(0)
    return {
        task: [torch.rand(width, generator=generator) < share for _ in range(LAYERS)]
        for task, share in (("code", 0.5), ("prose", 0.5), ("sums", 0.2))
    }


def alone(model: PreTrainedModel, masks: list[Tensor], ids: Tensor = PROMPTS) -> Tensor:
    """Logits of the model with all but these neurons silent."""
    with retained(ModelAdapter(model), masks):
        return logits(model, ids)


def corrected(masks: list[Tensor], seed: int, make: Callable[[int], Any], bias: bool) -> TaskSet:
    generator = torch.Generator().manual_seed(seed)
    neurons = KeptNeurons.from_masks(masks)
    own_bias = [torch.randn(HIDDEN, generator=generator) if bias else None for _ in masks]
    return TaskSet(neurons, tuple(make(len(kept)) for kept in neurons.kept), tuple(own_bias))


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [*PATHS, "llama-mlp-bias", "gemma2", "falcon"])
def test_a_task_is_the_model_with_the_other_neurons_silent(name: str) -> None:
    model = make_model(name)
    tasks = three_tasks(model)
    expected = {task: alone(model, masks) for task, masks in tasks.items()}
    whole = logits(model)
    with attach(model, tasks) as served:
        close(logits(model), whole)
        for task in ("sums", "code", "prose", "code"):
            with model.networks(task):
                close(logits(model), expected[task])
        ids = served.ids(["sums", "code"])
        mixed = logits(model, network_ids=ids)
        close(mixed, torch.stack([expected["sums"][0], expected["code"][1]]))
        with served.networks(["sums", "code"]):
            close(logits(model), mixed)
        close(logits(model), whole)


@pytest.mark.parametrize("name", PATHS)
def test_detaching_restores_every_bit_even_after_an_exception(name: str) -> None:
    model = make_model(name, dtype=torch.bfloat16)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    strides = {key: value.stride() for key, value in before.items()}
    whole, own = logits(model), set(vars(model))
    tasks = three_tasks(model)

    def fails() -> None:
        with attach(model, tasks), model.networks("code"):
            assert not torch.equal(logits(model), whole)
            raise KeyError("inside")

    with pytest.raises(KeyError, match="inside"):
        fails()
    after = model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert {key: value.stride() for key, value in after.items()} == strides
    assert torch.equal(logits(model), whole)
    assert set(vars(model)) == own


def test_contexts_nest_and_an_exception_in_one_ends_the_task() -> None:
    model = make_model("llama")
    with attach(model, three_tasks(model)):
        whole = logits(model)
        with model.networks("code"):
            code = logits(model)
            with model.networks("prose"):
                assert not torch.equal(logits(model), code)
            assert torch.equal(logits(model), code)

        def fails() -> None:
            with model.networks("code"), model.networks("prose"):
                raise KeyError("inside")

        with pytest.raises(KeyError, match="inside"):
            fails()
        assert torch.equal(logits(model), whole)
        with pytest.raises(InvalidInput, match="3 rows"):
            logits(model, PROMPTS[:1].expand(3, -1), network_ids=torch.tensor([0]))
        assert torch.equal(logits(model), whole)


def test_attaching_that_fails_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("llama")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    stock, made = attachment.ServedLayer, []

    def breaks(*arguments: Any) -> object:
        if len(made) == LAYERS - 1:
            raise MemoryError
        made.append(stock(*arguments))
        return made[-1]

    monkeypatch.setattr(attachment, "ServedLayer", breaks)
    with pytest.raises(MemoryError):
        attach(model, three_tasks(model))
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())
    assert "networks" not in vars(model)


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2"])
def test_the_weights_are_in_memory_once(name: str) -> None:
    model = make_model(name)

    def stored() -> int:
        storages = {one.untyped_storage() for one in model.parameters()}
        return sum({one.data_ptr(): one.nbytes() for one in storages}.values())

    before = stored()
    with attach(model, three_tasks(model)) as served:
        assert stored() == before
        addresses = {one.untyped_storage().data_ptr() for one in model.parameters()}
        for layer in served._layers:
            for weight in (layer._mlp.up, layer._mlp.gate, layer._mlp.down_t):
                assert weight is None or weight.untyped_storage().data_ptr() in addresses
        for task in ("code", "prose", "sums"):
            with model.networks(task):
                logits(model)
        assert served.memory.copies <= attachment.COPIES_SHARE * served.memory.weights


@pytest.mark.parametrize("share", [0.0, 10.0])
@pytest.mark.parametrize("long_run", [1, 10**9])
def test_room_for_copies_changes_no_number(
    share: float, long_run: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attachment, "COPIES_SHARE", share)
    monkeypatch.setattr(cpu, "LONG_RUN_BYTES", long_run)
    model = make_model("llama-mlp-bias")
    tasks = three_tasks(model)
    expected = {task: alone(model, masks) for task, masks in tasks.items()}
    with attach(model, tasks) as served:
        for task in ("prose", "sums", "prose"):
            with model.networks(task):
                close(logits(model), expected[task])
        assert (served.memory.copies > 0) == (share > 0 and long_run > 1)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3"])
def test_tasks_may_have_output_weights_of_their_own(name: str, bias: bool) -> None:
    """Against the same correction written into the weights of the whole model."""
    model, reference = make_model(name), make_model(name)
    masks = three_tasks(model)
    full = corrected(masks["code"], 1, lambda n: FullDown(torch.randn(HIDDEN, n)), bias)
    low = corrected(
        masks["prose"], 2, lambda n: LowRankDown(torch.randn(HIDDEN, 2), torch.randn(2, n)), bias
    )
    tasks = {
        "code": full,
        "prose": low,
        "sums": TaskSet.plain(KeptNeurons.from_masks(masks["sums"])),
    }
    expected = {task: with_weights_of(reference, task_set) for task, task_set in tasks.items()}
    with attach(model, tasks) as served:
        for task in tasks:
            with model.networks(task):
                close(logits(model), expected[task])
        ids = served.ids(["code", "prose"])
        close(
            logits(model, network_ids=ids),
            torch.stack([expected["code"][0], expected["prose"][1]]),
        )
        costs = served.memory.corrections
    biases = LAYERS * HIDDEN * 4 if bias else 0
    assert costs == {
        "code": HIDDEN * full.neurons.count * 4 + biases,
        "prose": 2 * (LAYERS * HIDDEN + low.neurons.count) * 4 + biases,
        "sums": 0,
    }


@torch.no_grad()
def with_weights_of(model: PreTrainedModel, task: TaskSet) -> Tensor:
    adapter = ModelAdapter(model)
    hooks, before = [], []
    for layer, kept in enumerate(task.neurons.kept):
        weight, own = adapter.down_weight(layer), task.own_down[layer]
        before.append((weight, weight.clone()))
        new = weight[:, kept]
        if isinstance(own, FullDown):
            new = own.weight
        elif own is not None:
            new = new + own.left @ own.right
        weight.zero_()[:, kept] = new
        bias = task.own_bias[layer]
        if bias is not None:
            down = adapter.output_module(layer)
            old = 0 if down.bias is None else down.bias
            change = (bias - old).detach()
            hooks.append(down.register_forward_hook(lambda *call, change=change: call[2] + change))
    found = logits(model)
    for hook in hooks:
        hook.remove()
    for weight, old in before:
        weight.copy_(old)
    return found


def test_generate_takes_a_task_a_row_with_beams_and_a_static_cache() -> None:
    model = make_model("llama")
    how = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    mask = torch.ones_like(PROMPTS)
    with attach(model, three_tasks(model)) as served:

        def generated(row: int, task: str, **more: Any) -> Tensor:
            with model.networks(task):
                ids = PROMPTS[row : row + 1]
                return model.generate(ids, attention_mask=mask[:1], **how, **more)[0]

        for more in ({}, {"num_beams": 2}, {"cache_implementation": "static"}):
            both = model.generate(
                PROMPTS,
                attention_mask=mask,
                network_ids=served.ids(["prose", "code"]),
                **how,
                **more,
            )
            assert both[0].tolist() == generated(0, "prose", **more).tolist()
            assert both[1].tolist() == generated(1, "code", **more).tolist()


def twelve_tasks(model: PreTrainedModel, own_down: bool) -> dict[str, TaskSet | list[Tensor]]:
    """More tasks than a compiler compiles graphs for one function; the last, if so wished, with own weights."""
    width = family_of(model.config).width(model.config)
    generator = torch.Generator().manual_seed(0)
    masks = [
        [torch.rand(width, generator=generator) < share for _ in range(LAYERS)]
        for share in torch.linspace(0.2, 0.8, 12).tolist()
    ]

    def own(kept: int) -> FullDown:
        return FullDown(torch.randn(HIDDEN, kept, generator=generator))

    tasks: list[TaskSet | list[Tensor]] = [*masks]
    if own_down:
        tasks[-4:] = [corrected(one, seed, own, False) for seed, one in enumerate(masks[-4:])]
    return {f"task {number}": task for number, task in enumerate(tasks)}


@pytest.mark.parametrize("own_down", [False, True], ids=["shared", "own"])
def test_a_compiled_model_is_few_graphs_for_many_tasks_and_one_for_all_mixtures(
    own_down: bool,
) -> None:
    model = make_model("llama")
    tasks = twelve_tasks(model, own_down)
    torch._dynamo.reset()
    graphs = torch._dynamo.testing.CompileCounterWithBackend("eager")
    compiled = torch.compile(model, fullgraph=True, backend=graphs)
    with attach(model, tasks) as served:
        for task in [*tasks, *tasks]:
            with model.networks(task):
                close(logits(compiled), logits(model))
        # The first task's neurons lie first, and the first sizes are taken for constants.
        for_tasks = graphs.frame_count
        assert for_tasks <= (4 if own_down else 3)
        for mixture in (["task 3", "task 11"], ["task 0", "task 5"], ["task 8", "task 8"]):
            ids = served.ids(mixture)
            close(logits(compiled, network_ids=ids), logits(model, network_ids=ids))
        assert graphs.frame_count == for_tasks + 1
    torch._dynamo.reset()


def test_a_model_that_is_dropped_while_it_serves_leaves_nothing_behind() -> None:
    before = dict(attachment._attached)
    model = make_model("llama")
    attach(model, three_tasks(model))
    assert len(attachment._attached) == len(before) + LAYERS
    gone = weakref.ref(model.lm_head.weight)
    del model
    gc.collect()
    assert gone() is None
    assert attachment._attached == before


masks_of_tasks = st.integers(1, 30).flatmap(
    lambda width: st.lists(
        st.lists(st.booleans(), min_size=width, max_size=width), min_size=1, max_size=5
    )
)


@given(masks_of_tasks)
@settings(deadline=None, max_examples=30)
def test_an_arrangement_puts_each_task_into_few_runs(given_masks: list[list[bool]]) -> None:
    masks = [torch.tensor(mask) for mask in given_masks]
    order = together(masks)
    assert sorted(order.tolist()) == list(range(len(masks[0])))
    assert order[inverse(order)].tolist() == list(range(len(order)))
    for number, mask in enumerate(masks):
        arranged = mask[order].int()
        runs = int(arranged[0]) + int((arranged.diff() == 1).sum())
        assert runs <= max(1, 2 ** (number - 1))
    anyone = torch.stack(masks).any(0)[order].int()
    assert bool((anyone.diff() <= 0).all())


def test_what_cannot_be_served_is_refused() -> None:
    model = make_model("llama")
    tasks = three_tasks(model)
    with pytest.raises(InvalidInput, match="no tasks"):
        attach(model, {})
    with pytest.raises(InvalidInput, match="'code' is for layers of"):
        attach(model, {"code": tasks["code"][:2]})
    with pytest.raises(InvalidInput, match="layer 1: kept neurons"):
        attach(model, {"code": [torch.tensor([1]), torch.tensor([3, 2]), torch.tensor([0])]})
    with pytest.raises(InvalidInput, match="training mode"):
        attach(make_model("llama").train(), tasks)
    config = FAMILY_CONFIGS["opt"]()
    config.activation_function = "tanh"
    with pytest.raises(InvalidInput, match="'tanh' is not one of"):
        attach(make_model("opt", config=config), tasks)
    with attach(model, tasks) as served:
        with pytest.raises(InvalidInput, match="serves tasks already"):
            attach(model, tasks)
        with pytest.raises(InvalidInput, match="no task 'poems'; the tasks are code, prose, sums"):
            served.ids(["code", "poems"])
        with pytest.raises(InvalidInput, match="network_ids holds 3, but there are 3 tasks"):
            logits(model, network_ids=torch.tensor([0, 3]))
        with (
            pytest.raises(InvalidInput, match="no task 'poems'"),
            model.networks("poems"),
        ):
            raise AssertionError("entered")
