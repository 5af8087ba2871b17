"""Threshold: score >= v or > v to bits; one call for many layers."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from subnet_kernels import reference
from subnet_kernels.ops import _checks as check
from subnet_kernels.ops._library import define
from subnet_kernels.ops.select import _bits_like

_threshold = define("threshold(Tensor[] scores, float value, bool inclusive=True) -> Tensor[]", reference.threshold, _bits_like)
_refresh_threshold = define(
    "refresh_threshold_(Tensor[] scores, Tensor[] weights, float value, bool inclusive, Tensor(a!)[] bits, Tensor(b!)[] w_eff) -> ()",
    reference.refresh_threshold_,
    lambda *_, **__: None,
)


def threshold(scores: Tensor | Sequence[Tensor], value: float, inclusive: bool = True) -> Tensor | list[Tensor]:
    """Score >= value (> value if not inclusive) as packed bits.

    scores: float tensor of any shape and strides, or a list of them -> uint8 (ceil(N/512)*64,), or a list. The comparison is
    PyTorch's in the scores' dtype: NaN is closed, -0.0 equals +0.0. SupSup on MNIST: (0, inclusive); Piggyback: (5e-3, exclusive).
    Raises ValueError on a bad argument.
    """
    single = isinstance(scores, Tensor)
    tensors = [scores] if single else check.tensors("threshold", "scores", scores)
    if not isinstance(value, (int, float)):
        raise ValueError(f"threshold: value must be a number, got {value!r}")
    for i, s in enumerate(tensors):
        check.floating("threshold", "scores" if single else f"scores[{i}]", s)
        check.device("threshold", f"scores[{i}]", s, tensors[0])
    bits = _threshold([s.detach() for s in tensors], float(value), bool(inclusive)) if tensors else []
    return bits[0] if single else bits


def refresh_threshold_(
    scores: Sequence[Tensor],
    weights: Sequence[Tensor],
    value: float,
    inclusive: bool,
    bits: Sequence[Tensor],
    w_eff: Sequence[Tensor],
) -> None:
    """`threshold` of many layers in one call, written into `bits` and, where not empty, `w_eff`; arguments as `refresh_`."""
    _refresh_threshold(scores, weights, value, inclusive, bits, w_eff)
