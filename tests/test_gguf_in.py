"""Claims about reading GGUF files: what transformers and the gguf package make of them, or a refusal by name."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import arguments, export, random_cuts, refused, run_json
from tiny_models import LAYERS, WIDTH, logits, make_model, save_tiny
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    Phi3Config,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    StableLmConfig,
)

from fbn_prune.cli.main import _exit_code
from fbn_prune.data.calibration import Batch
from fbn_prune.errors import FbnPruneError, InvalidInput
from fbn_prune.export.to_gguf import write as write_gguf
from fbn_prune.model import gguf_weights
from fbn_prune.model.checkpoint import Checkpoint
from fbn_prune.model.gguf_file import open_gguf
from fbn_prune.model.streaming import StreamedModel

pytest.importorskip("gguf")
import gguf
from gguf_files import VOCAB, Kind, make_merging_tokenizer, write_gguf_file

_SPECIAL = {"vocab_size": VOCAB, "bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 257}
_SIZES = {
    **_SPECIAL,
    "hidden_size": 16,
    "num_hidden_layers": LAYERS,
    "intermediate_size": WIDTH,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
_GEMMA = {**_SIZES, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 32}
_STABLELM = {**_SIZES, "num_attention_heads": 2}  # a quarter of 8 channels is rotated
_FALCON = {**_SPECIAL, "hidden_size": 16, "num_hidden_layers": LAYERS, "num_attention_heads": 4}

CONFIGS: dict[str, Callable[[], PretrainedConfig]] = {
    "llama": lambda: LlamaConfig(**_SIZES, head_dim=4, rms_norm_eps=1e-5),
    "qwen2": lambda: Qwen2Config(**_SIZES, tie_word_embeddings=True, rope_parameters=_theta(5e5)),
    "qwen3": lambda: Qwen3Config(**_SIZES, head_dim=128),  # transformers reads no other size
    "gemma2": lambda: Gemma2Config(**_GEMMA, final_logit_softcapping=20.0),
    "gemma3": lambda: Gemma3TextConfig(**_GEMMA),
    "phi3": lambda: Phi3Config(**_SIZES, original_max_position_embeddings=64),
    "stablelm": lambda: StableLmConfig(**_STABLELM),
    "stablelm-parallel": lambda: StableLmConfig(
        **_STABLELM, use_parallel_residual=True, use_qkv_bias=True
    ),
    "gpt2": lambda: GPT2Config(  # transformers reads no other number of positions
        **_SPECIAL, n_embd=16, n_layer=LAYERS, n_head=4, n_positions=1024
    ),
    "falcon": lambda: FalconConfig(**_FALCON),
    "falcon-grouped": lambda: FalconConfig(
        **_FALCON, new_decoder_architecture=True, num_kv_heads=2
    ),
    "falcon-one-norm": lambda: FalconConfig(
        **_FALCON, new_decoder_architecture=True, num_kv_heads=2, num_ln_in_parallel_attn=1
    ),
}
UNREAD_BY_TRANSFORMERS = ("falcon-grouped", "falcon-one-norm")
"""transformers leaves their heads in llama.cpp's order."""


def _theta(value: float) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": value}


def tiny(name: str = "llama", config: PretrainedConfig | None = None) -> PreTrainedModel:
    return make_model("", config=config or CONFIGS[name]())


def exact(file: Path) -> Checkpoint:
    checkpoint = Checkpoint.of_gguf(open_gguf(file, torch.float32))
    checkpoint.check()
    return checkpoint


def theirs(file: Path) -> PreTrainedModel:
    loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    )
    return loaded.eval()


