"""Architectures without an entry of their own, found by structure, through the whole of a run."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from small_runs import recipe
from tiny_models import CONTEXT, VOCAB, logits, make_tokenizer
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
)

from fbn_prune.api import prune_checkpoint
from fbn_prune.model.checkpoint import Checkpoint
from fbn_prune.model.tiny_copy import tiny_config, tiny_model
from fbn_prune.pruning.recovery import healing
from fbn_prune.runs import setup
from fbn_prune.runs.memory import plan_memory

TOKENS = {"bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 257}
ALTERNATING = ["sliding_attention", "full_attention"]


def config(model_type: str, layers: int, **text: object) -> PretrainedConfig:
    """A tiny config with the vocabulary of the byte tokenizer; `text` goes to the text model's part."""
    whole = CONFIG_MAPPING[model_type]
    nested = "text_config" in whole.sub_configs
    small = tiny_config(whole(text_config=text) if nested else whole(**text), layers)
    inner = small.get_text_config(decoder=True)
    for one in {id(each): each for each in (small, inner)}.values():
        for key, value in {**TOKENS, "vocab_size": VOCAB}.items():
            setattr(one, key, value)
    if hasattr(inner, "vocab_size_per_layer_input"):
        inner.vocab_size_per_layer_input = VOCAB
    inner.max_position_embeddings = CONTEXT
    return small


KINDS: dict[str, Callable[[], PretrainedConfig]] = {
    # Linear attention beside full attention, a vision tower around the text model.
    "qwen3_5": lambda: config("qwen3_5", 4),
    # Layers that share keys, have MLPs of twice the width, and get inputs made from the tokens.
    "gemma4": lambda: config(
        "gemma4",
        4,
        num_hidden_layers=4,
        layer_types=ALTERNATING * 2,
        num_kv_shared_layers=2,
        use_double_wide_mlp=True,
    ),
    # Short convolutions beside attention; the config computes the width from several keys.
    "lfm2": lambda: config(
        "lfm2", 3, num_hidden_layers=3, layer_types=["conv", "full_attention", "conv"]
    ),
    # Mamba beside attention, without experts.
    "granitemoehybrid": lambda: config(
        "granitemoehybrid",
        2,
        num_local_experts=0,
        num_hidden_layers=2,
        layer_types=["linear_attention", "full_attention"],
    ),
    # Text models inside multimodal ones.
    "gemma3": lambda: config("gemma3", 2, num_hidden_layers=2, layer_types=ALTERNATING),
    "mistral3": lambda: config("mistral3", 2),
    "qwen2_5_vl": lambda: config(
        "qwen2_5_vl",
        2,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    ),
    "qwen3_vl": lambda: config("qwen3_vl", 2),
}
kinds = pytest.mark.parametrize("kind", KINDS)


def save(kind: str, folder: Path) -> Path:
    model = tiny_model(KINDS[kind]())
    model.config.use_cache = True
    model.generation_config = GenerationConfig(**TOKENS)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def stored(folder: Path) -> dict[str, torch.Tensor]:
    files = folder.glob("model*.safetensors")
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def reloaded(folder: Path) -> PreTrainedModel:
    """The model as transformers loads it, all tensors accounted for."""
    checkpoint = Checkpoint.open(folder)
    own_code = (folder / "modeling_ragged.py").exists()
    (name,) = checkpoint.config["architectures"]
    stock = AutoModelForCausalLM if own_code else getattr(transformers, name)
    model, report = stock.from_pretrained(
        folder, trust_remote_code=own_code, dtype=torch.float32, output_loading_info=True
    )
    assert type(model).__name__ == name
    assert not any(report.values()), report
    expected = logits(checkpoint.load_model("cpu", torch.float32))
    assert torch.equal(logits(model.eval()), expected)
    return model


@kinds
@pytest.mark.parametrize("layout", ["uniform", "ragged"])
def test_a_found_family_is_pruned_saved_loaded_and_generates(
    kind: str, layout: str, text: Path, tmp_path: Path
) -> None:
    source = save(kind, tmp_path / "dense")
    written = {}
    for place, budget in (("memory", None), ("streamed", "800MB")):
        written[place] = tmp_path / place
        job = recipe(
            source,
            text,
            written[place],
            layout=layout,
            sparsity=0.5,
            width_multiple=2,
            allow_untrained=True,
            memory_budget=budget,
        )
        result = prune_checkpoint(recipe=job)
        assert 0.4 < sum(result.widths) / result.neurons_total < 0.6
    model = reloaded(written["memory"])
    new = model.generate(torch.tensor([[72, 105]]), max_new_tokens=4, do_sample=False)
    assert new.shape[1] > 2
    before, after = stored(source), stored(written["memory"])
    family = Checkpoint.open(source).family
    assert before.keys() == after.keys()
    cut = {name for name in before if before[name].shape != after[name].shape}
    assert cut
    assert all(family.output.path.rpartition(".")[0] in name for name in cut)
    for name in before.keys() - cut:
        assert torch.equal(before[name], after[name]), name
    for name, tensor in stored(written["streamed"]).items():
        torch.testing.assert_close(tensor, after[name], rtol=1e-3, atol=1e-3)


@kinds
def test_a_found_family_is_calibrated_on_its_own_text_and_trained_in_little_memory(
    kind: str, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not all of them state their attention heads, and their layers have many forms."""
    source = save(kind, tmp_path / "dense")
    job = recipe(
        source,
        text,
        tmp_path / "out",
        sparsity=0.5,
        width_multiple=2,
        allow_untrained=True,
        calibration=["generated"],
        recover=True,
        recover_steps="distil",
        recover_passes=1,
    )
    prune_checkpoint(recipe=job)
    monkeypatch.setattr(
        setup, "plan_memory", lambda *about: replace(plan_memory(*about), recompute=True)
    )
    ran: list[object] = []
    again = healing.recomputed
    monkeypatch.setattr(healing, "recomputed", lambda layers: ran.append(layers) or again(layers))
    prune_checkpoint(recipe=job.model_copy(update={"output": tmp_path / "small"}))
    assert len(ran) == 1
    found, expected = stored(tmp_path / "small"), stored(tmp_path / "out")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_layer_without_an_mlp_is_left_alone(text: Path, tmp_path: Path) -> None:
    kinds = ["linear_attention", "mlp", "full_attention", "mlp"]
    small = config("nemotron_h", 4, layers_block_type=kinds)
    model = tiny_model(copy.deepcopy(small))
    model.generation_config = GenerationConfig(**TOKENS)
    model.save_pretrained(tmp_path / "dense")
    make_tokenizer().save_pretrained(tmp_path / "dense")
    job = recipe(
        tmp_path / "dense",
        text,
        tmp_path / "out",
        sparsity=0.5,
        width_multiple=2,
        allow_untrained=True,
    )
    assert len(prune_checkpoint(recipe=job).widths) == 2
    reloaded(tmp_path / "out")
