"""Print how well a model cut for a task of a few examples does, by what its statistics were weighed with.

    python eval/task_table.py --model DIR --domain prose=CALIBRATE.txt,EVALUATE.txt --domain code=... \
        [--questions arithmetic]

For each domain as the task, and each draw of examples: perplexity on the domain's evaluation text (and the share of its
`Q: ... A: ...` lines answered exactly) when a share of the neurons is kept, uniform widths, second order and refit. The
generic documents hold as many blocks of every domain. What differs is the statistics:

generic             all generic documents alike
examples alone      the task's few blocks
half and half       half the weight to each of these two
oracle              the task's own generic documents and its examples, all alike
networks, K, s      function-matched (`fbn_prune.networks.tasks`) on the K networks where the task stands out most,
                    weights of sharpness s
components, K, s    the same with principal components of the same space
mean activations, s documents by cosine of the mean activations of all neurons, standardised
"""

from __future__ import annotations

import copy
import itertools
import json
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from fbn_prune.builtin.measure import exact_share
from fbn_prune.calibration import TokenBlocks, read_documents, tokenize_document
from fbn_prune.errors import InvalidInput
from fbn_prune.layerwise import LayerwiseForward
from fbn_prune.model.checkpoint import Checkpoint
from fbn_prune.model.surgery import apply_cut
from fbn_prune.networks.activity import principal_maps, second_moment, time_courses
from fbn_prune.networks.discovery import DiscoveryOptions, discover
from fbn_prune.networks.tasks import (
    SHARPNESS,
    match_documents,
    mixture_weights,
    score_weights,
    standardised,
)
from fbn_prune.perplexity import perplexity
from fbn_prune.progress import StageClock
from fbn_prune.pruning.allocation import budget_from_sparsity, uniform_widths
from fbn_prune.pruning.criteria import CRITERIA
from fbn_prune.pruning.pipeline import CutOptions, EvidencePass

BATCH_TOKENS = 4096
FIRST_BLOCKS = 400
EVALUATION_BLOCKS = 32
CONTEXT_LINES = 4
"""Lines of the evaluation text before each question, as the model met them in training."""


@dataclass(frozen=True)
class Domain:
    name: str
    calibrate: Path
    evaluate: Path


