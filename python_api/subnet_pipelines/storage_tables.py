"""What a task of ImpressLearn takes: the storage tables of its paper and of the authors' poster, and what a mask bank takes on disk.

Nothing is trained: a row is a network, masks and tasks, and its numbers follow. The formulas are those behind the printed cells: a mask is
the 16-bit places of an eighth of the weights, a new task has a float32 coefficient for every mask and layer, and bears its share of the
masks. Beside them stand the bytes of a bank in which that many masks and a new task have been saved.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
import tempfile
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import subnet_kernels as sk
from subnet_kernels.files import write_atomic
from subnet_pipelines.errors import Refusal
from subnet_pipelines.methods.masked import entry_name
from subnet_pipelines.models import MODELS, ResNet18, ResNet50
from subnet_pipelines.report import environment
from subnet_pipelines.tables import Table, as_pipes, as_text

DENSITY, PLACE_BITS = 1 / 8, 16  # of a mask as the tables count it
WORD_BITS = 64  # of a value of a mask on the poster
KB = 1024
CLOSE = 0.005  # how far a number may be from the printed one, relative to it; whole numbers must be equal
NETWORKS = {  # that are counted, and that no benchmark here needs; of pre-ResNet-200 the convolutions are those of a ResNet-200
    "resnet-34": partial(ResNet18, outputs=5, blocks=(3, 4, 6, 3), pool=4),
    "resnet-101": partial(ResNet50, outputs=10, blocks=(3, 4, 23, 3)),
    "pre-resnet-200": partial(ResNet50, outputs=10, blocks=(3, 24, 36, 3)),
}


@dataclass(frozen=True)
class Number:
    """A column: what the table calls it, its decimals, whether it must be the printed one exactly, and whether any table prints it."""

    heading: str
    digits: int = 0
    exact: bool = False
    printed: bool = True


NUMBERS = {
    "weights": Number("weights"),
    "mask_kb": Number("mask (kB)", 1),
    "mask_values": Number("values a mask"),
    "masks": Number("|M|", exact=True),
    "tasks": Number("tasks", exact=True),
    "layers": Number("layers", printed=False),
    "alphas": Number("|α|", exact=True),
    "phi": Number("Φ (kB)", 3),
    "cost": Number("C (x)", 2),
    "bits_kb": Number("bits (kB)", 1, printed=False),
}
BANK = {  # of a bank's columns: heading, decimals
    "mask_kb": ("bank: mask (kB)", 1),
    "task_kb": ("bank: new task (kB)", 2),
    "norms_kb": ("of it norms (kB)", 2),
    "phi": ("bank: Φ (kB)", 2),
    "cost": ("bank: C (x)", 2),
}


@dataclass(frozen=True)
class Row:
    """A row of a storage table; printed: its cells that are at hand, by the names of NUMBERS."""

    label: str
    printed: dict[str, int | float | str] = field(default_factory=dict)
    network: str | None = None  # whose weights and layers are counted
    outputs: int | None = None  # of its head, where they are not those of the benchmark's tasks
    head: bool = True  # whether the head has coefficients
    masks: int | None = None  # where none are printed, or not those of the other cells
    note: str | None = None


def read_rows(table: Table) -> list[Row]:
    """The rows of a storage table. Raises Refusal, naming its file."""
    path, known = f"{table.name}/table.yaml", [f.name for f in fields(Row)]
    for found in table.storage["rows"]:
        if unknown := [*(set(found) - set(known)), *(set(found.get("printed", {})) - set(NUMBERS))]:
            raise Refusal(f"{path}: {unknown[0]} is no key of a row; known are {', '.join(known)}, printed {', '.join(NUMBERS)}")
        if found.get("network") not in (None, *MODELS, *NETWORKS):
            raise Refusal(f"{path}: network must be one of {', '.join([*MODELS, *NETWORKS])}, got {found['network']!r}")
        if "network" not in found and "weights" not in found.get("printed", {}):
            raise Refusal(f"{path}: a row should have a network, or printed weights")
    return [Row(**found) for found in table.storage["rows"]]


def layer_sizes(name: str, outputs: int | None = None) -> list[int]:
    """Weights of every layer of a network, its head last; of shapes alone, without memory for the weights."""
    with torch.device("meta"):
        net = {**MODELS, **NETWORKS}[name](**({"outputs": outputs} if outputs is not None else {}))
    return [m.weight.numel() for m in net.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]


def count_of(tasks: int | str) -> int:
    """A number of tasks; "784!" is the factorial."""
    return math.factorial(int(tasks[:-1])) if isinstance(tasks, str) else tasks


def shared(mask: float, masks: int, tasks: int | str, own: float) -> float:
    """What a task takes where it has `own` for itself, and its share of some masks of size `mask`."""
    return mask * (masks / count_of(tasks)) + own


def numbers(row: Row) -> dict[str, float | int | str | None]:
    """The cells of a row, by the names of NUMBERS; null where neither a network nor a printed number says what they follow from."""
    sizes = layer_sizes(row.network, row.outputs) if row.network is not None else None
    found = dict.fromkeys(NUMBERS)
    weights = found["weights"] = sum(sizes) if sizes else row.printed["weights"]
    mask_kb = found["mask_kb"] = weights * DENSITY * PLACE_BITS / 8 / KB
    found["mask_values"] = weights / WORD_BITS
    found["bits_kb"] = (sum(map(packed_bytes, sizes)) if sizes else packed_bytes(int(weights))) / KB
    masks = found["masks"] = row.masks if row.masks is not None else row.printed.get("masks")
    tasks = found["tasks"] = row.printed.get("tasks")
    found["layers"] = len(sizes) - (not row.head) if sizes else None
    if sizes and masks is not None:
        alphas = found["alphas"] = masks * found["layers"]
        if tasks is not None:
            phi = found["phi"] = shared(mask_kb, masks, tasks, 4 * alphas / KB)
            found["cost"] = mask_kb / phi
    return found


def packed_bytes(n: int) -> int:
    """A layer's mask in a bank: a bit a weight, in lines of 512."""
    return 64 * math.ceil(n / 512)


