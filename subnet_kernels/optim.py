"""Optimizers whose steps cannot move a frozen bit: neither frozen weights nor their state, whatever the gradient holds.

`SGD`, `RMSprop`, `Adam` and `AdamW` have the signatures, defaults, groups and state of ``torch.optim``'s, so learning-rate schedules,
``GradScaler`` and checkpoints work as ever; each group's step is one call of a multi-tensor kernel. What is frozen is asked of the
masked layers at every step. ``foreach``, ``fused`` and ``capturable`` are accepted and make no difference. `freeze` gives the same
promise to any other optimizer, at the price of copies. One difference to torch.optim: a step reads running averages below the smallest
normal number as 0, where those of weights without a gradient end and processors multiply a hundred times as slowly.

With ``fuse_ste=True`` the gradients of weights and scores are made inside the step. Backward then leaves one gradient a layer, that of
the effective weight G, in ``weight.grad`` where the weight learns, else in ``scores.grad``; clipping, logging and hooks see G. The
mask, the weight and the scores that enter are those at the step. The optimizer made last for a layer decides how it learns.

A whole training step of a converted model can be captured in a CUDA graph, with these optimizers or with ``torch.optim``'s made with
``capturable=True`` and their lr as a tensor on the device. Make a few steps on a side stream first, so that all state is there, then::

    graph = torch.cuda.CUDAGraph()
    optimizer.zero_grad()
    with torch.cuda.graph(graph):
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()  # and the refresh of the masks with it
    for batch in batches:
        x.copy_(batch.x), y.copy_(batch.y)
        sk.optim.replay(graph, optimizer)

`replay` does what an eager step does on the host; ``graph.replay()`` alone is right too while nobody changes learning rates or writes
to weights and scores. Capture anew after the bank's ``begin``, ``commit`` or ``remove`` and after a ``load_state_dict`` of the optimizer:
they put other tensors in the place of those that were captured.
"""

from __future__ import annotations

from operator import is_
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from subnet_kernels import ops
from subnet_kernels.layers import (
    after_replay,
    after_step,
    before_replay,
    frozen_bits,
    generation,
    layers_of,
    refuse_fused,
    set_fused,
    watched,
)
from subnet_kernels.ops.apply import straight_through
from subnet_kernels.ops.update import update_adam_, update_rmsprop_, update_sgd_

__all__ = ["SGD", "Adam", "AdamW", "RMSprop", "freeze", "replay"]


class _Plan(NamedTuple):
    """What a group's last step found, good for as long as the same parameters have gradients and no state was replaced."""

    params: list[Tensor]
    states: list[dict]
    stateful: bool
    one_device: bool
    pairs: tuple = ()  # what the kernels take at the end for weights and scores with one gradient; nothing where there are none

    def serves(self, params: list[Tensor], stateful: bool) -> bool:
        """Whether it was made for these very tensors."""
        return self.stateful is stateful and len(self.params) == len(params) and all(map(is_, self.params, params))


class _Fusion(NamedTuple):
    """Whose gradients are made in the step: found anew when layers or parameters change."""

    generation: int
    count: int  # parameters
    sources: dict[int, list[Tensor]]  # group's id -> for each parameter the one whose .grad holds its gradient, or G
    empty: list[Tensor]  # scores whose gradient is their weight's: theirs must be None
    inside: list[tuple]  # (weight, scores, weight learns, layer): the kernels make the gradients
    before: list[tuple]  # the same: straight_through makes them before the kernels
    learning: list[tuple]  # (weight, scores, and whether each learns) of all fused layers
    plans: dict[int, _Plan]


