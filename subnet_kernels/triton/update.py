"""update_sgd_, update_rmsprop_, update_adam_: optimizer steps that leave frozen weights and their state bit-identical.

Every step is computed in float32 from numbers that a few small operations of PyTorch make on the device, and selected where weights
are neither frozen nor skipped. A weight and its scores with one gradient get theirs from the op `straight_through` first.
Parameters or state that a kernel cannot write where they lie are copied and copied back. float64 takes the reference's step, which
waits for `found_inf` where there is one.
"""

from collections.abc import Callable, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from subnet_kernels import reference
from subnet_kernels.triton._build import NAMES, Build, on_device, plain
from subnet_kernels.triton._packed import check, check_bits, check_lengths, each, opened, places, step_of

# -------------------------------------------------------------------------------------------------------------- kernels

# Numbers of a step, float32, a row for each parameter or one for all: what the change is multiplied with, what is added to a root,
# what the weight is multiplied with first, the gradient's scale, and whether the step is skipped.
_RATE, _EPS, _DECAY, _SCALE, _SKIP, _NUMBERS = (tl.constexpr(i) for i in range(6))


@triton.jit
def _live(frozen, numbers, has_frozen, n, BLOCK: tl.constexpr):
    """(BLOCK // 8, 8) bool: the weights of this program that the step may move."""
    live = (places(BLOCK) < n) & (tl.load(numbers + _SKIP).to(tl.int32) == 0)
    if has_frozen != 0:
        live = live & (opened(frozen, n, BLOCK) == 0)
    return live


@triton.jit
def _load(p, at, n):
    return tl.load(p + at, mask=at < n, other=0.0).to(tl.float32)


@triton.jit
def _store(p, at, value, live, n):
    """Where live; elsewhere the bits that are there go back, which costs less than stores that are not wide."""
    before = tl.load(p + at, mask=at < n, other=0.0)
    tl.store(p + at, tl.where(live, value.to(p.dtype.element_ty), before), mask=at < n)


@triton.jit
def _incoming(grad, at, n, weight, numbers, maximize, weight_decay):
    """The gradient that a rule sees: unscaled, negated to maximize, with weight decay added."""
    g = _load(grad, at, n)
    g = tl.math.div_rn(g, tl.load(numbers + _SCALE) + tl.zeros_like(g))
    if maximize != 0:
        g = -g
    if weight_decay != 0:
        g += weight_decay * weight
    return g


@triton.jit
def _normal(average):
    """0 where it is below the smallest normal number, as the specification has it."""
    return tl.where(tl.abs(average) < 1.1754943508222875e-38, 0.0, average)


@triton.jit
def _lerp(start, end, share):
    """From the nearer end, as torch.lerp."""
    return tl.where(share < 0.5, start + share * (end - start), end - (end - start) * (1 - share))


@triton.jit(do_not_specialize=[
    "has_frozen", "maximize", "has_momentum", "nesterov", "first_step", "n", "weight_decay", "momentum", "share"
])  # fmt: skip
def _sgd_kernel(
    param,
    grad,
    buffer,  # if has_momentum
    frozen,  # read if has_frozen
    numbers,
    has_frozen: tl.int32,
    maximize: tl.int32,
    has_momentum: tl.int32,
    nesterov: tl.int32,
    first_step: tl.int32,
    n: tl.int64,
    weight_decay: tl.float32,
    momentum: tl.float32,
    share: tl.float32,  # of the gradient in the buffer
    BLOCK: tl.constexpr,
):
    for STEP in tl.static_range(1, 17, 15):
        if step_of(n) == STEP:
            size = n // STEP * STEP
            at, live = places(BLOCK), _live(frozen, numbers, has_frozen, size, BLOCK)
            weight = _load(param, at, size)
            change = _incoming(grad, at, size, weight, numbers, maximize, weight_decay)
            if has_momentum != 0:
                moving = change
                if first_step == 0:
                    moving = momentum * _normal(_load(buffer, at, size)) + share * change
                _store(buffer, at, moving, live, size)
                if nesterov != 0:
                    change += momentum * moving
                else:
                    change = moving
            _store(param, at, weight - tl.load(numbers + _RATE) * change, live, size)


