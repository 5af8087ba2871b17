"""Superposition of a bank against the published expression and a matrix-vector product, both on float masks (32 times the bytes).

Expected on one thread before any measurement, 300 x 784 weights and 250 masks: forward and backward 100 times the published
expression and 10 times the product, equal alphas from counts 1,000 times the published expression whatever the number of masks.
On a GPU: 25 times the published expression and 8 times the product with 250 masks, 20 times the product with 2,500, and with 100 masks
over 25 million weights within 1.6 times the bytes at copy speed.
"""

import pytest
import torch
from baselines import alpha_grad_loop, superpose_grad_product, superpose_product, superpose_published, superpose_sum
from measure import compiled, floor, measure, on_cpu, only_on, record, report, sizes, table, targets_on

import subnet_kernels as sk
from subnet_kernels import reference

SHAPE = (300, 784)
OPS = torch.ops.subnet_kernels


def with_gradient(expression, grad, alphas, *args):
    """The expression and its gradient to the alphas, as a callable."""
    alphas = alphas.clone().requires_grad_()
    return lambda: torch.autograd.grad(expression(*args, alphas), alphas, grad)[0]


TARGETS = {"published (SupSup)": 25, "float product": 8}  # on a GPU
CPU_TARGETS = {"published (SupSup)": 100, "float product": 10, "torch.compile": 10}  # forward and backward, 250 tasks


@pytest.mark.parametrize("tasks", sizes([10, 32, 250], [250]))
def bench_superpose(tasks, thread_count):
    masks = torch.rand(tasks, *SHAPE) < 0.5
    bank, as_float = reference.pack_bank(masks), masks.float()
    weight, grad, alphas = torch.randn(SHAPE), torch.randn(SHAPE), torch.rand(tasks) + 0.01
    both = {
        "superpose": with_gradient(sk.superpose, grad, alphas, weight, bank),
        "published (SupSup)": with_gradient(superpose_published, grad, alphas, weight, as_float),
        "float product": with_gradient(superpose_product, grad, alphas, weight, as_float),
    }
    for ours, theirs in (
        (sk.superpose(weight, bank, alphas), superpose_published(weight, as_float, alphas)),
        (OPS.superpose_grad(grad, weight, bank), superpose_grad_product(grad, weight, as_float)),
        (both["superpose"](), both["published (SupSup)"]()),
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-2)
    notes, flat = {}, torch.cat([block.flatten() for block in bank]).view(torch.int64)
    if thread_count < 2:
        fast, notes = compiled(superpose_sum, weight, as_float, alphas.clone().requires_grad_())
        if fast:
            both["torch.compile"] = with_gradient(torch.compile(superpose_sum, dynamic=False), grad, alphas, weight, as_float)
            torch.testing.assert_close(both["torch.compile"](), both["superpose"](), rtol=1e-4, atol=1e-2)
    forward = measure(
        {
            "superpose": lambda: sk.superpose(weight, bank, alphas),
            "ours, equal alphas": lambda: sk.superpose(weight, bank),
            "published (SupSup)": lambda: superpose_published(weight, as_float, alphas),
            "float product": lambda: superpose_product(weight, as_float, alphas),
            "floor: read the bits once": flat.amax,
        },
        rounds=3,
    )
    backward = measure(
        {
            "superpose_grad": lambda: OPS.superpose_grad(grad, weight, bank),
            "float product": lambda: superpose_grad_product(grad, weight, as_float),
            "floor: read the bits once": flat.amax,
        },
        rounds=3,
    )
    together = measure({**both, "floor: read the bits twice": lambda: (flat.amax(), flat.amax())}, rounds=3)
    goals, both_goals = (
        targets_on(thread_count, {}, TARGETS),
        targets_on(thread_count, CPU_TARGETS if tasks == 250 else {}, TARGETS),
    )
    print("\n" + table(f"superpose, {SHAPE} float32, {tasks} masks", forward, "superpose", goals))
    print(table(f"superpose_grad, {SHAPE} float32, {tasks} masks", backward, "superpose_grad", goals))
    print(table(f"superpose and its gradient, {SHAPE} float32, {tasks} masks", together, "superpose", both_goals))
    record("superpose", f"shape={SHAPE} K={tasks} float32", forward, targets=goals)
    record("superpose_grad", f"shape={SHAPE} K={tasks} float32", backward, targets=goals)
    record("superpose", f"forward and backward, shape={SHAPE} K={tasks} float32", together, notes, both_goals)


