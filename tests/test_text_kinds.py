"""Text is read by what a file holds, whatever its name, and conversations as the model's template writes them."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import threading
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pytest
from tiny_models import make_tokenizer
from tokenizers import processors

from fbn_prune.data.calibration import tokenize_document
from fbn_prune.data.documents import read_documents
from fbn_prune.data.examples import example_blocks, read_examples
from fbn_prune.data.forms import Reading
from fbn_prune.data.given import as_source
from fbn_prune.data.harness_files import task_from_file
from fbn_prune.errors import InvalidInput

ROWS = [{"text": "one\ntwo", "id": 1}, {"text": "grün, 'so'", "id": 2}]
TEXTS = [row["text"] for row in ROWS]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
CSV = 'id,text\n1,"one\ntwo"\n2,"grün, \'so\'"\n'

TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "1+1?"},
    {"role": "assistant", "content": "2"},
]
SHARE = [
    {"from": {"user": "human", "assistant": "gpt"}.get(turn["role"], "system")}
    | {"value": turn["content"]}
    for turn in TURNS
]
CHATML = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{{ eos_token }}{% endfor %}"
    "{{ strftime_now('%Y-%m-%d') }}"
)
STRICT = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}[{{ m.role }}]{{ m.content }}{% endfor %}"
)


def templated(template: str | None) -> Any:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 256)]
    )
    return tokenizer


def documents(
    path: Path | str, content: str | bytes | None = None, tokenizer: Any = None
) -> tuple[list[str], list[str]]:
    """The documents of a file with this content, and what was said of it."""
    if content is not None:
        Path(path).write_bytes(content if isinstance(content, bytes) else content.encode())
    said: list[str] = []
    reading = Reading(tokenizer, said.append)
    return list(read_documents(str(path), characters=10**6, reading=reading)), said


def named(value: object) -> str | None:
    """Names of the cases: without the bytes of files, which are not the same each time."""
    return "" if isinstance(value, bytes) else None


@pytest.mark.parametrize(
    ("name", "content"),
    [
        *((f"a.{kind}", LINES) for kind in ("jsonl", "JSONL", "ndjson", "json", "data")),
        ("lines", LINES),
        ("list.json", json.dumps(ROWS)),
        ("list.jsonl", json.dumps(ROWS)),
        ("pretty.json", json.dumps(ROWS, indent=2)),
        ("inside.json", json.dumps({"version": "1", "data": ROWS}, indent=2)),
        ("a.csv", CSV),
        ("semicolons.csv", CSV.replace("id,", "id;").replace("1,", "1;").replace("2,", "2;")),
        ("a.TSV", CSV.replace("id,", "id\t").replace("1,", "1\t").replace("2,", "2\t")),
        ("mark.jsonl", "\ufeff" + LINES),
        ("mark.csv", "\ufeff" + CSV),
        ("a.jsonl.gz", gzip.compress(LINES.encode())),
        ("two-parts.json.gz", b"".join(gzip.compress(line.encode()) for line in LINES.split("\n"))),
        ("a.csv.zst", pyarrow.compress(CSV.encode(), "zstd", asbytes=True)),
        ("a.ndjson.bz2", bz2.compress(LINES.encode())),
        ("unnamed", lzma.compress(LINES.encode())),
    ],
    ids=named,
)
def test_records_are_read_by_what_the_file_holds(name: str, content: Any, tmp_path: Path) -> None:
    found, said = documents(tmp_path / name, content)
    assert found == TEXTS
    default = name in ("a.jsonl", "a.JSONL", "list.jsonl", "mark.jsonl", "a.jsonl.gz")
    assert ["in 'text'" in line for line in said] == ([] if default else [True])


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.json.gz"])
def test_strings_are_documents(name: str, tmp_path: Path) -> None:
    content = "\n".join(map(json.dumps, TEXTS)) if name == "a.jsonl" else json.dumps(TEXTS)
    data = gzip.compress(content.encode()) if name.endswith(".gz") else content
    found, said = documents(tmp_path / name, data)
    assert found == TEXTS
    assert said == [f"{tmp_path / name} (JSON): text in its strings"]


def test_plain_text_stays_one_document(tmp_path: Path) -> None:
    assert documents(tmp_path / "a.txt", "\ufeffone\r\ntwo")[0] == ["one\ntwo"]
    assert documents(tmp_path / "b.txt.gz", gzip.compress(b"one"))[0] == ["one"]
    found, said = documents(tmp_path / "c.txt", LINES)
    assert found == [LINES]
    assert "name it .jsonl" in said[0]
    os.mkfifo(tmp_path / "pipe")  # as <(command) of a shell
    writer = threading.Thread(target=(tmp_path / "pipe").write_text, args=(LINES,))
    writer.start()
    assert documents(tmp_path / "pipe")[0] == TEXTS
    writer.join()


def test_cells_of_csv_are_text_whatever_they_look_like(tmp_path: Path) -> None:
    found, _ = documents(tmp_path / "a.csv", "text\nnull\nNA\n007\n\n" + "x" * 200_000 + "\n")
    assert found == ["null", "NA", "007", "x" * 200_000]


def test_tables_and_folders_of_all_kinds_are_read(tmp_path: Path) -> None:
    folder = tmp_path / "a [1]*"
    folder.mkdir()
    table = datasets.Dataset.from_list([{"text": "of arrow"}])
    table.save_to_disk(folder / "saved")
    datasets.Dataset.from_list([{"text": "of parquet"}]).to_parquet(folder / "p.parquet")
    (folder / "LIST.JSON").write_text(json.dumps([{"text": "of json"}]))
    (folder / "c.csv").write_text("text\nof csv\n")
    (folder / "t.txt.gz").write_bytes(gzip.compress(b"of text"))
    (folder / "config.json").write_text('{"model_type": "llama"}')
    found, said = documents(folder)
    assert set(found) == {"of arrow", "of parquet", "of json", "of csv", "of text"}
    assert sum("config.json: skipped" in line for line in said) == 1


def test_no_more_of_a_file_is_read_than_is_used(tmp_path: Path) -> None:
    fault = b'\xff{"text": oops'
    for name, head, row in (
        ("a.json", "[", '{"text": "word"},\n'),
        ("b.jsonl", "", LINES),
        ("c.csv", "text\n", "word\n"),
    ):
        (tmp_path / name).write_bytes((head + row * 20_000).encode() + fault)
        (found,) = read_documents(str(tmp_path / name), characters=4)
        assert found in ("word", "one\n")


ALPACA = {"instruction": "Add.", "input": "1 1", "output": "2"}


@pytest.mark.parametrize(
    ("record", "plain"),
    [
        ({"messages": TURNS}, "System: Be brief.\n\nUser: 1+1?\n\nAssistant: 2\n"),
        ({"conversations": SHARE}, "System: Be brief.\n\nUser: 1+1?\n\nAssistant: 2\n"),
        (
            {"conversations": SHARE[1:], "system": "Be brief."},
            "System: Be brief.\n\nUser: 1+1?\n\nAssistant: 2\n",
        ),
        ({"messages": json.dumps(TURNS[1:])}, "User: 1+1?\n\nAssistant: 2\n"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]},
            "User: Hi\n",
        ),
        (ALPACA, "User: Add.\n\n1 1\n\nAssistant: 2\n"),
        ({"prompt": "Add.", "response": "2"}, "User: Add.\n\nAssistant: 2\n"),
        ({"prompt": TURNS[1:2], "completion": TURNS[2:]}, "User: 1+1?\n\nAssistant: 2\n"),
        ({"prompt": "The sky", "completion": " is blue"}, "The sky is blue"),
        ({"question": "1+1=", "answer": "2"}, "1+1=2\n"),
    ],
)
def test_fine_tuning_data_is_rendered(record: dict[str, Any], plain: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    found, said = documents(path, json.dumps(record), templated(None))
    assert found == [plain]
    is_chat = "User: " in plain
    assert ("no chat template" in said[0]) == is_chat
    found, said = documents(path, None, templated(CHATML))
    assert ("rendered with the model's chat template" in said[0]) == is_chat
    assert ("<|user|>" in found[0]) == is_chat
    named = next(key for key in record if key != "system")
    if len(record) == 1:
        assert documents(f"{path}:{named}", None, templated(None))[0] == [plain]


def test_a_conversation_gives_the_tokens_that_the_template_gives() -> None:
    """One BOS, though the template and the tokenizer both write it, and the same tokens on every day."""
    tokenizer = templated(CHATML)
    table = datasets.Dataset.from_list([{"messages": TURNS}])
    for given in (table, table.to_iterable_dataset(), [{"messages": TURNS}]):
        source = as_source(given, tokens=100, reading=Reading(tokenizer))
        (text,) = source.documents  # type: ignore[union-attr]
        assert text.endswith("</s>2024-07-26")
        (block,) = tokenize_document(tokenizer, text, 300)
        template = CHATML.replace("{{ strftime_now('%Y-%m-%d') }}", "2024-07-26")
        expected = tokenizer.apply_chat_template(TURNS, chat_template=template)
        assert block.tolist() == list(expected["input_ids"])


def test_a_strict_template_gets_the_turns_it_wants(tmp_path: Path) -> None:
    turns = [*TURNS, {"role": "user", "content": "2+2?"}, {"role": "user", "content": "Well?"}]
    path = tmp_path / "a.jsonl"
    found, _ = documents(path, json.dumps({"messages": turns}), templated(STRICT))
    assert found == ["[user]Be brief.\n\n1+1?[assistant]2[user]2+2?\n\nWell?"]
    never = templated("{{ raise_exception('not today') }}")
    with pytest.raises(InvalidInput, match=r"a.jsonl, line 1: .* refuses .*not today.*remove it"):
        documents(path, None, never)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", b"good\nbad \xe9 ", "line 2: the byte 0xe9 is not UTF-8; convert the file"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xe9"}', "line 2: the byte 0xe9"),
        ("a.csv.gz", gzip.compress(b"text\n\xe9\n"), "line 2: the byte 0xe9"),
        ("a.txt", b"cut \xc3", "line 1: the file ends within"),
        ("a.txt", "wide".encode("utf-16"), "iconv -f UTF-16"),
        ("a.jsonl.gz", gzip.compress(LINES.encode())[:-9], "download it again"),
        ("a.zip", b"PK\x03\x04", "a zip archive: unpack it"),
        ("a.docx", b"PK\x03\x04", "an office document: save its text in a .txt file"),
        ("a.json", "[1, 2]", "no text field 'text' .found: no object."),
        ("a.parquet", b"text", "write it again"),
        ("a.parquet", b"PAR1" + b"\0" * 40 + b"PAR1", "not a readable parquet file"),
        ("a.json", '[{"text": "a"},\n{"text": oops}]', "line 2: not JSON"),
        ("a.csv", "id,text\n1,a,b\n", "line 2: 3 cells, .*in double quotes"),
        ("a.csv", "id,body\n1,a\n", "no text field 'text' .found: body, id.; give .*a.csv:FIELD"),
        ("a.jsonl", '{"messages": "hi"}', "no text field 'text' .found: messages"),
        ("a.jsonl", '{"text": null}\n{"text": 5}', "line 2: 'text' holds a number"),
        (
            "a.jsonl",
            json.dumps({"messages": [{"role": "user", "content": [{"type": "image"}]}]}),
            "such as an image; remove",
        ),
    ],
    ids=named,
)
def test_a_fault_is_named_with_its_line_and_a_cure(
    name: str, content: Any, words: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(InvalidInput, match=words) as refused:
        documents(tmp_path / name, content)
    assert capfd.readouterr().err == ""  # nothing of another library beside the refusal
    assert str(tmp_path / name) in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_named_field_that_is_no_conversation_is_refused_without_contradiction(
    tmp_path: Path,
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"chosen": [1]}')
    with pytest.raises(InvalidInput, match="'chosen' holds a list, neither text nor the turns"):
        documents(f"{path}:chosen")
    with pytest.raises(InvalidInput, match=r"no text field 'body' \(found: chosen\); name one of"):
        documents(f"{path}:body")


def test_examples_of_a_task_take_the_same_kinds(tmp_path: Path) -> None:
    path = tmp_path / "task.json"
    path.write_text("\ufeff" + json.dumps([{"messages": TURNS}, ALPACA, {"text": "a b c d"}]))
    examples = read_examples(path)
    assert [one.question for one in examples] == ["1+1?", "Add.\n\n1 1", "a b c d"]
    tokenizer = templated(CHATML)
    options = {"context": 300, "vocabulary": 260, "source": "task"}
    blocks = example_blocks(examples, tokenizer, **options).blocks  # type: ignore[arg-type]
    assert tokenizer.decode(blocks[0]) == f"<s>{documents_of_turns(tokenizer)}"
    asked = tmp_path / "asked.JSONL"
    asked.write_text('\ufeff{"question": "1+1=", "answer": "2"}\n')
    assert task_from_file(asked)["dataset_path"] == "json"
    asked.write_bytes(b'{"question": "\xe9 "}')
    with pytest.raises(InvalidInput, match="line 1: the byte 0xe9"):
        task_from_file(asked)


def documents_of_turns(tokenizer: Any) -> str:
    source = as_source([{"messages": TURNS}], tokens=100, reading=Reading(tokenizer))
    return str(source.documents[0])  # type: ignore[union-attr]


def test_a_table_given_in_python_says_what_to_do() -> None:
    table = datasets.Dataset.from_list([{"body": "a"}])
    for given, words in (
        (datasets.DatasetDict(train=table), r"keys train: give one of its values"),
        (table, r"no column 'text' \(found: body\); rename"),
        (table.to_iterable_dataset(), r"no column 'text' \(found: body\); rename"),
    ):
        with pytest.raises(InvalidInput, match=words):
            as_source(given, tokens=10)


def test_a_local_table_is_read_without_a_word_to_the_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []
    datasets.Dataset.from_list([{"text": "of parquet"}]).to_parquet(tmp_path / "p.parquet")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("socket.getaddrinfo", lambda host, *_, **__: asked.append(host) or [])
    assert documents(tmp_path / "p.parquet")[0] == ["of parquet"]
    assert asked == []
    assert datasets.config.HF_UPDATE_DOWNLOAD_COUNTS
