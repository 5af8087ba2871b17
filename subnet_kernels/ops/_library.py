"""How an operation enters the dispatcher: schema, reference, fake, version bump and vmap rule, all from one call of `define`.

Schemas live in Python, so a pure-Python install works; the compiled libraries add `CPU` and `CUDA` keys to the same schemas.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

NAMESPACE = "subnet_kernels"
LIB = torch.library.Library(NAMESPACE, "DEF")
LOADED: dict[str, Path] = {}  # compiled library -> its file
MISSING: dict[str, str] = {}  # compiled library, or triton -> why it is not here, in a sentence


def define(schema: str, reference: Callable, fake: Callable, vmap: Callable | None = None) -> torch._ops.OpOverload:
    """Register an op and return its overload.

    The reference serves every device without a compiled kernel. A mutating op also gets an `ADInplaceOrView` kernel that bumps the
    version of what it wrote: without it autograd would silently use overwritten tensors. A functional op gets `vmap`, or a rule
    that runs it once for every element of the mapped dimension.
    """
    name = schema.split("(")[0]
    LIB.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIB.impl(name, torch.no_grad()(reference), "CompositeExplicitAutograd")  # forward only, as a compiled kernel is
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=LIB)
    op = getattr(getattr(torch.ops, NAMESPACE), name).default
    if op._schema.is_mutable:
        LIB.impl(name, _bumping(op), "ADInplaceOrView", with_keyset=True)
    else:
        torch.library.register_vmap(f"{NAMESPACE}::{name}", vmap or one_by_one(op), lib=LIB)
    return op


def _bumping(op: torch._ops.OpOverload) -> Callable:
    arguments = op._schema.arguments
    written = [(i, a.name) for i, a in enumerate(arguments) if a.alias_info is not None and a.alias_info.is_write]

    def kernel(keyset, *args, **kwargs):
        for i, name in written:
            value = args[i] if i < len(args) else kwargs[name]
            if not isinstance(value, Tensor) and len(value) == 0:
                continue
            torch.autograd.graph.increment_version(value)
        with torch._C._AutoDispatchBelowADInplaceOrView():
            return op.redispatch(keyset & torch._C._after_ADInplaceOrView_keyset, *args, **kwargs)

    return kernel


def one_by_one(op: torch._ops.OpOverload) -> Callable:
    """The vmap rule that runs an op once for every element of the mapped dimension."""

    def pick(value, dim, i: int):
        if isinstance(value, (list, tuple)):
            dims = dim if isinstance(dim, (list, tuple)) else [dim] * len(value)
            return [pick(v, d, i) for v, d in zip(value, dims)]
        return value.select(dim, i) if isinstance(value, Tensor) and dim is not None else value

    def rule(info, in_dims, *args):
        results = [op(*(pick(a, d, i) for a, d in zip(args, in_dims))) for i in range(info.batch_size)]
        if isinstance(results[0], Tensor):
            return torch.stack(results), 0
        stacked = [torch.stack(column) for column in zip(*results)]
        stacked = tuple(stacked) if isinstance(results[0], tuple) else stacked
        return stacked, type(stacked)([0] * len(stacked))

    return rule


def load(library: str) -> None:
    """Load a compiled library that lies beside the package, or note in `MISSING` why it is not in use."""
    files = sorted(Path(__file__).resolve().parent.parent.glob(f"{library}*.so"))
    if library == "_C_cpu" and (other := os.environ.get("SUBNET_KERNELS_CPU_LIBRARY")):
        files = [Path(other)]  # the CUDA kernels compiled for the processor, under test
    if not files:
        how = {"_C_cpu": "a C++ compiler and SUBNET_KERNELS_BUILD=auto", "_C_cuda": "nvcc and SUBNET_KERNELS_BUILD=cuda"}[library]
        MISSING[library] = f"it was not compiled: install with {how} (README, Two commands)"
        return
    try:
        torch.ops.load_library(files[0])
        LOADED[library] = files[0]
    except OSError as error:
        MISSING[library] = f"{files[0].name} does not load: {str(error).splitlines()[0]}"


def load_all() -> None:
    """Load what is compiled; say once if nothing is: the reference is slow."""
    for library in ("_C_cpu", "_C_cuda"):
        load(library)
    if "_C_cpu" not in LOADED:
        warnings.warn(
            f"subnet_kernels runs without compiled CPU kernels, on its slow reference: {MISSING['_C_cpu']}",
            RuntimeWarning,
            stacklevel=4,
        )
