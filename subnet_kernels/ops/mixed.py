"""A batch of rows of different tasks: every row through its own task's mask."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from subnet_kernels import reference
from subnet_kernels.ops import _checks as check
from subnet_kernels.ops._library import define
from subnet_kernels.ops.masked import _autocast, _check_linear

_mixed_linear = define(
    "mixed_linear(Tensor x, Tensor weight, Tensor[] bank, Tensor task_ids, Tensor? bias=None) -> Tensor",
    reference.mixed_linear,
    lambda x, weight, bank, task_ids, bias=None: x.new_empty((x.shape[0], weight.shape[0])),
)
_mixed_linear_grad_input = define(
    "mixed_linear_grad_input(Tensor grad, Tensor weight, Tensor[] bank, Tensor task_ids) -> Tensor",
    reference.mixed_linear_grad_input,
    lambda grad, weight, bank, task_ids: grad.new_empty((grad.shape[0], weight.shape[1])),
)
_mixed_linear_grad_weight = define(
    "mixed_linear_grad_weight(Tensor grad, Tensor x, Tensor[] bank, Tensor task_ids) -> Tensor",
    reference.mixed_linear_grad_weight,
    lambda grad, x, bank, task_ids: grad.new_empty((grad.shape[1], x.shape[1])),
)


# y, dx and dW are the three contractions of one product of g, W and x, each linear in its two factors: the gradients of each are the
# other two.


class MixedLinear(torch.autograd.Function):
    """y[b] = (W where M_t(b) is open) x[b] + bias."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, weight, bias, task_ids, *bank):
        return _mixed_linear(x, weight, list(bank), task_ids, bias)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, _, *rest = inputs
        ctx.save_for_backward(x, weight, *rest)

    @staticmethod
    def backward(ctx, grad):
        x, weight, *rest = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
        d_x = MixedLinearGradX.apply(grad, weight, *rest) if need_x else None
        d_weight = MixedLinearGradWeight.apply(grad, x, *rest) if need_weight else None
        return d_x, d_weight, grad.sum(0) if need_bias else None, *[None] * len(rest)


class MixedLinearGradX(torch.autograd.Function):
    """dx[b] = g[b] (W where M_t(b) is open)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(grad, weight, task_ids, *bank):
        return _mixed_linear_grad_input(grad, weight, list(bank), task_ids)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, d_x):
        grad, weight, *rest = ctx.saved_tensors
        need_grad, need_weight = ctx.needs_input_grad[:2]
        d_grad = MixedLinear.apply(d_x, weight, None, *rest) if need_grad else None
        d_weight = MixedLinearGradWeight.apply(grad, d_x, *rest) if need_weight else None
        return d_grad, d_weight, *[None] * len(rest)


class MixedLinearGradWeight(torch.autograd.Function):
    """dW = the sum of g[b] x[b]^T where M_t(b) is open."""

    generate_vmap_rule = True

    @staticmethod
    def forward(grad, x, task_ids, *bank):
        return _mixed_linear_grad_weight(grad, x, list(bank), task_ids)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, d_weight):
        grad, x, *rest = ctx.saved_tensors
        need_grad, need_x = ctx.needs_input_grad[:2]
        d_grad = MixedLinear.apply(x, d_weight, None, *rest) if need_grad else None
        d_x = MixedLinearGradX.apply(grad, d_weight, *rest) if need_x else None
        return d_grad, d_x, *[None] * len(rest)


def mixed_linear(x: Tensor, weight: Tensor, bank: Sequence[Tensor], task_ids: Tensor, bias: Tensor | None = None) -> Tensor:
    """y[b] = (W where the mask of task task_ids[b] is open) x[b] + bias: a batch of rows of different tasks.

    x: (B, I); weight: (O, I), x's dtype; bank: blocks of K masks from `pack_bank`; task_ids: int64 (B,), each in 0..K-1; bias: (O,) or
    None -> (B, O). On a GPU ids are not checked, which would wait for the device: a row with another id is NaN there, and adds nothing
    to the gradient of the weight. Differentiable (twice) in x, weight and bias.
    Under autocast x, weight and bias are cast as for ``F.linear``. float16 and bfloat16 are summed in float32 and rounded once.
    Raises ValueError on a bad argument.
    """
    x, weight, bias = _autocast(x, weight, bias)
    _check_linear("mixed_linear", x, weight, bias)
    if x.dim() != 2:
        raise ValueError(f"mixed_linear: x must be (B, I), got {tuple(x.shape)}")
    tasks = check.bank("mixed_linear", bank, weight.numel(), weight)
    check.tensor("mixed_linear", "task_ids", task_ids)
    if task_ids.dtype != torch.int64 or task_ids.shape != x.shape[:1]:
        raise ValueError(
            f"mixed_linear: task_ids must be int64 of shape ({x.shape[0]},), got {task_ids.dtype} of {tuple(task_ids.shape)}"
        )
    check.device("mixed_linear", "task_ids", task_ids, weight)
    _check_range(task_ids, tasks)
    return MixedLinear.apply(x, weight, bias, task_ids, *bank)


def _check_range(task_ids: Tensor, tasks: int) -> None:
    if not task_ids.is_cpu or torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active() or not len(task_ids):
        return  # values cannot be looked at; the compiled op looks again
    low, high = (int(bound) for bound in task_ids.aminmax())
    if low < 0 or high >= tasks:
        raise ValueError(
            f"mixed_linear: task_ids must be between 0 and {tasks - 1}, the tasks of the bank, got {low if low < 0 else high}"
        )
