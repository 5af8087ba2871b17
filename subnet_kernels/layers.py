"""Drop-in layers whose weights are used through a mask.

Selection is not part of the autograd graph. Between optimizer steps a live layer's ``bits`` equal ``select(scores)`` and its
``w_eff`` equals ``apply(weight, bits)``: a hook after every optimizer step puts frozen values back and refreshes all of that
optimizer's layers in one call, and an eager forward refreshes a layer whose scores or weight moved otherwise. Writes through
``.data`` move no version counter, nor does ``torch._foreach_lerp_``, which moving averages of parameters use, in torch 2.11: call
`refresh` after them.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.optim import optimizer as optimizer_module
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from subnet_kernels import ops, reference
from subnet_kernels.live import (
    EagerFusedWeight,
    EagerLiveWeight,
    FusedLinear,
    FusedWeight,
    LiveLinear,
    LiveWeight,
    Rule,
    of_planes,
)
from subnet_kernels.ops._library import LOADED
from subnet_kernels.ops.apply import _restore
from subnet_kernels.ops.masked import EagerMaskedLinear, SubnetWeight, product
from subnet_kernels.ops.select import check_density
from subnet_kernels.ops.superpose import superpose_weight


class SubnetLayer:
    """What masked layers have in common; mixed into a dense layer class that has a ``weight``.

    scores: Parameter like weight; bits: uint8 packed live mask; w_eff: the live effective weight, contiguous; frozen: packed bits of
    weights that may not move, or None; frozen_values: their values, compact, in logical order.
    """

    _fused = False  # whether an optimizer makes the gradients of weight and scores in its step (`set_fused`)
    path: str | None = None  # where `convert` found the layer in its model, for messages

    def install(self, rule: Rule, scores: Tensor | None = None) -> None:
        """Turn a constructed dense layer into a masked one: adds scores (drawn from U(-1/sqrt(fan_in), 1/sqrt(fan_in)) unless given)."""
        weight = self.weight
        if scores is None:
            scores = torch.empty_like(weight, memory_format=torch.contiguous_format)
            if not scores.is_meta:
                init_scores_(scores)
        self.scores = nn.Parameter(scores)
        self.rule = rule
        self.train_weight = self._dense_learns = weight.requires_grad
        self.frozen: Tensor | None = None
        self.frozen_values: Tensor | None = None
        self._active: Tensor | None = None  # effective weight of the active task
        self._mix: tuple | None = None  # (bank, alphas, row of alphas, counts, version of alphas) of a superposition
        self._rows: tuple | None = None  # (bank, task of each row, bias of each row or None) where rows have tasks of their own
        self._trace: list | None = None  # (input, output) of each superposed forward, where somebody wants row gradients
        self._seen: tuple | None = None  # versions of scores and weight that bits and w_eff were made from
        self._adopt()
        _LAYERS.add(self)

    def uninstall(self) -> None:
        """Become the dense layer that it was made from, with the weight it has now."""
        _LAYERS.discard(self)
        del self._parameters["scores"]
        self.weight.requires_grad_(self._dense_learns)
        for name in _INSTALLED:
            del self.__dict__[name]
        for name in ("_fused", "path"):
            self.__dict__.pop(name, None)
        self.__class__ = next(dense for dense, masked in DENSE.items() if masked is type(self))
        _changed()

    def _adopt(self) -> None:
        """Take the registered parameters for this layer's own, and have live tensors that fit them."""
        weight = self.weight
        live = self.__dict__.get("w_eff")
        self._own = (weight, self.scores)
        self._seen = None
        self.key = self.rule.key
        if live is None or (live.shape, live.dtype, live.device) != (weight.shape, weight.dtype, weight.device):
            self.k = self.rule.k(weight.numel())
            self.bits = torch.zeros(reference.nbytes(weight.numel()), dtype=torch.uint8, device=weight.device)
            self.w_eff = torch.zeros_like(weight, memory_format=torch.contiguous_format, requires_grad=False)
            self.hints = torch.zeros(4, dtype=torch.float64, device=weight.device)
            to = lambda t, dtype=None: None if t is None else t.to(weight.device, dtype)  # noqa: E731
            self.frozen, self.frozen_values = to(self.frozen), to(self.frozen_values, weight.dtype)
            self._active = to(self._active, weight.dtype)
        _changed()

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        super().register_parameter(name, param)
        if "_own" in self.__dict__ and {"weight", "scores"} <= self._parameters.keys():
            self._adopt()

    @property
    def density(self) -> float:
        """Kept share; setting it recomputes k and refreshes."""
        return self.rule.density

    @density.setter
    def density(self, density: float) -> None:
        check_density(self.path or type(self).__name__, density)
        self.rule = replace(self.rule, density=density)
        self.k = self.rule.k(self.weight.numel())
        _changed()
        refresh([self])

    def _now(self) -> tuple[int, int]:
        weight, scores = self._own
        return scores._version, weight._version

    def effective_weight(self) -> Tensor:
        """The weight that forward uses, in the autograd graph: live, of the active task, or superposed."""
        if self._active is not None:
            return self._active
        if self._mix is not None:
            bank, alphas, row, counts, version = self._mix
            # equal alphas are not read; once an optimizer has moved them, and where nobody can look (compiled), they are
            equal = counts is not None and not torch.compiler.is_compiling() and alphas._version == version
            alphas = alphas if row is None else alphas[row]
            if self.rule.planes == 2:
                alphas = of_planes(alphas)
            return superpose_weight(self.weight.detach(), bank, alphas, equal, counts if equal else None)
        weight, scores = self.weight, self.scores
        compiling = torch.compiler.is_compiling()
        if compiling:
            if not (isinstance(weight, nn.Parameter) and isinstance(scores, nn.Parameter)):
                return self._stateless(weight, scores)
        elif weight is not self._own[0] or scores is not self._own[1]:
            return self._stateless(weight, scores)
        elif self._seen != (scores._version, weight._version):
            refresh([self])
        if self._fused:
            function = FusedWeight if compiling or torch._C._are_functorch_transforms_active() else EagerFusedWeight
            return function.apply(weight, scores, self.w_eff)
        if compiling or torch._C._are_functorch_transforms_active():
            return LiveWeight.apply(weight, scores, self.w_eff, self.bits, self.frozen, self.key)
        return EagerLiveWeight.apply(weight, scores, self.w_eff, self.bits, self.frozen, self.key)

    def _stateless(self, weight: Tensor, scores: Tensor) -> Tensor:
        """Selection from tensors that are not this layer's parameters: functional_call, func.grad, vmap. No live tensor is touched."""
        rule = self.rule
        if self._fused and not torch.compiler.is_compiling() and (weight.grad_fn or scores.grad_fn):
            raise RuntimeError("a weight or scores computed from parameters cannot learn under an optimizer with fuse_ste")
        if rule.select == "topk":
            return SubnetWeight.apply(weight, scores, self.frozen, self.k, rule.by, rule.ties)[0]
        if rule.select == "signed":
            (bits,) = torch.ops.subnet_kernels.select.default([scores.detach()], [self.k], rule.by, rule.ties)
            effective = ops.apply(with_signs(weight.detach(), scores.detach()), bits)
            return LiveWeight.apply(weight, scores, effective, bits, None, "value")
        (bits,) = torch.ops.subnet_kernels.threshold.default([scores.detach()], rule.value, rule.inclusive)
        return LiveWeight.apply(weight, scores, ops.apply(weight.detach(), bits), bits, self.frozen, "value")

    def _product(self, x: Tensor, weight: Tensor, bias: Tensor | None = None, *rest) -> Tensor:
        """The dense layer's product with another weight and, where it has a bias and one is given, another bias; rest as of forward."""
        raise AssertionError("a masked layer class defines its product")

    def _product_of_rows(self, x: Tensor, *rest) -> Tensor:
        """Every row through its own task's mask, a product for each task of the batch."""
        bank, ids, biases = self._rows
        weight, y = self.weight.detach(), None
        for task in ids.unique().tolist():
            rows = (ids == task).nonzero()[:, 0]
            bias = None if biases is None else biases[rows[0]]
            part = self._product(x[rows], ops.apply(weight, reference.bank_bits(bank, task)), bias, *rest)
            y = part.new_empty((len(x), *part.shape[1:])) if y is None else y
            y = y.index_copy(0, rows, part)
        return y

    def forward(self, x: Tensor, *rest) -> Tensor:
        if self._rows is not None:
            rows = len(self._rows[1])
            if len(x) == 1:  # what all rows share, such as positions
                x = x.expand(rows, *x.shape[1:])
            if len(x) != rows:
                layer = self.path or type(self).__name__
                raise ValueError(f"rows: layer {layer!r}: its input must have {rows} rows first, got {tuple(x.shape)}")
            return self._product_of_rows(x, *rest)
        y = self._product(x, self.effective_weight(), None, *rest)
        if self._trace is not None:
            y = y if y.requires_grad else y.requires_grad_()
            self._trace.append((x.detach(), y))
            y = y.clone()  # an activation that works in place must not change what was traced
        return y

    def extra_repr(self) -> str:
        rule = self.rule
        how = (
            f"score {'>=' if rule.inclusive else '>'} {rule.value:g}"
            if rule.select == "threshold"
            else f"density={rule.density:g}"
        )
        return f"{super().extra_repr()}, {how}{', signed' if rule.planes == 2 else ''}"

    def _apply(self, fn, recurse=True):
        unborn = self.scores.is_meta
        super()._apply(fn, recurse)
        if unborn and not self.scores.is_meta:  # to_empty gives memory, and no values
            init_scores_(self.scores)
        self._adopt()
        refresh([self])
        return self

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        weight, scores = state_dict.get(prefix + "weight"), self.scores.detach()
        if scores.is_meta and weight is not None and not weight.is_meta:  # assigned to a model that has no values yet
            scores = init_scores_(torch.empty_like(weight, memory_format=torch.contiguous_format))
        state_dict.setdefault(prefix + "scores", scores)  # a dense checkpoint has none: keep ours
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        refresh([self])

    def __getstate__(self):
        state = self.__dict__.copy()
        del state["_own"]
        state.pop("_fused", None)  # a copy is no optimizer's yet
        state["_seen"] = state["_trace"] = None
        if self._mix is not None:  # alphas may lie in a graph, which cannot be copied
            bank, alphas, *rest = self._mix
            state["_mix"] = (bank, alphas.detach(), *rest)
        return state

    def __setstate__(self, state):
        super().__setstate__(state)
        self._adopt()
        _LAYERS.add(self)


