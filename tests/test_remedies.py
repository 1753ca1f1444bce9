"""Whatever is given in place of a checkpoint is named, with what to do; written configs name stock classes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from small_runs import arguments, export, random_cuts, refused
from tiny_models import LAYERS, make_model, make_tokenizer
from torch import Tensor

from fbn_prune.cli.main import _exit_code
from fbn_prune.errors import InvalidInput
from fbn_prune.export.directory import check_room
from fbn_prune.model import remedies
from fbn_prune.model.checkpoint import Checkpoint

WEIGHTS = "model.safetensors"


def rewritten(change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Callable[[Path], Path]:
    def rewrite(folder: Path) -> Path:
        changed = change(load_file(folder / WEIGHTS))
        save_file({n: t.clone() for n, t in changed.items()}, folder / WEIGHTS, {"format": "pt"})
        return folder

    return rewrite


def prefixed(prefix: str) -> Callable[[Path], Path]:
    return rewritten(lambda tensors: {prefix + name: t for name, t in tensors.items()})


def without(*names: str, **more: bytes) -> Callable[[Path], Path]:
    """Remove files, and add others; an underscore in a name stands for the dot."""

    def remove(folder: Path) -> Path:
        for name in names:
            (folder / name).unlink()
        for name, content in more.items():
            (folder / ".".join(name.rsplit("_", 1))).write_bytes(content)
        return folder

    return remove


def hub_cache(folder: Path) -> Path:
    repository = folder.parent / "models--someone--model"
    for name in ("other", "abc"):
        shutil.copytree(folder, repository / "snapshots" / name)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    return repository


def trainer_output(folder: Path) -> Path:
    return Path(shutil.copytree(folder, folder.parent / "run" / "checkpoint-9")).parent


def two_models(folder: Path) -> Path:
    return Path(shutil.copytree(folder, folder.parent / "other")).parent


def emptied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.empty(0) if "_proj" in name else t for name, t in tensors.items()}


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            without(WEIGHTS, m_gguf=b"GGUF"),
            r"m.gguf is not a complete GGUF file .*download it again",
        ),
        (rewritten(emptied), "tensors are empty .first .*_proj.* zero_to_fp32.py"),
        (prefixed("base_model.model."), "from PEFT's wrapper: .*merge_and_unload"),
        (prefixed("module."), "save the inner model, model.module"),
        (prefixed("_orig_mod."), "save the inner model, model._orig_mod"),
        (hub_cache, "give its snapshot .*models--someone--model/snapshots/abc"),
        (lambda folder: hub_cache(folder) / "snapshots", "give its snapshot .*/snapshots/abc"),
        (trainer_output, "give the folder inside, .*checkpoint-9"),
        (two_models, "give one of the folders inside it .model, other."),
        (without("config.json"), "copy it from the original model"),
        (without(WEIGHTS), "download the weights"),
        (without(WEIGHTS, consolidated_safetensors=b"x"), "only Mistral's own form"),
        (without(WEIGHTS, weights_safetensors=b"x"), "rename it to model.safetensors"),
        (without(WEIGHTS, adapter_model_safetensors=b"x"), "an adapter: merge it"),
        (
            without(model_safetensors=b"version https://git-lfs.github.com/spec/v1\n"),
            "a pointer of Git LFS: run `git lfs pull`",
        ),
        (without("tokenizer.json", "tokenizer_config.json"), "copy tokenizer.json and"),
    ],
)
def test_what_is_no_checkpoint_is_named_with_what_to_do(
    make: Callable[[Path], Path], words: str, tiny: Path, tmp_path: Path
) -> None:
    folder = make(Path(shutil.copytree(tiny, tmp_path / "model")))
    with pytest.raises(InvalidInput, match=words) as refused:
        Checkpoint.open(folder)
    assert "\n" not in str(refused.value)


def test_a_sentencepiece_model_alone_asks_for_all_that_reads_it(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not for tiktoken, as transformers does, which cannot read it."""
    folder = Path(shutil.copytree(tiny, tmp_path / "model"))
    (folder / "tokenizer.model").write_bytes(b"\x0a\x0e\x0a\x05<unk>\x15\0\0\0\0\x18\x02")
    monkeypatch.setattr(remedies, "find_spec", lambda name: None)
    Checkpoint.open(folder)  # tokenizer.json is enough
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (folder / file).unlink()
    with pytest.raises(
        InvalidInput, match="pip install sentencepiece protobuf to read it, or copy"
    ):
        Checkpoint.open(folder)
    monkeypatch.setattr(remedies, "find_spec", lambda name: name == "sentencepiece" or None)
    with pytest.raises(InvalidInput, match="pip install protobuf to read it"):
        Checkpoint.open(folder)


@pytest.mark.parametrize(
    ("needed", "free", "words"),
    [
        (30_000_000, 10, "needs 30.0 MB, but .* has 10 bytes free: make room"),
        (11_001, 11_000, "needs 11,001 bytes, but .* has 11,000 bytes free"),
        (2_500_000_000, 40_000, "needs 2.5 GB, but .* has 40.0 kB free"),
    ],
)
def test_missing_room_is_told_in_sizes_that_differ(
    needed: int, free: int, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    told = "fbn_prune.export.directory.shutil.disk_usage"
    monkeypatch.setattr(told, lambda _: usage._replace(free=free))
    with pytest.raises(InvalidInput, match=words):
        check_room(tmp_path / "out", needed, "output")


@pytest.mark.parametrize(
    ("stored", "written"),
    [
        (["MineForCausalLM"], ["LlamaForCausalLM"]),
        (None, ["LlamaForCausalLM"]),
        (["LlamaForCausalLM"], ["LlamaForCausalLM"]),
    ],
)
def test_a_written_config_names_the_class_that_every_loader_knows(
    stored: list[str] | None, written: list[str], tiny: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny, tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    config |= {"architectures": stored, "auto_map": {"AutoModelForCausalLM": "mine.Mine"}}
    (folder / "config.json").write_text(json.dumps(config))
    source = Checkpoint.open(folder)
    out = export(source, random_cuts(source, [8] * LAYERS), tmp_path / "out")
    found = json.loads((out / "config.json").read_text())
    assert found["architectures"] == written
    assert "auto_map" not in found


@pytest.mark.parametrize("adapted", ["mlp.down_proj", "self_attn.q_proj", "lm_head"])
def test_a_model_saved_with_its_adapters_is_refused_by_all_with_how_to_merge_them(
    adapted: str, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = {"modules_to_save": ["lm_head"]} if adapted == "lm_head" else {}
    module = "q_proj" if whole else adapted.rpartition(".")[2]
    lora = LoraConfig(r=2, target_modules=[module], task_type="CAUSAL_LM", **whole)
    wrapped = get_peft_model(make_model("llama"), lora)
    folder = tmp_path / "model"
    wrapped.base_model.model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    job = [*arguments(folder, text), "--sparsity", "0.5", "--dry-run"]
    gguf = ["--output", str(tmp_path / "m.gguf")]
    for command in (
        job,
        [*job, "--memory-budget", "800MB"],
        ["convert", "--model", str(folder), *gguf],
    ):
        refused(capsys, command, "saved from a model with PEFT's adapters: merge the adapters")
    merged = tmp_path / "merged"
    wrapped.merge_and_unload().save_pretrained(merged)
    make_tokenizer().save_pretrained(merged)
    assert _exit_code([*arguments(merged, text), *job[-3:]]) == 0
