"""Claims about models larger than memory: reading them layer by layer changes nothing but what is held at once."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from count_reads import count_reads
from small_runs import blocks, recipe, tensors
from tiny_models import FAMILY_CONFIGS, PATHS, logits, save_tiny

from fbn_prune.errors import FbnPruneError, InvalidInput
from fbn_prune.model.adapter import ModelAdapter
from fbn_prune.model.checkpoint import Checkpoint
from fbn_prune.model.layerwise import LayerwiseForward
from fbn_prune.model.perplexity import mean_loss
from fbn_prune.model.spill import Spilled
from fbn_prune.model.streaming import StreamedModel
from fbn_prune.networks.interventions import masked
from fbn_prune.progress import StageClock
from fbn_prune.runs import memory
from fbn_prune.runs.discover import run_discovery
from fbn_prune.runs.dry_run import plan
from fbn_prune.runs.main_job import run_prune
from fbn_prune.runs.memory import possible_plans
from fbn_prune.runs.opening import OpenRun
from fbn_prune.runs.setup import prepare
from fbn_prune.runs.stages import rank_scores

CPU = torch.device("cpu")
BATCHES = blocks(20, 48, 48, 33).batches(100)


def opened(model: Path, **options: bool) -> tuple[ModelAdapter, StreamedModel]:
    checkpoint = Checkpoint.open(model)
    whole = ModelAdapter(checkpoint.load_model(CPU, torch.float32))
    return whole, StreamedModel(checkpoint, CPU, torch.float32, scratch=model, **options)


def run_both(
    monkeypatch: pytest.MonkeyPatch, model: Path, text: Path, folder: Path, **changes: object
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The written tensors (and networks) of the run in memory, and of the most frugal one."""
    run_prune(recipe(model, text, folder / "whole", **changes), StageClock())
    chosen: list[bool] = []

    def frugal(*args: object) -> memory.MemoryPlan:
        plans = [p for p in possible_plans(*args) if p.streamed and p.batch_tokens == 4096]
        chosen.append(plans[-1].streamed and not plans[-1].keep_hidden)
        return plans[-1]

    monkeypatch.setattr("fbn_prune.runs.setup.plan_memory", frugal)
    run_prune(recipe(model, text, folder / "streamed", **changes), StageClock())
    assert chosen == [True]
    return tensors(folder / "whole"), tensors(folder / "streamed")


