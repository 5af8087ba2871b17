"""The command line: what it runs, how settings are laid over one another, and one sentence for everything that is wrong."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import typing
from dataclasses import dataclass, fields, make_dataclass, replace
from pathlib import Path
from typing import Literal

import pytest
import torch
from test_benchmarks import small_mnist

import subnet_pipelines
from subnet_pipelines import BENCHMARKS, METHODS, Refusal, RunConfig, cli
from subnet_pipelines.bounds import (
    Count,
    Fraction,
    NotNegative,
    Part,
    Positive,
    Several,
    Share,
    Whole,
    bounds_of,
    check_bounds,
)
from subnet_pipelines.cli import main
from subnet_pipelines.config import CONFIGS, Settings, convert, sentences

BASE = ["train", "finetune", "--benchmark", "permuted-mnist-mini"]
QUICK = [*BASE, "--tasks", "2", "--iterations", "20", "--select", "last"]


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    """An empty working folder, one thread, no network."""
    import pooch

    def offline(*_args, **_fields):
        raise OSError("no network")

    monkeypatch.setattr(pooch, "retrieve", offline)
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def command(capsys, *argv):
    code = main([str(a) for a in argv])
    out, err = capsys.readouterr()
    return code, out, err


def test_a_run_of_two_seeds_from_start_to_finish(capsys, tmp_path):
    out = tmp_path / "runs" / "two"
    code, text, err = command(capsys, *QUICK, "--seeds", "1,2", "--out", out)
    assert (code, err) == (0, "")
    assert "seed 2: row 1" in text
    assert str(out / "report.html") in text
    for seed in (1, 2):
        folder = out / f"seed-{seed}"
        assert {p.name for p in folder.iterdir()} >= {"result.json", "metrics.jsonl", "checkpoint", "report.html", "final.png"}
        result = json.loads((folder / "result.json").read_text())
        assert result["seed"] == seed
        assert result["config"]["iterations"] == 20
        assert result["config"]["fidelity"] == "sound"
        assert result["accuracy_matrix"][0][1] is None
    summary = json.loads((out / "summary.json").read_text())
    assert summary["seeds"] == [1, 2]
    assert summary["acc"]["std"] > 0

    files = {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file()}
    code, _, err = command(capsys, *QUICK, "--seeds", "1,2", "--out", out)
    assert (code, err) == (
        2,
        f"subnet-kernels: {out}/seed-1: holds a run already; add --resume to go on with it, or choose another --out\n",
    )
    code, _, err = command(capsys, *QUICK, "--seeds", "1,2", "--out", out, "--resume")
    assert (code, err) == (0, "")
    code, _, err = command(capsys, *QUICK, "--seeds", "1", "--out", out, "--resume", "--lr", "0.01")
    assert (code, err) == (2, f"subnet-kernels: {out}/seed-1: was made with another config: lr was 0.001, is 0.01\n")
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file()} == files


def test_the_default_folder_is_named_after_the_config(capsys, tmp_path):
    assert command(capsys, *QUICK)[0] == 0
    name = f"finetune-permuted-mnist-mini-{Settings('finetune', 'permuted-mnist-mini').resolve(None, settings_of(QUICK)).hash()}"
    assert [p.name for p in (tmp_path / "runs").iterdir()] == [name]


def settings_of(argv):
    flags = argv[4:]
    return {k[2:].replace("-", "_"): v for k, v in zip(flags[::2], flags[1::2])}


BAD = {
    "unknown method": (
        ["train", "finetun", "--benchmark", "permuted-mnist-mini"],
        "method 'finetun' is unknown; did you mean finetune?",
    ),
    "unknown benchmark": (["train", "finetune", "--benchmark", "permuted-mnst"], "did you mean permuted-mnist?"),
    "no benchmark": (["train", "finetune"], "the following arguments are required: --benchmark"),
    "no method": (["train"], "the following arguments are required: METHOD"),
    "unknown command": (["trian"], "invalid choice: 'trian'"),
    "unknown flag": ([*BASE, "--epoch", "3"], "--epoch is no flag of finetune on permuted-mnist-mini; did you mean --epochs?"),
    "unknown flag, equals": ([*BASE, "--batchsize=3"], "did you mean --batch-size?"),
    "another's flag": (
        [*BASE, "--angles", "3"],
        "--angles does not apply to finetune on permuted-mnist-mini; it is a setting of rotated",
    ),
    "another method's flag": (
        [*BASE, "--density", ".1"],
        "--density does not apply to finetune on permuted-mnist-mini; it is a",
    ),
    "stray word": ([*BASE, "fast"], "unexpected 'fast'"),
    "int": ([*BASE, "--epochs", "3.5"], "epochs must be a whole number, got '3.5'"),
    "float": ([*BASE, "--lr", "fast"], "lr must be a number, got 'fast'"),
    "nan": ([*BASE, "--lr", "nan"], "lr must be a number, finite, got 'nan'"),
    "bool": ([*BASE, "--eval-future", "perhaps"], "eval_future must be true or false, got 'perhaps'"),
    "choice": ([*BASE, "--select", "median"], "select must be one of last, best, got 'median'"),
    "list": (["train", "finetune", "--benchmark", "rotated-mnist-mini", "--angles", "1,x"], "angles must be a number, got '1,x'"),
    "range": ([*BASE, "--epochs", "0"], "epochs must be at least 1, got 0"),
    "density 0": (["train", "wsn", "--benchmark", "permuted-mnist-mini", "--density", "0"], "density must be in (0, 1], got 0.0"),
    "density 2": (["train", "wsn", "--benchmark", "permuted-mnist-mini", "--density", "2"], "density must be in (0, 1], got 2.0"),
    "both lengths": (
        [*BASE, "--epochs", "2", "--iterations", "5"],
        "epochs and iterations both say how long the main phase is; give one",
    ),
    "no value": ([*BASE, "--epochs"], "argument --epochs: expected one argument"),
    "scenario": ([*BASE, "--scenario", "GNu"], "finetune serves scenario GG and GNs, not GNu of permuted-mnist-mini"),
    "no scenario": ([*BASE, "--scenario", "NNu"], "scenario NNu is none (SupSup's table 1)"),
    "another's scenario": (
        ["train", "supsup", "--benchmark", "permuted-mnist-mini", "--scenario", "NNs"],
        "supsup serves scenario GG and GNs and GNu, not NNs of permuted-mnist-mini; for NNs train nns",
    ),
    "seeds": ([*BASE, "--seeds", "1,a"], "--seeds must be whole numbers, as in 1,2,3, got '1,a'"),
    "same seeds": ([*BASE, "--seeds", "1,1"], "--seeds must be different numbers"),
    "device": ([*BASE, "--device", "tpu"], "--device must be auto, cpu or cuda, got 'tpu'"),
    "fidelity": ([*BASE, "--fidelity", "exact"], "fidelity must be one of sound, code, paper, got 'exact'"),
    "no config": ([*BASE, "--config", "absent.yaml"], "absent.yaml: cannot be read (No such file or directory)"),
    "no data": (
        ["train", "finetune", "--benchmark", "permuted-mnist", "--data-dir", "absent"],
        "absent/mnist lacks train-images-idx3-ubyte.gz",
    ),
    "unknown bench": (["bench", "--only", "selct"], "--only 'selct' is no benchmark; did you mean select?"),
    "bench threads": (["bench", "--threads", "two"], "--threads must be whole numbers, as in 1,2, got 'two'"),
    "no bench threads": (["bench", "--threads", "0,1"], "--threads must be different numbers from 1 to 1024, got 0,1"),
    "bench flag": (["bench", "--fast"], "unrecognized arguments: --fast"),
    "demo seed": (["demo", "--seed", "x"], "--seed must be whole numbers"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_gets_a_sentence(name, capsys, tmp_path):
    argv, sentence = BAD[name]
    before = set(tmp_path.rglob("*"))
    code, out, err = command(capsys, *argv)
    assert code == 2
    assert out == ""
    assert sentence in err
    assert err.startswith("subnet-kernels: ")
    assert err.count("\n") == 1
    assert set(tmp_path.rglob("*")) == before


def test_an_unwritable_folder(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    code, _, err = command(capsys, *QUICK, "--out", tmp_path / "file" / "run")
    assert (code, err) == (2, f"subnet-kernels: {tmp_path}/file/run/seed-1: cannot be written (Not a directory)\n")


def test_truncated_data(capsys, tmp_path):
    small_mnist(tmp_path / "mnist")
    images = tmp_path / "mnist" / "train-images-idx3-ubyte.gz"
    images.write_bytes(images.read_bytes()[:500])
    argv = ["train", "finetune", "--benchmark", "permuted-mnist", "--data-dir", tmp_path, "--out", tmp_path / "run"]
    code, _, err = command(capsys, *argv)
    assert code == 2
    assert err.startswith(f"subnet-kernels: {images}: is damaged or cut short")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("densty: 0.1", "densty is no setting of wsn on permuted-mnist-mini; did you mean density?"),
        ("angles: [1]", "angles does not apply to wsn on permuted-mnist-mini"),
        ("density: yes", "density must be a number, got True"),
        ("epochs: 2.0", "epochs must be a whole number, got 2.0"),
        ("- 1", "should hold settings as `name: value`, holds a list"),
        ("a: [", "is no YAML"),
        ("method: supsup", "is for another method than wsn"),
    ],
)
def test_bad_config_files(text, sentence, capsys, tmp_path):
    (tmp_path / "c.yaml").write_text(text)
    code, _, err = command(capsys, "train", "wsn", "--benchmark", "permuted-mnist-mini", "--config", "c.yaml")
    assert code == 2
    assert err.startswith("subnet-kernels: c.yaml: ")
    assert sentence in err
    assert err.count("\n") == 1


def test_help_lists_the_settings_with_the_recipes_defaults(capsys):
    with pytest.raises(SystemExit):
        main([*BASE, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "--head X A head of its own for each task, or one for all. (default shared)" in text
    assert "--val-fraction X Share of the training rows" in text


def test_no_traceback_and_exit_code_of_the_process():
    done = subprocess.run(
        [sys.executable, "-m", "subnet_pipelines.cli", *BASE, "--epochs", "x"], capture_output=True, text=True, env=child()
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == "subnet-kernels: epochs must be a whole number, got 'x'"
    assert "Traceback" not in done.stderr


def child():
    root = Path(subnet_pipelines.__file__).parent.parent
    return {**os.environ, "PYTHONPATH": f"{root}:{root.parent}", "OMP_NUM_THREADS": "1"}


def test_sigterm_then_resume(capsys, tmp_path):
    argv = [*BASE, "--tasks", "2", "--epochs", "2", "--out", str(tmp_path / "run")]
    process = subprocess.Popen(
        [sys.executable, "-m", "subnet_pipelines.cli", *argv], stderr=subprocess.PIPE, text=True, env=child()
    )
    metrics = tmp_path / "run" / "seed-1" / "metrics.jsonl"
    limit = time.monotonic() + 60
    while not metrics.exists() and time.monotonic() < limit:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    err = process.communicate(timeout=60)[1]
    assert process.returncode == 128 + signal.SIGTERM
    assert "--resume goes on from there" in err
    assert not (tmp_path / "run" / "seed-1" / "result.json").exists()
    assert command(capsys, *argv, "--resume")[0] == 0
    assert command(capsys, *argv[:-1], tmp_path / "whole")[0] == 0
    broken, whole = (json.loads((tmp_path / n / "seed-1" / "result.json").read_text()) for n in ("run", "whole"))
    assert broken["accuracy_matrix"] == whole["accuracy_matrix"]
    assert metrics.read_text() == (tmp_path / "whole" / "seed-1" / "metrics.jsonl").read_text()


# ---- benchmarks -----------------------------------------------------------------------------------------------------

TINY = """
import time
from measure import measure, record, targets_on
def bench_tiny(thread_count):
    steps = {"ours": lambda: time.sleep(0.002), "fast": lambda: None, "slow": lambda: time.sleep(0.05)}
    targets = targets_on(thread_count, {"fast": 2, "slow": 2}, {"slow": 1e9})
    record("tiny_", "sleep", measure(steps, seconds=0, rounds=2), targets=targets)
    assert thread_count != 2, "a wrong result"
