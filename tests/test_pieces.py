"""A trimmed tokenizer finds the same pieces where it has them all, and spells everything else from smaller ones."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from fbn_prune.data.pieces import check_content, closed, parts, trimmed
from fbn_prune.errors import InvalidInput

ALPHABET = "abcd ef\n.é日👍"
TEXT = st.text(ALPHABET, min_size=1, max_size=60)
OTHERS = st.text(st.one_of(st.sampled_from(ALPHABET), st.characters(exclude_categories=("Cs",))))
BYTE_PIECES = [f"<0x{value:02X}>" for value in range(256)]


def trained(kind: str, corpus: list[str]) -> Tokenizer:
    """A tokenizer of this kind, trained on the corpus."""
    special = ["<unk>", "<s>"]
    how: dict[str, Any] = {"show_progress": False, "special_tokens": special}
    if kind in ("byte-level", "ignore-merges"):
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, **how)
        tokenizer.train_from_iterator(corpus, trainer)
        return with_model(tokenizer, ignore_merges=kind == "ignore-merges")
    if kind == "byte-fallback":
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        )
        how["special_tokens"] = [*special, *BYTE_PIECES]
        tokenizer.train_from_iterator(corpus, trainers.BpeTrainer(vocab_size=300, **how))
        # Bytes are pieces of the model, but not tokens that are looked for in a text.
        content = json.loads(tokenizer.to_str())
        content["added_tokens"] = content["added_tokens"][:2]
        return Tokenizer.from_str(json.dumps(content))
    if kind.startswith("unigram"):
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
        if kind == "unigram with bytes":
            how["special_tokens"] = [*special, *BYTE_PIECES]
        trainer = trainers.UnigramTrainer(vocab_size=340, unk_token="<unk>", **how)
        tokenizer.train_from_iterator(corpus, trainer)
        content = json.loads(tokenizer.to_str())
        content["added_tokens"] = content["added_tokens"][:2]
        content["model"]["byte_fallback"] = kind == "unigram with bytes"
        return Tokenizer.from_str(json.dumps(content))
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.train_from_iterator(corpus, trainers.WordPieceTrainer(vocab_size=60, **how))
    return tokenizer


def with_model(tokenizer: Tokenizer, **changes: Any) -> Tokenizer:
    content = json.loads(tokenizer.to_str())
    content["model"] |= changes
    return Tokenizer.from_str(json.dumps(content))


def ids(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False).ids


KINDS = [
    "byte-level",
    "ignore-merges",
    "byte-fallback",
    "unigram",
    "unigram with bytes",
    "wordpiece",
]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    corpus=st.lists(TEXT.filter(str.strip), min_size=2, max_size=6),
    seen=TEXT,
    others=st.lists(OTHERS, max_size=4),
)
def test_kept_pieces_are_found_again_and_all_else_is_spelled(
    kind: str, corpus: list[str], seen: str, others: list[str]
) -> None:
    whole = trained(kind, ["ab cd ab cd abc", *corpus])
    content = json.loads(whole.to_str())
    kept = closed(content, set(ids(whole, seen)))
    small = Tokenizer.from_str(json.dumps(trimmed(content, kept)))
    assert small.get_vocab_size() == len(kept)
    assert small.get_vocab() == {
        whole.id_to_token(old): new for new, old in enumerate(kept)
    }  # in the old order
    unknown = whole.token_to_id("<unk>")
    for text in [seen, seen + seen, *corpus, *others]:
        before, after = ids(whole, text), ids(small, text)
        if set(before) <= set(kept):
            assert [kept[new] for new in after] == before
        if "bytes" in kind or "byte" in kind or kind == "ignore-merges":
            assert small.decode(after) == whole.decode(before)
        if unknown not in before:
            assert small.token_to_id("<unk>") not in after
    assert [kept[new] for new in ids(small, seen)] == ids(whole, seen)


def test_only_the_pieces_on_the_way_are_needed() -> None:
    rank = {("a", "b"): 0, ("c", "d"): 1, ("ab", "cd"): 2, ("b", "c"): 3, ("a", "bcd"): 4}
    assert parts("abcd", rank) == {"a", "b", "c", "d", "ab", "cd", "abcd"}
    assert parts("abc", rank) == set()  # no merge ends in it


def test_the_piece_with_the_lowest_score_stays_because_unknown_characters_are_scored_by_it() -> (
    None
):
    vocab = [("<unk>", 0.0), ("ab", -2.0), ("a", -20.0), ("b", -3.0), ("c", -4.0), ("rare", -30.0)]
    vocab += [(piece, -1.0) for piece in BYTE_PIECES]
    whole = Tokenizer(models.Unigram(vocab, 0, byte_fallback=True))
    content = json.loads(whole.to_str())
    kept = closed(content, set(ids(whole, "ab")))
    assert [content["model"]["vocab"][old][0] for old in kept[:3]] == ["<unk>", "ab", "rare"]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"type": "WordLevel"}, "a WordLevel tokenizer"),
        ({"type": "BPE", "dropout": 0.1}, "dropout"),
        ({"type": "BPE", "end_of_word_suffix": "</w>"}, "end_of_word_suffix ('</w>')"),
    ],
)
def test_a_tokenizer_without_pieces_to_fall_back_on_is_refused(
    model: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidInput) as refused:
        check_content({"model": model}, "here")
    assert message in str(refused.value)
