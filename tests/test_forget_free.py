"""The promise: whatever the optimizer, nothing that an earlier task uses moves by a bit, and neither do its logits."""

import copy

import pytest
import torch
import torch.nn.functional as F
from device import DEVICE, generator
from torch import nn

import subnet_kernels as sk
from subnet_kernels import optim, reference

WIDTHS = (3, 5, 2)


def net():
    torch.manual_seed(0)
    model = nn.Sequential()
    model.add_module("conv", nn.Conv2d(2, 6, 3, padding=1))
    model.add_module("norm", nn.BatchNorm2d(6))
    model.add_module("relu", nn.ReLU())
    model.add_module("flat", nn.Flatten())
    model.add_module("hidden", nn.Linear(6 * 16, 20))
    model.add_module("norm2", nn.BatchNorm1d(20, momentum=0.5))
    model.add_module("head", nn.Linear(20, WIDTHS[0]))
    config = sk.SubnetConfig(
        density={"conv": 0.3, "hidden": 0.2}, k_rule="kth", ties="all", train_weights=True, per_task=["head"]
    )
    return sk.convert(model, config)


OPTIMIZERS = {
    "Adam": {"lr": 0.01},
    "AdamW": {"lr": 0.01, "weight_decay": 0.1},
    "SGD": {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1},
    "RMSprop": {"lr": 0.003, "momentum": 0.5, "weight_decay": 0.1},
}


def data(task, n=8):
    chance = generator(100 + task)
    return torch.randn(n, 2, 4, 4, generator=chance), torch.randint(WIDTHS[task], (n,), generator=chance)


def train(model, optimizer, task, how, steps=4):
    model.train()
    x, y = data(task)
    scaler = torch.amp.GradScaler(DEVICE, init_scale=2.0**10, enabled=how == "amp")
    for _ in range(steps):
        optimizer.zero_grad()
        with torch.autocast(DEVICE, torch.bfloat16, enabled=how == "amp"):
            loss = F.cross_entropy(model(x).float(), y)
        scaler.scale(loss).backward()
        if how == "clipping":
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        scaler.step(optimizer)
        scaler.update()
    model.eval()


def raw(tensor):
    return tensor.detach().contiguous().view(torch.uint8).clone()


def logits(model, bank, name):
    bank.activate(name)
    with torch.no_grad():
        y = raw(model(data(0)[0]))
    bank.activate(None)
    return y


def frozen_of(bank, tensors):
    """The bytes of what is frozen, of one tensor a layer."""
    return [raw(t[reference.unpack(m.frozen, m.weight.shape)]) for m, t in zip(bank.layers(), tensors)]


def state_of(bank, optimizer):
    """The bytes of the optimizer's state of frozen weights."""
    found = {}
    for layer in bank.layers():
        for key, value in optimizer.state[layer.weight].items():
            if isinstance(value, torch.Tensor) and value.shape == layer.weight.shape:
                found[id(layer), key] = raw(value[reference.unpack(layer.frozen, layer.weight.shape)])
    return found


@pytest.mark.parametrize(
    ("how", "reuse"),
    [("plain", False), ("plain", True), ("clipping", True), ("amp", True)],
    ids=["new", "reused", "clipping", "amp"],
)
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("module", [torch.optim, optim], ids=["torch", "ours"])
def test_nothing_is_forgotten(module, name, how, reuse):
    model = net()
    bank = sk.MaskBank(model)
    make = lambda: getattr(module, name)(model.parameters(), **OPTIMIZERS[name])  # noqa: E731
    optimizer, before = make(), {}
    for task in range(3):
        if task:
            frozen, state = frozen_of(bank, [m.weight for m in bank.layers()]), state_of(bank, optimizer)
            free = [m.weight.detach().clone() for m in bank.layers()]
            bank.begin(scores="init" if task == 1 else "keep", per_task={"head": WIDTHS[task]})
            if reuse:
                optimizer.add_param_group({"params": list(model.head.parameters())})
            else:
                optimizer = make()
        train(model, optimizer, task, how)
        if task:
            assert all(len(f) for f in frozen)
            assert all(map(torch.equal, frozen, frozen_of(bank, [m.weight for m in bank.layers()])))
            assert any(not torch.equal(w, m.weight) for w, m in zip(free, bank.layers()))  # what is free does learn
            for kept, y in before.items():
                assert torch.equal(y, logits(model, bank, kept)), kept
            if reuse and module is optim:
                assert state
                assert all(torch.equal(v, state_of(bank, optimizer)[k]) for k, v in state.items())
            bank.verify()
        bank.commit(f"task {task}")
        for kept in bank.names:
            before.setdefault(kept, logits(model, bank, kept))
    assert len(before) == 3


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_pressure_is_real(name):
    """Thawed, the same weights move: the test above would see it if nothing held them."""
    model = net()
    bank = sk.MaskBank(model)
    optimizer = getattr(torch.optim, name)(model.parameters(), **OPTIMIZERS[name])
    train(model, optimizer, 0, "plain")
    bank.commit("task 0")
    y, frozen = logits(model, bank, "task 0"), frozen_of(bank, [m.weight for m in bank.layers()])
    masks = [m.frozen for m in bank.layers()]
    for layer in bank.layers():
        layer.frozen = layer.frozen_values = None
    bank.begin(per_task={"head": WIDTHS[1]})
    train(model, optimizer, 1, "plain")
    for layer, mask in zip(bank.layers(), masks):
        layer.frozen = mask
    assert not any(map(torch.equal, frozen, frozen_of(bank, [m.weight for m in bank.layers()])))
    assert not torch.equal(y, logits(model, bank, "task 0"))


