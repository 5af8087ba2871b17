"""The masked linear layer beside the dense one: forward through given bits, and a training step of the layer alone.

Expected on one thread before any measurement: rows of weights against rows of inputs at 85 % of the processor's multiply-adds, and
masking a row once at the price of a copy; so within 1.15 of a dense product that waits for memory (one row), and as fast as MKL from
32 rows on. Where PyTorch's dense product already reaches 90 % of the peak, .75 of its time is beyond the hardware.

On a GPU, 4096 x 4096 bfloat16: forward within 1.15 dense products up to 16 rows and 1.25 at 256, and 2.5 times W * mask up to 16 rows;
a training step of the layer, 2,048 rows and more, within 1.05 dense ones.
"""

import pytest
import torch
import torch.nn.functional as F
from baselines import StraightThroughMask, masked_linear_multiply
from measure import compiled, floor, measure, only_on, record, report, table, targets_on
from torch import nn

import subnet_kernels as sk
from subnet_kernels import reference

SIZE, DENSITY = 1024, 0.3
# Our time over the dense product's, by rows
FORWARD_TARGETS = {
    1: {"dense F.linear": 1.15},
    32: {"dense F.linear": 1.0, "dense oneDNN": 1.3},
    256: {"dense F.linear": 0.75, "dense oneDNN": 1.15},
}
HALF_TARGETS = {1: 1.15, 16: 1.15, 256: 1.25}  # on a GPU
STEP_TARGETS = {32: 1.1, 256: 1.05}  # of the dense layer's own forward and backward


def onednn(x, weight):
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


@only_on("cpu")
@pytest.mark.parametrize("rows", [1, 10, 32, 256])
def bench_masked_linear(rows, thread_count):
    x, weight, mask = torch.randn(rows, SIZE), torch.randn(SIZE, SIZE), torch.rand(SIZE, SIZE) < DENSITY
    bits, as_float = sk.pack(mask), mask.float()
    effective = sk.apply(weight, bits)
    exact = x.double() @ effective.double().t()
    own = (F.linear(x, effective) - exact).abs().max()
    for y in (sk.masked_linear(x, weight, bits), sk.masked_linear(x, effective, sk.pack(torch.ones_like(mask)))):
        assert (y - exact).abs().max() <= 2 * own
    fast = torch.compile(masked_linear_multiply)
    torch.testing.assert_close(fast(x, weight, as_float), exact.float(), rtol=1e-4, atol=1e-3)
    product = torch.ops.subnet_kernels.masked_linear.default
    times = measure(
        {
            "masked_linear": lambda: sk.masked_linear(x, weight, bits),
            "ours, W_eff given": lambda: product(x, effective, None),
            "dense F.linear": lambda: F.linear(x, weight),
            "dense oneDNN": lambda: onednn(x, weight),
            "W * mask, F.linear": lambda: masked_linear_multiply(x, weight, as_float),
            "torch.compile of it": lambda: fast(x, weight, as_float),
        },
        rounds=6,
    )
    targets = targets_on(thread_count, {name: 1 / most for name, most in FORWARD_TARGETS.get(rows, {}).items()})
    print("\n" + table(f"masked_linear, {SIZE} x {SIZE} float32, {rows} rows", times, "masked_linear", targets))
    work = rows * SIZE * SIZE / 1e3
    rates = {name: f"{work / times[name].min:.1f}" for name in ("ours, W_eff given", "dense F.linear", "dense oneDNN")}
    print(f"  G multiply-adds a second: {rates}")
    record("masked_linear", f"{SIZE}x{SIZE} B={rows} float32 density={DENSITY}", times, targets=targets)


@only_on("cuda")
@pytest.mark.parametrize("rows", [1, 16, 256, 2048])
def bench_masked_linear_half(rows, thread_count):
    size = 4096
    x, weight = torch.randn(rows, size).bfloat16(), torch.randn(size, size).bfloat16()
    mask = torch.rand(size, size) < DENSITY
    bits, as_half = sk.pack(mask), mask.bfloat16()
    effective = sk.apply(weight, bits)
    exact = x.double() @ effective.double().t()
    own = (F.linear(x, effective) - exact).abs().max()
    assert (sk.masked_linear(x, weight, bits) - exact).abs().max() <= 2 * own
    calls = {
        "masked_linear": lambda: sk.masked_linear(x, weight, bits),
        "dense F.linear": lambda: F.linear(x, weight),
        "W * mask, F.linear": lambda: masked_linear_multiply(x, weight, as_half),
    }
    fast, notes = compiled(masked_linear_multiply, x, weight, as_half) if rows in (1, 256) else ({}, {})
    times = measure(calls | fast) | floor(size * size * 2.125 + 4 * rows * size)
    targets = {"dense F.linear": 1 / HALF_TARGETS[rows], "torch.compile": 1.3} if rows in HALF_TARGETS else {}
    targets |= {"W * mask, F.linear": 2.5} if rows <= 16 else {}
    report("masked_linear", f"{size}x{size} B={rows} bfloat16 density={DENSITY}", times, "masked_linear", targets, **notes)


