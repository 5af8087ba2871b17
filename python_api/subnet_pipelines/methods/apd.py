"""APD: additive parameter decomposition (Yoon et al., "Scalable and order-robust continual learning with APD", ICLR 2020).

The kernel of a task is what all tasks share, times the sigmoid of a mask of the task's own, and a sparse adaptive part of its own:
theta_t = sigma sigmoid(m_t) + tau_t. Training adds lambda1 |tau|_1, so that little is the task's own, and lambda2 times the square of what
moves of the earlier tasks' kernels as sigma does; to hold these, their adaptive parts are trained along.

LASEM's program (Lifelong-ML/LASEM c4ec052) has its own version, which its tables are of: `hold`, `penalties`, `mask`, `adaptive`, `biases`
and `prune` say where it differs from the authors' program (jaehong31/APD 6b6b67d). Left out are the authors' consolidation, which moves
what groups of adaptive parts have in common into parts of the groups' own (k-means, every five tasks), and their weight decay.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn as nn
from torch import Tensor

from subnet_pipelines.benchmarks.base import Batch, Benchmark, Task
from subnet_pipelines.bounds import NotNegative
from subnet_pipelines.chance import seeded
from subnet_pipelines.methods.base import Clock, Phase
from subnet_pipelines.methods.lifelong import Lifelong, LifelongConfig, named_tensors, named_under, parameters
from subnet_pipelines.methods.selective import Kernel, features


@dataclass(frozen=True)
class APDConfig(LifelongConfig):
    """APD in LASEM's comparison, which prints 59.58 % on Office-Home."""

    lambda1: NotNegative = 4e-4
    """Weight of the absolute values of adaptive parts; both programs have 4e-4."""
    lambda2: NotNegative = 100.0
    """Weight of the squares of what must not move; both programs have 100."""
    hold: Literal["tasks", "shared"] = "tasks"
    """What must not move: the kernels of earlier tasks, whose adaptive parts learn along (the paper), or what is shared (LASEM's code)."""
    penalties: Literal["sum", "mean"] = "sum"
    """Both penalties are sums over all numbers (the paper), or means over layers of means, and half of it for squares (LASEM's code)."""
    mask: Literal["unit", "weight"] = "unit"
    """A mask has a number for each output channel (the paper), or for each weight (LASEM's code)."""
    adaptive: Literal["shared", "drawn"] = "shared"
    """An adaptive part starts where what is shared is (the authors' code), or is drawn as any kernel (LASEM's code)."""
    biases: Literal["task", "shared"] = "task"
    """Biases are the task's own (the authors' code), or are shared (LASEM's code)."""
    prune: bool = True
    """Outside of training, entries of an adaptive part that are no greater than lambda1 count as zero (the authors' code), or do not
    (LASEM's code)."""


