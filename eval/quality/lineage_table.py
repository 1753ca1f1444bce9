"""Print how well shared networks tell copies of a model from models of another origin, beside the controls.

    python -m builtin_model.train --output IND --steps 100 --seed 11     (in eval/; repeat with other seeds)
    python eval/quality/lineage_table.py --set-on DIR --set-on ... --independent IND/model --independent ...

Copies of each model are made here: pruned, fine-tuned, quantised, merged, and copies of the same function whose neurons
are permuted or rescaled. A related pair is a model and one of its copies; an unrelated pair is a model and a model (or
a copy) of another origin. AUC is the chance that a related pair scores higher than an unrelated one. The threshold is
set half-way between related and unrelated pairs of the first `--set-on` models; only pairs without them are judged.
"""

from __future__ import annotations

import copy
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import protocol
import torch
import typer
from rich.console import Console
from rich.table import Table
from sklearn.metrics import roc_auc_score
from transformers import PreTrainedModel

from fbn_prune import PruningConfig, prune
from fbn_prune.data.calibration import calibration_data
from fbn_prune.data.words import Passages
from fbn_prune.model.adapter import ModelAdapter
from fbn_prune.model.checkpoint import Checkpoint
from fbn_prune.networks.controls import (
    COMPONENTS,
    NETWORKS,
    ROTATIONS,
    TEMPORAL,
    principal_basis,
    random_rotation,
    temporal_basis,
)
from fbn_prune.networks.lineage import linear_cka, shared_networks, span_overlap
from fbn_prune.progress import StageClock
from fbn_prune.runs.fingerprint import (
    Fingerprint,
    courses_beyond_words,
    fingerprint,
    passages_of,
)

SPAN = "span of the networks"
CKA, COSINE = "linear CKA of activations", "cosine of weights"
PLAIN = ", words left in"
LEARNING_RATE = 2e-4


@dataclass(frozen=True)
class Subject:
    """A model or a copy, with all that the scores need."""

    origin: str
    name: str
    found: Fingerprint
    bases: dict[str, torch.Tensor]
    weights: dict[str, torch.Tensor]


