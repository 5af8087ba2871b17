"""The networks of the papers' tables: plain nn.Modules with a `body`, `features`, which is what the head reads, and a `head`.

No biases and no affine norms: what tasks share is weights. WSN's networks follow its authors' code (ihaeyong/WSN f066982, networks/).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
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


class ConvNet(nn.Module):
    """A sequential `body` that ends flat, and a linear `head`: x (B, channels, height, width) float -> logits (B, outputs)."""

    body: nn.Sequential
    head: nn.Module

    def features(self, x: Tensor) -> Tensor:
        """x (B, channels, height, width) -> what the head reads (B, its in_features)."""
        return self.body(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


class AlexNet(ConvNet):
    """WSN's AlexNet for 32 x 32 images: convolutions of 64 (4 x 4), 128 (3 x 3) and 256 (2 x 2), linear layers of 2048 and 2048.

    After each: norm without affine, of the batch's own statistics in eval mode too; ReLU; dropout of .2, .2, .5, .5, .5; after a
    convolution 2 x 2 max pooling. Raises Refusal for a batch of one row, which has no statistics of its own.
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

    def features(self, x: Tensor) -> Tensor:
        norm = self.body[1]
        if len(x) < 2 and (norm.training or not norm.track_running_stats):
            raise Refusal("alexnet norms by the statistics of the batch, of which one row has none: choose another batch size")
        return super().features(x)


class LeNet(ConvNet):
    """WSN's LeNets for 32 x 32 images: two 5 x 5 convolutions, each with ReLU and 3 x 3 max pooling by 2, and two linear layers.

    widths: of the four. No norm and no dropout.
    """

    def __init__(self, widths: Sequence[int], outputs: int, channels: int = 3):
        super().__init__()
        layers: list[nn.Module] = []
        for inp, out in ((channels, widths[0]), (widths[0], widths[1])):
            layers += [nn.Conv2d(inp, out, 5, padding=2, bias=False), nn.ReLU(), nn.MaxPool2d(3, 2, padding=1)]
        layers.append(nn.Flatten())
        for inp, out in ((8 * 8 * widths[1], widths[2]), (widths[2], widths[3])):
            layers += [nn.Linear(inp, out, bias=False), nn.ReLU()]
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(widths[3], outputs, bias=False)


class TinyNet(ConvNet):
    """WSN's network for 64 x 64 images, La-MAML's: four 3 x 3 convolutions of `width` by 2, linear layers of 640 and 640, ReLU between."""

    def __init__(self, outputs: int, channels: int = 3, width: int = 160):
        super().__init__()
        layers: list[nn.Module] = []
        for inp in (channels, width, width, width):
            layers += [nn.Conv2d(inp, width, 3, 2, padding=1, bias=False), nn.ReLU()]
        layers.append(nn.Flatten())
        for inp in (4 * 4 * width, 640):
            layers += [nn.Linear(inp, 640, bias=False), nn.ReLU()]
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(640, outputs, bias=False)


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


class Bottleneck(nn.Module):
    """ResNet's bottleneck: 1 x 1, 3 x 3 and 1 x 1 convolutions, the inner ones `inner` wide, beside a shortcut as in Block."""

    def __init__(self, inp: int, inner: int, out: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inp, inner, 1, bias=False)
        self.norm1 = _norm(nn.BatchNorm2d, inner, True)
        self.conv2 = nn.Conv2d(inner, inner, 3, stride, 1, bias=False)
        self.norm2 = _norm(nn.BatchNorm2d, inner, True)
        self.conv3 = nn.Conv2d(inner, out, 1, bias=False)
        self.norm3 = _norm(nn.BatchNorm2d, out, True)
        self.shortcut = nn.Sequential()
        if stride > 1 or inp != out:
            self.shortcut = nn.Sequential(nn.Conv2d(inp, out, 1, stride, bias=False), _norm(nn.BatchNorm2d, out, True))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(self.conv1(x)).relu()
        y = self.norm2(self.conv2(y)).relu()
        return (self.norm3(self.conv3(y)) + self.shortcut(x)).relu()


