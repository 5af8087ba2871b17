"""The GPU check and its timing, as far as a machine without a GPU can tell: parts, resumption, limits, and the order of timed calls."""

import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from device import cpu_only

BENCH = Path(__file__).resolve().parents[1] / "bench"
pytestmark = cpu_only


@pytest.fixture
def bench(monkeypatch, tmp_path):
    """Imports modules of bench/, with results and outcomes in folders of the test's own."""
    monkeypatch.syspath_prepend(str(BENCH))
    names = ("measure", "figures", "on_cuda", "gpu_check", "readme")
    for name in names:
        monkeypatch.delitem(sys.modules, name, raising=False)
    modules = SimpleNamespace(**{name: importlib.import_module(name) for name in names})
    monkeypatch.setattr(modules.measure, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(modules.gpu_check, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(modules.gpu_check, "FOLDER", tmp_path / "gpu-check")
    yield modules
    for name in names:
        sys.modules.pop(name, None)


# ---------------------------------------------------------------------------------------------------------------- timing


class Clock:
    """A device whose calls take what they say; events read it, and a flush shows in it."""

    def __init__(self):
        self.now, self.flushes = 0.0, 0

    def event(self, enable_timing=False):
        event = SimpleNamespace()
        event.record = lambda: setattr(event, "at", self.now)
        event.synchronize = lambda: None
        event.elapsed_time = lambda other: (other.at - event.at) / 1e3
        return event

    def flush(self):
        self.flushes += 1
        self.now += 100.0

    def takes(self, microseconds):
        def call():
            self.now += microseconds

        return call


@pytest.fixture
def device(bench, monkeypatch):
    clock = Clock()
    monkeypatch.setattr(torch.cuda, "Event", clock.event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: SimpleNamespace(total_memory=1 << 40))
    monkeypatch.setattr(bench.on_cuda, "flush", clock.flush)
    monkeypatch.setattr(bench.on_cuda, "on_the_host", lambda go: (go(), 7.0)[1])
    return clock


def test_a_captured_call_is_replayed_behind_a_cold_cache(bench, device, monkeypatch):
    monkeypatch.setattr(bench.on_cuda, "capture", lambda call, pool: SimpleNamespace(replay=device.takes(20.0)))
    times = bench.on_cuda.measure({"ours": device.takes(50.0)}, 0, 3, 4, 2, ())
    low, median, calls, how, eager = times["ours"]
    assert (how, calls, eager) == ("graph", 12, 7.0)
    assert low == median == pytest.approx(20.0)  # not the flush, and not the launch
    assert device.flushes == calls


def test_what_cannot_be_captured_is_timed_as_it_is(bench, device, monkeypatch):
    monkeypatch.setattr(bench.on_cuda, "capture", lambda call, pool: None)
    times = bench.on_cuda.measure({"ours": device.takes(50.0), "step": device.takes(9.0)}, 0, 3, 4, 2, {"step"})
    assert times["ours"][:4] == (pytest.approx(50.0), pytest.approx(50.0), 12, "events")
    assert times["step"] == (7.0, 7.0, 12, "host", None)


def test_a_call_that_waits_is_not_captured(bench, monkeypatch):
    modes = [0]
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    def waiting():
        assert modes[-1] == "error"
        raise RuntimeError("called a synchronizing CUDA operation")

    assert bench.on_cuda.capture(waiting, (0, 1)) is None
    assert modes == [0, "error", 0]
    assert not bench.on_cuda.waits(lambda: None)


def test_slow_calls_are_few(bench, device, monkeypatch):
    monkeypatch.setattr(bench.on_cuda, "capture", lambda call, pool: pytest.fail("a call of 150 ms is not captured"))
    monkeypatch.setattr(bench.on_cuda, "on_the_host", lambda go: (go(), 150e3)[1])
    times = bench.on_cuda.measure({"kthvalue": device.takes(150e3)}, 0, 5, 4, 2, ())
    assert times["kthvalue"][2:] == (2, "events", None)


def test_the_default_device_comes_back(bench, device, monkeypatch):
    seen = []
    monkeypatch.setattr(torch, "get_default_device", lambda: torch.device("meta"))
    monkeypatch.setattr(torch, "set_default_device", seen.append)
    with pytest.raises(ZeroDivisionError):
        bench.on_cuda.measure({"broken": lambda: 1 / 0}, 0, 1, 1, 1, ())
    assert seen == [None, torch.device("meta")]


# --------------------------------------------------------------------------------------------------- results and targets


@pytest.fixture
def on_a_card(bench, monkeypatch):
    monkeypatch.setattr(bench.measure, "DEVICE", "cuda")
    monkeypatch.setattr(bench.on_cuda, "copy_rate", lambda: 3e6)
    card = {"model": "NVIDIA H0 80GB", "multiprocessors": 132, "driver": "1.2", "cuda": "13.0", "copy_gb_per_s": 3000.0}
    monkeypatch.setattr(bench.on_cuda, "machine", lambda: card)
    return bench


def test_rows_of_a_card(on_a_card, capsys):
    measure, figures = on_a_card.measure, on_a_card.figures
    timing = lambda us, how="graph": measure.Timing(us, us * 1.1, 12, how, us + 5)  # noqa: E731
    times = {"select": timing(10.0), "sort (SupSup)": timing(300.0), "topk, compare": timing(5.0, "events")} | measure.floor(3e7)
    assert times["floor: the bytes at copy speed"].min == pytest.approx(10.0)
    targets = {"sort (SupSup)": 40, "topk, compare": 0.4, "floor: the bytes at copy speed": 1 / 1.6}
    measure.report("select", "cold", times, "select", targets)
    printed = capsys.readouterr().out
    assert "MISS of 40x" in printed
    assert "met 0.4x" in printed
    (path,) = measure.RESULTS.glob("*.json")
    assert path.name == "nvidia-h0-80gb.json"
    rows = {row["name"]: row for row in json.loads(path.read_text())["rows"]}
    assert (rows["select"]["threads"], rows["select"]["timed"], rows["select"]["eager"]) == (0, "graph", 15.0)
    assert rows["topk, compare"]["timed"] == "events"
    assert "eager" not in rows["floor: the bytes at copy speed"]
    (group,) = figures.groups(list(rows.values()))
    assert group.where == ""
    assert figures.misses([group]) == ["MISS select, cold: sort (SupSup) takes 30 of ours, target 40"]
    text = figures.table([group])
    assert "30 x  sort (SupSup)  <- MISS of 40" in text
    assert "topk, compare  <- LOSS" in text


def test_a_page_with_a_card(on_a_card, monkeypatch, tmp_path):
    measure, readme = on_a_card.measure, on_a_card.readme
    times = {"select": measure.Timing(10.0, 10.0, 4, "graph"), "sort (SupSup)": measure.Timing(300.0, 300.0, 4, "graph")}
    measure.record("select", "cold", times, targets={"sort (SupSup)": 40})
    monkeypatch.setattr(readme, "HERE", tmp_path)
    page = readme.tables()
    assert "NVIDIA H0 80GB, driver 1.2, CUDA 13.0" in page
    assert "| `select` | cold | 10.0 | – | sort (SupSup) 30 [target 40] |" in page
    assert "`select`" not in readme.tables(some=True)  # of its cases another one is in the README


def test_sizes_and_gates_follow_the_device(on_a_card):
    assert on_a_card.measure.sizes([1], [2]) == [2]
    assert not on_a_card.measure.on_cpu()
    assert on_a_card.measure.only_on("cpu").args == (True,)
    assert on_a_card.measure.only_on("cuda").args == (False,)


# ------------------------------------------------------------------------------------------------------------------ parts


def ended(check, *arguments):
    """Runs parts; (exit status, {part: how it ended})."""
    status = check.main(list(arguments))
    return status, {p.stem: json.loads(p.read_text()) for p in check.FOLDER.glob("*.json")}


def test_without_a_gpu_every_part_says_so(bench, monkeypatch, capsys):
    check = bench.gpu_check
    monkeypatch.setattr(check, "load", lambda seconds: check.Outcome("load", "failed", "no CUDA device here"))
    monkeypatch.setitem(check.PARTS, "load", (check.load, 1.0))
    status, outcomes = ended(check)
    assert status == 1
    assert list(check.PARTS) == ["load", "graph", "tests", "sanitize", "bench", "table"]
    assert {part: o["outcome"] for part, o in outcomes.items()} == dict.fromkeys(check.PARTS, "skipped") | {"load": "failed"}
    for part in ("graph", "tests", "sanitize", "bench"):
        assert "no CUDA device here" in outcomes[part]["note"]
    assert "no file of a GPU" in outcomes["table"]["note"]
    assert "no CUDA device here" in capsys.readouterr().out


def test_a_part_that_passed_is_not_run_again(bench, monkeypatch, tmp_path):
    check, runs = bench.gpu_check, []

    def part(name, outcome):
        return lambda seconds: (runs.append(name), check.Outcome(name, outcome, "said"))[1]

    def broken(seconds):
        runs.append("sanitize")
        raise OSError("the tool is gone")

    monkeypatch.setattr(
        check, "PARTS", {"graph": (part("graph", "failed"), 1), "sanitize": (broken, 1), "tests": (part("tests", "passed"), 1)}
    )
    status, outcomes = ended(check, "--copy-to", str(tmp_path / "out"))
    assert status == 1
    assert runs == ["graph", "sanitize", "tests"]  # neither a failure nor an exception stopped the others
    assert outcomes["sanitize"]["note"] == "OSError: the tool is gone"
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["logs.txt", "outcomes.json"]
    ended(check)
    assert runs[3:] == ["graph", "sanitize"]
    ended(check, "--only", "tests", "--again")
    assert runs[5:] == ["tests"]
    monkeypatch.setattr(check, "sources", lambda: "others")
    ended(check, "--only", "tests")
    assert runs[6:] == ["tests"]
    with pytest.raises(SystemExit):
        check.main(["--only", "test"])


def test_a_command_that_hangs_ends_at_its_limit(bench):
    check = bench.gpu_check
    check.FOLDER.mkdir()
    status, output = check.run("load", [sys.executable, "-c", "import time; print('begun', flush=True); time.sleep(60)"], 1.5)
    assert status is None
    assert "begun" in output
    assert "begun" in (check.FOLDER / "load.log").read_text()


def test_what_pytest_says_is_read(bench, tmp_path):
    check = bench.gpu_check
    check.FOLDER.mkdir()
    file = tmp_path / "test_some.py"
    file.write_text("def test_good(): pass\ndef test_bad(): assert 0\ndef test_worse(absent): pass\n")
    outcome = check.pytest("tests", [str(file), "--rootdir", str(tmp_path)], 60)
    assert outcome.outcome == "failed"
    assert outcome.note.startswith("1 failed, 1 passed, 1 error in")
    assert [name.split("::")[1] for name in outcome.details] == ["test_bad", "test_worse"]
    file.write_text("def test_good(): pass\n")
    assert check.pytest("tests", [str(file)], 60).outcome == "passed"


def test_lists_name_what_there_is(bench):
    check = bench.gpu_check
    assert all((BENCH.parent / "tests" / f"test_{name}.py").exists() for name in check.TESTS)
    assert len(check.sources()) == 16
