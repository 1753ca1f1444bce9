"""How many operations of which kind each stage of the main job takes: pure functions of sizes, exact where the code's
loops fix the number and said to be typical where the data do (the iterations of the ICA).

The one place that counts them: the dry run turns the counts into seconds (:mod:`fbn_prune.runs.rates`), and
`eval/speed/scaling.py` fits the seconds of one operation of each kind to measured runs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from fbn_prune.networks.gram import GRAM_BLOCK
from fbn_prune.networks.sampling import LEAST_BLOCKS
from fbn_prune.pruning.second_order import BLOCKS_PER_LAYER
from fbn_prune.runs.stages import KNOCKOUT_TOKENS

Counts = Mapping[str, Mapping[str, float]]
"""Stage -> kind -> amount, in the unit that :data:`KINDS` says."""

KINDS = {
    "forward": "operations of the model's own matrix products",
    "gram": "operations of the Gram matrices of activations, float32",
    "token gram": "operations of the token by token Gram matrix",
    "ica": "operations of float32 products of the ICA",
    "eigen": "cubed sizes of eigendecompositions, float64",
    "double": "operations of the second order, float64",
    "gathered": "bytes of float64 matrices copied by rows and columns",
    "moved": "bytes that element-wise work reads and writes",
    "called": "calls of small operations in sequence",
    "read": "bytes of weights read and converted",
    "written": "bytes written",
    "exchanged": "bytes summed or joined over processes",
    "told": "bytes that one process packs and tells the others",
    "tokenised": "tokens made of text",
    "started": "starts of the process: Python, torch, transformers",
    "described": "outputs described: card, report",
}
"""Kinds of operation, each with a rate of its own, and what is counted of it."""


class Amounts(dict[str, float]):
    """Kind -> amount; kinds that are not there have none."""

    def __missing__(self, kind: str) -> float:
        return 0.0

    def __add__(self, other: Mapping[str, float]) -> Amounts:
        return Amounts(
            {kind: self.get(kind, 0.0) + other.get(kind, 0.0) for kind in {**self, **other}}
        )

    def __mul__(self, factor: float) -> Amounts:
        return Amounts({kind: amount * factor for kind, amount in self.items()})


EIGEN_PRODUCTS = 12
"""Block products after which the leading eigenvectors have settled: 6 to 14 in `eval/results/ica.json`."""

ICA_ITERATIONS = 200
"""FastICA steps until the maps have settled: 11 to 741 in `eval/results/ica.json`, around 200 on random models."""

TOKEN_PANEL, EXACT_EIGEN, ICA_ROWS = 512, 1024, 4096
"""What :mod:`fbn_prune.networks.eigen` and :mod:`fbn_prune.networks.fastica` go by."""

RECOVERY_PASSES = 8.0
"""Forward passes' worth of operations in one pass of the recovery over the text: dense and cut model forward, layer by
layer and as a whole, and the cut one backward. Not fitted."""


@dataclass(frozen=True)
class ModelSizes:
    """A causal language model's sizes.

    Attributes
    ----------
    layer_parameters, parameters
        Of one decoder layer (the mean), and all that are stored.
    nbytes
        Bytes of the stored tensors.
    itemsize
        Bytes of one number in the type that the model computes in.
    """

    hidden: int
    width: int
    layers: int
    vocabulary: int
    layer_parameters: int
    parameters: int
    nbytes: int
    itemsize: int = 4


@dataclass(frozen=True)
class HeadWork:
    """The attention heads of every layer, and how many of their groups stay.

    Attributes
    ----------
    groups, kept
        Groups of heads before and after.
    channels
        What the output projection reads of one group.
    parameters
        Of all attention projections of one group.
    """

    groups: int
    kept: int
    channels: int
    parameters: int


@dataclass(frozen=True)
class Job:
    """The facts of a recipe that decide its work.

    Attributes
    ----------
    tokens, held_out, context, batch_tokens
        Tokens that calibrate and that measure; tokens of a block and of a batch.
    kept
        Neurons that stay, the mean over the layers.
    networks, network_tokens, layerwise
        Networks to discover (0: none), tokens that they are found on, and whether each layer has its own.
    passes_for_ica
        How often the model runs for the ICA: once where activations are kept, else for each of its readings.
    streamed
        Whether weights are read layer by layer, in each pass anew.
    second_order
        Whether neurons are chosen and refitted by the second order.
    known_networks
        Networks whose output energy ranks them, also where they were found before.
    knocked_out
        Networks knocked out in turn.
    matched
        Whether the calibration text is weighed by a task.
    gradient_tokens
        Tokens of the backward pass.
    width_passes, trial_widths, trial_tokens
        Passes over the evidence of all layers to choose widths, layouts tried, and tokens on which each is.
    recovery_passes
        Passes over the text in each step of the recovery.
    heads
        What cutting attention heads adds; None where none are cut.
    eigen_products, ica_iterations
        What the data decide.
    """

    tokens: int
    held_out: int
    context: int
    batch_tokens: int
    kept: float
    networks: int = 0
    network_tokens: int = 0
    layerwise: bool = False
    passes_for_ica: int = 1
    streamed: bool = False
    second_order: bool = True
    sequential: bool = False
    known_networks: int = 0
    knocked_out: int = 0
    matched: bool = False
    gradient_tokens: int = 0
    width_passes: int = 0
    trial_widths: int = 0
    trial_tokens: int = 0
    recovery_passes: int = 0
    heads: HeadWork | None = None
    eigen_products: float = EIGEN_PRODUCTS
    ica_iterations: float = ICA_ITERATIONS


def held_out_tokens(tokens: int, share: float, context: int) -> int:
    """Tokens held out beside `tokens` that calibrate, in whole blocks, as :func:`calibration_data` takes them."""
    return max(1, round(tokens * share / (1 - share) / context)) * context


def operations(model: ModelSizes, job: Job) -> dict[str, Amounts]:
    """What each stage of the main job takes, by the names that the result gives the stages.

    `rest` is what lies between stages: the start of the process, the energy of the networks.
    """
    stages: dict[str, Amounts] = {
        "rest": Amounts(started=1),
        "calibration": Amounts(tokenised=job.tokens + job.held_out),
        "load": Amounts(read=0 if job.streamed else model.nbytes),
        "dense perplexity": _losses(model, job, job.held_out),
    }
    if job.networks:
        stages["activations"] = _activations(model, job)
        stages["ica"] = _ica(model, job)
    if job.known_networks:
        weights = model.hidden * model.width * model.layers
        read = weights * model.nbytes / model.parameters if job.streamed else 0
        stages["rest"] += Amounts(ica=2.0 * weights * job.known_networks, read=read)
    if job.matched:
        stages["time courses"] = forward_pass(model, job, job.tokens) + Amounts(
            ica=2.0 * job.tokens * model.width * model.layers * max(job.known_networks, 1)
        )
    if job.knocked_out:
        once = _losses(model, job, min(job.tokens, KNOCKOUT_TOKENS))
        stages["rank"] = once * (job.knocked_out + 1)
    if job.gradient_tokens:
        there = _losses(model, job, job.gradient_tokens)
        outer = Amounts(gram=2.0 * job.gradient_tokens * model.hidden**2 * model.layers)
        stages["gradients"] = there * 2 + outer
        stages["gradients"] += Amounts(eigen=model.layers * float(model.hidden) ** 3)
    if job.width_passes:
        shaping = replace(job, sequential=False, kept=0.0, second_order=True)  # all go in order
        stages["widths"] = _prune(model, shaping) * job.width_passes
        refits = refit_operations(model.hidden, model.width, job.kept)
        stages["widths"] += refits * (model.layers * job.trial_widths)
        if job.trial_widths:
            once = _losses(model, job, job.trial_tokens)
            stages["trial"] = once * (job.trial_widths + 1)
    stages["prune"] = _prune(model, job)
    smaller = _cut(model, job)
    stages["pruned perplexity"] = _losses(smaller, job, job.held_out)
    if job.recovery_passes:
        once = _losses(model, job, job.tokens)
        stages["recovery"] = once * (RECOVERY_PASSES * job.recovery_passes)
        stages["recovery"] += Amounts(read=model.nbytes)
    maps = 4.0 * job.known_networks * model.width * model.layers
    stages["export"] = Amounts(described=1, read=model.nbytes, written=smaller.nbytes + maps)
    return stages


def of_one_process(
    counts: Counts, processes: int, layers: int, *, sequential: bool = False
) -> dict[str, Amounts]:
    """What one of several processes waits for: its share of what they share, and all that one does for them.

    Tokens are shared (perplexities, forward passes, Gram matrices), and one-shot also the layers' second order, a
    layer a process at a time. Every process reads the weights; the ICA and the export are one's work, or each one's.
    """
    if processes == 1:
        return {stage: Amounts(kinds) for stage, kinds in counts.items()}
    alone = {"rest", "calibration", "load", "ica", "gradients", "recovery", "export"}
    portions = dict.fromkeys(("forward", "gram", "moved", "called"), 1 / processes)
    if not sequential:
        portions |= dict.fromkeys(("double", "gathered"), math.ceil(layers / processes) / layers)
    return {
        stage: Amounts(
            {
                kind: amount * (1.0 if stage in alone else portions.get(kind, 1.0))
                for kind, amount in kinds.items()
            }
        )
        for stage, kinds in counts.items()
    }


def exchanges(model: ModelSizes, job: Job) -> Amounts:
    """What passes between the processes of a job: each layer's Gram matrix and sampled activations, finished layers."""
    grams = 8.0 * model.width**2 * (2 if job.sequential else 1)
    sampled = 4.0 * _sample(job) * model.width if job.networks else 0.0
    finished = model.nbytes / model.parameters * model.hidden * job.kept
    return Amounts(exchanged=model.layers * (grams + sampled), told=model.layers * finished)


