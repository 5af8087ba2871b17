"""CIFAR-10 and CIFAR-100 in their binary version, and the task streams made of CIFAR-100."""

from __future__ import annotations

import functools
import gzip
import io
import tarfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
import torch
from torch import Tensor

from subnet_pipelines.benchmarks.files import Source, data_folder, find
from subnet_pipelines.benchmarks.images import ClassesConfig, ClassTasks, Normal, at_most
from subnet_pipelines.chance import stream
from subnet_pipelines.errors import Refusal

PIXELS = 3 * 32 * 32
LIMIT = 50_000  # records of a file; the largest has so many
ARCHIVE = 1 << 28  # bytes of an unpacked archive; the larger has 184 million
MEAN, STD = [v / 255 for v in (125.3, 123.0, 113.9)], [v / 255 for v in (63.0, 62.1, 66.7)]  # GPM's and WSN's code, on both sets
HOME = "https://www.cs.toronto.edu/~kriz/"  # its page prints these sums
ROUNDED = [0.491, 0.482, 0.447], [0.247, 0.243, 0.262]  # CIFAR-10's own mean and deviation, in SupSup's code of CIFAR-100 too
CIFAR10 = ("cifar-10-batches-bin", "cifar-10-binary.tar.gz", "md5:c32a1d4ab5d03f1284b67883e8d87530")
CIFAR100 = ("cifar-100-binary", "cifar-100-binary.tar.gz", "md5:03b5dce01913d631647c71ecec9e9cb8")