class _OneCall:
    """What the optimizers share; mixed in before a class of ``torch.optim``, whose constructor and state it keeps."""

    leaves_frozen = True  # the layers need not put frozen weights back after a step
    _step_supports_amp_scaling = True
    fuse_ste = False  # not in param_groups, so that state_dicts load into torch's optimizers

    def __init__(self, *args, fuse_ste: bool = False, **kwargs):
        if not isinstance(fuse_ste, bool):
            raise ValueError(f"{type(self).__name__}: fuse_ste must be True or False, got {fuse_ste!r}")
        super().__init__(*args, **kwargs)
        self.fuse_ste = fuse_ste
        set_fused(layers_of(self), fuse_ste)

    def add_param_group(self, param_group: dict) -> None:
        super().add_param_group(param_group)
        try:
            self._check(self.param_groups[-1])
        except ValueError:
            del self.param_groups[-1]
            raise
        if "fuse_ste" in self.__dict__:  # not from within the constructor
            set_fused(layers_of(self), self.fuse_ste)

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            self._check(group)
        for p, of_p in self.state.items():
            if "step" in of_p:
                of_p["step"] = torch.as_tensor(of_p["step"], dtype=torch.float32, device=p.device)

    def _check(self, group: dict) -> None:
        """Refuse what the kernels do not compute."""
        name = type(self).__name__
        if group.get("differentiable"):
            raise ValueError(f"{name}: differentiable=True is not supported, because a step is one kernel outside autograd")
        for key in ("weight_decay", "betas"):
            value = group.get(key)
            if isinstance(value, Tensor) or (isinstance(value, tuple) and any(isinstance(v, Tensor) for v in value)):
                raise ValueError(f"{name}: {key} must be numbers, got a tensor")
        if isinstance(group["lr"], Tensor) and group["lr"].numel() != 1:
            raise ValueError(f"{name}: lr must have one element, got {group['lr'].numel()}")
        for p in group["params"]:
            if not p.dtype.is_floating_point:
                raise ValueError(f"{name}: parameters must be real floating-point tensors, got one of {p.dtype}")

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch.optim's, without its profiler range, which takes longer than the work."""
        if not set_to_none:
            super().zero_grad(set_to_none=False)
            return
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = None

    def step(self, closure=None):
        """Do one step and return what the closure returned, if there is one.

        closure: computes the loss anew and its gradients.
        """
        if torch.compiler.is_compiling() or torch.autograd._profiler_enabled() or watched(self):
            return self._ranged_step(closure)
        refuse_fused(self)
        loss = self._step(closure)
        after_step(self)
        return loss

    step.hooked = True  # else torch.optim wraps it in a profiler range, 8 us a step where nobody profiles

    def _step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        scaling = self.__dict__.get("grad_scale"), self.__dict__.get("found_inf")  # GradScaler puts them there
        plans = self._plans()
        fusion = self._fusion() if self.fuse_ste else None
        made = {}
        if fusion is not None:
            if fusion.plans is not plans:
                plans.clear()
                fusion = fusion._replace(plans=plans)
                if not torch.compiler.is_compiling():
                    self._fused = fusion
            if fusion.before:
                made = self._made_before(fusion)
        for group in self.param_groups:
            params = group["params"]
            if fusion is None:
                grads = [p.grad for p in params]
            else:
                grads = [p.grad for p in fusion.sources[id(group)]]
                if made:
                    grads = [made.get(id(p), grad) for p, grad in zip(params, grads)]
            for grad in grads:
                if grad is None:  # most often none is, and then nothing is built anew
                    params = [p for p, g in zip(params, grads) if g is not None]
                    grads = [g for g in grads if g is not None]
                    break
            if not params:
                continue
            plan = plans.get(id(group))
            if plan is None or not plan.serves(params, self._keeps_state(group)):
                plan = plans[id(group)] = self._plan(group, params, grads, fusion)
            if plan.one_device:
                rate = self._rate(group, params[0].device)
                scalars = _on(params[0].device, scaling)
                self._update(group, params, grads, plan.states, frozen_bits(params), rate, *scalars, plan.pairs)
                continue
            grads = _apart(params, grads, plan.pairs)
            for device in sorted({p.device for p in params}, key=str):
                some, theirs, states = zip(*(row for row in zip(params, grads, plan.states) if row[0].device == device))
                rate = self._rate(group, device)
                scalars = _on(device, scaling)
                self._update(group, list(some), list(theirs), states, frozen_bits(some), rate, *scalars, ())
        return loss

    _ranged_step = torch.optim.Optimizer.profile_hook_step(_step)  # with everybody's hooks, `after_step` among them

    def _keeps_state(self, group: dict) -> bool:
        return True

    def _plans(self) -> dict[int, _Plan]:
        """The plan of each group by its id; none when state came, went or was replaced since the last step."""
        known = self.__dict__.get("_known")
        if known is not None:
            of, states, plans = known
            if of is self.state and len(states) == len(of) and all(map(is_, states, of.values())):
                return plans
        plans: dict[int, _Plan] = {}
        if not torch.compiler.is_compiling():  # a traced step keeps nothing, and Dynamo before torch 2.12 refuses to
            self._known = self.state, list(self.state.values()), plans
        return plans

    def _fusion(self) -> _Fusion | None:
        """What is fused at this step; None where nothing is."""
        known = self.__dict__.get("_fused")
        count = 0
        for group in self.param_groups:
            count += len(group["params"])
        if known is None or known.generation != generation() or known.count != count or self._is_stale(known):
            known = self._fuse(count)
            if not torch.compiler.is_compiling():
                self._fused = known
        for scores in known.empty:
            if scores.grad is not None:
                raise RuntimeError(
                    f"{type(self).__name__}: under fuse_ste a layer has one gradient, its weight's, and these scores have their own: "
                    "set it to None"
                )
        return known

    def _is_stale(self, known: _Fusion) -> bool:
        for weight, scores, weight_learns, scores_learn in known.learning:
            if weight.requires_grad is not weight_learns or scores.requires_grad is not scores_learn:
                return True
        return False

    def _fuse(self, count: int) -> _Fusion:
        name = type(self).__name__
        group_of = {id(p): id(group) for group in self.param_groups for p in group["params"]}
        source, empty, inside, before, learning = {}, [], [], [], []
        for layer in layers_of(self):
            weight, scores = layer._own
            if not layer._fused:
                continue
            learning.append((weight, scores, weight.requires_grad, scores.requires_grad))
            if not (weight.requires_grad or scores.requires_grad):
                continue
            if layer.weight is not weight or layer.scores is not scores:
                raise RuntimeError(
                    f"{name}: under fuse_ste weights and scores must be whole tensors, these are sharded or replaced"
                )
            learns = weight.requires_grad
            if not scores.requires_grad or id(scores) not in group_of or (learns and id(weight) not in group_of):
                raise ValueError(
                    f"{name}: fuse_ste needs a layer's weight and scores in one optimizer where both learn, and its scores in any "
                    "case: without the other neither has a gradient"
                )
            plain = all(t.dtype == torch.float32 and t.is_contiguous() for t in (weight, scores))
            together = not learns or group_of[id(weight)] == group_of[id(scores)]
            (inside if plain and together else before).append((weight, scores, learns, layer))
            if learns:
                source[id(scores)] = weight
                empty.append(scores)
        sources = {id(group): [source.get(id(p), p) for p in group["params"]] for group in self.param_groups}
        return _Fusion(generation(), count, sources, empty, inside, before, learning, {})

    @torch.no_grad()
    def _made_before(self, fusion: _Fusion) -> dict[int, Tensor]:
        """The gradients, by parameter, of layers whose dtype, strides or groups the kernels do not take as a pair."""
        made = {}
        for weight, scores, learns, layer in fusion.before:
            grad = (weight if learns else scores).grad
            if grad is not None:
                of = straight_through(grad, weight, scores, layer.bits, layer.frozen, layer.key, learns, True)
                made[id(scores)] = of[1]
                if learns:
                    made[id(weight)] = of[0]
        return made

    def _plan(self, group: dict, params: list[Tensor], grads: list[Tensor], fusion: _Fusion | None) -> _Plan:
        for grad in grads:
            if grad.layout is not torch.strided:
                raise ValueError(f"{type(self).__name__}: gradients must be dense, got one of layout {grad.layout}")
        stateful = self._keeps_state(group)
        states = [self.state[p] if stateful else {} for p in params]
        pairs, beside, at = [], [], {id(p): i for i, p in enumerate(params)}
        for weight, scores, learns, layer in fusion.inside if fusion is not None else ():
            if id(scores) in at:
                pairs += [at[id(scores)], at[id(weight)] if learns else -1, int(layer.key == "magnitude")]
                beside.append(layer.bits if learns else weight)
        return _Plan(list(params), states, stateful, len({p.device for p in params}) == 1, (pairs, beside) if pairs else ())

    def _rate(self, group: dict, device: torch.device) -> Tensor:
        """The group's learning rate as a 0-dim tensor on that device.

        A number has one tensor there for good, which is written when it changes: a captured step goes on reading that one.
        """
        lr = group["lr"]
        if isinstance(lr, Tensor):
            if lr.device == device or lr.device.type != "cpu" or torch.compiler.is_compiling():
                lr = lr.detach().reshape(())
                return lr.to(device, torch.float64 if not lr.dtype.is_floating_point else lr.dtype)
            lr = lr.item()  # the host's, as those of a loaded state are: nobody waits for it, and no step copies it to the device
        rates = self.__dict__.setdefault("_rates", {}).setdefault(id(group), {})
        kept = rates.get(device)
        if kept is None:
            kept = rates[device] = [lr, torch.full((), lr, dtype=torch.float64, device=device)]
        elif kept[0] != lr:
            kept[0] = lr
            kept[1].fill_(lr)
        return kept[1]

    def write_rates(self) -> None:
        """Write learning rates that have changed since the last step into the tensors that a captured step reads."""
        rates = self.__dict__.get("_rates", {})
        for group in self.param_groups:
            for device in rates.get(id(group), ()):
                self._rate(group, device)

    def _lists(self, params: list[Tensor], states: list[dict], names: tuple[str, ...]) -> list[list[Tensor]]:
        """The state tensors of each name, then the steps, in the order of params; a parameter without state gets zeros."""
        for p, state in zip(params, states):
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
                for name in names:
                    state[name] = torch.zeros_like(p, memory_format=torch.preserve_format)
        return [[state[name] for state in states] for name in (*names, "step")]

    def _update(self, group, params, grads, states, frozen, lr, grad_scale, found_inf, pairs) -> None:
        raise NotImplementedError