@only_on("cuda")
@pytest.mark.parametrize("rows", [2048, 8192])
def bench_layer_step_half(rows, thread_count):
    """Forward and backward of a bfloat16 layer; and its whole step in float32 under autocast, with selection, freezing and Adam."""
    size = 4096
    x, grad = torch.randn(rows, size).bfloat16().requires_grad_(), torch.randn(rows, size).bfloat16()

    def masked(dtype):
        layer = sk.convert(nn.Linear(size, size, bias=False, dtype=dtype), sk.SubnetConfig(density=DENSITY, train_weights=True))
        frozen = torch.rand(size, size) < 0.3
        layer.frozen, layer.frozen_values = sk.pack(frozen), layer.weight.detach()[frozen]
        return layer, frozen

    def pass_of(module, *parameters):
        def forward_and_backward():
            for t in (x, *parameters):
                t.grad = None
            module(x).backward(grad)

        return forward_and_backward

    layer, frozen = masked(torch.bfloat16)
    dense = nn.Linear(size, size, bias=False, dtype=torch.bfloat16)
    mask = reference.unpack(layer.bits, layer.weight.shape)
    live, weight = (mask & ~frozen).bfloat16(), layer.weight.detach().clone()
    as_half, signs = mask.bfloat16(), layer.scores.detach().sign()

    def by_hand():
        effective = (weight * as_half).requires_grad_()
        x.grad = None
        F.linear(x, effective).backward(grad)
        return effective.grad * live, effective.grad * weight * signs

    ours = pass_of(layer, layer.weight, layer.scores)
    ours()
    for mine, theirs in zip((layer.weight.grad, layer.scores.grad), by_hand()):
        torch.testing.assert_close(mine, theirs, rtol=2e-2, atol=1e-1)
    times = measure({"layer": ours, "dense layer": pass_of(dense, dense.weight), "eager, by hand": by_hand})
    targets = {"dense layer": 1 / 1.05, "eager, by hand": 1.3}
    report("layer", f"forward+backward {size}x{size} B={rows} bfloat16 density={DENSITY}", times, "layer", targets)

    def step_of(module, optimizer):
        def step():
            x.grad = None
            optimizer.zero_grad()
            with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
                y = module(x)
            y.backward(grad)
            optimizer.step()

        return step

    layer, _ = masked(torch.float32)
    dense = nn.Linear(size, size, bias=False)
    standing = nn.Parameter(torch.randn(size, size))  # for the scores: equal optimizer work
    standing.grad = torch.randn(size, size) * 0.01
    adam = torch.optim.Adam([dense.weight, standing], 1e-3, fused=True, capturable=True)
    adam.zero_grad = lambda: setattr(dense.weight, "grad", None)
    ours = sk.optim.Adam(layer.parameters(), 1e-3, fuse_ste=True)
    times = measure({"layer": step_of(layer, ours), "dense layer": step_of(dense, adam)})
    targets = {"dense layer": 1 / 1.05}
    report("layer", f"step with Adam, autocast bfloat16 {size}x{size} B={rows} density={DENSITY}", times, "layer", targets)


