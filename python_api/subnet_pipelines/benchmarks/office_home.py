"""Office-Home (Venkateswara et al., CVPR 2017), and LASEM's stream of it: thirteen classes a task, of products and then of photographs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from subnet_pipelines.benchmarks.base import Benchmark, BenchmarkConfig, Rows
from subnet_pipelines.benchmarks.files import data_folder, find
from subnet_pipelines.benchmarks.images import Normal, at_most
from subnet_pipelines.benchmarks.pictures import FILE, Tree, pictures
from subnet_pipelines.bounds import Part
from subnet_pipelines.chance import stream
from subnet_pipelines.errors import Refusal

NAME = "OfficeHomeDataset_10072016"
SIDE = 128
DOMAINS = (
    ("Product",),
    ("Real World", "RealWorld", "Real_World"),
)  # in the order of the tasks, by the names that the folder may have
GROUPS = tuple(
    line.split()
    for line in (  # each task's classes, the same in both domains (Lifelong-ML/LASEM c4ec052, gen_data.py, where they were drawn once)
        "TV Sneakers Soda Telephone Radio Calendar Bottle Speaker Exit_Sign Scissors Bed Spoon Couch",
        "Trash_Can Fan Flipflops Mop Webcam Push_Pin Helmet Chair Oven Eraser Flowers Monitor Knives",
        "Refrigerator Desk_Lamp Screwdriver Bucket Pan Lamp_Shade Bike Mouse Printer Paper_Clip Drill Curtains Clipboards",
        "Candles Keyboard Backpack Postit_Notes Marker Hammer Glasses Laptop Sink Computer Pencil Notebook ToothBrush",
        "Kettle Batteries Ruler Mug File_Cabinet Folder Table Fork Shelf Toys Calculator Alarm_Clock Pen",
    )
)


@functools.lru_cache(maxsize=1)
def load_office_home(data_dir: Path) -> tuple[Tensor, dict[tuple[str, str], list[int]]]:
    """The pictures of the two domains, uint8 (n, 3, 128, 128), and the row numbers of each domain, by its first name, and class.

    Resized to 128 x 128 whatever their ratio, as in LASEM's code, by Pillow's bicubic filter. Raises Refusal.
    """
    folder = data_dir / NAME
    tree = Tree(
        folder if folder.is_dir() else find(f"Office-Home (folder {NAME} or its zip)", [f"{NAME}.zip"], data_dir, ["."])[0], FILE
    )
    names: list[str] = []
    rows: dict[tuple[str, str], list[int]] = {}
    for known in DOMAINS:
        for path in (name.split("/") for name in tree.names):
            if len(path) == 3 and path[0] in known and path[2].lower().endswith((".jpg", ".jpeg")):
                rows.setdefault((known[0], path[1]), []).append(len(names))
                names.append("/".join(path))
        if not any(domain == known[0] for domain, _ in rows):
            raise Refusal(f"{tree.path}: should hold pictures {known[0]}/CLASS/NAME.jpg, holds none")
    return pictures(tree, names, "JPEG", "RGB", None, SIDE), rows


@dataclass(frozen=True)
class OfficeHomeConfig(BenchmarkConfig):
    """Office-Home in tasks of thirteen classes."""

    val_fraction: float = 1 / 7
    """Share of a task's training rows kept for validation; 0 trains on all of them (a seventh is 10 % of all rows, as in LASEM's code)."""
    test_fraction: Part = 0.3
    """Share of each class's pictures that is the test, drawn from the run's seed; LASEM's is .3."""


class OfficeHome(Benchmark):
    """Tasks 0 to 4 are the 65 classes of the domain Product in five groups, 5 to 9 the same groups of the domain Real World.

    Pixels are in [0, 1] and not normalised, as in LASEM's code.
    """

    name = "office-home"
    Config = OfficeHomeConfig
    classes = len(GROUPS[0])
    input_shape = (3, SIDE, SIDE)

    def __init__(
        self, config: OfficeHomeConfig, seed: int, data_dir: Path | str | None = None, device: torch.device | str = "cpu"
    ):
        super().__init__(config, seed, torch.device(device))
        at_most(config, len(DOMAINS) * len(GROUPS), self.name)
        x, rows = load_office_home(data_folder(data_dir))
        x, self.normal, self.parts = x.to(self.device), Normal([0.0], [1.0]).to(self.device), []
        y = torch.empty(len(x), dtype=torch.int64)
        for i in range(config.tasks):
            halves: tuple[list[Tensor], list[Tensor]] = ([], [])
            for label, title in enumerate(self.group(i)):
                mine = torch.tensor(rows.get((self.domain(i), title), []), dtype=torch.int64)
                test = round(config.test_fraction * len(mine))
                if not 0 < test < len(mine):
                    raise Refusal(
                        f"{self.name}: class {title} of {self.domain(i)}, of task {i}, should have pictures for training and test, "
                        f"has {len(mine)} in all"
                    )
                y[mine] = label
                mixed = mine[torch.randperm(len(mine), generator=stream(seed, "test", i, label))]
                halves[0].append(mixed[test:].sort().values)
                halves[1].append(mixed[:test].sort().values)
            self.parts.append([torch.cat(half).to(self.device) for half in halves])
        self.x, self.y = x, y.to(self.device)

    def domain(self, i: int) -> str:
        """Task i's domain, by the first of its names."""
        return DOMAINS[i // len(GROUPS)][0]

    def group(self, i: int) -> list[str]:
        """Task i's classes in the order of its labels."""
        return GROUPS[i % len(GROUPS)]

    def title(self, i: int) -> str:
        return f"{self.domain(i)}, group {i % len(GROUPS)}"

    def rows(self, i: int) -> tuple[Rows, Rows]:
        train, test = self.parts[i]
        return Rows(self.x, self.y, train), Rows(self.x, self.y, test)

    def view(self, i: int) -> Callable[[Tensor], Tensor]:
        return self.normal
