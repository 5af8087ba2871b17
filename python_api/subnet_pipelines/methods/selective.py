"""Networks whose layers are shared between tasks or a task's own, and all the ways to choose between the two in one evaluation.

A configuration says of every layer whether it is shared. Networks that begin alike have equal activations up to where they part, so the
2^d configurations of d layers are a tree: evaluated layer by layer it costs 2^(d+1) - 2 layers where one network after another costs
d 2^d. All nodes of a layer are one batch, and a layer's two kernels are one convolution of twice the channels, which makes the two
children of every node: a layer is one convolution, whatever its depth.

How a shared layer gets its kernel: as it is (HPS, hard parameter sharing), from a core tensor and factors of the task's own (TF, Bulat
et al., AAAI 2020), or from a knowledge base by a deconvolution and a contraction of the task's own (DF-CNN, Lee et al., IJCAI 2019).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from subnet_kernels.ops import max_pool_relu
from subnet_pipelines.errors import Refusal


class Layer(NamedTuple):
    """A convolution of so many channels, kernel x kernel, over a border of zeros; ReLU; pool x pool maxima.

    base: channels of DF-CNN's knowledge base, and those that the deconvolution makes of it; skip: what the layer before reads is added,
    past the ReLU, to what this one makes.
    """

    channels: int
    kernel: int
    pool: int = 1
    base: tuple[int, int] = (16, 24)
    skip: bool = False


class Net(NamedTuple):
    """The layers that may be shared, and hidden widths of the head that every task has for itself.

    flat: inputs are taken as channels; dtype: what the layers run in, None is the inputs' own. Features come back in that.
    """

    layers: tuple[Layer, ...]
    hidden: tuple[int, ...] = ()
    flat: bool = False
    dtype: torch.dtype | None = None


NETS = {  # by name; all but the first are those of LASEM's code (Lifelong-ML/LASEM c4ec052, utils_env_cl.py)
    "mlp": Net((Layer(100, 1), Layer(100, 1)), flat=True),
    "lasem-cifar": Net(
        (Layer(32, 3), Layer(32, 3, 2, (24, 48)), Layer(64, 3, 1, (32, 64)), Layer(64, 3, 2, (36, 72))), (64,)
    ),
    "lasem-office-home": Net(
        (Layer(64, 11, 3, (24, 48)), Layer(256, 5, 3, (64, 128)), Layer(256, 3, 2, (64, 128)), Layer(256, 3, 2, (64, 128))),
        (256, 64),
    ),
    "lasem-stl": Net(
        (
            Layer(32, 3, 1, (12, 24)), Layer(32, 3, 3, (24, 48)), Layer(64, 3, 1, (32, 64)),
            Layer(64, 3, 3, (48, 96)), Layer(128, 3, 1, (64, 128)), Layer(128, 3, 3, (96, 192)),
        ),
        (128, 16),
    ),
    "lasem-resnet-18": Net(
        tuple(
            Layer(width, 7 if i == 0 else 3, 2 if i in (0, 5, 9, 13) else 1, skip=i in (2, 4, 8, 12, 16))
            for i, width in enumerate([64] * 5 + [128] * 4 + [256] * 4 + [512] * 4)
        ),
        (1000,),
    ),
}  # fmt: skip

Kernel = tuple[Tensor, Tensor]  # weight (O, I, k, k) and bias (O,)


# ---- how a shared layer gets its kernel ----------------------------------------------------------------------------


class Start(NamedTuple):
    """How tensors begin: the deviation of weights drawn from a normal distribution cut at two of them, and the value of biases."""

    std: float
    bias: float

    def plain(self, layer: Layer, inp: int) -> dict[str, Tensor]:
        """A kernel of its own: weight (O, inp, k, k) and bias (O,), drawn from torch's global CPU generator, as all here."""
        return self.linear(inp, layer.channels, layer.kernel, layer.kernel)

    def linear(self, inp: int, out: int, *window: int) -> dict[str, Tensor]:
        """A linear layer: weight (out, inp, *window) and bias (out,)."""
        tail = 0.5 * (1 - math.erf(math.sqrt(2)))  # beyond two deviations
        weight = self.std * torch.special.ndtri(torch.empty(out, inp, *window).uniform_(tail, 1 - tail))
        return {"weight": weight, "bias": torch.full((out,), self.bias)}


def glorot(shape: Sequence[int], fan_in: int, fan_out: int) -> Tensor:
    """Uniform in +- sqrt(6 / (fan_in + fan_out)), TensorFlow's default."""
    bound = math.sqrt(6 / (fan_in + fan_out))
    return torch.empty(*shape).uniform_(-bound, bound)


