"""The words of a task stream: Batch, Rows, Split, Task, Visit, Scenario, Benchmark."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from subnet_pipelines.bounds import Count, Fraction, check_bounds
from subnet_pipelines.chance import stream
from subnet_pipelines.errors import Refusal

CHUNK = 1 << 18  # elements of an epoch that are gathered at once: a megabyte, which stays in the cache of a CPU
WIDE = 64  # times as many where a gather is a launch


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


class Rows(NamedTuple):
    """Rows of base tensors: x uint8 (n, ...), or what is indexed alike; y int64 (n,), labels; index int64 (m,) picks rows, None is all."""

    x: Tensor
    y: Tensor
    index: Tensor | None = None

    def labels(self) -> Tensor:
        """int64 (m,)."""
        return self.y if self.index is None else self.y[self.index]

    def pick(self, places: Tensor | None) -> Rows:
        """The rows at these places among the m, int64; None is all of them."""
        if places is None:
            return self
        return Rows(self.x, self.y, places if self.index is None else self.index[places])


@dataclass(frozen=True)
class Late:
    """What a view makes of rows that are too many to be floats at once: to be read by index as a float tensor `shape`, made when read.

    rows[places] are rows for the view, and for the augmentation in its place; shape (m, ...) and device: of what the view makes.
    """

    rows: Any
    view: Callable[[Any], Tensor]
    shape: tuple[int, ...]
    device: torch.device

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, places: slice | Tensor) -> Tensor:
        return self.view(self.rows[places])

    def index_select(self, dim: int, places: Tensor) -> Tensor:
        """The rows at these places int64 (b,) as float (b, ...); dim is 0."""
        return self[places]


@dataclass(frozen=True)
class Split:
    """Rows of base tensors that tasks share, and the view that makes them this task's.

    x uint8 (n, ...); y int64 (n,); index int64 (m,) picks rows, None is all; view: uint8 (m, ...) -> float (m, ...), or Late; augment, if
    there: float (b, ...) as the view made it, or the rows of a Late one, and int64 (b,) drawn from [0, 2^62) -> float (b, ...), anew for
    every batch of training.
    """

    x: Tensor
    y: Tensor
    index: Tensor | None
    view: Callable[[Tensor], Tensor]
    augment: Callable[[Tensor, Tensor], Tensor] | None = None

    def __len__(self) -> int:
        return len(self.y) if self.index is None else len(self.index)

    def tensors(self, places: Tensor | None = None) -> tuple[Tensor | Late, Tensor]:
        """The split as the model sees it, or the rows at these places int64 (m,) of it: x float (m, ...), y int64 (m,)."""
        rows = Rows(self.x, self.y, self.index).pick(places)
        return self.view(self.x if rows.index is None else self.x[rows.index]), rows.labels()

    def marked(self, task: int | None) -> tuple[Tensor | Late, Tensor, Tensor | None]:
        """`tensors()` and the task of each row, int64 (m,), or None where it is hidden."""
        x, y = self.tensors()
        return x, y, None if task is None else torch.full((1,), task, device=y.device).expand(len(y))


@dataclass(frozen=True)
class Joined:
    """The rows of several tasks' splits, one after another, each marked with its own task: splits[i] is task i's.

    augment as in Split: what the tasks have in common.
    """

    splits: tuple[Split, ...]
    augment: Callable[[Tensor, Tensor], Tensor] | None = None

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


class Visit(NamedTuple):
    """A stretch of a stream: the task whose rows it shows, its length in phases of that task, and the row of the accuracy matrix that is
    measured at its end, None where none is."""

    task: int
    length: float = 1.0
    row: int | None = None


def batches(
    x: Tensor | Late,
    y: Tensor,
    t: Tensor | None,
    order: Tensor | None,
    size: int,
    skip: int = 0,
    augment: Callable[[Tensor, Tensor], Tensor] | None = None,
    draws: Tensor | None = None,
) -> Iterator[Batch]:
    """Batches of `size` rows of x, y, t in the given order (as they lie where None), from batch number `skip` on.

    augment, with draws int64 for each place in the order, goes over x as in Split. Rows are gathered a chunk of batches at a time; a batch
    is then three views.
    """
    limit = CHUNK if x.device.type == "cpu" else CHUNK * WIDE
    rows = max(1, limit // max(1, math.prod(x.shape[1:]) * size)) * size
    n = len(x) if order is None else len(order)
    if augment is not None and isinstance(x, Late):
        x = replace(x, view=lambda rows: rows)
    for start in range(skip * size, n, rows):
        stop = min(start + rows, n)
        chunk = [v if v is None else v[start:stop] if order is None else v.index_select(0, order[start:stop]) for v in (x, y, t)]
        if augment is not None:
            chunk[0] = augment(chunk[0], draws[start:stop])
        xs, ys = chunk[0].split(size), chunk[1].split(size)
        ts = chunk[2].split(size) if t is not None else [None] * len(xs)
        yield from map(Batch, xs, ys, ts)


@dataclass(frozen=True)
class BenchmarkConfig:
    """Settings that every benchmark has."""

    tasks: Count = 10
    """Length of the stream: its first N tasks."""
    scenario: Literal["GG", "GNs", "GNu", "NNs", "NNu"] = "GG"
    """Who is told the task: given in training and at test (GG), in training only with shared or unshared labels (GNs, GNu), never (NNs);
    NNu, never and with unshared labels, is none."""
    visits: list[int] | None = None
    """Under NNs the task of each stretch of the stream, in which tasks may come back; null is every task once, and then `returns`."""
    returns: int | None = None
    """Under NNs the stream ends with so many of its tasks again, drawn from the run's seed among all but the last; null is none."""
    uneven: Fraction | None = None
    """Under NNs visits are longer or shorter than a phase by up to this share of it, drawn from the run's seed; null is all alike."""
    val_fraction: Fraction = 0.1
    """Share of the training rows kept for validation; 0 trains on all of them."""
    val_split: Literal["balanced", "first", "shuffle", "train"] = "balanced"
    """Validation rows: drawn class by class from the run's seed; the first rows of the file (WSN's code on Permuted MNIST); the first of
    sklearn's shuffle at the run's seed (WSN's code on CIFAR and 5-Datasets); the training rows again (WSN's code on Omniglot)."""
    eval_images: Count | None = None
    """Test on N rows a task, drawn class by class from the run's seed; all where null."""

    def check(self) -> None:
        """Raise Refusal where a field is out of range."""
        check_bounds(self)
        if self.scenario == "NNu":
            raise Refusal(
                "scenario NNu is none (SupSup's table 1): labels that are not shared tell by themselves that a task is new, which makes "
                "it GNu; without that nothing could tell whether an unknown label is of a known task; use GNu or NNs"
            )
        for name in ("visits", "returns", "uneven"):
            if getattr(self, name) is not None and SCENARIOS[self.scenario].train_id:
                raise Refusal(f"{name} is for streams whose borders are hidden, under scenario NNs, not {self.scenario}")
        if self.visits is not None and list(dict.fromkeys(self.visits)) != list(range(self.tasks)):
            raise Refusal(
                f"visits must show tasks 0 to {self.tasks - 1}, each for the first time in this order, got {self.visits}"
            )
        if self.returns is not None and self.visits is not None:
            raise Refusal("visits and returns both say how the stream goes on; give one")
        if self.returns is not None and not 0 <= self.returns < self.tasks:
            raise Refusal(f"returns must be at least 0 and fewer than the {self.tasks} tasks, got {self.returns}")


