"""LASEM's E-step and M-step of a batch, forward and backward: all 16 configurations as one tree, beside one network after another.

The network and batch of the papers' CIFAR-100: four convolutions of 32, 32, 64, 64, ten rows. One after another is what the authors'
program does: every network twice, without dropout for the posterior and with it for the gradients, which are added up by that posterior;
in PyTorch's usual layout, and in the tree's, which is faster here. The tree makes 30 layer evaluations for their 64, but the last layer is
most of the work, and there it saves nothing: counted in multiplications its forward is 1 of 1.7, and it goes forward once for their twice,
which is 2.3 in all. Expected before any measurement: 3 times as fast as the usual layout on one thread. The tree with PyTorch's pooling,
ReLU and copies in the place of `max_pool_relu` is what that op saves of a step: expected .9 of it in float32, .8 in bfloat16.
"""

from collections.abc import Callable
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from bench_pool import plain as pooled
from measure import measure, only_on, report, targets_on

from subnet_pipelines.benchmarks.base import Batch, Benchmark, BenchmarkConfig
from subnet_pipelines.methods import selective
from subnet_pipelines.methods.lasem import LASEM, LASEMConfig
from subnet_pipelines.methods.selective import SHARING, features

ROWS = 10
TARGET = 3.0


class Pictures(Benchmark):
    """As much of a stream as the method asks for."""

    name, classes, input_shape = "pictures", 10, (3, 32, 32)


class Contest:
    """A method in the middle of a task, and a batch."""

    def __init__(self, sharing: str, amp: str):
        torch.manual_seed(1)
        self.method = LASEM(LASEMConfig(sharing=sharing, amp=amp), Pictures(BenchmarkConfig(), 1, torch.device("cpu")), 1)
        self.batch = Batch(torch.randn(ROWS, 3, 32, 32), torch.randint(0, 10, (ROWS,)), None)
        self.method.prior.copy_(torch.softmax(torch.randn(16), 0))

    def tree(self) -> None:
        self.method.zero_grad()
        loss, _ = self.method.expected(self.batch)
        loss.backward()

    def tree_of_ops(self) -> None:
        with mock.patch.object(selective, "max_pool_relu", pooled):
            self.tree()

    def one_by_one(self, features: Callable) -> None:
        method, (x, y, _) = self.method, self.batch
        method.zero_grad()
        with torch.no_grad():
            logits = [method.scores(features(method.net, method.kernels(way), x)) for way in method.ways]
            posterior = method.posterior(torch.stack(logits), y)
        for way, p in zip(method.ways, posterior):
            made = method.dropped(features(method.net, method.kernels(way), x))
            loss = F.cross_entropy(method.scores(made), y)
            for share, added in zip(way, method.added):
                if share and (penalty := method.rule.penalty(added)) is not None:
                    loss = loss + method.config.orthogonality * penalty
            (p * loss).backward()

    def check(self) -> None:
        """The same gradients, without dropout, whose masks differ; of networks one by one in bfloat16 as far as its rounding lets them."""
        near = 1e-5 if self.method.net.dtype is None else 0.05
        with mock.patch.object(self.method, "dropped", lambda made: made):
            found = []
            for evaluate in (self.tree, self.tree_of_ops, lambda: self.one_by_one(plain), lambda: self.one_by_one(features)):
                evaluate()
                found.append([p.grad.clone() for p in self.method.parameters()])
        for ours, by_ops, *others in zip(*found):
            assert torch.equal(ours, by_ops)
            assert all(float((ours - theirs).norm()) <= near * float(theirs.norm()) for theirs in others)


def plain(net, kernels, x: torch.Tensor) -> torch.Tensor:
    """`features` as one writes it."""
    dtype, x = x.dtype, x.to(net.dtype or x.dtype)
    for layer, (weight, bias) in zip(net.layers, kernels):
        x = F.conv2d(x, weight.to(x.dtype), bias.to(x.dtype), padding=layer.kernel // 2).relu()
        x = F.max_pool2d(x, layer.pool) if layer.pool > 1 else x
    return x.flatten(1).to(dtype)


@only_on("cpu")
@pytest.mark.parametrize("amp", ["none", "bf16"])
@pytest.mark.parametrize("sharing", SHARING)
def bench_lasem(thread_count, sharing, amp):
    contest = Contest(sharing, amp)
    contest.check()
    rivals = {
        "ours: the tree": contest.tree,
        "the tree, pooling by three ops": contest.tree_of_ops,
        "one by one": lambda: contest.one_by_one(plain),
        "one by one, channels last": lambda: contest.one_by_one(features),
    }
    times = measure(rivals, seconds=8.0)
    name = f"{sharing}, 4 convolutions, batch {ROWS}, 16 configurations" + ("" if amp == "none" else ", bfloat16")
    report("lasem", name, times, "ours: the tree", targets_on(thread_count, {"one by one": TARGET}))
