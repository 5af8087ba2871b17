"""How sure a method is that infers its task, on rows of its tasks and on inputs of none: SupSup's own limitation, measured.

Nothing in the paper's rule says "none of these": the least gradient wins whatever the input. Two scores of a row may tell: the greatest
softmax of the answer, and how far the best task is ahead of the next.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from subnet_pipelines.benchmarks.base import Benchmark
from subnet_pipelines.benchmarks.files import data_folder
from subnet_pipelines.benchmarks.five import load_set
from subnet_pipelines.chance import stream
from subnet_pipelines.errors import Refusal

ROWS = 1000  # of each side, spread over the tasks
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def gap(grad: Tensor) -> Tensor:
    """How far the task of least gradient is ahead of the next, as a share of all gradients' sizes: (B, K) -> (B,) in [0, 1].

    NaN where there is one candidate and so no next one; 0 where all gradients are 0.
    """
    if grad.shape[-1] < 2:
        return grad.new_full(grad.shape[:-1], math.nan)
    least = grad.topk(2, -1, largest=False).values
    return (least[..., 1] - least[..., 0]) / grad.abs().sum(-1).clamp_min(torch.finfo(grad.dtype).tiny)


def auroc(own: Tensor, others: Tensor) -> float:
    """The chance that a row of the own side has a greater score than one of the others, ties counting half. (n,), (m,), n, m >= 1."""
    others = others.double().sort().values
    below, upto = (torch.searchsorted(others, own.double(), side=side) for side in ("left", "right"))
    return (below + upto).double().mean().item() / (2 * len(others))


def summary(own: Tensor, others: Tensor) -> dict[str, Any] | None:
    """Mean and quantiles of a score on both sides, and its AUROC; None where it is not defined."""
    if own.isnan().any() or others.isnan().any():
        return None
    at = torch.tensor(QUANTILES, dtype=torch.float64)
    side = lambda v: {  # noqa: E731
        "mean": v.double().mean().item(),
        "quantiles": dict(zip(map(str, QUANTILES), v.double().cpu().quantile(at).tolist())),
    }
    return {"own": side(own), "outsiders": side(others), "auroc": auroc(own, others)}


def own_rows(benchmark: Benchmark) -> Tensor:
    """Test rows of all tasks, as many of each, drawn from the seed: float (about `ROWS`, ...)."""
    parts, each = [], max(1, ROWS // len(benchmark))
    for j in range(len(benchmark)):
        x = benchmark.test(j).tensors()[0]
        parts.append(x[torch.randperm(len(x), generator=stream(benchmark.seed, "own rows", j))[:each].to(x.device)])
    return torch.cat(parts)


def pictures(benchmark: Benchmark, kind: Literal["noise", "fashion-mnist"], rows: int) -> Tensor:
    """So many pictures of no task, uint8 (rows, ...) as the benchmark's own. Raises Refusal where there are none of that kind.

    noise: every byte drawn evenly from 0 to 255; fashion-mnist: its first test pictures, where a task's have their 784 pixels.
    """
    shape = benchmark.test(0).x.shape[1:]
    if kind == "noise":
        return torch.randint(0, 256, (rows, *shape), generator=stream(benchmark.seed, "noise"), dtype=torch.uint8)
    if shape.numel() != 28 * 28:
        raise Refusal(f"outsiders fashion-mnist has pictures of 784 pixels, {benchmark.name} has {shape.numel()}; take noise")
    return load_set("fashion-mnist", data_folder(benchmark.data_dir))[1][0][:rows].reshape(-1, *shape)


def outside_rows(benchmark: Benchmark, kind: Literal["noise", "fashion-mnist"]) -> Tensor:
    """Inputs of no task, through the tasks' views in turn: float (about `ROWS`, ...). Raises Refusal as `pictures`."""
    each = max(1, ROWS // len(benchmark))
    found = pictures(benchmark, kind, each * len(benchmark)).to(benchmark.device)
    return torch.cat([benchmark.test(j).view(part) for j, part in enumerate(found.split(each))])
