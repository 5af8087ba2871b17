"""Components of a basis of masks: fewer directions than masks, each a sum of the masks in shares of its own.

Both kinds lie in the span of the masks, so all that they need is how many weights every two masks share, which the bank counts in packed
bits, and a combination of components is one of the masks.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDS = 500  # of the multiplicative updates


def principal(overlap: Tensor, count: int) -> Tensor:
    """Shares of K masks in their first principal components, about 0 and not the mean: overlap (K, K), M M' of masks M (K, weights) ->
    float64 (count, K). The components are orthogonal and as large as masks are in the root mean square."""
    values, vectors = torch.linalg.eigh(overlap.double())
    values, vectors = values.flip(0)[:count], vectors.flip(1)[:, :count]
    vectors = vectors * (1 - 2 * (vectors.sum(0) < 0))  # an eigenvector's sign is any: more masks for it than against
    return (vectors * (overlap.double().trace() / len(overlap) / values.clamp(min=1e-9)).sqrt()).T


def nonnegative(overlap: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """The same of non-negative components, convex NMF: M' is nearly (M' W) H' with W, H >= 0 (K, count), by the updates of Ding, Li and
    Jordan, "Convex and Semi-Nonnegative Matrix Factorizations", TPAMI 2010, for data that are not negative -> W' with rows that sum to
    one."""
    gram = overlap.double() / overlap.double().mean().clamp(min=1e-9)
    start = torch.rand((2, len(gram), count), generator=generator, dtype=torch.float64) + 0.1
    w, h = start.to(gram.device)
    tiny = torch.finfo(torch.float64).tiny
    for _ in range(ROUNDS):
        h = h * (gram @ w / (h @ (w.T @ gram @ w)).clamp(min=tiny)).sqrt()
        w = w * (gram @ h / (gram @ w @ (h.T @ h)).clamp(min=tiny)).sqrt()
    return (w / w.sum(0).clamp(min=tiny)).T


def nearest(overlap: Tensor, shares: Tensor, coefficients: Tensor) -> Tensor:
    """What components, by their shares (count, K), weigh so that they come nearest, in squares, to masks with these coefficients (K,) ->
    (count,)."""
    gram = overlap.double()
    return torch.linalg.lstsq(shares @ gram @ shares.T, shares @ gram @ coefficients.double(), driver="gelsd").solution