@triton.jit(do_not_specialize=[
    "has_frozen", "maximize", "centered", "has_momentum", "n", "weight_decay", "momentum", "keep", "share"
])  # fmt: skip
def _rmsprop_kernel(
    param,
    grad,
    square_avg,
    grad_avg,  # if centered
    buffer,  # if has_momentum
    frozen,  # read if has_frozen
    numbers,
    has_frozen: tl.int32,
    maximize: tl.int32,
    centered: tl.int32,
    has_momentum: tl.int32,
    n: tl.int64,
    weight_decay: tl.float32,
    momentum: tl.float32,
    keep: tl.float32,  # of the averages
    share: tl.float32,  # of what comes in
    BLOCK: tl.constexpr,
):
    for STEP in tl.static_range(1, 17, 15):
        if step_of(n) == STEP:
            size = n // STEP * STEP
            at, live = places(BLOCK), _live(frozen, numbers, has_frozen, size, BLOCK)
            weight = _load(param, at, size)
            g = _incoming(grad, at, size, weight, numbers, maximize, weight_decay)
            square = keep * _normal(_load(square_avg, at, size)) + share * (g * g)
            _store(square_avg, at, square, live, size)
            if centered != 0:
                mean = _lerp(_normal(_load(grad_avg, at, size)), g, share)
                _store(grad_avg, at, mean, live, size)
                square -= mean * mean
            change = tl.math.div_rn(g, tl.math.sqrt_rn(square) + tl.load(numbers + _EPS))
            if has_momentum != 0:
                change += momentum * _normal(_load(buffer, at, size))
                _store(buffer, at, change, live, size)
            _store(param, at, weight - tl.load(numbers + _RATE) * change, live, size)


@triton.jit(do_not_specialize=["has_frozen", "maximize", "amsgrad", "row", "n", "weight_decay", "mean_share", "keep", "share"])
def _adam_kernel(
    param,
    grad,
    exp_avg,
    exp_avg_sq,
    max_exp_avg_sq,  # if amsgrad
    frozen,  # read if has_frozen
    numbers,
    has_frozen: tl.int32,
    maximize: tl.int32,
    amsgrad: tl.int32,
    row: tl.int32,  # of numbers
    n: tl.int64,
    weight_decay: tl.float32,  # unless decoupled
    mean_share: tl.float32,  # of what comes in, in the mean
    keep: tl.float32,  # of the mean of squares
    share: tl.float32,
    BLOCK: tl.constexpr,
):
    for STEP in tl.static_range(1, 17, 15):
        if step_of(n) == STEP:
            size = n // STEP * STEP
            numbers += row * _NUMBERS
            at, live = places(BLOCK), _live(frozen, numbers, has_frozen, size, BLOCK)
            weight = _load(param, at, size)
            g = _incoming(grad, at, size, weight, numbers, maximize, weight_decay)
            mean = _lerp(_normal(_load(exp_avg, at, size)), g, mean_share)
            _store(exp_avg, at, mean, live, size)
            square = keep * _normal(_load(exp_avg_sq, at, size)) + share * (g * g)
            _store(exp_avg_sq, at, square, live, size)
            if amsgrad != 0:
                most = _load(max_exp_avg_sq, at, size)
                square = tl.where((most > square) | (most != most), most, square)  # a NaN in either stays
                _store(max_exp_avg_sq, at, square, live, size)
            denominator = tl.math.sqrt_rn(square) + tl.load(numbers + _EPS)
            change = tl.math.div_rn(tl.load(numbers + _RATE) * mean, denominator)
            _store(param, at, weight * tl.load(numbers + _DECAY) - change, live, size)


# --------------------------------------------------------------------------------------------------------------- builds

_BLOCK = 1024  # weights of one program, which holds up to five tensors of them


