"""What only a GPU can show: no op waits for it, each can be captured in a graph, and nothing depends on what memory held before.

Runs with ``SUBNET_TEST_DEVICE=cuda``. That results are right is what all other tests say, which run there too.
"""

import contextlib
import copy
import math

import pytest
import torch
import torch.nn.functional as F
from cases import cases
from device import DEVICE, generator
from test_dispatch import MUTATING, op_of
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

import subnet_kernels as sk
from subnet_kernels import ops, reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE != "cuda", reason="is about a CUDA device: run with SUBNET_TEST_DEVICE=cuda where there is one"),
]
every_case = pytest.mark.parametrize(("name", "make"), [pytest.param(name, make, id=label) for label, name, make in cases()])


def tensors(value) -> list[torch.Tensor]:
    return [t for t in tree_leaves(value) if isinstance(t, torch.Tensor)]


def moved(tensor: torch.Tensor, shift: int = 0) -> torch.Tensor:
    """A copy with the same strides, so many elements further in its storage."""
    storage = tensor.untyped_storage()
    new = torch.empty(storage.nbytes() + shift * tensor.element_size(), dtype=torch.uint8)
    new[shift * tensor.element_size() :].copy_(torch.empty(0, dtype=torch.uint8).set_(storage))
    offset = tensor.storage_offset() + shift
    return torch.empty(0, dtype=tensor.dtype).set_(new.untyped_storage(), offset, tensor.size(), tensor.stride())


def twin(args, shift: int = 0):
    """The arguments again, in memory of their own, strides and offsets kept."""
    return tree_map(lambda v: moved(v, shift) if isinstance(v, torch.Tensor) else v, args)


def call(name: str, args) -> list[torch.Tensor]:
    """What an op returns, or what it wrote."""
    result = op_of(name)(*args)
    if name not in MUTATING:
        return tensors(result)
    written = [a.alias_info is not None and a.alias_info.is_write for a in op_of(name)._schema.arguments]
    return tensors([value for value, is_written in zip(args, written) if is_written])


def assert_same_bytes(results, expected) -> None:
    assert len(results) == len(expected)
    for a, b in zip(results, expected):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert torch.equal(a.contiguous().reshape(-1).view(torch.uint8), b.contiguous().reshape(-1).view(torch.uint8))


def assert_near(results, expected) -> None:
    """Bits and counts equal; floats but for the order of their sums."""
    for a, b in zip(results, expected, strict=True):
        if not a.is_floating_point():
            assert torch.equal(a, b)
            continue
        roundings = 256 * torch.finfo(a.dtype).eps if a.dtype in (torch.float32, torch.float64) else 8 * torch.finfo(a.dtype).eps
        scale = b[b.isfinite()].abs().max().item() if b.isfinite().any() else 1.0
        torch.testing.assert_close(a, b, rtol=roundings, atol=roundings * max(scale, 1e-30), equal_nan=True)


def captured(function):
    """(graph, what the function returned) of one capture; one that breaks off leaves the allocator as it was."""
    graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
    torch.cuda.synchronize()
    try:
        with torch.cuda.graph(graph, pool=pool):
            result = function()
    except Exception:
        with contextlib.suppress(RuntimeError):
            torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
        raise
    return graph, result


def poison() -> None:
    """Leave the allocator's free blocks full of NaN: a float that nobody wrote, or a bit, shows."""
    blocks = [torch.full((1 << size,), 255, dtype=torch.uint8) for size in range(9, 25) for _ in range(4)]
    del blocks


@pytest.fixture
def waiting_refused():
    """A switch: from its call to the end of the test, anything that makes the host wait for the device raises."""
    before = torch.cuda.get_sync_debug_mode()

    def switch(mode="error"):
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode(mode)

    try:
        yield switch
    finally:
        torch.cuda.set_sync_debug_mode(before)


# ------------------------------------------------------------------------------------------------------------- every op


@every_case
def test_no_op_waits_for_the_device(waiting_refused, name, make):
    args = make()
    waiting_refused()
    call(name, args)


@every_case
def test_same_bits_every_time(name, make):
    args = make()
    expected = call(name, twin(args))
    for _ in range(19):
        assert_same_bytes(call(name, twin(args)), expected)


@every_case
def test_what_memory_held_does_not_matter(name, make):
    args = make()
    expected = call(name, twin(args))
    for _ in range(2):
        given = twin(args)
        poison()
        assert_same_bytes(call(name, given), expected)


