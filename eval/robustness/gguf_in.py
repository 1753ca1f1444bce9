"""Compare GGUF files as fbn-prune reads them with what transformers makes of them: tokens, weights and logits.

    python eval/robustness/gguf_in.py FILE.gguf ... [--results RESULTS.json]

Weights are compared in float32, in which both have the exact values that the `gguf` package computes. Logits are
computed in float32 from weights that both have rounded to `--dtype`, as fbn-prune would write them; what that rounding
changes is shown beside it. The script ends with exit code 1 if token ids or weights differ, or if a logit differs by
more than `--tolerance` times the logits' standard deviation.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from transformers import AutoModelForCausalLM, AutoTokenizer

from fbn_prune.model.checkpoint import Checkpoint
from fbn_prune.model.gguf_file import open_gguf
from fbn_prune.model.gguf_parts import find_gguf
from fbn_prune.model.quantized import PLAIN_DTYPES

TEXTS = (
    "Once upon a time, there was a little girl named Lily. She loved to play outside",
    "import os\n\n\ndef read(path):\n    with open(path) as file:\n        return file.read()",
    "<|im_start|>user\nWhat is 46 - 21? Façade, 日本語 and 👍.<|im_end|>\n<|im_start|>assistant\n",
)


def compare(file: Path, dtype: torch.dtype) -> dict[str, Any]:
    started = time.perf_counter()
    rounded = Checkpoint.of_gguf(open_gguf(file, dtype))
    rounded.check()
    opened = time.perf_counter()
    tokenizer = rounded.load_tokenizer()
    place = {"gguf_file": file.name, "local_files_only": True}
    theirs: Any = AutoTokenizer.from_pretrained(file.parent, **place)
    texts = [tokenizer(text)["input_ids"] for text in TEXTS]
    same_ids = texts == [theirs(text)["input_ids"] for text in TEXTS]
    model: Any = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **place)
    model.eval()
    exact = Checkpoint.of_gguf(open_gguf(file, torch.float32))
    weights = dict(model.named_parameters())
    unequal = [n for n in exact.names if not torch.equal(exact.tensor(n), weights.pop(n))]
    unequal += sorted(weights)
    exactly = logits(model, texts)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype).float()
    expected = logits(model, texts)
    del model, weights
    found = logits(rounded.load_model("cpu", torch.float32), texts)
    assert rounded.gguf is not None
    return {
        "architecture": rounded.gguf.model.arch,
        "quantization_types": list(rounded.gguf.types),
        "parameters": rounded.total_parameters,
        "seconds_to_open": round(opened - started, 1),
        "same_token_ids": same_ids,
        "same_chat_template": tokenizer.chat_template == theirs.chat_template,
        "unequal_weights": unequal,
        "dtype": str(dtype).removeprefix("torch."),
        "largest_logit_difference": float((found - expected).abs().max()),
        "largest_difference_by_rounding": float((expected - exactly).abs().max()),
        "logit_standard_deviation": float(expected.std()),
    }


def logits(model: Any, texts: list[list[int]]) -> torch.Tensor:
    """Return the logits of all texts, [tokens, vocabulary]."""
    return torch.cat([model(torch.tensor([ids]), use_cache=False).logits[0] for ids in texts])


@torch.inference_mode()
def main(
    files: Annotated[list[Path], typer.Argument(help="GGUF files.")],
    dtype: Annotated[
        Literal["bfloat16", "float16", "float32"], typer.Option(help="Dtype of the weights.")
    ] = "float16",
    tolerance: Annotated[
        float, typer.Option(help="Largest difference of a logit, in standard deviations.")
    ] = 1e-3,
    results: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
) -> None:
    table: dict[str, Any] = {}
    good = True
    for path in files:
        file = find_gguf(path)
        if file is None:
            raise typer.BadParameter(f"{path} is no GGUF file")
        table[file.name] = facts = compare(file, PLAIN_DTYPES[dtype])
        print(json.dumps({file.name: facts}, indent=1))
        good &= (
            facts["same_token_ids"]
            and not facts["unequal_weights"]
            and facts["largest_logit_difference"] <= tolerance * facts["logit_standard_deviation"]
        )
    if results is not None:
        results.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    if not good:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
