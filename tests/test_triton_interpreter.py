"""Runs the tests of Triton kernels in the interpreter, in a process of their own (`interpreter.py` says why)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from interpreter import DEVICE, INTERPRETED

FILES = [p for p in sorted(Path(__file__).parent.glob("test_triton_*.py")) if "\nonly_where_kernels_run()" in p.read_text()]


@pytest.mark.skipif(DEVICE != "cpu" or INTERPRETED, reason="the kernels' own tests run in this process")
@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_in_the_interpreter(path):
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", str(path)]
    run = subprocess.run(
        command, cwd=path.parents[1], env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