@every_case
@pytest.mark.parametrize("shift", [1, 2, 3])
def test_tensors_that_begin_anywhere(name, make, shift):
    """Every tensor that many elements past an aligned address."""
    args = make()
    assert_near(call(name, twin(args, shift)), call(name, twin(args)))


@every_case
def test_on_another_stream(name, make):
    """Inputs that come late on that stream: a kernel on the default stream would read zeros."""
    args = make()
    expected, given = call(name, twin(args)), twin(args)
    for t in tensors(given):
        t.untyped_storage().fill_(0)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(20_000_000)
        for late, t in zip(tensors(given), tensors(args)):
            late.copy_(t)
        results = call(name, given)
    torch.cuda.synchronize()
    assert_same_bytes(results, expected)


@every_case
def test_graph_has_the_bits_of_eager(waiting_refused, name, make):
    """Captured once, replayed on the same inputs and on others of the same shapes: what a kernel does may not follow the values."""
    args = make()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles, and sizes workspaces, outside the capture
        for _ in range(2):
            call(name, twin(args))
    torch.cuda.current_stream().wait_stream(side)
    waiting_refused()
    call(name, twin(args))
    waiting_refused("default")
    given = twin(args)
    graph, results = captured(lambda: call(name, given))
    for inputs in (args, make()):
        if [t.shape for t in tensors(inputs)] != [t.shape for t in tensors(args)]:
            continue  # as many kept values as a mask has bits
        expected = call(name, twin(inputs))
        for static, t in zip(tensors(given), tensors(inputs)):
            static.copy_(t)
        graph.replay()
        torch.cuda.synchronize()
        assert_same_bytes(results, expected)


# ------------------------------------------------------------------------------------------------------- long lists


def many(count=300):
    """Tensors of many sizes, empty ones among them."""
    return [torch.randn((i * 37) % 1500 + (4000 if i % 50 == 7 else 0)) for i in range(count)]


def test_select_of_300_tensors():
    scores = many()
    k = [s.numel() // 3 for s in scores]
    for by, ties in (("magnitude", "last"), ("value", "all")):
        for bits, expected in zip(sk.select(scores, k, by, ties), reference.select(scores, k, by, ties), strict=True):
            assert torch.equal(bits, expected)
    for bits, expected in zip(sk.threshold(scores, 0.3), reference.threshold(scores, 0.3), strict=True):
        assert torch.equal(bits, expected)


def test_refresh_of_300_tensors():
    scores = many()
    weights, k = [torch.randn_like(s) for s in scores], [s.numel() // 3 for s in scores]
    bits = [torch.full((reference.nbytes(s.numel()),), 255, dtype=torch.uint8) for s in scores]
    w_eff = [torch.full_like(s, math.nan) for s in scores]
    hints = [torch.zeros(4, dtype=torch.float64) for _ in scores]
    for _ in range(3):
        ops.refresh_(scores, weights, k, bits, w_eff, hints)
        for b, e, w, expected in zip(bits, w_eff, weights, reference.select(scores, k)):
            assert torch.equal(b, expected)
            assert torch.equal(e, reference.apply(w, expected))
        for s in scores:
            s.add_(torch.randn_like(s), alpha=1e-3)


def test_restore_of_300_tensors():
    weights = many()
    masks = [torch.rand(w.shape) < 0.4 for w in weights]
    kept = [torch.randn_like(w) for w in weights]
    expected = [torch.where(m, v, w) for m, v, w in zip(masks, kept, weights)]
    sk.restore_(weights, [reference.pack(m) for m in masks], [v[m] for v, m in zip(kept, masks)])
    assert all(torch.equal(w, e) for w, e in zip(weights, expected))


@pytest.mark.parametrize("rule", ["SGD", "RMSprop", "Adam"])
def test_step_of_300_tensors(rule):
    """One call over all is a call for each."""
    start = [w for w in many() if w.numel()]
    grads = [torch.randn_like(w) for w in start]
    together, apart = ([nn.Parameter(w.clone()) for w in start] for _ in range(2))
    make = getattr(sk.optim, rule)
    optimizers = [make(together, lr=0.01), *(make([p], lr=0.01) for p in apart)]
    for _ in range(2):
        for params in (together, apart):
            for p, g in zip(params, grads):
                p.grad = g.clone()
        for optimizer in optimizers:
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(together, apart))
    assert not torch.equal(together[1], start[1])


# -------------------------------------------------------------------------------------------------- selection, step by step


def test_graph_of_a_warm_refresh_follows_the_scores():
    """Hints that one replay leaves serve the next, and scores that jump are still selected exactly."""
    scores = [torch.randn(200_003), torch.randn(5001), torch.randn(33)]
    weights, k = [torch.randn_like(s) for s in scores], [60_000, 1500, 7]
    bits = [torch.zeros(reference.nbytes(s.numel()), dtype=torch.uint8) for s in scores]
    w_eff, hints = [torch.zeros_like(s) for s in scores], [torch.zeros(4, dtype=torch.float64) for _ in scores]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        ops.refresh_(scores, weights, k, bits, w_eff, hints)
    torch.cuda.current_stream().wait_stream(side)
    graph, _ = captured(lambda: ops.refresh_(scores, weights, k, bits, w_eff, hints))
    for step in range(8):
        graph.replay()
        for b, e, w, expected in zip(bits, w_eff, weights, reference.select(scores, k)):
            assert torch.equal(b, expected), step
            assert torch.equal(e, reference.apply(w, expected)), step
        for s in scores:
            s.add_(torch.randn_like(s), alpha=1e-3)
            if step == 4:
                s.copy_(torch.rand_like(s) * 100)
            if step == 5:
                s.fill_(0.5)


# ------------------------------------------------------------------------------------------------------- whole steps


def network(wsn: bool) -> nn.Module:
    torch.manual_seed(7)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 64, 100), nn.ReLU(), nn.Linear(100, 10)
    )
    config = sk.SubnetConfig(density=0.3, k_rule="kth", ties="all", train_weights=True, per_task=["5"])
    model = sk.convert(model, config if wsn else sk.SubnetConfig(density=0.5, weight_init="signed_constant"))
    if wsn:
        bank = sk.MaskBank(model)
        bank.commit("first")
        bank.begin()
    return model


