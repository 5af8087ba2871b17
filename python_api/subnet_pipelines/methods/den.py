"""DEN: dynamically expandable networks (Yoon et al., "Lifelong learning with dynamically expandable networks", ICLR 2018).

All tasks share one network, which grows. After the first task, each one
  selects: its head alone learns, with an L1 penalty, and a unit is selected where a weight that is not zero leads from it to the head;
  retrains the weights between selected units;
  expands, where the loss is still above a threshold: every layer gets new units, which alone learn; those whose weights group lasso has
  made zero are taken away again;
  splits: a unit that has moved far since the task began is put back as it was, and a copy of what it has become joins the layer; then the
  whole network is trained, held to what it was.
A task is tested on the units that were there at its end.

Read in the authors' program (jaehong31/DEN 17e7103), which is of linear layers; the convolutional one of LASEM's authors has never been
published. Here a unit is a channel, and what the task has for itself is the whole head, of two or three layers. Ours too: the units split
are those that moved most (the program takes the least of those above the threshold); a unit put back reads no units that are new; the
task's head reads the copy in its place; splitting follows whether there was an expansion or not, as in the paper.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from subnet_pipelines.benchmarks.base import Batch, Benchmark, Task, batches
from subnet_pipelines.bounds import Count, NotNegative, Part
from subnet_pipelines.chance import seeded
from subnet_pipelines.errors import Refusal
from subnet_pipelines.methods.base import Clock, Phase
from subnet_pipelines.methods.lifelong import ROWS, Lifelong, LifelongConfig, named_tensors, parameters
from subnet_pipelines.methods.selective import Kernel, features


@dataclass(frozen=True)
class DENConfig(LifelongConfig):
    """DEN in LASEM's comparison, which prints 48.00 % on Office-Home; constants are those that its program gives, but where it says so."""

    l1: NotNegative = 1e-6
    """By how much every step shrinks each weight that learns."""
    l2: NotNegative = 0.01
    """Half of it, times the squares of what learns, is added to the loss."""
    group: NotNegative = 1e-3
    """By how much every step shrinks the norm of a new unit's weights (DEN's program; LASEM's has .8, which makes all zero at once)."""
    hold: NotNegative = 0.5
    """Half of it, times the squares of what has moved since the task began, is added to the loss."""
    loss_threshold: NotNegative = 0.01
    """Mean loss over the training rows, without dropout, above which the network expands."""
    drift_threshold: NotNegative = 0.05
    """How far, as a norm, a unit's weights may move within a task without a split (DEN's program)."""
    expansion: Count = 16
    """Units that every layer gets in an expansion, and the most that are split in it."""
    select_share: Part = 0.1
    """Share of the epochs in which units are selected; the other phases have as many as the first task."""

    def check(self) -> None:
        super().check()
        if self.model == "lasem-resnet-18":
            raise Refusal("model must have no shortcuts for den, whose layers grow by themselves, got lasem-resnet-18")


