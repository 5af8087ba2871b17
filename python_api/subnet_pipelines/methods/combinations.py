"""Whose rows are these, where every task is a combination of masks? ImpressLearn's two answers without a task id, both by how sure the
logits are and without a label.

GN weighs the combinations of all learnt tasks by beta and goes down to it; basis-GN goes down to the coefficients over the masks
themselves, and asks for no task.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from subnet_pipelines import inference
from subnet_pipelines.benchmarks.base import Benchmark, Task
from subnet_pipelines.bounds import Count, Positive, Several, Whole
from subnet_pipelines.chance import stream
from subnet_pipelines.errors import NotLearnt
from subnet_pipelines.methods.base import MethodConfig, Prediction
from subnet_pipelines.methods.dense import OPTIMIZERS
from subnet_pipelines.methods.masked import MaskedMethod, entry_name
from subnet_pipelines.models import batch_statistics


@dataclass(frozen=True)
class CombinationConfig(MethodConfig):
    """Inference without a task id: the paper prints the number of passes and nothing else."""

    inference: Literal["gradient", "exhaustive"] = "exhaustive"
    """Gradient steps on the weights of all combinations (GN, the paper), or every combination tried: the one that is surest wins, measured
    under inference_objective information by how sure it was of its own training rows."""
    inference_rows: Count | None = 512
    """Unlabelled test rows that every combination is tried on; null is all of a task."""
    passes: Whole = 5
    """Epochs of gradient steps over a task's unlabelled test rows by which its combination is found; 0 is one gradient of one batch."""
    candidates: Literal["all", "new"] = "all"
    """Among whose combinations it is looked for: all learnt tasks', those of the basis being one mask each, or the new tasks'."""
    inference_objective: Literal["entropy", "information"] = "information"
    """What being sure is: a low mean entropy (the paper), or one far below the entropy of the mean prediction, which it is not where all
    rows get one class."""
    inference_step: Literal["simplex", "free"] = "simplex"
    """Exponentiated gradient, standardised over the candidates, or plain gradient steps on the weights of the combinations."""
    inference_lr: Positive = 0.5
    """The rate of these steps."""
    inference_batch: Several = 128
    """Unlabelled rows of a step."""
    basis_passes: Whole = 0
    """At the end of a run show every basis task without labels, and learn coefficients by so many epochs of the same objective
    (basis-GN)."""
    basis_start: Literal["equal", "surest"] = "surest"
    """Where these coefficients start: 1 / K each; or half on the one mask that wins on the first inference_rows rows as in exhaustive
    inference, and the rest alike on the others."""
    basis_step: Literal["simplex", "rmsprop", "adam", "sgd"] = "simplex"
    """As inference_step simplex, in every layer over the masks, or the optimizer of these coefficients."""
    basis_step_lr: Positive = 0.5
    """The rate of either."""


class Found(NamedTuple):
    """What GN found for the rows of one task."""

    tasks: list[int]  # after the first gradient, and after each pass; of exhaustive search one
    task: int  # the answer: the last of them


