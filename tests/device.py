"""The device under test: the CPU, or what SUBNET_TEST_DEVICE names, where `SUBNET_TEST_DEVICE=cuda pytest tests` runs the same tests.

`conftest.py` makes it PyTorch's default device, so tests say nothing of devices but where they look at memory (``.cpu().numpy()``),
draw from a generator of their own, or autocast.
"""

import os

import pytest
import torch

from subnet_kernels.ops._library import LOADED, MISSING

DEVICE = os.environ.get("SUBNET_TEST_DEVICE", "cpu")
ON_CPU = DEVICE == "cpu"
LIBRARY = "_C_cpu" if ON_CPU else "_C_cuda"  # the compiled ops of this device
# The CUDA kernels, compiled for the processor, in place of the CPU library (test_emulated.py).
EMULATED = "_C_cpu" in LOADED and LOADED["_C_cpu"].name.startswith("_C_emulated")
CUDA_KERNELS = EMULATED or not ON_CPU  # which do not wait to look at what tensors hold

cpu_only = pytest.mark.skipif(not ON_CPU, reason=f"about threads or instruction sets of the CPU, and this run is on {DEVICE}")
no_sync = pytest.mark.skipif(not ON_CPU or EMULATED, reason="needs a look at values on the host, for which no CUDA op waits")
cuda_kernels = pytest.mark.skipif(not EMULATED and (ON_CPU or LIBRARY not in LOADED), reason="about the CUDA kernels alone")
compiled_only = pytest.mark.skipif(LIBRARY not in LOADED, reason=f"no compiled ops for {DEVICE}: {MISSING.get(LIBRARY)}")


def name_of_device() -> str:
    """The device of new tensors as messages print it: cpu, cuda:0."""
    return str(torch.empty(0).device)


def generator(seed: int) -> torch.Generator:
    """A generator of the device under test."""
    return torch.Generator(DEVICE).manual_seed(seed)
