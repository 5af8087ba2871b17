"""Bits against float and bool masks in eager PyTorch and against numpy.packbits.

Expected on one thread before any measurement: pack within 1.5 times a read of the bool mask, OR at least 10 times the
bool expression and popcount at least 40 times the sum of a float mask, once the masks are larger than a call costs. On a GPU: 30 times
WSN's union of float masks from 100 million weights on, and within 1.2 times the bytes at copy speed above 64 MB.
"""

import numpy as np
import pytest
import torch
from baselines import count_lookup, pack_float, union_multiply
from measure import compiled, floor, measure, on_cpu, record, sizes, table, targets_on

import subnet_kernels as sk
from subnet_kernels import reference

DENSITY = 0.3
TARGETS = {"pack": {"eager float": 5}, "union_": {"bool": 8}, "count": {"float sum": 30}}  # of 24 million weights on the CPU


@pytest.mark.parametrize("n", sizes([78_400, 2_359_296, 24_000_000], [100_000_000, 1_000_000_000]))
def bench_bits(n, thread_count):
    mask, other = torch.rand(n) < DENSITY, torch.rand(n) < DENSITY
    bits, owned = reference.pack(mask), reference.pack(other)
    union, kept = owned.clone(), sk.unpack(bits, (n,))
    assert torch.equal(sk.pack(mask), bits)
    assert torch.equal(kept, mask)
    assert sk.stats(bits, owned).tolist() == [int(mask.sum()), int((mask & ~other).sum()), int((mask & other).sum())]
    assert torch.equal(sk.union_(union, bits), reference.pack(mask | other))
    as_float, other_float = mask.float(), other.float()
    words, ones = mask.view(torch.int64), torch.tensor([int(i).bit_count() for i in range(256)])
    assert torch.equal(pack_float(as_float), bits[: n // 8])
    if on_cpu():
        as_numpy, as_long, other_long = mask.numpy(), mask.long(), other.long()
        numpy = {"numpy.packbits": lambda: np.packbits(as_numpy, bitorder="little")}
        published = {"whole numbers (WSN)": lambda: union_multiply(other_long, as_long)}
    else:
        numpy, published = {}, {"float (WSN)": lambda: union_multiply(other_float, as_float)}
    groups = {
        "pack": {
            "pack": lambda: sk.pack(mask),
            **numpy,
            "eager float": lambda: pack_float(as_float),
            "floor: read once": words.amax,
        },
        "unpack": {"unpack": lambda: sk.unpack(bits, (n,)), "floor: write once": lambda: kept.fill_(True)},
        "union_": {
            "union_": lambda: sk.union_(union, bits),
            **published,
            "bool": lambda: other | mask,
            "floor: same bytes (out=)": lambda: torch.bitwise_or(union, bits, out=union),
        },
        "count": {
            "count": lambda: sk.count(bits),
            "ours, stats": lambda: sk.stats(bits, owned),
            "float sum": lambda: as_float.sum(),
            "bool sum": lambda: mask.sum(),
            "table of 256": lambda: count_lookup(bits, ones),
            "floor: read once": bits.view(torch.int64).amax,
        },
    }
    expressions = {"pack": (pack_float, as_float), "union_": (torch.logical_or, other, mask), "count": (torch.sum, as_float)}
    moved = {"pack": n * 9 / 8, "unpack": n * 9 / 8, "union_": n * 3 / 8, "count": n / 8}  # bytes
    for name, group in groups.items():
        fast, notes = {}, {}
        large = {"floor: the bytes at copy speed": 1 / 1.2} if moved[name] > 64e6 else {}
        targets = targets_on(thread_count, TARGETS.get(name, {}) if n == 24_000_000 else {}, {"float (WSN)": 30} | large)
        if thread_count == 1 and n > 100_000 and name in expressions:
            fast, notes = compiled(*expressions[name])
        times = measure({**group, **fast}, seconds=0.3, rounds=3) | floor(moved[name])
        print("\n" + table(f"{name}, {n:,} weights", times, name, targets))
        record(name, f"n={n}", times, notes, targets)


@pytest.mark.parametrize("tasks", [16, 250])
def bench_overlap(tasks, thread_count):
    n = 235_200
    masks = torch.rand(tasks, n) < DENSITY
    bank, as_float = reference.pack_bank(masks), masks.float()
    assert torch.equal(sk.overlap(bank), (as_float @ as_float.T).long())
    times = measure({"overlap": lambda: sk.overlap(bank), "float product": lambda: as_float @ as_float.T}, seconds=0.5, rounds=3)
    print("\n" + table(f"overlap of {tasks} masks over {n:,} weights", times, "overlap"))
    record("overlap", f"n={n} K={tasks}", times)
