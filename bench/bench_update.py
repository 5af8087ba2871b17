"""Optimizer steps with 30 % of the weights frozen, beside torch's fused steps without any mask and what people write instead.

A case is one whole `step()` of either side over the same parameters, Python included, with gradients that are not zero.
Only our step leaves frozen weights where they are: zeroed gradients still let momentum and weight decay move them. On a GPU: within 1.05
of torch's fused step without a mask, 1.3 times masked_fill_ before it, 3 times what is published, within 1.2 of the bytes at copy speed;
straight-through and Adam in one pass 1.6 times as fast as in two.
"""

import measure as clock
import pytest
import torch
from baselines import resnet18
from measure import compiled, measure, on_cpu, record, sizes, table, targets_on
from torch import nn

from subnet_kernels import optim, reference
from subnet_kernels.ops.apply import straight_through
from subnet_kernels.ops.update import update_adam_

SHARE = 0.3  # of each weight tensor
CPU_TARGET = 1.1  # our Adam step with frozen weights, in steps of torch's fused one without a mask


# case -> shapes of weights, and whether as many scores, of which none is frozen, are stepped with them
CASES = {
    "2 weights and 2 scores, 176,800": ([(100, 784), (100, 100)], True),
    "40 weights and 40 scores, 176,800": ([(65, 34)] * 40, True),
    "1 weight, 2,359,296": ([(512, 512, 3, 3)], False),
    "20 weights, 11,166,912": (resnet18(), False),
    "10 weights, 10,000,000": ([(1000, 1000)] * 10, False),
    "10 weights, 100,000,000": ([(10_000, 1000)] * 10, False),
}
LARGE = ("10 weights, 10,000,000", "10 weights, 100,000,000")

RULES = {
    "adam": (optim.Adam, torch.optim.Adam, dict(lr=1e-3), dict(fused=True)),
    "sgd-momentum": (optim.SGD, torch.optim.SGD, dict(lr=1e-3, momentum=0.9), dict(fused=True)),
    "rmsprop": (optim.RMSprop, torch.optim.RMSprop, dict(lr=1e-3), dict(foreach=True)),  # torch has no fused one
}


def parameters(shapes, scores):
    params = [nn.Parameter(torch.randn(s) * 0.1) for s in shapes * (1 + scores)]
    for p in params:
        p.grad = torch.randn_like(p) * 0.01
    return params


def copy_of(params):
    copies = [nn.Parameter(p.detach().clone()) for p in params]
    for p, c in zip(params, copies):
        c.grad = p.grad.clone()
    return copies


def states_of(optimizer, p):
    """The state tensors of a parameter's shape."""
    return [s for s in optimizer.state[p].values() if isinstance(s, torch.Tensor) and s.shape == p.shape]


