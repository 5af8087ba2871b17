"""A weight through its mask, frozen values put back, and the straight-through gradients, at the sizes of every training step.

Expected on one thread before any measurement: apply as fast as a product with a float mask, straight_through at 78,400 weights
10 to 15 us and 4 times the published expressions, restore_ at least 5 times an index write. On a GPU: within 1.3 times the bytes at
copy speed, and 3 times the published expressions.
"""

import pytest
import torch
from baselines import restore_index, straight_through_multiply, straight_through_published
from measure import floor, measure, record, sizes, table, targets_on

import subnet_kernels as sk
from subnet_kernels import reference
from subnet_kernels.ops.apply import straight_through

SIZES = sizes([10_000, 78_400, 2_359_296], [11_166_912, 100_000_000])
DENSITY = 0.3


@pytest.mark.parametrize("n", SIZES)
def bench_apply(n, thread_count):
    weight, mask = torch.randn(n), torch.rand(n) < DENSITY
    bits, as_float = reference.pack(mask), mask.float()
    assert torch.equal(sk.apply(weight, bits), torch.where(mask, weight, 0.0))
    op = torch.ops.subnet_kernels.apply.default
    times = measure(
        {
            "apply": lambda: op(weight, bits),
            "float product": lambda: weight * as_float,
            "where": lambda: torch.where(mask, weight, 0.0),
            "floor: clone": lambda: weight.clone(),
        },
        seconds=0.5,
    ) | floor(n * 8.125)
    targets = targets_on(thread_count, {}, {"floor: the bytes at copy speed": 1 / 1.3})
    print("\n" + table(f"apply, {n:,} float32 weights", times, "apply", targets))
    record("apply", f"n={n} float32 density={DENSITY}", times, targets=targets)


@pytest.mark.parametrize("n", SIZES)
def bench_restore(n, thread_count):
    frozen = torch.rand(n) < DENSITY
    bits, kept, weight, other = reference.pack(frozen), torch.randn(n), torch.randn(n), torch.randn(n)
    values = kept[frozen]
    expected = torch.where(frozen, kept, weight)
    sk.restore_([weight], [bits], [values])
    assert torch.equal(weight, expected)
    times = measure(
        {
            "restore_": lambda: sk.restore_([weight], [bits], [values]),
            "index write": lambda: restore_index(other, frozen, values),
            "where, copy": lambda: other.copy_(torch.where(frozen, kept, other)),
        },
        seconds=0.5,
    )
    targets = targets_on(thread_count, {}, {"index write": 5})
    print("\n" + table(f"restore_, {n:,} float32 weights", times, "restore_", targets))
    record("restore_", f"n={n} float32 density={DENSITY}", times, targets=targets)


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@torch.no_grad()  # as in an ordinary backward
def bench_straight_through(n, dtype, thread_count):
    grad, weight, scores = (torch.randn(n).to(dtype) for _ in range(3))
    mask, frozen = torch.rand(n) < DENSITY, torch.rand(n) < DENSITY
    bits, frozen_bits = reference.pack(mask), reference.pack(frozen)
    as_float, frozen_float, live = mask.to(dtype), frozen.to(dtype), (mask & ~frozen).to(dtype)
    ours = straight_through(grad, weight, scores, bits, frozen_bits)
    for rival in (
        straight_through_published(grad, weight, scores, as_float, frozen_float),
        straight_through_multiply(grad, weight, scores, live),
    ):
        assert torch.equal(ours[0], rival[0])
        assert torch.equal(ours[1], rival[1])
    out = torch.empty(n, dtype=dtype), torch.empty(n, dtype=dtype)

    def same_bytes():
        torch.mul(grad, weight, out=out[0])
        torch.add(out[0], scores, out=out[1])

    times = measure(
        {
            "straight_through": lambda: straight_through(grad, weight, scores, bits, frozen_bits),
            "published (WSN)": lambda: straight_through_published(grad, weight, scores, as_float, frozen_float),
            "float product": lambda: straight_through_multiply(grad, weight, scores, live),
            "floor: about the bytes (mul, add)": same_bytes,
        },
        seconds=0.5,
    ) | floor(n * (5 * grad.element_size() + 0.25))
    name = str(dtype).removeprefix("torch.")
    small = n == 78_400 and dtype == torch.float32
    targets = targets_on(
        thread_count, {"published (WSN)": 3} if small else {}, {"published (WSN)": 3, "floor: the bytes at copy speed": 1 / 1.3}
    )
    print("\n" + table(f"straight_through, {n:,} {name} weights", times, "straight_through", targets))
    record("straight_through", f"n={n} {name} density={DENSITY}", times, targets=targets)
