"""A checkpoint that cannot be used is refused in one line that names the file, before any work."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import FAMILY_CONFIGS, make_model, save_tiny
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fbn_prune.errors import InvalidInput
from fbn_prune.model.checkpoint import Checkpoint
from fbn_prune.model.families import family_of

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
TOKENS = torch.arange(3, 40).view(1, -1)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tiny(tmp_path / "model")


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return save_tiny(tmp_path / "model", max_shard_size="8KB")


def edit_json(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def edit_tensors(path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def refusal(path: str | Path) -> str:
    with pytest.raises(InvalidInput) as caught:
        Checkpoint.open(path)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("name", FAMILY_CONFIGS)
@pytest.mark.parametrize("shard", ["5GB", "8KB"])
def test_every_family_opens_and_loads_as_it_was_saved(
    name: str, shard: str, tmp_path: Path
) -> None:
    checkpoint = Checkpoint.open(save_tiny(tmp_path, name, max_shard_size=shard))
    original = make_model(name)
    assert checkpoint.family is family_of(original.config)
    assert checkpoint.total_parameters == sum(p.numel() for p in original.parameters())
    assert checkpoint.total_bytes == 4 * checkpoint.total_parameters
    assert checkpoint.storage_dtype == torch.float32
    state = original.state_dict()
    state["embed_out.weight"] = state["lm_head.weight"]  # what GPT-NeoX calls it on disk
    for tensor_name in checkpoint.names:
        assert torch.equal(checkpoint.tensor(tensor_name), state[tensor_name])
        assert checkpoint.shape(tensor_name) == tuple(state[tensor_name].shape)
        assert checkpoint.dtype(tensor_name) == torch.float32
    model = checkpoint.load_model("cpu", torch.float32)
    assert not model.training
    assert model.config.use_cache is False
    with torch.no_grad():
        assert torch.equal(model(TOKENS).logits, original(TOKENS).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtype_of_the_file_and_of_the_loaded_model_are_independent(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    checkpoint = Checkpoint.open(save_tiny(tmp_path, dtype=dtype))
    assert checkpoint.storage_dtype == dtype
    assert checkpoint.total_bytes == 2 * checkpoint.total_parameters
    assert checkpoint.load_model("cpu", torch.float32).dtype == torch.float32


@pytest.mark.parametrize("name", ["gpt2", "opt", "llama", "falcon", "gpt_neox"])
def test_names_of_the_base_model_are_understood(name: str, tmp_path: Path) -> None:
    save_tiny(tmp_path, name)
    family = family_of(FAMILY_CONFIGS[name]())
    root = family.layers.partition(".")[0] + "."

    def strip(tensors: dict[str, torch.Tensor]) -> None:
        for key in list(tensors):
            tensors[key.removeprefix(root)] = tensors.pop(key)

    edit_tensors(tmp_path / WEIGHTS, strip)
    checkpoint = Checkpoint.open(tmp_path)
    assert not any(key.startswith(root) for key in checkpoint.names)
    model = checkpoint.load_model("cpu", torch.float32)
    with torch.no_grad():
        assert torch.equal(model(TOKENS).logits, make_model(name)(TOKENS).logits)


def test_the_meta_device_loads_names_and_shapes_without_weights(folder: Path) -> None:
    model = Checkpoint.open(folder).load_model("meta", torch.float32)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


def test_the_tokenizer_round_trips_text(folder: Path) -> None:
    tokenizer = Checkpoint.open(folder).load_tokenizer()
    ids = tokenizer("Grüße, 123!")["input_ids"]
    assert tokenizer.decode(ids) == "Grüße, 123!"


def test_opening_changes_nothing_in_the_folder(sharded: Path) -> None:
    before = {file.name: (file.stat().st_mtime_ns, file.read_bytes()) for file in sharded.iterdir()}
    Checkpoint.open(sharded).load_model("cpu", torch.float32)
    after = {file.name: (file.stat().st_mtime_ns, file.read_bytes()) for file in sharded.iterdir()}
    assert after == before


# What is asked for


@pytest.mark.parametrize(
    "name", ["./nowhere", "/nowhere/at/all", "~/nowhere-at-all", "a/b/c", "x/"]
)
def test_a_path_that_does_not_exist_is_not_sought_on_the_hub(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("asked"))
    assert "there is no folder" in refusal(name)
    assert "there is no folder" in refusal(Path("missing"))


def test_an_empty_folder(tmp_path: Path) -> None:
    assert "is empty" in refusal(tmp_path)


def test_a_file_in_place_of_the_folder(folder: Path) -> None:
    assert "is a file" in refusal(folder / WEIGHTS)


def test_a_hub_id_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object, **__: object) -> str:
        raise OSError("no\nnetwork")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    assert "cannot be downloaded from the Hub: no network" in refusal("someone/model")


def test_from_the_hub_only_safetensors_come_and_only_after_the_config_is_accepted(
    sharded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []

    def download(hub_id: str, allow_patterns: list[str]) -> str:
        assert hub_id == "someone/model"
        asked.append(allow_patterns)
        return str(sharded)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    checkpoint = Checkpoint.open("someone/model")
    assert checkpoint.hub_id == "someone/model"
    assert len(asked) == 2
    assert asked[1] == sorted(file.name for file in sharded.glob("*.safetensors"))
    code_and_pickle = ("model.py", "pytorch_model.bin", "onnx/model.onnx", "model.pt")
    for pattern in asked[0] + asked[1]:
        assert not any(fnmatch(file, pattern) for file in code_and_pickle)

    asked.clear()
    edit_json(sharded / "config.json", lambda config: config.update(num_local_experts=8))
    assert "mixture of experts" in refusal("someone/model")
    assert len(asked) == 1


# The config


def test_no_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    assert "no config.json" in refusal(folder)
    (folder / "adapter_config.json").write_text("{}")
    assert "merge it" in refusal(folder)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "not readable JSON"),
        ("{'model_type'", "not readable JSON"),
        ("[" * 100_000, "not readable JSON"),
        ("[1, 2]", "must hold a JSON object, found list"),
        ("null", "must hold a JSON object, found NoneType"),
        ("{}", "no model_type"),
        ('{"model_type": "llama", "intermediate_size": "wide"}', "not a valid 'llama' config"),
    ],
)
def test_a_config_that_is_none(folder: Path, text: str, reason: str) -> None:
    (folder / "config.json").write_text(text)
    assert reason in refusal(folder)


def test_a_config_in_another_encoding(folder: Path) -> None:
    (folder / "config.json").write_bytes(b"\xff\xfe\x00")
    assert "not readable JSON" in refusal(folder)


# The weights


def header_of(raw: bytes) -> tuple[dict[str, Any], bytes]:
    (length,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def with_header(header: object, data: bytes) -> bytes:
    encoded = json.dumps(header).encode()
    return struct.pack("<Q", len(encoded)) + encoded + data


def broken_offsets(raw: bytes) -> bytes:
    header, data = header_of(raw)
    header["model.norm.weight"]["data_offsets"] = [0, 10**12]
    return with_header(header, data)


def broken_shape(raw: bytes) -> bytes:
    header, data = header_of(raw)
    header["model.norm.weight"]["shape"] = [10**6]
    return with_header(header, data)


BROKEN: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda raw: b"",
    "cut in the length": lambda raw: raw[:5],
    "cut in the header": lambda raw: raw[:100],
    "cut in the data": lambda raw: raw[:-1],
    "bytes too many": lambda raw: raw + b"\0",
    "length beyond the file": lambda raw: struct.pack("<Q", 10**15) + raw[8:],
    "length over 100 MB": lambda raw: struct.pack("<Q", 101 * 10**6) + raw[8:],
    "header not JSON": lambda raw: raw[:8] + b"#" * (len(raw) - 8),
    "header not an object": lambda raw: with_header([1], header_of(raw)[1]),
    "tensor not an object": lambda raw: with_header({"a": 1}, header_of(raw)[1]),
    "offsets beyond the file": broken_offsets,
    "shape beyond its bytes": broken_shape,
    "text": lambda raw: b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a",
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_safetensors_file_is_named(folder: Path, how: str) -> None:
    file = folder / WEIGHTS
    file.write_bytes(BROKEN[how](file.read_bytes()))
    message = refusal(folder)
    assert f"{file} is not a complete safetensors file" in message


def test_a_broken_shard_is_named(sharded: Path) -> None:
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-10])
    assert shard.name in refusal(sharded)


def test_only_pickled_weights(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")
    message = refusal(folder)
    assert "pytorch_model.bin" in message
    assert "convert them to safetensors" in message


def test_no_weights_at_all(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    assert f"neither {WEIGHTS} nor {INDEX}" in refusal(folder)


def test_shards_without_an_index(sharded: Path) -> None:
    (sharded / INDEX).unlink()
    assert "no index names it" in refusal(sharded)


def test_an_index_that_names_an_absent_shard(sharded: Path) -> None:
    shard = sorted(sharded.glob("*.safetensors"))[0]
    shard.unlink()
    assert f"names {shard.name}, which is not in the folder" in refusal(sharded)


@pytest.mark.parametrize(
    "name",
    [
        "../secret.safetensors",
        "sub/../../secret.safetensors",
        "/etc/secret.safetensors",
        "..\\secret.safetensors",
        "C:\\secret.safetensors",
        "model.bin",
        7,
    ],
)
def test_an_index_that_leads_out_of_the_folder(sharded: Path, name: object) -> None:
    (sharded.parent / "secret.safetensors").write_bytes(b"")

    def lead_out(index: dict[str, Any]) -> None:
        index["weight_map"][next(iter(index["weight_map"]))] = name

    edit_json(sharded / INDEX, lead_out)
    assert "shards must be .safetensors files in the checkpoint's folder" in refusal(sharded)


def test_an_index_that_promises_a_tensor_its_shard_has_not(sharded: Path) -> None:
    shard = sorted(sharded.glob("*.safetensors"))[0].name
    edit_json(sharded / INDEX, lambda index: index["weight_map"].update(extra=shard))
    assert f"says that extra is in {shard}, but it is not" in refusal(sharded)


@pytest.mark.parametrize("text", ["{}", '{"weight_map": {}}', '{"weight_map": [1]}', "[]", "{"])
def test_an_index_that_is_none(sharded: Path, text: str) -> None:
    (sharded / INDEX).write_text(text)
    assert INDEX in refusal(sharded)


# Weights against the config


def test_a_missing_mlp_tensor(folder: Path) -> None:
    edit_tensors(folder / WEIGHTS, lambda t: t.pop("model.layers.1.mlp.up_proj.weight"))
    assert "no tensor model.layers.1.mlp.up_proj.weight" in refusal(folder)


def test_fewer_layers_than_the_config_means(folder: Path) -> None:
    edit_json(folder / "config.json", lambda config: config.update(num_hidden_layers=9_000))
    assert "no tensor model.layers.3.mlp.gate_proj.weight" in refusal(folder)


def test_no_layers(folder: Path) -> None:
    edit_json(folder / "config.json", lambda config: config.update(num_hidden_layers=0))
    assert "0 layers" in refusal(folder)


def test_a_width_other_than_the_configs(folder: Path) -> None:
    edit_json(folder / "config.json", lambda config: config.update(intermediate_size=20))
    message = refusal(folder)
    assert "has shape" in message
    assert "config.json requires [20, 16]" in message or "config.json requires [16, 20]" in message


def test_a_bias_the_config_does_not_mean(folder: Path) -> None:
    name = "model.layers.0.mlp.down_proj.bias"
    edit_tensors(folder / WEIGHTS, lambda t: t.update({name: torch.zeros(16)}))
    assert "config.json says no MLP bias" in refusal(folder)


def test_quantized_weights(folder: Path) -> None:
    name = "model.layers.0.mlp.down_proj.weight"
    edit_tensors(folder / WEIGHTS, lambda t: t.update({name: t[name].to(torch.int8)}))
    assert "is stored as torch.int8" in refusal(folder)


def test_a_model_with_tensors_missing_is_not_filled_up_with_random_ones(folder: Path) -> None:
    edit_tensors(folder / WEIGHTS, lambda t: t.pop("model.norm.weight"))
    checkpoint = Checkpoint.open(folder)
    with pytest.raises(InvalidInput, match=r"not in the checkpoint, first model\.norm\.weight"):
        checkpoint.load_model("cpu", torch.float32)


def test_a_tensor_of_another_shape_is_named_on_loading(folder: Path) -> None:
    edit_tensors(folder / WEIGHTS, lambda t: t.update({"model.norm.weight": torch.ones(5)}))
    checkpoint = Checkpoint.open(folder)
    with pytest.raises(InvalidInput, match=r"model\.norm\.weight has shape \[5\].*needs \[16\]"):
        checkpoint.load_model("cpu", torch.float32)


# The tokenizer


def test_no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    assert "has no tokenizer" in refusal(folder)


def test_a_tokenizer_that_cannot_be_read(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")
    assert "the tokenizer cannot be loaded" in refusal(folder)


def test_a_tokenizer_that_returns_nothing(folder: Path) -> None:
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE())).save_pretrained(folder)
    assert "returns no tokens" in refusal(folder)


def test_a_tokenizer_that_fails_on_text(folder: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel({"word": 0}))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    assert "the tokenizer fails on text" in refusal(folder)


def test_a_tokenizer_that_knows_no_word(folder: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel({"word": 0, "<unk>": 1}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)
    assert "only the unknown token" in refusal(folder)


def test_a_tokenizer_of_a_larger_vocabulary(tmp_path: Path) -> None:
    config = FAMILY_CONFIGS["llama"]()
    config.vocab_size = 100
    config.pad_token_id = None
    assert "but the model has only 100 embeddings" in refusal(save_tiny(tmp_path, config=config))


def test_code_beside_the_model_is_not_run(folder: Path) -> None:
    code = {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}
    edit_json(folder / "config.json", lambda config: config.update(auto_map=code))
    (folder / "evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\n")
    Checkpoint.open(folder).load_model("cpu", torch.float32)
    assert not (folder / "ran").exists()


def test_a_tokenizer_that_is_code_is_refused_unless_trusted(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "hub"))
    code = {"AutoTokenizer": ["mine.Mine", None]}
    edit_json(
        folder / "tokenizer_config.json",
        lambda config: config.update(auto_map=code, tokenizer_class="Mine"),
    )
    (folder / "mine.py").write_text(
        "from transformers import PreTrainedTokenizerFast\n"
        f"open({str(folder / 'ran')!r}, 'w')\n"
        "class Mine(PreTrainedTokenizerFast): pass\n"
    )
    assert "allow it with --trust-remote-code" in refusal(folder)
    assert not (folder / "ran").exists()
    Checkpoint.open(folder, trust_remote_code=True)
    assert (folder / "ran").exists()
