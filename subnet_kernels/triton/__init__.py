"""Triton kernels of the CUDA key, for ops that no compiled library serves.

Light to import: triton itself is imported at the first launch. Inside this package ``import triton`` is the real one.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

import torch

from subnet_kernels.ops import _library

LAUNCHES = {  # op -> module.function of this package that launches it
    "apply": "apply.apply",
    "count": "bits.count",
    "masked_conv": "masked.masked_conv",
    "masked_linear": "masked.masked_linear",
    "masked_linear_grad_input": "masked.masked_linear_grad_input",
    "masked_linear_grad_weight": "masked.masked_linear_grad_weight",
    "max_pool_relu": "pool.max_pool_relu",
    "max_pool_relu_grad": "pool.max_pool_relu_grad",
    "pack": "bits.pack",
    "refresh_": "select.refresh_",
    "refresh_threshold_": "select.refresh_threshold_",
    "restore_": "apply.restore_",
    "select": "select.select",
    "stats": "bits.stats",
    "straight_through": "apply.straight_through",
    "superpose": "superpose.superpose",
    "superpose_counts": "superpose.superpose_counts",
    "superpose_grad": "superpose.superpose_grad",
    "threshold": "select.threshold",
    "unpack": "bits.unpack",
    "update_adam_": "update.update_adam_",
    "update_rmsprop_": "update.update_rmsprop_",
    "update_sgd_": "update.update_sgd_",
}
REGISTERED: set[str] = set()  # ops whose CUDA kernel is a launch of this package


def register() -> None:
    """Register every launch whose op has no CUDA kernel yet, on any machine that has triton; else say in `MISSING` why not."""
    if find_spec("triton") is None:
        _library.MISSING["triton"] = "it is not installed: pip install triton"
        return
    for op, place in LAUNCHES.items():
        if not torch._C._dispatch_has_kernel_for_dispatch_key(f"{_library.NAMESPACE}::{op}", "CUDA"):
            _library.LIB.impl(op, torch.no_grad()(_at_first_call(place)), "CUDA")
            REGISTERED.add(op)


def modules() -> list[str]:
    """Full names of the modules with kernels, each of which lists what it can launch in ``builds()``."""
    return sorted({f"{__name__}.{place.split('.')[0]}" for place in LAUNCHES.values()})


def installed() -> str | None:
    """Version of the installed triton, or None."""
    try:
        return version("triton")
    except PackageNotFoundError:
        return None


def _at_first_call(place: str) -> Callable:
    module, name = place.split(".")
    found = None

    def launch(*args):
        nonlocal found
        if found is None:
            found = getattr(import_module(f"{__name__}.{module}"), name)
        return found(*args)

    return launch
