"""Split ImageNet: 1,000 classes in 224 x 224 pixels, ten a task. The set fits in no memory: one task's pictures are there at a time."""

from __future__ import annotations

import csv
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from subnet_pipelines.benchmarks.base import Benchmark, Late, Rows, Task
from subnet_pipelines.benchmarks.files import data_folder, progress_bar
from subnet_pipelines.benchmarks.images import ClassesConfig, Normal, at_most
from subnet_pipelines.benchmarks.pictures import FILE, PIXELS, TOGETHER, sentence
from subnet_pipelines.benchmarks.tiny_imagenet import MEAN, STD
from subnet_pipelines.bounds import Count
from subnet_pipelines.chance import stream
from subnet_pipelines.errors import Refusal

FOLDERS = ("imagenet", "ILSVRC/Data/CLS-LOC", ".")
SOLUTION = "LOC_val_solution.csv"  # of the set's page at Kaggle: a picture of val, and its class first among its boxes
SHORT, SIDE = 256, 224  # short side of a picture as it is kept, side of what the model sees
LONGER = 64  # at most: a picture's long side over its short one
LEAST_AREA, LEAST_RATIO, TRIES = (
    0.08,
    3 / 4,
    10,
)  # of a training crop: torchvision's RandomResizedCrop, which the authors take as it is


# ---- files ----------------------------------------------------------------------------------------------------------


class ImageNet:
    """The set's files in the layout of ImageFolder: `classes`, the names of train's folders, sorted; `train` and `val` list pictures.

    val is in folders too, or flat beside LOC_val_solution.csv. Raises Refusal where there is no such set under data_dir.
    """

    def __init__(self, data_dir: Path):
        found = [data_dir / name for name in FOLDERS if all((data_dir / name / half).is_dir() for half in ("train", "val"))]
        if not found:
            raise Refusal(
                f"ImageNet: {data_dir / FOLDERS[0]} lacks train and val (no download is known: the set is given to those who register "
                f"with it); put them there, or name the folder that holds {FOLDERS[0]}/train with --data-dir"
            )
        self.folder = found[0]
        self.classes, kinds = (self._folders(half) for half in ("train", "val"))
        self._flat = None if kinds else self._solution(data_dir)

    def _folders(self, half: str) -> list[str]:
        """The folders in a half, sorted."""
        try:
            return sorted(entry.name for entry in os.scandir(self.folder / half) if entry.is_dir())
        except OSError as error:
            raise Refusal(f"{self.folder / half}: cannot be read ({sentence(error)})") from None

    def _solution(self, data_dir: Path) -> dict[str, list[str]]:
        """Pictures of val by class."""
        path = next((at / SOLUTION for at in (self.folder, data_dir) if (at / SOLUTION).is_file()), None)
        if path is None:
            raise Refusal(f"{self.folder / 'val'}: should hold a folder for each class, or {SOLUTION} lie in {self.folder}")
        try:
            with open(path, newline="", encoding="ascii") as file:
                lines = [line for line in csv.reader(file) if line][1:]
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise Refusal(f"{path}: cannot be read ({sentence(error)})") from None
        names: dict[str, list[str]] = {}
        known = set(self.classes)
        for line in lines:
            label = line[1].split(" ")[0] if len(line) > 1 else ""
            if label not in known:
                raise Refusal(f"{path}: {line[0][:40]!r} is of class {label[:40]!r}, of which train has no folder")
            names.setdefault(label, []).append(f"val/{Path(line[0]).name}.JPEG")
        return names

    def train(self, name: str) -> list[str]:
        """Training pictures of a class by their paths in the folder, sorted."""
        return self._pictures(f"train/{name}")

    def val(self, name: str) -> list[str]:
        """Test pictures of a class by their paths in the folder, sorted."""
        return self._pictures(f"val/{name}") if self._flat is None else sorted(self._flat.get(name, []))

    def _pictures(self, at: str) -> list[str]:
        try:
            names = os.listdir(self.folder / at)
        except OSError:
            names = []
        return [f"{at}/{name}" for name in sorted(names) if name.lower().endswith((".jpeg", ".jpg"))]

    def read(self, name: str) -> Tensor:
        """A picture, uint8 (height, width, 3), brought to SHORT on its short side by Pillow's bilinear filter. Raises Refusal."""
        path = self.folder / name
        try:
            with open(path, "rb") as file:
                data = file.read(FILE + 1)
        except OSError as error:
            raise Refusal(f"{path}: cannot be read ({sentence(error)})") from None
        if len(data) > FILE:
            raise Refusal(f"{path}: should be at most {FILE} bytes")
        try:
            with Image.open(BytesIO(data), formats=["JPEG", "PNG"]) as picture:  # one of the set's files is a PNG by another name
                width, height = picture.size
                if width * height > PIXELS or max(width, height) > LONGER * min(width, height):
                    raise Refusal(
                        f"{path}: should have at most {PIXELS} pixels and a long side at most {LONGER} times the short one, is "
                        f"{width} x {height}"
                    )
                short = min(width, height)
                size = int(SHORT * width / short), int(SHORT * height / short)
                return torch.from_numpy(np.array(picture.convert("RGB").resize(size, Image.Resampling.BILINEAR)))
        except Refusal:
            raise
        except Exception as error:  # Pillow's decoders raise what they like
            raise Refusal(f"{path}: is no picture that can be read ({sentence(error)})") from None

    def read_all(self, names: Sequence[str], device: torch.device, title: str) -> list[Tensor]:
        """`read` of these files, on the device."""
        bar = progress_bar(f"decoding {title}") if sys.stderr.isatty() else None
        if bar is not None:
            bar.total = len(names)
        made: list[Tensor] = []
        with ThreadPoolExecutor(os.cpu_count()) as pool:  # Pillow decodes without Python's lock
            for start in range(0, len(names), TOGETHER):
                made += [picture.to(device) for picture in pool.map(self.read, names[start : start + TOGETHER])]
                if bar is not None:
                    bar.update(len(names[start : start + TOGETHER]))
        if bar is not None:
            bar.close()
        return made


