"""`subnet-kernels reproduce`: the cells of a table, each over seeds, run as `train` runs them, side by side in processes of their own."""

from __future__ import annotations

import contextlib
import fcntl
import fnmatch
import multiprocessing
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from subnet_pipelines.config import Settings
from subnet_pipelines.errors import Refusal
from subnet_pipelines.interrupt import Stop
from subnet_pipelines.progress import count_bar
from subnet_pipelines.report import Result, finished, number, read_result, write_seeds
from subnet_pipelines.tables import Cell, Table, entry, epoch_means, write_table

ROOTS = [Path(__file__).resolve().parents[1], Path(__file__).resolve().parents[2]]  # of the two packages, for child processes
LOOK = 60.0  # seconds between two looks at what the runs say


@dataclass
class Job:
    """One run: a cell in one mode and of one seed."""

    cell: Cell
    fidelity: str
    seed: int
    out: Path  # of the cell in that mode; the run is in out/seed-N
    settings: Settings | None = None
    flags: dict[str, Any] = field(default_factory=dict)
    state: str = "waiting"  # then: running, done, not run, failed, stopped
    why: str | None = None
    result: Result | None = None

    @property
    def name(self) -> str:
        mode = "" if self.fidelity == self.cell.fidelity else f" {self.fidelity}"
        return f"{self.cell.name}{mode} seed {self.seed}"

    @property
    def log(self) -> Path:
        return self.out / f"seed-{self.seed}.log"


@dataclass(frozen=True)
class Asked:
    """What the command line asks for. tasks and epochs scale a table down; stop_after is minutes."""

    out: Path
    seeds: list[int]
    cells: str = "*"
    jobs: int | None = None
    device: str = "cpu"
    cuda_graph: bool = False
    stop_after: float | None = None
    data_dir: str | None = None
    also: str | None = None
    tasks: int | None = None
    epochs: int | None = None

    @property
    def scaled(self) -> str | None:
        """What keeps the numbers from being comparable with the paper's."""
        given = [f"--{name} {value}" for name in ("tasks", "epochs") if (value := getattr(self, name)) is not None]
        return " ".join(given) or None


def reproduce(table: Table, asked: Asked) -> int:
    """Run what is asked for and not finished yet, print the table, and write it to asked.out; returns the exit code."""
    globs = asked.cells.split(",")
    chosen = [cell for cell in table.cells if any(fnmatch.fnmatchcase(cell.name, g) for g in globs)]
    if not chosen:
        sample = ", ".join(cell.name for cell in table.cells[:3])
        raise Refusal(f"--cells {asked.cells!r} matches no cell of {table.name}; its cells are BENCHMARK/ROW, such as {sample}")
    begun = time.monotonic()
    everything = [job for cell in table.cells if cell.method is not None for job in jobs_of(cell, asked)]
    jobs = [job for job in everything if job.cell in chosen]
    jobs.sort(key=lambda job: asked.seeds.index(job.seed))  # a first seed of every cell before a second one of any
    with locked(asked.out) as lock:
        for job in everything:
            look_for(job)
        look_at_data([job for job in jobs if job.state == "waiting"], asked)
        signum = run_all([job for job in jobs if job.state == "waiting"], asked, lock, begun)
        shown = {cell.benchmark for cell in chosen}
        entries = [e for cell in table.cells if cell.benchmark in shown for e in entries_of(cell, everything, cell in chosen)]
        facts = {"seeds": asked.seeds, "wall_seconds": round(time.monotonic() - begun, 1), "jobs": len(slots_of(asked))}
        write_table(table, entries, asked.out, asked.scaled, facts)
    if left := sum(job.state in ("waiting", "stopped") for job in jobs):
        print(f"{left} of {len(jobs)} runs are left; the same command goes on with them")
    return 128 + signum if signum else int(any(job.state == "failed" for job in jobs))


