"""Conversion of an existing model: its layers become masked ones, in place, and plain ones again."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from subnet_kernels.kinds import DENSE, check_embedding
from subnet_kernels.layers import SubnetLayer, refresh
from subnet_kernels.live import Rule
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
    fan: ``"fan_in"`` or ``"fan_out"``, counted as ``torch.nn.init`` does; scale_fan: multiply it by the density first (hidden-networks).
    filter: which layers are masked: (name, module) -> bool, a module class, a name (glob) of a layer or of a module it lies in, or a list
    of classes and names; default all Linear, Conv1d-3d, ConvTranspose1d-3d and Embedding.
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
    filter: Callable[[str, nn.Module], bool] | type | str | Sequence[type | str] | None = None
    per_task: Sequence[str] = field(default_factory=tuple)

    def __post_init__(self):
        choice("SubnetConfig", "weight_init", self.weight_init, ("keep", "signed_constant", "kaiming_normal"))
        choice("SubnetConfig", "fan", self.fan, ("fan_in", "fan_out"))
        if isinstance(self.density, (int, float)):
            check_density("SubnetConfig", self.density)
        for item in () if _is_function(self.filter) else _items(self.filter):
            if not isinstance(item, (str, type)):
                raise ValueError(f"SubnetConfig: filter must be a function, or classes and names of modules, got {item!r}")
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
        check_density(name or "model", density)
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


def modules_named(model: nn.Module, patterns: Sequence[str], field: str) -> list[str]:
    """Names of the modules that the globs fit, without those that lie in another one. Raises ValueError where a glob fits none."""
    names = [name for name, _ in model.named_modules() if name]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(f"convert: {field} {pattern!r} must name a module of the model, which has {', '.join(names)}")
    found: list[str] = []
    for name in names:  # outer modules come before inner ones
        if not matches(name, found) and any(fnmatchcase(name, pattern) for pattern in patterns):
            found.append(name)
    return found


def _is_function(value: object) -> bool:
    return callable(value) and not isinstance(value, type)


def _items(value: object) -> Sequence[object]:
    return () if value is None else value if isinstance(value, (list, tuple)) else (value,)


def _filter(model: nn.Module, given: object) -> Callable[[str, nn.Module], bool]:
    """The function that ``SubnetConfig.filter`` stands for."""
    if given is None or _is_function(given):
        return given or (lambda name, module: True)
    classes = tuple(item for item in _items(given) if isinstance(item, type))
    named = modules_named(model, [item for item in _items(given) if isinstance(item, str)], "filter")
    return lambda name, module: isinstance(module, classes) or matches(name, named)


def convert(model: nn.Module, config: SubnetConfig) -> nn.Module:
    """Turn the layers of a model into masked ones, in place, and return it.

    Modules and Parameter objects keep their identity and state-dict keys; each masked layer gains ``scores``. Raises ValueError, with the
    model as it was, if a layer is masked already, its weight is parametrised or tied to another module's, an Embedding has ``max_norm`` or
    is sparse, or no layer fits. A layer is masked if its class is one of those exactly: a subclass has a forward of its own and stays
    dense. On the meta device scores have no values: they are drawn when ``to_empty`` or a checkpoint gives the weights theirs.
    """
    chosen: dict[str, nn.Module] = {}
    per_task = modules_named(model, config.per_task, "per_task")
    wanted = _filter(model, config.filter)
    for name, module in model.named_modules():
        if isinstance(module, SubnetLayer):
            raise ValueError(f"convert: module {name!r} must be dense, it is masked already ({type(module).__name__})")
        kind = parametrize.type_before_parametrizations(module)
        if matches(name, per_task) or kind not in DENSE or not wanted(name, module):
            continue
        if parametrize.is_parametrized(module) or not isinstance(module.weight, nn.Parameter):
            raise ValueError(f"convert: module {name!r} must have a plain weight, its weight is parametrised")
        if kind is nn.Embedding:
            check_embedding(f"convert: module {name!r}", module)
        chosen[name] = module
    if not chosen:
        raise ValueError(
            f"convert: expected a model with Linear, Conv or Embedding layers to mask, got none in {type(model).__name__}"
        )
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
        learns = module.weight.requires_grad
        module.weight.requires_grad_(config.train_weights)
        module.__class__ = DENSE[type(module)]
        module.install(config.rule(densities[name]))
        module._dense_learns, module.path = learns, name
    for module in _encoder_layers(model):
        if any(isinstance(m, SubnetLayer) for m in module.modules()):
            module.activation_relu_or_gelu = 0  # its fused inference path would read the dense weights past their masks
    # without functions, so that the model can be pickled; the densities are resolved
    model.subnet_config = replace(config, density=densities, filter=None, per_task=tuple(per_task))
    refresh(chosen.values())
    return model


def _encoder_layers(model: nn.Module) -> list[nn.TransformerEncoderLayer]:
    return [module for module in model.modules() if isinstance(module, nn.TransformerEncoderLayer)]


@torch.no_grad()
def unconvert(model: nn.Module, *, merge: bool = False) -> nn.Module:
    """Turn the masked layers of a model into the plain ones that they were made from, in place, and return it.

    merge: every layer's weight becomes the effective weight that its forward uses now, of the live mask, the active task or a
    superposition; otherwise it stays as it is, so that a model converted and unconverted is the one that it was, to the bit. Parameter
    objects keep their identity; a bank over the model is of no use any more (`MaskBank.export` gives a plain copy in its place). Plain
    layers multiply by PyTorch's own product, so a merged float32 Linear on the CPU agrees with the masked one up to rounding, and
    everything else to the bit. Raises ValueError if no layer is masked or rows have tasks of their own.
    """
    layers = [module for module in model.modules() if isinstance(module, SubnetLayer)]
    if not layers:
        raise ValueError(f"unconvert: expected a converted model, got {type(model).__name__} without a masked layer")
    if merge and any(layer._rows is not None for layer in layers):
        raise ValueError("unconvert: the model must run one task to be merged, every row has its own: leave bank.rows first")
    for layer in layers:
        effective = layer.effective_weight().clone() if merge else None
        layer.uninstall()
        if effective is not None:
            layer.weight.copy_(effective)
    for module in _encoder_layers(model):
        kind = module.activation
        relu, gelu = kind is F.relu or isinstance(kind, nn.ReLU), kind is F.gelu or isinstance(kind, nn.GELU)
        module.activation_relu_or_gelu = 1 if relu else 2 if gelu else 0  # as its constructor has it
    model.__dict__.pop("subnet_config", None)
    return model


def _join(module: str, parameter: str) -> str:
    return f"{module}.{parameter}" if module else parameter


def dense_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The state dict that the dense model had: without scores. Loads into it, and into a converted model."""
    masked = {_join(name, "scores") for name, m in model.named_modules() if isinstance(m, SubnetLayer)}
    return {key: value for key, value in model.state_dict().items() if key not in masked}
