"""The operations, one file each: schema, fake, autograd, public function. Kernels for CPU are in ``csrc/cpu``."""

from subnet_kernels import triton
from subnet_kernels.ops import _library
from subnet_kernels.ops.apply import apply, restore_
from subnet_kernels.ops.bits import count, overlap, pack, stats, union_, unpack
from subnet_kernels.ops.compressed import Compressed, compress, compressed_linear
from subnet_kernels.ops.masked import masked_conv, masked_linear, subnet_linear
from subnet_kernels.ops.mixed import mixed_linear
from subnet_kernels.ops.pool import max_pool_relu
from subnet_kernels.ops.select import k_kth, k_sort, refresh_, select
from subnet_kernels.ops.superpose import alpha_grad, pack_bank, superpose
from subnet_kernels.ops.threshold import refresh_threshold_, threshold
from subnet_kernels.ops.update import update_adam_, update_rmsprop_, update_sgd_

_library.load_all()
triton.register()  # of what neither compiled library serves

__all__ = [
    "Compressed", "alpha_grad", "apply", "compress", "compressed_linear", "count", "k_kth", "k_sort", "masked_conv",
    "masked_linear", "max_pool_relu", "mixed_linear", "overlap", "pack", "pack_bank", "refresh_", "refresh_threshold_", "restore_",
    "select", "stats", "subnet_linear", "superpose", "threshold", "union_", "unpack", "update_adam_", "update_rmsprop_",
    "update_sgd_",
]  # fmt: skip
