"""SupSup without any task id (Wortsman et al., NeurIPS 2020, scenario NNs): a stream of batches, and nobody says when its task changes.

Every so often all masks run at once on a batch. If the entropy's gradient prefers one of them it is that mask's task, and the mask goes on
learning; if it prefers none the task is new and gets the next mask. One set of scores is in memory: a mask that is left keeps its bits in
the bank and its scores in a file, from which they come back with its task.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor

from subnet_kernels.files import write_atomic
from subnet_pipelines import inference
from subnet_pipelines.benchmarks.base import Batch, Benchmark, Task
from subnet_pipelines.bounds import Count, Part, Several, Share, Whole
from subnet_pipelines.chance import seeded
from subnet_pipelines.checkpoint import KEEP
from subnet_pipelines.errors import NotLearnt, Refusal
from subnet_pipelines.methods.base import Clock, Method, Phase, Prediction
from subnet_pipelines.methods.supsup import SupSup, SupSupConfig, outputs_of


@dataclass(frozen=True)
class NNsConfig(SupSupConfig):
    """SupSup without any task id; the defaults are the recipe of the authors' code on Permuted MNIST."""

    epochs: int = 3
    """Epochs of a visit of the stream to a task, where iterations is null."""
    iterations: int | None = 1000
    """Steps of a visit of the stream to a task."""
    head: Literal["masked"] = "masked"
    """The last layer is fixed and masked as the others are: a learnt head would need to be told its task."""
    norm: Literal["batch"] = "batch"
    """Batch norms use the batch's own statistics: nobody says when a task ends and its statistics could be gathered."""
    optimizer: Literal["rmsprop", "adam", "sgd"] = "rmsprop"
    """Of the scores; its state starts afresh when another mask takes over (in the authors' code that of a mask fades while it rests)."""
    schedule: Literal["constant"] = "constant"
    """The rate stays as it is: nobody says when a task begins."""
    transfer: Literal["none"] = "none"
    """New scores are drawn: a mask that starts from others' could not be told from them."""
    parallel_tasks: Literal[1] = 1
    """One mask learns at a time."""
    check_every: Count = 100
    """Batches between two looks at whose they are."""
    grace: Whole = 0
    """Batches that a new mask learns before the next look, at least, so that looks may be more frequent than a mask is quick to know."""
    check_objective: Literal["H", "G"] = "H"
    """What a look differentiates: the entropy (H, the paper and the authors' code), or G; `objective` is that of the test."""
    threshold: float = 1.125
    """A batch is of a new task where no one of n candidates has more than threshold / n of the softmax of the gradients."""
    return_threshold: float | None = None
    """Another mask than the one that learns takes a batch where it has at least this / n, as it had a whole visit to learn its task; null:
    threshold."""
    drop: Part | None = None
    """A batch is of a new task, too, where the gradient prefers the mask that learns, but by less than this part of the last look's n p - 1
    (p: its share of the softmax); null does not compare."""
    candidates: Several = 5
    """Untrained masks fill the candidates of a look up to so many."""
    budget: Count = 2500
    """Masks that may be allocated."""
    when_spent: Literal["skip", "reuse"] = "skip"
    """What becomes of a new task when the budget is spent: its batches are skipped until the next look (in the authors' code all later
    batches of the run are), or the likeliest mask learns them."""
    merge: Share | None = None
    """A look merges the two masks that the gradient prefers where they agree on this share of the batch's rows; null never does."""

    def check(self) -> None:
        super().check()
        if self.threshold <= 1:
            raise Refusal(f"threshold must exceed 1, which n equal candidates have n times, got {self.threshold}")
        if self.return_threshold is not None and self.return_threshold <= 1:
            raise Refusal(f"return_threshold must exceed 1, which n equal candidates have n times, got {self.return_threshold}")


def mask_name(number: int) -> str:
    """The bank's name of the mask that was allocated at that place."""
    return f"mask {number}"


