"""The loop: it owns time, order, measuring and saving; a method owns the arithmetic of a step and its own state."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from subnet_pipelines.benchmarks.base import Batch, Benchmark, Task, Visit, batches
from subnet_pipelines.chance import generators, seed_of, stream
from subnet_pipelines.errors import Refusal
from subnet_pipelines.evaluate import Matrix, RunConfig, accuracy, validate
from subnet_pipelines.folder import Folder
from subnet_pipelines.graph import GraphedSteps, refuse_graph
from subnet_pipelines.interrupt import Interrupted, Stop
from subnet_pipelines.methods.base import Clock, Method, Phase
from subnet_pipelines.progress import Quiet
from subnet_pipelines.report import Result, finished, make_result, write_run
from subnet_pipelines.schedules import Plateau, set_lr

LIBC = ctypes.CDLL(None) if os.name == "posix" else None
WINDOW = 100  # steps between two looks at the losses, each one host sync


@dataclass
class Cursor:
    """Where the run is, and the sums that go with it. `part` counts visits within a phase where the stream's borders are hidden."""

    task: int = 0
    phase: int = 0
    part: int = 0
    epoch: int = 0
    batch: int = 0
    step: int = 0
    begun: bool = False  # the phase's `first` has run
    best: float = math.inf  # least validation loss of the phase
    sums: dict[str, float] = field(default_factory=dict)  # of what steps returned in this epoch


def run(
    method: Method,
    benchmark: Benchmark,
    config: RunConfig,
    out: Path | str,
    resume: bool = False,
    show: Quiet | None = None,
    save_every: float = 60.0,
    note: dict[str, Any] | None = None,
) -> Result | None:
    """Train the method on the benchmark's stream, measure it, and write the folder `out`; returns what result.json holds.

    resume goes on at the batch where `out` stopped, to the same final bits; method must then be fresh. save_every: seconds between
    checkpoints; note: more fields for the recorded config. Raises Refusal where `out` holds a run and resume is false, where it was made
    with another config, where cuda_graph cannot be had, or where a loss is not finite; Interrupted at SIGTERM or SIGINT, after a
    checkpoint. Of several processes that share a run each calls this, with the run's folder as out; but for the first they return None.
    """
    config.check()
    if config.cuda_graph:
        refuse_graph(method)
    out = method.out = method.process.home(Path(out))
    record = {"method": method.name, "benchmark": benchmark.name, "seed": method.seed}
    record |= {**asdict(method.config), **asdict(benchmark.config), **asdict(config), **(note or {})}
    if resume and (done := finished(out, record)) is not None:
        return done
    show = show or Quiet()
    with repeatable(), Stop() as stop:  # before the folder is there, so that whoever sees it may send signals
        return Run(method, benchmark, config, Folder(out, record, resume, show.say), show, save_every, stop).go()


@contextlib.contextmanager
def repeatable() -> Iterator[None]:
    """Within the block cuDNN's convolutions give the same bits every time, without which a resumed run would end with others."""
    cudnn = torch.backends.cudnn
    before = cudnn.deterministic, cudnn.benchmark
    cudnn.deterministic, cudnn.benchmark = True, False
    try:
        yield
    finally:
        cudnn.deterministic, cudnn.benchmark = before


def settle() -> None:
    """Keep the garbage collector from what is there now: a full collection over PyTorch's modules takes .2 s, every few thousand steps.

    What earlier tasks used and freed goes back to the system: glibc keeps it, in holes between the little that each of them leaves behind,
    .4 MB a task more where a task leaves .04.
    """
    gc.collect()
    gc.freeze()
    if (trim := getattr(LIBC, "malloc_trim", None)) is not None:  # other C libraries have none
        trim(0)


