"""mixed_linear and its gradients: every row as its own task's masked layer gives it."""

import pytest
import torch
import torch.nn.functional as F
from device import CUDA_KERNELS, DEVICE, compiled_only, cpu_only, cuda_kernels
from torch.autograd import gradcheck, gradgradcheck

import subnet_kernels as sk
from subnet_kernels import reference

OPS = torch.ops.subnet_kernels
FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
nan, inf = float("nan"), float("inf")

# rows, inputs, outputs, tasks: rows of W on words and across words and tiles; tasks with one row, with several, with enough for a
# product of their own; outputs that do not divide
SHAPES = [
    (1, 1, 1, 1),
    (5, 64, 8, 5),
    (9, 70, 33, 4),
    (16, 784, 12, 16),
    (7, 1024, 5, 2),
    (300, 65, 10, 2),
    (90, 513, 3, 66),
    (3, 5, 200, 130),
    (20, 640, 40, 3),
]


def draw(rows, inputs, outputs, tasks, dtype=torch.float32, density=0.4):
    masks = torch.rand(tasks, outputs, inputs) < density
    x, weight, bias = torch.randn(rows, inputs), torch.randn(outputs, inputs), torch.randn(outputs)
    ids = torch.randint(0, tasks, (rows,))
    if rows > 64:
        ids[: rows // 2 + 1] = tasks - 1
    return masks, sk.pack_bank(masks), ids, x.to(dtype), weight.to(dtype), bias.to(dtype)


def where_open(mask, weight):
    return torch.where(mask, weight, torch.zeros((), dtype=weight.dtype))


def own(x, weight, masks, ids, bias=None):
    """Every row by itself: the specification in one line."""
    rows = [F.linear(row, where_open(masks[t], weight), bias) for row, t in zip(x, ids.tolist())]
    return torch.stack(rows) if rows else x.new_empty((0, weight.shape[0]))


def assert_as_good(result, theirs, exact):
    """Error against float64 at most twice the reference's in the same dtype, and one rounding of the largest value."""
    assert (result.dtype, result.shape) == (theirs.dtype, theirs.shape)
    assert result.is_contiguous()
    error = lambda y: (y.double() - exact).pow(2).mean().sqrt().item() if y.numel() else 0.0  # noqa: E731
    largest = exact.abs().max().item() if exact.numel() else 0.0
    assert error(result) <= 2 * error(theirs) + torch.finfo(result.dtype).eps * largest / 2


def all_three(x, weight, bank, ids, bias, grad, forward=sk.mixed_linear):
    return (
        forward(x, weight, bank, ids, bias),
        OPS.mixed_linear_grad_input(grad, weight, bank, ids),
        OPS.mixed_linear_grad_weight(grad, x, bank, ids),
    )


def test_by_hand(cpu_isa):
    weight = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    masks = torch.tensor([[[1, 0, 1], [0, 1, 0]], [[0, 0, 0], [1, 1, 1]]], dtype=torch.bool)
    x = torch.tensor([[1.0, 10.0, 100.0]] * 3)
    ids = torch.tensor([1, 0, 1])
    bank = sk.pack_bank(masks)
    assert sk.mixed_linear(x, weight, bank, ids).tolist() == [[0.0, 654.0], [301.0, 50.0], [0.0, 654.0]]
    assert sk.mixed_linear(x, weight, bank, ids, torch.tensor([0.5, 1.0])).tolist() == [[0.5, 655.0], [301.5, 51.0], [0.5, 655.0]]
    grad = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    assert OPS.mixed_linear_grad_input(grad, weight, bank, ids).tolist() == [
        [8.0, 10.0, 12.0],
        [3.0, 20.0, 9.0],
        [24.0, 30.0, 36.0],
    ]
    assert OPS.mixed_linear_grad_weight(grad, x, bank, ids).tolist() == [[3.0, 0.0, 300.0], [8.0, 120.0, 800.0]]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_against_the_reference(cpu_isa, shape, dtype):
    masks, bank, ids, x, weight, bias = draw(*shape, dtype)
    grad = torch.randn(shape[0], shape[2]).to(dtype)
    wide = [t.double() for t in (x, weight, bias, grad)]
    results = all_three(x, weight, bank, ids, bias, grad)
    theirs = (
        reference.mixed_linear(x, weight, bank, ids, bias),
        reference.mixed_linear_grad_input(grad, weight, bank, ids),
        reference.mixed_linear_grad_weight(grad, x, bank, ids),
    )
    exact = (
        own(wide[0], wide[1], masks, ids, wide[2]),
        torch.stack([g @ where_open(masks[t], wide[1]) for g, t in zip(wide[3], ids.tolist())]),
        sum(where_open(masks[t], torch.outer(g, row)) for g, row, t in zip(wide[3], wide[0], ids.tolist())),
    )
    for result, their, right in zip(results, theirs, exact):
        assert_as_good(result, their, right)
    assert_as_good(
        sk.mixed_linear(x, weight, bank, ids), reference.mixed_linear(x, weight, bank, ids), own(*wide[:2], masks, ids)
    )


@cpu_only
@compiled_only
def test_instruction_sets_and_threads_agree():
    """The same bits on every instruction set and number of threads, where no task has a product of its own."""
    from conftest import switch_isa

    _, bank, ids, x, weight, bias = draw(60, 517, 130, 40)
    grad = torch.randn(60, 130)
    before, results = switch_isa(None), []
    try:
        for isa in ("portable", "avx2", "avx512"):
            switch_isa(isa)
            for count in (1, 2):
                torch.set_num_threads(count)
                results.append(all_three(x, weight, bank, ids, bias, grad))
    finally:
        switch_isa(before)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0]))


