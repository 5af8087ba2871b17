"""The demo: real runs, a table, a page; and it can be had twice."""

import json

import pytest
import torch

from subnet_pipelines import METHODS
from subnet_pipelines.config import Settings
from subnet_pipelines.demo import RUNS, run_demo

SHORT = [
    ("finetune", "permuted-mnist-mini", {"tasks": 2, "iterations": 30}),
    ("finetune", "rotated-mnist-mini", {"tasks": 2, "iterations": 30}),
]


def test_a_demo_and_another(tmp_path, capsys):
    threads = torch.get_num_threads()
    for seed in (1, 1):
        assert run_demo(seed, tmp_path, SHORT) == 0
    text = capsys.readouterr().out
    accuracy = json.loads((tmp_path / "finetune-rotated-mnist-mini" / "seed-1" / "result.json").read_text())["acc"]
    line = next(line for line in text.splitlines() if line.startswith("finetune, rotated-mnist-mini GG"))
    assert f"{accuracy:.2f}" in line
    assert str(tmp_path / "report.html") in text
    assert (tmp_path / "report.html").read_text().count("data:image/png") == 3
    assert torch.get_num_threads() == threads


def test_the_demo_shows_the_methods_of_the_three_papers_and_what_forgets():
    assert {name for name, _, _ in RUNS} == {"wsn", "supsup", "impresslearn", "finetune"} <= set(METHODS)


@pytest.mark.parametrize("entry", RUNS, ids=lambda e: f"{e[0]}-{e[1]}")
def test_its_runs_resolve(entry):
    name, stream, values = entry
    assert stream.endswith("-mini")  # no download
    settings = Settings(name, stream).resolve(None, values)
    _, config, _ = settings.build()
    assert settings.method(settings.build()[0], settings.benchmark(config, 1), 1).plan(settings.benchmark(config, 1).task(0))
