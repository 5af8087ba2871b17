"""Small separable task streams for the tests of training: 16 inputs, two classes, tasks that contradict each other."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from subnet_pipelines import Interrupted, RunConfig, run
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


class Shuffled(Contrary):
    """Task i has the pictures with the inputs in an order of its own and the same labels: whose task a row is shows in the row."""

    name = "shuffled"

    def view(self, i: int):
        order = torch.randperm(16, generator=stream(self.seed, "order of inputs", i))
        return lambda x: view(x)[:, order]

    def task(self, i: int) -> Task:
        return Benchmark.task(self, i)

    def test(self, i: int) -> Split:
        return Benchmark.test(self, i)


class Pictures(Benchmark):
    """Pictures of a shape in three classes, each bright in its own third of the lines; task i counts its labels from i on.

    42 training rows, so that batches of 4 leave a short one of 2; 6 of them more for validation, and 12 for the test.
    """

    name = "pictures"
    classes = 3

    def __init__(self, shape: Sequence[int], config: BenchmarkConfig | None = None, seed: int = 1, device: str = "cpu"):
        self.input_shape = tuple(shape)
        parts = [self.draw(48, "train"), self.draw(12, "test")]
        super().__init__(config or BenchmarkConfig(tasks=2, val_fraction=0.125), seed, torch.device(device), *parts)

    def draw(self, count: int, purpose: str) -> tuple[torch.Tensor, torch.Tensor]:
        """uint8 (count, *shape), int64 (count,)."""
        y = torch.arange(count) % 3
        x = torch.randint(0, 120, (count, *self.input_shape), generator=stream(0, purpose), dtype=torch.uint8)
        lines = x.movedim(-2 if len(self.input_shape) > 1 else -1, 1)
        for c, own in enumerate(lines.tensor_split(3, 1)):
            own[y == c] += 100
        return x, y

    def view(self, i: int):
        return view

    def turn(self, split: Split | None, i: int) -> Split | None:
        return None if split is None else Split(split.x, (split.y + i) % 3, split.index, view)

    def task(self, i: int) -> Task:
        task = super().task(i)
        return Task(i, task.name, self.turn(task.train, i), self.turn(task.val, i), task.classes)

    def test(self, i: int) -> Split:
        return self.turn(super().test(i), i)


def broken_run(make: Callable, out: Path, stops: Sequence[int]) -> tuple:
    """Run what `make()` gives, (method, benchmark), stopped by SIGTERM at those steps (counted from each start) and resumed after each.

    Returns the method and the result of the last try, which goes to the end.
    """
    for number, stop_at in enumerate((*stops, None)):
        method, benchmark = make()
        step, made = method.step, []

        def counted(*args, step=step, made=made, stop_at=stop_at):
            made.append(1)
            if len(made) == stop_at:
                os.kill(os.getpid(), signal.SIGTERM)
            return step(*args)

        method.step = counted
        if stop_at is None:
            return method, run(method, benchmark, RunConfig(), out, resume=number > 0)
        with pytest.raises(Interrupted):
            run(method, benchmark, RunConfig(), out, resume=number > 0)


def assert_same_run(a, b) -> None:
    """Two (method, result) agree: tensors, bank entries and everything measured, but for the seconds."""
    for name, tensor in a[0].state_dict().items():
        other = b[0].state_dict()[name]
        assert torch.equal(tensor, other) if isinstance(tensor, torch.Tensor) else tensor == other, name
    assert a[0].bank.names == b[0].bank.names
    for name in a[0].bank.masks:
        for layer, bits in a[0].bank.bits(name).items():
            assert torch.equal(bits, b[0].bank.bits(name)[layer]), (name, layer)
    first, second = asdict(a[1]), asdict(b[1])
    first.pop("seconds")
    second.pop("seconds")
    assert first == second
