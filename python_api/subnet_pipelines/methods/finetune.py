"""Finetuning: one dense network trained on task after task. The plain thing, and the floor of every table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn as nn
from torch import Tensor
from torch.func import functional_call

from subnet_pipelines.benchmarks.base import Batch, Benchmark, Task
from subnet_pipelines.capacity import capacity
from subnet_pipelines.chance import seeded
from subnet_pipelines.errors import NotLearnt, Refusal
from subnet_pipelines.methods.base import Clock, Method, Phase, Prediction
from subnet_pipelines.methods.dense import CODE_NORM, DenseConfig, make_network, norms_of, training


@dataclass(frozen=True)
class FinetuneConfig(DenseConfig):
    """Finetuning; with the defaults, the recipe of WSN's code on Permuted MNIST, the paper prints 78.22 +- .84 %."""

    norm: Literal["task", "gathered", "batch"] = "task"
    """What batch norms use at test: statistics that each task gathers over its training rows at its end and keeps for itself, those that
    the last task gathered, or those of the test batch (WSN's code)."""
    head: Literal["per-task", "shared"] = "per-task"
    """A head of its own for each task, or one for all."""


class Finetune(Method):
    """A dense network trained on; a head for each task, made when its task begins, or one shared head."""

    name = "finetune"
    Config = FinetuneConfig
    static_step = True
    FIDELITY = CODE_NORM
    scenarios = ("GG", "GNs")

    def __init__(self, config: FinetuneConfig, benchmark: Benchmark, seed: int):
        super().__init__(config, benchmark, seed)
        if not benchmark.scenario.test_id and config.head != "shared":
            raise Refusal(f"head must be 'shared' in scenario {benchmark.config.scenario}, where no task id is given at test")
        self.benchmark = benchmark
        self.model = make_network(config, benchmark.classes, benchmark, seed, "init")
        self.width, self.model.head = self.model.head.in_features, nn.Identity()
        self.heads = nn.ModuleList()
        self.norms = norms_of(config, self.model)
        if self.norms and config.norm == "task" and not benchmark.scenario.test_id:
            raise Refusal(f"norm must not be 'task' in scenario {benchmark.config.scenario}, where no task id is given at test")
        self.statistics: list[dict[str, Tensor]] = []  # of the norms, by task, where each keeps its own

    def plan(self, task: Task) -> list[Phase]:
        learning = lambda: [*self.model.parameters(), *self.head(task.index).parameters()]  # noqa: E731
        return [training(self.config, task, learning, self.add_head, lambda: self.end(task))]

    def end(self, task: Task) -> None:
        """Called once after a task's last step."""
        self.gather_norms(task, self.model, self.model)
        if self.norms and self.config.norm == "task":
            self.statistics.append({name: buffer.clone() for name, buffer in self.model.named_buffers()})

    def add_head(self) -> None:
        """The next task's head, initialised from a stream of its own; the shared one is made once."""
        if self.heads and self.config.head == "shared":
            return
        with seeded(self.seed, "head", len(self.heads)):
            fresh = nn.Linear(self.width, self.benchmark.classes, bias=False).to(self.device)
        self.heads.append(fresh)

    def head(self, task: int | None) -> nn.Module:
        if self.config.head == "shared":
            task = 0
        if task >= len(self.heads):
            raise NotLearnt(f"task {task} has no head yet")
        return self.heads[task]

    def logits(self, batch: Batch, clock: Clock) -> Tensor:
        return self.head(clock.task)(self.model.features(batch.x))

    def predict(self, x: Tensor, task: int | None) -> Prediction:
        head = self.head(task)
        own = task is not None and task < len(self.statistics)
        features = functional_call(self.model, self.statistics[task], (x,)) if own else self.model.features(x)
        return Prediction(head(features), None if task is None else torch.full((len(x),), task, device=x.device))

    def report(self) -> dict:
        weights = sum(p.numel() for p in self.model.parameters())
        return {"capacity": capacity(weights, weights, tasks=len(self.heads), mask_bytes=0, paper_cap=100.0)}

    def state(self) -> dict:
        return {**super().state(), "statistics": self.statistics}

    def load(self, state: dict) -> None:
        super().load(state)
        self.statistics = [{name: t.to(self.device, copy=True) for name, t in kept.items()} for kept in state["statistics"]]

    def facts(self) -> dict:
        return {"heads": len(self.heads)}

    def build(self, facts: dict) -> None:
        while len(self.heads) < facts["heads"]:
            self.add_head()
