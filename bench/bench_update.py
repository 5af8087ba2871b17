"""Optimizer steps with 30 % of the weights frozen, beside torch's fused steps without any mask and what people write instead.

A case is one whole `step()` of either side over the same parameters, Python included, with gradients that are not zero.
Only our step leaves frozen weights where they are: zeroed gradients still let momentum and weight decay move them.
"""

import pytest
import torch
from measure import measure, record, table
from torch import nn

from subnet_kernels import optim, reference

SHARE = 0.3  # of each weight tensor
GATE = 1.15  # our Adam step with frozen weights, in steps of torch's fused one without a mask


def resnet18():
    """Shapes of its convolutions."""
    shapes, before = [(64, 3, 7, 7)], 64
    for width in (64, 128, 256, 512):
        shapes += [(width, before, 3, 3)] + [(width, width, 3, 3)] * 3 + ([(width, before, 1, 1)] if width > before else [])
        before = width
    return shapes


# case -> shapes of weights, and whether as many scores, of which none is frozen, are stepped with them
CASES = {
    "2 weights and 2 scores, 176,800": ([(100, 784), (100, 100)], True),
    "40 weights and 40 scores, 176,800": ([(65, 34)] * 40, True),
    "1 weight, 2,359,296": ([(512, 512, 3, 3)], False),
    "20 weights, 11,166,912": (resnet18(), False),
}

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


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("rule", RULES)
def bench_step(monkeypatch, thread_count, rule, case):
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

    times = measure({"ours, 30 % frozen": ours.step, "ours, none frozen": unmasked.step, **rivals}, seconds=2.0)
    print("\n" + table(f"{rule}, {case}", times, "ours, 30 % frozen"))
    record("update", f"{rule}, {case}", times)
    ratio = times["ours, 30 % frozen"].min / times[f"{name}, no mask"].min
    assert ratio <= GATE or rule != "adam" or thread_count > 1, (
        f"{ratio:.2f} times the unmasked {name} step, at most {GATE} allowed"
    )
