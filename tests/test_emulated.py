"""The CUDA kernels without a GPU: compiled for the processor (csrc/cuda/simt.h), they pass their ops' tests in place of the CPU kernels.

Twice: as they are, and under sanitizers, which find what they read or write out of bounds or unaligned.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TESTS = [f"test_{op}.py" for op in ("apply", "bits", "compressed", "mixed", "pool", "select", "superpose", "threshold", "update")]


def build(*flags: str) -> Path:
    done = subprocess.run([sys.executable, ROOT / "csrc" / "build.py", "emulated", *flags], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return Path(done.stdout.splitlines()[-1])


def passed(file: str, library: Path, **environment: str) -> int:
    """How many tests of a file pass on a library; fails where one fails."""
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", f"tests/{file}"]
    environment = {**os.environ, "SUBNET_KERNELS_CPU_LIBRARY": str(library), **environment}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    return int(re.search(r"(\d+) passed", done.stdout).group(1))


@pytest.fixture(scope="module")
def library():
    return build()


@pytest.mark.parametrize("file", TESTS)
def test_as_they_are(library, file):
    assert passed(file, library) > 10


@pytest.fixture(scope="module")
def sanitized():
    return build("--address")


@pytest.mark.parametrize("file", TESTS)
def test_within_bounds(sanitized, file):
    find = lambda name: subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()  # noqa: E731
    preload = f"{find('libasan.so')} {find('libstdc++.so')}"
    assert passed(file, sanitized, LD_PRELOAD=preload, ASAN_OPTIONS="detect_leaks=0") > 10
