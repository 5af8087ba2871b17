"""The Triton optimizer kernels against the reference: its error at most twice, nothing behind a frozen bit, nothing if skipped."""

import math

import pytest
import torch
from interpreter import DEVICE, INTERPRETED, apart, note_launches, only_where_kernels_run, poison, thinned
from test_update import (
    BAD,
    BAD_PAIRS,
    CASES,
    SPECIAL,
    assert_same_bits,
    call,
    clone,
    every_case,
    paired,
    problem,
    raw,
    some_frozen,
)

from subnet_kernels import reference

only_where_kernels_run()

from subnet_kernels.triton import update as kernels  # noqa: E402

FLOATS = [torch.float32, torch.float16] if INTERPRETED else [torch.float32, torch.float16, torch.bfloat16]
SIZES = [0, 1, 513, 1024, 2057]
SOME = thinned(["sgd-nesterov", "rmsprop-centered-momentum", "adamw-amsgrad"], 1)


@pytest.fixture(autouse=True)
def launched(monkeypatch):
    poison(monkeypatch)
    with torch.device(DEVICE):  # what the helpers of test_update make is there
        yield note_launches(monkeypatch)


def doubled(tensors):
    """The same call in float64; steps stay what they are."""
    return [[t.clone() if t.dim() == 0 and t.dtype == torch.float32 else t.double() for t in some] for some in tensors]


def error(tensors, exact):
    return [[(a.double() - b.double()).abs() for a, b in zip(*pair)] for pair in zip(tensors, exact)]


def assert_near(ours, theirs, exact):
    """Of each tensor, the largest error at most twice the reference's, and two units in the last place of its largest value."""
    for got, mine, other, true in zip(ours, error(ours, exact), error(theirs, exact), exact):
        for t, a, b, x in zip(got, mine, other, true):
            if t.numel():
                assert a.max() <= 2 * b.max() + 2 * torch.finfo(t.dtype).eps * x.double().abs().max()


@every_case
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_of_the_reference(case, dtype, launched):
    """Every rule, with and without a scale; bits of what is frozen."""
    for grad_scale in (None, 3.0):
        tensors = problem(case, SIZES, dtype)
        before, frozen = clone(tensors), some_frozen(tensors[0])
        theirs = call(reference, case, clone(tensors), frozen, grad_scale=grad_scale)
        exact = call(reference, case, doubled(tensors), frozen, grad_scale=grad_scale)
        ours = call(kernels, case, tensors, frozen, grad_scale=grad_scale)
        assert_near(ours, theirs, exact)
        for now, then in zip([ours[0], *ours[2:]], [before[0], *before[2:]]):
            for a, b, bits in zip(now, then, frozen):
                if bits is not None and a.dim():
                    mask = reference.unpack(bits, a.shape)
                    assert torch.equal(raw(a)[mask], raw(b)[mask])
        assert_same_bits([ours[1]], [before[1]])
    assert len(launched) == 2 * (len(SIZES) - 1)


@pytest.mark.parametrize("case", SOME)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_frozen_entries_keep_their_bits(case, dtype):
    """Whatever is in gradient, weight and state at frozen entries stays there and stays alone."""
    tensors = problem(case, SIZES, dtype)
    frozen = some_frozen(tensors[0])
    masks = [torch.zeros_like(p).bool() if f is None else reference.unpack(f, p.shape) for p, f in zip(tensors[0], frozen)]
    lists = tensors[: None if case.startswith("sgd") else -1]
    for some in lists:
        for t, mask in zip(some, masks):
            t[mask] = torch.tensor(SPECIAL).to(dtype)[torch.randint(len(SPECIAL), (int(mask.sum()),))]
    before = clone(tensors)
    call(kernels, case, tensors, frozen, lr=0.1)
    for now, then in zip(lists, before):
        for a, b, mask in zip(now, then, masks):
            assert torch.equal(raw(a)[mask], raw(b)[mask])
            assert a[~mask].isfinite().all()


