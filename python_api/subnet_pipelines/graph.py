"""A training step as one CUDA graph: recorded once in a phase and replayed for every full batch, to the bits of eager steps.

The first steps of a phase are eager ones of the run, after which the optimizer's state and all that is made lazily is there. Then one
step is recorded, which executes nothing, on a batch of the graph's own that all later ones are copied into. What a step does on the host
is not in the graph: `Method.ready`, learning rates and layers that were written to by hand are seen to before every replay. Batches of
another size are eager.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from subnet_kernels import optim
from subnet_pipelines.benchmarks.base import Batch
from subnet_pipelines.errors import Refusal
from subnet_pipelines.methods.base import Clock, Method

EAGER = 3  # steps before the recording


class CudaRecorder:
    """Recordings on a device, and eager work on the stream that recordings are made on."""

    def __init__(self, device: torch.device):
        self.stream = torch.cuda.Stream(device)

    def eager(self, work: Callable[[], Any]) -> Any:
        """Do the work now and return what it made."""
        current = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            made = work()
        current.wait_stream(self.stream)
        return made

    def record(self, work: Callable[[], Any]) -> tuple[optim.Replayed, Any]:
        """A graph of the work, and what it will have made after each replay."""
        graph, collecting = torch.cuda.CUDAGraph(), gc.isenabled()
        gc.disable()  # what it would free meanwhile may ask for a call that no recording allows
        try:
            with torch.cuda.graph(graph, stream=self.stream):
                made = work()
        finally:
            if collecting:
                gc.enable()
        return graph, made


RECORDERS: dict[str, Callable[[torch.device], Any]] = {"cuda": CudaRecorder}  # by the type of the device


def refuse_graph(method: Method) -> None:
    """Raise Refusal where the method's steps cannot be recorded."""
    if method.device.type not in RECORDERS:
        raise Refusal(
            f"cuda_graph needs a CUDA device, and this run is on {method.device.type}; leave it out, or use --device cuda"
        )
    if not method.static_step:
        raise Refusal(f"cuda_graph needs a method whose steps do the same work every time, and {method.name} does not say so")


class GraphedSteps:
    """Takes and gives what `Method.step` does, for one phase of a method and its optimizer; rows: of a full batch.

    Raises Refusal where the optimizer's steps cannot be recorded.
    """

    def __init__(self, method: Method, opt: torch.optim.Optimizer, rows: int):
        if not hasattr(opt, "write_rates"):
            for group in opt.param_groups:
                if not (group.get("capturable") and isinstance(group["lr"], Tensor)):
                    raise Refusal(
                        f"cuda_graph needs an optimizer of subnet_kernels.optim, or one of torch.optim with capturable=True and lr a "
                        f"tensor; {method.name} has {type(opt).__name__} without"
                    )
                group["lr"] = group["lr"].to(group["params"][0].device)  # that of a checkpoint lies on the CPU
        self.method, self.opt, self.rows = method, opt, rows
        self.recorder = RECORDERS[method.device.type](method.device)
        self.eager = EAGER  # steps still to be made so
        self.graph: optim.Replayed | None = None
        self.batch: Batch | None = None
        self.made: dict[str, Tensor] = {}

    def __call__(self, batch: Batch, opt: torch.optim.Optimizer, clock: Clock) -> dict[str, Tensor]:
        if len(batch.y) != self.rows:
            return self.method.step(batch, opt, clock)
        if self.eager:
            self.eager -= 1
            return self.recorder.eager(lambda: self.method.step(batch, opt, clock))
        self.method.ready(clock)
        if self.graph is None:
            self.record(batch, clock)
        for mine, given in zip(self.batch, batch):
            if mine is not None:
                mine.copy_(given)
        optim.replay(self.graph, opt)
        return {name: value.clone() for name, value in self.made.items()}

    def record(self, batch: Batch, clock: Clock) -> None:
        """Record a step on a batch like this one."""
        self.batch = Batch(*(None if given is None else given.clone() for given in batch))
        optim.prepare_replay(self.opt)
        self.graph, self.made = self.recorder.record(lambda: self.method.step(self.batch, self.opt, clock))
