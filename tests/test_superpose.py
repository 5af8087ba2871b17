"""superpose, its gradients and alpha_grad: answers worked by hand; sums whose error is at most twice the reference's own."""

from collections import Counter

import pytest
import torch
from device import ON_CPU, compiled_only, cpu_only
from torch.utils._python_dispatch import TorchDispatchMode

import subnet_kernels as sk
from subnet_kernels import reference

TASKS = [1, 3, 16, 17, 64, 65, 130]  # around a lookup of four, a step of sixteen and a block
SIZES = [1, 7, 63, 64, 65, 511, 512, 513, 1021]  # around a byte, a word and a tile; a prime
FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
OPS = torch.ops.subnet_kernels
nan, inf = float("nan"), float("inf")


def random_bank(tasks, shape, density=0.3):
    masks = torch.rand(tasks, *shape) < density
    return masks, reference.pack_bank(masks)


def error(result, exact):
    return (result.double() - exact).pow(2).mean().sqrt().item()


def assert_as_good(result, theirs, exact, floor=1.0):
    """Error against float64 at most twice the reference's in the same dtype; floor: ulps of the largest result on top, for few terms."""
    assert (result.dtype, result.shape) == (theirs.dtype, theirs.shape)
    assert result.is_contiguous()
    ulp = torch.finfo(result.dtype).eps * exact.abs().max().item()
    assert error(result, exact) <= 2 * error(theirs, exact) + floor * ulp


# ------------------------------------------------------------------------------------------------------ worked by hand


def test_superpose_by_hand(cpu_isa):
    weight = torch.tensor([2.0, -4.0, nan, inf, 1.0])
    masks = torch.tensor([[1, 0, 0, 0, 1], [1, 1, 0, 0, 1], [1, 0, 0, 0, 1]], dtype=torch.bool)
    bank = sk.pack_bank(masks)
    assert sk.superpose(weight, bank, torch.tensor([0.5, 0.25, 2.0])).tolist() == [5.5, -1.0, 0.0, 0.0, 2.75]
    third = torch.tensor(1.0) / 3
    equal = [2.0, float(-4 * third), 0.0, 0.0, 1.0]
    counts = torch.tensor([3, 1, 0, 0, 3], dtype=torch.int32)
    assert sk.superpose(weight, bank).tolist() == equal
    assert sk.superpose(weight, bank, None, counts).tolist() == equal
    # open, but the alphas cancel or are zero: the weight times zero, with its sign, not the +0.0 of a closed one
    cancel = sk.superpose(weight, bank, torch.tensor([1.0, 0.0, -1.0]))
    assert cancel.tolist() == [0.0, 0.0, 0.0, 0.0, 0.0]
    assert cancel.signbit().tolist() == [False, True, False, False, False]


def test_closed_masks_do_not_matter(cpu_isa):
    """An infinite alpha reaches only the weights that its mask opens."""
    masks, bank = random_bank(9, (600,))
    alphas = torch.ones(9)
    alphas[4] = inf
    result = sk.superpose(torch.ones(600), bank, alphas)
    assert torch.equal(result.isinf(), masks[4])
    assert torch.equal(result[~masks[4]], masks[:, ~masks[4]].sum(0).float())


def test_gradient_by_hand(cpu_isa):
    masks = torch.tensor([[1, 0, 1, 0], [0, 1, 1, 0]], dtype=torch.bool)
    grad, weight = torch.tensor([1.0, 2.0, 3.0, nan]), torch.tensor([4.0, 0.5, -1.0, 1.0])
    assert OPS.superpose_grad(grad, weight, sk.pack_bank(masks)).tolist() == [1.0, -2.0]


def test_alpha_grad_by_hand(cpu_isa):
    x, grad_y = torch.tensor([[1.0, 2.0], [0.0, 1.0]]), torch.tensor([[1.0], [10.0]])
    bank = sk.pack_bank(torch.tensor([[[1, 0]], [[1, 1]]], dtype=torch.bool))
    assert sk.alpha_grad(x, grad_y, torch.tensor([[3.0, 5.0]]), bank).tolist() == [[3.0, 13.0], [0.0, 50.0]]


