"""Measuring: what a method predicts on a task's test rows, and its loss on validation rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from subnet_pipelines.benchmarks.base import Benchmark, batches
from subnet_pipelines.errors import NotLearnt
from subnet_pipelines.interrupt import Stop
from subnet_pipelines.methods.base import Clock, Method


def evaluate(method: Method, benchmark: Benchmark, j: int, batch_size: int, stop: Stop | None = None) -> dict[str, float | None]:
    """{"right": percent of task j's test rows right, "told": percent whose task was inferred right}; None where there is none.

    The id is given iff the scenario gives it at test, and "told" is then None; a task that the method has not learnt gives None. A row
    is right iff its label is and, where the id is not given and labels are unshared, its task too. Raises Interrupted between batches.
    """
    x, y = benchmark.test(j).tensors()
    given = j if benchmark.scenario.test_id else None
    right, told = torch.zeros((), dtype=torch.int64, device=x.device), torch.zeros((), dtype=torch.int64, device=x.device)
    inferred = False
    method.eval()
    with torch.no_grad():
        for batch in batches(x, y, None, None, batch_size):
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


def validate(method: Method, clock: Clock, x: Tensor, y: Tensor, t: Tensor | None, batch_size: int) -> float:
    """The method's mean validation loss over rows x (n, ...), y (n,), t (n,) or None."""
    method.eval()
    with torch.no_grad():
        losses: list[Any] = [method.validate(b, clock) * len(b.y) for b in batches(x, y, t, None, batch_size)]
    return torch.stack(losses).sum().item() / len(x)