@pytest.mark.parametrize("fuse_ste", [True, False])
@pytest.mark.parametrize("wsn", [True, False], ids=["WSN", "SupSup"])
def test_graph_of_a_whole_step(waiting_refused, wsn, fuse_ste):
    """Selection, forward, backward, step and freezing in one graph: the same bits as eager after as many steps."""
    models = [network(wsn)]
    models.append(copy.deepcopy(models[0]))

    def optimizer_of(model):
        make = sk.optim.Adam if wsn else sk.optim.RMSprop
        return make([p for p in model.parameters() if p.requires_grad], lr=1e-3, fuse_ste=fuse_ste)

    optimizers = [optimizer_of(m) for m in models]
    chance = generator(3)
    data = [(torch.randn(20, 3, 8, 8, generator=chance), torch.randint(0, 10, (20,), generator=chance)) for _ in range(7)]
    x, y = data[0][0].clone(), data[0][1].clone()

    def step(model, optimizer, x, y):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

    def graph_step():
        step(models[0], optimizers[0], x, y)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for batch in data[:3]:
            x.copy_(batch[0])
            y.copy_(batch[1])
            graph_step()
        x.copy_(data[3][0])
        y.copy_(data[3][1])
    torch.cuda.current_stream().wait_stream(side)
    waiting_refused()
    graph_step()
    waiting_refused("default")
    graph, _ = captured(graph_step)
    for batch in data[4:]:
        x.copy_(batch[0])
        y.copy_(batch[1])
        graph.replay()
    torch.cuda.synchronize()
    step(models[1], optimizers[1], *data[0])
    waiting_refused()
    for batch in data[1:]:
        step(models[1], optimizers[1], *batch)
    waiting_refused("default")
    for (name, a), b in zip(models[0].named_parameters(), models[1].parameters()):
        assert torch.equal(a, b), name
    for a, b in zip(models[0].modules(), models[1].modules()):
        if isinstance(a, sk.SubnetLayer):
            assert torch.equal(a.bits, b.bits)
            assert torch.equal(a.w_eff, b.w_eff)
            assert torch.equal(a.bits, reference.select([a.scores], [a.k], a.rule.by, a.rule.ties)[0])


# ---------------------------------------------------------------------------------------------- more than 2^31 elements


