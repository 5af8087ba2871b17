"""Compressed weights: the open ones alone, for small batches of one task at low density."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from subnet_kernels import reference
from subnet_kernels.ops import _checks as check
from subnet_kernels.ops._library import define
from subnet_kernels.ops.bits import pack, unpack
from subnet_kernels.ops.masked import _autocasts

FORMATS = ("bitmap", "index")

# Kept share below which columns are faster than a bitmap, by device.
# CPU, 4096 x 4096 float32, one thread, columns over bitmap: one row 1.2x at .2 and .9x to 1.2x at .3; four rows 1.1x and .7x to .85x;
# sixteen rows, where a lane is a row, above 2x at both.
# H100, 4096 x 4096 bfloat16: one row 1.3x at .03 and .1, 1.1x at .3; eight rows 1.4x, 1.3x and 1.3x; denser was not measured, and
# lines through these times meet beyond .5.
INDEX_BELOW = {"cpu": 0.25, "cuda": 0.5}

# From so many weights on and up to this kept share the product is faster than PyTorch's dense one, float32 on the CPU, at one thread and
# at two. 4096 x 4096 at .1, dense over compressed: 4x to 12x at 1, 4 and 16 rows (a Xeon of family 6, model 167, and an EPYC of family
# 25, model 17). What fits the processor's caches is another matter: 1024 x 1024 at .1, one row, .8x to 2.8x, and 512 x 512 at two rows
# .6x. Between 1024 x 1024 and 4096 x 4096 it depends on the size of the caches.
BEATS_DENSE = {"weights": 1 << 24, "density": 0.1}

_compressed_linear = define(
    "compressed_linear(Tensor x, Tensor values, Tensor positions, Tensor offsets, Tensor? bias=None) -> Tensor",
    reference.compressed_linear,
    lambda x, values, positions, offsets, bias=None: x.new_empty((*x.shape[:-1], offsets.shape[0] - 1)),
)
_decompress = define(
    "decompress(Tensor values, Tensor positions, Tensor offsets, int inputs) -> Tensor",
    reference.decompress,
    lambda values, positions, offsets, inputs: values.new_empty((offsets.shape[0] - 1, inputs)),
)


class Compressed(NamedTuple):
    """The open weights of a matrix, a snapshot made by `compress`; its tensors must not be changed.

    values: (count,), in logical order; positions: a bitmap, uint8 (O, ceil(I / 64) * 8), or the columns of the values, uint16 (int32
    above 65,536 inputs) (count,); offsets: int64 (O + 1,), where each row's values begin and the last ones end; shape: (O, I);
    format: ``"bitmap"`` or ``"index"``.
    """

    values: Tensor
    positions: Tensor
    offsets: Tensor
    shape: tuple[int, int]
    format: str

    def dense(self) -> Tensor:
        """The matrix (O, I), +0.0 where it is closed."""
        return _decompress(self.values, self.positions, self.offsets, self.shape[1])


class CompressedLinear(torch.autograd.Function):
    """y = x (W where open)^T + bias; dx through the open weights."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, values, positions, offsets, bias):
        return _compressed_linear(x, values, positions, offsets, bias)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, values, positions, offsets, _ = inputs
        ctx.inputs = x.shape[-1]
        ctx.save_for_backward(values, positions, offsets)

    @staticmethod
    def backward(ctx, grad):
        need_x, *_, need_bias = ctx.needs_input_grad
        d_x = grad @ _decompress(*ctx.saved_tensors, ctx.inputs) if need_x else None
        return d_x, None, None, None, grad.reshape(-1, grad.shape[-1]).sum(0) if need_bias else None


def faster_format(kept: int, weights: int, device: str) -> str:
    """The faster format of so many weights where so many are kept, on a type of device; on an unknown one, the CPU's."""
    return "index" if kept < INDEX_BELOW.get(device, INDEX_BELOW["cpu"]) * weights else "bitmap"