# ---- views ----------------------------------------------------------------------------------------------------------


class Pictures:
    """Pictures of different sizes, read when first asked for; indexed as a tensor of n rows is, which reads nothing.

    read: gives all of them as uint8 (height, width, 3); places int64 (n,) says which.
    """

    def __init__(self, read: Callable[[], Sequence[Tensor]], places: Tensor):
        self.read, self.places = read, places

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, places: slice | Tensor) -> Pictures:
        return Pictures(self.read, self.places[places if isinstance(places, slice) else places.cpu()])

    def rows(self) -> list[Tensor]:
        """The pictures themselves."""
        every = self.read()
        return [every[i] for i in self.places.tolist()]


def central(rows: Pictures) -> Tensor:
    """The middle of each picture: uint8 (n, 3, SIDE, SIDE)."""
    found = []
    for picture in rows.rows():
        top, left = (round((size - SIDE) / 2) for size in picture.shape[:2])
        found.append(picture[top : top + SIDE, left : left + SIDE])
    return torch.stack(found).permute(0, 3, 1, 2)


def random_parts(rows: Pictures, draws: Tensor) -> Tensor:
    """A part of each picture, mirrored half of the time, at SIDE x SIDE: float32 (n, 3, SIDE, SIDE) in [0, 255].

    draws int64 (n,) from [0, 2^62) say which part (`random_boxes`); resized by the bilinear filter, antialiased as Pillow's is.
    """
    pictures, found = rows.rows(), []
    boxes, mirrored = random_boxes(np.array([p.shape[:2] for p in pictures]), draws.cpu().numpy())
    for picture, (top, left, height, width), flip in zip(pictures, boxes.tolist(), mirrored.tolist()):
        part = picture[top : top + height, left : left + width].permute(2, 0, 1)[None].float()
        part = F.interpolate(part, (SIDE, SIDE), mode="bilinear", antialias=True)
        found.append(part.flip(3) if flip else part)
    return torch.cat(found)


