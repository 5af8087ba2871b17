"""A run's folder: OUT/seed-N with metrics.jsonl, checkpoint/ and, at the end, result.json."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from subnet_pipelines import checkpoint
from subnet_pipelines.benchmarks.base import SCENARIOS
from subnet_pipelines.errors import Refusal

# What may change at resume: the stream may grow, the preset is expanded into fields, a graph gives the same bits.
FREE = ("tasks", "fidelity", "cuda_graph")


def refuse_run(path: Path) -> None:
    """Raise Refusal where a run was begun in that folder."""
    if any((path / name).exists() for name in ("metrics.jsonl", "checkpoint", "result.json")):
        raise Refusal(f"{path}: holds a run already; add --resume to go on with it, or choose another --out")


def compare(where: Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    """Raise Refusal, naming the fields, unless a run with record `old` can go on with record `new`; `tasks` may grow."""
    changed = [name for name in {**old, **new} if old.get(name) != new.get(name) and name not in FREE]
    if changed:
        fields = ", ".join(f"{name} was {old.get(name)!r}, is {new.get(name)!r}" for name in changed)
        raise Refusal(f"{where}: was made with another config: {fields}")
    if new["tasks"] != old["tasks"] and not SCENARIOS[new["scenario"]].train_id:
        raise Refusal(
            f"{where}: has {old['tasks']} tasks as one stream without borders, which cannot be made {new['tasks']} at resume"
        )
    if new["tasks"] < old["tasks"]:
        raise Refusal(f"{where}: has {old['tasks']} tasks; resume may only raise tasks, not lower it to {new['tasks']}")


class Folder:
    """The files of one run while it goes on; one writer."""

    def __init__(self, path: Path, record: dict[str, Any], resume: bool, say: Callable[[str], None]):
        self.path, self.record = path, record
        if not resume:
            refuse_run(path)
        tree = checkpoint.load(path / "checkpoint", say) if resume else None
        if tree is not None:
            compare(path, tree["record"], record)
        self.tree = tree
        try:
            path.mkdir(parents=True, exist_ok=True)
            self.lines = open(path / "metrics.jsonl", "ab")
        except OSError as error:
            raise Refusal(f"{path}: cannot be written ({error.strerror})") from None
        self.lines.truncate(tree["metrics_bytes"] if tree is not None else 0)

    def log(self, line: dict[str, Any]) -> None:
        """Append a line to metrics.jsonl."""
        self.lines.write(json.dumps(line).encode() + b"\n")

    def save(self, tree: dict[str, Any]) -> None:
        """Write a checkpoint, and everything logged before it, to the disk."""
        self.lines.flush()
        os.fsync(self.lines.fileno())
        checkpoint.save(self.path / "checkpoint", {**tree, "record": self.record, "metrics_bytes": self.lines.tell()})

    def close(self) -> None:
        """Close metrics.jsonl."""
        self.lines.close()