# ------------------------------------------------------------------------------------------------ against the reference


@pytest.mark.parametrize("tasks", TASKS)
def test_tasks_and_tails(cpu_isa, tasks):
    for n in SIZES:
        masks, bank = random_bank(tasks, (n,))
        weight, grad, alphas = torch.randn(n), torch.randn(n), torch.randn(tasks)
        wide, wide_grad, wide_alphas = weight.double(), grad.double(), alphas.double()
        exact = reference.superpose(wide, bank, wide_alphas)
        assert_as_good(sk.superpose(weight, bank, alphas), reference.superpose(weight, bank, alphas), exact)
        counts = masks.sum(0, dtype=torch.int32)
        equal = sk.superpose(weight, bank)
        assert torch.equal(sk.superpose(weight, bank, None, counts), equal)
        # PyTorch divides by a number exactly on the CPU alone
        rounding = 0 if ON_CPU else 2 * torch.finfo(weight.dtype).eps
        torch.testing.assert_close(equal, reference.superpose(weight, bank, None), rtol=rounding, atol=0)
        exact = reference.superpose_grad(wide_grad, wide, bank)
        assert_as_good(OPS.superpose_grad(grad, weight, bank), reference.superpose_grad(grad, weight, bank), exact)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_dtypes(cpu_isa, dtype):
    n, tasks = 1500, 77
    masks, bank = random_bank(tasks, (n,))
    weight, grad, alphas = torch.randn(n).to(dtype), torch.randn(n).to(dtype), torch.randn(tasks).to(dtype)
    exact = reference.superpose(weight.double(), bank, alphas.double())
    assert_as_good(sk.superpose(weight, bank, alphas), reference.superpose(weight, bank, alphas), exact)
    exact = reference.superpose(weight.double(), bank, None)
    counts = masks.sum(0, dtype=torch.int32)
    for given in (None, counts):
        assert_as_good(sk.superpose(weight, bank, None, given), reference.superpose(weight, bank, None), exact)
    exact = reference.superpose_grad(grad.double(), weight.double(), bank)
    assert_as_good(OPS.superpose_grad(grad, weight, bank), reference.superpose_grad(grad, weight, bank), exact)


@pytest.mark.parametrize("density", [0.05, 0.5, 1.0])
def test_error_of_long_sums(density):
    """Many tasks and many weights: the error stays near that of one rounding a term."""
    ours = theirs = 0.0
    for _ in range(6):
        masks = torch.rand(128, 4096) < density
        bank = reference.pack_bank(masks)
        weight, grad, alphas = torch.randn(4096), torch.randn(4096), torch.rand(128)
        exact = reference.superpose(weight.double(), bank, alphas.double())
        assert_as_good(sk.superpose(weight, bank, alphas), reference.superpose(weight, bank, alphas), exact, floor=0)
        exact = reference.superpose_grad(grad.double(), weight.double(), bank)
        ours += error(OPS.superpose_grad(grad, weight, bank), exact) ** 2
        theirs += error(reference.superpose_grad(grad, weight, bank), exact) ** 2
    assert ours <= 4 * theirs


@cpu_only
@compiled_only
def test_instruction_sets_and_threads_agree():
    """The same bits on every instruction set and number of threads."""
    from conftest import switch_isa

    n = 30_001
    _, bank = random_bank(70, (n,))
    weight, grad, alphas = torch.randn(n), torch.randn(n), torch.randn(70)
    before, results = switch_isa(None), []
    try:
        for isa in ("portable", "avx2", "avx512"):
            switch_isa(isa)
            for count in (1, 2):
                torch.set_num_threads(count)
                results.append(
                    (sk.superpose(weight, bank, alphas), sk.superpose(weight, bank), OPS.superpose_grad(grad, weight, bank))
                )
    finally:
        switch_isa(before)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0]))


