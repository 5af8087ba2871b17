"""Edge-popup on one task: the sweep of the kept share as a table that is run, drawn and written; and the learning curves under it."""

import json
from dataclasses import asdict

import pytest
import torch
from streams import Contrary
from test_cli import _here  # noqa: F401 - an empty working folder, one thread, no network

from subnet_pipelines import METHODS, Refusal, RunConfig, run, tables
from subnet_pipelines.benchmarks.base import BenchmarkConfig
from subnet_pipelines.cli import main
from subnet_pipelines.config import Settings
from subnet_pipelines.tables import read_table

HEAD = """title: A small sweep
source: Nobody, 2026, a figure
sweep: {density: [.5, .1], weight_init: [signed_constant, kaiming_normal]}
figures:
  over density: {x: point, y: acc}
  learning: {x: epoch, y: val_accuracy}
cells:
  rotated-mnist-mini:
    method: supsup
    fidelity: sound
    settings: {tasks: 1, scenario: GG, model: mlp, outputs: null, mask: topk, optimizer: adam, lr: .001, epochs: 2, val_fraction: .1,
      curves: validation}
"""


@pytest.fixture
def small(tmp_path, monkeypatch):
    folder = tmp_path / "tables" / "small"
    folder.mkdir(parents=True)
    (folder / "table.yaml").write_text(HEAD)
    monkeypatch.setattr(tables, "TABLES", tmp_path / "tables")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return folder


def test_a_sweep_is_every_combination(small):
    cells = read_table("small").cells
    assert [cell.name for cell in cells] == [
        "rotated-mnist-mini/signed-constant-0.5",
        "rotated-mnist-mini/signed-constant-0.1",
        "rotated-mnist-mini/kaiming-normal-0.5",
        "rotated-mnist-mini/kaiming-normal-0.1",
    ]
    assert cells[1].label == "signed constant, density 0.1"
    assert cells[1].point == ["signed constant", 0.1]
    assert {"weight_init": "signed_constant", "density": 0.1}.items() <= cells[1].settings.items()
    assert (cells[1].paper, cells[1].fidelity, cells[1].method) == ({}, "sound", "supsup")
    (small / "table.yaml").write_text(HEAD.replace("fidelity: sound", "fidelty: sound"))
    with pytest.raises(Refusal, match=r"table\.yaml: fidelty is no key of a cell"):
        read_table("small")
    (small / "table.yaml").write_text(HEAD.replace(", weight_init: [signed_constant, kaiming_normal]", ""))
    assert [(cell.name.split("/")[1], cell.point) for cell in read_table("small").cells] == [
        ("0.5", ["rotated-mnist-mini", 0.5]),
        ("0.1", ["rotated-mnist-mini", 0.1]),
    ]


def test_a_sweep_from_start_to_finish(small, capsys, tmp_path):
    out = tmp_path / "out"
    argv = ["reproduce", "small", "--seeds", "1", "--device", "cpu", "--jobs", "1", "--cells", "*signed*", "--out", str(out)]
    assert main(argv) == 0
    assert "signed constant, density 0.5" in capsys.readouterr().out
    record = {cell["cell"].split("/")[1]: cell for cell in json.loads((out / "table.json").read_text())["cells"]}
    for density in (0.1, 0.5):
        cell = record[f"signed-constant-{density}"]
        assert (cell["status"], cell["why"]) == ("done", None)
        assert cell["difference"] is None
        folder = out / "rotated-mnist-mini" / f"signed-constant-{density}" / "sound" / "seed-1"
        result = json.loads((folder / "result.json").read_text())
        assert result["config"]["density"] == density
        assert result["capacity"]["used_fraction"] == pytest.approx(density, abs=1e-3)
        assert cell["ours"]["acc"]["mean"] == result["acc"] > 20
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert cell["epochs"]["val_accuracy"] == [line["val_accuracy"] for line in lines if line["kind"] == "epoch"]
        assert len(cell["epochs"]["val_accuracy"]) == 2
    assert record["kaiming-normal-0.1"]["status"] == "not asked for"
    assert {"rotated-mnist-mini.over-density.png", "rotated-mnist-mini.learning.png"} <= {path.name for path in out.glob("*.png")}


def test_the_shipped_sweep():
    cells = read_table("edge-popup").cells
    for benchmark in ("rotated-mnist", "permuted-mnist-mini", "five-datasets"):
        for line in ("signed constant", "kaiming normal"):
            shares = [cell.point[1] for cell in cells if (cell.benchmark, cell.point[0]) == (benchmark, line)]
            assert shares == sorted(shares)
            assert shares[0] <= 0.02 < 0.5 < 0.9 < shares[-1] < 1
    for cell in cells:
        values = Settings(cell.method, cell.benchmark).resolve(None, dict(cell.settings), cell.fidelity).values
        assert (values["tasks"], values["scenario"], values["mask"], values["curves"]) == (1, "GG", "topk", "validation")
        assert (values["head"], values["outputs"], values["iterations"]) == ("masked", None, None)
        assert values["density"] == cell.point[1]
        assert values["weight_init"].replace("_", " ") == cell.point[0]


# ---- learning curves ------------------------------------------------------------------------------------------------


def learning(name, out, **fields):
    cls = METHODS[name]
    benchmark = Contrary(BenchmarkConfig(tasks=2, val_fraction=0.25))
    config = {"supsup": {"iterations": 12, "batch_size": 16, "model": "mlp", "outputs": 8}, "finetune": {"epochs": 3}}[name]
    method = cls(cls.Config(**config), benchmark, 1)
    result = run(method, benchmark, RunConfig(**fields), out)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return method, benchmark, result, [line for line in lines if line["kind"] == "epoch"]


@pytest.mark.parametrize("name", ["supsup", "finetune"])
def test_a_curve_is_of_the_network_in_training(name, tmp_path):
    method, benchmark, result, lines = learning(name, tmp_path / "with", curves="validation")
    last = lines[-1]
    assert last["task"] == 1
    x, y = benchmark.task(1).val.tensors()
    with torch.no_grad():
        right = (method.predict(x, 1).logits.argmax(1) == y).double().mean().item()
    if name == "supsup" or last["val_loss"] <= min(line["val_loss"] for line in lines if line["task"] == 1):  # what was kept
        assert last["val_accuracy"] == pytest.approx(100 * right)
    assert {line["task"] for line in lines} == {0, 1}

    other, _, plain, without = learning(name, tmp_path / "without")
    for a, b in zip(method.state_dict().values(), other.state_dict().values()):
        assert torch.equal(a, b)  # looking changes nothing
    assert asdict(plain)["final"] == asdict(result)["final"]
    assert not any("val_accuracy" in line for line in without)


def test_curves_need_validation_rows(tmp_path):
    cls, benchmark = METHODS["supsup"], Contrary(BenchmarkConfig(tasks=1, val_fraction=0.0))
    method = cls(cls.Config(iterations=3, model="mlp", outputs=8), benchmark, 1)
    with pytest.raises(Refusal, match="curves watches the validation loss, but val_fraction of contrary is 0"):
        run(method, benchmark, RunConfig(curves="validation"), tmp_path)