class Plain:
    """HPS: what is shared is the kernel itself, and a task adds nothing."""

    @staticmethod
    def shared(layer: Layer, inp: int, start: Start) -> dict[str, Tensor]:
        """Fresh tensors that tasks share."""
        return start.plain(layer, inp)

    @staticmethod
    def added(layer: Layer, inp: int) -> dict[str, Tensor]:
        """Fresh tensors that a task adds of its own to what is shared."""
        return {}

    @staticmethod
    def kernel(shared: dict[str, Tensor], added: dict[str, Tensor]) -> Kernel:
        """The kernel that the two make."""
        return shared["weight"], shared["bias"]

    @staticmethod
    def penalty(added: dict[str, Tensor]) -> Tensor | None:
        """What the loss adds for a shared layer, 0-dim; None for nothing."""
        return None


class Tucker(Plain):
    """TF: a core (O, I, k, k) times a square factor of the task's own along each dimension, and a bias of the task's own."""

    @staticmethod
    def shared(layer: Layer, inp: int, start: Start) -> dict[str, Tensor]:
        out, area = layer.channels, layer.kernel**2
        return {"core": glorot((out, inp, layer.kernel, layer.kernel), area * inp, area * out)}

    @staticmethod
    def added(layer: Layer, inp: int) -> dict[str, Tensor]:
        sides = {"factor_rows": layer.kernel, "factor_columns": layer.kernel, "factor_in": inp, "factor_out": layer.channels}
        bias = {"bias": glorot((layer.channels,), layer.channels, layer.channels)}
        return {name: glorot((n, n), n, n) for name, n in sides.items()} | bias

    @staticmethod
    def kernel(shared: dict[str, Tensor], added: dict[str, Tensor]) -> Kernel:
        factors = (added[f"factor_{name}"] for name in ("out", "in", "rows", "columns"))
        weight = shared["core"]
        for factor in factors:  # each takes the first dimension, and makes the last one
            weight = torch.tensordot(weight, factor, dims=([0], [1]))
        return weight, added["bias"]

    @staticmethod
    def penalty(added: dict[str, Tensor]) -> Tensor:
        """The Frobenius norms of U'U - I of the four factors, summed."""
        factors = [added[f"factor_{name}"] for name in ("out", "in", "rows", "columns")]
        return sum(torch.linalg.norm(u.T @ u - torch.eye(len(u), dtype=u.dtype, device=u.device)) for u in factors)


class Deconvolved(Plain):
    """DF-CNN: a base (1, c, h, h), with k = 2 h - 1, deconvolved to (1, t, k, k) and contracted with (t, I, O)."""

    @staticmethod
    def shared(layer: Layer, inp: int, start: Start) -> dict[str, Tensor]:
        side, count = (layer.kernel + 1) // 2, layer.base[0]
        return {"base": glorot((1, count, side, side), side * side, side * count)}

    @staticmethod
    def added(layer: Layer, inp: int) -> dict[str, Tensor]:
        (count, made), out = layer.base, layer.channels
        return {
            "up": glorot((count, made, 3, 3), 9 * made, 9 * count),
            "up_bias": glorot((made,), 1, made),
            "mix": glorot((made, inp, out), made * inp, made * out),
            "bias": glorot((out,), out, out),
        }

    @staticmethod
    def kernel(shared: dict[str, Tensor], added: dict[str, Tensor]) -> Kernel:
        made = F.conv_transpose2d(shared["base"], added["up"], added["up_bias"], stride=2, padding=1)[0]
        return torch.tensordot(added["mix"], made, dims=([0], [0])).transpose(0, 1), added["bias"]


SHARING: dict[str, type[Plain]] = {"hps": Plain, "tf": Tucker, "df-cnn": Deconvolved}


# ---- configurations ------------------------------------------------------------------------------------------------


def configurations(groups: Sequence[int]) -> list[tuple[bool, ...]]:
    """Every way to share groups of consecutive layers or not, a bool a layer, True is shared: the first is all shared.

    groups: layers of each; bit g of a way's number says that group g is the task's own.
    """
    ways = [[number >> g & 1 == 0 for g in range(len(groups))] for number in range(1 << len(groups))]
    return [tuple(share for share, size in zip(way, groups) for _ in range(size)) for way in ways]


def named(name: str, layers: int) -> tuple[bool, ...]:
    """A fixed configuration by name: shared, specific, bottom-N, top-N, alternating, or a digit a layer, 1 for shared. Raises Refusal."""
    kind, _, count = name.partition("-")
    if name in ("shared", "specific"):
        return (name == "shared",) * layers
    if name == "alternating":
        return tuple(i % 2 == 1 for i in range(layers))
    if kind in ("bottom", "top") and count.isdecimal() and 0 < int(count) < layers:
        lowest = [i < int(count) for i in range(layers)]
        return tuple(lowest if kind == "bottom" else lowest[::-1])
    if len(name) == layers and set(name) <= {"0", "1"}:
        return tuple(digit == "1" for digit in name)
    raise Refusal(
        f"configuration must be em, darts, search, shared, specific, bottom-N or top-N with N from 1 to {layers - 1}, alternating, or "
        f"{layers} digits 0 and 1, got {name!r}"
    )


