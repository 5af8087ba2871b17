"""The expressions that the published code and plain PyTorch use for each operation: what the kernels are compared with.

Written from the methods' descriptions, each with the cost that it really has there (clones, index writes, host syncs, templates).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def resnet18() -> list[tuple[int, ...]]:
    """The shapes of its convolutions."""
    shapes, before = [(64, 3, 7, 7)], 64
    for width in (64, 128, 256, 512):
        shapes += [(width, before, 3, 3)] + [(width, width, 3, 3)] * 3 + ([(width, before, 1, 1)] if width > before else [])
        before = width
    return shapes


def select_sort(scores: Tensor, density: float) -> Tensor:
    """SupSup and edge-popup: sort |scores|, write 0 through the first indices and 1 through the rest of a clone."""
    return _sort_rule(scores.abs(), density)


def _sort_rule(key: Tensor, density: float) -> Tensor:
    out = key.clone()
    _, order = key.flatten().sort()
    closed = int((1 - density) * key.numel())
    flat = out.flatten()
    flat[order[:closed]] = 0
    flat[order[closed:]] = 1
    return flat.view_as(key)


def select_kthvalue(scores: Tensor, density: float, zeros: Tensor, ones: Tensor) -> Tensor:
    """WSN: the k-th smallest |score| by kthvalue, fetched to the host, and where() between two templates of the scores' size."""
    return _kthvalue_rule(scores.abs(), density, zeros, ones)


def _kthvalue_rule(key: Tensor, density: float, zeros: Tensor, ones: Tensor) -> Tensor:
    n = key.numel()
    rank = 1 + round(0.01 * ((1 - density) * 100) * (n - 1))
    least = key.flatten().kthvalue(rank).values.item()
    return torch.where(key < least, zeros, ones)


def select_topk(scores: Tensor, density: float) -> Tensor:
    """The best that eager PyTorch has for many kept scores: unsorted topk, its least value, and a comparison."""
    key = scores.abs()
    least = key.flatten().topk(key.numel() - int((1 - density) * key.numel()), sorted=False).values.min()
    return key >= least


def select_kthvalue_compare(scores: Tensor, density: float) -> Tensor:
    """The same by kthvalue and a comparison, without WSN's templates and host sync."""
    key = scores.abs()
    return key >= key.flatten().kthvalue(1 + int((1 - density) * key.numel())).values


def threshold_float(scores: Tensor) -> Tensor:
    """SupSup: a float mask of the scores that are not negative."""
    return (scores >= 0).float()


def threshold_pack(scores: Tensor) -> Tensor:
    """The same to bytes in eager PyTorch: groups of eight comparisons, shifted and summed."""
    shifts = torch.arange(8, dtype=torch.uint8, device=scores.device)
    return ((scores.view(-1, 8) >= 0).to(torch.uint8) << shifts).sum(1, dtype=torch.uint8)


def pack_float(mask: Tensor) -> Tensor:
    """A float mask to bytes in eager PyTorch: groups of eight, shifted and summed."""
    weights = (1 << torch.arange(8, device=mask.device)).to(torch.uint8)
    return ((mask.view(-1, 8) > 0).to(torch.uint8) * weights).sum(1, dtype=torch.uint8)


def union_multiply(owned: Tensor, mask: Tensor) -> Tensor:
    """WSN: the union of two masks as 1 - (1 - a)(1 - b) on whole numbers."""
    return 1 - (1 - owned) * (1 - mask)


def count_lookup(bits: Tensor, ones_of_byte: Tensor) -> Tensor:
    """Bits set by a table of 256 entries: the popcount that eager PyTorch can express."""
    return ones_of_byte[bits.long()].sum()


def straight_through_published(
    grad: Tensor, weight: Tensor, scores: Tensor, mask: Tensor, frozen: Tensor
) -> tuple[Tensor, Tensor]:
    """Autograd through a float mask, then WSN's loop: G m and G W through |S|, and frozen entries zeroed by an index write."""
    d_weight = grad * mask
    d_weight[frozen == 1] = 0
    return d_weight, grad * weight * scores.sign()


def straight_through_multiply(grad: Tensor, weight: Tensor, scores: Tensor, live: Tensor) -> tuple[Tensor, Tensor]:
    """The best that eager PyTorch has, with the open and unfrozen weights as a float mask kept by the caller."""
    return grad * live, grad * weight * scores.sign()


def restore_index(weight: Tensor, frozen: Tensor, values: Tensor) -> None:
    """Frozen values put back by an index write through a bool mask."""
    weight[frozen] = values


def superpose_published(weight: Tensor, masks: Tensor, alphas: Tensor) -> Tensor:
    """SupSup: masks with a positive alpha gathered, weighted, and summed, all as floats."""
    chosen = (alphas > 0).nonzero().flatten()
    shape = (-1,) + (1,) * weight.dim()
    return weight * (alphas[chosen].view(shape) * masks[chosen]).sum(0)