def _on(device: torch.device, scalars: tuple[Tensor | None, ...]) -> list[Tensor | None]:
    """What a GradScaler hands over, where the kernels read it: it has its tensors on one device."""
    return [s if s is None else s.to(device) for s in scalars]


@torch.no_grad()
def _apart(params: list[Tensor], grads: list[Tensor], pairs: tuple) -> list[Tensor]:
    """Each parameter's own gradient, for calls that do not hold both of a pair."""
    grads = list(grads)
    for k, other in enumerate(pairs[1] if pairs else ()):
        scores, weight, magnitude = pairs[0][3 * k : 3 * k + 3]
        by, learns = "magnitude" if magnitude else "value", weight >= 0
        bits = other if learns else ops.pack(torch.ones_like(other, dtype=torch.bool))  # not read
        of = straight_through(grads[scores], params[weight] if learns else other, params[scores], bits, None, by, learns, True)
        grads[scores] = of[1]
        if learns:
            grads[weight] = of[0]
    return grads


def _call(op, written: list[Tensor], *args) -> None:
    """Call a mutating op outside autograd: counts the versions of what it writes itself, which saves a detour of the dispatcher."""
    if torch.compiler.is_compiling():
        return op(*args)
    increment_version(written)
    with torch._C._AutoDispatchBelowADInplaceOrView():
        op(*args)


