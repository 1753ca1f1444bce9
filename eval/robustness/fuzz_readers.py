"""Fuzz everything that reads files from elsewhere: weights, index, config, recipe, calibration text of every kind, chat
data, task files, networks, quantised weights and their quantisation configs, GGUF files, records of unfinished runs.

A reader must return a value or raise InvalidInput. It must not allocate memory out of proportion to its input, and must
not look for shards outside the checkpoint's folder. The inputs are valid files with random edits of bytes or of JSON
nodes, which hypothesis draws and shrinks.

    python eval/robustness/fuzz_readers.py --minutes 10 [READER ...]

runs each reader for that much processor time under a memory limit and prints what it found. The tests run each briefly.
"""

from __future__ import annotations

import argparse
import bz2
import copy
import gzip
import io
import json
import lzma
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pyarrow
import pyarrow.parquet
import torch
from hypothesis import HealthCheck, Verbosity, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer

from fbn_prune.data import builtin
from fbn_prune.data.documents import read_documents
from fbn_prune.data.examples import read_examples, recorded_fingerprints
from fbn_prune.data.forms import Reading
from fbn_prune.errors import FbnPruneError, InvalidInput
from fbn_prune.model.checkpoint import Checkpoint
from fbn_prune.model.families import family_of
from fbn_prune.model.headers import INDEX_FILE, SINGLE_FILE, read_index, read_object
from fbn_prune.model.quantized_formats import stored_weights
from fbn_prune.model.quantized_values import plain
from fbn_prune.model.shards import read_headers
from fbn_prune.networks.functional_networks import FunctionalNetworks
from fbn_prune.recipe import Recipe, load_recipe
from fbn_prune.runs.kept import numbers
from fbn_prune.runs.unfinished import unfinished_runs
from fbn_prune.store import FORMAT, RECORD, Store

MEMORY_LIMIT = 3 * 2**30
"""Bytes of memory that a fuzzing process may take beyond its use at the start."""

# Inputs

_TEXT = st.text(max_size=20) | st.sampled_from(
    ["", "\0", "..", "../x", "/etc/passwd", "\ud800", "C:\\x", "nan", "1e999", "~", "hf", "auto"]
)
_NUMBERS = (
    st.integers()
    | st.floats()
    | st.sampled_from([0, -1, 2**31, 2**63, 2**64, 10**30, 10**400, 1e308, -0.0])
)
_LEAVES = st.none() | st.booleans() | _NUMBERS | _TEXT
_VALUES = st.recursive(
    _LEAVES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_TEXT, inner, max_size=4),
    max_leaves=8,
)


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    items: Any = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    for key, inner in items:
        yield from _places(inner, (*path, key))


@st.composite
def _edited_json(draw: st.DrawFn, samples: list[Any]) -> bytes:
    """Draw a valid object with some of its nodes replaced, added or deleted, as JSON text."""
    value = copy.deepcopy(draw(st.sampled_from(samples)))
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(list(_places(value))))
        if not path:
            if draw(st.integers(0, 9)) == 0:
                value = draw(_VALUES)
            elif isinstance(value, dict):
                value[draw(_TEXT)] = draw(_VALUES)
            continue
        parent = value
        for key in path[:-1]:
            parent = parent[key]
        if draw(st.booleans()) and isinstance(parent, dict):
            del parent[path[-1]]
        else:
            parent[path[-1]] = draw(_VALUES)
    return _as_json(value)


def _as_json(value: Any) -> bytes:
    return json.dumps(value).encode("utf-8", "surrogatepass")


@st.composite
def _edited_bytes(draw: st.DrawFn, samples: list[bytes]) -> bytes:
    """Draw a valid file with bytes replaced, inserted, repeated or cut off."""
    data = bytearray(draw(st.sampled_from(samples)))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        kind = draw(st.sampled_from(["replace", "insert", "cut", "repeat"]))
        if kind == "cut":
            del data[at:]
        elif kind == "repeat":
            data[at:at] = data[max(0, at - 64) : at] * draw(st.integers(1, 50))
        else:
            new = draw(st.binary(min_size=1, max_size=16))
            data[at : at + (len(new) if kind == "replace" else 0)] = new
    return bytes(data)


@st.composite
def _edited_safetensors(draw: st.DrawFn, header: dict[str, Any], data: bytes) -> bytes:
    """Draw a safetensors file with edited header nodes or an edited header length."""
    text = draw(_edited_json([header]))
    length = draw(st.just(len(text)) | st.integers(0, 2**64 - 1))
    return length.to_bytes(8, "little") + text + data


