"""Claims about calibration: borders, budgets, the held-out share, refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import VOCAB, make_tokenizer

from fbn_prune.data.calibration import TokenBlocks, calibration_data, tokenize_document
from fbn_prune.data.documents import read_documents
from fbn_prune.errors import InvalidInput

TOKENIZER = make_tokenizer()


def data(sources: list[str], **changes: object):
    options = {"tokens": 400, "context": 32, "held_out": 0.2, "seed": 0, "vocabulary": VOCAB}
    return calibration_data(sources, TOKENIZER, **{**options, **changes})  # type: ignore[arg-type]


def text_file(folder: Path, characters: int = 4000, name: str = "a.txt") -> str:
    path = folder / name
    path.write_text("".join(f"{i} apples and {i * 7} pears. " for i in range(characters // 20)))
    return str(path)


def test_held_out_blocks_never_calibrate_even_if_the_text_repeats(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text(("abcdefgh" * 4) * 100 + "".join(chr(65 + i % 26) * 3 for i in range(600)))
    both = data([str(path), str(path)])
    held = {tuple(block.tolist()) for block in both.held_out.blocks}
    assert held
    assert not held & {tuple(block.tolist()) for block in both.calibrating.blocks}


def test_documents_keep_their_borders(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with path.open("w") as file:
        for number in range(120):
            print(json.dumps({"text": chr(65 + number % 26) * (5 + number % 40)}), file=file)
    both = data([str(path)], tokens=2000)
    for block in (*both.calibrating.blocks, *both.held_out.blocks):
        assert len(set(block.tolist())) == 1


def test_the_budget_is_shared_evenly_and_kept(tmp_path: Path) -> None:
    sources = [text_file(tmp_path, 40_000, "a.txt"), text_file(tmp_path, 8_000, "b.txt")]
    both = data(sources, tokens=640)
    assert 640 <= both.calibrating.tokens <= 640 + 2 * 32
    assert both.held_out.tokens >= 0.2 * 640


def test_the_same_seed_gives_the_same_blocks_and_fingerprint(tmp_path: Path) -> None:
    source = text_file(tmp_path)
    assert data([source]).calibrating.fingerprint == data([source]).calibrating.fingerprint
    assert data([source], seed=1).calibrating.fingerprint != data([source]).calibrating.fingerprint


def test_every_block_opens_as_the_tokenizer_opens_a_text() -> None:
    class WithBos:
        def __call__(self, text: str, add_special_tokens: bool = True, **_: object):
            ids = TOKENIZER(text, add_special_tokens=False)["input_ids"]
            return {"input_ids": [256, *ids] if add_special_tokens else ids}

    blocks = tokenize_document(WithBos(), "x" * 50, 16)
    assert all(block[0] == 256 for block in blocks)
    assert all(len(block) <= 16 for block in blocks)
    assert sum(len(block) - 1 for block in blocks) == 50


@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=30), size=st.integers(1, 200))
@settings(deadline=None, max_examples=40)
def test_batches_hold_every_token_once(lengths: list[int], size: int) -> None:
    blocks = TokenBlocks(tuple(torch.arange(n) + 1 for n in lengths), 40, ("x",))
    batches = blocks.batches(size)
    assert sum(batch.tokens for batch in batches) == sum(lengths)
    rows = [
        row[valid].tolist()
        for batch in batches
        for row, valid in zip(batch.input_ids, batch.valid, strict=True)
    ]
    assert sorted(map(len, rows)) == sorted(lengths)
    assert all(row == list(range(1, len(row) + 1)) for row in rows)


def test_a_folder_and_a_named_field_are_read(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "one.txt").write_text("first text")
    (tmp_path / "two.jsonl").write_text('{"text": "second text"}\n\n{"text": "third"}\n')
    (tmp_path / "skip.bin").write_bytes(b"\xff\xfe")
    found = set(read_documents(str(tmp_path), characters=1000))
    assert found == {"first text", "second text", "third"}
    (tmp_path / "b.jsonl").write_text('{"body": "by field"}\n')
    assert list(read_documents(f"{tmp_path / 'b.jsonl'}:body", characters=99)) == ["by field"]


def test_a_data_set_is_read_through_datasets(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"body": "one"}\n{"body": "two"}\n')
    found = list(read_documents(f"hf:{tmp_path}::train:body", characters=99))
    assert found == ["one", "two"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "has no text"),
        ("  \n ", "has no text"),
        ("too short", "too short"),
        ("ab", "every document has fewer"),
        ("x" * 3200, "differ from the held-out"),
    ],
)
def test_unusable_text_is_refused(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "a.txt"
    path.write_text(content)
    with pytest.raises(InvalidInput, match=message):
        data([str(path)])


def test_unreadable_sources_are_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9" * 200)
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\nnot json\n')
    (tmp_path / "field.jsonl").write_text('{"content": "x"}\n')
    (tmp_path / "empty").mkdir()
    cases = {
        "nowhere.txt": "does not exist",
        "latin.txt": "not UTF-8",
        "bad.jsonl": "line 2: not JSON",
        "field.jsonl": "no text field 'text'",
        "empty": "has no",
    }
    for name, message in cases.items():
        with pytest.raises(InvalidInput, match=message):
            data([str(tmp_path / name)])


def test_ids_beyond_the_vocabulary_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="vocabulary has only 50"):
        data([text_file(tmp_path)], vocabulary=50)