def forward_pass(model: ModelSizes, job: Job, tokens: int) -> Amounts:
    """All decoder layers on `tokens`, without the output embedding."""
    attention = 4.0 * min(job.context, tokens) * model.hidden  # scores and their use, for one token
    products = 2.0 * model.layer_parameters + attention
    moved = (12.0 * model.hidden + 6.0 * model.width) * model.itemsize
    return Amounts(
        forward=tokens * model.layers * products,
        moved=tokens * model.layers * moved,
        called=model.layers * math.ceil(tokens / job.batch_tokens),
        read=_layers_bytes(model) if job.streamed else 0.0,
    )


def gram_operations(tokens: float, width: float) -> Amounts:
    """The upper block triangle of one layer's Gram matrix, and its conversion to float64."""
    return Amounts(gram=tokens * width * (width + GRAM_BLOCK), moved=32.0 * width**2)


def second_order_operations(
    hidden: float, width: float, kept: float, blocks_in_all: int = BLOCKS_PER_LAYER
) -> Amounts:
    """Choosing `kept` of `width` inputs of one output projection, [hidden, width], and nothing else.

    A factorisation (width³ / 3) and an inverse (2 width³ / 3), then blocks leave: each updates what is left of the
    inverse, which comes to 2 (width³ - kept³) / 3, and of the weights, hidden (width² - kept²). `blocks_in_all` would
    leave if nothing stayed.
    """
    removed = width**3 - kept**3
    blocks = blocks_in_all * (1 - kept / width)
    # Who goes changes places with the last: two rows, two columns of the inverse, and two columns of the weights each.
    swapped = 2 * (width**2 - kept**2) + 2 * hidden * (width - kept)
    # Before each block the weights are squared and summed, and after it the inverse's update is read and written.
    weights = 3 * hidden * (width + kept) / 2 * blocks
    return Amounts(
        double=width**3 + 2 * removed / 3 + hidden * (width**2 - kept**2),
        gathered=8.0 * swapped,
        moved=8.0 * weights,
        called=16 * blocks,
    )


