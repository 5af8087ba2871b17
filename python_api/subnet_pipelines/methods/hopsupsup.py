"""HopSupSup: masks stored in a Hopfield network (Wortsman et al., "Supermasks in Superposition", NeurIPS 2020).

The weights of a network stay at their random values, and a task is a mask over the gains of its batch norms. Each mask is a pattern of
+1 and -1 that is added to the d x d matrix of a Hopfield network by Storkey's rule. Without a task id a mask is found again by descent in
the network's energy and in the entropy of the logits of the task's test rows, labels unseen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

import subnet_kernels as sk
from subnet_kernels import optim
from subnet_kernels.convert import signed_constant_
from subnet_kernels.layers import DENSE, SubnetLayer
from subnet_pipelines.benchmarks.base import Benchmark, Task
from subnet_pipelines.bounds import Count, Fraction, NotNegative, Positive, Several
from subnet_pipelines.chance import seeded, stream
from subnet_pipelines.errors import NotLearnt
from subnet_pipelines.inference import entropy
from subnet_pipelines.methods.base import MethodConfig, Phase, Prediction
from subnet_pipelines.methods.masked import MaskedMethod, entry_name
from subnet_pipelines.models import Gain, GainNet


class SubnetGain(SubnetLayer, Gain):
    """`Gain` through a mask: a feature whose gain is closed is 0."""

    def _product(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return self.normed(x, weight)


DENSE[Gain] = SubnetGain


# ---- the Hopfield network -------------------------------------------------------------------------------------------


def store(matrix: Tensor, z: Tensor) -> Tensor:
    """Add a pattern z of +1 and -1 (d,) to a Hopfield matrix (d, d), in place, by Storkey's rule as the authors' code has it.

    W += (z z^T - I - z h^T - h z^T) / d with h = W z, which needs no other pattern. The matrix stays symmetric to the bit.
    """
    cross = torch.outer(z, matrix @ z)
    outer = torch.outer(z, z)
    outer.diagonal().sub_(1)
    return matrix.add_((outer - (cross + cross.T)) / len(z))


def energy(matrix: Tensor, z: Tensor) -> Tensor:
    """-z^T W z / 2 of z (d,), 0-dim: least at the patterns that were stored."""
    return -0.5 * (z @ (matrix @ z))


def fold(matrix: Tensor) -> Tensor:
    """The upper triangle of a symmetric matrix (d, d), its diagonal included -> (d (d + 1) / 2,)."""
    return matrix[torch.ones_like(matrix, dtype=torch.bool).triu()]


def unfold(triangle: Tensor, d: int) -> Tensor:
    """The symmetric float32 matrix (d, d) of an upper triangle (d (d + 1) / 2,)."""
    matrix = torch.zeros((d, d), device=triangle.device)
    matrix[torch.ones_like(matrix, dtype=torch.bool).triu()] = triangle.float()
    return matrix + matrix.triu(1).T


@dataclass(frozen=True)
class Descent:
    """How a mask is recovered; the authors' numbers."""

    gamma: float = 1.5e-3
    lr: float = 500.0
    momentum: float = 0.9
    weight_decay: float = 1e-4


def recover(
    model: nn.Module,
    matrices: Mapping[str, Tensor],
    starts: Mapping[str, Tensor],
    batches: Sequence[Tensor],
    descent: Descent,
    look: Callable[[Mapping[str, Tensor]], None] | None = None,
) -> dict[str, Tensor]:
    """Scores of the mask that belongs to unlabelled rows of one task, {layer name: (d,)}: open where >= 0.

    model: with its live masks, which stay as they are; matrices (d, d) and starts (d,) of each of its masked layers; batches: T of them,
    rows (B, ...). One step of SGD each, on (t/T) gamma (sum of the layers' energies) + (1 - t/T) (mean entropy of the logits), t = 1..T;
    the mask passes its gradient straight through. look is called with the scores before every step and after the last.
    """
    scores = {name: start.clone().requires_grad_() for name, start in starts.items()}
    opt = torch.optim.SGD(scores.values(), descent.lr, descent.momentum, weight_decay=descent.weight_decay)
    for t, x in enumerate(batches, 1):
        if look is not None:
            look(scores)
        with torch.enable_grad():
            logits = torch.func.functional_call(model, {f"{name}.scores": s for name, s in scores.items()}, (x,))
            energies = [energy(matrices[name], signs(s) + 2 * (s - s.detach())) for name, s in scores.items()]
            share = t / len(batches)
            loss = share * descent.gamma * sum(energies) + (1 - share) * entropy(logits).mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
    if look is not None:
        look(scores)
    return {name: s.detach() for name, s in scores.items()}


def signs(scores: Tensor) -> Tensor:
    """The pattern of a mask: +1 where score >= 0, else -1, in the scores' dtype and without a gradient."""
    return 2 * (scores.detach() >= 0).to(scores.dtype) - 1