@pytest.mark.parametrize("case", thinned(CASES, 2))
def test_overflow_changes_nothing(case):
    tensors = problem(case, SIZES)
    before = clone(tensors)
    call(kernels, case, tensors, some_frozen(tensors[0]), grad_scale=1024.0, found_inf=1.0)
    assert_same_bits(tensors, before)
    none = [None] * len(SIZES)
    assert_same_bits(call(kernels, case, clone(tensors), none, found_inf=0.0), call(kernels, case, tensors, none))


def test_maximum_keeps_nan():
    tensors = problem("adam-amsgrad", [20])
    tensors[4][0][3] = math.nan
    tensors[3][0][5] = math.nan
    call(kernels, "adam-amsgrad", tensors, [None])
    assert tensors[4][0].isnan().nonzero().flatten().tolist() == [3, 5]


@pytest.mark.parametrize("case", SOME)
def test_strides_and_another_dtype_of_gradient(case):
    """Bits are in logical order whatever the strides and addresses of parameter, gradient and state; each may have its own."""
    shape = (6, 10, 3, 5)
    tensors = problem(case, [shape] * 3)
    frozen = [reference.pack(torch.rand(shape) < 0.3) for _ in range(3)]
    tensors[1] = [t.half().float() for t in tensors[1]]
    want = call(kernels, case, clone(tensors), frozen)
    for lay in (lambda t, i: list(apart(t))[i % 3], lambda t, i: t.clone(memory_format=torch.channels_last)):
        moved = [[lay(t, i + j) if t.dim() else t.clone() for j, t in enumerate(some)] for i, some in enumerate(clone(tensors))]
        assert_same_bits([[t.contiguous() for t in some] for some in call(kernels, case, moved, frozen)], want)
    other = clone(tensors)
    other[1] = [t.half() for t in other[1]]
    got = call(kernels, case, other, frozen)
    assert_same_bits([got[0], *got[2:]], [want[0], *want[2:]])


@pytest.mark.parametrize("case", SOME)
def test_float64_is_the_reference(case, launched):
    """And may stand beside others in one call."""
    tensors, single = problem(case, [70], torch.float64), problem(case, [70])
    mixed = [a + b for a, b in zip(clone(tensors), clone(single))]
    want = call(reference, case, tensors, [None]), call(kernels, case, single, [None])
    launched.clear()
    assert_same_bits(call(kernels, case, mixed, [None, None]), [a + b for a, b in zip(*want)])
    assert len(launched) == 1


@pytest.mark.parametrize("case", SOME)
@pytest.mark.parametrize("fixed", [False, True])
def test_pairs_are_straight_through_and_a_step(case, fixed):
    tensors, frozen, extra = paired(case, [5, 1030], fixed=fixed)
    for some in tensors[:2]:
        for t in some:
            t.nan_to_num_(posinf=1.0)
    grads = reference.paired_gradients(tensors[0], tensors[1], **extra)
    want = clone(tensors)
    want[1] = [g.clone() for g in grads]
    call(kernels, case, want, frozen)
    got = call(kernels, case, tensors, frozen, **extra)
    assert_same_bits([got[0], *got[2:]], [want[0], *want[2:]])


def test_empty_lists(launched):
    for case in ("sgd", "rmsprop", "adam"):
        call(kernels, case, problem(case, []), [])
    assert not launched


@pytest.mark.parametrize("sentence", BAD)
def test_bad_arguments_get_a_sentence(sentence):
    tensors = problem("adam", [5, 700])
    frozen = [None, reference.pack(torch.ones(700, dtype=torch.bool))]
    BAD[sentence](tensors, frozen)
    before = clone(tensors)
    with pytest.raises(RuntimeError, match=sentence):
        call(kernels, "adam", tensors, frozen)
    assert all(torch.equal(a, b) for some, others in zip(tensors, before) for a, b in zip(some, others))


@pytest.mark.parametrize("sentence", [s for s in BAD_PAIRS if "float32 and of one size" not in s])
def test_bad_pairs_get_a_sentence(sentence):
    tensors, frozen, extra = paired("adam", [5])
    BAD_PAIRS[sentence](tensors, extra)
    with pytest.raises(RuntimeError, match=sentence):
        call(kernels, "adam", tensors, frozen, **extra)
