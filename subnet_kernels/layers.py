"""Drop-in layers whose weights are used through a mask.

Selection is not part of the autograd graph. Between optimizer steps a live layer's ``bits`` equal ``select(scores)`` and its
``w_eff`` equals ``apply(weight, bits)``: a hook after every optimizer step puts frozen values back and refreshes all of that
optimizer's layers in one call, and an eager forward refreshes a layer whose scores or weight moved otherwise. Writes through
``.data`` move no version counter: call `refresh` after them.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from subnet_kernels import ops, reference
from subnet_kernels.ops._checks import BY, TIES, choice
from subnet_kernels.ops.apply import straight_through
from subnet_kernels.ops.masked import SubnetWeight
from subnet_kernels.ops.select import check_density, k_kth, k_sort
from subnet_kernels.ops.superpose import superpose_weight


@dataclass(frozen=True)
class Rule:
    """How a layer's mask follows from its scores.

    density: kept share in (0, 1], for ``select="topk"``; k_rule: ``"sort"`` (SupSup's count) or ``"kth"`` (WSN's); by, ties: as
    `subnet_kernels.select`; select: ``"topk"``, or ``"threshold"`` for score >= value (> value if not inclusive).
    Raises ValueError on a bad field.
    """

    density: float = 0.5
    k_rule: str = "sort"
    by: str = "magnitude"
    ties: str = "last"
    select: str = "topk"
    value: float = 0.0
    inclusive: bool = True

    def __post_init__(self):
        check_density("Rule", self.density)
        choice("Rule", "k_rule", self.k_rule, ("sort", "kth"))
        choice("Rule", "by", self.by, BY)
        choice("Rule", "ties", self.ties, TIES)
        choice("Rule", "select", self.select, ("topk", "threshold"))

    def k(self, n: int) -> int:
        """Kept weights of a layer of n."""
        return (k_sort if self.k_rule == "sort" else k_kth)(n, self.density)

    @property
    def key(self) -> str:
        """What the scores are compared by: their sign enters the straight-through rule only where it is the magnitude."""
        return self.by if self.select == "topk" else "value"


class LiveWeight(torch.autograd.Function):
    """The materialised effective weight in place of (weight, scores); gradients straight through to both."""

    generate_vmap_rule = True

    @staticmethod
    def forward(weight, scores, w_eff, bits, frozen, by):
        return (
            w_eff.detach()
        )  # shares the version counter: a refresh between forward and backward is an error, not a wrong gradient

    @staticmethod
    def setup_context(ctx, inputs, output):
        weight, scores, _, bits, frozen, ctx.by = inputs
        ctx.save_for_backward(weight, scores, bits, frozen)

    @staticmethod
    def backward(ctx, grad):
        weight, scores, bits, frozen = ctx.saved_tensors
        need_weight, need_scores = ctx.needs_input_grad[:2]
        d_weight, d_scores = straight_through(grad, weight, scores, bits, frozen, ctx.by, need_weight, need_scores)
        return d_weight if need_weight else None, d_scores if need_scores else None, None, None, None, None


class SubnetLayer:
    """What masked layers have in common; mixed into a dense layer class that has a ``weight``.

    scores: Parameter like weight; bits: uint8 packed live mask; w_eff: the live effective weight, contiguous; frozen: packed bits of
    weights that may not move, or None; frozen_values: their values, compact, in logical order.
    """

    def install(self, rule: Rule, scores: Tensor | None = None) -> None:
        """Turn a constructed dense layer into a masked one: adds scores (drawn from U(-1/sqrt(fan_in), 1/sqrt(fan_in)) unless given)."""
        weight = self.weight
        if scores is None:
            scores = torch.empty_like(weight, memory_format=torch.contiguous_format)
            if not scores.is_meta:
                init_scores_(scores)
        self.scores = nn.Parameter(scores)
        self.rule = rule
        self.train_weight = weight.requires_grad
        self.frozen: Tensor | None = None
        self.frozen_values: Tensor | None = None
        self._active: Tensor | None = None  # effective weight of the active task
        self._mix: tuple | None = None  # (bank, alphas, equal, counts) of a superposition
        self._trace: list | None = None  # (input, output) of each superposed forward, where somebody wants row gradients
        self._allocate()
        _register(self)

    def _allocate(self) -> None:
        weight = self.weight
        self.k = self.rule.k(weight.numel())
        self.bits = weight.new_zeros(reference.nbytes(weight.numel()), dtype=torch.uint8)
        self.w_eff = torch.empty_like(weight, memory_format=torch.contiguous_format, requires_grad=False)
        self.hints = torch.zeros(4, dtype=torch.float64, device=weight.device)
        self._seen: tuple | None = None

    @property
    def density(self) -> float:
        """Kept share; setting it recomputes k and refreshes."""
        return self.rule.density

    @density.setter
    def density(self, density: float) -> None:
        self.rule = Rule(**{**vars(self.rule), "density": density})
        self.k = self.rule.k(self.weight.numel())
        refresh([self])

    def _now(self) -> tuple:
        scores, weight = self.scores, self.weight
        return scores._version, weight._version, id(scores), id(weight)

    def effective_weight(self) -> Tensor:
        """The weight that forward uses, in the autograd graph: live, of the active task, or superposed."""
        if self._active is not None:
            return self._active
        if self._mix is not None:
            bank, alphas, equal, counts = self._mix
            return superpose_weight(self.weight.detach(), bank, alphas, equal, counts)
        weight, scores = self.weight, self.scores
        if not (isinstance(weight, nn.Parameter) and isinstance(scores, nn.Parameter)):
            return self._stateless(weight, scores)
        if not torch.compiler.is_compiling() and self._seen != self._now():
            if self._seen is None or self._seen[2:] != (id(scores), id(weight)):
                _changed()
            refresh([self])
        return LiveWeight.apply(weight, scores, self.w_eff, self.bits, self.frozen, self.rule.key)

    def _stateless(self, weight: Tensor, scores: Tensor) -> Tensor:
        """Under functional_call, func.grad and vmap the given tensors are selected from now; no live buffer is touched."""
        rule = self.rule
        if rule.select == "topk":
            return SubnetWeight.apply(weight, scores, self.frozen, self.k, rule.by, rule.ties)[0]
        (bits,) = torch.ops.subnet_kernels.threshold.default([scores.detach()], rule.value, rule.inclusive)
        return LiveWeight.apply(weight, scores, ops.apply(weight.detach(), bits), bits, self.frozen, "value")

    def _product(self, x: Tensor, weight: Tensor) -> Tensor:
        raise AssertionError("a masked layer class defines its product")

    def forward(self, x: Tensor) -> Tensor:
        y = self._product(x, self.effective_weight())
        if self._trace is not None:
            y = y if y.requires_grad else y.requires_grad_()
            self._trace.append((x.detach(), y))
        return y

    def extra_repr(self) -> str:
        rule = self.rule
        how = f"density={rule.density:g}" if rule.select == "topk" else f"score {'>=' if rule.inclusive else '>'} {rule.value:g}"
        return f"{super().extra_repr()}, {how}"

    def _apply(self, fn, recurse=True):
        before = (self.weight.device, self.weight.dtype)
        super()._apply(fn, recurse)
        weight = self.weight
        if (weight.device, weight.dtype) != before:
            frozen, values = self.frozen, self.frozen_values
            self._allocate()
            self.frozen = None if frozen is None else frozen.to(weight.device)
            self.frozen_values = None if values is None else values.to(weight.device, weight.dtype)
            self._active = None if self._active is None else self._active.to(weight.device, weight.dtype)
        _changed()
        return self

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        state_dict.setdefault(prefix + "scores", self.scores.detach())  # a dense checkpoint has none: keep ours
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self._seen = None
        _changed()
        refresh([self])

    def __setstate__(self, state):
        super().__setstate__(state)
        self._seen = None
        _register(self)


class SubnetLinear(SubnetLayer, nn.Linear):
    """``nn.Linear`` through a mask. Arguments as ``nn.Linear``, and a `Rule`."""

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, *, rule: Rule | None = None, device=None, dtype=None
    ):
        nn.Linear.__init__(self, in_features, out_features, bias, device=device, dtype=dtype)
        self.install(rule or Rule())

    def _product(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight, self.bias)


class _SubnetConv(SubnetLayer):
    def _product(self, x: Tensor, weight: Tensor) -> Tensor:
        return self._conv_forward(x, weight, self.bias)


class SubnetConv1d(_SubnetConv, nn.Conv1d):
    """``nn.Conv1d`` through a mask. Arguments as ``nn.Conv1d``, and a `Rule`."""

    def __init__(self, *args, rule: Rule | None = None, **kwargs):
        nn.Conv1d.__init__(self, *args, **kwargs)
        self.install(rule or Rule())


class SubnetConv2d(_SubnetConv, nn.Conv2d):
    """``nn.Conv2d`` through a mask. Arguments as ``nn.Conv2d``, and a `Rule`."""

    def __init__(self, *args, rule: Rule | None = None, **kwargs):
        nn.Conv2d.__init__(self, *args, **kwargs)
        self.install(rule or Rule())


class SubnetConv3d(_SubnetConv, nn.Conv3d):
    """``nn.Conv3d`` through a mask. Arguments as ``nn.Conv3d``, and a `Rule`."""

    def __init__(self, *args, rule: Rule | None = None, **kwargs):
        nn.Conv3d.__init__(self, *args, **kwargs)
        self.install(rule or Rule())


DENSE = {nn.Linear: SubnetLinear, nn.Conv1d: SubnetConv1d, nn.Conv2d: SubnetConv2d, nn.Conv3d: SubnetConv3d}


def init_scores_(scores: Tensor) -> Tensor:
    """Draw scores from U(-1/sqrt(fan_in), 1/sqrt(fan_in)), Kaiming-uniform with a = sqrt(5): edge-popup's, SupSup's and WSN's init."""
    fan_in = scores[0].numel() if scores.dim() and len(scores) else 0
    bound = fan_in**-0.5 if fan_in else 0.0
    return nn.init.uniform_(scores, -bound, bound)


