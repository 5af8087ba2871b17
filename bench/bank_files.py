"""A saved bank of 2,500 tasks: `python bench/bank_files.py [--tasks 2500] [--folder DIR]`.

LeNet-300-100 of docs/scale.md under random masks, as a folder and as one file, plain and coded. Of each form: its bytes; in a fresh
process, the milliseconds of `MaskBank.load` and then of the first task made active, of the processor and of the clock, the least of some
such processes; of the folder what one more task writes. Then bits a weight over the density of independent masks, beside their entropy.
Nothing is kept but what is printed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from bank_scale import random_masks
from bench_bank import lenet
from measure import commit, machine, versions

import subnet_kernels as sk
from subnet_kernels import codec, storage

DENSITIES = (0.03, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5)
N = 1_000_000
PROCESSES = 5

OPEN = """
import json, sys, time, torch
import subnet_kernels as sk
from bench_bank import lenet
torch.set_num_threads(1)
torch.manual_seed(0)
model = lenet()
now = lambda: torch.tensor([time.process_time(), time.perf_counter()], dtype=torch.float64)
begun = now()
bank = sk.MaskBank.load(sys.argv[1], model)
opened = now()
bank.activate(bank.masks[len(bank) // 2])
print(json.dumps((1e3 * torch.cat([opened - begun, now() - opened])).tolist()))
"""


def size_of(path: Path) -> int:
    """Bytes of a file, or of a folder's files."""
    return sum(file.stat().st_size for file in (path.iterdir() if path.is_dir() else [path]))


def opening(path: Path) -> list[float]:
    """Milliseconds of opening and of the first task after it, of the processor and of the clock each."""
    words = [sys.executable, "-c", OPEN, str(path)]
    runs = [subprocess.run(words, cwd=Path(__file__).parent, capture_output=True, check=True) for _ in range(PROCESSES)]
    return [min(times) for times in zip(*(json.loads(run.stdout) for run in runs))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("--tasks", type=int, default=2_500)
    parser.add_argument("--folder", type=Path, help="where, default a temporary folder")
    given = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{machine()['model']}, one thread, torch {versions()['torch']}, commit {commit()}\n")
    torch.manual_seed(0)
    bank, chance = sk.MaskBank(lenet()), np.random.default_rng(0)
    for task in range(given.tasks):
        bank.commit(str(task), bits=random_masks(bank, chance))
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.folder or Path(temporary)
        print(
            "| form | MB | bytes a task | opening (CPU ms) | (ms) | first task active (CPU ms) | (ms) |\n|---|---|---|---|---|---|---|"
        )
        for name, coded in (("folder", False), ("folder-coded", True), ("one-file", False), ("one-file-coded", True)):
            path = folder / name
            bank.save(path, coded=coded) if name.startswith("folder") else bank.pack_file(path, coded=coded)
            size, times = size_of(path), " | ".join(f"{t:.1f}" for t in opening(path))
            print(f"| {name} | {size / 1e6:.1f} | {size / given.tasks:,.0f} | {times} |", flush=True)
        bank = sk.MaskBank.load(folder / "folder", bank.model)
        bank.commit("one more", bits=random_masks(bank, chance))
        written, write = [], storage.write_atomic
        storage.write_atomic = lambda path, data: (written.append((path.name, len(data))), write(path, data))
        bank.save(folder / "folder")
        print("\none more task writes", ", ".join(f"{name} ({size:,} bytes)" for name, size in written))
    print(f"\n| density | entropy | coded | over it |\n|---|---|---|---|  ({N:,} weights, bits each)")
    for density in DENSITIES:
        bits = sk.pack(torch.rand(N, generator=torch.Generator().manual_seed(1)) < density)
        entropy, size = codec.entropy(bits, N) / N, 8 * len(codec.seal(bits, N)) / N
        print(f"| {density} | {entropy:.4f} | {size:.4f} | {100 * (size / entropy - 1):.2f} % |")
        assert size <= 1.005 * entropy + 8 * 64 / N


if __name__ == "__main__":
    main()
