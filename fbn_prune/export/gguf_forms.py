"""Choose the llama.cpp tokenizer that gives the same token ids as a transformers tokenizer, or refuse.

llama.cpp does not run a tokenizer's own steps. It has two BPE algorithms and a fixed list of named ways to split text
(`src/llama-vocab.cpp`). Each check here stands for a place in that file that would give other token ids or fail.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tokenizers import models, pre_tokenizers

from fbn_prune.errors import InvalidInput

SPACE = "▁"
BYTE_PIECES = frozenset(f"<0x{value:02X}>" for value in range(256))

_LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_QWEN_2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_SPACES_ONCE = (
    "llama.cpp puts a space before every text and after every special token; this tokenizer (Metaspace) puts none "
    "before text that begins with one, and not always one after special tokens, so token ids may differ there"
)
_SPELLED_SPECIAL = """
<|eot_id|> <|im_end|> <|end|> <|return|> <|call|> <|flush|> <|calls|> <end_of_turn> <|endoftext|> </s>
<|eom_id|> <EOT> _<EOT> [EOT] [EOS] <|end_of_text|> <end_of_utterance> <eos> <turn|> <|tool_response>
<｜end▁of▁sentence｜> [e~[ <|fim_prefix|> <fim-prefix> <fim_prefix> <PRE> ▁<PRE> <|code_prefix|> <｜fim▁begin｜>
<|fim_suffix|> <fim-suffix> <fim_suffix> <SUF> ▁<SUF> <|code_suffix|> <｜fim▁hole｜> <|fim_middle|>
<fim-middle> <fim_middle> <MID> ▁<MID> <|prefix|> <|suffix|> <|middle|> <|code_middle|> <｜fim▁end｜>
<|fim_pad|> <fim-pad> <fim_pad> <PAD> [PAD] <|fim_repo|> <|repo_name|> <fim-repo> <REPO> <reponame>
<|file_sep|> <|channel|> <|message|> <|start|> <|constrain|>
"""
_TAKEN_FOR_SPECIAL = frozenset(_SPELLED_SPECIAL.split())
"""Texts that llama.cpp treats as special tokens because of their spelling, wherever they occur in a text."""


@dataclass(frozen=True)
class Form:
    """The tokenizer algorithm that llama.cpp runs.

    Attributes
    ----------
    model
        "gpt2" for byte-level BPE, which merges by rank; "llama" for SentencePiece, which merges by score.
    split
        llama.cpp's name for how text is split before merging; "default" for "llama".
    adds_space
        Whether llama.cpp puts a space before a text and after a special token.
    notes
        Differences from the tokenizer that occur only in rare text.
    """

    model: str
    split: str
    adds_space: bool = False
    notes: tuple[str, ...] = ()


def form_of(where: object, content: dict[str, Any]) -> Form:
    """Return the llama.cpp algorithm that matches a tokenizer.

    Parameters
    ----------
    where
        File or folder named at the beginning of error messages.
    content
        The parsed content of `tokenizer.json`.

    Raises
    ------
    InvalidInput
        llama.cpp would give other token ids than the tokenizer, or would not load the file.
    """
    model = content["model"]
    if model.get("type") != "BPE":
        raise InvalidInput(
            f"{where}: a {model.get('type')} tokenizer cannot be converted to GGUF; only BPE can"
        )
    if model.get("dropout"):
        raise InvalidInput(
            f"{where}: the tokenizer skips merges at random (dropout), and llama.cpp does not"
        )
    for key in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise InvalidInput(f"{where}: llama.cpp does not support the {key} {model[key]!r}")
    _check_added(where, content)
    steps = _steps(content.get("pre_tokenizer"), "pretokenizers")
    if steps and steps[-1].get("type") == "ByteLevel":
        form = _byte_level(where, content, steps)
    elif model.get("byte_fallback"):
        form = _sentencepiece(where, content, steps)
    else:
        raise InvalidInput(
            f"{where}: the tokenizer is neither byte-level nor with byte pieces; llama.cpp needs one"
        )
    return replace(form, notes=(*form.notes, *_taken_for_special(content)))


def _steps(part: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    """Return the normalizers, pre-tokenizers or decoders in order, with nested sequences flattened."""
    if part is None:
        return []
    if part.get("type") != "Sequence":
        return [part]
    return [step for inner in part[key] for step in _steps(inner, key)]


def _byte_level(where: object, content: dict[str, Any], steps: list[dict[str, Any]]) -> Form:
    model = content["model"]
    if not model["merges"]:
        raise InvalidInput(
            f"{where}: llama.cpp does not load a byte-level tokenizer without merges"
        )
    if any(" " in part for merge in model["merges"] for part in pair(merge)):
        raise InvalidInput(
            f"{where}: a merge holds a space, but GGUF separates its halves by a space"
        )
    if (content.get("decoder") or {}).get("type") != "ByteLevel":
        raise InvalidInput(
            f"{where}: the tokenizer splits text by bytes but does not join it by bytes, as llama.cpp does"
        )
    notes = [*_byte_level_normalizer(where, content), *_bytes_without_token(where, model)]
    return Form("gpt2", split_name(where, content, steps), notes=tuple(notes))


def _byte_level_normalizer(where: object, content: dict[str, Any]) -> Iterator[str]:
    for step in _steps(content.get("normalizer"), "normalizers"):
        if step["type"] != "NFC":
            raise InvalidInput(
                f"{where}: the tokenizer normalizes text ({step['type']}), and llama.cpp does not"
            )
        yield (
            "llama.cpp does not compose characters (Unicode NFC) as this tokenizer does; nearly all text is "
            "composed already, compose the rest before tokenizing"
        )


def _bytes_without_token(where: object, model: dict[str, Any]) -> Iterator[str]:
    """Both drop a byte without a token, but may merge across the gap differently."""
    missing = _bytes_of_text() - set(model["vocab"])
    if not missing:
        return
    if model.get("unk_token") is not None:
        raise InvalidInput(
            f"{where}: no token for {len(missing)} of the bytes that occur in UTF-8 text: the tokenizer gives "
            f"{model['unk_token']!r} for them, and llama.cpp drops them"
        )
    yield (
        f"this tokenizer has no token for {len(missing)} of the bytes that occur in UTF-8 text and drops them, as "
        "llama.cpp does, but llama.cpp may merge the pieces beside such a byte differently"
    )


def _bytes_of_text() -> set[str]:
    """Return the bytes that occur in UTF-8, as the characters by which byte-level tokenizers write them."""
    points = [*range(0x800), *range(0x800, 0xD800, 0x40), *range(0xE000, 0x110000, 0x40)]
    split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return {
        char for piece, _ in split.pre_tokenize_str("".join(map(chr, points))) for char in piece
    }


def split_name(where: object, content: dict[str, Any], steps: list[dict[str, Any]]) -> str:
    """Return llama.cpp's name for how a byte-level tokenizer splits text.

    Parameters
    ----------
    where
        File or folder named at the beginning of error messages.
    content
        The parsed content of `tokenizer.json`.
    steps
        Its pre-tokenizers, in order.

    Raises
    ------
    InvalidInput
        llama.cpp has no name for this way of splitting.
    """
    kinds = [step.get("type") for step in steps]
    first, last = steps[0], steps[-1]
    if last.get("add_prefix_space", True):
        raise InvalidInput(
            f"{where}: the tokenizer puts a space before text; with byte-level BPE llama.cpp does not"
        )
    whole, name = bool(content["model"].get("ignore_merges")), None
    if kinds == ["ByteLevel"] and last.get("use_regex", True):
        name = "gpt-2"
    elif kinds == ["Digits", "ByteLevel"] and last.get("use_regex", True):
        name = "smollm" if first.get("individual_digits") else None
    elif (
        kinds == ["Split", "ByteLevel"]
        and not last.get("use_regex", True)
        and first["behavior"] == "Isolated"
        and not first.get("invert")
    ):
        expression = first["pattern"].get("Regex", "")
        if (
            expression == _LLAMA_3
        ):  # llama-bpe takes whole words from the vocabulary without merging
            return "llama-bpe" if whole else "smaug-bpe"
        name = "qwen2" if expression == _QWEN_2 else None
    if name is None:
        raise InvalidInput(
            f"{where}: llama.cpp has no name for this way of splitting text: {kinds}"
        )
    if whole and not _merges_reach_all(content):
        raise InvalidInput(
            f"{where}: the tokenizer takes whole words that no merges make (ignore_merges); with this text split "
            f"({name}) llama.cpp does not"
        )
    return name


def _merges_reach_all(content: dict[str, Any]) -> bool:
    """Return whether merging the text of every piece gives that piece, so that ignore_merges changes nothing."""
    model = content["model"]
    bpe = models.BPE(vocab=model["vocab"], merges=[pair(merge) for merge in model["merges"]])
    added = {token["content"] for token in content.get("added_tokens") or []}
    return all(
        [token.value for token in bpe.tokenize(text)] == [text]
        for text in model["vocab"].keys() - added
    )


def _sentencepiece(where: object, content: dict[str, Any], steps: list[dict[str, Any]]) -> Form:
    missing = BYTE_PIECES - set(content["model"]["vocab"])
    if missing:
        raise InvalidInput(
            f"{where}: {len(missing)} of the 256 byte pieces are missing, first {min(missing)}; llama.cpp needs all"
        )
    decoders = {step["type"] for step in _steps(content.get("decoder"), "decoders")}
    if "ByteFallback" not in decoders or not decoders & {"Replace", "Metaspace"}:
        raise InvalidInput(
            f"{where}: the tokenizer joins pieces to text differently from llama.cpp, which turns byte pieces to bytes "
            f"and {SPACE} into spaces"
        )
    normalizers = _steps(content.get("normalizer"), "normalizers")
    kinds = [step["type"] for step in normalizers]
    spaces = [step for step in normalizers if step["type"] == "Replace"]
    swaps = [
        step["pattern"].get("String") == " " and step.get("content") == SPACE for step in spaces
    ]
    if set(kinds) - {"Prepend", "Replace"} or len(set(kinds)) < len(kinds) or not all(swaps):
        raise InvalidInput(
            f"{where}: the tokenizer normalizes text in a way that llama.cpp does not: {kinds}"
        )
    prepends = next((step["prepend"] for step in normalizers if step["type"] == "Prepend"), None)
    if prepends not in (None, SPACE) or (prepends and not spaces):
        raise InvalidInput(
            f"{where}: the tokenizer puts {prepends!r} before text, and llama.cpp puts a space"
        )
    notes: tuple[str, ...] = ()
    adds_space = bool(prepends)
    if steps:
        adds_space = _metaspace(where, content, steps, normalized=bool(normalizers))
        notes = (_SPACES_ONCE,) if adds_space else ()
    elif not spaces:
        raise InvalidInput(
            f"{where}: the tokenizer does not write spaces as {SPACE}, as llama.cpp does"
        )
    if prepends:
        for added in content.get("added_tokens") or []:
            if added.get("normalized"):
                raise InvalidInput(
                    f"{where}: the added token {added['content']!r} is looked for in normalized text, so only after a "
                    "space; llama.cpp finds it anywhere"
                )
    return Form("llama", "default", adds_space=adds_space, notes=notes)


def _metaspace(
    where: object, content: dict[str, Any], steps: list[dict[str, Any]], *, normalized: bool
) -> bool:
    """Return whether splitting by Metaspace puts a space before text."""
    kinds = [step.get("type") for step in steps]
    if kinds != ["Metaspace"] or steps[0].get("replacement") != SPACE or normalized:
        raise InvalidInput(
            f"{where}: llama.cpp has no name for this way of splitting text: {kinds}"
        )
    inner = next((text for text in content["model"]["vocab"] if SPACE in text[1:]), None)
    if steps[0].get("split", True) and inner is not None:
        raise InvalidInput(
            f"{where}: the tokenizer splits text at spaces, llama.cpp does not, and some pieces go across one: "
            f"{inner!r}"
        )
    return bool(steps[0].get("prepend_scheme", "always") != "never")


def pair(merge: str | Sequence[str]) -> tuple[str, str]:
    """Return the halves of a merge, which files write as "left right" or as two strings."""
    left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
    return left, right


def _check_added(where: object, content: dict[str, Any]) -> None:
    """Refuse added tokens that llama.cpp would find elsewhere: it has no conditions, and looks for long ones first."""
    added: list[dict[str, Any]] = [a for a in content.get("added_tokens") or [] if a["content"]]
    for token in added:
        text = token["content"]
        for key, does in (
            ("lstrip", "takes the spaces before it with it"),
            ("rstrip", "takes the spaces behind it with it"),
            ("single_word", "is found as a word of its own only"),
        ):
            if token.get(key):
                raise InvalidInput(
                    f"{where}: the added token {text!r} {does} ({key}), which llama.cpp does not support"
                )
    composes = content.get("normalizer") is not None
    for token in added:
        if composes and unicodedata.normalize("NFC", token["content"]) != token["content"]:
            raise InvalidInput(
                f"{where}: the added token {token['content']!r} is not composed text (Unicode NFC)"
            )
    _check_overlaps(where, added)


def _taken_for_special(content: dict[str, Any]) -> list[str]:
    """Return a note if llama.cpp takes pieces of ordinary text for special tokens, as in every file of Qwen 2.5."""
    named = {token["content"] for token in content.get("added_tokens") or []}
    taken = sorted((_TAKEN_FOR_SPECIAL & set(content["model"]["vocab"])) - named)
    if not taken:
        return []
    return [
        f"llama.cpp takes {', '.join(map(repr, taken))} for special tokens because of their names; here they are "
        "ordinary text"
    ]


def _check_overlaps(where: object, added: list[dict[str, Any]]) -> None:
    """Refuse added tokens that overlap: the tokenizer takes the one that begins first, llama.cpp the longer one.

    The tokenizer first looks for those that match text as it is, then for those that match normalized text.
    """
    starts: dict[str, list[dict[str, Any]]] = {}
    for token in added:
        for end in range(1, len(token["content"])):
            starts.setdefault(token["content"][:end], []).append(token)
    for one in added:
        text = one["content"]
        for begin in range(1, len(text)):
            for other in starts.get(text[begin:], ()):
                longer = other["content"]
                if other is one or len(longer) < len(text) or len(set(text + longer)) == 1:
                    continue  # both find runs of one character from the left
                raise InvalidInput(
                    f"{where}: the added tokens {text!r} and {longer!r} overlap; in text that holds both, llama.cpp "
                    "takes the other one"
                )
    late = [token["content"] for token in added if token.get("normalized")]
    for text in (token["content"] for token in added if not token.get("normalized")):
        inside = next((longer for longer in late if text in longer and text != longer), None)
        if inside is not None:
            raise InvalidInput(
                f"{where}: the added token {text!r} is looked for before {inside!r}, which holds it; llama.cpp looks "
                "for the longer one first"
            )
