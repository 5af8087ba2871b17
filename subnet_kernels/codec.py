"""Masks near their entropy: packed bits, coded given what the decoder knows already (csrc/host/codec.cpp, the layout in docs/codec.md).

A task's mask over weights that earlier tasks use too is far from random once one knows which those are: on a weight that is in use it
is open more often than on a free one. `context` is up to three such facts, packed as masks are; each combination of them has a
probability of its own.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from subnet_kernels import ops, reference

PLANES = 3  # of context, at most


def encode(bits: Tensor, n: int, context: Sequence[Tensor] = (), *, threads: int | None = None) -> bytes:
    """Code the mask of n weights in about its conditional entropy given the context.

    bits: uint8 (bytes,) on the CPU, as `pack` makes them; context: at most three more of the same shape, which `decode` must be given
    too; threads: default `torch.get_num_threads()`, and as many blocks of 64 KB run at once. A mask that does not shrink is kept as it
    is, so the result takes at most 24 bytes more, and 11 a block. The same bytes on every machine. Raises ValueError where an argument
    does not fit, RuntimeError where the codec has not been compiled.
    """
    planes = [_bytes(plane, n, f"context {k} of encode") for k, plane in enumerate(_few(context, "encode"))]
    given = _bytes(bits, n, "bits of encode")
    tail = given[n // 8 :].copy()
    tail[:1] >>= n % 8
    if tail.any():
        raise ValueError(f"encode: bits must have zero padding after the {n} weights")
    return _compiled().encode(given, n, planes, _threads(threads))


def decode(data: bytes | memoryview, n: int, context: Sequence[Tensor] = (), *, threads: int | None = None) -> Tensor:
    """The mask of n weights that `encode` coded: uint8 (bytes,).

    Nothing that `data` says is believed before it is checked: where the bytes are not those of `encode` it raises ValueError, in time and
    memory of the order of n. Every block has a checksum, and so has the header.
    """
    planes = [_bytes(plane, n, f"context {k} of decode") for k, plane in enumerate(_few(context, "decode"))]
    out = torch.zeros(reference.nbytes(n), dtype=torch.uint8)
    _compiled().decode(data, n, planes, out.numpy(), _threads(threads))
    return out


def seal(bits: Tensor, n: int, context: Sequence[Tensor] = ()) -> Tensor:
    """A coded mask as a bank's files hold it, which cannot be taken for another one even where the context is not that of its coder.

    -> uint8 (size,): CRC-32 of the mask's ceil(n / 8) bytes, little-endian, then `encode`'s bytes, or those of the mask itself where there
    are no fewer. As `encode`, and as it raises.
    """
    plain, coded = bits[: -(-n // 8)].numpy().tobytes(), encode(bits, n, context)
    kept = coded if len(coded) < len(plain) else plain
    return torch.frombuffer(bytearray(zlib.crc32(plain).to_bytes(4, "little") + kept), dtype=torch.uint8)


def unseal(data: Tensor, n: int, context: Sequence[Tensor] = ()) -> Tensor:
    """The mask of n weights that `seal` was given: uint8 (bytes,). Raises ValueError where the bytes, or the context, are not `seal`'s."""
    if data.dtype != torch.uint8 or data.dim() != 1 or not 4 <= len(data) <= 4 + -(-n // 8):
        raise ValueError(f"decode: a sealed mask of {n} weights must be 4 to {4 + -(-n // 8)} bytes, got {tuple(data.shape)}")
    whole = memoryview(data.contiguous().numpy())
    if len(data) == 4 + -(-n // 8):
        bits = torch.zeros(reference.nbytes(n), dtype=torch.uint8)
        bits[: -(-n // 8)] = data[4:]
    else:
        bits = decode(whole[4:], n, context)
    if zlib.crc32(bits[: -(-n // 8)].numpy()) != int.from_bytes(whole[:4], "little"):
        raise ValueError("decode: the mask must have the checksum that was kept with it, its bits or their context are others")
    return bits


def entropy(bits: Tensor, n: int, context: Sequence[Tensor] = ()) -> float:
    """Bits that no code with one probability a context can go below: the sum over contexts of n_c H(ones_c / n_c). As in `encode`."""
    count = lambda mask: int(ops.count(mask))  # noqa: E731
    groups = [(torch.full_like(bits, 255), n, count(bits))]  # weights of one context, how many they are, and how many are open
    for plane in _few(context, "entropy"):
        split = []
        for mask, size, ones in groups:
            inside = mask & plane
            sizes = (count(inside), count(inside & bits))
            split += [(inside, *sizes), (mask & ~plane, size - sizes[0], ones - sizes[1])]
        groups = split
    total = 0.0
    for _, size, ones in groups:
        for part in (ones, size - ones):
            total -= part * math.log2(part / size) if part else 0.0
    return total


def _few(context: Sequence[Tensor], where: str) -> Sequence[Tensor]:
    if len(context) > PLANES:
        raise ValueError(f"{where}: context must have at most {PLANES} masks, got {len(context)}")
    return context


def _bytes(bits: Tensor, n: int, what: str):
    if not isinstance(n, int) or n < 0:
        raise ValueError(f"{what}: n must be a number of weights, got {n!r}")
    shape = (reference.nbytes(n),)
    if not isinstance(bits, Tensor) or bits.dtype != torch.uint8 or bits.shape != shape or bits.device.type != "cpu":
        got = f"{bits.dtype} {tuple(bits.shape)} on {bits.device}" if isinstance(bits, Tensor) else type(bits).__name__
        raise ValueError(f"{what} must be uint8 {shape} on the CPU for {n} weights, got {got}")
    return bits.contiguous().numpy()


def _threads(threads: int | None) -> int:
    if threads is not None and threads < 1:
        raise ValueError(f"threads must be at least 1, got {threads}")
    return torch.get_num_threads() if threads is None else threads


def _compiled() -> ModuleType:
    try:
        from subnet_kernels import _codec
    except ImportError as error:
        raise RuntimeError(f"the mask codec is not compiled: install with a C++ compiler and pybind11 there ({error})") from None
    return _codec
