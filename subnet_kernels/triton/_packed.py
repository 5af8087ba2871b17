"""What kernels over single weights share: a block of weights beside its packed bits, and the checks of bits.

A block is (BLOCK // 8, 8): a row is a byte of bits, so that a byte is loaded once for its eight weights and made by one sum.
BLOCK is a multiple of 512, the padding of bits, so that a block's bytes are its own.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from subnet_kernels.reference import nbytes
from subnet_kernels.triton._build import Build, typed

BLOCK = 2048  # weights of one program
INTEGERS = {1: "i8", 2: "i16", 4: "i32", 8: "i64"}  # what an element is where it is moved and not computed with, by its size
AS_INTEGER = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@triton.jit
def step_of(n):
    """16 or 1, what n is a multiple of. Loads and stores are wide only if the compiler knows that the last one is: so a kernel has
    its body twice, once for each step, ``for STEP in tl.static_range(1, 17, 15)``, of which n picks one."""
    return tl.where(n % 16 == 0, 16, 1)


@triton.jit
def places(BLOCK: tl.constexpr):
    """(BLOCK // 8, 8) int64: the weights of this program."""
    inner = tl.arange(0, BLOCK // 8)[:, None] * 8 + tl.arange(0, 8)[None, :]
    return tl.program_id(0).to(tl.int64) * BLOCK + inner


@triton.jit
def opened(bits, n, BLOCK: tl.constexpr):
    """(BLOCK // 8, 8) bool: which of this program's weights are open, of n; bits: *u8."""
    byte = tl.program_id(0).to(tl.int64) * (BLOCK // 8) + tl.arange(0, BLOCK // 8)
    found = tl.load(bits + byte, mask=byte * 8 < n, other=0).to(tl.int32)
    return ((found[:, None] >> tl.arange(0, 8)[None, :]) & 1) != 0


@triton.jit
def store_packed(bits, mask, n, BLOCK: tl.constexpr):
    """Writes this program's bits from (BLOCK // 8, 8) bool, false from the n-th weight on; bits: *u8, padding included."""
    byte = tl.program_id(0).to(tl.int64) * (BLOCK // 8) + tl.arange(0, BLOCK // 8)
    made = tl.sum(mask.to(tl.int32) << tl.arange(0, 8)[None, :], 1)
    tl.store(bits + byte, made.to(tl.uint8), mask=byte < (n + 511) // 512 * 64)


def build(function: Any, kind: str, signature: dict[str, str], constants: dict[str, Any], warps: int = 4) -> Build:
    """The build of a kernel for elements of a kind (none if it has but one), named after its module."""
    module = function.fn.__module__.rpartition(".")[2]
    sizes = "x".join(str(size) for name, size in constants.items() if name != "MOST")
    parts = [module, function.fn.__name__.strip("_").removesuffix("_kernel"), kind, sizes]
    return Build("-".join(part for part in parts if part), function, signature, constants, warps, 1, True)


def each(
    function: Any, kinds: dict[Any, str], pointers: dict[str, str], *numbers: str, warps: int = 4, **constants: Any
) -> dict[Any, Build]:
    """A build for each kind of element, by what names it, a dtype or a size.

    pointers: a type, or "" for one that is the kind's; numbers: as in `typed`; constants: a dict has one for each name.
    """
    return {
        key: build(
            function,
            kind,
            typed({name: element or kind for name, element in pointers.items()}, *numbers),
            {name: value[key] if isinstance(value, dict) else value for name, value in constants.items()},
            warps,
        )
        for key, kind in kinds.items()
    }


def programs(n: int) -> tuple[int]:
    """The grid of a kernel whose programs take a block of n weights each."""
    return (triton.cdiv(n, BLOCK),)


def check(condition: bool, op: str, sentence: str) -> None:
    """Raise RuntimeError with a sentence, as the compiled ops do."""
    if not condition:
        raise RuntimeError(f"{op}: {sentence}")


def check_bits(op: str, bits: Tensor, n: int) -> None:
    """Raise RuntimeError unless bits are those of n weights."""
    check(
        bits.dtype == torch.uint8 and bits.dim() == 1 and bits.numel() == nbytes(n),
        op,
        f"bits must be contiguous uint8 with {nbytes(n)} bytes for {n} weights, got {bits.numel()}",
    )


def check_lengths(op: str, expected: int, given: int, what: str) -> None:
    """Raise RuntimeError unless a list is as long as it must be."""
    check(expected == given, op, f"expected {expected} {what}, got {given}")


def in_place(t: Tensor) -> bool:
    """Whether a kernel can write t where it lies."""
    return t.is_contiguous() and t.data_ptr() % 16 == 0