def test_a_row_does_not_depend_on_the_others(cpu_isa):
    """Alone, with rows of its task or with rows of others: the same bits."""
    _, bank, ids, x, weight, bias = draw(50, 300, 21, 9)
    y = sk.mixed_linear(x, weight, bank, ids, bias)
    order = torch.randperm(50)
    assert torch.equal(sk.mixed_linear(x[order], weight, bank, ids[order], bias), y[order])
    for row in (0, 17, 49):
        alone = sk.mixed_linear(x[row : row + 1], weight, bank, ids[row : row + 1], bias)
        if not CUDA_KERNELS:
            assert torch.equal(alone, y[row : row + 1])
        else:  # how many rows there are may choose the order of a sum
            torch.testing.assert_close(alone, y[row : row + 1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rows", [8, 140])  # 140: the task has a product of its own
def test_closed_weights_do_not_get_out(cpu_isa, rows):
    """NaN and infinities behind closed bits; what is not finite in x spreads as it does in the masked layer."""
    masks = torch.rand(2, 9, 70) < 0.4
    masks[1] = masks[0]
    clean = torch.randn(9, 70)
    weight = torch.where(masks[0], clean, torch.tensor([nan, inf, -inf]).repeat(210).view(9, 70))
    bank, ids = sk.pack_bank(masks), torch.zeros(rows, dtype=torch.int64)
    ids[: rows // 2 if rows < 100 else 2] = 1
    x, grad = torch.randn(rows, 70), torch.randn(rows, 9)
    results = all_three(x, weight, bank, ids, None, grad)
    expected = all_three(x, where_open(masks[0], clean), bank, ids, None, grad)
    for result, right in zip(results, expected):
        assert result.isfinite().all()
        assert torch.equal(result, right)
    closed = results[2][~masks[0]]
    assert torch.equal(closed, torch.zeros_like(closed))
    assert not closed.signbit().any()
    x[0, 3], grad[1, 2] = nan, inf
    for result, right in zip(
        all_three(x, weight, bank, ids, None, grad),
        (own(x, weight, masks, ids), grad @ where_open(masks[0], clean), where_open(masks[0], grad.t() @ x)),
    ):
        torch.testing.assert_close(result, right, equal_nan=True, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("inputs", [70, 136, 256])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_rows_keep_to_themselves(cpu_isa, dtype, inputs):
    """Weights that are NaN where one task is open and another closed, and rows that are not finite: other rows hear nothing of them."""
    masks = torch.rand(3, 40, inputs) < 0.5
    masks[2] = ~masks[0]
    bank, ids = sk.pack_bank(masks), torch.tensor([0, 2, 1, 0, 0, 2, 1, 0, 2, 2, 2, 0])
    x, grad, clean = torch.randn(12, inputs).to(dtype), torch.randn(12, 40).to(dtype), torch.randn(40, inputs).to(dtype)
    weight = torch.where(masks[0], clean, torch.tensor(nan, dtype=dtype))
    expected = all_three(x, clean, bank, ids, None, grad)
    for result, right in zip(all_three(x, weight, bank, ids, None, grad)[:2], expected):
        assert torch.equal(result[ids == 0], right[ids == 0])
        assert result[ids != 0].isnan().all()
    x[3, 5], grad[4, 7] = inf, nan
    for result, right, row in zip(all_three(x, clean, bank, ids, None, grad)[:2], expected, (3, 4)):
        others = torch.arange(12) != row
        assert torch.equal(result[others], right[others])
        assert not result[row].isfinite().any()


@pytest.mark.parametrize("runs", [1, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [3.9, 4.0, 500.0, 512.0, 3e4, "tiny", "least", inf])
def test_weights_of_any_size(cpu_isa, size, dtype, runs):
    """Large ones, among others and all over, denormal ones, and infinities: open ones as they are, and nothing of closed ones."""
    masks = torch.rand(11, 40, 136) < 0.5
    bank, ids = sk.pack_bank(masks), torch.arange(11 * runs) // runs
    x, grad = torch.randn(11 * runs, 136).to(dtype), torch.randn(11 * runs, 40).to(dtype)
    weight = torch.randn(40, 136).clamp(-3, 3).to(dtype)
    if isinstance(size, str):
        weight *= torch.finfo(dtype).tiny / (4 if size == "tiny" else 64)
    else:
        weight.view(-1)[::17] = size
        weight[9, 3] = -size
    wide = [t.double() for t in (x, weight, grad)]
    results = all_three(x, weight, bank, ids, None, grad)[:2]
    theirs = reference.mixed_linear(x, weight, bank, ids), reference.mixed_linear_grad_input(grad, weight, bank, ids)
    exact = own(*wide[:2], masks, ids), torch.stack([g @ where_open(masks[t], wide[1]) for g, t in zip(wide[2], ids.tolist())])
    for result, their, right in zip(results, theirs, exact):
        if size == inf:
            assert torch.equal(result.isnan(), right.isnan())
            assert torch.equal(result.isinf(), right.isinf())
            finite = right.isfinite()
            result, their, right = result[finite], their[finite], right[finite]
        assert_as_good(result, their, right)


def test_many_rows(cpu_isa):
    """More than are taken at a time."""
    masks, bank, ids, x, weight, bias = draw(8200, 3, 2, 5)
    grad = torch.randn(8200, 2)
    y, d_x, _ = all_three(x, weight, bank, ids, bias, grad)
    effective = where_open(masks, weight)[ids]
    torch.testing.assert_close(y, torch.einsum("boi,bi->bo", effective, x) + bias, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(d_x, torch.einsum("boi,bo->bi", effective, grad), rtol=1e-4, atol=1e-5)


def test_strides_and_uneven_blocks(cpu_isa):
    masks, _, ids, x, weight, bias = draw(9, 70, 33, 12)
    bank = [block for part in masks.split([5, 1, 6]) for block in sk.pack_bank(part)]
    y = sk.mixed_linear(x, weight, bank, ids, bias)
    torch.testing.assert_close(y, own(x, weight, masks, ids, bias), rtol=1e-5, atol=1e-5)
    strided = (
        x.t().contiguous().t(),
        weight.t().contiguous().t(),
        torch.stack([ids, ids], 1)[:, 0],
        torch.stack([bias] * 2, 1)[:, 0],
    )
    assert not any(t.is_contiguous() for t in strided)
    assert torch.equal(sk.mixed_linear(strided[0], strided[1], bank, strided[2], strided[3]), y)


@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(0, 6, 4), (3, 0, 4), (3, 6, 0)])
def test_nothing_there(cpu_isa, rows, inputs, outputs):
    x, weight, bias = torch.randn(rows, inputs), torch.randn(outputs, inputs), torch.randn(outputs)
    bank = [torch.zeros((inputs * outputs + 511) // 512, 2, 64, dtype=torch.uint8)]
    ids, grad = torch.ones(rows, dtype=torch.int64), torch.randn(rows, outputs)
    y, d_x, d_weight = all_three(x, weight, bank, ids, bias, grad)
    assert torch.equal(y, bias.expand(rows, outputs))
    assert torch.equal(d_x, torch.zeros(rows, inputs))
    assert torch.equal(d_weight, torch.zeros(outputs, inputs))


@pytest.mark.parametrize("rows", [5, 68])
def test_gradients_twice(rows):
    _, bank, ids, x, weight, bias = draw(rows, 4, 3, 3, torch.float64)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    call = lambda x, w, b: sk.mixed_linear(x, w, bank, ids, b)  # noqa: E731
    assert gradcheck(call, leaves, fast_mode=rows > 10)
    assert gradgradcheck(call, leaves, fast_mode=True)


def test_gradients_are_those_of_the_rows(cpu_isa):
    masks, bank, ids, x, weight, bias = draw(20, 70, 9, 6)
    grad = torch.randn(20, 9)
    leaves, others = ([t.clone().requires_grad_() for t in (x, weight, bias)] for _ in range(2))
    sk.mixed_linear(leaves[0], leaves[1], bank, ids, leaves[2]).backward(grad)
    own(others[0], others[1], masks, ids, others[2]).backward(grad)
    for a, b in zip(leaves, others):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)


def test_autocast():
    masks, bank, ids, x, weight, bias = draw(6, 70, 9, 3)
    x.requires_grad_()
    with torch.autocast(DEVICE, torch.bfloat16):
        y = sk.mixed_linear(x, weight, bank, ids, bias)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), own(x, weight, masks, ids, bias), rtol=3e-2, atol=0.2)
    y.float().sum().backward()
    assert x.grad.dtype == torch.float32


def test_vmap_over_models_and_rows():
    masks, bank, ids, x, weight, _ = draw(6, 7, 4, 3)
    weights = torch.randn(5, 4, 7)
    result = torch.vmap(lambda w: sk.mixed_linear(x, w, bank, ids))(weights)
    torch.testing.assert_close(result, torch.stack([own(x, w, masks, ids) for w in weights]))
    batches, tasks = torch.randn(2, 6, 7), torch.randint(0, 3, (2, 6))
    result = torch.vmap(lambda x, t: sk.mixed_linear(x, weight, bank, t))(batches, tasks)
    torch.testing.assert_close(result, torch.stack([own(b, weight, masks, t) for b, t in zip(batches, tasks)]))


@compiled_only
def test_dispatched_calls_check_too():
    _, bank, ids, x, weight, _ = draw(5, 6, 4, 3)
    if not CUDA_KERNELS:  # values are not looked at where that would wait for the device
        with pytest.raises(RuntimeError, match="task_ids must be between 0 and 2, got 3 for row 2"):
            OPS.mixed_linear(x, weight, bank, torch.tensor([0, 1, 3, 0, 0]))
    with pytest.raises(RuntimeError, match="one id for each of 5 rows, got 4"):
        OPS.mixed_linear(x, weight, bank, ids[:4])
    with pytest.raises(RuntimeError, match="for 24 weights"):
        OPS.mixed_linear(x, weight, sk.pack_bank(torch.rand(3, 600) < 0.5), ids)
    with pytest.raises(RuntimeError, match="x and weight must have one dtype"):
        OPS.mixed_linear(x, weight.double(), bank, ids)


@cuda_kernels
@pytest.mark.parametrize("rows", [7, 300])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_ids_that_are_no_task_on_a_gpu(rows, dtype):
    """Their rows are NaN, the others are as without them, and they take no part in dW."""
    _, bank, ids, x, weight, bias = draw(rows, 70, 9, 5, dtype)
    grad = torch.randn(rows, 9).to(dtype)
    wrong = torch.arange(rows) % 3 == 1
    ids[wrong] = torch.tensor([5, -1, 2**40, -(2**63), 2**63 - 1]).repeat(rows)[: int(wrong.sum())]
    y, d_x, d_weight = all_three(x, weight, bank, ids, bias, grad, OPS.mixed_linear)
    right = all_three(x[~wrong], weight, bank, ids[~wrong], bias, grad[~wrong])
    assert y[wrong].isnan().all()
    assert d_x[wrong].isnan().all()
    for result, expected in zip((y[~wrong], d_x[~wrong], d_weight), right):
        assert torch.equal(result, expected)
    none = all_three(x, weight, bank, torch.full_like(ids, 5), bias, grad, OPS.mixed_linear)
    assert all(t.isnan().all() for t in none[:2])
    assert torch.equal(none[2], torch.zeros_like(weight))


# Rows up to 256 are sorted by comparing each with each, more of them digit by digit in pieces of 1,024.
@pytest.mark.parametrize("rows", [1, 2, 255, 256, 257, 1024, 1025, 3000])
@pytest.mark.parametrize("pattern", ["equal", "distinct", "sorted", "reversed", "random", "two"])
def test_rows_in_any_order(rows, pattern):
    """Ids of one, two and three digits; a bank of many blocks."""
    tasks = 300 if rows < 3000 else 2100
    masks = torch.rand(tasks, 3, 5) < 0.5
    bank = sk.pack_bank(masks)
    ids = {
        "equal": lambda: torch.full((rows,), tasks - 1),
        "distinct": lambda: torch.randperm(max(rows, tasks))[:rows] % tasks,
        "sorted": lambda: torch.arange(rows) * tasks // rows,
        "reversed": lambda: tasks - 1 - torch.arange(rows) * tasks // rows,
        "random": lambda: torch.randint(0, tasks, (rows,)),
        "two": lambda: torch.arange(rows) % 2 * (tasks - 1),
    }[pattern]()
    x, weight, grad = torch.randn(rows, 5), torch.randn(3, 5), torch.randn(rows, 3)
    y, d_x, d_weight = all_three(x, weight, bank, ids, None, grad)
    effective = where_open(masks, weight)[ids]
    torch.testing.assert_close(y, torch.einsum("boi,bi->bo", effective, x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(d_x, torch.einsum("boi,bo->bi", effective, grad), rtol=1e-4, atol=1e-5)
    exact = torch.einsum("bo,bi,boi->oi", grad.double(), x.double(), masks[ids].double())
    torch.testing.assert_close(d_weight.double(), exact, rtol=1e-4, atol=1e-3)
