"""Masked products: linear and convolution through given bits, and the stateless layer that selects first."""

from __future__ import annotations

import torch
from torch import Tensor

from subnet_kernels import reference
from subnet_kernels.ops import _checks as check
from subnet_kernels.ops._library import define
from subnet_kernels.ops.apply import Apply, straight_through
from subnet_kernels.ops.select import _select, check_k

_DIMENSIONS = ("x", "weight")


def _masked_linear_fake(x, weight, bits, bias=None):
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _masked_linear_vmap(info, in_dims, x, weight, bits, bias=None):
    x_dim, *rest = in_dims
    if x_dim is not None and all(d is None for d in rest):  # one weight, many inputs: the mapped dimension is a batch dimension
        return product(x.movedim(x_dim, 0), weight, bits, bias), 0
    pick = lambda value, dim, i: value if dim is None else value.select(dim, i)  # noqa: E731
    arguments = list(zip((x, weight, bits, bias), (*in_dims, None)))
    return torch.stack([product(*(pick(v, d, i) for v, d in arguments)) for i in range(info.batch_size)]), 0


product = define(
    "masked_linear(Tensor x, Tensor weight, Tensor? bits, Tensor? bias=None) -> Tensor",
    reference.masked_linear,
    _masked_linear_fake,
    _masked_linear_vmap,
)
grad_input = define(
    "masked_linear_grad_input(Tensor grad_y, Tensor weight, Tensor? bits) -> Tensor",
    reference.masked_linear_grad_input,
    lambda grad_y, weight, bits: grad_y.new_empty((*grad_y.shape[:-1], weight.shape[1])),
)


def _grad_weight_fake(grad_y, x, weight=None, scores=None, bits=None, frozen=None, by="magnitude", need_weight=True):
    shape = (grad_y.shape[-1], x.shape[-1])
    return (
        (x if weight is None else weight).new_empty(shape if need_weight else 0),
        (x if scores is None else scores).new_empty(0 if scores is None else shape),
    )


grad_weight = define(
    "masked_linear_grad_weight(Tensor grad_y, Tensor x, Tensor? weight=None, Tensor? scores=None, Tensor? bits=None, "
    'Tensor? frozen=None, str by="magnitude", bool need_weight=True) -> (Tensor, Tensor)',
    reference.masked_linear_grad_weight,
    _grad_weight_fake,
)


def _masked_conv_fake(x, weight, bits, bias, stride, padding, dilation, groups):
    return _convolution(x, weight, bias, stride, padding, dilation, groups)


def _convolution(x, weight, bias, stride, padding, dilation, groups):
    return torch.convolution(x, weight, bias, stride, padding, dilation, False, [0] * len(stride), groups)


_masked_conv = define(
    "masked_conv(Tensor x, Tensor weight, Tensor bits, Tensor? bias, int[] stride, int[] padding, int[] dilation, int groups) -> Tensor",
    reference.masked_conv,
    _masked_conv_fake,
)


def _rows(t: Tensor) -> Tensor:
    return t.reshape(-1, t.shape[-1])


