"""The CUDA library, built by nvcc for every target without a GPU: it links, loads, serves every op, and its kernels keep their budgets.

A kernel's budget in `cuda_registers.json` is the registers of its largest instantiation on any target; none may spill but those named
there with the bytes that they do. After a change of kernels, `python tests/test_cuda_builds.py` writes what they take now.
"""

import ctypes
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from schemas import registrations

from subnet_kernels import info
from subnet_kernels import triton as launches
from subnet_kernels.ops import _library

ROOT = Path(__file__).resolve().parents[1]
BUDGETS = Path(__file__).parent / "cuda_registers.json"
TARGETS = {80, 90, 100}
STATIC_SHARED = 48 << 10  # bytes that a kernel may declare

needs_nvcc = pytest.mark.skipif(not (shutil.which("nvcc") or Path("/usr/local/cuda/bin/nvcc").exists()), reason="no nvcc here")


@pytest.fixture(scope="module")
def rows():
    """What ptxas says of every kernel and target; builds the library where its sources have changed."""
    done = subprocess.run([sys.executable, ROOT / "csrc" / "build.py", "cuda"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((ROOT / "build" / "cuda" / "resources.json").read_text())


def family(kernel: str) -> str:
    """A kernel's name without template arguments."""
    return re.sub(r"<.*", "", kernel)


def taken(rows) -> dict[str, dict[str, int]]:
    """{kernel: {registers, spill_bytes}} of its largest instantiation."""
    found: dict[str, dict[str, int]] = {}
    for row in rows:
        of = found.setdefault(family(row["kernel"]), {"registers": 0, "spill_bytes": 0})
        for name in of:
            of[name] = max(of[name], row[name])
    return dict(sorted(found.items()))


@needs_nvcc
def test_kernels_keep_their_budgets(rows):
    budgets, now = json.loads(BUDGETS.read_text()), taken(rows)
    assert {row["target"] for row in rows} == TARGETS
    assert set(now) == set(budgets), "cuda_registers.json must name every kernel"
    for kernel, of in now.items():
        assert of["registers"] <= budgets[kernel]["registers"], kernel
        assert of["spill_bytes"] <= budgets[kernel]["spill_bytes"], kernel
    assert max(row["shared"] for row in rows) <= STATIC_SHARED


@needs_nvcc
def test_only_what_is_known_spills(rows):
    """Kernels that spill are those off the usual path, each named in its source, <op>.cu or <op>_*.h, with the reason."""
    folder = ROOT / "csrc" / "cuda"
    for kernel in (kernel for kernel, of in taken(rows).items() if of["spill_bytes"]):
        op, name = kernel.split(": ")
        source = "".join(p.read_text() for p in [folder / f"{op}.cu", *sorted(folder.glob(f"{op}_*.h"))])
        assert re.search(rf"//[^\n]*spill[^{{]*\b{name}\b", source), kernel


@needs_nvcc
def test_loads_without_a_gpu(rows):
    """Nothing of CUDA is needed to load it, so `info` lists its ops anywhere."""
    library = ROOT / "subnet_kernels" / "_C_cuda.so"
    ctypes.CDLL(str(library))
    needed = subprocess.run(["readelf", "-d", str(library)], capture_output=True, text=True).stdout
    assert "libcud" not in needed


def test_every_op_has_a_cuda_kernel():
    """Compiled, or launched by Triton: every op but those of host files."""
    sources = (ROOT / "csrc" / "cuda").glob("*.cu")
    compiled = {op for source in sources for op, _ in registrations(source.read_text())}
    assert set(info.ops()) == compiled | set(launches.LAUNCHES)
    if "_C_cuda" in _library.LOADED and launches.installed():
        assert {tier["cuda"] for tier in info.ops().values()} == {"compiled", "triton"}


def test_the_page_names_every_kernel():
    """docs/resources.md is made by `make resources`, by hand; this notices a kernel that came or went since."""
    page = set(re.findall(r"^\| `([^`]+)`", (ROOT / "docs" / "resources.md").read_text(), flags=re.MULTILINE))
    triton = json.loads((Path(__file__).parent / "triton_registers.json").read_text())
    assert page == set(json.loads(BUDGETS.read_text())) | {re.sub(r"-\d.*", "", build) for build in triton}


def test_arguments_are_cut_off():
    spec = importlib.util.spec_from_file_location("csrc_build", ROOT / "csrc" / "build.py")
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    name = "void (anonymous namespace)::step_kernel<(Rule)2, c10::Half>(Job const*, void (*)(int), If<(A)1>::type)"
    assert build.without_arguments(name) == "step_kernel<(Rule)2, Half>"


if __name__ == "__main__":
    resources = json.loads((ROOT / "build" / "cuda" / "resources.json").read_text())
    BUDGETS.write_text(json.dumps(taken(resources), indent=1) + "\n")
