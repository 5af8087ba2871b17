"""A small converted network with a bank of tasks over it, for the tests of banks."""

import torch
from device import generator
from torch import nn

import subnet_kernels as sk
from subnet_kernels import reference


class Net(nn.Module):
    """Convolution, norm, masked and fixed layers, and a head for each task."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.hidden = nn.Linear(6, 30)
        self.fixed = nn.Linear(30, 30).requires_grad_(False)  # dense and shared by all tasks
        self.fc = nn.Linear(30, 4)

    def forward(self, x):
        x = self.norm(self.conv(x)).relu().mean((2, 3))
        return self.fc(self.fixed(self.hidden(x).relu()))


def net(train_weights=True, seed=0):
    torch.manual_seed(seed)
    only = lambda name, m: name in ("conv", "hidden")  # noqa: E731
    config = sk.SubnetConfig(density={"conv": 0.4, "hidden": 0.2}, train_weights=train_weights, filter=only, per_task=["fc"])
    return sk.convert(Net(), config)


def images(n=5, seed=1):
    return torch.randn(n, 2, 6, 6, generator=generator(seed))


def learn(model, seed, steps=2):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.5, momentum=0.9)
    chance = generator(seed)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(8, 2, 6, 6, generator=chance)).square().mean().backward()
        optimizer.step()
    return model.eval()


def learnt(tasks=3, train_weights=True, widths=(4, 7, 2)):
    """A bank of some tasks with heads of different widths, and each task's logits at its commit."""
    model = net(train_weights)
    bank = sk.MaskBank(model)
    logits = {}
    for t in range(tasks):
        bank.begin(scores="init" if t else "keep", per_task={"fc": widths[t % len(widths)]})
        learn(model, t)
        logits[f"task {t}"] = model(images()).detach()
        bank.commit(f"task {t}")
    return model, bank, logits


def outputs(model, bank):
    found = {}
    for name in bank.names:
        bank.activate(name)
        found[name] = model(images()).detach()
    bank.activate(None)
    return found


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())


def clone(state):
    return {k: v.clone() for k, v in state.items()}


def masks_of(bank, name):
    return {key: reference.unpack(bits, bank.model.get_submodule(key).weight.shape) for key, bits in bank.bits(name).items()}


def model_of(state):
    """A new model with the shared weights of a saved one, its own head and its own scores."""
    model = net(seed=5)
    fc = model.fc
    model.fc = nn.Linear(30, state["fc.weight"].shape[0])
    model.load_state_dict(state)
    model.fc = fc
    return model.eval()
