"""Task streams by name."""

from subnet_pipelines.benchmarks.base import (
    GG,
    SCENARIOS,
    Batch,
    Benchmark,
    BenchmarkConfig,
    GNs,
    GNu,
    NNs,
    Scenario,
    Split,
    Task,
)
from subnet_pipelines.benchmarks.mnist import PermutedMNIST, PermutedMNISTMini, RotatedMNIST, RotatedMNISTMini

BENCHMARKS: dict[str, type[Benchmark]] = {b.name: b for b in (PermutedMNIST, PermutedMNISTMini, RotatedMNIST, RotatedMNISTMini)}

__all__ = [
    "BENCHMARKS",
    "GG",
    "SCENARIOS",
    "Batch",
    "Benchmark",
    "BenchmarkConfig",
    "GNs",
    "GNu",
    "NNs",
    "Scenario",
    "Split",
    "Task",
]
