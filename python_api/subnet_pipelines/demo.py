"""The demo: the methods side by side on a few tasks of the shipped images, everything real and measured, in about a minute."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch

from subnet_kernels.files import write_atomic
from subnet_pipelines.config import Settings
from subnet_pipelines.interrupt import Interrupted
from subnet_pipelines.progress import count_bar
from subnet_pipelines.report import COLUMNS, Result, draw_final, name_of, number, page, table_row
from subnet_pipelines.train import run

RUNS: list[tuple[str, str, dict[str, Any]]] = [  # method, benchmark, settings over the recipe
    ("impresslearn", "rotated-mnist-mini", {}),
    ("impresslearn", "permuted-mnist-mini", {}),
    ("supsup", "permuted-mnist-mini", {}),
    ("wsn", "permuted-mnist-mini", {}),
    ("finetune", "permuted-mnist-mini", {}),
]
SHOWN = ("acc", "bwt", "task_inference", "used_fraction", "measured_cap", "seconds")
WORKERS = 2  # runs side by side, one thread each: the networks are too small to share


def run_demo(seed: int, out: Path, runs: list[tuple[str, str, dict[str, Any]]] = RUNS) -> int:
    """Run the demo into `out`, replacing runs of an earlier demo there, and print its table; returns the exit code."""
    begun = time.monotonic()
    results: list[Result | None] = [None] * len(runs)
    workers = min(WORKERS, os.cpu_count() or 1, len(runs))
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool, count_bar(len(runs)) as done:
        jobs = {pool.submit(one_run, seed, out, *spec): i for i, spec in enumerate(runs)}
        for job in as_completed(jobs):
            result = job.result()
            if isinstance(result, int):
                pool.shutdown(cancel_futures=True)
                print("subnet-kernels: the demo was stopped; started again, it begins anew", file=sys.stderr)
                return 128 + result
            results[jobs[job]] = result
            done(f"{name_of(result)}: {result.seconds['total']:.0f} s")
    plots = [("after the last task", draw_final(results, out))] if len(results) > 1 else []
    for result, (name, stream, _) in zip(results, runs):
        plots.append((name_of(result), out / f"{name}-{stream}" / f"seed-{seed}" / "accuracy_matrix.png"))
    write_atomic(out / "report.html", page("subnet-kernels demo", results, plots))
    print_table(results)
    print_controls(results)
    print(f"{len(runs)} runs in {time.monotonic() - begun:.0f} s; {out / 'report.html'}")
    return 0


def one_run(seed: int, out: Path, name: str, stream: str, values: dict[str, Any]) -> Result | int:
    """One run in a process of its own; the signal's number where it was stopped."""
    torch.set_num_threads(1)
    folder = out / f"{name}-{stream}" / f"seed-{seed}"
    if (folder / "metrics.jsonl").exists():
        shutil.rmtree(folder)
    settings = Settings(name, stream).resolve(None, values)
    method_config, benchmark_config, run_config = settings.build()
    benchmark = settings.benchmark(benchmark_config, seed)
    method = settings.method(method_config, benchmark, seed)
    try:
        return run(method, benchmark, run_config, folder, note={"fidelity": settings.fidelity})
    except Interrupted as stopped:
        return stopped.signum


def print_table(results: list[Result]) -> None:
    """The runs' numbers on stdout."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("run", no_wrap=True)
    for name in SHOWN:
        heading, unit = COLUMNS[name]
        table.add_column(f"{heading} ({unit})" if unit else heading, justify="right")
    for result in results:
        row = table_row(result)
        table.add_row(name_of(result).rsplit(",", 1)[0], *(number(row[name]) for name in SHOWN))
    console = Console()
    Console(width=max(console.width, 110)).print(table)


def print_controls(results: list[Result]) -> None:
    """Beside a run's new tasks, what it measured for comparison: means over them, in percent."""
    for result in results:
        means = {key.removesuffix("_mean"): value for key, value in result.method_report.items() if key.endswith("_mean")}
        if means:
            listed = ", ".join(f"{name.replace('_', ' ')} {number(value)}" for name, value in means.items())
            print(f"{name_of(result).rsplit(',', 1)[0]}, new tasks (%): {listed}")
