"""Several processes that share the masks of a homogeneous basis or the configurations of a search, as torchrun starts them."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file
from streams import Contrary

from subnet_pipelines import METHODS, Refusal, checkpoint
from subnet_pipelines.benchmarks.base import BenchmarkConfig
from subnet_pipelines.cli import main
from subnet_pipelines.processes import Process, hand_over, taken

SMALL = "train impresslearn --benchmark permuted-mnist-mini --tasks 3 --basis-kind homogeneous --basis 5 --basis-epochs 1".split()
SMALL += "--epochs 1 --model mlp --controls false --eval-rows last --device cpu".split()
SEARCH = "train lasem --benchmark permuted-mnist-mini --tasks 2 --configuration search --epochs 2 --device cpu".split()


def process(rank, count, out, *more, words=SMALL):
    """One of the processes, as torchrun would start it."""
    env = {**os.environ, "RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"}
    argv = [sys.executable, "-m", "subnet_pipelines.cli", *words, "--out", str(out), *more]
    return subprocess.Popen(argv, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def ended(*processes):
    for each in processes:
        text = each.communicate(timeout=300)[0]
        assert each.returncode == 0, text


def bank_of(out):
    """What the files of a run's bank hold, by name."""
    files = sorted((out / "seed-1" / "bank").glob("*.safetensors"))
    return {file.name: load_file(file) for file in files}


def assert_same_bank(a, b):
    assert list(a) == list(b)  # the names have the hashes of the contents
    for name, tensors in a.items():
        assert all(torch.equal(value, b[name][key]) for key, value in tensors.items()), name


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    out = tmp_path_factory.mktemp("alone")
    assert main([*SMALL, "--out", str(out)]) == 0
    found = bank_of(out)
    assert len(found) == 7  # five masks and two new tasks
    return found


@pytest.mark.parametrize(("count", "more"), [(2, []), pytest.param(3, ["--parallel-tasks", "2"], marks=pytest.mark.long)])
def test_processes_end_with_the_masks_of_one(alone, count, more, tmp_path):
    ended(*(process(rank, count, tmp_path, *more) for rank in range(count)))
    assert_same_bank(alone, bank_of(tmp_path))
    assert sorted(p.name for p in (tmp_path / "seed-1" / "processes").glob("[0-9]*")) == [str(k) for k in range(1, count)]


@pytest.mark.long
def test_a_process_that_was_killed_goes_on(alone, tmp_path):
    first, second = process(0, 2, tmp_path), process(1, 2, tmp_path)
    masks = tmp_path / "seed-1" / "processes"
    limit = time.monotonic() + 240
    while not list(masks.glob("masks-*/*.safetensors")) and time.monotonic() < limit:
        time.sleep(0.02)
    for each in (first, second):
        each.send_signal(signal.SIGKILL)
        each.communicate()
    assert not (tmp_path / "seed-1" / "result.json").exists()
    ended(*(process(rank, 2, tmp_path, "--resume") for rank in range(2)))
    assert_same_bank(alone, bank_of(tmp_path))


def found_by(out):
    """What a search made of its tasks: accuracies and configurations, and the tensors that they keep."""
    result = json.loads((out / "seed-1" / "result.json").read_text())
    kept = checkpoint.load(out / "seed-1" / "checkpoint", print)["method"]["learnt"]
    return {key: result[key] for key in ("accuracy_matrix", "method_report")}, kept


def assert_same_search(a, b):
    assert a[0] == b[0]
    for one, two in zip(a[1], b[1], strict=True):
        assert one.keys() == two.keys()
        assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    out = tmp_path_factory.mktemp("searched")
    assert main([*SEARCH, "--out", str(out)]) == 0
    report, kept = found_by(out)
    assert len(report["method_report"]["configurations"]) == len(kept) == 2
    return report, kept


def test_processes_find_what_one_does(searched, tmp_path):
    """Each configuration is trained in one of them, and every task goes on from the same winner."""
    ended(*(process(rank, 3, tmp_path, words=SEARCH) for rank in range(3)))
    assert_same_search(searched, found_by(tmp_path))
    lines = [json.loads(line) for line in (tmp_path / "seed-1" / "processes" / "1" / "metrics.jsonl").read_text().splitlines()]
    trained = {line["phase"] for line in lines}
    assert trained == {"search 1"}  # of the four, and no row of the matrix


@pytest.mark.long
def test_a_search_that_was_killed_goes_on(searched, tmp_path):
    processes = [process(rank, 2, tmp_path, words=SEARCH) for rank in range(2)]
    limit = time.monotonic() + 240
    while not list(tmp_path.rglob("search-*/1/*.safetensors")) and time.monotonic() < limit:
        time.sleep(0.02)
    for each in processes:
        each.send_signal(signal.SIGKILL)
        each.communicate()
    assert not (tmp_path / "seed-1" / "result.json").exists()
    ended(*(process(rank, 2, tmp_path, "--resume", words=SEARCH) for rank in range(2)))
    assert_same_search(searched, found_by(tmp_path))


@pytest.mark.parametrize(("name", "fields"), [("impresslearn", {"basis": 1}), ("lasem", {}), ("wsn", {})])
def test_who_cannot_share(name, fields, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    method, benchmark = METHODS[name], Contrary(BenchmarkConfig(tasks=2), 1)
    with pytest.raises(Refusal, match=f"{name} must be run by one process with these settings, got 2"):
        method(method.Config(model="mlp", **fields), benchmark, 1)


def test_folders_of_processes(tmp_path):
    assert Process().home(tmp_path) == tmp_path == Process().run_of(tmp_path)
    second = Process(1, 2)
    assert second.home(tmp_path) == tmp_path / "processes" / "1"
    assert second.run_of(second.home(tmp_path)) == tmp_path


def test_what_is_handed_over(tmp_path):
    tensors = {"a": torch.arange(5), "b": torch.randn(2, 3).T}
    hand_over(tmp_path / "masks" / "0.safetensors", tensors)
    found = taken(tmp_path / "masks" / "0.safetensors")
    assert list(found) == ["a", "b"]
    assert all(torch.equal(found[key], value) for key, value in tensors.items())
