"""`subnet-kernels reproduce`: small tables run, are stopped and go on; what is printed and written; and the papers' tables as shipped."""

import csv
import html
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_cli import _here  # noqa: F401 - an empty working folder, one thread, no network
from test_report import RESULT

from subnet_pipelines import BENCHMARKS, METHODS, Refusal, tables
from subnet_pipelines.capacity import packnet_cap, wsn_used
from subnet_pipelines.cli import main
from subnet_pipelines.config import CONFIGS, Settings, read_yaml
from subnet_pipelines.report import write_run
from subnet_pipelines.reproduce import Asked, Job, jobs_of, locked, run_all, settle, slots_of
from subnet_pipelines.tables import Cell, curves_of, entry, lines_of, read_table, remarks, table_names, write_table

HEAD = """title: A small table
source: Nobody, 2026, table 0
benchmarks: [permuted-mnist-mini, permuted-mnist]
rows: {gpm: GPM, finetune: Finetune, wsn: "WSN, c = .1"}
"""
CELLS = {
    "permuted-mnist-mini/gpm": "{paper: {acc: [85, .3]}, note: copied from elsewhere}",
    "permuted-mnist-mini/finetune": "{method: finetune, paper: {acc: [80, null], bwt: -21}, settings: {batch_size: 50, tasks: 3}}",
    "permuted-mnist-mini/wsn": "{method: wsn, paper: {acc: [90, 1], cap: 40.41, used: .335}, settings: {batch_size: 20}}",
    "permuted-mnist/wsn": "{method: wsn, paper: {acc: [96.14, .03]}}",
}


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A table `small` of three cells that can be run, one of them without data, and one that cannot."""
    folder = tmp_path / "tables" / "small"
    for name, text in CELLS.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.yaml").write_text(text)
    (folder / "table.yaml").write_text(HEAD)
    monkeypatch.setattr(tables, "TABLES", tmp_path / "tables")
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")  # nor has any other process a network
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return folder


def reproduce(capsys, *argv):
    code = main(["reproduce", "small", "--tasks", "2", "--epochs", "1", "--device", "cpu", *map(str, argv)])
    out, err = capsys.readouterr()
    return code, out, err


def stamps(folder: Path):
    return {p: p.stat().st_mtime_ns for p in folder.glob("*/*/*/**/*") if p.is_file()}


def test_a_table_from_start_to_finish(small, capsys, tmp_path):
    out = tmp_path / "out"
    other = out / "permuted-mnist-mini" / "finetune" / "code" / "seed-1"  # a run of another config is not taken for this one's
    other.mkdir(parents=True)
    write_run(replace(RESULT, method="finetune", benchmark="permuted-mnist-mini"), other)
    words = ["--seeds", "1,2", "--data-dir", "absent", "--out", out]
    code, text, err = reproduce(capsys, *words)
    assert code == 0
    assert (
        len(re.findall(r"^permuted-mnist-mini/(wsn seed [12]|finetune seed 2): ACC \d\d\.\d\d %, \d+ s$", err, re.MULTILINE)) == 3
    )
    assert "permuted-mnist-mini/finetune seed 1: not run: " in err
    record = json.loads((out / "table.json").read_text())
    found = {cell["cell"]: cell for cell in record["cells"]}
    assert list(found) == list(CELLS)
    assert record["scaled"] == "--tasks 2 --epochs 1"
    assert record["environment"]["torch"] == torch.__version__

    wsn, folder = found["permuted-mnist-mini/wsn"], out / "permuted-mnist-mini" / "wsn" / "code"
    results = [json.loads((folder / f"seed-{seed}" / "result.json").read_text()) for seed in (1, 2)]
    accs = [result["acc"] for result in results]
    assert wsn["ours"]["acc"] == {"mean": statistics.fmean(accs), "std": statistics.stdev(accs)}
    assert wsn["difference"] == wsn["ours"]["acc"]["mean"] - 90
    assert (wsn["status"], wsn["seeds"]) == ("done", [1, 2])
    assert all(result["config"]["fidelity"] == "code" and result["config"]["tasks"] == 2 for result in results)
    assert json.loads((folder / "summary.json").read_text())["seeds"] == [1, 2]
    line = next(line for line in text.splitlines() if line.startswith("WSN, c = .1"))
    assert f"{statistics.fmean(accs):.2f} ± {statistics.stdev(accs):.2f}" in line
    assert f"{wsn['difference']:+.2f}" in line
    finetune = found["permuted-mnist-mini/finetune"]
    assert (finetune["status"], finetune["seeds"]) == ("not run", [2])
    assert "was made with another config: " in finetune["why"]
    assert f"{finetune['ours']['acc']['mean']:.2f}" in next(line for line in text.splitlines() if line.startswith("Finetune "))
    assert found["permuted-mnist-mini/gpm"]["status"] == "paper only"
    assert found["permuted-mnist/wsn"]["status"] == "not run"
    assert re.search(r"absent/mnist.* train-images-idx3-ubyte.gz", found["permuted-mnist/wsn"]["why"])
    assert "cannot be compared with the paper's" in text

    (row,) = [row for row in csv.DictReader((out / "table.csv").open()) if row["cell"] == "permuted-mnist-mini/wsn"]
    assert float(row["ours_acc"]) == wsn["ours"]["acc"]["mean"]
    assert (row["paper_acc"], row["paper_acc_std"], row["paper_cap"], row["paper_bwt"], row["seeds"]) == (
        "90",
        "1",
        "40.41",
        "",
        "1 2",
    )
    markdown, page = (out / "table.md").read_text(), html.unescape((out / "report.html").read_text())
    for written in (markdown, page):
        for word in ("A small table", "GPM: copied from elsewhere", "train-images-idx3-ubyte.gz", "Finetune", "0.335"):
            assert word in written
    assert page.count("data:image/png;base64,") == 3
    assert not re.search(r'(src|href)="?(http|/|\w+\.)', page)

    # its command is the run: it is finished already
    command = wsn["command"].split()
    assert command[0] == "subnet-kernels"
    before = stamps(out)
    assert main([*command[1:], "--out", str(folder), "--resume"]) == 0
    capsys.readouterr()

    # again: nothing is run twice; a glob leaves the others as they are
    code, again, err = reproduce(capsys, *words, "--cells", "permuted-mnist-mini/w*")
    assert (code, err) == (0, "")
    assert stamps(out) == before
    assert "Finetune" in again
    assert "not run" not in again
    assert "permuted-mnist\n" not in again


def test_an_interrupted_table_goes_on(small, capsys, tmp_path):
    """SIGTERM stops it and its runs; the same command ends with the same bits as a run that was left alone."""
    out, argv = tmp_path / "out", ["--seeds", "1", "--cells", "*mini/wsn"]
    folder = out / "permuted-mnist-mini" / "wsn" / "code" / "seed-1"

    def interrupt():
        limit = time.monotonic() + 240
        while not (folder / "metrics.jsonl").exists() and time.monotonic() < limit:
            time.sleep(0.002)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=interrupt)
    thread.start()
    code, text, err = reproduce(capsys, *argv, "--out", out)
    thread.join()
    assert code == 128 + signal.SIGTERM
    assert "permuted-mnist-mini/wsn seed 1: stopped" in err
    assert "1 of 1 runs are left; the same command goes on with them" in text
    assert "WSN, c = .1: left" in text
    assert (folder / "checkpoint").is_dir()
    assert not (folder / "result.json").exists()

    code, text, err = reproduce(capsys, *argv, "--out", out, "--stop-after", "0.00001")
    assert (code, err) == (0, "")
    assert "1 of 1 runs are left" in text
    assert reproduce(capsys, *argv, "--out", out)[0] == 0
    whole = ["train", "wsn", "--benchmark", "permuted-mnist-mini", "--fidelity", "code", "--batch-size", "20", "--tasks", "2"]
    assert main([*whole, "--epochs", "1", "--device", "cpu", "--out", str(tmp_path / "whole")]) == 0
    for name in ("accuracy_matrix", "capacity", "method_report"):
        one, other = (json.loads((f / "result.json").read_text())[name] for f in (folder, tmp_path / "whole" / "seed-1"))
        assert one == other
    assert (folder / "metrics.jsonl").read_text() == (tmp_path / "whole" / "seed-1" / "metrics.jsonl").read_text()


def test_a_run_that_fails_does_not_take_the_others_with_it(small, capsys, tmp_path, monkeypatch):
    script = tmp_path / "python"
    script.write_text(
        f'#!/bin/sh\ncase "$*" in *finetune*|*sound*) echo "out of luck"; exit 3;; esac\nexec {sys.executable} "$@"\n'
    )
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    code, text, err = reproduce(capsys, "--seeds", "1", "--cells", "*mini*", "--also", "sound", "--out", tmp_path / "out")
    assert code == 1
    assert "permuted-mnist-mini/finetune seed 1: failed: exit code 3: out of luck (" in err
    assert "  Finetune: failed: exit code 3: out of luck (" in text
    cells = json.loads((tmp_path / "out" / "table.json").read_text())["cells"]
    assert [(c["cell"].split("/")[1], c["fidelity"], c["status"]) for c in cells] == [
        ("gpm", None, "paper only"),
        ("finetune", "code", "failed"),
        ("finetune", "sound", "failed"),
        ("wsn", "code", "done"),
        ("wsn", "sound", "failed"),
    ]
    assert (tmp_path / "out" / "permuted-mnist-mini" / "wsn" / "code" / "seed-1" / "result.json").exists()


BAD = {
    "glob": (
        ["--cells", "wsn-*"],
        "--cells 'wsn-*' matches no cell of small; its cells are BENCHMARK/ROW, such as permuted-mnist-mini/gpm",
    ),
    "also": (["--also", "exact"], "--also must be one of sound, code, paper, got 'exact'"),
    "tasks": (["--tasks", "0"], "--tasks must be a whole number greater than 0, got '0'"),
    "jobs": (["--jobs", "two"], "--jobs must be a whole number greater than 0, got 'two'"),
    "minutes": (["--stop-after", "-1"], "--stop-after must be a number greater than 0, got '-1'"),
    "endless": (["--stop-after", "nan"], "--stop-after must be a number greater than 0, got 'nan'"),
    "seeds": (["--seeds", "1,1"], "--seeds must be different numbers"),
    "device": (["--device", "tpu"], "--device must be auto, cpu or cuda, got 'tpu'"),
    "graph": (["--cuda-graph"], "--cuda-graph needs a CUDA device, got --device cpu, which is cpu here"),
    "flag": (["--fidelity", "code"], "unrecognized arguments: --fidelity code"),
    "out": (["--out", "file/run"], "file/run: cannot be written (Not a directory)"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_gets_a_sentence(name, small, capsys, tmp_path):
    (tmp_path / "file").write_text("")
    argv, sentence = BAD[name]
    before = set(tmp_path.rglob("*"))
    code, out, err = reproduce(capsys, *argv)
    assert (code, out) == (2, "")
    assert sentence in err
    assert err.count("\n") == 1
    assert set(tmp_path.rglob("*")) == before


def test_an_unknown_table_names_the_nearest(capsys):
    assert main(["reproduce", "wsn-table"]) == 2
    assert re.search(r"table 'wsn-table' is unknown; did you mean wsn-table[12]\?", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("{methods: wsn, paper: {acc: [1, 2]}}", "methods is no key of a cell"),
        ("{note: nothing}", "a cell should have a method, or what the paper prints"),
        ("{method: wsn, paper: 96}", "paper should hold acc: [mean, deviation]"),
        ("{method: wsn, point: [line]}", "point should be [line, number], is ['line']"),
        ("{paper: {acc: 3}}", "paper should hold acc: [mean, deviation]"),
        ("{paper: {acc: [3]}}", "paper should hold acc: [mean, deviation]"),
        (
            "{paper: {acc: [3, 1], capacity: 3}}",
            "paper should hold acc: [mean, deviation], and of bwt, cap, kept, peak, told, used",
        ),
        ("{paper: {acc: [3, 1]}, fidelity: exact}", "fidelity must be one of sound, code, paper, got 'exact'"),
        ("{paper: {acc: [3, 1]}, settings: 3}", "settings should be a mapping"),
        ("[", "is no YAML"),
    ],
)
def test_a_wrong_cell_is_named(text, sentence, small):
    path = small / "permuted-mnist-mini" / "wsn.yaml"
    path.write_text(text)
    with pytest.raises(Refusal, match=re.escape(sentence)) as caught:
        read_table("small")
    assert str(caught.value).startswith(f"{path}: ")


def test_a_stray_cell_is_named(small):
    (small / "permuted-mnist" / "wsm.yaml").write_text("{paper: {acc: [3, 1]}}")
    with pytest.raises(Refusal, match=r"wsm\.yaml: is no benchmark and row of "):
        read_table("small")


def test_settings_that_do_not_resolve_are_not_run(small, tmp_path):
    for settings, sentence in (
        ({"density": 2}, "density must be in (0, 1], got 2.0"),
        ({"angles": 3}, "angles does not apply to wsn"),
    ):
        cell = Cell("permuted-mnist-mini/wsn", "WSN", {"acc": [1, 1]}, "wsn", settings)
        (job,) = jobs_of(cell, Asked(tmp_path, [1]))
        assert job.state == "not run"
        assert sentence in job.why
    cell = Cell("permuted-mnist-mini/hat", "HAT", {"acc": [1, 1]}, "hat")
    assert "method 'hat' is unknown" in jobs_of(cell, Asked(tmp_path, [1]))[0].why


def test_scaling_down(tmp_path):
    """Over a cell's own settings; a mode that is the same config is no other run."""
    cell = Cell("permuted-mnist-mini/supsup", "", {"acc": [1, 1]}, "supsup", {"iterations": 30, "tasks": 3})
    assert jobs_of(cell, Asked(tmp_path, [1]))[0].flags == {"iterations": 30, "tasks": 3}
    assert jobs_of(cell, Asked(tmp_path, [1], tasks=9, epochs=2))[0].flags == {"tasks": 3, "epochs": 2}
    masks = Cell("permuted-mnist-mini/impresslearn", "", {}, "impresslearn", {"basis_epochs": 5})
    scaled = {"epochs": 2, "basis_epochs": 2, "backbone_epochs": 2}
    assert jobs_of(masks, Asked(tmp_path, [1], epochs=2))[0].flags == scaled
    assert jobs_of(masks, Asked(tmp_path, [1], epochs=7))[0].flags == {"epochs": 7, "basis_epochs": 5, "backbone_epochs": 7}
    assert [(j.fidelity, j.seed) for j in jobs_of(cell, Asked(tmp_path, [4, 2], also="sound"))] == [
        ("code", 4),
        ("code", 2),
        ("sound", 4),
        ("sound", 2),
    ]
    assert len(jobs_of(cell, Asked(tmp_path, [1], also="code"))) == 1
    sound = Settings("supsup", "permuted-mnist-mini").values
    same = replace(cell, settings={**cell.settings, **{name: sound[name] for name in METHODS["supsup"].FIDELITY["code"]}})
    assert len(jobs_of(same, Asked(tmp_path, [1], also="sound"))) == 1


