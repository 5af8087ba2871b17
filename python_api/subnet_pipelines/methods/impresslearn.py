"""ImpressLearn: new tasks as combinations of masks that are there already (Bhardwaj et al., "ImpressLearn: Continual Learning via
Combined Task Impressions").

Basis tasks get SupSup masks over a fixed random network. A new task learns K coefficients a layer, alpha, over those masks:
W_eff = W * sum_k alpha_k M_k, by cross-entropy and a penalty that keeps sum |alpha| near 1; only alpha is stored.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

import subnet_kernels as sk
from subnet_kernels import optim
from subnet_pipelines.benchmarks.base import Batch, Benchmark, Task
from subnet_pipelines.chance import seeded
from subnet_pipelines.errors import Refusal
from subnet_pipelines.methods.base import Clock, Phase
from subnet_pipelines.methods.combinations import CombinationConfig, CombinationMethod
from subnet_pipelines.methods.masked import entry_name
from subnet_pipelines.models import MODELS


@dataclass(frozen=True)
class ImpressLearnConfig(CombinationConfig):
    """ImpressLearn; the defaults are the paper's for LeNet-300-100 on Rotated and Permuted MNIST, where it prints them."""

    epochs: int = 20
    """Epochs of alpha for a new task (not printed)."""
    batch_size: int = 128
    """Rows of a training batch."""
    model: Literal["mlp", "lenet-300-100"] = "lenet-300-100"
    """The network; all its layers are masked."""
    basis: int = 10
    """The first tasks of the stream, which get masks of their own."""
    density: float = 0.1
    """Kept share of every layer in a basis mask."""
    weight_init: Literal["signed_constant", "kaiming_normal"] = "kaiming_normal"
    """The fixed weights."""
    basis_epochs: int = 15
    """Epochs of a basis mask (not printed)."""
    basis_lr: float = 1e-3
    """Adam's rate for the scores of a basis mask (not printed)."""
    alpha_init: Literal["equal", "previous"] = "equal"
    """Where alpha starts: 1 / K each, or the task before it, if that one has coefficients: for a task that drifts."""
    optimizer: Literal["rmsprop", "adam", "sgd"] = "rmsprop"
    """Of alpha: the paper's table says RMSprop on MNIST and Adam elsewhere, its text SGD."""
    lr: float = 2e-3
    """Its rate."""
    penalty: float = 0.0
    """lambda of lambda * sum over layers of (sum_k |alpha_k| - 1)^2; the paper has 0 on MNIST and .005 elsewhere."""
    controls: bool = True
    """Beside each new task measure a mask of its own, the best single basis mask by validation, the mean basis mask, the first one, and
    the combination of the first new task."""
    own_mask_every: int = 1
    """Under controls train a mask of its own for the first new task and every so many-th after it."""

    def check(self) -> None:
        super().check()
        if not 0 < self.density <= 1:
            raise Refusal(f"density must be in (0, 1], got {self.density}")
        if self.basis < 1:
            raise Refusal(f"basis must be at least 1, got {self.basis}")
        if self.basis_epochs < 1:
            raise Refusal(f"basis_epochs must be at least 1, got {self.basis_epochs}")
        for name, rate in (("lr", self.lr), ("basis_lr", self.basis_lr)):
            if rate <= 0:
                raise Refusal(f"{name} must be positive, got {rate}")
        if self.own_mask_every < 1:
            raise Refusal(f"own_mask_every must be at least 1, got {self.own_mask_every}")
        if self.penalty < 0:
            raise Refusal(f"penalty must not be negative, got {self.penalty}")


