"""Modules that every task has one of its own of (``SubnetConfig.per_task``): copies, fresh ones, and ones from a file."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn


def tensors_of(module: nn.Module) -> list[Tensor]:
    """Parameters and persistent buffers."""
    return list(module.state_dict(keep_vars=True).values())


def like(module: nn.Module) -> Tensor:
    """A tensor whose device and floating dtype are the module's."""
    return next((t for t in tensors_of(module) if t.is_floating_point()), torch.empty(0))


def fixed_copy(module: nn.Module) -> nn.Module:
    """A copy that learns nothing."""
    return copy.deepcopy(module).requires_grad_(False)


def fresh(module: nn.Module, name: str, outputs: int | None) -> nn.Module:
    """A module like this one with new parameters, drawn on the CPU so that every device gets the same ones."""
    if outputs is not None:
        if type(module) is not nn.Linear:
            raise ValueError(f"begin: module {name!r} must be a Linear to be given a width, got {type(module).__name__}")
        weight = module.weight
        new = nn.Linear(module.in_features, outputs, module.bias is not None, device="cpu", dtype=weight.dtype)
        return new.to(weight.device).train(module.training)
    new, device = copy.deepcopy(module).requires_grad_(True), like(module).device
    if device.type not in ("cpu", "meta"):
        new.cpu()
    for part in new.modules():
        if hasattr(part, "reset_parameters"):
            part.reset_parameters()
    return new if device.type == "meta" else new.to(device)


def from_state(template: nn.Module, state: Mapping[str, Tensor], path: Path | str, name: str) -> nn.Module:
    """A copy of the template with these tensors; a Linear takes their width. Draws no random numbers."""
    module = fixed_copy(template)
    mine = module.state_dict()
    if set(mine) != set(state):
        raise ValueError(f"load: {path} must hold {', '.join(mine)} of module {name!r}, got {', '.join(state) or 'nothing'}")
    if type(module) is nn.Linear and state["weight"].dim() == 2:
        outputs = state["weight"].shape[0]
        for key, value in list(module.named_parameters()):
            setattr(module, key, nn.Parameter(value.new_empty((outputs, *value.shape[1:])), requires_grad=False))
        module.out_features, mine = outputs, module.state_dict()
    for key, value in mine.items():
        if kind_of(value) != kind_of(state[key]):
            raise ValueError(f"load: {path} must hold {kind_of(value)} as {key!r} of module {name!r}, got {kind_of(state[key])}")
    module.load_state_dict(state)
    return module


def kind_of(tensor: Tensor) -> str:
    """Dtype and shape, for messages."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
