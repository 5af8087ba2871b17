"""Fixtures of all tests: the device, the same chance at every test, thread counts put back, and one run for each CPU instruction set."""

import os

import pytest
import torch
from device import DEVICE, ON_CPU

from subnet_kernels.info import cpu_isa as switch
from subnet_kernels.ops._library import LOADED, MISSING

torch.set_num_threads(1)  # the tests' tensors are small: a second thread costs more than it does; threads have tests of their own
ISAS = ("portable", "avx2", "avx512") if ON_CPU else (DEVICE,)

if not ON_CPU:
    if DEVICE == "cuda" and not torch.cuda.is_available():
        pytest.exit("SUBNET_TEST_DEVICE is cuda, and PyTorch finds no CUDA device here", returncode=4)
    torch.set_default_device(DEVICE)
    # what is compared to the bit, or to float32's rounding, must be computed the same way twice and in float32
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.deterministic = True


def pytest_configure(config):
    config.addinivalue_line("markers", "xdist_group: tests that pytest-xdist gives to one worker")


@pytest.fixture(autouse=True)
def _same_chance():
    """Every test starts from one seed and leaves torch's number of threads as it found it."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    yield
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
    if DEVICE == "cuda":
        torch.cuda.synchronize()  # a kernel's error is that of its own test


def switch_isa(request: str | None) -> str | None:
    """The instruction set that the compiled CPU ops use, after a request for another one if that is given."""
    return switch(request)


@pytest.fixture(params=ISAS)
def cpu_isa(request):
    """The test runs once for each instruction set that the compiled CPU ops have and this processor has too; its name.

    On another device it runs once, and the name is the device's.
    """
    if not ON_CPU:
        yield DEVICE
        return
    if "_C_cpu" not in LOADED:
        pytest.skip(f"no compiled CPU ops: {MISSING['_C_cpu']}")
    before = switch_isa(None)
    try:
        if switch_isa(request.param) != request.param:
            pytest.skip(f"this processor, or SUBNET_KERNELS_CPU, does not allow {request.param}")
        yield request.param
    finally:
        switch_isa(before)


_broken = False  # whether a kernel has failed: every later call of CUDA in this process would


@pytest.hookimpl(trylast=True)
def pytest_runtest_makereport(item, call):
    """Notice a CUDA error."""
    global _broken
    if (
        not ON_CPU
        and call.excinfo is not None
        and ("CUDA error" in str(call.excinfo.value) or "CUDA says" in str(call.excinfo.value))
    ):
        _broken = True


@pytest.hookimpl(trylast=True)
def pytest_runtest_logfinish(nodeid, location):
    """After a CUDA error a worker of pytest-xdist ends, and a fresh one takes the tests that are left."""
    if _broken and "PYTEST_XDIST_WORKER" in os.environ:
        os._exit(3)
