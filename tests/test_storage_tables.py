"""The storage tables of ImpressLearn: every printed cell, the formulas by hand, and the bytes of a saved bank."""

import csv
import json
from pathlib import Path

import pytest
import torch
from device import cpu_only
from safetensors import safe_open

import subnet_kernels as sk
from subnet_pipelines import Refusal, storage_tables, tables
from subnet_pipelines.cli import main
from subnet_pipelines.models import MODELS
from subnet_pipelines.storage_tables import (
    NUMBERS,
    Row,
    as_markdown,
    bank_bytes,
    compute,
    count_of,
    departures,
    layer_sizes,
    lines_of,
    numbers,
    packed_bytes,
    read_rows,
    shared,
)
from subnet_pipelines.tables import as_pipes, read_table

SHIPPED = ("impresslearn-storage-paper", "impresslearn-storage-poster")
ROWS = {(table, row.label): row for table in SHIPPED for row in read_rows(read_table(table))}
PRINTED = [(*key, name) for key, row in ROWS.items() for name in row.printed]
DEPARTING = {  # the row that contradicts itself, and a count of weights that no network in use has
    ("impresslearn-storage-poster", "pre-ResNet-200", "masks"),
    ("impresslearn-storage-poster", "ResNet-18", "weights"),
    ("impresslearn-storage-paper", "ResNet-18, Split CIFAR-100", "weights"),
}


@pytest.mark.parametrize(("table", "label", "name"), [cell for cell in PRINTED if cell not in DEPARTING])
def test_a_printed_cell(table, label, name):
    """Counts are the printed ones; sizes are within half a percent of them."""
    row = ROWS[table, label]
    ours, printed = numbers(row)[name], row.printed[name]
    if name in ("masks", "tasks", "alphas"):
        assert ours == printed
    else:
        assert ours == pytest.approx(printed, rel=0.005)


def test_what_departs():
    found = {(*key, name) for key, row in ROWS.items() for name in departures(row, numbers(row))}
    assert found == DEPARTING
    erratum = ROWS["impresslearn-storage-poster", "pre-ResNet-200"]
    assert departures(erratum, numbers(erratum)) == {"masks": (100, 75)}
    assert numbers(erratum)["alphas"] == erratum.printed["alphas"] == 15_225 == 75 * 203
    assert numbers(erratum)["layers"] == 203


def test_coefficients_follow_from_the_networks():
    found = {label: row.printed["alphas"] for (_, label), row in ROWS.items() if "alphas" in row.printed}
    assert sorted(found.values()) == [15, 210, 300, 370, 3_975, 7_800, 15_225]
    assert [len(layer_sizes(name)) for name in ("lenet-300-100", "gem-resnet-18", "resnet-34")] == [3, 21, 37]
    assert [len(layer_sizes(name)) - 1 for name in ("resnet-50", "resnet-101", "pre-resnet-200")] == [53, 104, 203]


def test_weights_are_those_of_the_networks():
    for name in ("lenet-300-100", "gem-resnet-18", "resnet-50"):
        with torch.device("meta"):
            net = MODELS[name]()
        assert sum(layer_sizes(name)) == sum(p.numel() for p in net.parameters())
    # convolutions and linear layers of the networks that Table 1 of He et al., CVPR 2016, describes; 64,496,832 of the 200 layers
    assert [sum(layer_sizes(name, 1000)) for name in ("resnet-50", "resnet-101")] == [25_502_912, 44_442_816]
    assert layer_sizes("resnet-50", 1000)[-1] == 2_048_000
    bottleneck = lambda inp, inner, out: inp * inner + 9 * inner**2 + inner * out  # noqa: E731
    expected = 49 * 3 * 64 + 2_048_000
    for before, inner, blocks in ((64, 64, 3), (256, 128, 24), (512, 256, 36), (1024, 512, 3)):
        out = 4 * inner
        expected += bottleneck(before, inner, out) + before * out + (blocks - 1) * bottleneck(out, inner, out)
    assert sum(layer_sizes("pre-resnet-200", 1000)) == expected


def test_the_formulas_by_hand():
    found = numbers(Row("", {"tasks": 359}, network="lenet-300-100", masks=5))
    assert found["weights"] == 784 * 300 + 300 * 100 + 100 * 10
    assert found["mask_kb"] == 266_200 / 8 * 2 / 1024
    assert found["mask_values"] == 266_200 / 64
    assert (found["layers"], found["alphas"]) == (3, 15)
    assert found["phi"] == pytest.approx(5 * found["mask_kb"] / 359 + 15 * 4 / 1024)
    assert found["cost"] == pytest.approx(found["mask_kb"] / found["phi"])
    assert found["bits_kb"] == 64 * (460 + 59 + 2) / 1024  # 235,200, 30,000 and 1,000 bits in lines of 512
    assert shared(65.0, 100, "784!", 1.5) == 1.5
    assert count_of("5!") == 120
    unknown = numbers(Row("", {"weights": 137_900_000, "cost": 3.0}))
    assert unknown["mask_kb"] == 137_900_000 / 4096
    assert {unknown[name] for name in ("masks", "tasks", "layers", "alphas", "phi", "cost")} == {None}
    assert departures(Row("", {"weights": 137_900_000, "cost": 3.0}), unknown) == {"cost": (3.0, None)}


