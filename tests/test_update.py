"""The optimizer kernels against the reference: every rule, instruction set, dtype and layout; and nothing behind a frozen bit."""

import math

import numpy as np
import pytest
import torch
from conftest import switch_isa
from device import ON_CPU, compiled_only, cpu_only

from subnet_kernels import ops, reference
from subnet_kernels.ops._library import LOADED, MISSING

SIZES = [0, 1, 15, 16, 17, 511, 512, 513, 3001]  # around a vector and a tile; prime
SPECIAL = [math.nan, math.inf, -math.inf, -0.0, 1e-40, 3e38]

# rule -> op, how many lists of state it takes, whether it counts steps, the options that follow lr, grad_scale and found_inf
SGD = dict(momentum=0.0, dampening=0.0, weight_decay=0.0, nesterov=False, maximize=False, first_step=False)
RMS = dict(alpha=0.99, eps=1e-8, weight_decay=0.0, momentum=0.0, centered=False, maximize=False)
ADAM = dict(beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0, amsgrad=False, maximize=False, decoupled=False)
CASES = {
    "sgd": ("sgd", SGD),
    "sgd-decay-maximize": ("sgd", SGD | dict(weight_decay=0.01, maximize=True)),
    "sgd-momentum-first": ("sgd", SGD | dict(momentum=0.9, first_step=True)),
    "sgd-momentum-dampening": ("sgd", SGD | dict(momentum=0.9, dampening=0.3, weight_decay=0.01)),
    "sgd-nesterov-first": ("sgd", SGD | dict(momentum=0.9, nesterov=True, first_step=True)),
    "sgd-nesterov": ("sgd", SGD | dict(momentum=0.9, nesterov=True)),
    "rmsprop": ("rmsprop", RMS),
    "rmsprop-momentum": ("rmsprop", RMS | dict(momentum=0.9, weight_decay=0.01)),
    "rmsprop-centered": ("rmsprop", RMS | dict(centered=True, maximize=True)),
    "rmsprop-centered-momentum": ("rmsprop", RMS | dict(centered=True, momentum=0.9)),
    "adam": ("adam", ADAM),
    "adam-decay-maximize": ("adam", ADAM | dict(weight_decay=0.01, maximize=True)),
    "adam-amsgrad": ("adam", ADAM | dict(amsgrad=True)),
    "adamw": ("adam", ADAM | dict(weight_decay=0.01, decoupled=True)),
    "adamw-amsgrad": ("adam", ADAM | dict(weight_decay=0.01, decoupled=True, amsgrad=True)),
}
every_case = pytest.mark.parametrize("case", CASES)


def lists_of(case):
    """Names of the lists of state that a case uses, in the order of its op."""
    rule, options = CASES[case]
    if rule == "sgd":
        return {"momentum_buffers": options["momentum"] != 0}
    if rule == "rmsprop":
        return {"square_avgs": True, "grad_avgs": options["centered"], "momentum_buffers": options["momentum"] > 0}
    return {"exp_avgs": True, "exp_avg_sqs": True, "max_exp_avg_sqs": options["amsgrad"]}


def problem(case, shapes=SIZES, dtype=torch.float32, step=3):
    """Tensors of one call: parameters, gradients, then the lists of state and the steps."""
    sizes = [(n,) if isinstance(n, int) else n for n in shapes]
    state = [[torch.rand(s).to(dtype) for s in sizes] if used else [] for used in lists_of(case).values()]
    if "centered" in case:  # a mean whose square is not above the mean of squares
        state[1] = [t.sqrt() / 2 for t in state[0]]
    steps = [[torch.tensor(float(step + i % 2)) for i in range(len(sizes))]] if CASES[case][0] != "sgd" else []
    return [[torch.randn(s).to(dtype) for s in sizes], [torch.randn(s).to(dtype) for s in sizes], *state, *steps]


def some_frozen(params, share=0.3):
    """None, some and all of a tensor frozen, in turn; None also as a mask without a bit."""
    kinds = [None, share, 1.0, 0.0]
    return [None if (s := kinds[i % 4]) is None else reference.pack(torch.rand(p.shape) < s) for i, p in enumerate(params)]


def clone(tensors):
    return [[t.clone() for t in some] for some in tensors]


def call(module, case, tensors, frozen, lr=0.01, grad_scale=None, found_inf=None, **changed):
    rule, options = CASES[case]
    options = options | changed  # pairs and beside come last
    device = tensors[0][0].device if tensors[0] else None
    scalars = [None if v is None else torch.tensor(v, device=device) for v in (grad_scale, found_inf)]
    rate = torch.tensor(lr, dtype=torch.float64, device=device)
    getattr(module, f"update_{rule}_")(*tensors, frozen, rate, *scalars, *options.values())
    return tensors


