"""A task by itself: its masks baked into a dense module, and a snapshot that cannot be changed."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from subnet_kernels.convert import unconvert
from subnet_kernels.heads import fixed_copy, like


def baked(
    model: nn.Module, weights: Mapping[str, Tensor], state: Mapping[str, Tensor], modules: Mapping[str, nn.Module]
) -> nn.Module:
    """A dense copy of a converted model with these effective weights, task state and ``per_task`` modules; it shares nothing with them."""
    kept, new = {}, {}
    for key, weight in weights.items():
        layer = model.get_submodule(key)
        new[key] = kept[id(layer.weight)] = nn.Parameter(weight, requires_grad=False)
        for name in "scores bits w_eff hints frozen frozen_values _active".split():  # which the copy is to lose: not copied
            if (tensor := getattr(layer, name)) is not None:
                kept[id(tensor)] = tensor
    dense = unconvert(copy.deepcopy(model, kept))
    for weight in new.values():
        weight.requires_grad_(False)
    tensors = dict([*dense.named_parameters(), *dense.named_buffers()])
    with torch.no_grad():
        for key, value in state.items():
            tensors[key].copy_(value)
    for key, module in modules.items():
        current = dense.get_submodule(key)
        dense.set_submodule(key, fixed_copy(module).to(like(current)).train(current.training))
    return dense


class TaskView(nn.Module):
    """One task of a bank as a module that cannot be changed: parameters need no gradient, mode is eval, attributes are fixed."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module.eval().requires_grad_(False)
        self.training = False
        self.__dict__["_fixed"] = True

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)

    def train(self, mode: bool = True) -> TaskView:
        if mode:
            raise RuntimeError("TaskView: a view stays in eval mode, it is a snapshot; train the model and commit again")
        return self

    def load_state_dict(self, *_, **__):
        raise RuntimeError("TaskView: a view cannot be loaded into, it is a snapshot; take a new one from the bank")

    def _apply(self, *_, **__):
        raise RuntimeError("TaskView: a view cannot be moved or cast, it is a snapshot; do so with what bank.export gives")

    def requires_grad_(self, requires_grad: bool = True) -> TaskView:
        if requires_grad:
            raise RuntimeError("TaskView: a view's parameters learn nothing, it is a snapshot; train the model and commit again")
        return self

    def __setattr__(self, name, value):
        if self.__dict__.get("_fixed"):
            raise AttributeError(f"TaskView: attribute {name!r} cannot be set, a view is a snapshot")
        super().__setattr__(name, value)
