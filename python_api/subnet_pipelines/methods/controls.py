"""What ImpressLearn's new tasks are compared with: a mask of their own, the masks of the basis alone, fewer of them."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable
from typing import Any

import torch

from subnet_pipelines.benchmarks.base import Benchmark, Split, Task, batches
from subnet_pipelines.methods.masked import MaskedMethod, entry_name


class Controls(MaskedMethod):
    """The part of ImpressLearn that measures beside a new task."""

    basis: list[str]  # names of the masks that new tasks combine
    basis_tasks: list[int]
    new_tasks: list[int]

    def __init__(self, config, benchmark: Benchmark, seed: int):
        super().__init__(config, benchmark, seed)
        self.measured: dict[str, dict[str, Any]] = {}  # control -> new task -> percent, or that of each mask

    def some_of_basis(self, size: int) -> list[str]:
        """So many masks, evenly from the basis."""
        return [self.basis[i * len(self.basis) // size] for i in range(size)]

    def measure_own(self, task: Task) -> None:
        self.run_live()
        self.gather_norms(task, self.model, self.network)
        self.note("own_mask", task, self.percent(self.benchmark.test(task.index)))

    def measure_basis(self, task: Task) -> int:
        """The place of the mask that does best on the validation rows, by default the training rows; under controls all are tested."""
        test, chosen, accuracy = self.benchmark.test(task.index), [], []
        for name in self.basis:
            with self.bank.as_task(name):
                chosen.append(self.percent(task.val or task.train))
                accuracy += [self.percent(test)] if self.config.controls else []
        best = max(range(len(chosen)), key=chosen.__getitem__)
        if self.config.controls:
            self.note("nearest_mask", task, accuracy[best])
            for size in self.config.sizes or ():
                places = [self.basis.index(name) for name in self.some_of_basis(size)]
                self.note(f"nearest_mask_of_{size}", task, accuracy[max(places, key=chosen.__getitem__)])
            self.note("fixed_mask", task, accuracy[0])
            self.note("wrong_mask", task, statistics.fmean(accuracy))
            self.note("wrong_mask_std", task, statistics.stdev(accuracy) if len(accuracy) > 1 else 0.0)
            self.note("each_mask", task, dict(zip(self.basis, accuracy)))
        return best

    def note(self, control: str, task: Task, found: Any) -> None:
        self.measured.setdefault(control, {})[entry_name(task.index)] = found

    @torch.no_grad()
    def percent(self, split: Split) -> float:
        self.eval()
        x, y = split.tensors()
        right = sum((self.network(batch.x).argmax(1) == batch.y).sum() for batch in batches(x, y, None, None, 1000))
        return 100 * right.item() / len(y)

    # ---- for the report ---------------------------------------------------------------------------------------------

    def controls_report(self) -> dict[str, Any]:
        """All that was measured, its means, and curves of them."""
        numbers = {name: tasks for name, tasks in self.measured.items() if name != "each_mask"}
        means = {f"{name}_mean": statistics.fmean(tasks.values()) for name, tasks in numbers.items()}
        return {**self.measured, **means, **({"curves": self.curves(numbers)} if numbers else {})}

    def curves(self, numbers: dict[str, dict[str, float]]) -> dict[str, Any]:
        """Lines for the page: what was measured of the new tasks, over the angle where the benchmark has one and else the task's number;
        every mask of the basis alone, over the angle between it and the task; and means over the size of the basis, where there are
        smaller ones."""
        angle = getattr(self.benchmark, "angle", None)
        places = {entry_name(i): angle(i) if angle else i for i in self.new_tasks}
        words = {name: name.replace("_", " ") for name in numbers if name != "wrong_mask_std" and "_of_" not in name}
        lines = {shown: [[places[task], percent] for task, percent in numbers[name].items()] for name, shown in words.items()}
        found = {"new tasks": {"x": "angle (degrees)" if angle else "task", "y": "right (%)", "lines": lines}}
        if angle and (alone := self.by_distance(angle)):
            found["a mask alone"] = {
                "x": "degrees between mask and task",
                "y": "right (%)",
                "lines": {"mask of another angle": alone},
            }
        if self.config.sizes is not None:
            found["size of the basis"] = {"x": "masks", "y": "right (%)", "lines": self.by_size(numbers)}
        return found

    def by_distance(self, angle: Callable[[int], float]) -> list[list[float]]:
        """[degrees, mean percent right] of the basis' masks on new tasks that are so far from their own."""
        found: dict[float, list[float]] = {}
        for new, own in itertools.product(self.new_tasks, self.basis_tasks):
            alone = self.measured.get("each_mask", {}).get(entry_name(new), {})
            if entry_name(own) in alone:
                found.setdefault(round(abs((angle(new) - angle(own) + 180) % 360 - 180), 6), []).append(alone[entry_name(own)])
        return [[degrees, statistics.fmean(found[degrees])] for degrees in sorted(found)]

    def by_size(self, numbers: dict[str, dict[str, float]]) -> dict[str, list]:
        """Means over the new tasks, a line each of what is measured over smaller bases; a mask of its own is the same over all."""
        sizes, lines = [*self.config.sizes, len(self.basis)], {}
        for control in ("combination", "nearest_mask", "own_mask"):
            names = {size: f"{control}_of_{size}" for size in sizes} | {len(self.basis): control}
            if control == "own_mask":
                names = dict.fromkeys(sizes, control)
            points = [[size, statistics.fmean(numbers[name].values())] for size, name in names.items() if name in numbers]
            lines |= {control.replace("_", " "): points} if points else {}
        return lines
