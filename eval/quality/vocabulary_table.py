"""Print what `fbn-prune trim-vocabulary` saves, and hold its promises against stock transformers and llama.cpp.

    python eval/quality/vocabulary_table.py --model DIR --texts train.txt [--python] --held-out WikiText=test.txt

The vocabulary is chosen from `--texts` and, with `--python`, from the Python files of this installation but every
twentieth. Of each held-out text it shows the share of documents with the same pieces and the growth in tokens. A
document is an article (WikiText), a story (TinyStories), what is between blank lines (other text), or a Python file. On
the first documents of each text with the same pieces, both models run in float32: the loss must not rise, and the most
likely token must be the same wherever the whole model says a kept one.
With `xllamacpp` installed, llama.cpp loads both as GGUF and continues the same prompts, greedily.

The measurements are taken with code of their own, not with that of the command.
"""

from __future__ import annotations

import json
import random
import re
import sysconfig
import tempfile
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from fbn_prune.api import convert, trim_vocabulary

ARTICLE = re.compile(r"^ (?== [^=])", re.MULTILINE)
LONGEST = 512
"""Tokens of a document on which the models are compared."""
PROMPT, CONTINUATION = 24, 48
PYTHON_CHARACTERS = 10**8


def main(
    model: Annotated[Path, typer.Option(help="Checkpoint folder.")],
    texts: Annotated[list[str], typer.Option(help="Text that the vocabulary is chosen from.")],
    held_out: Annotated[list[str], typer.Option(help="NAME=FILE to measure on; repeat.")],
    python: Annotated[bool, typer.Option(help="Also Python files of this installation.")] = False,
    min_count: int = 1,
    ascii: Annotated[bool, typer.Option(help="Keep all tokens of ASCII characters.")] = False,
    documents: Annotated[int, typer.Option(help="Documents of each text to run.")] = 6,
    output: Annotated[Path | None, typer.Option(help="JSON to add the model to.")] = None,
) -> None:
    """Trim one model's vocabulary and measure the result."""
    with tempfile.TemporaryDirectory() as place:
        small = Path(place) / "small"
        sets = {name: list(split(Path(file))) for name, _, file in map(partition, held_out)}
        sources = list(texts)
        if python:
            sources.append(str(Path(place) / "python.jsonl"))
            sets["Python files"] = python_files(Path(sources[-1]))
        result = trim_vocabulary(
            str(model), small, sources, min_count=min_count, ascii=ascii, held_out=texts[:1]
        )
        facts = result.to_json()
        name = f"{model.name}{', ASCII kept' if ascii else ''}"
        facts |= {"model": name, "min_count": min_count, "python": python}
        facts |= {"texts": [Path(text).name for text in texts]}
        del facts["output"]
        facts["vocabulary"] = {
            key: facts["vocabulary"][key]
            for key in ("tokens_before", "tokens_after", "text_tokens")
        }
        facts["held_out"], chosen = pieces(model, small, sets)
        chosen = {name: found[:documents] for name, found in chosen.items()}
        facts["models"] = compared(model, small, chosen)
        facts["llama_cpp"] = in_llama_cpp(model, small, chosen, Path(place))
    show(facts)
    if output is not None:
        found = json.loads(output.read_text(encoding="utf-8")) if output.exists() else {}
        found[name] = facts
        output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def partition(named: str) -> tuple[str, str, str]:
    return named.partition("=")


def split(path: Path) -> Iterator[str]:
    """Yield the documents of a text file."""
    text = path.read_text(encoding="utf-8")
    parts = ARTICLE.split(text)
    if len(parts) < 10:
        parts = (
            text.split("<|endoftext|>") if "<|endoftext|>" in text else re.split(r"\n\s*\n", text)
        )
    yield from (part for part in parts if part.strip())


def python_files(path: Path) -> list[str]:
    """Write the Python files of this installation to `path`, and return those that are held out, one in twenty."""
    folders = {sysconfig.get_paths()[key] for key in ("stdlib", "purelib", "platlib")}
    files = sorted({file for folder in folders for file in Path(folder).rglob("*.py")})
    random.Random(0).shuffle(files)
    held: list[str] = []
    written = 0
    with path.open("w", encoding="utf-8") as lines:
        for number, file in enumerate(files):
            try:
                text = file.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError):
                continue
            if not text.strip() or "\0" in text or len(text) > 200_000:
                continue
            if number % 20 == 0:
                held.append(text)
            elif written < PYTHON_CHARACTERS:
                lines.write(json.dumps({"text": text}) + "\n")
                written += len(text)
    return held[:500]


def pieces(
    model: Path, small: Path, sets: dict[str, list[str]]
) -> tuple[dict[str, Any], dict[str, list[list[int]]]]:
    """Compare the pieces of every document; also return the new ids of those documents that have the same."""
    whole, trimmed = (AutoTokenizer.from_pretrained(folder) for folder in (model, small))
    old = old_ids(whole, trimmed)
    facts: dict[str, Any] = {}
    chosen: dict[str, list[list[int]]] = {}
    for name, found in sets.items():
        same, inside, before, after, lost = [], 0, 0, 0, 0
        for text in found:
            first = whole(text, add_special_tokens=False, verbose=False)["input_ids"]
            second = trimmed(text, add_special_tokens=False, verbose=False)["input_ids"]
            lost += trimmed.decode(second) != whole.decode(first)
            if first == [old[token] for token in second]:
                same.append(second)
                inside += len(first)
            else:
                before += len(first)
                after += len(second)
        facts[name] = {
            "documents": len(found),
            "identical": len(same),
            "identical_share": len(same) / len(found),
            "tokens": inside + before,
            "growth_of_the_others": after / before - 1 if before else None,
            "growth_of_all": (inside + after) / (inside + before) - 1,
            "lost_in_decoding": lost,
        }
        chosen[name] = [ids for ids in same if len(ids) > PROMPT + CONTINUATION]
    return facts, chosen


