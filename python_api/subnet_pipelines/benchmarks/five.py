"""5-Datasets: five sets of ten classes, one a task, all as 32 x 32 pictures of three colours."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from subnet_pipelines.benchmarks import cifar, mnist
from subnet_pipelines.benchmarks.base import Benchmark, BenchmarkConfig, Rows
from subnet_pipelines.benchmarks.files import Source, data_folder, find
from subnet_pipelines.benchmarks.idx import IDX_NAMES, read_labelled
from subnet_pipelines.benchmarks.images import Normal, at_most
from subnet_pipelines.benchmarks.mat import read_mat
from subnet_pipelines.errors import Refusal

SVHN = {
    "train_32x32.mat": Source("http://ufldl.stanford.edu/housenumbers/train_32x32.mat", "md5:e26dedcc434d2e4c54c9b2d4a06d8373"),
    "test_32x32.mat": Source("http://ufldl.stanford.edu/housenumbers/test_32x32.mat", "md5:eb5a983be6a315427106f1b164d9cef3"),
}
FASHION_SHA256 = (  # of the original downloads
    "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
    "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
    "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
    "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
)
FASHION = {
    name: Source(f"http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/{name}", f"sha256:{digest}")
    for name, digest in zip(IDX_NAMES, FASHION_SHA256)
}
Pair = tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]


def read_svhn(path: Path) -> tuple[Tensor, Tensor]:
    """A .mat file of SVHN: pictures uint8 (n, 3, 32, 32) and labels int64 (n,), where its 10 is a 0. Raises Refusal."""
    arrays = read_mat(path, ["X", "y"])
    x, y = arrays["X"], arrays["y"].flatten().astype(np.int64)
    if x.dtype != np.uint8 or x.shape[:3] != (32, 32, 3) or x.ndim != 4 or x.shape[3] == 0:
        raise Refusal(f"{path}: X should be bytes (32, 32, 3, n), is {x.dtype} {x.shape}")
    if len(y) != x.shape[3]:
        raise Refusal(f"{path}: has {x.shape[3]} pictures and {len(y)} labels")
    if y.min() < 1 or y.max() > 10:
        raise Refusal(f"{path}: labels should be 1 to 10, are {y.min()} to {y.max()}")
    return torch.from_numpy(np.ascontiguousarray(x.transpose(3, 2, 0, 1))), torch.from_numpy(y % 10)


def idx_set(title: str, data_dir: Path, folders: list[str], sources: dict[str, Source] | None = None) -> Pair:
    """A set in MNIST's format."""
    paths = find(title, IDX_NAMES, data_dir, folders, sources)
    return read_labelled(*paths[:2]), read_labelled(*paths[2:])


LOADERS: dict[str, Callable[[Path], Pair]] = {
    "cifar-10": cifar.load_cifar10,
    "mnist": mnist.load,
    "svhn": lambda data_dir: tuple(map(read_svhn, find("SVHN", list(SVHN), data_dir, ["svhn", "SVHN", "."], SVHN))),
    "fashion-mnist": lambda data_dir: idx_set("Fashion-MNIST", data_dir, ["fashion-mnist", "FashionMNIST/raw"], FASHION),
    "notmnist": lambda data_dir: idx_set("notMNIST", data_dir, ["notmnist", "notMNIST"]),
}
NORMALS = {  # means and deviations of WSN's code, which pads before it takes them but for notMNIST
    "cifar-10": (cifar.MEAN, cifar.STD),
    "mnist": ([0.1], [0.2752]),
    "svhn": ([0.4377, 0.4438, 0.4728], [0.198, 0.201, 0.197]),
    "fashion-mnist": ([0.2190], [0.3318]),
    "notmnist": ([0.4254], [0.4501]),
}


@functools.lru_cache(maxsize=len(LOADERS))
def load_set(name: str, data_dir: Path) -> Pair:
    """One of the five sets as (pictures, labels int64 (n,)) for training and test; grey ones uint8 (n, 28, 28). Raises Refusal."""
    return LOADERS[name](data_dir)


@dataclass(frozen=True)
class FiveConfig(BenchmarkConfig):
    """5-Datasets."""

    tasks: int = 5
    """Length of the stream: its first N tasks."""
    val_fraction: float = 0.05
    """Share of a task's training rows kept for validation; 0 trains on all of them."""
    sets: list[str] = field(default_factory=lambda: list(LOADERS))
    """The sets in the order of their tasks; as many tasks as sets unless tasks says fewer."""

    def check(self) -> None:
        super().check()
        if unknown := [name for name in self.sets if name not in LOADERS]:
            raise Refusal(f"sets must be of {', '.join(LOADERS)}, got {unknown[0]!r}")
        if len(set(self.sets)) < len(self.sets):
            raise Refusal(f"sets must be different ones, got {', '.join(self.sets)}")
        at_most(self, len(self.sets), "sets")


class FiveDatasets(Benchmark):
    """Task i is one of CIFAR-10, MNIST, SVHN, Fashion-MNIST and notMNIST; labels are 0 to 9 in every task."""

    name = "five-datasets"
    Config = FiveConfig
    FIDELITY = {"sound": {}, "code": {"val_split": "shuffle"}, "paper": {}}
    classes = 10
    input_shape = (3, 32, 32)

    def __init__(self, config: FiveConfig, seed: int, data_dir: Path | str | None = None, device: torch.device | str = "cpu"):
        super().__init__(config, seed, torch.device(device))
        self.sets = config.sets[: config.tasks]
        folder = data_folder(data_dir)
        loaded = {name: load_set(name, folder) for name in sorted(self.sets, key=lambda name: name != "notmnist")}  # see below
        self.parts = [[Rows(x.to(self.device), y.to(self.device)) for x, y in loaded[name]] for name in self.sets]
        self.normals = [Normal(*NORMALS[name]).to(self.device) for name in self.sets]

    def rows(self, i: int) -> tuple[Rows, Rows]:
        return tuple(self.parts[i])

    def title(self, i: int) -> str:
        return self.sets[i]

    def view(self, i: int) -> Callable[[Tensor], Tensor]:
        normal = self.normals[i]
        return normal if self.parts[i][0].x.dim() == 4 else lambda x: normal(framed(x))


def framed(x: Tensor) -> Tensor:
    """Grey pictures in a black frame of 2 pixels, three times: uint8 (m, 28, 28) -> (m, 3, 32, 32)."""
    return torch.nn.functional.pad(x, (2, 2, 2, 2))[:, None].expand(-1, 3, -1, -1)
