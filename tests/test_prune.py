"""Claims about whole runs, for every family: what is written is what was measured, and a refit always helps."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_runs import arguments, recipe, refused, run_json
from tiny_models import PATHS, logits, save_tiny
from transformers import AutoModelForCausalLM

from fbn_prune.model.adapter import ModelAdapter
from fbn_prune.model.checkpoint import Checkpoint
from fbn_prune.model.perplexity import perplexity
from fbn_prune.progress import StageClock
from fbn_prune.pruning.cutting import CutPlan, cut_layers
from fbn_prune.pruning.evidence import CutOptions, EvidencePass
from fbn_prune.pruning.second_order import choose_neurons, output_error, refit
from fbn_prune.runs.main_job import run_prune
from fbn_prune.runs.opening import read_texts
from fbn_prune.runs.prepared import Prepared
from fbn_prune.runs.setup import prepare


def opened(model: Path, text: Path, **changes: object) -> tuple[Prepared, ModelAdapter, list]:
    prepared = prepare(recipe(model, text, **changes))
    live = ModelAdapter(prepared.checkpoint.load_model("cpu", torch.float32))
    data = read_texts(prepared, prepared.checkpoint.load_tokenizer())[0]
    return prepared, live, data.calibrating.batches(prepared.batch_tokens)


@pytest.mark.parametrize("name", PATHS)
def test_the_written_checkpoint_is_the_model_cut_live_and_has_the_reported_figures(
    name: str, text: Path, tmp_path: Path
) -> None:
    model = save_tiny(tmp_path / "model", name)
    result = run_prune(recipe(model, text, tmp_path / "out", sparsity=0.4), StageClock())
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    prepared, live, batches = opened(model, text)
    options = CutOptions(False, 1e-2, 1e-3, 0, prepared.checkpoint.storage_dtype)
    cut_layers(live, batches, CutPlan("second-order", result.widths), options, clock=StageClock())
    torch.testing.assert_close(logits(live.model), logits(written), atol=1e-5, rtol=1e-4)
    held_out = read_texts(prepared, prepared.checkpoint.load_tokenizer())[0].held_out
    after = perplexity(ModelAdapter(written), held_out.batches(prepared.batch_tokens))
    assert after == pytest.approx(result.perplexity_after, rel=1e-4)
    assert result.parameters_after == Checkpoint.open(tmp_path / "out").total_parameters
    assert result.parameters_after < result.parameters_before
    assert len(set(result.widths)) == 1


@pytest.mark.parametrize("name", PATHS)
def test_on_real_activations_a_refit_beats_no_refit(name: str, text: Path, tmp_path: Path) -> None:
    prepared, live, batches = opened(save_tiny(tmp_path / "model", name), text)
    options = CutOptions(False, 1e-2, 1e-3, 0, torch.float32)
    for layer in EvidencePass(live, batches, options, clock=StageClock()):
        for share in (0.25, 0.5, 0.75):
            keep = round(prepared.widths[0] * share)
            kept = choose_neurons(layer.weight, layer.gram, keep, damping=1e-2)
            plain = output_error(layer.weight, layer.gram, kept, layer.weight[:, kept])
            new = refit(layer.weight, layer.gram, kept, damping=1e-3)
            assert output_error(layer.weight, layer.gram, kept, new) < plain


def test_sequential_fits_the_stream_that_the_pruned_model_really_has(
    tiny: Path, text: Path
) -> None:
    losses = {}
    for sequential in (False, True):
        prepared, live, batches = opened(tiny, text)
        dense = prepared.checkpoint.load_model("cpu", torch.float32)
        options = CutOptions(sequential, 1e-2, 1e-3, 0, torch.float32)
        cut_layers(live, batches, CutPlan("second-order", [12] * 3), options, clock=StageClock())
        with torch.no_grad():
            losses[sequential] = sum(
                float((live.model(ids).logits - dense(ids).logits)[valid].square().sum())
                for ids, valid in ((batch.input_ids, batch.valid) for batch in batches)
            )
    assert losses[True] < losses[False]


def test_the_order_of_neurons_in_the_checkpoint_does_not_matter(text: Path, tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model")
    moved = save_tiny(tmp_path / "moved")
    tensors = load_file(moved / "model.safetensors")
    order = torch.randperm(24, generator=torch.Generator().manual_seed(1))
    for layer in range(3):
        prefix = f"model.layers.{layer}.mlp."
        for part in ("gate_proj", "up_proj"):
            tensors[f"{prefix}{part}.weight"] = tensors[f"{prefix}{part}.weight"][order].clone()
        down = f"{prefix}down_proj.weight"
        tensors[down] = tensors[down][:, order].clone()
    save_file(tensors, moved / "model.safetensors", metadata={"format": "pt"})
    found = []
    for source in (model, moved):
        output = tmp_path / f"{source.name}-out"
        run_prune(recipe(source, text, output, sparsity=0.5), StageClock())
        found.append(logits(AutoModelForCausalLM.from_pretrained(output).eval()))
    assert torch.allclose(*found, atol=1e-3)


def test_where_there_are_fewer_networks_than_are_kept_by_default_all_are_kept(
    tiny: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = arguments(tiny, text)  # finds 6, and says nothing of how many to keep
    shown = run_json(capsys, *job, "--output", tmp_path / "out")
    assert sorted(shown["kept_networks"]) == list(range(6))
    known = [*job, "--networks-from", str(tmp_path / "out" / "networks.safetensors")]
    assert run_json(capsys, *known, "--output", tmp_path / "again")["widths"] == shown["widths"]
    assert run_json(capsys, *known, "--dry-run")["widths"] == shown["widths"]
    for command in ("rank", "compare"):
        run_json(capsys, command, *known)
    refused(capsys, [*known, "--keep-networks", "7", "--dry-run"], "keep_networks = 7")


def test_without_an_output_nothing_is_written(
    tiny: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = set(tiny.iterdir())
    result = run_prune(recipe(tiny, text), StageClock())
    assert math.isfinite(result.perplexity_after)
    assert (set(tiny.iterdir()), list(tmp_path.iterdir())) == (before, [])