COMPILED = "_C_cpu" in LOADED  # without it PyTorch's own product is the faster one

_INSTALLED = (
    "rule key train_weight _dense_learns frozen frozen_values k bits w_eff hints _own _seen _active _mix _rows _trace".split()
)


class SubnetLinear(SubnetLayer, nn.Linear):
    """``nn.Linear`` through a mask. Arguments as ``nn.Linear``, and a `Rule`."""

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, *, rule: Rule | None = None, device=None, dtype=None
    ):
        nn.Linear.__init__(self, in_features, out_features, bias, device=device, dtype=dtype)
        self.install(rule or Rule())
        refresh([self])

    def forward(self, x: Tensor) -> Tensor:
        if not (self._active is self._mix is self._rows is self._trace is None and self._plainly(x)):
            return super().forward(x)
        weight, scores = self._parameters["weight"], self._parameters["scores"]
        if weight is not self._own[0] or scores is not self._own[1]:
            return super().forward(x)
        if self._seen != (scores._version, weight._version):
            refresh([self])
        bias = self._parameters["bias"]
        if not torch.is_grad_enabled():
            return product(x, self.w_eff, None, bias)
        if self._fused:
            return FusedLinear.apply(x, weight, scores, bias, self.w_eff)
        return LiveLinear.apply(x, weight, scores, bias, self.w_eff, self.bits, self.frozen, self.key)

    def _product(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        bias = self.bias if bias is None else bias
        return EagerMaskedLinear.apply(x, weight, None, bias) if self._plainly(x) else F.linear(x, weight, bias)

    def _product_of_rows(self, x: Tensor) -> Tensor:
        bank, ids, biases = self._rows
        if x.dim() == 2 and self._plainly(x) and not torch.is_grad_enabled():  # serving, where a call costs more than the product
            y = torch.ops.subnet_kernels.mixed_linear.default(x, self.weight, bank, ids, self.bias if biases is None else None)
            return y if biases is None else y + biases
        flat = x.reshape(-1, x.shape[-1])
        each = len(flat) // len(x)
        tasks = ids if each == 1 else ids.repeat_interleave(each)
        y = ops.mixed_linear(flat, self.weight.detach(), bank, tasks, self.bias if biases is None else None)
        y = y.view(*x.shape[:-1], -1)
        return y if biases is None else y + biases.view(len(x), *[1] * (x.dim() - 2), -1).to(y.dtype)

    def _plainly(self, x: Tensor) -> bool:
        """Whether this library's own product serves x: float32 on the CPU in eager mode. Half precision goes to oneDNN."""
        return (
            not torch.compiler.is_compiling()
            and type(x) is Tensor
            and x.dtype == torch.float32 == self.w_eff.dtype
            and x.device.type == "cpu"
            and COMPILED
            and not torch.is_autocast_enabled("cpu")
            and not torch._C._are_functorch_transforms_active()
            and x.dim() > 0
            and x.shape[-1] == self.in_features
        )


class _SubnetConv(SubnetLayer):
    def _product(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return self._conv_forward(x, weight, self.bias if bias is None else bias)


class SubnetConv1d(_SubnetConv, nn.Conv1d):
    """``nn.Conv1d`` through a mask. Arguments as ``nn.Conv1d``, and a `Rule`."""

    def __init__(self, *args, rule: Rule | None = None, **kwargs):
        nn.Conv1d.__init__(self, *args, **kwargs)
        self.install(rule or Rule())
        refresh([self])


class SubnetConv2d(_SubnetConv, nn.Conv2d):
    """``nn.Conv2d`` through a mask. Arguments as ``nn.Conv2d``, and a `Rule`."""

    def __init__(self, *args, rule: Rule | None = None, **kwargs):
        nn.Conv2d.__init__(self, *args, **kwargs)
        self.install(rule or Rule())
        refresh([self])


class SubnetConv3d(_SubnetConv, nn.Conv3d):
    """``nn.Conv3d`` through a mask. Arguments as ``nn.Conv3d``, and a `Rule`."""

    def __init__(self, *args, rule: Rule | None = None, **kwargs):
        nn.Conv3d.__init__(self, *args, **kwargs)
        self.install(rule or Rule())
        refresh([self])


DENSE = {nn.Linear: SubnetLinear, nn.Conv1d: SubnetConv1d, nn.Conv2d: SubnetConv2d, nn.Conv3d: SubnetConv3d}


@torch.no_grad()
def init_scores_(scores: Tensor) -> Tensor:
    """Draw scores from U(-1/sqrt(fan_in), 1/sqrt(fan_in)), Kaiming-uniform with a = sqrt(5): edge-popup's, SupSup's and WSN's init.

    They are drawn on the CPU, so that every device gets the same ones; only those of a tensor subclass (DTensor) where they lie.
    """
    fan_in = scores[0].numel() if scores.dim() and len(scores) else 0
    bound = fan_in**-0.5 if fan_in else 0.0
    if scores.device.type == "cpu" or type(scores) not in (Tensor, nn.Parameter):
        return nn.init.uniform_(scores, -bound, bound)
    return scores.copy_(nn.init.uniform_(torch.empty(scores.shape, dtype=scores.dtype), -bound, bound))


# -------------------------------------------------------------------------------------------------- once per optimizer step

_LAYERS: weakref.WeakSet = weakref.WeakSet()
_GENERATION = 0  # moves when what is cached below may have changed: a layer, its parameters, its live tensors, its rule
_BY_WEIGHT: tuple[int, dict] = (-1, {})
_refusing = False  # whether `refuse_fused` is in place: steps of processes that never fuse do not pay for it
_SECONDS = 0.0  # host time spent in refreshing


def refresh_seconds() -> float:
    """Host seconds that this process has spent in refreshing; on a GPU that is the launching alone."""
    return _SECONDS


def _changed() -> None:
    global _GENERATION
    _GENERATION += 1


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
    return _plan_of(optimizer)[2]


def generation() -> int:
    """A number that moves when layers, their parameters, live tensors or rules may have changed."""
    return _GENERATION


def set_fused(layers: Iterable[SubnetLayer], fused: bool) -> None:
    """Say whether an optimizer's step makes the gradients of these layers' weights and scores from that of the effective weight."""
    global _refusing
    for layer in layers:
        if layer._fused is not fused:
            layer._fused = fused
            _changed()
    if fused and not _refusing:
        _refusing = True
        register_optimizer_step_pre_hook(refuse_fused)


def refuse_fused(optimizer: Optimizer, *_) -> None:
    """An optimizer that knows nothing of `set_fused` would take the gradient of the effective weight for the weight's."""
    if getattr(optimizer, "fuse_ste", False):
        return
    fused = [layer for layer in layers_of(optimizer) if layer._fused]
    if fused:
        set_fused(fused, False)
        raise RuntimeError(
            "these gradients were made for an optimizer with fuse_ste: clear them and compute them anew for this one, which has not"
        )


def _plan(layers: Sequence[SubnetLayer]) -> list[tuple]:
    """The calls that refresh these layers, one for all layers of one rule: (op, its arguments, what it writes, layers).

    They hold the parameters themselves, so a plan stays right through everything but `_changed`.
    """
    groups: dict[tuple, list[SubnetLayer]] = {}
    for layer in layers:
        rule, (weight, scores) = layer.rule, layer._own
        if layer.scores is scores and layer.weight is weight and not weight.is_meta:  # not lent to functional_call, not sharded
            kind = (rule.value, rule.inclusive) if rule.select == "threshold" else (rule.by, rule.ties)
            groups.setdefault((rule.select, *kind, weight.device), []).append(layer)
    calls = []
    for (how, first, second, _), group in groups.items():
        weights, scores = [g._own[0] for g in group], [g._own[1] for g in group]
        bits, w_eff = [g.bits for g in group], [g.w_eff for g in group]
        if how != "threshold":
            hints = [g.hints for g in group]
            arguments = (scores, weights, [g.k for g in group], bits, w_eff, hints, first, second)
            op = ops.refresh_ if how == "topk" else _refresh_signed_
            calls.append((op, arguments, bits + w_eff + hints, group))
        else:
            calls.append((ops.refresh_threshold_, (scores, weights, first, second, bits, w_eff), bits + w_eff, group))
    return calls


def with_signs(weight: Tensor, scores: Tensor) -> Tensor:
    """The weight with its score's sign, 0 where the score is 0: what a signed mask opens."""
    return (weight * scores.sign()).masked_fill_(scores == 0, 0)


def _refresh_signed_(scores: Sequence[Tensor], weights: Sequence[Tensor], *rest) -> None:
    """`refresh_` of signed masks."""
    ops.refresh_(scores, [with_signs(w.detach(), s.detach()) for w, s in zip(weights, scores)], *rest)


def _run(calls: Iterable[tuple]) -> None:
    global _SECONDS
    timed = not torch.compiler.is_compiling()  # a traced optimizer step cannot read clocks
    begin = time.perf_counter() if timed else 0.0
    for op, arguments, written, group in calls:
        increment_version(written)  # here, and not by the op's detour through ADInplaceOrView, which costs 8 us
        with torch._C._AutoDispatchBelowADInplaceOrView():
            op(*arguments)
        for layer in group:
            weight, scores = layer._own
            layer.__dict__["_seen"] = scores._version, weight._version  # nn.Module's own way costs a microsecond a layer
    if timed:
        _SECONDS += time.perf_counter() - begin


@torch.no_grad()
def refresh(model: nn.Module | Iterable[SubnetLayer]) -> None:
    """Make bits and w_eff of every masked layer current: one call for all layers of one rule.

    model: a module, or layers. Needed by hand only after writes through ``.data``, and before a compiled forward after any write
    that is not an optimizer's step.
    """
    _run(_plan([m for m in model.modules() if isinstance(m, SubnetLayer)] if isinstance(model, nn.Module) else list(model)))


def _plan_of(optimizer: Optimizer) -> tuple:
    """Of the masked layers whose scores or weight an optimizer owns: (generation, parameters, layers, calls)."""
    count = 0
    for group in optimizer.param_groups:
        count += len(group["params"])
    plan = optimizer.__dict__.get("_subnet_plan")  # on the optimizer and in no table of all: a traced step reads its own only
    if plan is None or plan[0] != _GENERATION or plan[1] != count:
        ids = {id(p) for group in optimizer.param_groups for p in group["params"]}
        layers = [layer for layer in _LAYERS if id(layer.scores) in ids or id(layer.weight) in ids]
        plan = (_GENERATION, count, layers, _plan(layers))
        if not torch.compiler.is_compiling():  # a traced step keeps nothing, and Dynamo before torch 2.12 refuses to
            optimizer._subnet_plan = plan
    return plan


def watched(optimizer: Optimizer) -> bool:
    """Whether anybody but this module has hooks on the optimizer's steps."""
    ours = 1 + _refusing
    hooks = optimizer_module._global_optimizer_pre_hooks, optimizer_module._global_optimizer_post_hooks
    return bool(optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks) or sum(map(len, hooks)) > ours


def before_replay(optimizer: Optimizer) -> None:
    """Refresh those of an optimizer's layers whose scores or weight moved by hand: a captured forward does not look."""
    stale = [layer for layer in layers_of(optimizer) if layer._seen != layer._now()]
    if stale:
        refresh(stale)


def after_replay(optimizer: Optimizer) -> None:
    """Count the versions of what a captured step of an optimizer wrote, and take its layers for refreshed, as they are."""
    increment_version([p for group in optimizer.param_groups for p in group["params"]])
    for *_, written, group in _plan_of(optimizer)[3]:
        increment_version(written)
        for layer in group:
            layer._seen = layer._now()


def after_step(optimizer: Optimizer, *_) -> None:
    """The hook after every step of every optimizer: put frozen weights back, and refresh the optimizer's layers."""
    *_, layers, calls = _plan_of(optimizer)
    if not layers:
        return
    if not getattr(optimizer, "leaves_frozen", False):
        moved = [g for g in layers if g.frozen is not None]
        if any(g.weight is not g._own[0] for g in moved):
            raise RuntimeError("frozen weights must be whole tensors at an optimizer's step, these are sharded or replaced")
        if moved:
            weights = [g._own[0] for g in moved]
            increment_version(weights)
            with torch._C._AutoDispatchBelowADInplaceOrView():
                _restore(weights, [g.frozen for g in moved], [g.frozen_values for g in moved])
    _run(calls)


register_optimizer_step_post_hook(after_step)
