"""One model and one pool of documents, of which it knows the statistics: cuts for a task at the price of a sum.

The pool holds as many generic documents of every domain, and beside them a few more of each, drawn several times, that
play the examples of a task. Every way to weigh the pool's documents gives joint statistics, hence a cut model. Used by
`task_table.py`, which says what the ways are.
"""

from __future__ import annotations

import copy
import itertools
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fbn_prune.data.calibration import Batch, TokenBlocks, tokenize_document
from fbn_prune.data.documents import read_documents
from fbn_prune.errors import InvalidInput
from fbn_prune.model.adapter import ModelAdapter
from fbn_prune.model.checkpoint import Checkpoint
from fbn_prune.model.layerwise import LayerwiseForward
from fbn_prune.networks.activity import principal_maps, second_moment, time_courses
from fbn_prune.networks.discovery import DiscoveryOptions, discover
from fbn_prune.networks.function_matching import (
    match_documents,
    mixture_weights,
    score_weights,
    standardised,
)
from fbn_prune.progress import StageClock
from fbn_prune.pruning.allocation import budget_from_sparsity, uniform_widths
from fbn_prune.pruning.criteria import CRITERIA
from fbn_prune.pruning.evidence import CutOptions, EvidencePass

BATCH_TOKENS = 4096
FIRST_BLOCKS = 400
EVALUATION_BLOCKS = 32
CONTEXT_LINES = 4
"""Lines of the evaluation text before each `Q: ... A: ...` question, as the model met them in training."""

Questions = list[tuple[str, str]]


@dataclass(frozen=True)
class Domain:
    """A kind of text: what calibrates and what it is measured on."""

    name: str
    calibrate: Path
    evaluate: Path


@dataclass(frozen=True)
class Setting:
    """How large an experiment is."""

    context: int
    generic: int
    examples: int
    draws: int
    networks: int
    network_tokens: int
    seed: int
    tune: bool
    """Measure on blocks of the calibration text that the pool does not hold, not on the evaluation text."""


