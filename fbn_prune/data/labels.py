"""Read labelled texts: rows {"text", "label"} of a JSON lines, CSV or Parquet file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fbn_prune.data.file_kinds import open_file
from fbn_prune.data.records import json_lines, read_records
from fbn_prune.errors import InvalidInput

LEAST_TEXTS = 4
"""Texts that every label needs, so that each half has two."""

MOST_TEXTS = 100_000


@dataclass(frozen=True)
class LabelledTexts:
    """Texts, the names of their labels in order, and the index of each text's label."""

    texts: list[str]
    names: list[str]
    labels: list[int]


def read_labels(path: Path) -> LabelledTexts:
    """Read labelled texts.

    Raises
    ------
    InvalidInput
        The file is missing or damaged, a row has no text or label, there are fewer than two labels, or a label has
        fewer than :data:`LEAST_TEXTS` texts.
    """
    name = f"labels {path}"
    texts: list[str] = []
    labels: list[str] = []
    with open_file(path, name) as file:
        rows = (
            json_lines(file.text(), file.path)
            if file.kind == "text"
            else read_records(file, is_record=lambda record: "text" in record)
        )
        for where, record in rows:
            fields = record if isinstance(record, Mapping) else {}
            text, label = fields.get("text"), fields.get("label")
            if not isinstance(text, str) or not text.strip() or not _is_label(label):
                raise InvalidInput(
                    f'{where}: give a text and a label, as {{"text": "1+1=2", "label": "sum"}}'
                )
            texts.append(text)
            labels.append(str(label))
            if len(texts) > MOST_TEXTS:
                raise InvalidInput(f"{name} has more than {MOST_TEXTS:,} texts: give fewer")
    counts = Counter(labels)
    if len(counts) < 2:
        raise InvalidInput(f"{name}: {len(counts)} labels; a probe needs at least two")
    few = min(counts, key=counts.__getitem__)
    if counts[few] < LEAST_TEXTS:
        raise InvalidInput(
            f"{name}: the label {few!r} has {counts[few]} texts; give every label at least {LEAST_TEXTS}"
        )
    names = sorted(counts)
    return LabelledTexts(texts, names, [names.index(label) for label in labels])


def _is_label(label: object) -> bool:
    return isinstance(label, str | int | bool | float) and str(label).strip() != ""