"""


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A source checkout with the house's way to measure and one small benchmark."""
    source = tmp_path / "checkout"
    (source / "bench").mkdir(parents=True)
    for name in ("conftest.py", "figures.py", "measure.py"):
        shutil.copy(cli.SOURCE / "bench" / name, source / "bench")
    (source / "bench" / "bench_tiny.py").write_text(TINY)
    (source / "bench" / "bench_broken.py").write_text("raise RuntimeError")  # not imported where another one is asked for
    monkeypatch.setattr(cli, "SOURCE", source)
    return source


def test_bench_runs_and_draws(capfd, checkout, tmp_path):
    code, out, _ = command(capfd, "bench", "--only", "tiny", "--threads", "1", "--out", "drawn")
    assert code == 0
    (name,) = [p.name for p in (checkout / "bench" / "results").glob("*.json")]
    rows = json.loads((checkout / "bench" / "results" / name).read_text())["rows"]
    times = {row["name"]: row["min"] for row in rows}
    assert {(row["bench"], row["case"], row["threads"]) for row in rows} == {("tiny_", "sleep", 1)}
    text = " ".join(out.split())
    assert f"tiny_, sleep, 1 thread: ours {times['ours']:,.1f} us" in text
    assert f"{times['slow'] / times['ours']:.0f} x slow /" in text  # no loss; the drawings follow
    assert "x fast <- LOSS <- MISS of 2" in text
    assert {row["name"]: row.get("target") for row in rows} == {"ours": None, "fast": 2, "slow": 2}
    assert "MISS tiny_, sleep: fast takes" in text
    assert "MISS tiny_, sleep: slow" not in text
    assert str(tmp_path / "drawn" / "tiny.png") in text
    assert (tmp_path / "drawn" / "tiny.png").read_bytes().startswith(b"\x89PNG")


