"""Masked products: masked_linear, masked_conv, subnet_linear against where-masked PyTorch."""

import contextlib
import math

import pytest
import torch
import torch.nn.functional as F
from device import DEVICE, ON_CPU, cpu_only
from torch.autograd import gradcheck, gradgradcheck

import subnet_kernels as sk
from subnet_kernels import info, reference

NAN, INF = math.nan, math.inf
CONV = (F.conv1d, F.conv2d, F.conv3d)

# x, weight, and the arguments: grouped, strided, padded and dilated, alone and together, with odd sizes
CONVOLUTIONS = [
    ((2, 3, 9), (4, 3, 3), {}),
    ((2, 6, 11), (9, 2, 5), {"groups": 3, "stride": 2, "padding": 2}),
    ((1, 5, 13), (5, 1, 3), {"groups": 5, "padding": 2, "dilation": 2}),
    ((3, 4, 7, 8), (6, 4, 3, 2), {}),
    ((2, 4, 7, 8), (6, 2, 3, 3), {"groups": 2, "stride": (2, 1), "padding": (0, 2), "dilation": (1, 2)}),
    ((2, 8, 5, 5), (8, 1, 3, 3), {"groups": 8, "padding": 1}),
    ((4, 23, 1, 1), (11, 23, 1, 1), {}),
    ((2, 3, 5, 6, 4), (4, 3, 2, 3, 2), {"padding": (1, 0, 1)}),
    ((1, 4, 6, 6, 6), (4, 2, 3, 3, 3), {"groups": 2, "stride": 2, "padding": 1}),
]


def mask_of(shape, density=0.4):
    return torch.rand(shape) < density


def where_open(weight, mask):
    return torch.where(mask, weight, torch.zeros((), dtype=weight.dtype))


def poisoned(weight, mask):
    """Weight with NaN and infinities behind closed bits."""
    poison = torch.tensor([NAN, INF, -INF], dtype=weight.dtype).repeat(weight.numel())[: weight.numel()].view(weight.shape)
    return torch.where(mask, weight, poison)


def leaves(*tensors):
    return [t.clone().requires_grad_() for t in tensors]


# rows, outputs, inputs: whole tiles and tails of every kernel, sums longer than one block, bits of a row that start within a byte
PRODUCTS = [
    (1, 1, 1), (1, 9, 40), (2, 7, 5), (3, 4, 16), (5, 33, 65), (7, 100, 784), (10, 25, 131), (13, 37, 129), (14, 3, 300), (32, 64, 64),
    (130, 27, 33), (300, 14, 50), (50, 300, 530), (0, 4, 3), (3, 0, 4), (3, 4, 0),
]  # fmt: skip


def near(ours, eager, exact):
    """At most twice the error that eager PyTorch makes, and a floor of a few roundings of the largest value."""
    floor = 4 * torch.finfo(ours.dtype).eps * (exact.abs().max() if exact.numel() else 0)
    return (ours - exact).abs().max() <= 2 * (eager - exact).abs().max() + floor if exact.numel() else ours.shape == exact.shape


