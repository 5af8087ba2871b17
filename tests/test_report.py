"""result.json, the summary over seeds, plots and the page."""

import json
import re
import time
from dataclasses import asdict, fields, replace

import pytest
from PIL import Image

from subnet_pipelines import Refusal, Result, report
from subnet_pipelines.report import (
    captioned,
    draw,
    finished,
    name_of,
    page,
    read_result,
    spread,
    summarise,
    write_run,
    write_seeds,
)

RESULT = Result(
    schema=1,
    method="some",
    benchmark="stream",
    scenario="GG",
    seed=1,
    config={"tasks": 3, "scenario": "GG", "lr": 0.1, "fidelity": "sound"},
    environment={"torch": "2"},
    seconds={"train": 1.0, "select": 0.25, "eval": 0.5, "total": 2.0},
    accuracy_matrix=[[90.0, None, None], [80.0, 88.0, None], [70.0, 92.0, 95.0]],
    diagonal=[90.0, 88.0, 95.0],
    final=[70.0, 92.0, 95.0],
    acc=257 / 3,
    bwt=-8.0,
    forgetting=8.0,
    fwt=None,
    task_inference=None,
    method_report={"note": "<b>"},
    capacity={
        "used_fraction_per_task": [0.1, 0.15, 0.2],
        "used_fraction": 0.2,
        "paper_cap": 26.9,
        "measured_cap": 25.0,
        "mask_bytes": 64,
        "bits_per_weight": 1.0,
    },
)


def test_what_is_written_is_what_is_read(tmp_path):
    write_run(RESULT, tmp_path)
    assert read_result(tmp_path / "result.json") == RESULT
    assert list(json.loads((tmp_path / "result.json").read_text())) == [f.name for f in fields(Result)]
    assert not list(tmp_path.glob(".*"))  # no temporary file is left
    for name in ("accuracy_matrix", "tasks", "used_fraction", "final"):
        with Image.open(tmp_path / f"{name}.png") as image:
            assert image.size == (460, 380)
            assert len(set(image.convert("L").tobytes())) > 20  # something is drawn


def test_the_page_is_self_contained(tmp_path):
    text = page("a <title>", [RESULT], captioned([RESULT], draw(RESULT, tmp_path)))
    assert text.count("data:image/png;base64,") == 4
    assert not re.search(r'(src|href)="?(http|/|\w+\.)', text)
    assert "a &lt;title&gt;" in text
    assert "<b>" not in text
    for number in ("85.67", "-8.00", "26.90", "0.20"):
        assert number in text
    assert name_of(RESULT) in text


def test_reuse_is_drawn_and_not_listed(tmp_path):
    layer = {"all": [0, 0.5, 0.25], "some": [0, 0, 0.25], "none": [1, 0.5, None]}
    pairs = [[1.0, 0.5, None], [0.5, 1.0, -0.1], [None, -0.1, 1.0]]
    found = {
        "masks": ["a", "b", "c"],
        "tasks": layer,
        "layers": {"one": layer, "two": layer},
        "overlap": None,
        "correlation": pairs,
        "pairs": {"layers": {"one": {"measured": 1.5, "expected": 1.0}}, "all": {"measured": 1.5, "expected": 1.0}},
    }
    reusing = replace(RESULT, method_report={"reuse": found})
    drawn = draw(reusing, tmp_path)
    assert {"reuse_tasks.png", "reuse_layers.png", "correlation.png", "overlap.png"} < {p.name for p in drawn}
    assert "&quot;expected&quot;" not in page("title", [reusing], captioned([reusing], drawn))
    found["correlation"], found["pairs"], found["layers"] = None, None, {f"a.long.layer.name.{i}": layer for i in range(20)}
    assert not {"correlation.png", "overlap.png"} & {p.name for p in draw(reusing, tmp_path)}
    one = {name: values[:1] for name, values in layer.items()}
    only = replace(RESULT, method_report={"reuse": {**found, "tasks": one, "layers": {"one": one}}})
    assert "reuse_layers.png" not in {p.name for p in draw(only, tmp_path)}