def test_bench_tells_by_its_code_that_a_result_is_wrong(capfd, checkout):
    code, out, _ = command(capfd, "bench", "--only", "tiny", "--threads", "1,2")
    assert code == 1
    assert "a wrong result" in out
    assert "tiny_, sleep, 2 threads: ours" in out
    assert (checkout / "bench" / "results" / "tiny.png").exists()


def test_bench_needs_a_checkout(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(cli, "SOURCE", tmp_path)
    code, out, err = command(capsys, "bench")
    assert (code, out) == (2, "")
    assert (
        err == f"subnet-kernels: bench needs a source checkout, whose benchmarks would lie in {tmp_path}/bench; there are none\n"
    )


def test_bench_needs_what_it_measures_with(capsys, monkeypatch):
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: None if name == "pytest" else object())
    code, _, err = command(capsys, "bench")
    assert (code, err) == (2, "subnet-kernels: bench needs pytest, which is not installed: pip install pytest\n")


# ---- settings -------------------------------------------------------------------------------------------------------


def test_layers_lie_in_order(tmp_path, monkeypatch):
    method, benchmark = METHODS["finetune"], BENCHMARKS["permuted-mnist-mini"]
    monkeypatch.setattr(method, "FIDELITY", {"sound": {}, "code": {"lr": 0.3, "patience": 3, "head": "shared"}, "paper": {}})
    monkeypatch.setattr("subnet_pipelines.config.CONFIGS", tmp_path)
    (tmp_path / "finetune").mkdir()
    recipe = "lr: 0.2\nmodel: fc-1024\nexpected: {acc: [1, 2]}\nsource: nobody\nfidelity: {code: {lr_min: 0.1, patience: 2}}\n"
    (tmp_path / "finetune" / "permuted-mnist-mini.yaml").write_text(recipe)
    (tmp_path / "c.yaml").write_text("fidelity: code\npatience: 4\nhead: shared\nval-fraction: 0.2\n")
    found = Settings("finetune", "permuted-mnist-mini").resolve(tmp_path / "c.yaml", {"head": "per-task", "tasks": "7"})
    default = method.Config()
    assert found.values["batch_size"] == default.batch_size  # dataclass
    assert found.values["model"] == "fc-1024"  # recipe over dataclass
    assert found.values["lr"] == 0.3  # preset over recipe
    assert found.values["lr_min"] == 0.1  # the recipe's part of the preset
    assert found.values["patience"] == 4  # file over preset
    assert found.values["val_fraction"] == 0.2
    assert found.values["head"] == "per-task"  # flag over file
    assert found.values["tasks"] == 7
    assert found.fidelity == "code"
    assert Settings("finetune", "permuted-mnist-mini").resolve().values["lr_min"] == default.lr_min
    assert Settings("finetune", "permuted-mnist-mini").resolve(tmp_path / "c.yaml", {}, "sound").values["lr"] == 0.2
    assert [type(c) for c in found.build()] == [method.Config, benchmark.Config, RunConfig]


