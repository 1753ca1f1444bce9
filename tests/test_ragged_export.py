"""A checkpoint whose layers differ in width is the live model, in every family and through every way of loading."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import cut_live, export, random_cuts
from tiny_models import FAMILY_CONFIGS, PATHS, TOKENS, logits, save_tiny
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from fbn_prune.model.adapter import ModelAdapter
from fbn_prune.model.checkpoint import Checkpoint

WIDTHS = [4, 24, 7]
"""The middle layer stays whole, where 24 neurons are all."""


@pytest.fixture(autouse=True)
def _modules_of_its_own(tmp_path_factory: pytest.TempPathFactory, monkeypatch: Any) -> None:
    """Code files are cached by folder name; a test must not meet another one's."""
    folder = tmp_path_factory.mktemp("modules")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(folder))


def load(folder: Path, **more: Any) -> PreTrainedModel:
    model, report = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, output_loading_info=True, **more
    )
    assert not any(report.values()), report
    return model.eval()


@pytest.mark.parametrize("name", FAMILY_CONFIGS)
def test_the_export_is_the_live_model_also_saved_and_loaded_again(
    name: str, tmp_path: Path
) -> None:
    source = Checkpoint.open(save_tiny(tmp_path / "in", name))
    biased = source.family.accepts_bias(source.config)
    cuts = random_cuts(source, WIDTHS, bias=biased)
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


@pytest.mark.parametrize("name", PATHS)
def test_it_loads_onto_devices_that_accelerate_chooses_and_in_bfloat16(
    name: str, tmp_path: Path
) -> None:
    source = Checkpoint.open(save_tiny(tmp_path / "in", name, dtype=torch.bfloat16))
    cuts = random_cuts(source, WIDTHS)
    out = export(source, cuts, tmp_path / "out")
    spread = load(out, device_map="auto", dtype=torch.float32)
    assert torch.equal(logits(spread), logits(cut_live(source, cuts)))
    stored = load(out)
    assert stored.dtype == torch.bfloat16
    assert torch.equal(logits(stored), logits(cut_live(source, cuts, torch.bfloat16)))


@pytest.mark.parametrize("name", [*PATHS, "llama-tied"])
def test_the_config_and_the_base_model_alone_have_the_widths_but_not_without_trust(
    name: str, tmp_path: Path
) -> None:
    source = Checkpoint.open(save_tiny(tmp_path / "in", name))
    cuts = random_cuts(source, WIDTHS)
    out = export(source, cuts, tmp_path / "out")
    with pytest.raises(RuntimeError, match=source.family.width_key):
        AutoModelForCausalLM.from_pretrained(out)
    expected = cut_live(source, cuts)
    with torch.no_grad():
        base = AutoModel.from_pretrained(out, trust_remote_code=True).eval()
        found = base(TOKENS).last_hidden_state
        assert torch.equal(found, expected.base_model(TOKENS).last_hidden_state)
    model = load(out)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tied == (name not in ("llama", "phi3"))
    model = AutoModelForCausalLM.from_config(model.config, trust_remote_code=True)
    assert ModelAdapter(model).widths == WIDTHS
    assert torch.isfinite(logits(model)).all()


@pytest.mark.parametrize("name", PATHS)
def test_the_own_loader_opens_it_without_running_its_code(name: str, tmp_path: Path) -> None:
    source = Checkpoint.open(save_tiny(tmp_path / "in", name))
    cuts = random_cuts(source, WIDTHS)
    out = export(source, cuts, tmp_path / "out")
    (out / "modeling_ragged.py").write_text("raise SystemExit('ran code of a checkpoint')")
    written = Checkpoint.open(out)
    assert written.family.widths(written.config) == WIDTHS
    model = written.load_model("cpu", torch.float32)
    assert torch.equal(logits(model), logits(cut_live(source, cuts)))
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(load(tmp_path / "again")), logits(model))


def test_the_attention_implementation_can_be_changed_afterwards(tiny: Path, tmp_path: Path) -> None:
    source = Checkpoint.open(tiny)
    model = load(export(source, random_cuts(source, WIDTHS), tmp_path / "out"))
    before = logits(model)
    model.set_attn_implementation("eager")
    assert model.model.layers[0].self_attn.config._attn_implementation == "eager"
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-5)


def test_where_transformers_builds_the_widths_itself_nothing_is_changed(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.llama import modeling_llama

    from fbn_prune.model import modeling_ragged

    class OwnWidth(modeling_llama.LlamaDecoderLayer):
        def __init__(self, config: Any, layer_idx: int) -> None:
            super().__init__(config.per_layer_config[layer_idx], layer_idx)

    source = Checkpoint.open(tiny)
    cuts = random_cuts(source, WIDTHS)
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
    cuts = random_cuts(source, WIDTHS)
    out = export(source, cuts, tmp_path / "out")
    served = AutoModelForDecision.from_pretrained(out, trust_remote_code=True).eval()
    assert torch.equal(logits(served), logits(cut_live(source, cuts)))
    stock = AutoModelForDecision.from_pretrained(source.path).eval()
    assert torch.equal(logits(stock), logits(source.load_model("cpu", torch.float32)))


def test_the_config_states_the_widths_in_the_standard_form(tiny: Path, tmp_path: Path) -> None:
    source = Checkpoint.open(tiny)
    out = export(source, random_cuts(source, WIDTHS), tmp_path / "out")
    config = json.loads((out / "config.json").read_text())
    assert config["per_layer_config"] == {
        "0": {"intermediate_size": 4},
        "2": {"intermediate_size": 7},
    }
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["model_type"] == "llama"
    assert (out / "modeling_ragged.py").stat().st_size < 9000
