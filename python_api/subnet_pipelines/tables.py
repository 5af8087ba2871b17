"""A paper's table: its cells, what is printed in them, and ours beside that as text, CSV, JSON and a page.

A table is a folder of configs/tables: table.yaml (title, source, benchmarks and rows in the paper's order, and `figures` over its cells)
and BENCHMARK/ROW.yaml (method, the paper's numbers where it prints any, settings over the recipe of that method and benchmark, fidelity,
and the `point` of a figure that the cell is: its line and its place on the x axis). A cell without a method is one that this package does
not have; it is listed with the paper's number. Where cells differ by the values of settings alone, table.yaml says all of it: `sweep`, the
values of each swept setting, and `cells`, one for each benchmark, which is run at every combination of the values; the first setting, where
its values are numbers, is the x axis of `point`, the others make its line. A table whose cells are no runs has `storage` and no cells
(storage_tables.py).
"""

from __future__ import annotations

import csv
import html
import io
import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from subnet_kernels.files import write_atomic
from subnet_pipelines.config import CONFIGS, FIDELITIES, nearest, read_yaml
from subnet_pipelines.errors import Refusal
from subnet_pipelines.report import STYLE, Result, common, figures, lines_on, mean_curves, number, plot, spread, summarise

TABLES = CONFIGS / "tables"
# Percent (mean, deviation), percent points, percent, 0-1 (from CAP), percent inferred, percent at best epochs, final over that.
PAPER = {"acc", "bwt", "cap", "used", "told", "peak", "kept"}
SHOWN = (
    "acc",
    "bwt",
    "validation",
    "peak",
    "kept",
    "task_inference",
    "combination",
    "nearest_mask",
    "own_mask",
    "used_fraction",
    "paper_cap",
    "measured_cap",
    "huffman_cap",
    "seconds",
)  # of ours, as in COLUMNS
FIGURE = {  # what a figure may say, and what holds else
    "x": "point",
    "y": "acc",
    "xlabel": "",
    "ylabel": "ACC (%)",
    "log": False,
    "lines": None,
}
AXES = {"point": set(SHOWN), "task": {"final"}, "epoch": {"loss", "val_loss", "val_accuracy"}}  # x of a figure -> its y
# x `curve` has for y the title of one of the curves that methods report, of which `lines` may name some; x `epoch` a mean over all phases
# of a task's training, or a line for each phase that `lines` names


@dataclass(frozen=True)
class Cell:
    """One number of a table; name is BENCHMARK/ROW."""

    name: str
    label: str
    paper: dict[str, Any] = field(default_factory=dict)
    method: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    fidelity: str = "code"
    note: str | None = None
    point: tuple[str, float] | None = None

    @property
    def benchmark(self) -> str:
        return self.name.split("/")[0]


@dataclass(frozen=True)
class Table:
    """A paper's table; cells in its order, a benchmark after the other."""

    name: str
    title: str
    source: str
    cells: list[Cell]
    figures: dict[str, dict[str, Any]] = field(default_factory=dict)  # title -> FIGURE's words
    storage: dict[str, Any] | None = None  # what storage_tables.py computes, in place of cells


def table_names() -> list[str]:
    """The tables that there are."""
    return sorted(path.parent.name for path in TABLES.glob("*/table.yaml"))


def read_table(name: str) -> Table:
    """A table by the name of its folder. Raises Refusal where there is none, or a file of it is wrong."""
    if name not in table_names():
        raise Refusal(f"table {name!r} is unknown{nearest(name, table_names())}")
    head = read_yaml(TABLES / name / "table.yaml")
    files = {str(path.relative_to(TABLES / name).with_suffix("")): path for path in (TABLES / name).glob("*/*.yaml")}
    names = [f"{b}/{row}" for b in head.get("benchmarks", []) for row in head.get("rows", [])]
    if stray := sorted(set(files) - set(names)):
        raise Refusal(f"{files[stray[0]]}: is no benchmark and row of {TABLES / name / 'table.yaml'}")
    shown = head.get("figures", {})
    for title, words in shown.items():
        if unknown := set(words) - set(FIGURE):
            raise Refusal(f"{TABLES / name / 'table.yaml'}: {unknown.pop()} is no key of a figure; known are {', '.join(FIGURE)}")
        shown[title] = words = {**FIGURE, **words}
        if words["x"] != "curve" and words["y"] not in AXES.get(words["x"], ()):
            raise Refusal(f"{TABLES / name / 'table.yaml'}: figure {title!r} has no {words['y']} over {words['x']}")
    cells = [read_cell(n, head["rows"], files[n]) for n in names if n in files]
    cells += sweep(head["cells"], head["sweep"], TABLES / name / "table.yaml") if "sweep" in head else []
    return Table(name, head["title"], head["source"], cells, shown, head.get("storage"))


