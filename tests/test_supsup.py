"""SupSup: tasks learnt as masks alone, and found again from a row, some rows or a batch."""

import pytest
import torch
from streams import Contrary, Shuffled, assert_same_run, broken_run

from subnet_pipelines import METHODS, Refusal, RunConfig, run
from subnet_pipelines.benchmarks.base import BenchmarkConfig


def supsup(stream=Shuffled, scenario="GNu", tasks=3, seed=1, **fields):
    cls = METHODS["supsup"]
    benchmark = stream(BenchmarkConfig(tasks=tasks, val_fraction=0.0, scenario=scenario), seed)
    fields = {"iterations": 150, "batch_size": 32, "lr": 3e-3, "outputs": 40, "model": "mlp", **fields}
    return cls(cls.Config(**fields), benchmark, seed), benchmark


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
