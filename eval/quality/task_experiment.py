"""Cut a model for tasks: many weightings of one pool of documents, whose statistics are collected once.

The pool holds equally many generic documents of every domain, and for each domain some further documents that serve as
the examples of a task, drawn several times. A weighting of the documents gives joint statistics, and these a cut model.
`task_table.py` uses this module and describes the weightings.
"""

from __future__ import annotations

import copy
import itertools
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from protocol import BATCH_TOKENS, cut_options, find_networks, first_blocks
from torch import Tensor

from fbn_prune.data.calibration import Batch, TokenBlocks
from fbn_prune.errors import InvalidInput
from fbn_prune.model.adapter import ModelAdapter
from fbn_prune.model.checkpoint import Checkpoint
from fbn_prune.model.layerwise import LayerwiseForward
from fbn_prune.networks.activity import principal_maps, second_moment, time_courses
from fbn_prune.networks.function_matching import (
    match_documents,
    mixture_weights,
    score_weights,
    standardised,
)
from fbn_prune.progress import StageClock
from fbn_prune.pruning.allocation import budget_from_sparsity, uniform_widths
from fbn_prune.pruning.criteria import CRITERIA
from fbn_prune.pruning.evidence import EvidencePass

FIRST_BLOCKS = 400
EVALUATION_BLOCKS = 32
CONTEXT_LINES = 4
"""Lines of the evaluation text in front of each `Q: ... A: ...` question, as in the training text."""

Questions = list[tuple[str, str]]


@dataclass(frozen=True)
class Domain:
    """A kind of text, with one file to calibrate on and one to evaluate on."""

    name: str
    calibrate: Path
    evaluate: Path


@dataclass(frozen=True)
class Setting:
    """The sizes of an experiment."""

    context: int
    generic: int
    examples: int
    draws: int
    networks: int
    network_tokens: int
    seed: int
    tune: bool
    """Evaluate on blocks of the calibration text outside the pool instead of on the evaluation text."""


class Experiment:
    """A model, a pool of documents, and the statistics of every document in it."""

    def __init__(self, model: str, domains: list[Domain], setting: Setting) -> None:
        checkpoint = Checkpoint.open(model)
        self.adapter = ModelAdapter(checkpoint.load_model("cpu", torch.float32))
        self.tokenizer = checkpoint.load_tokenizer()
        if self.tokenizer.pad_token_id is None:  # padding is never scored, so any id will do
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
            found = first_blocks(domain.calibrate, self.tokenizer, setting.context, FIRST_BLOCKS)
            needed = share + setting.examples * setting.draws
            order = draw.sample(range(len(found)), len(found))
            if len(found) < needed + EVALUATION_BLOCKS * setting.tune:
                raise InvalidInput(f"{domain.calibrate} gives {len(found)} blocks: too few")
            taken = [found[i] for i in order[:needed]]
            documents += taken[:share]
            self.own.append(list(range(place * share, (place + 1) * share)))
            start = share * len(domains) + len(extra)
            ids = list(range(start, start + needed - share))
            self.examples.append(
                [ids[d * setting.examples :][: setting.examples] for d in range(setting.draws)]
            )
            extra += taken[share:]
            if setting.tune:
                measured = [found[i] for i in order[needed : needed + EVALUATION_BLOCKS]]
            else:
                measured = first_blocks(
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
        sample = TokenBlocks(tuple(mixed), setting.context, names)
        sizes = (setting.networks, setting.network_tokens, setting.seed)
        networks = find_networks(self.adapter, sample, self.tokenizer, *sizes)
        singles = self.pool.batches(1)  # one document a batch, in the order of the pool
        courses = time_courses(self.adapter, networks, singles, clock)
        self.activity = torch.stack([course.mean(0) for course in courses])
        moment = second_moment([courses[i] for i in self.generic])
        components = replace(networks, maps=principal_maps(networks, moment))
        in_components = time_courses(self.adapter, components, singles, clock)
        self.component_activity = torch.stack([course.mean(0) for course in in_components])
        self.grams, self.means = self._document_statistics(singles)
        options = cut_options(setting.seed)
        self.evidence = list(
            EvidencePass(self.adapter, generic_blocks.batches(BATCH_TOKENS), options, clock=clock)
        )

    def _document_statistics(self, singles: Sequence[Batch]) -> tuple[list[Tensor], list[Tensor]]:
        """Return for each layer xᵀx / tokens, float32 [documents, N, N], and E[x] [documents, N], of each document."""
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
        """Return the model cut on statistics in which document i of the pool has weight i."""
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
            cut = CRITERIA["second-order"](weighted, widths[evidence.layer])
            adapter.cut(evidence.layer, cut)
        return adapter

    def weights_by_method(
        self, place: int, draw: int, matched: Sequence[int], sharpness: Sequence[float]
    ) -> dict[str, Tensor]:
        """Return for each method the weights of the pool's documents, float64 [documents]."""
        own, examples = self.own[place], self.examples[place][draw]
        neurons = torch.cat(self.means, dim=1).double()
        generic = self.generic

        def spread(of_generic: Tensor, share: float) -> Tensor:
            """Weigh the generic documents by `of_generic`, and give the examples `share` of the total weight."""
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
        """Return the share of the generic documents' weight that lies on the task's domain."""
        return float(weights[self.own[place]].sum() / weights[self.generic].sum().clamp_min(1e-300))

    def effective_documents(self, weights: Tensor) -> float:
        """Return the effective number of generic documents, (sum w)² / sum w²."""
        generic = weights[self.generic]
        return float(generic.sum().square() / generic.square().sum().clamp_min(1e-300))

    def questions(self, place: int, count: int) -> Questions:
        """Return `Q: ... A: ...` lines of the evaluation text after their context lines, without those in the pool."""
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
        """Return the questions and answers of a JSON-lines file, without those in a document of the pool."""
        records = map(json.loads, file.read_text(encoding="utf-8").splitlines())
        seen = self._seen()
        return [(r["question"], r["answer"]) for r in records if r["question"] not in seen]

    def _seen(self) -> str:
        return "\n".join(self.tokenizer.decode(block) for block in self.pool.blocks)
