"""Finetuning: one dense network trained on task after task. The plain thing, and the floor of every table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn as nn
from torch import Tensor

from subnet_kernels import optim
from subnet_pipelines.benchmarks.base import Batch, Benchmark, Task
from subnet_pipelines.capacity import capacity
from subnet_pipelines.chance import seeded
from subnet_pipelines.errors import NotLearnt, Refusal
from subnet_pipelines.methods.base import Clock, Method, MethodConfig, Phase, Prediction
from subnet_pipelines.models import MODELS
from subnet_pipelines.schedules import Plateau


@dataclass(frozen=True)
class FinetuneConfig(MethodConfig):
    """Finetuning; the defaults are the recipe of WSN's code on Permuted MNIST, for which the paper prints 78.22 +- .84 %."""

    model: Literal["mlp", "lenet-300-100", "fc-1024"] = "mlp"
    """The network: 784-100-100, 784-300-100 or 784-1024-1024, and a head."""
    head: Literal["per-task", "shared"] = "per-task"
    """A head of its own for each task, or one for all."""
    lr: float = 1e-3
    """Adam's learning rate."""
    lr_min: float = 1e-6
    """A task ends where the rate falls below it."""
    patience: int = 6
    """Epochs without a better validation loss before the rate is halved."""
    select: Literal["last", "best"] = "best"
    """Keep the weights of the last epoch, or of the least validation loss."""

    def check(self) -> None:
        super().check()
        if self.lr <= 0:
            raise Refusal(f"lr must be positive, got {self.lr}")
        if self.patience < 1:
            raise Refusal(f"patience must be at least 1, got {self.patience}")


class Finetune(Method):
    """A dense network trained on; a head for each task, made when its task begins, or one shared head."""

    name = "finetune"
    Config = FinetuneConfig
    static_step = True
    scenarios = ("GG", "GNs")

    def __init__(self, config: FinetuneConfig, benchmark: Benchmark, seed: int):
        super().__init__(config, benchmark, seed)
        if not benchmark.scenario.test_id and config.head != "shared":
            raise Refusal(f"head must be 'shared' in scenario {benchmark.config.scenario}, where no task id is given at test")
        self.classes, self.validated = benchmark.classes, benchmark.config.val_fraction > 0
        with seeded(seed, "init"):
            self.model = MODELS[config.model](benchmark.classes, *benchmark.input_shape).to(self.device)
        self.width, self.model.head = self.model.head.in_features, nn.Identity()
        self.heads = nn.ModuleList()

    def plan(self, task: Task) -> list[Phase]:
        c = self.config
        return [
            Phase(
                "train",
                epochs=c.epochs,
                steps=c.iterations,
                batch_size=c.batch_size,
                optimizer=lambda: optim.Adam([*self.model.body.parameters(), *self.head(task.index).parameters()], c.lr),
                schedule=Plateau(c.patience, 2.0, c.lr_min) if self.validated else None,
                select=c.select if self.validated else "last",
                first=self.add_head,
            )
        ]

    def add_head(self) -> None:
        """The next task's head, initialised from a stream of its own; the shared one is made once."""
        if self.heads and self.config.head == "shared":
            return
        with seeded(self.seed, "head", len(self.heads)):
            fresh = nn.Linear(self.width, self.classes, bias=False).to(self.device)
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
        logits = self.head(task)(self.model.features(x))
        return Prediction(logits, None if task is None else torch.full((len(x),), task, device=x.device))

    def report(self) -> dict:
        weights = sum(p.numel() for p in self.model.body.parameters())
        return {"capacity": capacity(weights, weights, tasks=len(self.heads), mask_bytes=0, paper_cap=100.0)}

    def facts(self) -> dict:
        return {"heads": len(self.heads)}

    def build(self, facts: dict) -> None:
        while len(self.heads) < facts["heads"]:
            self.add_head()
