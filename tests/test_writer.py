"""The written checkpoint is the cut model, whole or not there at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from small_runs import cut_live, export, random_cuts
from tiny_models import BIASED, HIDDEN, LAYERS, PATHS, WIDTH, logits, save_tiny
from transformers import AutoModelForCausalLM, AutoTokenizer

from fbn_prune.errors import FbnPruneError, InvalidInput
from fbn_prune.export import directory
from fbn_prune.export.card import CardFacts, model_card, source_license
from fbn_prune.export.directory import atomic_directory, check_output
from fbn_prune.export.writer import verify_export, write_checkpoint
from fbn_prune.model.adapter import ModelAdapter
from fbn_prune.model.checkpoint import Checkpoint
from fbn_prune.model.surgery import MlpCut

KEPT = 8
CUT = [KEPT] * LAYERS


@pytest.fixture
def source(tiny: Path) -> Checkpoint:
    return Checkpoint.open(tiny)


@pytest.mark.parametrize("max_shard_size", ["5GB", "6KB"])
@pytest.mark.parametrize("name", [*PATHS, "llama-tied"])
def test_the_export_is_the_live_model(name: str, max_shard_size: str, tmp_path: Path) -> None:
    source = Checkpoint.open(save_tiny(tmp_path / "in", name))
    cuts = random_cuts(source, CUT)
    out = export(source, cuts, tmp_path / "out", max_shard_size=max_shard_size)
    reloaded = AutoModelForCausalLM.from_pretrained(out).eval()
    assert torch.equal(logits(reloaded), logits(cut_live(source, cuts)))
    assert (max_shard_size == "6KB") == (len(list(out.glob("*.safetensors"))) > 1)
    prompt = AutoTokenizer.from_pretrained(out)("Once", return_tensors="pt")
    answer = reloaded.generate(**prompt, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    assert answer.shape == (1, 9)
    tied = reloaded.get_output_embeddings().weight is reloaded.get_input_embeddings().weight
    assert tied == (name == "llama-tied" or name not in ("llama", "phi3"))


@pytest.mark.parametrize("name", [*PATHS, "llama-mlp-bias", "falcon"])
def test_parameters_and_bytes_fall_by_exactly_what_was_cut(name: str, tmp_path: Path) -> None:
    source = Checkpoint.open(save_tiny(tmp_path / "in", name))
    out = export(source, random_cuts(source, CUT), tmp_path / "out")
    written = Checkpoint.open(out)
    projections = 2 if name.startswith(("gpt", "opt", "falcon")) else 3
    a_neuron = projections * HIDDEN + (projections - 1 if name in BIASED else 0)
    removed = LAYERS * (source.family.width(source.config) - KEPT) * a_neuron
    assert source.total_parameters - written.total_parameters == removed
    assert source.total_bytes - written.total_bytes == 4 * removed
    assert sorted(written.names) == sorted(source.names)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", PATHS)
def test_the_stored_dtype_is_kept_and_the_live_model_rounded_to_it(
    name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    source = Checkpoint.open(save_tiny(tmp_path / "in", name, dtype=dtype))
    cuts = random_cuts(source, CUT)
    written = Checkpoint.open(export(source, cuts, tmp_path / "out"))
    assert {written.dtype(tensor_name) for tensor_name in written.names} == {dtype}
    reloaded = written.load_model("cpu", torch.float32)
    assert torch.equal(logits(reloaded), logits(cut_live(source, cuts)))


@pytest.mark.parametrize("name", ["llama", "granite", *BIASED])
def test_a_bias_is_replaced_or_written_where_the_config_can_say_so(
    name: str, tmp_path: Path
) -> None:
    source = Checkpoint.open(save_tiny(tmp_path / "in", name))
    cuts = random_cuts(source, CUT, bias=True)
    if name not in BIASED:
        cuts[1] = MlpCut(cuts[1].kept, cuts[1].down_weight)
    out = export(source, cuts, tmp_path / "out")
    written = Checkpoint.open(out)
    reloaded = written.load_model("cpu", torch.float32)
    assert torch.equal(logits(reloaded), logits(cut_live(source, cuts)))
    if name in BIASED:
        assert sorted(written.names) == sorted(source.names)
        return
    assert json.loads((out / "config.json").read_text())["mlp_bias"] is True
    assert len(written.names) == len(source.names) + 3 * LAYERS
    assert not written.tensor("model.layers.0.mlp.gate_proj.bias").any()
    assert not written.tensor("model.layers.1.mlp.down_proj.bias").any()


@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_names_of_the_base_model_stay_as_they_are(name: str, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "in", name)
    root = Checkpoint.open(folder).family.layers.partition(".")[0] + "."
    tensors = load_file(folder / "model.safetensors")
    stripped = {key.removeprefix(root): tensor for key, tensor in tensors.items()}
    if name == "gpt2":
        stripped["h.0.attn.bias"] = torch.ones(1, 1, 4, 4)  # a buffer of older releases
    save_file(stripped, folder / "model.safetensors", {"format": "pt"})
    source = Checkpoint.open(folder)
    cuts = random_cuts(source, CUT)
    written = Checkpoint.open(export(source, cuts, tmp_path / "out"))
    assert sorted(written.names) == sorted(source.names)
    reloaded = written.load_model("cpu", torch.float32)
    assert torch.equal(logits(reloaded), logits(cut_live(source, cuts)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_file_is_byte_for_byte_the_librarys(dtype: torch.dtype, tmp_path: Path) -> None:
    source = Checkpoint.open(save_tiny(tmp_path / "in", dtype=dtype))
    out = export(source, random_cuts(source, CUT), tmp_path / "out")
    again = tmp_path / "again.safetensors"
    save_file(load_file(out / "model.safetensors"), again, {"format": "pt"})
    assert (out / "model.safetensors").read_bytes() == again.read_bytes()


@pytest.mark.parametrize("name", PATHS)
def test_keeping_every_neuron_writes_the_same_tensors(name: str, tmp_path: Path) -> None:
    source = Checkpoint.open(save_tiny(tmp_path / "in", name))
    down = ModelAdapter(source.load_model("cpu", torch.float32)).down_weights()
    cuts = [MlpCut(torch.arange(weight.shape[1]), weight) for weight in down]
    written = Checkpoint.open(export(source, cuts, tmp_path / "out"))
    for tensor_name in source.names:
        assert torch.equal(written.tensor(tensor_name), source.tensor(tensor_name))


def test_the_same_cut_gives_the_same_bytes_and_the_index_names_the_weights_file(
    source: Checkpoint, tmp_path: Path
) -> None:
    cuts = random_cuts(source, CUT)
    out = export(source, cuts, tmp_path / "out")
    assert tree(out) == tree(export(source, cuts, tmp_path / "again"))
    weight_map = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    assert weight_map == dict.fromkeys(load_file(out / "model.safetensors"), "model.safetensors")


def test_what_cannot_be_written_is_refused(source: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="2 cuts for 3 layers"):
        write_checkpoint(source, random_cuts(source, [4, 4]), tmp_path)
    with pytest.raises(InvalidInput, match="max_shard_size 'lots'"):
        write_checkpoint(source, random_cuts(source, CUT), tmp_path, max_shard_size="lots")


def test_progress_adds_up_to_the_bytes_written(source: Checkpoint, tmp_path: Path) -> None:
    done: list[int] = []
    cuts = random_cuts(source, CUT)
    out = export(source, cuts, tmp_path / "out", progress=done.append, max_shard_size="6KB")
    index = json.loads((out / "model.safetensors.index.json").read_text())
    written = Checkpoint.open(out)
    assert sum(done) == written.total_bytes == index["metadata"]["total_size"]
    assert index["metadata"]["total_parameters"] == written.total_parameters


def test_the_tokenizer_comes_along_and_code_and_pickle_do_not(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "in")
    for file in ("modeling.py", "training_args.bin", "optimizer.pt", "notes.txt", "README.md"):
        (folder / file).write_text("x")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "LICENSE").write_text("free")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool.jinja").write_text("{{ tools }}")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModel": "m.M"}}))
    source = Checkpoint.open(folder)
    out = export(source, random_cuts(source, CUT), tmp_path / "out")
    assert {str(file.relative_to(out)) for file in out.rglob("*") if file.is_file()} == {
        "LICENSE",
        "additional_chat_templates/tool.jinja",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert "auto_map" not in json.loads((out / "config.json").read_text())
    assert AutoTokenizer.from_pretrained(out).get_chat_template() == "{{ messages }}"


@pytest.mark.parametrize("damage", ["config", "tensor"])
def test_a_checkpoint_that_contradicts_its_config_or_lost_a_tensor_does_not_pass(
    damage: str, source: Checkpoint, tmp_path: Path
) -> None:
    out = export(source, random_cuts(source, CUT), tmp_path / "out")
    if damage == "config":
        config = json.loads((out / "config.json").read_text())
        (out / "config.json").write_text(json.dumps(config | {"intermediate_size": KEPT + 1}))
    else:
        tensors = load_file(out / "model.safetensors")
        del tensors["model.norm.weight"]
        save_file(tensors, out / "model.safetensors", {"format": "pt"})
    said = "the written checkpoint does not load" if damage == "config" else r"model\.norm\.weight"
    with pytest.raises(FbnPruneError, match=said) as failure:
        verify_export(out)
    assert failure.value.exit_code == 1


# The output folder


def tree(folder: Path) -> dict[str, bytes | None]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


def test_the_folder_appears_only_when_it_is_whole(tmp_path: Path) -> None:
    output = tmp_path / "deep" / "er" / "out"
    with atomic_directory(output, overwrite=False) as partial:
        (partial / "a").write_text("1")
        assert not output.exists()
        assert partial.name.startswith(".")
    assert tree(tmp_path / "deep") == {"er": None, "er/out": None, "er/out/a": b"1"}


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """An output of an earlier run."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("1")
    return tmp_path / "out"


