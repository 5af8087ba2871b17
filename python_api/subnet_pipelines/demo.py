"""The demo: the methods side by side on a few tasks of the shipped images, everything real and measured, in about a minute."""

from __future__ import annotations

import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch

from subnet_pipelines.checkpoint import write_file
from subnet_pipelines.config import Settings
from subnet_pipelines.interrupt import Interrupted
from subnet_pipelines.progress import Quiet, shown_on
from subnet_pipelines.report import COLUMNS, Result, draw, name_of, number, page, table_row
from subnet_pipelines.train import run

RUNS: list[tuple[str, str, dict[str, Any]]] = [  # method, benchmark, settings over the recipe
    ("finetune", "permuted-mnist-mini", {"tasks": 5, "epochs": 5}),
    ("wsn", "permuted-mnist-mini", {"tasks": 5, "epochs": 5}),
    ("supsup", "permuted-mnist-mini", {"tasks": 5, "iterations": 400}),
    (
        "impresslearn",
        "rotated-mnist-mini",
        {"basis": 4, "angles": [0, 20, 40, 60, 10, 50], "basis_epochs": 6, "epochs": 8, "controls": False},
    ),
]
SHOWN = ("acc", "bwt", "task_inference", "used_fraction", "measured_cap", "seconds")


def run_demo(seed: int, out: Path, runs: list[tuple[str, str, dict[str, Any]]] = RUNS) -> int:
    """Run the demo into `out`, replacing runs of an earlier demo there, and print its table; returns the exit code."""
    begun, threads = time.monotonic(), torch.get_num_threads()
    torch.set_num_threads(1)  # the networks are tiny: more threads wait for each other
    results = []
    try:
        for name, stream, values in runs:
            folder = out / f"{name}-{stream}" / f"seed-{seed}"
            if (folder / "metrics.jsonl").exists():
                shutil.rmtree(folder)
            settings = Settings(name, stream).resolve(None, values)
            method_config, benchmark_config, run_config = settings.build()
            benchmark = settings.benchmark(benchmark_config, seed)
            method = settings.method(method_config, benchmark, seed)
            show: Quiet = shown_on(title=f"{name}: ")
            results.append(run(method, benchmark, run_config, folder, show=show, note={"fidelity": settings.fidelity}))
    except Interrupted as stopped:
        print("subnet-kernels: the demo was stopped; started again, it begins anew", file=sys.stderr)
        return 128 + stopped.signum
    finally:
        torch.set_num_threads(threads)
    plots = [("after the last task", p) for p in draw(results, out) if p.name == "final.png" and len(results) > 1]
    for result, (name, stream, _) in zip(results, runs):
        plots.append((name_of(result), out / f"{name}-{stream}" / f"seed-{seed}" / "accuracy_matrix.png"))
    write_file(out / "report.html", page("subnet-kernels demo", results, plots))
    print_table(results)
    print(f"{len(runs)} runs in {time.monotonic() - begun:.0f} s; {out / 'report.html'}")
    return 0


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
