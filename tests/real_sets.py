"""Real image sets laid out in the official formats, some of them in part, so that it takes seconds. Their README says what each file is.

They lie beside the repository, or where SUBNET_REAL_DATA points; tests on them are skipped where they are absent.
"""

import json
import os
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

FOLDER = Path(os.environ.get("SUBNET_REAL_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data")
CLASSES = {*range(30), 30, 32, 54, 55, 62, 67, 70, 72, 73, 82, 91, 92, 95}  # of CIFAR-100: three tasks of each of its streams
CHARACTERS = {"images_background": 30, "images_evaluation": 6}  # of Omniglot


def lay_out(data_dir: Path) -> Path:
    """Lay the sets out in data_dir; returns it."""
    for name, source in (("mnist", "mnist"), ("fashion-mnist", "fashion-mnist"), ("notmnist", "notmnist-small")):
        (data_dir / name).symlink_to(FOLDER / source)
    coarse = json.loads((FOLDER / "cifar100" / "labels.json").read_text())["fine_to_coarse"]
    home = data_dir / "cifar-100-binary"
    home.mkdir()
    for half in ("train", "test"):
        (home / f"{half}.bin").write_bytes(records(FOLDER / "cifar100" / half, coarse, CLASSES).tobytes())
    home = data_dir / "cifar-10-batches-bin"
    home.mkdir()
    train = records(FOLDER / "cifar10-subset" / "train", None, set(range(10)))
    for i in range(5):
        (home / f"data_batch_{i + 1}.bin").write_bytes(train[i::5].tobytes())
    (home / "test_batch.bin").write_bytes(records(FOLDER / "cifar10-subset" / "test", None, set(range(10))).tobytes())
    (data_dir / "omniglot").mkdir()
    for name, count in CHARACTERS.items():
        with (
            zipfile.ZipFile(FOLDER / "omniglot" / f"{name}.zip") as whole,
            zipfile.ZipFile(data_dir / "omniglot" / f"{name}.zip", "w") as part,
        ):
            pictures = sorted(member for member in whole.namelist() if member.endswith(".png"))
            for member in pictures[: 20 * count]:
                part.writestr(member, whole.read(member))
    return data_dir


def records(folder: Path, coarse: list[int] | None, classes: set[int]) -> np.ndarray:
    """CIFAR's binary records of these classes, uint8 (n, bytes), from a strip of pictures for each."""
    rows = []
    for label, path in sorted((int(path.name.split("_")[0]), path) for path in folder.glob("*.webp")):
        if label in classes:
            x = np.asarray(Image.open(path)).reshape(-1, 32, 32, 3).transpose(0, 3, 1, 2).reshape(-1, 3072)
            head = [label] if coarse is None else [coarse[label], label]
            rows.append(np.hstack([np.tile(np.uint8(head), (len(x), 1)), x]))
    return np.vstack(rows)


def link_omniglot(data_dir: Path) -> None:
    """All of Omniglot."""
    for name in CHARACTERS:
        (data_dir / f"{name}.zip").symlink_to(FOLDER / "omniglot" / f"{name}.zip")
