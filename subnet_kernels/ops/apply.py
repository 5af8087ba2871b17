"""Weights through a mask: the open ones, the frozen ones put back, and the straight-through gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from subnet_kernels import reference
from subnet_kernels.ops import _checks as check
from subnet_kernels.ops._library import define

_apply = define(
    "apply(Tensor weight, Tensor bits) -> Tensor",
    reference.apply,
    lambda weight, bits: torch.empty_like(weight, memory_format=torch.contiguous_format),
)
_restore = define(
    "restore_(Tensor(a!)[] weights, Tensor[] bits, Tensor[] values) -> ()", reference.restore_, lambda *_, **__: None
)


def _straight_through_fake(grad, weight, scores, bits, frozen, by="magnitude", need_weight=True, need_scores=True):
    return (
        torch.empty_like(weight, memory_format=torch.contiguous_format) if need_weight else weight.new_empty(0),
        torch.empty_like(scores, memory_format=torch.contiguous_format) if need_scores else scores.new_empty(0),
    )


_straight_through = define(
    'straight_through(Tensor grad, Tensor weight, Tensor scores, Tensor bits, Tensor? frozen, str by="magnitude", '
    "bool need_weight=True, bool need_scores=True) -> (Tensor, Tensor)",
    reference.straight_through,
    _straight_through_fake,
)


class StraightThrough(torch.autograd.Function):
    """The gradients of a straight-through weight, themselves differentiable: linear in G, and dS in W (sign(score) is flat)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(grad, weight, scores, bits, frozen, by, need_weight, need_scores):
        return _straight_through(grad, weight, scores, bits, frozen, by, need_weight, need_scores)

    @staticmethod
    def setup_context(ctx, inputs, output):
        grad, weight, scores, bits, frozen, ctx.by, ctx.need_weight, ctx.need_scores = inputs
        ctx.save_for_backward(grad, weight, scores, bits, frozen)

    @staticmethod
    def backward(ctx, g_weight, g_scores):
        grad, weight, scores, bits, frozen = ctx.saved_tensors
        d_grad = d_weight = None
        if ctx.need_weight:
            d_grad = Apply.apply(g_weight.to(grad.dtype), bits if frozen is None else bits & ~frozen)
        if ctx.need_scores:
            slope = g_scores * scores.detach().sign() if ctx.by == "magnitude" else g_scores
            through = (slope * weight).to(grad.dtype)
            d_grad = through if d_grad is None else d_grad + through
            d_weight = (slope * grad).to(weight.dtype)
        return d_grad, d_weight, None, None, None, None, None, None


def straight_through(
    grad: Tensor,
    weight: Tensor,
    scores: Tensor,
    bits: Tensor,
    frozen: Tensor | None,
    by: str = "magnitude",
    need_weight: bool = True,
    need_scores: bool = True,
) -> tuple[Tensor, Tensor]:
    """dW and dS from G, for the backward of a straight-through weight; arguments as `reference.straight_through`, not checked.

    Goes through autograd only where the backward itself is recorded (create_graph, torch.func), which an ordinary one never pays for.
    """
    function = StraightThrough.apply if torch.is_grad_enabled() else _straight_through
    return function(grad, weight, scores, bits, frozen, by, need_weight, need_scores)


class Apply(torch.autograd.Function):
    """W where open; dW = G where open. Differentiable twice, since its backward is itself."""

    generate_vmap_rule = True

    @staticmethod
    def forward(weight, bits):
        return _apply(weight, bits)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx, grad):
        (bits,) = ctx.saved_tensors
        return Apply.apply(grad, bits), None


def apply(weight: Tensor, bits: Tensor) -> Tensor:
    """W where its bit is open, +0.0 elsewhere: selected, never multiplied, so NaN behind a closed bit does not get out.

    weight: any dtype, shape and strides, N elements; bits: uint8 (ceil(N/512)*64,) -> weight's shape and dtype, contiguous.
    Differentiable in weight. Raises ValueError if sizes or devices disagree.
    """
    check.tensor("apply", "weight", weight)
    check.bits("apply", "bits", bits, weight.numel(), weight)
    return Apply.apply(weight, bits)


def restore_(weights: Sequence[Tensor], bits: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Write kept values back under their bits, in place, for a list of weights in one call.

    weights: any dtype and strides; bits: uint8 (ceil(N/512)*64,) each; values: (count(bits),) each, weight's dtype, in logical
    order. Raises ValueError if the lists, sizes, dtypes or devices disagree, and on the CPU RuntimeError if values are not as many as
    open bits; on CUDA, where nothing waits for that count, such a weight is left alone and the others are restored.
    """
    weights, bits, values = (
        check.tensors("restore_", name, value) for name, value in (("weights", weights), ("bits", bits), ("values", values))
    )
    if not len(weights) == len(bits) == len(values):
        raise ValueError(
            f"restore_: weights, bits and values must be lists of one length, got {len(weights)}, {len(bits)}, {len(values)}"
        )
    for i, (w, b, v) in enumerate(zip(weights, bits, values)):
        check.bits("restore_", f"bits[{i}]", b, w.numel(), w)
        if v.dtype != w.dtype or v.dim() != 1 or v.device != w.device:
            raise ValueError(
                f"restore_: values[{i}] must be one-dimensional {w.dtype} on {w.device}, got {tuple(v.shape)} {v.dtype} on {v.device}"
            )
    if len(weights):
        _restore([w.detach() for w in weights], bits, values)
