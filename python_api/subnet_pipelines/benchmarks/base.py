"""The words of a task stream: Batch, Split, Task, Scenario, Benchmark."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from subnet_pipelines.chance import stream
from subnet_pipelines.errors import Refusal

CHUNK = 1 << 18  # elements of an epoch that are gathered at once: a megabyte, which stays in the cache


class Batch(NamedTuple):
    """x float (B, ...); y int64 (B,); t int64 (B,), the task of each row, None where the scenario hides it."""

    x: Tensor
    y: Tensor
    t: Tensor | None


class Scenario(NamedTuple):
    """What is told: the task's id in training, at test; and whether the tasks share their labels (SupSup's table 1)."""

    train_id: bool
    test_id: bool
    shared: bool


GG = Scenario(train_id=True, test_id=True, shared=False)
GNs = Scenario(train_id=True, test_id=False, shared=True)
GNu = Scenario(train_id=True, test_id=False, shared=False)
NNs = Scenario(train_id=False, test_id=False, shared=True)
SCENARIOS = {"GG": GG, "GNs": GNs, "GNu": GNu, "NNs": NNs}


@dataclass(frozen=True)
class Split:
    """Rows of base tensors that all tasks share, and the view that makes them this task's.

    x uint8 (n, ...); y int64 (n,); index int64 (m,) picks rows, None is all; view: uint8 (m, ...) -> float (m, ...).
    """

    x: Tensor
    y: Tensor
    index: Tensor | None
    view: Callable[[Tensor], Tensor]

    def __len__(self) -> int:
        return len(self.y) if self.index is None else len(self.index)

    def tensors(self) -> tuple[Tensor, Tensor]:
        """The whole split as the model sees it: x float (m, ...), y int64 (m,)."""
        if self.index is None:
            return self.view(self.x), self.y
        return self.view(self.x[self.index]), self.y[self.index]

    def marked(self, task: int | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """`tensors()` and the task of each row, int64 (m,), or None where it is hidden."""
        x, y = self.tensors()
        return x, y, None if task is None else torch.full((1,), task, device=y.device).expand(len(y))


@dataclass(frozen=True)
class Joined:
    """The rows of several tasks' splits, one after another, each marked with its own task: splits[i] is task i's."""

    splits: tuple[Split, ...]

    def __len__(self) -> int:
        return sum(map(len, self.splits))

    def marked(self, task: int | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """All rows as `Split.marked` has them, with the task that each is of; None for `task` hides it."""
        x = y = t = None
        at = 0
        for i, split in enumerate(self.splits):
            part, labels = split.tensors()
            if x is None:
                x, y = (v.new_empty((len(self), *v.shape[1:])) for v in (part, labels))
                t = torch.empty_like(y)
            rows = slice(at, at := at + len(labels))
            x[rows], y[rows], t[rows] = part, labels, i
        return x, y, None if task is None else t


@dataclass(frozen=True)
class Task:
    """One task of a stream; index is its place in the stream. Of a union of tasks the rows are Joined."""

    index: int
    name: str
    train: Split | Joined
    val: Split | Joined | None
    classes: int


def batches(x: Tensor, y: Tensor, t: Tensor | None, order: Tensor | None, size: int, skip: int = 0) -> Iterator[Batch]:
    """Batches of `size` rows of x, y, t in the given order (as they lie where None), from batch number `skip` on.

    Rows are gathered a chunk of batches at a time; a batch is then three views.
    """
    rows = max(1, CHUNK // max(1, math.prod(x.shape[1:]) * size)) * size
    n = len(x) if order is None else len(order)
    for start in range(skip * size, n, rows):
        stop = min(start + rows, n)
        chunk = [v if v is None else v[start:stop] if order is None else v.index_select(0, order[start:stop]) for v in (x, y, t)]
        xs, ys = chunk[0].split(size), chunk[1].split(size)
        ts = chunk[2].split(size) if t is not None else [None] * len(xs)
        yield from map(Batch, xs, ys, ts)


@dataclass(frozen=True)
class BenchmarkConfig:
    """Settings that every benchmark has."""

    tasks: int = 10
    """Length of the stream: its first N tasks."""
    scenario: Literal["GG", "GNs", "GNu", "NNs"] = "GG"
    """Who is told the task: given in training and at test (GG), in training only with shared or unshared labels (GNs, GNu), never (NNs)."""
    val_fraction: float = 0.1
    """Share of the training rows kept for validation; 0 trains on all of them."""
    val_split: Literal["balanced", "first"] = "balanced"
    """Validation rows: drawn class by class from the run's seed, or the first rows of the file (WSN's code)."""
    eval_images: int | None = None
    """Test on N rows a task, drawn class by class from the run's seed; all where null."""

    def check(self) -> None:
        """Raise Refusal where a field is out of range."""
        if self.tasks < 1:
            raise Refusal(f"tasks must be at least 1, got {self.tasks}")
        if not 0 <= self.val_fraction < 1:
            raise Refusal(f"val_fraction must be in [0, 1), got {self.val_fraction}")
        if self.eval_images is not None and self.eval_images < 1:
            raise Refusal(f"eval_images must be at least 1, got {self.eval_images}")


