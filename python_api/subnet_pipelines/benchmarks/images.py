"""What the image benchmarks share: normalised views, crops and flips, tasks that are groups of a set's classes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from subnet_pipelines.benchmarks.base import Benchmark, BenchmarkConfig, Rows
from subnet_pipelines.errors import Refusal


@dataclass(frozen=True)
class ClassesConfig(BenchmarkConfig):
    """Tasks that are groups of one set's classes."""

    val_fraction: float = 0.05
    """Share of a task's training rows kept for validation; 0 trains on all of them."""
    labels: Literal["local", "global"] = "local"
    """A task's labels: its own from 0 on, or the set's numbers with heads as wide as the whole set (WSN's code)."""
    augment: Literal["none", "crop-flip"] = "none"
    """What training does to its pictures: nothing, or crops after a black border of 4 pixels and flips."""


class ClassTasks(Benchmark):
    """Task i is a group of an image set's classes, with a head as wide as the group or as the set."""

    def __init__(
        self,
        config: ClassesConfig,
        seed: int,
        device: torch.device,
        train: tuple[Tensor, Tensor],
        test: tuple[Tensor, Tensor],
        total: int,
        groups: Sequence[Sequence[int]],
        normal: Normal | None,
    ):
        """train, test: pictures uint8 (n, channels, height, width), classes int64 (n,) < total; groups: each task's classes, in order;
        normal: None for pictures of another shape, of which a subclass has the view.

        Raises Refusal where there are fewer groups than tasks, or a class of a task has no pictures.
        """
        super().__init__(config, seed, device)
        at_most(config, len(groups), self.name)
        self.groups = [list(group) for group in groups[: config.tasks]]
        self.input_shape = tuple(train[0].shape[1:])
        self.normal = None if normal is None else normal.to(device)
        self.parts = []
        self.classes = total if config.labels == "global" else len(groups[0])
        label, task = torch.arange(total), torch.full((total,), -1)
        for i, group in enumerate(self.groups):
            task[group] = i
            if config.labels == "local":
                label[group] = torch.arange(len(group))
        for half, (x, classes) in (("training", train), ("test", test)):
            counts = classes.bincount(minlength=total)
            for i, group in enumerate(self.groups):
                if empty := [c for c in group if not counts[c]]:
                    raise Refusal(f"{self.name}: class {empty[0]}, of task {i}, has no {half} picture")
            x, y = x.to(device), label[classes].to(device)
            self.parts.append([Rows(x, y, (task[classes] == i).nonzero().flatten().to(device)) for i in range(config.tasks)])

    def rows(self, i: int) -> tuple[Rows, Rows]:
        return self.parts[0][i], self.parts[1][i]

    def view(self, i: int) -> Callable[[Tensor], Tensor]:
        return self.normal

    def augment(self, i: int) -> Callable[[Tensor, Tensor], Tensor] | None:
        return CropFlip(4, self.normal.black) if self.config.augment == "crop-flip" else None


def at_most(config: BenchmarkConfig, tasks: int, name: str) -> None:
    """Raise Refusal where a config asks for more tasks than there are."""
    if config.tasks > tasks:
        raise Refusal(f"tasks must be at most the {tasks} of {name}, got {config.tasks}")


class Normal:
    """The view that takes bytes to [0, 1], less the mean, over the deviation: uint8 (m, channels, ...) -> float32, a new tensor.

    mean, std: one number a channel, or one for all.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float]):
        self.mean, self.std = (torch.tensor(v, dtype=torch.float32).view(-1, 1, 1) for v in (mean, std))

    def to(self, device: torch.device) -> Normal:
        """Move its numbers to the device; returns itself."""
        self.mean, self.std = self.mean.to(device), self.std.to(device)
        return self

    def __call__(self, x: Tensor) -> Tensor:
        return x.to(torch.float32, memory_format=torch.contiguous_format, copy=True).div_(255).sub_(self.mean).div_(self.std)

    @property
    def black(self) -> Tensor:
        """What a black pixel becomes: float32 (channels, 1, 1)."""
        return -self.mean / self.std


class CropFlip:
    """Each picture framed by `border` pixels of `fill`, cropped to its size anywhere in that, and mirrored half of the time.

    Called with pictures float (b, channels, height, width) and int64 (b,) drawn from [0, 2^62); the same draw gives the same crop.
    """

    def __init__(self, border: int, fill: Tensor):
        self.border, self.fill = border, fill

    def __call__(self, x: Tensor, draws: Tensor) -> Tensor:
        (b, channels, height, width), border, places = x.shape, self.border, 2 * self.border + 1
        framed = self.fill.expand(b, channels, height + 2 * border, width + 2 * border).clone()
        framed[:, :, border : border + height, border : border + width] = x
        down, right, flip = draws % places, draws // places % places, draws // places**2 % 2
        row = down[:, None] + torch.arange(height, device=x.device)
        column = torch.arange(width, device=x.device)
        column = right[:, None] + torch.where(flip[:, None] == 1, width - 1 - column, column)
        picture, channel = torch.arange(b, device=x.device), torch.arange(channels, device=x.device)
        return framed[picture[:, None, None, None], channel[:, None, None], row[:, None, :, None], column[:, None, None, :]]
