"""What LASEM and the methods that its paper compares with share: the networks, RMSprop, a head a task, the accuracy at the best epoch.

Lee, Behpour and Eaton, "Sharing Less is More", ICML 2021, train all methods of their tables alike; the recipe is that of their program
(Lifelong-ML/LASEM c4ec052). What a method shares between tasks and what a task has for itself is said in its own file.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map

from subnet_kernels import optim
from subnet_pipelines.benchmarks.base import Batch, Benchmark, Split, Task, batches
from subnet_pipelines.bounds import Fraction, NotNegative, Positive
from subnet_pipelines.capacity import capacity
from subnet_pipelines.chance import seeded
from subnet_pipelines.errors import NotLearnt
from subnet_pipelines.methods.base import Clock, Method, MethodConfig, Phase, Prediction
from subnet_pipelines.methods.selective import NETS, Start, widths

ROWS = 500  # of a test batch, where the accuracy at the best epoch is measured


@dataclass(frozen=True)
class LifelongConfig(MethodConfig):
    """The recipe of LASEM's authors for CIFAR-100."""

    epochs: int = 2000
    """Epochs of a task."""
    model: Literal["mlp", "lasem-cifar", "lasem-office-home", "lasem-stl", "lasem-resnet-18"] = "lasem-cifar"
    """The network."""
    keep: Literal["last", "best"] = "last"
    """A task keeps the weights, and what else it has learnt, of its last epoch (the code), or of its best on validation rows."""
    watch: Literal["loss", "accuracy"] = "accuracy"
    """Which epoch is the best on validation rows: that of least loss, or the first of greatest accuracy (the code)."""
    dropout: Fraction = 0.5
    """Share of the features before the head that is dropped in training."""
    lr: Positive = 1e-4
    """Learning rate of RMSprop in the first epoch."""
    lr_decay: NotNegative = 2.5e-4
    """The rate is lr / (1 + epoch lr_decay)."""
    lr_epochs: Literal["stream", "task"] = "stream"
    """Which epochs the rate counts: all since the first task began (the code), or the task's."""
    smoothing: Fraction = 0.9
    """RMSprop's share of the old mean of squares."""
    eps: Positive = 1e-5
    """What RMSprop adds to the root of the mean of squares (the code adds 1e-10 under the root)."""
    squares: Literal["zero", "one"] = "zero"
    """Where RMSprop's mean of squares starts (TensorFlow's, and so the code's, starts at one: first steps are small)."""
    weight_std: Positive = 0.05
    """Deviation of the normal distribution, cut at two of it, that plain kernels are drawn from."""
    bias: float = 0.2
    """What their biases, and those of the heads, start at."""
    amp: Literal["none", "bf16"] = "none"
    """Run the layers below the head in bfloat16, in training and at test; weights, kernels and the head stay float32."""


