"""MNIST task streams: permutations of the pixels, rotations of the picture, pairs of digits."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from subnet_pipelines.benchmarks.base import Benchmark, BenchmarkConfig
from subnet_pipelines.benchmarks.files import Source, data_folder, find
from subnet_pipelines.benchmarks.idx import IDX_NAMES, read_labelled
from subnet_pipelines.benchmarks.images import ClassTasks
from subnet_pipelines.chance import stream
from subnet_pipelines.errors import Refusal

MINI = Path(__file__).parent.parent / "data" / "mnist-mini"
MIRROR = "https://ossci-datasets.s3.amazonaws.com/mnist/"
SHA256 = (  # of the original downloads
    "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
    "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
    "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
    "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
)
SOURCES = {name: Source(MIRROR + name, f"sha256:{digest}") for name, digest in zip(IDX_NAMES, SHA256)}
MEAN, STD = 0.1307, 0.3081  # of MNIST's pixels; both papers' code


@functools.lru_cache(maxsize=4)
def load(data_dir: Path | None) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """MNIST as (images uint8 (n, 28, 28), labels int64 (n,)) for training and test; the shipped subset where data_dir is None.

    The files are looked for in data_dir/mnist, data_dir/MNIST/raw and data_dir, gzipped or not, and downloaded where they are missing.
    Raises Refusal where one cannot be had, is damaged, or does not fit the other.
    """
    if data_dir is None:
        paths = find("MNIST", IDX_NAMES, MINI, ["."])
    else:
        paths = find("MNIST", IDX_NAMES, data_dir, ["mnist", "MNIST/raw", "."], SOURCES)
    return read_labelled(*paths[:2]), read_labelled(*paths[2:])


def gather_view(index: Tensor | None) -> Callable[[Tensor], Tensor]:
    """The view that takes pixel index[i] (784 is a black one) for pixel i, and normalises. uint8 (m, 784) -> float32 (m, 784)."""
    if index is not None:
        inside, outside = index.clamp(max=783), (index == 784).nonzero().flatten()

    def view(rows: Tensor) -> Tensor:
        if index is not None:
            rows = columns(rows, inside)
            if len(outside):
                rows[:, outside] = 0
        return rows.to(torch.float32).div_(255).sub_(MEAN).div_(STD)

    return view


def columns(rows: Tensor, index: Tensor) -> Tensor:
    """rows[:, index], uint8 (m, n) and int64 (k,) -> uint8 (m, k); numpy's take is three times as fast as torch's on a CPU."""
    if rows.device.type != "cpu":
        return rows.index_select(1, index)
    return torch.from_numpy(np.take(rows.numpy(), index.numpy(), axis=1))


class MNIST(Benchmark):
    """Base of the MNIST streams: ten classes, 784 pixels; `mini` is the shipped subset."""

    mini = False
    classes = 10
    input_shape = (784,)

    def __init__(self, config, seed: int, data_dir: Path | None = None, device: torch.device | str = "cpu"):
        self.data_dir = data_dir
        parts = load(None if self.mini else data_folder(data_dir))
        super().__init__(config, seed, torch.device(device), *((images.flatten(1), labels) for images, labels in parts))


@dataclass(frozen=True)
class PermutedConfig(BenchmarkConfig):
    """Permuted MNIST; every task, the first included, permutes the pixels."""

    permutation: Literal["stream", "numpy", "sklearn"] = "stream"
    """Where task i's permutation comes from: a stream of (seed, i); numpy's at seed + i (SupSup's code: seeds overlap); sklearn's shuffle
    at 100 r + i with r from the shuffled task numbers (WSN's code)."""


class PermutedMNIST(MNIST):
    """Task i is MNIST with the pixels in its own order."""

    name = "permuted-mnist"
    Config = PermutedConfig

    def permutation(self, i: int) -> Tensor:
        """Task i's order of the pixels, int64 (784,): pixel k of the view is pixel permutation[k] of the picture."""
        if self.config.permutation == "stream":
            return torch.randperm(784, generator=stream(self.seed, "permutation", i))
        if self.config.permutation == "numpy":
            return torch.from_numpy(np.random.RandomState(self.seed + i).permutation(784))
        tasks = np.random.RandomState(self.seed).permutation(len(self))
        return torch.from_numpy(np.random.RandomState(int(tasks[i]) * 100 + i).permutation(784))

    def view(self, i: int) -> Callable[[Tensor], Tensor]:
        return gather_view(self.permutation(i).to(self.device))


class PermutedMNISTMini(PermutedMNIST):
    """The same over the shipped 4,000 + 1,000 images."""

    name = "permuted-mnist-mini"
    mini = True


@dataclass(frozen=True)
class RotatedConfig(BenchmarkConfig):
    """Rotated MNIST."""

    tasks: int = 36
    """Length of the stream: its first N tasks."""
    angle_step: float = 10.0
    """Degrees between a task and the next; SupSup's 36 tasks lie 10 degrees apart."""
    angles: list[float] | None = None
    """The angle of every task, in degrees, instead of angle_step; as many tasks as angles unless tasks says fewer."""

    def check(self) -> None:
        super().check()
        if self.angles is not None and self.tasks > len(self.angles):
            raise Refusal(f"tasks is {self.tasks} but angles lists only {len(self.angles)}")


class RotatedMNIST(MNIST):
    """Task i is MNIST rotated counter-clockwise by its angle, nearest neighbour, black outside."""

    name = "rotated-mnist"
    Config = RotatedConfig

    def angle(self, i: int) -> float:
        """Task i's angle in degrees."""
        return self.config.angles[i] if self.config.angles is not None else i * self.config.angle_step

    def title(self, i: int) -> str:
        return f"{self.angle(i):g} degrees"

    def view(self, i: int) -> Callable[[Tensor], Tensor]:
        return gather_view(rotation(self.angle(i)).to(self.device))


def rotation(angle: float) -> Tensor:
    """Pillow's nearest-neighbour rotation of a 28 x 28 picture as a gather: int64 (784,), 784 for what comes from outside."""
    numbers = Image.fromarray(np.arange(1, 785, dtype=np.int32).reshape(28, 28))
    turned = np.asarray(numbers.rotate(angle, Image.Resampling.NEAREST), dtype=np.int64).reshape(784)
    return torch.from_numpy(np.where(turned == 0, 784, turned - 1))


class RotatedMNISTMini(RotatedMNIST):
    """The same over the shipped 4,000 + 1,000 images."""

    name = "rotated-mnist-mini"
    mini = True


@dataclass(frozen=True)
class SplitMNISTConfig(BenchmarkConfig):
    """Split MNIST."""

    tasks: int = 5
    """Length of the stream: its first N tasks."""
    labels: Literal["local", "global"] = "local"
    """A task's labels: 0 and 1, or the digits themselves with heads as wide as all ten (SupSup's code)."""


class SplitMNIST(ClassTasks):
    """Task i is MNIST's digits 2 i and 2 i + 1."""

    name = "split-mnist"
    Config = SplitMNISTConfig
    FIDELITY = {"sound": {}, "code": {"labels": "global"}, "paper": {}}
    mini = False

    def __init__(self, config: SplitMNISTConfig, seed: int, data_dir: Path | None = None, device: torch.device | str = "cpu"):
        config.check()
        train, test = ((x.flatten(1), y) for x, y in load(None if self.mini else data_folder(data_dir)))
        pairs = [(c, c + 1) for c in range(0, 10, 2)]
        super().__init__(config, seed, torch.device(device), train, test, 10, pairs, None)

    def title(self, i: int) -> str:
        return f"digits {2 * i} and {2 * i + 1}"

    def view(self, i: int) -> Callable[[Tensor], Tensor]:
        return gather_view(None)

    def augment(self, i: int) -> None:
        return None


class SplitMNISTMini(SplitMNIST):
    """The same over the shipped 4,000 + 1,000 images."""

    name = "split-mnist-mini"
    mini = True
