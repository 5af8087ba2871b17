"""Timing and result files, shared by every benchmark.

``times = measure({"ours": f, "rival": g})`` runs the callables in turn in one process, so that a busy neighbour slows all alike;
``record(...)`` keeps the rows in ``bench/results/cpu-<model>.json``, each with its unit, threads, versions and commit.
A name that begins with "floor" is the time of reading, or of reading and writing, the same bytes in the same run.
With `--device cuda` the same benchmarks run on a GPU (`on_cuda.py`), at sizes of their own, and write ``bench/results/<card>.json``.
pytest-benchmark is not used to time: it measures one callable after the other, minutes apart, and here ratios are the result.
"""

import contextlib
import functools
import json
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import NamedTuple

import torch

RESULTS = Path(__file__).parent / "results"
RECORDED: set[tuple[Path, str, str, int]] = set()  # (file, bench, case, threads) of this process
DEVICE = "cpu"  # `use` changes it, before a benchmark is imported


def use(device: str) -> None:
    """Make `device` the one that benchmarks run on, and PyTorch's default."""
    global DEVICE
    DEVICE = device
    torch.set_default_device(device)


def on_cpu() -> bool:
    """Whether the benchmarks run on the CPU."""
    return DEVICE == "cpu"


def targets_on(thread_count: int, cpu: dict[str, float], cuda: dict[str, float] | None = None) -> dict[str, float]:
    """What a case is to reach: how many times as long as ours another callable takes at least. A missed one is printed and recorded.

    cpu: on one thread; on more there are none, because another process may hold the second core. cuda: on a GPU, thread_count 0.
    """
    return (cuda or {}) if thread_count == 0 else cpu if thread_count == 1 else {}


def sizes(cpu: list, cuda: list) -> list:
    """The cases of a benchmark on the device in use."""
    return cpu if on_cpu() else cuda


def only_on(device: str):
    """The mark of a benchmark whose sizes are those of one device."""
    import pytest

    return pytest.mark.skipif(device != DEVICE, reason=f"has the sizes of another device than {DEVICE}")


class Timing(NamedTuple):
    """Microseconds of one callable: the minimum is what ratios are of, the median shows how noisy the machine was.

    timed and eager: on a GPU how the call was timed, and what it costs on the host; see `on_cuda`.
    """

    min: float
    median: float
    calls: int
    timed: str = ""
    eager: float | None = None


def measure(
    callables: dict[str, Callable[[], object]],
    seconds: float = 1.0,
    rounds: int = 5,
    burst: int = 4,
    slow: int = 2,
    eager: Collection[str] = (),
) -> dict[str, Timing]:
    """Times each callable, all of them interleaved; on a GPU by `on_cuda.measure`, for at most .4 s, and those in `eager` on the host.

    A round gives every callable in turn one call that is not counted, which brings its data into the caches, and `burst` that are;
    of one that takes 20 ms or more, the first is counted and there is no other, and one that takes a second or more has `slow` calls
    in all. Rounds go on until the time is used, and for at least `rounds`.
    """
    if not on_cpu():
        import on_cuda

        found = on_cuda.measure(callables, min(seconds, 0.4), 3, burst, slow, eager)
        return {name: Timing(*timing) for name, timing in found.items()}
    spent: dict[str, list[int]] = {name: [] for name in callables}
    began = time.perf_counter()
    done = 0
    while done < rounds or time.perf_counter() - began < seconds:
        for name, call in callables.items():
            if len(spent[name]) >= slow and min(spent[name]) >= 1e9:
                continue
            start = time.perf_counter_ns()
            call()
            first = time.perf_counter_ns() - start
            if first >= 20e6:
                spent[name].append(first)
                continue
            for _ in range(burst):
                start = time.perf_counter_ns()
                call()
                spent[name].append(time.perf_counter_ns() - start)
        done += 1
    return {name: Timing(min(t) / 1e3, statistics.median(t) / 1e3, len(t)) for name, t in spent.items()}


def compiled(expression: Callable, *example) -> tuple[dict[str, Callable[[], object]], dict[str, str]]:
    """torch.compile of an expression, compiled here, outside the timing: ({name: callable}, notes), or ({}, notes) where it fails."""
    torch._dynamo.reset()
    function = torch.compile(expression, dynamic=False)
    try:
        function(*example)
    except Exception as error:  # whatever the compiler raises is its result
        return {}, {"torch.compile": f"fails: {type(error).__name__}"}
    return {"torch.compile": lambda: function(*example)}, {}


