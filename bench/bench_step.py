"""One whole training step, beside the same step in the published expressions and the dense step of the same network.

A step is zero_grad, forward, loss, backward and the optimizer's, with all that selection and freezing take. The dense network has
equal optimizer work: as many parameters as ours trains, those that stand for scores with gradients made before. Expected on one
thread before any measurement: our step takes at most 1.15 dense steps, and the published one 3, 1.5, 2 and 2 of ours.

On a GPU a step is timed as eager code, launching included, and captured in a CUDA graph, which the published steps cannot be: they wait
for the device at every layer. There the ResNet-18's captured step is to be 10 times as fast as WSN's.
"""

import copy
import itertools
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from baselines import freeze_by_index, publish
from measure import measure, on_cpu, record, table, targets_on
from torch import nn

import subnet_kernels as sk
from subnet_pipelines.models import MODELS

SHARE = 0.3  # of each masked weight: frozen, as in a second task
DENSE_TARGET = 1.15  # our step, in dense steps


@dataclass(frozen=True)
class Case:
    """A paper's recipe: WSN's (weights and scores learn, dense head, Adam 1e-3) or SupSup's (scores alone, RMSprop 1e-4)."""

    title: str
    model: str
    outputs: int
    shape: tuple[int, ...]
    rows: int
    density: float
    wsn: bool
    target: float  # the published step, in steps of ours, on the CPU
    seconds: float  # of measuring
    batches: int


CASES = {
    "mlp": Case("WSN 784-100-100, batch 10, Adam", "mlp", 10, (784,), 10, 0.1, True, 3.0, 4.0, 400),
    "lenet-300-100": Case(
        "SupSup LeNet-300-100, batch 128, RMSprop", "lenet-300-100", 100, (784,), 128, 0.5, False, 1.5, 4.0, 32
    ),
    "alexnet": Case("WSN AlexNet, 32 x 32, batch 64, Adam", "alexnet", 100, (3, 32, 32), 64, 0.1, True, 2.0, 25.0, 8),
    "resnet-18": Case("WSN ResNet-18, 32 x 32, batch 64, Adam", "resnet-18", 10, (3, 32, 32), 64, 0.1, True, 2.0, 25.0, 8),
}


@dataclass(frozen=True)
class Rival:
    """A network and the optimizer that it learns by."""

    net: nn.Module
    opt: torch.optim.Optimizer
    zero_grad: Callable[[], None]
    before_opt: Callable[[], None] | None = None

    def step(self, data, compiled: bool = False) -> Callable[[], None]:
        """A callable that makes one step on the next of the batches."""
        batches = itertools.cycle(data)
        net, opt, zero_grad, before = torch.compile(self.net) if compiled else self.net, self.opt, self.zero_grad, self.before_opt

        def step():
            x, y = next(batches)
            zero_grad()
            F.cross_entropy(net(x), y).backward()
            if before is not None:
                before()
            opt.step()

        return step


