"""Method: what is learnt, how a step is made, how one predicts. Every default is the plain thing, so that finetuning is an empty method."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from subnet_pipelines.benchmarks.base import Batch, Benchmark, Task, batches
from subnet_pipelines.bounds import Count, check_bounds
from subnet_pipelines.chance import stream
from subnet_pipelines.errors import Refusal
from subnet_pipelines.models import gather_statistics
from subnet_pipelines.processes import this_process
from subnet_pipelines.schedules import Plateau


class Prediction(NamedTuple):
    """logits float (B, classes); task int64 (B,), the task of each row as given or inferred, None where the method infers none."""

    logits: Tensor
    task: Tensor | None = None


@dataclass
class Clock:
    """Where a run is: read by methods, advanced by the loop. `task` is None where the stream's borders are hidden.

    visit: the stretch of such a stream, for a method's accounts of itself; what is learnt must not depend on it.
    """

    task: int | None = None
    visit: int | None = None
    phase: str = ""
    epoch: int = 0
    batch: int = 0
    step: int = 0
    steps: int = 1

    @property
    def progress(self) -> float:
        """Steps made in this phase over all its steps, 0 at the first step."""
        return self.step / self.steps


@dataclass
class Phase:
    """A stretch of steps with one optimizer: a row of a method's timetable, made afresh at resume.

    epochs or steps (at most; steps wins) say how long; optimizer builds the optimizer once `first` has run; schedule is None (constant),
    a function of progress in [0, 1) that gives the factor on each group's first learning rate, or a Plateau. select="best" ends with the
    copy of least validation loss. first and then are called once, before the first step and after the last. needed: asked after first;
    where it says no the phase has no steps. together: the task and others that are trained with it, with equally many training rows; a
    step is then given a tuple, a batch of each. order: the number that the order of rows and what augments them is drawn by, in place of
    the phase's place in the timetable.
    """

    name: str
    epochs: int = 1
    steps: int | None = None
    batch_size: int = 128
    optimizer: Callable[[], torch.optim.Optimizer] | None = None
    schedule: Callable[[float], float] | Plateau | None = None
    select: Literal["last", "best"] = "last"
    first: Callable[[], None] | None = None
    then: Callable[[], None] | None = None
    needed: Callable[[], bool] | None = None
    together: Sequence[Task] | None = None
    order: int | None = None


@dataclass(frozen=True)
class MethodConfig:
    """Settings that every method has."""

    epochs: Count = 5
    """Epochs of the main phase."""
    iterations: Count | None = None
    """Steps of the main phase instead of epochs."""
    batch_size: Count = 10
    """Rows of a training batch."""

    def check(self) -> None:
        """Raise Refusal where a field is out of range."""
        check_bounds(self)


class Method(nn.Module):
    """The base of all methods. A subclass builds its network in __init__ and overrides `plan` and what it does differently.

    All that must survive an interruption is a parameter, a buffer, or in `facts`. No .item(), print or progress in a method: a step waits
    for no device, and where `static_step` says that it does the same work every time it may be recorded once and replayed (graph.py).
    """

    name: str
    Config = MethodConfig
    FIDELITY: dict[str, dict] = {"sound": {}, "code": {}, "paper": {}}
    forget_free = False  # given the id, earlier tasks' logits stay bit-identical for ever
    static_step = False  # every step of a phase does the same work on the same tensors, whatever data, clock and host say
    evaluation: Sequence[str] = ()  # fields of its config that make and train nothing: a finished run can be measured by others
    joint = False  # learns all tasks at once: the stream is then one task, the benchmark's union, and only the end is measured
    scenarios: tuple[str, ...] = ("GG",)  # names of the scenarios it can serve
    elsewhere: dict[str, str] = {}  # names of others -> which method to take instead
    norms: Sequence[nn.Module] = ()  # batch norms that gather their statistics over a task's training rows at its end
    out: Path | None = None  # the run's folder, set by the loop: a method may keep files of its own there

    def __init__(self, config: MethodConfig, benchmark: Benchmark, seed: int):
        super().__init__()
        config.check()
        if benchmark.config.scenario not in self.scenarios:
            asked = benchmark.config.scenario
            instead = f"; for {asked} train {self.elsewhere[asked]}" if asked in self.elsewhere else ""
            raise Refusal(f"{self.name} serves scenario {' and '.join(self.scenarios)}, not {asked} of {benchmark.name}{instead}")
        self.config, self.seed, self.device = config, seed, benchmark.device
        if (process := this_process()).count > 1 and not self.can_share(config):
            raise Refusal(f"{self.name} must be run by one process with these settings, got {process.count}")
        self.process = process

    @staticmethod
    def can_share(config: MethodConfig) -> bool:
        """Whether several processes can share the work of such a run: each has a `plan` of its own of every task, and the first one alone
        measures."""
        return False

    @property
    def select_seconds(self) -> float:
        """Seconds spent in mask selection since the method was made; 0 where there is none."""
        return 0.0

    def plan(self, task: Task | None) -> list[Phase]:
        """The timetable of one task (None: the whole stream, borders hidden). Pure: no side effect, the same answer every time."""
        raise NotImplementedError

    def ready(self, clock: Clock) -> None:
        """What the host must have done before a step; called before each that is replayed, which does nothing on the host itself."""

    def logits(self, batch: Batch, clock: Clock) -> Tensor:
        """Training logits (B, classes) of batch.x (B, ...)."""
        raise NotImplementedError

    def loss(self, batch: Batch, clock: Clock) -> Tensor:
        """What a step descends, 0-dim: cross-entropy of the logits."""
        return F.cross_entropy(self.logits(batch, clock), batch.y)

    def gradients(self, clock: Clock) -> None:
        """Called between backward and step."""

    def step(self, batch: Batch, opt: torch.optim.Optimizer, clock: Clock) -> dict[str, Tensor]:
        """One training step; returns 0-dim tensors to be averaged over the epoch, "loss" among them."""
        opt.zero_grad()
        loss = self.loss(batch, clock)
        loss.backward()
        self.gradients(clock)
        opt.step()
        return {"loss": loss.detach()}

    def validate(self, batch: Batch, clock: Clock) -> Tensor:
        """Validation loss of a batch, 0-dim, a mean over its rows; called in eval mode without gradients."""
        for norm in self.norms:
            norm.train()  # by the batch's own statistics, as in training: a task's are gathered at its end
        return self.loss(batch, clock)

    def gather_norms(self, task: Task, net: nn.Module, forward: Callable[[Tensor], Any]) -> None:
        """Give `norms` their statistics over the task's training rows, of which forward calls net; a short last batch is left out."""
        if not self.norms:
            return
        x, y, _ = task.train.marked(None)
        order, size = torch.randperm(len(y), generator=stream(self.seed, "statistics", task.index)), self.config.batch_size
        order = order[: max(1, len(y) // size) * size].to(self.device)
        gather_statistics(net, forward, (batch.x for batch in batches(x, y, None, order, size)))

    def prepare(self, x: Tensor, order: Tensor) -> None:
        """Look at a task's test rows x (n, ...), without labels and in the order int64 (n,), before `predict` gets them in batches.

        Called where the id must be inferred, in eval mode without gradients; for methods that infer from all rows of a task together.
        """

    def predict(self, x: Tensor, task: int | None) -> Prediction:
        """Logits of x (B, ...) as the given task, which is None where it must be inferred.

        Called in eval mode without gradients (enable them where inference needs them). Raises NotLearnt for a task not learnt yet.
        """
        raise NotImplementedError

    def report(self) -> dict[str, Any]:
        """What only the method knows, as JSON; "capacity", if there, becomes the result's capacity."""
        return {}

    def final_report(self) -> dict[str, Any]:
        """`report` at the end of a run, with what is too dear to be worked out after every task."""
        return self.report()

    def facts(self) -> dict[str, Any]:
        """JSON that `build` needs to make a fresh object's tensors match this one's."""
        return {}

    def build(self, facts: dict[str, Any]) -> None:
        """Make in a fresh object the parts that training had added, before their tensors are loaded."""

    def state(self) -> dict[str, Any]:
        """All that must survive: a tree of dicts, lists, numbers, strings and tensors."""
        return {"facts": self.facts(), "tensors": self.state_dict()}

    def load(self, state: dict[str, Any]) -> None:
        """Take up a state() in a fresh object."""
        self.build(state["facts"])
        self.load_state_dict(state["tensors"], strict=True)

    def snapshot(self) -> dict[str, Any]:
        """A copy of what model selection puts back: by default all tensors of the module."""
        return {name: tensor.clone() for name, tensor in self.state_dict().items()}

    def restore(self, snapshot: dict[str, Any]) -> None:
        """Put a snapshot back, into the same tensors."""
        self.load_state_dict(snapshot, strict=True)
