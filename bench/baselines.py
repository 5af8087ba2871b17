"""The expressions that the published code and plain PyTorch use for each operation: what the kernels are compared with.

Written from the methods' descriptions, each with the cost that it really has there (clones, index writes, host syncs, templates).
"""

import torch
from torch import Tensor


def select_sort(scores: Tensor, density: float) -> Tensor:
    """SupSup and edge-popup: sort |scores|, write 0 through the first indices and 1 through the rest of a clone."""
    key = scores.abs()
    out = key.clone()
    _, order = key.flatten().sort()
    closed = int((1 - density) * key.numel())
    flat = out.flatten()
    flat[order[:closed]] = 0
    flat[order[closed:]] = 1
    return flat.view_as(scores)


def select_kthvalue(scores: Tensor, density: float, zeros: Tensor, ones: Tensor) -> Tensor:
    """WSN: the k-th smallest |score| by kthvalue, fetched to the host, and where() between two templates of the scores' size."""
    key = scores.abs()
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
