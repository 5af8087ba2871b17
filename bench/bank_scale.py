"""A bank of up to 100,000 tasks, simulated: `python bench/bank_scale.py [--most 100000] [--folder DIR]`; `--draw` only draws what is there.

One bank over LeNet-300-100 (784-300-100 with 100 outputs) grows by random masks, which are drawn as bytes. At each size of TASKS: the
seconds of one more task in memory, of one more on disk (up to --saved tasks), and on one thread of one-shot inference's forward and of
forward and gradient to all coefficients, for a batch of 128 rows that decides together; and the bytes. Results go to
bench/results/scale/<machine>.json, the curve to docs/bank-scale.png, and the table into docs/scale.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from bench_bank import ROWS, WIDTHS, lenet, objective, one_shot
from measure import RESULTS, commit, machine, slug_of, versions

import subnet_kernels as sk

TASKS = (100, 1_000, 2_500, 10_000, 30_000, 100_000)
FOLDER = RESULTS / "scale"
PAGE = Path(__file__).parent.parent / "docs" / "scale.md"
BEGIN, END = "<!-- table: python bench/bank_scale.py --draw -->", "<!-- end of table -->"
APPENDS = 128  # commits that are timed before each size: two blocks of 64, whose last task copies 63 and whose first copies none


def random_masks(bank: sk.MaskBank, chance: np.random.Generator) -> dict[str, torch.Tensor]:
    """A mask that opens about half of every layer: random bytes, and zero after the last weight."""
    masks = {}
    for name, layer in zip(bank.layer_names, bank.layers()):
        whole, rest = divmod(layer.weight.numel(), 8)
        drawn = np.frombuffer(chance.bytes(whole + bool(rest)), np.uint8)
        bits = np.zeros(layer.bits.numel(), np.uint8)
        bits[: len(drawn)] = drawn
        if rest:
            bits[whole] &= (1 << rest) - 1
        masks[name] = torch.from_numpy(bits)
    return masks


class Spent:
    """Seconds of calls on one thread: on the wall's clock, and of the processor, which a busy machine does not stretch as much."""

    def __init__(self):
        self.wall: list[float] = []
        self.cpu: list[float] = []

    def __call__(self, call: Callable[[], object]) -> None:
        wall, cpu = time.perf_counter(), time.process_time()
        call()
        self.cpu.append(time.process_time() - cpu)
        self.wall.append(time.perf_counter() - wall)

    def of_last(self, calls: int) -> dict[str, dict[str, float]]:
        """Least, median and most of the last calls."""
        found = {"wall": self.wall[-calls:], "cpu": self.cpu[-calls:]}
        return {clock: {"min": min(v), "median": statistics.median(v), "max": max(v)} for clock, v in found.items()}


def seconds_of(call: Callable[[], object], calls: int) -> dict[str, dict[str, float]]:
    """Of some calls, after one that is not counted."""
    call()
    spent = Spent()
    for _ in range(calls):
        spent(call)
    return spent.of_last(calls)


def held_bytes(bank: sk.MaskBank) -> int:
    """Bytes of all tensors that the bank keeps for its tasks: masks, their union, counts, task state."""
    masks = bank._masks
    held = [*(block for blocks in masks.blocks.values() for block in blocks), *masks.owned.values(), *masks.counts().values()]
    held += [tensor for name in bank.names for tensor in bank[name].state.values()]
    return sum(tensor.untyped_storage().nbytes() for tensor in held)


