"""What a layer's output lacks because the layers before it are cut, and how much of it the refit makes up for.

In a model that is cut layer by layer, each layer reads a hidden state that differs from the dense model's. Its output
lacks two things: its own difference, because it reads other activations, and the difference of the hidden state itself,
to which its output is added. A refit can aim at the output with both added. But the differences are noisy, and a refit
that aims at all of them fits that noise. So each is taken at the share that serves tokens best that were set aside: the
refitted weights are linear in the shares, so the best ones follow in closed form.

Pure numerics, independent of models. The same questions are asked, for quantised weights, by CoreQ (arXiv 2602.05902).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from scipy.optimize import lsq_linear
from torch import Tensor

from fbn_prune.pruning.damping import factored, ridge
from fbn_prune.pruning.second_order import of_others

USUAL_SHARE = 0.35
"""Share of every part where too little text is given to set some aside; measured on a model of 135 M parameters, whose
layers have 0.2 to 0.5."""

LEAST_REST = 0.25
"""The tokens that were not set aside must have this part of all weight, for a fit to them to tell anything."""


@dataclass(frozen=True)
class SetAside:
    """Tokens on which the shares are chosen.

    Attributes
    ----------
    x
        Inputs of the output projection, float32 [tokens, neurons].
    parts
        The parts of what the output lacks, float32 [parts, tokens, d].
    weights
        How often each token counts, float64 [tokens].
    """

    x: Tensor
    parts: Tensor
    weights: Tensor


@dataclass(frozen=True)
class Shortfall:
    """What the outputs lack, in parts δ.

    Attributes
    ----------
    cross
        E[δᵀx] over all tokens, float64 [parts, d, neurons].
    mean
        E[δ], float64 [parts, d].
    aside
        Tokens to choose the shares on; they are also part of `cross` and of H. None if the text is too short.
    """

    cross: Tensor
    mean: Tensor
    aside: SetAside | None


def best_shares(
    weight: Tensor,
    gram: Tensor,
    shortfall: Shortfall,
    kept: Tensor,
    *,
    mean: Tensor | None,
    tokens: float,
    damping: float,
) -> Tensor:
    """Return the share of each part with which a refit on the other tokens comes nearest to the set-aside outputs.

    Parameters
    ----------
    weight
        [d, neurons], float64.
    gram
        H = E[xᵀx] over all tokens, [neurons, neurons]; the covariance with `mean`.
    shortfall
        Its `cross` is E[δᵀx]; with `mean`, the covariance of δ and x.
    kept
        int64 [n], ascending.
    mean
        E[x] if an output bias absorbs means, else None.
    tokens
        Number of all tokens, or the sum of their weights.
    damping
        As in :func:`fbn_prune.pruning.second_order.refit`.

    Returns
    -------
    Tensor
        float64 [parts], each between 0 and 1.
    """
    aside = shortfall.aside
    rest = tokens - (0.0 if aside is None else float(aside.weights.sum()))
    if aside is None or rest < LEAST_REST * tokens:
        return weight.new_full((len(shortfall.cross),), USUAL_SHARE)
    x, parts = aside.x, aside.parts
    if mean is not None:
        x = x - mean.float()
        parts = parts - shortfall.mean[:, None].float()
    weighted = x * aside.weights[:, None].float()
    # Statistics of the tokens that were not set aside, for the kept neurons.
    others = (gram[:, kept] * tokens - (x.T @ weighted[:, kept]).double()) / rest
    missing = [
        (cross[:, kept] * tokens - (part.T @ weighted[:, kept]).double()) / rest
        for cross, part in zip(shortfall.cross, parts, strict=True)
    ]
    inner = others[kept]
    factor = factored(inner, ridge(inner, damping))

    root = aside.weights.sqrt()[:, None]
    inputs = x[:, kept].double()
    few = len(inputs) < (len(parts) + 1) * len(weight)
    solved = torch.cholesky_solve(inputs.T, factor).T if few else None

    def outputs(target: Tensor) -> Tensor:
        """What the weights fitted to a target E[tᵀx] add on the set-aside tokens."""
        if solved is not None:
            return solved @ target.T
        return inputs @ torch.cholesky_solve(target.T, factor)

    lacking = of_others(weight, x.double().T, kept).T + parts.sum(0).double()
    lacking = (lacking - outputs(of_others(weight, others, kept))) * root
    added = [outputs(one) * root for one in missing]
    products = torch.stack([torch.stack([(a * b).sum() for b in added]) for a in added])
    wanted = torch.stack([(a * lacking).sum() for a in added])
    return _in_bounds(products.cpu(), wanted.cpu()).to(weight)


def _in_bounds(products: Tensor, wanted: Tensor) -> Tensor:
    """The s in [0, 1] with the least ``sᵀ products s - 2 sᵀ wanted``."""
    scale = float(products.diagonal().max())
    if not scale > 0:
        return torch.zeros_like(wanted)
    values, vectors = torch.linalg.eigh(products / scale)
    roots = values.clamp(min=1e-12).sqrt()
    design = (roots[:, None] * vectors.T).numpy()
    target = ((vectors.T @ (wanted / scale)) / roots).numpy()
    return torch.from_numpy(lsq_linear(design, target, bounds=(0, 1)).x)