def raw(t):
    return t.view({8: torch.int64, 4: torch.int32, 2: torch.int16}[t.element_size()])


def assert_same_bits(got, want):
    for some, others in zip(got, want, strict=True):
        for a, b in zip(some, others, strict=True):
            assert torch.equal(raw(a), raw(b))


def assert_like_the_reference(got, want, frozen=()):
    """The reference's bits; elsewhere than on the CPU, where PyTorch contracts and divides as it likes, within some roundings."""
    if ON_CPU:
        assert_same_bits(got, want)
        return
    for some, others in zip(got, want, strict=True):
        for a, b in zip(some, others, strict=True):
            eps = torch.finfo(a.dtype).eps
            torch.testing.assert_close(a, b, rtol=8 * eps, atol=8 * eps, equal_nan=True)
    for p, q, bits in zip(got[0], want[0], frozen):
        if bits is not None:
            mask = reference.unpack(bits, p.shape)
            assert torch.equal(raw(p)[mask], raw(q)[mask])


@pytest.fixture
def exact_roots(monkeypatch):
    """Correctly rounded square roots in the reference: torch's own are off by one unit in the last place now and then."""
    if ON_CPU:
        monkeypatch.setattr(torch.Tensor, "sqrt", lambda t: torch.as_tensor(np.sqrt(t.numpy())))


@every_case
@pytest.mark.parametrize("grad_scale", [None, 3.0])
def test_bits_of_the_reference(cpu_isa, exact_roots, case, grad_scale):
    tensors = problem(case)
    frozen = some_frozen(tensors[0])
    want = call(reference, case, clone(tensors), frozen, grad_scale=grad_scale)
    assert_like_the_reference(call(ops, case, tensors, frozen, grad_scale=grad_scale), want, frozen)


@every_case
def test_float64(cpu_isa, exact_roots, case):
    tensors = problem(case, dtype=torch.float64)
    frozen = some_frozen(tensors[0])
    want = call(reference, case, clone(tensors), frozen)
    for some, others in zip(call(ops, case, tensors, frozen), want):
        for a, b in zip(some, others):
            # powers of beta may differ in the last place, and PyTorch contracts elsewhere than on the CPU
            torch.testing.assert_close(a, b, **(dict(rtol=1e-15, atol=1e-17) if ON_CPU else dict(rtol=2e-15, atol=2e-15)))


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_frozen_entries_keep_their_bits(cpu_isa, case, dtype):
    """Whatever is in gradient, weight and state at frozen entries stays there and stays alone."""
    tensors = problem(case, dtype=dtype)
    frozen = some_frozen(tensors[0])
    masks = [
        torch.zeros(p.shape, dtype=torch.bool) if f is None else reference.unpack(f, p.shape) for p, f in zip(tensors[0], frozen)
    ]
    counted = CASES[case][0] != "sgd"
    for some in tensors[: -1 if counted else None]:
        for t, mask in zip(some, masks):
            t[mask] = torch.tensor(SPECIAL).to(dtype)[torch.randint(len(SPECIAL), (int(mask.sum()),))]
    before = clone(tensors)
    call(ops, case, tensors, frozen, lr=0.1)
    for now, then in zip(tensors[: -1 if counted else None], before):
        for a, b, mask in zip(now, then, masks):
            assert torch.equal(raw(a)[mask], raw(b)[mask])
            assert a[~mask].isfinite().all()
    moved = torch.cat([(now != then)[~mask] for now, then, mask in zip(tensors[0], before[0], masks)])
    assert moved.float().mean() > 0.3  # in half precision many changes round to nothing
    if counted:
        assert [int(a) for a in tensors[-1]] == [int(b) + 1 for b in before[-1]]


TORCH = {
    "sgd-momentum-dampening": lambda p: torch.optim.SGD(p, 0.01, momentum=0.9, dampening=0.3, weight_decay=0.01, foreach=False),
    "rmsprop-centered-momentum": lambda p: torch.optim.RMSprop(p, 0.01, centered=True, momentum=0.9, foreach=False),
    "adam-amsgrad": lambda p: torch.optim.Adam(p, 0.01, amsgrad=True, foreach=False),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.01, foreach=False),
}


