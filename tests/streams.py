"""Small separable task streams for the tests of training: 16 inputs, two classes, tasks that contradict each other."""

from __future__ import annotations

import torch

from subnet_pipelines.benchmarks.base import Benchmark, BenchmarkConfig, Split, Task
from subnet_pipelines.chance import stream


def rows(count: int, purpose: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of two classes: class 0 is bright in the first eight inputs, class 1 in the last eight. uint8 (count, 16), int64 (count,)."""
    chance = stream(0, purpose)
    y = torch.arange(count) % 2
    x = torch.randint(0, 120, (count, 16), generator=chance, dtype=torch.uint8)
    x[y == 0, :8] += 100
    x[y == 1, 8:] += 100
    return x, y


def view(x: torch.Tensor) -> torch.Tensor:
    return x.float() / 255 - 0.5


class Contrary(Benchmark):
    """Task i has the same pictures as task i - 1 and the other labels, so that who shares everything must forget."""

    name = "contrary"
    classes = 2
    input_shape = (16,)

    def __init__(self, config: BenchmarkConfig | None = None, seed: int = 1, data_dir=None, device: str = "cpu"):
        config = config or BenchmarkConfig(tasks=2, val_fraction=0.25)
        super().__init__(config, seed, torch.device(device), rows(96, "train"), rows(64, "test"))

    def flip(self, split: Split | None, i: int) -> Split | None:
        return None if split is None else Split(split.x, split.y ^ (i % 2), split.index, view)

    def view(self, i: int):
        return view

    def task(self, i: int) -> Task:
        task = super().task(i)
        return Task(i, task.name, self.flip(task.train, i), self.flip(task.val, i), task.classes)

    def test(self, i: int) -> Split:
        return self.flip(super().test(i), i)