@pytest.mark.parametrize("given", ["bits", "effective"])
@pytest.mark.parametrize(("rows", "outputs", "inputs"), PRODUCTS)
class TestProducts:
    """The compiled float32 products, op by op, on every instruction set; outputs are fresh, so nothing may be left unwritten."""

    @pytest.fixture
    def case(self, rows, outputs, inputs, given):
        torch.manual_seed(rows * 1000 + outputs)
        mask = mask_of((outputs, inputs), 0.3)
        weight = torch.randn(outputs, inputs)
        open_weight = where_open(weight, mask)
        x, grad = torch.randn(rows, inputs), torch.randn(rows, outputs)
        bits = sk.pack(mask) if given == "bits" else None
        return x, grad, poisoned(weight, mask) if given == "bits" else open_weight, open_weight, bits

    def test_forward(self, cpu_isa, case):
        x, _, weight, effective, bits = case
        bias = torch.randn(len(weight))
        y = torch.ops.subnet_kernels.masked_linear(x, weight, bits, bias)
        assert near(y, F.linear(x, effective, bias), F.linear(x.double(), effective.double(), bias.double()))
        strided = torch.ops.subnet_kernels.masked_linear(x.t().contiguous().t(), weight.t().contiguous().t(), bits, bias)
        if ON_CPU:
            assert torch.equal(strided, y)
        else:  # another order of sums
            torch.testing.assert_close(strided, y, rtol=1e-4, atol=1e-4)

    def test_grad_input(self, cpu_isa, case):
        _, grad, weight, effective, bits = case
        d_x = torch.ops.subnet_kernels.masked_linear_grad_input(grad, weight, bits)
        assert near(d_x, grad @ effective, grad.double() @ effective.double())

    def test_grad_weight(self, cpu_isa, case):
        x, grad, weight, _, bits = case
        total, nothing = torch.ops.subnet_kernels.masked_linear_grad_weight(grad, x)
        assert near(total, grad.t() @ x, grad.double().t() @ x.double())
        assert nothing.numel() == 0
        if bits is None:
            return
        weight, scores, frozen = torch.randn_like(weight), torch.randn_like(weight), sk.pack(mask_of(weight.shape))
        for by in ("magnitude", "value"):
            for shut in (None, frozen):
                expected = reference.straight_through(total, weight, scores, bits, shut, by)
                both = torch.ops.subnet_kernels.masked_linear_grad_weight(grad, x, weight, scores, bits, shut, by)
                alone = torch.ops.subnet_kernels.masked_linear_grad_weight(grad, x, weight, scores, bits, shut, by, False)
                assert all(torch.equal(a, b) for a, b in zip(both, expected))
                assert alone[0].numel() == 0
                assert torch.equal(alone[1], expected[1])
        assert torch.equal(
            torch.ops.subnet_kernels.masked_linear_grad_weight(grad, x, None, None, bits, frozen)[0],
            reference.apply(total, bits & ~frozen),
        )

    @cpu_only
    def test_instruction_sets_and_threads_agree(self, case):
        """To the bit: the order of every sum is fixed."""
        x, grad, weight, _, bits = case
        found = []
        with contextlib.ExitStack() as stack:
            before = info.cpu_isa()
            stack.callback(info.cpu_isa, before)
            stack.callback(torch.set_num_threads, torch.get_num_threads())
            for name in ("portable", "avx2", "avx512"):
                if info.cpu_isa(name) != name:
                    continue
                for threads in (1, 2):
                    torch.set_num_threads(threads)
                    found.append(
                        (
                            torch.ops.subnet_kernels.masked_linear(x, weight, bits),
                            torch.ops.subnet_kernels.masked_linear_grad_input(grad, weight, bits),
                            torch.ops.subnet_kernels.masked_linear_grad_weight(grad, x)[0],
                        )
                    )
        for other in found[1:]:
            assert all(torch.equal(a, b) for a, b in zip(found[0], other))


@cpu_only
@pytest.mark.parametrize("rows", [1, 10, 40])
def test_large_products_agree_on_threads(rows):
    """Large enough that two threads share the work."""
    x, grad, weight = torch.randn(rows, 784), torch.randn(rows, 600), torch.randn(600, 784)
    bits, scores = sk.pack(weight > 0), torch.randn(600, 784)
    found, before = [], torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(
            (
                torch.ops.subnet_kernels.masked_linear(x, weight, bits),
                torch.ops.subnet_kernels.masked_linear_grad_input(grad, weight, bits),
                *torch.ops.subnet_kernels.masked_linear_grad_weight(grad, x, weight, scores, bits, None),
            )
        )
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*found))


@pytest.mark.parametrize("rows", [2, 20])
def test_infinite_inputs_reach_every_output(rows):
    """As in a dense product: 0 times infinity is NaN, whichever kernel a batch takes."""
    x, weight = torch.randn(rows, 40), torch.randn(9, 40)
    x[1, 7] = math.inf
    y = sk.masked_linear(x, weight, sk.pack(torch.zeros(9, 40, dtype=torch.bool)))
    assert y[1].isnan().all()
    assert torch.equal(y[0], torch.zeros(9))


