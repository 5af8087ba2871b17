"""Formulas of capacity: what the papers print, and what is measured."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

WSN_RATE = 0.78  # the average compression rate of 7-bit symbols in WSN's capacity; inverting its 30 printed cells gives it


def wsn_cap(used_fraction: float, tasks: int, rate: float = WSN_RATE) -> float:
    """WSN's CAP in percent: (1 - S) + (1 - rate) N / 32, with 1 - S the used fraction and N tasks' masks over 32-bit weights."""
    return 100 * (used_fraction + (1 - rate) * tasks / 32)


def wsn_used(cap: float, tasks: int, rate: float = WSN_RATE) -> float:
    """The used fraction behind a printed CAP: the inverse of `wsn_cap`."""
    return cap / 100 - (1 - rate) * tasks / 32


def packnet_cap(tasks: int, keep: float | None = None) -> float:
    """PackNet's CAP in WSN's tables, in percent: each of N tasks keeps 1/N (or `keep`) of what is free, and a bit per weight and task."""
    return 100 * (1 - (1 - (1 / tasks if keep is None else keep)) ** tasks + tasks / 32)


def capacity(
    used: int, total: int, tasks: int, mask_bytes: int, paper_cap: float | None, seed_only: bool = False
) -> dict[str, float | int | None]:
    """The result's capacity. used: masked weights in the union of all masks; total: masked weights; mask_bytes: of all stored masks.

    measured_cap is percent of the dense fp32 backbone: used values and mask bytes. seed_only: the backbone is fixed and random; then
    measured_cap counts all of it, and seed_only_cap is the figure where a seed is kept instead.
    """
    values = 1.0 if seed_only else used / total
    masks = mask_bytes / (4 * total)
    return {
        "used_fraction": used / total,
        "paper_cap": paper_cap,
        "measured_cap": 100 * (values + masks),
        "mask_bytes": mask_bytes,
        "bits_per_weight": 8 * mask_bytes / (total * tasks) if tasks else None,
        "seed_only_cap": 100 * masks if seed_only else None,
    }


def csc_bytes(opened: int, numbers: int) -> int:
    """What SupSup's paper stores masks in: 16 bits for the place of every open weight (scipy's CSC), and float32 numbers of the tasks (the
    running statistics of their norms)."""
    return 2 * opened + 4 * numbers


def with_own_numbers(weights: int, own: int, tasks: int, seed_only: bool = False) -> dict[str, float | int | None]:
    """The capacity where every task uses all the weights, and keeps `own` float32 numbers of its own (contexts, a head, statistics)."""
    cost, share = capacity(weights, weights, tasks, 0, None, seed_only), 100 * own * tasks / weights
    for name in ("measured_cap", "seed_only_cap"):
        if cost[name] is not None:
            cost[name] += share
    return cost


# ---- the joint Huffman code of WSN ----------------------------------------------------------------------------------

GROUP = 7  # consecutive tasks whose masks make one symbol a weight
_CHUNK = 1 << 17  # bytes of a mask that are opened at once


def joint_counts(group: Sequence[Tensor], n: int) -> np.ndarray:
    """How many of n weights have each joint pattern of some masks; bit j of a pattern is mask j.

    group: packed bits of n weights each, at most 8 -> int64 (2^len(group),).
    """
    rows = [bits.cpu().numpy() for bits in group]
    counts = np.zeros(1 << len(rows), np.int64)
    for start in range(0, len(rows[0]), _CHUNK):
        pattern = np.unpackbits(rows[0][start : start + _CHUNK], bitorder="little")
        for j, row in enumerate(rows[1:], 1):
            pattern |= np.unpackbits(row[start : start + _CHUNK], bitorder="little") << np.uint8(j)
        counts += np.bincount(pattern, minlength=len(counts))
    counts[0] -= 8 * len(rows[0]) - n  # the padding, which is zero in every mask
    return counts


def code_lengths(counts: Sequence[int]) -> list[int]:
    """Bits of each symbol in an optimal prefix code (Huffman 1952) for these counts; 0 where it does not occur or nothing else does."""
    lengths = [0] * len(counts)
    heap = [(int(count), i, [i]) for i, count in enumerate(counts) if count > 0]
    heapq.heapify(heap)
    while len(heap) > 1:
        low, order, symbols = heapq.heappop(heap)
        high, _, others = heap[0]
        merged = symbols + others
        for i in merged:
            lengths[i] += 1
        heapq.heapreplace(heap, (low + high, order, merged))
    return lengths


def joint_huffman(masks: Iterable[Mapping[str, Tensor]], sizes: Mapping[str, int], group: int = GROUP) -> dict[str, Any]:
    """What WSN's code for masks takes in true bits: each layer, and each group of consecutive tasks, has a Huffman code over the joint
    patterns of its weights; the last group may have fewer tasks.

    masks: packed bits {layer: uint8} of one task after another; sizes: weights of each layer. code_bits: of all code words; table_bits: of
    all codes, a byte for the length of each possible pattern's word; rate: the share of a raw bit a weight and task that the words save.
    (The authors' program counts a byte for each bit, of the words as of the raw masks, and takes every group for a full one.)
    """
    code = table = raw = 0
    tasks = iter(masks)
    while rows := list(itertools.islice(tasks, group)):
        for layer, n in sizes.items():
            counts = joint_counts([row[layer] for row in rows], n)
            code += sum(int(count) * length for count, length in zip(counts, code_lengths(counts)))
            table += 8 * len(counts)
            raw += n * len(rows)
    return {"group": group, "code_bits": code, "table_bits": table, "rate": 1 - code / raw if raw else None}


def with_huffman(capacity: Mapping[str, Any], huffman: dict[str, Any], total: int) -> dict[str, Any]:
    """A capacity with the joint Huffman code beside the stored bits; huffman_cap is measured_cap with that code in place of those bytes."""
    coded = (huffman["code_bits"] + huffman["table_bits"]) / 8
    cap = capacity["measured_cap"] + 100 * (coded - capacity["mask_bytes"]) / (4 * total)
    return {**capacity, "huffman": huffman, "huffman_cap": cap}
