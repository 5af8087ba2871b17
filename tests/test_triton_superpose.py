"""The Triton kernels of superpose and its gradient against the reference: exactly where every sum is exact, else by their error."""

import math

import pytest
import torch
from interpreter import DEVICE, INTERPRETED, apart, note_launches, only_where_kernels_run, poison, thinned

from subnet_kernels import reference

only_where_kernels_run()

from subnet_kernels.triton import superpose as kernels  # noqa: E402

FLOATS = [torch.float32, torch.float16] if INTERPRETED else [torch.float32, torch.float16, torch.bfloat16]
TASKS = [1, 7, 8, 9, 64, 65, 300]  # around a group of masks, a block and the blocks of a launch
SIZES = [1, 31, 33, 511, 512, 513, 2049, 5003]
NAN, INF = math.nan, math.inf


@pytest.fixture(autouse=True)
def launched(monkeypatch):
    poison(monkeypatch)
    return note_launches(monkeypatch)


def bank_of(tasks, *shape, density=0.3):
    masks = torch.rand(tasks, *shape, device=DEVICE) < density
    return masks, reference.pack_bank(masks)


def random(*shape, dtype=torch.float32):
    return torch.randn(*shape, device=DEVICE).to(dtype)


def near(ours, theirs, exact):
    """Error against float64 at most twice the reference's in the same dtype, and one rounding of the largest for few terms."""
    assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
    assert ours.is_contiguous()
    ulp = torch.finfo(ours.dtype).eps * exact.abs().max().item()
    error = lambda t: (t.double() - exact).pow(2).mean().sqrt().item()  # noqa: E731
    return error(ours) <= 2 * error(theirs) + ulp


CASES = [(tasks, n, dtype) for tasks in TASKS for n in SIZES for dtype in FLOATS]


@pytest.mark.parametrize(("tasks", "n", "dtype"), thinned(CASES, 7), ids=str)
def test_superpose(tasks, n, dtype):
    _, bank = bank_of(tasks, n)
    weight, alphas = random(n, dtype=dtype), random(tasks, dtype=dtype)
    exact = reference.superpose(weight.double(), bank, alphas.double())
    assert near(kernels.superpose(weight, bank, alphas), reference.superpose(weight, bank, alphas), exact)


@pytest.mark.parametrize(("tasks", "n", "dtype"), thinned(CASES, 7, 3), ids=str)
def test_equal_alphas(tasks, n, dtype):
    masks, bank = bank_of(tasks, n)
    weight, counts = random(n, dtype=dtype), masks.sum(0, dtype=torch.int32)
    theirs, exact = reference.superpose(weight, bank, None), reference.superpose(weight.double(), bank, None)
    ours = kernels.superpose(weight, bank, None)
    assert torch.equal(ours, theirs) if dtype == torch.float32 else near(ours, theirs, exact)
    assert torch.equal(kernels.superpose_counts(weight, counts, tasks), ours)


@pytest.mark.parametrize(("tasks", "n", "dtype"), thinned(CASES, 7, 5), ids=str)
def test_gradient(tasks, n, dtype):
    _, bank = bank_of(tasks, n)
    weight, grad = random(n, dtype=dtype), random(n, dtype=dtype)
    exact = reference.superpose_grad(grad.double(), weight.double(), bank)
    ours = kernels.superpose_grad(grad, weight, bank)
    assert near(ours, reference.superpose_grad(grad, weight, bank), exact)
    assert torch.equal(ours, kernels.superpose_grad(grad, weight, bank))


def test_rows():
    """Rows of alphas, or of gradients, are as many calls."""
    for tasks in (5, 270):
        _, bank = bank_of(tasks, 7, 90)
        weight, alphas, grads = random(7, 90), random(2, tasks), random(2, 7, 90)
        each = torch.stack([kernels.superpose(weight, bank, a) for a in alphas])
        assert torch.equal(kernels.superpose(weight, bank, alphas), each)
        each = torch.stack([kernels.superpose_grad(g, weight, bank) for g in grads])
        assert torch.equal(kernels.superpose_grad(grads, weight, bank), each)
        assert kernels.superpose(weight, bank, alphas[:0]).shape == (0, 7, 90)
        assert kernels.superpose_grad(grads[:0], weight, bank).shape == (0, tasks)


def test_more_chunks_than_tiles_of_one():
    n = 300 * 512
    _, bank = bank_of(2, n)
    weight, grad = random(n), random(n)
    exact = reference.superpose_grad(grad.double(), weight.double(), bank)
    assert near(kernels.superpose_grad(grad, weight, bank), reference.superpose_grad(grad, weight, bank), exact)


