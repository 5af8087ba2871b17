"""Omniglot Rotation: handwritten characters of fifty alphabets, each in four rotations, twelve a task."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from subnet_pipelines.benchmarks.base import Benchmark, BenchmarkConfig, Rows
from subnet_pipelines.benchmarks.files import Source, data_folder, find
from subnet_pipelines.benchmarks.images import Normal, at_most
from subnet_pipelines.benchmarks.pictures import Tree, pictures
from subnet_pipelines.chance import stream
from subnet_pipelines.errors import Refusal

HOME = "https://github.com/brendenlake/omniglot/raw/master/python/"
SOURCES = {
    "images_background.zip": Source(HOME + "images_background.zip", "md5:68d2efa1b9178cc56df9314c21c6e718"),
    "images_evaluation.zip": Source(HOME + "images_evaluation.zip", "md5:6b91aef0f799c5bb55b94e3f2daec811"),
}
DRAWERS = 20  # of every character
PER_TASK, TRAIN = 12, 60  # characters of a task; training pictures of the 80 of a character, the others are for test


@functools.lru_cache(maxsize=1)
def load_omniglot(data_dir: Path) -> Tensor:
    """All characters in the order of their sorted paths, background before evaluation: uint8 (characters, 20, 32, 32), 0 is ink.

    Decoded to grey and reduced from 105 x 105 by Pillow's bicubic filter, as WSN's code does. Raises Refusal.
    """
    folders = ["omniglot", "omniglot-py", "."]
    unpacked = {zipped: [data_dir / folder / Path(zipped).stem for folder in folders] for zipped in SOURCES}
    paths = {zipped: next((path for path in there if path.is_dir()), None) for zipped, there in unpacked.items()}
    packed = [zipped for zipped, path in paths.items() if path is None]
    paths.update(zip(packed, find("Omniglot", packed, data_dir, folders, SOURCES)))
    found = []
    for path in paths.values():
        tree = Tree(path)
        names = [n for n in tree.names if n.endswith(".png")]
        characters: dict[str, int] = {}
        for n in names:
            character = n.rsplit("/", 1)[0]
            characters[character] = characters.get(character, 0) + 1
        for character, count in characters.items():
            if count != DRAWERS:
                raise Refusal(f"{tree.path}: {character} should hold {DRAWERS} pictures, holds {count}")
        if not names:
            raise Refusal(f"{tree.path}: holds no pictures ALPHABET/CHARACTER/NAME.png")
        found.append(pictures(tree, names, "PNG", "L", 105, 32).view(-1, DRAWERS, 32, 32))
    return torch.cat(found)


@dataclass(frozen=True)
class OmniglotConfig(BenchmarkConfig):
    """Omniglot Rotation."""

    tasks: int = 100
    """Length of the stream: its first N tasks."""


class OmniglotRotation(Benchmark):
    """Task i is characters 12 i to 12 i + 11; of a character's 80 pictures, in four rotations, 60 drawn from the seed are for training.

    The authors take characters as their file system lists them, here they are sorted; labels are 0 to 11 in every task.
    """

    name = "omniglot-rotation"
    Config = OmniglotConfig
    FIDELITY = {"sound": {}, "code": {"val_split": "train"}, "paper": {}}
    classes = PER_TASK
    input_shape = (1, 32, 32)

    def __init__(self, config: OmniglotConfig, seed: int, data_dir: Path | str | None = None, device: torch.device | str = "cpu"):
        super().__init__(config, seed, torch.device(device))
        drawn = load_omniglot(data_folder(data_dir))
        at_most(config, min(100, len(drawn) // PER_TASK), f"{self.name} with {len(drawn)} characters")
        drawn = drawn[: config.tasks * PER_TASK].to(self.device)
        turned = torch.cat([drawn.rot90(quarter, (2, 3)) for quarter in range(4)], 1)
        self.x = turned.reshape(-1, 1, 32, 32)
        each = turned.shape[1]
        self.y = (torch.arange(len(turned)) % PER_TASK).repeat_interleave(each).to(self.device)
        self.normal = Normal([0.0], [1.0]).to(self.device)

    def rows(self, i: int) -> tuple[Rows, Rows]:
        each = 4 * DRAWERS
        order = torch.rand(PER_TASK, each, generator=stream(self.seed, "rotations", i)).argsort(stable=True)
        order += each * (torch.arange(PER_TASK)[:, None] + i * PER_TASK)
        train, test = order[:, :TRAIN].flatten().sort().values, order[:, TRAIN:].flatten().sort().values
        return Rows(self.x, self.y, train.to(self.device)), Rows(self.x, self.y, test.to(self.device))

    def view(self, i: int) -> Callable[[Tensor], Tensor]:
        return self.normal
