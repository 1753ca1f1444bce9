"""Times `generate` of a Llama-3.1-8B-shaped model, whole and through half of its neurons, on a GPU.

Usage: python kernels/bench/bench_generate.py [--share 0.5] [--output generate.json]

Random weights, bfloat16, batch 1, greedy. The gathered model holds the whole weights, its `down`
transposed. Decoding is run in two ways. `generate` is transformers' own, with a static cache, which
it compiles and replays as CUDA graphs; between two tokens it waits for the GPU and does its
bookkeeping in Python. `captured` is the same compiled step with the choice of the token inside one
CUDA graph, replayed without waiting, as serving engines do; every round goes on from the prompt. In
both the prompt's pass falls out: the time of a token is a difference between a long and a short
answer, or that of a replay. `--descent` lets the compiler search tiles by coordinate descent; it then
makes products with one row itself instead of calling cuBLAS, for the dense model too.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import torch._inductor.config
from gpu_common import environment
from sets import draw_set
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

from fbn_kernels import Kind, NeuronSet, gathered_mlp

logger = logging.getLogger("bench")

WAYS = ("generate", "captured")


class GatheredMlp(nn.Module):
    """A Llama MLP over whole weights that runs through one set."""

    def __init__(self, mlp: Any, neurons: NeuronSet) -> None:
        super().__init__()
        self.up, self.gate = mlp.up_proj.weight, mlp.gate_proj.weight
        self.down_t = nn.Parameter(mlp.down_proj.weight.detach().t().contiguous(), False)
        self.neurons = neurons

    def forward(self, x: Tensor) -> Tensor:
        """Run x [..., width] through the set."""
        return gathered_mlp(x, self.up, self.down_t, self.neurons, gate=self.gate)


def seconds_a_token(
    model: LlamaForCausalLM, prompt: Tensor, short: int, long: int, rounds: int
) -> list[float]:
    """Return the seconds of a decoded token, one figure a round, after warming up."""

    def answer(tokens: int) -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        model.generate(
            prompt,
            max_new_tokens=tokens,
            do_sample=False,
            cache_implementation="static",
            pad_token_id=0,
        )
        torch.cuda.synchronize()
        return time.perf_counter() - start

    # The longest first: the static cache is made once for it and kept.
    for tokens in (long, short, long):
        logger.info("warm-up: %.1f s", answer(tokens))
    return [(answer(long) - answer(short)) / (long - short) for _ in range(rounds)]


def seconds_a_replay(
    model: LlamaForCausalLM, prompt: Tensor, tokens: int, rounds: int
) -> list[float]:
    """Return the seconds of a decoded token when the whole step is one graph, a figure a round."""
    # Before the first round: one token of the prompt's pass, three calls, and one for the graph.
    cache = StaticCache(config=model.config, max_cache_len=prompt.shape[1] + tokens + 5)
    filled = model(prompt, past_key_values=cache, use_cache=True, logits_to_keep=1)
    token = filled.logits[:, -1:].argmax(-1)

    def step(token: Tensor) -> Tensor:
        logits = model(token, past_key_values=cache, use_cache=True).logits
        return logits[:, -1:].argmax(-1)

    compiled = torch.compile(step, fullgraph=True)
    start = time.perf_counter()
    for _ in range(3):
        token.copy_(compiled(token))
    torch.cuda.synchronize()
    logger.info("compiled in %.1f s", time.perf_counter() - start)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        token.copy_(compiled(token))
    times = []
    for _ in range(rounds):
        for layer in cache.layers:
            layer.cumulative_length.fill_(prompt.shape[1])
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(tokens):
            graph.replay()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - start) / tokens)
    return times


def main() -> None:
    """Run the comparison and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--neurons", type=int, default=14336)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--vocabulary", type=int, default=128256)
    parser.add_argument("--share", type=float, default=0.5, help="share of neurons kept")
    parser.add_argument("--kind", default="rows", choices=[kind.value for kind in Kind])
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--tokens", type=int, nargs=2, default=(32, 160))
    parser.add_argument("--ways", nargs="+", default=WAYS, choices=WAYS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--descent", action="store_true", help="search the compiler's own tiles")
    parser.add_argument("--output", type=Path, default=Path("generate.json"))
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if not torch.cuda.is_available():
        parser.error("this benchmark needs a GPU; bench_cpu.py is the one for CPUs")
    torch._inductor.config.coordinate_descent_tuning = options.descent
    device = torch.device("cuda", torch.cuda.current_device())
    config = LlamaConfig(
        hidden_size=options.width,
        intermediate_size=options.neurons,
        num_hidden_layers=options.layers,
        num_attention_heads=options.width // 128,
        num_key_value_heads=options.width // 512,
        vocab_size=options.vocabulary,
        max_position_embeddings=8192,
        eos_token_id=None,
        bos_token_id=0,
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with device:
        model = LlamaForCausalLM(config).eval()
    torch.set_default_dtype(torch.float32)
    prompt = torch.randint(0, options.vocabulary, (1, options.prompt), device=device)
    times: dict[str, dict[str, list[float]]] = {way: {} for way in options.ways}
    with torch.no_grad():
        for name in ("dense", "gathered"):
            if name == "gathered":
                for number, layer in enumerate(model.model.layers):
                    neurons = draw_set(options.neurons, options.share, Kind(options.kind), number)
                    layer.mlp = GatheredMlp(layer.mlp, neurons.to(device))
                model.__dict__.pop("_compiled_call", None)
            for way, kept in times.items():
                torch.compiler.reset()
                if way == "generate":
                    kept[name] = seconds_a_token(model, prompt, *options.tokens, options.rounds)
                else:
                    kept[name] = seconds_a_replay(
                        model, prompt, max(options.tokens), options.rounds
                    )
                logger.info("%s, %s: %s", way, name, [f"{1e3 * one:.3f} ms" for one in kept[name]])
    results = {}
    for way, kept in times.items():
        medians = {name: 1e3 * statistics.median(rounds) for name, rounds in kept.items()}
        results[way] = {
            "milliseconds_a_token": medians,
            "speed_up": medians["dense"] / medians["gathered"],
            "all_milliseconds": {name: [1e3 * one for one in all_] for name, all_ in kept.items()},
        }
        logger.info("%s: %s, %.2f times as fast", way, medians, results[way]["speed_up"])
    report = {
        "environment": environment(device),
        "options": {name: str(value) for name, value in vars(options).items()},
        "parameters": sum(one.numel() for one in model.parameters()),
        **results,
    }
    options.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