def balanced(y: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """`count` row numbers of y, as equal a number of each class as there is, ascending. y int64 (n,) -> int64 (count,)."""
    shuffled = torch.randperm(len(y), generator=generator)
    label = y.cpu()[shuffled]
    rank = torch.empty_like(label)  # a row's place among the shuffled rows of its own class
    for c in label.unique():
        at = label == c
        rank[at] = torch.arange(int(at.sum()))
    return shuffled[torch.argsort(rank, stable=True)[:count]].sort().values


class Benchmark:
    """A sequence of tasks and a scenario. Subclasses load base tensors and say what task i's view is.

    `task(i)` and `test(i)` are made when asked for, so 2,500 tasks cost what one costs.
    """

    name: str
    Config = BenchmarkConfig
    FIDELITY: dict[str, dict] = {"sound": {}, "code": {}, "paper": {}}
    classes: int
    input_shape: tuple[int, ...]

    def __init__(self, config: BenchmarkConfig, seed: int, device: torch.device, train: tuple, test: tuple):
        config.check()
        self.config, self.seed, self.device = config, seed, device
        self.scenario = SCENARIOS[config.scenario]
        self._train = tuple(t.to(device) for t in train)
        self._test = tuple(t.to(device) for t in test)
        y = train[1]
        count = round(config.val_fraction * len(y))
        if config.val_split == "first":
            held = torch.arange(count)
        else:
            held = balanced(y, count, stream(seed, "validation"))
        kept = torch.ones(len(y), dtype=torch.bool)
        kept[held] = False
        self._held = held.to(device) if count else None
        self._kept = kept.nonzero().flatten().to(device) if count else None
        self._tested = None
        if config.eval_images is not None and config.eval_images < len(test[1]):
            self._tested = balanced(test[1], config.eval_images, stream(seed, "eval_images")).to(device)

    def __len__(self) -> int:
        return self.config.tasks

    def view(self, i: int) -> Callable[[Tensor], Tensor]:
        """Task i's view: uint8 rows (m, ...) -> float model input (m, ...)."""
        raise NotImplementedError

    def title(self, i: int) -> str:
        """Task i's name for people."""
        return f"task {i}"

    def task(self, i: int) -> Task:
        """Task i of the stream, 0 <= i < len(self)."""
        view = self.view(i)
        val = None if self._held is None else Split(*self._train, self._held, view)
        return Task(i, self.title(i), Split(*self._train, self._kept, view), val, self.classes)

    def union(self) -> Task:
        """All tasks of the stream as one, in the place of the last."""
        tasks = [self.task(i) for i in range(len(self))]
        val = None if tasks[0].val is None else Joined(tuple(task.val for task in tasks))
        return Task(len(self) - 1, "all tasks", Joined(tuple(task.train for task in tasks)), val, self.classes)

    def test(self, i: int) -> Split:
        """Task i's test rows."""
        return Split(*self._test, self._tested, self.view(i))

    def stream(self) -> Sequence[int | None]:
        """What a run goes through: task numbers, or one None, the whole stream with its borders hidden."""
        return range(len(self)) if self.scenario.train_id else [None]