# ---- the method -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HopSupSupConfig(MethodConfig):
    """HopSupSup; the defaults are the recipe of the authors' code on Split MNIST."""

    epochs: int = 1
    """Epochs of a task, where iterations is null."""
    batch_size: int = 128
    """Rows of a training batch."""
    width: Several = 2048
    """d, the width of the two hidden layers, and so of the Hopfield networks."""
    lr: Positive = 0.1
    """SGD's rate for the scores, all 0 at a task's begin (the authors' cosine moves after an epoch, and they train for one)."""
    momentum: Fraction = 0.9
    """Its momentum."""
    weight_decay: NotNegative = 1e-4
    """L2 of the scores."""
    matrix_dtype: Literal["float32", "float16"] = "float32"
    """What the upper triangles of the Hopfield matrices are stored in; the arithmetic is float32's."""
    recovery_batch: Several = 64
    """Rows of a step of the recovery, which goes once over the test rows of a task."""
    recovery_tries: Count = 1
    """Recoveries of a task, each from its rows in another order, of which the mask counts whose logits have the least entropy; the authors
    make one."""
    recovery_lr: Positive = 500.0
    """SGD's rate in the recovery."""
    recovery_momentum: Fraction = 0.9
    """Its momentum."""
    recovery_weight_decay: NotNegative = 1e-4
    """L2 of the recovery's scores."""
    gamma: NotNegative = 1.5e-3
    """Weight of the energy, which grows from 0 to it while the weight of the entropy falls from 1 to 0."""

    @property
    def descent(self) -> Descent:
        return Descent(self.gamma, self.recovery_lr, self.recovery_momentum, self.recovery_weight_decay)


class Found(NamedTuple):
    """A recovered mask."""

    nearest: int  # the task whose stored mask differs least from it
    bits: dict[str, Tensor]  # packed, a layer
    entropy: float  # of the logits, in nats, mean over the rows
    way: Tensor  # int64 (T + 1, layers, tasks): gains that differ from every stored mask, before each step and after the last


