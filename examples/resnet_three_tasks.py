"""A ResNet from transformers, converted; three tasks on the shipped MNIST images; a batch whose rows are of all three.

python examples/resnet_three_tasks.py
"""

# %% The model is as its authors wrote it, here a small one; nothing of it changes but the layers that are masked.
import torch
import torch.nn.functional as F
from transformers import ResNetConfig, ResNetForImageClassification

import subnet_kernels as sk
from subnet_pipelines.benchmarks.mnist import load

torch.manual_seed(0)
sizes = [16, 32, 48, 64]
net = ResNetForImageClassification(
    ResNetConfig(num_channels=1, embedding_size=16, hidden_sizes=sizes, depths=[1, 1, 1, 1], layer_type="basic", num_labels=4)
)
model = sk.convert(net, sk.SubnetConfig(density=0.4, train_weights=True, per_task=["classifier.1"]))
bank = sk.MaskBank(model)
print(f"{len(bank.layers())} masked layers, {sum(m.weight.numel() for m in bank.layers()):,} weights")

# %% Three tasks of digits, with heads of 4, 3 and 3 outputs.
tasks = {"0 to 3": range(4), "4 to 6": range(4, 7), "7 to 9": range(7, 10)}


def images_of(digits, half):
    x, y = load(None)[half]
    x, y = x[(y >= digits[0]) & (y <= digits[-1])], y[(y >= digits[0]) & (y <= digits[-1])] - digits[0]
    return F.pad(x[:, None].float() / 255, (2, 2, 2, 2)), y


for name, digits in tasks.items():
    bank.begin(per_task={"classifier.1": len(digits)})
    x, y = images_of(digits, half=0)
    optimizer = torch.optim.AdamW(model.train().parameters(), 3e-3)
    for rows in torch.cat([torch.randperm(len(x)) for _ in range(4)]).split(50):
        optimizer.zero_grad()
        F.cross_entropy(model(x[rows]).logits, y[rows]).backward()
        optimizer.step()
    bank.commit(name)
bank.verify()  # no weight of an earlier task moved

# %% Each task by itself, after all were learnt.
model.eval()
for name, digits in tasks.items():
    x, y = images_of(digits, half=1)
    with bank.as_task(name), torch.no_grad():
        print(f"{name}: {(model(x[:200]).logits.argmax(1) == y[:200]).float().mean():.0%} right")

# %% One batch with rows of all three: each goes through its own task's mask, norms and head.
names = [name for name in tasks for _ in range(8)]
x = torch.cat([images_of(digits, half=1)[0][:8] for digits in tasks.values()])
with bank.rows(names), torch.no_grad():
    logits = model(x).logits
print(f"a batch of {len(x)} rows of {len(tasks)} tasks: logits {tuple(logits.shape)}")