class MaskedLinear(torch.autograd.Function):
    """y = x (W where open)^T + b; dx through the open weights, dW = G where open. Without bits all of W is open."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, weight, bits, bias):
        return product(x, weight, bits, bias)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, bits, _ = inputs
        ctx.save_for_backward(x, weight, bits)

    @staticmethod
    def backward(ctx, grad):
        x, weight, bits = ctx.saved_tensors
        need_x, need_weight, _, need_bias = ctx.needs_input_grad
        if torch.is_grad_enabled():  # the backward is recorded itself
            opened = (lambda t: t) if bits is None else (lambda t: Apply.apply(t, bits))
            d_x = grad @ opened(weight) if need_x else None
            d_weight = opened(_rows(grad).t() @ _rows(x)) if need_weight else None
        else:
            d_x = grad_input(grad, weight, bits) if need_x else None
            d_weight = grad_weight(grad, x, None, None, bits)[0] if need_weight else None
        return d_x, d_weight, None, _rows(grad).sum(0) if need_bias else None


class EagerMaskedLinear(torch.autograd.Function):
    """`MaskedLinear` without `setup_context`, which costs 20 us a call in Python and which only func transforms and compile need."""

    @staticmethod
    def forward(ctx, x, weight, bits, bias):
        ctx.save_for_backward(x, weight, bits)
        return product(x, weight, bits, bias)

    backward = MaskedLinear.backward


class SubnetWeight(torch.autograd.Function):
    """Select from scores now; W where open. dW = G where open and not frozen; scores learn straight through."""

    generate_vmap_rule = True

    @staticmethod
    def forward(weight, scores, frozen, k, by, ties):
        (bits,) = _select([scores], [k], by, ties)
        return torch.ops.subnet_kernels.apply.default(weight, bits), bits

    @staticmethod
    def setup_context(ctx, inputs, output):
        weight, scores, frozen, _, by, _ = inputs
        ctx.by = by
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(weight, scores, output[1], frozen)

    @staticmethod
    def backward(ctx, grad, _):
        weight, scores, bits, frozen = ctx.saved_tensors
        need_weight, need_scores = ctx.needs_input_grad[:2]
        d_weight, d_scores = straight_through(grad, weight, scores, bits, frozen, ctx.by, need_weight, need_scores)
        return d_weight if need_weight else None, d_scores if need_scores else None, None, None, None, None


def masked_linear(x: Tensor, weight: Tensor, bits: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = x (W where open)^T + bias, the masked linear layer.

    x: (..., I); weight: (O, I), x's dtype; bits: uint8 (ceil(O*I/512)*64,); bias: (O,) or None -> (..., O). Differentiable (dW = G
    where open). Under autocast x, weight and bias are cast as for ``F.linear``. Raises ValueError on a bad argument.
    """
    x, weight, bias = _autocast(x, weight, bias)
    _check_linear("masked_linear", x, weight, bias)
    check.bits("masked_linear", "bits", bits, weight.numel(), weight)
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return MaskedLinear.apply(x, weight, bits, bias)
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)):
        return EagerMaskedLinear.apply(x, weight, bits, bias)
    return product(x, weight, bits, bias)


def masked_conv(
    x: Tensor,
    weight: Tensor,
    bits: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, ...] = 1,
    padding: int | tuple[int, ...] = 0,
    dilation: int | tuple[int, ...] = 1,
    groups: int = 1,
) -> Tensor:
    """Convolution in 1, 2 or 3 dimensions through the open weights.

    x: (B, C, *size); weight: (O, C // groups, *kernel), x's dtype; bits: uint8 (ceil(N/512)*64,); bias: (O,) or None; stride,
    padding, dilation: an int or one a dimension -> (B, O, *out). Differentiable. Raises ValueError on a bad argument.
    """
    x, weight, bias = _autocast(x, weight, bias)
    for name, value in zip(_DIMENSIONS, (x, weight)):
        check.floating("masked_conv", name, value)
    n = weight.dim() - 2
    if n not in (1, 2, 3) or x.dim() != weight.dim():
        raise ValueError(
            f"masked_conv: weight must have 3, 4 or 5 dimensions and x as many, got {tuple(weight.shape)} and x of {tuple(x.shape)}"
        )
    if not isinstance(groups, int) or isinstance(groups, bool) or groups < 1:
        raise ValueError(f"masked_conv: groups must be an int of at least 1, got {groups!r}")
    if x.shape[1] != weight.shape[1] * groups or weight.shape[0] % groups:
        raise ValueError(
            f"masked_conv: x must have {weight.shape[1]} * groups channels and the outputs divide by groups = {groups}, "
            f"got x of {tuple(x.shape)} and weight of {tuple(weight.shape)}"
        )
    _check_pair("masked_conv", x, weight, bias)
    check.bits("masked_conv", "bits", bits, weight.numel(), weight)
    sizes = [
        _per_dimension("masked_conv", name, v, n, least)
        for name, v, least in (("stride", stride, 1), ("padding", padding, 0), ("dilation", dilation, 1))
    ]
    reach = [d * (kernel - 1) + 1 for kernel, d in zip(weight.shape[2:], sizes[2])]
    if any(size + 2 * p < r for size, p, r in zip(x.shape[2:], sizes[1], reach)):
        raise ValueError(
            f"masked_conv: x must be at least as large as the dilated kernel {tuple(reach)}, got {tuple(x.shape[2:])} padded by {sizes[1]}"
        )
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)):
        return _convolution(x, Apply.apply(weight, bits), bias, *sizes, groups)
    return _masked_conv(x, weight, bits, bias, *sizes, groups)


