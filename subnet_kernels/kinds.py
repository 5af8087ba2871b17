"""Masked layers of the kinds that no kernel here serves: PyTorch's own product with the effective weight, made once per step."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from subnet_kernels.layers import DENSE, SubnetLayer, refresh
from subnet_kernels.live import Rule


class _SubnetConvTranspose(SubnetLayer):
    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        return super().forward(x, output_size)

    def _product(self, x: Tensor, weight: Tensor, bias: Tensor | None = None, output_size: list[int] | None = None) -> Tensor:
        dimensions = weight.dim() - 2
        convolve = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[dimensions - 1]
        stride, padding, kernel, dilation = self.stride, self.padding, self.kernel_size, self.dilation
        more = self._output_padding(x, output_size, stride, padding, kernel, dimensions, dilation)
        return convolve(x, weight, self.bias if bias is None else bias, stride, padding, more, self.groups, dilation)


class SubnetConvTranspose1d(_SubnetConvTranspose, nn.ConvTranspose1d):
    """``nn.ConvTranspose1d`` through a mask. Arguments as ``nn.ConvTranspose1d``, and a `Rule`."""

    def __init__(self, *args, rule: Rule | None = None, **kwargs):
        nn.ConvTranspose1d.__init__(self, *args, **kwargs)
        self.install(rule or Rule())
        refresh([self])


class SubnetConvTranspose2d(_SubnetConvTranspose, nn.ConvTranspose2d):
    """``nn.ConvTranspose2d`` through a mask. Arguments as ``nn.ConvTranspose2d``, and a `Rule`."""

    def __init__(self, *args, rule: Rule | None = None, **kwargs):
        nn.ConvTranspose2d.__init__(self, *args, **kwargs)
        self.install(rule or Rule())
        refresh([self])


class SubnetConvTranspose3d(_SubnetConvTranspose, nn.ConvTranspose3d):
    """``nn.ConvTranspose3d`` through a mask. Arguments as ``nn.ConvTranspose3d``, and a `Rule`."""

    def __init__(self, *args, rule: Rule | None = None, **kwargs):
        nn.ConvTranspose3d.__init__(self, *args, **kwargs)
        self.install(rule or Rule())
        refresh([self])


class SubnetEmbedding(SubnetLayer, nn.Embedding):
    """``nn.Embedding`` through a mask. Arguments as ``nn.Embedding``, and a `Rule`.

    Raises ValueError for ``max_norm``, which would write into the weight at a forward, and for ``sparse``.
    """

    def __init__(self, *args, rule: Rule | None = None, **kwargs):
        nn.Embedding.__init__(self, *args, **kwargs)
        self.install(rule or Rule())
        refresh([self])

    def install(self, rule: Rule, scores: Tensor | None = None) -> None:
        check_embedding("SubnetEmbedding", self)
        super().install(rule, scores)

    def _product(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.embedding(x, weight, self.padding_idx, scale_grad_by_freq=self.scale_grad_by_freq)


def check_embedding(where: str, module: nn.Embedding) -> None:
    """Raise ValueError where an embedding does at a forward what a masked one cannot."""
    if module.max_norm is not None:
        raise ValueError(f"{where}: max_norm must be None, a forward may not write into the weight, got {module.max_norm}")
    if module.sparse:
        raise ValueError(f"{where}: sparse must be False, the gradients of weight and scores are dense, got True")


DENSE |= {
    nn.ConvTranspose1d: SubnetConvTranspose1d,
    nn.ConvTranspose2d: SubnetConvTranspose2d,
    nn.ConvTranspose3d: SubnetConvTranspose3d,
    nn.Embedding: SubnetEmbedding,
}
