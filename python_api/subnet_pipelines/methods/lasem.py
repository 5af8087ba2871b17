"""LASEM (Lee, Behpour and Eaton, "Sharing Less is More: Lifelong Learning in Deep Networks with Selective Layer Transfer", ICML 2021).

A task chooses for every layer whether to share it with the tasks before or to have one of its own. While it trains, all configurations do,
each by the posterior that the batch gives it (EM); in the end the likeliest is kept. Layers chosen shared drop the task's own copy, layers
chosen as its own give the shared ones back as they were. Later tasks move what is shared, so earlier ones do forget.

Where paper and code (Lifelong-ML/LASEM c4ec052) differ, `likelihood` and `prior` say so. What the paper compares with are settings of
`configuration`: fixed ones, a search through all of them, each trained by itself, and DARTS's selection (Liu et al., ICLR 2019), by which
every layer is a mixture of the shared one and the task's own, whose two logits learn before the weights do on each batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from subnet_pipelines.benchmarks.base import Batch, Benchmark, Task
from subnet_pipelines.bounds import NotNegative
from subnet_pipelines.chance import seeded
from subnet_pipelines.errors import Refusal
from subnet_pipelines.methods.base import Clock, Phase
from subnet_pipelines.methods.lifelong import Lifelong, LifelongConfig, named_tensors, named_under, parameters
from subnet_pipelines.methods.selective import NETS, SHARING, Kernel, configurations, features, mixed, named, tree
from subnet_pipelines.processes import hand_over, shared_folder, taken

POINTS = 100  # of a task's training, at which the probability of sharing is kept
MOST = 10  # choices among which all configurations are evaluated


@dataclass(frozen=True)
class LASEMConfig(LifelongConfig):
    """LASEM; the defaults are the recipe of the authors' code on CIFAR-100, for which the paper prints 39.3 % (HPS) with 10 tasks."""

    sharing: Literal["hps", "tf", "df-cnn"] = "hps"
    """How a shared layer gets its kernel: as it is, from a core and the task's factors, or from a base by the task's deconvolution."""
    configuration: str = "em"
    """Which layers are shared: chosen by EM; by DARTS's selection; by a search through all configurations on validation rows; or fixed:
    shared, specific, bottom-N, top-N, alternating, or a digit a layer, 1 for shared."""
    darts_order: Literal["first", "second"] = "first"
    """Under darts, the loss that the logits descend: that of the weights as they are, or of the weights after a step of gradient descent by
    the learning rate, through which the logits' gradient goes too (exactly; the code takes finite differences of it)."""
    groups: list[int] | None = None
    """Sizes of groups of consecutive layers that are shared together or not at all, under em and search; null is each by itself."""
    likelihood: Literal["mean", "product"] = "mean"
    """A configuration's likelihood of a batch: the mean of the probabilities of its labels (the code), or their product (the paper)."""
    prior: Literal["running", "counts"] = "running"
    """The prior of the next batch: the mean of the posteriors so far (the code), or (n + 1) / sum, with n the batches whose posterior a
    configuration led (the paper)."""
    prior_since: Literal["task", "epoch"] = "task"
    """Where the prior starts anew, at all alike: with each task, or with each epoch too."""
    orthogonality: NotNegative = 0.1
    """Weight of the penalty that keeps TF's factors close to orthogonal; the code has .1, .05, .01, .005 and .001."""

    def check(self) -> None:
        super().check()
        layers = len(NETS[self.model].layers)
        if self.configuration not in ("em", "darts", "search"):
            named(self.configuration, layers)
        if self.configuration == "darts" and self.sharing == "tf":
            raise Refusal("sharing must be hps or df-cnn for configuration darts, as in the paper, got tf")
        if self.groups is not None and (min(self.groups, default=0) < 1 or sum(self.groups) != layers):
            raise Refusal(f"groups must be sizes that sum to the {layers} layers of {self.model}, got {self.groups}")
        if self.configuration in ("em", "search") and (choices := len(self.groups or [1] * layers)) > MOST:
            raise Refusal(f"groups must leave at most {MOST} choices, whose configurations are {1 << MOST}; got {choices}")
        if self.model == "lasem-resnet-18" and self.sharing != "hps":
            raise Refusal(f"sharing must be hps for lasem-resnet-18, as in the paper, got {self.sharing}")


