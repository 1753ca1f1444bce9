"""A checkpoint that cannot be used is refused in one line that names the file, before any work."""

from __future__ import annotations

import json
import re
import shutil
import struct
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import FAMILY_CONFIGS, PATHS, logits, make_model, save_tiny
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fbn_prune.errors import InvalidInput
from fbn_prune.model.checkpoint import Checkpoint
from fbn_prune.model.families import family_of

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
NORM = "model.norm.weight"
UP = "model.layers.1.mlp.up_proj.weight"
DOWN = "model.layers.0.mlp.down_proj"


@pytest.fixture
def folder(tiny: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny, tmp_path / "model")


@pytest.fixture(scope="module")
def saved_in_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("shards"), max_shard_size="8KB")


@pytest.fixture
def sharded(saved_in_shards: Path, tmp_path: Path) -> Path:
    return shutil.copytree(saved_in_shards, tmp_path / "sharded")


def edit_json(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def edit_index(folder: Path, more: dict[str, object]) -> None:
    edit_json(folder / INDEX, lambda index: index["weight_map"].update(more))


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


@pytest.mark.parametrize("shard", ["5GB", "8KB"])
@pytest.mark.parametrize("name", [*PATHS, "llama-tied", "gpt_neox"])
def test_a_checkpoint_opens_and_loads_as_it_was_saved(
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
    assert torch.equal(logits(model), logits(original))


def test_dtype_of_the_file_and_of_the_loaded_model_are_independent(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(save_tiny(tmp_path, dtype=torch.bfloat16))
    assert checkpoint.storage_dtype == torch.bfloat16
    assert checkpoint.total_bytes == 2 * checkpoint.total_parameters
    assert checkpoint.load_model("cpu", torch.float32).dtype == torch.float32


@pytest.mark.parametrize("name", ["gpt2", "opt", "llama"])
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
    assert torch.equal(logits(model), logits(make_model(name)))


def test_the_meta_device_loads_names_and_shapes_without_weights(tiny: Path) -> None:
    model = Checkpoint.open(tiny).load_model("meta", torch.float32)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


def test_opening_changes_nothing_in_the_folder(sharded: Path) -> None:
    before = {file.name: (file.stat().st_mtime_ns, file.read_bytes()) for file in sharded.iterdir()}
    Checkpoint.open(sharded).load_model("cpu", torch.float32)
    after = {file.name: (file.stat().st_mtime_ns, file.read_bytes()) for file in sharded.iterdir()}
    assert after == before


# What is asked for


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at", "~/nowhere-at", "a/b/c", "x/"])
def test_a_path_that_does_not_exist_is_not_sought_on_the_hub(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("asked"))
    assert "there is no folder" in refusal(name)
    assert "there is no folder" in refusal(Path("missing"))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("owner/no--id", "no Hub id is like this: Cannot have -- or .. in repo_id"),
        ("owner/name.git", "Repo_id cannot end by '.git'"),
        ("x" * 97, "the maximum length is 96"),
        ("https://huggingface.co/owner/name/tree/main", "an address; give the Hub id owner/name"),
    ],
)
def test_a_name_that_can_be_no_hub_id_is_not_sought_there(
    name: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("asked"))
    assert words in refusal(name)


def test_no_folder_of_files(tmp_path: Path, tiny: Path) -> None:
    assert "is empty" in refusal(tmp_path)
    assert "is a file" in refusal(tiny / WEIGHTS)


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


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"", "not readable JSON"),
        (b"{'model_type'", "not readable JSON"),
        (b"[" * 100_000, "not readable JSON"),
        (b"\xff\xfe\x00", "not readable JSON"),
        (b"[1, 2]", "must hold a JSON object, found list"),
        (b"null", "must hold a JSON object, found NoneType"),
        (b"{}", "no model_type"),
        (b'{"model_type": "llama", "intermediate_size": "wide"}', "not a valid 'llama' config"),
    ],
)
def test_a_config_that_is_none(folder: Path, text: bytes, reason: str) -> None:
    (folder / "config.json").write_bytes(text)
    assert reason in refusal(folder)


# The weights


def reheaded(raw: bytes, change: Callable[[dict[str, Any]], object]) -> bytes:
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.dumps(change(json.loads(raw[8 : 8 + length]))).encode()
    return struct.pack("<Q", len(header)) + header + raw[8 + length :]


def with_norm(**changes: object) -> Callable[[bytes], bytes]:
    return lambda raw: reheaded(raw, lambda header: header | {NORM: header[NORM] | changes})


