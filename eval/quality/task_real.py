"""Print how well a real model cut for a task of a few examples does, by how the calibration documents are weighted.

    python eval/quality/task_real.py --model DIR --domain prose=a.txt,b.txt --domain questions=q.jsonl --task questions

As `task_table.py`, which explains the weightings, for models whose statistics of every document do not fit in memory:
each weighting's statistics are summed in one pass over the layers. A domain is a text to calibrate on and one to
measure on, or a file of multiple-choice questions, of which the last quarter is measured. The neurons to cut are chosen
once by second-order costs, and the output weights of the others are refitted. Beside the perplexity of the task's
text stand the share of its tokens that are predicted first, and that of `--asked` questions with the right choice.
With the file of an earlier run as `--output`, its draws are not made again.
"""

from __future__ import annotations

import random
import statistics
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import protocol
import torch
import typer
from multiple_choice import Question, accuracy, read_questions
from rich.console import Console
from rich.table import Table
from torch import Tensor

from fbn_prune.data.calibration import Batch, TokenBlocks, tokenize_document
from fbn_prune.model.adapter import ModelAdapter
from fbn_prune.model.checkpoint import Checkpoint
from fbn_prune.model.layerwise import LayerwiseForward
from fbn_prune.model.perplexity import exp_or_infinite
from fbn_prune.model.surgery import MlpCut
from fbn_prune.networks.activity import time_courses
from fbn_prune.networks.controls import control_bases
from fbn_prune.networks.function_matching import (
    SHARPNESS,
    match_documents,
    mixture_weights,
    score_weights,
    standardised,
)
from fbn_prune.progress import StageClock
from fbn_prune.pruning.damping import DampingWarning, outliers, refit_share, ridge

BATCH_TOKENS = 1024
DAMPING, REFIT_DAMPING = 1e-2, 1e-3
"""The package's defaults; the second rises where tokens are few (`fbn_prune.pruning.damping.refit_share`)."""
SHORTEST = 8
GENERIC, ALONE, ORACLE = "generic text", "the examples alone", "oracle"
MEANS = "cosine of mean activations"


