"""kill -9, again and again: `python tests/torture.py [--points 200] [--seed 1] [--only run|append]` (make torture).

A point is a process that is killed at a random moment, of a short WSN run that writes a checkpoint every step, or of a bank to which task
after task is appended and saved. The run then goes on, to the bits of an unbroken one: result, metrics and every file of the bank. The
bank must open, with every task in it that `save` had returned for, whose bits are right; appending goes on, to the same files. (The
system stays up, so what fsync is for is not tried.)
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from streams import Contrary
from torch import nn

import subnet_kernels as sk
from subnet_pipelines import METHODS, RunConfig, report, run
from subnet_pipelines.benchmarks.base import BenchmarkConfig

APPENDS = 12  # tasks of the bank


def in_child(work: Callable[[int], None], until: float | None = None) -> tuple[bytes, bool]:
    """Run work in a process of its own and kill that after some seconds; work is given a pipe. -> what it wrote there, whether it was
    killed. Raises RuntimeError where it fails by itself."""
    out, into = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.close(out)
            work(into)
        except BaseException:
            sys.excepthook(*sys.exc_info())
            os._exit(1)
        os._exit(0)
    os.close(into)
    if until is not None:
        time.sleep(until)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    with open(out, "rb") as pipe:
        said = pipe.read()
    killed = os.WIFSIGNALED(status)
    if not killed and os.WEXITSTATUS(status):
        raise RuntimeError(f"the process failed by itself, with exit code {os.WEXITSTATUS(status)}")
    return said, killed


def files_of(folder: Path) -> dict[str, str]:
    """The manifest of a bank and every file that it names, by what is in them."""
    manifest = json.loads((folder / "manifest.json").read_text())
    names = ["manifest.json", *manifest["segments"], *(row["file"] for row in manifest["entries"])]
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}


# -------------------------------------------------------------------------------------------------------------- a run


def train(out: Path) -> None:
    """A short WSN run, begun or gone on with."""
    benchmark = Contrary(BenchmarkConfig(tasks=3, val_fraction=0.25, scenario="GG"))
    method = METHODS["wsn"](METHODS["wsn"].Config(epochs=2, batch_size=7, density=0.3), benchmark, 1)
    report.draw = lambda results, folder: []
    run(method, benchmark, RunConfig(), out, resume=True, save_every=0)


def state_of_run(out: Path) -> dict:
    """All that a finished run leaves, but for its seconds and for where it ran: a commit may fall between two runs."""
    result = json.loads((out / "result.json").read_text())
    del result["seconds"], result["environment"]
    return {"result": result, "metrics": (out / "metrics.jsonl").read_text(), "bank": files_of(out / "bank")}


def torture_run(points: int, chance: random.Random, folder: Path) -> int:
    """-> how many were killed before they were done."""
    begun = time.monotonic()
    in_child(lambda _: train(folder / "whole"))
    seconds, expected, killed = time.monotonic() - begun, state_of_run(folder / "whole"), 0
    for point in range(points):
        out = folder / f"run-{point}"
        killed += in_child(lambda _, out=out: train(out), chance.uniform(0, seconds))[1]
        in_child(lambda _, out=out: train(out))
        found = state_of_run(out)
        if wrong := [name for name in expected if found[name] != expected[name]]:
            raise AssertionError(f"point {point}: the run that went on ends with another {', '.join(wrong)}")
        shutil.rmtree(out)
    return killed


# -------------------------------------------------------------------------------------------------------------- a bank


def append(folder: Path, said: int) -> None:
    """Open the bank, or make one, and append and save tasks until there are APPENDS; says each that is saved."""
    torch.manual_seed(0)
    model = sk.convert(nn.Linear(200, 100, bias=False), sk.SubnetConfig(train_weights=True))
    bank = sk.MaskBank.load(folder, model) if (folder / "manifest.json").exists() else sk.MaskBank(model)
    for task in range(len(bank), APPENDS):
        bank.commit(str(task), bits={"": bits_of(task)}, number=task)
        bank.save(folder, coded=task % 2 == 1)
        os.write(said, bytes([task]))


def bits_of(task: int) -> torch.Tensor:
    return sk.pack(torch.rand(100, 200, generator=torch.Generator().manual_seed(task)) < 0.1)


def look(folder: Path, least: int) -> None:
    """Open the bank and compare what is in it; least: tasks that must be there."""
    if not (folder / "manifest.json").exists():
        assert not least, f"{least} tasks were saved, and there is no bank"
        return
    torch.manual_seed(0)
    bank = sk.MaskBank.load(folder, sk.convert(nn.Linear(200, 100, bias=False), sk.SubnetConfig(train_weights=True)))
    assert bank.names == [str(task) for task in range(len(bank))], f"the bank has {bank.names}"
    assert len(bank) >= least, f"{least} tasks were saved, the bank has {len(bank)}"
    assert all(torch.equal(bank.bits(str(task))[""], bits_of(task)) for task in range(len(bank)))
    bank.verify()


def torture_append(points: int, chance: random.Random, folder: Path) -> int:
    """-> how many were killed before they were done."""
    begun = time.monotonic()
    in_child(lambda said: append(folder / "whole", said))
    seconds, expected, killed = time.monotonic() - begun, files_of(folder / "whole"), 0
    for point in range(points):
        out = folder / f"bank-{point}"
        said, was = in_child(lambda said, out=out: append(out, said), chance.uniform(0, seconds))
        killed += was
        in_child(lambda _, out=out, said=said: look(out, len(said)))
        in_child(lambda said, out=out: append(out, said))
        if files_of(out) != expected:
            raise AssertionError(f"point {point}: the bank that was gone on with ends otherwise")
        shutil.rmtree(out)
    return killed


TORTURES = {"run": torture_run, "append": torture_append}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("--points", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", choices=TORTURES)
    given = parser.parse_args()
    torch.set_num_threads(1)  # a process that has threads cannot be forked safely
    for name in [given.only] if given.only else TORTURES:
        begun = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            killed = TORTURES[name](given.points, random.Random(given.seed), Path(folder))
        print(
            f"{name}: {given.points} of {given.points} points resumed to the same bits, {killed} of them killed midway, "
            f"{time.monotonic() - begun:.0f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
