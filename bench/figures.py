"""Ratios from the result files, as a table and a bar chart an op: `python bench/figures.py [FOLDER]` draws all that there is.

A ratio is a rival's time over ours: above 1 ours is faster. Losses are marked; memory floors and variants of ours are no rivals.
"""

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

RESULTS = Path(__file__).parent / "results"
OURS = ("ours, 30 % frozen", "update, fused", "superpose, counts", "ours")
FLOORS = (
    "floor: ",
    "read once",
    "read the bits once",
    "same bytes",
    "about the bytes",
    "clone",
)  # they move the bytes and mask nothing
# Okabe and Ito's blue, vermilion and grey, which every kind of colour vision tells apart; a loss is hatched too
WIN, LOSS, ASIDE = "#0072B2", "#D55E00", "#999999"


class Group(NamedTuple):
    """One case of a benchmark on so many threads, 0 on a GPU: which callable is ours, its microseconds, and the others' times over it."""

    bench: str
    case: str
    threads: int
    name: str
    us: float
    ratios: dict[str, float]
    targets: dict[str, float] = {}  # of some of the others: the ratio they were to have at least

    @property
    def where(self) -> str:
        """The number of threads, for a heading; nothing on a GPU."""
        return f", {self.threads} thread{'s' if self.threads > 1 else ''}" if self.threads else ""

    def is_rival(self, name: str) -> bool:
        """Whether it is another's way to do the same, and no memory floor or variant of ours."""
        return not name.startswith(("ours", self.bench, *FLOORS))


def groups(rows: Sequence[dict]) -> list[Group]:
    """The cases of a result file's rows."""
    cases: dict[tuple[str, str, int], dict[str, float]] = {}
    targets: dict[tuple[str, str, int], dict[str, float]] = {}
    for row in rows:
        key = row["bench"], row["case"], row["threads"]
        cases.setdefault(key, {})[row["name"]] = row["min"]
        if "target" in row:
            targets.setdefault(key, {})[row["name"]] = row["target"]
    found = []
    for key, times in cases.items():
        name = next((n for n in (key[0], *OURS) if n in times), next(iter(times)))
        ratios = {n: t / times[name] for n, t in times.items() if n != name}
        found.append(Group(*key, name, times[name], ratios, targets.get(key, {})))
    return found


def misses(found: Sequence[Group]) -> list[str]:
    """A line for each target that was missed."""
    lines = []
    for g in found:
        for name, target in g.targets.items():
            if g.ratios.get(name, target) < target:
                lines.append(f"MISS {g.bench}, {g.case}: {name} takes {text(g.ratios[name])} of ours, target {text(target)}")
    return lines


def text(ratio: float) -> str:
    """A ratio in two digits."""
    return f"{ratio:.2g}" if ratio < 10 else f"{ratio:.0f}"


def table(found: Sequence[Group]) -> str:
    """A line for each case and each other callable of it; losses are marked."""
    lines = ["", "times ours: above 1 ours is faster, minima of one run"]
    for g in found:
        lines.append(f"\n{g.bench}, {g.case}{g.where}: {g.name} {g.us:,.1f} us")
        for name, ratio in g.ratios.items():
            note = "  <- LOSS" if g.is_rival(name) and ratio < 1 else ""
            note += f"  <- MISS of {text(g.targets[name])}" if ratio < g.targets.get(name, 0) else ""
            lines.append(f"  {text(ratio):>8} x  {name}{note}")
    return "\n".join(lines)


def draw(found: Sequence[Group], title: str, path: Path) -> None:
    """A bar chart of one benchmark's ratios on a logarithmic axis, from 1 outwards."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    lines: list[tuple[float, str, Group | None, str]] = []  # (place, label, group or a heading's None, name)
    place = 0.0
    for g in found:
        lines.append((place, f"{g.case}{g.where}", None, ""))
        for name in g.ratios:
            place += 1
            lines.append((place, name, g, name))
        place += 1.6
    height = 1.3 + 0.22 * place
    figure = Figure(figsize=(9, height), dpi=100)
    axes = figure.add_axes((0.36, 0.6 / height, 0.6, 1 - 1.2 / height))
    for at, label, g, name in lines:
        where = dict(va="center", transform=axes.get_yaxis_transform())
        if g is None:
            axes.text(-0.59, at, label, fontsize=9, fontweight="bold", ha="left", **where)
            continue
        ratio = g.ratios[name]
        colour = ASIDE if not g.is_rival(name) else WIN if ratio >= 1 else LOSS
        axes.barh(
            at, ratio - 1, 0.75, left=1, color=colour, hatch="////" if colour == LOSS else None, edgecolor="white", linewidth=0
        )
        axes.text(-0.01, at, label, fontsize=8, ha="right", **where)
        end = dict(xytext=(3 if ratio >= 1 else -3, 0), textcoords="offset points", fontsize=8, va="center")
        note = f"{text(ratio)}× loss" if colour == LOSS else f"{text(ratio)}×"
        axes.annotate(note, (ratio, at), ha="left" if ratio >= 1 else "right", **end)
    values = [r for g in found for r in g.ratios.values()] or [1.0]
    axes.set(
        xscale="log",
        xlim=(min(*values, 0.7) / 2, max(*values, 1.5) * 2.5),
        ylim=(place - 0.4, -0.8),
        yticks=[],
        xlabel="time over ours (log): above 1 ours is faster",
    )
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}×")
    axes.set_title(title, fontsize=9, loc="right")
    axes.axvline(1, color="black", linewidth=0.8)
    axes.spines[["top", "right", "left"]].set_visible(False)
    kinds = [(WIN, "ours faster", None), (LOSS, "ours slower", "////"), (ASIDE, "memory floor or variant of ours", None)]
    handles = [Patch(facecolor=c, label=label, hatch=h, edgecolor="white", linewidth=0) for c, label, h in kinds]
    figure.legend(handles=handles, loc="upper left", ncols=3, fontsize=8, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure).print_png(path, metadata={"Software": None})


def report(file: Path, folder: Path, wanted: Callable[[Group], bool] = lambda group: True) -> str:
    """Draw the wanted cases of a result file into the folder, an op a PNG; returns their table and where the drawings are."""
    results = json.loads(file.read_text())
    found = [g for g in groups(results["rows"]) if wanted(g)]
    made = []
    for bench in dict.fromkeys(g.bench for g in found):
        made.append(folder / f"{bench.rstrip('_')}.png")
        draw([g for g in found if g.bench == bench], f"{bench} on {results['machine']['model']}", made[-1])
    return "\n".join([table(found), "", *map(str, made)])


if __name__ == "__main__":
    for path in sorted(RESULTS.glob("*.json")):
        print(report(path, Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS))
