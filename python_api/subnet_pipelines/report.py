"""Results: one dataclass that is the schema of result.json, the summary over seeds, plots, and a page that holds them all."""

from __future__ import annotations

import base64
import functools
import html
import json
import os
import platform
import statistics
import subprocess
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from subnet_kernels.files import write_atomic
from subnet_pipelines import metrics
from subnet_pipelines.benchmarks.base import Benchmark
from subnet_pipelines.errors import Refusal
from subnet_pipelines.evaluate import Matrix
from subnet_pipelines.folder import compare
from subnet_pipelines.methods.base import Method

SCHEMA = 1
Vector = list[float | None]
STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:75rem;margin:2rem auto;padding:0 1rem}table{border-collapse:collapse}
td,th{padding:.25rem .75rem;border-bottom:1px solid #ccc;text-align:right}td:first-child,th:first-child{text-align:left}
figure{display:inline-block;margin:.5rem 1rem .5rem 0}figcaption{text-align:center;font-size:.85em}img{max-width:100%}
pre{overflow:auto;background:#f6f6f6;padding:.5rem}"""


@dataclass(frozen=True)
class Result:
    """What result.json holds. Accuracies are percent; null is what was not measured."""

    schema: int
    method: str
    benchmark: str
    scenario: str
    seed: int
    config: dict[str, Any]
    environment: dict[str, Any]
    seconds: dict[str, float]  # train, of it select, eval, and total of the process's runs
    accuracy_matrix: list[Vector] | None  # (t, j): task j just after task t; null in long streams
    diagonal: Vector
    final: Vector
    acc: float | None
    bwt: float | None
    forgetting: float | None
    fwt: float | None
    task_inference: dict[str, Any] | None
    method_report: dict[str, Any]
    capacity: dict[str, Any] | None


def make_result(method: Method, benchmark: Benchmark, record: dict[str, Any], seconds: dict[str, float], found: Matrix) -> Result:
    """A finished run's result, of what was found by measuring."""
    n, rows, used = len(benchmark), found.rows, found.used
    right = [[rows.get(str(t), {}).get(str(j), {}).get("right") for j in range(n)] for t in range(n)] if n <= 1000 else None
    diagonal = [rows.get(str(t), {}).get(str(t), {}).get("right") for t in range(n)]
    final = [rows[str(n - 1)][str(j)]["right"] for j in range(n)]
    told = [rows[str(n - 1)][str(j)]["told"] for j in range(n)]
    whole = right is not None and all(str(j) in rows.get(str(t), {}) for t in range(n) for j in range(t + 1))
    matrix = right if whole else None
    untrained = rows.get("untrained")
    report = dict(method.final_report())
    capacity = report.pop("capacity", None)
    if capacity is not None and all(str(t) in used for t in range(n)):
        capacity = {**capacity, "used_fraction_per_task": [used[str(t)] for t in range(n)]}
    unit = record.get("inference_unit")
    return Result(
        schema=SCHEMA,
        method=method.name,
        benchmark=benchmark.name,
        scenario=benchmark.config.scenario,
        seed=method.seed,
        config={k: v for k, v in record.items() if k not in ("method", "benchmark", "seed")},
        environment=environment(method.device),
        seconds={k: round(v, 3) for k, v in seconds.items()},
        accuracy_matrix=matrix,
        diagonal=diagonal,
        final=final,
        acc=metrics.acc(final),
        bwt=metrics.bwt(diagonal, final),
        forgetting=metrics.forgetting(matrix) if whole else None,
        fwt=metrics.fwt(matrix, [untrained.get(str(j), {}).get("right") for j in range(n)]) if whole and untrained else None,
        task_inference={"accuracy": metrics.mean(told), "unit": unit} if metrics.mean(told) is not None else None,
        method_report=report,
        capacity=capacity,
    )


def finished(folder: Path, record: dict[str, Any]) -> Result | None:
    """The folder's result if it is this record's and complete; None where the run is to go on. Raises Refusal as `compare` does."""
    path = folder / "result.json"
    if not path.exists():
        return None
    result = read_result(path)
    old = {"method": result.method, "benchmark": result.benchmark, "seed": result.seed, **result.config}
    compare(folder, old, record)
    return result if old["tasks"] == record["tasks"] else None


def read_result(path: Path) -> Result:
    """A result.json. Raises Refusal, naming the file, where it is none."""
    try:
        found = json.loads(path.read_bytes())
        if found.get("schema") != SCHEMA:
            raise ValueError(f"schema is {found.get('schema')}, this version reads {SCHEMA}")
        return Result(**{f.name: found[f.name] for f in fields(Result)})
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise Refusal(f"{path}: is no result of this version ({error})") from None


@functools.lru_cache
def environment(device: torch.device) -> dict[str, Any]:
    """Versions, machine and commit of a run."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": metadata.version("numpy"),
        "subnet_kernels": _version(),
        "commit": _commit(),
        "machine": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu(),
        "device": str(device),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
    }


def _version() -> str:
    import subnet_kernels

    return subnet_kernels.__version__


def _commit() -> str | None:
    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=5, check=True
        )
        return done.stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def write_run(result: Result, folder: Path) -> None:
    """result.json, the plots and report.html of one run; result.json last, as it says that the run is finished."""
    plots = captioned([result], draw(result, folder))
    write_atomic(folder / "report.html", page(f"{result.method} on {result.benchmark}, seed {result.seed}", [result], plots))
    write_atomic(folder / "result.json", json.dumps(asdict(result), indent=1))


def summarise(results: list[Result]) -> dict[str, Any]:
    """What summary.json holds: mean and sample standard deviation, over the seeds of one config, of every number of the tables."""
    first = results[0]
    return {
        "schema": SCHEMA,
        "method": first.method,
        "benchmark": first.benchmark,
        "scenario": first.scenario,
        "config": first.config,
        "environment": common([r.environment for r in results]),
        "seeds": [r.seed for r in results],
        **{name: spread([row[name] for row in map(table_row, results)]) for name in COLUMNS},
    }


def write_seeds(results: list[Result], folder: Path) -> dict[str, Any]:
    """summary.json, plots and report.html over the seeds of one config, unless they are there already; returns the summary."""
    summary = summarise(results)
    text, path = json.dumps(summary, indent=1), folder / "summary.json"
    if path.exists() and path.read_text() == text:
        return summary
    plots = [(f"final accuracies, {len(results)} seeds", draw_final(results, folder))]
    for name in ("accuracy_matrix.png", "recovery.png"):
        plots += [(name_of(r), p) for r in results for p in (folder / f"seed-{r.seed}").glob(name)]
    write_atomic(folder / "report.html", page(f"{results[0].method} on {results[0].benchmark}", results, plots))
    write_atomic(path, text)
    return summary


def common(environments: list[dict[str, Any]]) -> dict[str, Any]:
    """Of several environments, such as those of several seeds: a value that is the same in all, else the list of them."""
    merged = {name: [e.get(name) for e in environments] for name in {k: None for e in environments for k in e}}
    return {name: values[0] if values.count(values[0]) == len(values) else values for name, values in merged.items()}


def spread(values: list[float | None]) -> dict[str, float | None]:
    """{"mean", "std"}: sample standard deviation, null for one value; both null where a value is."""
    if not values or any(v is None for v in values):
        return {"mean": None, "std": None}
    return {"mean": statistics.fmean(values), "std": statistics.stdev(values) if len(values) > 1 else None}


COLUMNS = {  # of the tables: name -> (heading, unit)
    "acc": ("ACC", "%"),
    "bwt": ("BWT", "pp"),
    "forgetting": ("forgetting", "pp"),
    "validation": ("on validation rows", "%"),
    "peak": ("peak", "%"),
    "kept": ("final / peak", ""),
    "task_inference": ("task inferred", "%"),
    "combination": ("new tasks", "%"),
    "nearest_mask": ("nearest mask alone", "%"),
    "own_mask": ("own mask", "%"),
    "used_fraction": ("used", ""),
    "paper_cap": ("CAP, paper's formula", "%"),
    "measured_cap": ("CAP, stored bits", "%"),
    "huffman_cap": ("CAP, joint Huffman", "%"),
    "seconds": ("time", "s"),
}


def table_row(result: Result) -> dict[str, float | None]:
    """The numbers of a result that tables show, by the names of COLUMNS."""
    capacity, report = result.capacity or {}, result.method_report
    # of methods that measure their tasks at the best epoch on validation rows, on these and on the test rows
    validation, peak = (metrics.mean(report.get(name, [])) for name in ("validation", "peak"))
    return {
        "acc": result.acc,
        "bwt": result.bwt,
        "forgetting": result.forgetting,
        "validation": validation,
        "peak": peak,
        "kept": metrics.ratio(result.acc, peak),
        "task_inference": (result.task_inference or {}).get("accuracy"),
        **{name: report.get(f"{name}_mean") for name in ("combination", "nearest_mask", "own_mask")},
        "used_fraction": capacity.get("used_fraction"),
        "paper_cap": capacity.get("paper_cap"),
        "measured_cap": capacity.get("measured_cap"),
        "huffman_cap": capacity.get("huffman_cap"),
        "seconds": result.seconds["total"],
    }


# ---- plots and page -------------------------------------------------------------------------------------------------


def plot(path: Path, paint: Callable[[Any], None], **labels: Any) -> Path:
    """A PNG of what `paint` puts on the axes; labels are the axes'. Returns the path."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6, 3.8), dpi=100)
    axes = figure.add_axes((0.14, 0.13, 0.83, 0.78))
    paint(axes)
    axes.set(**labels)
    for axis in (axes.xaxis, axes.yaxis):
        if axis.get_label_text().endswith("task"):
            axis.get_major_locator().set_params(integer=True)
    FigureCanvasAgg(figure).print_png(path, metadata={"Software": None})
    return path


def draw(result: Result, folder: Path) -> list[Path]:
    """PNGs of a run into the folder: the matrix, a curve per task, the used fraction, recoveries of masks, the method's own curves, how
    masks share weights, where there are such; and the final accuracies."""
    made = []

    def save(name: str, paint: Callable[[Any], None], title: str, **labels: Any) -> None:
        made.append(plot(folder / name, paint, title=title, **labels))

    if result.accuracy_matrix is not None:
        values = _numbers(result.accuracy_matrix)
        save("accuracy_matrix.png", lambda axes: _heat(axes, values), "accuracy (%)", xlabel="task", ylabel="after task")
        save("tasks.png", lambda axes: _curves(axes, values), "each task", xlabel="after task", ylabel="accuracy (%)")
    if used := (result.capacity or {}).get("used_fraction_per_task"):
        save(
            "used_fraction.png",
            lambda axes: axes.plot(used, marker="."),
            "share of weights used",
            xlabel="after task",
            ylim=(0, 1),
        )
    if recovery := result.method_report.get("recovery"):
        labels = {"xlabel": "step of the recovery", "ylabel": f"of {recovery['gains']} gains, differ"}
        save("recovery.png", lambda axes: _recoveries(axes, recovery), "distance to the task's own mask", **labels)
    for title, curve in result.method_report.get("curves", {}).items():
        labels = {"xlabel": curve["x"], "ylabel": curve["y"]}
        save(f"{title.replace(' ', '_')}.png", lambda axes, lines=curve["lines"]: lines_on(axes, lines), title, **labels)
    if reused := result.method_report.get("reuse"):
        made += draw_reuse(reused, folder)
    return [*made, draw_final([result], folder)]


def draw_reuse(reused: dict[str, Any], folder: Path) -> list[Path]:
    """PNGs of how masks share weights (`reuse.reuse_report`)."""
    made = []

    def save(name: str, paint: Callable[[Any], None], title: str, **labels: Any) -> None:
        made.append(plot(folder / name, paint, title=title, **labels))

    shares, layers = reused["tasks"], {name: _later(shares) for name, shares in reused["layers"].items()}
    save("reuse_tasks.png", lambda axes: _shares(axes, shares), "whose weights a mask opens", xlabel="task", ylim=(0, 1))
    if len(shares["none"]) > 1:
        save("reuse_layers.png", lambda axes: _layers(axes, layers), "the same by layer, mean of later tasks", ylim=(0, 1))
    if reused["correlation"] is not None:
        pairs = _numbers(reused["correlation"])
        span = min([0.0, *(v for row in pairs for v in row if v == v)]), 1.0
        save(
            "correlation.png",
            lambda axes: _heat(axes, pairs, span, 2),
            "correlation of the masks",
            xlabel="task",
            ylabel="task",
        )
    if found := reused["pairs"]:
        labels = {"ylabel": "% of the weights", "title": "open in two masks, mean over pairs"}
        save("overlap.png", lambda axes: _overlaps(axes, {**found["layers"], "all": found["all"]}), **labels)
    return made


def _recoveries(axes: Any, recovery: dict[str, Any]) -> None:
    """A line a task; one that ends nearer to another task's mask is dashed and says so."""
    for task, (nearest, *ways) in enumerate(zip(recovery["nearest"], *recovery["distance"].values())):
        label = f"task {task}" + ("" if nearest == task else f", ends nearest to task {nearest}")
        axes.plot([sum(parts) for parts in zip(*ways)], "-" if nearest == task else "--", marker=".", label=label)
    axes.legend(fontsize=7)


def lines_on(axes: Any, curves: dict[str, list]) -> None:
    """A line each of label -> [(x, y), ...]."""
    for label, points in curves.items():
        axes.plot(*zip(*points), marker="." if len(points) <= 50 else None, label=label)
    axes.legend(fontsize=6)


def mean_curves(results: list[Result]) -> dict[str, dict[str, Any]]:
    """The curves of several seeds' method reports as one, each point the mean over the seeds that have it."""
    found: dict[str, dict[str, Any]] = {}
    for title in dict.fromkeys(title for r in results for title in r.method_report.get("curves", {})):
        each = [r.method_report["curves"][title] for r in results if title in r.method_report.get("curves", {})]
        lines: dict[str, dict[float, list[float]]] = {}
        for name, x, y in ((name, x, y) for curve in each for name, points in curve["lines"].items() for x, y in points):
            lines.setdefault(name, {}).setdefault(x, []).append(y)
        means = {name: [[x, statistics.fmean(ys)] for x, ys in points.items()] for name, points in lines.items()}
        found[title] = {**each[0], "lines": means}
    return found


def draw_final(results: list[Result], folder: Path) -> Path:
    """final.png: the accuracies after the last task, a line a result."""
    labels = {"xlabel": "task", "ylabel": "accuracy (%)", "title": "after the last task"}
    return plot(folder / "final.png", lambda axes: _finals(axes, results), **labels)


def _numbers(rows: list[Vector]) -> list[list[float]]:
    """NaN for null."""
    return [[float("nan") if v is None else v for v in row] for row in rows]


def _heat(axes: Any, values: list[list[float]], span: tuple[float, float] = (0.0, 100.0), digits: int = 1) -> None:
    image = axes.imshow(values, vmin=span[0], vmax=span[1], cmap="viridis", interpolation="nearest")
    if len(values) > 10:
        axes.figure.colorbar(image)
        return
    for t, row in enumerate(values):
        for j, v in enumerate(row):
            if v == v:
                dark = v < span[0] + 0.6 * (span[1] - span[0])
                axes.text(j, t, f"{v:.{digits}f}", ha="center", va="center", color="white" if dark else "black", fontsize=8)


SHARED = {"all": "used by all earlier tasks", "some": "by some", "none": "by none"}  # the shares of reuse.py, for legends


def _shares(axes: Any, shares: dict[str, Vector]) -> None:
    """Stacked bars."""
    n = len(shares["none"])
    base = [0.0] * n
    for name, label in SHARED.items():
        heights = [v or 0.0 for v in shares[name]]
        axes.bar(range(n), heights, 0.8 if n <= 50 else 1.0, base, label=label)
        base = [a + b for a, b in zip(base, heights)]
    axes.legend(fontsize=7)


def _layers(axes: Any, layers: dict[str, dict[str, float | None]]) -> None:
    _shares(axes, {name: [shares[name] for shares in layers.values()] for name in SHARED})
    _name_layers(axes, list(layers))


def _overlaps(axes: Any, layers: dict[str, dict[str, float]]) -> None:
    """Bars, and what independent masks would share."""
    axes.bar(range(len(layers)), [found["measured"] for found in layers.values()], 0.8, label="measured")
    axes.plot(range(len(layers)), [found["expected"] for found in layers.values()], "k_", markersize=8, label="independent masks")
    axes.legend(fontsize=7)
    _name_layers(axes, list(layers))


def _name_layers(axes: Any, names: list[str]) -> None:
    many = len(names) > 4
    axes.set_xticks(range(len(names)), names, rotation=90 if many else 0, fontsize=7)
    if many:  # room for the names
        axes.set_position((0.14, 0.28, 0.83, 0.63))


def _later(shares: dict[str, Vector]) -> dict[str, float | None]:
    """Means over all tasks but the first, which has no earlier ones."""
    return {name: metrics.mean(values[1:]) for name, values in shares.items()}


def _curves(axes: Any, values: list[list[float]]) -> None:
    n = len(values)
    for j in range(n):
        axes.plot(range(j, n), [row[j] for row in values[j:]], marker=".", label=f"task {j}")
    if n <= 10:
        axes.legend(fontsize=7)


def _finals(axes: Any, results: list[Result]) -> None:
    several = len({result.benchmark for result in results}) > 1
    for result in results:
        label = name_of(result) if several else f"{result.method} {result.scenario}, seed {result.seed}"
        axes.plot([float("nan") if v is None else v for v in result.final], marker=".", label=label)
    axes.legend(fontsize=7)


def name_of(result: Result) -> str:
    """A result's label in plots and tables."""
    return f"{result.method}, {result.benchmark} {result.scenario}, seed {result.seed}"


def captioned(results: list[Result], plots: list[Path]) -> list[tuple[str, Path]]:
    """Plots with the name of what they show."""
    return [(", ".join(map(name_of, results)), p) for p in plots]


def number(value: float | None, digits: int = 2) -> str:
    """A number for people; a dash where there is none."""
    return "–" if value is None else f"{value:.{digits}f}"


def page(title: str, results: list[Result], plots: list[tuple[str, Path]]) -> str:
    """One self-contained HTML page: table, plots (caption, PNG) embedded, config and environment of each run."""
    shown = [c for c in COLUMNS if any(table_row(r)[c] is not None for r in results)]
    head = "".join(f"<th>{html.escape(COLUMNS[c][0])}{f' ({COLUMNS[c][1]})' if COLUMNS[c][1] else ''}</th>" for c in shown)
    body = "".join(
        f"<tr><td>{html.escape(name_of(r))}</td>" + "".join(f"<td>{number(table_row(r)[c])}</td>" for c in shown) + "</tr>"
        for r in results
    )
    told = [
        {k: v for k, v in r.method_report.items() if k != "reuse"} for r in results
    ]  # reuse is a table for every task: in plots
    facts = [
        json.dumps({"config": r.config, "environment": r.environment, "method": m, "capacity": r.capacity}, indent=1)
        for r, m in zip(results, told)
    ]
    details = "".join(
        f"<details><summary>{html.escape(name_of(r))}: config and environment</summary><pre>{html.escape(text)}</pre></details>"
        for r, text in zip(results, facts)
    )
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{html.escape(title)}</title><style>{STYLE}</style>"
        f"<h1>{html.escape(title)}</h1><table><tr><th>run</th>{head}</tr>{body}</table>{figures(plots)}{details}</html>\n"
    )


def figures(plots: list[tuple[str, Path]]) -> str:
    """Plots (caption, PNG) as HTML, the pictures within it."""
    return "".join(
        f'<figure><img alt="{html.escape(caption)}" src="data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}">'
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
        for caption, path in plots
    )
