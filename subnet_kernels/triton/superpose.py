"""superpose, superpose_counts, superpose_grad: one weight through a whole bank of masks, and what tells the masks apart.

Sums have a fixed order. Alphas are added in float32, in groups of eight masks, and the groups in their order; a bank of more blocks
than a launch takes goes through a workspace. Products of a gradient are added in fours in float32 and then in float64, by chunks of
tiles that the size alone fixes.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from subnet_kernels import reference
from subnet_kernels.reference import BLOCK as TASKS
from subnet_kernels.reference import TILE
from subnet_kernels.triton._build import NAMES, Build, on_device, plain
from subnet_kernels.triton._packed import BLOCK, check, each, programs, step_of

# -------------------------------------------------------------------------------------------------------------- kernels


@triton.jit
def _mix(block, tasks, alphas, equal, total, opened, word, tiles):
    """Adds the alphas of a block's masks where they are open, and notes what is open.

    word: which words of 32 weights; total: (words, 32); opened: (words,) int32.
    """
    line = block + word // 16 * tasks * 16 + word % 16
    bit = tl.arange(0, 32)[None, :]
    for first in range(0, tasks, 8):
        some = tl.zeros_like(total)
        for j in tl.static_range(8):
            task = first + j
            is_task = task < tasks
            alpha = tl.load(alphas + task, mask=is_task & (equal == 0), other=1.0)
            code = tl.load(line + task * 16, mask=(word < tiles * 16) & is_task, other=0)
            opened |= code
            some += tl.where(((code[:, None] >> bit) & 1) != 0, alpha, 0.0)
        total += some
    return total, opened


@triton.jit(do_not_specialize=["tasks0", "tasks1", "tasks2", "tasks3", "equal", "begins", "ends", "width", "rows", "n"])
def _superpose_kernel(
    weight,
    block0,  # int32 (tiles, tasks0, 16), and so on
    block1,
    block2,
    block3,
    alphas,  # float32 (rows, width), those of these blocks' masks; not read if equal
    sums,  # float32 (rows, tiles * 512), of the blocks before; read if not begins, written if not ends
    seen,  # int32 (rows, tiles * 16), what they open
    out,  # (rows, n), written if ends
    tasks0: tl.int32,
    tasks1: tl.int32,
    tasks2: tl.int32,
    tasks3: tl.int32,
    equal: tl.int32,  # each alpha is 1 / width
    begins: tl.int32,
    ends: tl.int32,
    width: tl.int32,
    rows: tl.int32,
    n: tl.int64,
    TILES: tl.constexpr,
):
    """Program p: TILES tiles of one superposition; those of all rows are neighbours, which read the same bits."""
    row = (tl.program_id(0) % rows).to(tl.int64)
    tiles = (n + 511) // 512
    word = (tl.program_id(0) // rows).to(tl.int64) * (16 * TILES) + tl.arange(0, 16 * TILES)
    at = word[:, None] * 32 + tl.arange(0, 32)[None, :]
    there = word < tiles * 16
    mine = alphas + row * width
    total = tl.zeros((16 * TILES, 32), tl.float32)
    opened = tl.zeros((16 * TILES,), tl.int32)
    if begins == 0:
        total = tl.load(sums + row * tiles * 512 + at, mask=there[:, None], other=0.0)
        opened = tl.load(seen + row * tiles * 16 + word, mask=there, other=0)
    total, opened = _mix(block0, tasks0, mine, equal, total, opened, word, tiles)
    total, opened = _mix(block1, tasks1, mine + tasks0, equal, total, opened, word, tiles)
    total, opened = _mix(block2, tasks2, mine + (tasks0 + tasks1), equal, total, opened, word, tiles)
    total, opened = _mix(block3, tasks3, mine + (tasks0 + tasks1 + tasks2), equal, total, opened, word, tiles)
    if ends != 0:
        if equal != 0:
            total = tl.math.div_rn(total, width.to(tl.float32) + tl.zeros_like(total))
        is_open = ((opened[:, None] >> tl.arange(0, 32)[None, :]) & 1) != 0
        w = tl.load(weight + at, mask=is_open & (at < n), other=0.0).to(tl.float32)
        tl.store(out + row * n + at, tl.where(is_open, w * total, 0.0).to(out.dtype.element_ty), mask=at < n)
    else:
        tl.store(sums + row * tiles * 512 + at, total, mask=there[:, None])
        tl.store(seen + row * tiles * 16 + word, opened, mask=there)


@triton.jit(do_not_specialize=["tasks", "n"])
def _counts_kernel(weight, counts, out, tasks: tl.int32, n: tl.int64, BLOCK: tl.constexpr):
    """out = weight (counts / tasks), +0.0 where the count is 0."""
    for STEP in tl.static_range(1, 17, 15):
        if step_of(n) == STEP:
            size = n // STEP * STEP
            at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
            count = tl.load(counts + at, mask=at < size, other=0)
            w = tl.load(weight + at, mask=at < size, other=0.0).to(tl.float32)
            share = tl.math.div_rn(count.to(tl.float32), tasks.to(tl.float32) + tl.zeros((BLOCK,), tl.float32))
            tl.store(out + at, tl.where(count > 0, w * share, 0.0).to(out.dtype.element_ty), mask=at < size)


@triton.jit(do_not_specialize=["first", "tasks", "all_tasks", "chunk", "rows", "n"])
def _grad_kernel(
    grad,  # (rows, n)
    weight,
    block,  # u8 (tiles, tasks, 64)
    parts,  # float64 (chunks, rows, all_tasks)
    first: tl.int32,  # the block's first task in the bank
    tasks: tl.int32,
    all_tasks: tl.int32,
    chunk: tl.int32,  # tiles of one
    rows: tl.int32,
    n: tl.int64,
    GROUP: tl.constexpr,
):
    """Program (p, g): sums over one chunk for one row and GROUP masks of a block."""
    row = (tl.program_id(0) % rows).to(tl.int64)
    tiles = (n + 511) // 512
    task = tl.program_id(1) * GROUP + tl.arange(0, GROUP)
    four = tl.arange(0, 128)  # a tile is 128 fours of weights, two to a byte
    inner = four[:, None] * 4 + tl.arange(0, 4)[None, :]
    total = tl.zeros((GROUP, 128), tl.float64)
    begin = (tl.program_id(0) // rows).to(tl.int64) * chunk
    for tile in range(begin, tl.minimum(begin + chunk, tiles)):
        at = tile * 512 + inner
        g = tl.load(grad + row * n + at, mask=at < n, other=0.0).to(tl.float32)
        w = tl.load(weight + at, mask=at < n, other=0.0).to(tl.float32)
        byte = (tile * tasks + task)[:, None] * 64 + (four // 2)[None, :]
        code = tl.load(block + byte, mask=(task < tasks)[:, None], other=0).to(tl.int32) >> (four % 2 * 4)[None, :]
        is_open = ((code[:, :, None] >> tl.arange(0, 4)[None, None, :]) & 1) != 0
        total += tl.sum(tl.where(is_open, (g * w)[None], 0.0), 2).to(tl.float64)
    place = tl.program_id(0).to(tl.int64) * all_tasks + first + task
    tl.store(parts + place, tl.sum(total, 1), mask=task < tasks)


# --------------------------------------------------------------------------------------------------------------- builds

_BLOCKS = 4  # blocks of a bank that a launch takes
_TILES = 2
_GROUP = 16
_CHUNKS = 256
_POINTERS = ("block0", "block1", "block2", "block3")


_SUPERPOSE = each(
    _superpose_kernel,
    NAMES,
    {"weight": ""} | dict.fromkeys(_POINTERS, "i32") | {"alphas": "fp32", "sums": "fp32", "seen": "i32", "out": ""},
    "tasks0 tasks1 tasks2 tasks3 equal begins ends width rows",
    "n",
    TILES=_TILES,
)
_COUNTS = each(_counts_kernel, NAMES, {"weight": "", "counts": "i32", "out": ""}, "tasks", "n", BLOCK=BLOCK)
_GRAD = each(
    _grad_kernel,
    NAMES,
    {"grad": "", "weight": "", "block": "u8", "parts": "fp64"},
    "first tasks all_tasks chunk rows",
    "n",
    GROUP=_GROUP,
)


def builds() -> list[Build]:
    """Every build that a launch of this module can choose."""
    return [build for table in (_SUPERPOSE, _COUNTS, _GRAD) for build in table.values()]


# ------------------------------------------------------------------------------------------------------------- launches


def superpose(weight: Tensor, bank: Sequence[Tensor], alphas: Tensor | None) -> Tensor:
    """The op of `reference.superpose` on a GPU."""
    op, n, tasks = "superpose", weight.numel(), _check_bank("superpose", bank, weight)
    check(
        alphas is None or (alphas.dim() in (1, 2) and alphas.shape[-1] == tasks),
        op,
        f"alphas must be (K,) or (R, K), one for each of {tasks} tasks, got {0 if alphas is None else alphas.numel()}",
    )
    if weight.dtype not in NAMES or tasks == 0:
        return reference.superpose(weight, bank, alphas)
    rows = alphas.shape[0] if alphas is not None and alphas.dim() == 2 else 1
    shape = (rows, *weight.shape) if alphas is not None and alphas.dim() == 2 else weight.shape
    out = torch.empty(shape, dtype=weight.dtype, device=weight.device)
    if out.numel() == 0:
        return out
    weight, blocks = plain(weight), [plain(block).view(torch.int32) for block in bank if block.shape[1] > 0]
    # rounded to the weight's dtype, as the specification has them
    given = weight if alphas is None else alphas.reshape(rows, tasks).to(weight.dtype).float()
    tiles = -(-n // TILE)
    split = len(blocks) > _BLOCKS
    sums = torch.empty((rows, tiles * TILE) if split else 1, dtype=torch.float32, device=weight.device)
    seen = torch.empty((rows, tiles * TILE // 32) if split else 1, dtype=torch.int32, device=weight.device)
    done = 0
    with on_device(weight):
        for i in range(0, len(blocks), _BLOCKS):
            some = blocks[i : i + _BLOCKS]
            sizes = [block.shape[1] for block in some]
            own = sums if alphas is None else plain(given[:, done : done + sum(sizes)])
            some += [some[0]] * (_BLOCKS - len(some))
            numbers = sizes + [0] * (_BLOCKS - len(sizes))
            ends = i + _BLOCKS >= len(blocks)
            width = tasks if alphas is None else sum(sizes)
            _SUPERPOSE[weight.dtype].launch(
                (triton.cdiv(tiles, _TILES) * rows,),
                weight, *some, own, sums, seen, out, *numbers, int(alphas is None), int(i == 0), int(ends), width, rows, n,
            )  # fmt: skip
            done += sum(sizes)
    return out


def superpose_counts(weight: Tensor, counts: Tensor, tasks: int) -> Tensor:
    """The op of `reference.superpose_counts` on a GPU."""
    n = weight.numel()
    check(
        counts.numel() == n and counts.dtype == torch.int32,
        "superpose_counts",
        f"counts must be int32, one for each of {n} weights, got {counts.numel()}",
    )
    if weight.dtype not in NAMES:
        return reference.superpose_counts(weight, counts, tasks)
    out = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    if n > 0:
        with on_device(weight):
            _COUNTS[weight.dtype].launch(programs(n), plain(weight), plain(counts), out, tasks, n)
    return out


def superpose_grad(grad: Tensor, weight: Tensor, bank: Sequence[Tensor]) -> Tensor:
    """The op of `reference.superpose_grad` on a GPU."""
    op, n, tasks = "superpose_grad", weight.numel(), _check_bank("superpose_grad", bank, weight)
    many = grad.dim() == weight.dim() + 1
    rows = grad.shape[0] if many else 1
    check(grad.numel() == rows * n, op, f"grad must have the {n} elements of weight, got {grad.numel() // max(rows, 1)}")
    if weight.dtype not in NAMES or grad.dtype != weight.dtype or rows * n * tasks == 0:
        return reference.superpose_grad(grad, weight, bank)
    grad, weight = plain(grad), plain(weight)
    tiles = -(-n // TILE)
    chunk = triton.cdiv(tiles, _CHUNKS)
    chunks = triton.cdiv(tiles, chunk)
    parts = torch.empty((chunks, rows, tasks), dtype=torch.float64, device=weight.device)
    first = 0
    with on_device(weight):
        for block in bank:
            own = block.shape[1]
            if own > 0:
                grid = chunks * rows, triton.cdiv(own, _GROUP)
                _GRAD[weight.dtype].launch(grid, grad, weight, plain(block), parts, first, own, tasks, chunk, rows, n)
            first += own
    sums = parts.sum(0).to(weight.dtype)
    return sums if many else sums[0]


def _check_bank(op: str, bank: Sequence[Tensor], weight: Tensor) -> int:
    """Raise RuntimeError unless blocks are those of weight's size; the number of tasks."""
    n = weight.numel()
    tiles = -(-n // TILE)
    for b in bank:
        check(
            b.dtype == torch.uint8 and b.dim() == 3 and b.shape[0] == tiles and b.shape[1] <= TASKS and b.shape[2] == TILE // 8,
            op,
            f"a block of the bank must be uint8 ({tiles}, at most {TASKS}, {TILE // 8}) for {n} weights",
        )
    check(weight.dtype in NAMES or weight.dtype == torch.float64, op, "weight must be float64, float32, float16 or bfloat16")
    return sum(b.shape[1] for b in bank)
