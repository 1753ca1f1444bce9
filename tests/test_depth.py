"""Claims about leaving out whole layers: what is left is a stock model with fewer layers that computes the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small_runs import blocks, recipe, refused, run_json
from test_layout import job
from tiny_models import FAMILY_CONFIGS, LAYERS, TOKENS, WIDTH, logits, make_model, save_tiny
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3TextConfig,
    PreTrainedModel,
    Qwen2Config,
)

from fbn_prune import PruningConfig, prune
from fbn_prune.export.writer import verify_export, write_checkpoint
from fbn_prune.model.adapter import ModelAdapter
from fbn_prune.model.checkpoint import Checkpoint
from fbn_prune.model.depth import Depth, leave_out, leaving_out
from fbn_prune.model.families import family_of
from fbn_prune.model.layerwise import LayerwiseForward
from fbn_prune.model.perplexity import perplexity
from fbn_prune.model.surgery import MlpCut
from fbn_prune.progress import StageClock
from fbn_prune.pruning.cutting import CutPlan, cut_layers
from fbn_prune.pruning.evidence import CutOptions
from fbn_prune.runs.main_job import run_prune
from fbn_prune.runs.setup import prepare


def keeping_all(adapter: ModelAdapter) -> list[MlpCut]:
    return [
        MlpCut(torch.arange(weight.shape[1]), weight.clone())
        for weight in map(adapter.down_weight, range(adapter.num_layers))
    ]


def without(source: Path, left_out: set[int], folder: Path) -> Path:
    """The checkpoint without some layers, written."""
    checkpoint = Checkpoint.open(source)
    cuts = keeping_all(ModelAdapter(checkpoint.load_model("cpu", torch.float32)))
    folder.mkdir()
    write_checkpoint(checkpoint, cuts, folder, depth=Depth(len(cuts), frozenset(left_out)))
    verify_export(folder)
    return folder


@pytest.mark.parametrize("name", FAMILY_CONFIGS)
def test_a_written_model_with_fewer_layers_is_the_live_one_in_which_they_pass_their_input_on(
    name: str, tmp_path: Path
) -> None:
    source = save_tiny(tmp_path / "model", name)
    loaded = AutoModelForCausalLM.from_pretrained(without(source, {1}, tmp_path / "out"))
    assert loaded.config.num_hidden_layers == LAYERS - 1
    adapter = ModelAdapter(make_model(name))
    before = logits(adapter.model)
    LayerwiseForward(adapter, [])  # learns what its layers return
    with leaving_out(adapter, [1]):
        expected = logits(adapter.model)
    assert not torch.allclose(expected, before, atol=1e-2)
    assert torch.equal(logits(adapter.model), before)
    torch.testing.assert_close(logits(loaded), expected, rtol=1e-5, atol=1e-5)
    Depth(LAYERS, frozenset({1})).apply(adapter.model, adapter.family)
    assert torch.equal(logits(adapter.model), expected)
    # With a cache, attention must know its layer's new number.
    mine = adapter.model.generate(TOKENS, max_new_tokens=5, do_sample=False)
    assert torch.equal(mine, loaded.generate(TOKENS, max_new_tokens=5, do_sample=False))


def test_kinds_of_attention_stay_with_their_layers(tmp_path: Path) -> None:
    config: Gemma3TextConfig = FAMILY_CONFIGS["gemma3_text"]()  # type: ignore[assignment]
    config.num_hidden_layers = 4
    config.layer_types = ["sliding_attention", "full_attention"] * 2
    source = save_tiny(tmp_path / "model", "gemma3_text", config=config)
    loaded = AutoModelForCausalLM.from_pretrained(without(source, {2}, tmp_path / "out"))
    assert loaded.config.layer_types == ["sliding_attention", "full_attention", "full_attention"]


def test_a_list_that_the_config_class_derives_is_written_out() -> None:
    fields = {
        "model_type": "qwen2",
        "num_hidden_layers": 4,
        "use_sliding_window": True,
        "sliding_window": 8,
        "max_window_layers": 2,
    }
    derived = Qwen2Config(**fields).layer_types
    assert len(set(derived)) == 2
    changed = Depth(4, frozenset({0})).config(fields)
    assert changed["num_hidden_layers"] == 3
    assert Qwen2Config(**changed).layer_types == derived[1:]


def test_the_layer_before_makes_up_for_one_that_is_left_out() -> None:
    rises = {}
    batches = blocks(*[48] * 40).batches(400)
    reference = ModelAdapter(_quiet(make_model("llama")))
    dense = LayerwiseForward(reference, batches)
    for _ in range(LAYERS):
        dense.advance()
    for fitted in (True, False):
        adapter = ModelAdapter(_quiet(make_model("llama")))
        if fitted:
            options = CutOptions(True, 1e-2, 1e-3, 0, torch.float32)
            plan = CutPlan("second-order", [WIDTH] * LAYERS, left_out=frozenset({1}))
            cut_layers(adapter, batches, plan, options, clock=StageClock())
        else:
            LayerwiseForward(adapter, [])
            leave_out(adapter, [1])
        forward = LayerwiseForward(adapter, batches)
        for _ in range(LAYERS):
            forward.advance()
        pairs = zip(forward.hidden, dense.hidden, strict=True)
        rises[fitted] = sum(float((one - other).square().sum()) for one, other in pairs)
    assert rises[True] < 0.9 * rises[False]


def _quiet(model: PreTrainedModel) -> PreTrainedModel:
    """The model with weaker attention, so that much of what a layer does depends on its own token."""
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.mul_(0.1)
    return model


@pytest.mark.parametrize("layout", ["uniform", "ragged"])
def test_a_target_that_needs_fewer_layers_gets_fewer_layers(
    layout: str, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = save_tiny(tmp_path / "model")
    # More than all neurons but one a layer, and less than two layers.
    target = Checkpoint.open(source).total_parameters - 3600
    extra = ["--structures", "neurons,layers", "--layout", layout, "--target-params", str(target)]
    result = run_json(capsys, *job(source, text, tmp_path / "out", *extra))
    assert result["parameters_after"] <= target
    assert result["layers_left_out"]
    assert 0 not in result["layers_left_out"]
    assert len(result["widths"]) == LAYERS - len(result["layers_left_out"])
    if layout == "uniform":
        assert len(set(result["widths"])) == 1
    written = Checkpoint.open(tmp_path / "out")
    assert written.family.widths(written.config) == result["widths"]
    data = _held_out(source, text)
    again = ModelAdapter(written.load_model("cpu", torch.float32), written.family)
    assert perplexity(again, data) == pytest.approx(result["perplexity_after"], rel=1e-4)
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"and {len(result['layers_left_out'])} of {LAYERS} layers" in card


def _held_out(source: Path, text: Path) -> list:
    from fbn_prune.runs.opening import open_run

    same = recipe(source, text, sparsity=0.5, tokens=600, seed=0, context=48)
    return open_run(prepare(same, StageClock()), StageClock()).data.held_out.batches(4096)


def test_a_live_model_gets_the_weights_of_the_written_one(text: Path, tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "model")
    parameters = sum(p.numel() for p in make_model("llama").parameters())
    settings = {
        "structures": "neurons,layers",
        "target_params": str(parameters - 3000),
        "tokens": 600,
        "context": 48,
        "width_multiple": 4,
        "recover": True,
        "recover_passes": 1,
    }
    written = run_prune(
        recipe(source, text, tmp_path / "out", **settings, keep_networks=None, seed=0), StageClock()
    )
    assert written.layers_left_out
    live = AutoModelForCausalLM.from_pretrained(source)
    tokenizer = AutoTokenizer.from_pretrained(source)
    result = prune(live, tokenizer, str(text), PruningConfig(**settings))
    assert result.layers_left_out == written.layers_left_out
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert live.config.num_hidden_layers == len(written.widths)
    mine, theirs = live.state_dict(), loaded.state_dict()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)
    live.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(logits(again), logits(live))
    live.train()
    live(TOKENS, labels=TOKENS).loss.backward()


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--structures", "vocabulary"], "vocabulary alone is `fbn-prune trim-vocabulary`"),
        (["--structures", "neurons,attics"], "give neurons, heads, attention, layers, vocabulary"),
        (["--structures", "layers", "--layout", "ragged"], "where no neurons go"),
        (["--structures", "neurons,layers", "--layout", "auto"], "give uniform or ragged"),
        (
            ["--structures", "neurons,layers", "--layout", "ragged", "--widths", "loss"],
            "widths are searched",
        ),
        (
            ["--structures", "neurons,layers", "--target-params", "100"],
            "embeddings and the narrowest layer that stays alone take",
        ),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(
    extra: list[str], message: str, tiny: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    budget = [] if "--target-params" in extra else ["--sparsity", "0.5"]
    refused(capsys, job(tiny, text, Path("out"), *budget, *extra), message)


def test_a_model_of_one_layer_must_keep_it(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = FAMILY_CONFIGS["llama"]()
    config.num_hidden_layers = 1
    model = save_tiny(tmp_path / "model", config=config)
    extra = ["--structures", "neurons,layers", "--sparsity", "0.5"]
    refused(capsys, job(model, text, Path("out"), *extra), "a single layer, which must stay")


def test_tensors_of_staying_layers_get_new_numbers() -> None:
    family = family_of(FAMILY_CONFIGS["llama"]())
    depth = Depth(12, frozenset({1, 10}))
    assert (
        depth.name(family, "model.layers.0.mlp.up_proj.weight")
        == "model.layers.0.mlp.up_proj.weight"
    )
    assert depth.name(family, "model.layers.1.mlp.up_proj.weight") is None
    assert (
        depth.name(family, "model.layers.11.input_layernorm.weight")
        == "model.layers.9.input_layernorm.weight"
    )
    assert (
        depth.name(family, "layers.2.self_attn.o_proj.weight") == "layers.1.self_attn.o_proj.weight"
    )
    assert depth.name(family, "model.embed_tokens.weight") == "model.embed_tokens.weight"
