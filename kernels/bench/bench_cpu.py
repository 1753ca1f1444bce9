"""Times a dense, a cut and a gathered model side by side on a CPU: decode, prefill, task switch.

Usage: python kernels/bench/bench_cpu.py [--dtype bfloat16] [--threads 2] [--output cpu.json]

The models are Llamas with random weights, by default of the shape of Llama-3.2-1B. `cut` has the kept
neurons alone, as an exported checkpoint; `gathered` runs the whole checkpoint through sets of the
same neurons. Before anything is timed, the gathered model must generate the cut one's tokens. Rounds
take turns between the models, so that a busy machine slows all alike; the medians are reported.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from sets import draw_set
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from fbn_kernels import Kind, NeuronSet, compact_cache, gathered_mlp

logger = logging.getLogger("bench")

TASKS = 8


class GatheredMlp(nn.Module):
    """A Llama MLP over whole weights that runs through the set of the current task."""

    def __init__(self, up: Tensor, gate: Tensor, down_t: Tensor, sets: list[NeuronSet]) -> None:
        super().__init__()
        self.up, self.gate, self.down_t = up, gate, down_t
        self.sets = sets
        self.task = 0

    def forward(self, x: Tensor) -> Tensor:
        """Run x [..., width] through the current task's neurons."""
        return gathered_mlp(x, self.up, self.down_t, self.sets[self.task], gate=self.gate)


@dataclass
class Models:
    """The models compared, which share all weights but the MLPs'."""

    dense: LlamaForCausalLM
    cut: LlamaForCausalLM
    gathered: LlamaForCausalLM

    def named(self) -> dict[str, LlamaForCausalLM]:
        """The models by name."""
        return vars(self)

    def switch(self, task: int) -> None:
        """Send the gathered model through another task's sets."""
        for layer in self.gathered.model.layers:
            layer.mlp.task = task


def build(config: LlamaConfig, dtype: torch.dtype, share: float, kind: Kind) -> Models:
    """Draw a dense model, and cut and wrap it without copying what they have in common."""
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    dense = LlamaForCausalLM(config).eval()
    with torch.device("meta"):
        cut, gathered = (LlamaForCausalLM(config).eval() for _ in range(2))
    torch.set_default_dtype(torch.float32)
    for other in (cut, gathered):
        other.model.rotary_emb = dense.model.rotary_emb
        other.load_state_dict(dense.state_dict(), assign=True)
        other.tie_weights()
    neurons = config.intermediate_size
    for number, layer in enumerate(dense.model.layers):
        whole = layer.mlp
        sets = [draw_set(neurons, share, kind, number * TASKS + task) for task in range(TASKS)]
        rows = sets[0].rows()
        gathered.model.layers[number].mlp = GatheredMlp(
            whole.up_proj.weight.detach(),
            whole.gate_proj.weight.detach(),
            whole.down_proj.weight.detach().t().contiguous(),
            sets,
        )
        small = cut.model.layers[number].mlp
        for linear, weight in (
            (small.up_proj, whole.up_proj.weight[rows]),
            (small.gate_proj, whole.gate_proj.weight[rows]),
            (small.down_proj, whole.down_proj.weight[:, rows].contiguous()),
        ):
            linear.weight = nn.Parameter(weight.detach(), requires_grad=False)
    return Models(dense, cut, gathered)


def decode(model: LlamaForCausalLM, prompt: Tensor, tokens: int) -> tuple[Tensor, float]:
    """Generate greedily; return the tokens and the seconds a token after the first."""
    out = model(prompt, use_cache=True)
    cache, last = out.past_key_values, out.logits[:, -1:].argmax(-1)
    chosen, start = [last], time.perf_counter()
    for _ in range(tokens):
        out = model(last, past_key_values=cache, use_cache=True)
        last = out.logits[:, -1:].argmax(-1)
        chosen.append(last)
    return torch.cat(chosen, 1), (time.perf_counter() - start) / tokens


def prefill(model: LlamaForCausalLM, prompt: Tensor) -> float:
    """Return the seconds of one pass over a prompt."""
    start = time.perf_counter()
    model(prompt, use_cache=True, logits_to_keep=1)
    return time.perf_counter() - start


