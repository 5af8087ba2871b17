"""Bits: masks packed to one bit a weight, and what is counted on them. Layout: `subnet_kernels.reference`."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from subnet_kernels import reference
from subnet_kernels.ops import _checks as check
from subnet_kernels.ops._library import define

_pack = define(
    "pack(Tensor mask) -> Tensor", reference.pack, lambda mask: mask.new_empty(reference.nbytes(mask.numel()), dtype=torch.uint8)
)
_unpack = define(
    "unpack(Tensor bits, int[] shape) -> Tensor", reference.unpack, lambda bits, shape: bits.new_empty(shape, dtype=torch.bool)
)
_count = define("count(Tensor bits) -> Tensor", reference.count, lambda bits: bits.new_empty((), dtype=torch.int64))
_union = define("union_(Tensor(a!) owned, Tensor bits) -> ()", reference.union_, lambda owned, bits: None)
_stats = define(
    "stats(Tensor bits, Tensor owned) -> Tensor", reference.stats, lambda bits, owned: bits.new_empty(3, dtype=torch.int64)
)


def _overlap_fake(bank: Sequence[Tensor]) -> Tensor:
    tasks = sum(block.shape[1] for block in bank)
    return bank[0].new_empty((tasks, tasks), dtype=torch.int64)


_overlap = define("overlap(Tensor[] bank) -> Tensor", reference.overlap, _overlap_fake)


def pack(mask: Tensor) -> Tensor:
    """Pack a mask to bits: bool of any shape with N elements -> uint8 (ceil(N/512)*64,), little-endian, zero-padded.

    Raises ValueError if mask is not bool.
    """
    check.tensor("pack", "mask", mask)
    if mask.dtype != torch.bool:
        raise ValueError(f"pack: mask must be of dtype torch.bool, got {mask.dtype}")
    return _pack(mask)


def unpack(bits: Tensor, shape: Sequence[int]) -> Tensor:
    """Unpack bits: uint8 (ceil(N/512)*64,) -> bool of the given shape, N elements. Raises ValueError if the sizes disagree."""
    if isinstance(shape, (str, int)) or any(not isinstance(size, (int, torch.SymInt)) or size < 0 for size in shape):
        raise ValueError(f"unpack: shape must be a sequence of sizes, none negative, got {shape!r}")
    check.bits("unpack", "bits", bits, math.prod(shape))
    return _unpack(bits, list(shape))


def count(bits: Tensor) -> Tensor:
    """Open weights of packed bits -> int64 (), left on the device (no host sync). Raises ValueError if bits are not packed bits."""
    check.bits("count", "bits", bits, None)
    return _count(bits)


def union_(owned: Tensor, bits: Tensor) -> Tensor:
    """owned |= bits in place, and return owned. Raises ValueError if the sizes or devices differ."""
    check.bits("union_", "owned", owned, None)
    check.bits("union_", "bits", bits, owned.numel() * 8, owned)
    _union(owned, bits)
    return owned


def stats(bits: Tensor, owned: Tensor) -> Tensor:
    """(open, new, shared) of bits against owned -> int64 (3,): open weights, those not owned, those owned.

    Raises ValueError if the sizes or devices differ.
    """
    check.bits("stats", "owned", owned, None)
    check.bits("stats", "bits", bits, owned.numel() * 8, owned)
    return _stats(bits, owned)


def overlap(bank: Sequence[Tensor]) -> Tensor:
    """Open weights that every pair of a bank's masks has in common -> int64 (K, K). Raises ValueError if bank is not blocks of a bank."""
    first = bank[0] if isinstance(bank, (list, tuple)) and len(bank) and isinstance(bank[0], Tensor) else torch.empty(0, 0, 0)
    check.bank("overlap", bank, first.shape[0] * reference.TILE, first)
    return _overlap(list(bank))
