"""Train the embedded model again: `python -m builtin_model.train --output DIR`.

The output folder holds model/, text/, questions/ and training.json. The learning rate rises over the first fiftieth of
the run, stays constant, and falls linearly to zero over the second half. Muon (Jordan et al. 2024) trains the hidden
matrices, AdamW the embeddings and norms. With `--minutes` the schedule follows the clock; with `--steps` it follows the
steps, and the run can be repeated exactly.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import random
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
)

from builtin_model.corpus import collect
from builtin_model.dataset import Files, Row, tokenizer_texts, training_rows, write_files
from builtin_model.measure import (
    exact_share,
    perplexity,
    read_questions,
    read_texts,
    token_rows,
)
from builtin_model.tokenizer import save_tokenizer, train_tokenizer
from fbn_prune.data.builtin import QUESTION_SKILLS, SKILLS

CONTEXT = 256
VOCABULARY = 2048
SHAPE: dict[str, Any] = {
    "hidden_size": 192,
    "num_hidden_layers": 6,
    "intermediate_size": 768,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
}
SHARES = {"prose": 0.35, "code": 0.35, "arithmetic": 0.15, "brackets": 0.075, "copy": 0.075}
ROWS_A_STEP = 16
MUON_RATE, MUON_DECAY = 0.02, 0.02
ADAM_RATE = 3e-3
WARM_UP, DECAY_FROM = 0.02, 0.5
STEPS_A_RECORD = 50


@dataclass(frozen=True)
class Settings:
    """The settings of a run, recorded with its figures."""

    output: Path
    minutes: float
    steps: int | None
    save_minutes: float
    seed: int
    compile: bool


@dataclass(frozen=True)
class Recipe:
    """What is trained, and how: functions of the seed and tokenizer, of the model, and of the model and token ids.

    The last returns the logits and a term to add to the loss. `rows` are those of a step, by default
    :data:`ROWS_A_STEP`; `autocast` computes in bfloat16 where torch sees fit.
    """

    new_model: Callable[[int, PreTrainedTokenizerBase], Any]
    optimizers: Callable[[Any], list[torch.optim.Optimizer]]
    logits: Callable[[Any, torch.Tensor], tuple[torch.Tensor, torch.Tensor | float]]
    rows: int | None = None
    autocast: bool = True


@dataclass
class Progress:
    """The progress of a run, and its loss curve: nats per token by skill, averaged over some steps."""

    started: float = field(default_factory=time.monotonic)
    steps: int = 0
    rows: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SKILLS, 0))
    curve: list[dict[str, float]] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    def share(self, settings: Settings) -> float:
        """Return the finished share of the run, from 0 to 1."""
        if settings.steps is not None:
            return self.steps / settings.steps
        return self.seconds / (60 * settings.minutes)


def rate_factor(share: float) -> float:
    """Return the learning rate at a share of the run, relative to its peak."""
    return max(0.0, min(share / WARM_UP, 1.0, (1 - share) / (1 - DECAY_FROM)))


def new_model(seed: int, tokenizer: PreTrainedTokenizerBase) -> LlamaForCausalLM:
    """Return an untrained Llama of about 3.6 million parameters."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **SHAPE,
    )
    model = LlamaForCausalLM(config)
    # With torch.compile on a CPU, eager attention is a quarter faster than the fused one.
    model.set_attn_implementation("eager")
    model.generation_config.do_sample = False
    return model


def optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Return Muon for the layers' matrices and AdamW for the rest, each with its peak rate."""
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    others = [p for p in model.model.parameters() if not any(p is m for m in matrices)]
    return [
        torch.optim.Muon(matrices, lr=MUON_RATE, weight_decay=MUON_DECAY, momentum=0.95),
        torch.optim.AdamW(others, lr=ADAM_RATE, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def plain_logits(model: Any, ids: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Return the logits, and nothing to add to the loss."""
    return model(input_ids=ids, use_cache=False).logits, 0.0


EMBEDDED = Recipe(new_model, optimizers, plain_logits)
"""The embedded model."""


def train(
    settings: Settings,
    recipe: Recipe,
    model: Any,
    next_rows: dict[str, Callable[[], Row]],
    progress: Progress,
    save: Callable[[], None],
) -> None:
    """Train the model in place on batches of rows, each of one skill; record and save at intervals."""

    def token_losses(tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | float]:
        with torch.autocast("cpu", torch.bfloat16, enabled=recipe.autocast):
            logits, term = recipe.logits(model, tokens[:, :-1])
        losses = torch.nn.functional.cross_entropy(
            logits.float().flatten(0, 1), tokens[:, 1:].flatten(), reduction="none"
        )
        return losses.view(tokens.shape[0], -1), term

    forward = torch.compile(token_losses) if settings.compile else token_losses
    rng = random.Random(settings.seed)
    steppers = recipe.optimizers(model)
    peaks = [[group["lr"] for group in s.param_groups] for s in steppers]
    recent: dict[str, list[float]] = defaultdict(list)
    saved = progress.seconds
    model.train()
    while (share := progress.share(settings)) < 1:
        for stepper, rates in zip(steppers, peaks, strict=True):
            for group, rate in zip(stepper.param_groups, rates, strict=True):
                group["lr"] = rate * rate_factor(share)
        skills = rng.choices(
            list(SHARES), weights=list(SHARES.values()), k=recipe.rows or ROWS_A_STEP
        )
        rows = [next_rows[skill]() for skill in skills]
        losses, term = forward(torch.tensor([row.tokens for row in rows]))
        weights = torch.tensor([row.weights[1:] for row in rows])
        # Every row has the same weight, whatever the weights of its tokens.
        (((losses * weights).sum(1) / weights.sum(1)).mean() + term).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for stepper in steppers:
            stepper.step()
            stepper.zero_grad(set_to_none=True)
        progress.steps += 1
        for skill, loss in zip(skills, losses.mean(1).tolist(), strict=True):
            progress.rows[skill] += 1
            recent[skill].append(loss)
        if progress.steps % STEPS_A_RECORD == 0:
            record(progress, settings, recent)
            recent.clear()
        if progress.seconds - saved > 60 * settings.save_minutes:
            saved = progress.seconds
            save()
            model.train()


def record(progress: Progress, settings: Settings, recent: dict[str, list[float]]) -> None:
    """Add a point to the curve, and print the speed and the remaining time on stderr."""
    point = {skill: round(sum(recent[skill]) / len(recent[skill]), 4) for skill in recent}
    seconds = progress.seconds
    progress.curve.append({"step": progress.steps, "seconds": round(seconds, 1), **point})
    share = progress.share(settings)
    rate = sum(progress.rows.values()) * CONTEXT / seconds
    left = seconds * (1 - share) / share / 60
    losses = " ".join(f"{skill} {loss:.3f}" for skill, loss in sorted(point.items()))
    print(
        f"step {progress.steps} ({share:.1%}) {losses} | {rate:.0f} tokens/s, {left:.1f} min left",
        file=sys.stderr,
        flush=True,
    )


def save_and_measure(
    settings: Settings, recipe: Recipe, model: Any, progress: Progress, wall_started: float
) -> dict[str, Any]:
    """Write the model in float16, load and measure the written model, and write training.json."""
    folder, files = settings.output / "model", Files(settings.output)
    copy.deepcopy(model).half().save_pretrained(folder)
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    held_out = {s: token_rows(tokenizer, read_texts(files.held_out(s)), CONTEXT) for s in SKILLS}
    report = {
        "parameters": sum(p.numel() for p in loaded.parameters()),
        "perplexity": {s: round(perplexity(loaded, held_out[s]), 4) for s in SKILLS},
        "exact": {
            s: exact_share(loaded, tokenizer, read_questions(files.questions(s)))
            for s in QUESTION_SKILLS
        },
        "done": progress.share(settings) >= 1,
        "steps": progress.steps,
        "tokens": {s: rows * CONTEXT for s, rows in progress.rows.items()},
        "training_seconds": round(progress.seconds, 1),
        "wall_seconds": round(time.monotonic() - wall_started, 1),
        "threads": torch.get_num_threads(),
        "settings": {
            **{k: v for k, v in asdict(settings).items() if k != "output"},
            "shares": SHARES,
            "rows_a_step": recipe.rows or ROWS_A_STEP,
            "muon_rate": MUON_RATE,
            "muon_decay": MUON_DECAY,
            "adam_rate": ADAM_RATE,
        },
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
        },
        "machine": f"{platform.system()} {platform.machine()}",
        "curve": progress.curve,
    }
    text = json.dumps(report, indent=1)
    (settings.output / "training.json").write_text(text + "\n", encoding="utf-8")
    figures = {name: report[name] for name in ("perplexity", "exact")}
    print(json.dumps(figures), file=sys.stderr, flush=True)
    return report


def run(settings: Settings, recipe: Recipe = EMBEDDED) -> dict[str, Any]:
    """Collect text, train tokenizer and model, write the folder, and return the recorded figures."""
    wall_started = time.monotonic()
    corpus = collect()
    tokenizer = train_tokenizer(tokenizer_texts(corpus, settings.seed), VOCABULARY, CONTEXT)
    save_tokenizer(tokenizer, settings.output / "model")
    write_files(Files(settings.output), corpus, settings.seed)
    model = recipe.new_model(settings.seed, tokenizer)
    sources = {s: training_rows(s, corpus, tokenizer, CONTEXT + 1, settings.seed) for s in SKILLS}
    next_rows = {skill: source.__next__ for skill, source in sources.items()}
    progress = Progress()

    def save() -> None:
        save_and_measure(settings, recipe, model, progress, wall_started)

    train(settings, recipe, model, next_rows, progress, save)
    return save_and_measure(settings, recipe, model, progress, wall_started)


def parse(arguments: list[str] | None = None) -> Settings:
    """Return the settings from the command line."""
    parser = argparse.ArgumentParser(description="Train the embedded model of fbn-prune.")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--minutes", type=float, default=60.0, help="how long to train")
    length.add_argument("--steps", type=int, default=None, help="how many steps to train instead")
    parser.add_argument("--save-minutes", type=float, default=5.0, help="time between checkpoints")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--compile", action="store_true", help="torch.compile: about 1.4 times as fast, needs g++"
    )
    return Settings(**vars(parser.parse_args(arguments)))


if __name__ == "__main__":
    run(parse())