def departures(row: Row, ours: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The printed cells that are not what the row's other cells or its network give: {name: (printed, ours)}."""
    found = {}
    for name, printed in row.printed.items():
        value = ours[name]
        same = printed == value if NUMBERS[name].exact or value is None else abs(value - printed) <= CLOSE * printed
        if not same:
            found[name] = printed, value
    return found


@torch.no_grad()
def bank_bytes(network: str, masks: int) -> dict[str, float]:
    """Bytes by which a saved bank grows with one more mask, and with one more task that is a combination of all masks; and what of either
    is the state of the network's norms, which every task has for itself.

    network: of MODELS, with the outputs of a task there, all its layers masked. No size depends on what a mask opens, so one random mask
    is committed again and again.
    """
    bank = sk.MaskBank(sk.convert(MODELS[network](), sk.SubnetConfig(density=DENSITY)))
    layers = dict(zip(bank.layer_names, bank.layers()))
    bits = {name: sk.pack(torch.rand(layer.weight.shape) < DENSITY) for name, layer in layers.items()}
    alphas = torch.full((len(layers), masks), 1 / masks)
    with tempfile.TemporaryDirectory() as folder:

        def size() -> int:
            bank.save(folder)
            return sum(file.stat().st_size for file in os.scandir(folder))

        for i in range(masks):
            before = size() if i == masks - 1 else 0
            bank.commit(entry_name(i), bits=bits)
        with_masks = size()
        bank.commit(entry_name(masks), alphas=alphas)
        with_task = size()
    norms = sum(value.numel() * value.element_size() for value in bank[entry_name(masks)].state.values())
    return {"mask": with_masks - before, "task": with_task - with_masks, "norms": norms}


def bank_numbers(row: Row, ours: dict[str, Any]) -> dict[str, float]:
    """A bank's cells of a row, by the names of BANK; none where there is no network to build or no number of masks."""
    if row.network not in MODELS or ours["masks"] is None:
        return {}
    size = bank_bytes(row.network, ours["masks"])
    found = {f"{name}_kb": value / KB for name, value in size.items()}
    if ours["tasks"] is not None:
        found["phi"] = shared(found["mask_kb"], ours["masks"], ours["tasks"], found["task_kb"])
        found["cost"] = found["mask_kb"] / found["phi"]
    return found


def compute(table: Table) -> dict[str, Any]:
    """What table.json holds."""
    rows = []
    for row in read_rows(table):
        ours = numbers(row)
        rows.append({**asdict(row), "ours": ours, "bank": bank_numbers(row, ours), "departures": departures(row, ours)})
    facts = {"schema": 1, "table": table.name, "title": table.title, "source": table.source, "note": table.storage["note"]}
    return {**facts, "columns": table.storage["columns"], "environment": environment(torch.device("cpu")), "rows": rows}


def spelt(value: Any, digits: int) -> str:
    """A number for people, with commas; a dash where there is none."""
    if value is None or isinstance(value, str):
        return "–" if value is None else value
    return f"{value:,.{digits}f}"


def lines_of(record: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Headings and rows for people; a printed cell stands to the right of ours."""
    headings, rows = ["row", "counted"], [[row["label"], counted(row)] for row in record["rows"]]
    for name in record["columns"]:
        number = NUMBERS[name]
        headings += [number.heading, "printed"] if number.printed else [number.heading]
        for cells, row in zip(rows, record["rows"]):
            printed = row["printed"].get(name)
            digits = number.digits if isinstance(printed, int) else len(str(printed).partition(".")[2])
            cells += [spelt(row["ours"][name], number.digits), *([spelt(printed, digits)] if number.printed else [])]
    for name, (heading, digits) in BANK.items():
        if any(name in row["bank"] for row in record["rows"]):
            headings.append(heading)
            for cells, row in zip(rows, record["rows"]):
                cells.append(spelt(row["bank"].get(name), digits))
    return headings, rows


def counted(row: dict[str, Any]) -> str:
    """Where a row's weights come from."""
    if row["network"] is None:
        return "as printed"
    return row["network"] + (f", {row['outputs']} outputs" if row["outputs"] is not None else "")


def remarks(record: dict[str, Any]) -> list[str]:
    """Which printed cells depart from the rest of their row, and notes."""
    found = []
    for row in record["rows"]:
        for name, (printed, ours) in row["departures"].items():
            said = f"{row['label']}: {NUMBERS[name].heading}: printed {spelt(printed, 0)}"
            if name == "weights":
                found.append(f"{said}, which the network counted here does not have")
            else:
                found.append(f"Erratum: {said}, while the rest of the row gives {spelt(ours, 0)}")
        if row["note"]:
            found.append(f"{row['label']}: {row['note']}")
    return found


def as_markdown(record: dict[str, Any]) -> str:
    """What table.json holds as Markdown, from the title's words on."""
    lead = [record["title"], "", record["source"] + ".", "", record["note"], ""]
    return "\n".join([*lead, *as_pipes(*lines_of(record)), "", *(f"- {line}" for line in remarks(record))]) + "\n"


def as_csv(record: dict[str, Any]) -> str:
    """A line a row, every number of it."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["row", "counted", *NUMBERS, *(f"printed_{name}" for name in NUMBERS), *(f"bank_{name}" for name in BANK)])
    for row in record["rows"]:
        cells = [row["label"], counted(row), *row["ours"].values()]
        cells += [row["printed"].get(name) for name in NUMBERS] + [row["bank"].get(name) for name in BANK]
        writer.writerow(["" if v is None else v for v in cells])
    return file.getvalue()


def write_storage(table: Table, folder: Path) -> None:
    """Compute a storage table, print it, and write table.md, table.csv and table.json into the folder. Raises Refusal."""
    record = compute(table)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / "table.json", json.dumps(record, indent=1))
    except OSError as error:
        raise Refusal(f"{folder}: cannot be written ({error.strerror})") from None
    write_atomic(folder / "table.csv", as_csv(record))
    write_atomic(folder / "table.md", "# " + as_markdown(record))
    for line in [record["title"], *as_text(*lines_of(record)), *(f"  {line}" for line in remarks(record))]:
        print(line)
    print(f"{folder / 'table.md'}, table.csv, table.json")