class Lifelong(Method):
    """A method over a network of selective.py. What earlier tasks keep lies beside the module, so that model selection copies one task.

    A subclass has `head`, the head in training, and overrides `plan`, `body`, `settle` and `outputs`.
    """

    static_step = True
    FIDELITY = {"sound": {}, "code": {"squares": "one"}, "paper": {}}
    FACTS: tuple[str, ...] = ("index", "peaks", "validated")  # attributes beside the module that a checkpoint holds
    BESIDE: tuple[str, ...] = ("learnt",)  # and those that are tensors

    def __init__(self, config: LifelongConfig, benchmark: Benchmark, seed: int):
        super().__init__(config, benchmark, seed)
        self.benchmark, self.net = benchmark, NETS[config.model]._replace(dtype=torch.bfloat16 if config.amp == "bf16" else None)
        self.start = Start(config.weight_std, config.bias)
        self.inputs, self.width = widths(self.net, benchmark.input_shape)
        self.index = 0  # of the task in training
        self.at_best: dict[str, Tensor] | None = None  # tensors of the best epoch, from the last step to the end of a phase
        self.learnt: list[dict[str, Tensor]] = []  # of each task, what it keeps for itself
        self.peaks: list[float | None] = []  # of each task, its test accuracy at its best epoch
        self.validated: list[float | None] = []  # and that on its validation rows

    def fresh_head(self, task: int) -> list[dict[str, Tensor]]:
        """A task's head as it finds it, a dict a layer."""
        sizes = [self.width, *self.net.hidden, self.benchmark.classes]
        with seeded(self.seed, "head", task):
            return [self.start.linear(inp, out) for inp, out in pairwise(sizes)]

    # ---- training ---------------------------------------------------------------------------------------------------

    def phase(
        self,
        name: str,
        task: Task,
        learning: Callable[[], list[nn.Parameter]],
        first: Callable[[], None] | None,
        then: Callable[[], None] | None,
        share: float = 1.0,
    ) -> Phase:
        """A phase of a task, over that share of its epochs; learning: what the optimizer gets."""
        c = self.config
        a_round = -(-len(task.train) // c.batch_size)
        epochs = max(1, round(share * c.epochs))
        iterations = None if c.iterations is None else max(1, round(share * c.iterations))
        steps = iterations or epochs * a_round
        before = task.index * ((c.iterations or c.epochs * a_round) // a_round) if c.lr_epochs == "stream" else 0
        return Phase(
            name,
            epochs=epochs,
            steps=iterations,
            batch_size=c.batch_size,
            optimizer=lambda: self.optimizer(learning()),
            schedule=lambda progress: 1 / (1 + (before + round(progress * steps) // a_round) * c.lr_decay),
            select="last" if task.val is None else "best",
            first=first,
            then=then,
            order=0,  # the phases of a task see its rows in one order
        )

    def optimizer(self, learning: list[nn.Parameter]) -> torch.optim.Optimizer:
        c = self.config
        opt = optim.RMSprop(learning, c.lr, alpha=c.smoothing, eps=c.eps)
        for p in learning if c.squares == "one" else ():
            opt.state[p] = {"step": torch.zeros((), device=p.device), "square_avg": torch.ones_like(p)}
        return opt

    def body(self, x: Tensor) -> Tensor:
        """Features (B, width) of x (B, ...) as the task in training stands."""
        raise NotImplementedError

    def dropped(self, made: Tensor) -> Tensor:
        """Features, of which a share is dropped and the rest scaled up. The share counts in steps of 2^-16: a draw of 64 bits is four
        numbers, which on a CPU takes a quarter of the time of PyTorch's dropout, that is a fifth of EM's step."""
        dropped = min(round(65536 * self.config.dropout), 65535)
        words = torch.empty(-(-made.numel() // 4), dtype=torch.int64, device=made.device).random_(-(1 << 63), None)
        keep = words.view(torch.int16)[: made.numel()].view(made.shape) >= dropped - 32768
        return made * keep.to(made.dtype).mul_(65536 / (65536 - dropped))

    def scores(self, made: Tensor, head: Sequence | None = None) -> Tensor:
        """Features (..., width) through a head, default the one in training -> logits (..., classes)."""
        head = self.head if head is None else head
        for i, layer in enumerate(head):
            made = F.linear(made if i == 0 else made.relu(), layer["weight"], layer["bias"])
        return made

    def run(self, x: Tensor) -> Tensor:
        """Logits (B, classes) of x (B, ...) as the task in training stands, without dropout."""
        return self.scores(self.body(x))

    def logits(self, batch: Batch, clock: Clock) -> Tensor:
        return self.run(batch.x)

    def loss(self, batch: Batch, clock: Clock) -> Tensor:
        return F.cross_entropy(self.scores(self.dropped(self.body(batch.x))), batch.y)

    # ---- validation and the end of a task ---------------------------------------------------------------------------

    def validate(self, batch: Batch, clock: Clock) -> Tensor:
        logits = self.run(batch.x)
        if self.config.watch == "loss":
            return F.cross_entropy(logits, batch.y)
        return (logits.argmax(1) != batch.y).to(logits.dtype).mean()

    def restore(self, snapshot: dict[str, Tensor]) -> None:
        self.at_best = snapshot  # the end of the phase measures it, and says whether it is what stays

    @torch.no_grad()
    def accuracy(self, split: Split) -> float:
        """Percent of a half's rows that the task in training gets right."""
        self.eval()
        x, y = split.tensors()
        return 100 * sum(int((self.run(b.x).argmax(1) == b.y).sum()) for b in batches(x, y, None, None, ROWS)) / len(y)

    def measure(self) -> list[float | None]:
        """Accuracy at the best epoch of a phase, on validation and on test rows; then the tensors are those that the config keeps."""
        if self.at_best is None:
            return [None, None]
        last = self.snapshot()
        self.load_state_dict(self.at_best)
        task = self.benchmark.task(self.index)
        found = [self.accuracy(task.val), self.accuracy(self.benchmark.test(self.index))]
        if self.config.keep == "last":
            self.load_state_dict(last)
        self.at_best = None
        return found

    def end(self) -> None:
        """The end of a task's last phase."""
        self.finish(self.measure())

    def finish(self, found: list[float | None]) -> None:
        """The task is done, with these accuracies at its best epoch on validation and on test rows."""
        self.settle()
        self.validated.append(found[0])
        self.peaks.append(found[1])

    def settle(self) -> None:
        """The task keeps what it has learnt."""
        raise NotImplementedError

    # ---- use, report, state -----------------------------------------------------------------------------------------

    def outputs(self, x: Tensor, task: int) -> Tensor:
        """Logits (B, classes) of x (B, ...) as a task that has been learnt."""
        raise NotImplementedError

    def predict(self, x: Tensor, task: int | None) -> Prediction:
        if task >= len(self.learnt):
            raise NotLearnt(f"task {task} has not been learnt yet")
        return Prediction(self.outputs(x, task), torch.full((len(x),), task, device=x.device))

    def kept_head(self, task: int) -> list[dict[str, Tensor]]:
        """The head that a task keeps, under `head.` in what it has learnt."""
        return [named_under(self.learnt[task], f"head.{i}.") for i in range(len(self.net.hidden) + 1)]

    def costs(self, shared: int, own: list[int]) -> dict[str, Any]:
        """A report's accuracies at the best epochs, and capacity: numbers that tasks share, and those of each task beside its head."""
        plain = sum(layer.channels * (inp * layer.kernel**2 + 1) for layer, inp in zip(self.net.layers, self.inputs))
        cost = capacity(plain, plain, tasks=len(self.learnt), mask_bytes=0, paper_cap=None)
        cost["measured_cap"] = 100 * (shared + sum(own)) / plain
        return {"capacity": cost, "peak": list(self.peaks), "validation": list(self.validated), "parameters_per_task": own}

    def facts(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.FACTS}

    def build(self, facts: dict[str, Any]) -> None:
        facts = {"validated": [None] * len(facts["peaks"]), **facts}  # checkpoints of before they were kept go on too
        for name in self.FACTS:
            setattr(self, name, facts[name])

    def state(self) -> dict[str, Any]:
        return {**super().state(), **{name: getattr(self, name) for name in self.BESIDE}}

    def load(self, state: dict[str, Any]) -> None:
        super().load(state)
        for name in self.BESIDE:
            setattr(self, name, tree_map(lambda t: t.to(self.device, copy=True), state[name]))


def parameters(layers: list[dict[str, Tensor]], device: torch.device) -> nn.ModuleList:
    """The tensors of every layer as parameters."""
    return nn.ModuleList(nn.ParameterDict({name: nn.Parameter(t.to(device)) for name, t in layer.items()}) for layer in layers)


def named_under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Those whose name begins so, by the rest of the name."""
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def named_tensors(layers: Sequence, prefix: str = "") -> dict[str, Tensor]:
    """Copies of every layer's tensors, under PREFIX, the layer's number and their name."""
    return {f"{prefix}{i}.{name}": p.detach().clone() for i, layer in enumerate(layers) for name, p in layer.items()}
