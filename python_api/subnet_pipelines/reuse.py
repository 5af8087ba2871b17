"""How masks share weights: what a task takes over from earlier ones, how alike two masks are, and how alike they would be by chance. All
from packed bits."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

import subnet_kernels as sk

SHARES = ("all", "some", "none")
MOST = 250  # masks whose pairs are written down: more would make a result of megabytes


def reuse(masks: Iterable[Mapping[str, Tensor]]) -> dict[str, Any]:
    """The shares (0-1) of every mask that lie on weights used by all, some (not all) and no earlier tasks.

    masks: packed bits {layer: uint8} of one task after another, at least one -> {"tasks": {share: [a number a task]}, "layers": {layer:
    the same}}. The first task's weights are all used by none; a share of an empty mask is null.
    """
    counted, names, union, everyone = [], [], {}, {}
    for t, row in enumerate(masks):
        names, counts = list(row), []
        for layer, bits in row.items():
            if t == 0:
                union[layer], everyone[layer] = torch.zeros_like(bits), torch.zeros_like(bits)
            opened, new, shared = sk.stats(bits, union[layer]).unbind()
            by_all = sk.stats(bits, everyone[layer])[2]
            counts.append(torch.stack([by_all, shared - by_all, new, opened]))
            sk.union_(union[layer], bits)
            everyone[layer] = bits.clone() if t == 0 else everyone[layer] & bits
        counted.append(torch.stack(counts))
    found = torch.stack(counted).cpu()  # (tasks, layers, 4)
    return {"tasks": _shares(found.sum(1)), "layers": {name: _shares(found[:, i]) for i, name in enumerate(names)}}


def _shares(counts: Tensor) -> dict[str, list[float | None]]:
    """counts int64 (tasks, 4), the last of them the open weights -> {share: [a number a task]}."""
    rows = counts.tolist()
    return {name: [row[i] / row[3] if row[3] else None for row in rows] for i, name in enumerate(SHARES)}


def correlation(overlap: Tensor, n: int) -> list[list[float | None]]:
    """Pearson's correlation of every pair of masks, each n numbers 0 or 1; null for a mask that is all open or all closed.

    overlap: int64 (K, K), open weights in common.
    """
    both = overlap.cpu().double()
    ones = both.diagonal()
    spread = (ones * (n - ones)).sqrt()
    found = (n * both - ones[:, None] * ones) / (spread[:, None] * spread)
    return [[round(v, 6) if v == v and abs(v) != float("inf") else None for v in row] for row in found.tolist()]


def expected_overlap(overlap: Tensor, n: int) -> Tensor:
    """What every two masks over n weights would have in common if they were independent: n times the product of their densities.

    overlap: int64 (K, K), open weights in common, of a mask with itself its own -> float64 (K, K); the diagonal, which is no pair, too.
    """
    ones = overlap.diagonal().double()
    return ones[:, None] * ones / n


def pairs(overlap: Mapping[str, Tensor], sizes: Mapping[str, int]) -> dict[str, Any]:
    """The measured overlap of K >= 2 masks beside the expected one of independent masks, in percent of a layer's weights and as the
    mean over all pairs: {"layers": {layer: {"measured", "expected"}}, "all": the same over all layers}.

    overlap: {layer: int64 (K, K)}; sizes: weights of each layer. Over all layers, masks are independent where they are so in every one.
    """
    found = {name: (_pair_sum(both), _pair_sum(expected_overlap(both, sizes[name]))) for name, both in overlap.items()}
    whole = [sum(sums) for sums in zip(*found.values())]
    pair_count = math.comb(len(next(iter(overlap.values()))), 2)

    def shares(sums: Iterable[float], n: int) -> dict[str, float]:
        return {name: 100 * value / (pair_count * n) for name, value in zip(("measured", "expected"), sums)}

    layers = {name: shares(sums, sizes[name]) for name, sums in found.items()}
    return {"layers": layers, "all": shares(whole, sum(sizes[name] for name in overlap))}


def _pair_sum(matrix: Tensor) -> float:
    """The sum over the pairs i < j of a symmetric matrix."""
    matrix = matrix.cpu().double()
    return ((matrix.sum() - matrix.trace()) / 2).item()


def reuse_report(bank: Any, sizes: Mapping[str, int]) -> dict[str, Any] | None:
    """`reuse` of the masks of a bank, or of a saved one, in commit order; how many weights every two have in common, how many they would
    have if they were independent in every layer, and their correlation, over all layers; and the mean of the first two by layer (`pairs`,
    of two masks or more). All that is of pairs is null beyond 250 masks. None for an empty bank.

    bank: with `masks`, `opened` and `overlap`; sizes: weights of each layer.
    """
    names = bank.masks
    if not names:
        return None
    found = {"masks": names, **reuse(map(bank.opened, names)), **dict.fromkeys(("overlap", "expected", "correlation", "pairs"))}
    if len(names) <= MOST:
        layers = bank.overlap()
        overlap, expected = sum(layers.values()), sum(expected_overlap(both, sizes[name]) for name, both in layers.items())
        found["overlap"] = overlap.tolist()
        found["expected"] = [[round(value, 1) for value in row] for row in expected.tolist()]
        found["correlation"] = correlation(overlap, sum(sizes.values()))
        found["pairs"] = pairs(layers, sizes) if len(names) > 1 else None
    return found
