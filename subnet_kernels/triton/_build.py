"""A kernel with everything that a compiler needs: what a launch chooses among, and what is compiled ahead of time to prove it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

NAMES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
}  # dtypes that the kernels compute in, as Triton says


class Build(NamedTuple):
    """One way to compile a kernel.

    All that Triton specialises by itself is switched off or always true: integers have their type in the kernel's signature and
    are not specialised, and pointers are multiples of 16 (`plain`). So a build is one binary, and the list of builds is complete.
    """

    name: str  # module-kernel-dtype-sizes
    function: Any  # what triton.jit made
    signature: dict[str, str]  # argument -> type, without the constants
    constants: dict[str, Any]
    num_warps: int
    num_stages: int
    hot: bool  # of an aligned shape, where every register counts

    def launch(self, grid: tuple[int, ...], *args: Any) -> None:
        """Run on the current device, which args[0] is on."""
        place = self.name, args[0].get_device()
        compiled = _compiled.get(place)
        if compiled is not None:  # past Triton's own search for the binary, which takes longer than a small kernel
            compiled[(*grid, 1, 1)[:3]](*args, *self.constants.values())
            return
        compiled = self.function[grid](*args, **self.constants, num_warps=self.num_warps, num_stages=self.num_stages)
        if compiled is not None:  # as it is in the interpreter
            _compiled[place] = compiled


_compiled: dict[tuple[str, int], Any] = {}  # (build, device) -> its binary there


def typed(pointers: dict[str, str], int32: str = "", int64: str = "", fp32: str = "") -> dict[str, str]:
    """The signature of a kernel: {pointer: element type}, then names of numbers, in the order of the kernel's arguments."""
    types = {name: f"*{element}" for name, element in pointers.items()}
    return types | dict.fromkeys(int32.split(), "i32") | dict.fromkeys(int64.split(), "i64") | dict.fromkeys(fp32.split(), "fp32")


def plain(t: Tensor) -> Tensor:
    """t contiguous and at an address that is a multiple of 16; a copy only where it is not."""
    t = t.contiguous()
    return t if t.data_ptr() % 16 == 0 else t.clone()


def on_device(t: Tensor):
    """Makes the device of t the current one, on which Triton launches."""
    return torch.cuda.device(t.device) if t.is_cuda else _nowhere


class _Nowhere:
    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


_nowhere = _Nowhere()


def aligned(*sizes: int) -> bool:
    """All sizes are multiples of 16, so that rows of any dtype start at an address that 16-byte loads accept."""
    return all(size % 16 == 0 for size in sizes)
