"""A checkpoint with fewer tokens says the same of those it kept, in every form in which it is written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import recipe, refused, run_json
from test_gguf_tokenizers import CORPUS, byte_level, sentencepiece, with_token
from tiny_models import FAMILY_CONFIGS, save_tiny
from tokenizers import Tokenizer, models, processors
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Tokenizer,
    PhiConfig,
    PreTrainedTokenizerFast,
)

from fbn_prune.api import predict, prune_checkpoint, trim_vocabulary
from fbn_prune.cli.main import _exit_code
from fbn_prune.data.pieces import trimmed
from fbn_prune.errors import InvalidInput
from fbn_prune.model import families, vocabulary
from fbn_prune.model.checkpoint import Checkpoint
from fbn_prune.model.family import Family, Projection
from fbn_prune.model.vocabulary import VocabularyCut, named_ids
from fbn_prune.runs.memory import plan_memory
from fbn_prune.store import Store

EMBEDDINGS = 620
TOOL = byte_level().get_vocab_size()
"""The id of a token that is added to this tokenizer."""
ENGLISH = "the cat sat on the mat, and the other cats sat there too\n"
MULTILINGUAL = "naïve Ελληνικά русский 日本語 👍🏽 ½ ﷽ \U0010ffff \t\r\n"
PHI = Family(
    "Phi",
    ("phi",),
    layers="model.layers",
    inputs=(Projection("mlp.fc1", 0),),
    output=Projection("mlp.fc2", 1),
    biased=True,
)
"""It has a bias in the head, which no supported architecture has."""


def save(folder: Path, name: str = "llama", tokenizer: Tokenizer | None = None) -> Path:
    """A tiny checkpoint with more embeddings than tokens."""
    config = PhiConfig if name == "phi" else FAMILY_CONFIGS[name]
    made = config() if name != "phi" else PhiConfig(
        hidden_size=16, num_hidden_layers=2, intermediate_size=24, num_attention_heads=4,
        bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    made.vocab_size = EMBEDDINGS
    save_tiny(folder, config=made)
    names = {"bos_token": "<s>", "eos_token": "</s>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer or byte_level(), **names)
    fast.save_pretrained(folder)
    return folder


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text(ENGLISH * 40)
    return tmp_path / "text.txt"


def old_ids(before: Path, after: Path) -> torch.Tensor:
    """The id that each token of the trimmed tokenizer had before."""
    whole, small = (AutoTokenizer.from_pretrained(folder) for folder in (before, after))
    named = sorted((new, text) for text, new in small.get_vocab().items())
    return torch.tensor([whole.convert_tokens_to_ids(text) for _, text in named])


@torch.no_grad()
def assert_same_logits(before: Path, after: Path, **how: Any) -> None:
    ids = AutoTokenizer.from_pretrained(after)(ENGLISH)["input_ids"]
    old = old_ids(before, after)
    tokens = torch.tensor([ids])
    dense = AutoModelForCausalLM.from_pretrained(before, **how)(old[tokens]).logits
    small = AutoModelForCausalLM.from_pretrained(after, **how)(tokens).logits
    # Ids that only the config names have no text; they come last.
    torch.testing.assert_close(small[..., : len(old)], dense[..., old], rtol=0, atol=1e-5)
    assert small.shape[-1] < dense.shape[-1]


@pytest.mark.parametrize("name", [*FAMILY_CONFIGS, "phi"])
def test_the_logits_of_kept_tokens_are_the_same(
    name: str, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(families._BY_MODEL_TYPE, "phi", PHI)
    monkeypatch.setattr(vocabulary, "SLICE_BYTES", 4000)  # several blocks of rows
    save(tmp_path / "in", name)
    result = trim_vocabulary(str(tmp_path / "in"), tmp_path / "out", [str(text)])
    written = Checkpoint.open(tmp_path / "out")
    assert written.total_parameters == result.parameters_after < result.parameters_before
    assert written.total_bytes == result.bytes_after
    assert written.oddities() is None
    assert_same_logits(tmp_path / "in", tmp_path / "out")


def test_all_text_goes_through_and_comes_back(tmp_path: Path, text: Path) -> None:
    for name, tokenizer in (("bytes", byte_level()), ("pieces", sentencepiece())):
        save(tmp_path / name, tokenizer=tokenizer)
        trim_vocabulary(str(tmp_path / name), tmp_path / f"{name} out", [str(text)])
        whole, small = (
            AutoTokenizer.from_pretrained(tmp_path / folder) for folder in (name, f"{name} out")
        )
        old = old_ids(tmp_path / name, tmp_path / f"{name} out").tolist()
        assert [old[new] for new in small(ENGLISH)["input_ids"]] == whole(ENGLISH)["input_ids"]
        for one in (MULTILINGUAL, *CORPUS):
            assert small.decode(small(one)["input_ids"]) == whole.decode(whole(one)["input_ids"])


def test_characters_and_rare_tokens_stay_as_asked(tmp_path: Path) -> None:
    model = save(tmp_path / "in")
    (tmp_path / "text.txt").write_text("the cat. " * 30 + " self")
    texts = [str(tmp_path / "text.txt")]

    def kept(**how: Any) -> set[str]:
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        trim_vocabulary(str(model), tmp_path / "out", texts, **how)
        return set(AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab())

    whole = AutoTokenizer.from_pretrained(model)
    rare = set(whole.tokenize(" self")) - set(whole.tokenize(" the cat. "))
    asked = set(whole.tokenize("é"))
    assert rare <= kept()
    assert not rare & kept(min_count=2)
    assert asked <= kept(min_count=2, characters="é")
    every = kept(min_count=10**6, ascii=True)
    written = {whole.decode([token]): piece for piece, token in whole.get_vocab().items()}
    assert {piece for text, piece in written.items() if text.isascii()} <= every
    assert not all(piece in every for piece in written.values())


NAMED = {
    "bos_token_id": 0,
    "eos_token_id": [1, 400],
    "pad_token_id": -1,
    "image_token_index": 401,
    "suppress_tokens": [402],
    "begin_suppress_tokens": [403],
    "bad_words_ids": [[404, 405]],
    "forced_decoder_ids": [[1, 406]],
    "sequence_bias": [[[407], 0.5]],
    "lang_to_id": {"<|en|>": 408},
    "inner": {"decoder_start_token_id": 409, "use_cache": True},
    "stop_token_ids": [10_000],
    "num_hidden_layers": 3,
    "some_token_id": None,
}


def test_every_id_in_the_configs_is_renumbered() -> None:
    assert named_ids(NAMED, EMBEDDINGS) == {0, 1, *range(400, 410)}
    kept = torch.tensor([0, 1, *range(400, 410)])
    cut = VocabularyCut(kept, (), EMBEDDINGS, frozenset(), {})
    assert cut.config({**NAMED, "vocab_size": EMBEDDINGS}) == {
        **NAMED,
        "vocab_size": 12,
        "eos_token_id": [1, 2],
        "image_token_index": 3,
        "suppress_tokens": [4],
        "begin_suppress_tokens": [5],
        "bad_words_ids": [[6, 7]],
        "forced_decoder_ids": [[1, 8]],
        "sequence_bias": [[[9], 0.5]],
        "lang_to_id": {"<|en|>": 10},
        "inner": {"decoder_start_token_id": 11, "use_cache": True},
    }
    assert cut.renumbered({"added_tokens_decoder": {"401": {"content": "a"}}}) == {
        "added_tokens_decoder": {"3": {"content": "a"}}
    }


@pytest.mark.parametrize(
    "processor",
    [
        processors.RobertaProcessing(("</s>", 1), ("<s>", 0)),
        processors.BertProcessing(("</s>", 1), ("<s>", 0)),
        processors.Sequence(
            [
                processors.ByteLevel(),
                processors.TemplateProcessing(
                    single="<s> $A <tool>", special_tokens=[("<s>", 0), ("<tool>", TOOL)]
                ),
            ]
        ),
    ],
)
def test_every_id_in_the_tokenizer_is_renumbered(processor: Any) -> None:
    whole = with_token(byte_level(), "<tool>", special=True)
    whole.post_processor = processor
    whole.enable_padding(pad_id=TOOL, pad_token="<tool>")
    content = json.loads(whole.to_str())
    kept = [0, 1, *range(40, 300), TOOL]
    small = Tokenizer.from_str(json.dumps(trimmed(content, kept)))
    for ids in (whole.encode("a"), small.encode("a")):
        assert ids.tokens == whole.encode("a").tokens
    assert small.encode("a").ids == [kept.index(old) for old in whole.encode("a").ids]
    assert small.padding["pad_id"] == kept.index(TOOL)


def test_files_that_name_ids_are_written_anew(tmp_path: Path, text: Path) -> None:
    model = save(tmp_path / "in", "gemma", with_token(byte_level(), "<tool>"))
    (model / "generation_config.json").write_text('{"eos_token_id": [1, 600], "top_p": 0.9}')
    (model / "vocab.json").write_text("{}")
    (model / "task.json").write_text("{}")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "image_token_id": 601}))
    trim_vocabulary(str(model), tmp_path / "out", [str(text)])
    files = {file.name for file in (tmp_path / "out").iterdir()}
    assert "task.json" in files  # which questions the model has seen
    assert "vocab.json" not in files
    small = AutoTokenizer.from_pretrained(tmp_path / "out")
    size = len(small)
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation == {"eos_token_id": [1, size], "top_p": 0.9}
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (written["image_token_id"], written["vocab_size"]) == (size + 1, size + 2)
    assert small.convert_tokens_to_ids("<tool>") == size - 1
    assert_same_logits(model, tmp_path / "out")


def test_a_token_that_the_model_has_no_row_for_stays_behind_the_others(
    tmp_path: Path, text: Path
) -> None:
    tokenizer = byte_level()
    tokenizer.add_tokens([f"<extra {i}>" for i in range(EMBEDDINGS - TOOL)])
    save(tmp_path / "in", tokenizer=with_token(tokenizer, "<image>", special=True))
    trim_vocabulary(str(tmp_path / "in"), tmp_path / "out", [str(text)])
    rows = Checkpoint.open(tmp_path / "out").config["vocab_size"]
    assert AutoTokenizer.from_pretrained(tmp_path / "out").convert_tokens_to_ids("<image>") == rows


def test_a_tokenizer_in_other_files_is_converted(tmp_path: Path, text: Path) -> None:
    model = save(tmp_path / "in")
    content = json.loads((model / "tokenizer.json").read_text())["model"]
    for file in model.glob("*token*"):
        file.unlink()
    (model / "vocab.json").write_text(json.dumps(content["vocab"]))
    merges = [" ".join(merge) for merge in content["merges"]]
    (model / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "</s>"}
    settings = {"tokenizer_class": GPT2Tokenizer.__name__, **names}
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    trim_vocabulary(str(model), tmp_path / "out", [str(text)])
    assert not (tmp_path / "out" / "merges.txt").exists()
    assert_same_logits(model, tmp_path / "out")


def test_the_dry_run_measures_on_text_that_it_has_not_counted(
    tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save(tmp_path / "in")
    lines = [json.dumps({"text": ENGLISH}) for _ in range(19)]
    lines.append(json.dumps({"text": "def think(self, other)"}))  # the twentieth is held out
    (tmp_path / "lines.jsonl").write_text("\n".join(lines))
    command = ["trim-vocabulary", "--model", str(model), "--texts", str(tmp_path / "lines.jsonl")]
    found = run_json(capsys, *command, "--dry-run")
    assert found["vocabulary"]["held_out_documents"] == 2
    assert found["vocabulary"]["identical_documents"] == 0.5
    assert found["vocabulary"]["growth"] > 0.5
    # What is written has the tokens of all text.
    again = run_json(
        capsys, *command, "--held-out-texts", str(tmp_path / "lines.jsonl"), "--dry-run"
    )
    assert again["vocabulary"]["tokens_after"] == found["vocabulary"]["tokens_after"]
    assert again["vocabulary"]["identical_documents"] == 1.0
    assert again["vocabulary"]["growth"] is None
    removed = found["parameters_before"] - found["parameters_after"]
    assert removed == found["vocabulary"]["parameters_removed"] > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "lines.jsonl", "text.txt"]
    assert _exit_code([*command, "--output", str(tmp_path / "out")]) == 0
    assert "same pieces in 50.00% of 2 held-out documents" in capsys.readouterr().out


def test_what_cannot_be_trimmed_is_said_in_one_line(
    tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save(tmp_path / "in")
    base = ["trim-vocabulary", "--model", str(model), "--texts"]
    output = ["--output", str(tmp_path / "out")]
    refused(capsys, [*base, str(text)], "--output is missing")
    refused(capsys, [*base, str(tmp_path / "none.txt"), *output], "does not exist")
    assert _exit_code([*base, str(text), *output]) == 0
    small = ["trim-vocabulary", "--model", str(tmp_path / "out"), "--texts", str(text)]
    refused(capsys, [*small, "--output", str(tmp_path / "again")], "already minimal")
    refused(capsys, [*base, str(text), *output], "exists")
    words = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "quick": 2, "<unk>": 3}, "<unk>"))
    words.pre_tokenizer = byte_level().pre_tokenizer
    save(tmp_path / "words", tokenizer=words)
    word_level = ["trim-vocabulary", "--model", str(tmp_path / "words"), "--texts", str(text)]
    code = _exit_code([*word_level, "--output", str(tmp_path / "again")])
    assert code == 2
    assert not (tmp_path / "again").exists()
    with pytest.raises(InvalidInput, match="add vocabulary = 1"):
        recipe(model, text, vocabulary_texts=[str(text)])


class Killed(BaseException):
    """As a signal would, it ends the run between two instructions."""


@contextmanager
def killed_after(shards: int) -> Iterator[None]:
    write, kept = Store.write, 0

    def count(self: Store, name: str, *others: Any, **more: Any) -> None:
        nonlocal kept
        write(self, name, *others, **more)
        kept += name.startswith("shard-")
        if kept == shards:
            raise Killed

    with pytest.MonkeyPatch.context() as patch, suppress(Killed):
        patch.setattr(Store, "write", count)
        yield


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.suffix != ".yaml"}


def test_a_killed_run_ends_in_the_same_bytes(tmp_path: Path, text: Path) -> None:
    model = save(tmp_path / "in")

    def trim(output: Path) -> None:
        trim_vocabulary(str(model), output, [str(text)], max_shard_size="20KB")

    trim(tmp_path / "undisturbed")
    with killed_after(2):
        trim(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert len(list(tmp_path.glob(".out.work/*/shard-*"))) == 2
    trim(tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "undisturbed")
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("gemma", {"keep_networks": None, "sparsity": 0.4}),
        ("llama", {"keep_networks": None, "sparsity": 0.4, "layout": "ragged"}),
    ],
)
def test_the_main_job_prunes_and_trims(
    name: str, changes: dict[str, Any], tmp_path: Path, text: Path
) -> None:
    model = save(tmp_path / "in", name)
    (tmp_path / "more.txt").write_text("naïve café")
    job = recipe(model, text, tmp_path / "whole", **changes)
    prune_checkpoint(recipe=job)
    vocabulary_ = {"vocabulary": 1, "vocabulary_texts": str(tmp_path / "more.txt")}
    job = recipe(model, text, tmp_path / "out", **changes, **vocabulary_)
    plan, result = predict(job), prune_checkpoint(recipe=job)
    assert_same_logits(tmp_path / "whole", tmp_path / "out", trust_remote_code="layout" in changes)
    assert plan.vocabulary == result.vocabulary
    if "layout" not in changes:
        assert plan.parameters_after == result.parameters_after
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    whole = AutoTokenizer.from_pretrained(model)
    assert tokenizer.tokenize("naïve café") == whole.tokenize("naïve café")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "before the vocabulary was trimmed" in card
    assert f"{result.vocabulary.tokens_after:,} of {EMBEDDINGS:,} tokens left" in card
    # A pruned and trimmed model is trimmed again, whatever its layout.
    few = tmp_path / "few.txt"
    few.write_text("the cat " * 20)
    trim_vocabulary(str(tmp_path / "out"), tmp_path / "again", [str(few)])
    assert_same_logits(tmp_path / "out", tmp_path / "again", trust_remote_code="layout" in changes)
    assert (tmp_path / "again" / "kept_neurons.safetensors").is_file()
    if "layout" not in changes:
        again = recipe(tmp_path / "again", text, tmp_path / "pruned again", **changes)
        assert prune_checkpoint(recipe=again).parameters_after < result.parameters_after


def test_a_budget_counts_the_tokens_that_go(tmp_path: Path, text: Path) -> None:
    model = save(tmp_path / "in")
    changes = {"keep_networks": None, "target_params": "13000", "vocabulary": 1}
    result = prune_checkpoint(recipe=recipe(model, text, tmp_path / "out", **changes))
    neuron = 3 * 16
    assert 13000 - 3 * 4 * neuron < result.parameters_after <= 13000


def test_a_killed_main_job_ends_in_the_same_bytes_streamed(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save(tmp_path / "in")
    streamed = lambda *given: replace(plan_memory(*given), streamed=True)  # noqa: E731
    monkeypatch.setattr("fbn_prune.runs.setup.plan_memory", streamed)
    changes = {"keep_networks": None, "sparsity": 0.4, "vocabulary": 1, "max_shard_size": "20KB"}

    def job(output: str) -> None:
        prune_checkpoint(recipe=recipe(model, text, tmp_path / output, **changes))

    job("undisturbed")
    with killed_after(2):
        job("out")
    assert not (tmp_path / "out").exists()
    job("out")
    assert contents(tmp_path / "out") == contents(tmp_path / "undisturbed")


@pytest.mark.parametrize("make", [byte_level, sentencepiece])
def test_llama_cpp_finds_the_pieces_of_the_whole_vocabulary(
    make: Any, tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("gguf")
    from llama_cpp_tokens import LlamaCppTokens

    model = save(tmp_path / "in", tokenizer=make())
    trim_vocabulary(str(model), tmp_path / "out", [str(text)])
    found = []
    for folder in (model, tmp_path / "out"):
        file = folder.with_suffix(".gguf")
        run_json(capsys, "convert", "--model", str(folder), "--output", str(file))
        found.append(LlamaCppTokens(file))
    whole, small = found
    old = old_ids(model, tmp_path / "out").tolist()
    assert [old[new] for new in small(ENGLISH)] == whole(ENGLISH)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    for one in (MULTILINGUAL, *CORPUS):
        assert small(one) == tokenizer(one)["input_ids"]
