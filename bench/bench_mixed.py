"""A batch of rows of different tasks against the loop over the rows, eager and compiled, and against kept effective weights.

Expected on one thread before any measurement, 1024 x 1024 float32, 64 rows of 64 tasks: 3 times the loop and 2 times the compiled loop;
.4 of the speed of one dense product of the batch, which is the ceiling. On a GPU, 4096 x 4096 bfloat16: 20 times the loop and
6 times products with kept weights.
"""

import shutil

import pytest
import torch
import torch.nn.functional as F
from baselines import mixed_linear_grouped, mixed_linear_kept, mixed_linear_loop, mixed_linear_where
from measure import floor, measure, on_cpu, record, sizes, table, targets_on

import subnet_kernels as sk

OPS = torch.ops.subnet_kernels


def draw(rows, tasks, size, dtype=torch.float32):
    masks = torch.rand(tasks, size, size) < 0.3
    ids = torch.randperm(rows) % tasks
    return masks, sk.pack_bank(masks), ids, torch.randn(rows, size).to(dtype), torch.randn(size, size).to(dtype)


@pytest.mark.parametrize("dtype", sizes([torch.float32, torch.bfloat16], [torch.bfloat16]), ids=str)
def bench_mixed_linear(dtype, thread_count):
    rows, tasks, size = 64, 64, 1024 if on_cpu() else 4096
    masks, bank, ids, x, weight = draw(rows, tasks, size, dtype)
    as_float, places = masks.to(dtype), ids.tolist()
    kept = torch.where(masks, weight, 0)
    compiled = torch.compile(mixed_linear_loop, dynamic=False) if on_cpu() and shutil.which("g++") else None
    expected = mixed_linear_loop(x.double(), weight.double(), masks.double(), places)
    tolerance = {"rtol": 1e-3, "atol": 1e-3} if dtype == torch.float32 else {"rtol": 3e-2, "atol": 1.0}
    torch.testing.assert_close(sk.mixed_linear(x, weight, bank, ids).double(), expected, **tolerance)
    torch.testing.assert_close(mixed_linear_kept(x, kept, places).double(), expected, **tolerance)
    rivals = {
        "loop (mul)": lambda: mixed_linear_loop(x, weight, as_float, places),
        "loop (where)": lambda: mixed_linear_where(x, weight, masks, places),
        "kept weights": lambda: mixed_linear_kept(x, kept, places),
        "dense product of the batch": lambda: F.linear(x, weight),
    }
    if compiled is not None:
        torch.testing.assert_close(compiled(x, weight, as_float, places).double(), expected, **tolerance)
        rivals["loop (mul), compiled"] = lambda: compiled(x, weight, as_float, places)
    times = measure({"mixed_linear": lambda: sk.mixed_linear(x, weight, bank, ids), **rivals}, rounds=5)
    times |= floor(size * size * (weight.element_size() + tasks / 8))
    name = str(dtype).split(".")[1]
    cpu = {"loop (mul)": 3, "loop (where)": 3, "loop (mul), compiled": 2} if dtype == torch.float32 else {}
    cuda = {"loop (mul)": 20, "kept weights": 6, "floor: the bytes at copy speed": 1 / 2.2}
    targets = targets_on(thread_count, cpu, cuda)
    print("\n" + table(f"mixed_linear, {rows} rows of {tasks} tasks, {size} x {size} {name}", times, "mixed_linear", targets))
    record("mixed_linear", f"B={rows} T={tasks} {size}x{size} {name}", times, targets=targets)


def bench_mixed_linear_gradients(thread_count):
    """dx and dW of the same batch, beside products a task: no loop over rows is faster."""
    rows, tasks, size = 64, 64, 1024
    masks, bank, ids, x, weight = draw(rows, tasks, size)
    grad, as_float = torch.randn(rows, size), masks.float()

    def grad_weight_loop():
        return sum(torch.outer(grad[b], x[b]) * as_float[t] for b, t in enumerate(ids.tolist()))

    torch.testing.assert_close(OPS.mixed_linear_grad_weight(grad, x, bank, ids), grad_weight_loop(), rtol=1e-4, atol=1e-4)
    times = measure(
        {
            "mixed_linear_grad_input": lambda: OPS.mixed_linear_grad_input(grad, weight, bank, ids),
            "mixed_linear_grad_weight": lambda: OPS.mixed_linear_grad_weight(grad, x, bank, ids),
            "dx, loop (mul)": lambda: torch.stack([g @ (weight * as_float[t]) for g, t in zip(grad, ids.tolist())]),
            "dW, loop (mul)": grad_weight_loop,
        },
        rounds=3,
    )
    print(
        "\n"
        + table(f"gradients of mixed_linear, {rows} rows of {tasks} tasks, {size} x {size}", times, "mixed_linear_grad_input")
    )
    record("mixed_linear_grad", f"B={rows} T={tasks} {size}x{size} float32", times)


@pytest.mark.parametrize("rows", [4, 16, 64, 256])
def bench_rows_of_a_task(rows, thread_count):
    """Four tasks with that many rows each: where a product of its own begins to pay."""
    tasks, size = 4, 1024
    masks, bank, ids, x, weight = draw(rows * tasks, tasks, size)
    as_float = masks.float()
    torch.testing.assert_close(
        sk.mixed_linear(x, weight, bank, ids), mixed_linear_grouped(x, weight, as_float, ids), rtol=1e-3, atol=1e-3
    )
    times = measure(
        {
            "mixed_linear": lambda: sk.mixed_linear(x, weight, bank, ids),
            "a product a task": lambda: mixed_linear_grouped(x, weight, as_float, ids),
            "dense product of the batch": lambda: F.linear(x, weight),
        },
        rounds=4,
    )
    print("\n" + table(f"mixed_linear, {tasks} tasks of {rows} rows, {size} x {size} float32", times, "mixed_linear"))
    record("mixed_linear", f"B={rows * tasks} T={tasks} {size}x{size} float32", times)
