"""Conversion of an existing model: its linear and convolutional layers become masked ones, in place."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from subnet_kernels.layers import DENSE, Rule, SubnetLayer, refresh
from subnet_kernels.ops._checks import choice
from subnet_kernels.ops.select import check_density


@dataclass(frozen=True)
class ErdosRenyi:
    """Density of a layer from its shape: min(.5, s (out + in) / (out in kernel)); a larger s is denser. SupSup's GG scenario."""

    s: float

    def __call__(self, shape: Sequence[int]) -> float:
        out, inp, *kernel = shape
        return min(0.5, self.s * (out + inp) / (out * inp * math.prod(kernel)))


@dataclass(frozen=True)
class SubnetConfig:
    """What `convert` makes of a model.

    density: a share in (0, 1], {glob over module names: share}, a callable of a weight's shape, or `ErdosRenyi`.
    k_rule, by, ties, select, value, inclusive: as `Rule`.
    train_weights: weights learn beside the scores (WSN); otherwise they are fixed (SupSup).
    weight_init: ``"keep"``, ``"signed_constant"`` (the sign of the present weight times sqrt(2 / fan)) or ``"kaiming_normal"``.
    fan: ``"fan_in"`` or ``"fan_out"``; scale_fan: multiply it by the density first (hidden-networks).
    filter: (name, module) -> bool, which layers are masked; default all Linear, Conv1d, Conv2d, Conv3d.
    per_task: names (globs) of modules that stay dense and that every task has for itself, such as heads.
    Raises ValueError on a bad field.
    """

    density: float | Mapping[str, float] | Callable[[Sequence[int]], float] = 0.5
    k_rule: str = "sort"
    by: str = "magnitude"
    ties: str = "last"
    select: str = "topk"
    value: float = 0.0
    inclusive: bool = True
    train_weights: bool = False
    weight_init: str = "keep"
    fan: str = "fan_in"
    scale_fan: bool = False
    filter: Callable[[str, nn.Module], bool] | None = None
    per_task: Sequence[str] = field(default_factory=tuple)

    def __post_init__(self):
        choice("SubnetConfig", "weight_init", self.weight_init, ("keep", "signed_constant", "kaiming_normal"))
        choice("SubnetConfig", "fan", self.fan, ("fan_in", "fan_out"))
        if isinstance(self.density, (int, float)):
            check_density("SubnetConfig", self.density)
        self.rule(0.5)
        if self.select == "signed" and self.train_weights:
            raise ValueError(
                "SubnetConfig: train_weights must be False where select is 'signed', a learning weight has its own sign"
            )

    def rule(self, density: float) -> Rule:
        """The `Rule` of a layer of that density."""
        return Rule(density, self.k_rule, self.by, self.ties, self.select, self.value, self.inclusive)

    def layer_density(self, name: str, shape: Sequence[int]) -> float:
        """Density of the layer of that name and weight shape. Raises ValueError where no pattern fits or it is out of range."""
        density = self.density
        if isinstance(density, Mapping):
            fits = [share for pattern, share in density.items() if fnmatchcase(name, pattern)]
            if not fits:
                raise ValueError(
                    f"SubnetConfig: density must have a pattern for layer {name!r}, got {', '.join(map(repr, density))}"
                )
            density = fits[0]
        elif callable(density):
            density = density(tuple(shape))
        check_density(f"layer {name!r}", density)
        return density


def _fan(weight: Tensor, mode: str) -> int:
    receptive = weight[0][0].numel() if weight.dim() > 2 else 1
    return (weight.shape[1] if mode == "fan_in" else weight.shape[0]) * receptive


@torch.no_grad()
def signed_constant_(weight: Tensor, fan: str = "fan_in", scale: float = 1.0) -> Tensor:
    """Signed Kaiming constant, in place: sign(w) * sqrt(2 / (fan * scale)); an exact 0 stays 0 (Ramanujan et al. 2020)."""
    return weight.copy_(weight.sign() * math.sqrt(2.0 / (_fan(weight, fan) * scale)))