def superpose_product(weight: Tensor, masks: Tensor, alphas: Tensor) -> Tensor:
    """The best that eager PyTorch has on float masks: a matrix-vector product."""
    return weight * (alphas @ masks.view(len(masks), -1)).view(weight.shape)


def superpose_grad_product(grad: Tensor, weight: Tensor, masks: Tensor) -> Tensor:
    """Gradients of all alphas by a matrix-vector product with the float masks."""
    return masks.view(len(masks), -1) @ (grad * weight).flatten()


def alpha_grad_loop(x: Tensor, grad_y: Tensor, weight: Tensor, masks: Tensor) -> Tensor:
    """Every row's gradient to every alpha, a masked product a task."""
    return torch.stack([(grad_y @ (weight * mask) * x).sum(1) for mask in masks], 1)


def superpose_sum(weight: Tensor, masks: Tensor, alphas: Tensor) -> Tensor:
    """SupSup's expression without its choice of positive alphas, whose number no compiler knows: what torch.compile is given."""
    return weight * (alphas.view((-1,) + (1,) * weight.dim()) * masks).sum(0)


def masked_linear_multiply(x: Tensor, weight: Tensor, mask: Tensor) -> Tensor:
    """The usual masked layer: the weight times a float mask, then a dense product."""
    return torch.nn.functional.linear(x, weight * mask)


class StraightThroughMask(torch.autograd.Function):
    """A rule's mask of |scores|, with the straight-through gradient."""

    @staticmethod
    def forward(ctx, key, rule, *arguments):
        ctx.others = 1 + len(arguments)
        return rule(key, *arguments)

    @staticmethod
    def backward(ctx, grad):
        return grad, *[None] * ctx.others


class PublishedLayer:
    """A layer as WSN and SupSup have it: at every forward a float mask from its scores, and autograd through mask * weight."""

    def mask(self) -> Tensor:
        if self.rule == "sort":
            return StraightThroughMask.apply(self.scores.abs(), _sort_rule, self.density)
        return StraightThroughMask.apply(self.scores.abs(), _kthvalue_rule, self.density, self.zeros, self.ones)


class PublishedLinear(PublishedLayer, nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.mask() * self.weight, self.bias)


class PublishedConv2d(PublishedLayer, nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.mask() * self.weight, self.bias)


def publish(net: nn.Module, scores: dict[str, Tensor], rule: str, density: float) -> nn.Module:
    """Turn the layers that `scores` names into published ones, in place; rule is "sort" (SupSup) or "kthvalue" (WSN)."""
    for name, values in scores.items():
        layer = net.get_submodule(name)
        layer.__class__ = PublishedLinear if isinstance(layer, nn.Linear) else PublishedConv2d
        layer.scores = nn.Parameter(values.detach().clone())
        layer.rule, layer.density = rule, density
        layer.zeros, layer.ones = torch.zeros_like(values), torch.ones_like(values)  # WSN's templates, no buffers
    return net


def freeze_by_index(net: nn.Module, frozen: dict[str, Tensor]) -> None:
    """WSN's loop after backward: gradients of frozen weights zeroed by an index write a layer, from masks of whole numbers."""
    for name, module in net.named_modules():
        if name in frozen:
            module.weight.grad[frozen[name] == 1] = 0


def mixed_linear_loop(x: Tensor, weight: Tensor, masks: Tensor, ids: list[int]) -> Tensor:
    """Every row by itself: its task's float mask times the weight, and a matrix-vector product."""
    return torch.stack([torch.nn.functional.linear(row, weight * masks[t]) for row, t in zip(x, ids)])


def mixed_linear_where(x: Tensor, weight: Tensor, masks: Tensor, ids: list[int]) -> Tensor:
    """The same with bool masks, and closed weights not multiplied."""
    zero = torch.zeros((), dtype=weight.dtype, device=weight.device)
    return torch.stack([torch.nn.functional.linear(row, torch.where(masks[t], weight, zero)) for row, t in zip(x, ids)])


def mixed_linear_grouped(x: Tensor, weight: Tensor, masks: Tensor, ids: Tensor) -> Tensor:
    """The best that eager PyTorch has where tasks have several rows: a masked weight and a product for each task of the batch."""
    y = x.new_empty((len(x), len(weight)))
    for task in ids.unique().tolist():
        rows = (ids == task).nonzero()[:, 0]
        y[rows] = torch.nn.functional.linear(x[rows], weight * masks[task])
    return y


def mixed_linear_kept(x: Tensor, weights: Tensor, ids: list[int]) -> Tensor:
    """With every task's effective weight kept, as many times the weight as there are tasks: a matrix-vector product a row."""
    return torch.stack([torch.nn.functional.linear(row, weights[t]) for row, t in zip(x, ids)])