def test_uneven_blocks(cpu_isa):
    """Blocks need not be full."""
    masks = torch.rand(12, 1025) < 0.4
    bank = [block for part in masks.split([5, 1, 6]) for block in reference.pack_bank(part)]
    weight, alphas = torch.randn(1025), torch.randn(12)
    exact = reference.superpose(weight.double(), bank, alphas.double())
    assert_as_good(sk.superpose(weight, bank, alphas), reference.superpose(weight, bank, alphas), exact)
    exact = reference.superpose_grad(weight.double(), weight.double(), bank)
    assert_as_good(OPS.superpose_grad(weight, weight, bank), reference.superpose_grad(weight, weight, bank), exact)


def test_strides(cpu_isa):
    masks, bank = random_bank(5, (6, 8, 3, 3))
    weight = torch.randn(6, 8, 3, 3).to(memory_format=torch.channels_last)
    grad = torch.randn(8, 6, 3, 6).transpose(0, 1)[..., ::2]
    alphas = torch.randn(10)[::2]
    dense = (weight.contiguous(), grad.contiguous(), alphas.contiguous())
    assert torch.equal(sk.superpose(weight, bank, alphas), sk.superpose(dense[0], bank, dense[2]))
    assert sk.superpose(weight, bank, alphas).is_contiguous()
    assert torch.equal(OPS.superpose_grad(grad, weight, bank), OPS.superpose_grad(dense[1], dense[0], bank))
    counts = masks.sum(0, dtype=torch.int32).to(memory_format=torch.channels_last)
    assert torch.equal(sk.superpose(weight, bank, None, counts), sk.superpose(weight, bank))


def test_nothing_open_and_nothing_there(cpu_isa):
    bank = reference.pack_bank(torch.zeros(3, 70, dtype=torch.bool))
    weight = torch.full((70,), nan)
    for result in (sk.superpose(weight, bank), sk.superpose(weight, bank, torch.ones(3))):
        assert torch.equal(result, torch.zeros(70))
    assert OPS.superpose_grad(weight, weight, bank).tolist() == [0.0, 0.0, 0.0]
    empty = torch.zeros(0, 4)
    bank = reference.pack_bank(torch.zeros(3, 0, 4, dtype=torch.bool))
    assert sk.superpose(empty, bank, torch.ones(3)).shape == (0, 4)
    assert OPS.superpose_grad(empty, empty, bank).tolist() == [0.0, 0.0, 0.0]


# ---------------------------------------------------------------------------------------------------- sums of one tile


def test_products_that_do_not_add_up(cpu_isa):
    """Infinite, NaN and overflowing products reach the masks that open them and no other, in whatever tile they are."""
    n = 1400
    masks = torch.rand(20, n) < 0.5
    masks[:, [3, 600, 601]] = False
    masks[1, 3] = masks[2, 600] = masks[3, 601] = True
    grad, weight = torch.randn(n), torch.randn(n)
    grad[3], weight[3] = nan, 1.0
    grad[600], weight[600] = 3e38, 1e10
    grad[601], weight[601] = -3e38, 1e10
    bank = reference.pack_bank(masks)
    result = OPS.superpose_grad(grad, weight, bank)
    assert result[1].isnan()
    assert result[2:4].tolist() == [inf, -inf]
    finite = [0, *range(4, 20)]
    exact = reference.superpose_grad(grad.double(), weight.double(), bank)
    assert error(result[finite], exact[finite]) <= 1e-5


@pytest.mark.parametrize("spread", [10, 30])
def test_products_of_every_size(cpu_isa, spread):
    """Magnitudes from 2 ** -spread to 2 ** spread side by side: no mask loses the small ones because a large one lies in their tile."""
    n, tasks = 2048, 40
    grad, weight = torch.randn(n), torch.randn(n) * 2 ** torch.empty(n).uniform_(-spread, spread).round()
    masks = torch.rand(tasks, n) < 0.3
    masks[::2] &= (grad * weight).abs() < 1  # every other mask opens small products only
    bank = reference.pack_bank(masks)
    exact = reference.superpose_grad(grad.double(), weight.double(), bank)
    ours, theirs = OPS.superpose_grad(grad, weight, bank), reference.superpose_grad(grad, weight, bank)
    eager = masks.float() @ (grad * weight)  # what plain PyTorch adds up
    for some in (slice(0, None, 2), slice(1, None, 2)):
        bound = max(error(theirs[some], exact[some]), error(eager[some], exact[some]))
        assert error(ours[some], exact[some]) <= 2 * bound


