"""Leading eigenvectors of the token Gram matrix over the neurons of all layers.

Layers are streamed: only the token-by-token Gram matrix and one layer's activations are in memory. Block Krylov
iteration with thick restarts computes the eigenvectors (Golub & Underwood 1977; Wu & Simon 2000). The spectrum of
real activations is flat, so a randomised range finder with customary settings gives wrong results without any
warning; here the iteration continues until the subspace stops moving.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fbn_prune.errors import InvalidInput
from fbn_prune.networks.gram import fast_products, quick_products

logger = logging.getLogger(__name__)

_GRAM_PANEL = 512
_SUM_COLUMNS = 512
_EXACT_UP_TO = 1024
_BASES = 6
"""The Krylov basis grows to this many times the size that a restart keeps."""


class IcaConvergenceWarning(UserWarning):
    """The eigenvectors or the maps did not settle within the allowed iterations."""


@dataclass(frozen=True)
class EigenResult:
    """The k leading eigenpairs of a symmetric matrix, largest first: `vectors` [size, k], `values` [k].

    `residual` estimates the Frobenius norm of the tangents of the angles between `vectors` and the true leading
    subspace: sqrt(sum_i (|K v_i - t_i v_i| / (t_i - t_(k+1)))^2). It is 0 for an exact decomposition.
    """

    vectors: Tensor
    values: Tensor
    iterations: int
    residual: float
    converged: bool


class TokenGram:
    """Accumulates K = sum over layers of Z_l Z_l^T, [T, T] float32; computes only the lower triangle.

    It also sums each token over neurons. The exact centring over neurons (subtracting each token's mean over the
    neurons of all layers) is then possible at the end: K - N c c^T.
    """

    def __init__(self, tokens: int, *, device: torch.device | str = "cpu") -> None:
        self.tokens = tokens
        self.neurons = 0
        self._lower: Tensor | None = torch.zeros(tokens, tokens, device=device)
        self._sums = torch.zeros(tokens, dtype=torch.float64, device=device)

    def update(self, z: Tensor, on_part: Callable[[float], None] = lambda share: None) -> None:
        """Add one layer's activations z [T, N_l]; raise InvalidInput for another number of tokens, NaN or Inf.

        `on_part` is called with each finished share of the layer's work.
        """
        if self._lower is None:
            raise RuntimeError("update after finish: the Gram matrix has been handed over")
        if z.ndim != 2 or z.shape[0] != self.tokens:
            raise InvalidInput(
                f"activations have shape {tuple(z.shape)}, not [{self.tokens}, neurons]"
            )
        z = z.to(self._lower.device, torch.float32)
        # Float32 sums over a few columns, float64 over these sums: all in float64 takes a third of the Gram's time.
        sums = sum(part.sum(dim=1).double() for part in z.split(_SUM_COLUMNS, dim=1))
        if not bool(torch.isfinite(sums).all()):
            raise InvalidInput(
                "activations contain NaN or infinite values; calibrate in a wider dtype"
            )
        self._sums += sums
        self.neurons += z.shape[1]
        with fast_products():
            for start in range(0, self.tokens, _GRAM_PANEL):
                stop = min(start + _GRAM_PANEL, self.tokens)
                self._lower[start:stop, :stop].addmm_(z[start:stop], z[:stop].T)
                on_part((stop**2 - start**2) / self.tokens**2)

    @property
    def total_variance(self) -> float:
        """Sum of squares of Z over all layers added so far; T times the number of live neurons."""
        if self._lower is None:
            raise RuntimeError("total_variance after finish: the Gram matrix has been handed over")
        return float(self._lower.diagonal().double().sum())

    def finish(self) -> Tensor:
        """Return the whole Gram matrix, centred over neurons. Callable once, because it works in place."""
        if self._lower is None:
            raise RuntimeError("finish was called before: the Gram matrix has been handed over")
        gram, self._lower = self._lower, None
        scaled = self._sums / max(self.neurons, 1) ** 0.5
        for start in range(0, self.tokens, _GRAM_PANEL):
            stop = min(start + _GRAM_PANEL, self.tokens)
            gram[start:stop, :stop] -= torch.outer(scaled[start:stop], scaled[:stop]).float()
            gram[:start, start:stop] = gram[start:stop, :start].T
            block = gram[start:stop, start:stop]
            block.copy_(block.tril() + block.tril(-1).T)
        return gram


@quick_products()
def top_eigenvectors(
    gram: Tensor,
    k: int,
    *,
    seed: int = 0,
    tol: float = 1e-2,
    max_iter: int = 200,
    on_step: Callable[[], None] = lambda: None,
) -> EigenResult:
    """Compute the k leading eigenpairs of a symmetric positive semi-definite matrix.

    Block Krylov iteration with full orthogonalisation restarts from the leading Ritz vectors when the basis is full.
    It stops once the estimated angles between the Ritz space and the true leading space are below `tol`; the ICA maps
    depend only on this space. Small matrices, and requests for a large part of the spectrum, use an exact float64
    decomposition.

    Parameters
    ----------
    gram
        [size, size] float32, symmetric.
    seed
        Seed of the starting block. It changes the result only within `tol`.
    max_iter
        Largest number of block products.
    on_step
        Called after each block product.

    Raises
    ------
    InvalidInput
        k is out of range.

    Warns
    -----
    IcaConvergenceWarning
        The subspace has not settled after `max_iter` block products.
    """
    size = gram.shape[0]
    if not 1 <= k <= size:
        raise InvalidInput(f"cannot take {k} eigenvectors of a {size} x {size} matrix")
    block = max(32, min(96, k))
    capacity = min(_BASES * (k + block), size // 2)
    if size <= _EXACT_UP_TO or capacity < k + 4 * block:
        values, vectors = torch.linalg.eigh(gram.double())
        return EigenResult(vectors.flip(1)[:, :k].float(), values.flip(0)[:k], 0, 0.0, True)

    generator = torch.Generator().manual_seed(seed)
    newest = torch.randn(size, block, generator=generator).to(gram.device)
    basis = gram.new_empty(size, capacity)
    image = gram.new_empty(size, capacity)  # gram @ basis
    ritz = torch.zeros(capacity, capacity, dtype=torch.float64, device=gram.device)
    filled, check_at, iteration, before_restart = 0, k + 4 * block, 0, float("inf")
    while True:
        iteration += 1
        span = slice(filled, filled + block)
        basis[:, span] = _orthonormal_complement(newest, basis[:, :filled])
        image[:, span] = newest = gram @ basis[:, span]
        on_step()
        filled += block
        cross = (basis[:, :filled].T @ newest).double()
        ritz[:filled, span] = cross
        ritz[span, :filled] = cross.T
        full, last = filled + block > capacity, iteration == max_iter
        if filled < check_at and not full and not last:
            continue
        values, rotation = torch.linalg.eigh(ritz[:filled, :filled])
        values, rotation = values.flip(0), rotation.flip(1)[:, : k + block].float()
        vectors, products = basis[:, :filled] @ rotation, image[:, :filled] @ rotation
        errors = (products[:, :k] - vectors[:, :k] * values[:k].float()).norm(dim=0).double()
        gaps = (values[:k] - values[k]).clamp_min(torch.finfo(torch.float64).tiny)
        residual = float((errors / gaps).norm())
        logger.debug("block product %d: basis %d, residual %.2e", iteration, filled, residual)
        # Float32 limits how small the errors can get; a cycle near that limit without progress has reached it.
        at_floor = float(errors.max()) <= 100 * torch.finfo(gram.dtype).eps * float(values[0])
        stalled = full and at_floor and residual > 0.5 * before_restart
        if residual <= tol or stalled or last:
            break
        if full:
            # The residuals of all Ritz vectors lie in the part of the last product outside the basis.
            newest = _orthonormal_complement(newest, basis[:, :filled])
            before_restart, filled = residual, k + block
            basis[:, :filled], image[:, :filled] = vectors, products
            ritz[:filled, :filled] = torch.diag(values[:filled])
        # A check decomposes the whole basis, which soon costs more than the products between two checks.
        check_at = filled + max(2 * block, filled // 2)
    if residual > tol:
        warnings.warn(
            f"the {k} leading eigenvectors had not settled after {iteration} block products: residual "
            f"{residual:.1e} > {tol:.0e}; eigenvalue {k} may be too close to the next: use another number of networks",
            IcaConvergenceWarning,
            stacklevel=2,
        )
    return EigenResult(
        vectors[:, :k].contiguous(), values[:k], iteration, residual, residual <= tol
    )


def _orthonormal_complement(block: Tensor, basis: Tensor) -> Tensor:
    """Orthonormal basis of `block` without its part in `basis`; two rounds reach full accuracy."""
    for _ in range(2):
        block = torch.linalg.qr(block - basis @ (basis.T @ block)).Q
    return block
