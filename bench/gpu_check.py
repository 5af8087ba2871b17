"""All that only a GPU can check, part by part: `make gpu-check`, or `python3 bench/gpu_check.py [--only PART[,PART]] [--again]`.

load      do the compiled libraries load here, and what serves each op; a CUDA library that is missing or does not load is built here
graph     tests/test_cuda.py: no op waits for the device, each can be captured, and nothing depends on what memory held before; and
          tests/test_cuda_graph.py: whole training steps captured
tests     the kernel and layer tests on the GPU
sanitize  compute-sanitizer's memcheck and racecheck over one call of every op on every small input
bench     the benchmarks on the GPU, into bench/results/<card>.json
table     ratios of that file, losses and missed targets

No virtual environment and no install are needed: the checkout is put on the path, and what pytest-xdist or compute-sanitizer would
do is done without them, or left out in a sentence. Each part has a time limit; one that fails does not stop the others. How a part
ended is in build/gpu-check/<part>.json and what it printed in <part>.log; a part that passed with the same sources is not run
again without --again. `--copy-to DIR` puts all of them there in few files, after every part: outcomes.json, logs.txt, table.txt and
<card>.json.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "build" / "gpu-check"
RESULTS = ROOT / "bench" / "results"
TESTS = (
    "bits", "select", "threshold", "apply", "masked", "superpose", "mixed", "compressed", "update", "optim", "layers", "bank",
    "bank_superpose", "bank_rows", "bank_files", "signed",
    "convert", "forget_free", "dispatch", "checks", "triton_masked", "triton_register", "golden_wsn", "golden_supsup",
    "golden_impress", "golden_inference", "golden_trace",
)  # fmt: skip


@dataclass
class Outcome:
    """How a part ended: "passed", "failed", "timed out" or "skipped", and why, in a sentence."""

    part: str
    outcome: str
    note: str = ""
    seconds: float = 0.0
    sources: str = ""
    details: list[str] = field(default_factory=list)


def sources() -> str:
    """A hash of what the parts run."""
    digest = hashlib.sha256()
    for folder, endings in (
        ("csrc", (".h", ".cpp", ".cu", ".py")),
        ("subnet_kernels", (".py",)),
        ("tests", (".py",)),
        ("bench", (".py",)),
    ):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in endings:
                digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def environment(**more: str) -> dict[str, str]:
    """The environment of what is run: the checkout on the path, the golden vectors where they lie."""
    path = [str(ROOT), str(ROOT / "python_api"), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(path), "PYTHONUNBUFFERED": "1", **more}
    if "SUBNET_GOLDEN" not in env and (ROOT / "shared" / "golden").is_dir():
        env["SUBNET_GOLDEN"] = str(ROOT / "shared" / "golden")
    return env


def run(part: str, command: list[str], seconds: float, **env: str) -> tuple[int | None, str]:
    """(exit status, output) of a command whose output also goes to the part's log; None as status where its time ran out."""
    log = FOLDER / f"{part}.log"
    began = len(log.read_bytes()) if log.exists() else 0
    with log.open("ab") as file:
        file.write(f"$ {' '.join(command)}\n".encode())
        file.flush()
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment(**env), stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            status = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            status = None
            stop(process)
    return status, log.read_bytes()[began:].decode(errors="replace")


def stop(process: subprocess.Popen) -> None:
    """End a process and what it started; first as from a keyboard, so that pytest still says what failed."""
    for kind, patience in ((signal.SIGINT, 10), (signal.SIGKILL, None)):
        try:
            os.killpg(process.pid, kind)
            process.wait(timeout=patience)
            return
        except subprocess.TimeoutExpired:
            continue
        except ProcessLookupError:
            process.wait()
            return


