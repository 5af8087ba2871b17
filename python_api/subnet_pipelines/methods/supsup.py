"""SupSup: supermasks in superposition (Wortsman et al., NeurIPS 2020). Weights stay at their random values; a task is a mask.

Without a task id all masks run at once, and the gradient to their coefficients says whose task it is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

import subnet_kernels as sk
from subnet_pipelines import inference
from subnet_pipelines.benchmarks.base import Benchmark, Task
from subnet_pipelines.chance import seeded
from subnet_pipelines.errors import NotLearnt, Refusal
from subnet_pipelines.methods.base import MethodConfig, Phase, Prediction
from subnet_pipelines.methods.dense import OPTIMIZERS, Network
from subnet_pipelines.methods.masked import MaskedMethod, entry_name
from subnet_pipelines.models import MODELS, batch_norms, use_running_statistics
from subnet_pipelines.schedules import cosine


@dataclass(frozen=True)
class SupSupConfig(MethodConfig):
    """SupSup; the defaults are the recipe of the authors' code on Permuted MNIST without task ids."""

    epochs: int = 3
    """Epochs of a task, where iterations is null."""
    iterations: int | None = 1000
    """Steps of a task."""
    batch_size: int = 128
    """Rows of a training batch, and of a unit under inference_unit batch."""
    model: Network = "lenet-300-100"
    """The network."""
    head: Literal["masked", "dense"] = "masked"
    """The last layer: fixed and masked as the others are (the authors' code), or learnt, one for each task, as in WSN's comparison."""
    norm: Literal["task", "batch"] = "task"
    """What batch norms use at test: statistics that each task gathers over its training rows at its end and keeps for itself (in the
    authors' code averages over the last steps of training), or those of the test batch."""
    outputs: int | None = 100
    """Width of the last layer: the classes, and superfluous neurons beyond them; null is the classes alone."""
    mask: Literal["threshold", "topk"] = "threshold"
    """A weight is open where its score is >= 0 (the authors' code on MNIST), or where it is among the top-k of its layer (the paper)."""
    density: float = 0.5
    """Kept share of every layer under mask topk."""
    weight_init: Literal["signed_constant", "kaiming_normal"] = "signed_constant"
    """The fixed weights: +-sqrt(2 / fan_in), or normal of that deviation."""
    optimizer: Literal["rmsprop", "adam", "sgd"] = "rmsprop"
    """Of the scores; made afresh for each task."""
    lr: float = 1e-4
    """Its learning rate."""
    weight_decay: float = 0.0
    """L2 of the scores, in the optimizer (the authors' code has 1e-4 on Split CIFAR-100, where its scripts do not name it)."""
    schedule: Literal["constant", "cosine"] = "constant"
    """The rate over a task: as it is, or down to 0 (the authors' code in scenario GG)."""
    objective: Literal["G", "H"] = "G"
    """What inference differentiates: logsumexp that only superfluous neurons feel (G), or the entropy (H)."""
    inference: Literal["one-shot", "binary"] = "one-shot"
    """The task of least gradient at equal coefficients, or halving the candidates."""
    log_base: int = 2
    """Binary inference keeps one in log_base of the candidates each round."""
    inference_unit: Literal["row", "n", "batch"] = "row"
    """Who decides together: every row for itself, unit_rows rows, or a batch of batch_size rows."""
    unit_rows: int = 16
    """Rows of a unit under inference_unit n."""
    deciding_rows: int | None = None
    """First rows of a unit that decide for all of it; null is all of them (the authors' code lets one decide for 128)."""

    def check(self) -> None:
        super().check()
        if not 0 < self.density <= 1:
            raise Refusal(f"density must be in (0, 1], got {self.density}")
        if self.lr <= 0:
            raise Refusal(f"lr must be positive, got {self.lr}")
        if self.weight_decay < 0:
            raise Refusal(f"weight_decay must not be negative, got {self.weight_decay}")
        if self.log_base < 2:
            raise Refusal(f"log_base must be at least 2, got {self.log_base}")
        if self.unit_rows < 1:
            raise Refusal(f"unit_rows must be at least 1, got {self.unit_rows}")
        if self.deciding_rows is not None and self.deciding_rows < 1:
            raise Refusal(f"deciding_rows must be at least 1, got {self.deciding_rows}")