class LASEM(Lifelong):
    """What is shared, and the layers and head of the task in training; what earlier tasks keep lies beside the module, so that model
    selection copies one task."""

    name = "lasem"
    Config = LASEMConfig
    FACTS = (*Lifelong.FACTS, "trying", "known", "chosen", "paths", "tries")
    BESIDE = (*Lifelong.BESIDE, "before", "winner", "history")
    FIDELITY = {"sound": {}, "code": {"squares": "one"}, "paper": {"likelihood": "product", "prior": "counts"}}

    def __init__(self, config: LASEMConfig, benchmark: Benchmark, seed: int):
        super().__init__(config, benchmark, seed)
        self.rule, layers = SHARING[config.sharing], len(self.net.layers)
        self.groups = config.groups or [1] * layers
        self.by_em, self.by_darts = config.configuration == "em", config.configuration == "darts"
        if self.by_em or config.configuration == "search":
            self.ways = configurations(self.groups)
        else:  # DARTS tries none by itself
            self.ways = [named("shared" if self.by_darts else config.configuration, layers)]
        if config.configuration == "search" and benchmark.config.val_fraction == 0:
            raise Refusal(
                f"configuration search compares accuracies on validation rows, but val_fraction of {benchmark.name} is 0"
            )
        fresh, count = self.fresh(0), len(self.ways)
        self.shared, self.own, self.added, self.head = (parameters(part, self.device) for part in fresh)
        self.register_buffer("prior", torch.empty(count, device=self.device))
        self.register_buffer("led", torch.empty(count, device=self.device))  # batches that a way led by its posterior, and one
        if self.by_darts:  # of every layer: of the task's own, of the shared
            self.logits_of_layers = nn.Parameter(torch.zeros(layers, 2, device=self.device))
        self.register_buffer("shares", torch.tensor(self.ways).float().to(self.device), persistent=False)
        self.register_buffer("made", torch.zeros((), dtype=torch.int64, device=self.device))  # steps of the task in training
        self.static_step = config.prior_since == "task" and not self.by_darts  # else the host knows when an epoch begins
        self.forget_posteriors()
        self.trying = 0  # the configuration among ways where one is trained by itself
        self.known = [False] * layers  # which layers some task has shared
        self.before: list[dict[str, Tensor]] = []  # what was shared when the task began
        self.history = torch.full((POINTS, layers), torch.nan, device=self.device)  # P(shared), in the task in training
        # Of each task: which layers it shares, and its history.
        self.chosen: list[list[bool]] = []
        self.paths: list[list[list[float]]] = []
        # Under search: accuracies of each way so far at its best epoch, on validation and test rows, and the best way's tensors.
        self.tries: list[list[float]] = []
        self.winner: dict[str, Tensor] = {}

    @staticmethod
    def can_share(config: LASEMConfig) -> bool:
        return config.configuration == "search"

    # ---- tensors ----------------------------------------------------------------------------------------------------

    def fresh(self, task: int) -> list[list[dict[str, Tensor]]]:
        """Tensors as a task finds them: shared, its own, what it adds to the shared, a dict a layer each; and its head's."""
        shapes, parts = list(zip(self.net.layers, self.inputs)), []
        makers = (
            ("shared", lambda layer, inp: self.rule.shared(layer, inp, self.start)),
            ("own", self.start.plain),
            ("added", self.rule.added),
        )
        for purpose, make in makers:
            with seeded(self.seed, purpose, task):
                parts.append([make(layer, inp) for layer, inp in shapes])
        return [*parts, self.fresh_head(task)]

    def parts(self) -> tuple[nn.ModuleList, ...]:
        """What is in training: shared, the task's own, added, head; of each a dict of tensors a layer."""
        return self.shared, self.own, self.added, self.head

    @torch.no_grad()
    def begin(self, task: int) -> None:
        """Fresh tensors for a task; what is shared stays where an earlier task has shared it."""
        self.index = task
        for part, drawn in zip(self.parts(), self.fresh(task)):
            for i, (layer, tensors) in enumerate(zip(part, drawn)):
                for name, tensor in tensors.items() if part is not self.shared or not self.known[i] else ():
                    layer[name].copy_(tensor)
        self.before = [{name: p.detach().clone() for name, p in layer.items()} for layer in self.shared]
        self.forget_posteriors()
        if self.by_darts:
            self.logits_of_layers.zero_()
        self.made.zero_()
        self.history.fill_(torch.nan)

    def learning(self, way: tuple[bool, ...] | None) -> list[nn.Parameter]:
        """What a task's optimizer gets: of a configuration what it uses, None is of all."""
        found = [*self.head.parameters(), *([self.logits_of_layers] if self.by_darts else [])]
        for i, (shared, own, added) in enumerate(zip(self.shared, self.own, self.added)):
            found += [*shared.values(), *added.values()] if way is None or way[i] else []
            found += own.values() if way is None or not way[i] else []
        return found

    def kernels(self, way: Sequence[bool], parts: Sequence | None = None) -> list[Kernel]:
        """The kernels of a configuration; parts: own and added, default those in training."""
        own, added = parts or (self.own, self.added)
        return [
            self.rule.kernel(shared, a) if share else (o["weight"], o["bias"])
            for share, shared, o, a in zip(way, self.shared, own, added)
        ]

    # ---- training ---------------------------------------------------------------------------------------------------

    def plan(self, task: Task) -> list[Phase]:
        c = self.config
        if c.configuration != "search":
            way = None if self.by_em or self.by_darts else self.ways[0]
            return [self.phase("train", task, lambda: self.learning(way), lambda: self.begin(task.index), self.end)]
        phases = []
        for number, way in enumerate(self.ways):
            first = (lambda: self.begin(task.index)) if number == 0 else lambda number=number: self.begin_again(number)
            phase = self.phase(f"search {number}", task, lambda way=way: self.learning(way), first, self.compare)
            if number % self.process.count != self.process.rank:  # another process trains it
                phase = replace(phase, steps=0, optimizer=None, select="last", then=None)
            phases.append(phase)
        return [*phases, Phase("search ends", steps=0, then=self.end_search)]

    def step(self, batch: Batch, opt: torch.optim.Optimizer, clock: Clock) -> dict[str, Tensor]:
        opt.zero_grad()
        if self.by_darts:
            second = self.config.darts_order == "second"
            ahead = self.unrolled_loss(batch, opt.param_groups[0]["lr"]) if second else self.mixture_loss(batch)
            ahead.backward(inputs=[self.logits_of_layers])
            opt.step()  # of the logits alone: nothing else has a gradient
            opt.zero_grad()
            loss = self.mixture_loss(batch)
            loss.backward(inputs=[p for group in opt.param_groups for p in group["params"] if p is not self.logits_of_layers])
        elif self.by_em:
            if self.config.prior_since == "epoch" and clock.batch == 0:
                self.forget_posteriors()
            loss, posterior = self.expected(batch)
            loss.backward()
        else:
            loss = self.loss_of(self.ways[self.trying], batch)
            loss.backward()
        opt.step()
        if self.by_em:
            self.take(posterior)
        if self.by_em or self.by_darts:
            self.note(clock.steps)
        return {"loss": loss.detach()}

    def mixture_loss(self, batch: Batch, parts: Sequence | None = None) -> Tensor:
        """The training loss of DARTS's network, 0-dim; parts: shared, own, added and head, default those in training."""
        shared, own, added, head = parts or self.parts()
        kernels = [self.rule.kernel(s, a) for s, a in zip(shared, added)], [(o["weight"], o["bias"]) for o in own]
        made = mixed(self.net, *kernels, self.logits_of_layers.softmax(1)[:, 1], batch.x)
        return F.cross_entropy(self.scores(self.dropped(made), head), batch.y)

    def unrolled_loss(self, batch: Batch, rate: float | Tensor) -> Tensor:
        """DARTS's loss, 0-dim, after a step of the weights down the loss by this rate, in which the logits have their part too."""
        weights = [p for part in self.parts() for layer in part for p in layer.values()]
        slopes = iter(torch.autograd.grad(self.mixture_loss(batch), weights, create_graph=True))
        moved = [[{name: p - rate * next(slopes) for name, p in layer.items()} for layer in part] for part in self.parts()]
        return self.mixture_loss(batch, moved)

    def loss_of(self, way: tuple[bool, ...], batch: Batch) -> Tensor:
        """A configuration's training loss, 0-dim."""
        made = self.dropped(features(self.net, self.kernels(way), batch.x))
        loss = F.cross_entropy(self.scores(made), batch.y)
        for share, added in zip(way, self.added):
            if share and (penalty := self.rule.penalty(added)) is not None:
                loss = loss + self.config.orthogonality * penalty
        return loss

    def expected(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """E-step and M-step's loss: the posterior (ways,) of a batch, and the mean of all configurations' losses under it, 0-dim.

        Dropout comes after the last layer: both steps use the same features, and only the head runs twice.
        """
        shared, own = self.kernels((True,) * len(self.net.layers)), self.kernels((False,) * len(self.net.layers))
        made = tree(self.net, self.groups, shared, own, batch.x)
        with torch.no_grad():
            posterior = self.posterior(self.scores(made.detach()), batch.y)
        logits, y = self.scores(self.dropped(made)), batch.y.expand(len(self.ways), -1)
        each = F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="none")
        loss = posterior @ each.view_as(y).mean(1)
        for probability, added in zip(torch.mv(self.shares.T, posterior), self.added):
            if (penalty := self.rule.penalty(added)) is not None:
                loss = loss + self.config.orthogonality * probability * penalty
        return loss, posterior

    def posterior(self, logits: Tensor, y: Tensor) -> Tensor:
        """P(way | batch) (ways,), of logits (ways, B, classes) and labels int64 (B,)."""
        right = logits.log_softmax(2).gather(2, y.expand(len(self.ways), -1)[:, :, None]).squeeze(2)
        if self.config.likelihood == "product":
            return (self.prior.log() + right.sum(1)).softmax(0)
        joint = self.prior * right.exp().mean(1)
        return joint / (joint.sum() + 1e-30)

    def take(self, posterior: Tensor) -> None:
        """The prior of the next batch, after one with this posterior."""
        self.led += torch.arange(len(self.ways), device=self.device) == posterior.argmax()
        if self.config.prior == "counts":
            self.prior.copy_(self.led / self.led.sum())
        else:
            seen = self.led.sum() - len(self.ways)
            self.prior += (posterior - self.prior) / seen

    def note(self, steps: int) -> None:
        """Keep P(shared) at this point of a phase of so many steps. The count is a tensor, as a recorded step must find its place too."""
        point = self.made * POINTS // steps
        shared = self.logits_of_layers.detach().softmax(1)[:, 1] if self.by_darts else torch.mv(self.shares.T, self.prior)
        self.history.index_copy_(0, point.view(1), shared.float()[None])
        self.made += 1

    def forget_posteriors(self) -> None:
        """All configurations are alike."""
        self.prior.fill_(1 / len(self.ways))
        self.led.fill_(1)

    # ---- validation and the end of a task ---------------------------------------------------------------------------

    def best(self) -> tuple[bool, ...]:
        """The configuration in training; under EM the likeliest and under DARTS that of the greater logits, for which the host waits."""
        if self.by_darts:
            return tuple((self.logits_of_layers[:, 1] > self.logits_of_layers[:, 0]).tolist())
        return self.ways[int(self.prior.argmax()) if self.by_em else self.trying]

    def body(self, x: Tensor) -> Tensor:
        return features(self.net, self.kernels(self.best()), x)

    def begin_again(self, number: int) -> None:
        """The task from its start, under the search's configuration of that number."""
        self.put_back((False,) * len(self.net.layers))
        self.begin(self.index)
        self.trying = number

    def compare(self) -> None:
        """The end of a search's phase."""
        found, tensors = self.measure(), self.snapshot()
        if self.process.count > 1:
            hand_over(self.file_of(self.trying), {**tensors, "found": torch.tensor(found, dtype=torch.float64)})
        else:
            self.take_up(found, tensors)

    def take_up(self, found: list[float], tensors: dict[str, Tensor]) -> None:
        """What a configuration reached; its tensors are kept where none before was as good."""
        if not self.tries or found[0] > max(score for score, _ in self.tries):
            self.winner = tensors
        self.tries.append(found)

    def file_of(self, number: int) -> Path:
        """Where the process that tries a configuration on the task in training leaves what came of it."""
        run = self.process.run_of(self.out)
        settings = self.config, self.benchmark.config, self.seed
        return shared_folder(run, "search", *settings) / str(self.index) / f"{number}.safetensors"

    def end_search(self) -> None:
        """The end of a search, in every process: the task is what the best of its phases made of it; of equals, the first."""
        for number in range(len(self.ways)) if self.process.count > 1 else ():
            tensors = taken(self.file_of(number))
            self.take_up(tensors.pop("found").tolist(), tensors)
        scores = [score for score, _ in self.tries]
        self.trying = scores.index(max(scores))
        self.load_state_dict(self.winner)
        self.finish(self.tries[self.trying])
        self.tries, self.winner, self.trying = [], {}, 0

    @torch.no_grad()
    def put_back(self, way: Sequence[bool]) -> None:
        """What is shared of the layers that are not, as it was when the task began."""
        for share, layer, before in zip(way, self.shared, self.before):
            for name, tensor in before.items() if not share else ():
                layer[name].copy_(tensor)

    def settle(self) -> None:
        """The task keeps its configuration, and of its tensors those that it uses."""
        way = self.best()
        self.put_back(way)
        self.known = [known or share for known, share in zip(self.known, way)]
        kept = {f"{i}.{n}": p for i, share in enumerate(way) for n, p in (self.added if share else self.own)[i].items()}
        kept = {name: p.detach().clone() for name, p in kept.items()}
        self.learnt.append(kept | named_tensors(self.head, "head."))
        self.chosen.append(list(way))
        self.paths.append(self.path() if self.by_em or self.by_darts else [])

    def path(self) -> list[list[float]]:
        """P(shared) of every layer at the points of the task's training that were passed."""
        return [row for row in self.history.tolist() if row[0] == row[0]]

    # ---- use, report, state -----------------------------------------------------------------------------------------

    def outputs(self, x: Tensor, task: int) -> Tensor:
        layers = [named_under(self.learnt[task], f"{i}.") for i in range(len(self.net.layers))]
        return self.scores(features(self.net, self.kernels(self.chosen[task], (layers, layers)), x), self.kept_head(task))

    def report(self) -> dict[str, Any]:
        shared = sum(p.numel() for layer, known in zip(self.shared, self.known) if known for p in layer.values())
        own = [sum(t.numel() for name, t in kept.items() if not name.startswith("head.")) for kept in self.learnt]
        report = self.costs(shared, own)
        report["configurations"] = ["".join("01"[share] for share in way) for way in self.chosen]
        return report | ({"curves": curves} if (curves := self.curves()) else {})

    def curves(self) -> dict[str, Any]:
        """P(shared) of every layer: while a task trains, the mean over tasks, and at the end of each task."""
        paths, layers = [path for path in self.paths if path], range(len(self.net.layers))
        if not paths:
            return {}
        most = min(map(len, paths))
        means = {f"layer {i}": [[k / most, sum(path[k][i] for path in paths) / len(paths)] for k in range(most)] for i in layers}
        ends = {f"layer {i}": [[task, path[-1][i]] for task, path in enumerate(paths)] for i in layers}
        return {
            "shared while a task trains": {"x": "share of its training, mean of the tasks", "y": "P(shared)", "lines": means},
            "shared in the end": {"x": "task", "y": "P(shared)", "lines": ends},
        }
