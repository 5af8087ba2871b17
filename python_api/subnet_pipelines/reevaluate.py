"""A finished run measured again under other settings of evaluation: the trained bank is as it was, and so is its result.json."""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from subnet_kernels.files import write_atomic
from subnet_pipelines import checkpoint, metrics
from subnet_pipelines.benchmarks import SCENARIOS
from subnet_pipelines.config import Settings
from subnet_pipelines.errors import Refusal
from subnet_pipelines.evaluate import evaluate
from subnet_pipelines.report import SCHEMA, environment, read_result

STREAM = ("scenario", "eval_images", "eval_batch")  # what may change beside the method's own `evaluation`
TRAINED = ("capacity", "reuse")  # of a method's report: what evaluation has no part in


def folders_of(run: Path) -> list[Path]:
    """The folders of finished runs that a path stands for: itself, or its seeds. Raises Refusal where there are none."""
    found = [run] if (run / "result.json").exists() else sorted(path.parent for path in run.glob("seed-*/result.json"))
    if not found:
        raise Refusal(f"{run}: holds no finished run: neither it nor a folder seed-N in it has a result.json")
    return found


def settings_of(folder: Path, changes: dict[str, Any]) -> Settings:
    """The settings of a finished run with others of evaluation. Raises Refusal for a field that the network or its training knows."""
    result = read_result(folder / "result.json")
    settings = Settings(result.method, result.benchmark)
    free = (*settings.method.evaluation, *STREAM)
    for name in changes:
        if name in settings.types and name not in free:
            raise Refusal(
                f"{name} belongs to the training of {folder}: train again for another; evaluation has {', '.join(free)}"
            )
    settings.values |= {name: value for name, value in result.config.items() if name in settings.types}
    settings.lay("", changes)
    settings.fidelity = result.config.get("fidelity", "sound")
    return settings


def evaluate_run(folder: Path, changes: dict[str, Any], data_dir: Path | str | None, device: torch.device) -> dict[str, Any]:
    """Measure every task of a finished run under these changed settings; writes evaluation-HASH.json beside its result, and returns it.

    The network is made of the run's seed and read from its checkpoint and bank. Raises Refusal where the run cannot be read, the settings
    do not fit, or the scenario hides what training was told, or tells what it was not.
    """
    began, result = time.monotonic(), read_result(folder / "result.json")
    settings = settings_of(folder, changes)
    method_config, benchmark_config, run_config = settings.build()
    benchmark = settings.benchmark(benchmark_config, result.seed, data_dir, device)
    if benchmark.scenario.train_id is not SCENARIOS[result.scenario].train_id:
        as_it = (
            "tell the task in training, as that of {} did" if not benchmark.scenario.train_id else "not tell it, as that of {}"
        )
        raise Refusal(f"scenario must {as_it.format(folder)}, got {benchmark_config.scenario}")
    method = settings.method(method_config, benchmark, result.seed)
    tree = checkpoint.load(folder / "checkpoint", lambda _: None)
    if tree is None:
        raise Refusal(f"{folder}: has no checkpoint to read the network from")
    method.out = folder
    method.load(tree["method"])
    found = [evaluate(method, benchmark, j, run_config.eval_batch) for j in range(len(benchmark))]
    final, told = [task["right"] for task in found], metrics.mean([task["told"] for task in found])
    evaluation = {
        "schema": SCHEMA,
        "method": result.method,
        "benchmark": result.benchmark,
        "scenario": benchmark_config.scenario,
        "seed": result.seed,
        "changed": {name: settings.values[name] for name in changes},
        "config": {**asdict(method_config), **asdict(benchmark_config), **asdict(run_config)},
        "environment": environment(device),
        "final": final,
        "acc": metrics.acc(final),
        "task_inference": None if told is None else {"accuracy": told, "unit": settings.values.get("inference_unit")},
        "method_report": {name: value for name, value in method.final_report().items() if name not in TRAINED},
        "seconds": round(time.monotonic() - began, 3),
    }
    name = hashlib.blake2b(json.dumps(evaluation["changed"], sort_keys=True).encode(), digest_size=4).hexdigest()
    write_atomic(folder / f"evaluation-{name}.json", json.dumps(evaluation, indent=1))
    return evaluation