class Contest:
    """The rivals of a case, from equal weights, scores and frozen masks."""

    def __init__(self, case: Case):
        self.case = case
        self.capturable = {} if on_cpu() else {"capturable": True}
        net = MODELS[case.model](case.outputs, *case.shape)
        config = sk.SubnetConfig(density=case.density, weight_init="signed_constant")
        if case.wsn:
            config = sk.SubnetConfig(density=case.density, k_rule="kth", ties="all", train_weights=True, per_task=["head"])
        self.model = sk.convert(copy.deepcopy(net), config)
        self.bank = sk.MaskBank(self.model)
        self.layers = dict(zip(self.bank.layer_names, self.bank.layers()))
        self.frozen = {}
        if case.wsn:
            self.frozen = {name: torch.rand(layer.weight.shape) < SHARE for name, layer in self.layers.items()}
            self.bank.commit("first", bits={name: sk.pack(mask) for name, mask in self.frozen.items()})
            self.bank.begin()
        net.load_state_dict(sk.dense_state_dict(self.model))
        self.ours = self._ours()
        self.published = self._published(copy.deepcopy(net))
        self.dense = self._dense(net)
        labels = min(case.outputs, 10)
        self.data = [(torch.randn(case.rows, *case.shape), torch.randint(0, labels, (case.rows,))) for _ in range(case.batches)]

    def _ours(self) -> Rival:
        if self.case.wsn:
            opt = sk.optim.Adam(self.model.parameters(), 1e-3, fuse_ste=True)
        else:
            opt = sk.optim.RMSprop([layer.scores for layer in self.layers.values()], 1e-4, fuse_ste=True)
        return Rival(self.model, opt, opt.zero_grad)

    def _published(self, net: nn.Module) -> Rival:
        scores = {name: layer.scores for name, layer in self.layers.items()}
        publish(net, scores, "kthvalue" if self.case.wsn else "sort", self.case.density)
        if self.case.wsn:
            frozen = {name: mask.long() for name, mask in self.frozen.items()}
            opt = torch.optim.Adam(net.parameters(), 1e-3)
            return Rival(net, opt, opt.zero_grad, lambda: freeze_by_index(net, frozen))
        for name in scores:
            net.get_submodule(name).weight.requires_grad_(False)
        opt = torch.optim.RMSprop([p for p in net.parameters() if p.requires_grad], 1e-4)
        return Rival(net, opt, opt.zero_grad)

    def _dense(self, net: nn.Module) -> Rival:
        own = list(net.parameters())
        if self.case.wsn:
            standing = [nn.Parameter(torch.randn_like(layer.scores)) for layer in self.layers.values()]  # for the scores
            for p in standing:
                p.grad = torch.randn_like(p) * 0.01
            opt = torch.optim.Adam(own + standing, 1e-3, fused=True, **self.capturable)
        else:
            opt = torch.optim.RMSprop(own, 1e-4, foreach=True, **self.capturable)  # torch has no fused one

        def zero_grad():
            for p in own:
                p.grad = None

        return Rival(net, opt, zero_grad)

    def check(self) -> None:
        """One step of ours and of the published expressions, from equal tensors and with the same dropout."""
        theirs = {name: self.published.net.get_submodule(name) for name in self.layers}
        start = {name: layer.weight.detach().clone() for name, layer in self.layers.items()}
        writes = {name: layer.w_eff._version for name, layer in self.layers.items()}
        self.check_masks(theirs, 0.0 if on_cpu() else 1e-2)
        for rival in (self.ours, self.published):
            torch.manual_seed(1)
            rival.step(self.data)()
        # on a GPU a convolution's products are of TF32, and which kernel makes them may differ between two networks
        near = dict(rtol=1e-5, atol=1e-6) if on_cpu() else dict(rtol=1e-2, atol=1e-4)
        for name, layer in self.layers.items():
            assert layer.w_eff._version == writes[name] + 1, "the effective weight is made once a step"
            for mine, other in ((layer.scores, theirs[name].scores), (layer.weight, theirs[name].weight)):
                if other.grad is None:
                    assert torch.equal(mine, other)
                    continue
                # a first step of Adam and RMSprop is the gradient's sign: it says nothing where the gradient is all rounding
                sure = other.grad.abs() > (1e-4 if on_cpu() else 3e-2) * other.grad.abs().max()
                torch.testing.assert_close(mine[sure], other[sure], **near)
                assert (sure | (other.grad == 0)).float().mean() > (0.5 if on_cpu() else 0.0)
            held = self.frozen.get(name, ...)  # all of them where weights do not learn
            assert torch.equal(layer.weight[held], start[name][held])
        torch.testing.assert_close(self.ours.net.head.weight, self.published.net.head.weight, **near)
        self.check_masks(theirs, 1e-6 if on_cpu() else 1e-2)  # sums in another order may swap two neighbours at the cut

    @torch.no_grad()
    def check_masks(self, theirs: dict[str, nn.Module], most: float) -> None:
        for name, layer in self.layers.items():
            mask = sk.unpack(layer.bits, layer.weight.shape)
            differ = (mask != (theirs[name].mask() == 1)).float().mean().item()
            assert differ <= most, f"masks of layer {name} differ in {differ:.2%} of their weights"


@pytest.mark.skipif(on_cpu(), reason="a CUDA graph needs a GPU")
@pytest.mark.parametrize("name", CASES)
def bench_step_and_graph(thread_count, name):
    case = CASES[name]
    contest = Contest(case)
    contest.check()
    data = contest.data
    published, fast = ("published (WSN)", "fused") if case.wsn else ("published (SupSup)", "foreach")
    eager = {
        "ours": contest.ours.step(data),
        published: contest.published.step(data),
        f"dense, {fast}": contest.dense.step(data),
    }
    graphs = {"ours, captured": contest.ours.step(data), f"dense, {fast}, captured": contest.dense.step(data)}
    times = measure(eager | graphs, eager=eager)
    targets = {published: 10} if name == "resnet-18" else {}
    print("\n" + table(f"{case.title}, eager", {n: times[n] for n in eager}, "ours", targets))
    record("step", f"{case.title}, eager", {n: times[n] for n in eager}, {"density": case.density}, targets)
    captured = {"ours": times["ours, captured"], f"dense, {fast}": times[f"dense, {fast}, captured"], published: times[published]}
    targets |= {f"dense, {fast}": 1 / DENSE_TARGET}
    print(table(f"{case.title}, ours and dense captured", captured, "ours", targets))
    record("step", f"{case.title}, ours and dense captured", captured, {"density": case.density}, targets)


@pytest.mark.skipif(not on_cpu(), reason="on a GPU steps are also captured")
@pytest.mark.parametrize("name", CASES)
def bench_step(thread_count, name):
    case = CASES[name]
    contest = Contest(case)
    contest.check()
    ours, dense, data = contest.ours, contest.dense, contest.data
    published, fast = ("published (WSN)", "fused") if case.wsn else ("published (SupSup)", "foreach")
    steps = {"ours": ours.step(data), published: contest.published.step(data), f"dense, {fast}": dense.step(data)}
    if len(case.shape) == 3:
        last = [(x.contiguous(memory_format=torch.channels_last), y) for x, y in data]
        steps |= {"ours, channels_last input": ours.step(last), f"dense, {fast}, channels_last input": dense.step(last)}
    steps |= {"ours, compiled": ours.step(data, compiled=True), f"dense, {fast}, compiled": dense.step(data, compiled=True)}
    for step in steps.values():
        for _ in range(3):  # torch.compile compiles here
            step()
    times = measure(steps, seconds=case.seconds)
    targets = targets_on(thread_count, {published: case.target, f"dense, {fast}": 1 / DENSE_TARGET})
    print("\n" + table(case.title, times, "ours", targets))
    record("step", case.title, times, {"density": case.density, "frozen": SHARE if case.wsn else 0.0}, targets)
