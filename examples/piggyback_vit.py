"""Piggyback on a ViT from transformers: a frozen, pretrained backbone, and a threshold mask and a head for each task.

python examples/piggyback_vit.py
"""

import torch
import torch.nn.functional as F
from transformers import ViTConfig, ViTForImageClassification

import subnet_kernels as sk
from subnet_pipelines.benchmarks.mnist import load

VIEWS = {"upright": lambda x: x, "upside down": lambda x: x.flip(2), "negative": lambda x: -x}


def images(view, half):
    x, y = load(None)[half]
    return VIEWS[view]((x[:, None].float() / 255 - 0.1307) / 0.3081), y


def learn(model, parameters, rate, view, epochs):
    x, y = images(view, half=0)
    optimizer = torch.optim.Adam(parameters, rate)
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(50):
            optimizer.zero_grad()
            F.cross_entropy(model(x[rows]).logits, y[rows]).backward()
            optimizer.step()


def accuracy(model, view):
    x, y = images(view, half=1)
    with torch.no_grad():
        return (model(x).logits.argmax(1) == y).float().mean().item()


torch.manual_seed(0)
config = ViTConfig(
    image_size=28, patch_size=7, num_channels=1, hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2
)
config.num_labels = 10
net = ViTForImageClassification(config)
learn(net, net.parameters(), 2e-3, "upright", epochs=4)  # stands for a checkpoint

model = sk.convert(net.requires_grad_(False), sk.SubnetConfig(select="threshold", value=5e-3, per_task=["classifier"]))
bank = sk.MaskBank(model)
before = {view: accuracy(net, view) for view in VIEWS}
for view in VIEWS:
    bank.begin()
    for layer in bank.layers():
        torch.nn.init.constant_(layer.scores, 1e-2)  # every weight open at first, as in the paper
    learn(model, [p for p in model.parameters() if p.requires_grad], 1e-3, view, epochs=3)
    bank.commit(view)
bank.verify()  # the backbone is what it was
for view in VIEWS:
    with bank.as_task(view):
        print(f"{view}: {accuracy(model, view):.0%} right with its mask, {before[view]:.0%} by the backbone alone")
