"""Arrays of a MATLAB file of version 5 (what MATLAB has saved since 1996, but for -v7.3, which is HDF5).

A file is a header of 128 bytes and elements: a tag with type and byte count, the data, padding to 8 bytes. An array is an element whose
data are elements: flags, dimensions, name, numbers in column-major order. It may stand deflated in an element of its own.
Format: MathWorks, "MAT-File Format".
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from subnet_pipelines.errors import Refusal

LIMIT = 1 << 31  # bytes of an array; the largest of SVHN has 1.6 billion
NUMBERS = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}  # miINT8 ... miUINT64
INT8, INT32, UINT32, MATRIX, COMPRESSED = 1, 5, 6, 14, 15
STEP = 1 << 20  # bytes inflated at once


class Inflated:
    """A deflated element read like a file, no more of it than is asked for."""

    def __init__(self, file: BinaryIO, size: int):
        self.file, self.left, self.inflate = file, size, zlib.decompressobj()

    def read(self, size: int) -> bytes:
        """Up to size bytes, none only where the stream ends. Raises zlib.error."""
        made = b""
        while size and not made and not self.inflate.eof:
            source = self.inflate.unconsumed_tail
            if not source:
                source = self.file.read(min(STEP, self.left))
                self.left -= len(source)
            made = self.inflate.decompress(source, size)
            if not source:
                break
        return made

    def finish(self) -> None:
        """See that the stream ends here, but for padding, and with its checksum. Raises zlib.error, and Refusal where it does not end."""
        self.read(8)
        if self.read(1) or not self.inflate.eof:
            raise Refusal("is damaged: a deflated array does not end where its numbers do")


def read_mat(path: Path, names: Sequence[str]) -> dict[str, np.ndarray]:
    """The numeric arrays of these names in a MATLAB 5 file, as (dimension, ...) in C order of the numbers' own type.

    Raises Refusal, naming the file, where it is no such file, damaged or cut short, or lacks one of them. Reads no more of an array than
    its dimensions promise, and skips what was not asked for.
    """
    path, found = Path(path), {}
    try:
        with open(path, "rb") as file:
            head = file.read(128)
            order = {b"IM": "<", b"MI": ">"}.get(head[126:128])
            if order is None or struct.unpack(order + "H", head[124:126])[0] != 0x0100:
                raise Refusal(f"{path}: is no MATLAB file of version 5")
            end = path.stat().st_size
            while file.tell() < end and len(found) < len(names):
                kind, size = struct.unpack(order + "II", exactly(file, 8))
                after = file.tell() + size
                if after > end:
                    raise Refusal(f"{path}: is cut short: an element promises {size} bytes, {end - file.tell()} are there")
                source = file
                if kind == COMPRESSED:
                    source = Inflated(file, size)
                    kind, size = struct.unpack(order + "II", exactly(source, 8))
                if kind == MATRIX and (array := read_array(source, order, names)) is not None:
                    if isinstance(source, Inflated):
                        source.finish()
                    found.setdefault(*array)
                file.seek(after)
    except Refusal as error:
        raise error if str(error).startswith(str(path)) else Refusal(f"{path}: {error}") from None
    except (zlib.error, struct.error, ValueError) as error:  # numpy's where bytes are no whole numbers
        raise Refusal(f"{path}: is damaged or cut short ({error})") from None
    except OSError as error:
        raise Refusal(f"{path}: cannot be read ({error.strerror or error})") from None
    if missing := [name for name in names if name not in found]:
        raise Refusal(f"{path}: has no array {' or '.join(missing)}")
    return found


def exactly(file: BinaryIO | Inflated, size: int) -> bytearray:
    """size bytes of the file, taken up as they come. Raises Refusal where they are not there."""
    data = bytearray()
    while len(data) < size and (more := file.read(min(STEP, size - len(data)))):
        data += more
    if len(data) != size:
        raise Refusal(f"is cut short: {size} bytes should follow, {len(data)} do")
    return data


def element(file: BinaryIO | Inflated, order: str, kinds: Sequence[int], limit: int) -> tuple[int, bytearray]:
    """The type and data of the next element, which must be of one of these types and at most `limit` bytes. Raises Refusal."""
    (word,) = struct.unpack(order + "I", exactly(file, 4))
    kind, size, small = (word & 0xFFFF, word >> 16, True) if word >> 16 else (word, None, False)
    if not small:
        (size,) = struct.unpack(order + "I", exactly(file, 4))
    if kind not in kinds or size > (4 if small else limit):
        raise Refusal(f"is damaged: an element of type {kind} with {size} bytes stands where none may be")
    data = exactly(file, size)
    file.read(-size % (4 if small else 8))
    return kind, data


def read_array(file: BinaryIO | Inflated, order: str, names: Sequence[str]) -> tuple[str, np.ndarray] | None:
    """Name and values of an array whose tag has been read; None for one of another name or of no real numbers."""
    flags = struct.unpack(order + "II", element(file, order, [UINT32], 8)[1].ljust(8, b"\0"))[0]
    _, raw = element(file, order, [INT32], 4 * 32)
    shape = np.frombuffer(raw, order + "i4").tolist()
    _, name = element(file, order, [INT8], 64)
    if (name := name.decode("latin-1")) not in names:
        return None
    if not 6 <= flags & 0xFF <= 15 or flags & 0x0800:  # the classes of full numeric arrays; complex ones have a second part
        raise Refusal(f"array {name} is not one of real numbers")
    if len(shape) < 2 or min(shape) < 0 or math.prod(shape) > LIMIT:
        raise Refusal(f"array {name} has dimensions {shape}, which no set of this format has")
    kind, data = element(file, order, list(NUMBERS), min(math.prod(shape) * 8, LIMIT))
    values = np.frombuffer(data, order + NUMBERS[kind])
    if len(values) != math.prod(shape):
        raise Refusal(f"array {name} has dimensions {shape} and {len(values)} numbers")
    return name, values.reshape(shape, order="F")
