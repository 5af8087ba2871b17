"""A model that this project did not write: transformers' ResNet-18 on 32 x 32 images, 11.2M weights, converted and served.

Expected on one thread before any measurement: a WSN step takes at most 1.15 dense steps with equal optimizer work; going back to a cached
task at most 1 ms; activating one in place from the cache at most 1.5 times a copy of the weights; a view of a task at most 50 ms;
converting a ResNet-50 less than 2 s.
"""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from measure import Timing, measure, on_cpu, record, table, targets_on
from torch import nn

import subnet_kernels as sk

transformers = pytest.importorskip("transformers", reason="the models are from transformers, which cannot be imported")
pytestmark = pytest.mark.skipif(not on_cpu(), reason="the limits are those of a CPU; bench_step has the GPU's steps")
CONFIG = sk.SubnetConfig(density=0.3, train_weights=True, per_task=["classifier.1"])
ROWS, DENSE_TARGET = 64, 1.15
LIMITS = {"activate, cached": 1e3, "view": 50e3, "convert": 2e6}  # us


def resnet(layer_type: str, sizes: list[int], depths: list[int]) -> nn.Module:
    config = transformers.ResNetConfig(embedding_size=64, hidden_sizes=sizes, depths=depths, layer_type=layer_type, num_labels=10)
    return transformers.ResNetForImageClassification(config)


def resnet18() -> nn.Module:
    return resnet("basic", [64, 128, 256, 512], [2, 2, 2, 2])


def report(bench: str, case: str, times: dict[str, Timing], targets: dict[str, float] | None = None) -> None:
    """Print and record a case; the first callable is ours, and may have a limit of its own."""
    ours = next(iter(times))
    print("\n" + table(f"{bench}, {case}", times, ours, targets))
    limit = LIMITS.get(bench)
    if limit is not None:
        print(f"  {'MISS of' if times[ours].min > limit else 'met'} {limit / 1e3:g} ms")
    record(bench, case, times, {} if limit is None else {"limit": limit}, targets)


def bench_dropin_step(thread_count):
    net = resnet18()
    model = sk.convert(copy.deepcopy(net), CONFIG)
    bank = sk.MaskBank(model)
    bank.commit("first")
    bank.begin(scores="init")
    ours = sk.optim.Adam(model.parameters(), 1e-3, fuse_ste=True)
    standing = [nn.Parameter(torch.randn_like(layer.scores)) for layer in bank.layers()]  # for the scores
    for p in standing:
        p.grad = torch.randn_like(p) * 0.01
    own = list(net.parameters())
    dense = torch.optim.Adam(own + standing, 1e-3, fused=True)
    data = [(torch.randn(ROWS, 3, 32, 32), torch.randint(0, 10, (ROWS,))) for _ in range(4)]

    def step(side, parameters, optimizer):
        batches = itertools.cycle(data)

        def run():
            x, y = next(batches)
            for p in parameters:
                p.grad = None
            F.cross_entropy(side(x).logits, y).backward()
            optimizer.step()

        return run

    calls = {"ours": step(model, list(model.parameters()), ours), "dense, fused": step(net, own, dense)}
    for call in calls.values():
        call()
    bank.verify()
    targets = targets_on(thread_count, {"dense, fused": 1 / DENSE_TARGET})
    report("step", "WSN ResNet-18 of transformers, 32 x 32, batch 64, Adam", measure(calls, seconds=25.0), targets)


def bench_dropin_switch(thread_count):
    model = sk.convert(resnet18().eval(), CONFIG)
    bank = sk.MaskBank(model, cached=2)
    for name in ("a", "b"):
        bank.begin(scores="init")
        bank.commit(name)
    weights = [layer.weight.detach() for layer in bank.layers()]
    into = [torch.empty_like(weight) for weight in weights]
    names = itertools.cycle("ab")
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        for name in "ab":
            bank.activate(name)
            torch.testing.assert_close(bank.view(name)(x).logits, model(x).logits, rtol=1e-4, atol=1e-5)

    def computed():
        bank.cached = 0
        bank.activate(next(names))

    def cached():
        bank.cached = 2
        bank.activate(next(names))

    def in_place():
        bank.cached = 2
        bank.activate(next(names), in_place=True)

    def copied():
        for target, weight in zip(into, weights):
            target.copy_(weight)

    case = f"ResNet-18 of transformers, {sum(weight.numel() for weight in weights):,} weights"
    floor = "floor: copy of the weights"
    for call in (cached, cached, in_place):
        call()
    times = measure({"cached": cached, "in place": in_place, floor: copied}, seconds=4.0)
    report("activate, cached", case, {"ours": times["cached"], floor: times[floor]})
    report(
        "activate, in place from the cache",
        case,
        {"ours": times["in place"], floor: times[floor]},
        targets_on(thread_count, {floor: 1 / 1.5}),
    )
    report("activate, computed", case, measure({"ours": computed, floor: copied}, seconds=2.0))
    report("view", case, measure({"ours": lambda: bank.view("a"), floor: copied}, seconds=2.0))


def bench_dropin_convert(thread_count):
    net = resnet("bottleneck", [256, 512, 1024, 2048], [3, 4, 6, 3])
    copies = iter([copy.deepcopy(net) for _ in range(4)])
    times = measure({"ours": lambda: sk.convert(next(copies), CONFIG)}, seconds=0, rounds=2)
    report("convert", f"ResNet-50 of transformers, {sum(p.numel() for p in net.parameters()):,} parameters", times)