# -------------------------------------------------------------------------------------------------- once per optimizer step

_LAYERS: weakref.WeakSet = weakref.WeakSet()
_GENERATION = 0  # moves when a layer appears or one's parameters are replaced
_BY_WEIGHT: tuple[int, dict] = (-1, {})
_SECONDS = 0.0  # host time spent in `refresh`
_OF_OPTIMIZER: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def refresh_seconds() -> float:
    """Host seconds that this process has spent in `refresh`; on a GPU that is the launching alone."""
    return _SECONDS


def _changed() -> None:
    global _GENERATION
    _GENERATION += 1


def _register(layer: SubnetLayer) -> None:
    _LAYERS.add(layer)
    _changed()


def frozen_bits(params: Sequence[Tensor]) -> list[Tensor | None]:
    """For each parameter the packed bits of what is frozen in it, None where nothing is or it is no masked layer's weight."""
    global _BY_WEIGHT
    if _BY_WEIGHT[0] != _GENERATION:
        _BY_WEIGHT = (_GENERATION, {id(layer.weight): weakref.ref(layer) for layer in _LAYERS})
    layers = _BY_WEIGHT[1]
    found = []
    for p in params:
        ref = layers.get(id(p))
        layer = ref() if ref is not None else None
        found.append(layer.frozen if layer is not None and layer.weight is p else None)
    return found