def old_ids(whole: Any, trimmed: Any) -> list[int]:
    """The id that each token had before."""
    vocabulary = sorted((new, text) for text, new in trimmed.get_vocab().items())
    before = whole.get_vocab()
    return [before[text] for _, text in vocabulary]


@torch.inference_mode()
def compared(model: Path, small: Path, chosen: dict[str, list[list[int]]]) -> dict[str, Any]:
    """Run both models on the same documents."""
    old = torch.tensor(old_ids(*(AutoTokenizer.from_pretrained(one) for one in (model, small))))
    new = {token: index for index, token in enumerate(old.tolist())}
    dense, cut = (
        AutoModelForCausalLM.from_pretrained(one, dtype=torch.float32) for one in (model, small)
    )
    facts = {}
    for name, found in chosen.items():
        losses, rises, furthest = [], [], 0.0
        positions = kept = agreed = 0
        for ids in found:
            tokens = torch.tensor([ids[:LONGEST]])
            whole, trimmed = dense(old[tokens]).logits[0], cut(tokens).logits[0]
            furthest = max(furthest, float((whole[:, old] - trimmed[:, : len(old)]).abs().max()))
            before = cross_entropy(whole[:-1], old[tokens[0, 1:]]).item()
            after = cross_entropy(trimmed[:-1], tokens[0, 1:]).item()
            losses.append(before)
            rises.append(after - before)
            for said, now in zip(
                whole.argmax(-1).tolist(), trimmed.argmax(-1).tolist(), strict=True
            ):
                positions += 1
                if said in new:
                    kept += 1
                    agreed += now == new[said]
        facts[name] = {
            "documents": len(found),
            "dense_loss": sum(losses) / max(len(losses), 1),
            "mean_rise": sum(rises) / max(len(rises), 1),
            "largest_rise": max(rises, default=None),
            "largest_difference_of_logits": furthest,
            "positions": positions,
            "dense_says_a_kept_token": kept,
            "same_token_there": agreed,
        }
    return facts


def in_llama_cpp(
    model: Path, small: Path, chosen: dict[str, list[list[int]]], place: Path
) -> dict[str, Any] | None:
    """Continue the same prompts with both models in llama.cpp; None if its binding is not installed."""
    if find_spec("xllamacpp") is None:
        return None
    old = old_ids(*(AutoTokenizer.from_pretrained(one) for one in (model, small)))
    new = {token: index for index, token in enumerate(old)}
    prompts = [ids[:PROMPT] for found in chosen.values() for ids in found]
    said = {}
    for name, folder, asked in (
        ("dense", model, [[old[token] for token in ids] for ids in prompts]),
        ("small", small, prompts),
    ):
        file = place / f"{name}.gguf"
        convert(str(folder), file)
        said[name] = continuations(file, asked)
    same = tokens = 0
    for before, after in zip(said["dense"], said["small"], strict=True):
        kept = next((i for i, token in enumerate(before) if token not in new), len(before))
        tokens += kept
        same += sum(new[a] == b for a, b in zip(before[:kept], after[:kept], strict=False))
    return {"prompts": len(prompts), "kept_tokens_said": tokens, "same": same}


def continuations(file: Path, prompts: Sequence[list[int]]) -> list[list[int]]:
    """Return the tokens that llama.cpp puts after each prompt."""
    import xllamacpp

    settings = xllamacpp.CommonParams()
    settings.model.path = str(file)
    settings.n_ctx, settings.n_parallel, settings.n_gpu_layers = 256, 1, 0
    settings.warmup, settings.verbosity = False, 0
    server = xllamacpp.Server(settings)
    found = []
    for prompt in prompts:
        asked = {"prompt": prompt, "n_predict": CONTINUATION, "temperature": 0, "top_k": 1}
        answer = server.handle_completions(
            {**asked, "n_probs": 1, "cache_prompt": False, "ignore_eos": True}
        )
        answer = json.loads(answer) if isinstance(answer, str) else answer
        found.append([said["id"] for said in answer["choices"][0]["logprobs"]["content"]])
    return found


def show(facts: dict[str, Any]) -> None:
    tokens, change = facts["vocabulary"], facts["parameters_after"] / facts["parameters_before"] - 1
    title = (
        f"{facts['model']}: {tokens['tokens_after']:,} of {tokens['tokens_before']:,} tokens, "
        f"{facts['parameters_after']:,} of {facts['parameters_before']:,} parameters ({change:+.1%})"
    )
    headings = (
        "same pieces",
        "growth, others",
        "growth, all",
        "dense loss",
        "loss rise",
        "same token",
    )
    table = Table("held-out text", *headings, title=title)
    for name, found in facts["held_out"].items():
        ran, growth = facts["models"][name], found["growth_of_the_others"]
        table.add_row(
            f"{name} ({found['documents']:,})",
            f"{found['identical_share']:.2%}",
            "" if growth is None else f"{growth:+.2%}",
            f"{found['growth_of_all']:+.3%}",
            f"{ran['dense_loss']:.4f}",
            f"{ran['mean_rise']:+.4f}",
            f"{ran['same_token_there']} of {ran['dense_says_a_kept_token']}",
        )
    Console(width=130).print(table)
    print(f"llama.cpp: {facts['llama_cpp']}")


if __name__ == "__main__":
    typer.run(main)