class DEN(Lifelong):
    """The network as it is now, and the head of the task in training."""

    name = "den"
    Config = DENConfig
    FACTS = (*Lifelong.FACTS, "units", "stamps", "grown", "expanding", "splits", "tries")
    BESIDE = (*Lifelong.BESIDE, "before", "open")

    def __init__(self, config: DENConfig, benchmark: Benchmark, seed: int):
        super().__init__(config, benchmark, seed)
        self.units = [layer.channels for layer in self.net.layers]  # of every layer, now
        self.places = self.width // self.units[-1]  # of a channel where the head reads it
        self.stamps: list[list[int]] = []  # units of every layer at each task's end
        self.grown: list[int] = []  # while new units learn, units of every layer before them
        self.expanding = False  # whether the task in training expands the network
        self.splits: list[list[int]] = []  # and which units of every layer it splits
        self.tries: list[list[float | None]] = []  # accuracies at the best epoch of each phase of the task so far
        self.before: list[dict[str, Tensor]] = []  # the network when the task began
        self.open: dict[str, Tensor] = {}  # of every tensor that learns in this phase, bool: which entries
        self.make()

    # ---- tensors ----------------------------------------------------------------------------------------------------

    def make(self) -> None:
        """A network and a head of the sizes that there are now, freshly drawn."""
        layers = []
        with seeded(self.seed, "network"):
            for layer, inp, out in zip(self.net.layers, [self.inputs[0], *self.units], self.units):
                layers.append(self.start.linear(inp, out, layer.kernel, layer.kernel))
        self.layers = parameters(layers, self.device)
        self.width = self.units[-1] * self.places
        self.head = parameters(self.fresh_head(self.index), self.device)

    def put(self, i: int, weight: Tensor, bias: Tensor | None = None) -> None:
        """Give layer i, or past the last one the head, other tensors."""
        layer = self.layers[i] if i < len(self.layers) else self.head[0]
        layer["weight"] = nn.Parameter(weight.to(self.device).contiguous())
        if bias is not None:
            layer["bias"] = nn.Parameter(bias.to(self.device))
            self.units[i] = len(bias)
            self.width = self.units[-1] * self.places

    @torch.no_grad()
    def take(self, i: int, units: list[int]) -> None:
        """Layer i's units become these of them, in this order; what reads them follows."""
        places = torch.tensor(units).to(self.device)
        weight, bias = self.layers[i]["weight"], self.layers[i]["bias"]
        if i + 1 < len(self.layers):
            self.put(i + 1, self.layers[i + 1]["weight"][:, places])
        else:
            self.put(i + 1, self.head[0]["weight"].unflatten(1, (-1, self.places))[:, places].flatten(1))
        self.put(i, weight[places], bias[places])

    @torch.no_grad()
    def grow(self) -> None:
        """New units for every layer, freshly drawn, as are the weights by which old units and the head read them; these alone learn."""
        self.grown, self.open, more = list(self.units), {}, self.config.expansion
        with seeded(self.seed, "expansion", self.index):
            for i, layer in enumerate(self.net.layers):
                old = self.layers[i]["weight"].shape
                fresh = self.start.linear(old[1] + (more if i else 0), old[0] + more, layer.kernel, layer.kernel)
                fresh = {name: t.to(self.device) for name, t in fresh.items()}
                opened = {name: torch.ones_like(t, dtype=torch.bool) for name, t in fresh.items()}
                corner = {"weight": (slice(old[0]), slice(old[1])), "bias": slice(old[0])}
                for name, at in corner.items():
                    fresh[name][at], opened[name][at] = self.layers[i][name], False
                    self.open[f"layers.{i}.{name}"] = opened[name]
                self.put(i, fresh["weight"], fresh["bias"])
            head = self.head[0]["weight"]
            wide = self.start.linear(self.width, len(head))["weight"].to(self.device)
        wide[:, : head.shape[1]] = head
        self.put(len(self.layers), wide)
        self.open |= {f"head.{name}": torch.ones_like(p, dtype=torch.bool) for name, p in self.head.named_parameters()}

    # ---- the phases of a task -----------------------------------------------------------------------------------------

    def plan(self, task: Task) -> list[Phase]:
        if task.index == 0:
            return [self.phase("train", task, self.learning, lambda: self.begin(0, "layers."), self.end)]
        select = self.phase(
            "select", task, self.learning, lambda: self.begin(task.index), self.selected, self.config.select_share
        )
        retrain = self.phase("retrain", task, self.learning, None, self.retrained)
        expand = self.phase("expand", task, self.learning, lambda: self.expanding and self.grow(), self.expanded)
        split = self.phase("split", task, self.learning, self.split, self.end)
        expand, split = replace(expand, needed=lambda: self.expanding), replace(split, needed=lambda: any(self.splits))
        return [select, retrain, expand, split]

    def learning(self) -> list[nn.Parameter]:
        """What has open entries."""
        return [p for name, p in self.named_parameters() if name in self.open]

    def begin(self, task: int, also: str = "head.") -> None:
        """A fresh head, which learns, and what else has names that begin so."""
        self.index, self.expanding, self.splits, self.tries, self.grown = task, False, [], [], []
        self.before = [{name: p.detach().clone() for name, p in layer.items()} for layer in self.layers]
        self.head = parameters(self.fresh_head(task), self.device)
        self.open_all("head.", also)

    def open_all(self, *prefixes: str) -> None:
        """What learns is all that has a name that begins so."""
        self.open = {n: torch.ones_like(p, dtype=torch.bool) for n, p in self.named_parameters() if n.startswith(prefixes)}

    def note(self) -> None:
        """The end of a phase."""
        if (found := self.measure())[1] is not None:
            self.tries.append(found)

    @torch.no_grad()
    def selected(self) -> None:
        """Open the weights between the units from which a weight that is not zero leads to the head."""
        self.note()
        head = self.head[0]["weight"]
        used = head.unflatten(1, (-1, self.places)).ne(0).any(2).any(0)
        self.open_all("head.")
        self.open["head.0.weight"] = used.repeat_interleave(self.places).expand_as(head).clone()
        for i in range(len(self.layers) - 1, -1, -1):
            weight = self.layers[i]["weight"]
            rows = used[:, None, None, None]
            below = (weight.ne(0) & rows).any(3).any(2).any(0)
            read = below if i else torch.ones_like(below)  # what the first layer reads is no unit
            self.open[f"layers.{i}.weight"] = (rows & read[None, :, None, None]).expand_as(weight).clone()
            self.open[f"layers.{i}.bias"], used = used, below

    def retrained(self) -> None:
        """The end of retraining: find whether the network is to expand."""
        self.note()
        self.expanding = self.training_loss() > self.config.loss_threshold

    def expanded(self) -> None:
        """The end of an expansion, or of none: find what units to split."""
        self.note()
        if self.expanding:
            for i, dead in enumerate(self.dead()):
                self.take(i, [unit for unit in range(self.units[i]) if unit not in dead])
        self.grown, self.splits = [], self.drifted()

    @torch.no_grad()
    def split(self) -> None:
        """Put the units to split back as they were, with a copy each of what they have become; all learns."""
        for i, split in enumerate(self.splits):
            if not split:
                continue
            self.take(i, [*range(self.units[i]), *split])
            old, at = self.before[i], torch.tensor(split).to(self.device)
            weight, bias = self.layers[i]["weight"], self.layers[i]["bias"]
            weight[at] = 0.0
            weight[at, : old["weight"].shape[1]] = old["weight"][at]
            bias[at] = old["bias"][at]
            if i == len(self.layers) - 1:
                self.head[0]["weight"].unflatten(1, (-1, self.places))[:, at] = 0.0
        self.open_all("layers.", "head.")

    # ---- what needs values on the host --------------------------------------------------------------------------------

    @torch.no_grad()
    def training_loss(self) -> float:
        """Mean loss over the training rows of the task in training, without dropout."""
        self.eval()
        x, y, _ = self.benchmark.task(self.index).train.marked(None)
        return sum(float(F.cross_entropy(self.run(b.x), b.y, reduction="sum")) for b in batches(x, y, None, None, ROWS)) / len(y)

    def dead(self) -> list[list[int]]:
        """New units of every layer that read nothing."""
        silent = [layer["weight"].flatten(1).eq(0).all(1).nonzero().flatten().tolist() for layer in self.layers]
        return [[unit for unit in units if unit >= first] for units, first in zip(silent, self.grown)]

    @torch.no_grad()
    def drifted(self) -> list[list[int]]:
        """Units of every layer that have moved further than allowed since the task began, at most `expansion`, the furthest."""
        found = []
        for layer, before in zip(self.layers, self.before):
            out, inp = before["weight"].shape[:2]
            moved = (layer["weight"][:out, :inp] - before["weight"]).flatten(1).norm(dim=1).tolist()
            furthest = sorted(range(out), key=lambda unit, moved=moved: -moved[unit])[: self.config.expansion]
            found.append(sorted(unit for unit in furthest if moved[unit] > self.config.drift_threshold))
        return found

    # ---- a step -----------------------------------------------------------------------------------------------------

    def kernels(self, units: Sequence[int]) -> list[Kernel]:
        """The kernels of the first so many units of every layer."""
        sizes = zip(self.layers, units, [self.inputs[0], *units])
        return [(layer["weight"][:out, :inp], layer["bias"][:out]) for layer, out, inp in sizes]

    def body(self, x: Tensor) -> Tensor:
        learns = "layers.0.weight" in self.open  # while units are selected the head learns alone
        with torch.set_grad_enabled(torch.is_grad_enabled() and learns):
            return features(self.net, self.kernels(self.units), x)

    def penalty(self) -> Tensor:
        """What the loss adds, 0-dim: the squares of what learns, and after the first task of what has moved since the task began."""
        total = self.config.l2 / 2 * sum(p.square().sum() for p in self.learning())
        for i, before in enumerate(self.before if self.index and "layers.0.weight" in self.open else ()):
            out, inp = before["weight"].shape[:2]
            moved = self.layers[i]["weight"][:out, :inp] - before["weight"], self.layers[i]["bias"][:out] - before["bias"]
            total = total + self.config.hold / 2 * sum(t.square().sum() for t in moved)
        return total

    def loss(self, batch: Batch, clock: Clock) -> Tensor:
        return super().loss(batch, clock) + self.penalty()

    def gradients(self, clock: Clock) -> None:
        for name, p in self.named_parameters():
            if name in self.open:
                p.grad.mul_(self.open[name])

    def step(self, batch: Batch, opt: torch.optim.Optimizer, clock: Clock) -> dict[str, Tensor]:
        made = super().step(batch, opt, clock)
        self.shrink()
        return made

    @torch.no_grad()
    def shrink(self) -> None:
        """Make open weights smaller by `l1`, down to zero, and new units' weights shorter by `group`."""
        for name, p in self.named_parameters():
            if name in self.open and name.endswith("weight"):
                p.copy_(torch.where(self.open[name], F.softshrink(p, self.config.l1), p))
        for layer, first in zip(self.layers, self.grown):
            new = layer["weight"][first:]
            norm = new.flatten(1).norm(dim=1).clamp_min(1e-30)
            new.mul_((1 - self.config.group / norm).clamp_min(0)[:, None, None, None])

    # ---- the end of a task, use, report, state ------------------------------------------------------------------------

    def end(self) -> None:
        """The end of a task: its peak is that of the phase with the best accuracy on validation rows, of equals the first."""
        self.note()
        self.finish(max(self.tries, key=lambda found: found[0], default=[None, None]))

    def settle(self) -> None:
        self.learnt.append(named_tensors(self.head, "head."))
        self.stamps.append(list(self.units))
        self.before, self.open = [], {}

    def outputs(self, x: Tensor, task: int) -> Tensor:
        return self.scores(features(self.net, self.kernels(self.stamps[task]), x), self.kept_head(task))

    def report(self) -> dict[str, Any]:
        shared = sum(p.numel() for p in self.layers.parameters())
        return self.costs(shared, [0] * len(self.learnt)) | {"units": list(self.stamps)}

    def build(self, facts: dict[str, Any]) -> None:
        super().build(facts)
        self.make()
