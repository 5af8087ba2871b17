"""CIFAR-100 with a few rows of each class, in LASEM's three streams of 10, 20 and 40 tasks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from subnet_pipelines.benchmarks.base import Benchmark, BenchmarkConfig, Rows, Split, Task
from subnet_pipelines.benchmarks.cifar import load_cifar100
from subnet_pipelines.benchmarks.files import data_folder
from subnet_pipelines.benchmarks.images import Normal, at_most
from subnet_pipelines.bounds import Count
from subnet_pipelines.chance import stream
from subnet_pipelines.errors import Refusal

FORTY = (  # each task's classes (Lifelong-ML/LASEM c4ec052, gen_data.py); of its other streams, 20 tasks are the first half
    (4, 1, 54, 9, 0, 5, 6, 3, 12, 8), (4, 23, 54, 34, 0, 2, 6, 36, 12, 41), (22, 23, 15, 34, 26, 2, 27, 36, 47, 41),
    (22, 32, 15, 10, 26, 20, 27, 42, 47, 13), (30, 32, 62, 10, 51, 20, 7, 42, 17, 13), (30, 33, 62, 63, 51, 11, 7, 50, 17, 69),
    (39, 33, 19, 63, 45, 11, 29, 50, 52, 69), (39, 67, 19, 16, 45, 25, 29, 43, 52, 48), (55, 67, 70, 16, 53, 25, 14, 43, 37, 48),
    (55, 49, 70, 64, 53, 35, 14, 65, 37, 81), (40, 49, 21, 64, 77, 35, 44, 65, 56, 81), (40, 73, 21, 28, 77, 84, 44, 88, 56, 58),
    (72, 73, 82, 28, 57, 84, 18, 88, 68, 58), (72, 60, 82, 66, 57, 46, 18, 74, 68, 85), (86, 60, 31, 66, 79, 46, 78, 74, 59, 85),
    (86, 71, 31, 75, 79, 98, 78, 80, 59, 89), (87, 71, 38, 75, 99, 98, 93, 80, 96, 89), (87, 91, 38, 61, 99, 94, 93, 97, 96, 90),
    (95, 91, 92, 61, 83, 94, 24, 97, 76, 90), (95, 1, 92, 9, 83, 5, 24, 3, 76, 8), (4, 22, 54, 15, 0, 26, 6, 27, 12, 47),
    (1, 23, 9, 34, 5, 26, 6, 27, 12, 47), (1, 23, 9, 34, 5, 2, 3, 36, 8, 41), (30, 39, 62, 19, 51, 2, 3, 36, 8, 41),
    (30, 39, 62, 19, 51, 45, 7, 29, 17, 52), (32, 33, 10, 63, 20, 45, 7, 29, 17, 52), (32, 33, 10, 63, 20, 11, 42, 50, 13, 69),
    (55, 40, 70, 21, 53, 11, 42, 50, 13, 69), (55, 40, 70, 21, 53, 77, 14, 44, 37, 56), (67, 49, 16, 64, 25, 77, 14, 44, 37, 56),
    (67, 49, 16, 64, 25, 35, 43, 65, 48, 81), (72, 86, 82, 31, 57, 35, 43, 65, 48, 81), (72, 86, 82, 31, 57, 79, 18, 78, 68, 59),
    (73, 60, 28, 66, 84, 79, 18, 78, 68, 59), (73, 60, 28, 66, 84, 46, 88, 74, 58, 85), (95, 87, 92, 38, 83, 46, 88, 74, 58, 85),
    (95, 87, 92, 38, 83, 99, 24, 93, 76, 96), (91, 71, 61, 75, 94, 99, 24, 93, 76, 96), (91, 71, 61, 75, 94, 98, 97, 80, 90, 89),
    (4, 22, 54, 15, 0, 98, 97, 80, 90, 89),
)  # fmt: skip
TEN = tuple(
    FORTY[i] for i in (0, 4, 8, 12, 18, 2, 6, 10, 14, 16)
)  # no class twice: one of each of ten superclasses in every task


@dataclass(frozen=True)
class FewConfig(BenchmarkConfig):
    """CIFAR-100 with a few rows of each class."""

    val_fraction: float = 0.15
    """Share of a task's training rows kept for validation; 0 trains on all of them."""
    rows_per_class: Count = 20
    """Rows of each class for training and validation together, drawn from the run's seed; 20 are LASEM's 4 %."""
    standardise: Literal["train", "each"] = "train"
    """Whose mean and deviation a task's pictures are normalised by, colour by colour: those of its training rows, or every half by its own,
    the test rows too (LASEM's code)."""