def test_closed_masks_do_not_matter():
    """An infinite alpha, weight or product reaches only what its mask opens; open weights of alphas that cancel are weight times 0."""
    masks, bank = bank_of(9, 600)
    alphas = torch.ones(9, device=DEVICE)
    alphas[4] = INF
    result = kernels.superpose(torch.ones(600, device=DEVICE), bank, alphas)
    assert torch.equal(result.isinf(), masks[4])
    assert torch.equal(result[~masks[4]], masks[:, ~masks[4]].sum(0).float())
    masks[:, ::2] = False
    bank = reference.pack_bank(masks)
    weight = random(600)
    weight[::4], weight[2::4] = NAN, -INF
    assert torch.equal(kernels.superpose(weight, bank, alphas.nan_to_num())[::2], torch.zeros(300, device=DEVICE))
    assert torch.equal(kernels.superpose(weight, bank, None)[::2], torch.zeros(300, device=DEVICE))
    assert kernels.superpose_grad(weight, weight, bank).isfinite().all()
    two = reference.pack_bank(torch.ones(2, 3, dtype=torch.bool, device=DEVICE))
    cancel = kernels.superpose(torch.tensor([1.0, -2.0, INF], device=DEVICE), two, torch.tensor([1.0, -1.0], device=DEVICE))
    assert cancel.signbit()[:2].tolist() == [False, True]
    assert cancel[2].isnan()


def test_uneven_blocks_and_strides():
    masks = torch.rand(12, 8, 6, 5, device=DEVICE) < 0.4
    bank = [block for part in masks.split([5, 1, 6]) for block in reference.pack_bank(part)]
    bank.insert(1, bank[0][:, :0])
    weight, alphas, grad = random(8, 6, 5), random(12), random(8, 6, 5)
    want, slopes = kernels.superpose(weight, bank, alphas), kernels.superpose_grad(grad, weight, bank)
    assert near(want, reference.superpose(weight, bank, alphas), reference.superpose(weight.double(), bank, alphas.double()))
    assert near(
        slopes,
        reference.superpose_grad(grad, weight, bank),
        reference.superpose_grad(grad.double(), weight.double(), bank),
    )
    for w, a, g, first in zip(apart(weight), apart(alphas), apart(grad), apart(bank[0])):
        assert torch.equal(kernels.superpose(w, [first, *bank[1:]], a), want)
        assert torch.equal(kernels.superpose_grad(g, w, [first, *bank[1:]]), slopes)


def test_what_the_kernels_do_not_serve(launched):
    _, bank = bank_of(3, 70)
    weight, counts = random(70), torch.ones(70, dtype=torch.int32, device=DEVICE)
    for w, a in ((weight.double(), random(3).double()), (weight.double(), None)):
        assert torch.equal(kernels.superpose(w, bank, a), reference.superpose(w, bank, a))
    assert torch.equal(
        kernels.superpose_counts(weight.double(), counts, 3), reference.superpose_counts(weight.double(), counts, 3)
    )
    slopes = kernels.superpose_grad(weight.half(), weight, bank)
    assert torch.equal(slopes, reference.superpose_grad(weight.half(), weight, bank))
    empty = torch.zeros(0, 4, device=DEVICE)
    none = reference.pack_bank(torch.zeros(3, 0, 4, dtype=torch.bool, device=DEVICE))
    assert kernels.superpose(empty, none, random(3)).shape == (0, 4)
    assert kernels.superpose_grad(empty, empty, none).tolist() == [0.0, 0.0, 0.0]
    assert not launched


def test_refuses():
    _, bank = bank_of(3, 70)
    weight, counts = random(70), torch.ones(70, dtype=torch.int32, device=DEVICE)
    for call, sentence in (
        (lambda: kernels.superpose(weight, bank, random(4)), "one for each of 3 tasks, got 4"),
        (lambda: kernels.superpose(random(700), bank, random(3)), r"must be uint8 \(2, at most 64, 64\) for 700 weights"),
        (lambda: kernels.superpose(weight.int(), bank, random(3)), "superpose: weight must be float64"),
        (lambda: kernels.superpose_counts(weight, counts[1:], 3), "counts must be int32, one for each of 70 weights, got 69"),
        (
            lambda: kernels.superpose_grad(weight[1:], weight, bank),
            "superpose_grad: grad must have the 70 elements of weight, got 69",
        ),
    ):
        with pytest.raises(RuntimeError, match=sentence):
            call()
