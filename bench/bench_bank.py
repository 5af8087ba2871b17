"""One-shot inference through a bank of LeNet-300-100's tasks against the published expression on stacked float masks.

A batch of 128 rows decides together: the forward at equal coefficients and its gradient to them, over all three layers. Expected on one
thread before any measurement, 2,500 tasks: 100 times the published expression, 10 times matrix-vector products on the same floats,
and at most a thirtieth of their bytes, which is asserted.
"""

import itertools

import pytest
import torch
import torch.nn.functional as F
from baselines import superpose_product, superpose_published
from measure import measure, record, sizes, table, targets_on
from torch import nn

import subnet_kernels as sk
from subnet_kernels import reference

WIDTHS = (784, 300, 100, 100)
ROWS = 128
TARGETS = {"published (SupSup)": 100, "float product": 10}  # on a GPU; on the CPU the first, of 2,500 tasks


def lenet(select: str = "threshold") -> nn.Sequential:
    """LeNet-300-100 with 100 outputs over fixed random weights, converted."""
    layers = [nn.Linear(i, o, bias=False) for i, o in itertools.pairwise(WIDTHS)]
    model = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])
    return sk.convert(model, sk.SubnetConfig(weight_init="signed_constant", select=select))


def objective(logits):
    """G with 10 classes: the logsumexp of which the superfluous neurons alone feel the gradient."""
    return torch.cat([logits[:, :10].detach(), logits[:, 10:]], 1).logsumexp(1).mean()


def one_shot(bank, x):
    """The gradient to equal coefficients (K,)."""
    alphas = bank.superpose(None)
    return torch.autograd.grad(objective(bank.model(x)), alphas)[0]


def one_shot_of_floats(weights, masks, expression, x):
    """The same of stacked float masks (K, O, I) of each layer."""
    tasks = len(masks[0])
    alphas = x.new_full((tasks,), 1 / tasks).requires_grad_()
    for i, (weight, stacked) in enumerate(zip(weights, masks)):
        x = F.linear(x.relu() if i else x, expression(weight, stacked, alphas))
    return torch.autograd.grad(objective(x), alphas)[0]


@pytest.mark.parametrize("tasks", sizes([250, 2500], [2500]))
def bench_one_shot(tasks, thread_count):
    bank, x = sk.MaskBank(lenet()), torch.randn(ROWS, WIDTHS[0])
    masks = [torch.rand(tasks, o, i) < 0.5 for i, o in itertools.pairwise(WIDTHS)]
    for k in range(tasks):
        bank.commit(str(k), bits={name: reference.pack(mask[k]) for name, mask in zip(bank.layer_names, masks)})
    weights = [layer.weight.detach() for layer in bank.layers()]
    calls = {"one_shot": lambda: one_shot(bank, x)}
    if thread_count < 2:
        floats = [mask.float() for mask in masks]
        for name, expression in (("published (SupSup)", superpose_published), ("float product", superpose_product)):
            calls[name] = lambda expression=expression: one_shot_of_floats(weights, floats, expression, x)
            torch.testing.assert_close(calls["one_shot"](), calls[name](), rtol=1e-3, atol=1e-5)
    del masks
    times = measure(calls, rounds=3, slow=1)
    took, dense = bank.capacity()["mask_bytes"], 4 * tasks * sum(weight.numel() for weight in weights)
    case = f"LeNet-300-100, {ROWS} rows, K={tasks} float32"
    targets = targets_on(thread_count, {"published (SupSup)": 100} if tasks == 2500 else {}, TARGETS)
    print("\n" + table(f"one_shot, {case}", times, "one_shot", targets))
    print(f"  masks of {took:,} bytes, as floats {dense:,}: {dense / took:.1f} times")
    record("one_shot", case, times, {"mask_bytes": took, "float_bytes": dense}, targets)
    assert dense >= 30 * took, "below 30 times the bytes"


@pytest.mark.parametrize("tasks", [100, 250])
def bench_alpha_step(tasks, thread_count):
    """A step of ImpressLearn: RMSprop on a coefficient for each layer and mask, masks of density .1, beside the dense network's gradients.

    Expected on one thread of 250 masks: 100 times the published expression, and at most 1.5 of the dense forward and backward.
    """
    bank, x, y = sk.MaskBank(lenet()), torch.randn(ROWS, WIDTHS[0]), torch.randint(0, 10, (ROWS,))
    masks = [torch.rand(tasks, o, i) < 0.1 for i, o in itertools.pairwise(WIDTHS)]
    for k in range(tasks):
        bank.commit(str(k), bits={name: reference.pack(mask[k]) for name, mask in zip(bank.layer_names, masks)})
    weights, floats = [layer.weight.detach() for layer in bank.layers()], [mask.float() for mask in masks]
    del masks
    dense = nn.Sequential(*(nn.Linear(i, o, bias=False) for i, o in itertools.pairwise(WIDTHS)))

    def published(alphas):
        h = x
        for i, (weight, stacked) in enumerate(zip(weights, floats)):
            h = F.linear(h.relu() if i else h, superpose_published(weight, stacked, alphas[i]))
        return h

    def dense_logits():
        h = x
        for i, layer in enumerate(dense):
            h = layer(h.relu() if i else h)
        return h

    ours, theirs = (nn.Parameter(torch.full((len(weights), tasks), 1 / tasks)) for _ in range(2))
    bank.superpose(ours)

    def step(logits, opt):
        opt.zero_grad()
        F.cross_entropy(logits(), y).backward()
        opt.step()

    mine, other = (torch.optim.RMSprop([alphas], 2e-3, capturable=alphas.is_cuda) for alphas in (ours, theirs))
    calls = {"alpha_step": lambda: step(lambda: bank.model(x), mine)}
    calls["dense forward + backward"] = lambda: F.cross_entropy(dense_logits(), y).backward()
    F.cross_entropy(bank.model(x), y).backward()
    F.cross_entropy(published(theirs), y).backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-6)
    if thread_count < 2:
        calls["published (SupSup)"] = lambda: step(lambda: published(theirs), other)
    times = measure(calls, rounds=3, slow=1)
    targets = targets_on(thread_count, {"published (SupSup)": 100, "dense forward + backward": 1 / 1.5} if tasks == 250 else {})
    case = f"LeNet-300-100, {ROWS} rows, K={tasks} float32"
    print("\n" + table(f"alpha_step, {case}", times, "alpha_step", targets))
    record("alpha_step", case, times, {"density": 0.1}, targets)