def head_operations(hidden: float, tokens: float, heads: HeadWork) -> Amounts:
    """Statistics of what one layer's heads put out, the choice among their groups, and the refit.

    Before each group leaves, the cost of each left is solved for: its own block of the inverse, against its weights.
    """
    width, kept = heads.groups * heads.channels, heads.kept * heads.channels
    tried = (heads.groups * (heads.groups + 1) - heads.kept * (heads.kept + 1)) / 2
    each = 2 * heads.channels**3 / 3 + 2 * heads.channels**2 * hidden
    return (
        gram_operations(tokens, width)
        + second_order_operations(hidden, width, kept, heads.groups)
        + refit_operations(hidden, width, kept)
        + Amounts(double=tried * each)
    )


def refit_operations(hidden: float, width: float, kept: float) -> Amounts:
    """Least squares for the weights of the kept inputs, and the relative error of the outcome."""
    target = 2 * hidden * width * kept + 2 * hidden * kept**2
    solved = kept**3 / 3 + 2 * hidden * kept**2
    error = 4 * hidden * width**2
    return Amounts(
        double=target + solved + error, gathered=8.0 * (kept**2 + width * kept), called=6
    )


def _losses(model: ModelSizes, job: Job, tokens: int) -> Amounts:
    """A pass with logits and the loss of each token."""
    counts = forward_pass(model, job, tokens)
    counts["forward"] += 2.0 * tokens * model.hidden * model.vocabulary
    counts["moved"] += tokens * model.vocabulary * (model.itemsize + 5 * 4.0)
    if job.streamed:
        counts["read"] += model.nbytes - _layers_bytes(model)
    return counts


