"""max_pool_relu: answers worked by hand, then every CPU instruction set against PyTorch's own pooling and the reference, bit for bit."""

import pytest
import torch
import torch.nn.functional as F
from device import compiled_only

import subnet_kernels as sk
from subnet_kernels import reference

inf, nan = float("inf"), float("nan")
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
op, grad_op = torch.ops.subnet_kernels.max_pool_relu, torch.ops.subnet_kernels.max_pool_relu_grad


@pytest.fixture(autouse=True)
def _one_thread():
    """Parallel regions are slow where neighbours hold the cores; the test of threads asks for more."""
    torch.set_num_threads(1)


def plain(x, window, split=False):
    """What one writes in PyTorch."""
    y = F.max_pool2d(x, window, ceil_mode=True).relu()
    return torch.cat(y.chunk(2, 1)) if split else y


def pictures(*shape, dtype=torch.float32):
    """Numbers with many ties, both zeros, both infinities and NaN of both signs."""
    x = torch.randn(shape).mul(2).round()
    specials = torch.tensor([nan, -nan, inf, -inf, -0.0, 0.0, 1e-7, -1e-7])
    where = torch.rand(shape) < 0.05
    return torch.where(where, specials[torch.randint(0, len(specials), shape)], x).to(dtype)


# one channel, window 2: a picture, its maxima past ReLU, and where they were
TABLE = [
    ([[1, 2], [4, 3]], [[4]], [[2]]),
    ([[-1, -2], [-4, -3]], [[0]], [[255]]),
    ([[0.0, -0.0], [-1, -inf]], [[0]], [[255]]),
    ([[5, 5], [5, 5]], [[5]], [[0]]),  # of equals the first
    ([[1, 7, 3], [2, 7, 9], [-1, 8, 6]], [[7, 9], [8, 6]], [[1, 2], [1, 0]]),  # a border cuts windows
    ([[inf, 1], [2, -inf]], [[inf]], [[0]]),
    ([[nan, 9], [1, 2]], [[nan]], [[0]]),
    ([[9, -nan], [inf, nan]], [[nan]], [[3]]),  # of NaN the last
]


def check_table(function, dtype):
    for picture, maxima, places in TABLE:
        y, at = function(torch.tensor(picture, dtype=dtype)[None, :, :, None], 2, False)
        torch.testing.assert_close(y[0, :, :, 0], torch.tensor(maxima, dtype=dtype), rtol=0, atol=0, equal_nan=True)
        assert at[0, :, :, 0].tolist() == places, picture


@pytest.mark.parametrize("dtype", DTYPES)
def test_reference_gives_the_answers_worked_by_hand(dtype):
    check_table(reference.max_pool_relu, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_kernel_gives_the_answers_worked_by_hand(cpu_isa, dtype):
    check_table(op, dtype)


def test_split_puts_the_second_half_of_the_channels_behind():
    x = torch.arange(1.0, 13).view(1, 6, 1, 2)
    y = sk.max_pool_relu(x, 1, split=True)
    assert torch.equal(y, torch.cat([x[:, :3], x[:, 3:]]))
    assert torch.equal(sk.max_pool_relu(x, 2, split=True).flatten(), torch.arange(2.0, 13, 2))


SHAPES = [(3, 8, 7, 9), (2, 130, 16, 16), (1, 2, 1, 1), (2, 1030, 6, 5), (5, 64, 4, 4), (0, 4, 3, 3), (2, 24, 3, 40)]


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("window", [1, 2, 3, 5, 15])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_pytorch_and_the_reference(cpu_isa, shape, window, split):
    """Values, places and gradients, where windows divide the picture, are cut by its border, or are wider than it."""
    for dtype in DTYPES:
        x = pictures(*shape, dtype=dtype).to(memory_format=torch.channels_last)
        ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
        y, expected = sk.max_pool_relu(ours, window, split), plain(theirs, window, split)
        torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)
        assert y.is_contiguous(memory_format=torch.channels_last)
        grad = torch.randn(y.shape, dtype=dtype)
        y.backward(grad), expected.backward(grad)
        assert torch.equal(ours.grad, theirs.grad)

        nhwc, grad = x.permute(0, 2, 3, 1), grad.permute(0, 2, 3, 1)
        for got, answer in zip(op(nhwc, window, split), reference.max_pool_relu(nhwc, window, split), strict=True):
            torch.testing.assert_close(got, answer, rtol=0, atol=0, equal_nan=True)
        places = op(nhwc, window, split)[1]
        size = (window, split, *nhwc.shape[1:3])
        assert torch.equal(grad_op(grad, places, *size), reference.max_pool_relu_grad(grad, places, *size))


