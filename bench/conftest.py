"""Benchmarks are files bench_*.py with functions bench_*: `python -m pytest bench -s` checks, times, prints, records and gates."""

from pathlib import Path

import pytest
import torch
from figures import report
from measure import RECORDED, threads


def pytest_addoption(parser):
    group = parser.getgroup("bench")
    group.addoption("--thread-counts", default="1,2", metavar="1,2", help="threads of each benchmark (1,2)")
    group.addoption("--figures", metavar="DIR", help="print the ratios of this run, and draw them into this folder")


def pytest_configure(config):
    config.addinivalue_line("python_files", "bench_*.py")
    config.addinivalue_line("python_functions", "bench_*")


@pytest.fixture(autouse=True)
def _same_chance():
    """Every benchmark draws its inputs from one seed."""
    torch.manual_seed(0)


def pytest_generate_tests(metafunc):
    if "thread_count" in metafunc.fixturenames:
        counts = [int(count) for count in metafunc.config.getoption("--thread-counts").split(",")]
        names = [f"{count}thread{'s' if count > 1 else ''}" for count in counts]
        metafunc.parametrize("thread_count", counts, indirect=True, ids=names)


@pytest.fixture
def thread_count(request):
    """The benchmark runs on one thread and on two; gates hold on one, because another process may hold the second core."""
    with threads(request.param):
        yield request.param


def pytest_terminal_summary(terminalreporter, config):
    folder = config.getoption("--figures")
    for path in sorted({file for file, *_ in RECORDED}) if folder else ():
        wanted = {tuple(what) for file, *what in RECORDED if file == path}
        terminalreporter.write_line(report(path, Path(folder), lambda g, wanted=wanted: (g.bench, g.case, g.threads) in wanted))
