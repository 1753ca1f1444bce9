"""What a run wrote is a model like any other: every command takes it, and it can be pruned again to any layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from quantized_models import save_quantized
from small_runs import arguments, export, random_cuts, recipe, refused, run_json, tensors
from tiny_models import (
    FAMILY_CONFIGS,
    logits,
    make_merging_tokenizer,
    make_model,
    make_tokenizer,
    save_tiny,
)
from transformers import AutoModelForCausalLM, PreTrainedModel

from fbn_prune import PruningConfig, discover, prune
from fbn_prune.api import prune_checkpoint
from fbn_prune.errors import InvalidInput
from fbn_prune.model.checkpoint import Checkpoint
from fbn_prune.model.families import family_of
from fbn_prune.model.kept_neurons import KEPT_FILE, KeptNeurons
from fbn_prune.runs.budget import ModelSize
from fbn_prune.serving import load as load_bundle

WIDTHS = [8, 20, 12]
TEXTS = [f"{number} apples and {number * 3} pears" for number in range(200)]


def ragged(folder: Path, name: str = "llama") -> Path:
    """A checkpoint whose layers have `WIDTHS` neurons, as a run writes it."""
    source = Checkpoint.open(save_tiny(folder / "dense", name))
    return export(source, random_cuts(source, WIDTHS), folder / "ragged")


def opened(folder: Path) -> tuple[list[int], PreTrainedModel]:
    """The widths of a checkpoint, and its model as transformers loads it."""
    checkpoint = Checkpoint.open(folder)
    own_code = checkpoint.family.has_own_widths(checkpoint.config)
    assert (folder / "modeling_ragged.py").exists() == own_code
    model, report = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=own_code, dtype=torch.float32, output_loading_info=True
    )
    assert not any(report.values()), report
    expected = logits(checkpoint.load_model("cpu", torch.float32))
    assert torch.equal(logits(model.eval()), expected)
    return checkpoint.family.widths(checkpoint.config), model


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_layers_of_different_widths_are_pruned_again_in_memory_and_streamed(
    name: str, text: Path, tmp_path: Path
) -> None:
    source = ragged(tmp_path, name)
    for layout, sequential in (("ragged", True), ("uniform", False)):
        written = {}
        for place, budget in (("memory", None), ("streamed", "800MB")):
            written[place] = tmp_path / f"{layout}-{place}"
            job = recipe(
                source,
                text,
                written[place],
                layout=layout,
                sequential=sequential,
                sparsity=0.5,
                memory_budget=budget,
            )
            result = prune_checkpoint(recipe=job)
            widths, _ = opened(written[place])
            assert widths == result.widths
            assert sum(widths) == {"ragged": 20, "uniform": 24}[layout]
            assert (len(set(widths)) > 1) == (layout == "ragged")
            assert result.neurons_total == sum(WIDTHS)
            kept = KeptNeurons.load(written[place] / KEPT_FILE)
            assert kept.widths == tuple(WIDTHS)
            size = ModelSize.of(Checkpoint.open(source))
            assert result.parameters_after == size.parameters_with(sum(widths))
            assert "8 to 20" in (written[place] / "README.md").read_text()
        first, second = tensors(written["memory"]), tensors(written["streamed"])
        assert first.keys() == second.keys()
        for key, tensor in first.items():
            torch.testing.assert_close(tensor, second[key], rtol=1e-4, atol=1e-4)


def test_a_live_model_is_pruned_again_and_saved_as_what_it_is(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()

    def cut(model: PreTrainedModel, **changes: Any) -> list[int]:
        small = {"tokens": 500, "context": 32, "network_tokens": 300, "networks": 5}
        config = PruningConfig(**{**small, "width_multiple": 1, "sparsity": 0.3, **changes})
        return prune(model, tokenizer, TEXTS, config).widths

    own = AutoModelForCausalLM.from_pretrained(ragged(tmp_path), trust_remote_code=True)
    for model in (make_model("llama"), own):
        first = cut(model, layout="ragged")
        assert len(set(first)) > 1
        assert Checkpoint.of_model(model).config["per_layer_config"]
        found = discover(
            model, tokenizer, TEXTS, PruningConfig(tokens=500, networks=4, keep_networks=2)
        )
        assert list(found.widths) == first
        second = cut(model, layout="ragged", sparsity=0.2)
        assert sum(second) < sum(first)
        assert len(set(second)) > 1
        if model is own:  # its class builds any widths, so it can also be saved
            model.save_pretrained(tmp_path / "again")
            tokenizer.save_pretrained(tmp_path / "again")
            widths, loaded = opened(tmp_path / "again")
            assert widths == second
            assert torch.equal(logits(loaded), logits(model))
        third = cut(model, layout="uniform", sparsity=0.6)
        assert len(set(third)) == 1
        assert model.config.intermediate_size == third[0]
        folder = tmp_path / type(model).__module__
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        stock = AutoModelForCausalLM.from_pretrained(folder).eval()
        assert torch.equal(logits(stock), logits(model))


def test_equal_widths_that_do_not_reach_the_budget_are_refused_before_any_work(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = ragged(tmp_path)
    job = [*arguments(source, text, tmp_path / "out"), "--width-multiple", "4"]
    known = "24 of 40 in all: use --layout ragged, or remove more (--sparsity 0.4 or higher)"
    for layout in ("uniform", "auto"):
        for more in ([], ["--dry-run"]):
            refused(capsys, [*job, *more, "--layout", layout, "--sparsity", "0.3"], known)
            unknown = "use --layout ragged, or set the size"
            refused(capsys, [*job, *more, "--layout", layout, "--keep-networks", "2"], unknown)
    shown = run_json(capsys, *job, "--dry-run", "--sparsity", "0.4")
    assert shown["widths"] == [8, 8, 8]
    assert shown["seconds_high"] is not None
    model = Checkpoint.open(source).load_model("cpu", torch.float32)
    config = PruningConfig(sparsity=0.3, tokens=500, context=32)
    with pytest.raises(InvalidInput, match="equal layers can have at most 8 each"):
        prune(model, make_tokenizer(), TEXTS, config)
    even = ["--sparsity", "0.5", "--layout", "ragged", "--width-multiple", "2"]
    shown = run_json(capsys, *job, "--dry-run", *even)
    assert shown["widths"] == [4, 10, 6]  # the same share of each layer
    compared = run_json(capsys, "compare", *arguments(source, text), "--kept", "0.5")
    assert compared["budgets"][0]["widths"] == [8, 8, 8]  # multiples of 8


def test_only_the_width_key_of_per_layer_config_makes_layers_differ() -> None:
    config = FAMILY_CONFIGS["llama"]().to_dict()
    equal = {**config, "per_layer_config": {"0": {"head_dim": 4}, "1": {"intermediate_size": 24}}}
    family = family_of(equal)
    assert not family.has_own_widths(equal)
    assert family.widths(equal) == [24, 24, 24]
    with pytest.raises(InvalidInput, match="their own head_dim"):
        family_of({**config, "per_layer_config": {"0": {"head_dim": 8}}})
    # Gemma 4's stock class builds layers with attention heads of different sizes.
    gemma4 = family_of({"model_type": "gemma4_text", "per_layer_config": {"5": {"head_dim": 512}}})
    assert not gemma4.has_own_widths({"model_type": "gemma4_text"})


LAYOUTS: dict[str, list[str]] = {
    "uniform": ["--sparsity", "0.3"],
    "ragged": ["--sparsity", "0.45", "--layout", "ragged", "--width-multiple", "1"],
    "heads": ["--sparsity", "0.3", "--head-sparsity", "0.5"],
    "recovered": ["--sparsity", "0.3", "--recover", "--recover-passes", "1"],
}
COMMANDS: dict[str, list[str]] = {
    "prune": ["--layout", "ragged", "--sparsity", "0.3", "--output"],
    "dry run": ["--layout", "ragged", "--sparsity", "0.3", "--dry-run"],
    "discover": ["--output"],
    "rank": [],
    "ablate": ["--draws", "2"],
    "compare": [],
}


@pytest.mark.parametrize(
    "layout",
    ["ragged"]
    + [
        pytest.param(one, marks=pytest.mark.slow)
        for one in (*LAYOUTS, "dequantized")
        if one != "ragged"
    ],
)
def test_every_command_takes_what_a_run_writes(
    layout: str, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = tmp_path / "made"
    dense = save_tiny(tmp_path / "dense", dtype=torch.bfloat16)
    make_merging_tokenizer().save_pretrained(dense)  # llama.cpp loads no tokenizer without merges
    if layout == "dequantized":
        save_quantized(tmp_path / "quantized", "fp8-blocks", dtype=torch.bfloat16)
        make_merging_tokenizer().save_pretrained(tmp_path / "quantized")
        run_json(capsys, "dequantize", "--model", tmp_path / "quantized", "--output", made)
    else:
        run_json(capsys, *arguments(dense, text, made), *LAYOUTS[layout])
    widths, _ = opened(made)
    for command, flags in COMMANDS.items():
        target = [*flags, tmp_path / command] if "--output" in flags else flags
        named = [] if command in ("prune", "dry run") else [command]
        assert run_json(capsys, *named, *arguments(made, text), *target), command
    again, _ = opened(tmp_path / "prune")
    assert sum(again) < sum(widths)
    gguf = tmp_path / "model.gguf"
    run_json(capsys, "convert", "--model", made, "--to", "gguf", "--output", gguf)
    bundle = ["bundle", "--model", made, f"again={tmp_path / 'prune'}", "--output", tmp_path / "b"]
    run_json(capsys, *bundle)
    served = load_bundle(tmp_path / "b")
    assert torch.isfinite(logits(served.model)).all()
    assert (tmp_path / "b" / "modeling_ragged.py").exists() == (layout == "ragged")
    pytest.importorskip("lm_eval")
    line = tmp_path / "line.txt"
    line.write_text("3 apples cost 9 pence.\n")
    figures = run_json(capsys, "evaluate", "--model", made, "--tasks", line)["tasks"]["line"]
    assert figures["byte_perplexity"]["value"] > 1