class ResNet50(ConvNet):
    """ResNet-50: a 7 x 7 convolution of 64 by 2, 3 x 3 max pooling by 2, and 3, 4, 6, 3 bottlenecks.

    In eval mode norm is by running statistics. A stage's stride is in the 3 x 3 convolution of its first block, as in SupSup's code.
    base: width of the first stage's 3 x 3 convolutions, doubled from stage to stage; between blocks 256 to 2048 channels whatever it is.
    blocks: of each stage; 3, 4, 23, 3 are ResNet-101.
    """

    def __init__(self, outputs: int, channels: int = 3, base: int = 64, blocks: Sequence[int] = (3, 4, 6, 3)):
        super().__init__()
        layers = [nn.Conv2d(channels, 64, 7, 2, 3, bias=False), _norm(nn.BatchNorm2d, 64, True), nn.ReLU()]
        layers.append(nn.MaxPool2d(3, 2, 1))
        before = 64
        for stage, count in enumerate(blocks):
            out = 256 << stage
            for block in range(count):
                layers.append(Bottleneck(before, base << stage, out, 2 if stage and not block else 1))
                before = out
        self.body = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(before, outputs, bias=False)


class ResNet18(ConvNet):
    """ResNet-18 for 32 x 32 images as GPM, WSN, SupSup have it: 3 x 3 in front, eight blocks 1, 1, 2, 2, 4, 4, 8, 8 `width` wide.

    pool: side of the average pooling before the head, which reads 8 width (4 / pool)^2 features; running: norm by running
    statistics in eval mode (SupSup), or by the batch's own (WSN); blocks: of each stage; 3, 4, 6, 3 are ResNet-34.
    """

    def __init__(
        self,
        outputs: int,
        channels: int = 3,
        width: int = 20,
        pool: int = 2,
        running: bool = False,
        blocks: Sequence[int] = (2, 2, 2, 2),
    ):
        super().__init__()
        layers = [nn.Conv2d(channels, width, 3, 1, 1, bias=False), _norm(nn.BatchNorm2d, width, running), nn.ReLU()]
        before = width
        for stage, count in enumerate(blocks):
            out = width << stage
            for block in range(count):
                layers.append(Block(before, out, 2 if stage and not block else 1, running))
                before = out
        self.body = nn.Sequential(*layers, nn.AvgPool2d(pool), nn.Flatten())
        self.head = nn.Linear(before * (4 // pool) ** 2, outputs, bias=False)


class Gain(nn.Module):
    """Batch norm by the batch's own statistics, in eval mode too, times a gain for each feature: x (B, width) -> (B, width)."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.normed(x, self.weight)

    def normed(self, x: Tensor, gain: Tensor) -> Tensor:
        """x (B, width) with mean 0 and deviation 1 over the batch in each feature, times gain (width,)."""
        return F.batch_norm(x, None, None, gain, training=True)

    def extra_repr(self) -> str:
        return str(len(self.weight))


class GainNet(nn.Module):
    """HopSupSup's network: linear layers without biases, after each but the last a `Gain` and swish.

    widths: input, then hidden widths; outputs: width of the head. x (B, ...) float, flattened -> logits (B, outputs). Raises Refusal for
    a batch of one row, which has no statistics of its own.
    """

    def __init__(self, widths: Sequence[int], outputs: int):
        super().__init__()
        layers: list[nn.Module] = [nn.Flatten()]
        for i, o in pairwise(widths):
            layers += [nn.Linear(i, o, bias=False), Gain(o), nn.SiLU()]
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(widths[-1], outputs, bias=False)

    def features(self, x: Tensor) -> Tensor:
        """x (B, ...) -> what the head reads (B, widths[-1])."""
        if len(x) < 2:
            raise Refusal("gains norm by the statistics of the batch, of which one row has none: choose another batch size")
        return self.body(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


def _norm(kind: type[nn.Module], width: int, running: bool = False) -> nn.Module:
    """Batch norm as the papers have it: without affine parameters, which tasks would share."""
    return kind(width, affine=False, track_running_stats=running)


def batch_norms(net: nn.Module) -> list[nn.BatchNorm1d | nn.BatchNorm2d]:
    """The batch norms of a network, in order."""
    return [m for m in net.modules() if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d))]


def use_running_statistics(net: nn.Module) -> nn.Module:
    """Let every batch norm of a network norm by running statistics in eval mode, in place of the batch's own; returns the network.

    They are buffers, and so part of what a task keeps for itself in a mask bank that is opened after.
    """
    for norm in batch_norms(net):
        if not norm.track_running_stats:
            norm.track_running_stats = True
            norm.running_mean = torch.zeros(norm.num_features)
            norm.running_var = torch.ones(norm.num_features)
            norm.num_batches_tracked = torch.zeros((), dtype=torch.int64)
    return net


def use_batch_statistics(net: nn.Module) -> nn.Module:
    """Let every batch norm of a network norm by the batch's own statistics in eval mode too; returns the network."""
    for norm in batch_norms(net):
        norm.track_running_stats = False
        norm.running_mean = norm.running_var = norm.num_batches_tracked = None
    return net


@contextlib.contextmanager
def batch_statistics(norms: Iterable[nn.BatchNorm1d | nn.BatchNorm2d]) -> Iterator[None]:
    """Within the block these norms, in eval mode, norm by the batch's own statistics, and leave their running ones as they are."""
    changed = [norm for norm in norms if norm.track_running_stats and not norm.training]
    for norm in changed:
        norm.training, norm.track_running_stats = True, False
    try:
        yield
    finally:
        for norm in changed:
            norm.training, norm.track_running_stats = False, True


@torch.no_grad()
def gather_statistics(net: nn.Module, forward: Callable[[Tensor], Any], inputs: Iterable[Tensor]) -> None:
    """Make the running statistics of every batch norm the means over these batches of inputs, of which forward calls the network.

    All else is in eval mode. What training leaves behind is of no use after dropout: it makes variances larger than they are at test
    (Li et al., CVPR 2019), and it is of weights that have moved since. Ends with the network in eval mode.
    """
    net.eval()
    norms = batch_norms(net)
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.train().reset_running_stats()
    for i, x in enumerate(inputs):
        for norm in norms:
            norm.momentum = 1 / (i + 1)
        forward(x)
    for norm, momentum in zip(norms, momenta):
        norm.momentum = momentum
    net.eval()


def _channels(name: str, shape: tuple[int, ...], side: int = 32) -> int:
    """Channels of a benchmark's input shape, by default 3. Raises Refusal where it is no image of that side."""
    if shape and (len(shape) != 3 or shape[1:] != (side, side)):
        raise Refusal(f"model {name} reads images of channels x {side} x {side}, got inputs of {' x '.join(map(str, shape))}")
    return shape[0] if shape else 3


def _scaled(name: str, width: float, *sizes: int) -> list[int]:
    """A network's layer sizes times `width`, rounded down. Raises Refusal where one is then 0."""
    scaled = [int(width * size) for size in sizes]
    if min(scaled) < 1:
        raise Refusal(f"width must leave every layer of model {name} a unit, got {width}")
    return scaled


def mlp(outputs: int = 10, *shape: int) -> MLP:
    """784-100-100 with a head: WSN's network on Permuted MNIST (88,400 weights without the head). shape: of an input, default 784."""
    return MLP([math.prod(shape or (784,)), 100, 100], outputs)


def lenet_300_100(outputs: int = 10, *shape: int, width: float = 1.0) -> MLP:
    """LeNet-300-100: SupSup's and ImpressLearn's network on MNIST; outputs may exceed the classes (superfluous neurons).

    width multiplies the hidden layers. Raises Refusal where one would have no unit.
    """
    return MLP([math.prod(shape or (784,)), *_scaled("lenet-300-100", width, 300, 100)], outputs)


def fc_300_300(outputs: int = 10, *shape: int, width: float = 1.0) -> MLP:
    """784-300-300 with a head: the network of SupSup's notebook, with a head of 100; width as `lenet_300_100`."""
    return MLP([math.prod(shape or (784,)), *_scaled("fc-300-300", width, 300, 300)], outputs)


def fc_1024(outputs: int = 10, *shape: int, width: float = 1.0) -> MLP:
    """784-1024-1024 with a head: SupSup's network on Rotated MNIST; width as `lenet_300_100`."""
    return MLP([math.prod(shape or (784,)), *_scaled("fc-1024", width, 1024, 1024)], outputs)


def alexnet(outputs: int = 100, *shape: int) -> AlexNet:
    """AlexNet-BN 64(4)-128(3)-256(2)-2048-2048: WSN's network on Split CIFAR-100 (6,499,328 weights without the head).

    shape: channels, 32, 32; default 3 channels. Raises Refusal for another one.
    """
    return AlexNet(outputs, _channels("alexnet", shape))


def lenet(outputs: int = 100, *shape: int) -> LeNet:
    """LeNet 20-50-800-500: WSN's network on CIFAR-100 Superclass (2,986,500 weights without the head); shape as `alexnet`."""
    return LeNet([20, 50, 800, 500], outputs, _channels("lenet", shape))


def lenet_large(outputs: int = 12, *shape: int) -> LeNet:
    """LeNet 64-128-2500-1500: WSN's network on Omniglot Rotation (24,436,400 weights without the head, of grey images).

    shape: channels, 32, 32; default 1 channel. Raises Refusal for another one.
    """
    return LeNet([64, 128, 2500, 1500], outputs, _channels("lenet-large", shape or (1, 32, 32)))


def tinynet(outputs: int = 200, *shape: int) -> TinyNet:
    """Four convolutions of 160 and 640-640: WSN's network on TinyImageNet (2,743,520 weights without the head).

    shape: channels, 64, 64; default 3 channels. Raises Refusal for another one.
    """
    return TinyNet(outputs, _channels("tinynet", shape, 64))


def resnet_18(outputs: int = 10, *shape: int) -> ResNet18:
    """ResNet18 nf=20, 2 x 2 pooling to 640: WSN's network on 5-Datasets (1,090,140 weights without head); shape as `alexnet`."""
    return ResNet18(outputs, _channels("resnet-18", shape))


def gem_resnet_18(outputs: int = 5, *shape: int, width: float = 1.0) -> ResNet18:
    """GEMResNet18 nf=20 with 4 x 4 pooling to 160: SupSup's network on Split CIFAR-100 (1,090,940 weights with the head of 5).

    The head is linear for their 1 x 1 convolution, and masked too; a task has norm statistics of its own. shape as `alexnet`; width
    multiplies every layer's channels, as in their code rounded down. Raises Refusal where none would be left.
    """
    (channels,) = _scaled("gem-resnet-18", width, 20)
    return ResNet18(outputs, _channels("gem-resnet-18", shape), channels, pool=4, running=True)


def resnet_50(outputs: int = 10, *shape: int, width: float = 1.0) -> ResNet50:
    """ResNet-50: SupSup's network on Split ImageNet (23,475,392 weights with the head of 10, which is masked too).

    shape: channels, 224, 224; default 3 channels. width multiplies the 3 x 3 convolutions' channels, as in their code. Raises Refusal.
    """
    (base,) = _scaled("resnet-50", width, 64)
    return ResNet50(outputs, _channels("resnet-50", shape, 224), base)


MODELS = {
    "mlp": mlp,
    "lenet-300-100": lenet_300_100,
    "fc-300-300": fc_300_300,
    "fc-1024": fc_1024,
    "alexnet": alexnet,
    "lenet": lenet,
    "lenet-large": lenet_large,
    "tinynet": tinynet,
    "resnet-18": resnet_18,
    "gem-resnet-18": gem_resnet_18,
    "resnet-50": resnet_50,
}
