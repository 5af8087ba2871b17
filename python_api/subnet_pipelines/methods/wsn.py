"""WSN: winning subnetworks (Kang et al., "Forget-free Continual Learning with Winning Subnetworks", ICML 2022), Algorithm 1.

Weights and scores learn together. A task's mask is the top share of its scores in every layer; weights that an earlier task uses get
no gradient any more, scores always do, and they go on from task to task, which is how later tasks come to reuse earlier weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

import subnet_kernels as sk
from subnet_kernels import optim
from subnet_pipelines.benchmarks.base import Batch, Benchmark, Task
from subnet_pipelines.chance import seeded
from subnet_pipelines.errors import Refusal
from subnet_pipelines.methods.base import Clock, MethodConfig, Phase
from subnet_pipelines.methods.masked import MaskedMethod, entry_name
from subnet_pipelines.models import MODELS
from subnet_pipelines.schedules import Plateau


@dataclass(frozen=True)
class WSNConfig(MethodConfig):
    """WSN; the defaults are the recipe of the authors' code on Permuted MNIST, for which the paper prints 96.14 +- .03 % at c = .1."""

    model: Literal["mlp", "lenet-300-100"] = "mlp"
    """The network: 784-100-100 or 784-300-100, and a dense head for each task."""
    density: float = 0.1
    """c, the kept share of every masked layer; the paper's rows are .03, .05, .1, .3 and .5."""
    ties: Literal["last", "first", "all"] = "last"
    """Scores equal to the threshold: exactly k are kept, or all of them (WSN's code)."""
    scores: Literal["keep", "init"] = "keep"
    """Scores go on from the task before (WSN's code), or are drawn anew."""
    optimizer: Literal["adam", "sgd"] = "adam"
    """Made afresh for each task."""
    lr: float = 1e-3
    """Its learning rate."""
    lr_min: float = 1e-6
    """A task ends where the rate falls below it."""
    patience: int = 6
    """Epochs without a better validation loss before the rate is halved."""
    select: Literal["last", "best"] = "best"
    """Keep the weights of the last epoch, or of the least validation loss."""
    stored_mask: Literal["restored", "last_step"] = "restored"
    """The mask that is validated and kept: of the scores that are kept, or of the last training step (WSN's code)."""

    def check(self) -> None:
        super().check()
        if not 0 < self.density <= 1:
            raise Refusal(f"density must be in (0, 1], got {self.density}")
        if self.lr <= 0:
            raise Refusal(f"lr must be positive, got {self.lr}")
        if self.patience < 1:
            raise Refusal(f"patience must be at least 1, got {self.patience}")


class WSN(MaskedMethod):
    """A subnetwork for each task in one network whose used weights are frozen; a dense head for each task."""

    name = "wsn"
    Config = WSNConfig
    static_step = True
    FIDELITY = {"sound": {}, "code": {"ties": "all", "stored_mask": "last_step"}, "paper": {}}

    def __init__(self, config: WSNConfig, benchmark: Benchmark, seed: int):
        super().__init__(config, benchmark, seed)
        self.validated = benchmark.config.val_fraction > 0
        with seeded(seed, "init"):
            network = MODELS[config.model](benchmark.classes, *benchmark.input_shape)
            self.adopt(
                network,
                sk.SubnetConfig(density=config.density, k_rule="kth", ties=config.ties, train_weights=True, per_task=["head"]),
            )
        self.last_bits: dict[str, Tensor] = {}  # masks of the last training step, where they are what is kept

    def plan(self, task: Task) -> list[Phase]:
        c = self.config
        return [
            Phase(
                "train",
                epochs=c.epochs,
                steps=c.iterations,
                batch_size=c.batch_size,
                optimizer=self.optimizer,
                schedule=Plateau(c.patience, 2.0, c.lr_min) if self.validated else None,
                select=c.select if self.validated else "last",
                first=lambda: self.begin(task.index),
                then=lambda: self.commit(task.index),
            )
        ]

    def begin(self, task: int) -> None:
        with seeded(self.seed, "begin", task):
            self.bank.begin(scores="keep" if task == 0 else self.config.scores)

    def optimizer(self) -> torch.optim.Optimizer:
        kind = optim.Adam if self.config.optimizer == "adam" else optim.SGD
        return kind(self.model.parameters(), self.config.lr, fuse_ste=True)

    def gradients(self, clock: Clock) -> None:
        if self.config.stored_mask == "last_step":
            live = {
                name: layer.bits for name, layer in zip(self.bank.layer_names, self.bank.layers())
            }  # current: forward used them
            self.last_bits = self.last_bits or {name: torch.empty_like(bits) for name, bits in live.items()}
            for name, bits in live.items():
                self.last_bits[name].copy_(bits)  # into the same tensors for a whole task, as a replayed step must

    def validate(self, batch: Batch, clock: Clock) -> Tensor:
        if not self.last_bits:
            return self.loss(batch, clock)
        self.bank.activate(None, bits=self.last_bits)
        return torch.nn.functional.cross_entropy(self.model(batch.x), batch.y)

    def commit(self, task: int) -> None:
        self.run_live()
        self.bank.commit(entry_name(task), bits=self.last_bits or None)
        self.last_bits = {}

    def state(self) -> dict[str, Any]:
        return {**super().state(), "last_bits": self.last_bits}

    def load(self, state: dict[str, Any]) -> None:
        super().load(state)
        self.last_bits = {name: bits.to(self.device, copy=True) for name, bits in state["last_bits"].items()}
