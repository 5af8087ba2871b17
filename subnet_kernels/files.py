"""Writing that cannot leave half a file: temporary name, fsync, rename, fsync of the folder."""

from __future__ import annotations

import os
import threading
from pathlib import Path


def write_atomic(path: Path | str, data: bytes | str) -> None:
    """Write data to path so that at any moment path is either its old content or its new one, also after a crash."""
    path = Path(path)
    raw = data.encode() if isinstance(data, str) else data
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")  # two writers do not share it
    try:
        with open(temporary, "wb") as file:
            file.write(raw)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def sync(path: Path | str) -> None:
    """fsync a file, or a folder, so that a rename in it survives a crash."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