def subnet_linear(
    x: Tensor,
    weight: Tensor,
    scores: Tensor,
    k: int,
    frozen: Tensor | None = None,
    bias: Tensor | None = None,
    by: str = "magnitude",
    ties: str = "last",
) -> Tensor:
    """A linear layer through the top-k of its scores, selected in this call (no cache).

    x: (..., I); weight, scores: (O, I); k: kept weights; frozen: packed bits of weights that get no gradient, or None; bias: (O,) or
    None -> (..., O). Scores learn straight through: dS = G * W (* sign(score) by magnitude), G the gradient at the effective weight;
    dW = G where open and not frozen. Raises ValueError on a bad argument.
    """
    # F.linear autocasts by itself, and scores are compared in their own dtype.
    _check_linear("subnet_linear", x, weight, bias, same_dtype=not isinstance(x, Tensor) or not _autocasts(x.device.type))
    effective = subnet_weight("subnet_linear", weight, scores, k, frozen, by, ties)
    return torch.nn.functional.linear(x, effective, bias)


def subnet_weight(where: str, weight: Tensor, scores: Tensor, k: int, frozen: Tensor | None, by: str, ties: str) -> Tensor:
    """The effective weight of `subnet_linear`, for layers of any kind. Raises ValueError naming `where`."""
    check.floating(where, "scores", scores)
    check.same_shape(where, "scores", scores, "weight", weight)
    check.device(where, "scores", scores, weight)
    check.choice(where, "by", by, check.BY)
    check.choice(where, "ties", ties, check.TIES)
    check_k(where, k, weight.numel())
    if frozen is not None:
        check.bits(where, "frozen", frozen, weight.numel(), weight)
    return SubnetWeight.apply(weight, scores, frozen, k, by, ties)[0]


def _autocast(*tensors: Tensor | None) -> list[Tensor | None]:
    kind = tensors[0].device.type if isinstance(tensors[0], Tensor) else "cpu"
    if not _autocasts(kind):
        return list(tensors)
    dtype = torch.get_autocast_dtype(kind)
    return [t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() and t.dtype != torch.float64 else t for t in tensors]


def _autocasts(kind: str) -> bool:
    return kind != "meta" and torch.is_autocast_enabled(kind)  # which raises for meta


def _check_linear(op: str, x: Tensor, weight: Tensor, bias: Tensor | None, same_dtype: bool = True) -> None:
    for name, value in zip(_DIMENSIONS, (x, weight)):
        check.floating(op, name, value)
    if weight.dim() != 2 or x.dim() < 1 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"{op}: x must be (..., I) and weight (O, I), got {tuple(x.shape)} and {tuple(weight.shape)}")
    _check_pair(op, x, weight, bias, same_dtype)


def _check_pair(op: str, x: Tensor, weight: Tensor, bias: Tensor | None, same_dtype: bool = True) -> None:
    check.device(op, "x", x, weight)
    if same_dtype:
        check.same_dtype(op, "x", x, "weight", weight)
    if bias is not None:
        check.tensor(op, "bias", bias)
        check.device(op, "bias", bias, weight)
        if same_dtype:
            check.same_dtype(op, "bias", bias, "weight", weight)
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"{op}: bias must have shape ({weight.shape[0]},), got {tuple(bias.shape)}")


def _per_dimension(op: str, name: str, value: int | tuple[int, ...], n: int, least: int) -> list[int]:
    values = list(value) if isinstance(value, (list, tuple)) else [value] * n
    if len(values) != n or any(not isinstance(v, int) or v < least for v in values):
        raise ValueError(f"{op}: {name} must be an int of at least {least} or {n} of them, got {value!r}")
    return values