# ---- evaluation ----------------------------------------------------------------------------------------------------


def widths(net: Net, shape: Sequence[int]) -> tuple[list[int], int]:
    """Input channels of every layer, and the features that the last one leaves, for inputs of a shape. Raises Refusal."""
    if net.flat:
        channels, height, width = math.prod(shape), 1, 1
    elif len(shape) == 3:
        channels, height, width = shape
    else:
        raise Refusal(f"the network reads pictures of channels x height x width, got inputs of {' x '.join(map(str, shape))}")
    inputs = []
    for layer in net.layers:
        inputs.append(channels)
        channels, height, width = layer.channels, -(-height // layer.pool), -(-width // layer.pool)
    return inputs, channels * height * width


def convolve(
    x: Tensor, layer: Layer, weight: Tensor, bias: Tensor, groups: int = 1, skip: Tensor | None = None, split: bool = False
) -> Tensor:
    """x (N, I, H, W), channels last, through a layer of that kernel -> (N, O, ceil(H / pool), ceil(W / pool)), channels last too.

    It is done in the dtype of x. skip (N, O, H, W), where there is one, is added past the ReLU; otherwise maxima come first, as ReLU is
    then less work. split: what comes is `apart`.
    """
    weight = weight.to(x.dtype, memory_format=torch.channels_last)
    x = F.conv2d(x, weight, bias.to(x.dtype), padding=layer.kernel // 2, groups=groups)
    if skip is None:
        return max_pool_relu(x, layer.pool, split)
    x = x.relu_() + skip
    x = F.max_pool2d(x, layer.pool, ceil_mode=True) if layer.pool > 1 else x
    return apart(x) if split else x


def pictures(net: Net, x: Tensor) -> Tensor:
    """x (B, ...) as the first layer reads it: (B, channels, height, width), channels last, the layout that convolutions are fastest in."""
    return (x.reshape(len(x), -1, 1, 1) if net.flat else x).to(net.dtype or x.dtype, memory_format=torch.channels_last)


def features(net: Net, kernels: Sequence[Kernel], x: Tensor) -> Tensor:
    """x (B, ...) through a kernel a layer -> (B, features)."""
    dtype, x, before = x.dtype, pictures(net, x), None
    for layer, (weight, bias) in zip(net.layers, kernels):
        before, x = x, convolve(x, layer, weight, bias, skip=before if layer.skip else None)
    return x.flatten(1).to(dtype)


def mixed(net: Net, shared: Sequence[Kernel], own: Sequence[Kernel], shares: Tensor, x: Tensor) -> Tensor:
    """x (B, ...) through layers that make shares (d,) of what the shared kernel makes, and the rest of what the task's own does (DARTS).

    -> (B, features).
    """
    dtype, x, before = x.dtype, pictures(net, x), None
    for layer, share, *kernels in zip(net.layers, shares, shared, own):
        weight, bias = (torch.cat(pair) for pair in zip(*kernels))
        one, two = convolve(x, layer, weight, bias, skip=both(before) if layer.skip else None).chunk(2, 1)
        before, x = x, torch.lerp(two, one, share.to(x.dtype))
    return x.flatten(1).to(dtype)


def tree(net: Net, groups: Sequence[int], shared: Sequence[Kernel], own: Sequence[Kernel], x: Tensor) -> Tensor:
    """x (B, ...) through all configurations of the groups -> (2^len(groups), B, features), in the order of `configurations`.

    shared, own: a layer's kernel where it is shared, and where it is the task's own.
    """
    rows, dtype, borders, x, before = len(x), x.dtype, {0, *itertools.accumulate(groups)}, pictures(net, x), None
    for i, (layer, *kernels) in enumerate(zip(net.layers, shared, own)):
        weight, bias = (torch.cat(pair) for pair in zip(*kernels))
        parts, skip = i in borders, None
        if layer.skip:
            skip = both(before) if i - 1 in borders else before
            skip = both(apart(skip)) if parts else skip
        # In a group each child goes on by itself.
        before, x = x, convolve(x, layer, weight, bias, 1 if parts else 2, skip, split=i + 1 in borders)
    return x.flatten(1).to(dtype).view(-1, rows, x.shape[1:].numel())


def apart(x: Tensor) -> Tensor:
    """The two children of every node, side by side in the channels (N, 2 C, H, W), as nodes that part in their turn: (2 N, C, H, W), one
    half of the batch apart."""
    return torch.cat(x.chunk(2, 1))


def both(x: Tensor) -> Tensor:
    """What a node reads, (N, C, H, W), for each of its children: (N, 2 C, H, W)."""
    return torch.cat([x, x], 1)
