"""Thresholds against the float mask of the published code, against eager PyTorch that packs, and against reading the scores once.

One read of the scores and an eighth of a byte written for each: the floor is a read.
"""

import pytest
import torch
from baselines import resnet18, threshold_float, threshold_pack
from measure import compiled, floor, measure, report, sizes

import subnet_kernels as sk
from subnet_kernels import reference


@pytest.mark.parametrize(
    ("n", "dtype"),
    [*sizes([(78_400, torch.float32)], []), (24_000_000, torch.float32), (24_000_000, torch.bfloat16)],
    ids=str,
)
def bench_threshold(n, dtype, thread_count):
    if n < 100_000 and thread_count > 1:
        pytest.skip("a small layer stays on one thread")
    scores = torch.randn(n).to(dtype)
    scores[::1000] = -0.0  # open, as 0 is
    expected = reference.pack(scores >= 0)
    assert torch.equal(sk.threshold(scores, 0), expected)
    assert torch.equal(threshold_pack(scores), expected[: n // 8])
    assert torch.equal(threshold_float(scores).bool(), scores >= 0)
    keys = scores.view(torch.int16 if dtype == torch.bfloat16 else torch.int32)
    rivals = {"float mask (SupSup)": lambda: threshold_float(scores), "bool, packed": lambda: threshold_pack(scores)}
    fast, notes = compiled(threshold_pack, scores) if thread_count <= 1 else ({}, {})
    times = measure({"threshold": lambda: sk.threshold(scores, 0), **rivals, **fast, "floor: read once": keys.amax})
    times |= floor(n * (scores.element_size() + 1 / 8))
    report("threshold", f"n={n} {str(dtype).removeprefix('torch.')}", times, "threshold", {}, **notes)


def bench_threshold_layers(thread_count):
    """The convolutions of a ResNet-18 in one call, beside a Python loop over them."""
    scores = [torch.randn(shape) for shape in resnet18()]
    for bits, s in zip(sk.threshold(scores, 0), scores):
        assert torch.equal(bits, reference.pack(s >= 0))
    times = measure(
        {
            "threshold": lambda: sk.threshold(scores, 0),
            "float mask (SupSup), a layer at a time": lambda: [threshold_float(s) for s in scores],
            "bool, packed, a layer at a time": lambda: [threshold_pack(s) for s in scores],
            "ours, a layer at a time": lambda: [sk.threshold(s, 0) for s in scores],
            "floor: read once": lambda: [s.view(torch.int32).amax() for s in scores],
        }
    )
    total = sum(s.numel() for s in scores)
    times |= floor(total * 4.125)
    report("threshold", f"{len(scores)} layers of a ResNet-18, n={total} float32", times, "threshold", {})
