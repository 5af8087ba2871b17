"""ProgNN: progressive neural networks (Rusu et al., 2016), a column of the network for every task that reads all columns before it.

A task's column is a network of its own. From its second layer on, it also reads what the columns before it have made of the same row one
layer below: that is scaled by a number that learns, reduced to few channels by a 1 x 1 convolution and ReLU, and convolved into the
layer's sum. Columns that have learnt do not change, so nothing is forgotten; task t runs through t + 1 columns.

As LASEM's program has it (Lifelong-ML/LASEM c4ec052), every column before has a reduction of its own, where the paper puts the columns'
channels together before one reduction; and the head reads its own column alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from subnet_pipelines.benchmarks.base import Benchmark, Task
from subnet_pipelines.bounds import Positive
from subnet_pipelines.chance import seeded
from subnet_pipelines.methods.base import Phase
from subnet_pipelines.methods.lifelong import Lifelong, LifelongConfig, named_tensors, named_under, parameters
from subnet_pipelines.methods.selective import convolve, pictures


@dataclass(frozen=True)
class ProgNNConfig(LifelongConfig):
    """Progressive networks in LASEM's comparison, which prints 60.03 % on Office-Home."""

    reduction: Positive = 1.0
    """A connection to a column before reduces the channels c that it reads to c / (reduction columns), columns counting the task's own, and
    to one at least; the code has 1 and 2."""


class ProgNN(Lifelong):
    """The column and head of the task in training; the columns before it lie beside the module."""

    name = "prognn"
    Config = ProgNNConfig
    forget_free = True

    def __init__(self, config: ProgNNConfig, benchmark: Benchmark, seed: int):
        super().__init__(config, benchmark, seed)
        self.make(0)

    def make(self, task: int) -> None:
        """A fresh column and head for a task."""
        self.index, layers = task, []
        with seeded(self.seed, "column", task):
            for i, (layer, inp) in enumerate(zip(self.net.layers, self.inputs)):
                tensors = self.start.plain(layer, inp)
                for column in range(task if i else 0):
                    few = max(1, int(inp / (self.config.reduction * (task + 1))))
                    down = self.start.linear(inp, few, 1, 1)
                    tensors[f"scale_{column}"] = self.start.linear(1, 1)["weight"].view(1)
                    tensors[f"down_{column}"], tensors[f"down_bias_{column}"] = down["weight"], down["bias"]
                    tensors[f"up_{column}"] = self.start.linear(few, layer.channels, layer.kernel, layer.kernel)["weight"]
                layers.append(tensors)
        self.column, self.head = parameters(layers, self.device), parameters(self.fresh_head(task), self.device)

    def plan(self, task: Task) -> list[Phase]:
        return [self.phase("train", task, lambda: list(self.parameters()), lambda: self.make(task.index), self.end)]

    def columns(self, tasks: int) -> list[list[dict[str, Tensor]]]:
        """The first columns that have learnt, of each a dict of tensors a layer."""
        return [[named_under(kept, f"{i}.") for i in range(len(self.net.layers))] for kept in self.learnt[:tasks]]

    def through(self, x: Tensor, columns: Sequence) -> Tensor:
        """x (B, ...) through these columns, each after those that it reads -> features (B, width) of the last; only it gets gradients."""
        above: list[list[Tensor]] = []  # of each column done, what its layers read
        for number, column in enumerate(columns):
            with torch.set_grad_enabled(torch.is_grad_enabled() and number == len(columns) - 1):
                reads = [pictures(self.net, x)]
                for i, layer in enumerate(self.net.layers):
                    tensors, parts, kernels = column[i], [reads[i]], [column[i]["weight"]]
                    for other in range(number if i else 0):
                        read, names = above[other][i], ("scale", "down", "down_bias")
                        scale, weight, bias = (tensors[f"{name}_{other}"].to(read.dtype) for name in names)
                        parts.append(F.conv2d(read * scale, weight, bias).relu())
                        kernels.append(tensors[f"up_{other}"])
                    skip = reads[i - 1] if layer.skip else None  # one convolution of all channels is the sum of the columns'
                    reads.append(convolve(torch.cat(parts, 1), layer, torch.cat(kernels, 1), tensors["bias"], skip=skip))
                above.append(reads)
        return above[-1][-1].flatten(1).to(x.dtype)

    def body(self, x: Tensor) -> Tensor:
        return self.through(x, [*self.columns(self.index), self.column])

    def settle(self) -> None:
        self.learnt.append(named_tensors(self.column) | named_tensors(self.head, "head."))

    def outputs(self, x: Tensor, task: int) -> Tensor:
        return self.scores(self.through(x, self.columns(task + 1)), self.kept_head(task))

    def report(self) -> dict[str, Any]:
        return self.costs(0, [sum(t.numel() for n, t in kept.items() if not n.startswith("head.")) for kept in self.learnt])

    def build(self, facts: dict[str, Any]) -> None:
        super().build(facts)
        self.make(self.index)
