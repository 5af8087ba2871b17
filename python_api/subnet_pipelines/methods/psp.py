"""PSP: parameter superposition by rotations (Cheung et al., NeurIPS 2019), as SupSup's code has it for a baseline.

Every task turns the input of every layer by an orthogonal matrix of its own, y = W (C x), and trains the one W on: tasks that look into W
from random directions disturb each other little. A context is a random orthogonal matrix; it is never stored, but drawn again from
(seed, task, layer) whenever its task comes: 250 tasks of 784-1024-1024 would hold 2.7 GB of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from subnet_pipelines.benchmarks.base import Batch, Benchmark, Task
from subnet_pipelines.bounds import NotNegative
from subnet_pipelines.chance import seeded, stream
from subnet_pipelines.errors import Refusal
from subnet_pipelines.methods.base import Clock, Phase, Prediction
from subnet_pipelines.methods.dense import Network, WeightInit, initialise, training, wrap_layers
from subnet_pipelines.methods.finetune import Finetune, FinetuneConfig


def haar_orthogonal(d: int, generator: torch.Generator) -> Tensor:
    """A uniformly (Haar) distributed orthogonal matrix, float32 (d, d), on the CPU.

    Q of a normal matrix with the signs that make R's diagonal positive, without which Q is not uniform (Mezzadri, Notices of the AMS 54,
    2007). In float64, so that what libraries round differently is gone from the result.
    """
    q, r = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64))
    return (q * r.diagonal().sign()).to(torch.float32)


class Rotated(nn.Module):
    """A linear layer or convolution behind a rotation of its input, y = layer(C x): of a picture, of the channels at every place.

    context: C, (in, in); no buffer, as it is drawn again and not stored.
    """

    def __init__(self, layer: nn.Linear | nn.Conv2d):
        super().__init__()
        self.layer = layer
        self.context = torch.eye(layer.weight.shape[1], device=layer.weight.device)

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.layer, nn.Linear):
            return self.layer(F.linear(x, self.context))
        return self.layer(F.conv2d(x, self.context[:, :, None, None]))


@dataclass(frozen=True)
class PSPConfig(FinetuneConfig):
    """PSP; the defaults are the recipe of SupSup's code on Permuted MNIST."""

    epochs: int = 3
    """Epochs of a task, where iterations is null."""
    iterations: int | None = 1000
    """Steps of a task."""
    batch_size: int = 128
    """Rows of a training batch."""
    model: Network = "lenet-300-100"
    """The network; the inputs of all its layers are rotated, the head's too."""
    head: Literal["shared"] = "shared"
    """One head for all tasks, of which each sees another side."""
    weight_init: WeightInit = "xavier_normal"
    """How the weights are drawn; default is PyTorch's."""
    optimizer: Literal["rmsprop", "adam", "sgd"] = "rmsprop"
    """Of the weights; made afresh for each task."""
    lr: float = 1e-4
    """Its learning rate."""
    momentum: NotNegative = 0.0
    """Its momentum (the authors' scripts say .5, which never reaches RMSprop)."""

    def check(self) -> None:
        super().check()
        if self.momentum and self.optimizer == "adam":
            raise Refusal(f"momentum must be 0 for optimizer adam, which has its own, got {self.momentum}")


class PSP(Finetune):
    """Finetuning behind rotations."""

    name = "psp"
    Config = PSPConfig
    FIDELITY = {"sound": {}, "code": {}, "paper": {}}
    scenarios = ("GG",)

    def __init__(self, config: PSPConfig, benchmark: Benchmark, seed: int):
        super().__init__(config, benchmark, seed)
        with seeded(seed, "weights"):
            initialise(self.model, config.weight_init)
        wrap_layers(self.model, Rotated)
        self.turned: int | None = None  # whose contexts the layers hold

    def add_head(self) -> None:
        if not self.heads:
            super().add_head()
            with seeded(self.seed, "head weights"):
                initialise(self.heads, self.config.weight_init)
            wrap_layers(self.heads, Rotated)

    def rotated(self) -> list[Rotated]:
        """The layers, the head last."""
        return [m for net in (self.model, self.heads) for m in net.modules() if isinstance(m, Rotated)]

    def turn(self, task: int) -> None:
        """Give the layers a task's contexts."""
        if task != self.turned:
            for number, layer in enumerate(self.rotated()):
                context = haar_orthogonal(len(layer.context), stream(self.seed, "context", task, number))
                layer.context.copy_(context.to(self.device))
            self.turned = task

    def plan(self, task: Task) -> list[Phase]:
        momentum = {"momentum": self.config.momentum} if self.config.momentum else {}
        learning = lambda: [*self.model.parameters(), *self.heads.parameters()]  # noqa: E731
        return [training(self.config, task, learning, lambda: self.begin(task), lambda: self.end(task), **momentum)]

    def begin(self, task: Task) -> None:
        self.add_head()
        self.turn(task.index)

    def end(self, task: Task) -> None:
        self.turn(task.index)  # a run that was resumed at a task's last step has made none
        super().end(task)

    def ready(self, clock: Clock) -> None:
        self.turn(clock.task)

    def logits(self, batch: Batch, clock: Clock) -> Tensor:
        self.ready(clock)
        return super().logits(batch, clock)

    def predict(self, x: Tensor, task: int) -> Prediction:
        self.head(task)
        self.turn(task)
        return super().predict(x, task)

    def report(self) -> dict[str, Any]:
        sizes = [len(layer.context) for layer in self.rotated()]
        return {**super().report(), "context_bytes_per_task": {"stored": 0, "drawn again": sum(4 * d * d for d in sizes)}}
