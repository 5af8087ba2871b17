"""BatchE (Wen et al., "BatchEnsemble", ICLR 2020), as SupSup compares with it: a task is two vectors a layer, before and behind it.

y = s * W (x * t), s and t of the task. W learns with the first task, or never; each later task learns its s and t alone. Without a task id
a row is sent through the contexts of all tasks, and the most certain answer says whose it is (SupSup's code, ABatchE); or all contexts run
superposed, and the gradient to their coefficients says it, as for SupSup's masks (SupSup's paper alone).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from subnet_pipelines import inference
from subnet_pipelines.benchmarks.base import Batch, Benchmark, Task
from subnet_pipelines.bounds import Count, Positive
from subnet_pipelines.capacity import with_own_numbers
from subnet_pipelines.chance import seeded, stream
from subnet_pipelines.errors import NotLearnt
from subnet_pipelines.methods.base import Clock, Method, Phase, Prediction
from subnet_pipelines.methods.dense import Network, ScheduledConfig, WeightInit, initialise, make_network, training, wrap_layers
from subnet_pipelines.models import batch_norms

CHUNK = 1 << 22  # numbers of the inputs that go through replicated contexts at once


class RankOne(nn.Module):
    """A linear layer or convolution between two vectors, y = s * layer(x * t); s (out,) and t (in,), of a picture's channels."""

    def __init__(self, layer: nn.Linear | nn.Conv2d):
        super().__init__()
        self.layer = layer
        out, inp = layer.weight.shape[:2]
        self.s, self.t = (nn.Parameter(torch.ones(size, device=layer.weight.device)) for size in (out, inp))
        self.shape = (-1, *(1,) * (layer.weight.dim() - 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x * self.t.view(self.shape)) * self.s.view(self.shape)


@dataclass(frozen=True)
class BatchEConfig(ScheduledConfig):
    """BatchE; the defaults are the recipe of SupSup's code on Permuted MNIST."""

    epochs: int = 3
    """Epochs of a task, where iterations is null."""
    iterations: int | None = 1000
    """Steps of a task."""
    batch_size: int = 128
    """Rows of a training batch, and of a unit under inference_unit batch."""
    model: Network = "lenet-300-100"
    """The network; all its layers have contexts, the head's too."""
    norm: Literal["task"] = "task"
    """What batch norms use at test: statistics that each task gathers over its training rows at its end and keeps for itself."""
    weight_init: WeightInit = "kaiming_normal"
    """How the weights are drawn; default is PyTorch's."""
    trunk: Literal["trained", "random"] = "trained"
    """The weights learn with the first task and its context, or stay at their random values."""
    lr: float = 1e-2
    """Rate of the contexts over weights as they are (the authors' code has .1 over random ones)."""
    trunk_lr: Positive = 1e-4
    """Rate of weights and context in the first task, where the weights learn."""
    inference: Literal["replicated", "one-shot"] = "replicated"
    """Without a task id: every row through all contexts, or the gradient to the coefficients of all contexts superposed equally."""
    objective: Literal["H", "M"] = "H"
    """What is to be small in the right task: the entropy (H), or the largest probability with a minus (M)."""
    inference_unit: Literal["row", "n", "batch"] = "row"
    """Who decides together: every row for itself, unit_rows rows, or a batch of batch_size rows."""
    unit_rows: Count = 16
    """Rows of a unit under inference_unit n."""
    deciding_rows: Count | None = None
    """First rows of a unit that decide for all of it; null is all of them (the authors' code lets one decide for 128)."""


class BatchE(Method):
    """One network of which each task keeps a context a layer, and the statistics of its norms; given the task, or inferring it."""

    name = "batche"
    Config = BatchEConfig
    static_step = True
    FIDELITY = {"sound": {}, "code": {"inference_unit": "batch", "deciding_rows": 1}, "paper": {}}
    forget_free = True
    scenarios = ("GG", "GNs", "GNu")

    def __init__(self, config: BatchEConfig, benchmark: Benchmark, seed: int):
        super().__init__(config, benchmark, seed)
        self.model = make_network(config, benchmark.classes, benchmark, seed, "init")
        with seeded(seed, "weights"):
            initialise(self.model, config.weight_init)
        wrap_layers(self.model, RankOne)
        self.norms = batch_norms(self.model)
        layers = [m for m in self.model.modules() if isinstance(m, RankOne)]
        self.weights = [layer.layer.weight for layer in layers]
        self.contexts = [vector for layer in layers for vector in (layer.s, layer.t)]
        vectors, buffers = set(map(id, self.contexts)), dict(self.model.named_buffers())
        self.vector_names = [name for name, p in self.model.named_parameters() if id(p) in vectors]
        self.own = [*self.vector_names, *buffers]  # names of what a task keeps for itself
        self.kept: list[dict[str, Tensor]] = []  # that, by task
        self._stacked: dict[str, Tensor] = {}

    # ---- learning a task --------------------------------------------------------------------------------------------------

    def plan(self, task: Task) -> list[Phase]:
        c, own = self.config, lambda: self.learning(task.index)
        lr = c.trunk_lr if self.trunk_learns(task.index) else c.lr
        return [training(c, task, own, lambda: self.begin(task.index), lambda: self.keep(task), lr=lr)]

    def trunk_learns(self, task: int) -> bool:
        return task == 0 and self.config.trunk == "trained"

    def learning(self, task: int) -> list[nn.Parameter]:
        """What a task's optimizer gets; the weights have gradients only where they are among that."""
        trunk = self.weights if self.trunk_learns(task) else []
        for weight in self.weights:
            weight.requires_grad_(bool(trunk))
        return [*trunk, *self.contexts]

    @torch.no_grad()
    def begin(self, task: int) -> None:
        """A context of signs, +-1 at random."""
        chance = stream(self.seed, "context", task)
        for vector in self.contexts:
            vector.copy_(2 * torch.randint(2, vector.shape, generator=chance) - 1)

    def keep(self, task: Task) -> None:
        self.gather_norms(task, self.model, self.model)
        state = self.model.state_dict()
        self.kept.append({name: state[name].clone() for name in self.own})

    def logits(self, batch: Batch, clock: Clock) -> Tensor:
        return self.model(batch.x)

    # ---- whose task is it? ------------------------------------------------------------------------------------------------

    def predict(self, x: Tensor, task: int | None) -> Prediction:
        if task is not None:
            return Prediction(self.as_task(x, task), torch.full((len(x),), task, device=x.device))
        if not self.kept:
            raise NotLearnt("no task has been learnt that could be inferred")
        tasks = self.infer(x)
        logits = None
        for k in tasks.unique().tolist():
            rows = tasks == k
            part = self.as_task(x[rows], k)
            logits = part.new_empty((len(x), part.shape[1])) if logits is None else logits
            logits[rows] = part
        return Prediction(logits, tasks)

    def as_task(self, x: Tensor, task: int) -> Tensor:
        """Logits (B, classes) of x (B, ...) in a task's context."""
        if task >= len(self.kept):
            raise NotLearnt(f"task {task} has no context yet")
        return functional_call(self.model, self.kept[task], (x,))

    def infer(self, x: Tensor) -> Tensor:
        """The task of every row, int64 (B,): x (B, ...)."""
        c = self.config
        if c.inference_unit == "row":
            return inference.one_shot(self.evidence(x))
        units = x.split(c.unit_rows if c.inference_unit == "n" else c.batch_size)
        return torch.cat([inference.one_shot(self.evidence(unit[: c.deciding_rows]).mean(0)).expand(len(unit)) for unit in units])

    def evidence(self, x: Tensor) -> Tensor:
        """What is least in the task of a row, (B, K) of x (B, ...). No row influences another: a unit's is their mean."""
        if len(self._stacked.get(self.own[0], ())) != len(self.kept):
            self._stacked = {name: torch.stack([kept[name] for kept in self.kept]) for name in self.own}
        if self.config.inference == "one-shot":
            return self.alpha_gradients(x, self._stacked)
        in_context = lambda own: self.objective(functional_call(self.model, own, (x,)))  # noqa: E731
        return vmap(in_context, chunk_size=max(1, CHUNK // x.numel()))(self._stacked).t()

    def alpha_gradients(self, x: Tensor, stacked: dict[str, Tensor]) -> Tensor:
        """Of each row's objective to the coefficients of the contexts, at equal ones: (B, K). Norms use the mean of the tasks' statistics,
        by which no row influences another."""
        equal = x.new_full((len(self.kept),), 1 / len(self.kept))
        statistics = {name: stacked[name].mean(0, dtype=x.dtype).to(stacked[name].dtype) for name in self.own}

        def objective(alphas: Tensor, row: Tensor) -> Tensor:
            superposed = {name: torch.tensordot(alphas, stacked[name], 1) for name in self.vector_names}
            return self.objective(functional_call(self.model, {**statistics, **superposed}, (row[None],)))[0]

        return vmap(grad(objective), (None, 0))(equal, x)

    def objective(self, logits: Tensor) -> Tensor:
        return inference.entropy(logits) if self.config.objective == "H" else -logits.softmax(-1).amax(-1)

    # ---- what is kept -----------------------------------------------------------------------------------------------------

    def report(self) -> dict[str, Any]:
        state = self.model.state_dict()
        own = sum(state[name].numel() for name in self.own if state[name].is_floating_point())
        weights = sum(weight.numel() for weight in self.weights)
        cost = with_own_numbers(weights, own, tasks=len(self.kept), seed_only=self.config.trunk == "random")
        return {"capacity": cost, "parameters_per_task": own}

    def state(self) -> dict[str, Any]:
        return {**super().state(), "kept": self.kept}

    def load(self, state: dict[str, Any]) -> None:
        super().load(state)
        self.kept = [{name: t.to(self.device, copy=True) for name, t in kept.items()} for kept in state["kept"]]
        self._stacked = {}
