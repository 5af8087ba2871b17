"""Writes docs/results.md from the tables of docs/results: `python docs/results.py`, or `--check` to fail where they differ."""

import json
import sys
from pathlib import Path
from typing import Any

from subnet_pipelines.report import common
from subnet_pipelines.tables import as_markdown, read_table

HERE = Path(__file__).parent
LEAD = """# Results

Runs of `subnet-kernels reproduce TABLE` on real data. Every section is made from what that command wrote as `table.json`, which lies in
`docs/results/` as it was, a folder a table; it holds versions, machine, commit, seconds and seeds of every cell. Seconds are of whole
processes on machines that did other work beside, so they vary from seed to seed. This page: `python docs/results.py`.
"""


def tables() -> list[dict[str, Any]]:
    """What lies there, by table; the cells of several files of a table stand side by side, each with its own environment."""
    found = []
    for folder in sorted(path for path in (HERE / "results").iterdir() if path.is_dir()):
        records = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
        cells: dict[tuple[str, str], dict[str, Any]] = {}
        for cell in (cell for record in records for cell in record["cells"]):
            place = cell["cell"], cell["fidelity"]
            if cell["ours"] or (cell["status"] == "paper only" and place not in cells):
                cells[place] = cell
        order = [cell["cell"] for cell in records[0]["cells"]]
        kept = sorted(cells.values(), key=lambda cell: order.index(cell["cell"]))
        environment = common([cell["environment"] for cell in kept if cell["environment"]])
        environment = {k: ", ".join(dict.fromkeys(each_of(v))) if isinstance(v, list) else v for k, v in environment.items()}
        source = read_table(folder.name).source  # which files had not before there were tables of other papers
        found.append({"source": source, **records[0], "cells": kept, "environment": environment})
    return found


def each_of(values: list[Any]) -> list[str]:
    """What a field says in several cells, where a cell's own seeds may differ too."""
    return [str(v) for value in values for v in (value if isinstance(value, list) else [value])]


def figures_of(table: str) -> list[Path]:
    """The figures that `reproduce` drew beside the table, where they are kept."""
    return sorted((HERE / "results" / table).glob("*.png"))


def page() -> str:
    """The page as the files have it."""
    parts = [LEAD]
    for record in tables():
        spent: dict[str, float] = {}
        for cell in record["cells"]:
            if cell["ours"]:
                name = cell["cell"].split("/")[0]
                spent[name] = spent.get(name, 0.0) + cell["ours"]["seconds"]["mean"] * len(cell["seeds"])
        parts.append(f"## {as_markdown(record, '##')}")
        parts.append(f"Runs in all: {', '.join(f'{name} {seconds / 60:.0f} minutes' for name, seconds in spent.items())}.\n")
        parts += [f"![{path.stem}](results/{path.parent.name}/{path.name})" for path in figures_of(record["table"])]
    return "\n".join(parts)


def main() -> int:
    target, new = HERE / "results.md", page()
    if "--check" in sys.argv:
        if not target.exists() or target.read_text() != new:
            print("docs/results.md differs from docs/results; run python docs/results.py", file=sys.stderr)
            return 1
        return 0
    target.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