@pytest.mark.parametrize("case", TORCH)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_is_at_most_twice_that_of_torch(cpu_isa, case, dtype):
    """Three steps from nothing, against the formula in float64."""
    start = torch.randn(3001).to(dtype)
    grads = [torch.randn(3001).to(dtype) for _ in range(3)]
    counted = CASES[case][0] != "sgd"

    def ours(module, dtype):
        tensors = [[start.to(dtype)], [], *([torch.zeros(3001, dtype=dtype)] if used else [] for used in lists_of(case).values())]
        tensors += [[torch.zeros(())]] if counted else []
        for i, grad in enumerate(grads):
            tensors[1] = [grad.to(dtype)]
            call(module, case, tensors, [None], **({} if counted else {"first_step": i == 0}))
        return tensors[0][0].double()

    weight = torch.nn.Parameter(start.clone())
    optimizer = TORCH[case]([weight])
    for grad in grads:
        weight.grad = grad
        optimizer.step()
    exact = ours(reference, torch.float64)
    theirs = (weight.detach().double() - exact).abs()
    mine = (ours(ops, dtype) - exact).abs()
    floor = torch.finfo(dtype).eps * float(start.abs().max()) / 2
    assert mine.max() <= 2 * theirs.max() + floor
    assert mine.mean() <= 2 * theirs.mean() + floor / 10


@every_case
def test_strides(cpu_isa, case):
    """Bits are in logical order whatever the strides of parameter, gradient and state; each may have its own."""
    shape = (6, 10, 3, 5)
    tensors = problem(case, [shape] * 4)
    frozen = [None, None, *(reference.pack(torch.rand(shape) < 0.3) for _ in range(2))]
    want = call(ops, case, clone(tensors), frozen)
    last = torch.channels_last
    layouts = [lambda t: t.contiguous(memory_format=last), lambda t: t.transpose(0, 2).contiguous().transpose(0, 2)]
    layouts.append(lambda t: torch.stack([t, t], -1)[..., 1])
    everywhere = [[layouts[0](t) if t.dim() == 4 else t.clone() for t in some] for some in tensors]
    assert_same_bits(call(ops, case, everywhere, frozen), want)
    mixed = [[layouts[(i + j) % 3](t) if t.dim() == 4 else t.clone() for j, t in enumerate(s)] for i, s in enumerate(tensors)]
    assert_same_bits([[t.contiguous() for t in some] for some in call(ops, case, mixed, frozen)], want)


def test_expanded_gradient_and_offset():
    """A gradient with stride 0, as of a sum, and parameters that start anywhere in their storage."""
    store = torch.randn(1030)
    tensors = problem("adam", [1000])
    tensors[0] = [store[7:1007]]
    tensors[1] = [torch.tensor(0.5).expand(1000)]
    frozen = [reference.pack(torch.rand(1000) < 0.3)]
    same = [[store[7:1007].clone()], [torch.full((1000,), 0.5)], *clone(tensors[2:])]
    before = store.clone()
    assert_same_bits(call(ops, "adam", tensors, frozen), call(ops, "adam", same, frozen))
    assert torch.equal(store[:7], before[:7])
    assert torch.equal(store[1007:], before[1007:])


def test_gradient_of_another_dtype():
    tensors = problem("adam", [1000])
    tensors[1] = [tensors[1][0].bfloat16()]
    same = [tensors[0], [tensors[1][0].float()], *tensors[2:]]
    want = call(ops, "adam", clone(same), [None])
    got = call(ops, "adam", clone(tensors), [None])
    assert_same_bits([got[0], *got[2:]], [want[0], *want[2:]])


@cpu_only
@every_case
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_instruction_sets_agree(cpu_isa, case, dtype):
    tensors = problem(case, [700], dtype)
    frozen = [reference.pack(torch.rand(700) < 0.3)]
    got = call(ops, case, clone(tensors), frozen)
    switch_isa("portable")
    assert_same_bits(got, call(ops, case, tensors, frozen))


@cpu_only
@pytest.mark.parametrize("case", ["sgd-momentum-dampening", "rmsprop", "adam-amsgrad"])
def test_threads_agree(case):
    tensors = problem(case, [100_000, 7, 70_001, 30_000])
    frozen = some_frozen(tensors[0])
    torch.set_num_threads(1)
    want = call(ops, case, clone(tensors), frozen)
    torch.set_num_threads(2)
    assert_same_bits(call(ops, case, tensors, frozen), want)


@every_case
def test_overflow_changes_nothing(case):
    tensors = problem(case)
    before = clone(tensors)
    call(ops, case, tensors, some_frozen(tensors[0]), grad_scale=1024.0, found_inf=1.0)
    assert_same_bits(tensors, before)
    assert_same_bits(
        call(ops, case, clone(tensors), [None] * len(SIZES), found_inf=0.0), call(ops, case, tensors, [None] * len(SIZES))
    )


