"""Timing on a GPU: each call behind a cold L2 cache, between two events, replayed from a CUDA graph where it can be captured.

A graph takes the launching out of the time, which a training step captured as a whole does not pay either; ``Timing.eager`` is what the
same call costs the host, launching and waiting included, caches warm. What waits for the device itself, as WSN's ``.item()`` does,
cannot be captured: it is launched between the events, and its own waits are in its time.
"""

import contextlib
import functools
import gc
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Collection

import torch

COLD_BYTES = 256 << 20  # written before each call, several times the L2 cache of any card


@functools.cache
def _cold() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty(COLD_BYTES, dtype=torch.uint8, device="cuda"), torch.zeros(
        COLD_BYTES // 8, dtype=torch.int32, device="cuda"
    )


def flush() -> None:
    """Empty the L2 cache: write more than it holds, then read as much, so that no line waits to be written back."""
    written, read = _cold()
    written.zero_()
    read.amax()


def waits(call: Callable[[], object]) -> bool:
    """Whether a call makes the host wait for the device, found by making it once; to try to capture one would harm the allocator."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    except RuntimeError:
        return True
    finally:
        torch.cuda.set_sync_debug_mode(before)
    return False


def capture(call: Callable[[], object], pool: tuple[int, int]) -> torch.cuda.CUDAGraph | None:
    """A graph of one call, or None where it cannot be captured. Graphs of one pool share the memory of what they allocate."""
    if waits(call):
        return None
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiles, and sizes workspaces
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    collecting = gc.isenabled()
    gc.disable()  # what it might free belongs to no capture
    try:
        with torch.cuda.stream(stream):
            graph.capture_begin(pool=pool)
            try:
                call()
            finally:
                graph.capture_end()
    except Exception:  # whatever a capture refuses; the call is then timed as it is
        with contextlib.suppress(RuntimeError):  # a capture that broke off left the pool open
            torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
        with contextlib.suppress(RuntimeError):
            torch.cuda.synchronize()
        forget_capture()
        return None
    finally:
        if collecting:
            gc.enable()
    torch.cuda.synchronize()
    return graph


def forget_capture() -> None:
    """Give the card's generator a new state: one that a capture took and did not give back draws nothing any more."""
    generator = torch.cuda.default_generators[torch.cuda.current_device()]
    generator.graphsafe_set_state(torch.Generator("cuda").manual_seed(generator.initial_seed()).graphsafe_get_state())


def between_events(go: Callable[[], object]) -> float:
    """Microseconds of one call on the device, from a cold cache."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    flush()
    begin.record()
    go()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1e3


def on_the_host(go: Callable[[], object]) -> float:
    """Microseconds from the call to the end of its work on the device, caches as they are."""
    torch.cuda.synchronize()
    start = time.perf_counter_ns()
    go()
    torch.cuda.synchronize()
    return (time.perf_counter_ns() - start) / 1e3


def measure(
    callables: dict[str, Callable[[], object]],
    seconds: float,
    rounds: int,
    burst: int,
    slow: int,
    eager: Collection[str],
) -> dict[str, tuple[float, float, int, str, float | None]]:
    """(min, median, calls, how it was timed, eager time or None) of each callable, all of them interleaved.

    A round gives every callable in turn `burst` calls, or one where it takes 5 ms or more, and none after `slow` of 100 ms. Those named
    in `eager` are timed on the host; what takes 100 ms or more is not captured. PyTorch's default device is put aside meanwhile: it
    costs every call a microsecond or more on the host.
    """
    device = torch.get_default_device()
    torch.set_default_device(None)
    try:
        return _measure(callables, seconds, rounds, burst, slow, eager)
    finally:
        torch.set_default_device(device)


def _measure(callables, seconds, rounds, burst, slow, eager):
    pool = torch.cuda.graph_pool_handle()
    timed, once, graphs = {}, {}, []
    for name, call in callables.items():
        call()
        on_the_host(call)
        once[name] = on_the_host(call)
        timed[name] = ("host", on_the_host, call) if name in eager else ("events", between_events, call)
        if name not in eager and once[name] < 1e5 and (graph := capture(call, pool)) is not None:
            graphs.append(graph)
            timed[name] = ("graph", between_events, graph.replay)
    spent: dict[str, list[float]] = {name: [] for name in callables}
    began, done = time.perf_counter(), 0
    while done < rounds or time.perf_counter() - began < seconds:
        for name, (_, timer, go) in timed.items():
            if len(spent[name]) >= slow and min(spent[name]) >= 1e5:
                continue
            for _ in range(1 if once[name] >= 5e3 else burst):
                spent[name].append(timer(go))
        done += 1
    results = {}
    for name, times in spent.items():
        how = timed[name][0]
        host = None if how == "host" or once[name] >= 1e5 else min(once[name], *(on_the_host(callables[name]) for _ in range(3)))
        results[name] = min(times), statistics.median(times), len(times), how, host
    del graphs, timed
    if torch.cuda.memory_reserved() > torch.cuda.get_device_properties(0).total_memory // 3:
        torch.cuda.empty_cache()
    return results


@functools.cache
def copy_rate() -> float:
    """Bytes a microsecond of a copy of 1 GB, read and written: the floor of whatever moves bytes."""
    source, target = (torch.zeros(10**9, dtype=torch.uint8, device="cuda") for _ in range(2))
    go = functools.partial(target.copy_, source)
    return 2e9 / min([between_events(go) for _ in range(13)][3:])


def machine() -> dict[str, object]:
    """The card, its driver and what it copies."""
    card = torch.cuda.get_device_properties(0)
    driver = "unknown"
    if shutil.which("nvidia-smi"):
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
            lines = subprocess.run(query, capture_output=True, text=True, timeout=20).stdout.splitlines()
            driver = lines[0].strip() if lines else driver
    return {
        "model": card.name,
        "multiprocessors": card.multi_processor_count,
        "memory_gb": round(card.total_memory / 1e9, 1),
        "l2_mb": round(getattr(card, "L2_cache_size", 0) / 2**20, 1),
        "driver": driver,
        "cuda": torch.version.cuda,
        "copy_gb_per_s": round(copy_rate() / 1e3, 1),
    }


def versions() -> dict[str, str]:
    """What else than PyTorch makes the code that runs."""
    try:
        import triton
    except ImportError:
        return {"cuda": str(torch.version.cuda)}
    return {"cuda": str(torch.version.cuda), "triton": triton.__version__}
