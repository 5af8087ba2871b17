"""Writes docs/compatibility.md from docs/compatibility.json: `python docs/compatibility.py`, or `--check` to fail where they differ.

`--run` runs every cell of tests/test_compatibility.py first and writes the json, unless one fails.
"""

import json
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
KEPT, PAGE = HERE / "compatibility.json", HERE / "compatibility.md"
LEAD = """# Compatibility

What `convert` works with: every feature on models that this project did not write. Each cell is a test of `tests/test_compatibility.py`
that runs the converted model, forward and backward where the feature has a backward, on real images beside the dense model with the
same effective weights; the error against float64 is at most twice the dense model's. The models are small ones, built with random
weights from their libraries' own code (timm's where it can be imported, which takes a torchvision that fits torch). This page:
`python docs/compatibility.py --run` (minutes), or without `--run` from the last results, which lie in `docs/compatibility.json`.
"""
NOTES = """
## What a cell checks

- **checkpoints both ways**: keys and shapes of the state dict are the dense model's; a dense checkpoint loads after conversion, and
  the converted model's `dense_state_dict` into a dense model.
- **forward and backward**: gradients straight through to weights and scores, and to all that is not masked.
- **`unconvert`**: the plain model again, outputs to the bit; merged, the bits of the dense model with the effective weights.
- **autocast, `GradScaler`**: bfloat16 and float16; scores, masks and gradients of scores stay float32.
- **`torch.compile`**: `fullgraph=True`, and switching to another task compiles nothing. The backend is `aot_eager`; inductor is tested
  on layers (`tests/test_layers.py`).
- **`torch.export`**, **ONNX**: of one task, and of the live model; ONNX is run by its reference evaluator.
- **CUDA graph, on a tape**: without a GPU the ops of a step are recorded, one that would wait for a device fails the cell, and they are
  run again on other data, to the bits of eager steps. On layers the same is run on a GPU (`tests/test_cuda_graph.py`).
- **`torch.func`**: `functional_call`, `grad`, and `vmap` over two models.
- **DDP**, **FSDP2**: two processes by gloo, to the bits of one process that takes the halves of every batch in turn.
- **tasks**: each of three comes back to the bit after the others were learnt; `view`, `rename`, `remove`, `as_task`.
- **mixed-task batch**: every row of `bank.rows` as its own task alone.
- **every optimizer of `torch.optim`**: after steps of each of twelve, frozen weights and earlier tasks' outputs are the same bits.
- **Piggyback**: threshold masks, and ternary ones, over weights that do not learn.
"""


class Collector:
    """Keeps each cell's result."""

    def __init__(self):
        self.cells: dict[str, dict[str, dict[str, str]]] = {}
        self.failed: list[str] = []

    def pytest_runtest_logreport(self, report):
        known = dict(report.user_properties)
        if report.failed:
            self.failed.append(report.nodeid)
        elif "cell" in known and (report.when == "call" or report.skipped):
            model, feature = known["cell"]
            if report.skipped:
                cell = {"result": "not run", "sentence": report.longrepr[2].removeprefix("Skipped: ")}
            elif "refusal" in known:
                cell = {"result": "refused", "sentence": known["refusal"]}
            else:
                cell = {"result": "works"}
            self.cells.setdefault(model, {})[feature] = cell


def collect() -> int:
    """Run every cell and keep the results; returns 1, and keeps nothing, where one fails."""
    import pytest

    collector, tests = Collector(), HERE.parent / "tests" / "test_compatibility.py"
    options = ["-m", "long or not long", "-k", "test_cell", "-p", "no:cacheprovider"]
    pytest.main([str(tests), *options, *sys.argv[2:]], plugins=[collector])
    if collector.failed or not collector.cells:
        print("docs/compatibility.json stays as it was: " + (", ".join(collector.failed) or "no cell ran"), file=sys.stderr)
        return 1
    names = ("torch", "transformers", "timm", "onnx", "onnxscript")
    found = {d.metadata["Name"]: d.version for d in metadata.distributions()}
    git = ["git", "-C", str(HERE), "rev-parse", "--short=12", "HEAD"]
    record = {
        "versions": {"python": platform.python_version(), **{name: found[name] for name in names if name in found}},
        "commit": subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip(),
        "cells": collector.cells,
    }
    KEPT.write_text(json.dumps(record, indent=1) + "\n")
    return 0


def page(record: dict[str, Any]) -> str:
    """The page as the results have it: a row a feature, a column a model."""
    cells, sentences = record["cells"], {}
    rows = []
    for feature in next(iter(cells.values())):
        row = []
        for model in cells:
            cell = cells[model][feature]
            mark = sentences.setdefault(cell["sentence"], len(sentences) + 1) if "sentence" in cell else None
            row.append("yes" if mark is None else f"{cell['result']} [{mark}]")
        rows.append(f"| {feature} | {' | '.join(row)} |")
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    head = f"| feature | {' | '.join(cells)} |\n|{'---|' * (len(cells) + 1)}"
    notes = [f"[{mark}] {sentence}" for sentence, mark in sentences.items()]
    return "\n".join([LEAD, f"{versions}, commit {record['commit']}.", "", head, *rows, *(["", *notes] if notes else []), NOTES])


def main() -> int:
    if "--run" in sys.argv[1:2] and collect():
        return 1
    new = page(json.loads(KEPT.read_text()))
    if "--check" in sys.argv:
        if not PAGE.exists() or PAGE.read_text() != new:
            print("docs/compatibility.md differs from docs/compatibility.json; run python docs/compatibility.py", file=sys.stderr)
            return 1
        return 0
    PAGE.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
