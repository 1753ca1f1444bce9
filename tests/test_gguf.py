"""Claims about GGUF files, read back: every tensor, every width, every token as llama.cpp expects it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from small_runs import export, random_cuts, refused, run_json
from tiny_models import FAMILY_CONFIGS, LAYERS, VOCAB, WIDTH, make_merging_tokenizer
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from fbn_prune.cli.main import _exit_code
from fbn_prune.errors import InvalidInput
from fbn_prune.export.gguf_tokenizer import CONTROL, UNUSED
from fbn_prune.export.to_gguf import write as write_gguf
from fbn_prune.model.checkpoint import Checkpoint

gguf = pytest.importorskip("gguf")

LLAMAS = ("llama", "llama-mlp-bias", "llama-tied")
CONVERTED = (*LLAMAS, "qwen2", "qwen3")


def save_tiny(folder: Path, name: str = "llama", **how: Any) -> Path:
    """A tiny checkpoint that llama.cpp can load."""
    tiny_models.save_tiny(folder, name, **how)
    make_merging_tokenizer().save_pretrained(folder)
    return folder


def read(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {}
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        shape = tuple(int(size) for size in reversed(tensor.shape))
        tensors[tensor.name] = torch.from_numpy(np.array(values, dtype=np.float32)).reshape(shape)
    return fields, tensors


def ragged(folder: Path, name: str, out: Path) -> Checkpoint:
    source = Checkpoint.open(save_tiny(folder, name))
    export(source, random_cuts(source, (4, WIDTH, 7)), out)
    return Checkpoint.open(out)


def paired(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Row r of a head's first half beside row r of its second half."""
    size = weight.shape[0] // heads
    order = [
        h * size + half * size // 2 + r
        for h in range(heads)
        for r in range(size // 2)
        for half in (0, 1)
    ]
    return weight[order]


def check_tensors(source: Checkpoint, tensors: dict[str, torch.Tensor], *, pairs: bool) -> None:
    names = {
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "attn_q_norm": "self_attn.q_norm",
        "attn_k_norm": "self_attn.k_norm",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
    }
    whole = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
    seen = 0
    for name, found in tensors.items():
        stem, _, part = name.rpartition(".")
        if stem.startswith("blk."):
            _, layer, kind = stem.split(".")
            stored = f"model.layers.{layer}.{names[kind]}.{part}"
        else:
            kind, stored = stem, f"{whole[stem]}.{part}"
        expected = source.tensor(stored).float()
        if pairs and kind in ("attn_q", "attn_k"):
            expected = paired(expected, 4 if kind == "attn_q" else 2)
        assert torch.equal(found, expected), name
        seen += 1
    assert seen == len(source.names)


@pytest.mark.parametrize("name", CONVERTED)
def test_a_uniform_checkpoint_is_all_there(name: str, tmp_path: Path) -> None:
    source = Checkpoint.open(save_tiny(tmp_path / "in", name))
    arch = write_gguf(source, tmp_path / "m.gguf")
    fields, tensors = read(tmp_path / "m.gguf")
    assert arch == fields["general.architecture"] == source.config["model_type"]
    assert fields[f"{arch}.feed_forward_length"] == WIDTH
    assert fields[f"{arch}.block_count"] == LAYERS
    assert fields[f"{arch}.attention.head_count"] == 4
    assert fields[f"{arch}.attention.head_count_kv"] == 2
    assert fields[f"{arch}.rope.dimension_count"] == 4
    check_tensors(source, tensors, pairs=name in LLAMAS)


@pytest.mark.parametrize("name", LLAMAS)
def test_a_ragged_llama_has_one_width_a_layer(name: str, tmp_path: Path) -> None:
    source = ragged(tmp_path / "in", name, tmp_path / "out")
    assert write_gguf(source, tmp_path / "m.gguf") == "deci"
    fields, tensors = read(tmp_path / "m.gguf")
    assert fields["deci.feed_forward_length"] == [4, WIDTH, 7]
    assert fields["deci.attention.head_count"] == [4] * LAYERS
    assert fields["deci.attention.head_count_kv"] == [2] * LAYERS
    check_tensors(source, tensors, pairs=True)


def test_a_ragged_model_of_other_arithmetic_is_refused(tmp_path: Path) -> None:
    source = ragged(tmp_path / "in", "qwen2", tmp_path / "out")
    with pytest.raises(InvalidInput, match="only with Llama's arithmetic"):
        write_gguf(source, tmp_path / "m.gguf")
    assert not (tmp_path / "m.gguf").exists()


@pytest.mark.parametrize("name", ["phi3", "gpt2"])
def test_other_families_are_refused_in_one_line(name: str, tmp_path: Path) -> None:
    source = Checkpoint.open(save_tiny(tmp_path / "in", name))
    with pytest.raises(InvalidInput, match="not converted to GGUF"):
        write_gguf(source, tmp_path / "m.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_the_tokenizer_is_written_token_by_token(tmp_path: Path) -> None:
    source = Checkpoint.open(save_tiny(tmp_path / "in"))
    write_gguf(source, tmp_path / "m.gguf")
    fields, _ = read(tmp_path / "m.gguf")
    vocabulary = source.load_tokenizer().get_vocab()
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    assert len(tokens) == len(types) == VOCAB
    assert all(tokens[index] == text for text, index in vocabulary.items())
    assert types[256] == types[257] == CONTROL
    assert types[259] == UNUSED
    assert fields["tokenizer.ggml.model"] == "gpt2"
    assert fields["tokenizer.ggml.pre"] == "gpt-2"
    assert fields["tokenizer.ggml.bos_token_id"] == 256
    assert fields["tokenizer.ggml.merges"] == ["a b"]
    assert fields["tokenizer.ggml.add_bos_token"] is fields["tokenizer.ggml.add_eos_token"] is False


@pytest.mark.parametrize(("kind", "dtype"), [("f16", torch.float16), ("bf16", torch.bfloat16)])
def test_matrices_take_the_type_asked_for_and_vectors_stay_float32(
    kind: Any, dtype: torch.dtype, tmp_path: Path
) -> None:
    source = Checkpoint.open(save_tiny(tmp_path / "in"))
    write_gguf(source, tmp_path / "m.gguf", dtype=kind)
    stored = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    assert stored["blk.0.ffn_up.weight"] == kind.upper()
    assert stored["blk.0.attn_norm.weight"] == stored["output_norm.weight"] == "F32"
    _, tensors = read(tmp_path / "m.gguf")
    expected = source.tensor("model.layers.0.mlp.up_proj.weight").to(dtype).float()
    assert torch.equal(tensors["blk.0.ffn_up.weight"], expected)


def test_scaled_rotary_frequencies_are_those_of_transformers(tmp_path: Path) -> None:
    rope = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0}
    rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope |= {"original_max_position_embeddings": 32}
    plain_config = FAMILY_CONFIGS["llama"]().to_dict()
    config = LlamaConfig(**{**plain_config, "rope_parameters": rope, "head_dim": 16})
    source = Checkpoint.open(save_tiny(tmp_path / "in", config=config))
    write_gguf(source, tmp_path / "m.gguf")
    fields, tensors = read(tmp_path / "m.gguf")
    plain = fields["llama.rope.freq_base"] ** (-torch.arange(0, 16, 2).float() / 16)
    scaled = LlamaRotaryEmbedding(config).inv_freq
    torch.testing.assert_close(plain / tensors["rope_freqs.weight"], scaled)


def test_the_command_writes_a_file_once_and_says_what_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save_tiny(tmp_path / "in")
    args = ["convert", "--to", "gguf", "--model", str(folder), "--output", str(tmp_path / "m.gguf")]
    shown = run_json(capsys, *args)
    assert shown["architecture"] == "llama"
    assert shown["bytes"] == (tmp_path / "m.gguf").stat().st_size
    first = (tmp_path / "m.gguf").read_bytes()
    refused(capsys, args, "exists")
    assert _exit_code([*args, "--overwrite"]) == 0
    assert (tmp_path / "m.gguf").read_bytes() == first
    assert {path.name for path in tmp_path.iterdir()} == {"in", "m.gguf"}


def test_the_embedded_model_is_converted_by_its_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = run_json(
        capsys, "convert", "--model", "builtin", "--no-verify", "--output", tmp_path / "m.gguf"
    )
    assert shown["architecture"] == "llama"
    command = ["dequantize", "--model", "builtin", "--output", str(tmp_path / "d")]
    refused(capsys, command, "names no quantization: there is nothing to dequantize")