@pytest.mark.parametrize("name", FAMILY_CONFIGS)
def test_a_streamed_model_has_the_logits_of_the_whole_one(name: str, tmp_path: Path) -> None:
    whole, streamed = opened(save_tiny(tmp_path / "model", name))
    assert torch.equal(logits(whole.model), logits(streamed.model))


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        *((name, {}) for name in PATHS),
        ("llama-tied", {"sequential": True, "rank": "knockout"}),
        ("llama", {"criterion": "flap", "sparsity": 0.5}),
        ("llama", {"layout": "auto"}),
        ("llama", {"layout": "ragged", "sparsity": 0.5}),
        ("llama", {"layout": "ragged", "structures": "neurons,layers", "target_params": 10_600}),
        ("llama", {"scope": "layer", "networks": 3}),
    ],
    ids=str,
)
def test_streaming_prunes_to_the_same_weights_in_every_way_of_pruning(
    name: str,
    changes: dict[str, object],
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = save_tiny(tmp_path / "model", name)
    whole, streamed = run_both(monkeypatch, model, text, tmp_path, **changes)
    assert whole.keys() == streamed.keys()
    for key, tensor in whole.items():
        torch.testing.assert_close(streamed[key], tensor, rtol=1e-5, atol=1e-5)


def test_one_layer_is_in_memory_at_a_time(tiny: Path) -> None:
    _, adapter = opened(tiny)
    forward = LayerwiseForward(adapter, BATCHES)
    present = []
    for _ in range(3):
        forward.advance()
        present.append([not next(layer.parameters()).is_meta for layer in adapter.layers])
    assert torch.equal(torch.tensor(present), torch.eye(3, dtype=torch.bool))
    assert adapter.model.get_input_embeddings().weight.is_meta
    adapter.release()
    for layer in adapter.layers:
        assert all(parameter.is_meta for parameter in layer.parameters())


def test_hidden_states_on_disk_are_those_in_memory(tiny: Path) -> None:
    whole, on_disk = opened(tiny, spill_hidden=True)
    kept = LayerwiseForward(whole, BATCHES)
    spilled = LayerwiseForward(on_disk, BATCHES)
    assert isinstance(spilled.hidden, Spilled)
    for _ in range(3):
        kept.advance()
        spilled.advance()
        for a, b in zip(kept.hidden, spilled.hidden, strict=True):
            assert torch.equal(a, b)
    assert mean_loss(on_disk, BATCHES) == pytest.approx(mean_loss(whole, BATCHES), rel=1e-6)


def counted(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """The bytes read of each tensor of a checkpoint, until the test ends."""
    for method in ("tensor", "read"):
        monkeypatch.setattr(Checkpoint, method, getattr(Checkpoint, method))  # put back at the end
    return count_reads()


@pytest.mark.parametrize(
    ("changes", "passes", "more"),
    [
        # Perplexity before, activations, evidence and cuts, perplexity after, export; and the energy of the networks.
        ({}, 5, 1),
        ({"sequential": True}, 6, 1),  # the cut layer reads its inputs too
        ({"networks_from": "networks.safetensors"}, 4, 1),
        ({"criterion": "flap", "sparsity": 0.5}, 4, 0),
        ({"layout": "ragged", "sparsity": 0.5, "widths": "members"}, 5, 1),
    ],
    ids=["default", "sequential", "networks_from", "flap", "members"],
)
def test_a_streamed_run_reads_a_layer_once_a_pass_and_for_the_energy_its_output_alone(
    changes: dict[str, object],
    passes: int,
    more: int,
    tiny: Path,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if "networks_from" in changes:
        run_discovery(recipe(tiny, text, tmp_path / "found"), StageClock())
        changes = {"networks_from": str(tmp_path / "found" / "networks.safetensors")}

    def frugal(*args: object) -> memory.MemoryPlan:
        return next(p for p in possible_plans(*args) if p.streamed)

    monkeypatch.setattr("fbn_prune.runs.setup.plan_memory", frugal)
    seen = counted(monkeypatch)
    run_prune(recipe(tiny, text, tmp_path / "out", **changes), StageClock())
    checkpoint = Checkpoint.open(tiny)
    family = checkpoint.family
    for name, info in checkpoint.tensors.items():
        layer, location = family.layer_of(name), family.locate(name)
        if layer is None:
            continue
        output = location is not None and location.projection is family.output
        asked = layer == 0  # what layers put out, once
        assert seen[name] == (passes + more * output + asked) * info.nbytes, name


def test_networks_are_ranked_by_the_energy_they_were_found_with_or_have_in_another_model(
    tiny: Path, text: Path, tmp_path: Path
) -> None:
    networks, file = run_discovery(recipe(tiny, text, tmp_path / "found"), StageClock())
    assert networks.energy is not None
    elsewhere = replace(networks, energy=networks.energy.flip(0))
    elsewhere.save(file)
    data: Any = None
    for changes, given in (({}, networks), ({"networks_from": str(file)}, elsewhere)):
        prepared = prepare(recipe(tiny, text, **changes))
        for loaded in (prepared.load_model(), opened(tiny)[1]):
            run = OpenRun(prepared, None, data, None, loaded, StageClock())
            scores = rank_scores(run, given, None)
            assert torch.equal(scores, networks.energy)


def test_interventions_and_weights_reach_a_streamed_model(tiny: Path) -> None:
    whole, streamed = opened(tiny)
    streamed.load_layer(1)
    for a, b in zip(whole.down_weights(), streamed.down_weights(), strict=True):
        assert torch.equal(a, b)
        assert all(each.is_meta for each in streamed.layers.parameters())
    silent = [torch.arange(width) % 3 == 0 for width in whole.widths]
    losses = []
    for adapter in (whole, streamed):
        with masked(adapter, silent):
            losses.append(mean_loss(adapter, BATCHES))
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    assert losses[0] != mean_loss(whole, BATCHES)


def test_a_missing_or_misshapen_tensor_is_named_before_anything_runs(
    tiny: Path, tmp_path: Path
) -> None:
    checkpoint = Checkpoint.open(tiny)
    tensors = dict(checkpoint.tensors)
    gone = tensors.pop("model.norm.weight")
    with pytest.raises(InvalidInput, match=r"model\.norm\.weight"):
        StreamedModel(replace(checkpoint, tensors=tensors), CPU, torch.float32, scratch=tmp_path)
    tensors["model.norm.weight"] = replace(gone, shape=(3,))
    with pytest.raises(InvalidInput, match=r"model\.norm\.weight has shape \[3\]"):
        StreamedModel(replace(checkpoint, tensors=tensors), CPU, torch.float32, scratch=tmp_path)


def test_a_tensor_read_by_slices_is_the_tensor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = Checkpoint.open(save_tiny(tmp_path / "model", dtype=torch.float16))
    monkeypatch.setattr("fbn_prune.model.checkpoint.SLICE_BYTES", 1000)
    for name in opened.names:
        read = opened.read(name, CPU, torch.float32)
        assert read.dtype == torch.float32
        assert torch.equal(read, opened.tensor(name).float())


def test_spilled_tensors_come_back_as_they_were_and_leave_no_file(tmp_path: Path) -> None:
    spilled = Spilled(tmp_path)
    tensors = [torch.randn(3, 5), torch.zeros(0, 4), torch.arange(7), torch.tensor(True)]
    tensors.append(torch.randn(4, 2).T.to(torch.bfloat16))
    for tensor in tensors:
        spilled.append(tensor)
    spilled[2] = torch.arange(7) * 2
    tensors[2] = torch.arange(7) * 2
    assert len(spilled) == 5
    for a, b in zip(spilled, tensors, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match=r"in place of"):
        spilled[0] = torch.zeros(2)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(FbnPruneError, match="nowhere"):
        Spilled(tmp_path / "nowhere")


def test_a_budget_below_the_model_streams_and_the_dry_run_says_so(
    tiny: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "PROCESS_BYTES", 0)  # else it is all that counts in a tiny model
    whole = prepare(recipe(tiny, text, memory_budget="1GB"))
    assert not whole.memory.streamed
    budget = whole.memory.peak_bytes - 1
    tight = prepare(recipe(tiny, text, memory_budget=f"{budget}B"))
    assert plan(tight).peak_memory_bytes <= budget
    assert plan(whole).peak_memory_bytes == whole.memory.peak_bytes
    arguments = (tight.recipe, tight.checkpoint, CPU, torch.float32, 48)
    streamed = [p for p in possible_plans(*arguments) if p.streamed]
    assert streamed[-1].peak_bytes < streamed[0].peak_bytes
    least = prepare(recipe(tiny, text, memory_budget=f"{streamed[-1].peak_bytes}B"))
    assert least.memory.streamed
    assert "streamed" in plan(least).memory


def test_the_plan_of_a_model_in_memory_has_room_for_a_layer_as_if_cut(
    tiny: Path, text: Path
) -> None:
    checkpoint = Checkpoint.open(tiny)
    # Of more tokens the activations are all that counts.
    few = {"tokens": 2, "network_tokens": 2, "networks": 1, "keep_networks": 1}
    job = recipe(tiny, text, **few)
    whole = next(iter(possible_plans(job, checkpoint, CPU, torch.float32, 48)))
    located = {name: checkpoint.family.locate(name) for name in checkpoint.tensors}
    mlp = sum(
        checkpoint.tensors[name].parameters
        for name, location in located.items()
        if location is not None and location.layer == 0
    )
    weights = 4 * checkpoint.total_parameters
    assert whole.stages["perplexity"] >= memory.PROCESS_BYTES + weights + 4 * mlp


def test_a_budget_that_nothing_fits_is_refused_with_the_least_that_would(
    tiny: Path, text: Path
) -> None:
    with pytest.raises(InvalidInput, match=r"memory_budget = 10MB.*least.* 0\.\d+GB"):
        prepare(recipe(tiny, text, memory_budget="10MB"))
    with pytest.raises(InvalidInput, match="gradients need the whole model"):
        prepare(recipe(tiny, text, memory_budget="10MB", loss_aware=True))
    with pytest.raises(InvalidInput, match="memory_budget = 'much'"):
        prepare(recipe(tiny, text, memory_budget="much"))
