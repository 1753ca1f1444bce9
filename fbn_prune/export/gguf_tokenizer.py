"""A tokenizer in the terms of GGUF files: pieces with scores or merges, and the name of how text is first split.

llama.cpp has two kinds that matter here: byte-level BPE ("gpt2"), which merges by rank, and SentencePiece ("llama"),
which merges by score. A SentencePiece vocabulary that transformers keeps as ranked merges gets scores in that order.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from fbn_prune.errors import InvalidInput
from fbn_prune.export.gguf_forms import BYTE_PIECES, Form, form_of, pair

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""Kinds of pieces, as GGUF numbers them."""

_FOUND_FIRST = frozenset({UNKNOWN, CONTROL, USER_DEFINED})
"""What is looked for in a text before anything is merged."""

_NEVER = -1e9
"""Score of a piece that no merge makes: it is only ever found whole."""


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
    adds_bos, adds_eos : whether text gets these tokens before and behind it.
    adds_space : a space is put before text, and before what follows a special token.
    notes : lines on where llama.cpp may find other tokens, in text that is hardly ever met.
    """

    model: str
    split: str
    tokens: list[str]
    types: list[int]
    scores: list[float]
    merges: list[str]
    special: dict[str, int]
    adds_bos: bool
    adds_eos: bool
    adds_space: bool
    chat_template: str | None
    notes: tuple[str, ...] = ()


def gguf_tokenizer(
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    vocabulary: int,
    config: Mapping[str, Any] | None = None,
) -> GgufTokenizer:
    """Describe a tokenizer as transformers runs it: not every class takes a folder's `tokenizer.json` at its word.

    Parameters
    ----------
    folder
        Where it was loaded from.
    vocabulary
        Embeddings of the model; ids that no token has are filled up.
    config
        The object in `config.json`, asked for special tokens that the tokenizer does not name.

    Raises
    ------
    InvalidInput
        llama.cpp would find other tokens in a text than the tokenizer does, or would not load the file.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise InvalidInput(
            f"{folder}: the tokenizer is code ({type(tokenizer).__name__}), whose steps GGUF conversion cannot read; "
            "it reads those of the package tokenizers"
        )
    if getattr(tokenizer, "split_special_tokens", False):
        raise InvalidInput(
            f"{folder}: the tokenizer reads special tokens in a text as text (split_special_tokens in "
            "tokenizer_config.json), which a GGUF file cannot say"
        )
    content: dict[str, Any] = json.loads(backend.to_str())
    if isinstance(content["model"].get("vocab"), dict):
        # The text has one piece an id; the tokenizer may know several.
        content["model"]["vocab"] = backend.get_vocab(with_added_tokens=False)
    form = _form(folder, tokenizer, content)
    tokens, types = _pieces(folder, content, vocabulary, byte_level=form.model == "gpt2")
    merges = [pair(merge) for merge in content["model"]["merges"]]
    adds_bos, adds_eos = _added_around(folder, tokenizer)
    template = tokenizer.chat_template
    sentencepiece = form.model == "llama"
    return GgufTokenizer(
        model=form.model,
        split=form.split,
        tokens=tokens,
        types=types,
        scores=_scores(folder, tokens, types, merges) if sentencepiece else [],
        merges=[] if sentencepiece else [" ".join(merge) for merge in merges],
        special=_special(folder, tokenizer, config or {}, form, vocabulary),
        adds_bos=adds_bos,
        adds_eos=adds_eos,
        adds_space=form.adds_space,
        chat_template=template if isinstance(template, str) else None,
        notes=form.notes,
    )


def _form(folder: Path, tokenizer: PreTrainedTokenizerBase, content: dict[str, Any]) -> Form:
    """The form that transformers gives the tokenizer, held against what its file says."""
    name = type(tokenizer).__name__
    path = folder / "tokenizer.json"
    stored = None
    if path.is_file():
        try:
            stored = form_of(path, json.loads(Tokenizer.from_file(str(path)).to_str()))
        except Exception:  # a hint and no more: transformers has read the file
            stored = None
    hint = (
        'with "tokenizer_class": "PreTrainedTokenizerFast" in tokenizer_config.json transformers takes '
        "tokenizer.json at its word"
    )
    try:
        form = form_of(folder, content)
    except InvalidInput as error:
        if stored is None:
            raise
        raise InvalidInput(
            f"{error}; that is how transformers loads it ({name}): {hint}, which can be converted"
        ) from error
    if stored is not None and len(stored.notes) < len(form.notes):
        # The class adds what llama.cpp does not do.
        form = replace(
            form, notes=(*form.notes[:-1], f"{form.notes[-1]}; {hint}, and so does llama.cpp")
        )
    if stored is not None and (stored.model, stored.split) != (form.model, form.split):
        note = (
            f"transformers ({name}) splits text otherwise than tokenizer.json says ({form.split}, not {stored.split}), "
            f"and the file does as transformers; {hint}"
        )
        return Form(form.model, form.split, form.adds_space, (*form.notes, note))
    return form


