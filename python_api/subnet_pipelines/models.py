"""The networks of the papers' tables: plain nn.Modules with a body and a `head`, without biases."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch.nn as nn
from torch import Tensor

from subnet_pipelines.errors import Refusal


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


class AlexNet(nn.Module):
    """WSN's AlexNet for 32 x 32 images: convolutions of 64 (4 x 4), 128 (3 x 3) and 256 (2 x 2), linear layers of 2048 and 2048.

    After each: norm without affine, of the batch's own statistics in eval mode too; ReLU; dropout of .2, .2, .5, .5, .5; after a
    convolution 2 x 2 max pooling. x (B, channels, 32, 32) float, B >= 2 -> logits (B, outputs).
    """

    def __init__(self, outputs: int, channels: int = 3):
        super().__init__()
        layers: list[nn.Module] = []
        for inp, out, kernel, drop in ((channels, 64, 4, 0.2), (64, 128, 3, 0.2), (128, 256, 2, 0.5)):
            layers += [nn.Conv2d(inp, out, kernel, bias=False), _norm(nn.BatchNorm2d, out), nn.ReLU(), nn.Dropout(drop)]
            layers.append(nn.MaxPool2d(2))
        layers.append(nn.Flatten())
        for inp, out in ((1024, 2048), (2048, 2048)):
            layers += [nn.Linear(inp, out, bias=False), _norm(nn.BatchNorm1d, out), nn.ReLU(), nn.Dropout(0.5)]
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(2048, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


class Block(nn.Module):
    """ResNet's basic block: two 3 x 3 convolutions beside a shortcut, which is a 1 x 1 convolution where the shape changes."""

    def __init__(self, inp: int, out: int, stride: int, running: bool):
        super().__init__()
        self.conv1 = nn.Conv2d(inp, out, 3, stride, 1, bias=False)
        self.norm1 = _norm(nn.BatchNorm2d, out, running)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.norm2 = _norm(nn.BatchNorm2d, out, running)
        self.shortcut = nn.Sequential()
        if stride > 1 or inp != out:
            self.shortcut = nn.Sequential(nn.Conv2d(inp, out, 1, stride, bias=False), _norm(nn.BatchNorm2d, out, running))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(self.conv1(x)).relu()
        return (self.norm2(self.conv2(y)) + self.shortcut(x)).relu()


class ResNet18(nn.Module):
    """ResNet-18 for 32 x 32 images as GPM, WSN, SupSup have it: 3 x 3 in front, eight blocks 1, 1, 2, 2, 4, 4, 8, 8 `width` wide.

    pool: side of the average pooling before the head, which reads 8 width (4 / pool)^2 features; running: norm by running
    statistics in eval mode (SupSup), or by the batch's own (WSN). x (B, channels, 32, 32) float -> logits (B, outputs).
    """

    def __init__(self, outputs: int, channels: int = 3, width: int = 20, pool: int = 2, running: bool = False):
        super().__init__()
        layers = [nn.Conv2d(channels, width, 3, 1, 1, bias=False), _norm(nn.BatchNorm2d, width, running), nn.ReLU()]
        before = width
        for stage in range(4):
            out = width << stage
            layers += [Block(before, out, 2 if stage else 1, running), Block(out, out, 1, running)]
            before = out
        self.body = nn.Sequential(*layers, nn.AvgPool2d(pool), nn.Flatten())
        self.head = nn.Linear(before * (4 // pool) ** 2, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


def _norm(kind: type[nn.Module], width: int, running: bool = False) -> nn.Module:
    """Batch norm as the papers have it: without affine parameters, which tasks would share."""
    return kind(width, affine=False, track_running_stats=running)


def _channels(name: str, shape: tuple[int, ...]) -> int:
    """Channels of a benchmark's input shape. Raises Refusal where it is no 32 x 32 image."""
    if len(shape) != 3 or shape[1:] != (32, 32):
        raise Refusal(f"model {name} reads images of channels x 32 x 32, got inputs of {' x '.join(map(str, shape))}")
    return shape[0]


def mlp(outputs: int = 10, inputs: int = 784) -> MLP:
    """784-100-100 with a head: WSN's network on Permuted MNIST (88,400 weights without the head)."""
    return MLP([inputs, 100, 100], outputs)


def lenet_300_100(outputs: int = 10, inputs: int = 784) -> MLP:
    """LeNet-300-100: SupSup's and ImpressLearn's network on MNIST; outputs may exceed the classes (superfluous neurons)."""
    return MLP([inputs, 300, 100], outputs)


def fc_1024(outputs: int = 10, inputs: int = 784) -> MLP:
    """784-1024-1024 with a head: SupSup's network on Rotated MNIST."""
    return MLP([inputs, 1024, 1024], outputs)


def alexnet(outputs: int = 100, *shape: int) -> AlexNet:
    """AlexNet-BN 64(4)-128(3)-256(2)-2048-2048: WSN's network on Split CIFAR-100 (6,499,328 weights without the head).

    shape: channels, 32, 32; default 3 channels. Raises Refusal for another one.
    """
    return AlexNet(outputs, _channels("alexnet", shape or (3, 32, 32)))


def resnet_18(outputs: int = 10, *shape: int) -> ResNet18:
    """ResNet18 nf=20, 2 x 2 pooling to 640: WSN's network on 5-Datasets (1,090,140 weights without head); shape as `alexnet`."""
    return ResNet18(outputs, _channels("resnet-18", shape or (3, 32, 32)))


def gem_resnet_18(outputs: int = 5, *shape: int) -> ResNet18:
    """GEMResNet18 nf=20 with 4 x 4 pooling to 160: SupSup's network on Split CIFAR-100 (1,090,940 weights with the head of 5).

    The head is linear for their 1 x 1 convolution, and masked too; a task has norm statistics of its own. shape as `alexnet`.
    """
    return ResNet18(outputs, _channels("gem-resnet-18", shape or (3, 32, 32)), pool=4, running=True)


MODELS = {
    "mlp": mlp,
    "lenet-300-100": lenet_300_100,
    "fc-1024": fc_1024,
    "alexnet": alexnet,
    "resnet-18": resnet_18,
    "gem-resnet-18": gem_resnet_18,
}
