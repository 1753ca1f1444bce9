"""Accept calibration data as Python objects: strings, records, a `datasets.Dataset`, or batches of token ids."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fbn_prune.data.forms import DocumentMaker, Reading, form_of
from fbn_prune.errors import InvalidInput, counted

CHARACTERS_READ_PER_TOKEN = 16
"""Characters of text read for each token of the budget: about four times as many as the tokens have, so that the blocks
are sampled from more than the beginning of the text."""


@dataclass(frozen=True)
class GivenData:
    """One source of calibration data: documents to tokenize, or token ids.

    Attributes
    ----------
    name
        The source's name in reports.
    documents
        The documents' texts; empty if token ids are given.
    rows
        Token ids, int64 [length] each.
    """

    name: str
    documents: tuple[str, ...] = ()
    rows: tuple[Tensor, ...] = ()


Dataset = str | Sequence[str] | Iterable[Any]
"""Types that :func:`as_source` accepts."""


def as_source(
    dataset: Dataset, *, tokens: int, column: str | None = None, reading: Reading | None = None
) -> str | GivenData:
    """Make a calibration source from a Python object.

    Parameters
    ----------
    dataset
        A source's name as on the command line (a string); documents (a sequence of strings); a `datasets.Dataset` or a
        sequence of mappings, with text, conversations or `input_ids`; or an iterable of batches of token ids, such as a
        `torch.utils.data.DataLoader`: tensors int64 [blocks, length] or [length], or mappings with `input_ids` and,
        where rows are padded, `attention_mask`.
    tokens
        Number of token ids after which reading stops.
    column
        The column of text or of conversations. Default: `text`, or conversations under one of their usual names.
    reading
        How conversations are rendered, and where it is said what was found.

    Raises
    ------
    InvalidInput
        The object is of another type, or empty.
    """
    if isinstance(dataset, str):
        return dataset
    reading = reading or Reading()
    if isinstance(dataset, Mapping) and "input_ids" in dataset:  # what a tokenizer returns
        return GivenData("token ids", rows=_first_rows([dataset], tokens))
    if isinstance(dataset, Mapping):
        splits = ", ".join(map(str, dataset))
        raise InvalidInput(
            f"dataset is a {type(dataset).__name__} with the keys {splits}: give one of its values, as dataset[KEY]"
        )
    if hasattr(dataset, "column_names") and hasattr(dataset, "features"):
        return _of_table(dataset, tokens, column, reading)
    if isinstance(dataset, Sequence) and dataset and form_of(dataset[0]) is not None:
        return _of_records(dataset, tokens, column, reading)
    if isinstance(dataset, Sequence) and all(isinstance(text, str) for text in dataset):
        if not dataset:
            raise InvalidInput("dataset is an empty list: give documents, or the name of a source")
        return GivenData(f"{counted(len(dataset), 'document')}", documents=tuple(dataset))
    if isinstance(dataset, Iterable):
        return GivenData("token ids", rows=_first_rows(dataset, tokens))
    raise InvalidInput(
        f"dataset is a {type(dataset).__name__}: give strings, a datasets.Dataset, a DataLoader of "
        "token ids, or the name of a source"
    )


def _of_table(table: Any, tokens: int, column: str | None, reading: Reading) -> GivenData:
    names = list(table.column_names or next(iter(table), ()))  # a streamed table may not know them
    if "input_ids" in names and column is None:
        return GivenData("token ids", rows=_first_rows(table, tokens))
    return _of_records(table, tokens, column, reading)


def _of_records(
    records: Iterable[Any], tokens: int, column: str | None, reading: Reading
) -> GivenData:
    maker = DocumentMaker(
        column, cure="rename the column with the text to 'text', or give strings", noun="column"
    )
    texts: list[str] = []
    characters = 0
    for number, row in enumerate(records):  # no more than is used: a table may exceed memory
        where = f"dataset, row {number}"
        document = maker(where, row)
        if document is None:
            continue
        if maker.form != ("text",):
            reading.say_form("dataset", maker, document)
        texts.append(reading.rendered(document, where))
        characters += len(texts[-1])
        if characters >= tokens * CHARACTERS_READ_PER_TOKEN:
            break
    if not texts:
        raise InvalidInput("dataset has no row with text: give one that has")
    return GivenData(counted(len(texts), "document"), documents=tuple(texts))


def _first_rows(batches: Iterable[Any], tokens: int) -> tuple[Tensor, ...]:
    rows: list[Tensor] = []
    count = 0
    for batch in batches:
        for row in _rows(batch):
            rows.append(row)
            count += len(row)
        if count >= tokens:
            break
    if not rows:
        raise InvalidInput("dataset has no batch of token ids: give at least one")
    return tuple(rows)


def _rows(batch: Any) -> Iterator[Tensor]:
    mask = None
    if isinstance(batch, Mapping):
        if "input_ids" not in batch:
            found = ", ".join(map(str, batch))
            raise InvalidInput(
                f"dataset: a batch has no input_ids (found: {found}): rename the token ids"
            )
        batch, mask = batch["input_ids"], batch.get("attention_mask")
    elif isinstance(batch, tuple) and len(batch) == 1:  # a TensorDataset's
        batch = batch[0]
    try:
        ids = torch.atleast_2d(torch.as_tensor(batch))
    except (TypeError, ValueError, RuntimeError):
        raise InvalidInput(
            f"dataset: a batch is a {type(batch).__name__}, not token ids: give tensors or lists of them"
        ) from None
    if ids.is_floating_point() or ids.ndim != 2:
        raise InvalidInput(
            f"dataset: a batch is {ids.dtype} {list(ids.shape)}, not int64 [blocks, n]: give token ids of that form"
        )
    valid = torch.ones_like(ids) if mask is None else torch.atleast_2d(torch.as_tensor(mask))
    for row, kept in zip(ids.long().cpu(), valid.bool().cpu(), strict=True):
        yield row[kept]