def test_any_strides(cpu_isa):
    """A layout that is not channels last, a part of a larger tensor, memory that begins off any alignment; for the gradient too."""
    wide = torch.randn(4, 12, 9, 11)
    shifted = torch.randn(2 * 6 * 8 * 8 + 1)[1:].view(2, 8, 8, 6).permute(0, 3, 1, 2)
    for x in (wide, wide[::2, 2:8, 1:, :9], wide.transpose(2, 3), shifted):
        ours, theirs = x.detach().requires_grad_(), x.detach().requires_grad_()
        y, expected = sk.max_pool_relu(ours, 2, split=True), plain(theirs, 2, split=True)
        assert torch.equal(y, expected)
        grad = torch.randn(y.shape).transpose(2, 3).contiguous().transpose(2, 3)
        y.backward(grad), expected.backward(grad)
        assert torch.equal(ours.grad, theirs.grad)


@compiled_only
def test_thread_counts(cpu_isa):
    x = pictures(9, 64, 40, 40, dtype=torch.bfloat16).permute(0, 2, 3, 1).contiguous()
    y, places = op(x, 3, True)
    grad = torch.randn(y.shape).bfloat16()
    back = grad_op(grad, places, 3, True, 40, 40)
    for count in (2, 3):
        torch.set_num_threads(count)
        again, at = op(x, 3, True)
        assert torch.equal(again.view(torch.int16), y.view(torch.int16))
        assert torch.equal(at, places)
        assert torch.equal(grad_op(grad, places, 3, True, 40, 40), back)


@pytest.mark.parametrize("split", [False, True])
def test_gradients_of_gradients(split):
    """It is piecewise linear: gradcheck away from ties, and the second derivative of a square of it as PyTorch has it."""
    x = torch.randperm(2 * 4 * 5 * 7).view(2, 4, 5, 7).double().sub(100).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: sk.max_pool_relu(x, 2, split), x)
    assert torch.autograd.gradgradcheck(lambda x: sk.max_pool_relu(x, 2, split), x)

    def curvature(function):
        (slope,) = torch.autograd.grad(function(x, 2, split).pow(3).sum(), x, create_graph=True)
        return torch.autograd.grad(slope.pow(2).sum(), x)[0]

    assert torch.equal(curvature(sk.max_pool_relu), curvature(plain))


def test_under_vmap_and_func():
    x = torch.randn(3, 2, 4, 5, 6)
    assert torch.equal(torch.vmap(lambda x: sk.max_pool_relu(x, 2, True))(x), torch.stack([plain(one, 2, True) for one in x]))
    loss = lambda f: lambda x: f(x, 2, True).pow(2).sum()  # noqa: E731
    slopes = torch.vmap(torch.func.grad(loss(sk.max_pool_relu)))(x)
    assert torch.equal(slopes, torch.stack([torch.func.grad(loss(plain))(one) for one in x]))


def test_what_is_kept_for_backward_is_a_byte_an_output():
    x = torch.randn(4, 8, 16, 16, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = sk.max_pool_relu(x, 2)
    assert [(t.dtype, t.numel()) for t in kept] == [(torch.uint8, y.numel())]


@compiled_only
def test_the_op_refuses_what_does_not_fit():
    x = torch.randn(2, 4, 4, 6)
    y, places = op(x, 2, False)
    for bad, message in (
        (lambda: op(x[0], 2, False), "x must be \\(N, H, W, C\\), got 3 dimensions"),
        (lambda: op(x, 0, False), "window must be from 1 to 15, got 0"),
        (lambda: op(x, 16, False), "window must be from 1 to 15, got 16"),
        (lambda: op(x[..., :5], 2, True), "channels must be even to be split, got 5"),
        (lambda: op(x[:, :0], 2, False), "must be positive, got 0, 4 and 6"),
        (lambda: op(x.int(), 2, False), "x must be float64, float32, float16 or bfloat16"),
        (lambda: grad_op(y, places[:1], 2, False, 4, 4), "places must be uint8 of the shape of grad"),
        (lambda: grad_op(y, places.int(), 2, False, 4, 4), "places must be uint8 of the shape of grad"),
        (lambda: grad_op(y, places, 2, False, 5, 4), "grad must be of 3 x 2 windows, got 2 x 2"),
        (lambda: grad_op(y[:1], places[:1], 2, True, 4, 4), "with N even where it was split"),
    ):
        with pytest.raises(RuntimeError, match=message):
            bad()
