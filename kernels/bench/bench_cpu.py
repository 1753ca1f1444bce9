"""Times a dense, a cut and a gathered model side by side on a CPU: decode, prefill, task switch.

Usage: python kernels/bench/bench_cpu.py [--dtype bfloat16] [--threads 2] [--output cpu.json]

The models are Llamas with random weights, by default of the shape of Llama-3.2-1B. `cut` has the kept
neurons of the first of eight tasks alone, as an exported checkpoint; `gathered` is a whole model to
which the eight are attached (`fbn_prune.serving`), their sets drawn independently of one another: real
tasks overlap more, which is easier. Rounds take turns between the models, so that a busy machine slows
all alike, and the gathered model takes another task every round; medians are reported.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import psutil
import torch
from sets import draw_set
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from fbn_kernels import Kind
from fbn_prune.serving import Served, attach

logger = logging.getLogger("bench")

TASKS = 8


@dataclass
class Models:
    """The models compared, which share all weights but the MLPs'."""

    dense: LlamaForCausalLM
    cut: LlamaForCausalLM
    served: Served

    def named(self) -> dict[str, LlamaForCausalLM]:
        """The models by name."""
        return {"dense": self.dense, "cut": self.cut, "gathered": self.served.model}


def fill(model: LlamaForCausalLM) -> None:
    """Give a model random weights: pieces of one random vector, drawing a billion takes minutes."""
    generator = torch.Generator().manual_seed(0)
    pool = torch.randn(2**22 + 1, generator=generator)
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            parameter.data.fill_(1)
            continue
        start = int(torch.randint(len(pool), (), generator=generator))
        piece = (0.02 * pool.roll(start)).to(parameter.dtype)
        flat = parameter.data.view(-1)
        for first in range(0, len(flat), len(piece)):
            part = flat[first : first + len(piece)]
            part.copy_(piece[: len(part)])


def build(config: LlamaConfig, dtype: torch.dtype, share: float, kind: Kind) -> Models:
    """Draw a dense model; cut it; attach tasks to a copy that has its own MLPs."""
    torch.set_default_dtype(dtype)
    with torch.device("meta"):
        dense, cut, whole = (LlamaForCausalLM(config).eval() for _ in range(3))
    torch.set_default_dtype(torch.float32)
    dense.to_empty(device="cpu")
    dense.model.rotary_emb = type(dense.model.rotary_emb)(config)
    dense.tie_weights()
    fill(dense)
    for other in (cut, whole):
        other.model.rotary_emb = dense.model.rotary_emb
        other.load_state_dict(dense.state_dict(), assign=True)
        other.tie_weights()
    neurons, layers = config.intermediate_size, config.num_hidden_layers
    kept = [
        [draw_set(neurons, share, kind, layer * TASKS + task).rows() for layer in range(layers)]
        for task in range(TASKS)
    ]
    for layer in range(layers):
        source = dense.model.layers[layer].mlp
        small, same = cut.model.layers[layer].mlp, whole.model.layers[layer].mlp
        rows = kept[0][layer]
        for linear, weight in (
            (small.up_proj, source.up_proj.weight[rows]),
            (small.gate_proj, source.gate_proj.weight[rows]),
            (small.down_proj, source.down_proj.weight[:, rows].contiguous()),
            (same.up_proj, source.up_proj.weight.clone()),
            (same.gate_proj, source.gate_proj.weight.clone()),
            (same.down_proj, source.down_proj.weight.clone()),
        ):
            linear.weight = nn.Parameter(weight.detach(), requires_grad=False)
    return Models(dense, cut, attach(whole, {str(task): kept[task] for task in range(TASKS)}))


@dataclass(frozen=True)
class Spent:
    """Seconds by the clock, and of the processors, which other work on the machine disturbs less."""

    wall: float
    processor: float

    @classmethod
    def since(cls, start: Spent | None = None, parts: int = 1) -> Spent:
        """Seconds since `start` for each of `parts`, or since the clocks' own beginnings."""
        before = start or Spent(0, 0)
        wall, processor = time.perf_counter(), time.process_time()
        return cls((wall - before.wall) / parts, (processor - before.processor) / parts)


def decode(model: LlamaForCausalLM, prompt: Tensor, tokens: int) -> tuple[Tensor, Spent]:
    """Generate greedily; return the tokens and the time of a token after the first."""
    out = model(prompt, use_cache=True, logits_to_keep=1)
    cache, last = out.past_key_values, out.logits[:, -1:].argmax(-1)
    chosen, start = [last], Spent.since()
    for _ in range(tokens):
        out = model(last, past_key_values=cache, use_cache=True)
        last = out.logits[:, -1:].argmax(-1)
        chosen.append(last)
    return torch.cat(chosen, 1), Spent.since(start, tokens)


