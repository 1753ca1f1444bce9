"""Claims about bundles: what is served is what was exported, token for token, at the cost that is stated."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_runs import recipe, run_json
from tiny_models import BIASED, HIDDEN, LAYERS, PATHS, logits, save_tiny
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from fbn_prune.cli.main import _exit_code
from fbn_prune.errors import InvalidInput
from fbn_prune.export.writer import write_checkpoint
from fbn_prune.model.adapter import ModelAdapter
from fbn_prune.model.checkpoint import Checkpoint
from fbn_prune.model.kept_neurons import KEPT_FILE, KeptNeurons
from fbn_prune.model.surgery import MlpCut
from fbn_prune.networks.functional_networks import FunctionalNetworks
from fbn_prune.progress import StageClock
from fbn_prune.runs.main_job import run_prune
from fbn_prune.serving import Bundle, FullDown, Served, load
from fbn_prune.serving.bundle import TaskSource, write_bundle
from fbn_prune.serving.tasks import LowRankDown, Refit, task_of_pruned

PROMPT = torch.arange(3, 12).view(1, -1)


@pytest.fixture(scope="module")
def eight(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with eight neurons a layer, to read."""
    return prune(tiny, tmp_path_factory.mktemp("eight") / "pruned", [8] * LAYERS, 0)


def prune(model: Path, output: Path, widths: Sequence[int], seed: int, **more: bool) -> Path:
    """An export whose output weights are near the old ones, as a refit leaves them."""
    source = Checkpoint.open(model)
    generator = torch.Generator().manual_seed(seed)
    full = source.family.width(source.config)
    live = ModelAdapter(source.load_model("cpu", torch.float32))
    cuts = []
    for layer, width in enumerate(widths):
        kept = torch.randperm(full, generator=generator)[:width].sort().values
        weight = live.down_weight(layer)[:, kept]
        change = 0.3 * torch.randn(weight.shape, generator=generator)
        bias = torch.randn(HIDDEN, generator=generator) if more.get("bias") else None
        cuts.append(MlpCut(kept, weight + change, bias))
    output.mkdir()
    write_checkpoint(source, cuts, output)
    KeptNeurons((full,) * len(widths), tuple(cut.kept for cut in cuts)).save(output / KEPT_FILE)
    return output


def greedy(model: PreTrainedModel, prompt: Tensor = PROMPT, tokens: int = 12) -> list[int]:
    model.config.use_cache = True
    found = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        do_sample=False,
        pad_token_id=0,
    )
    return found[0].tolist()


def bundled(model: Path, output: Path, pruned: dict[str, Path], **more: Any) -> Served:
    sources = [TaskSource(name, path) for name, path in pruned.items()]
    write_bundle(Checkpoint.open(model), sources, output, **more)
    return load(output)