@pytest.mark.parametrize("spread", [0, 8, 60])
def test_alphas_of_every_size(cpu_isa, spread):
    """Magnitudes from 2 ** -spread to 2 ** spread side by side: weights that only small alphas open lose nothing to large ones."""
    n, tasks = 80_000, 40
    weight, alphas = torch.randn(n), torch.rand(tasks) * 2 ** torch.empty(tasks).uniform_(-spread, spread).round()
    masks = torch.rand(tasks, n) < 0.3
    masks[alphas >= 0.5, ::2] = False
    bank = [block for mask in masks for block in reference.pack_bank(mask[None])]
    exact = reference.superpose(weight.double(), bank, alphas.double())
    for blocks in (bank, reference.pack_bank(masks)):
        torch.testing.assert_close(sk.superpose(weight, blocks, alphas).double(), exact, rtol=1e-6, atol=0)


# ---------------------------------------------------------------------------------------------------------- many alphas


@pytest.mark.parametrize("rows", [0, 1, 2, 3, 8, 17])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_rows_of_alphas(cpu_isa, rows, dtype):
    """Each row gives the bits that it gives alone, forward and backward."""
    shape, tasks = (23, 31), 70
    _, bank = random_bank(tasks, shape)
    weight, alphas, grad = torch.randn(shape).to(dtype), torch.randn(rows, tasks).to(dtype), torch.randn(rows, *shape).to(dtype)
    weight[0, 0] = nan
    result, d_alphas = sk.superpose(weight, bank, alphas), OPS.superpose_grad(grad, weight, bank)
    assert (result.shape, result.dtype, result.is_contiguous()) == ((rows, *shape), dtype, True)
    assert (d_alphas.shape, d_alphas.dtype) == ((rows, tasks), dtype)
    assert reference.superpose(weight, bank, alphas).shape == result.shape
    assert reference.superpose_grad(grad, weight, bank).shape == d_alphas.shape
    for row in range(rows):
        torch.testing.assert_close(result[row], sk.superpose(weight, bank, alphas[row]), rtol=0, atol=0, equal_nan=True)
        alone = OPS.superpose_grad(grad[row], weight, bank)
        torch.testing.assert_close(d_alphas[row], alone, rtol=0, atol=0, equal_nan=True)


def test_strided_rows(cpu_isa):
    _, bank = random_bank(9, (40,))
    weight, alphas = torch.randn(40), torch.randn(9, 10)[:, ::2].T
    assert torch.equal(sk.superpose(weight, bank, alphas), sk.superpose(weight, bank, alphas.contiguous()))
    grad = torch.randn(40, 3).T
    assert torch.equal(OPS.superpose_grad(grad, weight, bank), OPS.superpose_grad(grad.contiguous(), weight, bank))


@cpu_only
def test_rows_on_threads():
    """The same bits on one thread and two; a bank of several blocks, and more rows than share a reading."""
    _, bank = random_bank(130, (20_000,))
    weight, alphas, grad = torch.randn(20_000), torch.randn(11, 130), torch.randn(19, 20_000)
    results = []
    for count in (1, 2):
        torch.set_num_threads(count)
        results.append((sk.superpose(weight, bank, alphas), OPS.superpose_grad(grad, weight, bank)))
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_gradients_of_rows_twice():
    _, bank = random_bank(5, (3, 4), 0.6)
    weight = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    alphas = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    function = lambda w, a: sk.superpose(w, bank, a)  # noqa: E731
    assert torch.autograd.gradcheck(function, (weight, alphas))
    assert torch.autograd.gradgradcheck(function, (weight, alphas))