class Origin:
    """A model of its own, and copies of it."""

    def __init__(
        self,
        path: str,
        texts: Sequence[str],
        tokens: int,
        context: int,
        rows: int,
        dtype: torch.dtype,
    ) -> None:
        self.rows = rows
        checkpoint = Checkpoint.open(path)
        self.tokenizer = checkpoint.load_tokenizer()
        self.model = checkpoint.load_model("cpu", dtype)
        self.context = min(context, checkpoint.family.context_length(checkpoint.config))
        self.texts = list(texts)
        vocabulary = checkpoint.family.vocab_size(checkpoint.config)
        self.blocks = calibration_data(
            self.texts, self.tokenizer, tokens=tokens, context=self.context, held_out=0.1, seed=0,
            vocabulary=vocabulary,
        ).calibrating  # fmt: skip

    def pruned(self, sparsity: float) -> PreTrainedModel:
        model = copy.deepcopy(self.model)
        config = PruningConfig(
            sparsity=sparsity,
            tokens=min(4096, self.blocks.tokens),
            context=self.context,
            allow_untrained=True,
        )
        return prune(model, self.tokenizer, self._documents(), config).model  # type: ignore[return-value]

    def _documents(self) -> list[str]:
        return [
            str(self.tokenizer.decode(block, skip_special_tokens=True))
            for block in self.blocks.blocks
        ]

    def finetuned(self, model: PreTrainedModel, steps: int) -> PreTrainedModel:
        """Train a copy of `model` on the first blocks of the text alone."""
        tuned = copy.deepcopy(model).train()
        longest = [b for b in self.blocks.blocks if len(b) == self.context][: 4 * self.rows]
        weights = protocol.ExactWeights(tuned.parameters())
        optimizer = torch.optim.AdamW(weights.exact, lr=LEARNING_RATE, weight_decay=0.0)
        draw = random.Random(0)
        for _ in range(steps):
            batch = torch.stack(draw.sample(longest, min(self.rows, len(longest))))
            tuned(input_ids=batch, labels=batch).loss.backward()
            weights.step(optimizer)
        return tuned.eval()

    def changed(self, change: Callable[[str, torch.Tensor], torch.Tensor]) -> PreTrainedModel:
        """Return a copy with every parameter replaced."""
        model = copy.deepcopy(self.model)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(change(name, parameter))
        return model

    def quantised(self, bits: int = 4) -> PreTrainedModel:
        """Round every matrix to whole multiples of a step for each row."""

        def rounded(name: str, w: torch.Tensor) -> torch.Tensor:
            if w.ndim != 2:
                return w
            step = w.abs().amax(1, keepdim=True).clamp_min(1e-12) / (2 ** (bits - 1) - 1)
            return (w / step).round() * step

        return self.changed(rounded)

    def merged(self, other: PreTrainedModel) -> PreTrainedModel:
        weights = dict(other.named_parameters())
        return self.changed(lambda name, w: (w + weights[name]) / 2)

    def same_function(self, seed: int, *, permute: bool, rescale: bool) -> PreTrainedModel:
        """Reorder the neurons of every layer, and multiply what enters each by what its output is divided by.

        The second is exact for the linear one of two gated inputs.
        """
        model = copy.deepcopy(self.model)
        adapter, generator = ModelAdapter(model), torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for layer, width in enumerate(adapter.widths):
                order = torch.randperm(width, generator=generator)
                factor = torch.exp(torch.randn(width, generator=generator) * 1.5)
                inputs, down = adapter.input_weights(layer), adapter.down_weight(layer)
                if permute:
                    for w in inputs:
                        w.copy_(w[order].clone())
                    down.copy_(down[:, order].clone())
                if rescale and len(inputs) == 2:
                    inputs[1].mul_(factor[:, None])
                    down.div_(factor)
        return model

    def copies(self, steps: int, *, few: bool) -> dict[str, PreTrainedModel]:
        tuned = self.finetuned(self.model, steps)
        found = {
            "pruned 30 %": self.pruned(0.3),
            "fine-tuned": tuned,
            "quantised to 4 bits": self.quantised(),
            "permuted and rescaled": self.same_function(0, permute=True, rescale=True),
        }
        if not few:
            found |= {
                "pruned 60 %": self.pruned(0.6),
                "pruned 50 %, recovered": self.finetuned(self.pruned(0.5), steps),
                "merged with the fine-tuned": self.merged(tuned),
                "permuted": self.same_function(1, permute=True, rescale=False),
                "rescaled": self.same_function(2, permute=False, rescale=True),
                "quantised to 3 bits": self.quantised(3),
            }
        return found

    def subject(
        self, origin: str, name: str, model: PreTrainedModel, passages: Passages, networks: int
    ) -> Subject:
        adapter, blocks = ModelAdapter(model), self.blocks
        found = protocol.find_networks(adapter, blocks, self.tokenizer, networks, blocks.tokens, 0)
        of_words = fingerprint(
            name, adapter, self.tokenizer, found, passages,
            context=self.context, batch_tokens=4096, clock=StageClock(),
        )  # fmt: skip
        courses = of_words.courses[of_words.seen]
        bases = {
            COMPONENTS: principal_basis(courses),
            ROTATIONS: random_rotation(networks, random.Random(f"{origin} {name}").getrandbits(32)),
            TEMPORAL: temporal_basis(courses),
        }
        weights = {n: p.detach().half() for n, p in model.named_parameters() if p.ndim == 2}
        return Subject(origin, name, of_words, bases, weights)


def scores(a: Subject, b: Subject, passages: Passages) -> dict[str, float]:
    """Return each score of a pair; those whose name ends in :data:`PLAIN` do not subtract what words explain."""
    both = a.found.seen & b.found.seen
    left = courses_beyond_words(a.found, b.found, passages)
    found: dict[str, float] = {}
    for end, of_a, of_b in (("", *left), (PLAIN, a.found.courses[both], b.found.courses[both])):
        found[NETWORKS + end] = shared_networks(of_a, of_b).score
        found[SPAN + end] = span_overlap(of_a, of_b)
        for name in a.bases:
            turned = of_a @ a.bases[name], of_b @ b.bases[name]
            found[name + end] = shared_networks(*turned).score
    found[CKA] = linear_cka(a.found.gram[both][:, both], b.found.gram[both][:, both])
    same = [n for n, w in a.weights.items() if n in b.weights and b.weights[n].shape == w.shape]
    cosines = [
        float(torch.nn.functional.cosine_similarity(
            a.weights[n].float().flatten(), b.weights[n].float().flatten(), dim=0))
        for n in same if ".mlp." in n
    ]  # fmt: skip
    found[COSINE] = statistics.fmean(cosines) if cosines else 0.0
    return found


def pairs_of(subjects: Sequence[Subject], passages: Passages, most: int) -> list[dict[str, Any]]:
    """Return the scores of each model and its copies, and of at most so many pairs of other origin."""
    first = [s for s in subjects if s.name == "itself"]
    related = [(a, b) for a in first for b in subjects if b.origin == a.origin and b is not a]
    others = [(a, b) for a in first for b in subjects if b.origin != a.origin]
    others = random.Random(0).sample(others, min(most, len(others)))
    return [
        {
            "a": [a.origin, a.name],
            "b": [b.origin, b.name],
            "related": is_related,
            **scores(a, b, passages),
        }
        for is_related, pairs in ((True, related), (False, others))
        for a, b in pairs
    ]


