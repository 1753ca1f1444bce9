"""On a GPU a served model gives what it gives on a CPU, also compiled, from a static cache and from a CUDA graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_many_tasks import PROMPTS, close, corrected, logits, three_tasks
from tiny_models import FAMILY_CONFIGS, HIDDEN, make_model
from torch import Tensor
from transformers import PreTrainedModel

from fbn_prune.serving import FullDown, LowRankDown, TaskSet, attach

if not torch.cuda.is_available():
    pytest.skip("there is no GPU", allow_module_level=True)

every_family = pytest.mark.parametrize("name", FAMILY_CONFIGS)
TASKS = ("sums", "code", "prose")


@pytest.fixture(autouse=True)
def undetermined() -> None:
    # cuBLAS asks for a setting of the environment otherwise.
    torch.use_deterministic_algorithms(False)


def twins(name: str, **options: Any) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The same model on the CPU and on the GPU."""
    host, device = make_model(name, **options), make_model(name, **options).cuda()
    device.load_state_dict(host.state_dict())
    return host, device


def answers(model: PreTrainedModel, tasks: dict[str, Any]) -> list[Tensor]:
    """Logits through each task, and through a mixture of them."""
    ids, found = PROMPTS.to(model.device), []
    with attach(model, tasks) as served:
        for task in TASKS:
            with model.networks(task):
                found.append(logits(model, ids))
        found.append(logits(model, ids, network_ids=served.ids(["code", "sums"])))
    return [one.cpu() for one in found]


@every_family
def test_every_task_and_mixture_is_what_it_is_on_a_cpu(name: str) -> None:
    host, device = twins(name)
    tasks = three_tasks(host)
    for found, expected in zip(answers(device, tasks), answers(host, tasks), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("bias", [False, True])
def test_tasks_with_output_weights_of_their_own_are_what_they_are_on_a_cpu(bias: bool) -> None:
    host, device = twins("llama")
    masks = three_tasks(host)

    def low(kept: int) -> LowRankDown:
        generator = torch.Generator().manual_seed(kept)
        left, right = (torch.randn(*size, generator=generator) for size in ((HIDDEN, 3), (3, kept)))
        return LowRankDown(left, right)

    def full(kept: int) -> FullDown:
        return FullDown(torch.randn(HIDDEN, kept, generator=torch.Generator().manual_seed(kept)))

    tasks: dict[str, TaskSet | list[Tensor]] = {
        "sums": corrected(masks["sums"], 1, low, bias),
        "code": corrected(masks["code"], 2, full, bias),
        "prose": masks["prose"],
    }
    for found, expected in zip(answers(device, tasks), answers(host, tasks), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


@every_family
def test_detaching_restores_every_bit(name: str) -> None:
    model = make_model(name, dtype=torch.bfloat16).cuda()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with attach(model, three_tasks(model)), model.networks("code"):
        logits(model, PROMPTS.cuda())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_nothing_is_copied_and_the_stated_memory_is_what_is_taken() -> None:
    model = make_model("llama").cuda()
    before = torch.cuda.memory_allocated()
    with attach(model, three_tasks(model)) as served:
        assert served.memory.copies == 0
        taken = torch.cuda.memory_allocated() - before
        # The allocator rounds each tensor up.
        assert served.memory.lists / 2 <= taken <= served.memory.lists + 512 * 64


def test_generate_compiles_and_goes_on_from_a_static_cache() -> None:
    model = make_model("llama").cuda()
    how: dict[str, Any] = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    ids = PROMPTS[:1].cuda()
    with attach(model, three_tasks(model)):
        for task in ("code", "prose", "code"):
            with model.networks(task):
                eager = model.generate(ids, **how)
                static = model.generate(ids, cache_implementation="static", **how)
                assert static.tolist() == eager.tolist()


def test_a_graph_replays_a_task_and_a_mixture() -> None:
    model, ids = make_model("llama").cuda(), PROMPTS.cuda()
    with attach(model, three_tasks(model)) as served:
        numbers = served.ids(["code", "sums"])
        for more in ({}, {"network_ids": numbers}):
            with model.networks("prose"):
                expected = logits(model, ids, **more)
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    found = logits(model, ids, **more)
            found.fill_(float("nan"))
            graph.replay()
            close(found, expected)
