"""Print what exchange steps after the removal of neurons would bring: swap kept and removed ones while the error falls.

    python eval/quality/exchange_gain.py --model MODEL --calibrate TEXT --layer 1 --layer 8 --output RESULT.json

The second order removes neurons one block after another and never takes one back. Here, neurons that would lower the
error of the layer's output most come back, as many that cost least go, and that is repeated with smaller and smaller
blocks (as arXiv 2512.10922 does for single weights). The table has the error of the refitted output with the exchanged
neurons as a multiple of that without, on the tokens that the neurons are chosen on and on as many others.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import protocol
import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from fbn_prune.data.builtin import model_path
from fbn_prune.data.calibration import TokenBlocks
from fbn_prune.model.adapter import ModelAdapter
from fbn_prune.model.checkpoint import Checkpoint
from fbn_prune.model.layerwise import LayerwiseForward
from fbn_prune.pruning.damping import ridge
from fbn_prune.pruning.second_order import choose_neurons, output_error, refit
from fbn_prune.pruning.statistics import GramStatistics

DAMPING, REFIT_DAMPING = 1e-2, 1e-3
FIRST_BLOCK, MOST_STEPS = 16, 60


class Exchange:
    """The neurons of a layer, in and out of the kept ones."""

    def __init__(self, weight: Tensor, gram: Tensor, kept: Tensor) -> None:
        self._weight, self._gram = weight, gram.clone()
        self._gram.diagonal().add_(ridge(gram, DAMPING))
        self.inside = torch.zeros(len(gram), dtype=torch.bool)
        self.inside[kept] = True

    def steps(self) -> int:
        """Exchange neurons until no block of any size lowers the error; returns the number of neurons swapped."""
        before, block, error = self.inside.clone(), FIRST_BLOCK, self._error(self.inside)
        for _ in range(MOST_STEPS):
            tried = self._swapped(block)
            found = self._error(tried)
            if found < error:
                self.inside, error = tried, found
            elif block == 1:
                break
            else:
                block //= 2
        return int((self.inside & ~before).sum())

    def _parts(self, inside: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Kept and removed neurons, the Cholesky factor of the kept, and its solution for the removed."""
        kept, gone = inside.nonzero().flatten(), (~inside).nonzero().flatten()
        factor = torch.linalg.cholesky(self._gram[kept][:, kept])
        return kept, gone, factor, torch.cholesky_solve(self._gram[kept][:, gone], factor)

    def _lost(self, inside: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The removed neurons, what the output lacks of them, and their variance given the kept ones."""
        kept, gone, _, solved = self._parts(inside)
        left = self._gram[gone][:, gone] - self._gram[gone][:, kept] @ solved
        return gone, self._weight[:, gone] @ left, left.diagonal()

    def _error(self, inside: Tensor) -> float:
        gone, lost, _ = self._lost(inside)
        return float((lost * self._weight[:, gone]).sum())

    def _swapped(self, block: int) -> Tensor:
        """The set after the best `block` removed neurons have come back and the cheapest `block` have gone."""
        gone, lost, variance = self._lost(self.inside)
        inside = self.inside.clone()
        inside[gone[(lost.square().sum(0) / variance).topk(block).indices]] = True
        kept, gone, factor, solved = self._parts(inside)
        weight = self._weight[:, kept] + self._weight[:, gone] @ solved.T
        cost = weight.square().sum(0) / torch.cholesky_inverse(factor).diagonal()
        inside[kept[cost.topk(block, largest=False).indices]] = False
        return inside


def main(
    model: Annotated[str, typer.Option(help="Checkpoint folder, GGUF file or builtin.")],
    calibrate: Annotated[Path, typer.Option(help="Calibration text.")],
    layer: Annotated[list[int], typer.Option(help="Layer to cut; repeat.")],
    tokens: Annotated[int, typer.Option(help="Tokens to choose on, and as many others.")] = 16384,
    context: protocol.Context = 512,
    kept: Annotated[str, typer.Option(help="Shares of neurons to keep.")] = "0.7,0.5",
    output: protocol.Output = None,
) -> None:
    """Cut single layers of a dense model."""
    checkpoint = Checkpoint.open(model_path() if model == "builtin" else model)
    adapter = ModelAdapter(checkpoint.load_model("cpu", torch.bfloat16))
    count = tokens // context
    tokenizer = checkpoint.load_tokenizer()
    blocks = protocol.first_blocks(calibrate, tokenizer, context, 2 * count)
    streams = [
        LayerwiseForward(adapter, TokenBlocks(tuple(part), context, ("text",)).batches(2048))
        for part in (blocks[:count], blocks[count : 2 * count])
    ]
    facts: dict[str, Any] = {"model": Path(model).name, "tokens": tokens, "rows": []}
    for number in range(max(layer) + 1):
        sums = [GramStatistics(adapter.widths[number]) for _ in streams]
        asked = number in layer
        for stream, own in zip(streams, sums, strict=True):
            stream.advance((lambda _, x, own=own: own.update(x)) if asked else None)
        if asked:
            weight = adapter.down_weight(number).double()
            for share in map(float, kept.split(",")):
                facts["rows"].append({"layer": number} | compared(weight, sums, share))
    table = Table("layer", "kept", "neurons swapped", "error, own tokens", "error, other tokens")
    for row in facts["rows"]:
        errors = (f"{row[name]:.4f}" for name in ("own", "other"))
        table.add_row(str(row["layer"]), f"{row['kept']:g}", str(row["swapped"]), *errors)
    Console().print(table)
    protocol.save_json(output, facts)


def compared(weight: Tensor, sums: list[GramStatistics], share: float) -> dict[str, Any]:
    """The errors after the exchange, as multiples of those before."""
    own, other = (each.gram for each in sums)
    first = choose_neurons(weight, own, round(share * len(own)), damping=DAMPING)
    exchange = Exchange(weight, own, first)
    swapped = exchange.steps()
    errors: list[list[float]] = []
    for kept in (first, exchange.inside.nonzero().flatten()):
        new = refit(weight, own, kept, damping=REFIT_DAMPING)
        errors.append([output_error(weight, gram, kept, new) for gram in (own, other)])
    (own_before, other_before), (own_after, other_after) = errors
    found = {"own": own_after / own_before, "other": other_after / other_before}
    return {"kept": share, "swapped": swapped} | found


if __name__ == "__main__":
    torch.set_num_threads(1)
    typer.run(main)