def _sample(job: Job) -> int:
    return min(job.network_tokens, job.tokens)


def _activations(model: ModelSizes, job: Job) -> Amounts:
    """The sampled tokens through the model, each layer's activations standardised."""
    sampled = _sample(job)
    run = min(max(sampled, LEAST_BLOCKS * job.context), job.tokens)
    counts = forward_pass(model, job, run)
    counts["moved"] += 6.0 * 4 * sampled * model.width * model.layers
    return counts * job.passes_for_ica


def _ica(model: ModelSizes, job: Job) -> Amounts:
    """Token Gram, its eigenvectors, projection, whitening and fixed point iterations."""
    if not job.layerwise:
        return _ica_of(model.width * model.layers, job)
    return _ica_of(model.width, job) * model.layers


def _ica_of(neurons: int, job: Job) -> Amounts:
    tokens, k = _sample(job), job.networks
    counts = Amounts({"token gram": 1.0 * tokens * (tokens + TOKEN_PANEL) * neurons})
    block = max(32, min(96, k))
    capacity = min(6 * (k + block), tokens // 2)
    if tokens <= EXACT_EIGEN or capacity < k + 4 * block:
        counts["eigen"] += float(tokens) ** 3
    else:
        products = job.eigen_products
        basis = min(capacity, products * block) / 2
        each = 2.0 * tokens**2 * block + 2 * (4 * tokens * basis * block + 4 * tokens * block**2)
        counts["ica"] += products * each
        counts["eigen"] += 2.0 * (2 * basis) ** 3
        counts["moved"] += 4.0 * tokens**2 * 2
    counts["ica"] += 2.0 * neurons * tokens * k
    counts["double"] += 4.0 * neurons * k**2
    counts["ica"] += job.ica_iterations * 4.0 * neurons * k**2
    counts["moved"] += job.ica_iterations * 4.0 * neurons * k * 6
    counts["eigen"] += job.ica_iterations * float(k) ** 3
    counts["called"] += job.ica_iterations * (8 + 5 * math.ceil(neurons / ICA_ROWS))
    return counts


def _prune(model: ModelSizes, job: Job) -> Amounts:
    """Statistics of all layers, their cuts, and keeping these for a run that has to start again."""
    counts = forward_pass(model, job, job.tokens)
    layer = gram_operations(job.tokens, model.width)
    if job.sequential:
        counts = counts * 3
        if job.streamed:
            counts["read"] = _layers_bytes(model) * 2
        layer["gram"] += 2.0 * job.tokens * model.width**2
        layer["moved"] += 16.0 * model.width**2
    if job.second_order:
        layer += second_order_operations(model.hidden, model.width, job.kept)
        layer += refit_operations(model.hidden, model.width, job.kept)
        if job.sequential:  # scored by weights fitted to the other signal
            layer += refit_operations(model.hidden, model.width, model.width)
    else:
        layer += Amounts(double=4.0 * model.hidden * model.width**2)  # the relative error
    stored = model.nbytes / model.parameters
    layer["written"] += stored * model.hidden * job.kept
    if job.heads is not None:
        layer += head_operations(model.hidden, job.tokens, job.heads)
        layer["written"] += stored * model.hidden * job.heads.kept * job.heads.channels
    return counts + layer * model.layers


def _cut(model: ModelSizes, job: Job) -> ModelSizes:
    """The sizes of the cut model: two projections of a layer are narrower, or three where it has so many parameters."""
    projections = 3 if model.layer_parameters > 3 * model.hidden * model.width else 2
    gone = round(projections * model.hidden * (model.width - job.kept))
    if job.heads is not None:
        gone += (job.heads.groups - job.heads.kept) * job.heads.parameters
    parameters = model.parameters - model.layers * gone
    return replace(
        model,
        width=max(1, round(job.kept)),
        layer_parameters=model.layer_parameters - gone,
        parameters=parameters,
        nbytes=round(model.nbytes * parameters / model.parameters),
    )


def _layers_bytes(model: ModelSizes) -> float:
    return model.layers * model.layer_parameters * (model.nbytes / model.parameters)
