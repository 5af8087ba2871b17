"""Writes docs/results.md from the tables of docs/results: `python docs/results.py`, or `--check` to fail where they differ."""

import json
import sys
from pathlib import Path

from subnet_pipelines.tables import as_markdown

HERE = Path(__file__).parent
LEAD = """# Results

Runs of `subnet-kernels reproduce TABLE` on real data. Every section is made from a `table.json` in `docs/results/`, which that command
wrote and nobody edits; it holds versions, machine, commit, seconds and seeds of every cell. This page: `python docs/results.py`.
"""


def page() -> str:
    """The page as the files have it."""
    parts = [LEAD]
    for path in sorted((HERE / "results").glob("*.json")):
        record = json.loads(path.read_text())
        record["cells"] = [cell for cell in record["cells"] if cell["ours"] or cell["status"] == "paper only"]
        spent = {cell["cell"].split("/")[0]: 0.0 for cell in record["cells"]}
        for cell in record["cells"]:
            if cell["ours"]:
                spent[cell["cell"].split("/")[0]] += cell["ours"]["seconds"]["mean"] * len(cell["seeds"])
        parts.append(f"## {as_markdown(record, '##')}")
        parts += [f"{name}: {seconds / 60:.0f} minutes of runs in all.  " for name, seconds in spent.items()]
        parts.append("")
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