def sweep(cells: dict[str, dict[str, Any]], values: dict[str, list[Any]], path: Path) -> list[Cell]:
    """Each benchmark's cell at every combination of the swept settings' values, the first setting's fastest. Raises Refusal."""
    found, (x, *others) = [], values
    for benchmark, cell in cells.items():
        for *line, place in itertools.product(*(values[name] for name in (*others, x))):
            words = [str(value).replace("_", " ") for value in line]
            name = f"{benchmark}/{'-'.join([*words, str(place)]).replace(' ', '-')}"
            point = [", ".join(words) or benchmark, place] if isinstance(place, (int, float)) else None
            settings = {**cell.get("settings", {}), **dict(zip(others, line)), x: place}
            label = ", ".join([*words, f"{x.replace('_', ' ')} {place}"])
            found.append(make_cell(name, label, {**cell, "settings": settings, "point": point}, path))
    return found


def read_cell(name: str, rows: dict[str, str], path: Path) -> Cell:
    """One cell's file. Raises Refusal."""
    return make_cell(name, rows[name.split("/")[1]], read_yaml(path), path)


def make_cell(name: str, label: str, found: dict[str, Any], path: Path) -> Cell:
    """A cell of what its file, or the table's, says. Raises Refusal."""
    known = {f.name for f in fields(Cell)} - {"name", "label"}
    if unknown := set(found) - known:
        raise Refusal(f"{path}: {unknown.pop()} is no key of a cell; known are {', '.join(sorted(known))}")
    paper = found.get("paper", {})
    acc = paper.get("acc", [None, None]) if isinstance(paper, dict) and set(paper) <= PAPER else None
    if not isinstance(acc, list) or len(acc) != 2:
        raise Refusal(
            f"{path}: paper should hold acc: [mean, deviation], and of {', '.join(sorted(PAPER - {'acc'}))} what is printed"
        )
    if not found.get("method") and not paper:
        raise Refusal(f"{path}: a cell should have a method, or what the paper prints")
    point = found.get("point")
    if point is not None and not (isinstance(point, list) and len(point) == 2 and isinstance(point[1], (int, float))):
        raise Refusal(f"{path}: point should be [line, number], is {point!r}")
    if not isinstance(found.get("settings", {}), dict):
        raise Refusal(f"{path}: settings should be a mapping, is a {type(found['settings']).__name__}")
    if found.get("fidelity", "code") not in FIDELITIES:
        raise Refusal(f"{path}: fidelity must be one of {', '.join(FIDELITIES)}, got {found['fidelity']!r}")
    return Cell(name, label, **found)


def entry(
    cell: Cell,
    fidelity: str | None,
    results: list[Result],
    status: str,
    why: str | None,
    command: str | None,
    epochs: dict[str, list[float]] | None = None,
) -> dict[str, Any]:
    """A cell in one mode, as table.json has it. status: done, left, failed, not run, not asked for, or paper only; epochs: of
    `epoch_means`."""
    found = {"cell": cell.name, "row": cell.label, "method": cell.method, "fidelity": fidelity, "status": status, "why": why}
    found |= {"seeds": [r.seed for r in results], "paper": cell.paper, "ours": {}, "difference": None, "note": cell.note}
    found |= {
        "used_fraction_per_task": None,
        "point": cell.point,
        "final": [],
        "epochs": epochs or {},
        "curves": mean_curves(results),
    }
    found |= {"command": command, "environment": {}}
    if results:
        summary = summarise(results)
        found["ours"], found["environment"] = {name: summary[name] for name in SHOWN}, summary["environment"]
        mean, printed = summary["acc"]["mean"], cell.paper.get("acc", [None])[0]
        if None not in (mean, printed):
            found["difference"] = mean - printed
        found["used_fraction_per_task"] = (results[0].capacity or {}).get("used_fraction_per_task")
        found["final"] = [spread(list(values))["mean"] for values in zip(*(r.final for r in results))]
    return found


