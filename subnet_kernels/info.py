"""Which tier serves each op here, and why the other tiers do not."""

from __future__ import annotations

import ctypes
import platform

import torch

from subnet_kernels import triton
from subnet_kernels.ops import _library

NAMES = ("portable", "avx2", "avx512")


def cpu_isa(request: str | None = None) -> str | None:
    """The instruction set of the compiled CPU kernels, after switching to `request` where the processor has it.

    None without the compiled library. Raises ValueError for an unknown name. SUBNET_KERNELS_CPU sets it at start.
    """
    if request is not None and request not in NAMES:
        raise ValueError(f"cpu_isa: the instruction set must be one of {', '.join(NAMES)}, got {request!r}")
    path = _library.LOADED.get("_C_cpu")
    if path is None:
        return None
    switch = ctypes.CDLL(str(path)).subnet_kernels_isa
    switch.argtypes, switch.restype = [ctypes.c_char_p], ctypes.c_char_p
    return switch(request.encode() if request else None).decode()


def ops() -> dict[str, dict[str, str]]:
    """{op: {"cpu": tier, "cuda": tier}}; a tier is ``compiled``, ``triton`` (on CUDA) or ``reference``."""
    names = sorted(name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("subnet_kernels::"))
    kernels = torch._C._dispatch_has_kernel_for_dispatch_key
    tiers = {}
    for name in names:
        full = f"subnet_kernels::{name}"
        tiers[name] = {key.lower(): "compiled" if kernels(full, key) else "reference" for key in ("CPU", "CUDA")}
        if name in triton.REGISTERED:
            tiers[name]["cuda"] = "triton"
    return tiers


def report() -> str:
    """What ``subnet-kernels info`` prints."""
    lines = [
        f"subnet_kernels on torch {torch.__version__}, Python {platform.python_version()}, {platform.machine()}",
        f"threads {torch.get_num_threads()}, CUDA devices {torch.cuda.device_count() if torch.version.cuda else 0}",
    ]
    for library in ("_C_cpu", "_C_cuda"):
        path = _library.LOADED.get(library)
        state = f"loaded from {path}" if path else f"off: {_library.MISSING[library]}"
        lines.append(f"{library}: {state}" + (f", instruction set {cpu_isa()}" if path and library == "_C_cpu" else ""))
    lines.append(f"codec: {_codec()}")
    served = f"{triton.installed()}, serves {len(triton.REGISTERED)} ops on CUDA" if triton.REGISTERED else _unused()
    lines.append(f"triton: {served}")
    width = max(map(len, ops()))
    lines += ["", f"{'op':{width}} {'cpu':10} cuda"]
    lines += [f"{name:{width}} {tier['cpu']:10} {tier['cuda']}" for name, tier in ops().items()]
    lines += ["", "reference: the op's definition in plain PyTorch, exact and slow; no kernel of it is compiled for that device"]
    return "\n".join(lines)


def _codec() -> str:
    try:
        from subnet_kernels import _codec as module
    except ImportError as error:
        return f"off: {error}"
    return f"loaded from {module.__file__}"


def _unused() -> str:
    return f"off: {_library.MISSING['triton']}" if "triton" in _library.MISSING else "every op has a compiled CUDA kernel"