def test_epochs_and_iterations_replace_each_other(tmp_path):
    settings = Settings("supsup", "permuted-mnist-mini")
    assert settings.values["iterations"] is not None
    assert settings.resolve(None, {"epochs": "2"}).values["iterations"] is None
    assert Settings("supsup", "permuted-mnist-mini").resolve(None, {"iterations": "5"}).values["iterations"] == 5
    values = Settings("supsup", "permuted-mnist-mini").resolve(None, {"epochs": "2", "iterations": "null"}).values
    assert (values["epochs"], values["iterations"]) == (2, None)


def test_a_list_of_angles_is_the_stream():
    assert Settings("finetune", "rotated-mnist-mini").resolve(None, {"angles": "0,5,90"}).values["tasks"] == 3
    assert Settings("finetune", "rotated-mnist-mini").resolve(None, {"angles": "0,5,90", "tasks": "2"}).values["tasks"] == 2


def test_the_hash_names_what_matters():
    def hash_of(**flags):
        return Settings("finetune", "permuted-mnist-mini").resolve(None, flags).hash()

    assert hash_of() == hash_of(tasks="9") == hash_of(lr="1e-3")
    assert hash_of() != hash_of(lr="1e-4")


@pytest.mark.parametrize(
    ("value", "kind", "expected"),
    [
        ("3", int, 3),
        (3, float, 3.0),
        ("1e-3", float, 1e-3),
        ("true", bool, True),
        (False, bool, False),
        ("null", int | None, None),
        ("4", int | None, 4),
        ("1,2.5", list[float], [1.0, 2.5]),
        ([1, 2], list[int], [1, 2]),
        ("b", Literal["a", "b"], "b"),
        ("x", str, "x"),
    ],
)
def test_convert(value, kind, expected):
    found = convert(value, kind)
    assert found == expected
    assert type(found) is type(expected)