class Experiment:
    """One model, one pool of documents, and statistics of every document of it."""

    def __init__(
        self,
        model: Path,
        domains: list[Domain],
        *,
        context: int,
        generic: int,
        examples: int,
        draws: int,
        networks: int,
        network_tokens: int,
        seed: int,
    ) -> None:
        checkpoint = Checkpoint.open(model)
        self.family = checkpoint.family
        self.model = checkpoint.load_model("cpu", torch.float32)
        self.tokenizer = checkpoint.load_tokenizer()
        if self.tokenizer.pad_token_id is None:  # padding is never scored: any id will do
            self.tokenizer.pad_token = self.tokenizer.decode([0])
        self.domains, self.draws = domains, draws
        draw = random.Random(seed)
        documents: list[Tensor] = []
        self.own: list[list[int]] = []
        self.examples: list[list[list[int]]] = []
        extra: list[Tensor] = []
        share = generic // len(domains)
        for place, domain in enumerate(domains):
            found = _blocks(domain.calibrate, self.tokenizer, context, FIRST_BLOCKS)
            taken = draw.sample(found, share + examples * draws)
            documents += taken[:share]
            self.own.append(list(range(place * share, (place + 1) * share)))
            start = share * len(domains) + len(extra)
            self.examples.append(
                [
                    list(range(start + d * examples, start + (d + 1) * examples))
                    for d in range(draws)
                ]
            )
            extra += taken[share:]
        self.generic = list(range(len(documents)))
        names = tuple(str(domain.calibrate) for domain in domains)
        self.pool = TokenBlocks((*documents, *extra), context, names)
        generic_blocks = TokenBlocks(tuple(documents), context, names)
        self.held_out = [
            TokenBlocks(
                tuple(_blocks(d.evaluate, self.tokenizer, context, EVALUATION_BLOCKS)),
                context,
                (str(d.evaluate),),
            ).batches(BATCH_TOKENS)
            for d in domains
        ]
        clock = StageClock()
        mixed = list(documents)
        random.Random(seed).shuffle(mixed)
        found_networks = discover(
            self.model,
            self.family,
            TokenBlocks(tuple(mixed), context, names),
            DiscoveryOptions(networks, network_tokens, "global", seed),
            tokenizer=self.tokenizer,
            batch_tokens=BATCH_TOKENS,
            keep=True,
            header={},
            clock=clock,
        )
        singles = self.pool.batches(1)  # one document a batch, in the order of the pool
        courses = time_courses(self.model, self.family, found_networks, singles, clock)
        self.activity = torch.stack([course.mean(0) for course in courses])
        moment = second_moment([courses[i] for i in self.generic])
        components = replace(found_networks, maps=principal_maps(found_networks, moment))
        in_components = time_courses(self.model, self.family, components, singles, clock)
        self.component_activity = torch.stack([course.mean(0) for course in in_components])
        self.grams, self.means = self._document_statistics(singles)
        options = CutOptions("networks", False, 1e-2, 1e-3, seed, torch.float32)
        self.evidence = list(
            EvidencePass(
                self.model,
                self.family,
                generic_blocks.batches(BATCH_TOKENS),
                options,
                membership=None,
                clock=clock,
            )
        )

    def _document_statistics(self, singles: Sequence[Any]) -> tuple[list[Tensor], list[Tensor]]:
        """For each layer xᵀx / tokens of every document, float32 [documents, N, N], and E[x] [documents, N]."""
        stream = LayerwiseForward(self.model, self.family, singles)
        grams: list[Tensor] = []
        means: list[Tensor] = []
        for layer in range(self.family.num_layers(self.model.config)):
            width = self.family.down_weight(self.model, layer).shape[1]
            gram = torch.empty(len(singles), width, width)
            mean = torch.empty(len(singles), width)

            def observe(index: int, x: Tensor, gram: Tensor = gram, mean: Tensor = mean) -> None:
                gram[index] = x.T @ x / len(x)
                mean[index] = x.mean(0)

            stream.advance(observe)
            grams.append(gram)
            means.append(mean)
        return grams, means

    def cut(self, weights: Tensor, keep: float) -> Any:
        """The model cut on statistics in which document i of the pool has weight i."""
        weights = (weights / weights.sum()).float()
        used = weights.nonzero()[:, 0]
        model = copy.deepcopy(self.model)
        full = [len(evidence.mean) for evidence in self.evidence]
        widths = uniform_widths(budget_from_sparsity(sum(full), 1 - keep), full, 1)
        for evidence, grams, means in zip(self.evidence, self.grams, self.means, strict=True):
            gram = torch.zeros_like(grams[0], dtype=torch.float64)
            for index in used.tolist():
                gram.add_(grams[index], alpha=float(weights[index]))
            mean = weights.double() @ means.double()
            weighted = replace(evidence, gram=gram, mean=mean)
            cut = CRITERIA["networks"](weighted, widths[evidence.layer])
            apply_cut(model, self.family, evidence.layer, cut)
        return model

    def weights_by_method(
        self, place: int, draw: int, matched: list[int], sharpness: list[float]
    ) -> dict[str, Tensor]:
        """For each method the weights of the pool's documents, float64 [documents]."""
        own, examples = self.own[place], self.examples[place][draw]
        neurons = torch.cat(self.means, dim=1).double()
        generic = self.generic

        def spread(of_generic: Tensor, share: float) -> Tensor:
            """Generic documents by their weights, the examples with `share` of all."""
            lengths = [len(block) for block in self.pool.blocks]
            weights = torch.zeros(len(lengths), dtype=torch.float64)
            weights[generic], weights[examples] = mixture_weights(
                of_generic,
                [lengths[i] for i in generic],
                [lengths[i] for i in examples],
                examples_share=share,
            )
            return weights

        alike = torch.ones(len(generic), dtype=torch.float64)
        alone = torch.zeros(len(self.pool.blocks), dtype=torch.float64)
        alone[examples] = 1
        oracle = alone.clone()
        oracle[own] = 1
        methods = {
            "generic": spread(alike, 0),
            "examples alone": alone,
            "half and half": spread(alike, 0.5),
            "generic + 0.3 examples": spread(alike, 0.3),
            "oracle": oracle,
        }
        for name, activity in (
            ("networks", self.activity),
            ("components", self.component_activity),
        ):
            for count, sharp in itertools.product(matched, sharpness):
                match = match_documents(
                    activity[generic], activity[examples], count, sharpness=sharp
                )
                methods[f"{name}, {count}, {sharp:g}"] = spread(match.weights, 0.3)
        means = standardised(neurons, neurons[generic])
        scores = torch.nn.functional.cosine_similarity(
            means[generic], means[examples].mean(0)[None], dim=1
        )
        for sharp in sharpness:
            methods[f"mean activations, {sharp:g}"] = spread(score_weights(scores, sharp), 0.3)
        return methods

    def questions(self, place: int, count: int) -> list[tuple[str, str]]:
        """Questions of the evaluation text, each behind a few lines of it, none of which calibrated."""
        lines = self.domains[place].evaluate.read_text(encoding="utf-8").splitlines()
        seen = "\n".join(self.tokenizer.decode(block) for block in self.pool.blocks)
        found = []
        for at in range(CONTEXT_LINES, len(lines)):
            question, separator, answer = lines[at].partition(" A:")
            if separator and question not in seen:
                before = "\n".join(lines[at - CONTEXT_LINES : at])
                found.append((f"{before}\n{question} A:", answer))
        return found[:count]