@pytest.mark.parametrize("name", [*PATHS, "falcon-bias"])
def test_a_served_task_speaks_like_the_export_token_for_token(name: str, tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model", name)
    bias = name in BIASED
    widths = {"code": [8] * LAYERS, "prose": [5, 12, 16]}
    pruned = {
        task: prune(model, tmp_path / task, each, seed, bias=bias)
        for seed, (task, each) in enumerate(widths.items())
    }
    served = bundled(model, tmp_path / "bundle", pruned)
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "bundle").eval()
    assert greedy(served.model) == greedy(dense)
    unlike = dense
    for task, path in pruned.items():
        exported = Checkpoint.open(path).load_model("cpu", torch.float32)
        with served.networks(task):
            assert greedy(served.model) == greedy(exported)
            torch.testing.assert_close(logits(served.model), logits(exported), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(logits(unlike), logits(exported), rtol=1e-2, atol=1e-2)
        unlike = exported


def test_a_bias_that_the_whole_model_has_no_place_for_is_served(tiny: Path, tmp_path: Path) -> None:
    pruned = prune(tiny, tmp_path / "code", [8] * LAYERS, 0, bias=True)
    served = bundled(tiny, tmp_path / "bundle", {"code": pruned})
    with served.networks("code"):
        expected = greedy(Checkpoint.open(pruned).load_model("cpu", torch.float32))
        assert greedy(served.model) == expected


def test_the_stated_memory_is_that_of_the_choice(tiny: Path, eight: Path, tmp_path: Path) -> None:
    base, cut = Checkpoint.open(tiny), Checkpoint.open(eight)
    costs: dict[Refit, int] = {"none": 0, "low-rank": LAYERS * 2 * (HIDDEN + 8) * 4}
    costs["full"] = LAYERS * HIDDEN * 8 * 4
    for refit, cost in costs.items():
        out = tmp_path / refit
        written = write_bundle(
            base, [TaskSource("code", eight)], out, refit=refit, rank=2, link=True
        )
        facts = written["tasks"]["code"]
        assert facts["correction_bytes"] == cost == load(out).memory.corrections["code"]
        assert facts["set_bytes"] == LAYERS * 24 // 8
        stored = sum(file.stat().st_size for file in (out / "tasks").rglob("*") if file.is_file())
        assert cost <= stored < cost + 3000
    exact = task_of_pruned(base, cut, "full", 1)
    missed = []
    for rank in (1, 3, 8):
        found = task_of_pruned(base, cut, "low-rank", rank)
        error = 0.0
        for layer in range(LAYERS):
            own, low = exact.own_down[layer], found.own_down[layer]
            assert isinstance(own, FullDown)
            assert isinstance(low, LowRankDown)
            old = base.tensor(f"model.layers.{layer}.mlp.down_proj.weight")
            kept = old[:, exact.neurons.kept[layer]]
            error += float((kept + low.left @ low.right - own.weight).norm())
        missed.append(error)
    assert missed[0] > missed[1] > missed[2]
    assert missed[2] < 1e-4


def test_the_command_takes_networks_kept_neurons_and_exports(
    tiny: Path, eight: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    neurons = 24 * LAYERS
    networks = FunctionalNetworks(
        maps=torch.randn(3, neurons, generator=torch.Generator().manual_seed(0)) * 3,
        widths=[24] * LAYERS,
        mean=torch.zeros(neurons),
        std=torch.ones(neurons),
        explained_variance=torch.full((3,), 0.1, dtype=torch.float64),
        engagement=torch.ones(3, dtype=torch.float64),
    )
    networks.save(tmp_path / "networks.safetensors")
    found = f"found={tmp_path / 'networks.safetensors'}:0,2"
    tasks = [f"whole={eight}", f"set={eight / KEPT_FILE}", found]
    output = tmp_path / "bundle"
    arguments = ["bundle", "--model", str(tiny), "--output", str(output), *tasks]
    told = run_json(capsys, *arguments)
    assert list(told["tasks"]) == ["whole", "set", "found"]
    assert told["tasks"]["set"]["correction_bytes"] == 0
    assert told["tasks"]["found"]["neurons_kept"] == int(networks.union([0, 2]).sum())
    assert load(output).names == ("whole", "set", "found")
    assert _exit_code([*arguments, "--overwrite", "--link"]) == 0
    assert "whole" in capsys.readouterr().out
    assert not list(output.glob("*.safetensors"))
    assert load(output).names == ("whole", "set", "found")


def test_the_order_of_the_tasks_is_kept(tiny: Path, eight: Path, tmp_path: Path) -> None:
    names = ["zebra", "apple", "mango"]
    served = bundled(tiny, tmp_path / "bundle", dict.fromkeys(names, eight))
    assert list(served.names) == names


def test_a_prune_records_its_neurons(text: Path, tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model", "phi3")
    asked = recipe(model, text, tmp_path / "out", sparsity=0.5, criterion="magnitude")
    result = run_prune(asked, StageClock())
    neurons = KeptNeurons.load(tmp_path / "out" / KEPT_FILE)
    assert [len(kept) for kept in neurons.kept] == result.widths
    task = task_of_pruned(Checkpoint.open(model), Checkpoint.open(tmp_path / "out"), "full", 1)
    assert task.correction_parameters == 0  # magnitude refits nothing


def test_what_does_not_belong_together_is_refused(tiny: Path, eight: Path, tmp_path: Path) -> None:
    other = save_tiny(tmp_path / "other", "llama", seed=1)
    output = tmp_path / "bundle"

    def refused(message: str, *sources: TaskSource, base: Path = tiny) -> None:
        with pytest.raises(InvalidInput, match=message):
            write_bundle(Checkpoint.open(base), sources, output)
        assert not output.exists()

    code = TaskSource("code", eight)
    refused("two tasks have the same name", code, code)
    refused("is not that of .*other", code, base=other)
    trained = tmp_path / "trained"
    shutil.copytree(eight, trained)
    tensors = load_file(trained / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] += 1
    save_file(tensors, trained / "model.safetensors", metadata={"format": "pt"})
    refused("layers.1.mlp.up_proj.weight .* or trained afterwards", TaskSource("code", trained))
    wide = KeptNeurons((32,) * LAYERS, (torch.arange(4),) * LAYERS)
    wide.save(tmp_path / "wide.safetensors")
    refused("is for layers of", TaskSource("code", tmp_path / "wide.safetensors"))
    (trained / KEPT_FILE).unlink()
    refused("no such file", TaskSource("code", trained))


@pytest.mark.parametrize("text", ["code", "=here", "co/de=here", "../up=here", "code="])
def test_a_task_needs_a_name_and_a_place(text: str) -> None:
    with pytest.raises(InvalidInput, match="write NAME=PATH"):
        TaskSource.parse(text)


def test_a_damaged_bundle_is_refused(tiny: Path, eight: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    bundled(tiny, folder, {"code": eight}, link=True)
    with pytest.raises(InvalidInput, match="is not a bundle"):
        Bundle.open(eight)
    task = folder / "tasks" / "code"
    tensors = load_file(task / "down.safetensors")
    tensors["layers.2.down"] = tensors["layers.2.down"][:, 1:].contiguous()
    save_file(tensors, task / "down.safetensors")
    with pytest.raises(InvalidInput, match=r"layer 2 has weights \[16, 7\] for 8 kept"):
        load(folder)
    (task / "down.safetensors").write_bytes(b"no tensors")
    with pytest.raises(InvalidInput, match=r"down.safetensors: damaged"):
        load(folder)
    (task / KEPT_FILE).write_bytes(b"no tensors")
    with pytest.raises(InvalidInput, match=r"kept_neurons\.safetensors: damaged"):
        load(folder)
    content = json.loads((folder / "bundle.json").read_text())
    for change, message in (
        ({"format": 7}, "format 7"),
        ({"order": []}, "lacks its tasks"),
        ({"order": ["../code"]}, "is not a valid task name"),
        ({"base": str(tmp_path / "gone")}, "there is no folder"),
    ):
        (folder / "bundle.json").write_text(json.dumps(content | change))
        with pytest.raises(InvalidInput, match=message):
            load(folder)


@pytest.mark.parametrize(
    ("widths", "kept", "message"),
    [
        ([8, 8], [[1, 2]], "1 sets of neurons for 2 layers"),
        ([8], [[]], "layer 0: kept neurons must be int64"),
        ([8], [[2, 1]], "must ascend and be below 8"),
        ([8], [[1, 8]], "must ascend and be below 8"),
    ],
)
def test_kept_neurons_fit_together(widths: list[int], kept: list[list[int]], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        KeptNeurons(tuple(widths), tuple(torch.tensor(one, dtype=torch.int64) for one in kept))


def test_kept_neurons_come_back_and_take_a_bit_each(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    masks = [torch.rand(width, generator=generator) < 0.5 for width in (8192, 13)]
    neurons = KeptNeurons.from_masks(masks)
    neurons.save(tmp_path / "a.safetensors")
    neurons.save(tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert (tmp_path / "a.safetensors").stat().st_size < 1500
    again = KeptNeurons.load(tmp_path / "a.safetensors")
    assert again.widths == (8192, 13)
    assert all(torch.equal(one, two) for one, two in zip(again.kept, neurons.kept, strict=True))
