"""Claims about tokenizers in GGUF files: llama.cpp finds the ids that transformers finds, or there is no file."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from small_runs import refused
from tiny_models import FAMILY_CONFIGS, save_tiny
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from fbn_prune.cli.main import _exit_code
from fbn_prune.errors import InvalidInput
from fbn_prune.export.gguf_forms import _LLAMA_3, _QWEN_2
from fbn_prune.export.gguf_tokenizer import gguf_tokenizer
from fbn_prune.export.to_gguf import write as write_gguf
from fbn_prune.model.checkpoint import Checkpoint

pytest.importorskip("gguf")
from llama_cpp_tokens import LlamaCppTokens

EMBEDDINGS = 700
CORPUS = [
    "the cat sat on the mat, and the other cats sat there too; that was the thing they'd do",
    "In 1999 there were 12345 hats (and 67 cats) on 3 mats.\n\nIt's what it's.\tThen: nothing!",
    "def think(self, other):\n    return self.hat + other.hat  # the sum\n",
    "naïve café, Ελληνικά, русский, 日本語 and 👍🏽 too",
]
TEXTS = [
    *CORPUS,
    "",
    " ",
    "a",
    " the",
    "  the   thing    \n\n \n",
    "one xylophone",
    "THEY'LL IT'S 1234567890 ½ ² ٣",
    "the<s> cat</s>the </s> sat<tool>1 <tool> 2",
    "\x00\x01\x7f\u00a0\u3000\ufeff end",
    "a<0x0A>b [PAD699] ▁ ▁▁ the▁cat",
    "𝒳 \U000e0067 \U0010ffff ɐ",
]
"""Among them leading spaces, special tokens in the middle, and bytes of every kind."""


def byte_level(
    split: Any = None,
    *,
    ignore_merges: bool = False,
    normalizer: Any = None,
    alphabet: set[str] | None = None,
) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = split or words()
    trainer = trainers.BpeTrainer(
        vocab_size=560,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<s>", "</s>"],
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    content = json.loads(tokenizer.to_str())
    vocab, merges = content["model"]["vocab"], content["model"]["merges"]
    if alphabet is not None:
        vocab = {t: i for t, i in vocab.items() if t in ("<s>", "</s>") or set(t) <= alphabet}
        merges = [merge for merge in merges if set("".join(merge)) <= alphabet]
    if ignore_merges:
        vocab["Ġxylophone"] = 600  # a word that no merge makes
    tokenizer.model = models.BPE(
        vocab=vocab, merges=[tuple(merge) for merge in merges], ignore_merges=ignore_merges
    )
    tokenizer.decoder = decoders.ByteLevel()
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    return tokenizer


def in_turn(*parts: Any) -> Any:
    return pre_tokenizers.Sequence(list(parts))


def words(**how: Any) -> Any:
    return pre_tokenizers.ByteLevel(**{"add_prefix_space": False, **how})


def split_by(expression: str, behavior: str = "isolated", *, again: bool = False) -> Any:
    split = pre_tokenizers.Split(Regex(expression), behavior)
    return in_turn(split, words(use_regex=again))


def digits(*, one_by_one: bool = True) -> Any:
    return in_turn(pre_tokenizers.Digits(individual_digits=one_by_one), words())


def spaces(scheme: str = "never", *, split: bool) -> dict[str, Any]:
    pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=split)
    return {"normalizer": None, "pre_tokenizer": pre_tokenizer}


def marked(*first: Any, prefix: str = "▁") -> Any:
    """Spaces written as marks, as SentencePiece writes them."""
    return normalizers.Sequence([*first, normalizers.Prepend(prefix), MARKS])


MARKS = normalizers.Replace(" ", "▁")
PIECES = [
    "▁t",
    "th",
    "▁the",
    "at",
    "he",
    "▁a",
    "▁▁",
    "in",
    "▁▁▁▁",
    "cat",
    "▁cat",
    "an",
    "▁s",
    "▁sat",
]
WITHIN = [piece for piece in PIECES if "▁" not in piece[1:]]
"""Those that do not go across a space."""


def sentencepiece(
    *,
    pieces: list[str] | None = None,
    normalizer: Any = "legacy",
    pre_tokenizer: Any = None,
    merges: Callable[[list[tuple[str, str]]], list[tuple[str, str]]] = lambda all_: all_,
) -> Tokenizer:
    """A vocabulary by score, with the merges that transformers makes of one: every pair of pieces that is a piece."""
    pieces = pieces or PIECES
    chars = sorted({*"".join(pieces), *"bcdefghilmnopqrsu"} - {" "})
    names = ["<unk>", "<s>", "</s>", *(f"<0x{value:02X}>" for value in range(256))]
    vocab = {text: index for index, text in enumerate([*names, *pieces, *chars])}
    made = [
        (piece[:cut], piece[cut:])
        for piece in pieces
        for cut in range(1, len(piece))
        if piece[:cut] in vocab and piece[cut:] in vocab
    ]
    how = {"unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges(made), **how))
    if normalizer == "legacy":
        normalizer = marked()
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    if pre_tokenizer is not None:
        tokenizer.pre_tokenizer = pre_tokenizer
    bytes_ = decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), *bytes_])
    return tokenizer


def around(tokenizer: Tokenizer, template: str) -> Tokenizer:
    names = [part for part in template.split() if part != "$A"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[(name, tokenizer.token_to_id(name)) for name in names]
    )
    return tokenizer


def with_token(tokenizer: Tokenizer, content: str, **how: Any) -> Tokenizer:
    tokenizer.add_tokens([AddedToken(content, **{"normalized": False, **how})])
    return tokenizer


@cache
def model_files() -> dict[str, bytes]:
    config = FAMILY_CONFIGS["llama"]()
    config.vocab_size = EMBEDDINGS
    with TemporaryDirectory() as folder:
        return {
            file.name: file.read_bytes()
            for file in save_tiny(Path(folder), config=config).iterdir()
        }


def checkpoint(folder: Path, tokenizer: Tokenizer, **names: Any) -> Checkpoint:
    folder.mkdir()
    for name, data in model_files().items():
        (folder / name).write_bytes(data)
    names = {"bos_token": "<s>", "eos_token": "</s>", **names}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    return Checkpoint.open(folder)


def written(source: Checkpoint, output: Path) -> tuple[LlamaCppTokens, list[str]]:
    """What llama.cpp would read, and what was said of it."""
    notes: list[str] = []
    write_gguf(source, output, note=notes.append)
    return LlamaCppTokens(output), notes


def assert_same_ids(source: Checkpoint, found: Callable[[str], list[int]]) -> None:
    tokenizer = source.load_tokenizer()
    assert {t: tokenizer(t)["input_ids"] for t in TEXTS} == {t: found(t) for t in TEXTS}


CARRIED: dict[str, tuple[Callable[[], Tokenizer], str]] = {
    "gpt-2": (byte_level, "gpt-2"),
    "digits": (lambda: byte_level(digits()), "smollm"),
    "qwen 2": (lambda: byte_level(split_by(_QWEN_2)), "qwen2"),
    "llama 3": (lambda: byte_level(split_by(_LLAMA_3), ignore_merges=True), "llama-bpe"),
    "llama 3, by merges": (lambda: byte_level(split_by(_LLAMA_3)), "smaug-bpe"),
    "begin and end": (lambda: around(byte_level(), "<s> $A </s>"), "gpt-2"),
    "begin": (lambda: around(byte_level(), "<s> $A"), "gpt-2"),
    "added token": (lambda: with_token(byte_level(), "<tool>"), "gpt-2"),
    "added runs of spaces": (lambda: with_token(with_token(byte_level(), "  "), "   "), "gpt-2"),
    "sentencepiece": (sentencepiece, "default"),
    "sentencepiece, begin": (lambda: around(sentencepiece(), "<s> $A"), "default"),
    "sentencepiece, added": (lambda: with_token(sentencepiece(), "<tool>"), "default"),
    "no space before": (lambda: sentencepiece(normalizer=MARKS), "default"),
    "metaspace, never": (lambda: sentencepiece(**spaces(split=False)), "default"),
    "metaspace, split": (lambda: sentencepiece(**spaces(split=True), pieces=WITHIN), "default"),
}


@pytest.mark.parametrize("name", CARRIED)
def test_llama_cpp_finds_the_ids_that_transformers_finds(name: str, tmp_path: Path) -> None:
    make, split = CARRIED[name]
    source = checkpoint(tmp_path / "in", make())
    found, notes = written(source, tmp_path / "m.gguf")
    assert found.fields["pre"] == split
    assert_same_ids(source, found)
    assert notes == []
    if find_spec("llama_cpp") is not None:  # itself, where it is installed
        import llama_cpp

        llama = llama_cpp.Llama(str(tmp_path / "m.gguf"), vocab_only=True, verbose=False)
        assert_same_ids(source, lambda text: llama.tokenize(text.encode(), special=True))


def test_ordinary_text_that_llama_cpp_takes_for_special_gets_a_note(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "in", sentencepiece(pieces=[*PIECES, "<EOT>"]))
    _, notes = written(source, tmp_path / "m.gguf")
    (note,) = notes
    assert note.startswith("llama.cpp takes '<EOT>' for special tokens because of their names")


def test_merges_by_rank_become_scores_in_the_same_order(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "in", sentencepiece())
    found = gguf_tokenizer(source.path, source.load_tokenizer(), EMBEDDINGS)
    score = dict(zip(found.tokens, found.scores, strict=True))
    in_order = [score[piece] for piece in PIECES if score[piece] > -1e8]
    assert in_order == sorted(in_order, reverse=True)
    assert score["b"] < min(in_order)
    assert (found.model, found.split, found.merges) == ("llama", "default", [])
    assert found.adds_space


def test_composed_text_gets_the_same_ids_and_what_is_left_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    composed = byte_level(split_by(_QWEN_2), normalizer=normalizers.NFC())
    source = checkpoint(tmp_path / "in", composed)
    found, notes = written(source, tmp_path / "m.gguf")
    assert_same_ids(source, found)
    (note,) = notes
    assert "NFC" in note
    assert source.load_tokenizer()("cafe\u0301")["input_ids"] != found("cafe\u0301")
    again = str(tmp_path / "again.gguf")
    command = ["convert", "--no-verify", "--model", str(source.path), "--output", again]
    capsys.readouterr()
    assert _exit_code([*command, "--json"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["notes"] == notes
    assert f"note: {note}\n" in printed.err


def test_bytes_that_no_token_stands_for_are_left_out_by_both_and_that_is_said(
    tmp_path: Path,
) -> None:
    known = set(pre_tokenizers.ByteLevel.alphabet()) - {"ó", "ô", "ā"}  # 0xF3, 0xF4, 0x01
    source = checkpoint(tmp_path / "in", byte_level(alphabet=known))
    found, notes = written(source, tmp_path / "m.gguf")
    assert_same_ids(source, found)
    (note,) = notes
    assert "3 of the bytes" in note


def changed(tokenizer: Tokenizer, **model: Any) -> Tokenizer:
    content = json.loads(tokenizer.to_str())
    content["model"] |= model
    return Tokenizer.from_str(json.dumps(content))


def with_word(word: str, index: int) -> Tokenizer:
    tokenizer = byte_level()
    return changed(tokenizer, vocab=tokenizer.get_vocab() | {word: index})


def with_decoder(tokenizer: Tokenizer, decoder: Any) -> Tokenizer:
    tokenizer.decoder = decoder
    return tokenizer


def without_bytes(tokenizer: Tokenizer) -> Tokenizer:
    content = json.loads(tokenizer.to_str())
    del content["model"]["vocab"]["<0x80>"]
    return Tokenizer.from_str(json.dumps(content))


def no_merges() -> Tokenizer:
    tokenizer = byte_level()
    vocab = {char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer.model = models.BPE(vocab=vocab | {"<s>": 256, "</s>": 257}, merges=[])
    return tokenizer


def of_kind(model: Any) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return tokenizer


WORDS = {word: index for index, word in enumerate(["<unk>", "The", "the", "a", "lazy", "dogs"])}
REFUSED: list[tuple[Callable[[], Tokenizer], str]] = [
    (lambda: of_kind(models.WordLevel(WORDS, unk_token="<unk>")), "a WordLevel"),
    (lambda: of_kind(models.WordPiece(WORDS, unk_token="<unk>")), "a WordPiece"),
    (lambda: of_kind(models.Unigram([(w, -1.0) for w in WORDS], 0)), "a Unigram"),
    (no_merges, "without merges"),
    (lambda: changed(byte_level(), dropout=0.1), "dropout"),
    (lambda: changed(byte_level(), end_of_word_suffix="</w>"), "end_of_word_suffix"),
    (
        lambda: changed(byte_level(), continuing_subword_prefix="##", merges=[]),
        "continuing_subword",
    ),
    (lambda: byte_level(words(add_prefix_space=True)), "puts a space before text"),
    (lambda: byte_level(words(use_regex=False)), "no name for this"),
    (lambda: byte_level(digits(one_by_one=False)), "no name for this"),
    (lambda: byte_level(split_by(r"\s+|\S+")), "no name for this"),
    (lambda: byte_level(split_by(_QWEN_2, "merged_with_next")), "no name for this"),
    (lambda: byte_level(split_by(_QWEN_2, again=True)), "no name for this"),
    (lambda: byte_level(ignore_merges=True), "ignore_merges"),
    (lambda: byte_level(normalizer=normalizers.Lowercase()), "Lowercase"),
    (
        lambda: changed(
            byte_level(alphabet=set(pre_tokenizers.ByteLevel.alphabet()) - {"ā"}), unk_token="<s>"
        ),
        "1 of the bytes",
    ),
    (lambda: with_decoder(byte_level(), decoders.Fuse()), "does not join it"),
    (lambda: with_token(byte_level(), "<tool>", lstrip=True), "takes the spaces before it"),
    (lambda: with_token(byte_level(), "<tool>", rstrip=True), "takes the spaces behind it"),
    (lambda: with_token(byte_level(), "tool", single_word=True), "'tool' is found as a word"),
    (lambda: with_token(with_token(byte_level(), "<<a"), "a>>>"), "'<<a' and 'a>>>' overlap"),
    (
        lambda: with_token(with_token(byte_level(), "b"), "abc", normalized=True),
        "'b' is looked for before",
    ),
    (lambda: around(byte_level(), "<s> <s> $A"), "no more around a text"),
    (lambda: with_word("zzz", 900), "'zzz' has the id 900"),
    (lambda: with_word("", 650), "the token 650 is ''"),
    (lambda: with_token(byte_level(), "a\0b"), "'a\\x00b'"),
    (lambda: changed(sentencepiece(), byte_fallback=False), "nor with byte"),
    (lambda: without_bytes(sentencepiece()), "first <0x80>"),
    (lambda: with_decoder(sentencepiece(), decoders.Fuse()), "joins pieces to text differently"),
    (lambda: sentencepiece(normalizer=None), "does not write spaces"),
    (lambda: sentencepiece(normalizer=marked(normalizers.NFKC())), "NFKC"),
    (lambda: sentencepiece(normalizer=marked(prefix="a")), "puts 'a' before text"),
    (lambda: sentencepiece(**spaces(split=True)), "go across one: '▁▁"),
    (lambda: sentencepiece(pre_tokenizer=pre_tokenizers.Whitespace()), "no name for this way"),
    (
        lambda: with_token(sentencepiece(), "<tool>", normalized=True),
        "looked for in normalized text",
    ),
    (
        lambda: sentencepiece(merges=lambda made: [m for m in made if m != ("▁t", "he")]),
        "'▁the' of '▁t' and 'he'",
    ),
    (
        lambda: sentencepiece(
            pieces=["▁▁", "▁▁▁", *PIECES[:6]],
            merges=lambda made: [*(m for m in made if m != ("▁▁", "▁")), ("▁▁", "▁")],
        ),
        "'▁▁▁' is merged from '▁▁' and '▁' later",
    ),
]


@pytest.mark.parametrize(("make", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_what_llama_cpp_would_read_otherwise_is_refused_in_one_line(
    make: Callable[[], Tokenizer], message: str, tmp_path: Path, capsys: Any
) -> None:
    source = checkpoint(tmp_path / "in", make())
    before = sorted(path.name for path in tmp_path.rglob("*"))
    args = ["convert", "--model", str(source.path), "--output", str(tmp_path / "out" / "m.gguf")]
    refused(capsys, args, message)
    assert sorted(path.name for path in tmp_path.rglob("*")) == before


def test_a_token_that_ends_text_is_taken_from_the_config_or_asked_for(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "in", byte_level(), eos_token=None)
    assert written(source, tmp_path / "m.gguf")[0].fields["eos_token_id"] == 257
    config = json.loads((source.path / "config.json").read_text())
    for unusable in (None, [], 100_000):
        (source.path / "config.json").write_text(json.dumps(config | {"eos_token_id": unusable}))
        with pytest.raises(InvalidInput, match="names a token that ends text"):
            write_gguf(Checkpoint.open(source.path), tmp_path / "other.gguf")


def test_names_of_ids_without_a_token_are_no_tokens_of_the_vocabulary(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "in", with_token(byte_level(), "[PAD699]"))
    found, _ = written(source, tmp_path / "m.gguf")
    assert len(found.tokens) == EMBEDDINGS
    assert found.tokens[699] == "[[PAD699]]"
    assert source.load_tokenizer()("a[PAD699]")["input_ids"] == found("a[PAD699]")


@pytest.mark.parametrize("name", ["Phi-3-mini-like", "modern-bert"])
def test_a_folder_name_that_llama_cpp_has_rules_for_is_left_out(name: str, tmp_path: Path) -> None:
    source = checkpoint(tmp_path / name, with_token(byte_level(), "<tool>"))
    found, _ = written(source, tmp_path / "m.gguf")
    assert "general.name" not in found.fields
    text = "<tool> the cat"
    assert source.load_tokenizer()(text)["input_ids"] == found(text)


def of_class(source: Checkpoint, name: str) -> Checkpoint:
    path = source.path / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer_class": name}))
    return Checkpoint.open(source.path)


def test_a_class_that_does_not_take_its_file_at_its_word_is_what_counts(tmp_path: Path) -> None:
    source = of_class(checkpoint(tmp_path / "in", byte_level(digits())), "GPT2Tokenizer")
    found, notes = written(source, tmp_path / "m.gguf")
    assert found.fields["pre"] == "gpt-2"
    assert_same_ids(source, found)
    (note,) = notes
    assert "(gpt-2, not smollm)" in note
    source = of_class(source, "PreTrainedTokenizerFast")
    found, notes = written(source, tmp_path / "m.gguf")
    assert found.fields["pre"] == "smollm"
    assert notes == []


@pytest.mark.parametrize("scheme", ["first", "always"])
def test_a_space_before_text_that_has_none_is_carried_over_and_the_rest_is_said(
    scheme: str, tmp_path: Path
) -> None:
    made = sentencepiece(**spaces(scheme, split=False))
    source = checkpoint(tmp_path / "in", made)
    tokenizer, (found, notes) = source.load_tokenizer(), written(source, tmp_path / "m.gguf")
    plain = [text for text in TEXTS if text and text[0] not in " <" and "<s>" not in text]
    assert len(plain) > 5
    assert {t: tokenizer(t)["input_ids"] for t in plain} == {t: found(t) for t in plain}
    assert tokenizer(" the cat")["input_ids"] != found(" the cat")
    (note,) = notes
    assert "before text that begins with one" in note
    assert "PreTrainedTokenizerFast" not in note


def test_a_llama_2_tokenizer_is_carried_over_and_the_way_to_equal_ids_is_said(
    tmp_path: Path,
) -> None:
    source = of_class(checkpoint(tmp_path / "in", sentencepiece()), "LlamaTokenizer")
    tokenizer, (found, notes) = source.load_tokenizer(), written(source, tmp_path / "m.gguf")
    assert tokenizer("the cat sat")["input_ids"][-3:] == found("the cat sat")[-3:]
    (note,) = notes
    assert "(Metaspace)" in note
    assert "PreTrainedTokenizerFast" in note
    source = of_class(source, "PreTrainedTokenizerFast")
    found, notes = written(source, tmp_path / "m.gguf")
    assert_same_ids(source, found)
    assert notes == []


def test_two_texts_of_one_id_are_refused(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "in", byte_level())
    path = source.path / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["vocab"]["zzz"] = 30
    path.write_text(json.dumps(content))
    with pytest.raises(InvalidInput, match="both the token 30"):
        write_gguf(Checkpoint.open(source.path), tmp_path / "m.gguf")


def test_special_tokens_read_as_text_are_refused(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "in", byte_level(), split_special_tokens=True)
    assert source.load_tokenizer()("<s>")["input_ids"] != [0]
    with pytest.raises(InvalidInput, match="split_special_tokens"):
        write_gguf(source, tmp_path / "m.gguf")


def test_a_tokenizer_that_is_code_is_refused(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "in", byte_level())
    with pytest.raises(InvalidInput, match=r"is code \(object\)"):
        gguf_tokenizer(source.path, object(), EMBEDDINGS)  # type: ignore[arg-type]