def run(
    output: Path,
    *,
    overwrite: bool = False,
    error: type[BaseException] | None = None,
    meanwhile: Callable[[], object] = lambda: None,
) -> None:
    """Write one file into the output and perhaps die."""
    with atomic_directory(output, overwrite) as partial:
        (partial / "new").write_text("2")
        meanwhile()
        if error is not None:
            raise error


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_a_run_that_dies_leaves_nothing_and_an_old_output_as_it_was(
    error: type[BaseException], old: Path, tmp_path: Path
) -> None:
    before = tree(tmp_path)
    with pytest.raises(error):
        run(tmp_path / "deep" / "out", error=error)
    with pytest.raises(error):
        run(old, overwrite=True, error=error)
    assert tree(tmp_path) == before


def test_an_old_output_stays_until_the_end_and_is_then_replaced_whole(
    old: Path, tmp_path: Path
) -> None:
    run(old, overwrite=True, meanwhile=lambda: (old / "old").read_text())
    assert tree(tmp_path) == {"out": None, "out/new": b"2"}


def test_an_old_output_comes_back_when_the_new_one_cannot_be_put_in_place(
    old: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = tree(tmp_path)
    rename = Path.rename

    def fail_for_the_new(path: Path, target: Path) -> Path:
        if path.name.endswith(".partial"):
            raise OSError(5, "disk on fire")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail_for_the_new)
    with pytest.raises(FbnPruneError, match="disk on fire"):
        run(old, overwrite=True)
    assert tree(tmp_path) == before