class NNs(SupSup):
    """Masks over fixed random weights that are allocated when a batch seems to be of no known task."""

    name = "nns"
    Config = NNsConfig
    forget_free = False  # a mask goes on learning when its task comes back, or what looks like its task
    static_step = False
    scenarios = ("NNs",)
    elsewhere = dict.fromkeys(("GG", "GNs", "GNu"), "supsup")

    def __init__(self, config: NNsConfig, benchmark: Benchmark, seed: int):
        super().__init__(config, benchmark, seed)
        if config.check_objective == "G" and outputs_of(config, benchmark) == self.classes:
            raise Refusal(f"outputs must exceed the {self.classes} classes for objective G, which reads the superfluous neurons")
        self.visits = [visit.task for visit in benchmark.visits()]  # for the report alone
        self.masks: list[int] = []  # numbers of the masks, in the bank's order
        self.allocated = 0  # masks ever: the next one's number
        self.current: int | None = None  # the mask whose scores are live
        self.files: dict[int, str] = {}  # the scores of the others
        self.until_look = 0  # batches
        self.margin: float | None = None  # n p - 1 of the last look, if it knew the current mask's task
        self.skipping = False
        self.tally = {"skipped_batches": 0, "changes_of_mask": 0, "merged": 0}
        self.trained: dict[int, dict[int, int]] = {}  # visit -> mask -> batches
        self.fresh = True  # the bank's entry of the current mask has its live bits
        self.needed: list[set[str]] = []  # files of scores that the last checkpoints refer to

    def plan(self, task: Task | None) -> list[Phase]:
        c = self.config
        return [Phase("stream", epochs=c.epochs, steps=c.iterations, batch_size=c.batch_size, optimizer=self.optimizer)]

    def step(self, batch: Batch, opt: torch.optim.Optimizer, clock: Clock) -> dict[str, Tensor]:
        if self.until_look == 0:
            self.until_look = self.config.check_every
            self.eval()
            self.look(batch, opt)
            self.train()
        self.until_look -= 1
        trained = self.trained.setdefault(clock.visit, {})
        if self.skipping:
            self.tally["skipped_batches"] += 1
            with torch.no_grad():
                return {"loss": self.loss(batch, clock)}
        trained[self.current] = trained.get(self.current, 0) + 1
        self.fresh = False
        return super().step(batch, opt, clock)

    # ---- whose batch is it? -----------------------------------------------------------------------------------------

    def look(self, batch: Batch, opt: torch.optim.Optimizer) -> None:
        """Find the mask that learns the next batches, and make its scores the live ones. On a GPU this waits for the device."""
        c = self.config
        if not self.masks:
            self.allocate(opt)
            return
        self.keep()
        grad = self.candidate_gradient(batch.x)
        found = inference.whose_batch(grad, len(self.masks), c.threshold)
        margin = found.confidence * len(grad) - 1
        self.skipping = False
        known = not found.new and found.mask < len(
            self.masks
        )  # an untrained mask that stands out knows the task as little as any
        if known and self.masks[found.mask] == self.current:
            # a mask that has begun to learn another task passes for that task's, but not as well as it did for its own
            known = c.drop is None or self.margin is None or margin >= c.drop * self.margin
        elif known and c.return_threshold is not None:
            known = margin + 1 >= c.return_threshold
        if known:
            self.take(self.merged(grad, found.mask, batch), opt)
            self.margin = margin
        elif len(self.masks) < c.budget:
            self.allocate(opt)
        elif c.when_spent == "reuse":
            self.take(self.masks[inference.one_shot(grad[: len(self.masks)])], opt)
            self.margin = None
        else:
            self.skipping = True

    def candidate_gradient(self, x: Tensor) -> Tensor:
        """Of the batch's mean objective to equal coefficients of all masks and, after them, of the untrained ones that fill up: (n,)."""
        with self.filled_up():
            n = len(self.bank)
            alphas = torch.full((n,), 1 / n, device=x.device, requires_grad=True)
            self.bank.superpose(alphas)
            logits, of_g = self.model(x), self.config.check_objective == "G"
            objective = inference.g_objective(logits, self.classes) if of_g else inference.entropy(logits)
            return torch.autograd.grad(objective.mean(), alphas)[0]

    @contextlib.contextmanager
    def filled_up(self) -> Iterator[None]:
        """Within the block the bank also has those of the next masks, untrained, that make the candidates enough."""
        fill = range(self.allocated, self.allocated + self.config.candidates - len(self.masks))
        if not fill:
            yield
            return
        live = self.scores()
        for number in fill:
            self.draw(number)
            self.bank.commit(mask_name(number))
        try:
            yield
        finally:
            for number in reversed(fill):
                self.bank.remove(mask_name(number))
            self.put(live)

    def merged(self, grad: Tensor, place: int, batch: Batch) -> int:
        """The number of the mask at that place, or of the runner-up where the two were one task's and it is the better one."""
        number = self.masks[place]
        if self.config.merge is None or len(self.masks) == 1:
            return number
        others = grad[: len(self.masks)].clone()
        others[place] = torch.inf
        other = self.masks[inference.one_shot(others)]
        logits = {}
        for mask in (number, other):
            with torch.no_grad(), self.bank.as_task(mask_name(mask)):
                logits[mask] = self.model(batch.x)
        agreed = (logits[number].argmax(1) == logits[other].argmax(1)).double().mean().item()
        if agreed < self.config.merge:
            return number
        kept, lost = sorted((number, other), key=lambda mask: F.cross_entropy(logits[mask], batch.y).item())
        self.bank.remove(mask_name(lost))
        self.masks.remove(lost)
        self.files.pop(lost, None)
        self.current = None if self.current == lost else self.current
        for trained in self.trained.values():
            if lost in trained:
                trained[kept] = trained.get(kept, 0) + trained.pop(lost)
        self.tally["merged"] += 1
        return kept

    # ---- one set of scores in memory --------------------------------------------------------------------------------

    def keep(self) -> None:
        """Let the bank's entry of the current mask have its live bits."""
        if self.fresh:
            return
        self.run_live()
        name = mask_name(self.current)
        if name in self.bank:
            self.bank.replace(name)
        else:
            self.bank.commit(name)
        self.fresh = True

    def allocate(self, opt: torch.optim.Optimizer) -> None:
        """Go on with a new mask."""
        self.leave()
        self.current, self.allocated, self.fresh = self.allocated, self.allocated + 1, False
        self.until_look, self.margin = max(self.config.check_every, self.config.grace), None
        self.masks.append(self.current)
        self.draw(self.current)
        opt.state.clear()

    def take(self, number: int, opt: torch.optim.Optimizer) -> None:
        """Go on with a mask that is there."""
        if number == self.current:
            return
        self.leave()
        self.put(self.read(number))
        self.current = number
        del self.files[number]
        self.tally["changes_of_mask"] += 1
        opt.state.clear()

    def leave(self) -> None:
        """Keep the current mask, its scores in a file that no checkpoint's is written over by: its name has a hash of its content."""
        if self.current is None:
            return
        self.keep()
        data = safetensors.torch.save(dict(zip(self.bank.layer_names, (scores.cpu() for scores in self.scores()))))
        name = f"{self.current:05d}-{hashlib.sha256(data).hexdigest()[:12]}.safetensors"
        folder = self.folder()
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / name).exists():
            write_atomic(folder / name, data)
        self.files[self.current] = name
        self.current = None

    def folder(self) -> Path:
        if self.out is None:
            raise RuntimeError("a method that keeps scores in files needs its run's folder, `out`")
        return self.out / "scores"

    def draw(self, number: int) -> None:
        """Make the live scores those that a new mask begins with."""
        with seeded(self.seed, "scores", number):
            self.bank.begin(scores="init")

    def scores(self) -> list[Tensor]:
        """Copies of the live scores."""
        return [layer.scores.detach().clone() for layer in self.bank.layers()]

    @torch.no_grad()
    def put(self, scores: Iterable[Tensor]) -> None:
        """Make these scores the live ones."""
        self.run_live()
        for layer, values in zip(self.bank.layers(), scores):
            layer.scores.copy_(values)

    def read(self, number: int) -> list[Tensor]:
        """The scores of a mask that was left. Raises Refusal, naming the file."""
        path = self.folder() / self.files[number]
        try:
            found = safetensors.torch.load_file(path)
            return [found[name] for name in self.bank.layer_names]
        except (OSError, SafetensorError, KeyError) as error:
            raise Refusal(f"{path}: must hold the scores of {mask_name(number)} and cannot be read ({error})") from None

    # ---- at test ----------------------------------------------------------------------------------------------------

    def predict(self, x: Tensor, task: int | None) -> Prediction:
        """As the base has it; a row's task is the one that its mask has learnt most batches of, -1 where that is none."""
        self.keep()
        if not self.masks:
            raise NotLearnt("no mask has been allocated that could be inferred")
        found = self.infer(x)
        with self.bank.rows(found):
            logits = self.model(x)
        learnt = self.learnt()
        tasks = [most(learnt[number]) for number in self.masks]
        return Prediction(logits, torch.tensor(tasks, device=x.device)[found])

    def learnt(self) -> dict[int, Counter]:
        """For each mask the batches that it learnt of each task."""
        learnt: dict[int, Counter] = {number: Counter() for number in self.masks}
        for visit, trained in self.trained.items():
            for number, batches in trained.items():
                learnt[number][self.visits[visit]] += batches
        return learnt

    def report(self) -> dict[str, Any]:
        """capacity as SupSup has it, and how the stream was understood.

        allocated: masks now; mapping: mask -> task; purity: percent of the trained batches that were of their mask's task; switches:
        borders between visits, and switches_seen those after which another mask learnt most batches than before; returns: visits to a
        task that had been there, and returns_recognised percent of them in which the mask that learnt most had been that task's.
        """
        self.keep()
        learnt = self.learnt()
        total = sum(tasks.total() for tasks in learnt.values())
        before: dict[int, Counter] = {number: Counter() for number in self.masks}
        seen, back, recognised, last, changed = set(), 0, 0, None, 0
        for number, (visit, trained) in enumerate(sorted(self.trained.items())):
            task, main = self.visits[visit], most(trained)
            changed += number > 0 and main not in (-1, last)
            back += task in seen
            recognised += task in seen and main != -1 and most(before[main]) == task
            for mask, batches in trained.items():
                before[mask][task] += batches
            seen.add(task)
            last = main
        return {
            **super().report(),
            "allocated": len(self.masks),
            "budget": self.config.budget,
            "mapping": {mask_name(number): most(tasks) for number, tasks in learnt.items()},
            "purity": 100 * sum(max(tasks.values(), default=0) for tasks in learnt.values()) / total if total else None,
            "switches": max(0, len(self.trained) - 1),
            "switches_seen": changed,
            "returns": back,
            "returns_recognised": 100 * recognised / back if back else None,
            **self.tally,
        }

    # ---- to go on later ---------------------------------------------------------------------------------------------

    def facts(self) -> dict[str, Any]:
        names = ("masks", "allocated", "current", "files", "until_look", "margin", "skipping", "tally", "trained")
        return {name: getattr(self, name) for name in names}

    def build(self, facts: dict[str, Any]) -> None:
        for name, value in facts.items():
            setattr(self, name, value)

    def state(self) -> dict[str, Any]:
        """The bank's folder is for its reader: a resumed run makes the bank anew, of the scores that the checkpoint refers to."""
        self.keep()
        state = super().state()
        remove_others(self.out / "bank", [self.bank[name].saved.name for name in self.bank.names])
        # this checkpoint is not on the disk yet, and any of those before it may turn out to be torn
        self.needed = [*self.needed[-KEEP:], set(self.files.values())]
        if len(self.needed) > KEEP:
            remove_others(self.folder(), set().union(*self.needed))
        return state

    def load(self, state: dict[str, Any]) -> None:
        Method.load(self, self.with_fixed(state))
        live = self.scores()
        for number in self.masks:
            self.put(live if number == self.current else self.read(number))
            self.bank.commit(mask_name(number))
        self.put(live)


def most(counts: dict[int, int]) -> int:
    """The key of the greatest count, the first of several; -1 where there is none."""
    return max(counts, key=counts.__getitem__, default=-1)


def remove_others(folder: Path, needed: Sequence[str] | set[str]) -> None:
    """Delete the safetensors files of a folder but those of these names."""
    for path in folder.glob("*.safetensors"):
        if path.name not in needed:
            path.unlink()
