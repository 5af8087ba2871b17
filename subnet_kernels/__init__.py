"""Kernels for networks that are used through masks: one backbone, thousands of tasks, one bit per weight and task."""

from subnet_kernels.ops import (
    alpha_grad,
    apply,
    count,
    k_kth,
    k_sort,
    masked_conv,
    masked_linear,
    overlap,
    pack,
    pack_bank,
    restore_,
    select,
    stats,
    subnet_linear,
    superpose,
    threshold,
    union_,
    unpack,
)

__version__ = "0.1.0"

__all__ = [
    "alpha_grad",
    "apply",
    "count",
    "k_kth",
    "k_sort",
    "masked_conv",
    "masked_linear",
    "overlap",
    "pack",
    "pack_bank",
    "restore_",
    "select",
    "stats",
    "subnet_linear",
    "superpose",
    "threshold",
    "union_",
    "unpack",
]
