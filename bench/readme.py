"""Writes the README's figures from the result files: `python bench/readme.py`, or `--check` to fail where they differ."""

import json
import sys
from pathlib import Path

HERE = Path(__file__).parent
README = HERE.parent / "README.md"
BEGIN, END = "<!-- figures: python bench/readme.py -->", "<!-- end of figures -->"
SHOWN = (
    *("select", "refresh_", "pack", "union_", "count", "update", "straight_through", "apply", "restore_"),
    *("superpose", "superpose_grad", "alpha_grad"),
)
OURS = ("ours, 30 % frozen", "update, fused", "superpose, counts", "ours")
FLOOR = "floor: "  # how the name of a row begins that reads, or reads and writes, the same bytes


def tables() -> str:
    """A Markdown table for every result file: one thread, minima; a rival's time over ours, bold below 1, where we lose."""
    parts = []
    for path in sorted((HERE / "results").glob("*.json")):
        found = json.loads(path.read_text())
        cases: dict[tuple[str, str], dict[str, float]] = {}
        failed: dict[tuple[str, str], str] = {}
        for row in found["rows"]:
            if row["threads"] == 1 and row["bench"] in SHOWN:
                cases.setdefault((row["bench"], row["case"]), {})[row["name"]] = row["min"]
                if "torch.compile" in row:
                    failed[row["bench"], row["case"]] = row["torch.compile"]
        versions = sorted({row["versions"]["torch"] for row in found["rows"]})
        commits = sorted({row["commit"] for row in found["rows"]})
        parts.append(
            f"{found['machine']['model']}, one thread, minimum of repeated runs, torch {', '.join(versions)}, commit {', '.join(commits)}. "
            "Each rival's time over ours, measured in one run: above 1 ours is faster, in **bold** it is slower. The floor is the time "
            "of reading, or of reading and writing, the same bytes with PyTorch; the column has ours over it.\n"
        )
        parts.append("| op | case | ours (µs) | ours / floor | rivals: their time / ours |\n|---|---|---|---|---|")
        for (bench, case), times in sorted(cases.items(), key=lambda item: (SHOWN.index(item[0][0]), item[0][1])):
            name = next((n for n in (bench, *OURS) if n in times), next(iter(times)))
            ours = times[name]
            floors = [f"{_ratio(ours / t)} ({n.removeprefix(FLOOR)})" for n, t in times.items() if n.startswith(FLOOR)]
            rivals = [
                f"**{n} {_ratio(t / ours)}**" if t < ours and not n.startswith("ours") else f"{n} {_ratio(t / ours)}"
                for n, t in times.items()
                if n != name and not n.startswith(FLOOR)
            ]
            rivals += [f"torch.compile {failed[bench, case]}"] if (bench, case) in failed else []
            parts.append(f"| `{bench}` | {case} | {ours:,.1f} | {', '.join(floors) or '–'} | {', '.join(rivals)} |")
        parts.append("")
    return "\n".join(parts)


def _ratio(value: float) -> str:
    return f"{value:.2g}" if value < 10 else f"{value:,.0f}"


def main() -> int:
    text = README.read_text()
    before, rest = text.split(BEGIN)
    new = f"{before}{BEGIN}\n{tables()}\n{END}{rest.split(END)[1]}"
    if "--check" in sys.argv:
        if new != text:
            print("README.md: the figures differ from bench/results; run python bench/readme.py", file=sys.stderr)
            return 1
        return 0
    README.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
