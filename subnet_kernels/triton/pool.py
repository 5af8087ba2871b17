"""max_pool_relu and its gradient: maxima of windows past ReLU, of activations whose channels lie last.

A program has a piece of a line, a row of windows of the output or of pixels of the input. Maxima are compared in float32, which holds
every element; the gradient is moved as integers and never interpreted.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from subnet_kernels import reference
from subnet_kernels.triton._build import NAMES, Build, on_device, plain
from subnet_kernels.triton._packed import AS_INTEGER, INTEGERS, check, each, step_of

# -------------------------------------------------------------------------------------------------------------- kernels


@triton.jit(do_not_specialize=["n", "height", "width", "rows", "columns", "part", "halves", "window", "pieces"])
def _pool_kernel(
    x,  # (n, height, width, halves * part)
    y,  # (halves * n, rows, columns, part)
    places,  # u8, as y
    n: tl.int32,
    height: tl.int32,
    width: tl.int32,
    rows: tl.int32,
    columns: tl.int32,
    part: tl.int32,
    halves: tl.int32,
    window: tl.int32,
    pieces: tl.int32,  # of a line of y
    BLOCK: tl.constexpr,
):
    """y = relu(max of the window), places = where in it that is."""
    for STEP in tl.static_range(1, 17, 15):
        if step_of(part) == STEP:
            size = part // STEP * STEP
            line, inner = tl.program_id(0) // pieces, tl.program_id(0) % pieces * BLOCK + tl.arange(0, BLOCK)
            row, image, half = line % rows, line // rows % n, line // rows // n
            column, channel = inner // size, inner % size
            ok = column < columns
            most = tl.zeros((BLOCK,), tl.float32)
            at = tl.full((BLOCK,), 255, tl.int32)
            for i in range(0, tl.minimum(window, height - row * window)):
                for j in range(0, window):
                    pixel = column * window + j
                    from_ = (image.to(tl.int64) * height + row * window + i) * width * (halves * size) + half * size
                    inside = ok & (pixel < width)
                    v = tl.load(x + from_ + (pixel * (halves * size) + channel), mask=inside, other=0.0).to(tl.float32)
                    taken = (v > most) | (v != v)  # of equals the first stays, of NaN the last
                    most = tl.where(taken, v, most)
                    at = tl.where(taken, i * window + j, at)
            to = line.to(tl.int64) * columns * size + inner
            tl.store(y + to, most.to(y.dtype.element_ty), mask=ok)
            tl.store(places + to, at.to(tl.uint8), mask=ok)


@triton.jit(do_not_specialize=["n", "height", "width", "rows", "columns", "part", "halves", "window", "pieces"])
def _pool_grad_kernel(
    grad,  # (halves * n, rows, columns, part)
    places,  # u8, as grad
    out,  # (n, height, width, halves * part)
    n: tl.int32,
    height: tl.int32,
    width: tl.int32,
    rows: tl.int32,
    columns: tl.int32,
    part: tl.int32,
    halves: tl.int32,
    window: tl.int32,
    pieces: tl.int32,  # of a line of out
    BLOCK: tl.constexpr,
):
    """out = grad where places say so, else 0."""
    for STEP in tl.static_range(1, 17, 15):
        if step_of(part) == STEP:
            size = part // STEP * STEP
            line, inner = tl.program_id(0) // pieces, tl.program_id(0) % pieces * BLOCK + tl.arange(0, BLOCK)
            row, image = line % height, line // height
            pixel, half, channel = inner // (halves * size), inner // size % halves, inner % size
            ok = pixel < width
            from_ = (((half * n + image).to(tl.int64) * rows + row // window) * columns + pixel // window) * size + channel
            here = tl.load(places + from_, mask=ok, other=255).to(tl.int32) == row % window * window + pixel % window
            taken = tl.where(here, tl.load(grad + from_, mask=ok, other=0), 0)
            tl.store(out + line.to(tl.int64) * width * (halves * size) + inner, taken, mask=ok)


# --------------------------------------------------------------------------------------------------------------- builds

_BLOCK = 1024
_SIZES = "n height width rows columns part halves window pieces"
_POOL = each(_pool_kernel, NAMES, {"x": "", "y": "", "places": "u8"}, _SIZES, BLOCK=_BLOCK)
_POOL_GRAD = each(
    _pool_grad_kernel,
    {size: kind for size, kind in INTEGERS.items() if size > 1},
    {"grad": "", "places": "u8", "out": ""},
    _SIZES,
    BLOCK=_BLOCK,
)


def builds() -> list[Build]:
    """Every build that a launch of this module can choose."""
    return [*_POOL.values(), *_POOL_GRAD.values()]


# ------------------------------------------------------------------------------------------------------------- launches


def max_pool_relu(x: Tensor, window: int, split: bool) -> tuple[Tensor, Tensor]:
    """The op of `reference.max_pool_relu` on a GPU."""
    op = "max_pool_relu"
    check(x.dim() == 4, op, f"x must be (N, H, W, C), got {x.dim()} dimensions")
    n, height, width, channels = x.shape
    rows, columns, part, halves = _sizes(op, x, height, width, channels, window, split)
    pieces = triton.cdiv(columns * part, _BLOCK)
    if x.dtype not in NAMES or not _fit(width * channels, halves * n * rows * pieces):
        return reference.max_pool_relu(x, window, split)
    y = torch.empty((halves * n, rows, columns, part), dtype=x.dtype, device=x.device)
    places = torch.empty(y.shape, dtype=torch.uint8, device=x.device)
    if n > 0:
        grid = (halves * n * rows * pieces,)
        with on_device(x):
            _POOL[x.dtype].launch(grid, plain(x), y, places, n, height, width, rows, columns, part, halves, window, pieces)
    return y, places


def max_pool_relu_grad(grad: Tensor, places: Tensor, window: int, split: bool, height: int, width: int) -> Tensor:
    """The op of `reference.max_pool_relu_grad` on a GPU."""
    op = "max_pool_relu_grad"
    halves = 2 if split else 1
    check(grad.dim() == 4 and grad.shape[0] % halves == 0, op, "grad must be (N, h, w, C), with N even where it was split")
    n, channels = grad.shape[0] // halves, grad.shape[3] * halves
    rows, columns, part, _ = _sizes(op, grad, height, width, channels, window, split)
    check(
        grad.shape[1:3] == (rows, columns),
        op,
        f"grad must be of {rows} x {columns} windows, got {grad.shape[1]} x {grad.shape[2]}",
    )
    check(places.dtype == torch.uint8 and places.shape == grad.shape, op, "places must be uint8 of the shape of grad")
    pieces = triton.cdiv(width * channels, _BLOCK)
    if not _fit(width * channels, n * height * pieces):
        return reference.max_pool_relu_grad(grad, places, window, split, height, width)
    out = torch.empty((n, height, width, channels), dtype=grad.dtype, device=grad.device)
    if n > 0:
        kind = AS_INTEGER[grad.element_size()]
        given = plain(grad).view(kind), plain(places), out.view(kind)
        with on_device(grad):
            _POOL_GRAD[grad.element_size()].launch(
                (n * height * pieces,), *given, n, height, width, rows, columns, part, halves, window, pieces
            )
    return out


def _fit(line: int, programs: int) -> bool:
    """Whether 32 bits count the numbers of a line, a last piece that is not full included, and the programs."""
    return max(line + _BLOCK, programs) < 2**31


def _sizes(op: str, t: Tensor, height: int, width: int, channels: int, window: int, split: bool) -> tuple[int, int, int, int]:
    """Rows and columns of windows, channels of an output and how many outputs have those of a pixel; raises RuntimeError."""
    name = "grad" if op.endswith("grad") else "x"
    check(t.dtype in NAMES or t.dtype == torch.float64, op, f"{name} must be float64, float32, float16 or bfloat16")
    check(1 <= window <= 15, op, f"window must be from 1 to 15, got {window}")
    check(
        min(height, width, channels) > 0, op, f"height, width and channels must be positive, got {height}, {width} and {channels}"
    )
    halves = 2 if split else 1
    check(channels % halves == 0, op, f"channels must be even to be split, got {channels}")
    return -(-height // window), -(-width // window), channels // halves, halves
