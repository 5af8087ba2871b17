"""EWC: elastic weight consolidation (Kirkpatrick et al., PNAS 2017), with one merged Fisher information as in HAT's code.

A quadratic penalty holds every shared weight where the last task left it, the harder the more the loss of the tasks so far depends on it:
loss + lambda / 2 * sum F (theta - theta*)^2, F the diagonal of the Fisher information with the true labels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.utils import clip_grad_norm_, parameters_to_vector

from subnet_pipelines.benchmarks.base import Batch, Benchmark, Task
from subnet_pipelines.bounds import Count, NotNegative, Positive
from subnet_pipelines.chance import stream
from subnet_pipelines.errors import Refusal
from subnet_pipelines.methods.base import Clock
from subnet_pipelines.methods.finetune import Finetune, FinetuneConfig
from subnet_pipelines.models import batch_norms

CHUNK = 1 << 25  # numbers of gradients of single rows that are there at once


@dataclass(frozen=True)
class EWCConfig(FinetuneConfig):
    """EWC; lambda, the merge and the Fisher of batches are HAT's code's. WSN's paper prints 92.01 +- .56 % on Permuted MNIST, not how."""

    strength: NotNegative = 5000.0
    """lambda, the weight of the penalty."""
    fisher: Literal["batch", "row"] = "batch"
    """Squared gradients of the mean loss of batches, times their rows (HAT's code, whose lambda goes with it), or of single rows."""
    fisher_batch: Count = 20
    """Rows of a batch under fisher batch."""
    clip_norm: Positive | None = None
    """Largest norm of a step's gradient; HAT's code, which trains by SGD of .05, has 100."""


class EWC(Finetune):
    """Finetuning under a penalty on what the earlier tasks need; heads of single tasks are free."""

    name = "ewc"
    Config = EWCConfig

    def __init__(self, config: EWCConfig, benchmark: Benchmark, seed: int):
        super().__init__(config, benchmark, seed)
        if config.norm == "batch" and config.fisher == "row" and batch_norms(self.model):
            raise Refusal(
                f"fisher must be 'batch' for {config.model} with norm 'batch', which mixes the rows of a batch; got 'row'"
            )
        shared = sum(p.numel() for p in self.model.parameters())
        if config.head == "shared":
            shared += self.width * benchmark.classes
        self.register_buffer("fisher", torch.zeros(shared, device=self.device))  # of the tasks so far, 0 before the first
        self.register_buffer("anchor", torch.zeros(shared, device=self.device))  # theta*

    def shared(self) -> list[nn.Parameter]:
        """What tasks share, and so what is held."""
        return [*self.model.parameters(), *(self.heads[0].parameters() if self.config.head == "shared" else ())]

    def penalty(self) -> Tensor:
        """lambda / 2 * sum F (theta - theta*)^2, 0-dim."""
        moved = parameters_to_vector(self.shared()) - self.anchor
        return self.config.strength / 2 * (self.fisher * moved.square()).sum()

    def loss(self, batch: Batch, clock: Clock) -> Tensor:
        return super().loss(batch, clock) + self.penalty()

    def gradients(self, clock: Clock) -> None:
        if self.config.clip_norm is not None:
            clip_grad_norm_([*self.model.parameters(), *self.head(clock.task).parameters()], self.config.clip_norm)

    def end(self, task: Task) -> None:
        super().end(task)
        self.consolidate(task)

    # ---- at a task's end ------------------------------------------------------------------------------------------------

    def consolidate(self, task: Task) -> None:
        """Take the task into the mean Fisher of the tasks so far, F <- (F_new + t F) / (t + 1), and hold the weights where they are."""
        self.eval()
        x, y = task.train.tensors()
        order = torch.randperm(len(y), generator=stream(self.seed, "fisher", task.index)).to(y.device)
        x, y = x[order], y[order]  # files may hold class after class, and the gradient of a batch of one class is another one
        total = torch.zeros_like(self.fisher)
        for squares in self.squares_of_rows(x, y, task.index) if self.config.fisher == "row" else self.squares(x, y, task.index):
            total += squares
        self.fisher.mul_(task.index).add_(total / len(y)).div_(task.index + 1)
        self.anchor.copy_(parameters_to_vector(self.shared()).detach())

    def squares(self, x: Tensor, y: Tensor, task: int) -> Iterator[Tensor]:
        """Of each batch the squared gradient of its mean loss, times its rows."""
        for rows, labels in zip(x.split(self.config.fisher_batch), y.split(self.config.fisher_batch)):
            loss = F.cross_entropy(self.head(task)(self.model.features(rows)), labels)
            yield parameters_to_vector(torch.autograd.grad(loss, self.shared())).square() * len(labels)

    def squares_of_rows(self, x: Tensor, y: Tensor, task: int) -> Iterator[Tensor]:
        """Of each chunk the sum of its rows' squared gradients."""
        names = [name for name, _ in self.model.named_parameters()]
        own = self.head(task).weight.detach()

        def loss(shared: list[Tensor], row: Tensor, label: Tensor) -> Tensor:
            features = functional_call(self.model, dict(zip(names, shared)), (row[None],))
            return F.cross_entropy(F.linear(features, shared[-1] if len(shared) > len(names) else own), label[None])

        gradients = vmap(grad(loss), (None, 0, 0))
        size = max(1, CHUNK // len(self.fisher))
        shared = [p.detach() for p in self.shared()]
        for rows, labels in zip(x.split(size), y.split(size)):
            yield torch.cat([g.square().sum(0).flatten() for g in gradients(shared, rows, labels)])
