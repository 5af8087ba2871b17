"""Formulas of capacity: what the papers print, and what is measured."""

from __future__ import annotations

WSN_RATE = 0.78  # the average compression rate of 7-bit symbols in WSN's capacity; inverting its 30 printed cells gives it


def wsn_cap(used_fraction: float, tasks: int, rate: float = WSN_RATE) -> float:
    """WSN's CAP in percent: (1 - S) + (1 - rate) N / 32, with 1 - S the used fraction and N tasks' masks over 32-bit weights."""
    return 100 * (used_fraction + (1 - rate) * tasks / 32)


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