class ImpressLearn(CombinationMethod):
    """Masks for the basis tasks, coefficients over them for every task after."""

    name = "impresslearn"
    Config = ImpressLearnConfig
    static_step = True

    def __init__(self, config: ImpressLearnConfig, benchmark: Benchmark, seed: int):
        super().__init__(config, benchmark, seed)
        if config.basis >= len(benchmark):
            raise Refusal(f"basis must leave new tasks: it is {config.basis}, {benchmark.name} has {len(benchmark)} tasks")
        with seeded(seed, "init"):
            network = MODELS[config.model](benchmark.classes, *benchmark.input_shape)
            self.adopt(network, sk.SubnetConfig(density=config.density, weight_init=config.weight_init))
        self.alphas: nn.Parameter | None = None
        self.measured: dict[str, dict[str, float]] = {}  # control -> new task -> percent

    def plan(self, task: Task) -> list[Phase]:
        c = self.config
        own = Phase(
            "mask",
            epochs=c.basis_epochs,
            batch_size=c.batch_size,
            optimizer=lambda: optim.Adam([layer.scores for layer in self.bank.layers()], c.basis_lr, fuse_ste=True),
            first=lambda: self.begin_mask(task.index),
            then=lambda: self.bank.commit(entry_name(task.index)),
        )
        if task.index < c.basis:
            return [own]
        own.name, own.then = "control mask", lambda: self.measure_own(task.index)
        kind = {"rmsprop": optim.RMSprop, "adam": optim.Adam, "sgd": optim.SGD}[c.optimizer]
        alpha = Phase(
            "alpha",
            epochs=c.epochs,
            steps=c.iterations,
            batch_size=c.batch_size,
            optimizer=lambda: kind([self.alphas], c.lr),
            first=lambda: self.begin_alphas(task),
            then=lambda: self.commit_alphas(task),
        )
        return [own, alpha] if c.controls and (task.index - c.basis) % c.own_mask_every == 0 else [alpha]

    # ---- basis tasks: a mask each -----------------------------------------------------------------------------------

    def begin_mask(self, task: int) -> None:
        with seeded(self.seed, "scores", task):
            self.bank.begin(scores="init")

    # ---- new tasks: coefficients over the masks ---------------------------------------------------------------------

    def begin_alphas(self, task: Task) -> None:
        self.make_alphas()
        if self.config.alpha_init == "previous" and task.index > self.config.basis:
            with torch.no_grad():
                self.alphas.copy_(self.bank[entry_name(task.index - 1)].alphas)

    def make_alphas(self) -> None:
        basis = self.config.basis
        self.alphas = nn.Parameter(torch.full((len(self.bank.layers()), basis), 1 / basis, device=self.device))

    def ready(self, clock: Clock) -> None:
        if clock.phase != "alpha":
            super().ready(clock)
        elif self.bank.is_live or self.bank.active is not None:
            self.bank.activate(None)
            self.bank.superpose(self.alphas, over=self.bank.masks)

    def loss(self, batch: Batch, clock: Clock) -> Tensor:
        loss = super().loss(batch, clock)
        if clock.phase == "alpha" and self.config.penalty:
            loss = loss + self.config.penalty * (self.alphas.abs().sum(1) - 1).square().sum()
        return loss

    def commit_alphas(self, task: Task) -> None:
        self.bank.activate(None)
        self.bank.commit(entry_name(task.index), alphas=self.alphas, over=self.bank.masks)
        self.alphas = None
        if self.config.controls:
            self.measure_basis(task)

    # ---- controls ---------------------------------------------------------------------------------------------------

    def measure_own(self, task: int) -> None:
        self.run_live()
        self.note("own_mask", task, self.percent(*self.benchmark.test(task).tensors()))

    def measure_basis(self, task: Task) -> None:
        """The combination, that of the first new task, and every basis mask alone: the one that validation data choose, the first, and
        their mean, the wrong mask."""
        test = self.benchmark.test(task.index).tensors()
        with self.bank.as_task(entry_name(task.index)):
            self.note("combination", task.index, self.percent(*test))
        chooser = (task.val or task.train).tensors()
        chosen, accuracy = [], []
        for name in self.bank.masks:
            with self.bank.as_task(name):
                chosen.append(self.percent(*chooser))
                accuracy.append(self.percent(*test))
        self.note("nearest_mask", task.index, accuracy[max(range(len(chosen)), key=chosen.__getitem__)])
        self.note("wrong_mask", task.index, sum(accuracy) / len(accuracy))
        self.note("fixed_mask", task.index, accuracy[0])
        with self.bank.as_task(entry_name(self.config.basis)):
            self.note("fixed_combination", task.index, self.percent(*test))

    def note(self, control: str, task: int, percent: float) -> None:
        self.measured.setdefault(control, {})[entry_name(task)] = percent

    @torch.no_grad()
    def percent(self, x: Tensor, y: Tensor) -> float:
        right = sum((self.model(rows).argmax(1) == labels).sum() for rows, labels in zip(x.split(1000), y.split(1000)))
        return 100 * right.item() / len(y)

    def report(self) -> dict[str, Any]:
        means = {f"{name}_mean": sum(tasks.values()) / len(tasks) for name, tasks in self.measured.items()}
        curves = {"curves": {"new tasks": self.curve()}} if self.measured else {}
        return {**super().report(), "basis_tasks": self.config.basis, **self.measured, **means, **curves}

    def curve(self) -> dict[str, Any]:
        """What was measured of the new tasks, over the angle where the benchmark has one, else over the task's number."""
        angle = getattr(self.benchmark, "angle", None)
        places = {entry_name(i): angle(i) if angle else i for i in range(self.config.basis, len(self.benchmark))}
        lines = {name: [[places[task], percent] for task, percent in tasks.items()] for name, tasks in self.measured.items()}
        names = {name: name.replace("_", " ") for name in lines}
        return {"x": "angle (degrees)" if angle else "task", "y": "right (%)", "lines": {names[n]: lines[n] for n in lines}}

    def facts(self) -> dict[str, Any]:
        return {"alphas": self.alphas is not None, "measured": self.measured}

    def build(self, facts: dict[str, Any]) -> None:
        if facts["alphas"]:
            self.make_alphas()
        self.measured = facts["measured"]
