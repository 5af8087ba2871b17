"""The Triton kernels of max_pool_relu and its gradient against the reference, bit for bit."""

import math

import pytest
import torch
from interpreter import DEVICE, apart, note_launches, only_where_kernels_run, poison, thinned

from subnet_kernels import reference

only_where_kernels_run()

from subnet_kernels.triton import pool as kernels  # noqa: E402

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
SPECIAL = torch.tensor([math.nan, -math.nan, math.inf, -math.inf, -0.0, 0.0, 1e-7, -1e-7])
# channels of 16 and more, odd ones, several pieces of a line, pictures that windows do not divide or are wider than
SHAPES = [(2, 7, 9, 8), (1, 3, 20, 130), (1, 1, 1, 2), (2, 5, 6, 64), (1, 2, 40, 32)]
CASES = [(dtype, window, split) for dtype in FLOATS for window in (1, 2, 3, 15) for split in (False, True)]


@pytest.fixture(autouse=True)
def launched(monkeypatch):
    poison(monkeypatch)
    return note_launches(monkeypatch)


def pictures(*shape, dtype=torch.float32):
    """Numbers with many ties, both zeros, both infinities and NaN of both signs."""
    x = torch.randn(shape, device=DEVICE).mul(2).round()
    found = SPECIAL.to(DEVICE)[torch.randint(0, len(SPECIAL), shape, device=DEVICE)]
    return torch.where(torch.rand(shape, device=DEVICE) < 0.05, found, x).to(dtype)


def compare(x, window, split):
    for got, want in zip(kernels.max_pool_relu(x, window, split), reference.max_pool_relu(x, window, split), strict=True):
        assert got.dtype == want.dtype
        assert got.is_contiguous()
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
    grad = torch.randn(got.shape, device=DEVICE).to(x.dtype)
    how = got, window, split, *x.shape[1:3]
    assert torch.equal(kernels.max_pool_relu_grad(grad, *how), reference.max_pool_relu_grad(grad, *how))


@pytest.mark.parametrize(("dtype", "window", "split"), thinned(CASES, 3), ids=str)
def test_shapes(dtype, window, split, launched):
    for shape in SHAPES:
        launched.clear()
        compare(pictures(*shape, dtype=dtype), window, split)
        assert len(launched) == 2


def test_of_double_and_of_nothing(launched):
    compare(pictures(2, 5, 5, 6, dtype=torch.float64), 2, True)
    assert launched == ["pool-pool_grad-i64-1024"]  # which moves numbers; maxima are the reference's
    launched.clear()
    y, places = kernels.max_pool_relu(pictures(0, 5, 5, 6), 2, True)
    assert y.shape == places.shape == (0, 3, 3, 3)
    assert kernels.max_pool_relu_grad(y, places, 2, True, 5, 5).shape == (0, 5, 5, 6)
    assert not launched


def test_strides():
    x = pictures(2, 5, 7, 6)
    want, places = reference.max_pool_relu(x, 2, True)
    grad = torch.randn(want.shape, device=DEVICE)
    for held, slope, at in zip(apart(x), apart(grad), apart(places)):
        torch.testing.assert_close(kernels.max_pool_relu(held, 2, True)[0], want, rtol=0, atol=0, equal_nan=True)
        back = kernels.max_pool_relu_grad(slope, at, 2, True, 5, 7)
        assert torch.equal(back, reference.max_pool_relu_grad(grad, places, 2, True, 5, 7))


def test_sizes_past_32_bits_are_the_references(launched, monkeypatch):
    monkeypatch.setattr(kernels, "_fit", lambda line, programs: False)
    compare(pictures(2, 5, 7, 6), 2, True)
    assert not launched
    monkeypatch.undo()
    assert kernels._fit(2**31 - 1025, 2**31 - 1)
    assert not kernels._fit(2**31 - 1024, 1)
    assert not kernels._fit(1, 2**31)


def test_refuses():
    x = torch.randn(2, 4, 4, 6, device=DEVICE)
    y, places = kernels.max_pool_relu(x, 2, False)
    for call, sentence in (
        (lambda: kernels.max_pool_relu(x[0], 2, False), "x must be \\(N, H, W, C\\), got 3 dimensions"),
        (lambda: kernels.max_pool_relu(x, 0, False), "window must be from 1 to 15, got 0"),
        (lambda: kernels.max_pool_relu(x, 16, False), "window must be from 1 to 15, got 16"),
        (lambda: kernels.max_pool_relu(x[..., :5], 2, True), "channels must be even to be split, got 5"),
        (lambda: kernels.max_pool_relu(x[:, :0], 2, False), "must be positive, got 0, 4 and 6"),
        (lambda: kernels.max_pool_relu(x.int(), 2, False), "x must be float64, float32, float16 or bfloat16"),
        (lambda: kernels.max_pool_relu_grad(y.int(), places, 2, False, 4, 4), "grad must be float64"),
        (lambda: kernels.max_pool_relu_grad(y, places[:1], 2, False, 4, 4), "places must be uint8 of the shape of grad"),
        (lambda: kernels.max_pool_relu_grad(y, places.int(), 2, False, 4, 4), "places must be uint8 of the shape of grad"),
        (lambda: kernels.max_pool_relu_grad(y, places, 2, False, 5, 4), "grad must be of 3 x 2 windows, got 2 x 2"),
        (lambda: kernels.max_pool_relu_grad(y[:1], places[:1], 2, True, 4, 4), "with N even where it was split"),
    ):
        with pytest.raises(RuntimeError, match=sentence):
            call()