class CIFAR100Few(Benchmark):
    """Task i is ten of CIFAR-100's classes, with a few training rows of each and all test rows.

    Tasks that have a class in common have other rows of it, as long as there are so many.
    """

    name = "cifar100-few"
    Config = FewConfig
    FIDELITY = {"sound": {}, "code": {"standardise": "each"}, "paper": {}}
    groups = TEN
    classes = 10

    def __init__(self, config: FewConfig, seed: int, data_dir: Path | str | None = None, device: torch.device | str = "cpu"):
        super().__init__(config, seed, torch.device(device))
        at_most(config, len(self.groups), self.name)
        train, test = ((x, y[:, 1]) for x, y in load_cifar100(data_folder(data_dir)))
        self.input_shape = tuple(train[0].shape[1:])
        places = [(classes == c).nonzero().flatten() for classes in (train[1], test[1]) for c in range(100)]
        used, self.parts = [0] * 100, []
        for i, group in enumerate(self.groups[: config.tasks]):
            halves: list[list[Tensor]] = [[], []]
            for c in group:
                mine, theirs = places[c], places[100 + c]
                if not len(mine) or not len(theirs):
                    raise Refusal(f"{self.name}: class {c}, of task {i}, has no {'test' if len(mine) else 'training'} picture")
                mixed = mine[torch.randperm(len(mine), generator=stream(seed, "rows", c))]
                count = min(config.rows_per_class, len(mine))
                halves[0].append(mixed[torch.arange(used[c], used[c] + count) % len(mine)])
                halves[1].append(theirs)
                used[c] += count
            labels = [torch.arange(len(group)).repeat_interleave(torch.tensor([len(p) for p in half])) for half in halves]
            picked = [x[torch.cat(half)] for (x, _), half in zip((train, test), halves)]
            self.parts.append(tuple(Rows(x.to(self.device), y.to(self.device)) for x, y in zip(picked, labels)))

    def rows(self, i: int) -> tuple[Rows, Rows]:
        return self.parts[i]

    def view(self, i: int) -> Callable[[Tensor], Tensor]:
        train = self.divided(i)[0]
        return standardised(train.x if train.index is None else train.x[train.index])

    def own_view(self, split: Split) -> Split:
        """The half as the config has it normalised: by its own numbers where that is asked for."""
        if self.config.standardise == "train":
            return split
        return replace(split, view=standardised(split.x if split.index is None else split.x[split.index]))

    def task(self, i: int) -> Task:
        task = super().task(i)
        return replace(task, train=self.own_view(task.train), val=None if task.val is None else self.own_view(task.val))

    def test(self, i: int) -> Split:
        return self.own_view(super().test(i))


def standardised(x: Tensor) -> Normal:
    """The view by the mean and deviation of pictures uint8 (n, channels, height, width), a number a channel."""
    std, mean = torch.std_mean(x.to(torch.float64) / 255, dim=(0, 2, 3), correction=0)
    return Normal(mean.tolist(), std.clamp_min((x.numel() // x.shape[1]) ** -0.5).tolist()).to(x.device)


@dataclass(frozen=True)
class Few20Config(FewConfig):
    """CIFAR-100 with a few rows of each class, in twenty tasks that overlap."""

    tasks: int = 20


class CIFAR100Few20(CIFAR100Few):
    """Every other task has half of its classes from the task before and half from the next."""

    name = "cifar100-few-20"
    Config = Few20Config
    groups = FORTY[:20]


@dataclass(frozen=True)
class Few40Config(FewConfig):
    """CIFAR-100 with a few rows of each class, in forty tasks that overlap."""

    tasks: int = 40


class CIFAR100Few40(CIFAR100Few):
    """The twenty tasks of cifar100-few-20, and twenty more of their classes."""

    name = "cifar100-few-40"
    Config = Few40Config
    groups = FORTY