def in_turns(models: Models, rounds: int, measure: Callable[[Any], float]) -> dict[str, Any]:
    """Measure each model in every round; return medians and speed-ups over dense."""
    times: dict[str, list[float]] = {name: [] for name in models.named()}
    for _ in range(rounds):
        for name, model in models.named().items():
            times[name].append(measure(model))
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {
        "milliseconds": {name: 1e3 * value for name, value in medians.items()},
        "speed_up": {name: medians["dense"] / value for name, value in medians.items()},
        "all_milliseconds": {name: [1e3 * one for one in kept] for name, kept in times.items()},
    }


def mlp_bytes(models: Models) -> dict[str, int]:
    """Return the bytes of the gathered model: weights, index lists of all tasks, compact copies."""
    layers = models.gathered.model.layers
    lists = sum(one.indices.nbytes for layer in layers for one in layer.mlp.sets)
    weights = sum(
        part.nbytes for layer in layers for part in (layer.mlp.up, layer.mlp.gate, layer.mlp.down_t)
    )
    weights += sum(part.nbytes for part in models.gathered.parameters())
    return {"weights": weights, "index_lists": lists, "compact_copies": compact_cache.nbytes}


def switch_milliseconds(models: Models, prompt: Tensor) -> dict[str, float]:
    """Time the first token after a switch to a task not run before, less a token without one."""
    extra, steady = [], []
    for task in range(1, TASKS):
        out = models.gathered(prompt, use_cache=True)
        cache, last = out.past_key_values, out.logits[:, -1:].argmax(-1)
        spent = []
        for number in range(4):
            start = time.perf_counter()
            if number == 1:
                models.switch(task)
            models.gathered(last, past_key_values=cache, use_cache=True)
            spent.append(time.perf_counter() - start)
        usual = min(spent[0], *spent[2:])
        extra.append(1e3 * (spent[1] - usual))
        steady.append(1e3 * usual)
    models.switch(0)
    return {"extra": statistics.median(extra), "steady_token": statistics.median(steady)}


def main() -> None:
    """Run the comparison and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--neurons", type=int, default=8192)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--key-value-heads", type=int, default=8)
    parser.add_argument("--vocabulary", type=int, default=128256)
    parser.add_argument("--share", type=float, default=0.5, help="share of neurons kept")
    parser.add_argument("--kind", default="block64", choices=[kind.value for kind in Kind])
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--decode", type=int, default=16, help="tokens generated a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, default=Path("cpu.json"))
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(options.threads)
    config = LlamaConfig(
        hidden_size=options.width,
        intermediate_size=options.neurons,
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
        num_key_value_heads=options.key_value_heads,
        vocab_size=options.vocabulary,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    )
    with torch.inference_mode(False), torch.no_grad():
        models = build(config, getattr(torch, options.dtype), options.share, Kind(options.kind))
        prompt = torch.randint(0, options.vocabulary, (1, options.prompt))
        cut_tokens, _ = decode(models.cut, prompt, options.decode)
        gathered_tokens, _ = decode(models.gathered, prompt, options.decode)
        same = int((cut_tokens == gathered_tokens).cumprod(1).sum())
        logger.info("%d of %d greedy tokens agree", same, cut_tokens.numel())
        decode_result = in_turns(
            models, options.rounds, lambda model: decode(model, prompt[:, :8], options.decode)[1]
        )
        logger.info("decode: %s", decode_result["speed_up"])
        prefill_result = in_turns(models, options.rounds, lambda model: prefill(model, prompt))
        logger.info("prefill: %s", prefill_result["speed_up"])
        one_task = mlp_bytes(models)
        switch = switch_milliseconds(models, prompt[:, :8])
        eight_tasks = mlp_bytes(models)
    report = {
        "environment": {
            "cpu": platform.processor() or platform.machine(),
            "torch": torch.__version__,
            "threads": options.threads,
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        },
        "options": {name: str(value) for name, value in vars(options).items()},
        "greedy_tokens": {"agree": same, "of": cut_tokens.numel()},
        "decode": decode_result,
        "prefill": prefill_result,
        "switch_milliseconds": switch,
        "bytes_one_task": one_task,
        "bytes_eight_tasks": eight_tasks,
        "eight_tasks_over_one": sum(eight_tasks.values()) / sum(one_task.values()),
    }
    options.output.write_text(json.dumps(report, indent=1) + "\n")
    brief = {name: value for name, value in report.items() if name not in ("decode", "prefill")}
    logger.info(json.dumps(brief, indent=1))


if __name__ == "__main__":
    main()
