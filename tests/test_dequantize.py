"""A quantised checkpoint becomes the plain one that it stands for, or is refused in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from quantized_models import (
    KINDS,
    WEIGHTS,
    compressed,
    edit_config,
    edit_tensors,
    save_quantized,
    weights,
)
from safetensors.torch import load_file, save_file
from tiny_models import FAMILY_CONFIGS, WIDTH, logits, save_tiny
from torch import Tensor
from transformers import AutoModelForCausalLM, FineGrainedFP8Config

from fbn_prune.cli import main as cli
from fbn_prune.errors import FbnPruneError, InvalidInput
from fbn_prune.export.dequantized import write_dequantized
from fbn_prune.model import quantized_values
from fbn_prune.model.checkpoint import Checkpoint
from fbn_prune.model.quantized import open_quantized

GATE = "model.layers.1.mlp.gate_proj"


def run(*arguments: object) -> int:
    """The exit code of the command line."""
    return cli._exit_code([str(argument) for argument in arguments])


def dequantize(model: Path, output: Path, *more: str) -> Path:
    assert run("dequantize", "--model", model, "--output", output, *more) == 0
    return output


def loaded_logits(folder: Path) -> Tensor:
    return logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))


def refusal(folder: Path) -> str:
    with pytest.raises(InvalidInput) as raised:
        open_quantized(folder)
    assert "\n" not in str(raised.value)
    return str(raised.value)


# What comes out


HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


@pytest.mark.parametrize("head", ["its own", "a copy", "alone"])
def test_what_is_written_says_whether_the_head_is_tied_whatever_the_config_said(
    head: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = save_quantized(tmp_path / "model", "fp8-blocks", dtype=torch.bfloat16)

    def change(tensors: dict[str, Tensor]) -> None:
        if head == "a copy":
            tensors[HEAD] = tensors[EMBEDDING].clone()
        elif head == "alone":
            tensors[HEAD] = tensors.pop(EMBEDDING)

    edit_tensors(tmp_path / "model", change)
    edit_config(tmp_path / "model", lambda settings: settings.update(tie_word_embeddings=True))
    out = dequantize(tmp_path / "model", tmp_path / "out")
    written = load_file(out / WEIGHTS)
    assert (HEAD in written) == (head == "its own")
    assert torch.equal(written[EMBEDDING], expected[EMBEDDING].bfloat16())
    tied = json.loads((out / "config.json").read_text())["tie_word_embeddings"]
    assert tied is (head != "its own")
    said = "lm_head.weight differs from the embedding: the stored head is used"
    assert (said in capsys.readouterr().err) == (head == "its own")
    if head == "its own":
        assert torch.equal(written[HEAD], expected[HEAD].bfloat16())


def test_widths_that_the_config_does_not_have_are_written_into_it(tmp_path: Path) -> None:
    save_quantized(tmp_path / "model", "pack-group-zero")
    edit_config(tmp_path / "model", lambda settings: settings.update(intermediate_size=40))
    out = dequantize(tmp_path / "model", tmp_path / "out")
    assert json.loads((out / "config.json").read_text())["intermediate_size"] == WIDTH


@pytest.mark.parametrize("kind", KINDS)
def test_the_weights_are_those_that_the_format_stands_for(kind: str, tmp_path: Path) -> None:
    expected = save_quantized(tmp_path / "model", kind)
    written = load_file(dequantize(tmp_path / "model", tmp_path / "out") / WEIGHTS)
    assert written.keys() == expected.keys()
    for name, values in expected.items():
        torch.testing.assert_close(written[name], values, rtol=3e-7, atol=0, msg=name)
    exact = not kind.startswith("bitsandbytes-8")  # which divides where the library multiplies
    assert not exact or all(torch.equal(written[name], expected[name]) for name in expected)


def test_the_result_is_a_stock_checkpoint_with_the_plain_models_logits(tmp_path: Path) -> None:
    plain = save_quantized(tmp_path / "model", "fp8-blocks", dtype=torch.bfloat16)
    out = dequantize(tmp_path / "model", tmp_path / "out")
    reference = save_tiny(tmp_path / "reference", dtype=torch.bfloat16)
    rounded = {name: values.to(torch.bfloat16) for name, values in plain.items()}
    save_file(rounded, reference / WEIGHTS, {"format": "pt"})
    assert torch.equal(loaded_logits(out), loaded_logits(reference))
    config = json.loads((out / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == "bfloat16"
    opened = Checkpoint.open(out)
    assert set(map(opened.dtype, opened.names)) == {torch.bfloat16}
    assert (out / "tokenizer.json").is_file()


def test_the_result_can_be_pruned_and_the_quantized_model_says_how(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_quantized(tmp_path / "model", "pack-group-zero")
    flags = ["--calibration", text, "--tokens", 512, "--context", 32, "--networks", 4]
    flags += ["--network-tokens", 256, "--sparsity", 0.4]
    assert run("--model", tmp_path / "model", "--output", tmp_path / "no", *flags) == 2
    assert "make a plain checkpoint of it with `fbn-prune dequantize`" in capsys.readouterr().err
    out = dequantize(tmp_path / "model", tmp_path / "out")
    assert run("--model", out, "--output", tmp_path / "small", *flags) == 0
    assert torch.isfinite(loaded_logits(tmp_path / "small")).all()


def test_transformers_reads_the_same_from_blocks_of_float8(tmp_path: Path) -> None:
    save_quantized(tmp_path / "model", "fp8-blocks")

    def small_blocks(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.endswith("weight_scale_inv")]:
            weight = tensors[name.removesuffix("_scale_inv")]
            grid = weight.shape[0] // 8, weight.shape[1] // 8  # transformers wants whole blocks
            tensors[name] = torch.rand(grid) + 0.5

    edit_tensors(tmp_path / "model", small_blocks)
    edit_config(
        tmp_path / "model", lambda c: c["quantization_config"].update(weight_block_size=[8, 8])
    )
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model",
        dtype=torch.float32,
        quantization_config=FineGrainedFP8Config(dequantize=True),
    ).state_dict()
    written = load_file(dequantize(tmp_path / "model", tmp_path / "out") / WEIGHTS)
    for name, values in written.items():
        assert torch.equal(values, loaded[name]), name


def test_one_slice_at_a_time_gives_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for kind in ("fp8-blocks", "pack-group-zero", "bitsandbytes-nf4-nested"):
        expected = save_quantized(tmp_path / kind, kind)
        monkeypatch.setattr(quantized_values, "SLICE_ELEMENTS", 40)
        source = open_quantized(tmp_path / kind)
        assert all(torch.equal(source.tensor(name), expected[name]) for name in expected)


def test_shards_and_an_index_on_both_sides(tmp_path: Path) -> None:
    expected = save_quantized(tmp_path / "model", "fp8-blocks")
    tensors = load_file(tmp_path / "model" / WEIGHTS)
    (tmp_path / "model" / WEIGHTS).unlink()
    shards: dict[str, dict[str, Tensor]] = {"a.safetensors": {}, "b.safetensors": {}}
    for name, tensor in tensors.items():  # scales and their weights in different files
        shards["a.safetensors" if "scale" in name else "b.safetensors"][name] = tensor
    for file, part in shards.items():
        save_file(part, tmp_path / "model" / file)
    index = {name: file for file, part in shards.items() for name in part}
    (tmp_path / "model" / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": index}))
    out = dequantize(tmp_path / "model", tmp_path / "out", "--max-shard-size", "10KB")
    assert len(list(out.glob("*.safetensors"))) > 2
    opened = Checkpoint.open(out)
    assert all(torch.equal(opened.tensor(name), expected[name]) for name in expected)


@pytest.mark.parametrize("given", ["bfloat16", "float32"])
def test_a_dtype_that_is_given_is_that_of_all_weights(
    given: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = save_quantized(tmp_path / "model", "int-tensor", dtype=torch.float16)
    out = dequantize(tmp_path / "model", tmp_path / "out", "--dtype", given, "--json")
    dtype = getattr(torch, given)
    for name, values in load_file(out / WEIGHTS).items():
        assert torch.equal(values, expected[name].to(dtype))
    assert json.loads((out / "config.json").read_text())["dtype"] == given
    told = json.loads(capsys.readouterr().out)
    assert told["dtype"] == given
    assert told["dequantized"] == 20
    assert told["bytes"] == sum(v.numel() * dtype.itemsize for v in expected.values())


def test_without_a_dtype_what_was_not_quantized_stays_as_it_is(tmp_path: Path) -> None:
    save_quantized(tmp_path / "model", "float-channel", dtype=torch.bfloat16)
    norm = "model.norm.weight"
    edit_tensors(tmp_path / "model", lambda t: t.update({norm: t[norm].float()}))
    edit_config(tmp_path / "model", lambda c: c.update(dtype="float8_e4m3fn"))  # means bfloat16
    opened = Checkpoint.open(dequantize(tmp_path / "model", tmp_path / "out"))
    assert opened.dtype(norm) == torch.float32
    assert opened.dtype(f"{GATE}.weight") == torch.bfloat16
    assert opened.config["dtype"] == "bfloat16"


def test_matrices_that_bitsandbytes_turned_round_are_turned_back(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", "gpt2")
    expected = load_file(folder / WEIGHTS)

    def quantize(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            if ".c_" in name and name.endswith("weight"):
                stored, values = KINDS["bitsandbytes-8"][1](tensors.pop(name).T)
                expected[name] = values.T
                module = name.removesuffix(".weight")
                tensors |= {f"{module}.{part}": v.contiguous() for part, v in stored.items()}

    edit_tensors(folder, quantize)
    edit_config(folder, lambda c: c.update(quantization_config={"load_in_8bit": True}))
    out = dequantize(folder, tmp_path / "out")
    for name, values in load_file(out / WEIGHTS).items():
        torch.testing.assert_close(values, expected[name], rtol=3e-7, atol=0)
    AutoModelForCausalLM.from_pretrained(out)


def test_groups_of_one_config_are_told_apart_by_their_scales(tmp_path: Path) -> None:
    expected = save_quantized(tmp_path / "model", "float-channel")
    module = "model.layers.2.mlp.up_proj"
    parts, expected[f"{module}.weight"] = KINDS["float-block"][1](expected[f"{module}.weight"])
    edit_tensors(
        tmp_path / "model", lambda t: t.update({f"{module}.{p}": v for p, v in parts.items()})
    )
    block = weights("block", "float", block_structure=[16, 16])
    config = compressed("mixed-precision", weights("channel", "float"), block)
    for group in config["config_groups"].values():
        group["format"] = "float-quantized"
    edit_config(tmp_path / "model", lambda c: c.update(quantization_config=config))
    written = load_file(dequantize(tmp_path / "model", tmp_path / "out") / WEIGHTS)
    assert all(torch.equal(written[name], expected[name]) for name in expected)


def test_the_config_is_found_in_its_old_place_and_the_card_keeps_the_licence(
    tmp_path: Path,
) -> None:
    save_quantized(tmp_path / "model", "int-tensor")
    edit_config(
        tmp_path / "model", lambda c: c.update(compression_config=c.pop("quantization_config"))
    )
    (tmp_path / "model" / "README.md").write_text("---\nlicense: mit\n---\nold words\n")
    out = dequantize(tmp_path / "model", tmp_path / "out")
    assert "compression_config" not in json.loads((out / "config.json").read_text())
    card = (out / "README.md").read_text()
    assert "license: mit" in card
    assert "was quantized by compressed-tensors: 20 weights" in card
    assert "old words" not in card
    assert str(tmp_path) not in card


# What is refused


@pytest.mark.parametrize("method", ["gptq", None, 3])
def test_other_methods_are_refused_by_name(method: object, tmp_path: Path) -> None:
    save_quantized(tmp_path, "fp8-blocks")
    edit_config(tmp_path, lambda c: c["quantization_config"].update(quant_method=method))
    message = refusal(tmp_path)
    assert f"quantized by '{method}'" in message or "does not name" in message
    assert "supported: fp8, compressed-tensors, bitsandbytes" in message
    with pytest.raises(InvalidInput, match="prune first, quantize afterwards"):
        Checkpoint.open(tmp_path)


def test_a_plain_model_and_one_that_cannot_be_pruned_are_refused(tmp_path: Path) -> None:
    assert "there is nothing to dequantize" in refusal(save_tiny(tmp_path))
    save_quantized(tmp_path, "fp8-blocks")
    edit_config(tmp_path, lambda c: c.update(model_type="mixtral", num_local_experts=8))
    assert "is a mixture of experts" in refusal(tmp_path)


def _set(part: str, value: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], None]:
    name = f"{GATE}.{part}"
    return lambda tensors: tensors.update({name: value(tensors[name]).contiguous()})


def _drop(part: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.pop(f"{GATE}.{part}")


def _state(**changes: Any) -> Callable[[dict[str, Tensor]], None]:
    def edit(state: Tensor) -> Tensor:
        content = json.loads(bytes(state.tolist())) | changes
        return torch.tensor(list(json.dumps(content).encode()), dtype=torch.uint8)

    return _set(STATE, edit)


STATE = "weight.quant_state.bitsandbytes__nf4"
FP8, NF4, INVERSE = "fp8-blocks", "bitsandbytes-nf4", "weight_scale_inv"


@pytest.mark.parametrize(
    ("kind", "edit", "message"),
    [
        (FP8, _drop(INVERSE), "its .*_scale_inv is not in"),
        (FP8, _set(INVERSE, lambda s: s[:1]), r"shape \[1, 1\], but the config implies \[2, 1\]"),
        (FP8, _set(INVERSE, lambda s: s.repeat(2, 1)), r"shape \[4, 1\], but the config implies"),
        (FP8, _set(INVERSE, lambda s: s.byte()), "stored as torch.uint8: a scale is floating"),
        (FP8, _set("weight", lambda w: w.float()), "scale_inv belongs to no quantized weight"),
        (
            FP8,
            _set("weight", lambda w: w.char()),
            "which its config does not explain|belongs to no",
        ),
        (FP8, _set("weight", lambda w: w[:8]), r"\[8, 16\]|has shape"),
        ("naive-channel", _drop("weight_scale"), "weight_scale is not in"),
        ("int-group-zero", _drop("weight_zero_point"), "zero_point is not in"),
        (
            "int-group-zero",
            _set("weight_zero_point", lambda z: z[:5]),
            r"zero_point has shape \[5, 2\], the scales \[24, 2\]",
        ),
        ("pack-group", _drop("weight_shape"), "weight_shape is not in"),
        ("pack-group", _set("weight_shape", lambda s: s * 2**40), "packed in int32"),
        (
            "pack-group",
            _set("weight_shape", lambda s: s + torch.tensor([0, 2**40])),
            "words a row for 1099511627792 numbers, but the config implies 4 bits",
        ),
        ("pack-group", _set("weight_packed", lambda w: w[:, :1]), "words a row"),
        ("pack-order", _set("weight_g_idx", lambda g: g[:3]), "g_idx has shape"),
        (
            "pack-group",
            lambda t: t.update({f"{GATE}.weight": torch.zeros(24, 16)}),
            "has both",
        ),
        ("bitsandbytes-8", _drop("SCB"), "its .*SCB is not in"),
        ("bitsandbytes-8", _set("weight_format", lambda f: f + 2), "weight_format is not 0"),
        (NF4, _drop("weight.absmax"), "absmax is not in"),
        (NF4, _set("weight.absmax", lambda a: a[:3]), r"requires \[12\]"),
        (NF4, _state(shape=[2**40, 2**40]), "which is not a matrix"),
        (NF4, _state(shape="x"), "not a matrix"),
        (NF4, _state(blocksize=2**40), "which is not a matrix"),
        (NF4, _state(blocksize=-64), "positive integer"),
        (f"{NF4}-nested", _state(nested_offset="x"), "gives the offset 'x'"),
        (NF4, _set(STATE, lambda s: s[:-1]), "not readable JSON"),
    ],
)
def test_tensors_that_do_not_go_together_are_refused(
    kind: str, edit: Callable[[dict[str, Tensor]], object], message: str, tmp_path: Path
) -> None:
    save_quantized(tmp_path, kind)
    edit_tensors(tmp_path, edit)
    with pytest.raises(InvalidInput, match=message):
        open_quantized(tmp_path)


def _group(*how: Any, **more: Any) -> dict[str, Any]:
    return {"config_groups": {"a": {"weights": weights(*how, **more)}}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "nvfp4-pack-quantized"}, "format 'nvfp4-pack-quantized' cannot be dequantized"),
        ({"format": None}, "format None cannot be dequantized"),
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "stored with a sparsity_config"),
        ({"transform_config": {"config_groups": {"u": {}}}}, "stored with a transform_config"),
        ({"config_groups": [1]}, "config_groups must be an object"),
        ({"config_groups": {"W8A8": ["Linear"]}}, "group 'W8A8' must be an object"),
        ({"config_groups": {}}, "but the config implies no quantized weights"),
        ({"config_groups": {"a": {"weights": [8]}}}, "weights must be an object"),
        (_group("tensor_group"), "strategy 'tensor_group' is not known"),
        (_group("group", group_size=0), "group_size must be a positive"),
        (_group("channel", bits=16), "num_bits is 16"),
        (_group("group", group_size=8), r"has shape \[1, 1\], but the config implies"),
    ],
)
def test_configs_that_do_not_say_how_are_refused(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    save_quantized(tmp_path, "int-tensor")
    edit_config(tmp_path, lambda c: c["quantization_config"].update(change))
    with pytest.raises(InvalidInput, match=message):
        open_quantized(tmp_path)


def test_three_bits_have_been_packed_in_two_ways(tmp_path: Path) -> None:
    save_quantized(tmp_path, "pack-group")

    def three(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.endswith("weight_packed")]:
            rows, columns = tensors[name.replace("_packed", "_shape")].tolist()
            tensors[name] = torch.zeros(rows, -(-columns * 3 // 32), dtype=torch.int32)

    edit_tensors(tmp_path, three)
    config = compressed("pack-quantized", weights("group", bits=3, group_size=8))
    edit_config(tmp_path, lambda c: c.update(quantization_config=config))
    assert "packs numbers of 3 bits" in refusal(tmp_path)


def test_an_order_that_was_never_set_is_none(tmp_path: Path) -> None:
    expected = save_quantized(tmp_path, "pack-group")[f"{GATE}.weight"]
    unset = torch.full((16,), -1, dtype=torch.int32)
    edit_tensors(tmp_path, lambda t: t.update({f"{GATE}.weight_g_idx": unset}))
    assert torch.equal(open_quantized(tmp_path).tensor(f"{GATE}.weight"), expected)


def test_what_two_ways_of_reading_fit_is_refused(tmp_path: Path) -> None:
    save_quantized(tmp_path, "float-block")
    groups = [weights("block", "float", block_structure=[size, 16]) for size in (16, 20)]
    config = compressed("float-quantized", *groups)
    edit_config(tmp_path, lambda c: c.update(quantization_config=config))
    message = "fits blocks of [16, 16] and [20, 16]: the config does not say which"
    assert message in refusal(tmp_path)


def test_a_group_outside_the_scales_is_refused(tmp_path: Path) -> None:
    save_quantized(tmp_path, "pack-order")
    edit_tensors(tmp_path, _set("weight_g_idx", lambda g: g + 1))
    source = open_quantized(tmp_path)
    with pytest.raises(InvalidInput, match="has groups outside 0 to 1"):
        source.tensor(f"{GATE}.weight")


def test_a_weight_that_a_type_cannot_hold_leaves_no_output(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_quantized(tmp_path / "model", "fp8-blocks")
    edit_tensors(tmp_path / "model", _set(INVERSE, lambda s: s * 1e6))
    arguments = ("dequantize", "--model", tmp_path / "model", "--output", tmp_path / "out")
    assert run(*arguments, "--dtype", "float16") == 1
    assert f"{GATE}.weight has values too large for torch.float16" in capsys.readouterr().err
    edit_tensors(tmp_path / "model", _set(INVERSE, lambda s: s / 0))
    assert run(*arguments) == 1
    assert f"{GATE}.weight has values that are not finite" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_an_output_that_exists_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_quantized(tmp_path / "model", "fp8-blocks")
    out = dequantize(tmp_path / "model", tmp_path / "out")
    arguments = ("dequantize", "--model", tmp_path / "model", "--output")
    assert run(*arguments, out) == 2
    assert "exists; give another, or --overwrite" in capsys.readouterr().err
    assert run(*arguments, out, "--overwrite") == 0
    assert run(*arguments, tmp_path / "model", "--overwrite") == 2
    assert "is or holds the model itself" in capsys.readouterr().err


def test_a_full_disk_is_told_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_quantized(tmp_path / "model", "fp8-blocks")
    source = open_quantized(tmp_path / "model")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fbn_prune.export.shards._Shard.write", full)
    (tmp_path / "out").mkdir()
    with pytest.raises(FbnPruneError, match="No space left on device"):
        write_dequantized(source, tmp_path / "out")


def test_a_quantized_model_is_not_run_as_it_is(tmp_path: Path) -> None:
    save_quantized(tmp_path, "fp8-blocks")
    source = open_quantized(tmp_path)
    with pytest.raises(InvalidInput, match="dequantize it first"):
        source.load_model("cpu", torch.float32)
    wide = source.read(f"{GATE}.weight", torch.device("cpu"), torch.float64)
    assert torch.equal(wide, source.tensor(f"{GATE}.weight").double())


def test_tied_embeddings_stay_tied(tmp_path: Path) -> None:
    config = FAMILY_CONFIGS["llama-tied"]()
    save_quantized(tmp_path / "model", "fp8-blocks", config=config)
    out = dequantize(tmp_path / "model", tmp_path / "out")
    assert "lm_head.weight" not in load_file(out / WEIGHTS)
    assert loaded_logits(out).shape[-1] == config.vocab_size