def read_records(file: BinaryIO, size: int, where: str, labels: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """The records of a CIFAR binary file of `size` bytes: pictures uint8 (n, 3, 32, 32) and labels int64 (n, len(labels)).

    labels: how many values each label byte before a picture may have, (10,) or, coarse and fine, (20, 100). Raises Refusal, naming
    `where`, unless the file is whole records with such labels.
    """
    record = len(labels) + PIXELS
    if size == 0 or size % record or size > LIMIT * record:
        raise Refusal(f"{where}: should be 1 to {LIMIT} records of {record} bytes, has {size} bytes")
    data = file.read(size)
    if len(data) != size:
        raise Refusal(f"{where}: is cut short: {size} bytes are promised, {len(data)} are there")
    records = torch.from_numpy(np.frombuffer(bytearray(data), dtype=np.uint8)).view(-1, record)
    found = records[:, : len(labels)].long()
    for place, count in enumerate(labels):
        if (top := int(found[:, place].max())) >= count:
            raise Refusal(f"{where}: label byte {place} should be below {count}, one is {top}")
    return records[:, len(labels) :].reshape(-1, 3, 32, 32), found


def read_files(title: str, source: tuple[str, str, str], names: list[str], labels: tuple[int, ...], data_dir: Path) -> list:
    """`read_records` of the named files: from the set's folder in data_dir, else from its archive there, else from the one downloaded.

    source: folder, archive and the archive's checksum. Archives are read where they are; nothing is unpacked.
    """
    folder, archive, checksum = source
    try:
        if (data_dir / folder).is_dir():
            parts = []
            for path in find(title, names, data_dir, [folder]):
                with open(path, "rb") as file:
                    parts.append(read_records(file, path.stat().st_size, str(path), labels))
            return parts
        title = f"{title} (folder {folder} or its archive)"
        (path,) = find(title, [archive], data_dir, ["."], {archive: Source(HOME + archive, checksum)})
        return _read_archive(path, names, labels)
    except OSError as error:
        raise Refusal(f"{error.filename or data_dir / folder}: cannot be read ({error.strerror or error})") from None


class Unpacked:
    """A gzipped file read from front to end, up to the size that the archives have."""

    def __init__(self, file: gzip.GzipFile):
        self.file, self.left = file, ARCHIVE

    def read(self, size: int) -> bytes:
        """The next bytes. Raises Refusal where the file unpacks to more than ARCHIVE."""
        data = self.file.read(size)
        self.left -= len(data)
        if self.left < 0:
            raise Refusal(f"{self.file.name}: unpacks to more than {ARCHIVE} bytes, which no archive of CIFAR does")
        return data


def _read_archive(path: Path, names: list[str], labels: tuple[int, ...]) -> list:
    found, limit = {}, LIMIT * (len(labels) + PIXELS)
    try:
        with gzip.open(path) as file, tarfile.open(fileobj=Unpacked(file), mode="r|") as tar:
            for member in tar:
                name = Path(member.name).name
                if name in names and member.isreg() and name not in found:
                    if member.size > limit:
                        raise Refusal(f"{path}: {name} should have at most {limit} bytes, has {member.size}")
                    data = tar.extractfile(member).read(member.size)
                    found[name] = read_records(io.BytesIO(data), member.size, f"{path}, {name}", labels)
    except Refusal:
        raise
    except (tarfile.TarError, gzip.BadGzipFile, EOFError, zlib.error, ValueError) as error:
        raise Refusal(f"{path}: is damaged or cut short ({error})") from None
    if missing := [name for name in names if name not in found]:
        raise Refusal(f"{path}: lacks {', '.join(missing)}")
    return [found[name] for name in names]


@functools.lru_cache(maxsize=1)
def load_cifar10(data_dir: Path) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """CIFAR-10 as (pictures uint8 (n, 3, 32, 32), labels int64 (n,)) for training and test. Raises Refusal."""
    names = [f"data_batch_{i}.bin" for i in range(1, 6)]
    *train, test = read_files("CIFAR-10", CIFAR10, [*names, "test_batch.bin"], (10,), data_dir)
    x, y = (torch.cat(parts) for parts in zip(*train))
    return (x, y[:, 0]), (test[0], test[1][:, 0])


@functools.lru_cache(maxsize=1)
def load_cifar100(data_dir: Path) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """CIFAR-100 as (pictures uint8 (n, 3, 32, 32), labels int64 (n, 2), coarse and fine) for training and test. Raises Refusal."""
    return tuple(read_files("CIFAR-100", CIFAR100, ["train.bin", "test.bin"], (20, 100), data_dir))


@dataclass(frozen=True)
class SplitConfig(ClassesConfig):
    """Split CIFAR-100; as in GPM's and WSN's code, ten tasks of ten classes."""

    classes_per_task: int = 10
    """Classes of a task, which must divide 100; SupSup's 20 tasks have 5."""
    order: Literal["numeric", "stream", "numpy"] = "numeric"
    """Whose classes come first: the set's numbers (WSN's code), drawn from the run's seed, or numpy's permutation at it (SupSup's code)."""

    def check(self) -> None:
        super().check()
        if self.classes_per_task < 1 or 100 % self.classes_per_task:
            raise Refusal(f"classes_per_task must divide 100, got {self.classes_per_task}")


class CIFAR100Split(ClassTasks):
    """Task i is the next classes_per_task of CIFAR-100's 100 classes."""

    name = "cifar100-split"
    Config = SplitConfig
    FIDELITY = {"sound": {}, "code": {"labels": "global", "val_split": "shuffle"}, "paper": {}}
    normal_of = MEAN, STD

    def __init__(self, config: SplitConfig, seed: int, data_dir: Path | str | None = None, device: torch.device | str = "cpu"):
        config.check()
        train, test = ((x, y[:, 1]) for x, y in load_cifar100(data_folder(data_dir)))
        order = torch.arange(100)
        if config.order == "stream":
            order = torch.randperm(100, generator=stream(seed, "classes"))
        if config.order == "numpy":
            order = torch.from_numpy(np.random.RandomState(seed).permutation(100))
        groups = order.view(-1, config.classes_per_task).tolist()
        super().__init__(config, seed, torch.device(device), train, test, 100, groups, Normal(*self.normal_of))


@dataclass(frozen=True)
class Split20Config(SplitConfig):
    """Split CIFAR-100 as BatchE and SupSup have it: twenty tasks of five classes, crops and flips."""

    tasks: int = 20
    classes_per_task: int = 5
    order: Literal["numeric", "stream", "numpy"] = "stream"
    augment: Literal["none", "crop-flip"] = "crop-flip"


class CIFAR100Split20(CIFAR100Split):
    """Task i is the next five of CIFAR-100's classes in an order drawn from the seed; mean and deviation are those of SupSup's code."""

    name = "cifar100-split-20"
    Config = Split20Config
    FIDELITY = {"sound": {}, "code": {"order": "numpy"}, "paper": {}}
    normal_of = ROUNDED


ORDERS = {  # of the coarse classes: Yoon et al. (APD), as in WSN's code, t_order 0 to 4
    "A": [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19],
    "B": [15, 12, 5, 9, 7, 16, 18, 17, 1, 0, 3, 8, 11, 14, 10, 6, 2, 4, 13, 19],
    "C": [17, 1, 19, 18, 12, 7, 6, 0, 11, 15, 10, 5, 13, 3, 9, 16, 4, 14, 2, 8],
    "D": [11, 9, 6, 5, 12, 4, 0, 10, 13, 7, 14, 3, 15, 16, 8, 1, 2, 19, 18, 17],
    "E": [6, 14, 0, 11, 12, 17, 13, 4, 9, 1, 7, 19, 8, 10, 3, 15, 18, 5, 2, 16],
}
COARSE = (
    "aquatic mammals", "fish", "flowers", "food containers", "fruit and vegetables", "household electrical devices",
    "household furniture", "insects", "large carnivores", "large man-made outdoor things", "large natural outdoor scenes",
    "large omnivores and herbivores", "medium-sized mammals", "non-insect invertebrates", "people", "reptiles", "small mammals",
    "trees", "vehicles 1", "vehicles 2",
)  # fmt: skip


@dataclass(frozen=True)
class SuperclassConfig(ClassesConfig):
    """CIFAR-100 Superclass."""

    tasks: int = 20
    """Length of the stream: its first N tasks."""
    order: Literal["A", "B", "C", "D", "E"] = "A"
    """Which of five fixed orders of the 20 coarse classes (Yoon et al.; WSN's launcher takes A)."""
    pixels: Literal["planes", "interleaved"] = "planes"
    """The bytes of a picture as the set stores them, a plane a colour; or read as if the colours of a pixel lay together, which mixes
    colours, rows and columns of every picture (WSN's code)."""


def fine_classes(labels: Tensor, coarse: list[int]) -> list[list[int]]:
    """The five fine classes of each of these coarse ones, ascending. labels int64 (n, 2), coarse and fine. Raises Refusal."""
    pairs = labels.unique(dim=0)
    if len(twice := pairs[:, 1][pairs[:, 1].bincount()[pairs[:, 1]] > 1]):
        raise Refusal(
            f"CIFAR-100: fine class {int(twice[0])} should have one coarse class, has {twice.tolist().count(int(twice[0]))}"
        )
    groups = [pairs[pairs[:, 0] == c, 1].tolist() for c in coarse]
    for c, group in zip(coarse, groups):
        if len(group) != 5:
            raise Refusal(f"CIFAR-100: coarse class {c} should have 5 fine classes, has {len(group)}")
    return groups


class CIFAR100Superclass(ClassTasks):
    """Task i is one of CIFAR-100's 20 coarse classes with its five fine ones; pixels in [0, 1], not normalised further."""

    name = "cifar100-superclass"
    Config = SuperclassConfig
    FIDELITY = {"sound": {}, "code": {"labels": "global", "val_split": "shuffle", "pixels": "interleaved"}, "paper": {}}

    def __init__(
        self, config: SuperclassConfig, seed: int, data_dir: Path | str | None = None, device: torch.device | str = "cpu"
    ):
        config.check()
        at_most(config, len(COARSE), self.name)
        train, test = load_cifar100(data_folder(data_dir))
        self.coarse = ORDERS[config.order][: config.tasks]
        groups = fine_classes(torch.cat([train[1], test[1]]), self.coarse)
        train, test = ((x, y[:, 1]) for x, y in (train, test))
        super().__init__(config, seed, torch.device(device), train, test, 100, groups, Normal([0.0], [1.0]))

    def title(self, i: int) -> str:
        return COARSE[self.coarse[i]]

    def view(self, i: int) -> Callable[[Tensor], Tensor]:
        if self.config.pixels == "planes":
            return self.normal
        return lambda x: self.normal(x.reshape(-1, 32, 32, 3).permute(0, 3, 1, 2))
