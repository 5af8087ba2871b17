"""Writes the README's figures from the result files: `python bench/readme.py`, or `--check` to fail where they differ."""

import json
import sys
from pathlib import Path

from figures import FLOORS, groups, text

HERE = Path(__file__).parent
README = HERE.parent / "README.md"
BEGIN, END = "<!-- figures: python bench/readme.py -->", "<!-- end of figures -->"
SHOWN = (
    "step",
    "activate, cached",
    "activate, in place from the cache",
    "view",
    "convert",
    "select",
    "refresh_",
    "threshold",
    "pack",
    "union_",
    "count",
    "masked_linear",
    "layer",
    "mixed_linear",
    "mixed_linear_grad",
    "compressed_linear",
    "update",
    "straight_through",
    "apply",
    "restore_",
    "superpose",
    "superpose_grad",
    "alpha_grad",
    "one_shot",
)


def tables() -> str:
    """A Markdown table for every result file: one thread or a GPU, minima; a rival's time over ours, bold below 1, where we lose."""
    parts = []
    for path in sorted((HERE / "results").glob("*.json")):
        found = json.loads(path.read_text())
        shown = groups([row for row in found["rows"] if row["threads"] <= 1 and row["bench"] in SHOWN])
        card = any(row["threads"] == 0 for row in found["rows"])
        versions = sorted({row["versions"]["torch"] for row in found["rows"]})
        commits = sorted({row["commit"] for row in found["rows"]})
        how = "one thread, minimum of repeated runs"
        if card:
            where = found["machine"]
            how = (
                f"driver {where['driver']}, CUDA {where['cuda']}, minimum of repeated runs, each from a cold L2 cache and replayed "
                "from a CUDA graph where it can be captured (eager steps: on the host)"
            )
        parts.append(
            f"{found['machine']['model']}, {how}, torch {', '.join(versions)}, commit {', '.join(commits)}. "
            "Each rival's time over ours, measured in one run: above 1 ours is faster, in **bold** it is slower. The floor is the time "
            "of reading, or of reading and writing, the same bytes with PyTorch; the column has ours over it."
            + (" A target that was missed stands behind its ratio." if any(g.targets for g in shown) else "")
            + "\n"
        )
        failed = {(row["bench"], row["case"]): row["torch.compile"] for row in found["rows"] if "torch.compile" in row}
        parts.append("| op | case | ours (µs) | ours / floor | rivals: their time / ours |\n|---|---|---|---|---|")
        for g in sorted(shown, key=lambda g: (SHOWN.index(g.bench), g.case)):
            missed = {n: g.targets[n] for n, ratio in g.ratios.items() if ratio < g.targets.get(n, 0)}
            floors = [
                f"{text(1 / ratio)} ({n.removeprefix('floor: ')})" + (f" [target {text(1 / missed[n])}]" if n in missed else "")
                for n, ratio in g.ratios.items()
                if n.startswith(FLOORS)
            ]
            rivals = [
                (f"**{n} {text(ratio)}**" if ratio < 1 and g.is_rival(n) else f"{n} {text(ratio)}")
                + (f" [target {text(missed[n])}]" if n in missed else "")
                for n, ratio in g.ratios.items()
                if not n.startswith(FLOORS)
            ]
            rivals += [f"torch.compile {failed[g.bench, g.case]}"] if (g.bench, g.case) in failed else []
            parts.append(f"| `{g.bench}` | {g.case} | {g.us:,.1f} | {', '.join(floors) or '–'} | {', '.join(rivals)} |")
        parts.append("")
    return "\n".join(parts)


def main() -> int:
    page = README.read_text()
    before, rest = page.split(BEGIN)
    new = f"{before}{BEGIN}\n{tables()}\n{END}{rest.split(END)[1]}"
    if "--check" in sys.argv:
        if new != page:
            print("README.md: the figures differ from bench/results; run python bench/readme.py", file=sys.stderr)
            return 1
        return 0
    README.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
