"""Several tasks trained at once over one fixed backbone: a network a task that shares the weights, one optimizer, one selection a step.

Every task's products are the calls that it has when it is trained alone, so its mask is the same to the bit; the selection, the
straight-through rule and the update of all tasks' scores are one call each. What a task learns waits here until its turn in the stream,
where it is put into the method's own network and committed as any other.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import subnet_kernels as sk
from subnet_pipelines.benchmarks.base import Batch, Task
from subnet_pipelines.errors import Refusal
from subnet_pipelines.methods.base import Phase


def drops(model: nn.Module) -> bool:
    """Whether a network draws random numbers as it trains."""
    return any(isinstance(m, nn.modules.dropout._DropoutNd) and m.p > 0 for m in model.modules())


def own_tensors(network: nn.Module) -> dict[str, Tensor]:
    """What a network over shared weights has of its own: all of its state but these."""
    shared = {f"{name}.weight" for name, m in network.named_modules() if isinstance(m, sk.SubnetLayer)}
    return {name: t for name, t in network.state_dict().items() if name not in shared}


class Together(nn.Module):
    """The networks of the tasks in training, and of those that are trained and wait.

    model: the converted network that tasks are put into, whose weights do not learn; live: makes it run as the live task. This is a part
    of the method's state: the networks' tensors are saved, all but the shared ones. Raises Refusal where the weights learn or the network
    draws random numbers as it trains.
    """

    def __init__(self, model: nn.Module, live: Callable[[], None]):
        super().__init__()
        if any(isinstance(m, sk.SubnetLayer) and m.train_weight for m in model.modules()):
            raise Refusal("parallel_tasks must be 1 where weights learn: tasks that share them would train each other's")
        if drops(model):
            raise Refusal("parallel_tasks must be 1 for a network with dropout, which draws from a stream of each task's own")
        self._model = (model,)  # in a tuple, so that it is no part of this module
        self.live = live
        self.networks: dict[int, nn.Module] = {}  # by task
        self.trained = False  # whether they only wait

    def phase(
        self,
        alone: Phase,
        task: Task,
        others: Sequence[Task],
        begin: Callable[[int], None],
        optimizer: Callable[[Sequence[nn.Module]], torch.optim.Optimizer],
    ) -> Phase:
        """The phase of a task: with the others that follow it, or, where it is trained already, nothing but the commit.

        alone: the phase that it has by itself; begin: makes the model that of a fresh task; optimizer: of the networks.
        """
        if self.trained and task.index in self.networks:
            return self.waiting(alone, task)
        tasks = [task, *others]
        return replace(
            alone,
            together=tasks,
            first=lambda: self.begin([t.index for t in tasks], begin),
            optimizer=lambda: optimizer(list(self.networks.values())),
            then=lambda: self.end(task.index, alone.then),
        )

    def waiting(self, alone: Phase, task: Task) -> Phase:
        """The phase of a task that was trained with one before it: nothing but the commit."""
        return replace(alone, steps=0, optimizer=None, schedule=None, first=None, then=lambda: self.end(task.index, alone.then))

    def begin(self, tasks: Sequence[int], begin: Callable[[int], None]) -> None:
        """A network for each task, as `begin` makes the model."""
        self.networks, self.trained = {}, False
        for task in tasks:
            begin(task)
            self.networks[task] = self._copy()

    def end(self, task: int, then: Callable[[], None]) -> None:
        """Put what a task has learnt into the model; its network goes."""
        self.trained = True
        self.live()
        self._model[0].load_state_dict(self.networks.pop(task).state_dict())
        then()

    def step(self, batches: Sequence[Batch], opt: torch.optim.Optimizer) -> dict[str, Tensor]:
        """A step of every task on its own batch; returns their mean loss."""
        opt.zero_grad()
        losses = []
        for network, batch in zip(self.networks.values(), batches, strict=True):
            loss = F.cross_entropy(network(batch.x), batch.y)
            loss.backward()
            losses.append(loss.detach())
        opt.step()
        return {"loss": torch.stack(losses).mean()}

    def train(self, mode: bool = True) -> Together:
        super().train(mode)
        for network in self.networks.values():
            network.train(mode)
        return self

    def get_extra_state(self) -> dict[str, Any]:
        saved = {}
        for task, network in self.networks.items():
            saved[task] = own_tensors(network)
        return {"trained": self.trained, "networks": saved}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.trained, self.networks = state["trained"], {}
        for task, tensors in state["networks"].items():
            self.networks[task] = network = self._copy()
            network.load_state_dict({**network.state_dict(), **tensors})

    def _copy(self) -> nn.Module:
        """Of the model, which shares what does not learn."""
        model = self._model[0]
        return copy.deepcopy(model, {id(p): p for p in model.parameters() if not p.requires_grad})
