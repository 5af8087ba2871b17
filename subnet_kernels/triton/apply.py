"""apply, restore_, straight_through: weights through a mask, frozen ones put back, and the gradients of both.

Elements are moved as integers of their size and never interpreted, but for the product in a score's gradient.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from subnet_kernels import reference
from subnet_kernels.triton._build import NAMES, Build, on_device, plain, typed
from subnet_kernels.triton._packed import (
    AS_INTEGER,
    BLOCK,
    INTEGERS,
    build,
    check,
    check_bits,
    check_lengths,
    each,
    in_place,
    opened,
    places,
    programs,
    step_of,
)

# -------------------------------------------------------------------------------------------------------------- kernels


@triton.jit(do_not_specialize=["n"])
def _apply_kernel(weight, bits, out, n: tl.int64, BLOCK: tl.constexpr):
    """out = open ? weight : 0."""
    for STEP in tl.static_range(1, 17, 15):
        if step_of(n) == STEP:
            size = n // STEP * STEP
            at = places(BLOCK)
            found = tl.load(weight + at, mask=at < size, other=0)
            tl.store(out + at, tl.where(opened(bits, size, BLOCK), found, 0), mask=at < size)


@triton.jit(do_not_specialize=["n"])
def _ones_kernel(bits, ones, n: tl.int64, BLOCK: tl.constexpr):
    """ones[p] = open weights of block p."""
    is_open = opened(bits, n, BLOCK) & (places(BLOCK) < n)
    tl.store(ones + tl.program_id(0), tl.sum(tl.sum(is_open.to(tl.int32), 1), 0))


@triton.jit(do_not_specialize=["n", "count"])
def _restore_kernel(
    weight,
    bits,
    values,
    ones,  # of each block
    before,  # open weights up to the end of each block
    n: tl.int64,
    count: tl.int64,  # values there are
    BLOCK: tl.constexpr,
):
    """The open weights of a block become the values whose turn it is."""
    block = tl.program_id(0)
    at = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    byte = tl.load(bits + at // 8, mask=at < n, other=0).to(tl.int32)
    is_open = ((byte >> (at % 8).to(tl.int32)) & 1) * (at < n).to(tl.int32)
    turn = tl.load(before + block) - tl.load(ones + block) + tl.cumsum(is_open, 0) - 1
    write = (is_open != 0) & (turn < count)
    tl.store(weight + at, tl.load(values + turn, mask=write, other=0), mask=write)


@triton.jit(do_not_specialize=["has_frozen", "magnitude", "need_weight", "need_scores", "n"])
def _straight_through_kernel(
    grad,
    weight,  # read if need_scores
    scores,  # read if need_scores and magnitude
    bits,  # read if need_weight
    frozen,  # read if need_weight and has_frozen
    d_weight,  # written if need_weight
    d_scores,  # written if need_scores
    has_frozen: tl.int32,
    magnitude: tl.int32,
    need_weight: tl.int32,
    need_scores: tl.int32,
    n: tl.int64,
    BLOCK: tl.constexpr,
):
    """dW = G where open and not frozen, dS = G W, times the sign of the score for magnitude keys."""
    for STEP in tl.static_range(1, 17, 15):
        if step_of(n) == STEP:
            size = n // STEP * STEP
            at = places(BLOCK)
            ok = at < size
            g = tl.load(grad + at, mask=ok, other=0.0)
            if need_weight != 0:
                live = opened(bits, size, BLOCK)
                if has_frozen != 0:
                    live = live & (opened(frozen, size, BLOCK) == 0)
                tl.store(d_weight + at, tl.where(live, g, 0.0), mask=ok)
            if need_scores != 0:
                w = tl.load(weight + at, mask=ok, other=0.0)
                slope = (g.to(tl.float32) * w.to(tl.float32)).to(grad.dtype.element_ty)
                if magnitude != 0:  # the product was rounded before the sign is put on, which is exact
                    s = tl.load(scores + at, mask=ok, other=0.0).to(tl.float32)
                    sign = (s > 0).to(tl.float32) - (s < 0).to(tl.float32)
                    slope = (slope.to(tl.float32) * sign).to(grad.dtype.element_ty)
                tl.store(d_scores + at, slope, mask=ok)


# --------------------------------------------------------------------------------------------------------------- builds

_APPLY = each(_apply_kernel, INTEGERS, {"weight": "", "bits": "u8", "out": ""}, "", "n", BLOCK=BLOCK)
_ONES = build(_ones_kernel, "", typed({"bits": "u8", "ones": "i32"}, int64="n"), {"BLOCK": BLOCK})
_RESTORE = each(
    _restore_kernel,
    INTEGERS,
    {"weight": "", "bits": "u8", "values": "", "ones": "i32", "before": "i64"},
    "",
    "n count",
    BLOCK=BLOCK,
)
_STRAIGHT = each(
    _straight_through_kernel,
    NAMES,
    {"grad": "", "weight": "", "scores": "", "bits": "u8", "frozen": "u8", "d_weight": "", "d_scores": ""},
    "has_frozen magnitude need_weight need_scores",
    "n",
    BLOCK=BLOCK,
)


def builds() -> list[Build]:
    """Every build that a launch of this module can choose."""
    return [*_APPLY.values(), _ONES, *_RESTORE.values(), *_STRAIGHT.values()]


# ------------------------------------------------------------------------------------------------------------- launches


def apply(weight: Tensor, bits: Tensor) -> Tensor:
    """The op of `reference.apply` on a GPU."""
    check_bits("apply", bits, weight.numel())
    if weight.element_size() not in INTEGERS:
        return reference.apply(weight, bits)
    out = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    apply_to(weight, bits, out)
    return out


def apply_to(weight: Tensor, bits: Tensor, out: Tensor) -> None:
    """`apply` into a contiguous tensor of weight's dtype and number of elements. Nothing is checked."""
    n, size = weight.numel(), weight.element_size()
    if size not in INTEGERS or not in_place(out):
        out.view(-1).copy_(apply(weight, bits).view(-1))
    elif n > 0:
        kind = AS_INTEGER[size]
        with on_device(weight):
            _APPLY[size].launch(programs(n), plain(weight).view(kind), plain(bits), out.view(kind), n)


