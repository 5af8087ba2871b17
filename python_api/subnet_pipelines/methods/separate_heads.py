"""Separate heads: SupSup's baseline of a trunk that stays as it is, and a head and norm statistics of its own for each task.

The trunk learns with the first task, or never (Wortsman et al., NeurIPS 2020, figure 3; RAIVNLab/supsup, experiments/GG/splitcifar100).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from subnet_pipelines.benchmarks.base import Task
from subnet_pipelines.bounds import Positive
from subnet_pipelines.capacity import with_own_numbers
from subnet_pipelines.methods.base import Phase
from subnet_pipelines.methods.dense import Network, ScheduledConfig, training
from subnet_pipelines.methods.finetune import Finetune, FinetuneConfig


@dataclass(frozen=True)
class SeparateHeadsConfig(ScheduledConfig, FinetuneConfig):
    """Separate heads; rates are those of SupSup's code on Split CIFAR-100, steps and network those of its recipe on Permuted MNIST."""

    epochs: int = 3
    """Epochs of a task, where iterations is null."""
    iterations: int | None = 1000
    """Steps of a task."""
    batch_size: int = 128
    """Rows of a training batch."""
    model: Network = "lenet-300-100"
    """The network, and its head."""
    norm: Literal["task", "batch"] = "task"
    """What batch norms use at test: statistics that each task gathers over its training rows at its end and keeps for itself (in the
    authors' code averages over the last steps of training), or those of the test batch."""
    head: Literal["per-task"] = "per-task"
    """Every task has a head of its own."""
    trunk: Literal["trained", "random"] = "trained"
    """What is below the heads learns with the first task, or stays at its random values."""
    lr: float = 1e-2
    """Rate of a head over the trunk as it is."""
    trunk_lr: Positive = 1e-3
    """Rate of trunk and head in the first task, where the trunk learns."""


class SeparateHeads(Finetune):
    """Finetuning that leaves the trunk alone after the first task."""

    name = "separate-heads"
    Config = SeparateHeadsConfig
    FIDELITY = {"sound": {}, "code": {}, "paper": {}}
    forget_free = True
    scenarios = ("GG",)

    def plan(self, task: Task) -> list[Phase]:
        c, own = self.config, lambda: self.learning(task.index)
        lr = c.trunk_lr if self.trunk_learns(task.index) else c.lr
        return [training(c, task, own, self.add_head, lambda: self.end(task), lr=lr)]

    def trunk_learns(self, task: int) -> bool:
        return task == 0 and self.config.trunk == "trained"

    def learning(self, task: int) -> list[nn.Parameter]:
        """What a task's optimizer gets; the trunk has gradients only where it is among that."""
        trunk = list(self.model.parameters()) if self.trunk_learns(task) else []
        self.model.requires_grad_(bool(trunk))
        return [*trunk, *self.head(task).parameters()]

    def report(self) -> dict[str, Any]:
        statistics = sum(b.numel() for b in self.model.buffers() if b.is_floating_point()) if self.config.norm == "task" else 0
        weights, own = sum(p.numel() for p in self.model.parameters()), self.width * self.benchmark.classes + statistics
        cost = with_own_numbers(weights, own, tasks=len(self.heads), seed_only=self.config.trunk == "random")
        return {"capacity": cost, "parameters_per_task": own}
