"""Every method, killed without warning at any of several steps, ends with the bits of an unbroken run; so with a torn checkpoint."""

import dataclasses
import shutil

import pytest
import torch
from streams import Contrary

import subnet_pipelines
from subnet_pipelines import METHODS, RunConfig, run
from subnet_pipelines.benchmarks.base import BenchmarkConfig

SMALL = {  # settings that make a run of about forty steps
    "stl": {"epochs": 2, "batch_size": 7},
    "mtl": {"epochs": 2, "batch_size": 7},
    "finetune": {"epochs": 2, "batch_size": 7},
    "ewc": {"epochs": 2, "batch_size": 7, "clip_norm": 1.0},
    "packnet": {"epochs": 2, "batch_size": 7},
    "wsn": {"epochs": 2, "batch_size": 7, "density": 0.3},
    "supsup": {"iterations": 15, "batch_size": 16, "model": "mlp", "outputs": 8},
    "nns": {"iterations": 15, "batch_size": 16, "model": "mlp", "outputs": 8, "check_every": 5},
    "hopsupsup": {"iterations": 15, "batch_size": 16, "width": 24, "recovery_batch": 16},
    "impresslearn": {"epochs": 2, "basis_epochs": 2, "batch_size": 16, "basis": 1, "model": "mlp"},
    "lasem": {"epochs": 2, "batch_size": 7, "model": "mlp"},
    "prognn": {"epochs": 2, "batch_size": 7, "model": "mlp"},
    "apd": {"epochs": 2, "batch_size": 7, "model": "mlp"},
    "den": {"epochs": 1, "batch_size": 7, "model": "mlp", "lr": 1e-2, "expansion": 3},
    "batche": {"iterations": 15, "batch_size": 16, "model": "mlp"},
    "psp": {"iterations": 15, "batch_size": 16, "model": "mlp"},
    "separate-heads": {"iterations": 15, "batch_size": 16, "model": "mlp"},
}


SCENARIOS = {"supsup": "GNu", "hopsupsup": "GNu", "nns": "NNs"}  # GG else


class Died(Exception):
    """The machine went away."""


@pytest.fixture(autouse=True)
def _no_plots(monkeypatch):
    monkeypatch.setattr(subnet_pipelines.report, "draw", lambda results, folder: [])


def attempt(name, out, die_at=None, resume=True):
    cls = METHODS[name]
    benchmark = Contrary(BenchmarkConfig(tasks=3, val_fraction=0.25, scenario=SCENARIOS.get(name, "GG")))
    method = cls(cls.Config(**SMALL[name]), benchmark, 1)
    step, made = method.step, []

    def counted(*args):
        made.append(1)
        if len(made) == die_at:
            raise Died
        return step(*args)

    method.step = counted
    if die_at is not None:
        with pytest.raises(Died):
            run(method, benchmark, RunConfig(), out, resume=resume, save_every=0)
        return None
    result = dataclasses.asdict(run(method, benchmark, RunConfig(), out, resume=resume))
    result.pop("seconds")
    method.eval()
    with torch.no_grad():
        logits = [method.predict(benchmark.test(j).tensors()[0], j).logits for j in range(3)]
    return logits, result, (out / "metrics.jsonl").read_text(), len(made)


@pytest.fixture(scope="module", params=METHODS)
def whole(request, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subnet_pipelines.report, "draw", lambda results, folder: [])
        return request.param, attempt(request.param, tmp_path_factory.mktemp("whole") / "run", resume=False)


def same(found, expected):
    for a, b in zip(found[0], expected[0]):
        assert torch.equal(a, b)
    assert found[1:3] == expected[1:3]


@pytest.mark.parametrize("share", [0.1, 0.35, 0.5, 0.7, 0.97])
def test_killed(whole, share, tmp_path):
    name, expected = whole
    attempt(name, tmp_path / "run", die_at=max(2, round(share * expected[3])))
    same(attempt(name, tmp_path / "run"), expected)


def test_killed_again_and_again_with_a_torn_checkpoint(whole, tmp_path):
    name, expected = whole
    for _ in range(4):
        attempt(name, tmp_path / "run", die_at=expected[3] // 5)
        newest = max((tmp_path / "run" / "checkpoint").iterdir())
        (newest / "tensors.safetensors").write_bytes(b"torn")
    same(attempt(name, tmp_path / "run"), expected)


def test_killed_before_the_first_checkpoint(whole, tmp_path):
    name, expected = whole
    attempt(name, tmp_path / "run", die_at=1)
    same(attempt(name, tmp_path / "run"), expected)


def test_a_borders_checkpoint_may_be_older_than_the_files(whole, tmp_path):
    """What a method keeps beside the checkpoint may be ahead of it: the checkpoint of an earlier task, later files."""
    name, expected = whole
    attempt(name, tmp_path / "run", die_at=max(2, expected[3] // 3))
    shutil.copytree(tmp_path / "run" / "checkpoint", tmp_path / "earlier")
    attempt(name, tmp_path / "run", die_at=max(2, expected[3] // 2))
    shutil.rmtree(tmp_path / "run" / "checkpoint")
    shutil.copytree(tmp_path / "earlier", tmp_path / "run" / "checkpoint")
    same(attempt(name, tmp_path / "run"), expected)