class APD(Lifelong):
    """What is shared; mask, adaptive part, biases and head of the task in training; under hold tasks the earlier tasks' adaptive parts."""

    name = "apd"
    Config = APDConfig
    BESIDE = (*Lifelong.BESIDE, "held")
    FIDELITY = {
        "sound": {},
        "code": {
            "squares": "one",
            "hold": "shared",
            "penalties": "mean",
            "mask": "weight",
            "adaptive": "drawn",
            "biases": "shared",
            "prune": False,
        },
        "paper": {},
    }

    def __init__(self, config: APDConfig, benchmark: Benchmark, seed: int):
        super().__init__(config, benchmark, seed)
        with seeded(seed, "shared"):
            fresh = [self.start.plain(layer, inp) for layer, inp in zip(self.net.layers, self.inputs)]
        for layer in fresh if config.biases == "task" else ():
            del layer["bias"]
        self.shared = parameters(fresh, self.device)
        self.held: list[
            list[Tensor]
        ] = []  # what must not move, as it was when the task began: a list of kernels a task, or of all shared
        self.make(0)

    # ---- tensors ----------------------------------------------------------------------------------------------------

    def make(self, task: int) -> None:
        """Fresh tensors for a task, and room for the adaptive parts that are trained along."""
        self.index, c, fresh = task, self.config, []
        with seeded(self.seed, "own", task):
            for layer, inp in zip(self.net.layers, self.inputs):
                window = (layer.kernel, layer.kernel) if c.mask == "weight" else (1, 1)
                drawn = self.start.plain(layer, inp)
                own = {"mask": self.start.linear(inp if c.mask == "weight" else 1, layer.channels, *window)["weight"]}
                fresh.append(own | {"adaptive": drawn["weight"]} | ({"bias": drawn["bias"]} if c.biases == "task" else {}))
        self.own, self.head = parameters(fresh, self.device), parameters(self.fresh_head(task), self.device)
        room = [{"adaptive": torch.zeros_like(layer["adaptive"])} for layer in fresh]
        self.earlier = nn.ModuleList(parameters(room, self.device) for _ in range(task if c.hold == "tasks" else 0))

    @torch.no_grad()
    def begin(self, task: int) -> None:
        self.make(task)
        for i, layer in enumerate(self.own if self.config.adaptive == "shared" else ()):
            layer["adaptive"].copy_(self.shared[i]["weight"])
        for kept, layers in zip(self.learnt, self.earlier):
            for i, layer in enumerate(layers):
                layer["adaptive"].copy_(kept[f"{i}.adaptive"])
        self.held = [[tensor.clone() for tensor in group] for group in self.holdable()]

    def weight(self, i: int, own: Any, adaptive: Tensor | None = None) -> Tensor:
        """Layer i's weight (O, I, k, k) of a task's mask and adaptive part, default its own."""
        return self.shared[i]["weight"] * own["mask"].sigmoid() + (own["adaptive"] if adaptive is None else adaptive)

    def kernels(self, own: Sequence, prune: bool) -> list[Kernel]:
        """The kernels of a task with these tensors, a dict a layer; prune: without the small entries of its adaptive part."""
        found = []
        for i, tensors in enumerate(own):
            adaptive = self.pruned(tensors["adaptive"]) if prune else tensors["adaptive"]
            bias = (tensors if self.config.biases == "task" else self.shared[i])["bias"]
            found.append((self.weight(i, tensors, adaptive), bias))
        return found

    def pruned(self, adaptive: Tensor) -> Tensor:
        """An adaptive part as it counts outside of training."""
        return adaptive.masked_fill(adaptive.abs() <= self.config.lambda1, 0.0) if self.config.prune else adaptive

    def holdable(self) -> list[list[Tensor]]:
        """What must not move, as it stands: the kernels of each earlier task, or all that is shared; nothing in the first task."""
        if self.config.hold == "shared":
            return [[p for layer in self.shared for p in layer.values()]] if self.index else []
        masks = [[named_under(kept, f"{i}.") for i in range(len(self.net.layers))] for kept in self.learnt[: self.index]]
        return [
            [self.weight(i, own[i], layer["adaptive"]) for i, layer in enumerate(layers)]
            for own, layers in zip(masks, self.earlier)
        ]

    # ---- training ---------------------------------------------------------------------------------------------------

    def plan(self, task: Task) -> list[Phase]:
        return [self.phase("train", task, lambda: list(self.parameters()), lambda: self.begin(task.index), self.end)]

    def body(self, x: Tensor) -> Tensor:
        return features(self.net, self.kernels(self.own, prune=not self.training), x)

    def penalty(self) -> Tensor:
        """What the loss adds, 0-dim."""
        sparse = [layer["adaptive"].abs() for layers in (self.own, *self.earlier) for layer in layers]
        moved = [(now - then).square() for group, was in zip(self.holdable(), self.held) for now, then in zip(group, was)]
        if self.config.penalties == "sum":
            return self.config.lambda1 * sum(t.sum() for t in sparse) + self.config.lambda2 * sum(t.sum() for t in moved)
        means = [sum(t.mean() for t in tensors) / max(1, len(tensors)) for tensors in (sparse, moved)]
        return self.config.lambda1 * means[0] + self.config.lambda2 / 2 * means[1]

    def loss(self, batch: Batch, clock: Clock) -> Tensor:
        return super().loss(batch, clock) + self.penalty()

    @torch.no_grad()
    def settle(self) -> None:
        """The task keeps what is its own, and earlier tasks their adaptive parts as they are now."""
        for kept, layers in zip(self.learnt, self.earlier):
            for i, layer in enumerate(layers):
                kept[f"{i}.adaptive"] = self.pruned(layer["adaptive"]).clone()
        kept = named_tensors(self.own)
        kept |= {name: self.pruned(t) for name, t in kept.items() if name.endswith(".adaptive")}
        self.learnt.append(kept | named_tensors(self.head, "head."))
        self.held = []

    # ---- use, report, state -----------------------------------------------------------------------------------------

    def outputs(self, x: Tensor, task: int) -> Tensor:
        own = [named_under(self.learnt[task], f"{i}.") for i in range(len(self.net.layers))]
        return self.scores(features(self.net, self.kernels(own, prune=False), x), self.kept_head(task))

    def report(self) -> dict[str, Any]:
        """A task's own numbers are its mask, its biases, and the entries of its adaptive part that are not zero."""
        counts, shares = [], []
        for kept in self.learnt:
            body = {name: t for name, t in kept.items() if not name.startswith("head.")}
            counts.append(sum(int(t.count_nonzero()) if name.endswith(".adaptive") else t.numel() for name, t in body.items()))
            adaptive = torch.cat([t.flatten() for name, t in body.items() if name.endswith(".adaptive")])
            shares.append(float(adaptive.count_nonzero() / adaptive.numel()))
        return self.costs(sum(p.numel() for p in self.shared.parameters()), counts) | {"adaptive_share": shares}

    def build(self, facts: dict[str, Any]) -> None:
        super().build(facts)
        self.make(self.index)
