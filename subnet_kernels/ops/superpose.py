"""Superposition: one weight through many masks at once, and the gradients that tell the masks apart."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from subnet_kernels import reference
from subnet_kernels.ops import _checks as check
from subnet_kernels.ops._library import define, one_by_one


def _tasks(bank: Sequence[Tensor]) -> int:
    return sum(block.shape[1] for block in bank)


def _superpose_fake(weight, bank, alphas):
    rows = alphas.shape[:1] if alphas is not None and alphas.dim() == 2 else ()
    return weight.new_empty((*rows, *weight.shape))


def _superpose_vmap(info, in_dims, weight, bank, alphas):
    """Mapped alphas alone are rows of one call, which reads the bits once; anything else is taken one by one."""
    if in_dims[2] is None or any(dim is not None for dim in _flat(in_dims[:2])):
        return one_by_one(_superpose)(info, in_dims, weight, bank, alphas)
    rows = alphas.movedim(in_dims[2], 0)
    out = _superpose(weight, bank, rows.reshape(-1, rows.shape[-1]))
    return out.reshape(*rows.shape[:-1], *weight.shape), 0


def _superpose_grad_fake(grad, weight, bank):
    return weight.new_empty((*grad.shape[: grad.dim() - weight.dim()], _tasks(bank)))


def _superpose_grad_vmap(info, in_dims, grad, weight, bank):
    """As for superpose: mapped gradients alone are rows of one call."""
    if in_dims[0] is None or any(dim is not None for dim in _flat(in_dims[1:])):
        return one_by_one(_superpose_grad)(info, in_dims, grad, weight, bank)
    rows = grad.movedim(in_dims[0], 0)
    out = _superpose_grad(rows.reshape(-1, *weight.shape), weight, bank)
    return out.reshape(*rows.shape[: rows.dim() - weight.dim()], -1), 0


def _flat(dims):
    return [d for dim in dims for d in (dim if isinstance(dim, (list, tuple)) else (dim,))]


_superpose = define(
    "superpose(Tensor weight, Tensor[] bank, Tensor? alphas) -> Tensor", reference.superpose, _superpose_fake, _superpose_vmap
)
_superpose_counts = define(
    "superpose_counts(Tensor weight, Tensor counts, int tasks) -> Tensor",
    reference.superpose_counts,
    lambda weight, counts, tasks: torch.empty_like(weight, memory_format=torch.contiguous_format),
)
_superpose_grad = define(
    "superpose_grad(Tensor grad, Tensor weight, Tensor[] bank) -> Tensor",
    reference.superpose_grad,
    _superpose_grad_fake,
    _superpose_grad_vmap,
)
_alpha_grad = define(
    "alpha_grad(Tensor x, Tensor grad_y, Tensor weight, Tensor[] bank) -> Tensor",
    reference.alpha_grad,
    lambda x, grad_y, weight, bank: x.new_empty((x.shape[0], _tasks(bank))),
)


class Superpose(torch.autograd.Function):
    """W * sum_k alpha_k M_k; dW = G * sum_k alpha_k M_k, d alpha_k = <G * W, M_k>. Rows of alphas: each its own, dW their sum."""

    generate_vmap_rule = True

    @staticmethod
    def forward(weight, alphas, equal, counts, *bank):
        if equal and counts is not None:
            return _superpose_counts(weight, counts, alphas.shape[0])
        return _superpose(weight, list(bank), None if equal else alphas)

    @staticmethod
    def setup_context(ctx, inputs, output):
        weight, alphas, ctx.equal, counts, *bank = inputs
        ctx.save_for_backward(weight, alphas, counts, *bank)

    @staticmethod
    def backward(ctx, grad):
        weight, alphas, counts, *bank = ctx.saved_tensors
        need_weight, need_alphas = ctx.needs_input_grad[:2]
        d_weight = _weighed(grad, weight, alphas, ctx.equal, counts, bank) if need_weight else None
        d_alphas = SuperposeGrad.apply(grad, weight, *bank).to(alphas.dtype) if need_alphas else None
        return d_weight, d_alphas, None, None, *[None] * len(bank)


class SuperposeCounts(torch.autograd.Function):
    """The same with equal alphas that get no gradient, from counts: the masks take no part, so their number costs nothing."""

    generate_vmap_rule = True

    @staticmethod
    def forward(weight, counts, tasks):
        return _superpose_counts(weight, counts, tasks)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, counts, ctx.tasks = inputs
        ctx.save_for_backward(counts)

    @staticmethod
    def backward(ctx, grad):
        return SuperposeCounts.apply(grad, *ctx.saved_tensors, ctx.tasks), None, None


class SuperposeGrad(torch.autograd.Function):
    """<G * W, M_k> for every k, of each row of G if it has any; its gradient to G is W * sum_k g_k M_k, and that to W with G for W."""

    generate_vmap_rule = True

    @staticmethod
    def forward(grad, weight, *bank):
        return _superpose_grad(grad, weight, list(bank))

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad):
        first, second, *bank = ctx.saved_tensors
        need_first, need_second = ctx.needs_input_grad[:2]
        d_first = Superpose.apply(second, grad, False, None, *bank) if need_first else None
        d_second = _weighed(first, second, grad, False, None, bank) if need_second else None
        return d_first, d_second, *[None] * len(bank)


def _weighed(grad, weight, alphas, equal, counts, bank):
    """G * sum_k alpha_k M_k, summed over the rows where G has any."""
    if grad.dim() == weight.dim():
        return Superpose.apply(grad, alphas, equal, counts, *bank)
    if not len(grad):
        return torch.zeros_like(weight, memory_format=torch.contiguous_format)
    return torch.stack([Superpose.apply(g, a, equal, counts, *bank) for g, a in zip(grad, alphas)]).sum(0)


def pack_bank(masks: Tensor) -> list[Tensor]:
    """K masks to a bank: bool (K, *shape) -> blocks (ceil(N/512), k, 64) uint8, k = 64 but for the last.

    Raises ValueError if masks is not bool with at least one mask.
    """
    check.tensor("pack_bank", "masks", masks)
    if masks.dtype != torch.bool or masks.dim() < 2 or not len(masks):
        raise ValueError(
            f"pack_bank: masks must be bool of shape (K, *shape) with K >= 1, got {masks.dtype} of {tuple(masks.shape)}"
        )
    return reference.pack_bank(masks)


def superpose(weight: Tensor, bank: Sequence[Tensor], alphas: Tensor | None = None, counts: Tensor | None = None) -> Tensor:
    """W * sum_k alpha_k M_k, from packed bits.

    weight: (*shape) float; bank: blocks of K masks; alphas: (K,) float, (R, K) for R superpositions that read the bits once, or None
    for 1/K each; counts: (*shape) int32, how many masks open each weight, cached by the caller, so that equal alphas read no mask
    -> (*shape), or (R, *shape). Differentiable in weight and alphas (twice); under vmap, mapped alphas are such rows.
    Raises ValueError on a bad argument.
    """
    check.floating("superpose", "weight", weight)
    if counts is not None:
        check.tensor("superpose", "counts", counts)
        if counts.shape != weight.shape or counts.dtype != torch.int32:
            raise ValueError(
                f"superpose: counts must be int32 of shape {tuple(weight.shape)}, got {counts.dtype} of {tuple(counts.shape)}"
            )
        check.device("superpose", "counts", counts, weight)
    if alphas is None and counts is not None:
        return SuperposeCounts.apply(weight, counts, _number_of_tasks(bank, weight))
    tasks = check.bank("superpose", bank, weight.numel(), weight)
    equal = alphas is None
    if equal:
        alphas = weight.new_full((tasks,), 1 / tasks)
    check.floating("superpose", "alphas", alphas)
    if alphas.dim() not in (1, 2) or alphas.shape[-1] != tasks:
        raise ValueError(
            f"superpose: alphas must have shape ({tasks},) or (R, {tasks}), one for each task of the bank, got {tuple(alphas.shape)}"
        )
    check.device("superpose", "alphas", alphas, weight)
    return superpose_weight(weight, bank, alphas, equal, None)


def _number_of_tasks(bank: Sequence[Tensor], weight: Tensor) -> int:
    """Tasks of a bank that is not read: the first block is checked, of the others only how many tasks they hold is asked."""
    try:
        check.bank("superpose", bank[:1], weight.numel(), weight)
        return sum([block.size(1) for block in bank])
    except (AttributeError, IndexError, TypeError):
        return check.bank("superpose", bank, weight.numel(), weight)


def superpose_weight(weight: Tensor, bank: Sequence[Tensor], alphas: Tensor, equal: bool, counts: Tensor | None) -> Tensor:
    """`superpose` without checks. With `equal`, alphas must all be 1/K: they are not read, yet receive their gradient."""
    if equal and counts is not None and not alphas.requires_grad:
        return SuperposeCounts.apply(weight, counts, alphas.shape[0])
    return Superpose.apply(weight, alphas, equal, counts, *bank)


def alpha_grad(x: Tensor, grad_y: Tensor, weight: Tensor, bank: Sequence[Tensor]) -> Tensor:
    """Gradient of a linear layer's objective to the alphas, for every row of the batch by itself.

    x: (B, I); grad_y: (B, O), the gradient at the layer's output; weight: (O, I); one dtype; bank: blocks of K masks -> (B, K):
    sum_oi grad_y[b, o] (W * M_k)[o, i] x[b, i]. Not differentiable. Raises ValueError on a bad argument.
    """
    for name, value in (("x", x), ("grad_y", grad_y), ("weight", weight)):
        check.floating("alpha_grad", name, value)
    check.bank("alpha_grad", bank, weight.numel(), weight)
    if weight.dim() != 2 or x.dim() != 2 or grad_y.shape != (x.shape[0], weight.shape[0]) or x.shape[1] != weight.shape[1]:
        raise ValueError(
            f"alpha_grad: x must be (B, I), grad_y (B, O) and weight (O, I), "
            f"got {tuple(x.shape)}, {tuple(grad_y.shape)} and {tuple(weight.shape)}"
        )
    for name, value in (("x", x), ("grad_y", grad_y)):
        check.same_dtype("alpha_grad", name, value, "weight", weight)
        check.device("alpha_grad", name, value, weight)
    return _alpha_grad(x.detach(), grad_y.detach(), weight.detach(), list(bank))
