"""How masks share weights: what a task takes over from earlier ones, and how alike two masks are. All from packed bits."""

from __future__ import annotations

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


def reuse_report(bank: sk.MaskBank) -> dict[str, Any] | None:
    """`reuse` of a bank's masks in commit order, how many weights every two have in common, and their correlation, over all layers;
    the pairs are null beyond 250 masks. None for an empty bank."""
    names = bank.masks
    if not names:
        return None
    found = {"masks": names, **reuse(map(bank.opened, names)), "overlap": None, "correlation": None}
    if len(names) <= MOST:
        overlap = sum(bank.overlap().values())
        found["overlap"] = overlap.tolist()
        found["correlation"] = correlation(overlap, sum(layer.weight.numel() for layer in bank.layers()))
    return found
