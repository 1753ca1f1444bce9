"""Answer requests for several tasks in one batch, each row through the neurons of its own task.

Usage: python examples/mixed_requests.py BUNDLE TASK=PROMPT... [--tokens 40]

BUNDLE is a folder that `fbn-prune bundle` wrote. The script then answers each request alone, inside the context of its
task, and shows that the answers are the same.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoTokenizer

from fbn_prune.serving import Bundle


def main() -> None:
    """Print one answer on each line, then the memory of the tasks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle")
    parser.add_argument("requests", nargs="+", metavar="TASK=PROMPT")
    parser.add_argument("--tokens", type=int, default=40)
    options = parser.parse_args()
    tasks, prompts = zip(*(one.split("=", 1) for one in options.requests), strict=True)
    bundle = Bundle.open(Path(options.bundle))
    tokenizer = AutoTokenizer.from_pretrained(bundle.base.path, padding_side="left")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    served = bundle.serve(dtype=torch.float32)
    model, settings = served.model, {"max_new_tokens": options.tokens, "do_sample": False}

    batch = tokenizer(list(prompts), return_tensors="pt", padding=True, return_token_type_ids=False)
    together = model.generate(**batch, **settings, network_ids=served.ids(tasks))
    for row, (task, prompt) in enumerate(zip(tasks, prompts, strict=True)):
        answer = tokenizer.decode(together[row], skip_special_tokens=True)
        print(f"{task}: {answer!r}")
        alone = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        with model.networks(task):
            same = tokenizer.decode(
                model.generate(**alone, **settings)[0], skip_special_tokens=True
            )
        print(f"{' ' * len(task)}  alone {'the same' if same == answer else repr(same)}")
    memory = served.memory
    print(
        f"weights {memory.weights:,} bytes; lists {memory.lists:,}; copies {memory.copies:,}; "
        + ", ".join(f"{name} {cost:,}" for name, cost in memory.corrections.items())
    )


if __name__ == "__main__":
    main()
