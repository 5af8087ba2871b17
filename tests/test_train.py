"""The loop: what it learns, measures and writes; resume at any batch to the same bits; NaN; hidden borders."""

import dataclasses
import gc
import json
import os
import re
import signal
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from streams import Contrary, broken_run

import subnet_pipelines
from subnet_pipelines import (
    METHODS,
    Interrupted,
    Method,
    MethodConfig,
    NotLearnt,
    Phase,
    Plateau,
    Prediction,
    Refusal,
    RunConfig,
    run,
    train,
)
from subnet_pipelines.benchmarks.base import BenchmarkConfig
from subnet_pipelines.chance import seeded


@pytest.fixture(autouse=True, scope="module")
def _quick():
    """One thread, as the networks are tiny, and no plots, which have tests of their own."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subnet_pipelines.report, "draw", lambda results, folder: [])
        yield
    torch.set_num_threads(threads)


HERE = Path(subnet_pipelines.__file__).parent


class Restless(Method):
    """Uses everything that a checkpoint must hold: momentum, dropout, a plateau, a best copy, two phases, parts that training adds."""

    name = "restless"
    scenarios = ("GG", "GNs", "NNs")

    def __init__(self, config, benchmark, seed):
        super().__init__(config, benchmark, seed)
        with seeded(seed, "init"):
            self.body = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Dropout(0.2), nn.BatchNorm1d(8))
        self.heads = nn.ModuleList()
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.stop_at = self.fail_at = self.nan_at = None
        self.made = 0

    def plan(self, task):
        if task is None:
            return [
                Phase(
                    "all", epochs=2, batch_size=10, optimizer=lambda: torch.optim.Adam(self.parameters(), 0.01), first=self.begin
                )
            ]
        rate = Plateau(patience=1, factor=2.0, lr_min=1e-4)
        return [
            Phase("warm", steps=9, batch_size=10, optimizer=self.adam, schedule=lambda p: 1 - p, first=self.begin),
            Phase("main", epochs=3, batch_size=7, optimizer=self.sgd, schedule=rate, select="best", then=self.end),
        ]

    def adam(self):
        return torch.optim.AdamW(self.parameters(), 0.01)

    def sgd(self):
        return torch.optim.SGD(self.parameters(), 0.05, momentum=0.9)

    def begin(self):
        self.heads.append(nn.Linear(8, 2))  # drawn from the global generator, which the loop seeds at each phase

    def end(self):
        self.seen += 1

    def logits(self, batch, clock):
        assert (batch.t is None) == (clock.task is None)
        return self.heads[0 if clock.task is None else clock.task](self.body(batch.x))

    def step(self, batch, opt, clock):
        self.made += 1
        if self.made == self.stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        if self.made == self.fail_at:
            raise OSError("the machine died")
        out = super().step(batch, opt, clock)
        return {"loss": out["loss"] * float("nan")} if self.made == self.nan_at else out

    def predict(self, x, task):
        if len(self.heads) <= (task or 0):
            raise NotLearnt
        return Prediction(self.heads[task or 0](self.body(x)), None)

    def facts(self):
        return {"heads": len(self.heads)}

    def build(self, facts):
        while len(self.heads) < facts["heads"]:
            self.begin()


def restless(tasks=2, seed=1, scenario="GG"):
    benchmark = Contrary(BenchmarkConfig(tasks=tasks, val_fraction=0.25, scenario=scenario), seed)
    return Restless(MethodConfig(), benchmark, seed), benchmark


def outcome(method, result, out):
    """What must not depend on where a run stopped."""
    fixed = dataclasses.asdict(result)
    fixed.pop("seconds")
    return {k: v.clone() for k, v in method.state_dict().items()}, fixed, (out / "metrics.jsonl").read_text()


def same(a, b):
    assert a[0].keys() == b[0].keys()
    for name in a[0]:
        assert torch.equal(a[0][name], b[0][name]), name
    assert a[1] == b[1]
    assert a[2] == b[2]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    out = tmp_path_factory.mktemp("unbroken") / "run"
    method, benchmark = restless()
    result = run(method, benchmark, RunConfig(), out)
    return outcome(method, result, out), method.made


# Steps: 9 of warm (8 make an epoch: 72 rows of 10), then 3 epochs of 11; twice. Odd places: mid-epoch, an epoch's and a phase's last
# batch, a phase's first, the very last, several in turn, one after another.
@pytest.mark.parametrize("places", [[3], [8], [9], [10], [20], [42], [43], [84], [5, 24, 31], [13, 13, 1, 1]])
def test_resume_ends_with_the_same_bits(places, unbroken, tmp_path):
    expected, steps = unbroken
    assert steps == 84
    out, made = tmp_path / "run", 0
    for stop_at in places:
        method, benchmark = restless()
        method.stop_at = stop_at
        with pytest.raises(Interrupted, match="--resume") as stopped:
            run(method, benchmark, RunConfig(), out, resume=made > 0)
        assert stopped.value.signum == signal.SIGTERM
        made += method.made
    method, benchmark = restless()
    result = run(method, benchmark, RunConfig(), out, resume=True)
    assert made + method.made == steps
    same(outcome(method, result, out), expected)


def test_a_killed_run_resumes_from_its_last_checkpoint(unbroken, tmp_path):
    method, benchmark = restless()
    method.fail_at = 30
    with pytest.raises(OSError, match="died"):
        run(method, benchmark, RunConfig(), tmp_path / "run", save_every=0)
    assert len(list((tmp_path / "run" / "checkpoint").iterdir())) == 2
    method, benchmark = restless()
    result = run(method, benchmark, RunConfig(), tmp_path / "run", resume=True)
    assert method.made == 84 - 29
    same(outcome(method, result, tmp_path / "run"), unbroken[0])


@pytest.mark.parametrize("name", ["tensors.safetensors", "facts.json", "sums.json"])
def test_a_torn_checkpoint_falls_back_to_the_one_before(name, unbroken, tmp_path):
    method, benchmark = restless()
    method.fail_at = 30
    with pytest.raises(OSError, match="died"):
        run(method, benchmark, RunConfig(), tmp_path / "run", save_every=0)
    newest = max((tmp_path / "run" / "checkpoint").iterdir())
    torn = newest / name
    torn.write_bytes(torn.read_bytes()[: torn.stat().st_size // 2])
    said = []

    class Listener(subnet_pipelines.progress.Quiet):
        def say(self, text):
            said.append(text)

    method, benchmark = restless()
    result = run(method, benchmark, RunConfig(), tmp_path / "run", resume=True, show=Listener())
    assert method.made == 84 - 28
    assert len(said) == 1
    assert str(newest) in said[0]
    assert "torn" in said[0]
    same(outcome(method, result, tmp_path / "run"), unbroken[0])


def test_all_checkpoints_torn_is_refused(tmp_path):
    method, benchmark = restless()
    method.stop_at = 5
    with pytest.raises(Interrupted):
        run(method, benchmark, RunConfig(), tmp_path, resume=True)
    for path in (tmp_path / "checkpoint").iterdir():
        (path / "facts.json").unlink()
    with pytest.raises(Refusal, match="no checkpoint is whole"):
        run(*restless(), RunConfig(), tmp_path, resume=True)


def test_interrupted_measuring_keeps_what_is_measured(unbroken, tmp_path):
    method, benchmark = restless()
    original, calls = method.predict, []

    def predict(x, task):
        calls.append(task)
        if len(calls) == 2:  # of four batches: the first row is half measured
            os.kill(os.getpid(), signal.SIGINT)
        return original(x, task)

    method.predict = predict
    with pytest.raises(Interrupted, match="measuring"):
        run(method, benchmark, RunConfig(eval_batch=16), tmp_path / "run")
    method, benchmark = restless()
    result = run(method, benchmark, RunConfig(eval_batch=16), tmp_path / "run", resume=True)
    assert method.made == 42
    assert result.final == unbroken[0][1]["final"]


def test_seeds(unbroken, tmp_path):
    method, benchmark = restless()
    same(outcome(method, run(method, benchmark, RunConfig(), tmp_path / "a"), tmp_path / "a"), unbroken[0])
    method, benchmark = restless(seed=2)
    run(method, benchmark, RunConfig(), tmp_path / "b")
    assert not any(torch.equal(v, unbroken[0][0][k]) for k, v in method.state_dict().items() if v.is_floating_point())


def test_a_longer_stream_goes_on_from_a_finished_one(tmp_path):
    run(*restless(tasks=2), RunConfig(), tmp_path / "grown")
    method, benchmark = restless(tasks=3)
    grown = run(method, benchmark, RunConfig(), tmp_path / "grown", resume=True)
    assert method.made == 42
    whole = run(*restless(tasks=3), RunConfig(), tmp_path / "whole")
    assert grown.accuracy_matrix == whole.accuracy_matrix
    with pytest.raises(Refusal, match="only raise"):
        run(*restless(tasks=1), RunConfig(), tmp_path / "grown", resume=True)


def test_finished_and_changed_runs(tmp_path):
    first = run(*restless(), RunConfig(), tmp_path)
    with pytest.raises(Refusal, match="--resume"):
        run(*restless(), RunConfig(), tmp_path)
    method, benchmark = restless()
    stamp = (tmp_path / "result.json").stat().st_mtime_ns
    assert run(method, benchmark, RunConfig(), tmp_path, resume=True) == first
    assert method.made == 0
    assert (tmp_path / "result.json").stat().st_mtime_ns == stamp
    with pytest.raises(Refusal, match="eval_batch was 500, is 7"):
        run(*restless(), RunConfig(eval_batch=7), tmp_path, resume=True)


def test_convolutions_repeat_themselves_within_a_run(tmp_path):
    """Without it cuDNN may add in another order at every call, and a resumed run would end with other bits."""
    method, benchmark = restless()
    cudnn, step, seen = torch.backends.cudnn, method.step, set()
    method.step = lambda *args: (seen.add((cudnn.deterministic, cudnn.benchmark)), step(*args))[1]
    before = cudnn.deterministic, cudnn.benchmark
    cudnn.benchmark = True
    try:
        run(method, benchmark, RunConfig(), tmp_path)
        assert cudnn.benchmark
    finally:
        cudnn.benchmark = before[1]
    assert seen == {(True, False)}
    assert (cudnn.deterministic, cudnn.benchmark) == before


def test_nan_stops_with_the_place(tmp_path):
    method, benchmark = restless()
    method.nan_at = 9 + 11 + 4  # the fourth batch of the main phase's second epoch
    with pytest.raises(Refusal, match=r"restless: loss is nan at task 0, phase main, epoch 1, batch 3$"):
        run(method, benchmark, RunConfig(), tmp_path)


def test_hidden_borders(tmp_path):
    """One plan for the whole stream, no task ids, a row at each true border; and it resumes."""
    method, benchmark = restless(tasks=3, scenario="NNs")
    result = run(method, benchmark, RunConfig(), tmp_path / "a")
    assert method.made == 3 * 2 * 8
    assert [sum(v is not None for v in row) for row in result.accuracy_matrix] == [1, 2, 3]
    assert len(method.heads) == 1
    broken, benchmark = restless(tasks=3, scenario="NNs")
    broken.stop_at = 21
    with pytest.raises(Interrupted):
        run(broken, benchmark, RunConfig(), tmp_path / "b")
    again, benchmark = restless(tasks=3, scenario="NNs")
    resumed = run(again, benchmark, RunConfig(), tmp_path / "b", resume=True)
    same(outcome(again, resumed, tmp_path / "b"), outcome(method, result, tmp_path / "a"))


def coming_back(seen=None, stop_at=None):
    """Tasks 0, 1, 0, 2, 1 with lengths of their own; notes the visit, the step and the rows of each batch."""
    visits = [0, 1, 0, 2, 1]
    benchmark = Contrary(BenchmarkConfig(tasks=3, val_fraction=0.25, scenario="NNs", visits=visits, uneven=0.5), 1)
    method = Restless(MethodConfig(), benchmark, 1)
    method.stop_at, step = stop_at, method.step

    def noted(batch, opt, clock):
        if seen is not None:
            seen.append((clock.visit, clock.step, clock.steps, batch.x.clone()))
        return step(batch, opt, clock)

    method.step = noted
    return method, benchmark


def test_hidden_visits(tmp_path):
    """Visits are as long as the benchmark says, in an order of their own each time, and rows wait for the next new task."""
    seen = []
    method, benchmark = coming_back(seen)
    result = run(method, benchmark, RunConfig(), tmp_path / "a")
    steps = [max(1, round(16 * visit.length)) for visit in benchmark.visits()]
    assert len(set(steps)) > 1
    assert [(visit, step) for visit, step, *_ in seen] == [(v, s) for v, n in enumerate(steps) for s in range(n)]
    assert all(total == steps[visit] for visit, _, total, _ in seen)
    first, again = (next(x for visit, *_, x in seen if visit == v) for v in (0, 2))
    assert not torch.equal(first, again)
    assert [sum(v is not None for v in row) for row in result.accuracy_matrix] == [1, 2, 3]
    lines = [json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    places = [line["row"] if line["kind"] == "row" else f"visit {line['part']}" for line in lines]
    assert list(dict.fromkeys(places)) == ["visit 0", "0", "visit 1", "visit 2", "1", "visit 3", "visit 4", "2"]
    whole = outcome(method, result, tmp_path / "a")
    for stop_at in (steps[0] + 3, sum(steps[:3]), sum(steps[:4]) + 1):
        out = tmp_path / str(stop_at)
        with pytest.raises(Interrupted, match=r"at visit [1-4], phase all"):
            run(*coming_back(stop_at=stop_at), RunConfig(), out)
        method, benchmark = coming_back()
        same(outcome(method, run(method, benchmark, RunConfig(), out, resume=True), out), whole)


def test_a_stream_without_borders_does_not_grow(tmp_path):
    run(*restless(tasks=2, scenario="NNs"), RunConfig(), tmp_path)
    with pytest.raises(Refusal, match="cannot be made 3"):
        run(*restless(tasks=3, scenario="NNs"), RunConfig(), tmp_path, resume=True)


@pytest.mark.skipif(not hasattr(train.LIBC, "malloc_trim"), reason="this C library has no malloc_trim to call")
def test_what_a_task_freed_goes_back_to_the_system():
    """Holes between what stays, which glibc keeps: thousands of tasks would each leave some."""

    def resident():
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024

    stays, goes = [], []
    for _ in range(2000):
        goes.append(torch.ones(25_000))  # 100 KB: below what malloc asks the system for alone
        stays.append(torch.ones(1_000))
    full = resident()
    goes.clear()
    assert resident() > full - 50  # MB; without holes there would be nothing to show
    train.settle()
    gc.unfreeze()
    assert resident() < full - 150
    assert all(bool((t == 1).all()) for t in stays)


def test_long_streams_measure_the_diagonal_and_the_end(tmp_path):
    result = run(*restless(tasks=3), RunConfig(eval_rows="last"), tmp_path / "last")
    whole = run(*restless(tasks=3), RunConfig(), tmp_path / "all")
    assert result.accuracy_matrix is None
    assert result.forgetting is None
    assert (result.diagonal, result.final, result.bwt) == (whole.diagonal, whole.final, whole.bwt)


def test_future_tasks(tmp_path):
    method, benchmark = finetune(head="shared", tasks=3)
    result = run(method, benchmark, RunConfig(eval_future=True), tmp_path / "shared")
    assert all(v is not None for row in result.accuracy_matrix for v in row)
    assert result.fwt is None  # the shared head is made with the first task, so the untrained network cannot be measured
    method, benchmark = finetune(head="per-task", tasks=3)
    assert run(method, benchmark, RunConfig(eval_future=True), tmp_path / "own").accuracy_matrix[0][1:] == [None, None]


def finetune(tasks=2, seed=1, **fields):
    cls = METHODS["finetune"]
    benchmark = Contrary(BenchmarkConfig(tasks=tasks, val_fraction=0.25), seed)
    return cls(cls.Config(epochs=8, lr=0.01, **fields), benchmark, seed), benchmark


def test_finetune_learns_and_forgets(tmp_path):
    result = run(*finetune(head="shared"), RunConfig(), tmp_path / "shared")
    assert min(result.diagonal) >= 95
    assert result.final[0] <= 10  # the second task has the other labels
    assert result.bwt <= -85
    result = run(*finetune(head="per-task"), RunConfig(), tmp_path / "own")
    assert min(result.diagonal) >= 95
    lines = [json.loads(line) for line in (tmp_path / "own" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if line["kind"] == "epoch" and line["task"] == 0]
    assert losses[-1] < losses[0] / 2


def test_finetune_resumes(tmp_path):
    expected, benchmark = finetune()
    run(expected, benchmark, RunConfig(), tmp_path / "a")
    method, _ = broken_run(finetune, tmp_path / "b", (37, 60))
    for name, tensor in expected.state_dict().items():
        assert torch.equal(tensor, method.state_dict()[name]), name


def test_the_loop_knows_no_method():
    for name in ("train", "graph", "evaluate", "folder", "checkpoint", "metrics", "report"):
        text = (HERE / f"{name}.py").read_text().lower()
        for method in METHODS:
            assert not re.search(rf"\b{re.escape(method)}\b", text), f"{name}.py names {method}"


def test_a_method_that_watches_needs_validation_rows(tmp_path):
    benchmark = Contrary(BenchmarkConfig(tasks=2, val_fraction=0.0))
    with pytest.raises(Refusal, match="val_fraction of contrary is 0"):
        run(Restless(MethodConfig(), benchmark, 1), benchmark, RunConfig(), tmp_path)


def test_scenarios_are_checked():
    benchmark = Contrary(BenchmarkConfig(scenario="GNu"))
    with pytest.raises(Refusal, match="serves scenario GG and GNs, not GNu of contrary"):
        METHODS["finetune"](METHODS["finetune"].Config(), benchmark, 1)