class CombinationMethod(MaskedMethod):
    """Tasks that are entries of a bank, masks or combinations of masks, and can be inferred as such from all test rows of a task."""

    scenarios = ("GG", "GNs", "GNu")
    elsewhere = {"NNs": "nns"}
    evaluation = (
        "inference",
        "inference_rows",
        "passes",
        "candidates",
        "inference_objective",
        "inference_step",
        "inference_lr",
        "inference_batch",
        "basis_passes",
        "basis_start",
        "basis_step",
        "basis_step_lr",
    )

    def __init__(self, config: CombinationConfig, benchmark: Benchmark, seed: int):
        super().__init__(config, benchmark, seed)
        self.benchmark = benchmark
        self.basis: list[str] = []  # names of the masks that new tasks combine
        self.found: Found | None = None  # for the test rows that were prepared last

    # ---- whose combination is it? -----------------------------------------------------------------------------------

    def prepare(self, x: Tensor, order: Tensor) -> None:
        self.found = self.find(x, order) if self.known() else None

    def predict(self, x: Tensor, task: int | None) -> Prediction:
        if task is not None:
            return super().predict(x, task)
        if self.found is None:
            raise NotLearnt("no task has been learnt whose combination could be found")
        return super().predict(x, self.found.task)

    def known(self) -> list[int]:
        """The tasks whose combinations are candidates."""
        learnt, masked = [i for i in range(len(self.benchmark)) if entry_name(i) in self.bank], self.masked()
        return learnt if self.config.candidates == "all" else [i for i in learnt if i not in masked]

    def masked(self) -> list[int]:
        """The tasks that have a mask."""
        return [i for i in range(len(self.benchmark)) if (name := entry_name(i)) in self.bank and self.bank[name].alphas is None]

    def coefficients_of(self, tasks: Sequence[int]) -> Tensor:
        """The tasks' coefficients over all masks of the bank, a mask's own being 1 on itself: (J, layers, K)."""
        places = {name: k for k, name in enumerate(self.bank.masks)}
        found = self.bank.layers()[0].weight.new_zeros((len(tasks), len(self.bank.layers()), len(places)))
        for row, task in zip(found, tasks):
            name = entry_name(task)
            entry = self.bank[name]
            if entry.alphas is None:
                row[:, places[name]] = 1
            else:
                row[:, [places[other] for other in entry.over]] = entry.alphas.to(found).expand(len(row), -1)
        return found

    def alike(self, candidates: Tensor) -> Tensor:
        """Candidates (J, layers, K) with effective weights of one size in each layer, the root mean square over the candidates.

        Else the one with the largest weights would win everywhere, as whatever makes logits larger makes them surer. The squared size is
        alpha^T O alpha with O the masks' overlaps, up to a factor where squared weights do not depend on the masks.
        """
        overlap = torch.stack(list(self.bank.overlap().values())).to(candidates)
        squared = torch.einsum("jlk,lkm,jlm->jl", candidates, overlap, candidates)
        return candidates * (squared.mean(0) / squared.clamp(min=torch.finfo(squared.dtype).tiny)).sqrt()[:, :, None]

    def find(self, x: Tensor, order: Tensor) -> Found:
        """Weigh the candidates on the rows x (n, ...), taken in this order in the first pass and in others after it."""
        c, tasks = self.config, self.known()
        if c.inference == "exhaustive":
            rows = order[: c.inference_rows]
            best = min(tasks, key=lambda task: self.doubt(x, rows, entry_name(task)))
            return Found([best], best)
        shown = self.shown(order, c.passes) if c.passes else [[order[: c.inference_batch]]]
        candidates = self.alike(self.coefficients_of(tasks))
        gradient = lambda alphas, rows: self.unlabelled_gradient(alphas, self.bank.masks, x[rows])  # noqa: E731
        weighed = inference.weigh_combinations(gradient, candidates, shown, c.inference_lr, c.inference_step)
        self.bank.activate(None)
        places = [inference.one_shot(weighed.first), *weighed.beta.argmax(1)[: c.passes]]
        found = [tasks[int(place)] for place in places]
        return Found(found, found[-1])

    def objective(self, logits: Tensor) -> Tensor:
        """How unsure logits (B, C) are, 0-dim."""
        informed = self.config.inference_objective == "information"
        return inference.information(logits) if informed else inference.entropy(logits).mean()

    @torch.no_grad()
    def doubt(self, x: Tensor, rows: Tensor, name: str) -> float:
        """The objective of these rows of x (n, ...) through an entry of the bank; under information less that of the rows it was learnt
        on, as some entries are surer of everything than others."""
        with self.bank.as_task(name):
            doubt = self.objective(torch.cat([self.network(x[some]) for some in rows.split(1000)])).item()
        return doubt - (self.bank[name].tensors["information"].item() if self.config.inference_objective == "information" else 0)

    @torch.no_grad()
    def own_information(self, task: Task) -> Tensor:
        """The information objective of as many training rows of a task, through whatever is active, 0-dim."""
        self.eval()
        rows = torch.randperm(len(task.train), generator=stream(self.seed, "own rows", task.index))[: self.config.inference_rows]
        parts = (task.train.tensors(some)[0] for some in rows.to(self.device).split(1000))
        return inference.information(torch.cat([self.network(x) for x in parts]))

    def shown(self, order: Tensor, passes: int) -> list[list[Tensor]]:
        """Row numbers of the batches of each pass; a last batch of one row, which has no statistics, is left out."""
        found = []
        for k in range(passes):
            mixed = torch.randperm(len(order), generator=stream(self.seed, "unlabelled", k)).to(order.device)
            batches = (order[mixed] if k else order).split(self.config.inference_batch)
            found.append([rows for rows in batches if len(rows) > 1 or len(order) == 1])
        return found

    @torch.enable_grad()
    def unlabelled_gradient(self, alphas: Tensor, over: Sequence[str], x: Tensor) -> Tensor:
        """Of the objective over the rows x to coefficients (layers, K) over these masks; norms take the rows' own statistics."""
        alphas = alphas.detach().requires_grad_()
        self.bank.superpose(alphas, over=over)
        with batch_statistics(self.norms):
            value = self.objective(self.network(x))
        return torch.autograd.grad(value, alphas)[0]

    # ---- a basis task without its mask ------------------------------------------------------------------------------

    def first_choice(self, x: Tensor, order: Tensor) -> int:
        """The place of the basis mask that SupSup's one-shot rule chooses by the first batch of the rows x (n, ...)."""
        equal = self.bank.layers()[0].weight.new_full((len(self.bank.layers()), len(self.basis)), 1 / len(self.basis))
        return int(inference.one_shot(self.unlabelled_gradient(equal, self.basis, x[self.shown(order, 1)[0][0]]).sum(0)))

    def descend(self, x: Tensor, order: Tensor) -> list[Tensor]:
        """basis-GN on the rows x (n, ...): coefficients (layers, K) after each pass."""
        c = self.config
        start = self.descent_start(x, order).expand(len(self.bank.layers()), -1).clone()
        alphas, drift = nn.Parameter(start), start.log()
        opt = None if c.basis_step == "simplex" else OPTIMIZERS[c.basis_step]([alphas], c.basis_step_lr)
        after = []
        for batches in self.shown(order, c.basis_passes):
            for rows in batches:
                alphas.grad = self.unlabelled_gradient(alphas, self.basis, x[rows])
                if opt is None:
                    drift = drift - c.basis_step_lr * inference.standardised(alphas.grad)
                    alphas.data = drift.softmax(1)
                else:
                    opt.step()
            after.append(alphas.detach().clone())
        return after

    def descent_start(self, x: Tensor, order: Tensor) -> Tensor:
        """Coefficients (K,) of basis masks from which they go down the objective; all are > 0."""
        masks = len(self.basis)
        if self.config.basis_start == "equal" or masks == 1:
            return torch.full((masks,), 1 / masks, device=x.device)
        rows = order[: self.config.inference_rows]
        doubts = [self.doubt(x, rows, name) for name in self.basis]
        start = torch.full((masks,), 0.5 / (masks - 1), device=x.device)
        start[doubts.index(min(doubts))] = 0.5
        return start

    @torch.no_grad()
    def right(self, x: Tensor, y: Tensor, order: Tensor, run_as: str | Tensor) -> float:
        """Percent of the rows that an entry of the bank, or these coefficients over the basis, get right."""
        if isinstance(run_as, str):
            self.bank.activate(run_as)
        else:
            self.bank.superpose(run_as, over=self.basis)
        with batch_statistics(self.norms if isinstance(run_as, Tensor) else ()):
            right = sum((self.network(x[rows]).argmax(1) == y[rows]).sum() for rows in order.split(1000))
        self.bank.activate(None)
        return 100 * right.item() / len(y)

    # ---- how well did it go? ----------------------------------------------------------------------------------------

    def final_report(self) -> dict[str, Any]:
        self.eval()
        report = super().final_report()
        curves = dict(report.get("curves", {}))
        if not self.benchmark.scenario.test_id and self.known():
            report["gn"], curves["combinations found"] = self.searches()
        if self.config.basis_passes and (masked := self.masked()):
            report["basis_gn"], curves["without a label"] = self.descents(masked)
        return {**report, "curves": curves} if curves else report

    def rows_of(self, task: int) -> tuple[Tensor, Tensor, Tensor]:
        """A task's test rows x (n, ...), y (n,), and their order, that in which they are measured."""
        x, y = self.benchmark.test(task).tensors()
        return x, y, torch.randperm(len(y), generator=stream(self.benchmark.seed, "test order", task)).to(x.device)

    def searches(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Every candidate's search once more, and a curve of it.

        tasks: what was found after the first gradient and after each pass, {task: [...]}; found: percent of the tasks that were found so;
        accuracy: mean percent right through what was found; given: mean percent right with the id.
        """
        tasks, accuracy, given = {}, [], []
        for task in self.known():
            x, y, order = self.rows_of(task)
            found = self.find(x, order).tasks
            through = {other: self.right(x, y, order, entry_name(other)) for other in {task, *found}}
            tasks[task], given = found, [*given, through[task]]
            accuracy.append([through[other] for other in found])
        share = [100 * statistics.fmean(task == other for task, other in pairs) for pairs in each_pass(tasks)]
        means = [statistics.fmean(each) for each in zip(*accuracy)]
        report = {"tasks": {entry_name(task): found for task, found in tasks.items()}, "found": share, "accuracy": means}
        lines = {"found": list(map(list, enumerate(share))), "right through it": list(map(list, enumerate(means)))}
        return {**report, "given": statistics.fmean(given)}, {"x": "pass", "y": "%", "lines": lines}

    def descents(self, masked: Sequence[int]) -> tuple[dict[str, Any], dict[str, Any]]:
        """basis-GN on these tasks, and a curve of it. Percent right: of a task's own mask, of the mask that one shot chose, and of the
        coefficients after each pass."""
        own, shot, after, hits = {}, {}, {}, []
        for task in masked:
            (x, y, order), name = self.rows_of(task), entry_name(task)
            chosen = self.basis[self.first_choice(x, order)]
            hits.append(chosen == name)
            own[name] = self.right(x, y, order, name)
            shot[name] = own[name] if hits[-1] else self.right(x, y, order, chosen)
            after[name] = [self.right(x, y, order, each) for each in self.descend(x, order)]
        means = [statistics.fmean(each) for each in zip(*after.values())]
        report = {"own_mask": own, "one_shot_mask": shot, "combination": after, "one_shot_found": 100 * statistics.fmean(hits)}
        report |= {"own_mask_mean": statistics.fmean(own.values()), "one_shot_mask_mean": statistics.fmean(shot.values())}
        flat = lambda value: [[k + 1, value] for k in range(len(means))]  # noqa: E731
        lines = {"combination": [[k + 1, mean] for k, mean in enumerate(means)], "own mask": flat(report["own_mask_mean"])}
        lines["one-shot mask"] = flat(report["one_shot_mask_mean"])
        return {**report, "combination_mean": means}, {"x": "pass", "y": "right (%)", "lines": lines}


def each_pass(tasks: dict[int, list[int]]) -> list[list[tuple[int, int]]]:
    """Of {task: found after each pass} the pairs of both, pass by pass."""
    return [[(task, found[k]) for task, found in tasks.items()] for k in range(len(next(iter(tasks.values()))))]
