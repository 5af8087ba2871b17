"""Whose task is it? Each row's own gradient to the coefficients of a superposed model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from subnet_kernels import ops
from subnet_kernels.layers import SubnetConv2d, SubnetLayer, SubnetLinear

CHUNK = 1 << 24  # floats of patches, or of gradients, that a convolution's rows have in memory at once


def check_traceable(layers: Mapping[str, SubnetLayer]) -> None:
    """Raise ValueError unless `traced_alpha_grad` can go through these layers."""
    for key, layer in layers.items():
        if not isinstance(layer, SubnetLinear) and not (isinstance(layer, SubnetConv2d) and layer.groups == 1):
            raise ValueError(f"row_alpha_grad: layer {key!r} must be linear or an ungrouped Conv2d, got {type(layer).__name__}")


def traced_alpha_grad(
    model: nn.Module, layers: Mapping[str, SubnetLayer], x: Tensor, objective: Callable[[Tensor], Tensor], like: Tensor
) -> Tensor:
    """Of a superposed model, the gradient to the alphas of every row's own objective: x (B, ...) -> (B, K).

    objective: logits (B, C) -> (B,), row b depending on row b alone; like: the alphas (..., K). One forward and backward of the summed
    objective, in which the layers keep their inputs, then `alpha_grad` of every layer.
    """
    superposed = list(layers.values())
    banks = [layer._mix[0] for layer in superposed]
    try:
        for layer in superposed:
            layer._trace = []
        with torch.enable_grad():
            value = objective(model(x)).sum()
        calls = [(layer, bank, *call) for layer, bank in zip(superposed, banks) for call in layer._trace]
    finally:
        for layer in superposed:
            layer._trace = None
    grads = torch.autograd.grad(value, [y for *_, y in calls], allow_unused=True)
    total = x.new_zeros((x.shape[0], like.shape[-1]), dtype=like.dtype)
    for (layer, bank, inp, _), grad in zip(calls, grads):
        if grad is None:  # what this call computed does not reach the objective
            continue
        if inp.shape[0] % x.shape[0]:
            raise ValueError(f"row_alpha_grad: a layer's input must have {x.shape[0]} rows first, got {tuple(inp.shape)}")
        rows = _conv_rows(layer, bank, inp, grad) if isinstance(layer, SubnetConv2d) else _linear_rows(layer, bank, inp, grad)
        if layer.rule.planes == 2:
            rows = rows[:, ::2] - rows[:, 1::2]
        total += rows.reshape(x.shape[0], -1, rows.shape[1]).sum(1)
    return total


def _linear_rows(layer: SubnetLinear, bank: Sequence[Tensor], x: Tensor, grad: Tensor) -> Tensor:
    weight = layer.weight.detach()
    return ops.alpha_grad(x.reshape(-1, weight.shape[1]), grad.reshape(-1, weight.shape[0]), weight, bank)


def _conv_rows(layer: SubnetConv2d, bank: Sequence[Tensor], x: Tensor, grad: Tensor) -> Tensor:
    """A row has many positions: their sum, the row's own gradient to the weight, meets every mask once, and not every position does."""
    weight, positions, parts = layer.weight.detach(), grad[0, 0].numel(), []
    each = max(1, CHUNK // max(1, max(positions, len(weight)) * weight[0].numel()))
    for some, of in zip(x.split(each), grad.flatten(2).split(each)):
        own = torch.bmm(of, _columns(layer, some))
        parts.append(torch.ops.subnet_kernels.superpose_grad(own.view(-1, *weight.shape), weight, bank))
    return torch.cat(parts)


def _columns(layer: SubnetConv2d, x: Tensor) -> Tensor:
    """The input patches of a convolution: (B, C, H, W) -> (B, positions, C * kernel)."""
    padding = layer.padding
    if isinstance(padding, str) or layer.padding_mode != "zeros":
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        x, padding = F.pad(x, layer._reversed_padding_repeated_twice, mode=mode), 0
    return F.unfold(x, layer.kernel_size, layer.dilation, padding, layer.stride).transpose(1, 2)
