"""`convert` runs its file in llama.cpp and compares it with transformers, or says that it did not."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from small_runs import export, random_cuts, refused, run_json
from test_attention_groups import cuts_of
from test_gguf_config import stated
from tiny_models import LAYERS, WIDTH

from fbn_prune.cli.main import _exit_code
from fbn_prune.errors import FbnPruneError, InvalidInput
from fbn_prune.export import llama_cpp
from fbn_prune.export.to_gguf import write as write_gguf
from fbn_prune.model.checkpoint import Checkpoint

pytest.importorskip("gguf")
installed = pytest.mark.skipif(
    importlib.util.find_spec(llama_cpp.BINDING) is None, reason="xllamacpp is not installed"
)


def arguments(folder: Path, output: Path, *more: str) -> list[str]:
    return ["convert", "--model", str(folder), "--output", str(output), *more]


@installed
@pytest.mark.parametrize("name", ["llama-mlp-bias", "llama-tied", "qwen2", "qwen3"])
def test_llama_cpp_answers_as_transformers_does(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = stated(tmp_path / "in", name, {})
    shown = run_json(capsys, *arguments(folder, tmp_path / "m.gguf", "--gguf-type", "f16"))
    assert "verified with llama.cpp: 64 greedy tokens agree" in shown["notes"][-1]


@installed
def test_a_ragged_model_is_verified_too(tmp_path: Path) -> None:
    source = Checkpoint.open(stated(tmp_path / "in", "llama", {}))
    export(source, random_cuts(source, [4, WIDTH, 8][:LAYERS]), tmp_path / "out")
    lines: list[str] = []
    written = Checkpoint.open(tmp_path / "out")
    write_gguf(written, tmp_path / "m.gguf", verify=True, note=lines.append)
    assert "verified" in lines[-1]


@installed
@pytest.mark.parametrize("name", ["llama", "llama-mlp-bias"])
def test_layers_with_fewer_heads_or_none_are_verified_too(name: str, tmp_path: Path) -> None:
    source = Checkpoint.open(stated(tmp_path / "in", name, {}))
    written = Checkpoint.open(export(source, cuts_of(source), tmp_path / "out"))
    lines: list[str] = []
    assert write_gguf(written, tmp_path / "m.gguf", verify=True, note=lines.append) == "deci"
    assert "verified" in lines[-1]


def test_a_first_layer_without_attention_and_other_arithmetic_are_refused(tmp_path: Path) -> None:
    for name, groups, message in (
        ("llama", [[], [1], [0, 1]], "its first layer has no attention"),
        ("qwen3", [[1], [], [0, 1]], "different numbers of attention heads only with Llama's"),
    ):
        source = Checkpoint.open(stated(tmp_path / name, name, {}))
        out = export(source, cuts_of(source, groups), tmp_path / f"{name}-out")
        with pytest.raises(InvalidInput, match=message):
            write_gguf(Checkpoint.open(out), tmp_path / "m.gguf")
    assert not (tmp_path / "m.gguf").exists()


@installed
def test_a_file_that_answers_differently_is_not_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fbn_prune.export.to_gguf.check_config", lambda *about: None)
    folder = stated(tmp_path / "in", "llama", {"hidden_act": "gelu"})
    (tmp_path / "m.gguf").write_bytes(b"an older file")
    assert _exit_code(arguments(folder, tmp_path / "m.gguf", "--overwrite")) == 1
    (line,) = [one for one in capsys.readouterr().err.splitlines() if "error:" in one]
    assert "llama.cpp answers differently from transformers" in line
    assert {path.name for path in tmp_path.iterdir()} == {"in", "m.gguf"}
    assert (tmp_path / "m.gguf").read_bytes() == b"an older file"
    assert _exit_code(arguments(folder, tmp_path / "n.gguf", "--no-verify")) == 0


@installed
def test_a_file_that_llama_cpp_does_not_load_is_not_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Checkpoint.open(stated(tmp_path / "in", "llama", {}))
    monkeypatch.setattr("fbn_prune.export.to_gguf._add_tokenizer", lambda *about: None)
    with pytest.raises(FbnPruneError, match=r"llama\.cpp cannot run the file"):
        write_gguf(source, tmp_path / "m.gguf", verify=None)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_without_llama_cpp_one_line_says_that_the_file_is_not_verified(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llama_cpp, "find_spec", lambda name: None)
    folder = stated(tmp_path / "in", "llama", {})
    shown = run_json(capsys, *arguments(folder, tmp_path / "m.gguf"))
    assert shown["notes"] == ["not verified: llama.cpp is not installed (pip install xllamacpp)"]
    refused(capsys, arguments(folder, tmp_path / "n.gguf", "--verify"), "not installed")
    assert not (tmp_path / "n.gguf").exists()


@installed
def test_a_binding_that_has_changed_says_nothing_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = tmp_path / "changed.py"
    changed.write_text("import sys; print('error: no such setting', file=sys.stderr); sys.exit(3)")
    monkeypatch.setattr(llama_cpp.llama_cpp_process, "__file__", str(changed))
    source = Checkpoint.open(stated(tmp_path / "in", "llama", {}))
    lines: list[str] = []
    write_gguf(source, tmp_path / "m.gguf", verify=None, note=lines.append)
    assert "not verified: the installed xllamacpp does not work" in lines[-1]
    with pytest.raises(FbnPruneError, match="no such setting"):
        write_gguf(source, tmp_path / "n.gguf", verify=True)