_ENDS = {"frozen": "u8", "numbers": "fp32"}
_SGD = each(
    _sgd_kernel,
    NAMES,
    dict.fromkeys(("param", "grad", "buffer"), "") | _ENDS,
    "has_frozen maximize has_momentum nesterov first_step",
    "n",
    "weight_decay momentum share",
    BLOCK=_BLOCK,
)
_RMSPROP = each(
    _rmsprop_kernel,
    NAMES,
    dict.fromkeys(("param", "grad", "square_avg", "grad_avg", "buffer"), "") | _ENDS,
    "has_frozen maximize centered has_momentum",
    "n",
    "weight_decay momentum keep share",
    BLOCK=_BLOCK,
)
_ADAM = each(
    _adam_kernel,
    NAMES,
    dict.fromkeys(("param", "grad", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"), "") | _ENDS,
    "has_frozen maximize amsgrad row",
    "n",
    "weight_decay mean_share keep share",
    BLOCK=_BLOCK,
)


def builds() -> list[Build]:
    """Every build that a launch of this module can choose."""
    return [build for table in (_SGD, _RMSPROP, _ADAM) for build in table.values()]


# ------------------------------------------------------------------------------------------------------------- launches


def update_sgd_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    frozen: Sequence[Tensor | None],
    lr: Tensor,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    maximize: bool,
    first_step: bool,
    pairs: Sequence[int] = (),
    beside: Sequence[Tensor] | None = None,
) -> None:
    """The op of `reference.update_sgd_` on a GPU."""
    states, lists = [momentum_buffers if momentum != 0 else None], (params, grads, momentum_buffers, frozen)
    options = momentum, dampening, weight_decay, nesterov, maximize, first_step
    ours, grads, rate, scale, skip = _begin(
        reference.update_sgd_, lists, states, None, (lr, grad_scale, found_inf), options, pairs, beside
    )
    if not ours:
        return
    one = torch.ones_like(rate)
    numbers = _rows(rate, one, one, scale, skip)
    for i in ours:
        flags = (int(flag) for flag in (frozen[i] is not None, maximize, momentum != 0, nesterov, first_step))
        rest = weight_decay, momentum, 1 - dampening
        _launch(_SGD, params[i], grads[i], _of_one(i, states), frozen[i], numbers, flags, rest)


def update_rmsprop_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    square_avgs: Sequence[Tensor],
    grad_avgs: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    steps: Sequence[Tensor],
    frozen: Sequence[Tensor | None],
    lr: Tensor,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    alpha: float,
    eps: float,
    weight_decay: float,
    momentum: float,
    centered: bool,
    maximize: bool,
    pairs: Sequence[int] = (),
    beside: Sequence[Tensor] | None = None,
) -> None:
    """The op of `reference.update_rmsprop_` on a GPU."""
    states = [square_avgs, grad_avgs if centered else None, momentum_buffers if momentum > 0 else None]
    lists = params, grads, square_avgs, grad_avgs, momentum_buffers, steps, frozen
    options = alpha, eps, weight_decay, momentum, centered, maximize
    ours, grads, rate, scale, skip = _begin(
        reference.update_rmsprop_, lists, states, steps, (lr, grad_scale, found_inf), options, pairs, beside
    )
    if not ours:
        return
    numbers = _rows(rate, torch.full_like(rate, eps), torch.ones_like(rate), scale, skip)
    for i in ours:
        flags = (int(flag) for flag in (frozen[i] is not None, maximize, centered, momentum > 0))
        rest = weight_decay, momentum, alpha, 1 - alpha
        _launch(_RMSPROP, params[i], grads[i], _of_one(i, states), frozen[i], numbers, flags, rest)


def update_adam_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    frozen: Sequence[Tensor | None],
    lr: Tensor,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    amsgrad: bool,
    maximize: bool,
    decoupled: bool,
    pairs: Sequence[int] = (),
    beside: Sequence[Tensor] | None = None,
) -> None:
    """The op of `reference.update_adam_` on a GPU."""
    states = [exp_avgs, exp_avg_sqs, max_exp_avg_sqs if amsgrad else None]
    lists = params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps, frozen
    options = beta1, beta2, eps, weight_decay, amsgrad, maximize, decoupled
    ours, grads, rate, scale, skip = _begin(
        reference.update_adam_, lists, states, steps, (lr, grad_scale, found_inf), options, pairs, beside
    )
    if not ours:
        return
    count = torch.stack([steps[i].reshape(()) for i in ours]).double()
    root = (1 - beta2**count).sqrt()
    decay = 1 - rate * weight_decay if decoupled else torch.ones_like(rate)
    numbers = _rows(rate * root / (1 - beta1**count), eps * root, decay.expand_as(root), scale, skip)
    for row, i in enumerate(ours):
        flags = (int(frozen[i] is not None), int(maximize), int(amsgrad), row)
        rest = 0.0 if decoupled else weight_decay, 1 - beta1, beta2, 1 - beta2
        _launch(_ADAM, params[i], grads[i], _of_one(i, states), frozen[i], numbers, flags, rest)


_States = Sequence[Sequence[Tensor] | None]  # lists that a rule may have, in the order of its kernel; None: it has not


def _begin(
    rule: Callable[..., None],
    lists: Sequence[Sequence[Tensor | None]],
    states: _States,
    steps: Sequence[Tensor] | None,
    scalars: tuple[Tensor, Tensor | None, Tensor | None],
    options: Sequence[float],
    pairs: Sequence[int],
    beside: Sequence[Tensor] | None,
) -> tuple[list[int], list[Tensor], Tensor, Tensor, Tensor]:
    """Which parameters the kernels are to move, all gradients, and rate, scale and 1 where the step is skipped, else 0.

    The arguments are checked, steps are counted, and float64 parameters get the step of the reference, rule, which takes lists, scalars
    and options. What is returned last is 0-dim float64 on the device, never read by the host.
    """
    op, (params, grads, *rest), (lr, grad_scale, found_inf) = rule.__name__, lists, scalars
    if steps is not None:
        check_lengths(op, len(params), len(steps), "steps")
        fit = all(step.dtype == torch.float32 and step.numel() == 1 for step in steps)
        check(fit, op, "steps must be float32 with one element each")
    grads = _gradients(op, params, grads, states, rest[-1], pairs, beside)
    ours = [i for i, p in enumerate(params) if p.dtype in NAMES]
    wide = [i for i, p in enumerate(params) if p.dtype not in NAMES]
    if wide:
        rule(*([some[i] for i in wide if len(some)] for some in (params, grads, *rest)), *scalars, *options)
    rate = lr.detach().reshape(()).double()
    scale = torch.ones_like(rate) if grad_scale is None else grad_scale.reshape(()).to(rate)
    skip = torch.zeros_like(rate) if found_inf is None else (found_inf.reshape(()) != 0).to(rate)
    if ours and steps is not None:
        counted = [steps[i] for i in ours]
        # one tensor alone would be read by the host
        torch._foreach_add_(counted, 1 if found_inf is None else [(1 - skip).float()] * len(counted))
    return ours, grads, rate, scale, skip