class HopSupSup(MaskedMethod):
    """A mask over batch norm gains for each task; without the id it is recovered from Hopfield networks, one a layer."""

    name = "hopsupsup"
    Config = HopSupSupConfig
    static_step = True
    scenarios = ("GG", "GNs", "GNu")
    evaluation = ("gamma", *(f"recovery_{name}" for name in ("batch", "tries", "lr", "momentum", "weight_decay")))

    def __init__(self, config: HopSupSupConfig, benchmark: Benchmark, seed: int):
        super().__init__(config, benchmark, seed)
        self.benchmark = benchmark
        with seeded(seed, "init"):
            network = GainNet([math.prod(benchmark.input_shape), config.width, config.width], benchmark.classes)
            for layer in network.modules():
                if isinstance(layer, nn.Linear):
                    signed_constant_(layer.weight.requires_grad_(False))
            masked = lambda _, module: isinstance(module, Gain)  # noqa: E731
            self.adopt(network, sk.SubnetConfig(select="threshold", filter=masked))
        empty = torch.zeros(config.width * (config.width + 1) // 2, dtype=getattr(torch, config.matrix_dtype), device=self.device)
        for i in range(len(self.bank.layers())):
            self.register_buffer(f"hopfield_{i}", empty.clone())
        self.found: Found | None = None  # for the test rows that were prepared last

    def plan(self, task: Task) -> list[Phase]:
        c = self.config
        return [
            Phase(
                "mask",
                epochs=c.epochs,
                steps=c.iterations,
                batch_size=c.batch_size,
                optimizer=self.optimizer,
                first=self.begin,
                then=lambda: self.commit(task),
            )
        ]

    def begin(self) -> None:
        """All gains are open."""
        self.bank.begin()
        with torch.no_grad():
            for layer in self.bank.layers():
                layer.scores.zero_()
        sk.refresh(self.model)

    def optimizer(self) -> torch.optim.Optimizer:
        c, learning = self.config, [layer.scores for layer in self.bank.layers()]
        return optim.SGD(learning, c.lr, momentum=c.momentum, weight_decay=c.weight_decay, fuse_ste=True)

    @torch.no_grad()
    def commit(self, task: Task) -> None:
        self.run_live()
        self.bank.commit(entry_name(task.index))
        patterns = self.patterns(self.bank.bits(entry_name(task.index)))
        for i, (matrix, z) in enumerate(zip(self.matrices().values(), patterns.values())):
            self.get_buffer(f"hopfield_{i}").copy_(fold(store(matrix, z)))

    def matrices(self) -> dict[str, Tensor]:
        """The Hopfield matrix of each masked layer, float32 (d, d)."""
        d = self.config.width
        return {name: unfold(self.get_buffer(f"hopfield_{i}"), d) for i, name in enumerate(self.bank.layer_names)}

    def patterns(self, bits: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """+1 and -1 for open and closed, float32 (d,) for each masked layer, of packed bits."""
        return {name: 2 * sk.unpack(b, (self.config.width,)).float() - 1 for name, b in bits.items()}

    # ---- whose task is it? ------------------------------------------------------------------------------------------

    def prepare(self, x: Tensor, order: Tensor) -> None:
        self.found = self.find(x, order) if len(self.bank) else None

    def find(self, x: Tensor, order: Tensor) -> Found:
        """Recover the mask of the rows x (n, ...), taken in this order and, where there are more tries, in others."""
        stored = [self.patterns(self.bank.bits(name)) for name in self.bank.masks]
        starts = {name: torch.stack([z[name] for z in stored]).mean(0) for name in self.bank.layer_names}
        matrices, tries = self.matrices(), []
        for attempt in range(self.config.recovery_tries):
            way: list[Tensor] = []

            def look(scores: Mapping[str, Tensor], way: list[Tensor] = way) -> None:
                differ = [torch.stack([(signs(s) != z[name]).sum() for z in stored]) for name, s in scores.items()]
                way.append(torch.stack(differ))

            if attempt:
                mixed = torch.randperm(len(order), generator=stream(self.seed, "recovery", attempt))
                order = order[mixed.to(order.device)]
            batches = [x[rows] for rows in order.split(self.config.recovery_batch)]
            self.run_live()
            scores = recover(self.model, matrices, starts, batches, self.config.descent, look)
            bits = {name: sk.threshold(s, 0.0) for name, s in scores.items()}
            self.bank.activate(None, bits=bits)
            doubt = torch.cat([entropy(self.network(rows)) for rows in batches]).mean().item()
            tries.append(Found(int(way[-1].sum(0).argmin()), bits, doubt, torch.stack(way)))
        return min(tries, key=lambda found: found.entropy)

    def predict(self, x: Tensor, task: int | None) -> Prediction:
        if task is not None:
            return super().predict(x, task)
        if self.found is None:
            raise NotLearnt("no task has been learnt whose mask could be recovered")
        self.bank.activate(None, bits=self.found.bits)
        return Prediction(self.network(x), torch.full((len(x),), self.found.nearest, device=x.device))

    # ---- how well did it go? ----------------------------------------------------------------------------------------

    def final_report(self) -> dict[str, Any]:
        report = super().final_report()
        if not self.benchmark.scenario.test_id:
            report["recovery"] = self.recoveries()
        return report

    @torch.no_grad()
    def recoveries(self) -> dict[str, Any]:
        """Every task's recovery from its test rows once more, and accuracies (percent) with its own mask and with the recovered one.

        distance: gains that differ from the task's own mask, {layer: [task][step]}, T steps and the end; ends: those of all layers, at
        the end, from every stored mask, [task][mask]; nearest: the closest of these; entropy: mean over the rows, through the recovered
        mask, which tells a failure without a label.
        """
        self.eval()
        own, recovered, found = [], [], []
        distance: dict[str, list[list[int]]] = {name: [] for name in self.bank.layer_names}
        for j in range(len(self.bank)):
            x, y = self.benchmark.test(j).tensors()
            order = torch.randperm(len(y), generator=stream(self.benchmark.seed, "test order", j)).to(x.device)
            own.append(self.percent(x, y, order, j))
            self.found = self.find(x, order)
            recovered.append(self.percent(x, y, order, None))
            for name, steps in zip(distance, self.found.way.unbind(1)):
                distance[name].append(steps[:, j].tolist())
            found.append(self.found)
        triangles = [self.get_buffer(f"hopfield_{i}") for i in range(len(self.bank.layers()))]
        matrix_bytes, mask_bytes = sum(t.numel() * t.element_size() for t in triangles), self.bank.capacity()["mask_bytes"]
        return {
            "own_mask": own,
            "recovered_mask": recovered,
            "own_mask_mean": sum(own) / len(own),
            "recovered_mask_mean": sum(recovered) / len(recovered),
            "nearest": [f.nearest for f in found],
            "entropy": [f.entropy for f in found],
            "distance": distance,
            "ends": [f.way[-1].sum(0).tolist() for f in found],
            "gains": sum(layer.weight.numel() for layer in self.bank.layers()),
            "matrix_bytes": matrix_bytes,
            "mask_bytes": mask_bytes,
            "tasks_whose_masks_are_as_large": math.ceil(matrix_bytes / (mask_bytes / len(self.bank))),
        }

    def percent(self, x: Tensor, y: Tensor, order: Tensor, task: int | None) -> float:
        """Accuracy over the rows in this order, in batches of recovery_batch."""
        parts = order.split(self.config.recovery_batch)
        right = sum((self.predict(x[rows], task).logits.argmax(1) == y[rows]).sum() for rows in parts)
        return 100 * right.item() / len(y)