@pytest.mark.parametrize(
    ("value", "kind"), [(True, int), (1.0, int), (1, bool), (1, str), ([1], float), (True, float), ("inf", float)]
)
def test_convert_refuses(value, kind):
    with pytest.raises(ValueError):
        convert(value, kind)


@pytest.mark.parametrize("recipe", sorted(p.relative_to(CONFIGS) for p in CONFIGS.glob("*/*.yaml")), ids=str)
@pytest.mark.parametrize("fidelity", ["sound", "code", "paper"])
def test_every_recipe_resolves(recipe, fidelity):
    Settings(recipe.parent.name, recipe.stem).resolve(None, {}, fidelity)


@pytest.mark.parametrize("name", [*METHODS, *BENCHMARKS])
def test_every_field_has_a_sentence_and_every_preset_its_fields(name):
    cls = {**METHODS, **BENCHMARKS}[name]
    assert cls.name == name
    names = {f.name for f in fields(cls.Config)}
    assert all(sentences(cls.Config).get(n, "").endswith(".") for n in names)
    assert set(cls.FIDELITY) == {"sound", "code", "paper"}
    assert all(set(preset) <= names for preset in cls.FIDELITY.values())


@pytest.mark.parametrize("name", [*METHODS, *BENCHMARKS])
def test_every_bound_is_kept(name):
    config = ({**METHODS, **BENCHMARKS}[name]).Config()
    config.check()
    bounded = {
        field: bound
        for cls in reversed(type(config).__mro__)
        for field, kind in typing.get_type_hints(cls, include_extras=True).items()
        for bound, _ in bounds_of(kind, -1)
    }
    assert {"epochs", "batch_size"} <= bounded.keys() or {"tasks", "val_fraction"} <= bounded.keys()
    for field, bound in bounded.items():
        with pytest.raises(Refusal, match=f"{field} must {re.escape(bound.must)}, got -1"):
            replace(config, **{field: -1}).check()


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        (Count, 1, 0),
        (Several, 2, 1),
        (Whole, 0, -1),
        (Positive, 1e-9, 0.0),
        (NotNegative, 0.0, -1e-9),
        (Share, 1.0, 0.0),
        (Share, 1e-9, 1.1),
        (Part, 0.5, 1.0),
        (Part, 0.5, 0.0),
        (Fraction, 0.0, 1.0),
        (Fraction, 0.9, -0.1),
        (Positive | None, None, 0.0),
        (Share | dict[str, Share], 0.1, {"a": 0.1, "*": 0.0}),
        (list[Count] | None, [1, 2], [1, 0]),
    ],
)
def test_a_bound_holds_where_its_type_says_so(kind, good, bad):
    config = make_dataclass("Config", [("field", kind)], frozen=True)
    check_bounds(config(good))
    with pytest.raises(Refusal, match="field must"):
        check_bounds(config(bad))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("stream", BENCHMARKS)
def test_no_field_stands_twice(method, stream):
    assert Settings(method, stream).types


def test_two_configs_with_one_field_are_a_mistake_of_ours(monkeypatch):
    @dataclass(frozen=True)
    class Twice(METHODS["finetune"].Config):
        tasks: int = 3

    monkeypatch.setattr(METHODS["finetune"], "Config", Twice)
    with pytest.raises(TypeError, match="field tasks stands in two configs"):
        Settings("finetune", "permuted-mnist-mini")


def test_refusals_are_value_errors():
    assert issubclass(Refusal, ValueError)
