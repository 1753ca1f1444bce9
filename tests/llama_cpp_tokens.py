"""Token ids of a text as llama.cpp finds them from what a GGUF file says, special tokens included.

Written from llama.cpp's `src/llama-vocab.cpp`: special tokens are cut out first, long ones before short ones; then
SentencePiece merges what is a piece together, the best score first, and byte-level BPE splits, and merges by rank.
`test_gguf_tokenizers.py` holds this against llama.cpp itself where `llama-cpp-python` is installed.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import gguf
import regex
from tokenizers import pre_tokenizers

_GPT_2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_WORDS = (
    r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_EXPRESSIONS = {
    "gpt-2": [_GPT_2],
    "smollm": [r"\p{N}", _GPT_2],
    "llama-bpe": [_WORDS % "{1,3}"],
    "smaug-bpe": [_WORDS % "{1,3}"],
    "qwen2": [_WORDS % ""],
}
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4


class LlamaCppTokens:
    """The tokenizer in a GGUF file, run as llama.cpp runs it."""

    def __init__(self, path: Path) -> None:
        reader = gguf.GGUFReader(path)
        fields = {
            name.removeprefix("tokenizer.ggml."): field.contents()
            for name, field in reader.fields.items()
        }
        self.tokens: list[str] = fields["tokens"]
        self._id = {text: index for index, text in enumerate(self.tokens)}
        if len(self._id) != len(self.tokens):
            raise ValueError("llama.cpp ends at a token that is there twice")
        self.fields: dict[str, Any] = fields
        special = [
            text
            for text, kind in zip(self.tokens, fields["token_type"], strict=True)
            if kind in (_UNKNOWN, _CONTROL, _USER_DEFINED)
        ]
        self._special = sorted(special, key=lambda text: -len(text.encode()))
        self._sentencepiece = fields["model"] == "llama"
        if not self._sentencepiece:
            if "merges" not in fields:
                raise ValueError("cannot find tokenizer merges in model file")
            halves = [tuple(merge.split(" ", 1)) for merge in fields["merges"]]
            self._rank = {pair: rank for rank, pair in reversed(list(enumerate(halves)))}

    def __call__(self, text: str) -> list[int]:
        ids = [self.fields["bos_token_id"]] if self.fields["add_bos_token"] else []
        after_special = True
        for part, is_special in self._partition(text):
            if is_special:
                ids.append(self._id[part])
            elif self._sentencepiece:
                space = " " if self.fields["add_space_prefix"] and after_special else ""
                ids += self._by_score((space + part).replace(" ", "▁"))
            else:
                ids += self._by_rank(part)
            after_special = is_special
        return ids + ([self.fields["eos_token_id"]] if self.fields["add_eos_token"] else [])

    def _partition(self, text: str) -> list[tuple[str, bool]]:
        parts = [(text, False)] if text else []
        for special in self._special:
            cut: list[tuple[str, bool]] = []
            for part, done in parts:
                if done:
                    cut.append((part, True))
                    continue
                for index, between in enumerate(part.split(special)):
                    if index:
                        cut.append((special, True))
                    if between:
                        cut.append((between, False))
            parts = cut
        return parts

    def _by_score(self, text: str) -> list[int]:
        symbols, scores = list(text), self.fields["scores"]
        while True:
            pairs = [
                (-scores[self._id[left + right]], index)
                for index, (left, right) in enumerate(itertools.pairwise(symbols))
                if left + right in self._id
            ]
            if not pairs:
                break
            _, index = min(pairs)
            symbols[index : index + 2] = ["".join(symbols[index : index + 2])]
        ids: list[int] = []
        for symbol in symbols:
            names = [symbol] if symbol in self._id else [f"<0x{b:02X}>" for b in symbol.encode()]
            ids += [self._id[name] for name in names]
        return ids

    def _by_rank(self, text: str) -> list[int]:
        whole = self.fields["pre"] == "llama-bpe"
        words = [text]
        for expression in _EXPRESSIONS[self.fields["pre"]]:
            words = [piece for word in words for piece in _isolate(expression, word)]
        mapped = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        ids: list[int] = []
        for word in words:
            symbols = [char for piece, _ in mapped.pre_tokenize_str(word) for char in piece]
            if whole and "".join(symbols) in self._id:
                symbols = ["".join(symbols)]
            while True:
                pairs = [
                    (self._rank[pair], index)
                    for index, pair in enumerate(itertools.pairwise(symbols))
                    if pair in self._rank
                ]
                if not pairs:
                    break
                _, index = min(pairs)
                symbols[index : index + 2] = ["".join(symbols[index : index + 2])]
            ids += [self._id[symbol] for symbol in symbols if symbol in self._id]
        return ids


def _isolate(expression: str, text: str) -> list[str]:
    """Matches and what lies between them, each by itself."""
    pieces, end = [], 0
    for match in regex.finditer(expression, text):
        pieces += [text[end : match.start()], match[0]]
        end = match.end()
    return [piece for piece in (*pieces, text[end:]) if piece]