def beats_dense(kept: int, weight: Tensor) -> bool:
    """Whether a weight (O, I) of which so many are open is multiplied faster compressed, as far as was measured."""
    measured = weight.device.type == "cpu" and weight.dtype == torch.float32
    n = weight.numel()
    return measured and n >= BEATS_DENSE["weights"] and kept < BEATS_DENSE["density"] * n + 1  # its number is rounded


def compress(weight: Tensor, bits: Tensor, format: str | None = None) -> Compressed:
    """The open weights of a linear layer and where they are, for `compressed_linear`.

    weight: (O, I) float; bits: uint8 (ceil(O*I/512)*64,); format: ``"bitmap"`` (1/8 byte a weight beside the values), ``"index"`` (2
    bytes a value), or None for the faster one at this density on this device. The values are copies: they do not follow the weight.
    Waits for the device. Raises ValueError on a bad argument.
    """
    check.floating("compress", "weight", weight)
    if weight.dim() != 2:
        raise ValueError(f"compress: weight must be (O, I), got {tuple(weight.shape)}")
    check.bits("compress", "bits", bits, weight.numel(), weight)
    if format is not None:
        check.choice("compress", "format", format, FORMATS)
    weight = weight.detach()
    outputs, inputs = weight.shape
    mask = unpack(bits, weight.shape)
    values = weight[mask]
    if format is None:
        format = faster_format(values.numel(), weight.numel(), weight.device.type)
    offsets = F.pad(mask.sum(1).cumsum(0), (1, 0))
    if format == "index":
        positions = mask.nonzero()[:, 1].to(torch.uint16 if inputs <= 1 << 16 else torch.int32)
    else:
        row = (inputs + 63) // 64 * 8
        positions = pack(F.pad(mask, (0, row * 8 - inputs)))[: outputs * row].view(outputs, row)
    return Compressed(values, positions, offsets, (outputs, inputs), format)


def compressed_linear(x: Tensor, weight: Compressed, bias: Tensor | None = None) -> Tensor:
    """y = x (W where open)^T + bias with a compressed weight: faster than the dense product for small batches at low density.

    x: (..., I), the dtype of the weight's values; weight: from `compress`; bias: (O,) or None -> (..., O). Differentiable in x and
    bias; values are a snapshot and get no gradient. An x that only closed weights meet takes no part, even where it is not finite.
    Under autocast x and bias are cast to the values' dtype. float16 and bfloat16 are summed in float32 and rounded once.
    Raises ValueError on a bad argument.
    """
    if not isinstance(weight, Compressed):
        raise ValueError(f"compressed_linear: weight must come from compress, got {type(weight).__name__}")
    values, positions, offsets, (outputs, inputs), _ = weight
    check.floating("compressed_linear", "x", x)
    if values.requires_grad:
        raise ValueError("compressed_linear: values must be a snapshot that needs no gradient, got one that requires it")
    if _autocasts(x.device.type):
        x, bias = x.to(values.dtype), bias.to(values.dtype) if isinstance(bias, Tensor) else bias
    if x.dim() < 1 or x.shape[-1] != inputs:
        raise ValueError(f"compressed_linear: x must be (..., {inputs}), got {tuple(x.shape)}")
    check.same_dtype("compressed_linear", "x", x, "the weight's values", values)
    check.device("compressed_linear", "x", x, values)
    if bias is not None:
        check.tensor("compressed_linear", "bias", bias)
        check.device("compressed_linear", "bias", bias, values)
        check.same_dtype("compressed_linear", "bias", bias, "the weight's values", values)
        if bias.shape != (outputs,):
            raise ValueError(f"compressed_linear: bias must have shape ({outputs},), got {tuple(bias.shape)}")
    if not torch.is_grad_enabled() and not torch._C._are_functorch_transforms_active():
        return _compressed_linear(x, values, positions, offsets, bias)
    return CompressedLinear.apply(x, values, positions, offsets, bias)
