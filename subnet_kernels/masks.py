"""Packed masks of many tasks in memory: blocks of tasks, so that adding one costs the same however many there are."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from subnet_kernels import ops, reference


class Masks:
    """The masks of K tasks over named layers, in the order in which they came.

    weights: {layer name: weight}, whose shapes and devices the masks have; planes: 1, or 2 for signed masks, which are two masks in
    turn, where they are 1 and where they are -1. blocks: {layer name: blocks of at most 64 tasks, as
    `pack_bank` makes them}; owned: {layer name: packed bits that any mask opens}. Earlier blocks never move: a task that is added
    copies at most the last one. Tensors that were handed out are never written again.

    waiting: what gives each of the first masks, {layer name: packed bits}, which lie elsewhere. A single one is got whenever its bits are
    asked for; all of them are, once, when something of all is: blocks, what is owned, counts, or a change.
    """

    def __init__(
        self, weights: Mapping[str, Tensor], planes: int = 1, waiting: Sequence[Callable[[], Mapping[str, Tensor]]] = ()
    ):
        self.planes = planes
        self.shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
        self._blocks: dict[str, list[Tensor]] = {name: [] for name in weights}
        self._owned = {
            name: torch.zeros(reference.nbytes(weight.numel()), dtype=torch.uint8, device=weight.device)
            for name, weight in weights.items()
        }
        self._waiting = waiting
        self._tasks = len(waiting)
        self._counts: dict[str, Tensor] | None = None  # kept up to date once somebody has asked for them

    def copy(self) -> Masks:
        """The same masks, to which others may be added: no bits are copied."""
        other = copy.copy(self)
        other._blocks, other._owned = {name: list(blocks) for name, blocks in self._blocks.items()}, dict(self._owned)
        other._counts = None if self._counts is None else dict(self._counts)
        return other

    @property
    def blocks(self) -> dict[str, list[Tensor]]:
        """{layer name: blocks}, uint8 (tiles, at most 64 masks, 64) each; masks that wait are got first."""
        self._get_all()
        return self._blocks

    @property
    def owned(self) -> dict[str, Tensor]:
        """{layer name: packed bits that any mask opens}; masks that wait are got first."""
        self._get_all()
        return self._owned

    def _get_all(self) -> None:
        """Get the masks that wait: all of them, or, where one cannot be had, none."""
        if not self._waiting:
            return
        each = reference.BLOCK // self.planes
        blocks: dict[str, list[Tensor]] = {name: [] for name in self._blocks}
        for start in range(0, len(self._waiting), each):
            masks = [get() for get in self._waiting[start : start + each]]
            for name in blocks:
                blocks[name] += _blocks_of(torch.stack([mask[name] for mask in masks]).flatten(0, -2))
        self._waiting, self._blocks, self._owned = (), blocks, {name: _union_of(some) for name, some in blocks.items()}

    def __len__(self) -> int:
        return self._tasks

    def append(self, bits: Mapping[str, Tensor]) -> None:
        """Add a mask, {layer name: packed bits (bytes,), of a signed one (2, bytes)}."""
        for name, blocks in self.blocks.items():
            (rows,) = _blocks_of(bits[name].view(self.planes, -1))
            if blocks and blocks[-1].shape[1] < reference.BLOCK:
                blocks[-1] = torch.cat([blocks[-1], rows], 1)
            else:
                blocks.append(rows.clone())
            self.owned[name] = self.owned[name] | opened(bits[name])
        self._tasks += 1
        if self._counts is not None:
            self._counts = {name: total + ops.unpack(bits[name], self.shapes[name]) for name, total in self._counts.items()}

    def remove(self, index: int) -> None:
        """Take a mask out; later ones move up by one."""
        self._get_all()  # before anything changes
        each = reference.BLOCK // self.planes
        kept = index // each  # blocks before the mask's
        later = [self.bits(i) for i in range(kept * each, len(self)) if i != index]
        self._tasks, self._counts = kept * each, None
        for name, blocks in self.blocks.items():
            self.blocks[name], self.owned[name] = blocks[:kept], torch.zeros_like(self.owned[name])
        for i in range(len(self)):
            for name, bits in self.bits(i).items():
                ops.union_(self.owned[name], opened(bits))
        for bits in later:
            self.append(bits)

    def replace(self, index: int, bits: Mapping[str, Tensor]) -> None:
        """Put another mask in the place of one; its block is copied, so that what reads the old one goes on doing so."""
        block, place = divmod(index * self.planes, reference.BLOCK)
        for name, blocks in self.blocks.items():
            (rows,) = _blocks_of(bits[name].view(self.planes, -1))
            block_now = blocks[block].clone()
            block_now[:, place : place + self.planes] = rows
            blocks = self.blocks[name] = [*blocks[:block], block_now, *blocks[block + 1 :]]
            self.owned[name] = _union_of(blocks)
        self._counts = None

    def bits(self, index: int) -> dict[str, Tensor]:
        """A copy of a mask: {layer name: packed bits}."""
        if self._waiting:
            return {name: bits.clone() for name, bits in self._waiting[index]().items()}
        block, place = divmod(index * self.planes, reference.BLOCK)
        rows = {name: blocks[block][:, place : place + self.planes].transpose(0, 1) for name, blocks in self.blocks.items()}
        copies = {name: row.clone(memory_format=torch.contiguous_format).flatten(1) for name, row in rows.items()}
        return {name: copy[0] if self.planes == 1 else copy for name, copy in copies.items()}

    def counts(self) -> dict[str, Tensor]:
        """How many of all masks open each weight, {layer name: int32 of the weight's shape}: counted once, then added to."""
        if self._counts is None:
            self._counts = {name: count_masks(blocks, self.shapes[name]) for name, blocks in self.blocks.items()}
        return self._counts

    def some(self, indices: Iterable[int]) -> dict[str, list[Tensor]]:
        """Blocks of some of the masks, copied."""
        rows = [self.bits(index) for index in indices]
        return {name: _blocks_of(torch.stack([row[name] for row in rows]).flatten(0, -2)) for name in self.shapes}

    def to(self, weights: Mapping[str, Tensor]) -> bool:
        """Follow the weights to their devices; returns whether anything had to move."""
        moved = False
        for name, weight in weights.items():  # masks that wait will come to where the weights are then
            if weight.device != self._owned[name].device:
                self._owned[name], self._counts = self._owned[name].to(weight.device), None
                self._blocks[name] = [block.to(weight.device) for block in self._blocks[name]]
                moved = True
        return moved


def opened(bits: Tensor) -> Tensor:
    """Packed bits of what a mask opens: uint8 (bytes,), or of a signed one (2, bytes) -> (bytes,)."""
    return bits if bits.dim() == 1 else bits[0] | bits[1]


def _blocks_of(rows: Tensor) -> list[Tensor]:
    """Packed masks uint8 (K, bytes) as blocks of at most 64."""
    return [part.view(len(part), -1, reference.TILE // 8).transpose(0, 1).contiguous() for part in rows.split(reference.BLOCK)]


def _union_of(blocks: Sequence[Tensor]) -> Tensor:
    union = torch.zeros_like(blocks[0][:, 0])
    for block in blocks:
        while (tasks := block.shape[1]) > 1:
            half = (tasks + 1) // 2
            block = block[:, :half] | block[:, -half:]
        union |= block[:, 0]
    return union.reshape(-1)


def count_masks(blocks: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
    """How many of the masks, at least one, open each weight: int32 of the weight's shape."""
    ones = torch.ones(tuple(shape), dtype=torch.float32, device=blocks[0].device)
    once = ones.new_ones(sum(block.shape[1] for block in blocks))
    return ops.superpose(ones, blocks, once).to(torch.int32)  # sums of ones, which float32 has exactly up to 2^24
