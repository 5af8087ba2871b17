"""SupSup: tasks learnt as masks alone, and found again from a row, some rows or a batch."""

import os
import signal
from dataclasses import asdict, replace

import pytest
import torch
from streams import Contrary, Pictures, Shuffled, assert_same_run, broken_run
from torch import nn

import subnet_kernels as sk
from subnet_kernels import layers, ops
from subnet_pipelines import METHODS, Interrupted, Refusal, RunConfig, run
from subnet_pipelines.benchmarks.base import Batch, BenchmarkConfig
from subnet_pipelines.methods.base import Clock
from subnet_pipelines.together import Together


def supsup(stream=Shuffled, scenario="GNu", tasks=3, seed=1, **fields):
    cls = METHODS["supsup"]
    benchmark = stream(BenchmarkConfig(tasks=tasks, val_fraction=0.0, scenario=scenario), seed)
    fields = {"iterations": 150, "batch_size": 32, "lr": 3e-3, "outputs": 40, "model": "mlp", **fields}
    return cls(cls.Config(**fields), benchmark, seed), benchmark


class Images(Pictures):
    """Pictures of three colours."""

    def __init__(self, config, seed):
        super().__init__((3, 32, 32), config, seed)


@pytest.fixture(scope="module")
def learnt(tmp_path_factory):
    method, benchmark = supsup()
    weights = [layer.weight.clone() for layer in method.bank.layers()]
    result = run(method, benchmark, RunConfig(), tmp_path_factory.mktemp("supsup"))
    assert all(torch.equal(layer.weight, w) for layer, w in zip(method.bank.layers(), weights))
    return method, benchmark, result


def test_given_the_task(tmp_path):
    method, benchmark = supsup(Contrary, "GG")
    result = run(method, benchmark, RunConfig(), tmp_path)
    assert min(result.final) >= 95
    assert result.bwt == 0.0
    assert result.task_inference is None


def test_every_row_finds_its_task(learnt):
    _, _, result = learnt
    assert result.task_inference["unit"] == "row"
    assert result.task_inference["accuracy"] >= 90
    assert result.acc >= 88


def with_fields(learnt, **fields):
    """The learnt method under other settings of inference."""
    method, benchmark, _ = learnt
    other = object.__new__(type(method))
    other.__dict__ = {**method.__dict__, "config": type(method.config)(**{**vars(method.config), **fields})}
    return other, benchmark


def found(learnt, j, **fields):
    method, benchmark = with_fields(learnt, **fields)
    x, _ = benchmark.test(j).tensors()
    return method.predict(x, None).task


@pytest.mark.parametrize(
    "fields",
    [
        {"inference_unit": "batch"},
        {"inference_unit": "n", "unit_rows": 8},
        {"inference_unit": "batch", "objective": "H"},
        {"inference_unit": "n", "inference": "binary"},
    ],
)
def test_more_rows_decide_together(learnt, fields):
    for j in range(3):
        assert (found(learnt, j, **fields) == j).float().mean() >= 0.9, j


def test_a_unit_has_one_task_and_its_first_rows_decide(learnt):
    rows = found(learnt, 1, inference_unit="row")
    first = found(learnt, 1, inference_unit="batch", deciding_rows=1)
    assert torch.equal(first, rows[::32].repeat_interleave(32)[: len(rows)])
    assert torch.equal(found(learnt, 1, inference_unit="n", unit_rows=1), rows)


def test_only_learnt_tasks_are_candidates(tmp_path):
    method, benchmark = supsup()
    x, _ = benchmark.test(0).tensors()
    method.out = tmp_path
    method.bank.commit("task 0")
    assert (method.predict(x, None).task == 0).all()


def test_logits_are_those_of_the_found_task(learnt):
    method, benchmark = with_fields(learnt)
    x, _ = benchmark.test(2).tensors()
    logits, tasks = method.predict(x, None)
    for k in tasks.unique().tolist():
        assert torch.allclose(logits[tasks == k], method.predict(x, k).logits[tasks == k], atol=1e-5)


def test_top_k_masks(tmp_path):
    method, benchmark = supsup(Contrary, "GG", mask="topk", density=0.3, optimizer="adam", weight_init="kaiming_normal")
    result = run(method, benchmark, RunConfig(), tmp_path)
    assert min(result.final) >= 95
    assert result.capacity["measured_cap"] > 100 > result.capacity["seed_only_cap"]


def test_resumes_to_the_same_bits(tmp_path):
    method, benchmark = supsup(tasks=2, iterations=30)
    whole = method, run(method, benchmark, RunConfig(), tmp_path / "whole")
    assert_same_run(whole, broken_run(lambda: supsup(tasks=2, iterations=30), tmp_path / "broken", [7, 23, 1]))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"outputs": 1}, "outputs must be at least the 2 classes"),
        ({"outputs": 2}, "outputs must exceed the 2 classes"),
        ({"scenario": "NNs"}, "for NNs train nns"),
        ({"density": 0.0}, "density"),
        ({"log_base": 1}, "log_base"),
        ({"unit_rows": 0}, "unit_rows"),
        ({"deciding_rows": 0}, "deciding_rows"),
    ],
)
def test_bad_settings(fields, words):
    with pytest.raises(Refusal, match=words):
        supsup(**fields)


# ---- several tasks at once ------------------------------------------------------------------------------------------


def report_of(result):
    """What must not depend on how many tasks were trained at once."""
    fields = {**asdict(result), "seconds": None}
    return {**fields, "config": {k: v for k, v in fields["config"].items() if k != "parallel_tasks"}}


