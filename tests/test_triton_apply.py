"""The Triton kernels of apply, restore_ and straight_through against the reference, bit for bit."""

import math

import pytest
import torch
from interpreter import DEVICE, INTERPRETED, apart, note_launches, only_where_kernels_run, poison

from subnet_kernels import reference

only_where_kernels_run()

from subnet_kernels.triton import apply as kernels  # noqa: E402

SIZES = [0, 1, 7, 8, 9, 511, 512, 513, 2048, 2049, 9001]
MOVED = [torch.uint8, torch.bool, torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64, torch.complex64]
FLOATS = [torch.float32, torch.float16] if INTERPRETED else [torch.float32, torch.float16, torch.bfloat16]
SPECIAL = [math.nan, math.inf, -math.inf, -0.0, 0.0, 1e-40]


@pytest.fixture(autouse=True)
def launched(monkeypatch):
    poison(monkeypatch)
    return note_launches(monkeypatch)


def mask_of(*shape, density=0.4):
    return torch.rand(*shape, device=DEVICE) < density


def random(shape, dtype):
    """Values with what is special in between, from the first on."""
    t = torch.randn(shape, device=DEVICE)
    flat = t.view(-1)
    flat[::3] = torch.tensor(SPECIAL, device=DEVICE).repeat(flat.numel())[: flat[::3].numel()]
    return (t.nan_to_num() * 9).to(dtype) if not dtype.is_floating_point and not dtype.is_complex else t.to(dtype)


def same(a, b):
    """Equal to the bit, but for what NaN a NaN is."""
    equal = (a == b) & (a.signbit() == b.signbit()) | a.isnan() & b.isnan()
    return a.dtype == b.dtype and a.shape == b.shape and bool(equal.all())


@pytest.mark.parametrize("dtype", MOVED, ids=str)
def test_apply(dtype, launched):
    for n in SIZES:
        weight, mask = random(n, dtype), mask_of(n)
        out = kernels.apply(weight, reference.pack(mask))
        assert out.dtype == dtype
        assert torch.equal(out.view(torch.uint8), reference.apply(weight, reference.pack(mask)).view(torch.uint8))
    assert len(launched) == len(SIZES) - 1


def test_apply_strides():
    weight, mask = random((6, 10, 3, 5), torch.float32), mask_of(6, 10, 3, 5)
    bits = reference.pack(mask)
    want = reference.apply(weight, bits)
    for held in (*apart(weight), weight.to(memory_format=torch.channels_last)):
        for packed in apart(bits):
            out = kernels.apply(held, packed)
            assert out.is_contiguous()
            assert same(out, want)
    out = torch.zeros(weight.numel() + 1, device=DEVICE)[1:]
    kernels.apply_to(weight, bits, out)
    assert same(out.view(weight.shape), want)


def test_apply_of_wide_elements(launched):
    weight, mask = torch.randn(9, device=DEVICE, dtype=torch.complex128), mask_of(9)
    assert torch.equal(kernels.apply(weight, reference.pack(mask)), torch.where(mask, weight, 0))
    assert not launched


@pytest.mark.parametrize("dtype", MOVED, ids=str)
def test_restore(dtype, launched):
    weights, kept, want, bits = [], [], [], []
    for n in (*SIZES, 20_000):
        before, now, mask = random(n, dtype), random(n, dtype).flip(0), mask_of(n, density=0.3)
        weights.append(now)
        kept.append(before[mask])
        bits.append(reference.pack(mask))
        want.append(torch.where(mask, before, now))
    kernels.restore_(weights, bits, kept)
    for a, b in zip(weights, want):
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))
    assert launched


def test_restore_nothing_everything_and_strides(launched):
    weight, values = torch.randn(5000, device=DEVICE), torch.randn(5000, device=DEVICE)
    before = weight.clone()
    kernels.restore_([weight], [reference.pack(mask_of(5000, density=0))], [values[:0]])
    assert torch.equal(weight, before)
    assert not launched
    kernels.restore_([weight], [reference.pack(mask_of(5000, density=2))], [values])
    assert torch.equal(weight, values)
    mask = mask_of(6, 8)
    strided = torch.randn(8, 6, device=DEVICE).t()
    want = torch.where(mask, torch.ones_like(strided), strided)
    kernels.restore_([strided], [reference.pack(mask)], [torch.ones(int(mask.sum()), device=DEVICE)])
    assert torch.equal(strided, want)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("n", SIZES)
def test_straight_through(dtype, n, launched):
    grad, weight, scores = random(n, dtype), random(n, dtype).flip(0), random(n, dtype).roll(1)
    bits, frozen = reference.pack(mask_of(n)), reference.pack(mask_of(n))
    for by in ("magnitude", "value"):
        for shut in (None, frozen):
            for needed in ((True, True), (True, False), (False, True), (False, False)):
                args = (grad, weight, scores, bits, shut, by, *needed)
                for ours, theirs in zip(kernels.straight_through(*args), reference.straight_through(*args)):
                    assert same(ours, theirs)
    assert len(launched) == (12 if n else 0)


def test_straight_through_strides_and_dtypes(launched):
    grad, weight, scores, mask = *(random((6, 10), torch.float32) for _ in range(3)), mask_of(6, 10)
    bits = reference.pack(mask)
    want = reference.straight_through(grad, weight, scores, bits, bits)
    for held in zip(*(apart(t) for t in (grad, weight, scores, bits))):
        for ours, theirs in zip(kernels.straight_through(*held, held[3]), want):
            assert ours.is_contiguous()
            assert same(ours, theirs)
    assert launched
    launched.clear()
    for dtypes in (
        (torch.float32, torch.float32, torch.float64),
        (torch.float64,) * 3,
        (torch.float16, torch.float32, torch.float32),
    ):
        held = [t.to(dtype) for t, dtype in zip((grad, weight, scores), dtypes)]
        for ours, theirs in zip(kernels.straight_through(*held, bits, None), reference.straight_through(*held, bits, None)):
            assert same(ours, theirs)
    assert not launched


def test_refuses():
    weight, bits = torch.randn(9, device=DEVICE), torch.zeros(64, dtype=torch.uint8, device=DEVICE)
    for call, sentence in (
        (lambda: kernels.apply(weight, bits[:32]), "64 bytes for 9 weights, got 32"),
        (lambda: kernels.restore_([weight], [], [weight]), "restore_: expected 1 tensors of bits, got 0"),
        (lambda: kernels.restore_([weight], [bits], []), "restore_: expected 1 tensors of values, got 0"),
        (lambda: kernels.restore_([weight], [bits], [weight.double()]), "must have the dtype of its weight"),
        (lambda: kernels.straight_through(weight, weight[:3], weight, bits, None), "must have one shape, got 9, 3 and 9"),
        (lambda: kernels.straight_through(weight, weight, weight, bits, None, "rank"), "by must be"),
        (lambda: kernels.straight_through(weight, weight, weight, bits, bits[:32]), "64 bytes for 9 weights"),
    ):
        with pytest.raises(RuntimeError, match=sentence):
            call()