@pytest.mark.parametrize("case", sizes([*CASES][:-1], ["40 weights and 40 scores, 176,800", "20 weights, 11,166,912", *LARGE]))
@pytest.mark.parametrize("rule", RULES)
def bench_step(monkeypatch, thread_count, rule, case):
    if case in LARGE and rule != "adam":
        pytest.skip("one rule is enough of this size")
    shapes, scores = CASES[case]
    ours_class, torch_class, options, fast = RULES[rule]
    params = parameters(shapes, scores)
    masks = [torch.rand(s) < SHARE for s in shapes]
    bits = {id(p): reference.pack(m) for p, m in zip(params, masks)}
    monkeypatch.setattr(optim, "frozen_bits", lambda some: [bits.get(id(p)) for p in some])  # no layers, so none is refreshed
    ours, unmasked = ours_class(params, **options), ours_class(copy_of(params), **options)

    def rival(fast, before=None):
        optimizer = torch_class(copy_of(params), **options, **fast)
        grads = [p.grad for p in optimizer.param_groups[0]["params"]][: len(masks)]

        def step():
            if before is not None:
                for grad, mask in zip(grads, given):
                    before(grad, mask)
            optimizer.step()

        given = [(~m).float() for m in masks] if before is torch.Tensor.mul_ else masks
        return optimizer, step

    name = next(iter(fast))
    if not on_cpu() and rule != "sgd-momentum":
        fast = fast | dict(capturable=True)  # their steps are captured as ours are
    plain, plain_step = rival(fast)
    rivals = {
        f"{name}, no mask": plain_step,
        f"grad.mul_(keep), {name}": rival(fast, torch.Tensor.mul_)[1],
        f"grad.masked_fill_, {name}": rival(fast, lambda g, m: g.masked_fill_(m, 0))[1],
        "grad[M] = 0, default": rival({}, lambda g, m: g.__setitem__(m, 0))[1],
    }

    start = [p.detach().clone() for p in params]
    for optimizer in (ours, plain):
        optimizer.step()
    for p, q, s, m in zip(params, plain.param_groups[0]["params"], start, masks + [None] * len(params)):
        live = torch.ones_like(p, dtype=torch.bool) if m is None else ~m
        assert torch.equal(p.detach()[~live], s[~live])
        torch.testing.assert_close(p.detach()[live], q.detach()[live], rtol=1e-5, atol=1e-7)

    notes = {}
    if case in LARGE and thread_count == 1:
        default, _ = rival({})
        fast, notes = compiled(default.step)
        rivals |= {f"{label}, no mask": f for label, f in fast.items()}
    weights, state = copy_of(params), [s.clone() for p in plain.param_groups[0]["params"] for s in states_of(plain, p)]

    @torch.no_grad()
    def floor():
        """The bytes of a step: gradients read, weights and state read and written."""
        for p in weights:
            p.add_(p.grad)
        for s in state:
            s.mul_(0.9)

    rivals["floor: same bytes (add_, mul_)"] = floor
    times = measure(
        {"ours, 30 % frozen": ours.step, "ours, none frozen": unmasked.step, **rivals},
        seconds=3.0 if case in LARGE else 1.5,
    )
    targets = {}
    if rule == "adam":
        cpu = {f"{name}, no mask": 1 / CPU_TARGET}
        count = sum(p.numel() for p in params)
        times |= clock.floor(28 * count + sum(map(torch.numel, masks)) / 8)
        cuda = {f"{name}, no mask": 1 / 1.05, f"grad.masked_fill_, {name}": 1.3, "grad[M] = 0, default": 3}
        cuda |= {"floor: the bytes at copy speed": 1 / 1.2} if case in LARGE else {}
        targets = targets_on(thread_count, cpu, cuda)
    print("\n" + table(f"{rule}, {case}", times, "ours, 30 % frozen", targets))
    record("update", f"{rule}, {case}", times, notes, targets)


@pytest.mark.parametrize("n", sizes([78_400, 10_000_000], [10_000_000, 100_000_000]))
def bench_fused_straight_through(n, thread_count):
    """Gradients of weight and scores made inside the step (fuse_ste), beside the op that makes them and the step after it."""
    mask, frozen = torch.rand(n) < SHARE, torch.rand(n) < SHARE
    bits, frozen_bits, grad = reference.pack(mask), [None, reference.pack(frozen)], torch.randn(n) * 0.01
    rate = torch.tensor(1e-3, dtype=torch.float64)
    made = torch.randn(n), torch.randn(n) * 0.1

    def new():
        """Scores and weight, with their state."""
        return [t.clone() for t in made], *([torch.zeros(n) for _ in made] for _ in range(2)), [torch.zeros(()) for _ in made]

    one, two = new(), new()
    options = None, None, 0.9, 0.999, 1e-8, 0.0, False, False, False

    def fused():
        params, means, squares, steps = one
        update_adam_(params, [grad, grad], means, squares, [], steps, frozen_bits, rate, *options, [0, 1, 1], [bits])

    def separate():
        params, means, squares, steps = two
        d_weight, d_scores = straight_through(grad, params[1], params[0], bits, frozen_bits[1])
        update_adam_(params, [d_scores, d_weight], means, squares, [], steps, frozen_bits, rate, *options)

    for _ in range(2):
        fused()
        separate()
    assert torch.equal(one[0][1][frozen], made[1][frozen])
    for ours, theirs in zip(one[0] + one[1] + one[2], two[0] + two[1] + two[2]):
        assert torch.equal(ours, theirs)
    times = measure({"update, fused": fused, "straight_through, then update": separate}, seconds=1.0) | clock.floor(52.25 * n)
    cpu = {"straight_through, then update": 1.3} if n == 10_000_000 else {}
    targets = targets_on(thread_count, cpu, {"straight_through, then update": 1.6})
    print("\n" + table(f"straight-through and Adam, {n:,} weights and as many scores", times, "update, fused", targets))
    record("update", f"straight-through and adam, 2 x {n}", times, targets=targets)
