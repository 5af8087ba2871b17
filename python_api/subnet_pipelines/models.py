"""The networks of the papers' MNIST tables: plain nn.Modules with a body and a `head`."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch.nn as nn
from torch import Tensor


class MLP(nn.Module):
    """Linear layers without biases, ReLU between them, and a linear `head`; torch's default initialisation.

    widths: input, then hidden widths; outputs: width of the head. x (B, ...) float, flattened -> logits (B, outputs).
    """

    def __init__(self, widths: Sequence[int], outputs: int):
        super().__init__()
        self.body = nn.ModuleList(nn.Linear(i, o, bias=False) for i, o in pairwise(widths))
        self.head = nn.Linear(widths[-1], outputs, bias=False)

    def features(self, x: Tensor) -> Tensor:
        """x (B, ...) -> what the head reads (B, widths[-1])."""
        x = x.flatten(1)
        for layer in self.body:
            x = layer(x).relu()
        return x

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


def mlp(outputs: int = 10, inputs: int = 784) -> MLP:
    """784-100-100 with a head: WSN's network on Permuted MNIST (88,400 weights without the head)."""
    return MLP([inputs, 100, 100], outputs)


def lenet_300_100(outputs: int = 10, inputs: int = 784) -> MLP:
    """LeNet-300-100: SupSup's and ImpressLearn's network on MNIST; outputs may exceed the classes (superfluous neurons)."""
    return MLP([inputs, 300, 100], outputs)


def fc_1024(outputs: int = 10, inputs: int = 784) -> MLP:
    """784-1024-1024 with a head: SupSup's network on Rotated MNIST."""
    return MLP([inputs, 1024, 1024], outputs)


MODELS = {"mlp": mlp, "lenet-300-100": lenet_300_100, "fc-1024": fc_1024}