def restore_(weights: Sequence[Tensor], bits: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """The op of `reference.restore_` on a GPU. How many values there must be is known to the device alone: none is read past the last."""
    op = "restore_"
    check_lengths(op, len(weights), len(bits), "tensors of bits")
    check_lengths(op, len(weights), len(values), "tensors of values")
    for i, (w, b, v) in enumerate(zip(weights, bits, values)):
        check_bits(op, b, w.numel())
        check(v.dtype == w.dtype, op, f"values[{i}] must have the dtype of its weight")
    for w, b, v in zip(weights, bits, values):
        n, size = w.numel(), w.element_size()
        if n == 0 or v.numel() == 0:
            continue
        if size not in INTEGERS or not in_place(w):
            reference.restore_([w], [b], [v])
            continue
        b, v, grid = plain(b), plain(v), programs(n)
        ones = torch.empty(grid, dtype=torch.int32, device=w.device)
        with on_device(w):
            _ONES.launch(grid, b, ones, n)
            before = ones.cumsum(0)  # int64, and in a fixed order
            _RESTORE[size].launch(grid, w.view(AS_INTEGER[size]), b, v.view(AS_INTEGER[size]), ones, before, n, v.numel())


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
    """The op of `reference.straight_through` on a GPU."""
    op, n = "straight_through", grad.numel()
    check(
        weight.numel() == n == scores.numel(),
        op,
        f"grad, weight and scores must have one shape, got {n}, {weight.numel()} and {scores.numel()} elements",
    )
    check(by in ("magnitude", "value"), op, f"by must be 'magnitude' or 'value', got '{by}'")
    check_bits(op, bits, n)
    if frozen is not None:
        check_bits(op, frozen, n)
    if not grad.dtype == weight.dtype == scores.dtype or grad.dtype not in NAMES:
        return reference.straight_through(grad, weight, scores, bits, frozen, by, need_weight, need_scores)
    grad, bits = plain(grad), plain(bits)
    d_weight, d_scores = (
        torch.empty(t.shape if needed else 0, dtype=t.dtype, device=t.device)
        for t, needed in ((weight, need_weight), (scores, need_scores))
    )
    if n == 0 or not (need_weight or need_scores):
        return d_weight, d_scores
    weight, scores = (plain(weight), plain(scores)) if need_scores else (grad, grad)
    shut = bits if frozen is None else plain(frozen)
    flags = (int(flag) for flag in (frozen is not None, by == "magnitude", need_weight, need_scores))
    to = d_weight if need_weight else d_scores, d_scores if need_scores else d_weight
    with on_device(grad):
        _STRAIGHT[grad.dtype].launch(programs(n), grad, weight, scores, bits, shut, *to, *flags, n)
    return d_weight, d_scores
