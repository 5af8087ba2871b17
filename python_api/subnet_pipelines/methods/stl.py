"""Single-task learning: a network of its own for every task. What a task can have where nothing is shared and nothing can be forgotten."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor
from torch.func import functional_call

from subnet_kernels.files import write_atomic
from subnet_pipelines.benchmarks.base import Batch, Benchmark, Task
from subnet_pipelines.capacity import capacity
from subnet_pipelines.errors import NotLearnt, Refusal
from subnet_pipelines.methods.base import Clock, Method, Phase, Prediction
from subnet_pipelines.methods.dense import CODE_NORM, ScheduledConfig, make_network, norms_of, training


@dataclass(frozen=True)
class STLConfig(ScheduledConfig):
    """Single-task learning; with the defaults, the recipe of WSN's code on Permuted MNIST, the paper prints 97.37 +- .01 %."""

    start: Literal["fresh", "previous"] = "fresh"
    """Where a task's network starts: at random weights of its own, or where the task before ended (SupSup's code for its upper bound)."""


class STL(Method):
    """A dense network for each task, made afresh from a stream of its own or a copy of the task before's; those that have learnt lie in
    out/nets, a file each."""

    name = "stl"
    Config = STLConfig
    static_step = True
    FIDELITY = CODE_NORM
    forget_free = True

    def __init__(self, config: STLConfig, benchmark: Benchmark, seed: int):
        super().__init__(config, benchmark, seed)
        self.benchmark = benchmark
        self.model = make_network(config, benchmark.classes, benchmark, seed, "init", 0)
        self.norms = norms_of(config, self.model)
        self.learnt: list[dict[str, Tensor]] = []  # by task; not part of the module, so that model selection copies one network

    def plan(self, task: Task) -> list[Phase]:
        begin = lambda: self.begin(task.index)  # noqa: E731
        return [training(self.config, task, self.model.parameters, begin, lambda: self.keep(task))]

    def begin(self, task: int) -> None:
        if task and self.config.start == "previous":
            return
        fresh = make_network(self.config, self.benchmark.classes, self.benchmark, self.seed, "init", task)
        self.model.load_state_dict(fresh.state_dict())

    def keep(self, task: Task) -> None:
        self.gather_norms(task, self.model, self.model)
        self.learnt.append({name: tensor.clone() for name, tensor in self.model.state_dict().items()})

    def logits(self, batch: Batch, clock: Clock) -> Tensor:
        return self.model(batch.x)

    def predict(self, x: Tensor, task: int | None) -> Prediction:
        if task >= len(self.learnt):
            raise NotLearnt(f"task {task} has no network yet")
        logits = functional_call(self.model, self.learnt[task], (x,), strict=True)
        return Prediction(logits, torch.full((len(x),), task, device=x.device))

    def report(self) -> dict[str, Any]:
        weights, tasks = sum(p.numel() for p in self.model.parameters()), len(self.learnt)
        cost = capacity(weights, weights, tasks=tasks, mask_bytes=0, paper_cap=100.0 * tasks)
        return {"capacity": {**cost, "measured_cap": 100.0 * tasks}}

    # ---- the networks that have learnt: each is written once, and a checkpoint says how many there are ----------------

    def file(self, task: int) -> Path:
        return self.out / "nets" / f"task-{task}.safetensors"

    def state(self) -> dict[str, Any]:
        if self.out is None:
            raise RuntimeError("a method with a network for each task needs its run's folder, `out`, to save them in")
        for task, tensors in enumerate(self.learnt):
            if not self.file(task).exists():
                self.file(task).parent.mkdir(parents=True, exist_ok=True)
                write_atomic(self.file(task), save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}))
        return super().state()

    def facts(self) -> dict[str, Any]:
        return {"learnt": len(self.learnt)}

    def build(self, facts: dict[str, Any]) -> None:
        expected = {name: (tensor.shape, tensor.dtype) for name, tensor in self.model.state_dict().items()}
        for task in range(facts["learnt"]):
            try:
                found = load(self.file(task).read_bytes())
            except (OSError, SafetensorError) as error:
                raise Refusal(f"{self.file(task)}: holds no network of task {task} ({error})") from None
            if {name: (tensor.shape, tensor.dtype) for name, tensor in found.items()} != expected:
                raise Refusal(f"{self.file(task)}: its tensors should be those of {self.config.model}, they are others")
            self.learnt.append({name: tensor.to(self.device) for name, tensor in found.items()})
