"""What a config says and llama.cpp does not compute is refused by name before a GGUF file is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from small_runs import refused
from tiny_models import make_merging_tokenizer, save_tiny
from transformers import PretrainedConfig

from fbn_prune.export.gguf_limits import CHECKED, SIZES, WITHOUT_EFFECT, check_config
from fbn_prune.export.to_gguf import _OwnAttributes
from fbn_prune.export.to_gguf import write as write_gguf
from fbn_prune.model.checkpoint import Checkpoint
from fbn_prune.model.families import FAMILIES
from fbn_prune.model.family import as_config

pytest.importorskip("gguf")

LLAMA_3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
WINDOW: dict[str, Any] = {
    "use_sliding_window": True,
    "sliding_window": 8,
    "max_window_layers": 1,
    "layer_types": None,
}


def stated(folder: Path, name: str, changes: dict[str, Any]) -> Path:
    """A tiny checkpoint whose config says something else."""
    save_tiny(folder, name)
    make_merging_tokenizer().save_pretrained(folder)
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(fields | changes))
    return folder


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("llama", {"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ("qwen2", {"hidden_act": "relu"}, "hidden_act = 'relu'"),
        ("qwen3", {"hidden_act": "gelu_pytorch_tanh"}, "hidden_act = 'gelu_pytorch_tanh'"),
        ("qwen2", WINDOW, "sliding_window = 8"),
        ("qwen3", WINDOW, "sliding_window = 8"),
        ("llama", {"rope_parameters": LINEAR}, "rope_type = 'linear'"),
        ("qwen2", {"rope_parameters": LLAMA_3}, "rope_type = 'llama3'"),
        ("qwen3", {"rope_parameters": LLAMA_3}, "rope_type = 'llama3'"),
        ("llama", {"rope_parameters": {**LLAMA_3, "partial_rotary_factor": 0.5}}, "partial_rotary"),
        ("llama", {"is_causal": False}, "is_causal = False"),
    ],
)
def test_what_llama_cpp_computes_otherwise_is_refused_by_name(
    name: str,
    changes: dict[str, Any],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = stated(tmp_path / "in", name, changes)
    refused(capsys, ["convert", "--model", str(folder), "--output", str(tmp_path / "m")], message)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_attention_biases_of_qwen3_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import Qwen3Config

    fields = as_config(json.loads((save_tiny(tmp_path / "a", "qwen3") / "config.json").read_text()))
    config = Qwen3Config(**{**fields.to_dict(), "attention_bias": True})
    folder = save_tiny(tmp_path / "in", config=config)
    make_merging_tokenizer().save_pretrained(folder)
    args = ["convert", "--model", str(folder), "--output", str(tmp_path / "m")]
    refused(capsys, args, "attention_bias = True")


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("llama", {"hidden_act": "swish"}),
        ("qwen2", {**WINDOW, "sliding_window": 64}),
        ("qwen2", {"use_sliding_window": False, "sliding_window": 8}),
        ("llama", {"attention_dropout": 0.1, "initializer_range": 0.5}),
    ],
)
def test_what_changes_no_logit_is_no_obstacle(
    name: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    write_gguf(Checkpoint.open(stated(tmp_path / "in", name, changes)), tmp_path / "m.gguf")


def test_every_key_of_the_config_classes_is_known(tmp_path: Path) -> None:
    known = SIZES | CHECKED | WITHOUT_EFFECT | set(PretrainedConfig().to_dict())
    for family in FAMILIES:
        if family.gguf is not None and family.gguf.arch is not None:  # others are only read
            for model_type in family.model_types:
                keys = set(type(as_config({"model_type": model_type}))().to_dict())
                assert keys - known == set(), "look up what llama.cpp does with these"


def test_a_key_that_nobody_has_looked_up_must_have_its_default(tmp_path: Path) -> None:
    from transformers import LlamaConfig

    class Newer(LlamaConfig):
        model_type = "llama"

        def to_dict(self) -> dict[str, Any]:
            return {"logit_cap": getattr(self, "logit_cap", None), **super().to_dict()}

    source = Checkpoint.open(stated(tmp_path / "in", "llama", {}))
    newer = Newer(**source.config)
    facts = source.family.gguf
    assert facts is not None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fbn_prune.export.gguf_limits.as_config", lambda config: newer)
        check_config(source, "llama", facts, _OwnAttributes(newer))
        newer.logit_cap = 30.0
        with pytest.raises(Exception, match=r"logit_cap = 30\.0"):
            check_config(source, "llama", facts, _OwnAttributes(newer))