def _json_like(samples: list[Any]) -> st.SearchStrategy[bytes]:
    return _edited_json(samples) | _edited_bytes([_as_json(sample) for sample in samples])


def _safetensors_like(sample: bytes) -> st.SearchStrategy[bytes]:
    length = int.from_bytes(sample[:8], "little")
    header = json.loads(sample[8 : 8 + length])
    return _edited_bytes([sample]) | _edited_safetensors(header, sample[8 + length :])


# Readers


@dataclass(frozen=True)
class Reader:
    """How to draw inputs, and the function that reads one from a file in a new folder."""

    inputs: st.SearchStrategy[bytes]
    read: Callable[[bytes, Path], object]

    def __call__(self, data: bytes) -> None:
        """Read one input; any exception but InvalidInput passes through."""
        with tempfile.TemporaryDirectory(prefix="fuzz-") as folder, suppress(InvalidInput):
            self.read(data, Path(folder))


@cache
def _small_safetensors() -> bytes:
    tensors = {
        "model.layers.0.mlp.down_proj.weight": torch.zeros(2, 3),
        "b": torch.ones(4, dtype=torch.bfloat16),
    }
    return save(tensors, {"format": "pt"})


@cache
def _small_networks() -> bytes:
    networks = FunctionalNetworks(
        maps=torch.randn(2, 6),
        widths=[3, 3],
        mean=torch.zeros(6),
        std=torch.ones(6),
        explained_variance=torch.full((2,), 0.1, dtype=torch.float64),
        engagement=torch.ones(2, dtype=torch.float64),
        header={"contexts": [[{"before": "a", "token": "b", "after": "c", "activity": 1.0}]] * 2},
    )
    with tempfile.TemporaryDirectory() as folder:
        networks.save(Path(folder, "x"))
        return Path(folder, "x").read_bytes()


def _read_weights(data: bytes, folder: Path) -> object:
    (folder / SINGLE_FILE).write_bytes(data)
    return read_headers(folder)


_INDEX = {
    "metadata": {"total_size": 40},
    "weight_map": {
        "model.layers.0.mlp.down_proj.weight": "model-00001.safetensors",
        "b": "model-00001.safetensors",
    },
}


def _read_index(data: bytes, folder: Path) -> object:
    inside = folder / "checkpoint"
    inside.mkdir()
    (inside / INDEX_FILE).write_bytes(data)
    (inside / "model-00001.safetensors").write_bytes(_small_safetensors())
    (folder / "x.safetensors").write_bytes(_small_safetensors())
    for shard in read_index(inside).values():
        assert inside.resolve() in (inside / shard).resolve().parents, shard
    return read_headers(inside)


@cache
def _config() -> dict[str, Any]:
    config: dict[str, Any] = json.loads((builtin.model_path() / "config.json").read_text())
    return config


def _read_config(data: bytes, folder: Path) -> object:
    for file in builtin.model_path().iterdir():
        if file.name != "config.json":
            (folder / file.name).symlink_to(file)
    (folder / "config.json").write_bytes(data)
    return Checkpoint.open(folder)


def _read_any_config(data: bytes, folder: Path) -> object:
    (folder / "config.json").write_bytes(data)
    config = read_object(folder / "config.json")
    family = family_of(config)
    sizes = family.widths(config), family.hidden_size(config), family.vocab_size(config)
    return *sizes, family.context_length(config), family.has_bias(config)


def _configs() -> list[Any]:
    common = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 9}
    kinds = ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "gpt_neox"]
    kinds += ["opt", "falcon", "olmo2", "granite"]
    ragged = {"per_layer_config": {"0": {"intermediate_size": 4}, "1": {"intermediate_size": 6}}}
    return [
        *({"model_type": kind, **common, "intermediate_size": 16} for kind in kinds),
        {"model_type": "llama", **common, "intermediate_size": 16, **ragged},
        {"model_type": "gpt2", "n_embd": 8, "n_layer": 2, "n_head": 2, "n_inner": None},
    ]


