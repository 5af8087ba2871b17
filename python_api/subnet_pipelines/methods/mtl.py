"""Multi-task learning: all tasks at once, a head each. What a shared network can have where no task has to wait for another.

An epoch goes once through the rows of all tasks, in one shuffled order: as many steps, and as many looks at each row, as an epoch of
every task in turn.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from subnet_pipelines.benchmarks.base import Batch, Benchmark, Task
from subnet_pipelines.capacity import capacity
from subnet_pipelines.chance import seeded
from subnet_pipelines.errors import NotLearnt, Refusal
from subnet_pipelines.methods.base import Clock, Method, Phase, Prediction
from subnet_pipelines.methods.dense import DenseConfig, make_network, norms_of, training


@dataclass(frozen=True)
class MTLConfig(DenseConfig):
    """Multi-task learning; with the defaults, the recipe of WSN's code on Permuted MNIST, the paper prints 96.70 +- .02 %."""


class MTL(Method):
    """A dense network with a head for each task, trained on batches that mix the tasks."""

    name = "mtl"
    Config = MTLConfig
    static_step = True
    joint = True

    def __init__(self, config: MTLConfig, benchmark: Benchmark, seed: int):
        super().__init__(config, benchmark, seed)
        self.benchmark, self.classes, self.learnt = benchmark, benchmark.classes, False
        self.model = make_network(config, benchmark.classes, benchmark, seed, "init")
        self.norms = norms_of(config, self.model)
        width, self.model.head = self.model.head.in_features, nn.Identity()
        with seeded(seed, "heads"):  # one below another: (tasks * classes, width)
            self.heads = nn.Linear(width, len(benchmark) * benchmark.classes, bias=False).to(self.device)

    def plan(self, task: Task) -> list[Phase]:
        return [training(self.config, task, self.parameters, then=lambda: self.end(task))]

    def end(self, task: Task) -> None:
        self.gather_norms(task, self.model, self.model)
        self.learnt = True

    def logits(self, batch: Batch, clock: Clock) -> Tensor:
        every = self.heads(self.model.features(batch.x)).unflatten(1, (-1, self.classes))
        return every.gather(1, batch.t.view(-1, 1, 1).expand(-1, 1, self.classes)).squeeze(1)

    def predict(self, x: Tensor, task: int | None) -> Prediction:
        if not self.learnt:
            raise NotLearnt("no task has been learnt yet")
        rows = slice(task * self.classes, (task + 1) * self.classes)
        logits = F.linear(self.model.features(x), self.heads.weight[rows])
        return Prediction(logits, torch.full((len(x),), task, device=x.device))

    def report(self) -> dict[str, Any]:
        weights = sum(p.numel() for p in self.model.parameters())
        return {"capacity": capacity(weights, weights, tasks=len(self.benchmark), mask_bytes=0, paper_cap=100.0)}

    def facts(self) -> dict[str, Any]:
        return {"tasks": len(self.benchmark), "learnt": self.learnt}

    def build(self, facts: dict[str, Any]) -> None:
        if facts["tasks"] != len(self.benchmark):
            raise Refusal(f"{facts['tasks']} tasks were learnt at once, which cannot be made {len(self.benchmark)} at resume")
        self.learnt = facts["learnt"]
