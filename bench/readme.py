"""Writes docs/figures.md from the result files, and some of its rows into the README: `python bench/readme.py`, or `--check` to fail
where they differ."""

import json
import sys
from pathlib import Path

from figures import FLOORS, groups, text

HERE = Path(__file__).parent
README, ALL = HERE.parent / "README.md", HERE.parent / "docs" / "figures.md"
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
    "max_pool_relu",
    "lasem",
)
FEW = {  # what the cases in the README begin with, of every op one that training or serving a network comes to; of others all
    "select": ("cold, 20 layers",),
    "refresh_": ("warm n=[78400, 10000] float32 density=0.3 bits",),
    "threshold": ("20 layers",),
    "pack": ("n=24000000", "n=100000000"),
    "union_": ("n=24000000", "n=100000000"),
    "count": ("n=24000000", "n=100000000"),
    "masked_linear": ("1024x1024 B=32 ", "4096x4096 B=256 "),
    "layer": ("forward+backward 1024x1024 B=32 ", "forward+backward 4096x4096 B=2048 "),
    "mixed_linear": ("B=64 T=64 1024x1024 float32", "B=64 T=64 4096x4096"),
    "compressed_linear": ("B=1 4096x4096 bfloat16 density=0.1",),
    "update": ("adam, 20 weights",),
    "straight_through": ("n=2359296 float32", "n=11166912 float32"),
    "apply": ("n=2359296 float32", "n=11166912 float32"),
    "restore_": ("n=2359296 float32", "n=11166912 float32"),
    "superpose": ("forward and backward, shape=(300, 784) K=250 ",),
    "superpose_grad": ("shape=(300, 784) K=250 ",),
    "alpha_grad": ("B=16 shape=(300, 784) K=250 ",),
    "one_shot": ("LeNet-300-100, 128 rows, K=2500 ",),
    "max_pool_relu": ("forward and backward, 80x128x16x16 window=2 bfloat16",),
    "lasem": ("hps,",),
}


def tables(some: bool = False) -> str:
    """A Markdown table for every result file: one thread or a GPU, minima; a rival's time over ours, bold below 1, where we lose.

    some: only the cases of FEW.
    """
    parts = []
    for path in sorted((HERE / "results").glob("*.json")):
        found = json.loads(path.read_text())
        shown = groups([row for row in found["rows"] if row["threads"] <= 1 and row["bench"] in SHOWN])
        shown = [g for g in shown if not some or g.case.startswith(FEW.get(g.bench, ""))]
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


def pages() -> dict[Path, str]:
    """What the two pages are to say."""
    before, rest = README.read_text().split(BEGIN)
    title = "# Figures\n\n<!-- made from bench/results by python bench/readme.py -->\n\n"
    return {README: f"{before}{BEGIN}\n{tables(some=True)}\n{END}{rest.split(END)[1]}", ALL: title + tables().rstrip() + "\n"}


def main() -> int:
    changed = {page: new for page, new in pages().items() if not page.exists() or page.read_text() != new}
    if "--check" in sys.argv:
        for page in changed:
            print(
                f"{page.relative_to(HERE.parent)}: the figures differ from bench/results; run python bench/readme.py",
                file=sys.stderr,
            )
        return 1 if changed else 0
    for page, new in changed.items():
        page.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