class Calls(TorchDispatchMode):
    """Counts what is called below all transforms."""

    def __init__(self):
        super().__init__()
        self.count = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count[str(func)] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("shape", [(6, 5), (6, 2, 5)])
def test_mapped_alphas_are_one_call(shape):
    """vmap over alphas, and over their gradient, reads the bits once; over the weight as well, once a weight."""
    _, bank = random_bank(5, (3, 4), 0.6)
    weight, alphas = torch.randn(3, 4), torch.randn(shape)
    with Calls() as calls:
        result = torch.vmap(lambda a: sk.superpose(weight, bank, a), out_dims=1)(alphas)
    assert calls.count["subnet_kernels.superpose.default"] == 1
    rows = torch.stack([sk.superpose(weight, bank, a) for a in alphas], 1)
    assert torch.equal(result, rows)
    moved = torch.vmap(lambda a: sk.superpose(weight, bank, a), in_dims=-1)(alphas.movedim(0, -1))
    assert torch.equal(moved, rows.transpose(0, 1))
    with Calls() as calls:
        result = torch.vmap(torch.func.grad(lambda a: sk.superpose(weight, bank, a).pow(2).sum()))(alphas)
    assert calls.count["subnet_kernels.superpose.default"] == calls.count["subnet_kernels.superpose_grad.default"] == 1
    for mine, a in zip(result, alphas):
        torch.testing.assert_close(mine, torch.func.grad(lambda a: sk.superpose(weight, bank, a).pow(2).sum())(a))
    weights = torch.randn(6, 3, 4)
    each = torch.vmap(lambda w, a: sk.superpose(w, bank, a))(weights, alphas)
    assert torch.equal(each, torch.stack([sk.superpose(w, bank, a) for w, a in zip(weights, alphas)]))


# ------------------------------------------------------------------------------------------------------------ gradients


@pytest.mark.parametrize("tasks", [1, 3, 17, 65])
def test_gradients_twice(tasks):
    _, bank = random_bank(tasks, (3, 5), 0.6)
    weight = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    alphas = torch.randn(tasks, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda w, a: sk.superpose(w, bank, a), (weight, alphas))
    if tasks < 65:
        assert torch.autograd.gradgradcheck(lambda w, a: sk.superpose(w, bank, a), (weight, alphas))


def test_gradient_of_equal_alphas():
    masks, bank = random_bank(6, (40,))
    weight = torch.randn(40, requires_grad=True)
    grad = torch.randn(40)
    (d_weight,) = torch.autograd.grad(sk.superpose(weight, bank), weight, grad)
    torch.testing.assert_close(d_weight, grad * masks.sum(0) / 6)


def test_gradient_of_equal_alphas_from_counts():
    """With counts no mask is read: not for the result, and not for the gradient at the weight, which is differentiable again."""
    masks, bank = random_bank(6, (40,))
    counts = masks.sum(0, dtype=torch.int32)
    other = reference.pack_bank(~masks)
    weight = torch.randn(40, requires_grad=True)
    grad = torch.randn(40, requires_grad=True)
    result = sk.superpose(weight, other, None, counts)
    assert torch.equal(result, sk.superpose(weight, bank))
    (d_weight,) = torch.autograd.grad(result, weight, grad, create_graph=True)
    torch.testing.assert_close(d_weight, grad * counts / 6)
    (d_grad,) = torch.autograd.grad(d_weight.sum(), grad)
    torch.testing.assert_close(d_grad, counts / 6)
    weights = torch.randn(3, 40)
    each = torch.vmap(lambda w: sk.superpose(w, bank, None, counts))(weights)
    assert torch.equal(each, torch.stack([sk.superpose(w, bank) for w in weights]))


