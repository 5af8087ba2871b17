"""PackNet (Mallya and Lazebnik, CVPR 2018): tasks share out the weights of one network.

A task trains all weights that no earlier task owns, prunes most of them by magnitude, trains the rest again, and owns it. What it
pruned is free, and 0, for the next task; its network is what it and the tasks before it own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

import subnet_kernels as sk
from subnet_pipelines.benchmarks.base import Benchmark, Task
from subnet_pipelines.bounds import Count, Positive, Share
from subnet_pipelines.capacity import packnet_cap
from subnet_pipelines.chance import seeded
from subnet_pipelines.errors import Refusal
from subnet_pipelines.methods.base import Phase
from subnet_pipelines.methods.dense import CODE_NORM, DenseConfig, make_network, norms_of, training
from subnet_pipelines.methods.masked import MaskedMethod, entry_name


@dataclass(frozen=True)
class PackNetConfig(DenseConfig):
    """PackNet; with the defaults, the recipe of WSN's code on Permuted MNIST, WSN's paper prints 96.37 +- .04 %, not how."""

    norm: Literal["task", "batch"] = "task"
    """What batch norms use at test: statistics that each task gathers over its training rows at its end and keeps for itself, or those of
    the test batch (WSN's code)."""
    keep: Share | None = None
    """Share of the free weights of every layer that a task keeps; null is 1 / tasks (WSN's tables, but for Omniglot's .02)."""
    retrain_epochs: Count | None = None
    """Epochs after pruning; null is half of epochs, rounded up (PackNet's code: 20 and 10), of iterations where those are given."""
    retrain_lr: Positive | None = None
    """Learning rate after pruning; null is a tenth of lr (PackNet's code)."""


class PackNet(MaskedMethod):
    """One network whose weights are owned by tasks; a dense head for each task.

    A weight's score is not learnt: it says whether the weight is open (1) or pruned (-1) in the task that is being trained.
    """

    name = "packnet"
    Config = PackNetConfig
    static_step = True
    FIDELITY = CODE_NORM

    def __init__(self, config: PackNetConfig, benchmark: Benchmark, seed: int):
        super().__init__(config, benchmark, seed)
        self.benchmark = benchmark
        self.share = 1 / len(benchmark) if config.keep is None else config.keep
        with seeded(seed, "init"):  # of the scores, which are then set
            self.adopt(
                make_network(config, benchmark.classes, benchmark, seed, "init"),
                sk.SubnetConfig(select="threshold", train_weights=True, per_task=["head"]),
            )
        self.norms = norms_of(config, self.model)
        for layer in self.bank.layers():
            layer.scores.requires_grad_(False).fill_(1)
        self.free = [layer.weight.numel() for layer in self.bank.layers()]  # weights of each layer that no task owns

    def plan(self, task: Task) -> list[Phase]:
        c, first = self.config, lambda: self.begin(task.index)
        learning = lambda: [p for p in self.model.parameters() if p.requires_grad]  # noqa: E731
        train = training(c, task, learning, first, self.prune)
        retrain = training(c, task, learning, None, lambda: self.commit(task), lr=c.retrain_lr or c.lr / 10)
        retrain.name = "retrain"
        retrain.epochs = c.retrain_epochs or -(-c.epochs // 2)
        retrain.steps = None if c.iterations is None else -(-c.iterations // 2)
        return [train, retrain]

    @torch.no_grad()
    def begin(self, task: int) -> None:
        with seeded(self.seed, "begin", task):
            self.bank.begin()
        for layer in self.bank.layers():
            layer.scores.fill_(1)

    @torch.no_grad()
    def prune(self) -> None:
        """Of the free weights of each layer keep the largest `share`; the others are 0 and closed."""
        self.run_live()
        layers = self.bank.layers()
        mine = [~sk.unpack(bits, layer.weight.shape) for bits, layer in zip(self.bank.owned().values(), layers)]
        sizes = [layer.weight.abs().masked_fill_(~free, -1.0) for free, layer in zip(mine, layers)]
        counts = [free - round((1 - self.share) * free) for free in self.free]
        for layer, free, bits in zip(layers, mine, sk.select(sizes, counts, by="value")):
            pruned = free & ~sk.unpack(bits, layer.weight.shape)
            layer.weight.masked_fill_(pruned, 0.0)
            layer.scores.masked_fill_(pruned, -1.0)
        self.free = [free - count for free, count in zip(self.free, counts)]

    def commit(self, task: Task) -> None:
        self.run_live()
        self.gather_norms(task, self.model, self.model)
        self.bank.commit(entry_name(task.index))  # the live mask: all that is owned, and what this task has kept

    def report(self) -> dict[str, Any]:
        report = super().report()
        report["capacity"]["paper_cap"] = packnet_cap(len(self.bank), self.share) if len(self.bank) else None
        return {**report, "keep": self.share}

    def facts(self) -> dict[str, Any]:
        return {"free": self.free, "share": self.share}

    def build(self, facts: dict[str, Any]) -> None:
        if facts["share"] != self.share:
            raise Refusal(
                f"keep was {facts['share']:g} and is {self.share:g}, as it follows the number of tasks: give --keep to grow a stream"
            )
        self.free = list(facts["free"])