def bench_superpose_large_bank(thread_count):
    """2,500 masks: 73 MB of bits, 2.35 GB of floats. The published expression is timed once: it copies all of them twice."""
    tasks = 2500
    masks = torch.rand(tasks, *SHAPE) < 0.5
    bank, counts = reference.pack_bank(masks), masks.sum(0, dtype=torch.int32)
    few, few_counts = reference.pack_bank(masks[:25]), masks[:25].sum(0, dtype=torch.int32)
    weight, grad, alphas = torch.randn(SHAPE), torch.randn(SHAPE), torch.rand(tasks) + 0.01
    equal, flat, out = (
        torch.full((tasks,), 1 / tasks),
        torch.cat([b.flatten() for b in bank]).view(torch.int64),
        torch.empty(SHAPE),
    )
    both = {"superpose": with_gradient(sk.superpose, grad, alphas, weight, bank)}
    rivals, equal_rivals = {}, {}
    if thread_count < 2:
        as_float = masks.float()
        rivals["published (SupSup)"] = with_gradient(superpose_published, grad, alphas, weight, as_float)
        rivals["float product"] = with_gradient(superpose_product, grad, alphas, weight, as_float)
        equal_rivals["published (SupSup)"] = lambda: superpose_published(weight, as_float, equal)
        for ours, theirs in (
            (sk.superpose(weight, bank, alphas), superpose_product(weight, as_float, alphas)),
            (sk.superpose(weight, bank, None, counts), superpose_product(weight, as_float, equal)),
            (both["superpose"](), rivals["float product"]()),
        ):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-1)
    if not on_cpu():
        forward = {
            "superpose": lambda: sk.superpose(weight, bank, alphas),
            "published (SupSup)": lambda: superpose_published(weight, as_float, alphas),
            "float product": lambda: superpose_product(weight, as_float, alphas),
        }
        times = measure(forward) | floor(sum(block.numel() for block in bank) + 8 * weight.numel())
        targets = TARGETS | {"float product": 20, "floor: the bytes at copy speed": 1 / 1.6}
        report("superpose", f"shape={SHAPE} K={tasks} float32", times, "superpose", targets)
    floors = {"floor: read the bits twice": lambda: (flat.amax(), flat.amax())}
    together = measure({**both, **rivals, **floors}, rounds=3, slow=1)
    targets = targets_on(thread_count, {"published (SupSup)": 100}, TARGETS)
    print("\n" + table(f"superpose and its gradient, {SHAPE} float32, {tasks} masks", together, "superpose", targets))
    record("superpose", f"forward and backward, shape={SHAPE} K={tasks} float32", together, targets=targets)
    cached = measure(
        {
            "superpose, counts": lambda: sk.superpose(weight, bank, None, counts),
            "ours at K=25": lambda: sk.superpose(weight, few, None, few_counts),
            **equal_rivals,
            "floor: same bytes (mul)": lambda: torch.mul(weight, counts, out=out),
        },
        slow=1,
    )
    targets = targets_on(thread_count, {"published (SupSup)": 1000, "ours at K=25": 1 / 1.2})
    print(table(f"superpose with equal alphas from counts, {SHAPE} float32, {tasks} masks", cached, "superpose, counts", targets))
    record("superpose", f"equal alphas from counts, shape={SHAPE} K={tasks} float32", cached, targets=targets)


@only_on("cuda")
def bench_superpose_resnet50(thread_count):
    """100 masks over 25 million weights: .31 GB of bits, 10 GB of floats."""
    n, tasks = 25_000_000, 100
    masks = torch.stack([torch.rand(n) < 0.5 for _ in range(tasks)])
    bank, as_float = reference.pack_bank(masks), masks.float()
    del masks
    weight, grad, alphas = torch.randn(n), torch.randn(n), torch.rand(tasks) + 0.01
    torch.testing.assert_close(
        sk.superpose(weight, bank, alphas), superpose_product(weight, as_float, alphas), rtol=1e-3, atol=1e-2
    )
    forward = {
        "superpose": lambda: sk.superpose(weight, bank, alphas),
        "published (SupSup)": lambda: superpose_published(weight, as_float, alphas),
        "float product": lambda: superpose_product(weight, as_float, alphas),
    }
    bits = sum(block.numel() for block in bank)
    case = f"n={n} K={tasks} float32"
    targets = {"published (SupSup)": 25, "float product": 20, "floor: the bytes at copy speed": 1 / 1.6}
    report("superpose", case, measure(forward) | floor(bits + 8 * n), "superpose", targets)
    backward = {
        "superpose_grad": lambda: OPS.superpose_grad(grad, weight, bank),
        "float product": lambda: superpose_grad_product(grad, weight, as_float),
    }
    report("superpose_grad", case, measure(backward) | floor(bits + 8 * n), "superpose_grad", {"float product": 8})


@pytest.mark.parametrize("rows", [4, 16])
def bench_superpose_rows(rows, thread_count):
    """Several alphas at once: the bits are read once for eight of them."""
    tasks = 250
    masks = torch.rand(tasks, *SHAPE) < 0.5
    bank, as_float = reference.pack_bank(masks), masks.float().flatten(1)
    weight, alphas = torch.randn(SHAPE), torch.rand(rows, tasks)
    product = lambda: weight * (alphas @ as_float).view(rows, *SHAPE)  # noqa: E731
    torch.testing.assert_close(sk.superpose(weight, bank, alphas), product(), rtol=1e-4, atol=1e-2)
    times = measure(
        {
            "superpose": lambda: sk.superpose(weight, bank, alphas),
            "ours, a call a row": lambda: [sk.superpose(weight, bank, row) for row in alphas],
            "float product": product,
        },
        rounds=3,
    )
    print("\n" + table(f"superpose, {SHAPE} float32, {tasks} masks, {rows} rows of alphas", times, "superpose"))
    record("superpose", f"shape={SHAPE} K={tasks} R={rows} float32", times)


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