@pytest.mark.parametrize("name", CONFIGS)
def test_each_family_is_read_pruned_and_written(name: str, tmp_path: Path) -> None:
    model = tiny(name)
    file = write_gguf_file(tmp_path / "m.gguf", model)
    checkpoint = exact(file)
    ours = checkpoint.load_model("cpu", torch.float32)
    expected = dict(model.named_parameters())
    assert dict(ours.named_parameters()).keys() == expected.keys() == set(checkpoint.names)
    for parameter, weight in ours.named_parameters():
        torch.testing.assert_close(weight, expected[parameter], rtol=0, atol=2e-7, msg=parameter)
    spread = logits(model).std()
    assert (logits(ours) - logits(model)).abs().max() < 1e-5 * spread
    streamed = StreamedModel(checkpoint, torch.device("cpu"), torch.float32, scratch=tmp_path)
    batch = Batch(torch.arange(3, 40).view(1, -1), torch.ones(1, 37, dtype=torch.bool))
    ((row, _, _),) = streamed.logits([batch])
    torch.testing.assert_close(row, logits(model), rtol=1e-4, atol=1e-4)
    if name not in UNREAD_BY_TRANSFORMERS:
        for parameter, weight in theirs(file).named_parameters():
            assert torch.equal(weight, checkpoint.tensor(parameter)), parameter
    family = checkpoint.family
    cuts = random_cuts(checkpoint, [family.width(checkpoint.config) // 2] * LAYERS)
    cut = export(checkpoint, cuts, tmp_path / "cut")
    stock = AutoModelForCausalLM.from_pretrained(cut)
    assert family.widths(stock.config) == [family.width(checkpoint.config) // 2] * LAYERS
    assert torch.isfinite(logits(stock)).all()


def test_every_quantization_type_has_the_values_of_the_gguf_package(tmp_path: Path) -> None:
    kinds = ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q6_K"]
    kinds += ["Q2_K", "Q3_K", "Q5_K", "IQ4_NL", "IQ4_XS"]
    sizes = {**_SIZES, "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2}
    model = tiny(config=LlamaConfig(**sizes, head_dim=64))
    chosen: dict[str, Kind] = {}

    def in_turn(name: str) -> Kind:
        return chosen.setdefault(name, Kind[kinds[len(chosen) % len(kinds)]])

    file = write_gguf_file(tmp_path / "m.gguf", model, in_turn)
    assert set(chosen.values()) == {Kind[kind] for kind in kinds}
    checkpoint = exact(file)
    other = theirs(file)
    for parameter, weight in other.named_parameters():
        assert torch.equal(weight, checkpoint.tensor(parameter)), parameter
    half = Checkpoint.open(file)
    assert half.storage_dtype == torch.float16
    ours = half.load_model("cpu", torch.float32)
    for parameter in other.parameters():
        parameter.data = parameter.data.half().float()
    assert (logits(ours) - logits(other)).abs().max() < 1e-3 * logits(other).std()


def test_tensors_are_dequantized_a_slice_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_gguf_file(tmp_path / "m.gguf", tiny(), lambda name: Kind.F16)
    whole = {name: exact(file).tensor(name) for name in exact(file).names}
    sizes, dequantize = [], gguf.dequantize

    def watched(data: Any, kind: Any) -> Any:
        values = dequantize(data, kind)
        sizes.append(values.size)
        return values

    monkeypatch.setattr(gguf, "dequantize", watched)
    monkeypatch.setattr(gguf_weights, "SLICE_VALUES", 50)
    for name, tensor in whole.items():
        assert torch.equal(exact(file).tensor(name), tensor)
    assert max(sizes) <= 50


@pytest.mark.slow
def test_commands_take_a_gguf_file_as_the_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    config = LlamaConfig(**{**_SIZES, "hidden_size": 32, "intermediate_size": 32}, head_dim=8)
    file = write_gguf_file(folder / "tiny.gguf", tiny(config=config), lambda name: Kind.Q8_0)
    before = file.read_bytes()
    text = tmp_path / "text.txt"
    text.write_text("The cat sat on the mat, and the dog ate the hat.\n\n" * 60)
    plain, cut = tmp_path / "plain", tmp_path / "cut"
    said = run_json(capsys, "dequantize", "--model", file, "--output", plain)
    assert (said["dequantized"], said["dtype"]) == (2 + 7 * LAYERS, "float16")
    assert said["method"] == "GGUF (Q8_0, F32)"
    said = run_json(capsys, *arguments(folder, text, cut, "--sparsity", "0.5"))
    assert said["neurons_total"] == 32 * LAYERS
    sizes = [
        run_json(capsys, *arguments(one, text, None, "--sparsity", "0.5", "--dry-run"))
        for one in (file, plain)
    ]
    assert sizes[0]["parameters_after"] == sizes[1]["parameters_after"]
    again = tmp_path / "of-plain"
    run_json(capsys, *arguments(plain, text, again, "--sparsity", "0.5"))
    assert (cut / "model.safetensors").read_bytes() == (again / "model.safetensors").read_bytes()
    reloaded = AutoModelForCausalLM.from_pretrained(cut)
    assert reloaded.config.intermediate_size == 16
    tokenizer = AutoTokenizer.from_pretrained(cut)
    assert (
        tokenizer("cab <s>")["input_ids"]
        == AutoTokenizer.from_pretrained(folder, gguf_file=file.name)("cab <s>")["input_ids"]
    )
    assert len(tokenizer) == VOCAB  # transformers adds an <|endoftext|>
    assert "messages" in tokenizer.chat_template
    assert "license: apache-2.0" in (cut / "README.md").read_text()
    assert _exit_code(["convert", "--model", str(cut), "--output", str(tmp_path / "out.gguf")]) == 0
    capsys.readouterr()
    written = Checkpoint.open(tmp_path / "out.gguf")
    assert all(
        torch.equal(written.tensor(name), Checkpoint.open(cut).tensor(name))
        for name in written.names
    )
    bundle = ["bundle", f"a={cut}", "--model", file, "--output", tmp_path / "bundle"]
    run_json(capsys, *bundle)
    base, gguf_base = Checkpoint.open(tmp_path / "bundle"), Checkpoint.open(file)
    assert all(torch.equal(base.tensor(n), gguf_base.tensor(n)) for n in gguf_base.names)
    assert list(folder.iterdir()) == [file]
    assert file.read_bytes() == before


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192}
        | {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 5e5},
        _theta(10000.0),
    ],
)
def test_what_convert_writes_is_read_back(rope: dict[str, Any], tmp_path: Path) -> None:
    config = LlamaConfig(
        **_SIZES, head_dim=64, mlp_bias=True, attention_bias=True, rope_parameters=rope
    )
    source = Checkpoint.open(save_tiny(tmp_path / "in", config=config))
    make_merging_tokenizer().save_pretrained(tmp_path / "in")
    write_gguf(source, tmp_path / "m.gguf")
    written = Checkpoint.open(tmp_path / "m.gguf")
    assert written.config["rope_parameters"] == source.config["rope_parameters"]
    assert set(written.names) == set(source.names)
    assert all(torch.equal(written.tensor(name), source.tensor(name)) for name in source.names)


def test_rotary_settings_are_read(tmp_path: Path) -> None:
    def rope(model: PreTrainedModel, **changes: Any) -> dict[str, Any]:
        file = write_gguf_file(tmp_path / "m.gguf", model, **changes)
        found: dict[str, Any] = Checkpoint.open(file).config["rope_parameters"]
        return found

    stretched = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    assert rope(tiny(), changes=stretched)["factor"] == 4.0
    yarn = {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 2.0}
    yarn["llama.rope.scaling.original_context_length"] = 32
    assert rope(tiny(), changes=yarn)["original_max_position_embeddings"] == 32
    local = {"gemma3.rope.scaling.type": "linear", "gemma3.rope.scaling.factor": 8.0}
    found = rope(tiny("gemma3"), changes=local)
    assert found["full_attention"]["factor"] == 8.0
    assert "factor" not in found["sliding_attention"]
    partial = Phi3Config(**{**_SIZES, "hidden_size": 32}, partial_rotary_factor=0.5)
    factors = {
        f"rope_factors_{kind}.weight": torch.linspace(1, 3, 2).numpy() for kind in ("long", "short")
    }
    found = rope(tiny(config=partial), extra=factors)
    assert (found["partial_rotary_factor"], found["rope_type"]) == (0.5, "longrope")
    assert found["long_factor"] == [1.0, 3.0]


def test_a_folder_with_one_gguf_file_is_that_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny()
    convert = ["convert", "--output", str(tmp_path / "out.gguf"), "--model"]
    (tmp_path / "a").mkdir()
    file = write_gguf_file(tmp_path / "a" / "m.gguf", model)
    (tmp_path / "a" / "mmproj-m.gguf").write_bytes(b"GGUF")
    (tmp_path / "a" / "README.md").write_text("")
    assert Checkpoint.open(tmp_path / "a").path == file
    first = write_gguf_file(tmp_path / "b.gguf", model, parts=3)
    (tmp_path / "b").mkdir()
    for part in tmp_path.glob("b-*.gguf"):
        shutil.move(part, tmp_path / "b")
    split = Checkpoint.open(tmp_path / "b" / first.name.replace("00001-of", "00002-of"))
    assert split.path == Checkpoint.open(tmp_path / "b").path == tmp_path / "b" / first.name
    assert set(split.names) == set(Checkpoint.open(file).names)
    assert all(torch.equal(split.tensor(n), Checkpoint.open(file).tensor(n)) for n in split.names)
    (tmp_path / "b" / first.name.replace("00001-of", "00003-of")).unlink()
    refused(capsys, [*convert, str(tmp_path / "b")], "00003-of-00003.gguf is missing")
    shutil.copy(file, tmp_path / "a" / "n.gguf")
    message = f"holds 2 GGUF files (m.gguf, n.gguf); give one of them, as {file}"
    refused(capsys, [*convert, str(tmp_path / "a")], message)
    save_tiny(tmp_path / "a")
    assert Checkpoint.open(tmp_path / "a").gguf is None
    refused(capsys, [*convert, str(tmp_path / "no.gguf")], "there is no file")


def _without(name: str) -> dict[str, Any]:
    return {"keep": lambda other: other != name}


def _changed(key: str, value: Any) -> dict[str, Any]:
    return {"changes": {key: value}}


UNREADABLE: dict[str, tuple[dict[str, Any], str]] = {
    "architecture": (
        {"arch": "mamba"},
        "of the architecture 'mamba' are not read; supported: llama",
    ),
    "experts": (_changed("llama.expert_count", 8), "is a mixture of experts"),
    "missing setting": (_changed("llama.block_count", None), "llama.block_count is None"),
    "contradiction": (_changed("llama.attention.head_count", 3), "is not a valid 'llama' config"),
    "width": (
        _changed("llama.feed_forward_length", 20),
        "blk.0.ffn_gate.weight has shape [24, 16], but the metadata require [20, 16]",
    ),
    "different widths": (
        _changed("llama.feed_forward_length", [8, 16, 24]),
        "differs between layers",
    ),
    "missing tensor": (
        _without("blk.1.ffn_up.weight"),
        "no tensor for the model's model.layers.1.mlp.up_proj.weight (blk.1.ffn_up.weight)",
    ),
    "missing layer": (_changed("llama.block_count", 4), "says 4 layers, but has tensors of 3"),
    "more tensors": (
        {"extra": {"blk.0.attn_sinks.weight": torch.ones(4).numpy()}},
        "have no blk.0.attn_sinks.weight",
    ),
    "rotary kind": (_changed("llama.rope.scaling.type", "longrope"), "of a kind that is not read"),
    "rotary divisors": (
        {"extra": {"rope_freqs.weight": torch.tensor([1.0, 9.0]).numpy()}},
        "in a way that transformers cannot represent",
    ),
    "rotated channels": (_changed("llama.rope.dimension_count", 2), "2 of a head's 4 channels"),
    "tokenizer": (_changed("tokenizer.ggml.model", "bert"), "its tokenizer cannot be read"),
    "no tokenizer": (_changed("tokenizer.ggml.tokens", None), "its tokenizer cannot be read"),
    "part without its name": (_changed("split.count", 2), "is one of 2 parts of a split file"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_what_cannot_be_read_is_refused_by_name(name: str, tmp_path: Path) -> None:
    how, message = UNREADABLE[name]
    file = write_gguf_file(tmp_path / "m.gguf", tiny(), **how)
    with pytest.raises(InvalidInput) as caught:
        Checkpoint.open(file)
    assert str(file) in str(caught.value)
    assert message in str(caught.value)


def test_damaged_files_are_refused_by_name(tmp_path: Path) -> None:
    file = write_gguf_file(tmp_path / "m.gguf", tiny())
    data = file.read_bytes()

    def refusal(changed: bytes) -> str:
        file.write_bytes(changed)
        with pytest.raises(InvalidInput) as caught:
            Checkpoint.open(file)
        return str(caught.value)

    assert "ends before the end of its tensor" in refusal(data[:-40])
    for length in (3, 20, 100, 1000):
        assert "GGUF file" in refusal(data[:length])
    assert "does not begin with GGUF" in refusal(b"PK" + data[2:])
    assert "GGUF version 9" in refusal(data[:4] + b"\x09\0\0\0" + data[8:])
    assert "big-endian" in refusal(data[:4] + b"\0\0\0\x03" + data[8:])
    endless = data.index(b"tokenizer.ggml.token_type") + len(b"tokenizer.ggml.token_type") + 8
    assert "ends within its header" in refusal(data[:endless] + b"\xff" * 7 + data[endless + 7 :])
    kind = data.index(b"blk.0.ffn_up.weight") + len(b"blk.0.ffn_up.weight") + 4 + 16
    unknown = (77).to_bytes(4, "little")
    assert "quantization type 77" in refusal(data[:kind] + unknown + data[kind + 4 :])
    integers = int(Kind.I32).to_bytes(4, "little")
    assert "quantized as I32" in refusal(data[:kind] + integers + data[kind + 4 :])
    file.write_bytes(data[:-8] + b"\xff\xff\xff\x7f" * 2)
    checkpoint = Checkpoint.open(file)
    with pytest.raises(FbnPruneError, match="values that are not finite: the file is damaged"):
        checkpoint.tensor("lm_head.weight")  # the last tensor of the file


def test_values_too_large_for_float16_name_the_cure(tmp_path: Path) -> None:
    model = tiny()
    model.get_submodule("model.norm").weight.data[:] = 1e6
    file = write_gguf_file(
        tmp_path / "m.gguf", model, lambda name: Kind.F16 if "embd" in name else Kind.F32
    )
    checkpoint = Checkpoint.of_gguf(open_gguf(file, torch.float16))
    with pytest.raises(FbnPruneError, match="--dtype bfloat16"):
        checkpoint.tensor("model.norm.weight")
