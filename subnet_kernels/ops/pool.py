"""Max-pooling and ReLU in one pass, for networks of which many are evaluated as one tree: what a layer's two kernels make of a node
become two nodes, halves of the channels turned into rows."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from subnet_kernels import reference
from subnet_kernels.ops import _checks as check
from subnet_kernels.ops._library import define

MOST = 15  # the widest window whose places, and one more number, fit a byte


def _fake(x, window, split):
    halves = 2 if split else 1
    y = x.new_empty((x.shape[0] * halves, -(-x.shape[1] // window), -(-x.shape[2] // window), x.shape[3] // halves))
    return y, torch.empty_like(y, dtype=torch.uint8)


def _grad_fake(grad, places, window, split, height, width):
    halves = 2 if split else 1
    return grad.new_empty((grad.shape[0] // halves, height, width, grad.shape[3] * halves))


_max_pool_relu = define("max_pool_relu(Tensor x, int window, bool split) -> (Tensor, Tensor)", reference.max_pool_relu, _fake)
_max_pool_relu_grad = define(
    "max_pool_relu_grad(Tensor grad, Tensor places, int window, bool split, int height, int width) -> Tensor",
    reference.max_pool_relu_grad,
    _grad_fake,
)


class MaxPoolRelu(torch.autograd.Function):
    """The op, of which places have no gradient."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, window, split):
        return _max_pool_relu(x, window, split)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, *ctx.how = inputs
        ctx.sizes = x.shape[1:3]
        ctx.save_for_backward(output[1])
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx, grad, _):
        (places,) = ctx.saved_tensors
        function = MaxPoolReluGrad.apply if torch.is_grad_enabled() else _max_pool_relu_grad
        return function(grad, places, *ctx.how, *ctx.sizes), None, None


class MaxPoolReluGrad(torch.autograd.Function):
    """Its gradient, linear in that of the output: what flows back to it is picked up at the same places."""

    generate_vmap_rule = True

    @staticmethod
    def forward(grad, places, window, split, height, width):
        return _max_pool_relu_grad(grad, places, window, split, height, width)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, places, ctx.window, ctx.split, *_ = inputs
        ctx.save_for_backward(places)

    @staticmethod
    def backward(ctx, grad):
        (places,), window = ctx.saved_tensors, ctx.window
        if ctx.split:
            places = torch.cat(places.chunk(2), 3)
        n, rows, columns, channels = places.shape
        grad = F.pad(grad, (0, 0, 0, columns * window - grad.shape[2], 0, rows * window - grad.shape[1]))
        windows = grad.reshape(n, rows, window, columns, window, channels).permute(0, 1, 3, 5, 2, 4).flatten(4)
        picked = windows.gather(4, places[..., None].long().clamp(max=window**2 - 1)).squeeze(4).masked_fill(places == 255, 0)
        return torch.cat(picked.chunk(2, 3)) if ctx.split else picked, None, None, None, None, None


def max_pool_relu(x: Tensor, window: int, split: bool = False) -> Tensor:
    """``F.max_pool2d(x, window, ceil_mode=True).relu()``, and with split ``torch.cat(y.chunk(2, 1))`` of that, in one pass.

    x: (N, C, H, W) of a floating dtype, fastest with channels last; window: from 1 to 15; split: C is even, and its second half follows
    as rows of its own -> (N, C, ceil(H / window), ceil(W / window)) or (2 N, C / 2, ...), x's dtype, channels last. Kept for backward is
    a byte an output. Differentiable in x, any number of times; of equal maxima the first gets the gradient. Raises ValueError on a bad
    argument.
    """
    check.floating("max_pool_relu", "x", x)
    if x.dim() != 4 or 0 in x.shape[1:]:
        raise ValueError(f"max_pool_relu: x must be (N, C, H, W) with C, H and W positive, got {tuple(x.shape)}")
    if type(window) is not int or not 1 <= window <= MOST:
        raise ValueError(f"max_pool_relu: window must be an integer from 1 to {MOST}, got {window!r}")
    if split and x.shape[1] % 2:
        raise ValueError(f"max_pool_relu: x must have an even number of channels to be split, got {x.shape[1]}")
    return MaxPoolRelu.apply(x.permute(0, 2, 3, 1), window, bool(split))[0].permute(0, 3, 1, 2)
