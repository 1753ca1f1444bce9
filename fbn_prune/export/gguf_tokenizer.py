"""A tokenizer in the terms of GGUF files: pieces with scores or merges, and the name of how text is first split.

llama.cpp has two kinds that matter here: byte-level BPE ("gpt2"), which merges by rank, and SentencePiece ("llama"),
which merges by score. A SentencePiece vocabulary that transformers keeps as ranked merges gets scores in that order.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from fbn_prune.errors import InvalidInput

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""Kinds of pieces, as GGUF numbers them."""

_NEVER = -1e9
"""Score of a piece that no merge makes: it is only ever found whole."""

_SPLITS = {
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+": "llama-bpe",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+": "qwen2",
}
"""The regular expression that splits text before merging -> llama.cpp's name for it."""


@dataclass(frozen=True)
class GgufTokenizer:
    """What GGUF says of a tokenizer; `tokens`, `types` and `scores` have one entry a token id.

    Attributes
    ----------
    model : "gpt2" or "llama".
    split : how text is split before merging, by llama.cpp's name; "default" for "llama".
    merges : "left right" by rank; empty for "llama".
    scores : empty for "gpt2".
    special : GGUF's key ("bos", "eos", "unk", "pad") -> token id.
    """

    model: str
    split: str
    tokens: list[str]
    types: list[int]
    scores: list[float]
    merges: list[str]
    special: dict[str, int]
    adds_bos: bool
    adds_space: bool
    chat_template: str | None


def gguf_tokenizer(
    folder: Path, tokenizer: PreTrainedTokenizerBase, vocabulary: int
) -> GgufTokenizer:
    """Read a folder's `tokenizer.json`.

    Parameters
    ----------
    vocabulary
        Embeddings of the model; ids that no token has are filled up.

    Raises
    ------
    InvalidInput
        A tokenizer of a kind that llama.cpp does not have, or that this does not know to name.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise InvalidInput(f"{folder} has no tokenizer.json, which GGUF conversion reads")
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    model = content["model"]
    if model.get("type") != "BPE":
        raise InvalidInput(
            f"{path}: a {model.get('type')} tokenizer has no counterpart in GGUF here"
        )
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    byte_level = (content.get("decoder") or {}).get("type") == "ByteLevel"
    if not byte_level and not model.get("byte_fallback"):
        raise InvalidInput(f"{path}: neither byte-level nor with byte pieces, as llama.cpp needs")
    tokens, types = _pieces(content, vocabulary, byte_level)
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a", add_special_tokens=True)["input_ids"]
    template = tokenizer.chat_template
    return GgufTokenizer(
        model="gpt2" if byte_level else "llama",
        split=_split(path, content) if byte_level else "default",
        tokens=tokens,
        types=types,
        scores=[] if byte_level else _scores(tokens, types, merges),
        merges=merges if byte_level else [],
        special={
            key: int(value)
            for key in ("bos", "eos", "unk", "pad")
            if (value := getattr(tokenizer, f"{key}_token_id")) is not None
        },
        adds_bos=len(full) > len(plain) and full[0] == tokenizer.bos_token_id,
        adds_space=not byte_level and '"Prepend"' in json.dumps(content.get("normalizer")),
        chat_template=template if isinstance(template, str) else None,
    )


def _pieces(
    content: dict[str, Any], vocabulary: int, byte_level: bool
) -> tuple[list[str], list[int]]:
    tokens = [f"[PAD{index}]" for index in range(vocabulary)]
    types = [UNUSED] * vocabulary
    unknown = content["model"].get("unk_token")
    for text, index in content["model"]["vocab"].items():
        is_byte = not byte_level and len(text) == 6 and text.startswith("<0x")
        tokens[index], types[index] = text, BYTE if is_byte else NORMAL
    for added in content.get("added_tokens") or []:
        tokens[added["id"]] = added["content"]
        types[added["id"]] = CONTROL if added["special"] else USER_DEFINED
        if added["content"] == unknown:
            types[added["id"]] = UNKNOWN
    return tokens, types


def _scores(tokens: list[str], types: list[int], merges: list[str]) -> list[float]:
    """The rank of the first merge that makes a piece, negated: SentencePiece then merges in the same order."""
    rank: dict[str, int] = {}
    for index, merge in enumerate(merges):
        rank.setdefault(merge.replace(" ", ""), index)
    return [
        -float(rank[token]) if token in rank else _NEVER if kind == NORMAL else 0.0
        for token, kind in zip(tokens, types, strict=True)
    ]


def _split(path: Path, content: dict[str, Any]) -> str:
    first = content.get("pre_tokenizer") or {}
    steps = first.get("pretokenizers", [first])
    kinds = [step.get("type") for step in steps]
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits"):
        return "smollm"
    if kinds == ["Split", "ByteLevel"]:
        name = _SPLITS.get(steps[0]["pattern"].get("Regex", ""))
        if name is not None:
            return name
    raise InvalidInput(f"{path}: splits text in a way that llama.cpp has no name for here: {kinds}")
