"""MNIST task streams: permutations of the pixels, rotations of the picture."""

from __future__ import annotations

import functools
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from subnet_kernels.files import write_atomic
from subnet_pipelines.benchmarks.base import Benchmark, BenchmarkConfig
from subnet_pipelines.benchmarks.idx import read_idx
from subnet_pipelines.chance import stream
from subnet_pipelines.errors import Refusal

MINI = Path(__file__).parent.parent / "data" / "mnist-mini"
MIRROR = "https://ossci-datasets.s3.amazonaws.com/mnist/"
SHA256 = {  # of the original downloads
    "train-images-idx3-ubyte.gz": "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
    "train-labels-idx1-ubyte.gz": "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
    "t10k-images-idx3-ubyte.gz": "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
    "t10k-labels-idx1-ubyte.gz": "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
}
MEAN, STD = 0.1307, 0.3081  # of MNIST's pixels; both papers' code


def default_data_dir() -> Path:
    """$SUBNET_DATA_DIR, else the user's cache."""
    if found := os.environ.get("SUBNET_DATA_DIR"):
        return Path(found).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "subnet-kernels"


def find(name: str, data_dir: Path) -> Path:
    """The file of that official name under data_dir/mnist, data_dir/MNIST/raw or data_dir, gzipped or not; else it is downloaded.

    Raises Refusal naming the file and where to put it.
    """
    folders = [data_dir / "mnist", data_dir / "MNIST" / "raw", data_dir]
    for folder in folders:
        for candidate in (folder / name, folder / name.removesuffix(".gz")):
            if candidate.is_file():
                return candidate
    import pooch  # here, as it is only needed by those who lack the data

    try:
        pooch.get_logger().setLevel("ERROR")
        with tempfile.TemporaryDirectory() as temporary:
            bar = _bar() if sys.stderr.isatty() else False
            got = pooch.retrieve(MIRROR + name, f"sha256:{SHA256[name]}", name, temporary, progressbar=bar)
            folders[0].mkdir(parents=True, exist_ok=True)
            write_atomic(folders[0] / name, Path(got).read_bytes())
        return folders[0] / name
    except Exception as error:
        reason = str(error) if isinstance(error, ValueError) else f"{type(error).__name__} at {MIRROR}"
        raise Refusal(
            f"MNIST: {name} is not in {folders[0]} and could not be downloaded ({reason}): "
            f"put it there, or name the folder that holds mnist/{name} with --data-dir"
        ) from None


def _bar() -> object:
    """A progress bar with the three methods that pooch calls, drawn by rich."""
    from rich.progress import Progress

    class Bar:
        total = 0

        def __init__(self):
            self.progress = Progress(transient=True)
            self.task = None

        def update(self, n: int) -> None:
            if self.task is None:
                self.progress.start()
                self.task = self.progress.add_task("downloading", total=self.total)
            self.progress.update(self.task, advance=n)

        def reset(self) -> None:
            if self.task is not None:
                self.progress.reset(self.task)

        def close(self) -> None:
            self.progress.stop()

    return Bar()


@functools.lru_cache(maxsize=4)
def load(folder: Path | None) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """MNIST as (images uint8 (n, 784), labels int64 (n,)) for training and test; the shipped subset where folder is None.

    Raises Refusal where a file is missing, damaged, or does not fit the other.
    """
    parts = []
    for half in ("train", "t10k"):
        names = f"{half}-images-idx3-ubyte.gz", f"{half}-labels-idx1-ubyte.gz"
        images_at, labels_at = (MINI / n if folder is None else find(n, folder) for n in names)
        images, labels = read_idx(images_at, 3), read_idx(labels_at, 1)
        if images.shape[1:] != (28, 28):
            raise Refusal(f"{images_at}: images should be 28 x 28, are {images.shape[1]} x {images.shape[2]}")
        if len(images) != len(labels):
            raise Refusal(f"{images_at}: has {len(images)} images, {labels_at.name} has {len(labels)} labels")
        if len(labels) == 0 or labels.max() > 9:
            raise Refusal(f"{labels_at}: labels should be 0 to 9 and there be at least one")
        parts.append((images.flatten(1), labels.long()))
    return parts[0], parts[1]


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
        folder = None if self.mini else Path(data_dir or default_data_dir()).expanduser()
        super().__init__(config, seed, torch.device(device), *load(folder))


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