BROKEN: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda raw: b"",
    "cut in the length": lambda raw: raw[:5],
    "cut in the header": lambda raw: raw[:100],
    "cut in the data": lambda raw: raw[:-1],
    "bytes too many": lambda raw: raw + b"\0",
    "length beyond the file": lambda raw: struct.pack("<Q", 10**15) + raw[8:],
    "length over 100 MB": lambda raw: struct.pack("<Q", 101 * 10**6) + raw[8:],
    "header not JSON": lambda raw: raw[:8] + b"#" * (len(raw) - 8),
    "header not an object": lambda raw: reheaded(raw, lambda header: [1]),
    "tensor not an object": lambda raw: reheaded(raw, lambda header: {"a": 1}),
    "offsets beyond the file": with_norm(data_offsets=[0, 10**12]),
    "shape beyond its bytes": with_norm(shape=[10**6]),
    "text": lambda raw: b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a",
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_safetensors_file_is_named(folder: Path, how: str) -> None:
    file = folder / WEIGHTS
    file.write_bytes(BROKEN[how](file.read_bytes()))
    assert f"{file} is not a complete safetensors file" in refusal(folder)


def first_shard(folder: Path) -> Path:
    return sorted(folder.glob("*.safetensors"))[0]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: first_shard(f).write_bytes(b"short"), "model-00001-of"),
        (lambda f: (f / INDEX).unlink(), "no index names it"),
        (lambda f: first_shard(f).unlink(), "names model-00001-of"),
        (
            lambda f: edit_index(f, {"extra": first_shard(f).name}),
            "says that extra is in model-00001-of",
        ),
        *(
            (lambda f, text=text: (f / INDEX).write_text(text), INDEX)
            for text in ("{}", '{"weight_map": {}}', '{"weight_map": [1]}', "[]", "{")
        ),
    ],
)
def test_shards_and_an_index_that_do_not_go_together(
    damage: Callable[[Path], object], message: str, sharded: Path
) -> None:
    damage(sharded)
    assert message in refusal(sharded)


OUTSIDE = ["../secret", "sub/../../secret", "/etc/secret", "..\\secret", "C:\\secret"]


@pytest.mark.parametrize("name", [*(f"{path}.safetensors" for path in OUTSIDE), "model.bin", 7])
def test_an_index_that_leads_out_of_the_folder(sharded: Path, name: object) -> None:
    (sharded.parent / "secret.safetensors").write_bytes(b"")

    edit_index(sharded, {UP: name})
    assert "shards must be .safetensors files in the checkpoint's folder" in refusal(sharded)


# Weights against the config


def change_config(**changes: object) -> Callable[[Path], None]:
    return lambda f: edit_json(f / "config.json", lambda config: config.update(changes))


def change_tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    return lambda f: edit_tensors(f / WEIGHTS, change)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "config.json").unlink(), "no config.json"),
        (lambda f: (f / "config.json").rename(f / "adapter_config.json"), "merge it"),
        (lambda f: (f / WEIGHTS).unlink(), f"neither {WEIGHTS} nor {INDEX}"),
        (
            lambda f: (f / WEIGHTS).rename(f / "pytorch_model.bin"),
            r"pytorch_model.bin.*convert them to safetensors",
        ),
        (change_tensors(lambda t: t.pop(UP)), f"no tensor {UP}"),
        (change_config(num_hidden_layers=9_000), "no tensor model.layers.3.mlp.gate_proj.weight"),
        (change_config(num_hidden_layers=0), "0 layers"),
        (
            change_tensors(lambda t: t.update({UP: torch.ones(20, 16)})),
            r"up_proj.weight has shape \[20, 16\], but config.json requires \[24, 16\]",
        ),
        (
            change_tensors(lambda t: t.update({f"{DOWN}.bias": torch.zeros(16)})),
            "config.json says no MLP bias",
        ),
        (
            change_tensors(lambda t: t.update({f"{DOWN}.weight": t[f"{DOWN}.weight"].char()})),
            "is stored as torch.int8",
        ),
        (lambda f: (f / "tokenizer.json").unlink(), "has no tokenizer"),
        (lambda f: (f / "tokenizer.json").write_text("{}"), "the tokenizer cannot be loaded"),
    ],
)
def test_files_that_are_missing_or_do_not_go_together(
    damage: Callable[[Path], object], message: str, folder: Path
) -> None:
    damage(folder)
    assert re.search(message, refusal(folder))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.pop(NORM),
            r"the checkpoint lacks 1 tensor of the model, first model\.norm\.weight",
        ),
        (
            lambda t: t.update({NORM: torch.ones(5)}),
            r"model\.norm\.weight has shape \[5\].*needs \[16\]",
        ),
    ],
)
def test_tensors_outside_the_mlp_are_not_filled_up_with_random_ones(
    change: Callable[[dict[str, torch.Tensor]], object], message: str, folder: Path
) -> None:
    edit_tensors(folder / WEIGHTS, change)
    with pytest.raises(InvalidInput, match=message):
        Checkpoint.open(folder).load_model("cpu", torch.float32)


# The tokenizer


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: models.BPE(), "returns no tokens"),
        (lambda: models.WordLevel({"word": 0}), "the tokenizer fails on text"),
        (
            lambda: models.WordLevel({"word": 0, "<unk>": 1}, unk_token="<unk>"),
            "returns only the unknown token",
        ),
    ],
)
def test_a_tokenizer_that_cannot_read_text(
    model: Callable[[], Any], message: str, folder: Path
) -> None:
    tokenizer = Tokenizer(model())
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)
    assert message in refusal(folder)


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