def test_one_at_a_time(tmp_path):
    """The folder is locked against another, as long as any child lives."""
    with (
        locked(tmp_path) as lock,
        pytest.raises(Refusal, match="another reproduce, or a run that it started, is at work"),
        locked(tmp_path),
    ):
        pass
    with locked(tmp_path) as lock:
        child = subprocess.Popen(["sleep", "60"], pass_fds=[lock])
    with pytest.raises(Refusal, match="is at work"), locked(tmp_path):
        pass
    child.kill()
    child.wait()
    with locked(tmp_path):
        pass


def test_cores_and_gpus_are_shared_out(monkeypatch, tmp_path):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("os.cpu_count", lambda: 16)
    assert slots_of(Asked(tmp_path, [1])) == [{"OMP_NUM_THREADS": "1"}] * 16
    assert slots_of(Asked(tmp_path, [1], jobs=3)) == [{"OMP_NUM_THREADS": "5"}] * 3
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    assert slots_of(Asked(tmp_path, [1], device="cuda")) == [{"OMP_NUM_THREADS": "16"}]
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert [s["CUDA_VISIBLE_DEVICES"] for s in slots_of(Asked(tmp_path, [1], device="cuda"))] == ["0", "1"]
    assert [s["CUDA_VISIBLE_DEVICES"] for s in slots_of(Asked(tmp_path, [1], jobs=3, device="cuda"))] == ["0", "1", "0"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert slots_of(Asked(tmp_path, [1], jobs=2, device="cuda"))[1] == {"OMP_NUM_THREADS": "2", "CUDA_VISIBLE_DEVICES": "7"}


@pytest.mark.parametrize(
    ("state", "code", "expected"),
    [
        ("running", 2, ("not run", "a sentence")),
        ("running", -9, ("failed", "exit code -9: subnet-kernels: a sentence")),
        ("stopped", 143, ("stopped", None)),
        ("stopped", -15, ("stopped", None)),
    ],
)
def test_how_a_process_ended(state, code, expected, tmp_path):
    job = Job(Cell("b/r", "R", {"acc": [1, 1]}, "wsn"), "code", 1, tmp_path, state=state)
    job.log.write_text("a line\nsubnet-kernels: a sentence\n\n")
    settle(job, code)
    assert job.state == expected[0]
    assert (job.why or "").startswith(expected[1] or "")


def test_nothing_to_run_is_run_at_once(tmp_path):
    assert run_all([], Asked(tmp_path, [1]), 0, time.monotonic()) is None


# ---- the page of a table --------------------------------------------------------------------------------------------


def entries():
    paper = {"acc": [85, 0.5], "bwt": -9, "cap": 30, "used": 0.21}
    cell, gpm = Cell("stream/some", "Some", paper, "some"), Cell("stream/gpm", "GPM", {"acc": [80.0, None]}, note="copied")
    results = [RESULT, replace(RESULT, seed=2, acc=80.0, environment={"torch": "3"})]
    return [
        entry(cell, "code", results, "done", None, "subnet-kernels train some"),
        entry(cell, "sound", results[:1], "failed", "exit code 1", "subnet-kernels train some"),
        entry(replace(cell, name="stream/other", label="Other"), "code", [], "not run", "no <data>", None),
        entry(gpm, None, [], "paper only", None, None),
    ]


def test_lines_and_remarks():
    headings, rows = lines_of(entries())
    assert [dict(zip(headings[:4], row)) for row in rows] == [
        {"row": "Some", "ACC (%)": "82.83 ± 4.01", "paper": "85.00 ± 0.50", "difference": "-2.17"},
        {"row": "Other", "ACC (%)": "–", "paper": "85.00 ± 0.50", "difference": "–"},
        {"row": "GPM", "ACC (%)": "–", "paper": "80.00", "difference": "–"},
    ]
    found = dict(zip(headings, rows[0]))
    assert (found["used"], found["from CAP"]) == ("0.200 ± 0.000", "0.210")
    assert (found["sound: ACC (%)"], found["sound: used"]) == ("85.67", "0.200")
    assert "CAP, joint Huffman" not in headings
    assert all("–" != row[i] for row in rows[:1] for i, word in enumerate(headings) if word != "sound: inferred (%)")
    assert remarks(entries()) == [
        "Some: failed: exit code 1",
        "Other: not run: no <data>",
        "GPM: copied",
    ]
    assert remarks([entry(Cell("s/g", "G", {"acc": [1, 1]}), None, [], "paper only", None, None)]) == [
        "G: no such method here, the paper's number only"
    ]


FIGURES = """figures:
  by rows of a batch: {xlabel: rows, log: true}
  inferred by rows: {y: task_inference, ylabel: inferred (%)}
  task by task: {x: task, y: final}
  learning: {x: epoch, y: val_loss, ylabel: validation loss}
"""


def test_figures_of_a_table(small, capsys, tmp_path):
    """Points of cells by line and place, curves over tasks and epochs; what has no number in a figure is not in it."""
    (small / "table.yaml").write_text(HEAD + FIGURES)
    (small / "permuted-mnist-mini" / "finetune.yaml").write_text(
        "{method: finetune, settings: {batch_size: 100}, point: [dense, 100]}"
    )
    (small / "permuted-mnist-mini" / "wsn.yaml").write_text("{method: wsn, settings: {batch_size: 50}, point: [WSN, 50]}")
    words = ["--seeds", "1,2", "--cells", "permuted-mnist-mini/*", "--out", tmp_path / "out"]
    assert reproduce(capsys, *words)[0] == 0
    record = json.loads((tmp_path / "out" / "table.json").read_text())
    found = {e["row"]: e for e in record["cells"] if e["ours"]}
    assert found["Finetune"]["difference"] is None
    assert len(found["WSN, c = .1"]["final"]) == 2
    acc = {row: e["ours"]["acc"]["mean"] for row, e in found.items()}
    cells = list(found.values())
    assert curves_of("point", "acc", cells) == {"dense": [(100, acc["Finetune"])], "WSN": [(50, acc["WSN, c = .1"])]}
    assert curves_of("point", "task_inference", cells) == {}
    tasks = curves_of("task", "final", cells)
    assert statistics.fmean(y for _, y in tasks["Finetune"]) == pytest.approx(acc["Finetune"])
    log = [json.loads(line) for line in (tmp_path / "out/permuted-mnist-mini/wsn/code/seed-1/metrics.jsonl").open()]
    losses = [line["val_loss"] for line in log if line["kind"] == "epoch"]
    assert curves_of("epoch", "val_loss", cells)["WSN, c = .1"] == [(1, pytest.approx(statistics.fmean(losses)))]
    assert curves_of("epoch", "val_loss", cells, ["train"])["WSN, c = .1: train"] == [
        (1, pytest.approx(statistics.fmean(losses)))
    ]
    assert curves_of("epoch", "val_loss", cells, ["another phase"]) == {}
    pictures = {path.name for path in (tmp_path / "out").glob("*.png")}
    assert {f"permuted-mnist-mini.{name}.png" for name in ("by-rows-of-a-batch", "task-by-task", "learning")} <= pictures
    assert "permuted-mnist-mini.inferred-by-rows.png" not in pictures


@pytest.mark.parametrize(
    ("figure", "sentence"),
    [("{z: acc}", "z is no key of a figure; known are x, y"), ("{x: task}", "figure 'bad' has no acc over task")],
)
def test_a_wrong_figure_is_named(figure, sentence, small):
    (small / "table.yaml").write_text(HEAD + f"figures: {{bad: {figure}}}\n")
    with pytest.raises(Refusal, match=re.escape(sentence)):
        read_table("small")


def test_what_a_table_writes(tmp_path, capsys):
    table = tables.Table("small", "Small & fine", "Nobody", [])
    write_table(table, entries(), tmp_path, None, {"wall_seconds": 3})
    record = json.loads((tmp_path / "table.json").read_text())
    assert record["wall_seconds"] == 3
    assert record["environment"] == {"torch": [["2", "3"], "2"]}
    page = (tmp_path / "report.html").read_text()
    assert "Small &amp; fine" in page
    assert "no &lt;data&gt;" in page
    assert page.count("data:image/png;base64,") == 3
    assert "Scaled down" not in page + (tmp_path / "table.md").read_text()
    assert len(list(csv.reader((tmp_path / "table.csv").open()))) == 5
    assert "82.83 ± 4.01" in capsys.readouterr().out
    nothing = [e for e in entries() if not e["ours"]]
    write_table(table, nothing, tmp_path / "..", None, {})
    assert "data:image/png" not in (tmp_path / ".." / "report.html").read_text()


# ---- the shipped tables ---------------------------------------------------------------------------------------------

WSN_TABLES = ("wsn-table1", "wsn-table2")
SHIPPED = [(table, cell) for table in table_names() for cell in read_table(table).cells]
PAPERS = [(table, cell) for table, cell in SHIPPED if table in WSN_TABLES]
IDS = [f"{table}-{cell.name}" for table, cell in SHIPPED]
TASKS = {  # of the paper's streams
    "permuted-mnist": 10,
    "five-datasets": 5,
    "omniglot-rotation": 100,
    "cifar100-split": 10,
    "cifar100-superclass": 20,
    "tiny-imagenet": 40,
}


def test_both_tables_are_whole():
    names = {table: [cell.name for cell in read_table(table).cells] for table in WSN_TABLES}
    assert {table: len(cells) for table, cells in names.items()} == {"wsn-table1": 37, "wsn-table2": 33}
    assert {cell.split("/")[0] for cells in names.values() for cell in cells} == set(TASKS) <= set(BENCHMARKS)
    assert (
        {cell.method for _, cell in PAPERS} - {None}
        == {"stl", "finetune", "ewc", "packnet", "supsup", "wsn", "mtl"}
        <= set(METHODS)
    )


@pytest.mark.parametrize(("table", "cell"), SHIPPED, ids=IDS)
def test_a_shipped_cell_resolves(table, cell):
    if cell.method is not None:
        assert (CONFIGS / cell.method / f"{cell.benchmark}.yaml").is_file()
        for fidelity in ("sound", "code", "paper"):
            Settings(cell.method, cell.benchmark).resolve(None, dict(cell.settings), fidelity).build()


@pytest.mark.parametrize("table", table_names())
def test_points_belong_to_figures(table):
    found = read_table(table)
    over_points = [words for words in found.figures.values() if words["x"] == "point"]
    points = [(cell.benchmark, *cell.point) for cell in found.cells if cell.point is not None]
    assert points or not over_points  # a sweep has points, whether a figure is drawn over them or not
    assert len(set(points)) == len(points)


@pytest.mark.parametrize(("table", "cell"), PAPERS, ids=[f"{table}-{cell.name}" for table, cell in PAPERS])
def test_a_cell_of_wsns_tables(table, cell):
    """Says what the paper's formulas and our recipes say."""
    tasks = TASKS[cell.benchmark]
    if cell.method == "wsn":
        assert cell.paper["used"] == pytest.approx(wsn_used(cell.paper["cap"], tasks), abs=0.0005)
        density = float(cell.settings["density"])
        assert density <= cell.paper["used"] <= 1 - (1 - density) ** tasks
    if cell.method == "stl":
        assert cell.paper["cap"] == 100 * tasks
    if cell.method is None:
        return
    found = Settings(cell.method, cell.benchmark).resolve(None, dict(cell.settings), "code")
    assert found.values["tasks"] == tasks
    assert found.values["scenario"] == "GG"
    if cell.method == "packnet":
        assert packnet_cap(tasks, found.values["keep"]) == pytest.approx(cell.paper["cap"], abs=0.05)
    recipe = CONFIGS / cell.method / f"{cell.benchmark}.yaml"
    assert recipe.is_file()
    expected = read_yaml(recipe).get("expected", {})
    settings = {k: v for k, v in cell.settings.items() if found.values[k] != Settings(cell.method, cell.benchmark).values[k]}
    if not settings:  # the recipe is this cell's
        assert expected["acc"] == cell.paper["acc"]
        if "used_fraction" in expected:
            assert expected["used_fraction"][0] == cell.paper["used"]