class Domain:
    """A kind of text: documents to calibrate on, blocks to measure on, and questions to answer."""

    def __init__(self, entry: str, tokenizer: Any, context: int, held: int) -> None:
        self.name, _, files = entry.partition("=")
        own, _, measured = files.partition(",")
        self.questions: list[Question] = []
        if measured:
            self.documents = protocol.first_blocks(Path(own), tokenizer, context, 400)
            blocks = protocol.first_blocks(Path(measured), tokenizer, context, held // context)
        else:
            every = read_questions(Path(own))
            random.Random(0).shuffle(every)
            last = len(every) // 4
            self.questions = every[-last:]
            self.documents, blocks = (
                [b for q in part for b in tokenize_document(tokenizer, q.text, context)[:1] if len(b) >= SHORTEST]
                for part in (every[:-last][:2000], self.questions[: held // 24])
            )  # fmt: skip
        self.measured = TokenBlocks(tuple(blocks), context, (self.name,)).batches(BATCH_TOKENS)


class Pool:
    """Generic documents of every domain and the examples of one, with what networks and neurons do on each."""

    def __init__(
        self, adapter: ModelAdapter, tokenizer: Any, domains: Sequence[Domain], task: str, *,
        context: int, share: int, examples: int, example_tokens: int, networks: int, network_tokens: int, seed: int,
    ) -> None:  # fmt: skip
        draw = random.Random(seed)
        self.adapter, documents = adapter, list[Tensor]()
        own: list[int] = []
        chosen: list[Tensor] = []
        for domain in domains:
            order = draw.sample(domain.documents, len(domain.documents))
            if domain.name == task:
                chosen, order = [b[:example_tokens] for b in order[:examples]], order[examples:]
            tokens = 0
            for document in order:
                if tokens >= share:
                    break
                if domain.name == task:
                    own.append(len(documents))
                documents.append(document)
                tokens += len(document)
        self.generic, self.own = list(range(len(documents))), own
        self.examples = list(range(len(documents), len(documents) + len(chosen)))
        self.blocks = TokenBlocks((*documents, *chosen), context, ("pool",))
        mixed = list(documents)
        random.Random(seed).shuffle(mixed)
        nets = protocol.find_networks(
            adapter, TokenBlocks(tuple(mixed), context, ("pool",)), tokenizer, networks, network_tokens, 0
        )  # fmt: skip
        self.batches = self.blocks.batches(BATCH_TOKENS)
        lengths = [batch.valid.sum(1).tolist() for batch in self.batches]
        neurons: list[list[Tensor]] = [[] for _ in nets.widths]

        def watch(layer: int, index: int, z: Tensor) -> None:
            neurons[layer] += [part.mean(0) for part in torch.split(z, lengths[index])]

        courses = torch.cat(time_courses(adapter, nets, self.batches, StageClock(), watch))
        self.lengths = [length for batch in lengths for length in batch]
        places = torch.argsort(torch.tensor(self.blocks.batch_order()))
        bases = control_bases(courses)
        self.activity = {
            name: torch.stack([p.mean(0) for p in torch.split(courses @ drawn[0], self.lengths)])[places]
            for name, drawn in bases.items()
        }  # fmt: skip
        self.neurons = torch.cat([torch.stack(each) for each in neurons], 1)[places].double()

    def weights(self, matched: int, sharpness: Sequence[float]) -> dict[str, Tensor]:
        """Return for each weighting the weight of a token of each document, float64 [documents]."""
        generic, examples = self.generic, self.examples
        sizes = [len(block) for block in self.blocks.blocks]

        def spread(of_generic: Tensor, share: float) -> Tensor:
            weights = torch.zeros(len(sizes), dtype=torch.float64)
            weights[generic], weights[examples] = mixture_weights(
                of_generic, [sizes[i] for i in generic], [sizes[i] for i in examples], examples_share=share
            )  # fmt: skip
            return weights

        alike = torch.ones(len(generic), dtype=torch.float64)
        alone = torch.zeros(len(sizes), dtype=torch.float64)
        alone[examples] = 1
        oracle = alone.clone()
        oracle[self.own] = 1
        found = {
            GENERIC: spread(alike, 0),
            "generic with 30 % examples": spread(alike, 0.3),
            ALONE: alone,
        }
        means = standardised(self.neurons, self.neurons[generic])
        scores = torch.nn.functional.cosine_similarity(
            means[generic], means[examples].mean(0)[None], dim=1
        )
        for sharp in sharpness:
            more = f", {sharp:g}" if len(sharpness) > 1 else ""
            for name, activity in self.activity.items():
                match = match_documents(
                    activity[generic], activity[examples], matched, sharpness=sharp
                )
                found[f"{name}, {matched}{more}"] = spread(match.weights, 0.3)
            found[f"{MEANS}{more}"] = spread(score_weights(scores, sharp), 0.3)
        found[ORACLE] = oracle
        return found  # fmt: skip

    def own_share(self, weights: Tensor) -> float:
        """Return the share of the generic tokens' weight that lies on the task's domain."""
        mass = weights * torch.tensor([len(block) for block in self.blocks.blocks])
        return float(mass[self.own].sum() / mass[self.generic].sum().clamp_min(1e-300))

    def cuts(
        self, weights: dict[str, Tensor], keeps: Sequence[float]
    ) -> dict[tuple[str, float], list[MlpCut]]:
        """Return the cuts of every weighting to every share of neurons."""
        order = self.blocks.batch_order()
        rows = {
            name: torch.cat([w[i].expand(n) for i, n in zip(order, self.lengths, strict=True)]).float()
            for name, w in weights.items()
        }  # fmt: skip
        found: dict[tuple[str, float], list[MlpCut]] = {(n, k): [] for n in rows for k in keeps}
        stream = LayerwiseForward(self.adapter, self.batches)
        for layer in range(self.adapter.num_layers):
            parts: list[Tensor] = []
            stream.advance(lambda index, x, parts=parts: parts.append(x.float()))  # type: ignore[misc]
            x, weight = torch.cat(parts), self.adapter.down_weight(layer).float()
            between = x @ x.T if len(x) < x.shape[1] else None
            for name, of_row in rows.items():
                used = of_row > 1e-4 * of_row.max()
                own = between if between is None else between[used][:, used]
                cuts = cuts_of_layer(x[used], of_row[used], weight, keeps, own)
                for keep, cut in cuts.items():
                    found[name, keep].append(cut)
        return found


def cuts_of_layer(
    x: Tensor, rows: Tensor, weight: Tensor, keeps: Sequence[float], between: Tensor | None = None
) -> dict[float, MlpCut]:
    """Cut one layer: the cheapest neurons go at once, and the others take over what they can.

    With fewer tokens than neurons it is solved over tokens, which is the same and takes a fraction of the time: for
    G = XᵀX + c and K = XXᵀ + c, the inverse of G is (1 - XᵀK⁻¹X) / c, and weights V on neurons that go (of activations
    Y) are made up for by V YᵀK⁻¹X on those that stay.

    Parameters
    ----------
    x
        Activations, float32 [tokens, neurons].
    rows
        Weight of each token, float32 [tokens].
    weight
        Output weights, float32 [d, neurons].
    keeps
        Shares of neurons to keep.
    between
        x xᵀ, if it is known.
    """
    tokens, width = x.shape
    root = (rows / rows.sum()).sqrt()
    energy = torch.diag((x * root[:, None]).square().sum(0))
    if bool(
        outliers(energy).any()
    ):  # beside massive activations float32 has no digits left for the others
        x, root, weight, between = x.double(), root.double(), weight.double(), None
    scaled = x * root[:, None]
    to_choose = ridge(energy, DAMPING)
    to_refit = ridge(energy, refit_share(REFIT_DAMPING, tokens, width))
    over_tokens = tokens < width
    if over_tokens:
        gram = scaled @ scaled.T if between is None else between * torch.outer(root, root)
        half = torch.linalg.solve_triangular(_factor(gram, to_choose), scaled, upper=False)
        diagonal = (1 - half.square().sum(0)).clamp_min(1e-7) / to_choose
    else:
        gram = scaled.T @ scaled
        diagonal = torch.cholesky_inverse(_factor(gram, to_choose)).diagonal()
    order = torch.argsort(weight.square().sum(0) / diagonal, descending=True, stable=True)
    found = {}
    for keep in keeps:
        count = round(keep * width)
        kept, gone = order[:count].sort().values, order[count:]
        if over_tokens:
            own = scaled[:, kept]
            factor = _factor(own @ own.T, to_refit)
            added = torch.cholesky_solve(scaled[:, gone] @ weight[:, gone].T, factor).T @ own
        else:
            factor = _factor(gram[kept[:, None], kept], to_refit)
            added = torch.cholesky_solve(gram[kept[:, None], gone] @ weight[:, gone].T, factor).T
        found[keep] = MlpCut(kept, (weight[:, kept] + added).float())
    return found


def _factor(gram: Tensor, added: float) -> Tensor:
    damped = gram.clone()
    damped.diagonal().add_(added)
    return torch.linalg.cholesky(damped)


@torch.inference_mode()
def measure(adapter: ModelAdapter, batches: Sequence[Batch]) -> dict[str, float]:
    """Return the perplexity, and the share of tokens that the model predicts first."""
    loss, right, count = 0.0, 0, 0
    for logits, ids, valid in adapter.logits(batches, lambda tokens: None):
        scored = valid[:, 1:]
        guess, target = logits[:, :-1][scored].float(), ids[:, 1:][scored]
        loss += float(torch.nn.functional.cross_entropy(guess, target, reduction="sum"))
        right += int((guess.argmax(1) == target).sum())
        count += len(target)
    return {"perplexity": exp_or_infinite(loss / count), "next token": right / count}


def main(
    model: Annotated[str, typer.Option(help="Checkpoint folder.")],
    domain: Annotated[list[str], typer.Option(help="NAME=CALIBRATE,EVALUATE or NAME=QUESTIONS.jsonl.")],
    task: Annotated[str, typer.Option(help="The domain to keep.")],
    kept: Annotated[str, typer.Option(help="Shares of neurons kept.")] = "0.5,0.3",
    context: protocol.Context = 128,
    share: Annotated[int, typer.Option(help="Generic tokens of each domain.")] = 2048,
    examples: int = 16,
    example_tokens: Annotated[int, typer.Option(help="Most tokens of an example.")] = 128,
    draws: Annotated[int, typer.Option(help="Draws of documents and examples.")] = 3,
    held: Annotated[int, typer.Option(help="Tokens to measure on.")] = 1024,
    asked: Annotated[int, typer.Option(help="Questions of the task to answer, in the first draw.")] = 0,
    networks: int = 64,
    network_tokens: int = 2048,
    matched: int = 10,
    sharpness: Annotated[list[float], typer.Option(help="How steeply weights grow; repeat.")] = [SHARPNESS],  # noqa: B006
    method: Annotated[list[str] | None, typer.Option(help="Only weightings that begin so.")] = None,
    dtype: Annotated[str, typer.Option(help="Type that the model computes in.")] = "float32",
    output: protocol.Output = None,
) -> None:  # fmt: skip
    start = time.monotonic()
    warnings.simplefilter("ignore", DampingWarning)  # one for each weighting and layer
    checkpoint = Checkpoint.open(model)
    tokenizer = checkpoint.load_tokenizer()
    adapter = ModelAdapter(checkpoint.load_model("cpu", getattr(torch, dtype)))
    domains = [Domain(entry, tokenizer, context, held) for entry in domain]
    on = next(one for one in domains if one.name == task)
    keeps = [float(one) for one in kept.split(",")]
    facts: dict[str, Any] = {
        "model": Path(model).name, "task": task, "domains": [d.name for d in domains],
        "examples": examples, "example_tokens": example_tokens, "share": share,
        "networks": networks, "network_tokens": network_tokens, "matched": matched, "sharpness": sharpness,
        "held": held, "asked": asked, "dtype": dtype,
    }  # fmt: skip
    dense = measure(adapter, on.measured)
    if asked:
        dense["questions"] = accuracy(adapter, tokenizer, on.questions[:asked], context)
    facts = protocol.table_to_go_on(output, facts | {"dense": dense})
    print(f"whole model: {dense}", flush=True)
    for draw in range(_draws_made(facts, keeps), draws):
        pool = Pool(
            adapter, tokenizer, domains, task, context=context, share=share, examples=examples,
            example_tokens=example_tokens, networks=networks, network_tokens=network_tokens, seed=draw,
        )  # fmt: skip
        weights = {
            name: each
            for name, each in pool.weights(matched, sharpness).items()
            if not method or name.startswith(tuple(method))
        }
        print(f"draw {draw}: pool after {time.monotonic() - start:.0f} s", flush=True)
        for (name, keep), cuts in pool.cuts(weights, keeps).items():
            row = facts["rows"].setdefault(name, {}).setdefault(str(keep), {})
            with adapter.trying(cuts):
                figures = measure(adapter, on.measured)
                if asked and draw == 0:
                    figures["questions"] = accuracy(
                        adapter, tokenizer, on.questions[:asked], context
                    )
            figures["own"] = pool.own_share(weights[name])
            for figure, value in figures.items():
                row.setdefault(figure, []).append(value)
            print(f"{name}, {keep:g} kept: {row}, {time.monotonic() - start:.0f} s", flush=True)
        protocol.save_json(output, facts)
    show(facts, keeps)


def _draws_made(facts: dict[str, Any], keeps: Sequence[float]) -> int:
    """Return how many draws an unfinished table has; a draw is saved whole."""
    return max((len(row[str(keeps[0])]["own"]) for row in facts["rows"].values()), default=0)


def show(facts: dict[str, Any], keeps: Sequence[float]) -> None:
    title = f"{facts['model']}, {facts['task']}: whole model " + ", ".join(
        f"{figure} {value:.3g}" for figure, value in facts["dense"].items()
    )
    table = Table("statistics", *[f"{figure}, {k:g} kept" for k in keeps for figure in facts["dense"]],
                  "weight on own", title=title)  # fmt: skip
    for name, row in facts["rows"].items():
        cells = []
        for keep in keeps:
            for figure in facts["dense"]:
                values = row[str(keep)][figure]
                spread = statistics.stdev(values) if len(values) > 1 else 0.0
                cells.append(f"{statistics.fmean(values):.4g} ± {spread:.2g}")
        own = statistics.fmean(row[str(keeps[0])]["own"])
        table.add_row(name, *cells, f"{own:.2f}")
    Console(width=220).print(table)


if __name__ == "__main__":
    torch.set_num_threads(1)
    typer.run(main)