def jobs_of(cell: Cell, asked: Asked) -> list[Job]:
    """The runs of a cell: its own mode over the seeds, then the other one where that is another config; a cell whose settings do not
    resolve is not run."""
    found, values = [], []
    for mode in dict.fromkeys([cell.fidelity, asked.also or cell.fidelity]):
        settings, flags, why = None, dict(cell.settings), None
        try:
            settings = Settings(cell.method, cell.benchmark)
            if asked.tasks is not None:
                flags["tasks"] = min(asked.tasks, flags.get("tasks", settings.values["tasks"]))
            if asked.epochs is not None:
                flags.pop("iterations", None)
                flags["epochs"] = asked.epochs
                further = {name: flags.get(name, value) for name, value in settings.values.items() if name.endswith("_epochs")}
                flags |= {name: min(asked.epochs, value) for name, value in further.items() if isinstance(value, int)}
            settings.resolve(None, flags, mode)
        except Refusal as error:
            why = str(error)
        if settings is not None and settings.values in values:
            continue
        values += [settings.values] if settings is not None else []
        state = "waiting" if why is None else "not run"
        found += [Job(cell, mode, seed, asked.out / cell.name / mode, settings, flags, state, why) for seed in asked.seeds]
    return found


def look_for(job: Job) -> None:
    """Take up a result that is there already."""
    if job.state != "waiting":
        return
    record = {"method": job.cell.method, "benchmark": job.cell.benchmark, "seed": job.seed, "fidelity": job.fidelity}
    for config in job.settings.build():
        record |= asdict(config)
    with contextlib.suppress(Refusal):  # of another config: the run itself will say so
        job.result = finished(job.out / f"seed-{job.seed}", record)
    if job.result is not None:
        job.state = "done"


@contextlib.contextmanager
def locked(out: Path) -> Iterator[int]:
    """Hold the table's folder alone; child processes inherit the lock, so that it lasts as long as any of them. Raises Refusal."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        file = open(out / ".lock", "w")
    except OSError as error:
        raise Refusal(f"{out}: cannot be written ({error.strerror})") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise Refusal(f"{out}: another reproduce, or a run that it started, is at work there") from None
        yield file.fileno()


def look_at_data(jobs: list[Job], asked: Asked) -> None:
    """Make each benchmark once of which no run was begun, so that what can be downloaded is there before runs ask for it side by side; one
    whose files are missing takes its jobs out of the queue. In a process of its own, which gives the memory back."""
    begun = {job.cell.benchmark for job in jobs if (job.out / f"seed-{job.seed}").exists()}
    first = {job.cell.benchmark: job for job in reversed(jobs) if job.cell.benchmark not in begun}
    if not first:
        return
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        for name, job in first.items():
            said = pool.submit(make_benchmark, job.cell.method, name, job.flags, job.fidelity, job.seed, asked.data_dir).result()
            for other in jobs if said is not None else []:
                if other.cell.benchmark == name:
                    other.state, other.why = "not run", said
            if said is not None:
                print(f"{name}: not run: {said}", flush=True)


def make_benchmark(method: str, name: str, flags: dict, fidelity: str, seed: int, data_dir: str | None) -> str | None:
    """The sentence with which a benchmark refuses to be made here, if it does."""
    try:
        settings = Settings(method, name).resolve(None, flags, fidelity)
        settings.benchmark(settings.build()[1], seed, data_dir)
    except Refusal as error:
        return str(error)
    return None


def words_of(job: Job, seeds: list[int]) -> list[str]:
    """The run, of some seeds, as words after `subnet-kernels`."""
    words = ["train", job.cell.method, "--benchmark", job.cell.benchmark, "--fidelity", job.fidelity]
    words += [f"--{name.replace('_', '-')}={flag_of(value)}" for name, value in job.flags.items()]
    return [*words, "--seeds", ",".join(map(str, seeds))]


def flag_of(value: Any) -> str:
    """A value of a YAML as a flag gives it."""
    if isinstance(value, list):
        return ",".join(map(flag_of, value))
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def run_all(jobs: list[Job], asked: Asked, lock: int, begun: float) -> int | None:
    """Run jobs in processes side by side, until all are run, the time is over, or a signal comes, whose number is returned.

    Runs that must stop get SIGTERM: they write a checkpoint, and go on from it another time.
    """
    slots = slots_of(asked)
    waiting, running, free = list(jobs), {}, list(range(len(slots)))
    deadline = begun + 60 * asked.stop_after if asked.stop_after is not None else float("inf")
    with Stop() as stop, count_bar(len(jobs)) as say:
        said = time.monotonic()
        try:
            while running or (waiting and stop.signum is None and time.monotonic() < deadline):
                over = stop.signum is not None or time.monotonic() >= deadline
                while waiting and free and not over:
                    job, slot = waiting.pop(0), free.pop(0)
                    running[slot] = job, start(job, asked, slots[slot], lock)
                for slot, (job, process) in list(running.items()):
                    if over and job.state == "running":
                        process.terminate()
                        job.state = "stopped"
                    if process.poll() is not None:
                        del running[slot]
                        free.append(slot)
                        settle(job, process.returncode)
                        say(line_of(job))
                if time.monotonic() - said > LOOK:
                    said = time.monotonic()
                    for job, _ in running.values():
                        say(f"{job.name}: {last_line(job.log)}", False)
                time.sleep(0.1)
        finally:  # of what runs still: a second signal, or a mistake of ours
            for job, process in running.values():
                if job.state == "running":  # a second signal would not let it write its checkpoint
                    process.terminate()
            for _, process in running.values():
                process.wait()
    return stop.signum


def slots_of(asked: Asked) -> list[dict[str, str]]:
    """The environment of each process that runs at a time: the cores are split between them; several GPUs take turns.

    One run a GPU unless asked otherwise: processes on one GPU take turns too, and five together were no quicker than one (docs/gpu.md).
    """
    import torch

    cores = os.cpu_count() or 1
    cuda = asked.device == "cuda"
    gpus = torch.cuda.device_count() if cuda else 0
    count = asked.jobs or (max(1, gpus) if cuda else cores)
    threads = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or str(max(1, cores // count))}
    if gpus < 2:
        return [threads] * count
    names = (os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(gpus)))).split(",")
    return [{**threads, "CUDA_VISIBLE_DEVICES": names[i % gpus]} for i in range(count)]


def start(job: Job, asked: Asked, environment: dict[str, str], lock: int) -> subprocess.Popen:
    """The run's process, with its own log; in a session of its own, so that a key pressed here reaches it only through us."""
    job.out.mkdir(parents=True, exist_ok=True)
    words = [sys.executable, "-m", "subnet_pipelines.cli", *words_of(job, [job.seed]), "--out", str(job.out), "--resume"]
    words += ["--device", asked.device, *(["--data-dir", asked.data_dir] if asked.data_dir is not None else [])]
    words += ["--cuda-graph"] if asked.cuda_graph and job.settings.method.static_step else []
    paths = os.pathsep.join([*map(str, ROOTS), *filter(None, [os.environ.get("PYTHONPATH")])])
    job.state = "running"
    with open(job.log, "ab") as log:
        log.write(f"$ {shlex.join(words)}\n".encode())
        log.flush()
        return subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **environment, "PYTHONPATH": paths},
            pass_fds=[lock],
            start_new_session=True,
        )