class SGD(_OneCall, torch.optim.SGD):
    """``torch.optim.SGD`` that leaves frozen weights and their momentum bit-identical; arguments as there."""

    def _keeps_state(self, group: dict) -> bool:
        return group["momentum"] != 0

    def _update(self, group, params, grads, states, frozen, lr, grad_scale, found_inf, pairs) -> None:
        momentum = group["momentum"]
        options = momentum, group["dampening"], group["weight_decay"], group["nesterov"], group["maximize"]
        if momentum == 0:
            return _call(update_sgd_, params, params, grads, [], frozen, lr, grad_scale, found_inf, *options, False, *pairs)
        buffers = [state.get("momentum_buffer") for state in states]
        new = [i for i, buffer in enumerate(buffers) if buffer is None]
        if new and pairs and len(new) < len(params):
            grads, pairs = _apart(params, grads, pairs), ()
        for first, some in ((True, new), (False, [i for i in range(len(params)) if buffers[i] is not None] if new else None)):
            if some is None:
                of = params, grads, buffers, frozen
            elif some:
                for i in some if first else ():
                    buffers[i] = torch.zeros_like(params[i], memory_format=torch.preserve_format)
                of = tuple([values[i] for i in some] for values in (params, grads, buffers, frozen))
            else:
                continue
            _call(update_sgd_, of[0] + of[2], *of, lr, grad_scale, found_inf, *options, first, *pairs)
        # A skipped first step leaves zeros, from which an undampened second one makes what a first one would: nobody need look at
        # found_inf then, and wait for it.
        if new and not (found_inf is not None and group["dampening"] and found_inf.item()):
            for i in new:
                states[i]["momentum_buffer"] = buffers[i]


class RMSprop(_OneCall, torch.optim.RMSprop):
    """``torch.optim.RMSprop`` that leaves frozen weights and their state bit-identical; arguments as there."""

    def _update(self, group, params, grads, states, frozen, lr, grad_scale, found_inf, pairs) -> None:
        momentum, centered = group["momentum"], group["centered"]
        names = ("square_avg", *(("grad_avg",) if centered else ()), *(("momentum_buffer",) if momentum > 0 else ()))
        *lists, steps = self._lists(params, states, names)
        square_avgs, grad_avgs = lists[0], lists[1] if centered else []
        buffers = lists[-1] if momentum > 0 else []
        _call(
            update_rmsprop_, params + square_avgs + grad_avgs + buffers + steps,
            params, grads, square_avgs, grad_avgs, buffers, steps, frozen, lr, grad_scale, found_inf,
            group["alpha"], group["eps"], group["weight_decay"], momentum, centered, group["maximize"], *pairs,
        )  # fmt: skip