@pytest.mark.parametrize("tasks", [1, 5, 70])
def test_alpha_grad_is_every_rows_gradient(cpu_isa, tasks):
    """Row b is the gradient to alphas of that row's objective alone: through autograd, and summed over rows that of the batch."""
    rows, inputs, outputs = 4, 9, 7
    _, bank = random_bank(tasks, (outputs, inputs))
    x, grad_y, weight = torch.randn(rows, inputs), torch.randn(rows, outputs), torch.randn(outputs, inputs)
    result = sk.alpha_grad(x, grad_y, weight, bank)
    assert result.shape == (rows, tasks)
    alphas = torch.full((tasks,), 1 / tasks, requires_grad=True)
    for row in range(rows):
        y = x[row] @ sk.superpose(weight, bank, alphas).T
        (expected,) = torch.autograd.grad(y, alphas, grad_y[row])
        torch.testing.assert_close(result[row], expected, rtol=1e-4, atol=1e-5)
    total = OPS.superpose_grad(grad_y.T @ x, weight, bank)
    torch.testing.assert_close(result.sum(0), total, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_alpha_grad_dtypes_and_threads(cpu_isa, dtype):
    """More rows than share a reading of the bank; outputs end inside a tile; strided inputs."""
    _, bank = random_bank(9, (70, 61))
    x, grad_y = torch.randn(61, 35).to(dtype).T, torch.randn(35, 140).to(dtype)[:, ::2]
    weight = torch.randn(61, 70).to(dtype).T
    exact = reference.alpha_grad(x.double(), grad_y.double(), weight.double(), bank)
    theirs = reference.alpha_grad(x, grad_y, weight, bank)
    results = []
    for count in (1, 2):
        torch.set_num_threads(count)
        results.append(sk.alpha_grad(x, grad_y, weight, bank))
        assert_as_good(results[-1], theirs, exact)
    assert torch.equal(*results)


def test_alpha_grad_of_closed_weights(cpu_isa):
    """NaN behind a closed bit does not get out."""
    masks = torch.tensor([[[1, 0]], [[1, 1]]], dtype=torch.bool)
    weight = torch.tensor([[1.0, nan]])
    result = sk.alpha_grad(torch.ones(1, 2), torch.ones(1, 1), weight, sk.pack_bank(masks))
    assert result[0, 0].item() == 1.0
    assert result[0, 1].isnan()


# --------------------------------------------------------------------------------------------- sizes that divide the work
# How the kernels divide tiles, tasks and rows depends on the sizes: each of these takes another way.


def splits(tasks, most):
    """Random sizes of a bank's blocks."""
    sizes = []
    while sum(sizes) < tasks:
        sizes.append(min(int(torch.randint(1, most + 1, ())), tasks - sum(sizes)))
    return sizes


@pytest.mark.parametrize(
    ("n", "tasks"), [(100_003, 9), (100_003, 70), (90_003, 130), (60_000, 37), (20_000, 66), (513, 2100), (1400, 1030), (3, 128)]
)
def test_sizes(cpu_isa, n, tasks):
    """Many tiles and few, more tasks than tables fit in memory for; one row and three, and what a row gives alone."""
    masks, bank = random_bank(tasks, (n,))
    masks[:, 1] = False
    bank = [block for part in masks.split(splits(tasks, 64)) for block in reference.pack_bank(part)]
    weight, grad, alphas = torch.randn(n), torch.randn(3, n), torch.randn(3, tasks)
    exact = reference.superpose(weight.double(), bank, alphas.double())
    exact_grad = reference.superpose_grad(grad.double(), weight.double(), bank)
    weight[1] = nan
    exact[:, 1] = 0
    result, d_alphas = sk.superpose(weight, bank, alphas), OPS.superpose_grad(grad, weight, bank)
    assert_as_good(result, reference.superpose(weight, bank, alphas), exact)
    assert_as_good(d_alphas, reference.superpose_grad(grad, weight, bank), exact_grad)
    assert torch.equal(sk.superpose(weight, bank, alphas[2]), result[2])
    assert torch.equal(OPS.superpose_grad(grad[2], weight, bank), d_alphas[2])
    assert torch.equal(sk.superpose(weight, bank), reference.superpose(weight, bank, None))


@pytest.mark.parametrize("most", [1, 3, 64])
def test_blocks_of_any_size(cpu_isa, most):
    """The same sums, in whatever blocks the masks lie."""
    n, tasks = 1100, 150
    masks, whole = random_bank(tasks, (n,))
    bank = [block for part in masks.split(splits(tasks, most)) for block in reference.pack_bank(part)]
    weight, alphas = torch.randn(n), torch.randn(tasks)
    exact = reference.superpose(weight.double(), whole, alphas.double())
    assert_as_good(sk.superpose(weight, bank, alphas), reference.superpose(weight, whole, alphas), exact)
    assert torch.equal(sk.superpose(weight, bank), sk.superpose(weight, whole))
    assert torch.equal(OPS.superpose_grad(weight, weight, bank), OPS.superpose_grad(weight, weight, whole))


@pytest.mark.parametrize("tasks", [4, 5, 64, 65, 130])
def test_alphas_that_are_no_numbers(cpu_isa, tasks):
    """Infinite and NaN alphas reach what their masks open and nothing else; alphas of zero open, and give the weight times zero."""
    n, k = 1025, tasks // 2
    masks, bank = random_bank(tasks, (n,))
    weight = torch.randn(n)
    weight[~masks.any(0)] = nan
    for value in (inf, -inf, nan, 0.0):
        alphas = torch.ones(2, tasks)
        alphas[0, k] = value
        result, finite = sk.superpose(weight, bank, alphas), sk.superpose(weight, bank, alphas[1])
        assert torch.equal(result[1], finite)
        assert finite.isfinite().all()
        assert torch.equal(result[0, ~masks[k]], finite[~masks[k]])
        if value == 0:
            alone = masks[k] & (masks.sum(0) == 1)
            assert torch.equal(result[0].signbit()[alone], weight.signbit()[alone])
            assert (result[0, alone] == 0).all()
        else:
            assert not result[0, masks[k]].isfinite().any()
            assert torch.equal(result[0, masks[k]].isnan(), torch.full((int(masks[k].sum()),), value != value))


@pytest.mark.parametrize(
    ("alphas", "weight"), [(torch.float64, torch.bfloat16), (torch.float32, torch.float16), (torch.float16, torch.float64)]
)
def test_alphas_of_another_dtype(cpu_isa, alphas, weight):
    """They are rounded to the dtype of weight first."""
    _, bank = random_bank(70, (600,))
    w, a = torch.randn(600).to(weight), torch.randn(2, 70).to(alphas)
    assert torch.equal(OPS.superpose(w, bank, a), OPS.superpose(w, bank, a.to(weight)))
    grad = torch.randn(2, 600).to(alphas)
    exact = reference.superpose_grad(grad.double(), w.double(), bank)
    assert_as_good(OPS.superpose_grad(grad, w, bank), reference.superpose_grad(grad, w, bank), exact)


@pytest.mark.parametrize(
    ("rows", "outputs", "inputs", "tasks"),
    [(1, 61, 70, 33), (2, 70, 300, 520), (40, 130, 61, 3), (19, 65, 600, 7), (131, 5, 33, 66), (3, 1, 1, 1), (33, 64, 64, 2)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
def test_alpha_grad_sizes(cpu_isa, rows, outputs, inputs, tasks, dtype):
    _, bank = random_bank(tasks, (outputs, inputs))
    x, grad_y, weight = torch.randn(rows, inputs), torch.randn(rows, outputs), torch.randn(outputs, inputs)
    x, grad_y, weight = x.to(dtype), grad_y.to(dtype), weight.to(dtype)
    exact = reference.alpha_grad(x.double(), grad_y.double(), weight.double(), bank)
    result = sk.alpha_grad(x, grad_y, weight, bank)
    if dtype == torch.float64:
        torch.testing.assert_close(result, exact, rtol=1e-12, atol=1e-11)
    else:
        assert_as_good(result, reference.alpha_grad(x, grad_y, weight, bank), exact)


@pytest.mark.parametrize("rows", [2, 40])
def test_alpha_grad_of_rows_that_are_no_numbers(cpu_isa, rows):
    """An infinite input counts for the masks that open one of its weights, and for its own row."""
    outputs, inputs, tasks = 70, 40, 6
    masks = torch.rand(tasks, outputs, inputs) < 0.4
    masks[:3, :, 7] = False
    masks[3, 5, 7] = masks[4, 5, 7] = True
    masks[:3, 9] = False
    bank = reference.pack_bank(masks)
    x, grad_y, weight = torch.randn(rows, inputs), torch.randn(rows, outputs), torch.randn(outputs, inputs)
    expected = reference.alpha_grad(x, grad_y, weight, bank)
    x[1, 7], grad_y[1, 9] = inf, nan
    result = sk.alpha_grad(x, grad_y, weight, bank)
    kept = torch.ones(rows, dtype=torch.bool)
    kept[1] = False
    torch.testing.assert_close(result[kept], expected[kept], rtol=1e-4, atol=1e-3)
    assert result[1, :3].isfinite().all()
    assert not result[1, 3:5].isfinite().any()
    x[1, 7] = grad_y[1, 9] = 0
    torch.testing.assert_close(result[1, :3], reference.alpha_grad(x, grad_y, weight, bank)[1, :3], rtol=1e-4, atol=1e-3)


# ------------------------------------------------------------------------------------------------------------ arguments


def test_bad_arguments_get_a_sentence():
    _, bank = random_bank(3, (10,))
    weight = torch.randn(10)
    with pytest.raises(ValueError, match=r"alphas must have shape \(3,\) or \(R, 3\), one for each task of the bank, got \(4,\)"):
        sk.superpose(weight, bank, torch.ones(4))
    with pytest.raises(ValueError, match=r"or \(R, 3\), one for each task of the bank, got \(1, 2, 3\)"):
        sk.superpose(weight, bank, torch.ones(1, 2, 3))
    with pytest.raises(ValueError, match="bank must be a list of blocks"):
        sk.superpose(weight, bank[0])
    with pytest.raises(ValueError, match=r"bank\[0\] must be uint8 of shape \(2, k, 64\)"):
        sk.superpose(torch.randn(600), bank)
    with pytest.raises(ValueError, match="counts must be int32"):
        sk.superpose(weight, bank, None, torch.zeros(10))
    with pytest.raises(ValueError, match=r"x must be \(B, I\)"):
        sk.alpha_grad(torch.ones(2, 3), torch.ones(2, 2), torch.ones(2, 5), random_bank(3, (10,))[1])


@compiled_only
def test_dispatched_calls_check_too():
    _, bank = random_bank(3, (10,))
    with pytest.raises(RuntimeError, match="for 600 weights"):
        OPS.superpose(torch.randn(600), bank, None)
    with pytest.raises(RuntimeError, match="one for each of 3 tasks, got 2"):
        OPS.superpose(torch.randn(10), bank, torch.ones(2))
    with pytest.raises(RuntimeError, match="grad must have the 10 elements of weight, got 9"):
        OPS.superpose_grad(torch.randn(9), torch.randn(10), bank)
    with pytest.raises(RuntimeError, match="grad must have the 10 elements of weight, got 9"):
        OPS.superpose_grad(torch.randn(2, 9), torch.randn(10), bank)
    with pytest.raises(RuntimeError, match="one for each of 3 tasks, got 4"):
        OPS.superpose(torch.randn(10), bank, torch.ones(2, 2))


@pytest.mark.parametrize("name", ["superpose", "superpose_grad", "alpha_grad"])
def test_opcheck(name):
    _, bank = random_bank(3, (4, 5))
    weight = torch.randn(4, 5)
    arguments = {
        "superpose": (weight, bank, torch.randn(3)),
        "superpose_grad": (torch.randn(4, 5), weight, bank),
        "alpha_grad": (torch.randn(2, 5), torch.randn(2, 4), weight, bank),
    }[name]
    torch.library.opcheck(getattr(OPS, name).default, arguments)
