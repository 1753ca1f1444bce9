"""A checkpoint's tensors count, whatever its config says; what the model does not use is said and left out."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_runs import arguments, cut_live, export, random_cuts, recipe, refused, run_json
from tiny_models import (
    HIDDEN,
    LAYERS,
    PATHS,
    WIDTH,
    logits,
    make_merging_tokenizer,
    make_tokenizer,
    save_tiny,
)
from transformers import AutoModelForCausalLM

from fbn_prune import PruningConfig, prune, serving
from fbn_prune.api import prune_checkpoint, write_bundle
from fbn_prune.export.to_gguf import write as write_gguf
from fbn_prune.model.adapter import ModelAdapter
from fbn_prune.model.checkpoint import Checkpoint
from fbn_prune.model.config_checks import ConfigWarning
from fbn_prune.model.kept_neurons import KeptNeurons
from fbn_prune.model.streaming import StreamedModel
from fbn_prune.model.surgery import MlpCut

gguf = pytest.importorskip("gguf")

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
Change = Callable[[dict[str, torch.Tensor]], object]


def changed(folder: Path, change: Change, name: str = "llama-tied", **config: object) -> Path:
    """A tiny checkpoint with other tensors, and other values in its config."""
    save_tiny(folder, name)
    make_merging_tokenizer().save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    stated = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(stated | config))
    return folder


def own_head(tensors: dict[str, torch.Tensor]) -> None:
    tensors[HEAD] = 3 * tensors[EMBEDDING]


def head_alone(tensors: dict[str, torch.Tensor]) -> None:
    tensors[HEAD] = tensors.pop(EMBEDDING)


def head_twice(tensors: dict[str, torch.Tensor]) -> None:
    tensors[HEAD] = tensors[EMBEDDING].clone()


def adapters(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.0.mlp.up_proj.lora_A.weight"] = torch.ones(2, 16)
    tensors["v_head.summary.weight"] = torch.ones(1, 16)


def test_a_head_of_its_own_is_used_and_written_though_the_config_says_tied(tmp_path: Path) -> None:
    folder = changed(tmp_path / "in", own_head)
    with pytest.warns(ConfigWarning, match=r"lm_head\.weight differs from the embedding"):
        source = Checkpoint.open(folder)
    head = source.tensor(HEAD)
    for model in (
        source.load_model("cpu", torch.float32),
        StreamedModel(source, torch.device("cpu"), torch.float32, scratch=tmp_path).model,
    ):
        assert model.config.tie_word_embeddings is False
    dense = logits(source.load_model("cpu", torch.float32))
    assert torch.equal(dense, logits(AutoModelForCausalLM.from_pretrained(folder)))
    for name, widths in (("uniform", (8,) * LAYERS), ("ragged", (4, WIDTH, 8))):
        out = export(source, random_cuts(source, widths), tmp_path / name)
        written = Checkpoint.open(out)
        assert written.config["tie_word_embeddings"] is False
        assert torch.equal(written.tensor(HEAD), head)
        write_gguf(written, tmp_path / f"{name}.gguf")
        (found,) = (
            tensor
            for tensor in gguf.GGUFReader(tmp_path / f"{name}.gguf").tensors
            if tensor.name == "output.weight"
        )
        assert torch.equal(torch.from_numpy(found.data.copy()), head)
    kept = KeptNeurons((WIDTH,) * LAYERS, tuple(torch.arange(8) for _ in range(LAYERS)))
    kept.save(tmp_path / "kept.safetensors")
    write_bundle(str(folder), [f"one={tmp_path / 'kept.safetensors'}"], tmp_path / "bundle")
    stated = json.loads((tmp_path / "bundle" / "config.json").read_text())
    assert stated["tie_word_embeddings"] is False
    served = serving.load(tmp_path / "bundle").model
    assert torch.equal(served.get_output_embeddings().weight, head)


def test_a_model_in_memory_with_a_head_of_its_own_is_saved_with_it(tmp_path: Path) -> None:
    folder = changed(tmp_path / "in", own_head)
    model = AutoModelForCausalLM.from_pretrained(folder)
    texts = [f"{number} apples and {number * 3} pears" for number in range(200)]
    config = PruningConfig(
        criterion="magnitude", sparsity=0.5, tokens=500, context=32, width_multiple=4
    )
    prune(model, make_tokenizer(), texts, config)
    model.save_pretrained(tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(written[HEAD], load_file(folder / "model.safetensors")[HEAD])
    assert (
        json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    )


def test_a_tied_model_that_stores_only_its_head_is_pruned_and_converted(
    tmp_path: Path, text: Path
) -> None:
    folder = changed(tmp_path / "in", head_alone)
    plain = Checkpoint.open(save_tiny(tmp_path / "plain", "llama-tied"))
    source = Checkpoint.open(folder)
    assert sorted(source.names) == sorted(plain.names)
    streamed = StreamedModel(source, torch.device("cpu"), torch.float32, scratch=tmp_path)
    assert torch.equal(
        logits(streamed.model), logits(ModelAdapter(plain.load_model("cpu", torch.float32)).model)
    )
    prune_checkpoint(recipe=recipe(folder, text, tmp_path / "out", sparsity=0.5))
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert EMBEDDING in written
    assert HEAD not in written
    write_gguf(source, tmp_path / "m.gguf")
    names = {tensor.name for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    assert "token_embd.weight" in names
    assert "output.weight" not in names


def test_a_copy_of_a_tied_head_is_counted_once(tmp_path: Path) -> None:
    twice = Checkpoint.open(changed(tmp_path / "in", head_twice))
    plain = Checkpoint.open(save_tiny(tmp_path / "plain", "llama-tied"))
    assert twice.total_parameters == plain.total_parameters
    assert twice.config["tie_word_embeddings"] is True


def test_tensors_that_the_model_does_not_use_are_said_once_and_written_only_on_demand(
    tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = changed(tmp_path / "in", adapters, "llama")
    line = (
        r"2 tensors are not part of the model, first model\.layers\.0\.mlp\.up_proj\.lora_A.*merge"
    )
    with pytest.warns(ConfigWarning, match=line):
        source = Checkpoint.open(folder)
    extra = {"model.layers.0.mlp.up_proj.lora_A.weight", "v_head.summary.weight"}
    assert source.total_parameters == Checkpoint.open(save_tiny(tmp_path / "p")).total_parameters
    for keep in (False, True):
        out = tmp_path / f"out-{keep}"
        small = recipe(folder, text, out, sparsity=0.5, keep_unused_tensors=keep)
        result = prune_checkpoint(recipe=small)
        assert extra & set(load_file(out / "model.safetensors")) == (extra if keep else set())
        assert "not part of the model" in str(result.warning)
        assert "not part of the model" in (out / "README.md").read_text()
    write_gguf(source, tmp_path / "m.gguf")  # which has no place for them


@pytest.mark.parametrize(
    ("change", "config", "message"),
    [
        (lambda t: None, {"vocab_size": 259}, "has shape [260, 16], the model needs [259, 16]"),
        (own_head, {"vocab_size": 259}, "has shape [260, 16], the model needs [259, 16]"),
        (
            lambda t: t.update({HEAD: torch.ones(300, 16)}),
            {},
            "lm_head.weight has shape [300, 16], the model needs [260, 16]",
        ),
        (lambda t: None, {"head_dim": 8}, "has shape [16, 16], the model needs [32, 16]"),
        (lambda t: None, {"tie_word_embeddings": False}, "has no lm_head.weight"),
    ],
)
def test_a_config_that_contradicts_the_tensors_is_refused_before_any_work(
    change: Change,
    config: dict[str, object],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = changed(tmp_path / "in", change, **config)
    for args in (
        ["convert", "--model", str(folder), "--output", str(tmp_path / "m.gguf")],
        ["--model", str(folder), "--sparsity", "0.5", "--dry-run"],
    ):
        refused(capsys, args, message)


def test_rows_of_the_vocabulary_that_the_config_does_not_have_are_refused_with_what_to_write(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = changed(tmp_path / "in", lambda t: None, "llama", vocab_size=258)
    words = 'write "vocab_size": 260 into config.json if the weights are right'
    refused(capsys, ["--model", str(folder), "--sparsity", "0.5", "--dry-run"], words)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 260}))
    Checkpoint.open(folder)


def test_layers_that_the_config_does_not_count_are_said(tmp_path: Path) -> None:
    folder = changed(tmp_path / "in", lambda t: None, "llama", num_hidden_layers=2)
    line = r"config\.json says 2 layers, but 3 are stored: correct it if they belong"
    with pytest.warns(ConfigWarning, match=line):
        Checkpoint.open(folder)


def test_a_bias_that_only_the_config_has_is_refused_with_what_to_write(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = changed(tmp_path / "in", lambda t: None, "llama", mlp_bias=True)
    words = 'config.json says "mlp_bias": true, but no MLP has a bias: write false there'
    refused(capsys, ["--model", str(folder), "--sparsity", "0.5", "--dry-run"], words)


def cut_under_an_old_config(folder: Path, name: str, widths: Sequence[int]) -> Path:
    """A cut checkpoint beside the config of the whole model, as other tools and hand-made cuts leave it."""
    source = Checkpoint.open(save_tiny(folder / "dense", name))
    out = export(source, random_cuts(source, widths), folder / "cut")
    for file in out.glob("modeling_*.py"):
        file.unlink()
    (out / "config.json").write_bytes((folder / "dense" / "config.json").read_bytes())
    return out


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("widths", [(8, 8, 8), (4, 24, 8)], ids=["uniform", "ragged"])
def test_widths_that_the_config_does_not_have_are_read_from_the_tensors(
    name: str, widths: tuple[int, ...], tmp_path: Path
) -> None:
    folder = cut_under_an_old_config(tmp_path, name, widths)
    before = (folder / "config.json").read_bytes()
    with pytest.warns(ConfigWarning, match="neurons.* but the stored tensors have .*neurons"):
        checkpoint = Checkpoint.open(folder)
    assert checkpoint.family.widths(checkpoint.config) == list(widths)
    dense = Checkpoint.open(tmp_path / "dense")
    expected = logits(cut_live(dense, random_cuts(dense, widths)))
    assert torch.equal(logits(checkpoint.load_model("cpu", torch.float32)), expected)
    streamed = StreamedModel(checkpoint, torch.device("cpu"), torch.float32, scratch=tmp_path)
    torch.testing.assert_close(logits(streamed.model), expected)
    cut = MlpCut(torch.arange(4), torch.randn(HIDDEN, 4, dtype=torch.float64), None)
    out = export(checkpoint, [cut] * LAYERS, tmp_path / "again")
    written = Checkpoint.open(out)
    assert written.family.width(written.config) == 4
    assert (folder / "config.json").read_bytes() == before


def test_every_command_takes_a_folder_whose_config_has_other_widths(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = cut_under_an_old_config(tmp_path, "llama", (8, 16, 16))
    job = [*arguments(folder, text), "--width-multiple", "4"]
    out = tmp_path / "out"
    shown = run_json(capsys, *job, "--sparsity", "0.5", "--output", out, "--layout", "ragged")
    line = "config.json says 24 neurons in each layer, but the stored tensors have 8 to 16 neurons"
    assert line in shown["warning"]
    assert line in (out / "README.md").read_text()
    assert run_json(capsys, *job, "--sparsity", "0.5", "--dry-run")["widths"] == [8, 8, 8]
    for command in ("rank", "compare"):
        run_json(capsys, command, *arguments(folder, text))
    shown = run_json(capsys, "bundle", "--model", folder, f"a={out}", "--output", tmp_path / "b")
    served = serving.load(tmp_path / "b")
    assert torch.isfinite(logits(served.model)).all()
    copied = Checkpoint.open(tmp_path / "b")
    assert copied.family.widths(copied.config) == [8, 16, 16]


def test_widths_on_which_the_tensors_do_not_agree_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = cut_under_an_old_config(tmp_path, "llama", (8, 8, 8))
    tensors = load_file(folder / "model.safetensors")
    up = "model.layers.1.mlp.up_proj.weight"
    tensors[up] = torch.ones(16, 16)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    job = ["--model", str(folder), "--sparsity", "0.5", "--dry-run"]
    refused(capsys, job, "take both from one model")


def test_a_bias_that_the_config_does_not_have_is_not_written_for_llama_cpp_to_use(
    tmp_path: Path,
) -> None:
    bias = "model.layers.1.self_attn.q_proj.bias"
    folder = changed(tmp_path / "in", lambda t: t.update({bias: torch.ones(16)}), "llama")
    with pytest.warns(ConfigWarning, match="1 tensor is not part of the model"):
        source = Checkpoint.open(folder)
    write_gguf(source, tmp_path / "m.gguf")
    names = {tensor.name for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    assert not [name for name in names if name.endswith(".bias")]
