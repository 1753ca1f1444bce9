"""A checkpoint whose layers differ in width is the live model, in every family and through every way of loading."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import FAMILY_CONFIGS, HIDDEN, save_tiny
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from fbn_prune.errors import InvalidInput
from fbn_prune.export.writer import verify_export, write_checkpoint
from fbn_prune.model.adapter import ModelAdapter
from fbn_prune.model.checkpoint import Checkpoint
from fbn_prune.model.surgery import MlpCut

every_family = pytest.mark.parametrize("name", FAMILY_CONFIGS)
TOKENS = torch.arange(3, 40).view(1, -1)


@pytest.fixture(autouse=True)
def _modules_of_its_own(tmp_path_factory: pytest.TempPathFactory, monkeypatch: Any) -> None:
    """Code files are cached by folder name; a test must not meet another one's."""
    folder = tmp_path_factory.mktemp("modules")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(folder))


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    return model(TOKENS, use_cache=False).logits.float()


def some_widths(source: Checkpoint) -> list[int]:
    """Three different widths; the middle layer stays whole."""
    return [4, source.family.width(source.config), 7]


def random_cuts(source: Checkpoint, widths: Sequence[int], *, bias: bool = False) -> list[MlpCut]:
    generator = torch.Generator().manual_seed(0)
    full = source.family.width(source.config)
    return [
        MlpCut(
            torch.randperm(full, generator=generator)[:width].sort().values,
            torch.randn(HIDDEN, width, generator=generator, dtype=torch.float64),
            torch.randn(HIDDEN, generator=generator) if bias else None,
        )
        for width in widths
    ]


def cut_live(
    source: Checkpoint, cuts: Sequence[MlpCut], dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    adapter = ModelAdapter(source.load_model("cpu", dtype))
    for layer, cut in enumerate(cuts):
        adapter.cut(layer, cut, round_to=source.storage_dtype)
    return adapter.model


def export(source: Checkpoint, cuts: Sequence[MlpCut], directory: Path, **more: Any) -> Path:
    directory.mkdir()
    write_checkpoint(source, cuts, directory, **more)
    verify_export(directory)
    return directory


def load(folder: Path, **more: Any) -> PreTrainedModel:
    model, report = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, output_loading_info=True, **more
    )
    assert not any(report.values()), report
    return model.eval()


@every_family
def test_the_export_is_the_live_model_also_saved_and_loaded_again(
    name: str, tmp_path: Path
) -> None:
    source = Checkpoint.open(save_tiny(tmp_path / "in", name))
    cuts = random_cuts(source, some_widths(source))
    out = export(source, cuts, tmp_path / "out", max_shard_size="6KB")
    expected = logits(cut_live(source, cuts))
    reloaded = load(out)
    assert torch.equal(logits(reloaded), expected)
    prompt = AutoTokenizer.from_pretrained(out)("Once", return_tensors="pt")
    answer = reloaded.generate(**prompt, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    assert answer.shape == (1, 9)
    reloaded.save_pretrained(tmp_path / "again")
    again = load(tmp_path / "again")
    assert torch.equal(logits(again), expected)
    assert again.config.auto_map == reloaded.config.auto_map
    again.save_pretrained(tmp_path / "third")
    assert torch.equal(logits(load(tmp_path / "third")), expected)


@every_family
def test_it_loads_onto_devices_that_accelerate_chooses_and_in_bfloat16(
    name: str, tmp_path: Path
) -> None:
    source = Checkpoint.open(save_tiny(tmp_path / "in", name, dtype=torch.bfloat16))
    cuts = random_cuts(source, some_widths(source))
    out = export(source, cuts, tmp_path / "out")
    spread = load(out, device_map="auto", dtype=torch.float32)
    assert torch.equal(logits(spread), logits(cut_live(source, cuts)))
    stored = load(out)
    assert stored.dtype == torch.bfloat16
    assert torch.equal(logits(stored), logits(cut_live(source, cuts, torch.bfloat16)))


@every_family
def test_the_own_loader_opens_it_to_run_it_without_its_code(name: str, tmp_path: Path) -> None:
    source = Checkpoint.open(save_tiny(tmp_path / "in", name))
    widths = some_widths(source)
    cuts = random_cuts(source, widths)
    out = export(source, cuts, tmp_path / "out")
    (out / "modeling_ragged.py").write_text("raise SystemExit('ran code of a checkpoint')")
    written = Checkpoint.open(out, ragged=True)
    assert written.family.widths(written.config) == widths
    model = written.load_model("cpu", torch.float32)
    assert torch.equal(logits(model), logits(cut_live(source, cuts)))
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(load(tmp_path / "again")), logits(model))


@every_family
def test_it_is_refused_where_it_would_be_pruned_again(name: str, tmp_path: Path) -> None:
    source = Checkpoint.open(save_tiny(tmp_path / "in", name))
    out = export(source, random_cuts(source, some_widths(source)), tmp_path / "out")
    with pytest.raises(InvalidInput, match="different widths"):
        Checkpoint.open(out)


