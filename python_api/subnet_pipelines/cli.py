"""The command line: subnet-kernels demo | train METHOD --benchmark NAME | evaluate RUN | reproduce TABLE | bench | bank | info."""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from subnet_pipelines.errors import Refusal

SOURCE = Path(__file__).resolve().parents[2]  # of the checkout, where this is one
SHARED = ("benchmark", "data_dir", "device", "seeds", "out", "resume", "config", "fidelity", "help")


class Parser(argparse.ArgumentParser):
    """argparse whose errors are our one sentence."""

    def error(self, message: str) -> Any:
        raise Refusal(message)


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns the exit code: 0, 2 for what was refused, 128 + the signal for what was interrupted."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        return command(argv)
    except Refusal as error:
        print(f"subnet-kernels: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def command(argv: list[str]) -> int:
    """Run the command that the words name; returns the exit code. Raises Refusal."""
    parser = Parser("subnet-kernels", description="One neural backbone, thousands of tasks, one bit per weight and task.")
    parser.add_argument(
        "command",
        choices=("demo", "train", "evaluate", "reproduce", "bench", "bank", "info"),
        help="what to do; each has its own --help",
    )
    if not argv or argv[0] in ("-h", "--help"):
        parser.print_help()
        return 0
    name = parser.parse_args(argv[:1]).command
    commands = {
        "demo": demo,
        "train": train,
        "evaluate": evaluate,
        "reproduce": reproduce,
        "bench": bench,
        "bank": bank,
        "info": info,
    }
    return commands[name](argv[1:])


def info(argv: list[str]) -> int:
    """What is active on this machine, and why the rest is not."""
    Parser("subnet-kernels info", description=info.__doc__).parse_args(argv)
    from subnet_kernels.info import report

    print(report())
    return 0


def demo(argv: list[str]) -> int:
    """Train the methods side by side on a few tasks of the shipped images, in about a minute."""
    parser = Parser("subnet-kernels demo", description=demo.__doc__, allow_abbrev=False)
    parser.add_argument("--seed", default="1", help="seed of every run (1)")
    parser.add_argument("--out", default="runs/demo", metavar="DIR", help="folder of the runs and of report.html")
    given = parser.parse_args(argv)
    from subnet_pipelines.demo import run_demo

    seeds = seeds_of(given.seed, "--seed")
    if len(seeds) > 1:
        raise Refusal(f"--seed takes one seed, got {given.seed}")
    return run_demo(seeds[0], Path(given.out))


def bench(argv: list[str]) -> int:
    """Time the kernels beside their rivals here, print and draw the ratios; exit code 1 where a promised one is missed."""
    parser = Parser("subnet-kernels bench", description=bench.__doc__, allow_abbrev=False)
    parser.add_argument("--only", metavar="NAME", help="one benchmark, or some: select,step")
    parser.add_argument("--threads", default="1,2", metavar="1,2", help="threads to measure on (1,2)")
    parser.add_argument("--out", metavar="DIR", help="folder of the drawings (bench/results)")
    given = parser.parse_args(argv)
    folder = SOURCE / "bench"
    found = {path.stem.removeprefix("bench_"): path for path in sorted(folder.glob("bench_*.py"))}
    if not found:
        raise Refusal(f"bench needs a source checkout, whose benchmarks would lie in {folder}; there are none")
    for module in ("pytest", "matplotlib"):
        if importlib.util.find_spec(module) is None:
            raise Refusal(f"bench needs {module}, which is not installed: pip install {module}")
    threads = counts_of(given.threads, "--threads")
    names = given.only.split(",") if given.only else list(found)
    for name in names:
        if name not in found:
            from subnet_pipelines.config import nearest

            raise Refusal(f"--only {name!r} is no benchmark" + nearest(name, found))
    out = Path(given.out or folder / "results").absolute()
    words = ["-s", "--show-capture=no", f"--thread-counts={','.join(map(str, threads))}", f"--figures={out}"]
    paths = [str(SOURCE), str(Path(__file__).resolve().parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    argv = [sys.executable, "-m", "pytest", *words, *(str(found[name]) for name in names)]
    return subprocess.run(argv, cwd=SOURCE, env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)}).returncode


def bank(argv: list[str]) -> int:
    """Print what is in a saved bank: each mask's density, what it shares, its bits a weight; and what all take in each form."""
    parser = Parser("subnet-kernels bank", description=bank.__doc__, allow_abbrev=False)
    parser.add_argument("action", choices=("show",), help="what to do with it")
    parser.add_argument("path", metavar="PATH", help="folder of a bank (runs/.../seed-1/bank), or a packed file")
    parser.add_argument("--plot", metavar="DIR", help="folder into which pictures of overlap and reuse are drawn")
    given = parser.parse_args(argv)
    from subnet_pipelines.bank_show import show

    for line in show(Path(given.path), Path(given.plot) if given.plot else None):
        print(line)
    return 0


def train(argv: list[str]) -> int:
    """Train a method on a benchmark's stream of tasks."""
    first = Parser("subnet-kernels train", add_help=False, allow_abbrev=False)
    first.add_argument("method", nargs="?")
    first.add_argument("--benchmark")
    known, _ = first.parse_known_args(argv)
    from subnet_pipelines.benchmarks import BENCHMARKS
    from subnet_pipelines.config import Settings, nearest, owners
    from subnet_pipelines.methods import METHODS

    parser = Parser(
        "subnet-kernels train",
        description=f"{train.__doc__} With METHOD and --benchmark, --help lists their settings too.",
        allow_abbrev=False,
    )
    parser.add_argument("method", metavar="METHOD", help=f"one of {', '.join(METHODS)}")
    parser.add_argument("--benchmark", metavar="NAME", required=True, help=f"one of {', '.join(BENCHMARKS)}")
    parser.add_argument("--data-dir", metavar="DIR", help="folder of the data sets ($SUBNET_DATA_DIR, else the user's cache)")
    parser.add_argument("--device", default="auto", help="auto (default), cpu or cuda")
    parser.add_argument("--seeds", default="1", metavar="1,2,3", help="one run a seed (1)")
    parser.add_argument("--out", metavar="DIR", help="folder of the runs (runs/METHOD-BENCHMARK-HASH)")
    parser.add_argument("--resume", action="store_true", help="go on with an interrupted run, or skip a finished one")
    parser.add_argument("--config", metavar="FILE", help="YAML of settings, over the recipe and under the flags")
    parser.add_argument("--fidelity", metavar="WORD", help="sound (default), code or paper: how their disagreements are settled")
    settings = None
    if known.method is not None and known.benchmark is not None:
        settings = Settings(known.method, known.benchmark)
        group = parser.add_argument_group(f"settings of {known.method} on {known.benchmark}")
        for field, text in settings.help.items():
            default = f"(default {settings.values[field]})".replace("%", "%%")
            bare = {"nargs": "?", "const": "true"} if settings.types[field] is bool else {}
            words = f"{text.replace('%', '%%')} {default}"
            group.add_argument(flag(field), metavar="X", default=argparse.SUPPRESS, help=words, **bare)
    given, rest = parser.parse_known_args(argv)
    if rest:
        word = rest[0].split("=")[0]
        if not word.startswith("--"):
            raise Refusal(f"unexpected {rest[0]!r}")
        key = word[2:].replace("-", "_")
        if owners(key):
            raise Refusal(f"{word} does not apply to {settings.title}; it is a setting of {', '.join(owners(key))}")
        raise Refusal(f"{word} is no flag of {settings.title}" + nearest(word, map(flag, (*SHARED, *settings.types))))
    flags = {k: v for k, v in vars(given).items() if k in settings.types}
    settings.resolve(Path(given.config) if given.config else None, flags, given.fidelity)
    return train_seeds(settings, given)


def train_seeds(settings: Any, given: argparse.Namespace) -> int:
    """One run a seed, then the summary."""
    from subnet_pipelines.folder import refuse_run
    from subnet_pipelines.interrupt import Interrupted
    from subnet_pipelines.processes import this_process
    from subnet_pipelines.progress import shown_on
    from subnet_pipelines.report import number, write_seeds
    from subnet_pipelines.train import run

    seeds, device = seeds_of(given.seeds), device_of(given.device)
    method_config, benchmark_config, run_config = settings.build()
    out = Path(given.out or f"runs/{settings.method.name}-{settings.benchmark.name}-{settings.hash()}")
    process = this_process()
    for seed in seeds if not given.resume else []:
        refuse_run(process.home(out / f"seed-{seed}"))
    results = []
    for seed in seeds:
        benchmark = settings.benchmark(benchmark_config, seed, given.data_dir, device)
        method = settings.method(method_config, benchmark, seed)
        title = f"seed {seed}: " if len(seeds) > 1 else ""
        show = shown_on(title=title + (f"process {process.rank}: " if process.rank else ""))
        try:
            note = {"fidelity": settings.fidelity}
            results.append(run(method, benchmark, run_config, out / f"seed-{seed}", given.resume, show, note=note))
        except Interrupted as stopped:
            print(f"subnet-kernels: {stopped}", file=sys.stderr)
            return 128 + stopped.signum
    if process.rank:
        return 0
    summary = write_seeds(results, out)
    spread = f" +- {number(summary['acc']['std'])}" if len(seeds) > 1 else ""
    print(f"{settings.title}: ACC {number(summary['acc']['mean'])}{spread} %; {out / 'report.html'}")
    return 0


def evaluate(argv: list[str]) -> int:
    """Measure a finished run again under other settings of evaluation, beside its result, without training."""
    first = Parser("subnet-kernels evaluate", add_help=False, allow_abbrev=False)
    first.add_argument("run", nargs="?")
    known, _ = first.parse_known_args(argv)
    parser = Parser(
        "subnet-kernels evaluate", description=f"{evaluate.__doc__} With RUN, --help lists its settings too.", allow_abbrev=False
    )
    parser.add_argument("run", metavar="RUN", help="folder of a finished run, OUT/seed-N, or OUT for all of its seeds")
    parser.add_argument("--data-dir", metavar="DIR", help="folder of the data sets ($SUBNET_DATA_DIR, else the user's cache)")
    parser.add_argument("--device", default="auto", help="auto (default), cpu or cuda")
    if known.run is None or known.run.startswith("-"):
        parser.parse_args(argv)
    from subnet_pipelines.config import nearest
    from subnet_pipelines.reevaluate import STREAM, evaluate_run, folders_of, settings_of
    from subnet_pipelines.report import number

    folders = folders_of(Path(known.run))
    settings = settings_of(folders[0], {})
    group = parser.add_argument_group(f"settings of evaluation of {settings.title}")
    for field in settings.types:
        shown = field in (*settings.method.evaluation, *STREAM)
        words = f"{settings.help[field]} (there {settings.values[field]})".replace("%", "%%")
        group.add_argument(flag(field), metavar="X", default=argparse.SUPPRESS, help=words if shown else argparse.SUPPRESS)
    given, rest = parser.parse_known_args(argv)
    if rest:
        word = rest[0].split("=")[0]
        raise Refusal(f"{word} is no flag of {settings.title}" + nearest(word, map(flag, settings.types)))
    changes = {k: v for k, v in vars(given).items() if k in settings.types}
    for folder in folders:
        settings_of(folder, changes).build()  # refuse before anything is measured
    for folder in folders:
        found = evaluate_run(folder, changes, given.data_dir, device_of(given.device))
        told = found["task_inference"]
        inferred = f", task inferred {number(told['accuracy'])} %" if told else ""
        print(f"{folder}: ACC {number(found['acc'])} %{inferred}")
    return 0


def reproduce(argv: list[str]) -> int:
    """Run a paper's table, or cells of it, over seeds, and print ours beside the paper's; the same command goes on where it stopped."""
    from subnet_pipelines.config import FIDELITIES
    from subnet_pipelines.reproduce import Asked
    from subnet_pipelines.reproduce import reproduce as run_table
    from subnet_pipelines.tables import read_table, table_names

    parser = Parser("subnet-kernels reproduce", description=reproduce.__doc__, allow_abbrev=False)
    parser.add_argument("table", metavar="TABLE", help=f"one of {', '.join(table_names())}")
    parser.add_argument(
        "--cells", default="*", metavar="GLOB", help="cells to run, BENCHMARK/ROW, as in 'permuted-mnist/wsn-*' (all)"
    )
    parser.add_argument("--seeds", default="1,2,3", metavar="1,2,3", help="one run a cell and seed (1,2,3)")
    parser.add_argument("--also", metavar="WORD", help="a further fidelity, such as sound, as columns of its own")
    parser.add_argument("--jobs", metavar="N", help="runs side by side (one a core, or one a GPU)")
    parser.add_argument("--device", default="auto", help="auto (default), cpu or cuda")
    parser.add_argument("--cuda-graph", action="store_true", help="record steps as CUDA graphs where the method's can be")
    parser.add_argument("--stop-after", metavar="MIN", help="after so many minutes let the runs write a checkpoint and stop")
    parser.add_argument("--tasks", metavar="N", help="scale down: at most the first N tasks")
    parser.add_argument("--epochs", metavar="N", help="scale down: epochs of a task")
    parser.add_argument("--data-dir", metavar="DIR", help="folder of the data sets ($SUBNET_DATA_DIR, else the user's cache)")
    parser.add_argument("--out", metavar="DIR", help="folder of the runs and of report.html (runs/TABLE)")
    given = parser.parse_args(argv)
    table = read_table(given.table)
    if table.storage is not None:
        from subnet_pipelines.storage_tables import write_storage

        if useless := [
            name for name in vars(given) if name not in ("table", "out") and vars(given)[name] != parser.get_default(name)
        ]:
            raise Refusal(f"{table.name} is computed and takes no flag but --out, got {flag(useless[0])}")
        write_storage(table, Path(given.out or f"runs/{table.name}"))
        return 0
    seeds = seeds_of(given.seeds)
    if given.also is not None and given.also not in FIDELITIES:
        raise Refusal(f"--also must be one of {', '.join(FIDELITIES)}, got {given.also!r}")
    device = device_of(given.device).type
    if given.cuda_graph and device != "cuda":
        raise Refusal(f"--cuda-graph needs a CUDA device, got --device {given.device}, which is {device} here")
    tasks, epochs, jobs = (positive(getattr(given, name), f"--{name}", int) for name in ("tasks", "epochs", "jobs"))
    scale = "".join(f"-{name}-{n}" for name, n in (("tasks", tasks), ("epochs", epochs)) if n is not None)
    asked = Asked(
        out=Path(given.out or f"runs/{table.name}{scale}"),
        seeds=seeds,
        cells=given.cells,
        jobs=jobs,
        device=device,
        cuda_graph=given.cuda_graph,
        stop_after=positive(given.stop_after, "--stop-after", float),
        data_dir=given.data_dir,
        also=given.also,
        tasks=tasks,
        epochs=epochs,
    )
    return run_table(table, asked)


def positive(text: str | None, name: str, kind: type) -> Any:
    """The number of a flag, greater than 0; None where it is not given. Raises Refusal."""
    if text is None:
        return None
    try:
        value = kind(text)
    except ValueError:
        value = 0
    if not 0 < value < float("inf"):
        raise Refusal(f"{name} must be a {'whole ' if kind is int else ''}number greater than 0, got {text!r}")
    return value


def flag(field: str) -> str:
    """A field's flag."""
    return "--" + field.replace("_", "-")


def seeds_of(text: str, name: str = "--seeds") -> list[int]:
    """The seeds of a flag. Raises Refusal."""
    try:
        seeds = [int(s) for s in text.split(",")]
    except ValueError:
        raise Refusal(f"{name} must be whole numbers, as in 1,2,3, got {text!r}") from None
    if len(set(seeds)) < len(seeds) or min(seeds) < 0 or max(seeds) >= 2**31:
        raise Refusal(f"{name} must be different numbers from 0 to 2^31 - 1, got {text}")
    return seeds


def counts_of(text: str, name: str) -> list[int]:
    """The numbers of threads of a flag. Raises Refusal."""
    try:
        counts = [int(s) for s in text.split(",")]
    except ValueError:
        raise Refusal(f"{name} must be whole numbers, as in 1,2, got {text!r}") from None
    if len(set(counts)) < len(counts) or min(counts) < 1 or max(counts) > 1024:
        raise Refusal(f"{name} must be different numbers from 1 to 1024, got {text}")
    return counts


def device_of(word: str) -> Any:
    """The torch device of --device. Raises Refusal."""
    import torch

    if word not in ("auto", "cpu", "cuda"):
        raise Refusal(f"--device must be auto, cpu or cuda, got {word!r}")
    if word == "cuda" and not torch.cuda.is_available():
        raise Refusal("--device cuda: torch finds no CUDA device here; use --device cpu")
    if word == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    if "LOCAL_RANK" in os.environ:  # several processes: a GPU each, as far as there are
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    return torch.device("cuda")


if __name__ == "__main__":
    sys.exit(main())