@torch.no_grad()
def _kaiming_normal_(weight: Tensor, fan: str, scale: float) -> Tensor:
    return weight.normal_(0, math.sqrt(2.0 / (_fan(weight, fan) * scale)))


def matches(name: str, modules: Sequence[str]) -> bool:
    """Whether a module's or tensor's name is one of these modules' or lies in one of them."""
    return any(name == module or name.startswith(module + ".") for module in modules)


def per_task_modules(model: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Names of the modules that the globs fit, without those that lie in another one. Raises ValueError where a glob fits none."""
    names = [name for name, _ in model.named_modules() if name]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(f"convert: per_task {pattern!r} must name a module of the model, which has {', '.join(names)}")
    found: list[str] = []
    for name in names:  # outer modules come before inner ones
        if not matches(name, found) and any(fnmatchcase(name, pattern) for pattern in patterns):
            found.append(name)
    return found


def convert(model: nn.Module, config: SubnetConfig) -> nn.Module:
    """Turn the layers of a model into masked ones, in place, and return it.

    Modules and Parameter objects keep their identity and state-dict keys; each masked layer gains ``scores``. Raises ValueError, with the
    model as it was, if a layer is masked already, its weight is parametrised or tied to another module's, or no layer fits.
    """
    chosen: dict[str, nn.Module] = {}
    per_task = per_task_modules(model, config.per_task)
    for name, module in model.named_modules():
        if isinstance(module, SubnetLayer):
            raise ValueError(f"convert: module {name!r} must be dense, it is masked already ({type(module).__name__})")
        kind = parametrize.type_before_parametrizations(module)
        if matches(name, per_task) or kind not in DENSE or not (config.filter is None or config.filter(name, module)):
            continue
        if parametrize.is_parametrized(module) or not isinstance(module.weight, nn.Parameter):
            raise ValueError(f"convert: module {name!r} must have a plain weight, its weight is parametrised")
        chosen[name] = module
    if not chosen:
        raise ValueError(f"convert: expected a model with Linear or Conv layers to mask, got none in {type(model).__name__}")
    weights: dict[int, str] = {}
    for name, module in chosen.items():
        weights.setdefault(id(module.weight), _join(name, "weight"))
    for name, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            mine, other = _join(name, key), weights.get(id(parameter))
            if other not in (None, mine):
                raise ValueError(f"convert: weights must not be tied, {mine!r} is {other!r}")
    shared = config.select != "threshold"
    densities = {name: config.layer_density(name, m.weight.shape) if shared else 0.5 for name, m in chosen.items()}
    for name, module in chosen.items():
        scale = densities[name] if config.scale_fan else 1.0
        if config.weight_init == "signed_constant":
            signed_constant_(module.weight, config.fan, scale)
        elif config.weight_init == "kaiming_normal":
            _kaiming_normal_(module.weight, config.fan, scale)
        module.weight.requires_grad_(config.train_weights)
        module.__class__ = DENSE[type(module)]
        module.install(config.rule(densities[name]))
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer) and any(isinstance(m, SubnetLayer) for m in module.modules()):
            module.activation_relu_or_gelu = 0  # its fused inference path would read the dense weights past their masks
    # without functions, so that the model can be pickled; the densities are resolved
    model.subnet_config = replace(config, density=densities, filter=None, per_task=tuple(per_task))
    refresh(chosen.values())
    return model


def _join(module: str, parameter: str) -> str:
    return f"{module}.{parameter}" if module else parameter


def dense_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The state dict that the dense model had: without scores. Loads into it, and into a converted model."""
    masked = {_join(name, "scores") for name, m in model.named_modules() if isinstance(m, SubnetLayer)}
    return {key: value for key, value in model.state_dict().items() if key not in masked}