PARALLEL = {
    "threshold": {},
    "top-k, decay, cosine": {"mask": "topk", "density": 0.3, "optimizer": "adam", "weight_decay": 1e-3, "schedule": "cosine"},
    "a dense head": {"head": "dense", "optimizer": "sgd", "lr": 0.1},
}


def some(fields, parallel, tasks=5):
    scenario = "GG" if "head" in fields else "GNu"
    return supsup(scenario=scenario, tasks=tasks, iterations=25, parallel_tasks=parallel, **fields)


@pytest.fixture(scope="module", params=PARALLEL)
def one_by_one(request, tmp_path_factory):
    fields = PARALLEL[request.param]
    method, benchmark = some(fields, 1)
    return fields, method, run(method, benchmark, RunConfig(), tmp_path_factory.mktemp("one"))


def assert_same_masks(method, result, one_by_one):
    _, other, expected = one_by_one
    assert report_of(result) == report_of(expected)
    for name in other.bank.names:
        assert all(torch.equal(bits, method.bank.bits(name)[layer]) for layer, bits in other.bank.bits(name).items()), name
        for module, head in other.bank[name].modules.items():
            assert torch.equal(head.weight, method.bank[name].modules[module].weight)
    mine = method.state_dict()
    assert all(torch.equal(tensor, mine[name]) for name, tensor in other.state_dict().items())


@pytest.mark.parametrize("parallel", [2, 5, 7])
def test_tasks_trained_at_once_have_the_masks_of_one_by_one(one_by_one, parallel, tmp_path):
    """Groups of two and a last one alone; all; and more than there are."""
    method, benchmark = some(one_by_one[0], parallel)
    result = run(method, benchmark, RunConfig(), tmp_path)
    assert_same_masks(method, result, one_by_one)
    assert not method.together.networks


def test_a_step_of_all_tasks_selects_and_updates_once(monkeypatch):
    method, benchmark = some({"mask": "topk"}, 3)
    assert not method.static_step  # so that no graph is asked of it
    (phase,) = method.plan(benchmark.task(0))
    assert [task.index for task in phase.together] == [0, 1, 2]
    phase.first()
    calls, opt = [], phase.optimizer()
    refresh, update = ops.refresh_, type(opt)._update
    monkeypatch.setattr(
        layers.ops, "refresh_", lambda scores, *args: (calls.append(("refresh", len(scores))), refresh(scores, *args))
    )
    monkeypatch.setattr(type(opt), "_update", lambda *args: (calls.append(("update", len(args[2]))), update(*args))[1])
    opt = phase.optimizer()
    batches = [Batch(*benchmark.task(i).train.tensors(), None) for i in range(3)]
    method.step(tuple(batches), opt, Clock())
    calls.clear()  # the first forward of a network refreshes a layer at a time
    method.step(tuple(batches), opt, Clock())
    masked = len(method.bank.layers())
    assert calls == [("update", 3 * masked), ("refresh", 3 * masked)]


def test_tasks_at_once_resume_to_the_same_bits(one_by_one, tmp_path):
    """Stopped within a group, within the next, and while a trained task waits."""
    make = lambda: some(one_by_one[0], 2)  # noqa: E731
    method, result = broken_run(make, tmp_path, [7, 30, 24])
    assert_same_masks(method, result, one_by_one)


def test_trained_tasks_that_wait_are_kept_by_a_stop(one_by_one, tmp_path, monkeypatch):
    method, benchmark = some(one_by_one[0], 3)
    commit = method.commit

    def stop_at_second(task):
        commit(task)
        if task.index == 0:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(method, "commit", stop_at_second)
    with pytest.raises(Interrupted):
        run(method, benchmark, RunConfig(), tmp_path)
    assert list(method.together.networks) == [1, 2]
    method, benchmark = some(one_by_one[0], 3)
    steps, step = [], method.step
    monkeypatch.setattr(method, "step", lambda *args: (steps.append(1), step(*args))[1])
    result = run(method, benchmark, RunConfig(), tmp_path, resume=True)
    assert len(steps) == 25  # of the last two tasks, together
    assert_same_masks(method, result, one_by_one)


def test_a_stream_that_grows_at_resume_forms_new_groups(one_by_one, tmp_path):
    fields = one_by_one[0]
    for tasks in (3, 5):
        method, benchmark = some(fields, 2, tasks)
        result = run(method, benchmark, RunConfig(), tmp_path, resume=tasks == 5)
    assert_same_masks(method, result, one_by_one)


def test_what_cannot_be_trained_at_once():
    with pytest.raises(Refusal, match="parallel_tasks must be at least 1, got 0"):
        supsup(parallel_tasks=0)
    with pytest.raises(Refusal, match="parallel_tasks must be 1 where weights learn"):
        Together(sk.convert(nn.Linear(4, 4), sk.SubnetConfig(train_weights=True)), print)
    with pytest.raises(Refusal, match="parallel_tasks must be 1 for a network with dropout"):
        Together(sk.convert(nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)), sk.SubnetConfig()), print)


def test_tasks_at_once_have_equally_many_rows(tmp_path):
    method, benchmark = some({}, 2)
    task = benchmark.task
    few = lambda i: replace(task(i), train=replace(task(i).train, index=torch.arange(40 + i)))  # noqa: E731
    benchmark.task = few
    with pytest.raises(Refusal, match="trained together must have equally many training rows"):
        run(method, benchmark, RunConfig(), tmp_path)