def settle(job: Job, code: int) -> None:
    """What became of a process."""
    path = job.out / f"seed-{job.seed}" / "result.json"
    if code == 0:
        job.state, job.result = "done", read_result(path)
    elif job.state != "stopped" and code == 2:
        job.state, job.why = "not run", last_line(job.log).removeprefix("subnet-kernels: ")
    elif job.state != "stopped":
        job.state, job.why = "failed", f"exit code {code}: {last_line(job.log)} ({job.log})"


def last_line(path: Path) -> str:
    """The last line of a log."""
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - 4096))
        lines = file.read().decode(errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def line_of(job: Job) -> str:
    """A finished job for people."""
    if job.result is not None:
        return f"{job.name}: ACC {number(job.result.acc)} %, {job.result.seconds['total']:.0f} s"
    return f"{job.name}: {job.state}" + (f": {job.why}" if job.why else "")


def entries_of(cell: Cell, jobs: list[Job], asked_for: bool) -> list[dict[str, Any]]:
    """What became of a cell, in each of its modes; the folder of a mode gets the summary over its seeds."""
    if cell.method is None:
        return [entry(cell, None, [], "paper only", None, None)]
    found = []
    for mode in dict.fromkeys(job.fidelity for job in jobs if job.cell == cell):
        group = [job for job in jobs if job.cell == cell and job.fidelity == mode]
        results = [job.result for job in group if job.result is not None]
        if results:
            write_seeds(results, group[0].out)
        states = {job.state for job in group}
        bad = next((state for state in ("failed", "not run") if state in states), "left")
        status = "done" if states == {"done"} else bad if asked_for else "not asked for"
        why = next((job.why for job in group if job.state == status), None)
        words = shlex.join(["subnet-kernels", *words_of(group[0], [job.seed for job in group])])
        log = next((group[0].out / f"seed-{job.seed}" / "metrics.jsonl" for job in group if job.result is not None), None)
        found.append(entry(cell, mode, results, status, why, words, epoch_means(log) if log is not None else None))
    return found