def _added_around(folder: Path, tokenizer: PreTrainedTokenizerBase) -> tuple[bool, bool]:
    """Whether the tokenizer puts its first and its last special token around a text."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a", add_special_tokens=True)["input_ids"]
    for adds_bos, adds_eos in ((False, False), (True, False), (False, True), (True, True)):
        before = [tokenizer.bos_token_id] if adds_bos else []
        after = [tokenizer.eos_token_id] if adds_eos else []
        if full == [*before, *plain, *after]:
            return adds_bos, adds_eos
    around = tokenizer.convert_ids_to_tokens(full)
    raise InvalidInput(
        f"{folder}: the tokenizer makes {around} of the text 'a'; llama.cpp puts no more around a text than the tokens "
        f"of its beginning and end, here {tokenizer.bos_token!r} and {tokenizer.eos_token!r}"
    )


def _special(
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    config: Mapping[str, Any],
    form: Form,
    vocabulary: int,
) -> dict[str, int]:
    found: dict[str, int] = {}
    for key in ("bos", "eos", "unk", "pad"):
        index = getattr(tokenizer, f"{key}_token_id")
        if index is None and key in ("bos", "eos"):
            index = config.get(f"{key}_token_id")
            index = index[0] if isinstance(index, list) and index else index
            if not isinstance(index, int) or not 0 <= index < vocabulary:
                index = None
        if index is not None:
            found[key] = int(index)
    if "eos" not in found:
        default = 11 if form.model == "gpt2" else 2
        raise InvalidInput(
            f"{folder}: neither the tokenizer nor config.json names a token that ends text (eos_token), and llama.cpp "
            f"would take the one with the id {default} for it"
        )
    return found


def _pieces(
    folder: Path, content: dict[str, Any], vocabulary: int, *, byte_level: bool
) -> tuple[list[str], list[int]]:
    named = {index: text for text, index in content["model"]["vocab"].items()}
    types = [UNUSED] * vocabulary
    added = {token["id"]: token for token in content.get("added_tokens") or []}
    beyond = sorted(index for index in named | added if index >= vocabulary)
    if beyond:
        text = added[beyond[0]]["content"] if beyond[0] in added else named[beyond[0]]
        raise InvalidInput(
            f"{folder}: the token {text!r} has the id {beyond[0]}, but the model has {vocabulary} embeddings, which is "
            "as many as llama.cpp takes tokens"
        )
    for index, text in named.items():
        types[index] = BYTE if not byte_level and text in BYTE_PIECES else NORMAL
    unknown = content["model"].get("unk_token")
    for index, token in added.items():
        named[index] = token["content"]
        types[index] = CONTROL if token["special"] else USER_DEFINED
        if token["content"] == unknown:
            types[index] = UNKNOWN
    for text, index in content["model"]["vocab"].items():
        if named[index] != text:
            raise InvalidInput(
                f"{folder}: {text!r} and {named[index]!r} are both the token {index}, and GGUF has one text a token"
            )
    for index, text in named.items():
        if not text or "\0" in text:
            raise InvalidInput(
                f"{folder}: the token {index} is {text!r}, which llama.cpp cannot read: it ends texts at a null"
            )
    taken = set(named.values())
    if len(taken) < len(named):
        twice = next(text for text in taken if list(named.values()).count(text) > 1)
        raise InvalidInput(f"{folder}: two tokens are {twice!r}, and llama.cpp ends at such a file")
    return [named.get(index) or _filler(index, taken) for index in range(vocabulary)], types


def _filler(index: int, taken: set[str]) -> str:
    """A name for an id that no token has; llama.cpp wants each once."""
    name = f"[PAD{index}]"
    while name in taken:
        name = f"[{name}]"
    return name


def _scores(
    folder: Path, tokens: list[str], types: list[int], merges: list[tuple[str, str]]
) -> list[float]:
    """The rank of the first merge that makes a piece, negated: SentencePiece then merges in the same order.

    It does if its rule makes the same of every pair: any two neighbours are merged that are a piece together, the
    better score first, whichever pair makes it.
    """
    found = {token for token, kind in zip(tokens, types, strict=True) if kind in _FOUND_FIRST}
    rank: dict[str, int] = {}
    last = None
    for index, (left, right) in enumerate(merges):
        piece = left + right
        if piece in rank and piece != last and piece not in found:
            raise InvalidInput(
                f"{folder}: {piece!r} is merged from {left!r} and {right!r} later than other pieces are that come "
                "after it otherwise; llama.cpp has one score a piece"
            )
        rank.setdefault(piece, index)
        last = last if piece in found else piece
    known, pairs = set(tokens), set(merges)
    for token, kind in zip(tokens, types, strict=True):
        if kind in _FOUND_FIRST:
            continue
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            met = (cut == 1 or left in known) and (len(right) == 1 or right in known)
            if met and (left, right) not in pairs:
                raise InvalidInput(
                    f"{folder}: llama.cpp would make {token!r} of {left!r} and {right!r}, which no merge of the "
                    "tokenizer does"
                )
    return [
        -float(rank[token]) if token in rank else _NEVER if kind == NORMAL else 0.0
        for token, kind in zip(tokens, types, strict=True)
    ]
