"""What the scripts of this folder share: their options, the texts that they measure on, and the JSON that they write.

Calibration blocks are drawn at random from the first blocks of each text; evaluation blocks are the first of each.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from fbn_prune.data.calibration import Batch, TokenBlocks, tokenize_document
from fbn_prune.data.documents import read_documents
from fbn_prune.errors import InvalidInput
from fbn_prune.model.adapter import ModelAdapter
from fbn_prune.model.checkpoint import Checkpoint
from fbn_prune.networks.discovery import DiscoveryOptions, discover
from fbn_prune.networks.functional_networks import FunctionalNetworks
from fbn_prune.progress import StageClock
from fbn_prune.pruning.evidence import CutOptions
from fbn_prune.recipe import build_recipe
from fbn_prune.runs.opening import OpenRun, open_run
from fbn_prune.runs.setup import prepare

BATCH_TOKENS = 4096

Model = Annotated[Path, typer.Option(help="Checkpoint folder.")]
Calibrate = Annotated[list[Path], typer.Option(help="Calibration text; repeat for several.")]
Evaluate = Annotated[list[Path], typer.Option(help="Evaluation text; repeat for several.")]
Context = Annotated[int, typer.Option(help="Tokens of a block.")]
Blocks = Annotated[int, typer.Option(help="Calibration blocks of each text.")]
EvaluationBlocks = Annotated[int, typer.Option(help="First blocks of each text.")]
First = Annotated[int, typer.Option(help="Calibration blocks are drawn from these.")]
Output = Annotated[Path | None, typer.Option(help="Also write JSON here.")]


@dataclass(frozen=True)
class Sample:
    """A model in float32 with its tokenizer, calibration blocks and batches of evaluation text."""

    checkpoint: Checkpoint
    adapter: ModelAdapter
    tokenizer: Any
    calibration: TokenBlocks
    held_out: list[Batch]

    @property
    def batches(self) -> list[Batch]:
        return self.calibration.batches(BATCH_TOKENS)


def load_sample(
    model: Path,
    calibrate: Sequence[Path],
    evaluate: Sequence[Path],
    *,
    context: int,
    blocks: int,
    evaluation_blocks: int,
    first: int,
    seed: int,
) -> Sample:
    """Load a model and draw `blocks` of the `first` blocks of each calibration text."""
    checkpoint = Checkpoint.open(model)
    tokenizer = checkpoint.load_tokenizer()
    context = min(context, checkpoint.family.context_length(checkpoint.config))
    draw = random.Random(seed)
    sample: list[torch.Tensor] = []
    for file in calibrate:
        found = first_blocks(file, tokenizer, context, first)
        sample += draw.sample(found, min(blocks, len(found)))
    draw.shuffle(sample)
    held = [
        b for file in evaluate for b in first_blocks(file, tokenizer, context, evaluation_blocks)
    ]
    return Sample(
        checkpoint,
        ModelAdapter(checkpoint.load_model("cpu", torch.float32)),
        tokenizer,
        TokenBlocks(tuple(sample), context, tuple(map(str, calibrate))),
        TokenBlocks(tuple(held), context, tuple(map(str, evaluate))).batches(BATCH_TOKENS),
    )


def first_blocks(file: Path, tokenizer: Any, context: int, count: int) -> list[torch.Tensor]:
    """Return the first `count` whole blocks of a text, fewer if it is shorter."""
    blocks: list[torch.Tensor] = []
    for document in read_documents(str(file), characters=count * context * 12):
        parts = tokenize_document(tokenizer, document, context)
        blocks += [block for block in parts if len(block) == context]
    if not blocks:
        raise InvalidInput(f"{file} gives no block of {context} tokens")
    return blocks[:count]


def find_networks(
    adapter: ModelAdapter,
    blocks: TokenBlocks,
    tokenizer: Any,
    networks: int,
    tokens: int,
    seed: int,
) -> FunctionalNetworks:
    """Find functional networks over all layers, with the package's default settings."""
    return discover(
        adapter,
        blocks,
        DiscoveryOptions(networks, tokens, "global", seed),
        tokenizer=tokenizer,
        batch_tokens=BATCH_TOKENS,
        keep=True,
        header={},
        clock=StageClock(),
    )


class ExactWeights:
    """Float32 copies of parameters for an optimizer: in bfloat16 small steps would be lost to rounding."""

    def __init__(self, live: Iterable[torch.nn.Parameter]) -> None:
        self.live = list(live)
        self.exact = [one.detach().float().clone() for one in self.live]

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Take a step over `exact` by the gradients of the live parameters, which take the result over."""
        for kept, one in zip(self.exact, self.live, strict=True):
            assert one.grad is not None
            kept.grad, one.grad = one.grad.float(), None
        optimizer.step()
        with torch.no_grad():
            for kept, one in zip(self.exact, self.live, strict=True):
                one.copy_(kept)


def open_texts(model: str, texts: list[str], tokens: int) -> OpenRun:
    """Load a model in float32 and split `tokens` tokens of the texts as the main job does."""
    recipe = build_recipe(
        {"model": model, "calibration": texts, "tokens": tokens, "context": 256, "networks": 1}
        | {"dtype": "float32", "device": "cpu"}
    )
    return open_run(prepare(recipe), StageClock(), whole=True)


def cut_options(seed: int, **changes: Any) -> CutOptions:
    """Return the package's default damping, with weights kept in float32 unless `changes` say otherwise."""
    return CutOptions(**{"sequential": False, "damping": 1e-2, "refit_damping": 1e-3, "seed": seed,
                         "round_to": torch.float32, **changes})  # fmt: skip


def table_to_go_on(path: Path | None, about: dict[str, Any]) -> dict[str, Any]:
    """Return `about` with the `rows` of an unfinished table in the file; without such a file there are none."""
    if path is None or not path.exists():
        return {**about, "rows": {}}
    facts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if {key: facts.get(key) for key in about} != about:
        raise typer.BadParameter(f"{path} holds another table: give another file")
    return facts


def save_json(path: Path | None, facts: Any) -> None:
    """Write `facts` as indented JSON; do nothing without a path."""
    if path is not None:
        path.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
