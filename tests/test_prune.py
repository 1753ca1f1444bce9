"""Claims about whole runs, for every family: what is written is what was measured, and a refit always helps."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import FAMILY_CONFIGS, save_tiny
from transformers import AutoModelForCausalLM

from fbn_prune.model.adapter import ModelAdapter
from fbn_prune.model.checkpoint import Checkpoint
from fbn_prune.model.perplexity import perplexity
from fbn_prune.progress import StageClock
from fbn_prune.pruning.cutting import CutPlan, cut_layers
from fbn_prune.pruning.evidence import CutOptions, EvidencePass
from fbn_prune.pruning.second_order import choose_neurons, output_error, refit
from fbn_prune.recipe import Recipe, build_recipe
from fbn_prune.runs.opening import read_texts
from fbn_prune.runs.prune import run_prune
from fbn_prune.runs.setup import Prepared, prepare

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"{i} apples, {i * 3} pence, {i % 7} pears. " for i in range(400)))
    return path


def recipe(model: Path, text: Path, output: Path | None = None, **changes: object) -> Recipe:
    small = {"tokens": 800, "network_tokens": 500, "networks": 5, "keep_networks": 3}
    base = {"model": str(model), "calibration": [str(text)], "context": 48, "output": output}
    return build_recipe({**base, **small, "width_multiple": 4, **changes})


def opened(model: Path, text: Path, **changes: object) -> tuple[Prepared, ModelAdapter, list]:
    prepared = prepare(recipe(model, text, **changes))
    live = ModelAdapter(prepared.checkpoint.load_model("cpu", torch.float32))
    data = read_texts(prepared, prepared.checkpoint.load_tokenizer())[0]
    return prepared, live, data.calibrating.batches(400)


@pytest.mark.parametrize("name", FAMILY_CONFIGS)
def test_the_reported_figures_are_those_of_the_written_checkpoint(
    name: str, text: Path, tmp_path: Path
) -> None:
    model = save_tiny(tmp_path / "model", name)
    result = run_prune(recipe(model, text, tmp_path / "out", sparsity=0.4), StageClock())
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    prepared = prepare(recipe(model, text))
    held_out = read_texts(prepared, prepared.checkpoint.load_tokenizer())[0].held_out
    after = perplexity(ModelAdapter(written), held_out.batches(prepared.batch_tokens))
    assert after == pytest.approx(result.perplexity_after, rel=1e-4)
    assert result.parameters_after == Checkpoint.open(tmp_path / "out").total_parameters
    assert result.parameters_after < result.parameters_before
    assert len(set(result.widths)) == 1


@pytest.mark.parametrize("name", FAMILY_CONFIGS)
def test_the_live_pruned_model_has_the_logits_of_the_written_one(
    name: str, text: Path, tmp_path: Path
) -> None:
    model = save_tiny(tmp_path / "model", name)
    run_prune(recipe(model, text, tmp_path / "out", sparsity=0.5), StageClock())
    prepared, live, batches = opened(model, text)
    width = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    kept = prepared.family.width(width.config)
    options = CutOptions(False, 1e-2, 1e-3, 0, prepared.checkpoint.storage_dtype)
    wanted = CutPlan("second-order", [kept] * prepared.layers)
    cut_layers(live, batches, wanted, options, clock=StageClock())
    ids = torch.arange(40)[None]
    with torch.no_grad():
        assert torch.allclose(live.model(ids).logits, width(ids).logits, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", FAMILY_CONFIGS)
def test_on_real_activations_a_refit_beats_no_refit(name: str, text: Path, tmp_path: Path) -> None:
    prepared, live, batches = opened(save_tiny(tmp_path / "model", name), text)
    options = CutOptions(False, 1e-2, 1e-3, 0, torch.float32)
    for layer in EvidencePass(live, batches, options, clock=StageClock()):
        for share in (0.25, 0.5, 0.75):
            keep = round(prepared.width * share)
            kept = choose_neurons(layer.weight, layer.gram, keep, damping=1e-2)
            plain = output_error(layer.weight, layer.gram, kept, layer.weight[:, kept])
            new = refit(layer.weight, layer.gram, kept, damping=1e-3)
            assert output_error(layer.weight, layer.gram, kept, new) < plain


def test_sequential_fits_the_stream_that_the_pruned_model_really_has(
    text: Path, tmp_path: Path
) -> None:
    model = save_tiny(tmp_path / "model")
    losses = {}
    for sequential in (False, True):
        prepared, live, batches = opened(model, text)
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
    ids = torch.arange(40)[None]
    logits = []
    for source in (model, moved):
        output = tmp_path / f"{source.name}-out"
        run_prune(recipe(source, text, output, sparsity=0.5), StageClock())
        with torch.no_grad():
            logits.append(AutoModelForCausalLM.from_pretrained(output).eval()(ids).logits)
    assert torch.allclose(*logits, atol=1e-3)


def test_without_an_output_nothing_is_written(text: Path, tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model")
    result = run_prune(recipe(model, text), StageClock())
    assert math.isfinite(result.perplexity_after)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_the_export_loads_and_generates_where_this_package_cannot_be_imported(
    text: Path, tmp_path: Path
) -> None:
    model = save_tiny(tmp_path / "model")
    run_prune(recipe(model, text, tmp_path / "out"), StageClock())
    program = (
        "import sys; sys.modules['fbn_prune'] = None\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "m = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "t = AutoTokenizer.from_pretrained(sys.argv[1])\n"
        "out = m.generate(**t('12 apples', return_tensors='pt'), max_new_tokens=5, min_new_tokens=5)\n"
        "print(out.shape[1])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "out")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(done.stdout.split()[-1]) == len("12 apples") + 5