def test_maximum_keeps_nan():
    """amsgrad's maximum is torch.maximum: a NaN in either stays."""
    tensors = problem("adam-amsgrad", [20])
    tensors[4][0][3] = math.nan
    tensors[3][0][5] = math.nan
    call(ops, "adam-amsgrad", tensors, [None])
    assert tensors[4][0].isnan().nonzero().flatten().tolist() == [3, 5]


@pytest.mark.parametrize("case", ["sgd-momentum-dampening", "rmsprop-centered-momentum", "adam-amsgrad"])
def test_opcheck(case):
    rule, options = CASES[case]
    tensors = problem(case, [17, 513])
    arguments = (*tensors, some_frozen(tensors[0]), torch.tensor(0.01, dtype=torch.float64), None, None, *options.values())
    torch.library.opcheck(getattr(torch.ops.subnet_kernels, f"update_{rule}_").default, arguments)


def test_versions_move_with_what_is_written():
    tensors = problem("adam-amsgrad", [17, 513])
    before = [[t._version for t in some] for some in tensors]
    call(ops, "adam-amsgrad", tensors, [None, None])
    moved = [[t._version - v for t, v in zip(*pair)] for pair in zip(tensors, before)]
    assert moved == [[1, 1], [0, 0], [1, 1], [1, 1], [1, 1], [1, 1]]


def test_empty_lists():
    for case in ("sgd", "rmsprop", "adam"):
        call(ops, case, problem(case, []), [])


BAD = {
    "update_adam_: expected 2 gradients, got 1": lambda t, f: t[1].pop(),
    "update_adam_: expected 2 frozen masks": lambda t, f: f.pop(),
    "update_adam_: expected 2 tensors in each list of state, got 1": lambda t, f: t[3].pop(),
    "update_adam_: expected 2 steps, got 1": lambda t, f: t[5].pop(),
    "must have its shape, 5 elements, got 6": lambda t, f: t[2].__setitem__(0, torch.zeros(6)),
    "the state of parameter 1 must have its dtype": lambda t, f: t[2].__setitem__(1, torch.zeros(700).double()),
    "bits must be contiguous uint8 with 64 bytes for 5 weights, got 128": lambda t, f: f.__setitem__(0, f[1]),
    "steps must be float32": lambda t, f: t[5].__setitem__(0, torch.tensor(1)),
    "parameters must be float32, float64, bfloat16 or float16": lambda t, f: t[0].__setitem__(
        0, torch.zeros(5, dtype=torch.int32)
    ),
}


@compiled_only
@pytest.mark.parametrize("sentence", BAD)
def test_bad_arguments_get_a_sentence(sentence):
    tensors = problem("adam", [5, 700])
    frozen = [None, reference.pack(torch.ones(700, dtype=torch.bool))]
    BAD[sentence](tensors, frozen)
    before = clone(tensors)
    with pytest.raises(RuntimeError, match=sentence):
        call(ops, "adam", tensors, frozen)
    assert all(torch.equal(a, b) for some, others in zip(tensors, before) for a, b in zip(some, others))


# ------------------------------------------------------------------------------------- weights and scores with one gradient


def paired(case, sizes=SIZES, fixed=False):
    """Tensors of one call, with the pairs in it and what is beside them: (dense, weight, scores, dense, weight, ...)."""
    shapes, pairs, beside = [], [], []
    for i, n in enumerate(sizes):
        at = len(shapes)
        shapes += [7, n] if fixed else [7, n, n]
        pairs += [at + 1 if fixed else at + 2, -1 if fixed else at + 1, i % 2]
        beside.append(torch.randn(n) if fixed else reference.pack(torch.rand(n) < 0.3))
    tensors = problem(case, shapes)
    for k, n in enumerate(sizes):
        scores, weight = pairs[3 * k], pairs[3 * k + 1]
        if n > 3:
            tensors[0][scores][:3] = torch.tensor([0.0, -0.0, math.nan])
            tensors[1][scores][1:4] = torch.tensor([0.0, math.inf, -0.0])
        if weight >= 0:
            tensors[1][weight] = tensors[1][scores]
    frozen = some_frozen(tensors[0])
    for k in range(len(sizes)):
        frozen[pairs[3 * k]] = None
    return tensors, frozen, dict(pairs=pairs, beside=beside)


def separate(tensors, pairs, beside):
    """The same call with gradients made by straight_through."""
    tensors = clone(tensors)
    for k, other in enumerate(beside):
        s, w, magnitude = pairs[3 * k : 3 * k + 3]
        grad, scores = tensors[1][s], tensors[0][s]
        weight, packed = (tensors[0][w], other) if w >= 0 else (other, reference.pack(torch.ones_like(other) > 0))
        by = "magnitude" if magnitude else "value"
        made = torch.ops.subnet_kernels.straight_through.default(grad, weight, scores, packed, None, by)
        tensors[1][s] = made[1]
        if w >= 0:
            tensors[1][w] = made[0]
    return tensors


