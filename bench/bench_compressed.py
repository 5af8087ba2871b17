"""Products with compressed weights against dense ones: PyTorch's, and our own over all weights (mixed_linear with one open mask).

Expected on one thread before any measurement, 4096 x 4096 float32, one row, against the faster dense product: 2 times at density .1
and 2.5 times at .03, where the weight does not fit the caches; nothing is promised where it does. On a GPU, in bfloat16 against
cuBLAS: 1.6 times at density .3, 2.3 at .1 and 4 at .03.
"""

import pytest
import torch
import torch.nn.functional as F
from measure import floor, measure, on_cpu, record, sizes, table, targets_on
from torch import nn

import subnet_kernels as sk

TARGETS = {0.3: 1.6, 0.1: 2.3, 0.03: 4}  # on a GPU: density -> F.linear over the faster format
CPU_TARGETS = {0.1: 2, 0.03: 2.5}  # one row, 4096 x 4096 float32: the same, and of our own dense product


@pytest.mark.parametrize(("rows", "size", "dtype"), sizes(
    [(1, 4096, torch.float32), (4, 4096, torch.float32), (16, 4096, torch.float32), (1, 4096, torch.bfloat16), (1, 1024, torch.float32)],
    [(1, 4096, torch.bfloat16), (8, 4096, torch.bfloat16)],
))  # fmt: skip
def bench_compressed_linear(rows, size, dtype, thread_count):
    weight, x = torch.randn(size, size).to(dtype), torch.randn(rows, size).to(dtype)
    everything, ids = sk.pack_bank(torch.ones(1, size, size, dtype=torch.bool)), torch.zeros(rows, dtype=torch.int64)
    calls = {
        "F.linear": lambda: F.linear(x, weight),
        "own dense": lambda: sk.mixed_linear(x, weight, everything, ids),
    }
    for density in (0.3, 0.1, 0.03):
        bits = sk.select(torch.rand(size, size), int(density * size * size))
        exact = F.linear(x.double(), sk.apply(weight, bits).double())
        for form in ("bitmap", "index"):
            small = sk.compress(weight, bits, form)
            y = sk.compressed_linear(x, small)
            torch.testing.assert_close(y.double(), exact, rtol=1e-2, atol=1e-3 if dtype == torch.float32 else 0.5)
            calls[f"{form} {density}"] = lambda small=small: sk.compressed_linear(x, small)
    times = measure(calls, rounds=6)
    name = str(dtype).split(".")[1]
    dense = min(times["F.linear"].min, times["own dense"].min)
    best = {d: min(times[f"{form} {d}"].min for form in ("bitmap", "index")) for d in (0.3, 0.1, 0.03)}
    print("\n" + table(f"compressed_linear, {rows} row(s), {size} x {size} {name}", times, "index 0.1"))
    print("  faster dense / faster format: " + ", ".join(f"{dense / t:.1f}x at {d}" for d, t in best.items()))
    for density in (0.3, 0.1, 0.03):
        chosen = sk.compress(weight, sk.select(weight, int(density * size * size))).format
        shown = {"compressed_linear": times[f"{chosen} {density}"]}
        shown |= {"F.linear": times["F.linear"], "own dense": times["own dense"]}
        shown |= {form: times[f"{form} {density}"] for form in ("bitmap", "index")}
        shown |= floor(size * size * density * (weight.element_size() + 2))
        asked = rows == 1 and size == 4096 and dtype == torch.float32 and density in CPU_TARGETS
        cpu = dict.fromkeys(("F.linear", "own dense"), CPU_TARGETS[density]) if asked else {}
        targets = targets_on(thread_count, cpu, {"F.linear": TARGETS[density]})
        case = f"B={rows} {size}x{size} {name} density={density}"
        record("compressed_linear", case, shown, targets=targets)
        if not on_cpu():
            print(table(case, shown, "compressed_linear", targets))


def bench_exported_linear(thread_count):
    """`bank.export(task, compressed=True)` beside the dense export, the smallest layer that it compresses: never slower beyond 5 %."""
    if not on_cpu():
        pytest.skip("an export is compressed on the CPU alone")
    ratios, size = {}, 4096
    for density in (0.1, 0.03):
        bank = sk.MaskBank(sk.convert(nn.Linear(size, size), sk.SubnetConfig(density=density)))
        bank.commit("task")
        small, dense = bank.export("task", compressed=True), bank.export("task")
        assert type(small) is not nn.Linear
        for rows in (1, 2, 4, 16, 64, 256):
            x = torch.randn(rows, size)
            with torch.no_grad():
                torch.testing.assert_close(small(x), dense(x), rtol=1e-3, atol=1e-4)
                times = measure({"compressed": lambda: small(x), "dense": lambda: dense(x)}, seconds=0.5, rounds=3)  # noqa: B023
            ratios[density, rows] = times["dense"].min / times["compressed"].min
            record("exported_linear", f"B={rows} {size}x{size} float32 density={density}", times)
    print(f"\ndense export / compressed export, {size} x {size} float32, {thread_count} thread(s)")
    for (density, rows), ratio in ratios.items():
        print(f"  density {density:<5} {rows:5} rows {ratio:6.2f}")
    assert min(ratios.values()) > 0.95