@cache
def _small_quantized() -> bytes:
    """One weight in each of the quantised storage formats."""
    state = {"quant_type": "nf4", "blocksize": 4, "dtype": "float32", "shape": [2, 6]}
    state |= {"nested_blocksize": 2, "nested_offset": 0.5}
    words = torch.zeros(2, 1, dtype=torch.int32)
    tensors = {
        "a.weight": torch.ones(4, 6).to(torch.float8_e4m3fn),
        "a.weight_scale_inv": torch.ones(2, 2),
        "b.weight": torch.ones(4, 6, dtype=torch.int8),
        "b.weight_scale": torch.ones(4, 2, dtype=torch.bfloat16),
        "b.weight_zero_point": torch.zeros(4, 2, dtype=torch.int8),
        "b.SCB": torch.ones(4),
        "b.weight_format": torch.tensor(0, dtype=torch.uint8),
        "c.weight_packed": words,
        "c.weight_shape": torch.tensor([2, 6]),
        "c.weight_scale": torch.ones(2, 2),
        "c.weight_zero_point": words[:1].repeat(1, 2),
        "c.weight_g_idx": torch.tensor([0, 0, 1, 1, 0, 1], dtype=torch.int32),
        "d.weight": torch.zeros(6, 1, dtype=torch.uint8),
        "d.weight.absmax": torch.zeros(3, dtype=torch.uint8),
        "d.weight.quant_map": torch.zeros(16),
        "d.weight.nested_absmax": torch.zeros(2),
        "d.weight.nested_quant_map": torch.zeros(256),
        "d.weight.quant_state.bitsandbytes__nf4": torch.tensor(
            list(json.dumps(state).encode()), dtype=torch.uint8
        ),
    }
    return save(tensors, {"format": "pt"})


def _quantizations() -> list[Any]:
    group = {"num_bits": 8, "strategy": "group", "group_size": 3, "symmetric": False}
    block = {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [2, 3]}
    forms = {"x": {"format": "int-quantized", "weights": group}, "y": {"weights": block}}
    forms["z"] = {"format": "pack-quantized", "weights": {**group, "num_bits": 4}}
    return [
        {"quant_method": "fp8", "weight_block_size": [2, 3]},
        {"quant_method": "compressed-tensors", "format": "naive-quantized", "config_groups": forms},
        {"quant_method": "bitsandbytes", "load_in_8bit": True},
        {"load_in_4bit": True},
    ]


def _dequantize(weights: bytes, quantization: Any, folder: Path, letters: str = "abcd") -> object:
    """Dequantise the modules whose names begin with one of `letters`."""
    (folder / SINGLE_FILE).write_bytes(weights)
    headers = read_headers(folder)
    headers = {name: info for name, info in headers.items() if name[:1] in letters}
    tensors = load_file(folder / SINGLE_FILE)
    stored = stored_weights(headers, quantization, tensors.__getitem__)
    for name, weight in stored.items():
        with suppress(FbnPruneError):  # values out of the range of the dtype
            plain(name, weight, tensors.__getitem__, torch.bfloat16)
    return list(stored)


def _read_quantization(data: bytes, folder: Path) -> object:
    (folder / "config.json").write_bytes(data)
    config = read_object(folder / "config.json")
    for letter in "abcd":
        with suppress(InvalidInput):
            _dequantize(_small_quantized(), config, folder, letter)
    return config


def _read_quantized(data: bytes, folder: Path) -> object:
    for quantization in _quantizations():
        for letter in "abcd":
            with suppress(InvalidInput):
                _dequantize(data, quantization, folder, letter)
    return None