def assert_same_but_gradients(got, want, same=assert_same_bits):
    nan = lambda some: [torch.where(t.isnan(), torch.full_like(t, math.nan), t) for t in some]  # noqa: E731
    same([nan(some) for some in (got[0], *got[2:])], [nan(some) for some in (want[0], *want[2:])])


@every_case
@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("grad_scale", [None, 3.0])
def test_pairs_are_straight_through_and_a_step(cpu_isa, case, fixed, grad_scale):
    tensors, frozen, extra = paired(case, fixed=fixed)
    fixed_before = [t.clone() for t in extra["beside"]]
    want = call(ops, case, separate(tensors, **extra), frozen, grad_scale=grad_scale)
    assert_same_but_gradients(call(ops, case, clone(tensors), frozen, grad_scale=grad_scale, **extra), want)
    assert all(torch.equal(raw(a) if fixed else a, raw(b) if fixed else b) for a, b in zip(extra["beside"], fixed_before))


@every_case
@pytest.mark.parametrize("fixed", [False, True])
def test_pairs_of_the_reference(exact_roots, case, fixed):
    tensors, frozen, extra = paired(case, fixed=fixed)
    want = call(reference, case, clone(tensors), frozen, **extra)
    assert_same_but_gradients(call(ops, case, tensors, frozen, **extra), want, assert_like_the_reference)


@cpu_only
@cpu_only
@pytest.mark.parametrize("case", ["sgd-momentum-dampening", "rmsprop", "adam-amsgrad"])
def test_threads_agree_on_pairs(case):
    tensors, frozen, extra = paired(case, [100_003, 7, 70_001])
    torch.set_num_threads(1)
    want = call(ops, case, clone(tensors), frozen, **extra)
    torch.set_num_threads(2)
    assert_same_but_gradients(call(ops, case, tensors, frozen, **extra), want)


def test_pairs_with_other_strides_of_gradient_and_state():
    tensors, frozen, extra = paired("adam", [513])
    want = call(ops, "adam", clone(tensors), frozen, **extra)
    apart = clone(tensors)
    for some in apart[1:4]:
        some[1:] = [torch.stack([t, t], -1)[..., 1] for t in some[1:]]
    assert_same_but_gradients([[t.contiguous() for t in some] for some in call(ops, "adam", apart, frozen, **extra)], want)


def test_overflow_changes_no_pair():
    tensors, frozen, extra = paired("adam")
    before = clone(tensors)
    call(ops, "adam", tensors, frozen, grad_scale=1024.0, found_inf=1.0, **extra)
    assert_same_bits(tensors, before)


@pytest.mark.parametrize("case", ["sgd-momentum-dampening", "rmsprop-centered-momentum", "adam-amsgrad"])
def test_opcheck_of_pairs(case):
    tensors, frozen, extra = paired(case, [17, 513])
    for t in tensors[0]:
        t.nan_to_num_()
    for t in tensors[1]:
        t.nan_to_num_(posinf=1.0)
    tensors[1] = [t.clone() for t in tensors[1]]
    rule, options = CASES[case]
    scalars = (torch.tensor(0.01, dtype=torch.float64), None, None)
    torch.library.opcheck(
        getattr(torch.ops.subnet_kernels, f"update_{rule}_").default,
        (*tensors, frozen, *scalars, *options.values(), *extra.values()),
    )


BAD_PAIRS = {
    "expected three numbers for each tensor beside a pair, got 2": lambda t, e: e["pairs"].pop(),
    "a pair must name parameters of this call, each once, got 9": lambda t, e: e["pairs"].__setitem__(0, 9),
    "a pair must name parameters of this call, each once, got 2": lambda t, e: e["pairs"].__setitem__(1, 2),
    "a weight and scores with one gradient must be contiguous, float32 and of one size": lambda t, e: e["pairs"].__setitem__(
        1, 0
    ),
    "bits must be contiguous uint8 with 64 bytes for 5 weights, got 5": lambda t, e: e["beside"].__setitem__(
        0, torch.zeros(5, dtype=torch.uint8)
    ),
}


@compiled_only
@pytest.mark.parametrize("sentence", BAD_PAIRS)
def test_bad_pairs_get_a_sentence(sentence):
    tensors, frozen, extra = paired("adam", [5])
    BAD_PAIRS[sentence](tensors, extra)
    before = clone(tensors)
    with pytest.raises(RuntimeError, match=sentence):
        call(ops, "adam", tensors, frozen, **extra)
    assert all(torch.equal(raw(a), raw(b)) for some, others in zip(tensors, before) for a, b in zip(some, others))