def has(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def closing(output: str) -> str:
    """pytest's last line of counts."""
    found = re.findall(r"^=*\s*((?:\d+ \w+,? ?)+.*? in [\d.:hms ()]+)\s*=*$", output, flags=re.MULTILINE)
    return found[-1].strip() if found else "no closing line of pytest: it did not come to its end"


def pytest(part: str, arguments: list[str], seconds: float, workers: int = 0, **env: str) -> Outcome:
    """A part that is a run of pytest."""
    if not has("pytest"):
        return Outcome(part, "skipped", "pytest is not installed here")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--tb=short", "-vv", *arguments]
    notes = []
    if workers:
        if has("xdist"):
            command += ["-n", str(workers), "--dist", "loadgroup", "--max-worker-restart", "16"]
            if has("pytest_timeout"):  # a kernel that hangs ends its worker, and another one goes on
                command += ["--timeout", "90", "--timeout-method", "thread"]
        else:
            notes.append("without pytest-xdist, one test after another")
    if not has("pytest_benchmark"):  # the project's options name it
        command += ["-o", "addopts=--strict-markers -q -m 'not long'"]
        notes.append("without pytest-benchmark")
    status, output = run(part, command, seconds, **env)
    lines = r"^(?:\[gw\d+\][^:]*?)?(?:FAILED|ERROR) (\S+::\S+)|^(\S+::\S+) (?:FAILED|ERROR)\b"
    failed = list(dict.fromkeys(a or b for a, b in re.findall(lines, output, flags=re.MULTILINE)))
    note = "; ".join([closing(output), *notes])
    outcome = "timed out" if status is None else "passed" if status == 0 else "failed"
    return Outcome(part, outcome, note, details=failed)


def no_gpu() -> str | None:
    """Why nothing can run on a GPU here; None where it can."""
    if not has("torch"):
        return "torch is not installed here"
    import torch

    return None if torch.cuda.is_available() else f"torch {torch.__version__} finds no CUDA device here"


def load(seconds: float) -> Outcome:
    """Build what is missing, then ask a fresh process what loads."""
    ask = [sys.executable, "-c", "from subnet_kernels.info import report; print(report())"]
    status, output = run("load", ask, 120)
    built = []
    if reason := re.search(r"^_C_cuda: off: (.*)$", output, flags=re.MULTILINE):
        begin, env = time.monotonic(), {}
        if "SUBNET_KERNELS_CUDA_ARCHS" not in os.environ and no_gpu() is None:
            capability = "import torch; print('%d%d' % torch.cuda.get_device_capability())"
            env["SUBNET_KERNELS_CUDA_ARCHS"] = run("load", [sys.executable, "-c", capability], 60)[1].split()[-1]
        for old in (ROOT / "subnet_kernels").glob("_C_cuda*.so"):
            old.unlink()
        done, said = run("load", [sys.executable, "csrc/build.py", "cuda"], seconds, **env)
        if done != 0:
            why = "it ran out of time" if done is None else said.strip().splitlines()[-1]
            return Outcome("load", "failed", f"_C_cuda is off ({reason[1]}), and its build failed: {why}")
        built.append(f"_C_cuda was built here in {time.monotonic() - begin:.0f} s, because {reason[1]}")
        status, output = run("load", ask, 120)
    print(output)
    absent = re.findall(r"^(_C_\w+: off.*)$", output, flags=re.MULTILINE)
    slow = re.findall(r"^(\w+) +\w+ +reference$", output, flags=re.MULTILINE)
    if slow:
        built.append(f"on the reference for CUDA: {', '.join(slow)}")
    if status != 0 or absent:
        return Outcome("load", "failed", "; ".join(absent) or "the package does not import: see load.log")
    if (reason := no_gpu()) is not None:
        return Outcome("load", "failed", f"both libraries load, but {reason}")
    return Outcome("load", "passed", "; ".join(["both libraries load", *built]))


def graph(seconds: float) -> Outcome:
    if (reason := no_gpu()) is not None:
        return Outcome("graph", "skipped", reason)
    begin, workers = time.monotonic(), min(8, os.cpu_count() or 1)
    ops = pytest("graph", ["tests/test_cuda.py", "--durations=8", "--maxfail=80"], seconds, workers, SUBNET_TEST_DEVICE="cuda")
    left = max(10.0, seconds - (time.monotonic() - begin))
    steps = pytest("graph", ["tests/test_cuda_graph.py", "--durations=4"], left, workers)  # which names its devices itself
    worst = max(ops, steps, key=lambda o: ["passed", "skipped", "failed", "timed out"].index(o.outcome))
    note = f"ops: {ops.note}; steps: {steps.note}"
    return Outcome("graph", worst.outcome, note, details=ops.details + steps.details)


def tests(seconds: float) -> Outcome:
    if (reason := no_gpu()) is not None:
        return Outcome("tests", "skipped", reason)
    files = [f"tests/test_{name}.py" for name in TESTS if (ROOT / "tests" / f"test_{name}.py").exists()]
    arguments = [*files, "--durations=12", "--maxfail=200"]
    return pytest("tests", arguments, seconds, min(8, os.cpu_count() or 1), SUBNET_TEST_DEVICE="cuda")


def sanitize(seconds: float) -> Outcome:
    """Both tools at a time: each slows its own process down, not the card."""
    if (reason := no_gpu()) is not None:
        return Outcome("sanitize", "skipped", reason)
    tool = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if tool is None:
        return Outcome("sanitize", "skipped", "compute-sanitizer is not installed here")
    script = [sys.executable, "bench/one_of_each.py"]
    # every tensor in memory of its own, else an access past its end falls into the allocator's next block and is not seen
    env = environment(SUBNET_TEST_DEVICE="cuda", PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    running = {}
    for name in ("memcheck", "racecheck"):
        log = (FOLDER / f"sanitize-{name}.log").open("wb")
        command = [tool, "--tool", name, "--error-exitcode", "9", "--target-processes", "all", "--launch-timeout", "120", *script]
        running[name] = subprocess.Popen(command, cwd=ROOT, env=env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    deadline, notes, worst = time.monotonic() + seconds, [], "passed"
    for name, process in running.items():
        try:
            status = process.wait(timeout=max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            stop(process)
            status = None
        output = (FOLDER / f"sanitize-{name}.log").read_text(errors="replace")
        summaries = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: .*", output)
        reached = re.findall(r"^(\w+): \d+ calls$", output, flags=re.MULTILINE)
        notes.append(f"{name}: {summaries[-1] if summaries else 'no summary'}, {len(reached)} ops")
        if status is None:
            worst, notes[-1] = "timed out", notes[-1] + ", out of time"
        elif status != 0 and worst == "passed":
            worst = "failed"
    return Outcome("sanitize", worst, "; ".join(notes))


def results_of_gpus() -> list[Path]:
    return sorted(p for p in RESULTS.glob("*.json") if not p.name.startswith("cpu-"))


def bench(seconds: float) -> Outcome:
    if (reason := no_gpu()) is not None:
        return Outcome("bench", "skipped", reason)
    return pytest("bench", ["bench", "-s", "--device", "cuda", "--durations=15"], seconds)


def table(seconds: float) -> Outcome:
    found = results_of_gpus()
    if not found:
        return Outcome("table", "skipped", "bench/results has no file of a GPU")
    sys.path.insert(0, str(ROOT / "bench"))
    import figures

    path = max(found, key=lambda p: p.stat().st_mtime)
    content = json.loads(path.read_text())
    cases = figures.groups(content["rows"])
    missed = figures.misses(cases)
    text = "\n".join([f"{content['machine']}", figures.table(cases), "", *missed])
    (FOLDER / "table.txt").write_text(text + "\n")
    print("\n".join(missed))
    targets = sum(len(g.targets) for g in cases)
    return Outcome(
        "table", "passed", f"{path.name}: {len(cases)} cases, {len(missed)} of {targets} targets missed", details=missed
    )


PARTS: dict[str, tuple[Callable[[float], Outcome], float]] = {
    "load": (load, 240.0),
    "graph": (graph, 180.0),
    "tests": (tests, 240.0),
    "sanitize": (sanitize, 240.0),
    "bench": (bench, 240.0),
    "table": (table, 20.0),
}


def kept(part: str, now: str) -> Outcome | None:
    """What an earlier call found, where the part passed with these sources."""
    try:
        before = Outcome(**json.loads((FOLDER / f"{part}.json").read_text()))
    except (OSError, ValueError, TypeError):
        return None
    return before if before.outcome == "passed" and before.sources == now else None


def attempt(part: str, now: str) -> Outcome:
    """Run a part and write down how it ended, whatever it raises."""
    function, limit = PARTS[part]
    for old in FOLDER.glob(f"{part}*.log"):
        old.unlink()
    begin = time.monotonic()
    try:
        outcome = function(limit)
    except Exception as error:
        outcome = Outcome(part, "failed", f"{type(error).__name__}: {error}")
    outcome.seconds, outcome.sources = round(time.monotonic() - begin, 1), now
    (FOLDER / f"{part}.json").write_text(json.dumps(asdict(outcome), indent=1) + "\n")
    return outcome


def copy_to(folder: Path) -> None:
    """Outcomes, logs (of each the last 2 MB), table and results of the parts so far."""
    folder.mkdir(parents=True, exist_ok=True)
    outcomes = [json.loads(path.read_text()) for path in sorted(FOLDER.glob("*.json"))]
    (folder / "outcomes.json").write_text(json.dumps(outcomes, indent=1) + "\n")
    logs = [f"######## {path.name}\n".encode() + path.read_bytes()[-2_000_000:] for path in sorted(FOLDER.glob("*.log"))]
    (folder / "logs.txt").write_bytes(b"\n".join(logs))
    for path in [*FOLDER.glob("table.txt"), *results_of_gpus()]:
        shutil.copy(path, folder / path.name)


def main(arguments: list[str] | None = None) -> int:
    """Runs the parts; the exit status is 1 where one failed or ran out of time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="PART[,PART]", default=",".join(PARTS), help=f"of {', '.join(PARTS)}")
    parser.add_argument("--again", action="store_true", help="also parts that passed before")
    parser.add_argument("--copy-to", type=Path, metavar="DIR", help="copy logs, outcomes and results there")
    given = parser.parse_args(arguments)
    wanted = given.only.split(",")
    if unknown := [part for part in wanted if part not in PARTS]:
        parser.error(f"--only knows {', '.join(PARTS)}, got {', '.join(unknown)}")
    FOLDER.mkdir(parents=True, exist_ok=True)
    now, outcomes = sources(), []
    for part in wanted:
        outcome = None if given.again else kept(part, now)
        if outcome is None:
            print(f"== {part}", flush=True)
            outcome = attempt(part, now)
            print(f"   {outcome.outcome} in {outcome.seconds:.0f} s: {outcome.note}", flush=True)
        else:
            outcome.note += " (an earlier run)"
        outcomes.append(outcome)
        if given.copy_to:
            copy_to(given.copy_to)
    print("\ngpu-check")
    for outcome in outcomes:
        print(f"  {outcome.part:9} {outcome.outcome:10} {outcome.seconds:6.0f} s  {outcome.note}")
        for line in outcome.details[:40]:
            print(f"      {line}")
        if len(outcome.details) > 40:
            print(f"      and {len(outcome.details) - 40} more, in build/gpu-check/{outcome.part}.json")
    return int(any(outcome.outcome in ("failed", "timed out") for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
