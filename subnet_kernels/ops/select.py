"""Selection: exact top-k of scores, and thresholds, to bits; one call for many layers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from subnet_kernels import reference
from subnet_kernels.ops import _checks as check
from subnet_kernels.ops._library import define


def _bits_like(scores: Sequence[Tensor], *_, **__) -> list[Tensor]:
    return [s.new_empty(reference.nbytes(s.numel()), dtype=torch.uint8) for s in scores]


_select = define(
    'select(Tensor[] scores, int[] k, str by="magnitude", str ties="last") -> Tensor[]', reference.select, _bits_like
)
_refresh = define(
    "refresh_(Tensor[] scores, Tensor[] weights, int[] k, Tensor(a!)[] bits, Tensor(b!)[] w_eff, Tensor(c!)[] hints, "
    'str by="magnitude", str ties="last") -> ()',
    reference.refresh_,
    lambda *_, **__: None,
)


def k_sort(n: int, density: float) -> int:
    """Kept weights by SupSup's rule: n - int((1 - density) * n), in Python doubles.

    Raises ValueError unless n >= 0 and 0 < density <= 1.
    """
    _check_n("k_sort", n)
    check_density("k_sort", density)
    return n - int((1 - density) * n)


def k_kth(n: int, density: float) -> int:
    """Kept weights by WSN's rule: n - round(.01 * ((1 - density) * 100) * (n - 1)), in Python doubles and in that order.

    Rounds half to even. 0 for n = 0. Raises ValueError unless n >= 0 and 0 < density <= 1.
    """
    _check_n("k_kth", n)
    check_density("k_kth", density)
    return n - round(0.01 * ((1 - density) * 100) * (n - 1)) if n else 0


def _check_n(where: str, n: int) -> None:
    if not isinstance(n, (int, torch.SymInt)) or isinstance(n, bool) or n < 0:
        raise ValueError(f"{where}: n must be an int of at least 0, got {n!r}")


def check_density(where: str, density: float) -> None:
    """Raise ValueError unless 0 < density <= 1."""
    if not isinstance(density, (int, float)) or isinstance(density, bool) or not 0 < density <= 1:
        raise ValueError(f"{where}: density must be in (0, 1], got {density!r}")


def select(
    scores: Tensor | Sequence[Tensor], k: int | Sequence[int], by: str = "magnitude", ties: str = "last"
) -> Tensor | list[Tensor]:
    """The exact top-k of scores as packed bits.

    scores: float tensor of any shape and strides, or a list of them; k: kept weights, 0 <= k <= N, an int or one each -> uint8
    (ceil(N/512)*64,), or a list of them.

    The key is \\|score\\| (``by="magnitude"``) or the score (``"value"``); NaN counts as largest, -0.0 equals +0.0. Ties at the cut:
    ``"last"`` keeps higher logical indices, ``"first"`` lower ones, ``"all"`` every one (the count may exceed k, as in WSN's code).
    Not differentiable: see `subnet_linear` for the straight-through rule. Raises ValueError on a bad argument.
    """
    single = isinstance(scores, Tensor)
    tensors = [scores] if single else check.tensors("select", "scores", scores)
    sizes = list(k) if isinstance(k, (list, tuple)) else [k] * len(tensors)
    if len(tensors) != len(sizes):
        raise ValueError(f"select: k must be one int or one for each score tensor, got {len(sizes)} for {len(tensors)} tensors")
    check.choice("select", "by", by, check.BY)
    check.choice("select", "ties", ties, check.TIES)
    for i, (s, n) in enumerate(zip(tensors, sizes)):
        check.floating("select", "scores" if single else f"scores[{i}]", s)
        check.device("select", f"scores[{i}]", s, tensors[0])
        check_k("select", n, s.numel())
    bits = _select([s.detach() for s in tensors], sizes, by, ties) if tensors else []
    return bits[0] if single else bits


def check_k(where: str, k: int, n: int) -> None:
    """Raise ValueError unless k is an int with 0 <= k <= n."""
    if not isinstance(k, (int, torch.SymInt)) or isinstance(k, bool) or not 0 <= k <= n:
        raise ValueError(f"{where}: k must be an int between 0 and {n}, got {k!r}")


def refresh_(
    scores: Sequence[Tensor],
    weights: Sequence[Tensor],
    k: Sequence[int],
    bits: Sequence[Tensor],
    w_eff: Sequence[Tensor],
    hints: Sequence[Tensor],
    by: str = "magnitude",
    ties: str = "last",
) -> None:
    """`select` of many layers in one call, written into `bits`, and the effective weight into `w_eff` where that is not empty.

    scores, weights: float, equal shapes in pairs; k: one int each; bits: uint8 (ceil(N/512)*64,); w_eff: contiguous, weight's
    shape and dtype, or 0 elements where it is not wanted; hints: float64 (4,) each, kept by the caller from call to call, zeros at
    first, which change speed and never results.

    This is the layers' inner loop: arguments are checked by the op, not here.
    """
    _refresh(scores, weights, k, bits, w_eff, hints, by, ties)
