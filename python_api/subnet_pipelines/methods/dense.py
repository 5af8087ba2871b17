"""What methods over a plain network share: the network, its optimizer, and the loop of HAT's, GPM's and WSN's code around it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from subnet_kernels import optim
from subnet_pipelines.benchmarks.base import Benchmark, Task
from subnet_pipelines.bounds import Count, NotNegative, Positive
from subnet_pipelines.chance import seeded
from subnet_pipelines.methods.base import MethodConfig, Phase
from subnet_pipelines.models import MODELS, batch_norms, use_batch_statistics, use_running_statistics
from subnet_pipelines.schedules import Plateau, cosine

Network = Literal[
    "mlp",
    "lenet-300-100",
    "fc-300-300",
    "fc-1024",
    "alexnet",
    "resnet-18",
    "lenet",
    "lenet-large",
    "tinynet",
    "gem-resnet-18",
    "resnet-50",
]
WeightInit = Literal["default", "kaiming_normal", "xavier_normal"]
OPTIMIZERS = {"adam": optim.Adam, "sgd": optim.SGD, "rmsprop": optim.RMSprop}
CODE_NORM = {"sound": {}, "code": {"norm": "batch"}, "paper": {}}  # fidelity: what the networks of WSN's code do


@dataclass(frozen=True)
class DenseConfig(MethodConfig):
    """What methods over a plain network have; the defaults are the recipe of WSN's code on Permuted MNIST."""

    model: Network = "mlp"
    """The network, and its head."""
    norm: Literal["gathered", "batch"] = "gathered"
    """What batch norms use at test: statistics gathered over the training rows at the end, or those of the test batch (WSN's code), by
    which a row's logits depend on the rows beside it."""
    optimizer: Literal["adam", "sgd"] = "adam"
    """Made afresh for each phase."""
    lr: Positive = 1e-3
    """Its learning rate."""
    lr_min: float = 1e-6
    """A phase ends where the rate falls below it."""
    patience: Count = 6
    """Epochs without a better validation loss before the rate is halved."""
    select: Literal["last", "best"] = "best"
    """Keep the weights of the last epoch, or of the least validation loss."""


@dataclass(frozen=True)
class ScheduledConfig(DenseConfig):
    """What SupSup's recipes for plain networks have beside."""

    schedule: Literal["plateau", "cosine"] = "plateau"
    """The rate over a phase: halved where validation stalls, and constant without validation rows, or down to 0 along half a cosine."""
    weight_decay: NotNegative = 0.0
    """L2 of what learns, in the optimizer (SupSup's code has 1e-4 wherever its scripts use Adam or SGD, none of which names it)."""


def make_network(config: DenseConfig, outputs: int, benchmark: Benchmark, seed: int, *purpose: str | int) -> nn.Module:
    """The config's network with a head of so many outputs, on the benchmark's device, initialised from the stream of that purpose."""
    with seeded(seed, *purpose):
        made = MODELS[config.model](outputs, *benchmark.input_shape)
    return (use_batch_statistics if config.norm == "batch" else use_running_statistics)(made).to(benchmark.device)


def norms_of(config: DenseConfig, network: nn.Module) -> list[nn.Module]:
    """The batch norms that gather statistics over a task's rows; none where they use those of the test batch."""
    return [] if config.norm == "batch" else batch_norms(network)


def layers_of(net: nn.Module) -> dict[str, nn.Linear | nn.Conv2d]:
    """The linear layers and convolutions of a network, in order, by name."""
    return {name: module for name, module in net.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))}


@torch.no_grad()
def initialise(net: nn.Module, how: WeightInit) -> None:
    """Draw the weights of all layers from torch's global CPU generator, whatever their device; default leaves PyTorch's as they are."""
    for layer in layers_of(net).values() if how != "default" else ():
        drawn = torch.empty(layer.weight.shape, device="cpu")
        if how == "kaiming_normal":
            nn.init.kaiming_normal_(drawn, nonlinearity="relu")
        else:
            nn.init.xavier_normal_(drawn)
        layer.weight.copy_(drawn)


def wrap_layers(net: nn.Module, kind: Callable[[nn.Module], nn.Module]) -> None:
    """Put kind(layer) in the place of every layer of a network."""
    for name, layer in layers_of(net).items():
        net.set_submodule(name, kind(layer))


def training(
    config: DenseConfig,
    task: Task,
    parameters: Callable[[], Iterable[nn.Parameter]],
    first: Callable[[], None] | None = None,
    then: Callable[[], None] | None = None,
    lr: float | None = None,
    **more: Any,
) -> Phase:
    """The phase "train" of a task; without validation rows the rate is constant and the last weights stay. lr: default the config's;
    more: arguments of the optimizer. A ScheduledConfig's schedule and weight decay are seen to here."""
    if isinstance(config, ScheduledConfig):
        more["weight_decay"] = config.weight_decay
    follows_cosine = isinstance(config, ScheduledConfig) and config.schedule == "cosine"
    return Phase(
        "train",
        epochs=config.epochs,
        steps=config.iterations,
        batch_size=config.batch_size,
        optimizer=lambda: OPTIMIZERS[config.optimizer](list(parameters()), config.lr if lr is None else lr, **more),
        schedule=cosine() if follows_cosine else None if task.val is None else Plateau(config.patience, 2.0, config.lr_min),
        select="last" if task.val is None else config.select,
        first=first,
        then=then,
    )