def test_what_the_notes_say():
    """Of cells that cannot be derived."""
    row = ROWS["impresslearn-storage-paper", "ResNet-18, Split CIFAR-100"]
    assert "1.988 for ours, 1.998 for 6.2M" in row.note
    assert numbers(row)["cost"] == pytest.approx(1.988, abs=0.0005)
    mask = 6.2e6 / 4096
    assert mask / shared(mask, 10, 20, 4 * 210 / 1024) == pytest.approx(1.998, abs=0.0005)
    row = ROWS["impresslearn-storage-paper", "ResNet-50, Split ImageNet"]
    assert "With the head of 10 that a task has, C is 26.03" in row.note
    of_a_task = numbers(Row("", row.printed, network="resnet-50", head=False))
    assert of_a_task["cost"] == pytest.approx(26.03, abs=0.005)
    assert abs(of_a_task["cost"] / row.printed["cost"] - 1) > 0.005
    assert numbers(ROWS["impresslearn-storage-poster", "ResNet-18"])["mask_values"] == 1_090_940 / 64
    assert 6.2e6 / 64 == 96_875


# ---- the bank -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 511, 512, 513, 30_000, 235_200])
def test_packed_bytes(n):
    assert packed_bytes(n) == sk.pack(torch.ones(n, dtype=torch.bool)).numel()


def payload(path):
    """Bytes of the tensors in a file, by name."""
    with safe_open(path, "pt") as file:
        return {key: file.get_tensor(key).numel() * file.get_tensor(key).element_size() for key in file.keys()}


def test_files_do_not_depend_on_what_masks_open(tmp_path):
    """One random mask stands for all: whatever is open, a mask's file has the same size, and a combination's grows by its coefficients."""
    bank = sk.MaskBank(sk.convert(MODELS["lenet-300-100"](), sk.SubnetConfig(density=0.1)))
    sizes = dict(zip(bank.layer_names, layer_sizes("lenet-300-100")))
    shares = [0.0, 0.05, 0.125, 0.5, 1.0]
    for i, share in enumerate(shares):
        bits = {name: sk.pack(torch.rand(layer.weight.shape) < share) for name, layer in zip(bank.layer_names, bank.layers())}
        bank.commit(f"task {i}", bits=bits)
    for k in (2, 5):
        bank.commit(f"new {k}", alphas=torch.rand(3, k), over=bank.masks[:k])
    bank.save(tmp_path)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len({file.stat().st_size for file in files[: len(shares)]}) == 1
    assert payload(files[0]) == {f"bits/{name}": packed_bytes(n) for name, n in sizes.items()}
    assert bank.capacity()["mask_bytes"] == len(shares) * sum(map(packed_bytes, sizes.values()))
    assert [payload(file) for file in files[len(shares) :]] == [{"alphas": 4 * 3 * 2}, {"alphas": 4 * 3 * 5}]
    assert [file.stat().st_size for file in files[len(shares) :]] == [96, 132]


def test_what_a_bank_grows_by():
    few, more = bank_bytes("lenet-300-100", 2), bank_bytes("lenet-300-100", 5)
    bits = sum(map(packed_bytes, layer_sizes("lenet-300-100")))
    assert few["mask"] == more["mask"]
    assert bits < few["mask"] < 1.02 * bits
    assert few["norms"] == 0
    # coefficients, and the name of every mask on a line of the manifest
    assert more["task"] - few["task"] == 4 * 3 * 3 + 3 * len('    "task 0",\n')
    assert 4 * 3 * 5 < more["task"] < 4 * 3 * 5 + 400


