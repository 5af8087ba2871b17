"""Edge-popup on one task: the sweep of the kept share as a table that is run, drawn and written; and the learning curves under it."""

import json
from dataclasses import asdict, replace

import pytest
import torch
from streams import Contrary
from test_cli import _here  # noqa: F401 - an empty working folder, one thread, no network
from test_report import RESULT

from subnet_pipelines import METHODS, Refusal, RunConfig, run, tables
from subnet_pipelines.benchmarks.base import BenchmarkConfig
from subnet_pipelines.cli import main
from subnet_pipelines.config import Settings
from subnet_pipelines.tables import entry, lines_of, read_table, write_table

HEAD = """title: A small sweep
source: Nobody, 2026, a figure
sweep: {density: [.1, .5], weight_init: [signed_constant, kaiming_normal]}
cells:
  rotated-mnist-mini:
    method: supsup
    fidelity: sound
    settings: {tasks: 1, scenario: GG, model: mlp, outputs: null, mask: topk, optimizer: adam, lr: .001, epochs: 2, val_fraction: .1,
      iterations: null, curves: validation}
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
    assert [cell.name.split("/")[1] for cell in cells] == [
        "signed-constant-0.1",
        "signed-constant-0.5",
        "kaiming-normal-0.1",
        "kaiming-normal-0.5",
    ]
    assert cells[1].label == "weight init signed constant, density 0.5"
    assert cells[1].swept == {"weight_init": "signed_constant", "density": 0.5}
    assert cells[1].swept.items() <= cells[1].settings.items()
    assert (cells[1].paper, cells[1].fidelity, cells[1].benchmark) == ({}, "sound", "rotated-mnist-mini")
    (small / "table.yaml").write_text(HEAD.replace("fidelity: sound", "fidelty: sound"))
    with pytest.raises(Refusal, match=r"table\.yaml: fidelty is no key of a cell"):
        read_table("small")


def test_a_sweep_from_start_to_finish(small, capsys, tmp_path):
    out = tmp_path / "out"
    argv = ["reproduce", "small", "--seeds", "1", "--device", "cpu", "--jobs", "1", "--cells", "*signed*", "--out", str(out)]
    assert main(argv) == 0
    text, _ = capsys.readouterr()
    record = {cell["cell"].split("/")[1]: cell for cell in json.loads((out / "table.json").read_text())["cells"]}
    for density in (0.1, 0.5):
        cell = record[f"signed-constant-{density}"]
        assert cell["status"] == "done"
        assert cell["difference"] is None
        folder = out / "rotated-mnist-mini" / f"signed-constant-{density}" / "sound" / "seed-1"
        result = json.loads((folder / "result.json").read_text())
        assert result["config"]["density"] == density
        assert cell["ours"]["acc"]["mean"] == result["acc"] > 50
        epochs = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert cell["curve"] == [line["val_accuracy"] for line in epochs if line["kind"] == "epoch"]
        assert len(cell["curve"]) == 2
    assert record["kaiming-normal-0.1"]["status"] == "not asked for"
    assert "paper" not in text.split("\n")[1]  # no column for what nobody printed
    assert "weight init signed constant, density 0.5" in text
    names = {"rotated-mnist-mini.density.png", "rotated-mnist-mini.learning.png"}
    assert names == {path.name for path in out.glob("*.png")}
    assert (out / "report.html").read_text().count("data:image/png") == 2


class Axes:
    """Takes down what is drawn."""

    def __init__(self):
        self.lines = {}

    def errorbar(self, x, y, label, **_):
        self.lines[label] = x, y

    def plot(self, x, y, style, label, **_):
        self.lines[label] = list(x), y, style

    def legend(self, **_):
        pass


def test_what_is_drawn(small, tmp_path):
    table = read_table("small")
    accuracy = dict(zip((cell.name for cell in table.cells), (60.0, 90.0, 50.0, 80.0)))
    found = [
        entry(c, "sound", [replace(RESULT, acc=accuracy[c.name])], "done", None, None, [[1.0, 3.0], [3.0, 5.0]])
        for c in table.cells
    ]
    assert found[0]["curve"] == [2.0, 4.0]  # the mean over seeds
    lines = {"signed constant": found[:2], "kaiming normal": found[2:]}
    axes = Axes()
    tables._swept(axes, lines, "density")
    assert axes.lines == {"signed constant": ([0.1, 0.5], [60.0, 90.0]), "kaiming normal": ([0.1, 0.5], [50.0, 80.0])}
    axes = Axes()
    tables._learning(axes, lines, "density")
    assert axes.lines["kaiming normal, 0.5"] == ([1, 2], [2.0, 4.0], "--")
    assert len(axes.lines) == 4
    headings, rows = lines_of(found)
    assert dict(zip(headings[:4], rows[1])) == {
        "row": "weight init signed constant, density 0.5",
        "ACC (%)": "90.00",
        "paper": "–",
        "difference": "–",
    }
    write_table(table, found, tmp_path, None, {})
    assert (tmp_path / "table.csv").read_text().count("\n") == 5
    lead = (tmp_path / "table.md").read_text().split("\n")[2]
    assert lead == "Nobody, 2026, a figure. Ours: mean ± sample standard deviation over the seeds."


SHIPPED = read_table("edge-popup").cells


def test_the_shipped_sweep():
    for benchmark in ("rotated-mnist", "rotated-mnist-mini", "five-datasets"):
        swept = [cell.swept for cell in SHIPPED if cell.benchmark == benchmark]
        for init in ("signed_constant", "kaiming_normal"):
            shares = [s["density"] for s in swept if s["weight_init"] == init]
            assert shares == sorted(shares)
            assert shares[0] <= 0.02 < 0.5 < 0.9 < shares[-1] < 1
            assert 0.5 in shares
    for cell in SHIPPED:
        values = Settings(cell.method, cell.benchmark).resolve(None, dict(cell.settings), cell.fidelity).values
        assert (values["tasks"], values["scenario"], values["mask"], values["curves"]) == (1, "GG", "topk", "validation")
        assert (values["head"], values["outputs"], values["epochs"] > 0) == ("masked", None, True)


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