class Experiment:
    """A model, a pool of documents, and statistics of every document of it."""

    def __init__(self, model: str, domains: list[Domain], setting: Setting) -> None:
        checkpoint = Checkpoint.open(model)
        self.adapter = ModelAdapter(checkpoint.load_model("cpu", torch.float32))
        self.tokenizer = checkpoint.load_tokenizer()
        if self.tokenizer.pad_token_id is None:  # padding is never scored: any id will do
            self.tokenizer.pad_token = self.tokenizer.decode([0])
        self.domains, self.setting = domains, setting
        draw = random.Random(setting.seed)
        documents: list[Tensor] = []
        self.own: list[list[int]] = []
        self.examples: list[list[list[int]]] = []
        self.held_out: list[list[Batch]] = []
        extra: list[Tensor] = []
        share = setting.generic // len(domains)
        for place, domain in enumerate(domains):
            found = _blocks(domain.calibrate, self.tokenizer, setting.context, FIRST_BLOCKS)
            needed = share + setting.examples * setting.draws
            order = draw.sample(range(len(found)), len(found))
            if len(found) < needed + EVALUATION_BLOCKS * setting.tune:
                raise InvalidInput(f"{domain.calibrate} gives {len(found)} blocks: too few")
            taken = [found[i] for i in order[:needed]]
            documents += taken[:share]
            self.own.append(list(range(place * share, (place + 1) * share)))
            start = share * len(domains) + len(extra)
            each = setting.examples
            self.examples.append(
                [
                    list(range(start + d * each, start + (d + 1) * each))
                    for d in range(setting.draws)
                ]
            )
            extra += taken[share:]
            if setting.tune:
                measured = [found[i] for i in order[needed : needed + EVALUATION_BLOCKS]]
            else:
                measured = _blocks(
                    domain.evaluate, self.tokenizer, setting.context, EVALUATION_BLOCKS
                )
            held_out = TokenBlocks(tuple(measured), setting.context, (domain.name,))
            self.held_out.append(held_out.batches(BATCH_TOKENS))
        self.generic = list(range(len(documents)))
        names = tuple(str(domain.calibrate) for domain in domains)
        self.pool = TokenBlocks((*documents, *extra), setting.context, names)
        generic_blocks = TokenBlocks(tuple(documents), setting.context, names)
        clock = StageClock()
        mixed = list(documents)
        random.Random(setting.seed).shuffle(mixed)
        networks = discover(
            self.adapter,
            TokenBlocks(tuple(mixed), setting.context, names),
            DiscoveryOptions(setting.networks, setting.network_tokens, "global", setting.seed),
            tokenizer=self.tokenizer,
            batch_tokens=BATCH_TOKENS,
            keep=True,
            header={},
            clock=clock,
        )
        singles = self.pool.batches(1)  # one document a batch, in the order of the pool
        courses = time_courses(self.adapter, networks, singles, clock)
        self.activity = torch.stack([course.mean(0) for course in courses])
        moment = second_moment([courses[i] for i in self.generic])
        components = replace(networks, maps=principal_maps(networks, moment))
        in_components = time_courses(self.adapter, components, singles, clock)
        self.component_activity = torch.stack([course.mean(0) for course in in_components])
        self.grams, self.means = self._document_statistics(singles)
        options = CutOptions(False, 1e-2, 1e-3, setting.seed, torch.float32)
        self.evidence = list(
            EvidencePass(self.adapter, generic_blocks.batches(BATCH_TOKENS), options, clock=clock)
        )

    def _document_statistics(self, singles: Sequence[Batch]) -> tuple[list[Tensor], list[Tensor]]:
        """For each layer xᵀx / tokens of every document, float32 [documents, N, N], and E[x] [documents, N]."""
        stream = LayerwiseForward(self.adapter, singles)
        grams: list[Tensor] = []
        means: list[Tensor] = []
        for width in self.adapter.widths:
            gram = torch.empty(len(singles), width, width)
            mean = torch.empty(len(singles), width)

            def observe(index: int, x: Tensor, gram: Tensor = gram, mean: Tensor = mean) -> None:
                gram[index] = x.T @ x / len(x)
                mean[index] = x.mean(0)

            stream.advance(observe)
            grams.append(gram)
            means.append(mean)
        return grams, means

    def cut(self, weights: Tensor, keep: float) -> ModelAdapter:
        """The model cut on statistics in which document i of the pool has weight i."""
        weights = (weights / weights.sum()).float()
        used = weights.nonzero()[:, 0]
        adapter = copy.deepcopy(self.adapter)
        full = self.adapter.widths
        widths = uniform_widths(budget_from_sparsity(sum(full), 1 - keep), full, 1)
        for evidence, grams, means in zip(self.evidence, self.grams, self.means, strict=True):
            gram = torch.zeros_like(grams[0], dtype=torch.float64)
            for index in used.tolist():
                gram.add_(grams[index], alpha=float(weights[index]))
            mean = weights.double() @ means.double()
            weighted = replace(evidence, gram=gram, mean=mean)
            cut = CRITERIA["networks"](weighted, widths[evidence.layer])
            adapter.cut(evidence.layer, cut)
        return adapter

    def weights_by_method(
        self, place: int, draw: int, matched: Sequence[int], sharpness: Sequence[float]
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

    def own_share(self, weights: Tensor, place: int) -> float:
        """How much of the generic documents' weight lies on those of the task's domain."""
        return float(weights[self.own[place]].sum() / weights[self.generic].sum().clamp_min(1e-300))

    def effective_documents(self, weights: Tensor) -> float:
        """How many generic documents of equal weight would vary as little: (sum w)² / sum w²."""
        generic = weights[self.generic]
        return float(generic.sum().square() / generic.square().sum().clamp_min(1e-300))

    def questions(self, place: int, count: int) -> Questions:
        """`Q: ... A: ...` lines of the evaluation text, each behind a few of its lines, none of which calibrated."""
        lines = self.domains[place].evaluate.read_text(encoding="utf-8").splitlines()
        seen = self._seen()
        found = []
        for at in range(CONTEXT_LINES, len(lines)):
            question, separator, answer = lines[at].partition(" A:")
            if separator and question not in seen:
                before = "\n".join(lines[at - CONTEXT_LINES : at])
                found.append((f"{before}\n{question} A:", answer))
        return found[:count]

    def questions_of(self, file: Path) -> Questions:
        """Questions and answers of a JSON-lines file, without those that a document of the pool holds."""
        records = map(json.loads, file.read_text(encoding="utf-8").splitlines())
        seen = self._seen()
        return [(r["question"], r["answer"]) for r in records if r["question"] not in seen]

    def _seen(self) -> str:
        return "\n".join(self.tokenizer.decode(block) for block in self.pool.blocks)


def _blocks(file: Path, tokenizer: Any, context: int, count: int) -> list[Tensor]:
    blocks: list[Tensor] = []
    for document in read_documents(str(file), characters=count * context * 12):
        parts = tokenize_document(tokenizer, document, context)
        blocks += [block for block in parts if len(block) == context]
    if not blocks:
        raise InvalidInput(f"{file} gives no block of {context} tokens")
    return blocks[:count]