def balanced(y: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """`count` row numbers of y, as equal a number of each class as there is, ascending. y int64 (n,) -> int64 (count,)."""
    shuffled = torch.randperm(len(y), generator=generator)
    label = y.cpu()[shuffled]
    rank = torch.empty_like(label)  # a row's place among the shuffled rows of its own class
    for c in label.unique():
        at = label == c
        rank[at] = torch.arange(int(at.sum()))
    return shuffled[torch.argsort(rank, stable=True)[:count]].sort().values


def divide(y: Tensor, fraction: float, split: str, seed: int, *purpose: int) -> tuple[Tensor | None, Tensor | None]:
    """Places of a task's training rows and of its validation rows, int64 ascending; None is all rows, or no validation.

    y int64 (n,), the rows' labels; fraction and split as in BenchmarkConfig; purpose tells tasks apart that divide rows of their own.
    """
    count = max(1, (int if split == "shuffle" else round)(fraction * len(y)))
    if fraction == 0:
        return None, None
    if split == "train":
        return None, torch.arange(len(y))
    if split == "first":
        held = torch.arange(count)
    elif split == "shuffle":  # the same rows for every task of a length, as in the code
        held = torch.from_numpy(np.random.RandomState(seed).permutation(len(y))[:count]).sort().values
    else:
        held = balanced(y, count, stream(seed, "validation", *purpose))
    kept = torch.ones(len(y), dtype=torch.bool)
    kept[held] = False
    return kept.nonzero().flatten(), held


class Benchmark:
    """A sequence of tasks and a scenario. Subclasses load base tensors and say what task i's rows and view are.

    `task(i)` and `test(i)` are made when asked for, so 2,500 tasks cost what one costs.
    """

    name: str
    Config = BenchmarkConfig
    FIDELITY: dict[str, dict] = {"sound": {}, "code": {}, "paper": {}}
    classes: int  # width of a head
    input_shape: tuple[int, ...]
    data_dir: Path | str | None = None  # folder of the data sets that was asked for

    def __init__(
        self, config: BenchmarkConfig, seed: int, device: torch.device, train: tuple | None = None, test: tuple | None = None
    ):
        """train, test: x and y that all tasks share; a subclass whose tasks have rows of their own gives none, and overrides `rows`."""
        config.check()
        self.config, self.seed, self.device = config, seed, device
        self.scenario = SCENARIOS[config.scenario]
        self.shared = train is not None
        if self.shared:
            self._rows = tuple(Rows(*(t.to(device) for t in pair)) for pair in (train, test))
        self._divided: dict[int, tuple[Rows, Rows | None, Rows]] = {}

    def __len__(self) -> int:
        return self.config.tasks

    def rows(self, i: int) -> tuple[Rows, Rows]:
        """Task i's training rows, those for validation among them, and its test rows."""
        return self._rows

    def view(self, i: int) -> Callable[[Tensor], Tensor]:
        """Task i's view: uint8 rows (m, ...) -> float model input (m, ...)."""
        raise NotImplementedError

    def augment(self, i: int) -> Callable[[Tensor, Tensor], Tensor] | None:
        """What training does to task i's batches, as in Split."""
        return None

    def title(self, i: int) -> str:
        """Task i's name for people."""
        return f"task {i}"

    def divided(self, i: int) -> tuple[Rows, Rows | None, Rows]:
        """Task i's rows for training, validation (None where there are none) and test."""
        key = 0 if self.shared else i
        if key not in self._divided:
            c, purpose = self.config, () if self.shared else (i,)
            train, test = self.rows(i)
            kept, held = divide(train.labels().cpu(), c.val_fraction, c.val_split, self.seed, *purpose)
            kept, held = (None if places is None else places.to(self.device) for places in (kept, held))
            val = None if held is None else train.pick(held)
            if c.eval_images is not None and c.eval_images < len(test.labels()):
                places = balanced(test.labels(), c.eval_images, stream(self.seed, "eval_images", *purpose))
                test = test.pick(places.to(self.device))
            self._divided[key] = train.pick(kept), val, test
        return self._divided[key]

    def task(self, i: int) -> Task:
        """Task i of the stream, 0 <= i < len(self)."""
        view, (train, val, _) = self.view(i), self.divided(i)
        held = None if val is None else Split(*val, view)
        return Task(i, self.title(i), Split(*train, view, self.augment(i)), held, self.classes)

    def union(self) -> Task:
        """All tasks of the stream as one, in the place of the last."""
        tasks = [self.task(i) for i in range(len(self))]
        val = None if tasks[0].val is None else Joined(tuple(task.val for task in tasks))
        train = Joined(tuple(task.train for task in tasks), self.augment(0))
        return Task(len(self) - 1, "all tasks", train, val, self.classes)

    def test(self, i: int) -> Split:
        """Task i's test rows."""
        return Split(*self.divided(i)[2], self.view(i))

    def stream(self) -> Sequence[int | None]:
        """What a run goes through: task numbers, or one None, the whole stream with its borders hidden."""
        return range(len(self)) if self.scenario.train_id else [None]

    def visits(self) -> list[Visit]:
        """The stretches of a stream whose borders are hidden. A row of the matrix is measured before a task is seen for the first time,
        and the last one at the end of the stream."""
        c, tasks = self.config, len(self)
        again = torch.randperm(tasks - 1, generator=stream(self.seed, "returns"))[: c.returns or 0]
        order = c.visits or [*range(tasks), *again.tolist()]
        drawn = torch.rand(len(order), generator=stream(self.seed, "lengths"), dtype=torch.float64)
        lengths = (1 + (c.uneven or 0.0) * (2 * drawn - 1)).tolist()
        known = list(accumulate(order, max))
        rows = [t if later > t else None for t, later in pairwise([*known, tasks])]
        return list(map(Visit, order, lengths, rows))
