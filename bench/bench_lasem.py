"""LASEM's E-step and M-step of a batch, forward and backward: all 16 configurations as one tree, beside one network after another.

The network and batch of the papers' CIFAR-100: four convolutions of 32, 32, 64, 64, ten rows. One after another is what the authors'
program does: every network twice, without dropout for the posterior and with it for the gradients, which are added up by that posterior;
in PyTorch's usual layout, and in the tree's, which is faster here. The tree makes 30 layer evaluations for their 64, but the last layer is
most of the work, and there it saves nothing: counted in multiplications its forward is 1 of 1.7, and it goes forward once for their twice,
which is 2.3 in all. Expected before any measurement: 3 times as fast as the usual layout on one thread.
"""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from measure import measure, only_on, report, targets_on

from subnet_pipelines.benchmarks.base import Batch, Benchmark, BenchmarkConfig
from subnet_pipelines.methods.lasem import LASEM, LASEMConfig
from subnet_pipelines.methods.selective import SHARING, features

ROWS = 10
TARGET = 3.0


class Pictures(Benchmark):
    """As much of a stream as the method asks for."""

    name, classes, input_shape = "pictures", 10, (3, 32, 32)


class Contest:
    """A method in the middle of a task, and a batch."""

    def __init__(self, sharing: str):
        torch.manual_seed(1)
        self.method = LASEM(LASEMConfig(sharing=sharing), Pictures(BenchmarkConfig(), 1, torch.device("cpu")), 1)
        self.batch = Batch(torch.randn(ROWS, 3, 32, 32), torch.randint(0, 10, (ROWS,)), None)
        self.method.prior.copy_(torch.softmax(torch.randn(16), 0))

    def tree(self) -> None:
        self.method.zero_grad()
        loss, _ = self.method.expected(self.batch)
        loss.backward()

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
        """The same gradients, without dropout, whose masks differ."""
        dropped, self.method.dropped = self.method.dropped, lambda made: made
        found = []
        for evaluate in (self.tree, lambda: self.one_by_one(plain), lambda: self.one_by_one(features)):
            evaluate()
            found.append([p.grad.clone() for p in self.method.parameters()])
        for ours, *others in zip(*found):
            assert all(float((ours - theirs).norm()) <= 1e-5 * float(theirs.norm()) for theirs in others)
        self.method.dropped = dropped


def plain(net, kernels, x: torch.Tensor) -> torch.Tensor:
    """`features` as one writes it."""
    for layer, (weight, bias) in zip(net.layers, kernels):
        x = F.conv2d(x, weight, bias, padding=layer.kernel // 2).relu()
        x = F.max_pool2d(x, layer.pool) if layer.pool > 1 else x
    return x.flatten(1)


@only_on("cpu")
@pytest.mark.parametrize("sharing", SHARING)
def bench_lasem(thread_count, sharing):
    contest = Contest(sharing)
    contest.check()
    rivals = {
        "ours: the tree": contest.tree,
        "one by one": lambda: contest.one_by_one(plain),
        "one by one, channels last": lambda: contest.one_by_one(features),
    }
    times = measure(rivals, seconds=8.0)
    name = f"{sharing}, 4 convolutions, batch {ROWS}, 16 configurations"
    report("lasem", name, times, "ours: the tree", targets_on(thread_count, {"one by one": TARGET}))
