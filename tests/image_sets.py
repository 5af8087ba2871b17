"""Tiny image sets in every official format, written into a folder: three tasks of each benchmark, easy to learn, in a second.

A class is a pattern of large squares, a picture of it that pattern and noise; the same for every call with the same seed.
"""

from __future__ import annotations

import io
import shutil
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from subnet_pipelines.benchmarks.idx import IDX_NAMES, write_idx

DRAWERS = 20


def pictures(labels: np.ndarray, shape: tuple[int, ...], purpose: int = 0) -> np.ndarray:
    """A picture for each label: uint8 (n, *shape), shape ending in height and width; purpose tells sets and halves apart."""
    *channels, height, width = shape
    coarse = np.empty((len(labels), *channels, 4, 4))
    for label in np.unique(labels):
        pattern = np.random.default_rng(1000 + label).integers(0, 2, (*channels, 4, 4))
        coarse[labels == label] = 40 + 170 * pattern
    large = coarse.repeat(-(-height // 4), -2).repeat(-(-width // 4), -1)[..., :height, :width]
    noise = np.random.default_rng(purpose).integers(-40, 41, large.shape)
    return np.clip(large + noise, 0, 255).astype(np.uint8)


def labels_of(classes: int, each: int) -> np.ndarray:
    """`each` of every class, class after class in turn."""
    return np.tile(np.arange(classes), each)


def write_idx_set(folder: Path, train: int = 8, test: int = 4, purpose: int = 0) -> None:
    """A set in MNIST's format (mnist, fashion-mnist, notmnist): rows of each of the ten classes."""
    folder.mkdir(parents=True, exist_ok=True)
    for half, each in ((0, train), (1, test)):
        labels = labels_of(10, each)
        write_idx(folder / IDX_NAMES[2 * half], pictures(labels, (28, 28), 2 * purpose + half))
        write_idx(folder / IDX_NAMES[2 * half + 1], labels.astype(np.uint8))


def records(labels: np.ndarray, purpose: int, coarse: bool) -> bytes:
    """CIFAR's binary records, with a coarse label before the label where asked for: five labels have one."""
    x = pictures(labels, (3, 32, 32), purpose).reshape(len(labels), -1)
    heads = [labels // 5, labels] if coarse else [labels]
    return np.hstack([np.stack(heads, 1).astype(np.uint8), x]).tobytes()


def write_cifar10(data_dir: Path, train: int = 10, test: int = 4, archive: bool = False) -> None:
    """CIFAR-10's binary version: rows of each class, train / 5 of them in each of five files."""
    files = {f"data_batch_{i}.bin": records(labels_of(10, train // 5), 10 + i, False) for i in range(1, 6)}
    files["test_batch.bin"] = records(labels_of(10, test), 16, False)
    write_files(data_dir, "cifar-10-batches-bin", "cifar-10-binary.tar.gz", files, archive)


def write_cifar100(data_dir: Path, classes: int = 30, train: int = 10, test: int = 4, archive: bool = False) -> None:
    """CIFAR-100's binary version with its first classes only: rows of each."""
    files = {
        "train.bin": records(labels_of(classes, train), 20, True),
        "test.bin": records(labels_of(classes, test), 21, True),
    }
    write_files(data_dir, "cifar-100-binary", "cifar-100-binary.tar.gz", files, archive)


def write_stl10(folder: Path, train: int = 8, test: int = 3) -> None:
    """STL-10's binary version: rows of each of ten classes, columns before lines."""
    folder.mkdir(parents=True, exist_ok=True)
    for half, each, purpose in (("train", train, 60), ("test", test, 61)):
        labels = labels_of(10, each)
        (folder / f"{half}_X.bin").write_bytes(pictures(labels, (3, 96, 96), purpose).transpose(0, 1, 3, 2).tobytes())
        (folder / f"{half}_y.bin").write_bytes((labels + 1).astype(np.uint8).tobytes())


def write_office_home(
    data_dir: Path, groups: list[list[str]], each: int = 10, photographs: str = "Real World", zipped: bool = False
) -> None:
    """Office-Home's folder, or zip: JPEGs of several sizes, so many of each class of the two domains that are read, and some of a third."""
    folder, sizes = data_dir / "OfficeHomeDataset_10072016", [(150, 200), (128, 128), (90, 60)]  # height, width
    for d, domain in enumerate(("Product", photographs, "Art")):
        for c, name in enumerate(name for group in groups for name in group[: 1 if domain == "Art" else None]):
            (folder / domain / name).mkdir(parents=True)
            for i in range(1 if domain == "Art" else each):
                picture = pictures(np.array([c]), (3, *sizes[i % 3]), 70 + i + each * (c + 65 * d))[0]
                (folder / domain / name / f"{i + 1:05}.jpg").write_bytes(encoded(picture.transpose(1, 2, 0), "JPEG"))
    (folder / "ImageInfo.csv").write_text("a list that nothing here reads\n")
    zip_folder(folder, zipped)


def write_files(data_dir: Path, folder: str, archive_name: str, files: dict[str, bytes], archive: bool) -> None:
    """Files in a folder, or in an archive that has the folder."""
    if not archive:
        (data_dir / folder).mkdir(parents=True, exist_ok=True)
        for name, data in files.items():
            (data_dir / folder / name).write_bytes(data)
        return
    data_dir.mkdir(parents=True, exist_ok=True)
    with tarfile.open(data_dir / archive_name, "w:gz", compresslevel=1) as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(f"{folder}/{name}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def mat_element(kind: int, data: bytes, order: str = "<") -> bytes:
    """An element of a MATLAB 5 file, small where it may be."""
    if 0 < len(data) <= 4:
        return struct.pack(order + "I", len(data) << 16 | kind) + data.ljust(4, b"\0")
    return struct.pack(order + "II", kind, len(data)) + data + bytes(-len(data) % 8)


def mat_array(name: str, values: np.ndarray, order: str = "<", deflated: bool = True) -> bytes:
    """A uint8 or float64 array as an element of a MATLAB 5 file."""
    mx, mi = {"uint8": (9, 2), "float64": (6, 9)}[values.dtype.name]
    body = mat_element(6, struct.pack(order + "II", mx, 0), order)
    body += mat_element(5, struct.pack(f"{order}{values.ndim}i", *values.shape), order) + mat_element(1, name.encode(), order)
    body += mat_element(mi, values.astype(values.dtype.newbyteorder(order)).tobytes(order="F"), order)
    whole = struct.pack(order + "II", 14, len(body)) + body
    if not deflated:
        return whole
    packed = zlib.compress(whole)
    return struct.pack(order + "II", 15, len(packed)) + packed


def mat_file(elements: list[bytes], order: str = "<") -> bytes:
    """A MATLAB 5 file of these elements."""
    head = b"MATLAB 5.0 MAT-file".ljust(124) + struct.pack(order + "H", 0x0100) + (b"IM" if order == "<" else b"MI")
    return head + b"".join(elements)


def write_svhn(folder: Path, train: int = 8, test: int = 4) -> None:
    """SVHN's two .mat files: rows of each class, a zero's label being 10."""
    folder.mkdir(parents=True, exist_ok=True)
    for half, each, purpose in (("train", train, 30), ("test", test, 31)):
        labels = labels_of(10, each)
        x = pictures(labels, (3, 32, 32), purpose).transpose(2, 3, 1, 0)
        y = np.where(labels == 0, 10, labels).astype(np.uint8)[:, None]
        (folder / f"{half}_32x32.mat").write_bytes(mat_file([mat_array("X", x), mat_array("y", y)]))


def encoded(picture: np.ndarray, kind: str) -> bytes:
    """A picture's file: JPEG of uint8 (h, w, 3), PNG of bool (h, w)."""
    data = io.BytesIO()
    Image.fromarray(picture).save(data, kind, **({"quality": 95} if kind == "JPEG" else {}))
    return data.getvalue()


def drawings(character: int) -> list[np.ndarray]:
    """A character's twenty drawings, bool (105, 105): its pattern, shifted a little and a little further."""
    pattern = pictures(np.array([character]), (105, 105))[0] > 125
    pattern[:9, :30] ^= True  # so that it looks like none of its rotations
    return [np.roll(pattern, (drawer % 5, drawer // 5), (0, 1)) for drawer in range(DRAWERS)]


def write_omniglot(folder: Path, background: int = 24, evaluation: int = 12, zipped: bool = False) -> None:
    """Omniglot's two folders, or zips: characters of 105 x 105 in one bit, twenty drawings of each, ten characters an alphabet."""
    for name, first, count in (("images_background", 0, background), ("images_evaluation", background, evaluation)):
        for c in range(first, first + count):
            at = folder / name / f"Alphabet_{c // 10:02}" / f"character{c % 10 + 1:02}"
            at.mkdir(parents=True)
            for drawer, picture in enumerate(drawings(c)):
                (at / f"{c + 1:04}_{drawer + 1:02}.png").write_bytes(encoded(picture, "PNG"))
        zip_folder(folder / name, zipped)


def write_tiny_imagenet(data_dir: Path, classes: int = 15, train: int = 10, val: int = 4, zipped: bool = False) -> None:
    """TinyImageNet's folder, or zip: classes of 64 x 64 JPEGs, rows of each."""
    folder = data_dir / "tiny-imagenet-200"
    names = [f"n{7919 * (c + 3) % 100000000:08}" for c in range(classes)]  # not ascending, like the real list
    (folder / "val" / "images").mkdir(parents=True)
    (folder / "wnids.txt").write_text("\n".join(names) + "\n")
    for c, name in enumerate(names):
        at = folder / "train" / name / "images"
        at.mkdir(parents=True)
        for i, picture in enumerate(pictures(np.full(train, c), (3, 64, 64), 40 + c)):
            (at / f"{name}_{i}.JPEG").write_bytes(encoded(picture.transpose(1, 2, 0), "JPEG"))
    labels = labels_of(classes, val)
    lines = []
    for i, picture in enumerate(pictures(labels, (3, 64, 64), 39)):
        (folder / "val" / "images" / f"val_{i}.JPEG").write_bytes(encoded(picture.transpose(1, 2, 0), "JPEG"))
        lines.append(f"val_{i}.JPEG\t{names[labels[i]]}\t0\t0\t62\t62\n")
    (folder / "val" / "val_annotations.txt").write_text("".join(lines))
    zip_folder(folder, zipped)


def write_imagenet(folder: Path, classes: int = 6, train: int = 8, val: int = 3, flat: bool = False) -> list[str]:
    """ImageNet in ImageFolder's layout, pictures of several sizes; flat: val without folders, and its list beside it. Returns the classes.

    Among a class's training pictures are a grey one, one in CMYK and, of the first class, a PNG by another name.
    """
    names = [f"n{7919 * (c + 3) % 100000000:08}" for c in range(classes)]
    sizes = [(300, 400), (400, 300), (256, 256), (90, 120)]  # height, width
    lines = ["ImageId,PredictionString"]
    (folder / "val").mkdir(parents=True)
    for c, name in enumerate(names):
        for half, count in (("train", train), ("val", val)):
            at = folder / half / ("" if flat and half == "val" else name)
            at.mkdir(parents=True, exist_ok=True)
            for i in range(count):
                picture = pictures(np.array([c]), (3, *sizes[i % len(sizes)]), 50 + i + train * (half == "val"))[0]
                image, kind = Image.fromarray(picture.transpose(1, 2, 0)), "JPEG"
                if half == "train" and i in (1, 2):
                    image = image.convert({1: "L", 2: "CMYK"}[i])
                if half == "train" and (c, i) == (0, 3):
                    kind = "PNG"
                file = f"{name}_{i}.JPEG" if half == "train" else f"ILSVRC2012_val_{c + classes * i:08}.JPEG"
                image.save(at / file, kind, **({"quality": 95} if kind == "JPEG" else {}))
                if half == "val":
                    lines.append(f"{Path(file).stem},{name} 1 2 30 40 {name} 5 6 70 80")
    if flat:
        (folder / "LOC_val_solution.csv").write_text("\n".join([lines[0], *sorted(lines[1:])]) + "\n")
    return names


def zip_folder(folder: Path, zipped: bool) -> None:
    """Turn a folder into a zip of its name that holds it, where asked to."""
    if zipped:
        shutil.make_archive(str(folder), "zip", folder.parent, folder.name)
        shutil.rmtree(folder)


def write_all(data_dir: Path) -> Path:
    """All sets, for the first three tasks of every benchmark; returns the folder."""
    for i, name in enumerate(("mnist", "fashion-mnist", "notmnist")):
        write_idx_set(data_dir / name, purpose=i)
    write_cifar10(data_dir)
    write_cifar100(data_dir)
    write_svhn(data_dir / "svhn")
    write_omniglot(data_dir / "omniglot")
    write_tiny_imagenet(data_dir)
    return data_dir
