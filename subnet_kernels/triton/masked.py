"""Masked products: y = x (W where open)^T + b, dx = G_y (W where open), and G = G_y^T x with the straight-through rule behind it.

Few rows are bound by reading W, so its mask is expanded beside it: in half precision on the way to the tensor cores (`_tile_kernel`), in
float32 in registers (`_rows_kernel`) or on the way to shared memory (`_grad_input_kernel`). Many rows are bound by the product, and the
open weight is made once for PyTorch's own: the tables of builds end where the two meet. A weight gradient is one product whose epilogue
reads W, the scores' signs and bits, and writes dW and dS.

A mask selects. Sums have a fixed order; where one is split among programs, the parts go to a workspace and are added in order.
Offsets that a row is part of are 64-bit; what counts within a row is 32-bit.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from subnet_kernels.triton._build import NAMES, Build, aligned, on_device, plain, typed
from subnet_kernels.triton._packed import check, check_bits

# ----------------------------------------------------------------------------------------------------------------- bits

_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)  # where there is no PTX


@triton.jit
def _words(bits, words, row, column, group, ok, columns, STEP: tl.constexpr):
    """The 32 mask bits from weight (row, column + 32 group) on, as uint32; column is a multiple of 32.

    row: int64; group, ok: of shapes that broadcast with it; words: of all the bits, beyond which nothing is read. Where rows are
    whole words (STEP = 32) one is loaded, else two are and the bits shifted out of them. Bits of columns that do not exist may be
    the next row's.
    """
    if STEP % 32 == 0:
        place = column // 32 + group
        found = tl.load(bits + (row * (columns // 32) + place), mask=ok & (place < columns // 32), other=0)
        return found.to(tl.uint32, bitcast=True)
    first = row * columns + column
    at = (first >> 5) + group
    low = tl.load(bits + at, mask=ok & (at < words), other=0).to(tl.uint32, bitcast=True)
    high = tl.load(bits + at + 1, mask=ok & (at + 1 < words), other=0).to(tl.uint32, bitcast=True)
    return ((low.to(tl.uint64) | (high.to(tl.uint64) << 32)) >> (first & 31).to(tl.uint64)).to(tl.uint32)


@triton.jit
def _where_open(values, words, bits, never, AXIS: tl.constexpr):
    """Values where their bits are set, +0.0 elsewhere; a word has the bits of 32 neighbours along AXIS, -1 or -2.

    Shifts move each bit to the top of its byte, one for the four bits that are a byte apart. From there `prmt` spreads the bits of two
    halves over both, or that of a float, and an AND selects.

    never: false, unknown to the compiler. It moves a loaded operand of a product to the registers that multiply it, and then masks it
    there, only if nothing but loads and constants goes into the mask; else both pass through shared memory once more. So which bit is
    whose comes from loads that never read.
    """
    bit, byte = tl.arange(0, 8), tl.arange(0, 4)
    shift = tl.load(bits + bit, mask=never & (bit >= 0), other=7 - bit).to(tl.uint32)
    select = tl.load(bits + byte, mask=never & (byte >= 0), other=byte)
    words = tl.expand_dims(tl.expand_dims(words, AXIS), AXIS)
    if AXIS == -1:
        tops, select = words << shift, select[:, None]
        tops, select = tl.broadcast(tops, select)
    else:
        tops, select = tl.broadcast(words << shift[:, None], select[:, None, None])
    tops, select = tl.reshape(tops, values.shape), tl.reshape(select, values.shape)
    if _INTERPRETED:
        integer: tl.constexpr = tl.int16 if values.dtype.primitive_bitwidth == 16 else tl.int32
        spread = ((tops >> (select * 8 + 7).to(tl.uint32)) & 1).to(tl.int32) * -1
        return (values.to(integer, bitcast=True) & spread.to(integer)).to(values.dtype, bitcast=True)
    if values.dtype.primitive_bitwidth == 16:
        return tl.inline_asm_elementwise(
            """
            {
            .reg .b32 places, mask;
            mad.lo.u32 places, $5, 0x1100, 0xcc88;  // bytes of the second half's word are 4 to 7, and 8 stands for the sign
            mad.lo.u32 places, $4, 0x11, places;
            prmt.b32 mask, $2, $3, places;
            and.b32 $0, $1, mask;
            }
            """,
            "=r,r,r,r,r,r",
            [values, tops, select],
            dtype=values.dtype,
            is_pure=True,
            pack=2,
        )
    return tl.inline_asm_elementwise(
        """
        {
        .reg .b32 places, mask;
        mad.lo.u32 places, $3, 0x1111, 0x8888;
        prmt.b32 mask, $2, $2, places;
        and.b32 $0, $1, mask;
        }
        """,
        "=r,r,r,r",
        [values, tops, select],
        dtype=values.dtype,
        is_pure=True,
        pack=1,
    )


@triton.jit
def _places_of(BLOCK: tl.constexpr, PARTS: tl.constexpr):
    """0 to BLOCK: (BLOCK,), or (PARTS, BLOCK // PARTS)."""
    if PARTS == 1:
        return tl.arange(0, BLOCK)
    else:
        return tl.arange(0, PARTS)[:, None] * (BLOCK // PARTS) + tl.arange(0, BLOCK // PARTS)[None, :]


@triton.jit
def _store_sums(total, bias, y, partial, row, column, row_ok, column_ok, rows, columns, has_bias):
    """Sums of y at rows and columns that broadcast, to y with the bias if there is one split, else to the split's own place in partial."""
    if tl.num_programs(1) == 1:
        if has_bias != 0:
            total += tl.load(bias + column, mask=column_ok, other=0.0).to(tl.float32)
        tl.store(y + columns.to(tl.int64) * row + column, total.to(y.dtype.element_ty), mask=row_ok & column_ok)
    else:
        place = (tl.program_id(1) * rows + row).to(tl.int64) * columns
        tl.store(partial + place + column, total, mask=row_ok & column_ok)


# -------------------------------------------------------------------------------------------------------------- kernels


@triton.jit(do_not_specialize=["rows", "columns", "terms", "chunk", "has_bias", "words"])
def _rows_kernel(
    x,  # (rows, terms)
    weight,  # (columns, terms)
    bits,  # int32 (words,)
    bias,  # (columns,), read if has_bias
    y,  # (rows, columns), written if there is one split
    partial,  # float32 (splits, rows, columns), else
    rows: tl.int32,
    columns: tl.int32,
    terms: tl.int32,
    chunk: tl.int32,
    has_bias: tl.int32,
    words: tl.int64,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STEP: tl.constexpr,
):
    """Program (p, s): BLOCK_C columns of at most BLOCK_B rows of y = x W^T in float32, over the s-th chunk of the terms."""
    terms = terms // STEP * STEP  # says that rows are aligned
    GROUPS: tl.constexpr = BLOCK_K // 32
    VEC: tl.constexpr = 4
    o = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    ok = o < columns
    begin = tl.program_id(1) * chunk // 32 * 32
    end = tl.minimum(begin + chunk, terms)
    # A tile is (BLOCK_C, GROUPS, 32 // VEC, VEC): a thread holds VEC neighbours of one word, a 16-byte load. That words neighbour
    # each other is hidden behind `one`, or the compiler would load them as wide vectors and hand them round between threads.
    bit = tl.arange(0, 32 // VEC)[:, None] * VEC + tl.arange(0, VEC)[None, :]
    inner = tl.arange(0, GROUPS)[:, None, None] * 32 + bit[None, :, :]
    one = tl.num_programs(2)
    group = (tl.arange(0, GROUPS) * one)[None, :, None, None] + tl.zeros((1, 1, 32 // VEC, 1), tl.int32)
    row, row_ok = o.to(tl.int64)[:, None, None, None], ok[:, None, None, None]
    w_row = weight + row * terms
    zero = tl.zeros((BLOCK_C, GROUPS, 32 // VEC), tl.float32)
    sums = (zero,)
    for _ in tl.static_range(BLOCK_B - 1):
        sums += (zero,)
    for k in range(begin, end, BLOCK_K):
        at = k + inner
        inside = at < terms
        w = tl.load(w_row + at[None], mask=row_ok & inside[None], other=0.0)
        word = _words(bits, words, row, k, group, row_ok, terms, STEP)
        w = tl.where((word >> bit[None, None].to(tl.uint32)) & 1 != 0, w, 0.0)
        more = ()
        for b in tl.static_range(BLOCK_B):
            v = tl.load(x + b * terms.to(tl.int64) + at, mask=inside & (b < rows), other=0.0)
            more += (sums[b] + tl.sum(w * v[None], 3),)
        sums = more
    for b in tl.static_range(BLOCK_B):
        total = tl.sum(tl.reshape(sums[b], (BLOCK_C, GROUPS * (32 // VEC))), 1)
        _store_sums(total, bias, y, partial, b, o, b < rows, ok, rows, columns, has_bias)


@triton.jit(do_not_specialize=["rows", "columns", "terms", "chunk", "has_bias", "words"])
def _tile_kernel(
    x,  # (rows, terms)
    weight,  # (columns, terms), or (terms, columns) if TRANSPOSED
    bits,  # int32 (words,)
    bias,  # (columns,), read if has_bias
    y,  # (rows, columns), written if there is one split
    partial,  # float32 (splits, rows, columns), else
    rows: tl.int32,
    columns: tl.int32,
    terms: tl.int32,
    chunk: tl.int32,
    has_bias: tl.int32,
    words: tl.int64,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PARTS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    STEP: tl.constexpr,
):
    """Program (p, s): a tile of y^T = W x^T, or W^T x^T, over the s-th chunk of the terms.

    W is on the left, where it can be masked in registers. A block of terms may have as many parts as there are warps: each multiplies its
    own, so that none masks what another one does, and the parts' sums are added at the end.
    """
    if TRANSPOSED:
        columns = columns // STEP * STEP  # says that rows are aligned
        if STEP >= 16:
            terms = terms // 16 * 16
    else:
        terms = terms // STEP * STEP
        if STEP == 32:
            columns = columns // 16 * 16
    tiles = tl.cdiv(rows, BLOCK_B)  # programs of one tile of W are neighbours, so that it is read once
    first = tl.program_id(0) // tiles * BLOCK_C
    c = (first + tl.arange(0, BLOCK_C))[:, None]
    b = (tl.program_id(0) % tiles * BLOCK_B + tl.arange(0, BLOCK_B))[None, :]
    c_ok, b_ok = c < columns, b < rows
    begin = tl.program_id(1) * chunk // 16 * 16
    end = tl.minimum(begin + chunk, terms)
    inner = _places_of(BLOCK_K, PARTS)
    if TRANSPOSED:
        group = tl.arange(0, BLOCK_C // 32)[:, None]
    else:
        group = tl.expand_dims(_places_of(BLOCK_K // 32, PARTS), -2)
        row = c.to(tl.int64)
    x_row = x + b.to(tl.int64) * terms
    if PARTS == 1:
        total = tl.zeros((BLOCK_C, BLOCK_B), tl.float32)
    else:
        total = tl.zeros((PARTS, BLOCK_C, BLOCK_B), tl.float32)
    for k in range(begin, end, BLOCK_K):
        at = k + inner
        ok = at < terms
        v = tl.load(x_row + tl.expand_dims(at, -1), mask=tl.expand_dims(ok, -1) & b_ok, other=0.0)
        at, ok = tl.expand_dims(at, -2), tl.expand_dims(ok, -2)
        if TRANSPOSED:
            row = at.to(tl.int64)
            w = tl.load(weight + row * columns + c, mask=ok & c_ok, other=0.0)
            word = _words(bits, words, row, first, group, ok, columns, STEP)
            w = _where_open(w, word, bits, rows < 0, -2)
        else:
            w = tl.load(weight + row * terms + at, mask=c_ok & ok, other=0.0)
            word = _words(bits, words, row, k, group, c_ok, terms, STEP)
            w = _where_open(w, word, bits, rows < 0, -1)
        total = tl.dot(w, v, total, input_precision="ieee")
    if PARTS > 1:
        total = tl.sum(total, 0)
    _store_sums(total, bias, y, partial, b, c, b_ok, c_ok, rows, columns, has_bias)


@triton.jit(do_not_specialize=["rows", "columns", "terms", "chunk", "has_bias", "words"])
def _grad_input_kernel(
    x,  # (rows, terms)
    weight,  # (terms, columns)
    bits,  # int32 (words,)
    bias,  # (columns,), read if has_bias
    y,  # (rows, columns), written if there is one split
    partial,  # float32 (splits, rows, columns), else
    rows: tl.int32,
    columns: tl.int32,
    terms: tl.int32,
    chunk: tl.int32,
    has_bias: tl.int32,
    words: tl.int64,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STEP: tl.constexpr,
):
    """Program (p, s): a tile of y = x W in float32, over the s-th chunk of the terms.

    x is on the left, where all threads of a warp read the same of it. On the right, where `_tile_kernel` has it, they read columns that
    lie a whole line of banks apart in shared memory, eight threads the same bank: 103 us instead of 42 (an H200, 4096 x 4096, 16 rows).
    """
    columns = columns // STEP * STEP  # says that rows are aligned
    if STEP >= 16:
        terms = terms // 16 * 16
    tiles = tl.cdiv(rows, BLOCK_B)
    first = tl.program_id(0) // tiles * BLOCK_C
    c = (first + tl.arange(0, BLOCK_C))[None, :]
    b = (tl.program_id(0) % tiles * BLOCK_B + tl.arange(0, BLOCK_B))[:, None]
    c_ok, b_ok = c < columns, b < rows
    begin = tl.program_id(1) * chunk // 16 * 16
    end = tl.minimum(begin + chunk, terms)
    group = tl.arange(0, BLOCK_C // 32)[None, :]
    x_row = x + b.to(tl.int64) * terms
    bit = tl.arange(0, 32).to(tl.uint32)
    total = tl.zeros((BLOCK_B, BLOCK_C), tl.float32)
    for k in range(begin, end, BLOCK_K):
        at = k + tl.arange(0, BLOCK_K)
        ok = at < terms
        row = at.to(tl.int64)[:, None]
        v = tl.load(x_row + at[None, :], mask=b_ok & ok[None, :], other=0.0)
        w = tl.load(weight + row * columns + c, mask=ok[:, None] & c_ok, other=0.0)
        word = _words(bits, words, row, first, group, ok[:, None], columns, STEP)
        spread = tl.reshape((word[:, :, None] << (31 - bit)[None, None, :]).to(tl.int32, bitcast=True) >> 31, (BLOCK_K, BLOCK_C))
        w = (w.to(tl.int32, bitcast=True) & spread).to(tl.float32, bitcast=True)
        total = tl.dot(v, w, total, input_precision="ieee")
    _store_sums(total, bias, y, partial, b, c, b_ok, c_ok, rows, columns, has_bias)


@triton.jit(do_not_specialize=["columns", "splits", "has_bias", "elements"])
def _reduce_kernel(
    partial,  # float32 (splits, elements)
    bias,  # (columns,), read if has_bias
    y,  # (elements,)
    columns: tl.int32,
    splits: tl.int32,
    has_bias: tl.int32,
    elements: tl.int64,
    BLOCK: tl.constexpr,
):
    """Program p: BLOCK sums over the splits, in their order, and the bias."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    ok = at < elements
    total = tl.zeros((BLOCK,), tl.float32)
    for s in range(splits):
        total += tl.load(partial + s * elements + at, mask=ok, other=0.0)
    if has_bias != 0:
        total += tl.load(bias + at % columns, mask=ok, other=0.0).to(tl.float32)
    tl.store(y + at, total.to(y.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=["rows", "outputs", "inputs", "has_frozen", "magnitude", "need_weight", "need_scores", "words"])
def _grad_weight_kernel(
    grad,  # (rows, outputs)
    x,  # (rows, inputs)
    weight,  # (outputs, inputs), read if need_scores
    scores,  # (outputs, inputs), read if need_scores and magnitude
    bits,  # int32 (words,), read if need_weight
    frozen,  # int32 (words,), read if need_weight and has_frozen
    d_weight,  # (outputs, inputs), written if need_weight
    d_scores,  # (outputs, inputs), written if need_scores
    rows: tl.int32,
    outputs: tl.int32,
    inputs: tl.int32,
    has_frozen: tl.int32,
    magnitude: tl.int32,
    need_weight: tl.int32,
    need_scores: tl.int32,
    words: tl.int64,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STEP: tl.constexpr,
):
    """Program p: a tile of G = G_y^T x over all rows, and what follows from it."""
    inputs = inputs // STEP * STEP  # says that rows are aligned
    if STEP >= 16:
        outputs = outputs // 16 * 16
    tiles = tl.cdiv(inputs, BLOCK_I)
    o = tl.program_id(0) // tiles * BLOCK_O + tl.arange(0, BLOCK_O)
    first = tl.program_id(0) % tiles * BLOCK_I
    i = first + tl.arange(0, BLOCK_I)
    o_ok, i_ok = o < outputs, i < inputs
    total = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
    for k in range(0, rows, BLOCK_K):
        b = k + tl.arange(0, BLOCK_K)
        inside = b < rows
        b = b.to(tl.int64)
        g = tl.load(grad + b[None, :] * outputs + o[:, None], mask=o_ok[:, None] & inside[None, :], other=0.0)
        v = tl.load(x + b[:, None] * inputs + i[None, :], mask=inside[:, None] & i_ok[None, :], other=0.0)
        total = tl.dot(g, v, total, input_precision="ieee")
    row = o.to(tl.int64)[:, None]
    ok = o_ok[:, None] & i_ok[None, :]
    if need_weight != 0:
        group = tl.arange(0, BLOCK_I // 32)[None, :]
        live = _words(bits, words, row, first, group, o_ok[:, None], inputs, STEP)
        if has_frozen != 0:
            live = live ^ (live & _words(frozen, words, row, first, group, o_ok[:, None], inputs, STEP))
        d = _where_open(total, live, bits, rows < 0, -1)
        tl.store(d_weight + row * inputs + i[None, :], d.to(d_weight.dtype.element_ty), mask=ok)
    if need_scores != 0:
        slope = total * tl.load(weight + row * inputs + i[None, :], mask=ok, other=0.0).to(tl.float32)
        if magnitude != 0:
            s = tl.load(scores + row * inputs + i[None, :], mask=ok, other=0.0).to(tl.float32)
            slope = slope * ((s > 0).to(tl.float32) - (s < 0).to(tl.float32))
        tl.store(d_scores + row * inputs + i[None, :], slope.to(d_scores.dtype.element_ty), mask=ok)


# --------------------------------------------------------------------------------------------------------------- builds

# How far the sizes are aligned: rows of whole words and 16-byte loads, 16-byte loads, or neither.
_STEPS = (32, 16, 1)
_REDUCE = 1024
_DEVICE = 132  # multiprocessors that sums are split for, where fewer programs would leave some idle; a number, so that bits stay


_PRODUCT = "x weight bits bias y partial", "rows columns terms chunk has_bias", "words"  # arguments of its kernels


def _build(
    function, pointers: str, int32: str, int64: str, dtype: torch.dtype, constants: dict, warps: int, stages: int, kind: str = ""
) -> Build:
    elements = {"bits": "i32", "frozen": "i32", "partial": "fp32"}
    signature = typed({name: elements.get(name, NAMES[dtype]) for name in pointers.split()}, int32, int64)
    sizes = "x".join(str(size) for name, size in constants.items() if name not in ("TRANSPOSED", "STEP"))
    step = f"-step{constants['STEP']}" if "STEP" in constants else ""
    kind = kind or function.__name__.strip("_").removesuffix("_kernel")
    name = f"masked-{kind}-{NAMES[dtype]}-{sizes}{step}"
    return Build(name, function, signature, constants, warps, stages, constants.get("STEP", 32) == 32)


def _rows_build(b: int, c: int, step: int) -> Build:
    return _build(_rows_kernel, *_PRODUCT, torch.float32, {"BLOCK_B": b, "BLOCK_C": c, "BLOCK_K": 1024, "STEP": step}, 4, 1)


def _tile_build(
    dtype: torch.dtype, b: int, c: int, k: int, warps: int, stages: int, step: int, parts: int = 1, transposed: bool = False
) -> Build:
    constants = {"BLOCK_B": b, "BLOCK_C": c, "BLOCK_K": k, "PARTS": parts, "TRANSPOSED": transposed, "STEP": step}
    return _build(_tile_kernel, *_PRODUCT, dtype, constants, warps, stages, "grad_input" if transposed else "tile")


def _grad_input_build(b: int, c: int, k: int, warps: int, stages: int, step: int) -> Build:
    constants = {"BLOCK_B": b, "BLOCK_C": c, "BLOCK_K": k, "STEP": step}
    return _build(_grad_input_kernel, *_PRODUCT, torch.float32, constants, warps, stages)


def _grad_weight_build(dtype: torch.dtype, o: int, i: int, k: int, warps: int, stages: int, step: int) -> Build:
    constants = {"BLOCK_O": o, "BLOCK_I": i, "BLOCK_K": k, "STEP": step}
    pointers = "grad x weight scores bits frozen d_weight d_scores"
    int32 = "rows outputs inputs has_frozen magnitude need_weight need_scores"
    return _build(_grad_weight_kernel, pointers, int32, "words", dtype, constants, warps, stages)


# {(dtype, step): [(rows, beside, build), ...]}: a launch takes the first build whose rows its own fit into, and splits sums where that
# makes up to so many programs beside each other on a multiprocessor. More rows than the last build's are not fused: from there on making
# the open weight costs no more. Measured on an H200, 4096 x 4096, kernels alone, L2 flushed, fused against not, us. Bfloat16, 16, 128 and
# 256 rows: forward 14 and 30, 22 and 32, 33 and 34; dx 18 and 30, 23 and 33, 32 and 35; the weight's and the scores' gradient 52 and 60,
# 55 and 61, 64 and 66, and at 512 80 and 76. Float32: forward 99 and 87 at 16 rows; dx 42 and 119 at 16, 88 and 77 at 32; the gradients
# 133 and 187 at 128. Where rows are not whole words the limits are estimates.
_Table = dict[tuple[torch.dtype, int], list[tuple[int, int, Build]]]
_FORWARD: _Table = {}
_GRAD_INPUT: _Table = {}
_GRAD_WEIGHT: _Table = {}
_SUMS = {
    dtype: _build(_reduce_kernel, "partial bias y", "columns splits has_bias", "elements", dtype, {"BLOCK": _REDUCE}, 4, 1)
    for dtype in NAMES
}


def _fill_tables() -> None:
    for dtype in (torch.float16, torch.bfloat16):
        _FORWARD[dtype, 32] = [
            (16, 2, _tile_build(dtype, 16, 16, 256, 4, 4, 32, parts=4)),  # of one row 14.6 us, and 16.0 summed in registers
            (32, 1, _tile_build(dtype, 32, 64, 128, 4, 4, 32)),
            (64, 2, _tile_build(dtype, 64, 64, 64, 4, 4, 32)),
            (128, 2, _tile_build(dtype, 128, 64, 64, 4, 4, 32)),
            (256, 1, _tile_build(dtype, 128, 128, 64, 8, 4, 32)),
        ]
        _GRAD_INPUT[dtype, 32] = [
            (16, 1, _tile_build(dtype, 16, 64, 128, 4, 4, 32, transposed=True)),
            (32, 1, _tile_build(dtype, 32, 64, 128, 4, 4, 32, transposed=True)),
            (64, 2, _tile_build(dtype, 64, 64, 64, 4, 4, 32, transposed=True)),
            (128, 2, _tile_build(dtype, 128, 64, 64, 4, 4, 32, transposed=True)),
            (256, 1, _tile_build(dtype, 256, 128, 64, 8, 3, 32, transposed=True)),
        ]
        # two fit a multiprocessor: an epilogue beside a loop
        _GRAD_WEIGHT[dtype, 32] = [(256, 1, _grad_weight_build(dtype, 128, 64, 64, 8, 3, 32))]
        for step, stages in ((16, 4), (1, 2)):  # single elements are not copied in the background
            _FORWARD[dtype, step] = [
                (16, 2, _tile_build(dtype, 16, 16, 256, 4, stages, step, parts=4)),
                (128, 1, _tile_build(dtype, 64, 64, 64, 8, 2, step)),
            ]
            _GRAD_INPUT[dtype, step] = [(128, 1, _tile_build(dtype, 64, 64, 64, 8, 2, step, transposed=True))]
            _GRAD_WEIGHT[dtype, step] = [(128, 1, _grad_weight_build(dtype, 64, 64, 32, 4, 3, step))]
    for step in _STEPS:
        _FORWARD[torch.float32, step] = [(4, 2, _rows_build(4, 4, step))]
        _GRAD_INPUT[torch.float32, step] = [(16, 2, _grad_input_build(16, 64, 16, 4, 4, step))]
        warps, stages = (4, 3) if step == 32 else (8, 2)
        _GRAD_WEIGHT[torch.float32, step] = [(128, 1, _grad_weight_build(torch.float32, 64, 64, 32, warps, stages, step))]
    _FORWARD[torch.float32, 32].insert(0, (1, 2, _rows_build(1, 4, 32)))


_fill_tables()


def builds() -> list[Build]:
    """Every build that a launch of this module can choose."""
    tables = (_FORWARD, _GRAD_INPUT, _GRAD_WEIGHT)
    return [build for table in tables for choices in table.values() for *_, build in choices] + list(_SUMS.values())


def _step(inputs: int, *others: int) -> int:
    return 1 if not aligned(inputs, *others) else 32 if inputs % 32 == 0 else 16


def _choose(table: _Table, dtype: torch.dtype, step: int, rows: int) -> tuple[int, Build] | None:
    """(beside, build) of so many rows, or None where they are not fused."""
    return next(((beside, build) for limit, beside, build in table[dtype, step] if rows <= limit), None)


def _split(beside: int, tiles: int, terms: int, block: int) -> tuple[int, int]:
    """(splits, terms of one) for sums of so many terms, taken in blocks: one split where tiles nearly fill the device or sums are short."""
    splits = 1 if tiles >= 3 * _DEVICE // 4 else max(1, min(beside * _DEVICE // tiles, terms // (4 * block)))
    chunk = _ceil(_ceil(terms, splits), block) * block
    return _ceil(terms, chunk), chunk


# ------------------------------------------------------------------------------------------------------------- launches


def masked_linear(x: Tensor, weight: Tensor, bits: Tensor | None, bias: Tensor | None = None) -> Tensor:
    """The op of `reference.masked_linear` on a GPU."""
    op = "masked_linear"
    rows = _rows_of(x)
    _check_linear(op, x, weight, 1, "x must be (..., I) and weight (O, I)")
    check(bias is None or bias.numel() == weight.shape[0], op, "bias must have one element for each output")
    outputs, inputs = weight.shape
    found = None
    if bits is not None and _serves(rows, x, weight, bias):
        step = _step(inputs)
        whole = outputs % 16 == 0 or x.dtype == torch.float32  # tiles of step 32 store whole lines
        found = _choose(_FORWARD, x.dtype, step if whole else min(step, 16), rows)
    if found is None:
        return F.linear(x, _open_weight(weight, bits), bias)
    return _product(op, *found, x, weight, bits, bias, outputs, inputs)


def masked_linear_grad_input(grad_y: Tensor, weight: Tensor, bits: Tensor | None) -> Tensor:
    """The op of `reference.masked_linear_grad_input` on a GPU."""
    op = "masked_linear_grad_input"
    rows = _rows_of(grad_y)
    _check_linear(op, grad_y, weight, 0, "grad_y must be (..., O) and weight (O, I)")
    outputs, inputs = weight.shape
    found = None
    if bits is not None and _serves(rows, grad_y, weight):
        found = _choose(_GRAD_INPUT, grad_y.dtype, _step(inputs, outputs), rows)
    if found is None:
        return grad_y @ _open_weight(weight, bits)
    return _product(op, *found, grad_y, weight, bits, None, inputs, outputs)


def _product(
    op: str, beside: int, build: Build, x: Tensor, weight: Tensor, bits: Tensor, bias: Tensor | None, columns: int, terms: int
) -> Tensor:
    """Launches a build of a product, and the reduction of what it splits."""
    rows = _rows_of(x)
    x, weight, words = plain(x), plain(weight), _words_of(op, bits, weight.numel())
    y = torch.empty((*x.shape[:-1], columns), dtype=x.dtype, device=x.device)
    block_b, block_c, block_k = (build.constants[name] for name in ("BLOCK_B", "BLOCK_C", "BLOCK_K"))
    tiles = _ceil(columns, block_c) * _ceil(rows, block_b)
    splits, chunk = _split(beside, tiles, terms, block_k)
    given, has_bias = (y, 0) if bias is None else (plain(bias), 1)
    partial = torch.empty((splits, y.numel()), dtype=torch.float32, device=x.device) if splits > 1 else words.view(torch.float32)
    with on_device(x):
        build.launch(
            (tiles, splits), x, weight, words, given, y, partial, rows, columns, terms, chunk, has_bias, words.numel()
        )  # fmt: skip
        if splits > 1:
            _SUMS[y.dtype].launch((_ceil(y.numel(), _REDUCE),), partial, given, y, columns, splits, has_bias, y.numel())
    return y


def masked_linear_grad_weight(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor | None = None,
    scores: Tensor | None = None,
    bits: Tensor | None = None,
    frozen: Tensor | None = None,
    by: str = "magnitude",
    need_weight: bool = True,
) -> tuple[Tensor, Tensor]:
    """The op of `reference.masked_linear_grad_weight` on a GPU."""
    op = "masked_linear_grad_weight"
    check(by in ("magnitude", "value"), op, f"by must be 'magnitude' or 'value', got '{by}'")
    check(scores is None or (weight is not None and bits is not None), op, "scores need their weight and bits")
    check(frozen is None or bits is not None, op, "frozen bits need the mask's")
    check(grad_y.dim() >= 1 and x.dim() >= 1, op, "grad_y must be (..., O) and x (..., I)")
    rows, outputs, inputs = _rows_of(grad_y), grad_y.shape[-1], x.shape[-1]
    check(_rows_of(x) == rows, op, f"grad_y and x must have the same rows, got {rows} and {_rows_of(x)}")
    n = outputs * inputs
    for t in (weight, scores):
        check(t is None or t.numel() == n, op, f"weight and scores must be (O, I), {n} elements")
    found = None
    if bits is not None and _serves(rows, grad_y, x, weight, scores):
        found = _choose(_GRAD_WEIGHT, x.dtype, _step(inputs, outputs), rows)
    if found is None:
        if not need_weight and scores is None:
            return x.new_empty(0), x.new_empty(0)
        total = grad_y.reshape(rows, outputs).t() @ x.reshape(rows, inputs)
        if bits is None:
            return total, x.new_empty(0)
        own = total if weight is None else weight
        through = torch.ops.subnet_kernels.straight_through.default
        return through(total, own, own if scores is None else scores, bits, frozen, by, need_weight, scores is not None)
    grad, x = plain(grad_y), plain(x)
    words = _words_of(op, bits, n)
    shut = words if frozen is None else _words_of(op, frozen, n)
    empty = lambda wanted: torch.empty((outputs, inputs) if wanted else 0, dtype=x.dtype, device=x.device)  # noqa: E731
    d_weight, d_scores = empty(need_weight), empty(scores is not None)
    if not need_weight and scores is None:
        return d_weight, d_scores
    weight, scores_of = (x, x) if scores is None else (plain(weight), plain(scores))
    _, build = found
    tiles = _ceil(outputs, build.constants["BLOCK_O"]) * _ceil(inputs, build.constants["BLOCK_I"])
    to_weight, to_scores = d_weight if need_weight else x, d_scores if scores is not None else x
    flags = (int(flag) for flag in (frozen is not None, by == "magnitude", need_weight, scores is not None))
    with on_device(x):
        build.launch(
            (tiles,), grad, x, weight, scores_of, words, shut, to_weight, to_scores, rows, outputs, inputs, *flags, words.numel()
        )
    return d_weight, d_scores


def masked_conv(
    x: Tensor,
    weight: Tensor,
    bits: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """The op of `reference.masked_conv` on a GPU: weights are few beside activations, so cuDNN gets the open weight."""
    return torch.convolution(x, _open_weight(weight, bits), bias, stride, padding, dilation, False, [0] * len(stride), groups)


def _ceil(n: int, of: int) -> int:
    """n / of, rounded up; Triton's own takes microseconds."""
    return -(-n // of)


def _rows_of(t: Tensor) -> int:
    """The product of the sizes before the last one."""
    return t.shape[:-1].numel()


def _check_linear(op: str, t: Tensor, weight: Tensor, side: int, sentence: str) -> None:
    check(weight.dim() == 2 and t.dim() >= 1 and t.shape[-1] == weight.shape[side], op, sentence)


def _serves(rows: int, *tensors: Tensor | None) -> bool:
    """Whether the kernels can: one dtype that they compute in, nothing empty, and sizes that 32 bits count with room to spare."""
    given = [t for t in tensors if t is not None]
    sizes = [rows, *(size for t in given for size in t.shape[-2:])]
    return given[0].dtype in NAMES and all(t.dtype == given[0].dtype for t in given) and 0 < min(sizes) and max(sizes) < 2**30


def _words_of(op: str, bits: Tensor, n: int) -> Tensor:
    check_bits(op, bits, n)
    return plain(bits).view(torch.int32)


def _open_weight(weight: Tensor, bits: Tensor | None) -> Tensor:
    return weight if bits is None else torch.ops.subnet_kernels.apply.default(weight, bits)
