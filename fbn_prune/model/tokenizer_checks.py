"""Check that a checkpoint's tokenizer turns text into tokens of its model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from fbn_prune.errors import InvalidInput
from fbn_prune.model import remedies
from fbn_prune.model.folder import VOCABULARY_FILES
from fbn_prune.model.headers import one_line

ENDLESS = (
    "the tokenizer looks for its unknown token without end: unk_token may be empty in tokenizer_config.json or "
    'special_tokens_map.json; the first LLaMA tokenizers need "<unk>" there'
)
_PROBE = "The quick brown fox jumps over 13 lazy dogs.\n"


def check_tokenizer(
    path: Path, folder: Path, load: Callable[[], PreTrainedTokenizerBase], vocabulary: int
) -> None:
    """Refuse a tokenizer that returns no tokens, or ids that the model has no embedding for.

    Parameters
    ----------
    path
        The checkpoint, for messages.
    folder
        The folder with the tokenizer's files.
    load
        Loads the tokenizer.
    vocabulary
        Number of the model's embeddings.

    Raises
    ------
    InvalidInput
        There is no tokenizer, or it cannot be used.
    """
    if not any(file for pattern in VOCABULARY_FILES for file in folder.glob(pattern)):
        raise InvalidInput(
            f"{path} has no tokenizer: copy tokenizer.json and tokenizer_config.json from the original model"
        )
    remedies.refuse_sentencepiece_without_library(folder)
    tokenizer = load()
    try:
        ids, unknown = (
            tokenizer(_PROBE, add_special_tokens=False)["input_ids"],
            tokenizer.unk_token_id,
        )
    except RecursionError as error:
        raise InvalidInput(f"{path}: {ENDLESS}") from error
    except Exception as error:  # as in load_tokenizer
        raise InvalidInput(
            f"{path}: the tokenizer fails on text, replace its files: {one_line(error)}"
        ) from error
    if not ids or set(ids) == {unknown}:
        got = "no tokens" if not ids else "only the unknown token"
        raise InvalidInput(
            f"{path}: the tokenizer ({type(tokenizer).__name__}) returns {got} for a test sentence; "
            "copy the tokenizer's files from the original model"
        )
    if max(ids) >= vocabulary:
        raise InvalidInput(
            f"{path}: the tokenizer returns the id {max(ids)}, but the model has only {vocabulary} embeddings; "
            "copy the tokenizer's files from the original model"
        )