@every_family
def test_without_trust_it_does_not_load_as_something_else(name: str, tmp_path: Path) -> None:
    source = Checkpoint.open(save_tiny(tmp_path / "in", name))
    out = export(source, random_cuts(source, some_widths(source)), tmp_path / "out")
    with pytest.raises(RuntimeError, match=source.family.width_key):
        AutoModelForCausalLM.from_pretrained(out)


@every_family
def test_the_base_model_alone_loads_too(name: str, tmp_path: Path) -> None:
    source = Checkpoint.open(save_tiny(tmp_path / "in", name))
    cuts = random_cuts(source, some_widths(source))
    out = export(source, cuts, tmp_path / "out")
    with torch.no_grad():
        base = AutoModel.from_pretrained(out, trust_remote_code=True).eval()
        found = base(TOKENS).last_hidden_state
        expected = cut_live(source, cuts).base_model(TOKENS).last_hidden_state
    assert torch.equal(found, expected)


@every_family
def test_a_model_from_the_config_alone_has_the_widths(name: str, tmp_path: Path) -> None:
    source = Checkpoint.open(save_tiny(tmp_path / "in", name))
    widths = some_widths(source)
    out = export(source, random_cuts(source, widths), tmp_path / "out")
    model = AutoModelForCausalLM.from_config(load(out).config, trust_remote_code=True)
    assert ModelAdapter(model).widths == widths
    assert torch.isfinite(logits(model)).all()


@pytest.mark.parametrize("name", ["llama", "llama-mlp-bias", "gpt2", "opt", "falcon-bias"])
def test_biases_come_along(name: str, tmp_path: Path) -> None:
    source = Checkpoint.open(save_tiny(tmp_path / "in", name))
    cuts = random_cuts(source, some_widths(source), bias=True)
    out = export(source, cuts, tmp_path / "out")
    assert torch.equal(logits(load(out)), logits(cut_live(source, cuts)))


@pytest.mark.parametrize("name", ["llama-tied", "llama"])
def test_tied_embeddings_stay_tied_and_untied_ones_untied(name: str, tmp_path: Path) -> None:
    source = Checkpoint.open(save_tiny(tmp_path / "in", name))
    out = export(source, random_cuts(source, some_widths(source)), tmp_path / "out")
    model = load(out)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tied == (name == "llama-tied")


def test_the_attention_implementation_can_be_changed_afterwards(tmp_path: Path) -> None:
    source = Checkpoint.open(save_tiny(tmp_path / "in"))
    out = export(source, random_cuts(source, some_widths(source)), tmp_path / "out")
    model = load(out)
    before = logits(model)
    model.set_attn_implementation("eager")
    assert model.model.layers[0].self_attn.config._attn_implementation == "eager"
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-5)


def test_where_transformers_builds_the_widths_itself_nothing_is_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.llama import modeling_llama

    from fbn_prune.model import modeling_ragged

    class OwnWidth(modeling_llama.LlamaDecoderLayer):
        def __init__(self, config: Any, layer_idx: int) -> None:
            super().__init__(config.per_layer_config[layer_idx], layer_idx)

    source = Checkpoint.open(save_tiny(tmp_path / "in"))
    cuts = random_cuts(source, some_widths(source))
    out = export(source, cuts, tmp_path / "out")
    monkeypatch.setattr(modeling_llama, "LlamaDecoderLayer", OwnWidth)
    monkeypatch.setattr(modeling_ragged, "_narrow", lambda *_: pytest.fail("was built right"))
    model = modeling_ragged.LlamaForCausalLM.from_pretrained(out).eval()
    assert torch.equal(logits(model), logits(cut_live(source, cuts)))


def test_a_stock_model_may_be_opened_after_it_by_the_name_that_transformers_serve_uses(
    tmp_path: Path,
) -> None:
    from transformers import AutoModelForDecision

    source = Checkpoint.open(save_tiny(tmp_path / "in", "granite"))
    cuts = random_cuts(source, some_widths(source))
    out = export(source, cuts, tmp_path / "out")
    served = AutoModelForDecision.from_pretrained(out, trust_remote_code=True).eval()
    assert torch.equal(logits(served), logits(cut_live(source, cuts)))
    stock = AutoModelForDecision.from_pretrained(source.path).eval()
    assert torch.equal(logits(stock), logits(source.load_model("cpu", torch.float32)))


def test_the_config_states_the_widths_in_the_standard_form(tmp_path: Path) -> None:
    source = Checkpoint.open(save_tiny(tmp_path / "in"))
    out = export(source, random_cuts(source, [4, 24, 7]), tmp_path / "out")
    config = json.loads((out / "config.json").read_text())
    assert config["per_layer_config"] == {
        "0": {"intermediate_size": 4},
        "2": {"intermediate_size": 7},
    }
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["model_type"] == "llama"
    assert (out / "modeling_ragged.py").stat().st_size < 5000
