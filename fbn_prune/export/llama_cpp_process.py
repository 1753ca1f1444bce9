"""A process that runs llama.cpp on prompts: a JSON request on standard input, an answer on standard output.

It imports nothing of this package, so it starts quickly and can be run as a file.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

ANSWER = "fbn-prune-answer:"
"""Before the answer, because llama.cpp may print too."""


FAILED = 3
"""Exit code if the binding, not the file, is the trouble."""


def main() -> None:
    """Answer one request: its prompts are continued greedily, with the most probable tokens at each step."""
    request = json.load(sys.stdin)
    try:
        settings = _settings(request)
    except Exception as error:  # the binding changes with llama.cpp
        print(f"error: {error}", file=sys.stderr)
        sys.exit(FAILED)
    server = settings()
    try:
        answers = [_answer(server, prompt, request) for prompt in request["prompts"]]
    except Exception as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(FAILED)
    print(ANSWER + json.dumps(answers), flush=True)


def _settings(request: dict[str, Any]) -> Callable[[], Any]:
    """Return a function that loads the file."""
    import xllamacpp

    settings = xllamacpp.CommonParams()
    settings.model.path = request["path"]
    settings.n_ctx = request["context"]
    settings.n_parallel = 1
    settings.n_gpu_layers = 0
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = request["threads"]
    settings.warmup = False
    settings.fit_params = False
    # The defaults, a cache of float16 and attention on it, would change the third digit of the logits.
    settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    off = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    settings.flash_attn_type = off
    return lambda: xllamacpp.Server(settings)


def _answer(server: Any, prompt: list[int], request: dict[str, Any]) -> list[Any]:
    """Return the most probable tokens of each step, as pairs of id and log-probability, the chosen one first."""
    steps: list[Any] = []
    for _ in range(request["tokens"]):
        # The server reports nothing for tokens that end text or are part of a character. So it is made to choose a
        # plain one; the probabilities that it reports are those before the choice.
        reply = server.handle_completions(
            {
                "prompt": prompt + [step[0][0] for step in steps],
                "n_predict": 1,
                "n_probs": request["compared"],
                "logit_bias": [[request["plain"], 1e6]],
                "cache_prompt": True,
            }
        )
        (content,) = reply["choices"][0]["logprobs"]["content"]
        steps.append([[token["id"], token["logprob"]] for token in content["top_logprobs"]])
    return steps


if __name__ == "__main__":
    main()
