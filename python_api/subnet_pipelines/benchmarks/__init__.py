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
from subnet_pipelines.benchmarks.cifar import CIFAR100Split, CIFAR100Split20, CIFAR100Superclass
from subnet_pipelines.benchmarks.cifar_few import CIFAR100Few, CIFAR100Few20, CIFAR100Few40
from subnet_pipelines.benchmarks.five import FiveDatasets
from subnet_pipelines.benchmarks.imagenet import ImageNetSplit
from subnet_pipelines.benchmarks.mnist import (
    PermutedMNIST,
    PermutedMNISTMini,
    RotatedMNIST,
    RotatedMNISTMini,
    SplitMNIST,
    SplitMNISTMini,
)
from subnet_pipelines.benchmarks.office_home import OfficeHome
from subnet_pipelines.benchmarks.omniglot import OmniglotRotation
from subnet_pipelines.benchmarks.stl10 import STL10Tasks
from subnet_pipelines.benchmarks.tiny_imagenet import TinyImageNet

_ALL = (
    PermutedMNIST,
    PermutedMNISTMini,
    RotatedMNIST,
    RotatedMNISTMini,
    SplitMNIST,
    SplitMNISTMini,
    FiveDatasets,
    OmniglotRotation,
    CIFAR100Split,
    CIFAR100Split20,
    CIFAR100Superclass,
    CIFAR100Few,
    CIFAR100Few20,
    CIFAR100Few40,
    STL10Tasks,
    OfficeHome,
    TinyImageNet,
    ImageNetSplit,
)
BENCHMARKS: dict[str, type[Benchmark]] = {b.name: b for b in _ALL}

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