def split_scores(rows: Sequence[dict[str, Any]], kind: str) -> tuple[list[float], list[float]]:
    """Return the scores of the related and of the unrelated pairs."""
    both = [[row[kind] for row in rows if row["related"] is wanted] for wanted in (True, False)]
    return both[0], both[1]


def separation(rows: Sequence[dict[str, Any]], kind: str) -> dict[str, float]:
    """Return how well a score tells the related from the unrelated pairs."""
    yes, no = split_scores(rows, kind)
    truth = [True] * len(yes) + [False] * len(no)
    return {
        "related": len(yes),
        "unrelated": len(no),
        "auc": float(roc_auc_score(truth, yes + no)),
        "least_related": min(yes),
        "highest_unrelated": max(no),
        "mean_related": statistics.fmean(yes),
        "mean_unrelated": statistics.fmean(no),
    }


def main(
    independent: Annotated[
        list[str] | None, typer.Option(help="A model of another origin, with four copies; repeat.")
    ] = None,
    model: Annotated[str, typer.Option(help="The model with the most copies.")] = "builtin",
    few: Annotated[bool, typer.Option("--few", help="It has only four copies too.")] = False,
    alone: Annotated[list[str] | None, typer.Option(help="Others without copies; repeat.")] = None,
    set_on: Annotated[
        list[str] | None,
        typer.Option(help="Models, with all copies, whose pairs set the threshold; repeat."),
    ] = None,
    text: Annotated[list[str] | None, typer.Option(help="Text; repeat for several.")] = None,
    networks: int = 32,
    tokens: Annotated[int, typer.Option(help="Tokens to find networks on.")] = 4096,
    context: int = 128,
    steps: Annotated[int, typer.Option(help="Steps of a fine-tune.")] = 20,
    rows: Annotated[int, typer.Option(help="Blocks of a step.")] = 8,
    unrelated: Annotated[int, typer.Option(help="Unrelated pairs to draw.")] = 60,
    dtype: Annotated[str, typer.Option(help="Type that the models compute in.")] = "float32",
    output: protocol.Output = None,
) -> None:
    from fbn_prune.data import builtin

    texts = text or ["builtin"]
    if texts == ["builtin"]:
        texts = [str(path) for path in builtin.calibration_files().values()]
    passages = passages_of(texts)
    facts: dict[str, Any] = {"found": networks, "tokens": tokens, "steps": steps, "dtype": dtype}

    def subjects(paths: Sequence[str]) -> list[Subject]:
        found: list[Subject] = []
        for path in paths:
            on = Origin(
                builtin.path_or_id(path), texts, tokens, context, rows, getattr(torch, dtype)
            )
            origin = Path(path).parent.name if Path(path).name == "model" else Path(path).name
            start = time.monotonic()
            found.append(on.subject(origin, "itself", on.model, passages, networks))
            facts.setdefault("seconds", {})[origin] = time.monotonic() - start
            made = (
                {}
                if path in (alone or ())
                else on.copies(steps, few=few or path not in (model, *(set_on or ())))
            )
            for name, copied in made.items():
                found.append(on.subject(origin, name, copied, passages, networks))
                print(f"{origin}: {name}", flush=True)
        return found

    bases = [NETWORKS, SPAN, COMPONENTS, ROTATIONS, TEMPORAL]
    kinds = [*bases, *[name + PLAIN for name in bases], CKA, COSINE]
    if set_on:
        setting = pairs_of(subjects(set_on), passages, unrelated)
        facts["set on"] = {kind: separation(setting, kind) for kind in kinds}
        protocol.save_json(output, facts)
    paths = [model, *(independent or ()), *(alone or ())]
    judged = pairs_of(subjects(paths), passages, unrelated)
    facts["rows"] = judged
    count = sum(row["related"] for row in judged)
    table = Table(
        "copy of the model", *kinds, title=f"{count} related, {len(judged) - count} unrelated pairs"
    )
    main_origin = judged[0]["a"][0]
    for row in judged:
        if row["related"] and row["a"][0] == main_origin:
            table.add_row(row["b"][1], *[f"{row[kind]:.3f}" for kind in kinds])
    for kind in kinds:
        facts[kind] = separation(judged, kind)
        if set_on:
            before = facts["set on"][kind]
            line = (before["least_related"] + before["highest_unrelated"]) / 2
            yes, no = split_scores(judged, kind)
            facts[kind]["wrong"] = sum(v < line for v in yes) + sum(v >= line for v in no)
            facts[kind]["threshold"] = line
    for name in facts[NETWORKS]:
        table.add_row(name.replace("_", " "), *[f"{facts[kind][name]:.3f}" for kind in kinds])
    Console(width=220).print(table)
    protocol.save_json(output, facts)


if __name__ == "__main__":
    torch.set_num_threads(1)
    typer.run(main)
