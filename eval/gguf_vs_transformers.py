"""Check a converted model in llama.cpp itself: the same tokens of a text, the same logits, the same greedy answer.

    pip install gguf llama-cpp-python      # the latter builds llama.cpp: minutes
    fbn-prune convert --to gguf --gguf-type f32 --model DIR --output model.gguf
    python eval/gguf_vs_transformers.py --model DIR --gguf model.gguf

Prints what was found, and leaves with 1 where greedy tokens differ or a logit is off by more than `--tolerance`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from fbn_prune.model.checkpoint import Checkpoint

TEXT = "Once upon a time, there was a little girl named Lily. She loved to play outside"


def greedy(model: Any, ids: list[int], count: int) -> list[int]:
    """The `count` tokens that follow `ids`, the most probable each time."""
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


@torch.inference_mode()
def main(
    model: Annotated[Path, typer.Option(help="The checkpoint that was converted.")],
    gguf: Annotated[Path, typer.Option(help="The file it was converted to.")],
    text: Annotated[str, typer.Option(help="What both read.")] = TEXT,
    tokens: Annotated[int, typer.Option(help="Tokens that both write.")] = 100,
    tolerance: Annotated[float, typer.Option(help="Largest difference of a logit.")] = 0.05,
) -> None:
    from llama_cpp import Llama

    checkpoint = Checkpoint.open(model, ragged=True)
    reference = checkpoint.load_model("cpu", torch.float32)
    ids = checkpoint.load_tokenizer()(text)["input_ids"]
    context = len(ids) + tokens + 1
    llama = Llama(str(gguf), n_ctx=context, logits_all=True, verbose=False, n_threads=1)
    theirs = llama.tokenize(text.encode(), add_bos=True, special=False)
    llama.eval(ids)
    expected = reference(torch.tensor([ids]), use_cache=False).logits[0].numpy()
    found = np.array(llama.scores[: len(ids)])[:, : expected.shape[1]]
    worst = float(np.abs(found - expected).max())
    ours, answer = greedy(reference, ids, tokens), greedy_llama_cpp(llama, ids, tokens)
    same = next((i for i, (a, b) in enumerate(zip(ours, answer, strict=True)) if a != b), tokens)
    facts = {
        "same_token_ids_of_the_text": theirs == ids,
        "largest_logit_difference": worst,
        "logit_standard_deviation": float(expected.std()),
        "greedy_tokens_equal": same,
        "of": tokens,
    }
    print(json.dumps(facts, indent=1))
    if same < tokens or worst > tolerance or theirs != ids:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
