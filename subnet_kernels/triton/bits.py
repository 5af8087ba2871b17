"""pack, unpack, count, stats: masks as bits, and what is counted on them. `union_` is one operation of PyTorch's own."""

from collections.abc import Sequence
from math import prod

import torch
import triton
import triton.language as tl
from torch import Tensor

from subnet_kernels import reference
from subnet_kernels.triton._build import Build, on_device, plain, typed
from subnet_kernels.triton._packed import BLOCK, build, check, check_bits, opened, places, programs, step_of, store_packed

# -------------------------------------------------------------------------------------------------------------- kernels


@triton.jit(do_not_specialize=["n"])
def _pack_kernel(mask, bits, n: tl.int64, BLOCK: tl.constexpr):
    """Bytes of a mask to bits; any but 0 is open."""
    for STEP in tl.static_range(1, 17, 15):
        if step_of(n) == STEP:
            size = n // STEP * STEP
            at = places(BLOCK)
            store_packed(bits, tl.load(mask + at, mask=at < size, other=0) != 0, size, BLOCK)


@triton.jit(do_not_specialize=["n"])
def _unpack_kernel(bits, mask, n: tl.int64, BLOCK: tl.constexpr):
    """Bits to bytes of a mask, 0 or 1."""
    for STEP in tl.static_range(1, 17, 15):
        if step_of(n) == STEP:
            size = n // STEP * STEP
            at = places(BLOCK)
            tl.store(mask + at, opened(bits, size, BLOCK).to(tl.uint8), mask=at < size)


@triton.jit
def _ones(word):
    """Bits set in each uint32."""
    word = word - ((word >> 1) & 0x55555555)
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F
    word = word + (word >> 8)
    return (word + (word >> 16)) & 0x3F


@triton.jit(do_not_specialize=["three", "words"])
def _count_kernel(
    bits,
    owned,  # read if three
    counts,  # int64, zeros at first: open, and if three, new and shared
    three: tl.int32,
    words: tl.int64,
    BLOCK: tl.constexpr,
):
    """Adds what a block of words counts: integers, so that the order does not matter."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    word = tl.load(bits + at, mask=at < words, other=0).to(tl.uint32, bitcast=True)
    every = tl.sum(_ones(word).to(tl.int32), 0).to(tl.int64)
    tl.atomic_add(counts, every, sem="relaxed")
    if three != 0:
        both = word & tl.load(owned + at, mask=at < words, other=0).to(tl.uint32, bitcast=True)
        shared = tl.sum(_ones(both).to(tl.int32), 0).to(tl.int64)
        tl.atomic_add(counts + 1, every - shared, sem="relaxed")
        tl.atomic_add(counts + 2, shared, sem="relaxed")


# --------------------------------------------------------------------------------------------------------------- builds

_WORDS = 1024  # of one program that counts
_PACK = build(_pack_kernel, "", typed({"mask": "u8", "bits": "u8"}, int64="n"), {"BLOCK": BLOCK})
_UNPACK = build(_unpack_kernel, "", typed({"bits": "u8", "mask": "u8"}, int64="n"), {"BLOCK": BLOCK})
_COUNT = build(_count_kernel, "", typed({"bits": "i32", "owned": "i32", "counts": "i64"}, "three", "words"), {"BLOCK": _WORDS})


def builds() -> list[Build]:
    """Every build that a launch of this module can choose."""
    return [_PACK, _UNPACK, _COUNT]


# ------------------------------------------------------------------------------------------------------------- launches


def pack(mask: Tensor) -> Tensor:
    """The op of `reference.pack` on a GPU."""
    check(mask.dtype == torch.bool, "pack", "mask must be bool")
    n = mask.numel()
    bits = torch.empty(reference.nbytes(n), dtype=torch.uint8, device=mask.device)
    if n > 0:
        with on_device(mask):
            _PACK.launch(programs(n), plain(mask).view(torch.uint8), bits, n)
    return bits


def unpack(bits: Tensor, shape: Sequence[int]) -> Tensor:
    """The op of `reference.unpack` on a GPU."""
    n = prod(shape)
    check_bits("unpack", bits, n)
    mask = torch.empty(tuple(shape), dtype=torch.bool, device=bits.device)
    if n > 0:
        with on_device(bits):
            _UNPACK.launch(programs(n), plain(bits), mask.view(torch.uint8), n)
    return mask


def count(bits: Tensor) -> Tensor:
    """The op of `reference.count` on a GPU."""
    check(bits.dtype == torch.uint8, "count", "bits must be uint8")
    if bits.numel() % 4 != 0:  # not the bits of a mask
        return reference.count(bits)
    return _counted(bits, bits, 1)[0]


def stats(bits: Tensor, owned: Tensor) -> Tensor:
    """The op of `reference.stats` on a GPU."""
    check(bits.dtype == owned.dtype == torch.uint8, "stats", "bits and owned must be uint8")
    check(bits.numel() == owned.numel(), "stats", f"bits have {bits.numel()} bytes, owned {owned.numel()}")
    if bits.numel() % 4 != 0:
        return reference.stats(bits.reshape(-1), owned.reshape(-1))
    return _counted(bits, owned, 3)


def _counted(bits: Tensor, owned: Tensor, figures: int) -> Tensor:
    counts = torch.zeros(figures, dtype=torch.int64, device=bits.device)
    words = bits.numel() // 4
    if words > 0:
        one, other = (plain(t.reshape(-1)).view(torch.int32) for t in (bits, owned))
        with on_device(bits):
            _COUNT.launch((triton.cdiv(words, _WORDS),), one, other, counts, int(figures == 3), words)
    return counts
