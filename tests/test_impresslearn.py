"""ImpressLearn: basis tasks as masks, later tasks as coefficients over them."""

import pytest
import torch
from streams import Contrary, assert_same_run, broken_run

from subnet_pipelines import METHODS, Refusal, RunConfig, run
from subnet_pipelines.benchmarks.base import BenchmarkConfig


def impresslearn(tasks=4, seed=1, **fields):
    cls = METHODS["impresslearn"]
    benchmark = Contrary(BenchmarkConfig(tasks=tasks, val_fraction=0.25), seed)
    fields = {
        "basis": 2,
        "basis_epochs": 30,
        "basis_lr": 0.01,
        "epochs": 30,
        "lr": 0.03,
        "batch_size": 24,
        "model": "mlp",
        **fields,
    }
    return cls(cls.Config(**{"density": 0.3, **fields}), benchmark, seed), benchmark


@pytest.fixture(scope="module")
def learnt(tmp_path_factory):
    method, benchmark = impresslearn()
    return method, benchmark, run(method, benchmark, RunConfig(), tmp_path_factory.mktemp("impresslearn"))


def test_learns_new_tasks_by_coefficients(learnt):
    method, _, result = learnt
    assert min(result.final) >= 90
    assert result.bwt == 0.0
    assert method.bank.masks == ["task 0", "task 1"]
    assert method.bank["task 2"].alphas.shape == (3, 2)  # three layers, two masks: all that a new task stores


def test_controls(learnt):
    _, _, result = learnt
    report = result.method_report
    assert set(report["own_mask"]) == {"task 2", "task 3"}
    assert report["own_mask_mean"] >= 90
    assert report["nearest_mask_mean"] >= 90  # every new task is one of the two basis tasks again
    assert report["wrong_mask_mean"] == pytest.approx(50, abs=12)  # one basis mask is right, the other exactly wrong


def test_alphas_start_equal_and_only_they_learn(tmp_path):
    method, benchmark = impresslearn(controls=False, epochs=1)
    seen = []
    step = method.step

    def look(batch, opt, clock):
        if clock.phase == "alpha" and clock.step == 0:
            seen.append(method.alphas.detach().clone())
        before = [p.detach().clone() for layer in method.bank.layers() for p in (layer.weight, layer.scores)]
        out = step(batch, opt, clock)
        if clock.phase == "alpha":
            after = [p for layer in method.bank.layers() for p in (layer.weight, layer.scores)]
            assert all(torch.equal(a, b) for a, b in zip(before, after))
        return out

    method.step = look
    run(method, benchmark, RunConfig(), tmp_path)
    assert all(torch.equal(a, torch.full((3, 2), 0.5)) for a in seen)
    assert len(seen) == 2


def test_penalty_draws_sums_to_one(tmp_path):
    free, benchmark = impresslearn(controls=False)
    run(free, benchmark, RunConfig(), tmp_path / "free")
    held, benchmark = impresslearn(controls=False, penalty=3.0)
    run(held, benchmark, RunConfig(), tmp_path / "held")
    distance = [(m.bank["task 3"].alphas.abs().sum(1) - 1).abs().max() for m in (free, held)]
    assert distance[1] < distance[0]
    assert distance[1] < 0.2


def test_penalty_by_hand():
    method, benchmark = impresslearn(penalty=0.5)
    for name in ("task 0", "task 1"):
        method.bank.commit(name)
    method.make_alphas()
    with torch.no_grad():
        method.alphas.copy_(torch.tensor([[0.5, 0.5], [1.0, -1.0], [0.0, 0.25]]))
    x, y = benchmark.test(0).tensors()
    clock = type("Clock", (), {"phase": "alpha", "task": 2})()
    batch = type("Batch", (), {"x": x, "y": y})()
    plain = torch.nn.functional.cross_entropy(method.logits(batch, clock), y)
    assert method.loss(batch, clock).item() == pytest.approx(plain.item() + 0.5 * (0.0 + 1.0 + 0.5625), rel=1e-6)


def test_resumes_to_the_same_bits(tmp_path):
    short = {"basis_epochs": 2, "epochs": 3, "tasks": 3}
    method, benchmark = impresslearn(**short)
    whole = method, run(method, benchmark, RunConfig(), tmp_path / "whole")
    assert_same_run(whole, broken_run(lambda: impresslearn(**short), tmp_path / "broken", [4, 9, 8, 2]))


@pytest.mark.parametrize(
    ("fields", "words"),
    [({"basis": 4}, "leave new tasks"), ({"basis": 0}, "basis must"), ({"penalty": -1.0}, "penalty"), ({"lr": 0.0}, "lr")],
)
def test_bad_settings(fields, words):
    with pytest.raises(Refusal, match=words):
        impresslearn(**fields)
