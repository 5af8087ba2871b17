"""Live weights: the rule by which a layer's scores choose its mask, and the straight-through gradients of weight and scores."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from subnet_kernels.ops._checks import BY, TIES, choice
from subnet_kernels.ops.apply import straight_through
from subnet_kernels.ops.masked import grad_input, grad_weight, product
from subnet_kernels.ops.select import check_density, k_kth, k_sort


@dataclass(frozen=True)
class Rule:
    """How a layer's mask follows from its scores.

    density: kept share in (0, 1], for ``select="topk"`` and ``"signed"``; k_rule: ``"sort"`` (SupSup's count) or ``"kth"`` (WSN's);
    by, ties: as `subnet_kernels.select`; select: ``"topk"``, ``"threshold"`` for score >= value (> value if not inclusive), or
    ``"signed"``, the sign of the score on the top-k of its size: entries 1, -1 and 0, for weights that do not learn.
    Raises ValueError on a bad field.
    """

    density: float = 0.5
    k_rule: str = "sort"
    by: str = "magnitude"
    ties: str = "last"
    select: str = "topk"
    value: float = 0.0
    inclusive: bool = True

    def __post_init__(self):
        check_density("Rule", self.density)
        choice("Rule", "k_rule", self.k_rule, ("sort", "kth"))
        choice("Rule", "by", self.by, BY)
        choice("Rule", "ties", self.ties, TIES)
        choice("Rule", "select", self.select, ("topk", "threshold", "signed"))
        if self.select == "signed" and self.by != "magnitude":
            raise ValueError(f"Rule: by must be 'magnitude' where select is 'signed', got {self.by!r}")

    def k(self, n: int) -> int:
        """Kept weights of a layer of n."""
        return (k_sort if self.k_rule == "sort" else k_kth)(n, self.density)

    @property
    def key(self) -> str:
        """What the scores are compared by: their sign enters the straight-through rule only where it is the magnitude alone."""
        return self.by if self.select == "topk" else "value"

    @property
    def planes(self) -> int:
        """Packed masks that one of these takes: where it is 1 and where it is -1, if it can be."""
        return 2 if self.select == "signed" else 1


def of_planes(alphas: Tensor) -> Tensor:
    """The coefficients of signed masks' planes: a mask's own for where it is 1, its negative for where it is -1; (..., K) -> (..., 2K)."""
    return torch.stack([alphas, -alphas], -1).flatten(-2)


class LiveWeight(torch.autograd.Function):
    """The materialised effective weight in place of (weight, scores); gradients straight through to both."""

    generate_vmap_rule = True

    @staticmethod
    def forward(weight, scores, w_eff, bits, frozen, by):
        # the alias shares the version counter: a refresh between forward and backward is an error, not a wrong gradient
        return w_eff.detach()

    @staticmethod
    def setup_context(ctx, inputs, output):
        weight, scores, _, bits, frozen, ctx.by = inputs
        ctx.save_for_backward(weight, scores, bits, frozen)

    @staticmethod
    def backward(ctx, grad):
        weight, scores, bits, frozen = ctx.saved_tensors
        need_weight, need_scores = ctx.needs_input_grad[:2]
        d_weight, d_scores = straight_through(grad, weight, scores, bits, frozen, ctx.by, need_weight, need_scores)
        return d_weight if need_weight else None, d_scores if need_scores else None, None, None, None, None


class EagerLiveWeight(torch.autograd.Function):
    """`LiveWeight` without `setup_context`, which costs 20 us a call in Python and which only func transforms and compile need."""

    @staticmethod
    def forward(ctx, weight, scores, w_eff, bits, frozen, by):
        ctx.by = by
        ctx.save_for_backward(weight, scores, bits, frozen)
        return w_eff.detach()

    backward = LiveWeight.backward


class FusedWeight(torch.autograd.Function):
    """The materialised effective weight whose gradient goes on as it is, to the weight where it learns, else to the scores.

    The optimizer's step makes both gradients of it (``fuse_ste``).
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(weight, scores, w_eff):
        return w_eff.detach()  # an alias, as `LiveWeight`'s

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, grad):
        need_weight, need_scores, _ = ctx.needs_input_grad
        return grad if need_weight else None, grad if need_scores and not need_weight else None, None


class EagerFusedWeight(torch.autograd.Function):
    """`FusedWeight` without `setup_context`, as `EagerLiveWeight`."""

    @staticmethod
    def forward(ctx, weight, scores, w_eff):
        return w_eff.detach()

    backward = FusedWeight.backward


class LiveLinear(torch.autograd.Function):
    """y = x W_eff^T + b of a live layer in one node, for eager mode; the gradients go straight through to weight and scores."""

    @staticmethod
    def forward(ctx, x, weight, scores, bias, w_eff, bits, frozen, by):
        ctx.by = by
        ctx.save_for_backward(x, w_eff, weight, scores, bits, frozen)  # which finds out whether they were written since
        return product(x, w_eff, None, bias)

    @staticmethod
    def backward(ctx, grad):
        x, w_eff, weight, scores, bits, frozen = ctx.saved_tensors
        need_x, need_weight, need_scores, need_bias, *_ = ctx.needs_input_grad
        d_weight = d_scores = None
        if torch.is_grad_enabled():  # the backward is recorded itself
            effective = LiveWeight.apply(weight, scores, w_eff, bits, frozen, ctx.by)
            d_x = grad @ effective if need_x else None
            total = grad.reshape(-1, grad.shape[-1]).t() @ x.reshape(-1, x.shape[-1])
            d_weight, d_scores = straight_through(total, weight, scores, bits, frozen, ctx.by, need_weight, need_scores)
        else:
            d_x = grad_input(grad, w_eff, None) if need_x else None
            if need_scores:
                d_weight, d_scores = grad_weight(grad, x, weight, scores, bits, frozen, ctx.by, need_weight)
            elif need_weight:
                d_weight = grad_weight(grad, x, None, None, bits, frozen)[0]
        d_bias = grad.reshape(-1, grad.shape[-1]).sum(0) if need_bias else None
        return d_x, d_weight if need_weight else None, d_scores if need_scores else None, d_bias, None, None, None, None


class FusedLinear(torch.autograd.Function):
    """`LiveLinear` whose weight gradient goes on as it is, as in `FusedWeight`."""

    @staticmethod
    def forward(ctx, x, weight, scores, bias, w_eff):
        ctx.parameters = weight, scores
        ctx.save_for_backward(x, w_eff)
        return product(x, w_eff, None, bias)

    @staticmethod
    def backward(ctx, grad):
        x, w_eff = ctx.saved_tensors
        need_x, need_weight, need_scores, need_bias, _ = ctx.needs_input_grad
        d_x = total = None
        if torch.is_grad_enabled():
            if need_x:
                d_x = grad @ FusedWeight.apply(*ctx.parameters, w_eff)
            if need_weight or need_scores:
                total = grad.reshape(-1, grad.shape[-1]).t() @ x.reshape(-1, x.shape[-1])
        else:
            if need_x:
                d_x = grad_input(grad, w_eff, None)
            if need_weight or need_scores:
                total = grad_weight(grad, x)[0]
        d_bias = grad.reshape(-1, grad.shape[-1]).sum(0) if need_bias else None
        return d_x, total if need_weight else None, total if need_scores and not need_weight else None, d_bias, None
