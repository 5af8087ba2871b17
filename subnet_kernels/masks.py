"""Packed masks of many tasks in memory: blocks of tasks, so that adding one costs the same however many there are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from subnet_kernels import ops, reference


class Masks:
    """The masks of K tasks over named layers, in the order in which they came.

    weights: {layer name: weight}, whose shapes and devices the masks have. blocks: {layer name: blocks of at most 64 tasks, as
    `pack_bank` makes them}; owned: {layer name: packed bits that any mask opens}. Earlier blocks never move: a task that is added
    copies at most the last one.
    """

    def __init__(self, weights: Mapping[str, Tensor]):
        self.shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
        self.blocks: dict[str, list[Tensor]] = {name: [] for name in weights}
        self.owned = {
            name: torch.zeros(reference.nbytes(weight.numel()), dtype=torch.uint8, device=weight.device)
            for name, weight in weights.items()
        }
        self._tasks = 0

    def __len__(self) -> int:
        return self._tasks

    def append(self, bits: Mapping[str, Tensor]) -> None:
        """Add a mask, {layer name: packed bits}."""
        for name, blocks in self.blocks.items():
            row = bits[name].view(-1, 1, reference.TILE // 8)
            if blocks and blocks[-1].shape[1] < reference.BLOCK:
                blocks[-1] = torch.cat([blocks[-1], row], 1)
            else:
                blocks.append(row.clone())
            ops.union_(self.owned[name], bits[name])
        self._tasks += 1

    def replace(self, index: int, bits: Mapping[str, Tensor]) -> None:
        """Put another mask in the place of one; its block is copied, so that what reads the old one goes on doing so."""
        block, place = divmod(index, reference.BLOCK)
        for name, blocks in self.blocks.items():
            blocks[block] = blocks[block].clone()
            blocks[block][:, place] = bits[name].view(-1, reference.TILE // 8)
            self.owned[name] = _union_of(blocks)

    def bits(self, index: int) -> dict[str, Tensor]:
        """A copy of a mask: {layer name: packed bits}."""
        block, place = divmod(index, reference.BLOCK)
        return {
            name: blocks[block][:, place].clone(memory_format=torch.contiguous_format).view(-1)
            for name, blocks in self.blocks.items()
        }

    def some(self, indices: Iterable[int]) -> dict[str, list[Tensor]]:
        """Blocks of some of the masks, copied."""
        rows = [self.bits(index) for index in indices]
        return {name: _blocks_of([row[name] for row in rows]) for name in self.blocks}

    def to(self, weights: Mapping[str, Tensor]) -> bool:
        """Follow the weights to their devices; returns whether anything had to move."""
        moved = False
        for name, weight in weights.items():
            if weight.device != self.owned[name].device:
                self.owned[name] = self.owned[name].to(weight.device)
                self.blocks[name] = [block.to(weight.device) for block in self.blocks[name]]
                moved = True
        return moved


def _blocks_of(rows: Sequence[Tensor]) -> list[Tensor]:
    stacked = torch.stack(list(rows))
    return [part.view(len(part), -1, reference.TILE // 8).transpose(0, 1).contiguous() for part in stacked.split(reference.BLOCK)]


def _union_of(blocks: Sequence[Tensor]) -> Tensor:
    union = torch.zeros_like(blocks[0][:, 0])
    for block in blocks:
        while (tasks := block.shape[1]) > 1:
            half = (tasks + 1) // 2
            block = block[:, :half] | block[:, -half:]
        union |= block[:, 0]
    return union.reshape(-1)


def count_masks(blocks: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
    """How many of the masks open each weight: int32 of the weight's shape."""
    counts = torch.zeros(tuple(shape), dtype=torch.int32, device=blocks[0].device)
    for block in blocks:
        for j in range(block.shape[1]):
            counts += ops.unpack(block[:, j].reshape(-1), shape)
    return counts