@cache
def _small_gguf() -> bytes:
    """A Llama of one layer with a byte-level tokenizer, its matrices in several types."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    shapes = {"token_embd": (260, 32), "output_norm": (32,), "output": (260, 32)}
    layer = {"attn_norm": (32,), "ffn_norm": (32,), "ffn_gate": (32, 32), "ffn_up": (32, 32)}
    layer |= {"ffn_down": (32, 32), "attn_q": (32, 32), "attn_k": (16, 32), "attn_v": (16, 32)}
    shapes |= {
        f"blk.0.{name}": shape for name, shape in (layer | {"attn_output": (32, 32)}).items()
    }
    kinds = [gguf.GGMLQuantizationType[kind] for kind in ("Q8_0", "Q4_1", "Q5_0", "F16", "BF16")]
    with tempfile.TemporaryDirectory() as folder:
        writer = gguf.GGUFWriter(Path(folder, "x"), "llama")
        for key, value in {"block_count": 1, "context_length": 64, "embedding_length": 32}.items():
            writer.add_uint32(f"llama.{key}", value)
        for key, value in {"head_count": 4, "head_count_kv": 2, "key_length": 8}.items():
            writer.add_uint32(f"llama.attention.{key}", value)
        writer.add_feed_forward_length(32)
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_list([*alphabet, "<s>", "ab", "[PAD258]", "[PAD259]"])
        writer.add_token_types([*[1] * 256, 3, 1, 5, 5])
        writer.add_token_merges(["a b"])
        writer.add_bos_token_id(256)
        writer.add_chat_template("{{ messages }}")
        for index, (name, shape) in enumerate(shapes.items()):
            kind = kinds[index % len(kinds)] if len(shape) > 1 else gguf.GGMLQuantizationType.F32
            values = gguf.quantize(np.ones(shape, np.float32), kind)
            writer.add_tensor(f"{name}.weight", values, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return Path(folder, "x").read_bytes()


@st.composite
def _edited_gguf(draw: st.DrawFn) -> bytes:
    """Draw a GGUF file with bytes of its header replaced, most of them in numbers, or cut off."""
    data = bytearray(_small_gguf())
    header = data.rfind(b"weight") + 64
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, header))
        number = draw(st.sampled_from([0, 1, 2, 8, 9, 32, 2**16, 2**31, 2**32 - 1, 2**63]))
        width = draw(st.sampled_from([1, 4, 8]))
        data[at : at + width] = (number % 256**width).to_bytes(width, "little")
    return bytes(data)


def _read_gguf(path: Path) -> object:
    checkpoint = Checkpoint.open(path)
    with suppress(FbnPruneError):  # values out of the range of the dtype
        return [checkpoint.tensor(name).shape for name in checkpoint.names]
    return None


def _write_and(name: str, read: Callable[[Path], object]) -> Callable[[bytes, Path], object]:
    def read_file(data: bytes, folder: Path) -> object:
        (folder / name).write_bytes(data)
        return read(folder / name)

    return read_file


def _read_work(data: bytes, folder: Path) -> object:
    run = folder / "run"
    run.mkdir()
    (run / RECORD).write_bytes(data)
    (run / "dense.json").write_text("1.5")
    store = Store(run)
    store.bind("text")
    dense = numbers(store, "dense", lambda: 2.5)
    return unfinished_runs(folder), store.words, dense, store.read("layer-00000.safetensors")


_WORK = {
    "format": FORMAT,
    "model": "m",
    "output": "o",
    "calibration": "text",
    "stages": {
        "dense.json": "9f29a130438b81170b92a42650f9a94291ecad60bd47af2a3886e75f7f728725",
        "layer-00000.safetensors": "0",
    },
}
_RECIPES = st.dictionaries(st.sampled_from(list(Recipe.model_fields)) | _TEXT, _VALUES, max_size=4)
_YAML = [
    Recipe().to_yaml().encode(),
    b"tokens: 100\ncalibration: [a.txt, b.jsonl:t]\nsparsity: 0.5\n",
    b"a: &a [x, x]\nb: &b [*a, *a]\ntokens: [*b, *b]\n",
    b"model: !!python/object/apply:os.system [x]\n2001-01-01: .nan\n? [a]\n: b\n",
]
_LINES = [
    b'{"text": "one"}\n{"text": "two", "n": 1}\n\n{"text": "three"}\n',
    b'{"question": "1+1=", "answer": "2"}\n{"text": "\\ud83d\\ude00"}\n',
]


_TURNS = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}]
_CHATS: list[Any] = [
    {"messages": [{"role": "system", "content": "Be brief."}, *_TURNS], "tools": [{"name": "a"}]},
    {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": None}]},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}], "system": "b"},
    {"messages": json.dumps(_TURNS)},
    {"instruction": "Add.", "input": "1 1", "output": "2"},
    {"prompt": _TURNS[:1], "completion": _TURNS[1:]},
    {"prompt": "a", "response": "b"},
    {"question": "a", "answer": "b"},
]
_LISTS: list[Any] = [
    [{"text": "one"}, {"text": "two"}],
    {"version": 1, "data": [{"text": "one"}, {"text": None}]},
    {"text": "one", "of": [{"a": 1}]},
]
_CSV = [
    b'id,text\n1,"one\ntwo"\n2,three\n',
    b'\xef\xbb\xbftext;id\n"a ""b""";1\n',
    b"id\ttext\n1\ta\n",
]
_TEMPLATE = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('turns') }}{% endif %}{{ m.role + ': ' + m.content }}{% endfor %}"
)


@cache
def _templated() -> Any:
    tokenizer = AutoTokenizer.from_pretrained(builtin.model_path())
    tokenizer.chat_template = _TEMPLATE
    return tokenizer