class TestValues:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("with_bias", [False, True])
    @pytest.mark.parametrize(("rows", "outputs", "inputs"), [(1, 1, 1), (3, 7, 5), (8, 33, 65), (17, 100, 784), (2, 512, 2)])
    def test_linear(self, dtype, with_bias, rows, outputs, inputs):
        x, weight, mask = torch.randn(rows, inputs).to(dtype), torch.randn(outputs, inputs).to(dtype), mask_of((outputs, inputs))
        bias = torch.randn(outputs).to(dtype) if with_bias else None
        y = sk.masked_linear(x, weight, sk.pack(mask), bias)
        exact = F.linear(x.double(), where_open(weight, mask).double(), None if bias is None else bias.double())
        # At most twice the error that PyTorch itself makes in this dtype, and a floor of one rounding of the largest value.
        own = (F.linear(x, where_open(weight, mask), bias).double() - exact).abs().max()
        floor = torch.finfo(dtype).eps * exact.abs().max()
        assert y.dtype == dtype
        assert y.shape == exact.shape
        assert (y.double() - exact).abs().max() <= 2 * own + floor

    @pytest.mark.parametrize(("x_shape", "weight_shape", "how"), CONVOLUTIONS)
    @pytest.mark.parametrize("with_bias", [False, True])
    @pytest.mark.parametrize("grad", [False, True])  # with gradients the weight is applied first, without them the op is fused
    def test_conv(self, x_shape, weight_shape, how, with_bias, grad):
        x, weight, mask = torch.randn(x_shape), torch.randn(weight_shape), mask_of(weight_shape)
        bias = torch.randn(weight_shape[0]) if with_bias else None
        expected = CONV[len(x_shape) - 3](x, where_open(weight, mask), bias, **how)
        y = sk.masked_conv(x, weight.requires_grad_(grad), sk.pack(mask), bias, **how)
        assert y.requires_grad == grad
        torch.testing.assert_close(y.detach(), expected, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("by", ["magnitude", "value"])
    @pytest.mark.parametrize("ties", ["last", "first", "all"])
    @pytest.mark.parametrize("k", [0, 1, 17, 60])
    def test_subnet_linear(self, by, ties, k):
        x, weight, scores, bias = torch.randn(4, 12), torch.randn(5, 12), torch.randn(5, 12).round(), torch.randn(5)
        mask = sk.unpack(sk.select(scores, k, by=by, ties=ties), weight.shape)
        y = sk.subnet_linear(x, weight, scores, k, bias=bias, by=by, ties=ties)
        torch.testing.assert_close(y, F.linear(x, where_open(weight, mask), bias))

    def test_open_and_closed(self):
        x, weight, bias = torch.randn(3, 6), torch.randn(4, 6), torch.randn(4)
        everything = sk.pack(torch.ones(4, 6, dtype=torch.bool))
        torch.testing.assert_close(sk.masked_linear(x, weight, everything, bias), F.linear(x, weight, bias))
        nothing = torch.zeros_like(everything)
        assert torch.equal(sk.masked_linear(x, weight, nothing, bias), bias.expand(3, 4))

    @pytest.mark.parametrize("shape", [(6,), (0, 6), (2, 0, 6), (2, 3, 6), (2, 1, 3, 6)])
    def test_leading_dimensions(self, shape):
        x, weight, mask, bias = torch.randn(shape), torch.randn(4, 6), mask_of((4, 6)), torch.randn(4)
        x, y_x = leaves(x, x)
        weight, y_weight = leaves(weight, weight)
        y = sk.masked_linear(x, weight, sk.pack(mask), bias)
        expected = F.linear(y_x, where_open(y_weight, mask), bias)
        torch.testing.assert_close(y, expected)
        g = torch.randn_like(y)
        y.backward(g)
        expected.backward(g)
        torch.testing.assert_close(x.grad, y_x.grad)
        torch.testing.assert_close(weight.grad, y_weight.grad)

    def test_empty_batch_of_images(self):
        x, weight, mask = torch.randn(0, 3, 9).requires_grad_(), torch.randn(4, 3, 3).requires_grad_(), mask_of((4, 3, 3))
        y = sk.masked_conv(x, weight, sk.pack(mask))
        assert y.shape == (0, 4, 7)
        y.sum().backward()
        assert x.grad.shape == x.shape
        assert weight.grad.count_nonzero() == 0
        assert sk.masked_conv(x.detach(), weight.detach(), sk.pack(mask)).shape == (0, 4, 7)

    @pytest.mark.parametrize(("outputs", "inputs"), [(0, 6), (4, 0)])
    def test_layers_without_weights(self, outputs, inputs):
        x, weight = torch.randn(3, inputs), torch.randn(outputs, inputs)
        y = sk.masked_linear(x, weight, sk.pack(weight > 0))
        assert torch.equal(y, torch.zeros(3, outputs))
        assert torch.equal(sk.subnet_linear(x, weight, weight, 0), y)

    def test_strides(self):
        """Ties, bits and products are in logical order whatever the strides are."""
        x, weight, mask = torch.randn(6, 5).t(), torch.randn(6, 4).t(), mask_of((6, 4)).t()
        assert not any(t.is_contiguous() for t in (x, weight, mask))
        expected = F.linear(x, where_open(weight, mask))
        torch.testing.assert_close(sk.masked_linear(x, weight, sk.pack(mask)), expected)
        scores = torch.ones(6, 4).t()
        kept = sk.unpack(sk.select(scores, 7), (4, 6))
        torch.testing.assert_close(sk.subnet_linear(x, weight, scores, 7), F.linear(x, where_open(weight, kept)))
        image, kernel = torch.randn(2, 7, 8, 3).permute(0, 3, 1, 2), torch.randn(3, 3, 3, 4).permute(3, 2, 0, 1)
        mask = mask_of(kernel.shape)
        y = sk.masked_conv(image, kernel, sk.pack(mask))
        torch.testing.assert_close(y, F.conv2d(image, where_open(kernel, mask)), rtol=1e-5, atol=1e-5)

    def test_inputs_stay(self):
        x, weight, bits = torch.randn(3, 6), torch.randn(4, 6), sk.pack(mask_of((4, 6)))
        before = [t.clone() for t in (x, weight, bits)]
        sk.masked_linear(x, weight, bits)
        sk.subnet_linear(x, weight, weight, 5)
        assert all(torch.equal(a, b) for a, b in zip(before, (x, weight, bits)))


class TestPoison:
    """A mask selects and never multiplies: what stands behind a closed bit stays there, forward and backward."""

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_linear(self, dtype):
        mask = mask_of((9, 70))
        x, clean = torch.randn(5, 70).to(dtype), torch.randn(9, 70).to(dtype)
        x, weight, x0, weight0 = leaves(x, poisoned(clean, mask), x, where_open(clean, mask))
        y, expected = sk.masked_linear(x, weight, sk.pack(mask)), F.linear(x0, weight0)
        torch.testing.assert_close(y, expected)
        g = torch.randn_like(y)
        y.backward(g)
        expected.backward(g)
        torch.testing.assert_close(x.grad, x0.grad)
        torch.testing.assert_close(weight.grad, where_open(weight0.grad, mask))

    @pytest.mark.parametrize("grad", [False, True])
    def test_conv(self, grad):
        mask = mask_of((4, 3, 3, 3))
        x, clean = torch.randn(2, 3, 6, 6), torch.randn(4, 3, 3, 3)
        weight = poisoned(clean, mask)
        y = sk.masked_conv(x.requires_grad_(grad), weight, sk.pack(mask))
        torch.testing.assert_close(y.detach(), F.conv2d(x.detach(), where_open(clean, mask)), rtol=1e-5, atol=1e-5)
        if grad:
            y.sum().backward()
            assert x.grad.isfinite().all()

    def test_subnet_linear(self):
        scores = torch.randn(4, 6)
        mask = sk.unpack(sk.select(scores, 9), (4, 6))
        x, clean = torch.randn(3, 6).requires_grad_(), torch.randn(4, 6)
        y = sk.subnet_linear(x, poisoned(clean, mask), scores, 9)
        torch.testing.assert_close(y, F.linear(x, where_open(clean, mask)))
        y.sum().backward()
        assert x.grad.isfinite().all()

    def test_closed_gradient_is_plus_zero(self):
        """Where x is NaN, G is NaN for every weight; a closed one still gets +0.0."""
        x = torch.randn(3, 6)
        x[1, 2] = NAN
        (weight,), mask = leaves(torch.randn(4, 6)), mask_of((4, 6))
        sk.masked_linear(x, weight, sk.pack(mask)).backward(-torch.ones(3, 4))
        closed = weight.grad[~mask]
        assert torch.equal(closed, torch.zeros_like(closed))
        assert not closed.signbit().any()
        assert weight.grad[:, 2][mask[:, 2]].isnan().all()


class TestGradients:
    @pytest.mark.parametrize("shape", [(3, 6), (6,), (2, 2, 6), (0, 6)])
    def test_linear(self, shape):
        x, weight, bias = leaves(*(torch.randn(s, dtype=torch.float64) for s in (shape, (4, 6), (4,))))
        bits = sk.pack(mask_of((4, 6)))
        assert gradcheck(lambda *a: sk.masked_linear(a[0], a[1], bits, a[2]), (x, weight, bias), check_batched_grad=True)
        assert gradgradcheck(lambda *a: sk.masked_linear(a[0], a[1], bits, a[2]), (x, weight, bias))

    @pytest.mark.parametrize(("x_shape", "weight_shape", "how"), [CONVOLUTIONS[i] for i in (1, 2, 4)])
    def test_conv(self, x_shape, weight_shape, how):
        x, weight, bias = leaves(*(torch.randn(s, dtype=torch.float64) for s in (x_shape, weight_shape, weight_shape[:1])))
        bits = sk.pack(mask_of(weight_shape))
        assert gradcheck(lambda *a: sk.masked_conv(a[0], a[1], bits, a[2], **how), (x, weight, bias), fast_mode=True)
        assert gradgradcheck(lambda *a: sk.masked_conv(a[0], a[1], bits, a[2], **how), (x, weight, bias), fast_mode=True)

    def test_conv_3d(self):
        x, weight = leaves(torch.randn(1, 2, 3, 3, 3, dtype=torch.float64), torch.randn(2, 2, 2, 2, 2, dtype=torch.float64))
        bits = sk.pack(mask_of(weight.shape))
        assert gradcheck(lambda *a: sk.masked_conv(*a, bits, padding=1, stride=2), (x, weight))

    @pytest.mark.parametrize("frozen", [False, True])
    @pytest.mark.parametrize("by", ["magnitude", "value"])
    def test_subnet_linear_in_x_and_bias(self, by, frozen):
        """To x and bias the layer is an ordinary function. To the weights it is one where all are live; to scores never."""
        x, weight, bias = leaves(*(torch.randn(s, dtype=torch.float64) for s in ((3, 6), (4, 6), (4,))))
        scores = torch.randn(4, 6, dtype=torch.float64)
        bits = sk.pack(mask_of((4, 6))) if frozen else None
        checked = (x, bias) if frozen else (x, bias, weight)

        def layer(x, bias, w=weight.detach()):  # noqa: B008
            return sk.subnet_linear(x, w, scores, 10, frozen=bits, bias=bias, by=by)

        assert gradcheck(layer, checked)
        assert gradgradcheck(layer, checked)

    @pytest.mark.parametrize("by", ["magnitude", "value"])
    @pytest.mark.parametrize("frozen", [False, True])
    def test_straight_through(self, by, frozen):
        """dW = G where open and not frozen, else +0.0; dS = G * W (* sign of the score by magnitude), for closed weights too."""
        x, weight, scores = leaves(torch.randn(5, 6), torch.randn(4, 6), torch.randn(4, 6))
        with torch.no_grad():
            scores[0, :3] = torch.tensor([0.0, -0.0, 1e-30])
        owned = mask_of((4, 6))
        mask = sk.unpack(sk.select(scores, 10, by=by), (4, 6))
        g = torch.randn(5, 4)
        sk.subnet_linear(x, weight, scores, 10, frozen=sk.pack(owned) if frozen else None, by=by).backward(g)
        G = g.t() @ x.detach()
        open_ = mask & ~owned if frozen else mask
        torch.testing.assert_close(weight.grad, where_open(G, open_))
        shut = weight.grad[~open_]
        assert torch.equal(shut, torch.zeros_like(shut))
        assert not shut.signbit().any()
        expected = G * weight.detach()
        if by == "magnitude":
            expected = expected * scores.detach().sign()
            assert scores.grad[0, :2].count_nonzero() == 0
        torch.testing.assert_close(scores.grad, expected)
        torch.testing.assert_close(x.grad, g @ where_open(weight.detach(), mask))

    def test_only_what_is_needed(self):
        x, weight, scores = torch.randn(5, 6), torch.randn(4, 6), torch.randn(4, 6)
        for needed in ("x", "weight", "scores"):
            tensors = {"x": x.clone(), "weight": weight.clone(), "scores": scores.clone()}
            tensors[needed].requires_grad_()
            sk.subnet_linear(**tensors, k=7).sum().backward()
            assert [name for name, t in tensors.items() if t.grad is not None] == [needed]

    @pytest.mark.parametrize("by", ["magnitude", "value"])
    def test_second_derivatives_straight_through(self, by):
        """The straight-through gradients are differentiable as the formulas they are."""
        x, weight, scores = leaves(*(torch.randn(s, dtype=torch.float64) for s in ((5, 6), (4, 6), (4, 6))))
        v, u = torch.randn(4, 6, dtype=torch.float64), torch.randn(4, 6, dtype=torch.float64)
        owned = mask_of((4, 6))

        def gradients(layer):
            d_weight, d_scores = layer()
            return torch.autograd.grad((d_weight * v).sum() + (d_scores * u).sum(), x)[0]

        def ours():
            y = sk.subnet_linear(x, weight, scores, 10, frozen=sk.pack(owned), by=by)
            return torch.autograd.grad(y.pow(3).sum(), (weight, scores), create_graph=True)

        def formulas():
            mask = sk.unpack(sk.select(scores, 10, by=by), (4, 6))
            y = F.linear(x, where_open(weight, mask))
            G = (3 * y.pow(2)).t() @ x
            slope = scores.detach().sign() if by == "magnitude" else 1.0
            return where_open(G, mask & ~owned), G * weight * slope

        # Only to x do both agree throughout: G depends on the weight through y as well, and there ours is straight through again.
        torch.testing.assert_close(gradients(ours), gradients(formulas))

    def test_hessian_vector_product(self):
        """Without frozen weights the weights are an ordinary argument, so second derivatives are PyTorch's own."""
        x, weight = torch.randn(5, 6, dtype=torch.float64), torch.randn(4, 6, dtype=torch.float64)
        scores, v = torch.randn(4, 6, dtype=torch.float64), torch.randn(4, 6, dtype=torch.float64)
        mask = sk.unpack(sk.select(scores, 10), (4, 6))

        def product(layer):
            w = weight.clone().requires_grad_()
            (d,) = torch.autograd.grad(layer(w).pow(3).sum(), w, create_graph=True)
            return torch.autograd.grad((d * v).sum(), w)[0]

        expected = product(lambda w: F.linear(x, where_open(w, mask)))
        torch.testing.assert_close(product(lambda w: sk.subnet_linear(x, w, scores, 10)), expected)
        torch.testing.assert_close(product(lambda w: sk.masked_linear(x, w, sk.pack(mask))), expected)


class TestAutocast:
    @pytest.mark.parametrize("name", ["masked_linear", "subnet_linear", "masked_conv"])
    def test_bfloat16(self, name):
        """As for the dense layer: products in bfloat16, gradients in the parameters' own dtype."""
        scores = torch.randn(8, 6)
        mask = sk.unpack(sk.select(scores, 20), (8, 6))
        bits = sk.pack(mask)

        def run(layer):
            x, weight, bias = leaves(*inputs)
            with torch.autocast(DEVICE, torch.bfloat16):
                y = layer(x, weight, bias)
            y.float().square().sum().backward()
            return y, x.grad, weight.grad, bias.grad

        inputs = torch.randn(16, 6), torch.randn(8, 6), torch.randn(8)
        kernel = lambda w: w[:, :, None]  # noqa: E731
        layers = {
            "masked_linear": lambda x, w, b: sk.masked_linear(x, w, bits, b),
            "subnet_linear": lambda x, w, b: sk.subnet_linear(x, w, scores, 20, bias=b),
            "masked_conv": lambda x, w, b: sk.masked_conv(kernel(x), kernel(w), bits, b)[..., 0],
        }
        y, *grads = run(layers[name])
        y0, *grads0 = run(lambda x, w, b: F.linear(x, where_open(w, mask), b))
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y, y0, rtol=2e-2, atol=2e-2)
        for grad, grad0 in zip(grads, grads0):
            assert grad.dtype == torch.float32
            assert (grad - grad0).norm() <= 2e-2 * grad0.norm()

    def test_scores_are_not_cast(self):
        """Scores that bfloat16 cannot tell apart are still told apart."""
        scores = torch.full((2, 8), 1.0)
        scores[0, 3] += 1e-4
        x, weight = torch.eye(8), torch.ones(2, 8)
        with torch.autocast(DEVICE, torch.bfloat16):
            y = sk.subnet_linear(x, weight, scores, 1)
        assert y.nonzero().tolist() == [[3, 0]]

    def test_double_is_left_alone(self):
        x, weight, bits = torch.randn(3, 6).double(), torch.randn(4, 6).double(), sk.pack(mask_of((4, 6)))
        with torch.autocast(DEVICE, torch.bfloat16):
            assert sk.masked_linear(x, weight, bits).dtype == torch.float64