def resident_bytes() -> int | None:
    """Memory of this process, where the system says it."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmRSS"))
    except (OSError, StopIteration):
        return None


def check(bank: sk.MaskBank, x: torch.Tensor) -> None:
    """The gradient of the first and the last task against the dense product, before anything is timed."""
    found = one_shot(bank, x)
    weights = [layer.weight.detach() for layer in bank.layers()]
    alphas = torch.full((len(bank),), 1 / len(bank), requires_grad=True)
    y = x
    for i, (name, weight) in enumerate(zip(bank.layer_names, weights)):
        stacked = torch.stack([sk.unpack(bank.bits(task)[name], weight.shape) for task in bank.names]).float()
        y = torch.nn.functional.linear(y.relu() if i else y, weight * torch.tensordot(alphas, stacked, 1))
    torch.testing.assert_close(found, torch.autograd.grad(objective(y), alphas)[0], rtol=1e-3, atol=1e-5)


def simulate(most: int, saved: int, folder: Path) -> Iterator[dict]:
    """Rows of the table, a size each, as the bank grows."""
    torch.manual_seed(0)
    chance, x = np.random.default_rng(0), torch.randn(ROWS, WIDTHS[0])
    bank = sk.MaskBank(lenet())
    bank.commit("0", bits=random_masks(bank, chance))
    bank.superpose(None)  # from here on a commit adds to the counts too
    bank.activate(None)
    weights = sum(layer.weight.numel() for layer in bank.layers())
    for tasks in [t for t in TASKS if t <= most]:
        spent = Spent()
        while len(bank) < tasks:
            spent(partial(bank.commit, str(len(bank)), bits=random_masks(bank, chance)))
        if tasks == TASKS[0]:
            check(bank, x)
        calls = 20 if tasks <= 2_500 else 3
        bank.superpose(None)
        with torch.no_grad():
            forward = seconds_of(lambda: (bank.superpose(None), bank.model(x)), calls)
        both = seconds_of(lambda: one_shot(bank, x), calls)
        bank.activate(None)
        row = {
            "tasks": tasks,
            "append": spent.of_last(APPENDS),
            "forward": forward,
            "forward_and_gradient": both,
            "bank_bytes": held_bytes(bank),
            "float_bytes": 4 * weights * tasks,
            "resident_bytes": resident_bytes(),
            "save": None,
        }
        if tasks <= saved:
            bank.save(folder)
            spent = Spent()
            for _ in range(5):
                bank.commit(str(len(bank)), bits=random_masks(bank, chance))
                spent(partial(bank.save, folder))
            files = list(folder.iterdir())
            row["save"] = {
                **spent.of_last(5),
                "disk_bytes": sum(file.stat().st_size for file in files),
                "tasks": len(bank),
                "manifest_bytes": (folder / "manifest.json").stat().st_size,
            }
        yield row


def line(row: dict) -> str:
    """A row of the table in Markdown."""
    save = row["save"]
    disk = (f"{1e3 * save['wall']['min']:.1f}", f"{save['disk_bytes'] / save['tasks']:,.0f}") if save else ("–", "–")
    cells = [
        f"{row['tasks']:,}",
        f"{1e3 * row['append']['cpu']['median']:.2f}",
        f"{1e3 * row['append']['cpu']['max']:.2f}",
        disk[0],
        f"{1e3 * row['forward']['cpu']['min']:.2f}",
        f"{1e3 * row['forward_and_gradient']['cpu']['min']:,.1f}",
        f"{row['bank_bytes'] / 1e6:,.1f}",
        f"{row['float_bytes'] / row['bank_bytes']:.1f}",
        disk[1],
    ]
    return f"| {' | '.join(cells)} |"


HEAD = (
    "| tasks | one more task (CPU ms) | the dearest of 128 (CPU ms) | saving one more (ms) | one-shot, forward (CPU ms) | "
    "forward and gradient (CPU ms) | bank (MB) | float masks / bank | bytes a task on disk |\n" + "|---" * 9 + "|"
)


def draw(results: dict, path: Path) -> None:
    """Seconds and bytes over the number of tasks, on logarithmic axes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = results["rows"]
    tasks = [row["tasks"] for row in rows]
    figure = Figure(figsize=(9, 3.8), dpi=100)
    left, right = figure.subplots(1, 2)
    left.plot(tasks, [row["append"]["cpu"]["median"] for row in rows], marker="o", label="one more task, in memory")
    kept = [row for row in rows if row["save"]]
    left.plot(
        [row["tasks"] for row in kept], [row["save"]["wall"]["min"] for row in kept], marker="s", label="one more task, on disk"
    )
    left.plot(tasks, [row["forward"]["cpu"]["min"] for row in rows], marker="^", label="one-shot: forward")
    left.plot(
        tasks, [row["forward_and_gradient"]["cpu"]["min"] for row in rows], marker="v", label="one-shot: forward and gradient"
    )
    left.set(xscale="log", yscale="log", xlabel="tasks in the bank", ylabel="seconds (of the processor; on disk: of the clock)")
    right.plot(tasks, [row["float_bytes"] for row in rows], marker="o", color="#999999", label="masks as float32")
    right.plot(tasks, [row["bank_bytes"] for row in rows], marker="o", color="#0072B2", label="the bank")
    right.set(xscale="log", yscale="log", xlabel="tasks in the bank", ylabel="bytes in memory")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.suptitle(f"LeNet-300-100, {results['machine']['model']}", fontsize=9)
    figure.tight_layout()
    FigureCanvasAgg(figure).print_png(path, metadata={"Software": None})


def write_page(results: dict) -> None:
    """The curve, and the table between the marks of docs/scale.md."""
    draw(results, PAGE.with_name("bank-scale.png"))
    where = f"{results['machine']['model']}, one thread, torch {results['versions']['torch']}"
    table = "\n".join([f"{where}, commit {results['commit']}.\n", HEAD, *map(line, results["rows"])])
    before, rest = PAGE.read_text().split(BEGIN)
    curve = "![Seconds and bytes over the number of tasks](bank-scale.png)"
    PAGE.write_text(f"{before}{BEGIN}\n{table}\n\n{curve}\n{END}{rest.split(END)[1]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("--most", type=int, default=TASKS[-1], help="the largest number of tasks")
    parser.add_argument("--saved", type=int, default=2_500, help="the largest number of tasks that is written to disk")
    parser.add_argument("--folder", type=Path, help="where, default a temporary folder")
    parser.add_argument("--draw", action="store_true", help="measure nothing, draw what was measured last")
    given = parser.parse_args()
    path = FOLDER / f"cpu-{slug_of(machine())}.json"
    if not given.draw:
        torch.set_num_threads(1)
        results = {"machine": machine(), "commit": commit(), "versions": versions(), "rows": []}
        FOLDER.mkdir(parents=True, exist_ok=True)
        print(HEAD)
        with tempfile.TemporaryDirectory() as temporary:
            for row in simulate(given.most, given.saved, given.folder or Path(temporary)):
                print(line(row), flush=True)
                results["rows"].append(row)  # what is measured so far is kept, whatever stops the rest
                path.write_text(json.dumps(results, indent=1) + "\n")
    write_page(json.loads(path.read_text()))


if __name__ == "__main__":
    main()
