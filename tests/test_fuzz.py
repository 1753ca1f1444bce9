"""Any file is read, or refused in one line: a short run of every fuzzer, and what the long runs and reading found."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from fuzz_readers import READERS, fuzz
from safetensors.torch import save_file
from tiny_models import save_tiny

from fbn_prune.data import examples as task_data
from fbn_prune.data import records
from fbn_prune.data import text_files as texts
from fbn_prune.data.documents import read_documents
from fbn_prune.data.examples import read_examples
from fbn_prune.errors import InvalidInput
from fbn_prune.model.checkpoint import Checkpoint
from fbn_prune.model.families import family_of
from fbn_prune.networks.functional_networks import METADATA_KEY, FunctionalNetworks
from fbn_prune.recipe import build_recipe, load_recipe


@pytest.mark.parametrize("name", READERS)
def test_whatever_is_in_a_file_is_read_or_refused(name: str) -> None:
    assert fuzz(READERS[name], 25) >= 1


def test_a_fuzzer_finds_what_a_reader_lets_through() -> None:
    reader = READERS["task record"]

    def careless(data: bytes, folder: Path) -> object:
        return json.loads(data)["questions_sha256"]

    with pytest.raises((KeyError, TypeError, IndexError, json.JSONDecodeError)):
        fuzz(type(reader)(reader.inputs, careless), 100)


# What was found


@pytest.mark.parametrize(
    "values",
    [
        {"seed": 2**70},
        {"tokens": 10**30},
        {"damping": float("inf")},
        {"sparsity": float("nan")},
        {"model": "a\0b"},
        {"calibration": ["a\ud800.txt"]},
        {"task": "\0"},
        {"max_shard_size": "lots"},
        {"target_params": "9" * 400},
        {"target_params": 10**400},
        {"target_size": "١GB"},
    ],
    ids=lambda values: next(iter(values)),
)
def test_values_that_no_run_can_use_are_refused_at_once(values: dict[str, object]) -> None:
    with pytest.raises(InvalidInput, match=next(iter(values))):
        build_recipe(values)


def test_a_recipe_without_end_is_not_read_or_unfolded_whole(tmp_path: Path) -> None:
    lines = ["a: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"b{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
    (tmp_path / "r.yaml").write_text("\n".join([*lines, "tokens: *a11"]))
    with pytest.raises(InvalidInput, match="uses YAML aliases"):
        load_recipe(tmp_path / "r.yaml")
    (tmp_path / "r.yaml").write_text(yaml.safe_dump({"model": "x" * 2**20}))
    with pytest.raises(InvalidInput, match="larger than 1,048,576 bytes"):
        load_recipe(tmp_path / "r.yaml")


def test_a_long_wrong_value_is_not_repeated_whole() -> None:
    with pytest.raises(InvalidInput) as refusal:
        build_recipe({"tokens": ["x" * 10_000] * 1000})
    assert len(str(refusal.value)) < 500


def test_half_a_character_in_json_is_refused_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "good"}\n{"text": "bad \\ud800"}\n')
    with pytest.raises(InvalidInput, match=r"line 2: .*contains a NUL"):
        list(read_documents(str(path), characters=1000))
    with pytest.raises(InvalidInput, match=r"line 2: .*contains a NUL"):
        read_examples(path)


def test_a_line_or_a_file_without_end_is_not_read_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "LONGEST_LINE", 100)
    monkeypatch.setattr(task_data, "MOST_BYTES", 100)
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "x" * 200}))
    with pytest.raises(InvalidInput, match="line 1: longer than 100 characters"):
        list(read_documents(str(tmp_path / "a.jsonl"), characters=1000))
    (tmp_path / "a.jsonl").write_text(f"{json.dumps({'text': 'x' * 60})}\n" * 2)
    with pytest.raises(InvalidInput, match="larger than 100 bytes"):
        read_examples(tmp_path / "a.jsonl")


@pytest.mark.parametrize("key", ["num_hidden_layers", "num_labels"])
def test_a_config_of_endless_layers_is_refused_before_lists_are_made(key: str) -> None:
    config = {"model_type": "qwen2", "num_hidden_layers": 2, key: 10**9}
    with pytest.raises(InvalidInput, match=f"{key} = 1000000000: the most supported"):
        family_of(config).width(config)


@pytest.mark.parametrize("layers", [-(10**30), 1e300, -1e300, float("nan"), "9" * 40, [2]])
@pytest.mark.parametrize("key", ["num_hidden_layers", "n_layer"])
def test_a_number_of_layers_that_is_none_is_refused(key: str, layers: object) -> None:
    refused = 0
    for model_type in ("gpt2", "falcon", "gpt_neox", "llama"):
        config = {"model_type": model_type, key: layers}
        try:
            assert len(family_of(config).widths(config)) < 100  # no key of this architecture
        except InvalidInput:
            refused += 1
    assert refused >= 1


@pytest.mark.parametrize(
    "own", [[1], {"x": {}}, {"0": 4}, {"0": {"intermediate_size": [4]}}, {"1e3": {}}]
)
def test_widths_of_layers_that_are_none_are_refused(own: object) -> None:
    config = {"model_type": "llama", "num_hidden_layers": 2, "per_layer_config": own}
    with pytest.raises(
        InvalidInput, match=r"per_layer_config must map|not an integer|is not a valid"
    ):
        family_of(config).widths(config)


def test_a_config_that_breaks_its_own_class_is_refused(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "", "rope_theta": []}))
    with pytest.raises(InvalidInput, match="is not a valid 'llama' config"):
        Checkpoint.open(folder)


def test_numbers_too_long_for_python_in_the_networks_header_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "networks.safetensors"
    header = '{"format": ' + "1" * 5000 + "}"
    save_file({"maps": torch.zeros(1, 1)}, path, metadata={METADATA_KEY: header})
    with pytest.raises(InvalidInput, match="the metadata is not JSON"):
        FunctionalNetworks.load(path)


@pytest.mark.parametrize("text", ["\0", "a\ud800"])
def test_what_cannot_be_written_down_is_no_text(text: str) -> None:
    assert not texts.is_text(text)
    assert texts.is_text("Grüße\n")