def test_an_output_that_appears_during_the_run_is_not_touched(tmp_path: Path) -> None:
    def appear() -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "theirs").write_text("1")

    with pytest.raises(FbnPruneError, match="appeared during the run"):
        run(tmp_path / "out", meanwhile=appear)
    assert tree(tmp_path) == {"out": None, "out/theirs": b"1"}


def test_a_linked_output_is_replaced_where_the_link_leads(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    run(tmp_path / "out", overwrite=True)
    assert (tmp_path / "out").is_symlink()
    assert tree(tmp_path / "disk") == {"new": b"2"}


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_a_killed_run_left_is_removed_and_an_empty_folder_filled(
    overwrite: bool, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    for left in (".out.0123abcd.partial", ".out.0123abcd.old"):
        (tmp_path / left).mkdir()
        (tmp_path / left / "model.safetensors").write_text("half")
    run(tmp_path / "out", overwrite=overwrite)
    assert tree(tmp_path) == {"out": None, "out/new": b"2"}


def test_what_another_run_is_writing_is_left_alone(tmp_path: Path) -> None:
    with atomic_directory(tmp_path / "out", overwrite=True) as other:
        (other / "its").write_text("1")
        (tmp_path / ".out.0123abcd.old").mkdir()
        run(tmp_path / "out", overwrite=True)
        assert (other / "its").exists()
        assert (tmp_path / ".out.0123abcd.old").exists()
    assert tree(tmp_path) == {"out": None, "out/its": b"1"}


def test_a_full_disk_is_told_in_one_line(
    source: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fbn_prune.export.writer.write_shards", full)
    with pytest.raises(FbnPruneError, match=r"cannot write .*No space left on device"):
        write_checkpoint(source, random_cuts(source, CUT), tmp_path)


def test_what_a_killed_run_left_beside_the_output_counts_as_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = tmp_path / ".out.0badf00d.partial"
    left.mkdir()
    (left / "model.safetensors").write_bytes(bytes(1000))
    (tmp_path / "kept").write_bytes(bytes(500))
    os.link(tmp_path / "kept", left / "also-kept")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(directory.shutil, "disk_usage", lambda _: usage._replace(free=10_000))
    check_output(tmp_path / "out", False, None, needed_bytes=11_000)
    with pytest.raises(InvalidInput, match="free: make room"):
        check_output(tmp_path / "out", False, None, needed_bytes=11_001)
    with pytest.raises(InvalidInput, match="free: make room"):
        check_output(tmp_path / "another", False, None, needed_bytes=10_001)


def test_outputs_that_can_be_written_are_accepted(old: Path, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    for output in ("new", "a/b/new", "out", "model/inside"):
        check_output(tmp_path / output, output == "out", tmp_path / "model")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out"]


def test_outputs_that_must_not_be_written_are_refused(
    old: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, work, home = (tmp_path / name for name in ("models/model", "work/here", "homes/me"))
    for folder in (model, work, home):
        folder.mkdir(parents=True)
    (tmp_path / "file").write_text("1")
    (tmp_path / "link").symlink_to(model)
    monkeypatch.chdir(work)
    monkeypatch.setenv("HOME", str(home))

    def refused(output: Path, overwrite: bool = True, needed_bytes: int = 0) -> str:
        with pytest.raises(InvalidInput) as refusal:
            check_output(output, overwrite, model, needed_bytes)
        return str(refusal.value)

    (tmp_path / "empty").mkdir()
    for existing in (old, tmp_path / "empty"):
        assert "--overwrite" in refused(existing, overwrite=False)
    assert "is a file" in refused(tmp_path / "file")
    for output in (model, model.parent, tmp_path / "link", model / ".." / "model"):
        assert "is or holds the model itself" in refused(output)
    for output in (Path("."), work.parent, home, home.parent, Path("~")):
        assert "working or home folder" in refused(output)
    assert "holds the model" in refused(Path("/"))
    assert "is not writable" in refused(tmp_path / "file" / "out")
    assert "GB free" in refused(tmp_path / "new", needed_bytes=10**18)


def test_a_mount_point_cannot_be_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "volume").mkdir()
    monkeypatch.setattr("os.path.ismount", lambda path: Path(path) == tmp_path / "volume")
    with pytest.raises(InvalidInput, match="is a mount point; give a folder inside it"):
        check_output(tmp_path / "volume", False, None)
    check_output(tmp_path / "volume" / "out", False, None)


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder closed to root too")
def test_a_folder_in_which_none_can_be_made_is_refused() -> None:
    with pytest.raises(InvalidInput, match="is not writable"):
        check_output(Path("/proc/out"), False, None)


# The card


FACTS = CardFacts(
    base_name="someone/model",
    base_hub_id="someone/model",
    criterion="second-order pruning with refit",
    widths=(KEPT,) * LAYERS,
    widths_before=(WIDTH,) * LAYERS,
    parameters_before=2_000_000,
    parameters_after=1_500_000,
    bytes_before=4_000_000,
    bytes_after=3_000_000,
    calibration="4,096 tokens of prose",
    held_out="1,024 held-out tokens",
    command="fbn-prune --keep-networks 10 --model someone/model --output out",
    version="0.1.0",
    kept_networks=10,
    total_networks=64,
    perplexity_before=16.62,
    perplexity_after=18.0,
    license={"license": "mit"},
)


def test_the_cards_front_matter_names_base_and_licence() -> None:
    _, front, body = model_card(FACTS).split("---\n", 2)
    assert yaml.safe_load(front) == {
        "base_model": "someone/model",
        "library_name": "transformers",
        "license": "mit",
        "pipeline_tag": "text-generation",
        "tags": ["fbn-prune", "pruned"],
    }
    assert "# model, pruned" in body


def test_the_cards_figures_are_the_runs() -> None:
    card = model_card(FACTS)
    assert "| parameters | 2,000,000 | 1,500,000 | -25.0 % |" in card
    assert "| MLP neurons | 72 | 24 | -66.7 % |" in card
    assert "| weights on disk (MB) | 4.0 | 3.0 | -25.0 % |" in card
    assert "| perplexity | 16.62 | 18.00 | +8.3 % |" in card
    assert "removing 48 of its 72 MLP neurons" in card
    assert "10 of 64 functional networks set the budget." in card
    assert "recipe.yaml" in card


def test_a_local_base_is_no_hub_id_and_its_folder_is_not_told() -> None:
    facts = CardFacts(
        **{**vars(FACTS), "base_name": "/home/me/secret/tiny", "base_hub_id": None, "license": {}}
    )
    card = model_card(facts)
    assert "base_model" not in card
    assert "/home/me" not in card
    assert "tiny" in card


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("---\nlicense: mit\ntags: [a]\n---\n# x\n", {"license": "mit"}),
        (
            "---\nlicense: other\nlicense_name: own\n---\n",
            {"license": "other", "license_name": "own"},
        ),
        ("# no front matter\n", {}),
        (None, {}),
        ("---\n: [\n---\n", {}),
        ("---\nlicense: [mit, bsd]\n---\n", {}),
    ],
)
def test_the_licence_is_the_source_cards(
    text: str | None, expected: dict[str, str], tmp_path: Path
) -> None:
    if text is not None:
        (tmp_path / "README.md").write_text(text)
    assert source_license(tmp_path / "README.md") == expected
