"""The idx format of MNIST: magic, big-endian sizes, bytes; gzipped or plain."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from subnet_pipelines.errors import Refusal

IDX_NAMES = tuple(f"{half}-{kind}-ubyte.gz" for half in ("train", "t10k") for kind in ("images-idx3", "labels-idx1"))
LIMIT = 1 << 31  # bytes of data that a header may promise; MNIST has 47 million


def read_idx(path: Path, dims: int) -> Tensor:
    """The uint8 tensor of an idx file with that many dimensions (3 for images, 1 for labels).

    Raises Refusal, naming the file, where magic, sizes or length are wrong or the compressed stream is cut short. Reads no more than
    the header promises and one byte.
    """
    path = Path(path)
    magic = 0x0800 | dims
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as f:
            head = f.read(4 + 4 * dims)
            if len(head) < 4 + 4 * dims:
                raise Refusal(f"{path}: is cut short: an idx header has {4 + 4 * dims} bytes, the file {len(head)}")
            found, *shape = struct.unpack(f">{dims + 1}I", head)
            if found != magic:
                raise Refusal(f"{path}: is no idx file of {dims}-d bytes: magic should be {magic:#010x}, is {found:#010x}")
            size = math.prod(shape)
            if size > LIMIT:
                raise Refusal(f"{path}: header promises {size} bytes, more than any set of this format ({LIMIT})")
            data = f.read(size)
            extra = f.read(1) if len(data) == size else b""
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise Refusal(f"{path}: is damaged or cut short ({error})") from None
    except OSError as error:
        raise Refusal(f"{path}: cannot be read ({error.strerror or error})") from None
    if len(data) != size:
        raise Refusal(f"{path}: is cut short: header promises {size} bytes, {len(data)} are there")
    if extra:
        raise Refusal(f"{path}: holds more than the {size} bytes its header promises")
    return torch.from_numpy(np.frombuffer(bytearray(data), dtype=np.uint8).reshape(shape))


def read_labelled(images_at: Path, labels_at: Path) -> tuple[Tensor, Tensor]:
    """Two idx files as MNIST has them: images uint8 (n, 28, 28) and labels int64 (n,) of ten classes.

    Raises Refusal where one is damaged or does not fit the other.
    """
    images, labels = read_idx(images_at, 3), read_idx(labels_at, 1)
    if images.shape[1:] != (28, 28):
        raise Refusal(f"{images_at}: images should be 28 x 28, are {images.shape[1]} x {images.shape[2]}")
    if len(images) != len(labels):
        raise Refusal(f"{images_at}: has {len(images)} images, {Path(labels_at).name} has {len(labels)} labels")
    if len(labels) == 0 or labels.max() > 9:
        raise Refusal(f"{labels_at}: labels should be 0 to 9 and there be at least one")
    return images, labels.long()


def write_idx(path: Path, array: np.ndarray) -> None:
    """Write a uint8 array as gzipped idx, the same bytes every time."""
    head = struct.pack(f">{array.ndim + 1}I", 0x0800 | array.ndim, *array.shape)
    with open(path, "wb") as raw, gzip.GzipFile("", "wb", 9, raw, mtime=0) as f:
        f.write(head + np.ascontiguousarray(array).tobytes())