@pytest.fixture
def room():
    """Half of a large card's memory, emptied before and after."""
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < 20 << 30:
        pytest.skip(f"needs 20 GB of GPU memory, {torch.cuda.mem_get_info()[0] / 2**30:.1f} are free")
    yield
    torch.cuda.empty_cache()


huge = pytest.mark.xdist_group("huge")  # one after another: each takes gigabytes
HUGE = 2**31 + 1543  # elements
PART = 1 << 28


@huge
def test_counts_beyond_32_bits(room):
    n = 2**32 + 512 * 3
    bits = torch.full((n // 8,), 255, dtype=torch.uint8)
    assert sk.count(bits).item() == n
    owned = bits.clone()
    owned[-64:] = 0
    assert sk.stats(bits, owned).tolist() == [n, 512, n - 512]
    sk.union_(owned, bits)
    assert owned[-64:].eq(255).all()


@huge
def test_pack_and_unpack_beyond_32_bits(room):
    mask = torch.zeros(HUGE, dtype=torch.bool)
    places = torch.tensor([0, 7, 2**31 - 1, 2**31, 2**31 + 600, HUGE - 1])
    mask[places] = True
    bits = sk.pack(mask)
    assert sk.count(bits).item() == len(places)
    assert (bits[places // 8] >> (places % 8).to(torch.uint8) & 1).all()
    assert torch.equal(sk.unpack(bits, (HUGE,)), mask)


@huge
def test_apply_beyond_32_bits(room):
    weight = torch.empty(HUGE, dtype=torch.uint8).random_(1, 255)
    bits = torch.empty(reference.nbytes(HUGE), dtype=torch.uint8).random_(0, 256)
    result = sk.apply(weight, bits)
    for begin in range(0, HUGE, PART):
        end = min(begin + PART, HUGE)
        mask = reference.unpack(bits[begin // 8 : begin // 8 + (end - begin + 511) // 512 * 64], (end - begin,))
        assert torch.equal(result[begin:end], torch.where(mask, weight[begin:end], 0)), begin


@huge
@pytest.mark.parametrize("ties", ["last", "first"])
def test_select_beyond_32_bits(room, ties):
    """Sixteen-bit scores tie at the cut by the million: exactly k, the right ones, and the ties of the right end."""
    scores = torch.empty(HUGE, dtype=torch.bfloat16).normal_(generator=generator(1))
    k = HUGE // 3
    bits = sk.select(scores, k, ties=ties)
    assert sk.count(bits).item() == k
    least, most, open_ties, closed_ties = math.inf, -math.inf, [], []
    parts = [(begin, min(begin + PART, HUGE)) for begin in range(0, HUGE, PART)]
    masks = [reference.unpack(bits[a // 8 : a // 8 + (b - a + 511) // 512 * 64], (b - a,)) for a, b in parts]
    for (a, b), mask in zip(parts, masks):
        key = scores[a:b].abs()
        least = min(least, torch.where(mask, key, math.inf).min().item())
        most = max(most, torch.where(mask, -math.inf, key).max().item())
    assert least >= most
    for (a, b), mask in zip(parts, masks):
        tied = scores[a:b].abs() == least
        for found, which in ((open_ties, mask & tied), (closed_ties, ~mask & tied)):
            places = which.nonzero()[:, 0]
            if len(places):
                found += [a + places[0].item(), a + places[-1].item()]
    if open_ties and closed_ties:
        assert min(open_ties) > max(closed_ties) if ties == "last" else max(open_ties) < min(closed_ties)


@huge
def test_max_pool_relu_beyond_32_bits(room):
    """Four maxima among more than 2^31 elements, before, at and behind the 2^31st, and their gradients."""
    x = torch.empty((1, 64, 32_769, 1024), dtype=torch.bfloat16, memory_format=torch.channels_last).fill_(-1)
    peaks = [(5, 0, 3), (63, 32_767, 1023), (0, 32_768, 0), (63, 32_768, 1023)]  # channel, row, column
    for i, at in enumerate(peaks):
        x[0][at] = i + 1
    y = sk.max_pool_relu(x.requires_grad_(), 2)
    assert [y[0, c, i // 2, j // 2].item() for c, i, j in peaks] == [1, 2, 3, 4]
    (slope,) = torch.autograd.grad(y, x, y.detach())
    assert [slope[0][at].item() for at in peaks] == [1, 2, 3, 4]
    for made in (y.detach(), slope):
        assert sum(int(part.count_nonzero()) for part in made[0].split(1024, 1)) == len(peaks)
