"""Superposition of a bank against the published expression and a matrix-vector product, both on float masks (32 times the bytes).

Expected on one thread before any measurement, 300 x 784 weights and 250 masks: 60 times the published expression and 8 times the
product (gates), equal alphas from counts 1,000 times the published expression.
"""

import pytest
import torch
from baselines import alpha_grad_loop, superpose_grad_product, superpose_product, superpose_published
from measure import measure, record, table

import subnet_kernels as sk
from subnet_kernels import reference

SHAPE = (300, 784)
OPS = torch.ops.subnet_kernels


@pytest.mark.parametrize("tasks", [10, 32, 250])
def bench_superpose(tasks, thread_count):
    masks = torch.rand(tasks, *SHAPE) < 0.5
    bank, as_float = reference.pack_bank(masks), masks.float()
    counts = masks.sum(0, dtype=torch.int32)
    weight, grad, alphas = torch.randn(SHAPE), torch.randn(SHAPE), torch.rand(tasks) + 0.01
    equal = torch.full((tasks,), 1 / tasks)
    for ours, theirs in (
        (sk.superpose(weight, bank, alphas), superpose_published(weight, as_float, alphas)),
        (sk.superpose(weight, bank, None, counts), superpose_published(weight, as_float, equal)),
        (OPS.superpose_grad(grad, weight, bank), superpose_grad_product(grad, weight, as_float)),
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-2)
    forward = measure(
        {
            "superpose": lambda: sk.superpose(weight, bank, alphas),
            "superpose, equal alphas": lambda: sk.superpose(weight, bank),
            "superpose, counts": lambda: sk.superpose(weight, bank, None, counts),
            "published (SupSup)": lambda: superpose_published(weight, as_float, alphas),
            "float product": lambda: superpose_product(weight, as_float, alphas),
        },
        rounds=3,
    )
    backward = measure(
        {
            "superpose_grad": lambda: OPS.superpose_grad(grad, weight, bank),
            "float product": lambda: superpose_grad_product(grad, weight, as_float),
        },
        rounds=3,
    )
    print("\n" + table(f"superpose, {SHAPE} float32, {tasks} masks", forward, "superpose"))
    print(table(f"superpose_grad, {SHAPE} float32, {tasks} masks", backward, "superpose_grad"))
    record("superpose", f"shape={SHAPE} K={tasks} float32", forward)
    record("superpose_grad", f"shape={SHAPE} K={tasks} float32", backward)
    if thread_count == 1 and tasks == 250:
        assert forward["published (SupSup)"].min >= 60 * forward["superpose"].min, "below 60x"
        assert forward["float product"].min >= 8 * forward["superpose"].min, "below 8x"
        assert backward["float product"].min >= 4 * backward["superpose_grad"].min, "below 4x"


def bench_superpose_large_bank(thread_count):
    """2,496 masks, 73 MB of bits: no rival, float masks would be 2.3 GB."""
    tasks = 2496
    bank = [torch.randint(0, 256, (460, 64, 64), dtype=torch.uint8) for _ in range(tasks // 64)]
    weight, grad, alphas = torch.randn(460 * 512), torch.randn(460 * 512), torch.rand(tasks)
    row = reference.superpose(weight[:512], [block[:1] for block in bank], alphas)
    torch.testing.assert_close(sk.superpose(weight, bank, alphas)[:512], row, rtol=1e-4, atol=1e-3)
    flat = torch.stack(bank).flatten()
    times = measure(
        {
            "superpose": lambda: sk.superpose(weight, bank, alphas),
            "superpose_grad": lambda: OPS.superpose_grad(grad, weight, bank),
            "read the bits once (amax)": lambda: flat.view(torch.int64).amax(),
        },
        rounds=3,
    )
    print("\n" + table(f"superpose, 235,520 float32, {tasks} masks", times, "superpose"))
    record("superpose", f"n=235520 K={tasks} float32", times)


@pytest.mark.parametrize(("rows", "tasks"), [(1, 32), (16, 32), (16, 250)])
def bench_alpha_grad(rows, tasks, thread_count):
    masks = torch.rand(tasks, *SHAPE) < 0.5
    bank, as_float = reference.pack_bank(masks), masks.float()
    x, grad_y, weight = torch.randn(rows, SHAPE[1]), torch.randn(rows, SHAPE[0]), torch.randn(SHAPE)
    torch.testing.assert_close(
        sk.alpha_grad(x, grad_y, weight, bank), alpha_grad_loop(x, grad_y, weight, as_float), rtol=1e-3, atol=1e-1
    )
    times = measure(
        {
            "alpha_grad": lambda: sk.alpha_grad(x, grad_y, weight, bank),
            "a product a task": lambda: alpha_grad_loop(x, grad_y, weight, as_float),
        },
        rounds=2,
    )
    print("\n" + table(f"alpha_grad, {rows} rows, {SHAPE} float32, {tasks} masks", times, "alpha_grad"))
    record("alpha_grad", f"B={rows} shape={SHAPE} K={tasks} float32", times)