class Adam(_OneCall, torch.optim.Adam):
    """``torch.optim.Adam`` that leaves frozen weights and their state bit-identical; arguments as there."""

    def _update(self, group, params, grads, states, frozen, lr, grad_scale, found_inf, pairs) -> None:
        amsgrad, (beta1, beta2) = group["amsgrad"], group["betas"]
        if amsgrad:
            means, squares, largest, steps = self._lists(params, states, ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"))
        else:
            (means, squares, steps), largest = self._lists(params, states, ("exp_avg", "exp_avg_sq")), []
        _call(
            update_adam_, params + means + squares + largest + steps,
            params, grads, means, squares, largest, steps, frozen, lr, grad_scale, found_inf,
            beta1, beta2, group["eps"], group["weight_decay"], amsgrad, group["maximize"], group["decoupled_weight_decay"],
            *pairs,
        )  # fmt: skip


class AdamW(Adam, torch.optim.AdamW):
    """``torch.optim.AdamW`` that leaves frozen weights and their state bit-identical; arguments as there."""


class _Freezing:
    """The hooks of `freeze` on one optimizer."""

    def __init__(self, optimizer: torch.optim.Optimizer, bank):
        self.bank = bank
        self.kept: list[tuple[Tensor, Tensor, dict[str, Tensor]]] = []  # weight, what is frozen of it, its state before the step
        self.hooks = [optimizer.register_step_pre_hook(self._save), optimizer.register_step_post_hook(self._put_back)]

    def _like(self, optimizer, weight: Tensor) -> dict[str, Tensor]:
        state = optimizer.state[weight] if weight in optimizer.state else {}
        return {name: t for name, t in state.items() if isinstance(t, Tensor) and t.shape == weight.shape}

    @torch.no_grad()
    def _save(self, optimizer, *_) -> None:
        owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
        self.kept = []
        for layer in self.bank.layers():
            weight, frozen = layer.weight, layer.frozen
            if frozen is not None and id(weight) in owned:
                before = {name: t.clone() for name, t in self._like(optimizer, weight).items()}
                self.kept.append((weight, ops.unpack(frozen, weight.shape), before))

    @torch.no_grad()
    def _put_back(self, optimizer, *_) -> None:
        for weight, mask, before in self.kept:
            for name, t in self._like(optimizer, weight).items():
                if name in before:
                    t.copy_(torch.where(mask, before[name], t))
                else:
                    t.masked_fill_(mask, 0)  # the step made this state
        self.kept = []

    def remove(self) -> None:
        """Take the hooks off again."""
        for hook in self.hooks:
            hook.remove()


def freeze(optimizer: torch.optim.Optimizer, bank) -> _Freezing:
    """Make any elementwise optimizer exact on the state of frozen weights too.

    Before each step the state tensors of a weight's shape are saved at its frozen positions, and put back after it; state that a step
    creates is zero there. The weights themselves are put back by their layers anyway.

    optimizer: owns the weights; bank: its ``layers()`` are watched -> a handle whose ``remove()`` ends it.
    """
    return _Freezing(optimizer, bank)


class Replayed(Protocol):
    """What `replay` asks of a graph: a ``torch.cuda.CUDAGraph``."""

    def replay(self) -> None: ...


def replay(graph: Replayed, *optimizers: torch.optim.Optimizer) -> None:
    """Replay a captured training step, with what an eager one does on the host beside it.

    Before: layers whose scores or weight somebody wrote to are refreshed, and learning rates that have changed are written into the
    tensors that the step reads (those of ``torch.optim`` must be such tensors already). After: the versions of what the step wrote are
    counted, so that autograd notices it. graph: its ``replay()`` is called; optimizers: those whose steps it holds.
    """
    for optimizer in optimizers:
        prepare_replay(optimizer)
    graph.replay()
    for optimizer in optimizers:
        after_replay(optimizer)


def prepare_replay(optimizer: torch.optim.Optimizer) -> None:
    """What `replay` does before, and what a capture needs before it too, or else it would record it."""
    before_replay(optimizer)
    if isinstance(optimizer, _OneCall):
        optimizer.write_rates()