# -------------------------------------------------------------------------------- how the work is cut, and where tensors begin

BORDERS = [2047, 2048, 2049, 4095, 4096, 4097, 8191, 8192, 8193]  # around what a block of the CUDA kernels takes, for each dtype
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
every_dtype = pytest.mark.parametrize("dtype", DTYPES)


@every_case
@every_dtype
def test_a_tensor_is_stepped_as_its_pieces_are(case, dtype):
    n, piece = 8200, 100
    tensors = problem(case, [n], dtype)
    mask = torch.rand(n) < 0.3
    mask[2000:3000] = mask[8192:] = True
    counted = CASES[case][0] != "sgd"
    lists = tensors[:-1] if counted else tensors
    pieces = [[t.clone() for t in some[0].split(piece)] if some else [] for some in lists]
    pieces += [[tensors[-1][0].clone() for _ in pieces[0]]] if counted else []
    call(ops, case, tensors, [reference.pack(mask)], grad_scale=3.0)
    call(ops, case, pieces, [reference.pack(m) for m in mask.split(piece)], grad_scale=3.0)
    assert_same_bits(lists, [[torch.cat(some)] if some else [] for some in pieces[: len(lists)]])


def anywhere(t, by):
    """A copy that begins `by` elements after its storage does."""
    store = torch.full((t.numel() + by + 3,), math.nan, dtype=t.dtype, device=t.device)
    view = store[by : by + t.numel()].view(t.shape)
    view.copy_(t)
    return view


def assert_nothing_beside(t, by):
    store = torch.empty(0, dtype=t.dtype, device=t.device).set_(t.untyped_storage())
    assert store[:by].isnan().all()
    assert store[by + t.numel() :].isnan().all()


@every_case
@every_dtype
@pytest.mark.parametrize("alone", [None, 0, 1, 2])
def test_tensors_may_begin_anywhere(case, dtype, alone):
    """All of them, or those of one list alone."""
    tensors = problem(case, [1, 9, 2061], dtype)
    frozen = [reference.pack(torch.rand(p.shape) < 0.3) for p in tensors[0]]
    want = call(ops, case, clone(tensors), frozen)
    lists = [i for i, some in enumerate(tensors) if some and some[0].dim() == 1 and alone in (None, i)]
    for i in lists:
        tensors[i] = [anywhere(t, 1 + i) for t in tensors[i]]
    assert_same_bits(call(ops, case, tensors, frozen), want)
    for i in lists:
        for t in tensors[i]:
            assert_nothing_beside(t, 1 + i)


def joined(problems):
    return [[t for some in lists for t in some] for lists in zip(*problems)]


@pytest.mark.parametrize("case", ["sgd", "sgd-nesterov", "rmsprop-centered-momentum", "adamw-amsgrad"])
@pytest.mark.parametrize("count", [6, 7, 24, 25, 300, 330])
def test_many_tensors_of_all_dtypes_in_one_call(case, count):
    sizes = [(37 * i) % 151 for i in range(count)]
    problems = [problem(case, [n], DTYPES[i * i % 7 % 4], step=i % 5) for i, n in enumerate(sizes)]
    frozen = [some_frozen([p[0][0]] * 2)[i % 2] for i, p in enumerate(problems)]
    want = joined([call(ops, case, clone(p), [f]) for p, f in zip(problems, frozen)])
    assert_same_bits(call(ops, case, joined(problems), frozen), want)


@pytest.mark.parametrize("case", ["rmsprop", "adam"])
def test_steps_are_counted_exactly(case):
    """Also of tensors without elements; not where gradients overflowed; and up to where float32 can count."""
    tensors = problem(case, [0, 5, 5000, 0], step=0)
    tensors[-1][3].fill_(2.0**24 - 1)
    before = [int(t) for t in tensors[-1]]
    for i, found_inf in enumerate([None, 0.0, 1.0, None]):
        call(ops, case, tensors, [None] * 4, found_inf=found_inf)
        counted = (1, 2, 2, 3)[i]
        assert [int(t) for t in tensors[-1]] == [min(b + counted, 2**24) for b in before]


@every_case
@pytest.mark.parametrize("alone", [None, 1, 2])
def test_pairs_may_begin_anywhere(case, alone):
    """All tensors, or of each pair the weight, or the scores, alone."""
    tensors, frozen, extra = paired(case, [1, 9, 4097])
    want = call(ops, case, clone(tensors), frozen, **extra)
    for i, some in enumerate(tensors):
        if some and some[0].dim() == 1:
            tensors[i] = [anywhere(t, 1 + i) if alone in (None, k % 3) else t for k, t in enumerate(some)]
    assert_same_but_gradients(call(ops, case, tensors, frozen, **extra), want)