class TestVmap:
    """Over each argument by itself and over all at once: the same as a loop."""

    @pytest.mark.parametrize("mapped", [(0, None, None, None), (None, 0, None, None), (None, None, 0, None), (None, None, None, 0),
                                        (1, 0, None, None), (0, 0, 0, 0), (2, 1, 0, 1)])  # fmt: skip
    @pytest.mark.parametrize("name", ["masked_linear", "masked_conv"])
    def test_masked(self, name, mapped):
        conv = name == "masked_conv"
        shapes = [(2, 6, 5) if conv else (3, 6), (4, 6, 3) if conv else (4, 6), None, (4,)]
        arguments = []
        for shape, dim in zip(shapes, mapped):
            if shape is None:
                bits = torch.stack([sk.pack(mask_of(shapes[1])) for _ in range(5)])
                arguments.append(bits if dim == 0 else bits[0])
            else:
                tensor = torch.randn(5, *shape) if dim is not None else torch.randn(shape)
                arguments.append(tensor if dim is None else tensor.movedim(0, dim))
        call = getattr(sk, name)
        mapped_y = torch.vmap(call, in_dims=mapped)(*arguments)
        pick = lambda t, d, i: t if d is None else t.select(d, i)  # noqa: E731
        loop = torch.stack([call(*(pick(t, d, i) for t, d in zip(arguments, mapped))) for i in range(5)])
        torch.testing.assert_close(mapped_y, loop, rtol=1e-5, atol=1e-5)

    def test_scores(self):
        """An ensemble of masks over one weight, and its straight-through gradients."""
        x, weight, scores = torch.randn(3, 6), torch.randn(4, 6), torch.randn(5, 4, 6)
        value = lambda s: sk.subnet_linear(x, weight, s, 9).pow(2).sum()  # noqa: E731
        grads = torch.vmap(torch.func.grad(value))(scores)
        for s, grad in zip(scores, grads):
            torch.testing.assert_close(grad, torch.func.grad(value)(s))

    def test_gradients_of_every_row(self):
        x, weight, bits = torch.randn(7, 6), torch.randn(4, 6), sk.pack(mask_of((4, 6)))
        value = lambda w, row: sk.masked_linear(row, w, bits).pow(2).sum()  # noqa: E731
        grads = torch.vmap(torch.func.grad(value), (None, 0))(weight, x)
        torch.testing.assert_close(grads.sum(0), torch.func.grad(value)(weight, x))


