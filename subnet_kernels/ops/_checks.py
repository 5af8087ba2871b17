"""Argument checks of the public functions: one sentence with what was expected, what came, and where."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from subnet_kernels.reference import BLOCK, TILE, nbytes

BY = ("magnitude", "value")
TIES = ("last", "first", "all")


def choice(op: str, name: str, value: str, choices: Sequence[str]) -> None:
    """value is one of the choices."""
    if value not in choices:
        raise ValueError(f"{op}: {name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def tensor(op: str, name: str, value: object) -> None:
    """value is a tensor."""
    if not isinstance(value, Tensor):
        raise ValueError(f"{op}: {name} must be a tensor, got {type(value).__name__}")


def floating(op: str, name: str, value: Tensor) -> None:
    """value is a tensor of floating numbers."""
    tensor(op, name, value)
    if not value.dtype.is_floating_point:
        raise ValueError(f"{op}: {name} must be of a floating dtype, got {value.dtype}")


def device(op: str, name: str, value: Tensor, like: Tensor) -> None:
    """value is where `like` is."""
    if value.device != like.device:
        raise ValueError(f"{op}: {name} must be on {like.device}, got {value.device}")


def tensors(op: str, name: str, value: object) -> list[Tensor]:
    """value as a list of tensors."""
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"{op}: {name} must be a list of tensors, got {type(value).__name__}")
    for i, v in enumerate(value):
        tensor(op, f"{name}[{i}]", v)
    return list(value)


def same_dtype(op: str, name: str, value: Tensor, other: str, like: Tensor) -> None:
    """value has the dtype of `like`, the argument named `other`."""
    if value.dtype != like.dtype:
        raise ValueError(f"{op}: {name} must have the dtype of {other}, {like.dtype}, got {value.dtype}")


def bits(op: str, name: str, value: Tensor, n: int | None, like: Tensor | None = None) -> None:
    """value is packed bits of n weights (of any number where n is None), on the device of `like`."""
    tensor(op, name, value)
    if value.dtype != torch.uint8 or value.dim() != 1:
        raise ValueError(
            f"{op}: {name} must be packed bits, uint8 of one dimension, got {value.dtype} of shape {tuple(value.shape)}"
        )
    if n is None:
        if value.numel() % (TILE // 8):
            raise ValueError(f"{op}: {name} must be padded to {TILE // 8} bytes, got {value.numel()}")
    elif value.numel() != nbytes(n):
        raise ValueError(f"{op}: {name} must have {nbytes(n)} bytes for {n} weights, got {value.numel()}")
    if like is not None:
        device(op, name, value, like)


def bank(op: str, value: Sequence[Tensor], n: int, like: Tensor) -> int:
    """value is a bank over n weights; returns its number of tasks."""
    tiles = nbytes(n) // (TILE // 8)
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"{op}: bank must be a list of blocks from pack_bank, got {type(value).__name__}")
    if not value:
        raise ValueError(f"{op}: bank must hold at least one block from pack_bank, got an empty {type(value).__name__}")
    for i, block in enumerate(value):
        tensor(op, f"bank[{i}]", block)
        if block.dtype != torch.uint8 or block.dim() != 3 or block.shape[0] != tiles or block.shape[2] != TILE // 8:
            raise ValueError(
                f"{op}: bank[{i}] must be uint8 of shape ({tiles}, k, {TILE // 8}), got {block.dtype} of {tuple(block.shape)}"
            )
        if not 1 <= block.shape[1] <= BLOCK:
            raise ValueError(f"{op}: bank[{i}] must hold 1 to {BLOCK} tasks, got {block.shape[1]}")
        device(op, f"bank[{i}]", block, like)
    return sum(block.shape[1] for block in value)


def same_shape(op: str, name: str, value: Tensor, other: str, like: Tensor) -> None:
    """value has the shape of `like`, the argument named `other`."""
    if value.shape != like.shape:
        raise ValueError(f"{op}: {name} must have the shape of {other}, {tuple(like.shape)}, got {tuple(value.shape)}")