@only_on("cpu")
@pytest.mark.parametrize("rows", [10, 32, 256])
def bench_layer_step(rows, thread_count):
    """Forward and backward with gradients of x, W and the scores, 30 % of the weights frozen."""
    dense = nn.Linear(SIZE, SIZE, bias=False)
    layer = sk.convert(nn.Linear(SIZE, SIZE, bias=False), sk.SubnetConfig(density=DENSITY, train_weights=True))
    with torch.no_grad():
        layer.weight.copy_(dense.weight)
    sk.refresh(layer)
    frozen = torch.rand(SIZE, SIZE) < 0.3
    layer.frozen, layer.frozen_values = sk.pack(frozen), layer.weight.detach()[frozen]
    x, grad = torch.randn(rows, SIZE).requires_grad_(), torch.randn(rows, SIZE)
    weight, scores = nn.Parameter(layer.weight.detach().clone()), nn.Parameter(layer.scores.detach().clone())
    mask = reference.unpack(layer.bits, scores.shape).float()

    def clear(*tensors):
        for t in tensors:
            t.grad = None

    def ours():
        clear(x, layer.weight, layer.scores)
        layer(x).backward(grad)

    def plain():
        clear(x, dense.weight)
        dense(x).backward(grad)

    def published():
        clear(x, weight, scores)
        F.linear(x, weight * StraightThroughMask.apply(scores.abs(), lambda key: mask.detach())).backward(grad)
        weight.grad[frozen] = 0

    def eager():
        clear(x, weight, scores)
        effective = (weight.detach() * mask).requires_grad_()
        F.linear(x, effective).backward(grad)
        weight.grad, scores.grad = effective.grad * live, effective.grad * weight.detach() * scores.detach().sign()

    live = mask * ~frozen
    ours()
    d_x, d_weight, d_scores = x.grad.clone(), layer.weight.grad.clone(), layer.scores.grad.clone()
    for rival in (published, eager):
        rival()
        for mine, theirs in ((d_x, x.grad), (d_weight, weight.grad), (d_scores, scores.grad)):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-3)
    times = measure({"layer": ours, "dense layer": plain, "published (WSN)": published, "eager, by hand": eager}, rounds=6)
    targets = targets_on(thread_count, {"dense layer": 1 / STEP_TARGETS[rows]} if rows in STEP_TARGETS else {})
    report("layer", f"forward+backward {SIZE}x{SIZE} B={rows} float32 density={DENSITY}", times, "layer", targets)

    # With `fuse_ste` the layer leaves the one gradient of W_eff, and the optimizer's pass makes of it what the step above makes.
    standing = nn.Parameter(scores.detach().clone())  # for the scores: equal optimizer work
    standing.grad = scores.grad.clone() * 0.01
    adam, fused = (
        torch.optim.Adam([dense.weight, standing], 1e-3, fused=True),
        sk.optim.Adam(layer.parameters(), 1e-3, fuse_ste=True),
    )

    def whole(pass_, optimizer):
        def step():
            pass_()
            optimizer.step()

        return step

    held = layer.weight.detach()[frozen]
    times = measure({"layer": whole(ours, fused), "dense layer": whole(plain, adam)}, rounds=6)
    assert torch.equal(layer.weight.detach()[frozen], held)
    report("layer", f"step with Adam {SIZE}x{SIZE} B={rows} float32 density={DENSITY}", times, "layer", {})
    times = measure({"layer": ours, "dense layer": plain}, rounds=6)
    report("layer", f"forward+backward under fuse_ste {SIZE}x{SIZE} B={rows} float32 density={DENSITY}", times, "layer", {})


@only_on("cpu")
@pytest.mark.parametrize("rows", [32, 256])
def bench_layer_autocast(rows, thread_count):
    """The forward of a layer under bfloat16 autocast, which goes to oneDNN, beside the dense layer there and both in float32."""
    layer = sk.convert(nn.Linear(SIZE, SIZE, bias=False), sk.SubnetConfig(density=DENSITY))
    dense, x = nn.Linear(SIZE, SIZE, bias=False), torch.randn(rows, SIZE)

    def half(module):
        with torch.autocast("cpu", torch.bfloat16):
            return module(x)

    exact = x.double() @ layer.w_eff.double().t()
    own = (F.linear(x.bfloat16(), layer.w_eff.bfloat16()) - exact).abs().max()
    assert (half(layer) - exact).abs().max() <= 2 * own
    with torch.no_grad():
        times = measure(
            {
                "layer, autocast": lambda: half(layer),
                "dense layer, autocast": lambda: half(dense),
                "layer, float32": lambda: layer(x),
                "dense layer, float32": lambda: dense(x),
            },
            rounds=6,
        )
    print("\n" + table(f"bfloat16 autocast forward of a layer, {SIZE} x {SIZE}, {rows} rows", times, "layer, autocast"))
    record("layer", f"forward autocast bfloat16 {SIZE}x{SIZE} B={rows}", times)