@cache
def _tables() -> list[bytes]:
    """A small Parquet file, and Arrow's two formats."""
    table = pyarrow.table({"text": ["one", None, "three"], "messages": [_TURNS, None, []]})
    written = [io.BytesIO() for _ in range(3)]
    pyarrow.parquet.write_table(table, written[0])
    for sink, opened in zip(
        written[1:], (pyarrow.ipc.new_file, pyarrow.ipc.new_stream), strict=True
    ):
        with opened(sink, table.schema) as writer:
            writer.write_table(table)
    return [one.getvalue() for one in written]


def _compressed() -> list[bytes]:
    text = b"".join(_LINES)
    packed = [pyarrow.compress(text, form, asbytes=True) for form in ("zstd", "lz4")]
    return [gzip.compress(text) * 2, bz2.compress(text), lzma.compress(text), *packed]


def _documents(path: Path) -> object:
    plain = list(read_documents(f"{path}", characters=1000))
    reading = Reading(_templated())
    return plain, list(read_documents(f"{path}", characters=1000, reading=reading))


READERS: dict[str, Reader] = {
    "weights": Reader(_safetensors_like(_small_safetensors()), _read_weights),
    "index": Reader(_json_like([_INDEX]), _read_index),
    "config": Reader(_edited_json([_config()]), _read_config),
    "configs": Reader(_json_like(_configs()), _read_any_config),
    "recipe": Reader(
        _edited_bytes(_YAML) | _RECIPES.map(_as_json), _write_and("recipe.yaml", load_recipe)
    ),
    "text": Reader(
        st.binary(max_size=200) | _edited_bytes([b"One.\n\xc3\xa9"]),
        _write_and("a.txt", _documents),
    ),
    "json lines": Reader(
        _edited_bytes(_LINES) | _VALUES.map(_as_json), _write_and("a.jsonl", _documents)
    ),
    "json": Reader(_json_like(_LISTS) | _VALUES.map(_as_json), _write_and("a.json", _documents)),
    "chats": Reader(_json_like(_CHATS), _write_and("a.json", _documents)),
    "csv": Reader(_edited_bytes(_CSV), _write_and("a.csv", _documents)),
    "compressed": Reader(_edited_bytes(_compressed()), _write_and("a", _documents)),
    "tables": Reader(_edited_bytes(_tables()), _write_and("a", _documents)),
    "task": Reader(
        _edited_bytes(_LINES) | _json_like(_CHATS) | _VALUES.map(_as_json),
        _write_and("a.jsonl", lambda path: [one.fingerprint for one in read_examples(path)]),
    ),
    "task record": Reader(
        _edited_json([{"file": "a", "questions_sha256": ["0" * 64]}]),
        _write_and("task.json", lambda path: recorded_fingerprints(path.parent)),
    ),
    "work": Reader(_json_like([_WORK]), _read_work),
    "quantization": Reader(_json_like(_quantizations()), _read_quantization),
    "quantized weights": Reader(_safetensors_like(_small_quantized()), _read_quantized),
    "gguf": Reader(
        st.deferred(lambda: _edited_gguf() | _edited_bytes([_small_gguf()])),
        _write_and("m.gguf", _read_gguf),
    ),
    "networks": Reader(
        _safetensors_like(_small_networks()),
        _write_and("networks.safetensors", FunctionalNetworks.load),
    ),
}


def fuzz(reader: Reader, examples: int, *, seconds: float | None = None) -> int:
    """Read at least `examples` inputs, for at least `seconds` of processor time; return how many were read."""
    count = 0

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        verbosity=Verbosity.quiet,
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )
    @given(reader.inputs)
    def read(data: bytes) -> None:
        nonlocal count
        count += 1
        reader(data)

    start = time.process_time()
    while True:
        read()
        if seconds is None or time.process_time() - start >= seconds:
            return count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("readers", nargs="*", metavar="READER", help=", ".join(READERS))
    parser.add_argument("--minutes", type=float, default=10.0)
    arguments = parser.parse_args()
    if unknown := [name for name in arguments.readers if name not in READERS]:
        parser.error(f"no reader {unknown[0]!r}; there are {', '.join(READERS)}")
    with open("/proc/self/statm", encoding="ascii") as statm:
        held = int(statm.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + MEMORY_LIMIT, held + MEMORY_LIMIT))
    for name in arguments.readers or READERS:
        try:
            count = fuzz(READERS[name], 1000, seconds=60 * arguments.minutes)
        except Exception as error:
            notes = " ".join(getattr(error, "__notes__", []))
            print(f"{name}: {type(error).__name__}: {error} {notes}", flush=True)
            raise
        print(f"{name}: {count} inputs in {arguments.minutes:g} minutes, no crash", flush=True)


if __name__ == "__main__":
    main()