@every_case
def test_a_weight_beside_scores_may_begin_anywhere(case):
    tensors, frozen, extra = paired(case, [9, 4097], fixed=True)
    want = call(ops, case, clone(tensors), frozen, **extra)
    extra["beside"] = [anywhere(t, 1) for t in extra["beside"]]
    assert_same_but_gradients(call(ops, case, tensors, frozen, **extra), want)


@pytest.mark.parametrize("case", ["sgd-nesterov", "rmsprop", "adam-amsgrad"])
@pytest.mark.parametrize("fixed", [False, True])
def test_pairs_of_any_size(case, fixed):
    tensors, frozen, extra = paired(case, BORDERS, fixed)
    want = call(ops, case, separate(tensors, **extra), frozen, grad_scale=3.0)
    assert_same_but_gradients(call(ops, case, tensors, frozen, grad_scale=3.0, **extra), want)


@pytest.mark.parametrize("shape", [(40, 23, 3, 3), (64, 129), (5, 1, 7, 11, 13), (3, 2, 3, 2, 5, 2, 3)])
@pytest.mark.parametrize("case", ["sgd-nesterov", "adam"])
@every_dtype
def test_memory_order(case, shape, dtype):
    """Dense tensors in any one order: dimensions reversed, all but the first reversed, the second last, and every other first."""
    dims = list(range(len(shape)))
    orders = [dims[::-1], [0, *dims[:0:-1]], [0, *dims[2:], 1], dims[1::2] + dims[::2]]
    tensors = problem(case, [shape] * len(orders), dtype)
    frozen = [reference.pack(torch.rand(shape) < 0.3) for _ in orders]
    want = call(ops, case, clone(tensors), frozen)
    back = [sorted(dims, key=order.__getitem__) for order in orders]
    ordered = [
        [t.permute(o).contiguous().permute(b) for t, o, b in zip(some, orders, back)] if some and some[0].dim() else some
        for some in tensors
    ]
    assert_same_bits([[t.contiguous() for t in some] for some in call(ops, case, ordered, frozen)], want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_averages_below_the_normal_numbers_end(cpu_isa, dtype):
    """Without a gradient an average decays to 0 and not to a number that slows every later step; a frozen one keeps its bits."""
    small = torch.finfo(torch.promote_types(dtype, torch.float32)).tiny / 4
    of = lambda value: torch.full((600,), value, dtype=dtype)  # noqa: E731
    weight, averages = of(1.0), [of(small), of(small)]
    frozen = reference.pack(torch.arange(600) < 300)
    step, lr = torch.tensor(5.0), torch.tensor(0.1, dtype=torch.float64)
    ops.update_adam_(
        [weight],
        [of(0.0)],
        averages[:1],
        averages[1:],
        [],
        [step],
        [frozen],
        lr,
        None,
        None,
        0.9,
        0.999,
        1e-8,
        0.0,
        False,
        False,
        False,
    )
    for average in averages:
        assert torch.equal(average[:300], of(small)[:300])
        assert torch.equal(average[300:], of(0.0)[300:])
    assert torch.equal(weight, of(1.0))


# ----------------------------------------------------------------------------------------------------------------- on a GPU


@pytest.fixture
def cuda():
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
    if "_C_cuda" not in LOADED:
        pytest.skip(f"no compiled CUDA ops: {MISSING['_C_cuda']}")
    with torch.device("cpu"):  # whatever the default device is, these compare the two
        yield torch.device("cuda")


def moved(tensors, device):
    """Copies on a device with the same strides."""
    return [None if t is None else t.clone().to(device) for t in tensors]


def assert_bits_of_the_cpu(case, tensors, frozen, dtype=torch.float32, **arguments):
    """The CUDA op gives what the CPU op gives, NaNs by whatever bits: to the bit but in float64, whose powers of beta may differ."""
    of = {}
    for device in ("cuda", "cpu"):
        there = [moved(some, device) for some in tensors]
        extra = {k: moved(v, device) if k == "beside" else v for k, v in arguments.items()}
        of[device] = call(ops, case, there, moved(frozen, device), **extra)
        assert [[t.stride() for t in some] for some in there] == [[t.stride() for t in some] for some in tensors]
    for got, want in zip((of["cuda"][0], *of["cuda"][2:]), (of["cpu"][0], *of["cpu"][2:])):
        for a, b in zip(moved(got, "cpu"), want, strict=True):
            if dtype == torch.float64:
                torch.testing.assert_close(a, b, rtol=1e-14, atol=1e-16, equal_nan=True)
            else:
                assert torch.equal(a.isnan(), b.isnan())
                assert torch.equal(raw(a)[~b.isnan()], raw(b)[~b.isnan()])


@every_case
@every_dtype
@pytest.mark.parametrize("grad_scale", [None, 3.0])
def test_cuda_gives_the_bits_of_the_cpu(cuda, case, dtype, grad_scale):
    tensors = problem(case, [*SIZES, *BORDERS, 100_003], dtype)
    assert_bits_of_the_cpu(case, tensors, some_frozen(tensors[0]), dtype, grad_scale=grad_scale)


@every_case
@every_dtype
def test_cuda_keeps_the_bits_of_frozen_entries(cuda, case, dtype):
    tensors = problem(case, [*SIZES, 4097], dtype)
    frozen = some_frozen(tensors[0])
    masks = [torch.zeros(p.shape) > 0 if f is None else reference.unpack(f, p.shape) for p, f in zip(tensors[0], frozen)]
    lists = [i for i, some in enumerate(tensors) if some and some[0].dim() == 1]  # all but the steps
    for i in lists:
        for t, mask in zip(tensors[i], masks):
            t[mask] = torch.tensor(SPECIAL).to(dtype)[torch.randint(len(SPECIAL), (int(mask.sum()),))]
    there = [moved(some, cuda) for some in tensors]
    call(ops, case, there, moved(frozen, cuda), lr=0.1)
    for i in lists:
        for a, b, mask in zip(*(moved(some, "cpu") for some in (there[i], tensors[i], masks))):
            assert torch.equal(raw(a)[mask], raw(b)[mask])
            assert a[~mask].isfinite().all()


@every_case
@pytest.mark.parametrize("fixed", [False, True])
def test_cuda_pairs_give_the_bits_of_the_cpu(cuda, case, fixed):
    tensors, frozen, extra = paired(case, [*SIZES, *BORDERS], fixed)
    assert_bits_of_the_cpu(case, tensors, frozen, grad_scale=3.0, **extra)


@every_case
@every_dtype
def test_cuda_strides_give_the_bits_of_the_cpu(cuda, case, dtype):
    shape = (24, 10, 3, 5)
    tensors = problem(case, [shape] * 4, dtype)
    frozen = some_frozen(tensors[0])
    layouts = [
        lambda t: t.contiguous(memory_format=torch.channels_last),
        lambda t: t.transpose(0, 2).contiguous().transpose(0, 2),
    ]
    for change in (lambda i, j: 0, lambda i, j: 1, lambda i, j: (i + j) % 2):
        strided = [
            [layouts[change(i, j)](t) if t.dim() == 4 else t.clone() for j, t in enumerate(some)]
            for i, some in enumerate(tensors)
        ]
        assert_bits_of_the_cpu(case, strided, frozen, dtype)


@pytest.mark.parametrize("case", ["sgd-nesterov", "rmsprop", "adam-amsgrad"])
def test_cuda_steps_in_a_graph_and_without_waiting(cuda, case):
    tensors, frozen, extra = paired(case, [513, 4097])
    tensors = [moved([t.nan_to_num(posinf=1.0) for t in some], cuda) for some in tensors]
    frozen, extra["beside"] = moved(frozen, cuda), moved(extra["beside"], cuda)
    eager = clone(tensors)
    rule, options = CASES[case]
    scalars = [torch.tensor(0.01, device=cuda), torch.tensor(2.0, device=cuda), torch.tensor(0.0, device=cuda)]
    step = lambda some: getattr(ops, f"update_{rule}_")(*some, frozen, *scalars, *options.values(), *extra.values())  # noqa: E731
    step(clone(tensors))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(tensors)
    for found_inf in (0.0, 1.0, 0.0, 0.0):
        scalars[2].fill_(found_inf)
        graph.replay()
        torch.cuda.set_sync_debug_mode("error")
        try:
            step(eager)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert_same_but_gradients(tensors, eager)


def test_cuda_refuses_tensors_elsewhere(cuda):
    tensors = [moved(some, cuda) for some in problem("adam", [5, 700])]
    options = ADAM.values()
    with pytest.raises(RuntimeError, match="update_adam_: lr must be on cuda:0, as the first tensor is"):
        ops.update_adam_(*tensors, [None, None], torch.tensor(0.01, device="cpu"), None, None, *options)
    tensors[5][1] = tensors[5][1].cpu()
    with pytest.raises(RuntimeError, match="update_adam_: every step must be on cuda:0, as the first tensor is"):
        ops.update_adam_(*tensors, [None, None], torch.tensor(0.01, device=cuda), None, None, *options)
