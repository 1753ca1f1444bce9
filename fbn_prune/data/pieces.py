"""Choose which pieces of a tokenizer to keep, and write its `tokenizer.json` without the others.

All functions take the parsed content of a `tokenizer.json`. A text whose tokens are all kept gets the same pieces
afterwards:

- BPE: the merges inside a piece do not depend on the text around it, so a piece is found again if every piece on the
  way to it is kept with the merges between them. This holds for `ignore_merges` too, where a whole word is looked up
  first: the same piece inside a longer word is still made by merges.
- Unigram: the best split of a text stays the best of fewer. The score of an unknown character depends on the lowest
  score of all pieces, so the piece that has it is kept.
- WordPiece: the longest piece that fits stays the longest of fewer.

Any other text is spelled by smaller pieces: in the end by bytes, which are always kept, or, in a tokenizer without
bytes, by its single characters.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any

from tokenizers import pre_tokenizers

from fbn_prune.errors import InvalidInput

KINDS = ("BPE", "Unigram", "WordPiece")
"""Kinds of tokenizers whose vocabulary can be trimmed: they split words into pieces."""

BYTE_PIECES = frozenset(f"<0x{value:02X}>" for value in range(256))
BATCH_CHARACTERS = 10**6

Content = dict[str, Any]
"""The parsed content of a `tokenizer.json`."""


def check_content(content: Content, name: str) -> None:
    """Raise InvalidInput if the vocabulary of this tokenizer cannot be trimmed; `name` begins the message."""
    model = content["model"]
    kind = model.get("type")
    if kind not in KINDS:
        raise InvalidInput(
            f"{name}: the vocabulary of a {kind} tokenizer cannot be trimmed, only of {', '.join(KINDS)}"
        )
    if kind == "BPE":
        if model.get("dropout"):
            raise InvalidInput(
                f"{name}: the tokenizer skips merges at random (dropout), so no set of pieces gives the same tokens"
            )
        for key in ("continuing_subword_prefix", "end_of_word_suffix"):
            if model.get(key):
                raise InvalidInput(
                    f"{name}: the vocabulary of a BPE tokenizer with a {key} ({model[key]!r}) cannot be trimmed"
                )


def count_tokens(
    tokenizer: Any, documents: Iterable[str], read: Callable[[int], None] = lambda count: None
) -> Counter[int]:
    """Return how often the documents use each token, by id.

    Parameters
    ----------
    tokenizer
        A Hugging Face tokenizer.
    documents
        The texts.
    read
        Called with the number of characters counted since the last call.
    """
    counts: Counter[int] = Counter()
    for batch in batches(documents):
        for ids in encoded(tokenizer, batch):
            counts.update(ids)
        read(sum(map(len, batch)))
    return counts


def batches(documents: Iterable[str]) -> Iterator[list[str]]:
    """Group documents into lists that a tokenizer encodes at once."""
    batch: list[str] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def encoded(tokenizer: Any, documents: Sequence[str]) -> list[list[int]]:
    """Return the token ids of each document, without the special tokens that the tokenizer puts around a text."""
    if not documents:
        return []
    plain = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
    ids: list[list[int]] = tokenizer(list(documents), **plain)["input_ids"]
    return ids


def tokens_of_characters(tokenizer: Any, content: Content, characters: str) -> set[int]:
    """Return the ids of the tokens that single characters consist of, alone and as pieces of their own."""
    vocabulary = _ids(content)
    wanted = {vocabulary[character] for character in characters if character in vocabulary}
    for ids in encoded(tokenizer, sorted(set(characters))):
        wanted.update(ids)
    return wanted


def ascii_tokens(tokenizer: Any) -> set[int]:
    """Return the ids of the tokens whose text is ASCII."""
    ids = sorted(tokenizer.get_vocab().values())
    texts = tokenizer.batch_decode([[token] for token in ids])
    return {token for token, text in zip(ids, texts, strict=True) if text.isascii()}


def closed(content: Content, wanted: Collection[int]) -> list[int]:
    """Return the ids of the wanted tokens, of those needed to make them, and of those kept always; ascending.

    Kept always are added and special tokens, those that the tokenizer's settings name, and bytes or, in a tokenizer
    without bytes, single characters and the pieces that these cannot spell.

    Parameters
    ----------
    content
        A tokenizer that :func:`check_content` accepts.
    wanted
        Token ids; those without a piece are returned as well.
    """
    ids = _ids(content)
    kept = {*wanted, *_always(content, ids)}
    if content["model"]["type"] == "BPE":
        rank = {_pair(merge): index for index, merge in enumerate(content["model"]["merges"])}
        for piece in [piece for piece, index in ids.items() if index in kept]:
            kept.update(ids[part] for part in parts(piece, rank) if part in ids)
    return sorted(kept)


def parts(piece: str, rank: dict[tuple[str, str], int]) -> set[str]:
    """Return all pieces that BPE makes on the way from the characters of a piece to the piece itself.

    Parameters
    ----------
    piece
        The text of the piece.
    rank
        The order of the merges by their halves.

    Returns
    -------
    set of str
        The characters and every intermediate piece; empty if merging does not end in the piece.
    """
    symbols, made = list(piece), set(piece)
    while len(symbols) > 1:
        ranked = [
            (rank[both], index) for index, both in enumerate(pairwise(symbols)) if both in rank
        ]
        if not ranked:
            return set()
        index = min(ranked)[1]
        symbols[index : index + 2] = [symbols[index] + symbols[index + 1]]
        made.add(symbols[index])
    return made


def trimmed(content: Content, kept: Sequence[int]) -> Content:
    """Return the tokenizer with the kept tokens only, numbered in their old order.

    Parameters
    ----------
    content
        The tokenizer.
    kept
        Ids from :func:`closed`.
    """
    new = {old: index for index, old in enumerate(kept)}
    model = dict(content["model"])
    if model["type"] == "Unigram":
        model["vocab"] = [model["vocab"][old] for old in kept if old < len(model["vocab"])]
        if model.get("unk_id") is not None:
            model["unk_id"] = new[model["unk_id"]]
    else:
        model["vocab"] = {text: new[old] for text, old in model["vocab"].items() if old in new}
    if model["type"] == "BPE":
        pieces = model["vocab"]
        model["merges"] = [
            merge
            for merge in model["merges"]
            if all(part in pieces for part in (*_pair(merge), "".join(_pair(merge))))
        ]
    result = {**content, "model": model}
    result["added_tokens"] = [
        {**token, "id": new[token["id"]]} for token in content.get("added_tokens") or []
    ]
    result["post_processor"] = _with_ids(content.get("post_processor"), new.__getitem__)
    if content.get("padding"):
        result["padding"] = {**content["padding"], "pad_id": new[content["padding"]["pad_id"]]}
    return result


def has_bytes(content: Content) -> bool:
    """Whether the tokenizer can spell every text by bytes."""
    pieces = _ids(content)
    if _is_byte_level(content):
        return True
    return bool(content["model"].get("byte_fallback")) and pieces.keys() >= BYTE_PIECES


def _always(content: Content, ids: dict[str, int]) -> Iterator[int]:
    """Yield the ids of the tokens that are kept whether a text uses them or not."""
    model = content["model"]
    yield from (token["id"] for token in content.get("added_tokens") or [])
    named: set[int] = set()

    def note(old: int) -> int:
        named.add(old)
        return old

    _with_ids(content.get("post_processor"), note)
    yield from named
    if content.get("padding"):
        yield content["padding"]["pad_id"]
    if model.get("unk_token") in ids:
        yield ids[model["unk_token"]]
    yield from (ids[piece] for piece in BYTE_PIECES if piece in ids)
    yield from (ids[mark] for mark in _marks(content) if mark in ids)
    if _is_byte_level(content):
        yield from (ids[piece] for piece in pre_tokenizers.ByteLevel.alphabet() if piece in ids)
    elif not has_bytes(content):
        yield from (index for piece, index in ids.items() if not _spelled(piece, model, ids))
    if model["type"] == "Unigram":
        if model.get("unk_id") is not None:
            yield model["unk_id"]
        scores = [score for _, score in model["vocab"]]
        yield min(range(len(scores)), key=scores.__getitem__)


def _spelled(piece: str, model: dict[str, Any], ids: dict[str, int]) -> bool:
    """Whether other pieces of one character each can stand for this piece."""
    prefix = model.get("continuing_subword_prefix") or "" if model["type"] == "WordPiece" else ""
    inner = bool(prefix) and piece.startswith(prefix)
    text = piece.removeprefix(prefix) if inner else piece
    if len(text) <= 1:
        return False
    first = prefix + text[0] if inner else text[0]
    return first in ids and all(prefix + character in ids for character in text[1:])


def _marks(content: Content) -> set[str]:
    """Return the characters that stand for others, as ▁ does for a space: spelled by bytes they are not turned back."""
    marks: set[str] = set()
    for step in (*_steps(content.get("normalizer")), *_steps(content.get("pre_tokenizer"))):
        for key in ("replacement", "content", "prepend"):
            marks.update(step.get(key) or "")
    return marks


def _is_byte_level(content: Content) -> bool:
    steps = [*_steps(content.get("pre_tokenizer")), *_steps(content.get("normalizer"))]
    return any(step.get("type") == "ByteLevel" for step in steps)


def _steps(part: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Return the normalizers or pre-tokenizers in order, with nested sequences flattened."""
    if part is None:
        return []
    if part.get("type") != "Sequence":
        return [part]
    inner = part.get("pretokenizers") or part.get("normalizers") or []
    return [step for each in inner for step in _steps(each)]


def _ids(content: Content) -> dict[str, int]:
    vocabulary = content["model"]["vocab"]
    if isinstance(vocabulary, dict):
        return vocabulary
    return {text: index for index, (text, _) in enumerate(vocabulary)}


def _pair(merge: str | Sequence[str]) -> tuple[str, str]:
    """Return the halves of a merge, which files write as "left right" or as two strings."""
    left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
    return left, right


def _with_ids(processor: Any, change: Callable[[int], int]) -> Any:
    """Return a post-processor with all token ids changed."""
    if not processor:
        return processor
    kind = processor["type"]
    if kind == "Sequence":
        return {
            **processor,
            "processors": [_with_ids(each, change) for each in processor["processors"]],
        }
    if kind == "TemplateProcessing":
        special = {
            name: {**token, "ids": [change(old) for old in token["ids"]]}
            for name, token in processor["special_tokens"].items()
        }
        return {**processor, "special_tokens": special}
    result = dict(processor)
    for key in ("sep", "cls"):  # BertProcessing and RobertaProcessing
        if key in result:
            text, old = result[key]
            result[key] = [text, change(old)]
    return result
