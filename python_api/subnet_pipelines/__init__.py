"""Training pipelines for networks used through masks: methods, task streams, one loop."""

from subnet_pipelines.benchmarks import BENCHMARKS, SCENARIOS, Batch, Benchmark, Scenario, Split, Task
from subnet_pipelines.errors import NotLearnt, Refusal
from subnet_pipelines.evaluate import RunConfig, evaluate
from subnet_pipelines.interrupt import Interrupted
from subnet_pipelines.methods import METHODS, Clock, Method, MethodConfig, Phase, Prediction
from subnet_pipelines.report import Result
from subnet_pipelines.schedules import Plateau, cosine
from subnet_pipelines.train import run

__all__ = [
    "BENCHMARKS",
    "METHODS",
    "SCENARIOS",
    "Batch",
    "Benchmark",
    "Clock",
    "Interrupted",
    "Method",
    "MethodConfig",
    "NotLearnt",
    "Phase",
    "Plateau",
    "Prediction",
    "Refusal",
    "Result",
    "RunConfig",
    "Scenario",
    "Split",
    "Task",
    "cosine",
    "evaluate",
    "run",
]
