"""The golden vectors: inputs and results that the authors' own programs computed. Their README says what each array is.

They lie beside the repository, or where SUBNET_GOLDEN points; tests on them are skipped where they are absent.
"""

import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from device import DEVICE

FOLDER = Path(os.environ.get("SUBNET_GOLDEN") or Path(__file__).resolve().parents[2] / "shared" / "golden")

# The README: a correct float32 implementation lands within a few times a file's own deviation, most of order 1e-7; allow at least this.
TOLERANCE = 1e-5


def tolerance(path: Path) -> float:
    """What is allowed for one file: 1e-5, or 3 times the deviation of the saved values themselves where the README puts that higher.

    Convolutional inference whose saved values deviate by more than 1e-5 hangs on the rounding of exact zeros: 5e-3, as written there.
    """
    row = re.search(rf"^\| `{re.escape(path.name)}` \|.*\| (\S+) \|$", (FOLDER / "README.md").read_text(), flags=re.MULTILINE)
    deviation = 0.0 if row[1] == "exact" else float(row[1])
    if "_conv_" in path.name and deviation > TOLERANCE:
        return 5e-3
    return max(TOLERANCE, 3 * deviation)


def cases(pattern: str):
    """The files of a family as pytest parameters; one skipped parameter where the folder is absent."""
    if not FOLDER.is_dir():
        return [
            pytest.param(None, id=pattern, marks=pytest.mark.skip(reason=f"no golden vectors at {FOLDER}: set SUBNET_GOLDEN"))
        ]
    files = sorted(FOLDER.glob(f"{pattern}.npz"))
    assert files, f"{FOLDER} has no {pattern}.npz"
    return [pytest.param(path, id=path.stem) for path in files]


class Golden(dict):
    """The arrays of one file: scalars as Python numbers, numeric arrays as tensors, texts as lists."""

    def __init__(self, path: Path):
        with np.load(path, allow_pickle=False) as file:
            for name, value in file.items():
                if value.ndim == 0:
                    self[name] = value.item()
                else:
                    self[name] = value.tolist() if value.dtype.kind == "U" else torch.from_numpy(value).to(DEVICE)

    def mask(self, name: str) -> torch.Tensor:
        """A mask, saved as 0 and 1, as bool."""
        assert self[name].max() <= 1
        return self[name].bool()

    def leaf(self, name: str) -> torch.Tensor:
        """A copy of an array that collects its gradient."""
        return self[name].clone().requires_grad_()


def assert_near(actual: torch.Tensor, expected, tolerance: float = TOLERANCE, what: str = "") -> None:
    """max |actual - expected| <= tolerance * max |expected|, the README's measure of deviation."""
    expected = torch.as_tensor(expected)
    actual = torch.as_tensor(actual).detach()
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    if expected.numel() == 0:
        return
    deviation = (actual.double() - expected.double()).abs().max().item()
    scale = expected.double().abs().max().item()
    assert deviation <= tolerance * scale, f"{what}: deviates by {deviation:.3g}, allowed {tolerance:g} of {scale:.3g}"
