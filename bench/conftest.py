"""Benchmarks are files bench_*.py with functions bench_*: `python -m pytest bench -s` checks, times, prints and records."""

import gc
import json
from pathlib import Path

import pytest
import torch
from figures import groups, misses, report
from measure import DEVICE, RECORDED, on_cpu, threads, use


def pytest_addoption(parser):
    group = parser.getgroup("bench")
    group.addoption("--thread-counts", default="1,2", metavar="1,2", help="threads of each benchmark (1,2)")
    group.addoption("--device", default=DEVICE, choices=("cpu", "cuda"), help="where the benchmarks run (cpu)")
    group.addoption("--figures", metavar="DIR", help="print the ratios of this run, and draw them into this folder")


def pytest_configure(config):
    config.addinivalue_line("python_files", "bench_*.py")
    config.addinivalue_line("python_functions", "bench_*")
    if config.getoption("--device") != "cpu":
        if not torch.cuda.is_available():
            raise pytest.UsageError("--device cuda: PyTorch finds no CUDA device here")
        use(config.getoption("--device"))


@pytest.fixture(autouse=True)
def _same_chance():
    """Every benchmark draws its inputs from one seed, and on a GPU leaves its memory to the next."""
    torch.manual_seed(0)
    yield
    if not on_cpu():
        gc.collect()
        torch.cuda.empty_cache()


def pytest_generate_tests(metafunc):
    if "thread_count" in metafunc.fixturenames:
        counts = [int(count) for count in metafunc.config.getoption("--thread-counts").split(",")] if on_cpu() else [1]
        names = [f"{count}thread{'s' if count > 1 else ''}" if on_cpu() else "cuda" for count in counts]
        metafunc.parametrize("thread_count", counts, indirect=True, ids=names)


@pytest.fixture
def thread_count(request):
    """The benchmark runs on one thread and on two; targets are for one, because another process may hold the second core. On a GPU, 0."""
    with threads(request.param):
        yield request.param if on_cpu() else 0


def pytest_terminal_summary(terminalreporter, config):
    folder = config.getoption("--figures")
    for path in sorted({file for file, *_ in RECORDED}):
        wanted = {tuple(what) for file, *what in RECORDED if file == path}
        if folder:
            terminalreporter.write_line(
                report(path, Path(folder), lambda g, wanted=wanted: (g.bench, g.case, g.threads) in wanted)
            )
        if on_cpu():  # on a GPU gpu_check tells them
            found = groups(json.loads(path.read_text())["rows"])
            for line in misses([g for g in found if (g.bench, g.case, g.threads) in wanted]):
                terminalreporter.write_line(line)