def layers_of(optimizer: Optimizer) -> list[SubnetLayer]:
    """The masked layers whose scores or weight an optimizer owns."""
    params = sum(len(group["params"]) for group in optimizer.param_groups)
    cached = _OF_OPTIMIZER.get(optimizer)
    if cached is None or cached[0] != (_GENERATION, params):
        ids = {id(p) for group in optimizer.param_groups for p in group["params"]}
        mine = [layer for layer in _LAYERS if id(layer.scores) in ids or id(layer.weight) in ids]
        cached = ((_GENERATION, params), [weakref.ref(layer) for layer in mine])
        _OF_OPTIMIZER[optimizer] = cached
    return [layer for ref in cached[1] if (layer := ref()) is not None]


@torch.no_grad()
def refresh(model: nn.Module | Iterable[SubnetLayer]) -> None:
    """Make bits and w_eff of every masked layer current: one `refresh_` for all layers of one rule.

    model: a module, or layers. Needed by hand only after writes through ``.data``.
    """
    global _SECONDS
    begin = time.perf_counter()
    layers = [m for m in model.modules() if isinstance(m, SubnetLayer)] if isinstance(model, nn.Module) else list(model)
    groups: dict[tuple, list[SubnetLayer]] = {}
    for layer in layers:
        rule = layer.rule
        if not layer.weight.is_meta:
            kind = (rule.by, rule.ties) if rule.select == "topk" else (rule.value, rule.inclusive)
            groups.setdefault((rule.select, *kind, layer.weight.device), []).append(layer)
    for (how, first, second, _), group in groups.items():
        scores, weights = [g.scores.detach() for g in group], [g.weight.detach() for g in group]
        bits, w_eff = [g.bits for g in group], [g.w_eff for g in group]
        if how == "topk":
            ops.refresh_(scores, weights, [g.k for g in group], bits, w_eff, [g.hints for g in group], first, second)
        else:
            ops.refresh_threshold_(scores, weights, first, second, bits, w_eff)
        for layer in group:
            layer._seen = layer._now()
    _SECONDS += time.perf_counter() - begin


@torch.no_grad()
def _after_step(optimizer: Optimizer, *_) -> None:
    layers = layers_of(optimizer)
    if not layers:
        return
    if not getattr(optimizer, "leaves_frozen", False):
        moved = [g for g in layers if g.frozen is not None]
        if moved:
            ops.restore_([g.weight for g in moved], [g.frozen for g in moved], [g.frozen_values for g in moved])
    refresh(layers)


register_optimizer_step_post_hook(_after_step)
