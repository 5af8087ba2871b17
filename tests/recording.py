"""Stand-ins for a GPU on the CPU: ops that would wait for it are refused, and steps are recorded and replayed as CUDA graphs are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
# What needs to know a value or a number of elements on the host, and what brings the host's data to the device.
WAITING = {
    aten._local_scalar_dense, aten.is_nonzero, aten.equal, aten.nonzero, aten.nonzero_numpy, aten.masked_select, aten._unique,
    aten._unique2, aten.unique_dim, aten.unique_consecutive, aten.lift_fresh, aten.lift, aten.repeat_interleave,
}  # fmt: skip


def waits(func: Any, args: tuple, kwargs: dict) -> str | None:
    """Why an op would wait for a GPU, or None."""
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    packet = func.overloadpacket
    if packet in WAITING:
        return f"{func} needs the host"
    if packet in (aten.index, aten.index_put, aten.index_put_, aten._unsafe_index):
        if any(t is not None and t.dtype in (torch.bool, torch.uint8) for t in args[1]):
            return f"{func} by a mask counts on the host"
    if packet is aten._to_copy and kwargs.get("device") is not None and tensors[0].device != torch.device(kwargs["device"]):
        return f"{func} goes from {tensors[0].device} to {kwargs['device']}"
    if len({t.device for t in tensors if packet is aten.copy_ or t.dim()}) > 1:
        return f"{func} has tensors on several devices"
    return None


class NoWaiting(TorchDispatchMode):
    """Raises at an op that would wait for a GPU; `seen` counts the ops."""

    seen = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if why := waits(func, args, kwargs or {}):
            raise AssertionError(f"a step must not wait: {why}")
        self.seen += 1
        return func(*args, **(kwargs or {}))


class Tape(NoWaiting):
    """Records the ops of its block on the very tensors that they read and write; afterwards nothing has been written."""

    def __init__(self):
        super().__init__()
        self.calls: list[tuple] = []
        self.before: dict[int, tuple[Tensor, Tensor]] = {}  # storage -> a tensor on it, its bytes

    def __enter__(self):
        self.chance = torch.get_rng_state()
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        named = dict(zip((a.name for a in func._schema.arguments), args)) | kwargs
        silently = "batch_norm" in func.name()  # writes running statistics, and its schema does not say so
        for argument in func._schema.arguments:
            if silently or (argument.alias_info is not None and argument.alias_info.is_write):
                for t in tree_leaves(named.get(argument.name)):
                    if isinstance(t, Tensor):
                        self.before.setdefault(t.untyped_storage().data_ptr(), (t, _bytes(t).clone()))
        out = super().__torch_dispatch__(func, types, args, kwargs)
        self.calls.append((func, args, kwargs, out))
        return out

    def __exit__(self, *error):
        super().__exit__(*error)
        with torch._C._AutoDispatchBelowADInplaceOrView():
            for t, content in self.before.values():
                _bytes(t).copy_(content)
        torch.set_rng_state(self.chance)

    def replay(self) -> None:
        """Do what was recorded again, and none of what the host did beside it: no version is counted."""
        with torch.no_grad(), torch._C._AutoDispatchBelowADInplaceOrView():
            for func, args, kwargs, out in self.calls:
                for mine, made in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs))):
                    if isinstance(mine, Tensor) and _at(mine) != _at(made):
                        mine.copy_(made)


def _bytes(t: Tensor) -> Tensor:
    return torch.empty(0, dtype=torch.uint8).set_(t.untyped_storage())


def _at(t: Tensor) -> int:
    return t.untyped_storage().data_ptr()


class TapeRecorder:
    """As `subnet_pipelines.graph.CudaRecorder`, on tapes; counts what it is asked for in all of them."""

    eager_steps = recordings = replays = 0

    def __init__(self, device: torch.device):
        assert device.type == "cpu"

    def eager(self, work: Callable[[], Any]) -> Any:
        TapeRecorder.eager_steps += 1
        return work()

    def record(self, work: Callable[[], Any]) -> tuple[Any, Any]:
        TapeRecorder.recordings += 1
        tape = Tape()
        with tape:
            made = work()
        return _Counted(tape), made


class _Counted:
    def __init__(self, tape: Tape):
        self.tape = tape

    def replay(self) -> None:
        TapeRecorder.replays += 1
        self.tape.replay()
