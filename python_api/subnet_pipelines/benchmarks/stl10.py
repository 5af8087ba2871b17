"""STL-10 in its binary version, and LASEM's stream of it: three classes a task, with noise and colours of the task's own."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from subnet_pipelines.benchmarks.base import Benchmark, BenchmarkConfig, Rows, Split, Task
from subnet_pipelines.benchmarks.files import data_folder, find
from subnet_pipelines.benchmarks.images import at_most
from subnet_pipelines.bounds import Count
from subnet_pipelines.chance import stream
from subnet_pipelines.errors import Refusal

SIDE = 96
LIMIT = 8000  # pictures of a file; the test's has so many
FOLDERS = ("stl10_binary", "stl10", ".")
NAMES = ("train_X.bin", "train_y.bin", "test_X.bin", "test_y.bin")
STEP = 0.025  # of the noise's mean and deviation


def read_pictures(path: Path) -> Tensor:
    """The pictures of a file, uint8 (n, 3, 96, 96): as it stores them, a colour after the other, each column by column. Raises Refusal."""
    size, record = path.stat().st_size, 3 * SIDE * SIDE
    if size == 0 or size % record or size > LIMIT * record:
        raise Refusal(f"{path}: should be 1 to {LIMIT} pictures of {record} bytes, has {size} bytes")
    columns = torch.from_numpy(np.fromfile(path, np.uint8)).view(-1, 3, SIDE, SIDE)
    return columns.transpose(2, 3).contiguous()


def read_labels(path: Path, pictures: int) -> Tensor:
    """The labels of a file, int64 (n,), from 0 on. Raises Refusal unless there is one from 1 to 10 for each picture."""
    size = path.stat().st_size
    if size != pictures:
        raise Refusal(f"{path}: should hold a label for each of {pictures} pictures, has {size} bytes")
    labels = torch.from_numpy(np.fromfile(path, np.uint8)).long()
    if wrong := [int(v) for v in (labels.min(), labels.max()) if not 1 <= v <= 10]:
        raise Refusal(f"{path}: labels should be from 1 to 10, one is {wrong[0]}")
    return labels - 1


@functools.lru_cache(maxsize=1)
def load_stl10(data_dir: Path) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """STL-10 as (pictures uint8 (n, 3, 96, 96), labels int64 (n,)) for training and test. Raises Refusal."""
    paths = find("STL-10 (binary version)", NAMES, data_dir, FOLDERS)
    try:
        halves = [(read_pictures(x), y) for x, y in (paths[:2], paths[2:])]
        return tuple((x, read_labels(y, len(x))) for x, y in halves)
    except OSError as error:
        raise Refusal(f"{error.filename or data_dir}: cannot be read ({error.strerror or error})") from None


@dataclass(frozen=True)
class STL10Config(BenchmarkConfig):
    """STL-10 in tasks of three classes."""

    tasks: int = 20
    """Length of the stream: its first N tasks."""
    val_fraction: float = 1 / 6
    """Share of a task's training rows kept for validation; 0 trains on all of them (LASEM's code has 85 of 500)."""
    rows_per_class: Count = 500
    """Rows of each class for training and validation together, drawn from the run's seed; the set has 500."""
    disturb: bool = True
    """Whether a task adds Gaussian noise of its own, and permutes the colours."""


class STL10Tasks(Benchmark):
    """Task i is three of the ten classes, no two tasks the same three, with noise and an order of colours, all drawn from the seed.

    The noise's mean is -.05 to .025 and its deviation 0 or .025, over pixels in [-.5, .5]; every picture has it once and for all.
    """

    name = "stl10-split"
    Config = STL10Config
    FIDELITY = {"sound": {}, "code": {}, "paper": {}}
    classes = 3
    input_shape = (3, SIDE, SIDE)

    def __init__(self, config: STL10Config, seed: int, data_dir: Path | str | None = None, device: torch.device | str = "cpu"):
        super().__init__(config, seed, torch.device(device))
        at_most(config, 120, self.name)  # ways to choose three of ten
        self.groups, self.noise, self.colours = draw(config.tasks, seed)
        self.parts = []
        halves = load_stl10(data_folder(data_dir))
        for i, group in enumerate(self.groups):
            rows = []
            for half, (x, y) in zip(("training", "test"), halves):
                places = [(y == c).nonzero().flatten() for c in group]
                if empty := [c for c, found in zip(group, places) if not len(found)]:
                    raise Refusal(f"{self.name}: class {empty[0] + 1}, of task {i}, has no {half} picture")
                if half == "training":
                    orders = [torch.randperm(len(p), generator=stream(seed, "rows", i, c)) for p, c in zip(places, group)]
                    places = [p[order[: config.rows_per_class]] for p, order in zip(places, orders)]
                labels = torch.arange(3).repeat_interleave(torch.tensor([len(p) for p in places]))
                rows.append(Rows(x[torch.cat(places)].to(self.device), labels.to(self.device)))
            self.parts.append(tuple(rows))

    def rows(self, i: int) -> tuple[Rows, Rows]:
        return self.parts[i]

    def view(self, i: int) -> Callable[[Tensor], Tensor]:
        return self.disturbed(i, "training")

    def disturbed(self, i: int, half: str) -> Callable[[Tensor], Tensor]:
        """The view of a half of task i."""
        (mean, std), order = self.noise[i], self.colours[i]

        def view(x: Tensor) -> Tensor:
            made = x.to(torch.float32).div_(255).sub_(0.5)
            if not self.config.disturb:
                return made
            if std:
                drawn = torch.randn(made.shape, generator=stream(self.seed, "noise", i, half))
                made += STEP * std * drawn.to(made.device)
            return (made + STEP * mean)[:, order].contiguous()

        return view

    def task(self, i: int) -> Task:
        task = super().task(i)
        if task.val is None:
            return task
        held = Split(task.val.x, task.val.y, task.val.index, self.disturbed(i, "validation"))
        return Task(task.index, task.name, task.train, held, task.classes)

    def test(self, i: int) -> Split:
        test = super().test(i)
        return Split(test.x, test.y, test.index, self.disturbed(i, "test"))


def draw(tasks: int, seed: int) -> tuple[list[list[int]], list[tuple[int, int]], list[list[int]]]:
    """Of each task its classes, its noise's mean and deviation in steps of .025, and its order of colours."""
    groups: list[list[int]] = []
    number = 0
    while len(groups) < tasks:
        group = torch.randperm(10, generator=stream(seed, "classes", number))[:3].tolist()
        number += 1
        if all(set(group) != set(other) for other in groups):
            groups.append(group)
    noise = []
    for i in range(tasks):
        chance = stream(seed, "noise", i)
        noise.append((int(torch.randint(-2, 2, (), generator=chance)), int(torch.randint(0, 2, (), generator=chance))))
    return groups, noise, [torch.randperm(3, generator=stream(seed, "colours", i)).tolist() for i in range(tasks)]