def _blocks(file: Path, tokenizer: Any, context: int, count: int) -> list[Tensor]:
    blocks: list[Tensor] = []
    for document in read_documents(str(file), characters=count * context * 12):
        parts = tokenize_document(tokenizer, document, context)
        blocks += [block for block in parts if len(block) == context]
    if not blocks:
        raise InvalidInput(f"{file} gives no block of {context} tokens")
    return blocks[:count]


def _domain(text: str) -> Domain:
    name, _, files = text.partition("=")
    calibrate, _, evaluate = files.partition(",")
    if not evaluate:
        raise InvalidInput(f"--domain {text}: write NAME=CALIBRATE,EVALUATE")
    return Domain(name, Path(calibrate), Path(evaluate))


def _row(values: list[float], style: Callable[[float], str]) -> str:
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{style(statistics.mean(values))} ± {style(spread)}"


def main(
    model: Annotated[Path, typer.Option(help="Checkpoint folder.")],
    domain: Annotated[
        list[str], typer.Option(help="NAME=CALIBRATE.txt,EVALUATE.txt; repeat for each.")
    ],
    task: Annotated[list[str] | None, typer.Option(help="Only these domains as task.")] = None,
    questions: Annotated[list[str] | None, typer.Option(help="Domains of Q: A: lines.")] = None,
    kept: Annotated[float, typer.Option(help="Share of neurons kept.")] = 0.3,
    context: Annotated[int, typer.Option()] = 256,
    generic: Annotated[int, typer.Option(help="Generic documents in all.")] = 120,
    examples: Annotated[int, typer.Option(help="Documents of the task.")] = 4,
    draws: Annotated[int, typer.Option(help="Draws of examples.")] = 5,
    networks: Annotated[int, typer.Option()] = 64,
    network_tokens: Annotated[int, typer.Option()] = 6144,
    matched: Annotated[list[int], typer.Option(help="Networks matched on.")] = [10, 64],  # noqa: B006
    sharpness: Annotated[list[float], typer.Option(help="Steepness of weights.")] = [SHARPNESS],  # noqa: B006
    seed: Annotated[int, typer.Option()] = 0,
    output: Annotated[Path | None, typer.Option(help="Also write JSON here.")] = None,
) -> None:
    domains = [_domain(text) for text in domain]
    run = Experiment(
        model,
        domains,
        context=context,
        generic=generic,
        examples=examples,
        draws=draws,
        networks=networks,
        network_tokens=network_tokens,
        seed=seed,
    )
    console = Console(width=120)
    facts: dict[str, Any] = {"model": model.name, "kept": kept, "draws": draws, "tasks": {}}
    for place, one in enumerate(domains):
        if task and one.name not in task:
            continue
        asked = run.questions(place, 300) if one.name in (questions or []) else []
        columns = ["perplexity", *(["exact"] if asked else [])]
        results: dict[str, dict[str, list[float]]] = {}
        known: dict[bytes, list[float]] = {}
        for draw in range(draws):
            for method, weights in run.weights_by_method(place, draw, matched, sharpness).items():
                key = weights.numpy().tobytes()
                if key not in known:
                    cut = run.cut(weights, kept)
                    known[key] = [perplexity(cut, run.held_out[place])]
                    if asked:
                        known[key].append(exact_share(cut, run.tokenizer, asked))
                row = results.setdefault(method, {column: [] for column in columns})
                for column, value in zip(columns, known[key], strict=True):
                    row[column].append(value)
        dense = {"perplexity": perplexity(run.model, run.held_out[place])}
        if asked:
            dense["exact"] = exact_share(run.model, run.tokenizer, asked)
        facts["tasks"][one.name] = {"dense": dense, "methods": results, "questions": len(asked)}
        table = Table("statistics", *columns, "to the oracle", title=f"{one.name}: dense {dense}")
        oracle = statistics.mean(results["oracle"]["perplexity"])
        for method, row in results.items():
            ratio = statistics.mean(row["perplexity"]) / oracle - 1
            cells = [_row(row[column], lambda value: f"{value:.3f}") for column in columns]
            table.add_row(method, *cells, f"{ratio:+.1%}")
        console.print(table)
        if output is not None:
            output.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
