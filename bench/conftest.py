"""Benchmarks are files bench_*.py with functions bench_*: `python -m pytest bench -s` checks, times, prints, records and gates."""

import pytest
import torch
from measure import threads


def pytest_configure(config):
    config.addinivalue_line("python_files", "bench_*.py")
    config.addinivalue_line("python_functions", "bench_*")


@pytest.fixture(autouse=True)
def _same_chance():
    """Every benchmark draws its inputs from one seed."""
    torch.manual_seed(0)


@pytest.fixture(params=[1, 2], ids=["1thread", "2threads"])
def thread_count(request):
    """The benchmark runs on one thread and on two; gates hold on one, because another process may hold the second core."""
    with threads(request.param):
        yield request.param