def test_norms_are_every_tasks_own():
    found = bank_bytes("gem-resnet-18", 2)
    norms = [m for m in MODELS["gem-resnet-18"]().modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert found["norms"] == sum(2 * 4 * norm.num_features + 8 for norm in norms)
    assert found["task"] > found["norms"] + 4 * 21 * 2
    assert found["mask"] > found["norms"] + sum(map(packed_bytes, layer_sizes("gem-resnet-18")))


# ---- the command ----------------------------------------------------------------------------------------------------

SMALL = """title: A small table
source: Nobody, 2026
storage:
  note: Of nothing.
  columns: [weights, mask_kb, masks, tasks, layers, alphas, phi, cost]
  rows:
    - {label: LeNet, network: lenet-300-100, masks: 2, printed: {weights: 266000, masks: 3, tasks: 10, alphas: 6, cost: 4.98}}
    - {label: deep, network: resnet-101, outputs: 1000, head: false, masks: 75, printed: {alphas: 7800}, note: much}
    - {label: large, printed: {weights: 137900000}}
"""


@pytest.fixture
def small(tmp_path, monkeypatch):
    (tmp_path / "tables" / "small").mkdir(parents=True)
    (tmp_path / "tables" / "small" / "table.yaml").write_text(SMALL)
    monkeypatch.setattr(tables, "TABLES", tmp_path / "tables")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "tables" / "small" / "table.yaml"


def test_the_command(small, capsys, tmp_path):
    assert main(["reproduce", "small"]) == 0
    text, out = capsys.readouterr().out, tmp_path / "runs" / "small"
    record = json.loads((out / "table.json").read_text())
    lenet, deep, large = record["rows"]
    assert lenet["ours"]["alphas"] == 6
    assert lenet["bank"]["phi"] == pytest.approx(0.2 * lenet["bank"]["mask_kb"] + lenet["bank"]["task_kb"])
    assert lenet["departures"] == {"masks": [3, 2]}
    assert (deep["bank"], deep["departures"], large["bank"]) == ({}, {}, {})
    assert record["environment"]["torch"] == torch.__version__
    line = next(line.split() for line in text.splitlines() if line.startswith("LeNet"))
    assert line[:6] == ["LeNet", "lenet-300-100", "266,200", "266,000", "65.0", "–"]
    assert line[6:13] == ["2", "3", "10", "10", "3", "6", "6"]
    assert line[15:17] == ["4.99", "4.98"]
    for written in (text, (out / "table.md").read_text()):
        assert "Erratum: LeNet: |M|: printed 3, while the rest of the row gives 2" in written
        assert "deep: much" in written
        assert "resnet-101, 1000 outputs" in written
    rows = list(csv.DictReader((out / "table.csv").open()))
    assert [row["row"] for row in rows] == ["LeNet", "deep", "large"]
    assert (rows[0]["masks"], rows[0]["printed_masks"], rows[2]["alphas"], rows[1]["printed_phi"]) == ("2", "3", "", "")
    assert float(rows[0]["cost"]) == lenet["ours"]["cost"]


def test_flags_of_runs_are_refused(small, capsys, tmp_path):
    (tmp_path / "file").write_text("")
    for argv, sentence in (
        (["--seeds", "1"], "small is computed and takes no flag but --out, got --seeds"),
        (["--cuda-graph"], "small is computed and takes no flag but --out, got --cuda-graph"),
        (["--out", "file/run"], "file/run: cannot be written (Not a directory)"),
    ):
        assert main(["reproduce", "small", *argv]) == 2
        assert sentence in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ("{label: a, networks: lenet}", "small/table.yaml: networks is no key of a row; known are label, printed, network"),
        ("{label: a, network: lenet, printed: {size: 3}}", "size is no key of a row"),
        ("{label: a, network: lenet-5}", "network must be one of mlp, "),
        ("{label: a, printed: {masks: 3}}", "a row should have a network, or printed weights"),
    ],
)
def test_a_wrong_row_is_named(row, sentence, small):
    small.write_text(SMALL + f"    - {row}\n")
    with pytest.raises(Refusal) as caught:
        read_rows(read_table("small"))
    assert sentence in str(caught.value)


def test_columns_are_numbers():
    for table in SHIPPED:
        assert set(read_table(table).storage["columns"]) <= set(NUMBERS)
        shown = set(read_table(table).storage["columns"])
        assert {name for row in read_rows(read_table(table)) for name in row.printed} <= shown


# ---- docs/impresslearn.md -------------------------------------------------------------------------------------------

PAGE = Path(__file__).parents[1] / "docs" / "impresslearn.md"


@pytest.mark.parametrize("table", SHIPPED)
def test_the_page_has_the_formulas_numbers(table, monkeypatch):
    """All columns but the measured ones, which the next test looks at."""
    monkeypatch.setattr(storage_tables, "bank_numbers", lambda row, ours: {})
    lines = PAGE.read_text().splitlines()
    for line in as_pipes(*lines_of(compute(read_table(table))))[2:]:
        assert sum(shown.startswith(line) for shown in lines) == 1


@cpu_only
@pytest.mark.long
@pytest.mark.parametrize("table", SHIPPED)
def test_the_page_has_the_banks_numbers(table):
    text = as_markdown(compute(read_table(table)))
    assert {line for line in text.splitlines() if line.startswith("|")} <= set(PAGE.read_text().splitlines())