def _gradients(
    op: str,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    states: _States,
    frozen: Sequence[Tensor | None],
    pairs: Sequence[int],
    beside: Sequence[Tensor] | None,
) -> list[Tensor]:
    """Each parameter's own gradient, as `reference.paired_gradients` has them, of arguments that are checked here."""
    check_lengths(op, len(params), len(grads), "gradients")
    check_lengths(op, len(params), len(frozen), "frozen masks (None where nothing is frozen)")
    given = [grads, *(some for some in states if some is not None)]
    for some in given[1:]:
        check_lengths(op, len(params), len(some), "tensors in each list of state")
    for i, (p, shut) in enumerate(zip(params, frozen)):
        known = p.dtype in NAMES or p.dtype == torch.float64
        sentence = f"parameters must be float32, float64, bfloat16 or float16, got another dtype for parameter {i}"
        check(known, op, sentence)
        for some in given:
            same, n = some[i].shape == p.shape, p.numel()
            check(same, op, f"gradient and state of parameter {i} must have its shape, {n} elements, got {some[i].numel()}")
            check(some is grads or some[i].dtype == p.dtype, op, f"the state of parameter {i} must have its dtype")
        if shut is not None:
            check_bits(op, shut, p.numel())
    if len(pairs) == 0:
        return list(grads)
    fits = beside is not None and len(pairs) == 3 * len(beside)
    check(fits, op, f"expected three numbers for each tensor beside a pair, got {len(pairs)}")
    taken = set()
    for i in (i for j, i in enumerate(pairs) if j % 3 == 0 or (j % 3 == 1 and i >= 0)):
        check(0 <= i < len(params) and i not in taken, op, f"a pair must name parameters of this call, each once, got {i}")
        taken.add(i)
    grads = list(grads)
    through = torch.ops.subnet_kernels.straight_through.default
    for k, other in enumerate(beside):
        scores, weight, magnitude = pairs[3 * k : 3 * k + 3]
        learns, by = weight >= 0, "magnitude" if magnitude else "value"
        own = params[weight] if learns else other
        live = other if learns else _unread_bits(own)
        d_weight, grads[scores] = through(grads[scores], own, params[scores], live, None, by, learns)
        if learns:
            grads[weight] = d_weight
    return grads


def _unread_bits(weight: Tensor) -> Tensor:
    """Bits of the size that the op asks for; without a gradient of the weight it does not read them."""
    return torch.empty(reference.nbytes(weight.numel()), dtype=torch.uint8, device=weight.device)


def _of_one(i: int, states: _States) -> list[Tensor | None]:
    return [None if some is None else some[i] for some in states]


def _rows(*numbers: Tensor) -> Tensor:
    """The kernels' numbers of a step: float32, contiguous, a row for each element of the first, or one."""
    return torch.stack([t.expand_as(numbers[0]) for t in numbers], -1).float()


def _launch(
    table: dict[torch.dtype, Build],
    param: Tensor,
    grad: Tensor,
    states: list[Tensor | None],
    frozen: Tensor | None,
    numbers: Tensor,
    flags: Sequence[int],
    rest: Sequence[float],
) -> None:
    n = param.numel()
    if n == 0:
        return
    written = [t for t in (param, *states) if t is not None]
    held = [plain(t.detach()) for t in written]
    grad = plain(grad.to(param.dtype))
    found = iter(held[1:])
    pointers = held[0], grad, *(held[0] if t is None else next(found) for t in states)
    shut = numbers.view(torch.uint8) if frozen is None else plain(frozen)
    with on_device(param):
        table[param.dtype].launch((triton.cdiv(n, _BLOCK),), *pointers, shut, numbers, *flags, n, *rest)
    for t, at in zip(written, held):
        if at.data_ptr() != t.data_ptr():
            t.detach().copy_(at)
