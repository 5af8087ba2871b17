"""SupSup on a plain nn.Sequential: masks over fixed random weights, and whose task a batch is of found in one step.

python examples/supsup_mlp.py
"""

import torch
import torch.nn.functional as F
from torch import nn

import subnet_kernels as sk
from subnet_pipelines.benchmarks.mnist import load

TASKS, BATCH = 5, 128


def permuted(task, half):
    """MNIST with the pixels in a task's own order."""
    x, y = load(None)[half]
    order = torch.randperm(784, generator=torch.Generator().manual_seed(task))
    return x.flatten(1).float().div(255)[:, order], y


def entropy(logits):
    return -(logits.softmax(1) * logits.log_softmax(1)).sum(1)


torch.manual_seed(0)
net = nn.Sequential(nn.Linear(784, 300, bias=False), nn.ReLU(), nn.Linear(300, 100, bias=False), nn.ReLU())
net.append(nn.Linear(100, 10, bias=False))
model = sk.convert(net, sk.SubnetConfig(density=0.5, weight_init="signed_constant"))  # weights do not learn
bank = sk.MaskBank(model)
for task in range(TASKS):
    bank.begin(scores="init")
    optimizer = sk.optim.RMSprop([layer.scores for layer in bank.layers()], 3e-4, fuse_ste=True)
    x, y = permuted(task, half=0)
    for _ in range(3):
        for rows in torch.randperm(len(x)).split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
    bank.commit(f"permutation {task}")

# all masks at once, each with the same weight: the one that takes the entropy down fastest is the task's
found, right = 0, 0
for task in range(TASKS):
    x, y = (t[:BATCH] for t in permuted(task, half=1))
    alphas = bank.superpose(None)
    (slope,) = torch.autograd.grad(entropy(model(x)).mean(), alphas)
    name = bank.names[int(slope.argmin())]
    found += name == f"permutation {task}"
    with bank.as_task(name), torch.no_grad():
        right += (model(x).argmax(1) == y).float().mean().item() / TASKS
print(f"{found} of {TASKS} tasks found without being told, {right:.0%} of their images right")
print(f"{bank.capacity()['mask_bytes'] / TASKS / 1024:.0f} KiB a task")
