"""Folders and zips of pictures, decoded once and cached beside them as one tensor of bytes."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import sys
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from subnet_kernels.files import sync
from subnet_pipelines.benchmarks.files import progress_bar
from subnet_pipelines.errors import Refusal

FILES = 1 << 18  # of a tree; TinyImageNet has 120,406
BYTES = 1 << 20  # of a file in it; the largest is a list of 300 kB
FILE, PIXELS = 1 << 25, 1 << 27  # bytes and pixels of a photograph, whose size is not known beforehand
TOGETHER = 1000  # pictures decoded before they are put in their place
VERSION = 1  # of what decode makes of a file
DAMAGE = (OSError, zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, NotImplementedError, ValueError, SyntaxError)


class Tree:
    """The files of a folder, or of the folder of a zip's name in that zip, by their paths in it; nothing is unpacked.

    `names` are sorted, with slashes on every system; most: bytes of a file. Raises Refusal, naming the path, where it cannot be read.
    """

    def __init__(self, path: Path, most: int = BYTES):
        self.path, self.zip, self.most = path, None, most
        try:
            if path.is_dir():
                entries = dict(self._walk())
            else:
                self.zip = zipfile.ZipFile(path)
                top = path.stem + "/"
                infos = [info for info in self.zip.infolist() if info.filename.startswith(top) and not info.is_dir()]
                entries = {info.filename[len(top) :]: (info.file_size, info.CRC) for info in infos}
        except DAMAGE as error:
            raise Refusal(f"{path}: is no folder or zip that can be read ({sentence(error)})") from None
        if len(entries) > FILES:
            raise Refusal(f"{path}: should hold at most {FILES} files, holds {len(entries)}")
        self.names = sorted(entries)
        self._marks = entries  # size, and checksum or time of the last change

    def _walk(self) -> Iterator[tuple[str, tuple[int, int]]]:
        for folder, _, files in os.walk(self.path):
            for name in files:
                at = Path(folder, name)
                status = at.stat()
                if stat.S_ISREG(status.st_mode):
                    yield at.relative_to(self.path).as_posix(), (status.st_size, status.st_mtime_ns)

    def __contains__(self, name: str) -> bool:
        return name in self._marks

    def read(self, name: str) -> bytes:
        """A file's bytes. Raises Refusal."""
        if name not in self._marks:
            raise Refusal(f"{self.path}: lacks {name}")
        try:
            with open(self.path / name, "rb") if self.zip is None else self.zip.open(self.path.stem + "/" + name) as file:
                data = file.read(self.most + 1)
        except DAMAGE as error:
            raise Refusal(f"{self.path}: {name} is damaged ({sentence(error)})") from None
        if len(data) > self.most:
            raise Refusal(f"{self.path}: {name} should be at most {self.most} bytes")
        return data

    def mark(self, names: Sequence[str], *how: object) -> str:
        """What identifies these files and what is made of them, for a cache."""
        return hashlib.blake2b(json.dumps([how, [(n, *self._marks[n]) for n in names]]).encode(), digest_size=16).hexdigest()


def sentence(error: BaseException) -> str:
    """What an error says, on one line."""
    return " ".join(str(error).split()) or type(error).__name__


def decode(data: bytes, where: str, kind: str, mode: str, side: int | None, to: int) -> np.ndarray:
    """A picture's bytes: uint8 (to, to) in mode L, (to, to, 3) in mode RGB, resized by Pillow's bicubic filter where to differs from side.

    kind: PNG or JPEG; side: the width and height that it must have, which is seen before anything is decoded; None for any, of at most
    PIXELS pixels, whose ratio is not kept. Raises Refusal.
    """
    try:
        with Image.open(BytesIO(data), formats=[kind]) as picture:
            width, height = picture.size
            if side is not None and (width, height) != (side, side):
                raise Refusal(f"{where}: should be {side} x {side}, is {width} x {height}")
            if width * height > PIXELS:
                raise Refusal(f"{where}: should have at most {PIXELS} pixels, is {width} x {height}")
            picture = picture.convert(mode)
            return np.asarray(picture if (width, height) == (to, to) else picture.resize((to, to), Image.Resampling.BICUBIC))
    except Refusal:
        raise
    except Exception as error:  # Pillow's decoders raise what they like
        raise Refusal(f"{where}: is no {kind} picture that can be read ({sentence(error)})") from None


def pictures(tree: Tree, names: Sequence[str], kind: str, mode: str, side: int | None, to: int) -> Tensor:
    """These files of a tree decoded as `decode` does: uint8 (n, channels, to, to).

    Read from the cache, STEM.SIDExSIDE.safetensors beside the tree, where that was made of the same files; else decoded, and the cache
    written where the folder can be written to. Raises Refusal.
    """
    channels = 3 if mode == "RGB" else 1
    cache = tree.path.with_name(f"{tree.path.stem}.{to}x{to}.safetensors")
    mark = tree.mark(names, VERSION, kind, mode, side, to)
    if (found := _cached(cache, mark, (len(names), channels, to, to))) is not None:
        return found
    made = torch.empty((len(names), to, to, channels), dtype=torch.uint8)
    bar = progress_bar(f"decoding {tree.path.name}") if sys.stderr.isatty() else None
    if bar is not None:
        bar.total = len(names)

    def one(name: str) -> np.ndarray:
        return decode(tree.read(name), f"{tree.path}, {name}", kind, mode, side, to)

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # Pillow decodes without Python's lock
        for start in range(0, len(names), TOGETHER):
            some = np.stack(list(pool.map(one, names[start : start + TOGETHER])))
            made[start : start + TOGETHER] = torch.from_numpy(some).view(-1, to, to, channels)
            if bar is not None:
                bar.update(len(some))
    if bar is not None:
        bar.close()
    made = made.permute(0, 3, 1, 2).contiguous()
    _write(cache, mark, made)
    return made


def _cached(path: Path, mark: str, shape: tuple[int, ...]) -> Tensor | None:
    try:
        with safe_open(path, "pt") as file:
            if (file.metadata() or {}).get("made_of") != mark:
                return None
            found = file.get_tensor("pictures")
    except (OSError, SafetensorError):  # not there, or not whole: it is made again
        return None
    return found if found.dtype == torch.uint8 and tuple(found.shape) == shape else None


def _write(path: Path, mark: str, made: Tensor) -> None:
    """Write the cache so that it is there whole or not at all; a folder that cannot be written to goes without."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save_file({"pictures": made}, temporary, {"made_of": mark})
        temporary.chmod(0o644)  # it is as public as the pictures
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    except (OSError, SafetensorError):
        temporary.unlink(missing_ok=True)
