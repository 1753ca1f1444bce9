"""Describe a tokenizer by the fields of a GGUF file: pieces with scores or merges, and the name of the text split.

GGUF has byte-level BPE ("gpt2"), which merges by rank, and SentencePiece ("llama"), which merges by score. transformers
keeps SentencePiece vocabularies as ranked merges; here each piece gets a score from the rank of its merge.
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
"""GGUF's numbers for the types of pieces."""

_FOUND_FIRST = frozenset({UNKNOWN, CONTROL, USER_DEFINED})
"""Types of pieces that llama.cpp finds in a text before it merges anything."""

_NEVER = -1e9
"""Score of a piece that no merge makes, so that llama.cpp never merges into it."""


@dataclass(frozen=True)
class GgufTokenizer:
    """The tokenizer fields of a GGUF file; `tokens`, `types` and `scores` have one entry for each token id.

    Attributes
    ----------
    model, split, adds_space, notes
        See :class:`fbn_prune.export.gguf_forms.Form`.
    merges
        "left right" in order of rank; empty for "llama".
    scores
        Empty for "gpt2".
    special
        Token ids by GGUF's keys "bos", "eos", "unk" and "pad".
    adds_bos, adds_eos
        Whether these tokens are put before and after a text.
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
    """Return the GGUF fields of a tokenizer as transformers runs it.

    Some tokenizer classes change the steps in `tokenizer.json` when they load it, so the loaded object decides.

    Parameters
    ----------
    folder
        The folder that the tokenizer was loaded from.
    tokenizer
        A tokenizer of the package `tokenizers`, as transformers loads it.
    vocabulary
        Number of embeddings of the model; ids without a token get placeholder tokens.
    config
        The content of `config.json`, for special tokens that the tokenizer does not name.

    Raises
    ------
    InvalidInput
        llama.cpp would give other token ids than the tokenizer, or would not load the file.
    """
    try:
        return _gguf_tokenizer(folder, tokenizer, vocabulary, config)
    except InvalidInput as error:
        raise InvalidInput(
            f"{error}; without GGUF, transformers serves the folder as it is"
        ) from error


def _gguf_tokenizer(
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    vocabulary: int,
    config: Mapping[str, Any] | None,
) -> GgufTokenizer:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise InvalidInput(
            f"{folder}: the tokenizer is code ({type(tokenizer).__name__}); only tokenizers of the package "
            "`tokenizers` can be converted to GGUF"
        )
    if getattr(tokenizer, "split_special_tokens", False):
        raise InvalidInput(
            f"{folder}: the tokenizer reads special tokens in a text as ordinary text (split_special_tokens in "
            "tokenizer_config.json), which GGUF does not support"
        )
    content: dict[str, Any] = json.loads(backend.to_str())
    if isinstance(content["model"].get("vocab"), dict):
        # The serialised form has one piece for each id; the tokenizer may have several.
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
    """Return the form of the loaded tokenizer, with a note where it differs from that of `tokenizer.json`."""
    name = type(tokenizer).__name__
    path = folder / "tokenizer.json"
    stored = None
    if path.is_file():
        try:
            stored = form_of(path, json.loads(Tokenizer.from_file(str(path)).to_str()))
        except Exception:  # only needed for a hint: transformers has read the file
            stored = None
    hint = (
        'with "tokenizer_class": "PreTrainedTokenizerFast" in tokenizer_config.json transformers follows '
        "tokenizer.json exactly"
    )
    try:
        form = form_of(folder, content)
    except InvalidInput as error:
        if stored is None:
            raise
        raise InvalidInput(
            f"{error}; {name} of transformers causes this: {hint}, and then it can be converted"
        ) from error
    if stored is not None and len(stored.notes) < len(form.notes):
        # The tokenizer class adds the step that llama.cpp does not do.
        form = replace(
            form, notes=(*form.notes[:-1], f"{form.notes[-1]}; {hint}, and so does llama.cpp")
        )
    if stored is not None and (stored.model, stored.split) != (form.model, form.split):
        note = (
            f"transformers ({name}) splits text differently from tokenizer.json ({form.split}, not {stored.split}), "
            f"and the GGUF file follows transformers; {hint}"
        )
        return Form(form.model, form.split, form.adds_space, (*form.notes, note))
    return form


def _added_around(folder: Path, tokenizer: PreTrainedTokenizerBase) -> tuple[bool, bool]:
    """Return whether the tokenizer puts its bos before and its eos after a text."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a", add_special_tokens=True)["input_ids"]
    for adds_bos, adds_eos in ((False, False), (True, False), (False, True), (True, True)):
        before = [tokenizer.bos_token_id] if adds_bos else []
        after = [tokenizer.eos_token_id] if adds_eos else []
        if full == [*before, *plain, *after]:
            return adds_bos, adds_eos
    around = tokenizer.convert_ids_to_tokens(full)
    raise InvalidInput(
        f"{folder}: the tokenizer turns the text 'a' into {around}; llama.cpp puts no more around a text than "
        f"bos and eos, here {tokenizer.bos_token!r} and {tokenizer.eos_token!r}"
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
            f"{folder}: neither the tokenizer nor config.json names a token that ends text (eos_token); llama.cpp "
            f"would use the token with id {default}"
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
            f"{folder}: the token {text!r} has the id {beyond[0]}, but the model has {vocabulary} embeddings, the "
            "limit for tokens in llama.cpp"
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
                f"{folder}: {text!r} and {named[index]!r} are both the token {index}; GGUF allows one text for a token"
            )
    for index, text in named.items():
        if not text or "\0" in text:
            raise InvalidInput(
                f"{folder}: the token {index} is {text!r}, which llama.cpp cannot read (texts end at a null byte)"
            )
    taken = set(named.values())
    if len(taken) < len(named):
        twice = next(text for text in taken if list(named.values()).count(text) > 1)
        raise InvalidInput(
            f"{folder}: two tokens are {twice!r}; llama.cpp does not load such a file"
        )
    return [named.get(index) or _filler(index, taken) for index in range(vocabulary)], types


def _filler(index: int, taken: set[str]) -> str:
    """Return a unique placeholder for an id without a token; llama.cpp needs every text to be unique."""
    name = f"[PAD{index}]"
    while name in taken:
        name = f"[{name}]"
    return name


def _scores(
    folder: Path, tokens: list[str], types: list[int], merges: list[tuple[str, str]]
) -> list[float]:
    """Return as score the negated rank of the first merge that makes a piece, and refuse where the order would differ.

    SentencePiece merges any two neighbours that form a piece, best score first, whether or not the pair is a merge.
    """
    found = {token for token, kind in zip(tokens, types, strict=True) if kind in _FOUND_FIRST}
    rank: dict[str, int] = {}
    last = None
    for index, (left, right) in enumerate(merges):
        piece = left + right
        if piece in rank and piece != last and piece not in found:
            raise InvalidInput(
                f"{folder}: {piece!r} is merged from {left!r} and {right!r} later than from another pair, with other "
                "pieces between; llama.cpp has one score for each piece"
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
                    f"{folder}: llama.cpp would make {token!r} of {left!r} and {right!r}, and the tokenizer has no "
                    "such merge"
                )
    return [
        -float(rank[token]) if token in rank else _NEVER if kind == NORMAL else 0.0
        for token, kind in zip(tokens, types, strict=True)
    ]