class SupSup(MaskedMethod):
    """A mask for each task over fixed random weights; given the task, or inferring it."""

    name = "supsup"
    Config = SupSupConfig
    static_step = True
    FIDELITY = {"sound": {}, "code": {"inference_unit": "batch", "deciding_rows": 1}, "paper": {}}
    scenarios = ("GG", "GNs", "GNu")
    elsewhere = {"NNs": "nns"}

    def __init__(self, config: SupSupConfig, benchmark: Benchmark, seed: int):
        super().__init__(config, benchmark, seed)
        self.classes = benchmark.classes
        outputs = config.outputs or benchmark.classes
        if outputs < self.classes:
            raise Refusal(f"outputs must be at least the {self.classes} classes of {benchmark.name}, got {outputs}")
        if not benchmark.scenario.test_id and config.objective == "G" and outputs == self.classes:
            raise Refusal(f"outputs must exceed the {self.classes} classes for objective G, which reads the superfluous neurons")
        if not benchmark.scenario.test_id and config.head == "dense":
            raise Refusal(f"head must be 'masked' in scenario {benchmark.config.scenario}, where no task id is given at test")
        select = {"select": "threshold"} if config.mask == "threshold" else {"density": config.density}
        with seeded(seed, "init"):
            network = MODELS[config.model](outputs, *benchmark.input_shape)
            if config.norm == "task":
                use_running_statistics(network)
            own = ["head"] if config.head == "dense" else []
            self.norms = batch_norms(network) if config.norm == "task" else []
            self.adopt(network, sk.SubnetConfig(weight_init=config.weight_init, per_task=own, **select))

    def plan(self, task: Task) -> list[Phase]:
        c = self.config
        return [
            Phase(
                "mask",
                epochs=c.epochs,
                steps=c.iterations,
                batch_size=c.batch_size,
                optimizer=self.optimizer,
                schedule=cosine() if c.schedule == "cosine" else None,
                first=lambda: self.begin(task.index),
                then=lambda: self.commit(task),
            )
        ]

    def begin(self, task: int) -> None:
        with seeded(self.seed, "scores", task):
            self.bank.begin(scores="init")

    def optimizer(self) -> torch.optim.Optimizer:
        c, learning = self.config, [layer.scores for layer in self.bank.layers()]
        if c.head == "dense":
            learning += self.model.head.parameters()
        return OPTIMIZERS[c.optimizer](learning, c.lr, weight_decay=c.weight_decay, fuse_ste=True)

    def commit(self, task: Task) -> None:
        self.run_live()
        self.gather_norms(task, self.model, self.model)
        self.bank.commit(entry_name(task.index))

    # ---- whose task is it? ------------------------------------------------------------------------------------------

    def predict(self, x: Tensor, task: int | None) -> Prediction:
        if task is not None:
            return super().predict(x, task)
        if not len(self.bank):
            raise NotLearnt("no task has been learnt that could be inferred")
        tasks = self.infer(x)
        logits = None
        for k in tasks.unique().tolist():
            rows = tasks == k
            part = super().predict(x[rows], k).logits
            logits = part.new_empty((len(x), part.shape[1])) if logits is None else logits
            logits[rows] = part
        return Prediction(logits, tasks)

    def infer(self, x: Tensor) -> Tensor:
        """The task of every row, int64 (B,): x (B, ...)."""
        c = self.config
        if c.inference_unit == "row" and c.inference == "one-shot":
            return inference.one_shot(self.bank.row_alpha_grad(x, self.objective))
        size = {"row": 1, "n": c.unit_rows, "batch": c.batch_size}[c.inference_unit]
        find = self.one_shot if c.inference == "one-shot" else self.binary
        return torch.cat([find(unit[: c.deciding_rows]).expand(len(unit)) for unit in x.split(size)])

    def objective(self, logits: Tensor) -> Tensor:
        return inference.g_objective(logits, self.classes) if self.config.objective == "G" else inference.entropy(logits)

    @torch.enable_grad()
    def gradient(self, x: Tensor, alphas: Tensor | None) -> Tensor:
        """Of the mean objective to the coefficients (K,), at these or at equal ones."""
        alphas = self.bank.superpose(None if alphas is None else alphas.requires_grad_())
        return torch.autograd.grad(self.objective(self.model(x)).mean(), alphas)[0]

    def one_shot(self, x: Tensor) -> Tensor:
        return inference.one_shot(self.gradient(x, None))

    def binary(self, x: Tensor) -> Tensor:
        ask: Callable[[Tensor], Tensor] = lambda alphas: self.gradient(x, alphas.to(x.dtype))  # noqa: E731
        alive = torch.ones(len(self.bank), dtype=torch.bool, device=x.device)
        return inference.infer_binary(ask, alive, self.config.log_base).task

    def report(self) -> dict[str, Any]:
        return {**super().report(), "outputs": self.config.outputs or self.classes}