def random_boxes(sizes: np.ndarray, draws: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Training crops of pictures of these sizes, as RandomResizedCrop and RandomHorizontalFlip of torchvision distribute them.

    A share of the picture's area from [.08, 1) and a ratio of the sides from [3/4, 4/3), log-uniform, are tried ten times; where none fits
    the box is the largest central one of such a ratio. sizes int64 (n, 2), height and width; draws int64 (n,) -> boxes int64 (n, 4) of
    top, left, height, width, and bool (n,), whether to mirror.
    """
    chance = uniforms(draws, 4 * TRIES + 1)
    share, shape, down, right = chance[:, 1:].reshape(len(draws), 4, TRIES).transpose(1, 0, 2)
    full_height, full_width = sizes[:, :1], sizes[:, 1:]
    area = full_height * full_width * (LEAST_AREA + (1 - LEAST_AREA) * share)
    ratio = LEAST_RATIO ** (1 - 2 * shape)
    height, width = np.rint(np.sqrt(area / ratio)), np.rint(np.sqrt(area * ratio))
    fits = (0 < height) & (height <= full_height) & (0 < width) & (width <= full_width)
    top, left = np.floor(down * (full_height - height + 1)), np.floor(right * (full_width - width + 1))
    tried = np.stack([top, left, height, width], -1)[np.arange(len(draws)), fits.argmax(1)]
    high = np.minimum(full_height, np.rint(full_width / LEAST_RATIO))
    wide = np.minimum(full_width, np.rint(full_height / LEAST_RATIO))
    middle = np.hstack([(full_height - high) // 2, (full_width - wide) // 2, high, wide])
    return np.where(fits.any(1, keepdims=True), tried, middle).astype(np.int64), chance[:, 0] < 0.5


def uniforms(draws: np.ndarray, count: int) -> np.ndarray:
    """`count` numbers in [0, 1) of each draw, by SplitMix64 (Steele et al., OOPSLA 2014): int64 (n,) -> float64 (n, count)."""
    z = draws.astype(np.uint64)[:, None] + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((z ^ (z >> np.uint64(31))) >> np.uint64(11)) * 2.0**-53


# ---- the stream -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ImageNetConfig(ClassesConfig):
    """Split ImageNet, as in SupSup's code; the set's val is the test."""

    tasks: int = 100
    """Length of the stream: its first N tasks."""
    classes_per_task: Count = 10
    """Classes of a task."""
    order: Literal["stream", "numpy", "sorted"] = "stream"
    """Order of the classes: drawn from the run's seed, numpy's permutation at 1 whatever the seed (SupSup's code), or by name."""
    augment: Literal["none", "crop-flip"] = "crop-flip"
    """What training does to its pictures: takes their middle as the test does, or parts of 8 to 100 % of their area, and flips."""


class ImageNetSplit(Benchmark):
    """Task i is the next classes_per_task of ImageNet's classes, its pictures decoded when it is first trained on or tested."""

    name = "imagenet-split"
    Config = ImageNetConfig
    FIDELITY = {"sound": {}, "code": {"order": "numpy"}, "paper": {}}
    input_shape = (3, SIDE, SIDE)

    def __init__(self, config: ImageNetConfig, seed: int, data_dir: Path | str | None = None, device: torch.device | str = "cpu"):
        super().__init__(config, seed, torch.device(device))
        self.files = ImageNet(data_folder(data_dir))
        total, each = len(self.files.classes), config.classes_per_task
        at_most(config, total // each, f"{self.name} with {total} classes")
        order = list(range(total))
        if config.order == "stream":
            order = torch.randperm(total, generator=stream(seed, "classes")).tolist()
        if config.order == "numpy":
            order = np.random.RandomState(1).permutation(total).tolist()
        self.groups = [order[i * each : (i + 1) * each] for i in range(config.tasks)]
        self.classes = total if config.labels == "global" else each
        self.normal = Normal(MEAN, STD).to(self.device)
        self._held: dict[str, tuple[int, list[Tensor]]] = {}  # of each half the pictures of one task
        for i, group in enumerate(self.groups):  # now, and not days later
            for half, title in (("train", "training"), ("val", "test")):
                for c in group:
                    if not getattr(self.files, half)(self.files.classes[c]):
                        raise Refusal(f"{self.name}: class {self.files.classes[c]}, of task {i}, has no {title} picture")

    def rows(self, i: int) -> tuple[Rows, Rows]:
        return self._half("train", i), self._half("val", i)

    def _half(self, half: str, i: int) -> Rows:
        names, labels = [], []
        for place, c in enumerate(self.groups[i]):
            found = getattr(self.files, half)(self.files.classes[c])
            names += found
            labels += [c if self.config.labels == "global" else place] * len(found)
        pictures = Pictures(lambda: self.hold(half, i, names), torch.arange(len(names)))
        return Rows(pictures, torch.tensor(labels, device=self.device))

    def hold(self, half: str, i: int, names: Sequence[str]) -> list[Tensor]:
        """The pictures of a half of task i, which take the place of the last task's."""
        if self._held.get(half, (None,))[0] != i:
            self._held.pop(half, None)  # before the next are read: two tasks' pictures are never there
            self._held[half] = i, self.files.read_all(names, self.device, f"{half} of {self.title(i)}")
        return self._held[half][1]

    def view(self, i: int) -> Callable[[Pictures], Late]:
        return lambda rows: Late(rows, lambda some: self.normal(central(some)), (len(rows), *self.input_shape), self.device)

    def augment(self, i: int) -> Callable[[Pictures, Tensor], Tensor] | None:
        return (lambda rows, draws: self.normal(random_parts(rows, draws))) if self.config.augment == "crop-flip" else None

    def union(self) -> Task:
        raise Refusal(
            f"{self.name} cannot be learnt as one task: the pictures of all its tasks would have to be in memory at once"
        )