def epoch_means(log: Path) -> dict[str, list[float]]:
    """What a run's metrics.jsonl says of its epochs: means over the tasks that had the epoch, by epoch, under the name of what was
    measured; and under "PHASE, NAME" those over one phase of their training."""
    found: dict[str, list[list[float]]] = {}
    for line in map(json.loads, log.read_text().splitlines()):
        for name in AXES["epoch"] if line["kind"] == "epoch" else ():
            for key in (name, f"{line['phase']}, {name}") if line.get(name) is not None else ():
                values = found.setdefault(key, [])
                values += [[] for _ in range(line["epoch"] + 1 - len(values))]
                values[line["epoch"]].append(line[name])
    return {name: [sum(each) / len(each) for each in epochs] for name, epochs in found.items() if epochs and all(epochs)}


def spelt(value: Any, digits: int = 2) -> str:
    """A number, {"mean", "std"} or [mean, std] for people."""
    if isinstance(value, dict):
        value = [value["mean"], value["std"]]
    if isinstance(value, list):
        mean, std = value
        return number(mean, digits) + (f" ± {number(std, digits)}" if mean is not None and std is not None else "")
    return number(value, digits)


COLUMNS = [  # after the row's name: heading, whose number, its name, digits
    ("ACC (%)", "ours", "acc", 2),
    ("paper", "paper", "acc", 2),
    ("difference", "", "difference", 2),
    ("BWT (pp)", "ours", "bwt", 2),
    ("paper", "paper", "bwt", 2),
    ("on validation rows (%)", "ours", "validation", 2),
    ("peak (%)", "ours", "peak", 2),
    ("paper", "paper", "peak", 2),
    ("final / peak", "ours", "kept", 2),
    ("paper", "paper", "kept", 2),
    ("inferred (%)", "ours", "task_inference", 2),
    ("paper", "paper", "told", 2),
    ("new tasks (%)", "ours", "combination", 2),
    ("nearest mask", "ours", "nearest_mask", 2),
    ("own mask", "ours", "own_mask", 2),
    ("used", "ours", "used_fraction", 3),
    ("from CAP", "paper", "used", 3),
    ("CAP (%)", "ours", "paper_cap", 2),
    ("paper", "paper", "cap", 2),
    ("CAP, stored bits", "ours", "measured_cap", 2),
    ("CAP, joint Huffman", "ours", "huffman_cap", 2),
    ("seeds", "", "seeds", 0),
    ("time (s)", "ours", "seconds", 0),
]
ALSO = [
    ("ACC (%)", "acc", 2),
    ("peak (%)", "peak", 2),
    ("final / peak", "kept", 2),
    ("inferred (%)", "task_inference", 2),
    ("used", "used_fraction", 3),
]  # of another mode than the table's