@pytest.mark.parametrize("module", [torch.optim, optim], ids=["torch", "ours"])
def test_state_from_before_the_freeze_does_not_move_weights(module):
    """A momentum that was gathered while a weight was free goes on pushing after it is frozen, without any gradient."""
    model = net()
    bank = sk.MaskBank(model)
    optimizer = module.SGD(model.parameters(), 0.1, momentum=0.9)
    train(model, optimizer, 0, "plain")
    bank.commit("task 0")
    frozen = frozen_of(bank, [m.weight for m in bank.layers()])
    for layer in bank.layers():
        mask = reference.unpack(layer.frozen, layer.weight.shape)
        assert (optimizer.state[layer.weight]["momentum_buffer"][mask] != 0).any()
        layer.weight.grad = torch.zeros_like(layer.weight)
    optimizer.step()
    assert all(map(torch.equal, frozen, frozen_of(bank, [m.weight for m in bank.layers()])))


def test_special_values_stay_to_the_bit():
    """Frozen NaN, inf, -0.0 and denormals come through a step of an optimizer that would quiet them."""
    model = net()
    bank = sk.MaskBank(model)
    special = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 0.0, 1e-42])
    special = torch.cat([special, torch.tensor([0x7FC12345, 0x7F812345], dtype=torch.int32).view(torch.float32)])
    with torch.no_grad():
        model.conv.scores.view(-1)[:8] = 9.0
        model.conv.weight.view(-1)[:8] = special
    optimizer = torch.optim.AdamW(model.parameters(), 0.1, weight_decay=0.5)
    bank.commit("a")
    frozen = frozen_of(bank, [m.weight for m in bank.layers()])
    for layer in bank.layers():
        layer.weight.grad = torch.ones_like(layer.weight)
    optimizer.step()
    assert all(map(torch.equal, frozen, frozen_of(bank, [m.weight for m in bank.layers()])))
    assert torch.equal(raw(model.conv.weight.view(-1)[:8]), raw(special))


def test_through_a_closure_and_a_schedule():
    model = net()
    bank = sk.MaskBank(model)
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.5, max_iter=3)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    x, y = data(0)

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    optimizer.step(closure)
    bank.commit("a")
    before, frozen = logits(model, bank, "a"), frozen_of(bank, [m.weight for m in bank.layers()])
    for _ in range(2):
        optimizer.step(closure)
        schedule.step()
    assert all(map(torch.equal, frozen, frozen_of(bank, [m.weight for m in bank.layers()])))
    assert torch.equal(before, logits(model, bank, "a"))
    for layer in bank.layers():
        assert torch.equal(layer.bits, reference.select([layer.scores], [layer.k], "magnitude", "all")[0])


def test_a_copy_trains_on_without_forgetting():
    """A deep copy keeps what is frozen; and the original is not held by the copy's optimizer."""
    model = net()
    bank = sk.MaskBank(model)
    train(model, torch.optim.SGD(model.parameters(), 0.1), 0, "plain")
    bank.commit("task 0")
    other = copy.deepcopy(model)
    train(other, torch.optim.SGD(other.parameters(), 0.1, weight_decay=0.1), 0, "plain")
    for name, layer in (("conv", model.conv), ("hidden", model.hidden)):
        mask = reference.unpack(layer.frozen, layer.weight.shape)
        assert torch.equal(other.get_submodule(name).weight[mask], layer.weight[mask])
        assert not torch.equal(other.get_submodule(name).weight, layer.weight)
