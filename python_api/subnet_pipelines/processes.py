"""Several processes at one run, as torchrun starts them: the first is the run, the others train a share of it and hand over files.

Files and no collectives: a process that was killed is started again and finds what it, and the others, had finished.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import load_file, save
from torch import Tensor

from subnet_kernels.files import write_atomic


class Process(NamedTuple):
    """Which of how many processes this is; the first, 0, is the run."""

    rank: int = 0
    count: int = 1

    def home(self, out: Path) -> Path:
        """The folder that this process keeps of the run `out`."""
        return out / "processes" / str(self.rank) if self.rank else out

    def run_of(self, home: Path) -> Path:
        """The run whose folder, in this process, is `home`."""
        return home.parents[1] if self.rank else home


def this_process() -> Process:
    """As torchrun says in RANK and WORLD_SIZE; alone where it does not."""
    return Process(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))


def shared_folder(out: Path, what: str, *settings: Any) -> Path:
    """Where the processes of a run leave files of that kind for each other: a folder of its own for every value of the settings."""
    return out / "processes" / f"{what}-{hashlib.sha256(repr(settings).encode()).hexdigest()[:12]}"


def hand_over(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors for the other processes."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(file, save({key: value.detach().cpu().contiguous() for key, value in tensors.items()}))


def taken(file: Path) -> dict[str, Tensor]:
    """What another process hands over, or has; waits for it."""
    while not file.exists():
        time.sleep(0.1)
    return load_file(file)
