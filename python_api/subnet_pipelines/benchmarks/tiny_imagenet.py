"""TinyImageNet: 200 classes of ImageNet in 64 x 64 pixels, five a task."""

from __future__ import annotations

import functools
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from subnet_pipelines.benchmarks.files import Source, data_folder, find
from subnet_pipelines.benchmarks.images import ClassesConfig, ClassTasks, Normal
from subnet_pipelines.benchmarks.pictures import Tree, pictures
from subnet_pipelines.chance import stream
from subnet_pipelines.errors import Refusal

NAME = "tiny-imagenet-200"
SOURCE = Source(f"http://cs231n.stanford.edu/{NAME}.zip", "md5:90528d7ca1a48142e341f4ef8d21d0de")
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # of ImageNet; La-MAML's and WSN's code
PER_TASK = 5


@functools.lru_cache(maxsize=1)
def load_tiny_imagenet(data_dir: Path) -> tuple[list[str], tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The classes' names, sorted, and (pictures uint8 (n, 3, 64, 64), classes int64 (n,)) of the set's train and val. Raises Refusal."""
    folder = data_dir / NAME
    title = f"TinyImageNet (folder {NAME} or its zip)"
    tree = Tree(folder if folder.is_dir() else find(title, [f"{NAME}.zip"], data_dir, ["."], {f"{NAME}.zip": SOURCE})[0])
    try:
        classes = sorted(tree.read("wnids.txt").decode("ascii").split())
        lines = [line.split("\t") for line in tree.read("val/val_annotations.txt").decode("ascii").splitlines()]
    except UnicodeDecodeError:
        raise Refusal(f"{tree.path}: wnids.txt and val/val_annotations.txt should be plain text") from None
    number = {name: i for i, name in enumerate(classes)}
    train = [(n, n.split("/")[1]) for n in tree.names if n.startswith("train/") and n.endswith(".JPEG")]
    test = [(f"val/images/{line[0]}", line[1] if len(line) > 1 else "") for line in lines]
    for name, label in [*train, *test]:
        if label not in number:
            raise Refusal(f"{tree.path}: {name} is of class {label[:40]!r}, which wnids.txt does not list")
        if name not in tree:
            raise Refusal(f"{tree.path}: lacks {name}, which val/val_annotations.txt lists")
    if len(number) < len(classes) or not train or not test:
        raise Refusal(
            f"{tree.path}: should list different classes in wnids.txt and hold pictures train/CLASS/images/NAME.JPEG and val"
        )
    x = pictures(tree, [name for name, _ in [*train, *test]], "JPEG", "RGB", 64, 64)
    y = torch.tensor([number[label] for _, label in [*train, *test]])
    return classes, (x[: len(train)], y[: len(train)]), (x[len(train) :], y[len(train) :])


@dataclass(frozen=True)
class TinyConfig(ClassesConfig):
    """TinyImageNet in 40 tasks, as in La-MAML's, FS-DGPM's and WSN's code; the set's val is the test."""

    tasks: int = 40
    """Length of the stream: its first N tasks."""
    val_fraction: float = 0.1
    """Share of a task's training rows kept for validation; 0 trains on all of them."""
    order: Literal["stream", "python", "sorted"] = "stream"
    """Order of the classes: drawn from the run's seed, shuffled by Python's random at it (La-MAML's and WSN's code), or by name."""
    augment: Literal["none", "crop-flip"] = "crop-flip"
    """What training does to its pictures: nothing, or crops after a black border of 4 pixels and flips."""


class TinyImageNet(ClassTasks):
    """Task i is the next five classes of the order."""

    name = "tiny-imagenet"
    Config = TinyConfig
    FIDELITY = {"sound": {}, "code": {"labels": "global", "order": "python"}, "paper": {}}

    def __init__(self, config: TinyConfig, seed: int, data_dir: Path | str | None = None, device: torch.device | str = "cpu"):
        config.check()
        self.names, train, test = load_tiny_imagenet(data_folder(data_dir))
        total = len(self.names)
        order = list(range(total))
        if config.order == "stream":
            order = torch.randperm(total, generator=stream(seed, "classes")).tolist()
        if config.order == "python":
            random.Random(seed).shuffle(order)
        groups = [order[i : i + PER_TASK] for i in range(0, total - PER_TASK + 1, PER_TASK)]
        super().__init__(config, seed, torch.device(device), train, test, total, groups, Normal(MEAN, STD))
