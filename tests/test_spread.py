"""A model spread over devices gives what it gives on one, and nothing mixes tensors of two devices."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pretended_devices import Placed, on_host, pretended_devices
from small_runs import blocks, recipe, tensors
from tiny_models import PATHS, make_model, save_tiny
from transformers import PreTrainedModel

from fbn_prune.model.adapter import ModelAdapter
from fbn_prune.model.checkpoint import Checkpoint
from fbn_prune.model.kept_neurons import KeptNeurons
from fbn_prune.model.layerwise import LayerwiseForward
from fbn_prune.model.perplexity import mean_loss
from fbn_prune.model.placement import device_map
from fbn_prune.model.streaming import skeleton
from fbn_prune.model.surgery import MlpCut
from fbn_prune.networks.interventions import masked
from fbn_prune.progress import StageClock
from fbn_prune.pruning.sensitivity import output_sensitivity
from fbn_prune.runs.compare import run_comparison
from fbn_prune.runs.discover import run_discovery
from fbn_prune.runs.main_job import run_prune
from fbn_prune.runs.memory import MemoryPlan, plan_memory
from fbn_prune.serving import FullDown, TaskSet, attach

PLACEMENT = (0, 1, 1)
BATCHES = blocks(20, 48, 48, 33).batches(100)


@pytest.fixture
def devices() -> Iterator[None]:
    with pretended_devices():
        yield


def spread(folder: Path, placement: tuple[int, ...] = PLACEMENT) -> ModelAdapter:
    checkpoint = Checkpoint.open(folder)
    first, *layers = (torch.device("cpu", index) for index in (0, *placement))
    bare = skeleton(checkpoint, torch.float32)
    places = device_map(bare, checkpoint.family, layers, first)
    return ModelAdapter(checkpoint.load_model("cpu", torch.float32, places))


def test_tensors_of_two_devices_do_not_meet(devices: None) -> None:
    a, b, host = torch.ones(3).to("cpu:0"), torch.ones(3, device="cpu:1"), torch.ones(3)
    for left, right in ((a, b), (a, host), (host, b)):
        with pytest.raises(RuntimeError, match="expected all tensors on the same device"):
            left + right
    with torch.inference_mode(), pytest.raises(RuntimeError, match="same device"):
        torch.cat([a, b])
    assert isinstance(a + b.to(a.device), Placed)
    assert (a * 2).device == torch.device("cpu:0")
    assert type(a.cpu()) is torch.Tensor
    assert (a + torch.tensor(1.0)).tolist() == [2.0, 2.0, 2.0]


@pytest.mark.parametrize("name", [*PATHS, "falcon"])
def test_a_model_runs_spread_as_whole_also_layer_by_layer(name: str, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", name)
    whole = ModelAdapter(make_model(name))
    expected = LayerwiseForward(whole, BATCHES)
    loss = mean_loss(whole, BATCHES)
    with pretended_devices():
        adapter = spread(folder)
        assert mean_loss(adapter, BATCHES) == loss
        stream = LayerwiseForward(adapter, BATCHES)
        for layer, place in enumerate(PLACEMENT):
            device = torch.device("cpu", place)
            seen: dict[str, list[torch.Tensor]] = {"whole": [], "spread": []}
            expected.advance(lambda _, x, seen=seen: seen["whole"].append(x))
            stream.advance(lambda _, x, seen=seen: seen["spread"].append(x))
            assert adapter.layer_device(layer) == device
            for a, b in zip(seen["whole"], seen["spread"], strict=True):
                assert b.device == device
                assert torch.equal(a, on_host(b))
            for a, b in zip(expected.hidden, stream.hidden, strict=True):
                assert b.device == device
                assert torch.equal(a, on_host(b))
        last = stream.logits(stream.hidden[0])
        assert torch.equal(on_host(last), expected.logits(expected.hidden[0]))


def test_the_hooks_are_back_after_the_recorders(tiny: Path, devices: None) -> None:
    adapter = spread(tiny)
    before = [layer.__dict__["forward"] for layer in adapter.layers]
    LayerwiseForward(adapter, BATCHES)
    assert [layer.__dict__["forward"] for layer in adapter.layers] == before


@pytest.mark.parametrize("name", ["gpt2", "phi3"])
def test_cuts_and_interventions_are_made_where_the_layer_lies(name: str, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", name)
    generator = torch.Generator().manual_seed(0)
    kept = torch.arange(0, 24, 3)
    losses = []
    whole = ModelAdapter(make_model(name))
    hidden = whole.hidden_size
    cuts = [MlpCut(kept, torch.randn(hidden, 8, generator=generator)) for _ in PLACEMENT]
    silent = [torch.arange(width) % 3 == 0 for width in whole.widths]
    with pretended_devices():
        for adapter in (whole, spread(folder)):
            with masked(adapter, silent):
                losses.append(mean_loss(adapter, BATCHES))
            for layer, cut in enumerate(cuts):
                adapter.cut(layer, cut)
            losses.append(mean_loss(adapter, BATCHES))
        assert [adapter.layer_device(layer).index for layer in range(3)] == list(PLACEMENT)
    assert losses[:2] == losses[2:]
    assert losses[0] != losses[1]


@pytest.mark.parametrize("name", PATHS)
def test_a_spread_model_serves_tasks_and_mixtures_of_them(name: str, tmp_path: Path) -> None:
    folder, whole = save_tiny(tmp_path / "model", name), ModelAdapter(make_model(name))
    hidden = whole.hidden_size
    masks = [torch.arange(width) % 3 == 0 for width in whole.widths]
    kept = KeptNeurons.from_masks([~mask for mask in masks])
    generator = torch.Generator().manual_seed(0)
    own = [FullDown(torch.randn(hidden, len(one), generator=generator)) for one in kept.kept]
    bias = [torch.randn(hidden, generator=generator) for _ in PLACEMENT]
    ids = torch.arange(3, 21).view(2, 9)

    def answers(model: PreTrainedModel, ids: torch.Tensor, own_down: bool) -> list[torch.Tensor]:
        found = []
        corrected = TaskSet(kept, tuple(own), tuple(bias)) if own_down else TaskSet.plain(kept)
        with torch.no_grad(), attach(model, {"a": masks, "b": corrected}) as served:
            for task in ("a", "b"):
                with model.networks(task):
                    found.append(model(ids, use_cache=False).logits)
            numbers = served.ids(["b", "a"])
            found.append(model(ids, use_cache=False, network_ids=numbers).logits)
        return [*found, model(ids, use_cache=False).logits]

    for own_down in (False, True):
        expected = answers(whole.model, ids, own_down)
        with pretended_devices():
            found = answers(spread(folder).model, ids.to("cpu:0"), own_down)
        for a, b in zip(expected, found, strict=True):
            assert torch.equal(a, on_host(b))


def test_gradients_cross_devices(tiny: Path) -> None:
    expected = output_sensitivity(ModelAdapter(make_model("llama")), BATCHES, StageClock())
    with pretended_devices():
        found = output_sensitivity(spread(tiny), BATCHES, StageClock())
    assert [each.device.index for each in found] == list(PLACEMENT)
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(on_host(b), a, rtol=1e-4, atol=1e-9)


def test_a_first_device_without_layers_still_takes_ids_and_gives_logits(
    tiny: Path, devices: None
) -> None:
    adapter = spread(tiny, (1, 1, 2))
    assert adapter.device == torch.device("cpu:0")
    ids = torch.arange(12)[None]
    logits = adapter.model(ids.to("cpu:0"), use_cache=False).logits
    assert logits.device == torch.device("cpu:0")
    assert torch.equal(on_host(logits), make_model("llama")(ids).logits)


def spread_plan(*args: object) -> MemoryPlan:
    return replace(plan_memory(*args), placement=PLACEMENT)


@pytest.mark.parametrize(
    "changes",
    [
        {"sequential": True, "rank": "knockout"},
        {"criterion": "flap", "sparsity": 0.5},
        {"recover": True, "recover_passes": 1},
        {"layout": "auto", "widths": "auto", "loss_aware": True},
        {"scope": "layer", "networks": 3, "task": "examples"},
    ],
    ids=lambda changes: "-".join(map(str, changes.values())),
)
def test_the_main_job_spread_writes_the_bytes_of_the_whole_one(
    changes: dict[str, object], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save_tiny(tmp_path / "model", "gpt2")
    if "task" in changes:
        changes = changes | {"task": str(tmp_path / "task.jsonl")}
        lines = ['{"text": "7 apples, 21 pence, 0 pears."}', '{"text": "8 apples, 24 pence."}']
        (tmp_path / "task.jsonl").write_text("\n".join(lines) + "\n")
    whole = run_prune(recipe(model, text, tmp_path / "whole", **changes), StageClock())
    monkeypatch.setattr("fbn_prune.runs.setup.plan_memory", spread_plan)
    with pretended_devices():
        result = run_prune(recipe(model, text, tmp_path / "spread", **changes), StageClock())
    assert result.lasting() == whole.lasting()
    expected, found = tensors(tmp_path / "whole"), tensors(tmp_path / "spread")
    assert expected.keys() == found.keys()
    for key, tensor in expected.items():
        assert torch.equal(found[key], tensor), key


def test_discovery_with_recurrence_runs_spread(
    tiny: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, whole = run_discovery(recipe(tiny, text, tmp_path / "whole"), StageClock())
    monkeypatch.setattr("fbn_prune.runs.setup.plan_memory", spread_plan)
    with pretended_devices():
        _, found = run_discovery(recipe(tiny, text, tmp_path / "spread"), StageClock())
    assert whole.read_bytes() == found.read_bytes()


def test_criteria_compare_alike_on_a_spread_model(
    tiny: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = recipe(tiny, text)
    criteria = ["flap", "second-order"]
    whole = run_comparison(study, criteria, [0.5], None, StageClock())
    monkeypatch.setattr("fbn_prune.runs.setup.plan_memory", spread_plan)
    with pretended_devices():
        found = run_comparison(study, criteria, [0.5], None, StageClock())
    assert found.to_json() == whole.to_json()
    assert set(found.cells) == {(name, 0.5) for name in criteria}