class TestUnits:
    """Answers by hand."""

    def test_linear(self):
        weight = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
        mask = torch.tensor([[True, False, True], [False, True, False]])
        assert sk.masked_linear(torch.tensor([1.0, 10.0, 100.0]), weight, sk.pack(mask)).tolist() == [301.0, 50.0]

    def test_conv(self):
        kernel, mask = torch.tensor([[[1.0, 2.0, 4.0]]]), torch.tensor([[[True, False, True]]])
        assert sk.masked_conv(torch.tensor([[[1.0, 10.0, 100.0, 1000.0]]]), kernel, sk.pack(mask)).tolist() == [[[401.0, 4010.0]]]

    def test_subnet_linear(self):
        weight, scores = torch.tensor([[1.0, 2.0, 3.0, 4.0]]), torch.tensor([[-3.0, 1.0, 2.0, 2.0]])
        x = torch.ones(1, 4)
        assert sk.subnet_linear(x, weight, scores, 2).item() == 5.0  # |-3| and, of the two 2s, the last
        assert sk.subnet_linear(x, weight, scores, 2, ties="first").item() == 4.0
        assert sk.subnet_linear(x, weight, scores, 2, ties="all").item() == 8.0
        assert sk.subnet_linear(x, weight, scores, 2, by="value").item() == 7.0