class Run:
    """One run of one seed."""

    def __init__(
        self, method: Method, benchmark: Benchmark, config: RunConfig, folder: Folder, show: Quiet, save_every: float, stop: Stop
    ):
        self.method, self.benchmark, self.config, self.folder, self.show = method, benchmark, config, folder, show
        self.save_every, self.started = save_every, time.monotonic()
        self.saved, self.stop, self.clock = self.started, stop, Clock()
        self.opt: torch.optim.Optimizer | None = None
        self.plateau: Plateau | None = None
        self.step: Callable = method.step
        self.waiting: dict[str, Any] = {}  # a loaded optimizer's and schedule's state, until the phase has made them
        tree = folder.tree or {}
        self.cursor = Cursor(**tree.get("cursor", {}))
        self.seconds = tree.get("seconds", {"train": 0.0, "select": 0.0, "eval": 0.0, "total": 0.0})
        self.matrix = Matrix(method, benchmark, config, tree.get("matrix"))
        self.best = tree.get("best")
        if tree:
            method.load(tree["method"])
            self.waiting = {"optimizer": tree["optimizer"], "left": tree["left"]}
            generators(tree["random"])

    def go(self) -> Result | None:
        """The whole stream, or this process's share of it."""
        with contextlib.closing(self.folder), self.show, contextlib.ExitStack() as stack:
            stack.callback(gc.unfreeze)
            self.go_on()
            self.save()
        if self.method.process.rank:
            return None
        result = make_result(self.method, self.benchmark, self.folder.record, self.seconds, self.matrix)
        write_run(result, self.folder.path)
        return result

    def go_on(self) -> None:
        every, total = self.benchmark.stream(), len(self.benchmark)
        if self.method.joint:
            every = [total - 1]
            self.matrix.leave_out(every[0])
        if self.config.eval_future and self.cursor == Cursor():
            self.measure(lambda: self.matrix.measure("untrained", range(total), self.stop))
        while self.cursor.task < len(every):
            index = every[self.cursor.task]  # None: the stream is one task, its borders hidden
            parts = self.benchmark.visits() if index is None else [Visit(index, row=index)]
            plan = self.method.plan(None if index is None else self.task(index))
            while self.cursor.phase < len(plan):
                self.phase(plan[self.cursor.phase], index, parts, marks=self.cursor.phase == len(plan) - 1)
            if not self.method.process.rank:
                self.measure(lambda parts=parts: self.matrix.mark(parts[-1].row, self.stop))
            self.cursor = Cursor(task=self.cursor.task + 1)
            if time.monotonic() - self.saved >= self.save_every / 6:
                self.save()

    def task(self, i: int) -> Task:
        """Task i of the stream, or the union of all."""
        return self.benchmark.union() if self.method.joint else self.benchmark.task(i)

    def phase(self, phase: Phase, index: int | None, parts: Sequence[Visit], marks: bool) -> None:
        """first, the steps, then. marks: measure at the hidden borders within it."""
        if not self.cursor.begun:
            torch.manual_seed(seed_of(self.method.seed, "phase", self.cursor.task, self.cursor.phase))
            if phase.first is not None:
                phase.first()
            self.cursor.begun = True
        self.opt = phase.optimizer() if phase.optimizer is not None else None
        rates = [float(group["lr"]) for group in self.opt.param_groups] if self.opt is not None else []
        self.plateau = replace(phase.schedule) if isinstance(phase.schedule, Plateau) else None
        if self.opt is not None and self.waiting.get("optimizer") is not None:
            self.opt.load_state_dict(self.waiting["optimizer"])
        if self.plateau is not None and self.waiting.get("left") is not None:
            self.plateau.left = self.waiting["left"]
        self.waiting = {}
        graphed = self.config.cuda_graph and self.opt is not None
        self.step = GraphedSteps(self.method, self.opt, phase.batch_size) if graphed else self.method.step
        settle()  # after the optimizer, whose first one imports the most
        while self.cursor.part < len(parts):
            visit = parts[self.cursor.part]
            self.part(phase, visit, index, rates)
            if marks and self.cursor.part < len(parts) - 1 and visit.row is not None:
                self.measure(lambda row=visit.row: self.matrix.mark(row, self.stop))
            self.cursor = replace(self.cursor, part=self.cursor.part + 1, epoch=0, batch=0, step=0, best=math.inf)
        if phase.select == "best":
            self.method.restore(self.best)
        if phase.then is not None:
            phase.then()
        self.cursor = Cursor(task=self.cursor.task, phase=self.cursor.phase + 1)
        self.opt = self.plateau = self.best = None
        self.step = self.method.step  # a graph goes with its phase, and its memory with it

    def part(self, phase: Phase, visit: Visit, index: int | None, rates: list[float]) -> None:
        """All epochs of a phase over one task's rows."""
        task, hidden, c, clock = self.task(visit.task), index is None, self.cursor, self.clock
        place = c.part if hidden else task.index  # so that a task that comes back comes in another order
        watched = phase.select == "best" or self.plateau is not None or self.config.curves is not None
        if watched and task.val is None:
            who = self.method.name if self.config.curves is None else "curves"
            raise Refusal(f"{who} watches the validation loss, but val_fraction of {self.benchmark.name} is 0")
        if watched and phase.together is not None:
            raise Refusal(f"{self.method.name}: tasks that are trained together have no validation loss: leave curves out")
        sets = [(t, t.train.marked(index)) for t in phase.together or [task]]
        train, val = sets[0][1], None
        if any(len(rows[1]) != len(train[1]) for _, rows in sets):
            raise Refusal(f"{self.method.name}: tasks that are trained together must have equally many training rows")
        if watched:
            mixed = torch.randperm(len(task.val), generator=stream(self.method.seed, "validation order", place))
            val = (*task.val.marked(index), mixed.to(train[1].device))
        n = len(train[1])
        a_round = -(-n // phase.batch_size)
        whole = phase.steps if phase.steps is not None else phase.epochs * a_round
        whole = 0 if phase.needed is not None and not phase.needed() else whole
        steps = max(min(whole, 1), round(whole * visit.length))
        clock.task, clock.phase, clock.steps, clock.visit = index, phase.name, steps, c.part if hidden else None
        self.show.begin(f"{task.name}, {phase.name}", steps, c.step)
        more = c.epoch * a_round < steps
        while more:
            clock.epoch = c.epoch
            most = (steps - c.epoch * a_round) * phase.batch_size
            feeds = [self.feed(place if t is task else t.index, t, rows, phase, most) for t, rows in sets]
            feed = feeds[0] if phase.together is None else zip(*feeds)
            self.steps(feed, phase.schedule if self.plateau is None else None, rates)
            goes_on = self.epoch_end(phase, val)
            c.epoch, c.batch, c.sums = c.epoch + 1 if goes_on else -(-steps // a_round), 0, {}
            more = c.epoch * a_round < steps

    def feed(self, place: int, task: Task, rows: tuple, phase: Phase, most: int) -> Iterator[Batch]:
        """(The rest of) an epoch's batches of a task, of at most so many of its rows, in the order of that place in the stream."""
        c, n = self.cursor, len(rows[1])
        number = c.phase if phase.order is None else phase.order
        order = torch.randperm(n, generator=stream(self.method.seed, "order", place, number, c.epoch))
        order = order[:most].to(rows[1].device)
        augment, draws = task.train.augment, None
        if augment is not None:
            draws = torch.randint(1 << 62, (n,), generator=stream(self.method.seed, "augment", place, number, c.epoch))
            draws = draws.to(order.device)
        return batches(*rows, order, phase.batch_size, c.batch, augment, draws)

    def steps(self, feed: Iterable, schedule: Any, rates: list[float]) -> None:
        """The batches of (the rest of) an epoch."""
        c, clock, step, opt, stop = self.cursor, self.clock, self.step, self.opt, self.stop
        window: list[dict[str, Tensor]] = []
        self.method.train()
        begun, due = self.watch(), self.saved + self.save_every
        for batch in feed:
            clock.batch, clock.step = c.batch, c.step
            if schedule is not None:
                for group, rate in zip(opt.param_groups, rates):
                    set_lr(group, rate * schedule(clock.progress))
            window.append(step(batch, opt, clock))
            c.batch += 1
            c.step += 1
            if len(window) == WINDOW or stop.signum is not None or time.monotonic() >= due:
                self.look(window)
                self.show.steps(c.step)
                if stop.signum is not None or time.monotonic() >= due:
                    self.spend(begun)
                    self.save()
                    stop.obey(f"at {self.where(c.batch)}")
                    begun, due = self.watch(), self.saved + self.save_every
        self.look(window)
        self.spend(begun)

    def epoch_end(self, phase: Phase, val: tuple | None) -> bool:
        """Validate, keep the best copy, log; False where the schedule ends the phase."""
        c, more = self.cursor, True
        line = {"kind": "epoch", "task": self.clock.task, "part": c.part, "phase": phase.name, "epoch": c.epoch}
        line["batches"] = c.batch
        line |= {name: total / c.batch for name, total in c.sums.items()}
        if val is not None:
            begun = time.monotonic()
            line["val_loss"] = loss = validate(self.method, self.clock, *val, self.config.eval_batch)
            if not math.isfinite(loss):
                raise Refusal(f"{self.method.name}: validation loss is {loss} after {self.where(c.batch)}")
            if self.config.curves is not None:
                line["val_accuracy"] = accuracy(self.method, self.clock, *val, self.config.eval_batch)
            line["lr"] = float(self.opt.param_groups[0]["lr"])
            improved, c.best = loss < c.best, min(loss, c.best)
            if improved and phase.select == "best":
                self.best = self.method.snapshot()
            if self.plateau is not None:
                more = self.plateau.epoch(improved, self.opt)
            self.seconds["eval"] += time.monotonic() - begun
        self.folder.log(line)
        self.show.epoch(line)
        return more

    def look(self, window: list[dict[str, Tensor]]) -> None:
        """Add a window of what steps returned to the epoch's sums, one number at a time so that stops leave no trace, and empty it."""
        for name in window[0] if window else ():
            values = torch.stack([made[name] for made in window]).tolist()
            for i, value in enumerate(values):
                if not math.isfinite(value):
                    raise Refusal(f"{self.method.name}: {name} is {value} at {self.where(self.cursor.batch - len(window) + i)}")
                self.cursor.sums[name] = self.cursor.sums.get(name, 0.0) + value
        window.clear()

    def measure(self, make: Callable[[], dict[str, Any] | None]) -> None:
        """Make a row of the matrix and log it; an interruption keeps what is measured of it."""
        begun, line, stopped = time.monotonic(), None, None
        try:
            line = make()
        except Interrupted as signal:
            stopped = signal
        self.seconds["eval"] += time.monotonic() - begun
        if stopped is not None:
            self.save()
            raise stopped
        if line is not None:
            self.folder.log(line)
            self.show.row(line)

    def save(self) -> None:
        """A checkpoint of everything."""
        now = time.monotonic()
        self.seconds["total"] += now - self.started
        self.started = now
        self.folder.save(
            {
                "cursor": asdict(self.cursor),
                "seconds": self.seconds,
                "matrix": self.matrix.state(),
                "best": self.best,
                "method": self.method.state(),
                "optimizer": self.opt.state_dict() if self.opt is not None else None,
                "left": self.plateau.left if self.plateau is not None else None,
                "random": generators(),
            }
        )
        self.saved = time.monotonic()

    def watch(self) -> tuple[float, float]:
        """Now, on the wall's clock and the method's selection clock."""
        return time.monotonic(), self.method.select_seconds

    def spend(self, begun: tuple[float, float]) -> None:
        """Add the time since a watch() to the seconds spent in training and, of it, in selection."""
        for name, now, then in zip(("train", "select"), self.watch(), begun):
            self.seconds[name] += now - then

    def where(self, batch: int) -> str:
        """task (of a stream whose borders are hidden: visit), phase, epoch, batch for people."""
        place = f"visit {self.cursor.part}" if self.clock.task is None else f"task {self.clock.task}"
        return f"{place}, phase {self.clock.phase}, epoch {self.cursor.epoch}, batch {batch}"
