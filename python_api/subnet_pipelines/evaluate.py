"""Measuring: what a method predicts on a task's test rows, the matrix of that, and its loss on validation rows."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from subnet_pipelines.benchmarks.base import Benchmark, batches
from subnet_pipelines.bounds import Count, check_bounds
from subnet_pipelines.chance import stream
from subnet_pipelines.errors import NotLearnt
from subnet_pipelines.interrupt import Stop
from subnet_pipelines.methods.base import Clock, Method


@dataclass(frozen=True)
class RunConfig:
    """Settings of the loop."""

    eval_rows: Literal["auto", "all", "last"] = "auto"
    """Measure every learnt task after each task (all), or only the one just learnt until the end (last); auto is all up to 50 tasks."""
    eval_batch: Count = 500
    """Rows of a test batch."""
    eval_future: bool = False
    """Measure tasks not learnt yet too, for forward transfer."""
    cuda_graph: bool = False
    """On a GPU, record a training step as one CUDA graph in each phase and replay it: the same bits, without the host's work."""
    curves: Literal["validation"] | None = None
    """After every epoch, write loss and accuracy over the task's validation rows to metrics.jsonl."""

    def check(self) -> None:
        """Raise Refusal where a field is out of range."""
        check_bounds(self)


def evaluate(method: Method, benchmark: Benchmark, j: int, batch_size: int, stop: Stop | None = None) -> dict[str, float | None]:
    """{"right": percent of task j's test rows right, "told": percent whose task was inferred right}; None where there is none.

    The id is given iff the scenario gives it at test, and "told" is then None; a task that the method has not learnt gives None. A row
    is right iff its label is and, where the id is not given and labels are unshared, its task too. Rows come in an order drawn from the
    seed: files may hold class after class, and a network that norms by its batch would see one class alone. Raises Interrupted between
    batches.
    """
    x, y = benchmark.test(j).tensors()
    order = torch.randperm(len(y), generator=stream(benchmark.seed, "test order", j)).to(x.device)
    given = j if benchmark.scenario.test_id else None
    right, told = torch.zeros((), dtype=torch.int64, device=x.device), torch.zeros((), dtype=torch.int64, device=x.device)
    inferred = False
    method.eval()
    with torch.no_grad():
        if given is None:
            method.prepare(x, order)
        for batch in batches(x, y, None, order, batch_size):
            if stop is not None:
                stop.obey("while measuring")
            try:
                logits, task = method.predict(batch.x, given)
            except NotLearnt:
                return {"right": None, "told": None}
            good = logits.argmax(1) == batch.y
            if given is None and task is not None:
                inferred = True
                told += (task == j).sum()
                if not benchmark.scenario.shared:
                    good &= task == j
            right += good.sum()
    return {"right": 100 * right.item() / len(y), "told": 100 * told.item() / len(y) if inferred else None}


def validate(method: Method, clock: Clock, x: Tensor, y: Tensor, t: Tensor | None, order: Tensor, batch_size: int) -> float:
    """The method's mean validation loss over rows x (n, ...), y (n,), t (n,) or None, taken in the order int64 (n,)."""
    method.eval()
    with torch.no_grad():
        losses: list[Any] = [method.validate(b, clock) * len(b.y) for b in batches(x, y, t, order, batch_size)]
    return torch.stack(losses).sum().item() / len(x)


def accuracy(method: Method, clock: Clock, x: Tensor, y: Tensor, t: Tensor | None, order: Tensor, batch_size: int) -> float:
    """Percent of the rows, given as to `validate`, that the network in training gets right."""
    method.eval()
    for norm in method.norms:
        norm.train()  # as in `Method.validate`
    with torch.no_grad():
        right = sum((method.logits(b, clock).argmax(1) == b.y).sum() for b in batches(x, y, t, order, batch_size))
    return 100 * right.item() / len(x)


class Matrix:
    """What has been measured: rows of accuracies, and how much of the backbone was in use. Keys are strings, as in JSON."""

    def __init__(self, method: Method, benchmark: Benchmark, config: RunConfig, state: dict[str, Any] | None = None):
        self.method, self.benchmark, self.config = method, benchmark, config
        state = state or {"rows": {}, "used": {}}
        self.rows: dict[str, dict[str, dict[str, float | None]]] = state["rows"]  # row -> task -> {"right", "told"}
        self.used: dict[str, float] = state["used"]  # row -> used fraction, from methods that report it

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds of it."""
        return {"rows": self.rows, "used": self.used}

    def mark(self, t: int, stop: Stop) -> dict[str, Any] | None:
        """Measure row t, the tasks so far; returns its line of metrics.jsonl. See `measure`."""
        total, rows = len(self.benchmark), self.config.eval_rows
        every = range(total) if self.config.eval_future else range(t + 1)
        line = self.measure(str(t), every if rows == "all" or (rows == "auto" and total <= 50) or t == total - 1 else [t], stop)
        used = (self.method.report().get("capacity") or {}).get("used_fraction")
        if used is not None:
            self.used[str(t)] = used
        return line

    def leave_out(self, end: int) -> None:
        """Rows before row `end` are of times at which there was nothing to measure: null."""
        self.rows |= {str(t): {str(j): {"right": None, "told": None} for j in range(t + 1)} for t in range(end)}

    def measure(self, name: str, tests: Iterable[int], stop: Stop) -> dict[str, Any] | None:
        """Measure what is missing of a row; None where nothing is. Raises Interrupted, and keeps what is measured by then."""
        row = self.rows.setdefault(name, {})
        missing = [j for j in tests if str(j) not in row]
        for j in missing:
            row[str(j)] = evaluate(self.method, self.benchmark, j, self.config.eval_batch, stop)
        return {"kind": "row", "row": name, "accuracy": {j: v["right"] for j, v in row.items()}} if missing else None