def lines_of(entries: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """One benchmark's entries for people: headings and rows. Another mode than the table's is columns of its row; a column in which no row
    has a number is left out."""
    rows = {}
    for e in entries:
        rows.setdefault(e["cell"], []).append(e)
    other = next((e[1]["fidelity"] for e in rows.values() if len(e) > 1), None)
    headings = ["row", *(c[0] for c in COLUMNS), *(f"{other}: {c[0]}" for c in ALSO if other)]
    found = []
    for first, *more in rows.values():
        also = more[0]["ours"] if more else {}
        row = [first["row"]]
        for _, whose, name, digits in COLUMNS:
            row.append(spelt((first[whose] if whose else first).get(name), digits) if name not in ("difference", "seeds") else "")
        row[headings.index("difference")] = "–" if first["difference"] is None else f"{first['difference']:+.2f}"
        row[headings.index("seeds")] = str(len(first["seeds"]))
        row += [spelt(also.get(name), digits) for _, name, digits in ALSO if other]
        found.append(row)
    kept = [i for i in range(len(headings)) if i < 2 or any(row[i] != "–" for row in found)]
    return [headings[i] for i in kept], [[row[i] for i in kept] for row in found]


def remarks(entries: list[dict[str, Any]]) -> list[str]:
    """What the rows cannot say: which are not done and why, and notes."""
    open_, notes = {}, {}  # what is said -> whose rows
    for e in entries:
        if e["status"] not in ("done", "not asked for", "paper only"):
            open_.setdefault(e["status"] + (f": {e['why']}" if e["why"] else ""), {})[e["row"]] = None
        if e["note"] or e["status"] == "paper only":
            notes.setdefault(e["note"] or "no such method here, the paper's number only", {})[e["row"]] = None
    return [f"{'; '.join(rows)}: {said}" for said, rows in (open_ | notes).items()]


def write_table(table: Table, entries: list[dict[str, Any]], folder: Path, scaled: str | None, facts: dict[str, Any]) -> None:
    """Print the table and write table.md, table.csv, table.json and report.html into the folder.

    scaled: what keeps the numbers from being comparable with the paper's; facts: what else table.json says.
    """
    environment = common([e["environment"] for e in entries if e["environment"]])
    record = {"schema": 1, "table": table.name, "title": table.title, "source": table.source, "scaled": scaled, **facts}
    record |= {"environment": environment, "cells": entries}
    print_parts(record)
    write_atomic(folder / "table.json", json.dumps(record, indent=1))
    write_atomic(folder / "table.csv", as_csv(entries))
    write_atomic(folder / "table.md", "# " + as_markdown(record))
    plots = [(name, path) for name, part in parts_of(record).items() for path in draw(name, part, table.figures, folder)]
    write_atomic(folder / "report.html", as_page(record, plots))
    print(f"{folder / 'report.html'}, table.md, table.csv, table.json")


def parts_of(record: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The cells of what table.json holds, by benchmark."""
    parts = {}
    for e in record["cells"]:
        parts.setdefault(e["cell"].split("/")[0], []).append(e)
    return parts


def lead_of(record: dict[str, Any]) -> list[str]:
    """What stands above a table: whose it is, and what keeps its numbers from being comparable with the paper's."""
    lead = [
        f"{record['source']}. Ours: mean ± sample standard deviation over the seeds, as the authors' code has it unless a column says "
        "otherwise. The difference is ours less the paper's, in percent points."
    ]
    if all(e["fidelity"] in (None, "sound") for e in record["cells"]):
        lead = [f"{record['source']}. Mean ± sample standard deviation over the seeds, sound where the authors' code is not."]
    if record["scaled"]:
        lead.append(f"Scaled down ({record['scaled']}): these numbers cannot be compared with the paper's.")
    return lead


def as_text(headings: list[str], rows: list[list[str]]) -> list[str]:
    """A table's lines in columns, the first one to the left."""
    widths = [max(map(len, column)) for column in zip(headings, *rows)]
    lines = [
        [row[0].ljust(widths[0]), *(word.rjust(width) for word, width in zip(row[1:], widths[1:]))] for row in [headings, *rows]
    ]
    return ["  ".join(line) for line in lines]


def as_pipes(headings: list[str], rows: list[list[str]]) -> list[str]:
    """A table's lines in Markdown."""
    head, *lines = ["| " + " | ".join(word.replace("|", "\\|") for word in row) + " |" for row in [headings, *rows]]
    return [head, "|" + "---|" + "---:|" * (len(headings) - 1), *lines]


def print_parts(record: dict[str, Any]) -> None:
    """The table on stdout."""
    for name, part in parts_of(record).items():
        headings, rows = lines_of(part)
        kept = [i for i, word in enumerate(headings) if word not in ("CAP, stored bits", "CAP, joint Huffman", "time (s)")]
        print(f"{record['title']}: {name}")
        for line in as_text([headings[i] for i in kept], [[row[i] for i in kept] for row in rows]):
            print(line)
        for line in remarks(part):
            print(f"  {line}")
        print()
    for line in lead_of(record)[1:]:
        print(line)


def as_csv(entries: list[dict[str, Any]]) -> str:
    """A line a cell and mode."""
    file = io.StringIO()
    paper = ("acc", "acc_std", "bwt", "told", "cap", "used")
    names = ["cell", "row", "method", "fidelity", "status", "seeds", *(f"paper_{n}" for n in paper), "difference"]
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow([*names, *(f"ours_{n}{part}" for n in SHOWN for part in ("", "_std"))])
    for e in entries:
        acc, std = e["paper"].get("acc", [None, None])
        printed = {**e["paper"], "acc": acc, "acc_std": std}
        ours = [v for n in SHOWN for v in (e["ours"].get(n) or {"mean": None, "std": None}).values()]
        row = [*(e[name] for name in names[:5]), " ".join(map(str, e["seeds"])), *map(printed.get, paper), e["difference"], *ours]
        writer.writerow(["" if v is None else v for v in row])
    return file.getvalue()


def as_markdown(record: dict[str, Any], level: str = "#") -> str:
    """What table.json holds as Markdown, from the title's words on; level: of the title, whose benchmarks are one below."""
    out = [record["title"], "", *(f"{line}\n" for line in lead_of(record))]
    for name, part in parts_of(record).items():
        headings, rows = lines_of(part)
        out += [f"{level}# {name}", "", *as_pipes(headings, rows)]
        out += ["", *(f"- {line}" for line in remarks(part)), ""]
    out += [f"{name}: {value}  " for name, value in record["environment"].items() if value is not None]
    return "\n".join(out) + "\n"


def as_page(record: dict[str, Any], plots: list[tuple[str, Path]]) -> str:
    """The table as one self-contained HTML page."""
    title = html.escape(record["title"])
    out = [f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title><style>{STYLE}</style>"]
    out += [f"<h1>{title}</h1>", *(f"<p>{html.escape(line)}</p>" for line in lead_of(record))]
    for name, part in parts_of(record).items():
        headings, rows = lines_of(part)
        head = "".join(f"<th>{html.escape(word)}</th>" for word in headings)
        body = "".join("<tr>" + "".join(f"<td>{html.escape(word)}</td>" for word in row) + "</tr>" for row in rows)
        out += [f"<h2>{html.escape(name)}</h2><table><tr>{head}</tr>{body}</table>"]
        out += ["<ul>", *(f"<li>{html.escape(line)}</li>" for line in remarks(part)), "</ul>"]
        out += [figures([(path.stem.replace(".", ": "), path) for owner, path in plots if owner == name])]
        commands = "\n".join(e["command"] for e in part if e["command"])
        out += [f"<details><summary>commands</summary><pre>{html.escape(commands)}</pre></details>"]
    environment = html.escape(json.dumps(record["environment"], indent=1))
    out += [f"<details><summary>environment</summary><pre>{environment}</pre></details></html>"]
    return "\n".join(out) + "\n"


def draw(name: str, entries: list[dict[str, Any]], figures: dict[str, dict[str, Any]], folder: Path) -> list[Path]:
    """PNGs of one benchmark: the table's own figures; accuracies beside the paper's, accuracy over capacity, and the share of weights in
    use task by task."""
    mine = [e for e in entries if any(e["ours"].get(name, {}).get("mean") is not None for name in ("acc", "combination"))]
    if not mine:
        return []
    made = []
    for title, words in figures.items():
        if curves := curves_of(words["x"], words["y"], mine, words["lines"]):
            path = folder / f"{name}.{title.replace(' ', '-')}.png"
            labels = {"xlabel": words["xlabel"] or words["x"], "ylabel": words["ylabel"], "title": title}
            made.append(plot(path, lambda axes, curves=curves, words=words: _lines(axes, curves, words["log"]), **labels))
    if any(e["ours"]["acc"]["mean"] is not None for e in mine):
        paint = lambda axes: _accuracies(axes, entries)  # noqa: E731
        made.append(plot(folder / f"{name}.accuracy.png", paint, xlabel="ACC (%)", title=f"{name}: ACC"))
    if any(e["ours"]["paper_cap"]["mean"] is not None for e in mine):
        made.append(
            plot(
                folder / f"{name}.capacity.png",
                lambda axes: _capacities(axes, entries),
                xlabel="CAP (%)",
                ylabel="ACC (%)",
                title=name,
            )
        )
    first = list({e["cell"]: e for e in reversed(mine)}.values())[::-1]  # in the table's own mode
    if used := [e for e in first if e["used_fraction_per_task"] and len(e["used_fraction_per_task"]) > 1]:
        paint = _used(used)
        made.append(
            plot(folder / f"{name}.used.png", paint, xlabel="after task", ylim=(0, 1.02), title=f"{name}: share of weights used")
        )
    return made


def curves_of(
    x: str, y: str, entries: list[dict[str, Any]], lines: list[str] | None = None
) -> dict[str, list[tuple[float, float]]]:
    """What a figure shows: label -> points. Over `point` a number of every cell that has one; of `curve` the lines, these or all, of that
    title that a cell's method reports; over `epoch` a curve of every cell, or of each of these phases of its training; else a curve of
    every cell."""
    found: dict[str, list[tuple[float, float]]] = {}
    several = len({e["fidelity"] for e in entries}) > 1
    for e in entries:
        mode = f" ({e['fidelity']})" if several else ""
        if x == "curve":
            for name, points in e["curves"].get(y, {"lines": {}})["lines"].items():
                if lines is None or name in lines:
                    found[f"{e['row']}: {name}{mode}"] = [tuple(point) for point in points]
        elif x == "point":
            if e["point"] and (value := e["ours"][y]["mean"]) is not None:
                found.setdefault(e["point"][0] + mode, []).append((e["point"][1], value))
        else:
            named = {f"{e['row']}: {phase}": e["epochs"].get(f"{phase}, {y}", []) for phase in lines or ()}
            for label, values in (named or {e["row"]: e["final"] if x == "task" else e["epochs"].get(y, [])}).items():
                if any(v is not None for v in values):
                    found[label + mode] = [(i + 1, v) for i, v in enumerate(values) if v is not None]
    return {label: sorted(points) for label, points in found.items()}


def _lines(axes: Any, curves: dict[str, list[tuple[float, float]]], log: bool) -> None:
    lines_on(axes, curves)
    if log:
        axes.set_xscale("log")


def _accuracies(axes: Any, entries: list[dict[str, Any]]) -> None:
    labels = list(dict.fromkeys(e["row"] for e in entries))
    axes.set_position((0.26, 0.13, 0.71, 0.78))
    papers = {e["row"]: e["paper"]["acc"] for e in entries if e["paper"].get("acc", [None])[0] is not None}
    if papers:
        means, places = [mean for mean, _ in papers.values()], [labels.index(row) for row in papers]
        deviations = [std or 0 for _, std in papers.values()]
        axes.errorbar(means, places, xerr=deviations, fmt="o", mfc="none", color="gray", label="paper")
    for mode in dict.fromkeys(e["fidelity"] for e in entries if e["ours"]):
        found = [e for e in entries if e["fidelity"] == mode and e["ours"] and e["ours"]["acc"]["mean"] is not None]
        axes.errorbar(
            [e["ours"]["acc"]["mean"] for e in found],
            [labels.index(e["row"]) for e in found],
            xerr=[e["ours"]["acc"]["std"] or 0 for e in found],
            fmt="x",
            label=f"ours ({mode})",
        )
    axes.set_yticks(range(len(labels)), labels, fontsize=7)
    axes.invert_yaxis()
    axes.legend(fontsize=7)


def _capacities(axes: Any, entries: list[dict[str, Any]]) -> None:
    printed = {e["row"]: (e["paper"]["cap"], e["paper"]["acc"][0]) for e in entries if {"cap", "acc"} <= set(e["paper"])}
    axes.plot(*zip(*printed.values()), "o", mfc="none", color="gray", label="paper") if printed else None
    for mode in dict.fromkeys(e["fidelity"] for e in entries if e["ours"]):
        found = [e["ours"] for e in entries if e["fidelity"] == mode and e["ours"]]
        points = [
            (o["paper_cap"]["mean"], o["acc"]["mean"]) for o in found if None not in (o["paper_cap"]["mean"], o["acc"]["mean"])
        ]
        axes.plot(*zip(*points), "x", label=f"ours ({mode}), the same formula") if points else None
    for row, point in printed.items():
        axes.annotate(row, point, xytext=(4, 2), textcoords="offset points", fontsize=6)
    if any(cap > 200 for cap, _ in printed.values()):
        axes.set_xscale("log")
    axes.legend(fontsize=7)


def _used(entries: list[dict[str, Any]]) -> Callable[[Any], None]:
    def paint(axes: Any) -> None:
        for e in entries:
            axes.plot(e["used_fraction_per_task"], marker=".", label=e["row"])
        for e in entries:
            if e["paper"].get("used") is not None:
                axes.axhline(e["paper"]["used"], color="lightgray", linewidth=0.8, zorder=0)
        axes.legend(fontsize=6)

    return paint
