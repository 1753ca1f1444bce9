"""Check converted models in llama.cpp: the same token ids for a text, the same logits, the same greedy answer.

    pip install gguf llama-cpp-python      # the latter compiles llama.cpp, which takes minutes
    python eval/robustness/gguf_vs_transformers.py --model DIR --model DIR ... [--results FILE.json]

Each checkpoint, uniform or ragged, is converted with float32 matrices, and llama.cpp keeps its key-value cache in
float32, so that only the order of additions differs. The script ends with exit code 1 if token ids or greedy tokens
differ, or if a logit differs by more than `--tolerance` times the logits' standard deviation.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from fbn_prune.data import builtin
from fbn_prune.export.to_gguf import write as write_gguf
from fbn_prune.model.checkpoint import Checkpoint

TEXTS = (
    "Once upon a time, there was a little girl named Lily. She loved to play outside",
    "In this first year , he was praised by the Senate for",
    "import os\n\n\ndef read(path):\n    with open(path) as file:\n",
    "Q: 7 + 11 = ? A: 18\nQ: 46 - 21 = ? A:",
)
GGML_TYPE_F32 = 0


def greedy(model: Any, ids: list[int], count: int) -> list[int]:
    """Return the `count` greedy tokens that follow `ids`."""
    answer = list(ids)
    for _ in range(count):
        logits = model(torch.tensor([answer]), use_cache=False).logits[0, -1]
        answer.append(int(logits.argmax()))
    return answer[len(ids) :]


def greedy_llama_cpp(llama: Any, ids: list[int], count: int) -> list[int]:
    llama.reset()
    llama.eval(ids)
    answer: list[int] = []
    for _ in range(count):
        answer.append(int(np.argmax(llama.scores[llama.n_tokens - 1])))
        llama.eval(answer[-1:])
    return answer


def equal_tokens(ours: list[int], theirs: list[int]) -> int:
    """Return how many tokens agree before the first difference."""
    pairs = enumerate(zip(ours, theirs, strict=True))
    return next((index for index, (one, other) in pairs if one != other), len(ours))


def compare(checkpoint: Checkpoint, gguf: Path, tokens: int) -> dict[str, Any]:
    from llama_cpp import Llama

    reference = checkpoint.load_model("cpu", torch.float32)
    tokenizer = checkpoint.load_tokenizer()
    texts = {text: tokenizer(text)["input_ids"] for text in TEXTS}
    settings = {"logits_all": True, "verbose": False, "n_threads": 1}
    settings |= {"type_k": GGML_TYPE_F32, "type_v": GGML_TYPE_F32}
    context = max(len(ids) for ids in texts.values()) + tokens + 1
    llama = Llama(str(gguf), n_ctx=context, **settings)
    found = []
    for text, ids in texts.items():
        expected = reference(torch.tensor([ids]), use_cache=False).logits[0].numpy()
        llama.reset()
        llama.eval(ids)
        logits = np.array(llama.scores[: len(ids)])[:, : expected.shape[1]]
        ours, theirs = greedy(reference, ids, tokens), greedy_llama_cpp(llama, ids, tokens)
        found.append(
            {
                "text": text,
                "same_token_ids": llama.tokenize(text.encode(), special=False) == ids,
                "largest_logit_difference": float(np.abs(logits - expected).max()),
                "logit_standard_deviation": float(expected.std()),
                "greedy_tokens_equal": equal_tokens(ours, theirs),
            }
        )
    return {
        "architecture": llama.metadata["general.architecture"],
        "widths": checkpoint.family.widths(checkpoint.config),
        "greedy_tokens": tokens,
        "texts": found,
    }


@torch.inference_mode()
def main(
    model: Annotated[
        list[Path], typer.Option(help="A checkpoint or `builtin`; repeat for several.")
    ],
    tokens: Annotated[int, typer.Option(help="Greedy tokens to compare.")] = 100,
    tolerance: Annotated[
        float, typer.Option(help="Largest difference of a logit, in standard deviations.")
    ] = 1e-3,
    results: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
) -> None:
    table: dict[str, Any] = {}
    good = True
    for folder in model:
        source = builtin.model_path() if str(folder) == "builtin" else folder
        checkpoint = Checkpoint.open(str(source))
        with tempfile.TemporaryDirectory() as temporary:
            gguf = Path(temporary, "model.gguf")
            write_gguf(checkpoint, gguf, dtype="f32")
            table[folder.name] = facts = compare(checkpoint, gguf, tokens)
        good &= all(
            one["same_token_ids"]
            and one["greedy_tokens_equal"] == tokens
            and one["largest_logit_difference"] <= tolerance * one["logit_standard_deviation"]
            for one in facts["texts"]
        )
        print(json.dumps({folder.name: facts}, indent=1))
    if results is not None:
        results.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    if not good:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