def prefill(model: LlamaForCausalLM, prompt: Tensor) -> Spent:
    """Return the time of one pass over a prompt."""
    start = Spent.since()
    model(prompt, use_cache=True, logits_to_keep=1)
    return Spent.since(start)


def in_turns(models: Models, rounds: int, measure: Callable[[Any], Spent]) -> dict[str, Any]:
    """Measure each model in every round, the gathered one in another task each; both clocks' medians."""
    spent: dict[str, list[Spent]] = {name: [] for name in models.named()}
    for number in range(rounds):
        with models.served.networks(str(number % TASKS)):
            for name, model in models.named().items():
                spent[name].append(measure(model))
    return {
        "wall": summary({name: [one.wall for one in all_] for name, all_ in spent.items()}),
        "processor": summary(
            {name: [one.processor for one in all_] for name, all_ in spent.items()}
        ),
    }


def summary(times: dict[str, list[float]]) -> dict[str, Any]:
    """Medians and speed-ups over dense; times in milliseconds."""
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {
        "milliseconds": {name: 1e3 * value for name, value in medians.items()},
        "speed_up": {name: medians["dense"] / value for name, value in medians.items()},
        "gathered_speed_up_by_round": [medians["dense"] / one for one in times["gathered"]],
        "all_milliseconds": {name: [1e3 * one for one in kept] for name, kept in times.items()},
    }


def switches(models: Models, prompt: Tensor) -> dict[str, Any]:
    """Time each switch to another task, and the token after it less a usual one; milliseconds."""
    served, entering, extra = models.served, [], []
    for task in range(TASKS):
        out = served.model(prompt, use_cache=True, logits_to_keep=1)
        cache, last = out.past_key_values, out.logits[:, -1:].argmax(-1)
        start = Spent.since()
        with served.networks(str(task)):
            tokens = [Spent.since(start)]
            for _ in range(4):
                start = Spent.since()
                served.model(last, past_key_values=cache, use_cache=True)
                tokens.append(Spent.since(start))
        entering.append(tokens[0])
        extra.append(
            tokens[0].processor + tokens[1].processor - min(one.processor for one in tokens[2:])
        )
    return {
        "entering_wall": [1e3 * one.wall for one in entering],
        "entering_processor": [1e3 * one.processor for one in entering],
        "entering_and_first_token_less_a_usual_one_processor": [1e3 * one for one in extra],
    }


def resident() -> int:
    """Bytes of memory the process holds."""
    return int(psutil.Process().memory_info().rss)


def one_task_bytes(models: Models) -> int:
    """Bytes of the same model with the first task alone attached, which has nothing to copy."""
    memory = models.served.memory
    return memory.weights + memory.lists // TASKS


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
    parser.add_argument("--kind", default="rows", choices=[kind.value for kind in Kind])
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--decode", type=int, default=16, help="tokens generated a round")
    parser.add_argument("--rounds", type=int, default=8)
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
        one_task = one_task_bytes(models)
        with models.served.networks("0"):
            cut_tokens, _ = decode(models.cut, prompt, options.decode)
            gathered_tokens, _ = decode(models.served.model, prompt, options.decode)
        same = int((cut_tokens == gathered_tokens).cumprod(1).sum())
        logger.info("%d of %d greedy tokens agree", same, cut_tokens.numel())
        before = resident()
        switch = switches(models, prompt[:, :8])
        grown = resident() - before
        logger.info("switches: %s", switch["entering_wall"])
        decode_result = in_turns(
            models, options.rounds, lambda model: decode(model, prompt[:, :8], options.decode)[1]
        )
        logger.info("decode: %s", {clock: one["speed_up"] for clock, one in decode_result.items()})
        prefill_result = in_turns(models, options.rounds, lambda model: prefill(model, prompt))
        logger.info(
            "prefill: %s", {clock: one["speed_up"] for clock, one in prefill_result.items()}
        )
    eight_tasks = models.served.memory
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
        "bytes_eight_tasks": asdict(eight_tasks) | {"total": eight_tasks.total},
        "eight_tasks_over_one": eight_tasks.total / one_task,
        "resident_bytes_grown_by_all_switches": grown,
    }
    options.output.write_text(json.dumps(report, indent=1) + "\n")
    brief = {name: value for name, value in report.items() if name not in ("decode", "prefill")}
    logger.info(json.dumps(brief, indent=1))


if __name__ == "__main__":
    main()
