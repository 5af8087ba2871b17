"""Kernels for networks that are used through masks: one backbone, thousands of tasks, one bit per weight and task."""

from subnet_kernels import optim
from subnet_kernels.bank import MaskBank
from subnet_kernels.convert import ErdosRenyi, SubnetConfig, convert, dense_state_dict, signed_constant_, unconvert
from subnet_kernels.kinds import SubnetConvTranspose1d, SubnetConvTranspose2d, SubnetConvTranspose3d, SubnetEmbedding
from subnet_kernels.layers import SubnetConv1d, SubnetConv2d, SubnetConv3d, SubnetLayer, SubnetLinear, refresh
from subnet_kernels.live import Rule
from subnet_kernels.ops import (
    Compressed,
    alpha_grad,
    apply,
    compress,
    compressed_linear,
    count,
    k_kth,
    k_sort,
    masked_conv,
    masked_linear,
    max_pool_relu,
    mixed_linear,
    overlap,
    pack,
    pack_bank,
    restore_,
    select,
    stats,
    subnet_linear,
    superpose,
    threshold,
    union_,
    unpack,
)
from subnet_kernels.predictor import Predictor

__version__ = "0.1.0"

__all__ = [
    "Compressed",
    "ErdosRenyi",
    "MaskBank",
    "Predictor",
    "Rule",
    "SubnetConfig",
    "SubnetConv1d",
    "SubnetConv2d",
    "SubnetConv3d",
    "SubnetConvTranspose1d",
    "SubnetConvTranspose2d",
    "SubnetConvTranspose3d",
    "SubnetEmbedding",
    "SubnetLayer",
    "SubnetLinear",
    "alpha_grad",
    "apply",
    "compress",
    "compressed_linear",
    "convert",
    "count",
    "dense_state_dict",
    "k_kth",
    "k_sort",
    "masked_conv",
    "masked_linear",
    "max_pool_relu",
    "mixed_linear",
    "optim",
    "overlap",
    "pack",
    "pack_bank",
    "refresh",
    "restore_",
    "select",
    "signed_constant_",
    "stats",
    "subnet_linear",
    "superpose",
    "threshold",
    "unconvert",
    "union_",
    "unpack",
]
