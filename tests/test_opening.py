"""What transformers cannot open is refused by every command before any work, or read as what it means."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import arguments, refused, run_json
from tiny_models import logits, save_tiny
from transformers import AutoModelForCausalLM

from fbn_prune.cli.main import _exit_code
from fbn_prune.errors import InvalidInput
from fbn_prune.model.checkpoint import Checkpoint
from fbn_prune.model.config_checks import ConfigWarning


def edited(folder: Path, file: str = "config.json", **fields: Any) -> Path:
    """Set fields of a JSON file of a checkpoint; None removes one."""
    content = {**json.loads((folder / file).read_text()), **fields}
    kept = {key: value for key, value in content.items() if value is not None}
    (folder / file).write_text(json.dumps(kept))
    return folder


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "activation": ({"hidden_act": "swiglu"}, "KeyError: 'swiglu'"),
    "kind of rope": ({"rope_parameters": {"rope_type": "ntk", "factor": 2.0}}, "KeyError: 'ntk'"),
    "kind of rope in a list": ({"rope_parameters": {"rope_type": ["linear"]}}, "TypeError"),
    "base of rope": ({"rope_parameters": {"rope_type": "default", "rope_theta": "x"}}, "TypeError"),
    "no key heads": ({"num_key_value_heads": 0}, "ZeroDivisionError"),
    "padding": ({"pad_token_id": 99999}, "Padding_idx must be within num_embeddings"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_config_that_no_model_can_be_built_from_is_refused_on_opening(
    case: str, tmp_path: Path
) -> None:
    fields, message = REFUSED[case]
    model = edited(save_tiny(tmp_path / "model"), **fields)
    with pytest.raises(InvalidInput, match="cannot build the model") as refusal:
        Checkpoint.open(model)
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_every_command_refuses_in_one_line_and_so_does_the_dry_run(
    tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = edited(save_tiny(tmp_path / "model"), hidden_act="swiglu")
    job = arguments(model, text)
    output = ["--output", str(tmp_path / "out")]
    commands = {
        "": [*job, *output],
        "dry run": [*job, "--dry-run"],
        "streamed": [*job, "--memory-budget", "800MB", *output],
        "discover": ["discover", *job, *output],
        "rank": ["rank", *job],
        "ablate": ["ablate", *job],
        "compare": ["compare", *job],
        "evaluate": ["evaluate", "--model", str(model), "--tasks", str(text)],
        "convert": ["convert", "--model", str(model), "--to", "gguf", *output],
        "bundle": ["bundle", "--model", str(model), f"a={model}", *output],
    }
    for command in commands.values():
        refused(capsys, command, "KeyError: 'swiglu'")
    assert not (tmp_path / "out").exists()


def test_a_config_whose_model_is_built_but_cannot_run_is_refused_before_the_work(
    tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rope = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0, "partial_rotary_factor": 0.5}
    model = edited(save_tiny(tmp_path / "model"), rope_parameters=rope)  # Llama turns whole heads
    job = arguments(model, text)
    output = ["--output", str(tmp_path / "out")]
    for command in (
        [*job, *output],
        [*job, *output, "--memory-budget", "800MB"],
        ["discover", *job, *output],
        ["rank", *job],
        ["evaluate", "--model", str(model), "--tasks", str(text)],
    ):
        assert _exit_code(command) == 2, command
        (line,) = [one for one in capsys.readouterr().err.splitlines() if "error:" in one]
        assert "transformers cannot run the model that config.json describes: The size of" in line
    assert not (tmp_path / "out").exists()


def test_files_beside_the_weights_that_are_not_what_they_must_be_are_refused(
    tmp_path: Path,
) -> None:
    model = save_tiny(tmp_path / "list")
    (model / "generation_config.json").write_text("[1]")
    with pytest.raises(InvalidInput, match="must hold a JSON object, found list"):
        Checkpoint.open(model)
    model = save_tiny(tmp_path / "empty")
    first = {"tokenizer_class": "LlamaTokenizer", "unk_token": ""}
    (model / "tokenizer_config.json").write_text(json.dumps(first))
    with pytest.raises(InvalidInput, match="unk_token may be empty"):
        Checkpoint.open(model)


MEANT: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "attention": ({"attn_implementation": "flash_attention_2"}, {"attn_implementation": None}),
    "old attention": (
        {"_attn_implementation": "flash_attention_2"},
        {"_attn_implementation": None},
    ),
    "rope as text": (
        {"rope_parameters": {"rope_type": "default", "rope_theta": "1e6"}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    ),
    "rope of pictures": (
        {"rope_parameters": None, "rope_scaling": {"type": "mrope", "mrope_section": [1, 1]}},
        {"rope_scaling": {"type": "default"}},
    ),
    "no quantization": ({"quantization_config": {}}, {"quantization_config": None}),
}


@pytest.mark.parametrize("case", MEANT)
def test_a_setting_that_only_keeps_the_model_from_loading_here_is_read_as_what_it_means(
    case: str, tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fields, meant = MEANT[case]
    source = edited(save_tiny(tmp_path / "source"), **fields)
    plain = edited(save_tiny(tmp_path / "plain"), **fields)
    edited(plain, **meant)
    if case == "attention":  # one is enough of the whole way
        job = arguments(source, text, tmp_path / "out", "--sparsity", "0.5")
        run_json(capsys, *job)
        assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.intermediate_size < 24
        assert "flash_attention_2" in (tmp_path / "out" / "README.md").read_text()
    with pytest.warns(ConfigWarning, match=r"config\.json"):
        checkpoint = Checkpoint.open(source)
    model = checkpoint.load_model("cpu", torch.float32)
    assert model.name_or_path == str(source)
    expected = AutoModelForCausalLM.from_pretrained(plain).eval()
    assert torch.equal(logits(model), logits(expected))
    assert (
        json.loads((source / "config.json").read_text()).items()
        >= {key: value for key, value in fields.items() if value is not None}.items()
    )


def test_an_index_without_metadata_opens_and_loads(tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model", max_shard_size="6KB")
    expected = logits(AutoModelForCausalLM.from_pretrained(model).eval())
    edited(model, "model.safetensors.index.json", metadata=None)
    before = (model / "model.safetensors.index.json").read_bytes()
    assert torch.equal(logits(Checkpoint.open(model).load_model("cpu", torch.float32)), expected)
    assert (model / "model.safetensors.index.json").read_bytes() == before


def test_the_dry_run_refuses_the_texts_and_tensors_that_the_run_would_refuse(
    tiny: Path, tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = tmp_path / "short.txt"
    short.write_text("no")
    missing = tmp_path / "nothing.txt"
    for source in (short, missing):
        refused(capsys, [*arguments(tiny, source), "--dry-run"], source.name)
    model = save_tiny(tmp_path / "model")
    edited(model, attention_bias=True)  # biases that the checkpoint does not have
    for more in ([], ["--memory-budget", "800MB"]):
        refused(capsys, [*arguments(model, text), "--dry-run", *more], "self_attn")