def test_recoveries_are_drawn(tmp_path):
    recovery = {
        "nearest": [0, 2, 2],
        "distance": {"a": [[5, 1, 0], [5, 4, 4], [6, 0, 0]], "b": [[7, 2, 1], [7, 7, 7], [3, 1, 0]]},
        "gains": 16,
    }
    found, seen = replace(RESULT, method_report={"recovery": recovery}), {}

    class Axes:
        def plot(self, way, style, label, **_):
            seen[label] = way, style

        def legend(self, **_):
            pass

    report._recoveries(Axes(), recovery)
    assert seen == {
        "task 0": ([12, 3, 1], "-"),
        "task 1, ends nearest to task 2": ([12, 11, 11], "--"),
        "task 2": ([9, 1, 0], "-"),
    }
    for seed in (1, 2):
        (tmp_path / f"seed-{seed}").mkdir()
        write_run(replace(found, seed=seed), tmp_path / f"seed-{seed}")
        assert (tmp_path / f"seed-{seed}" / "recovery.png").is_file()
    write_seeds([found, replace(found, seed=2)], tmp_path)
    assert (tmp_path / "report.html").read_text().count("data:image/png") == 5  # final accuracies; a matrix and recoveries a seed


def test_plots_are_quick(tmp_path):
    draw(RESULT, tmp_path)  # imports
    begun = time.process_time()
    draw(RESULT, tmp_path)
    assert time.process_time() - begun < 2


def test_plots_of_what_is_null(tmp_path):
    bare = replace(RESULT, accuracy_matrix=None, final=[None, 92.0, 95.0], capacity=None)
    assert [p.name for p in draw(bare, tmp_path)] == ["final.png"]


def test_long_streams_are_drawn(tmp_path):
    n = 60
    matrix = [[50.0 if j <= t else None for j in range(n)] for t in range(n)]
    begun = time.process_time()
    draw(replace(RESULT, accuracy_matrix=matrix, final=[50.0] * n), tmp_path)
    assert time.process_time() - begun < 3


def test_spread():
    assert spread([1.0, 2.0, 3.0]) == {"mean": 2.0, "std": 1.0}
    assert spread([1.0]) == {"mean": 1.0, "std": None}
    assert spread([1.0, None]) == spread([]) == {"mean": None, "std": None}


def test_summary_over_seeds(tmp_path):
    second = replace(RESULT, seed=2, acc=80.0, bwt=-10.0)
    summary = write_seeds([RESULT, second], tmp_path)
    assert summary == json.loads((tmp_path / "summary.json").read_text())
    assert summary["seeds"] == [1, 2]
    assert summary["bwt"] == {"mean": -9.0, "std": pytest.approx(2**0.5)}
    assert summary["task_inference"] == {"mean": None, "std": None}
    assert summary["measured_cap"]["std"] == 0
    assert "seed 2" in (tmp_path / "report.html").read_text()
    stamp = (tmp_path / "report.html").stat().st_mtime_ns
    write_seeds([RESULT, second], tmp_path)
    assert (tmp_path / "report.html").stat().st_mtime_ns == stamp
    assert summarise([RESULT])["acc"] == {"mean": RESULT.acc, "std": None}
    elsewhere = replace(second, environment={"torch": "2", "commit": "abc"})
    assert summarise([RESULT, second])["environment"] == {"torch": "2"}
    assert summarise([RESULT, elsewhere])["environment"] == {"torch": "2", "commit": [None, "abc"]}


@pytest.mark.parametrize("text", ["", "[]", '{"schema": 9}', '{"schema": 1}'])
def test_foreign_results_are_refused(text, tmp_path):
    (tmp_path / "result.json").write_text(text)
    with pytest.raises(Refusal, match=r"result\.json: is no result of this version"):
        read_result(tmp_path / "result.json")


def test_finished(tmp_path):
    record = {"method": "some", "benchmark": "stream", "seed": 1, **RESULT.config}
    assert finished(tmp_path, record) is None
    (tmp_path / "result.json").write_text(json.dumps(asdict(RESULT)))
    assert finished(tmp_path, record) == RESULT
    assert finished(tmp_path, {**record, "tasks": 4}) is None
    assert finished(tmp_path, {**record, "fidelity": "code"}) == RESULT
    with pytest.raises(Refusal, match=r"another config: lr was 0\.1, is 0\.2"):
        finished(tmp_path, {**record, "lr": 0.2})
    with pytest.raises(Refusal, match="method was 'some', is 'other'"):
        finished(tmp_path, {**record, "method": "other"})