def floor(count: float) -> dict[str, Timing]:
    """On a GPU the time of moving so many bytes at the speed of its copy of 1 GB, as a row of its own; nothing on the CPU."""
    if on_cpu():
        return {}
    import on_cuda

    us = count / on_cuda.copy_rate()
    return {"floor: the bytes at copy speed": Timing(us, us, 0, "computed")}


@contextlib.contextmanager
def threads(count: int):
    """torch on `count` threads inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def machine() -> dict[str, object]:
    """The processor, as the operating system names it, or the card."""
    if not on_cpu():
        import on_cuda

        return on_cuda.machine()
    model = platform.processor() or platform.machine()
    flags = ""
    with contextlib.suppress(OSError):
        info = Path("/proc/cpuinfo").read_text()
        model = re.search(r"model name\s*: (.*)", info).group(1).strip()
        family = re.search(r"cpu family\s*: (\d+)", info)
        number = re.search(r"\nmodel\s*: (\d+)", info)
        flags = f" family {family.group(1)} model {number.group(1)}" if family and number else ""
    return {"model": model + flags, "cores": os.cpu_count()}


def commit() -> str:
    """The commit of the tree, "+changes" where files differ from it."""
    if known := os.environ.get("SUBNET_KERNELS_COMMIT"):  # where a copy of the tree runs without its history
        return known
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        head = subprocess.run(
            [*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("+changes" if [line for line in changed.splitlines() if "bench/results/" not in line] else "")


def versions() -> dict[str, str]:
    """Of this library and what it runs on."""
    from subnet_kernels import __version__

    found = {"subnet_kernels": __version__, "torch": torch.__version__, "python": platform.python_version()}
    if not on_cpu():
        import on_cuda

        found |= on_cuda.versions()
    return found


def slug_of(here: dict[str, object]) -> str:
    """A machine's name for a file."""
    return re.sub("[^a-z0-9]+", "-", str(here["model"]).lower()).strip("-")


@functools.cache
def _file() -> tuple[Path, dict[str, object], dict[str, str]]:
    """Where results go, the machine they are of, and the versions."""
    here = machine()
    return RESULTS / f"{'cpu-' if on_cpu() else ''}{slug_of(here)}.json", here, versions()


def record(
    bench: str,
    case: str,
    times: dict[str, Timing],
    notes: dict[str, object] | None = None,
    targets: dict[str, float] | None = None,
) -> Path:
    """Writes a row for each callable of a case, in place of all rows of the same bench, case and threads; returns the file.

    targets: see `targets_on`. Threads are 0 on a GPU.
    """
    path, here, of = _file()
    results = json.loads(path.read_text()) if path.exists() else {"machine": here, "rows": []}
    if not on_cpu():
        results["machine"] = here  # the copy's speed is that of the last run
    where = {"bench": bench, "case": case, "threads": torch.get_num_threads() if on_cpu() else 0}
    rows = []
    for name, t in times.items():
        row = {**where, "name": name, "unit": "us", "min": round(t.min, 2), "median": round(t.median, 2), "calls": t.calls}
        if t.timed:
            row |= {"timed": t.timed} | ({} if t.eager is None else {"eager": round(t.eager, 2)})
        if targets and name in targets:
            row["target"] = round(targets[name], 3)
        rows.append(row | {"commit": commit(), "versions": of, **(notes or {})})
    kept = [row for row in results["rows"] if any(row[key] != value for key, value in where.items())]
    results["rows"] = sorted(kept + rows, key=lambda row: (row["bench"], row["case"], row["threads"]))
    RESULTS.mkdir(exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(results, indent=1) + "\n")
    os.replace(temporary, path)
    RECORDED.add((path, bench, case, where["threads"]))
    return path


def table(title: str, times: dict[str, Timing], ours: str, targets: dict[str, float] | None = None) -> str:
    """A few lines for a person: each callable's time and how many times longer than ours it takes."""
    lines = [title + (f", {torch.get_num_threads()} thread(s)" if on_cpu() else "")]  # a rival below 1.00x is faster than ours
    for name, t in times.items():
        ratio = t.min / times[ours].min
        line = f"  {name:<28} {t.min:>12.1f} us   median {t.median:>12.1f}   {ratio:>9.2f}x ours"
        if t.timed:
            line += f"   {t.timed:<8}" + ("" if t.eager is None else f" eager {t.eager:>12.1f}")
        if targets and name in targets:
            line += f"   {'MISS of' if ratio < targets[name] else 'met'} {targets[name]:.3g}x"
        lines.append(line)
    return "\n".join(lines)


def report(bench: str, case: str, times: dict[str, Timing], ours: str, targets: dict[str, float], **notes: object) -> None:
    """Print and record a case that has targets."""
    print("\n" + table(f"{bench}, {case}", times, ours, targets))
    record(bench, case, times, notes, targets)
