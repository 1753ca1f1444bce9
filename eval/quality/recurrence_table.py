"""Print how far a model's networks recur: from other starts, in other text, in one task's text, after fine-tuning.

    python eval/quality/recurrence_table.py --model DIR --text prose=a.txt --text code=b.txt --finetune-on prose

Each line compares a set of networks with those found on a mixture of all texts: maps are matched one to one, and the
overlap of members (IoU) stands beside that of shuffled neurons. `other sample` is a mixture of other blocks; a text's
line uses equally many tokens of that text alone; `fine-tuned` is the model after a few steps of training on one text,
compared on the first mixture and on that text; `untrained` has the same shape and random weights and gives the floor.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import protocol
import torch
import typer
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, PreTrainedModel

from fbn_prune.data.calibration import TokenBlocks
from fbn_prune.errors import InvalidInput
from fbn_prune.model.adapter import ModelAdapter
from fbn_prune.model.checkpoint import Checkpoint
from fbn_prune.model.perplexity import perplexity
from fbn_prune.networks.functional_networks import FunctionalNetworks
from fbn_prune.networks.recurrence import (
    SHARED_CORRELATION,
    STARTS,
    recurrence,
    recurrence_between_starts,
)

TRAINING_BLOCKS = 8
TRAINING_POOL = 256
"""Number of blocks to train on; they follow those on which networks are found."""
LEARNING_RATE = 5e-5


class Subject:
    """A checkpoint and its texts, with the settings for finding networks."""

    def __init__(
        self, model: Path, texts: dict[str, Path], *, context: int, tokens: int, networks: int
    ) -> None:
        self.checkpoint = Checkpoint.open(model)
        self.family = self.checkpoint.family
        self.tokenizer = self.checkpoint.load_tokenizer()
        self.context = min(context, self.family.context_length(self.checkpoint.config))
        self.tokens, self.networks = tokens, networks
        self.texts, self.each = texts, 2 * -(-tokens // self.context)
        self.blocks = {name: self._blocks(path, self.each) for name, path in texts.items()}

    def sample(self, names: Sequence[str], half: int) -> TokenBlocks:
        """Return equally many blocks of each text, from its even (0) or odd (1) blocks."""
        share = -(-self.tokens // self.context // len(names)) + 1
        chosen = [block for name in names for block in self.blocks[name][half::2][:share]]
        random.Random(0).shuffle(chosen)
        return TokenBlocks(tuple(chosen), self.context, tuple(names))

    def found(self, model: PreTrainedModel, blocks: TokenBlocks) -> FunctionalNetworks:
        return protocol.find_networks(
            ModelAdapter(model), blocks, self.tokenizer, self.networks, self.tokens, seed=0
        )

    def finetuned(self, model: PreTrainedModel, name: str, steps: int) -> PreTrainedModel:
        """Return a copy trained on blocks of one text outside all samples, by AdamW with linear decay."""
        tuned = copy.deepcopy(model).train()
        blocks = self._blocks(self.texts[name], self.each + TRAINING_POOL)[self.each :]
        weights = protocol.ExactWeights(tuned.parameters())
        optimizer = torch.optim.AdamW(weights.exact, lr=LEARNING_RATE, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
        draw = random.Random(0)
        for _ in range(steps):
            batch = torch.stack(draw.sample(blocks, TRAINING_BLOCKS))
            tuned(input_ids=batch, labels=batch).loss.backward()
            torch.nn.utils.clip_grad_norm_(tuned.parameters(), 1.0)
            weights.step(optimizer)
            schedule.step()
        return tuned.eval()

    def perplexity(self, model: PreTrainedModel, name: str) -> float:
        """Return the perplexity on the blocks on which networks are found; none of them was trained on here."""
        held = TokenBlocks(tuple(self.blocks[name]), self.context, (name,))
        return perplexity(ModelAdapter(model), held.batches(protocol.BATCH_TOKENS))

    def _blocks(self, path: Path, count: int) -> list[torch.Tensor]:
        blocks = protocol.first_blocks(path, self.tokenizer, self.context, count)
        if len(blocks) < count:
            raise InvalidInput(f"{path} gives {len(blocks)} blocks of {self.context}, not {count}")
        return blocks


def _row(name: str, a: FunctionalNetworks, b: FunctionalNetworks) -> dict[str, Any]:
    found = recurrence(a, b)
    facts = found.to_json()
    del facts["networks"]
    return {"compared with": name, "mean_correlation": float(found.correlation.mean()), **facts}


def main(
    model: protocol.Model,
    text: Annotated[list[str], typer.Option(help="NAME=FILE; repeat for several.")],
    finetune_on: Annotated[str, typer.Option(help="Name of the text to train on.")],
    steps: int = 48,
    context: protocol.Context = 256,
    tokens: Annotated[int, typer.Option(help="Tokens that networks are found on.")] = 8192,
    networks: int = 64,
    output: protocol.Output = None,
) -> None:
    texts = {name: Path(path) for name, _, path in (entry.partition("=") for entry in text)}
    if finetune_on not in texts:
        raise InvalidInput(f"--finetune-on {finetune_on}: name one of {', '.join(texts)}")
    on = Subject(model, texts, context=context, tokens=tokens, networks=networks)
    names = list(texts)
    trained = on.checkpoint.load_model(torch.device("cpu"), torch.float32)
    mixture = on.sample(names, 0)
    base = on.found(trained, mixture)
    starts = recurrence_between_starts(
        base.maps, [slice(0, base.maps.shape[1])], range(1, 1 + STARTS)
    )
    rows = [_row("other sample", base, on.found(trained, on.sample(names, 1)))]
    alone = {name: on.found(trained, on.sample([name], 0)) for name in names}
    rows += [_row(f"{name} alone", base, alone[name]) for name in names]
    tuned = on.finetuned(trained, finetune_on, steps)
    rows.append(_row(f"fine-tuned on {finetune_on}", base, on.found(tuned, mixture)))
    own = on.found(tuned, on.sample([finetune_on], 0))
    rows.append(_row(f"fine-tuned, {finetune_on} alone, both", alone[finetune_on], own))
    torch.manual_seed(0)
    untrained = AutoModelForCausalLM.from_config(trained.config).eval()
    rows.append(_row("untrained", base, on.found(untrained, mixture)))
    shifts = {name: [on.perplexity(m, name) for m in (trained, tuned)] for name in names}
    console = Console(width=140)
    table = Table(
        "compared with", "mean IoU", "by chance", "above it", "same", "connectivity", "mean corr."
    )
    for row in rows:
        figures = [f"{row['mean_iou']:.2f}", f"{row['chance_iou']:.2f}"]
        figures += [f"{row['recurring']} of {networks}", f"{row['same']}"]
        figures += [f"{row[key]:.2f}" for key in ("connectivity_correlation", "mean_correlation")]
        table.add_row(row["compared with"], *figures)
    console.print(table)
    shared = torch.tensor(starts["shared_seeds"])
    console.print(
        f"{STARTS} further starts: {int((shared == 1).sum())} of {networks} maps in all of them, "
        f"mean correlation {sum(starts['correlation_seeds']) / networks:.4f}; "
        f"'same' is a correlation of at least {SHARED_CORRELATION}"
    )
    for name, (before, after) in shifts.items():
        console.print(f"perplexity on {name}: {before:.2f}, fine-tuned {after:.2f}")
    facts = {"model": model.name, "texts": names, "tokens": tokens, "networks": networks}
    facts |= {"steps": steps, "starts": starts, "perplexity": shifts, "rows": rows}
    protocol.save_json(output, facts)


if __name__ == "__main__":
    torch.set_num_threads(1)
    typer.run(main)
