"""A bank's model run as a stored task, as rows of many tasks, or as all at once; and what is the live task's meanwhile."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from subnet_kernels import ops
from subnet_kernels.heads import fixed_copy, like, tensors_of
from subnet_kernels.live import of_planes
from subnet_kernels.masks import count_masks, opened
from subnet_kernels.rows import HeadOfRows, differing_biases, distinct, join
from subnet_kernels.storage import Entry
from subnet_kernels.superposition import check_traceable, traced_alpha_grad


class BankRuns:
    """The part of a bank that says what its model runs as."""

    @torch.no_grad()
    def activate(self, name: str | None, *, bits: Mapping[str, Tensor] | None = None, in_place: bool = False) -> None:
        """Run the model as a stored task; None is the live one again.

        bits: run as this mask with the live state, {layer name: packed bits}; in_place: copy into the tensors that forward reads
        already (for CUDA graphs: those of the first such call, whatever is activated between). While a task is active weights and scores
        get no gradient. Raises KeyError for an unknown name, ValueError for bad bits or, in place, another head width.
        """
        if name is not None and bits is not None:
            raise ValueError(f"activate: expected a name or bits, got both, {name!r}")
        self._follow()
        entry = self[name] if name is not None else None
        if bits is not None:
            self._check_bits("activate", bits)
        weights = {} if entry is None and bits is None else self._from_cache(name, entry, bits)
        self._hold(name, in_place)
        for key, layer in self._layers.items():
            layer._mix = layer._rows = None
            layer._active = weights.get(key)
            if in_place and weights:
                slot = self._slots.get(key)
                if slot is None or slot.dtype != weights[key].dtype or slot.device != weights[key].device:
                    slot = self._slots[key] = weights[key].clone()
                layer._active = slot.copy_(weights[key])
        self.active = name

    @property
    def is_live(self) -> bool:
        """Whether forward goes through the live masks: no task is active and nothing superposed."""
        return all(layer._active is layer._mix is layer._rows is None for layer in self._layers.values())

    @contextlib.contextmanager
    def as_task(self, name: str | None) -> Iterator[None]:
        """Run the block as a stored task (None: the live one); afterwards the model runs as it did before."""
        active, held, modes = self.active, self._held, [(layer._active, layer._mix, layer._rows) for layer in self.layers()]
        self.activate(name)
        try:
            yield
        finally:
            with torch.no_grad():
                self._hold(held[0], state=held[1])
            self.active = active
            for layer, (weight, mix, rows) in zip(self.layers(), modes):
                layer._active, layer._mix, layer._rows = weight, mix, rows

    @contextlib.contextmanager
    def rows(self, task_ids: Tensor | Sequence[str]) -> Iterator[None]:
        """Run the block's forwards of the model with each row of the batch as its own task: the same as activating that task for it.

        task_ids: (B,) int64, places in `masks` (commit order), or B names of entries, combinations included. Every forward in the block
        takes B rows first, in eval mode, and gives B rows; rows must not influence each other, and what all share, such as positions, may
        come to a layer as one row. Linear layers run all rows at once (`mixed_linear`), the others and ``per_task`` modules those of a task
        at a time. Where other task state than the biases of masked layers differs between the tasks, an entry is a combination or masks
        are signed, the whole model runs once for each task; it may give tensors in tuples, lists and mappings too. Where heads have
        different widths, what lies beyond a row's own head is -inf. x gets a gradient, weights and scores get none. Not for compiled
        models. Raises KeyError for an unknown name, ValueError on a bad argument.
        """
        names, ids = distinct(self, task_ids)
        self._follow()
        ids = ids.to(self.layers()[0].weight.device)
        with self.as_task(names[0]):
            entries = [self[name] for name in names]
            biases = differing_biases(entries, self._layers) if self._planes == 1 else None
            if len(names) == 1:
                yield
            elif biases is None:
                own, call = self.model.__dict__.get("forward"), self.model.forward
                self.model.__dict__["forward"] = lambda *args, **kwargs: self._one_by_one(call, names, ids, args, kwargs)
                try:
                    yield
                finally:
                    del self.model.__dict__["forward"]
                    if own is not None:
                        self.model.__dict__["forward"] = own
            else:
                masks = torch.tensor([self[name].index for name in names], device=ids.device)[ids]
                for key, layer in self._layers.items():
                    layer._active = None
                    layer._rows = (self._masks.blocks[key], masks, biases[key][ids] if key in biases else None)
                for key in self._per_task:
                    current = self.model.get_submodule(key)
                    heads = [fixed_copy(self[name].modules[key]).to(like(current)) for name in names]
                    self.model.set_submodule(key, HeadOfRows(heads, ids).train(current.training))
                yield

    def _one_by_one(self, call: Callable, names: Sequence[str], ids: Tensor, args: tuple, kwargs: dict) -> object:
        """The model's forward on the rows of each task with that task active."""
        parts = []
        for i, name in enumerate(names):
            rows = (ids == i).nonzero()[:, 0]
            pick = lambda v, rows=rows: v[rows] if isinstance(v, Tensor) and v.dim() and len(v) == len(ids) else v  # noqa: E731
            with self.as_task(name):
                parts.append((rows, call(*map(pick, args), **{key: pick(v) for key, v in kwargs.items()})))
        return join(parts, len(ids))

    def _from_cache(self, name: str | None, entry: Entry | None, bits: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        """The effective weights of a task or of bits, made anew where they are not those of a task that is cached."""
        now = [(layer._own, layer.weight._version) for layer in self.layers()]  # one that moves or is cast gets another `_own`
        if len(now) != len(self._ready_of) or any(a is not b or v != w for (a, v), (b, w) in zip(now, self._ready_of)):
            self._ready, self._ready_of = {}, now
        weights = self._ready.pop(name, None) if entry is not None else None
        if weights is None:
            weights = self._effective(entry, bits)
        if entry is not None:
            self._ready[name] = weights
        while len(self._ready) > self.cached:
            del self._ready[next(iter(self._ready))]
        return weights

    def _effective(self, entry: Entry | None, bits: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        weights = self._weights()
        if entry is not None and entry.index is None:
            blocks, _ = self._of(entry.over, False)
            rows = entry.alphas.expand(len(weights), -1) if entry.alphas.dim() == 1 else entry.alphas
            rows = rows if self._planes == 1 else of_planes(rows)
            return {key: ops.superpose(w, blocks[key], row.to(w)) for (key, w), row in zip(weights.items(), rows)}
        bits = self._masks.bits(entry.index) if bits is None else bits
        if self._planes == 2:
            weights = {key: torch.where(ops.unpack(bits[key][1], w.shape), -w, w) for key, w in weights.items()}
        return {key: ops.apply(w, opened(bits[key])) for key, w in weights.items()}

    def _hold(self, name: str | None, in_place: bool = False, state: dict[str, Tensor] | None = None) -> None:
        """Put an entry's task state and ``per_task`` modules into the model; None: the live ones. What is stored stays as it is.

        state: the task state in place of that one's own.
        """
        entry = self[name] if name is not None else None
        if entry is None and self._live is None and state is None:
            return
        modules = {}
        for key, module in (entry.modules if entry is not None else self._live[1] if self._live is not None else {}).items():
            if entry is not None and in_place:
                slot = self._heads[key] if key in self._heads else fixed_copy(module)
                self._heads[key] = slot = slot.to(like(self.model.get_submodule(key)))
                pairs = list(zip(tensors_of(slot), tensors_of(module)))
                if any(mine.shape != theirs.shape for mine, theirs in pairs):
                    raise ValueError(
                        f"activate: in place, module {key!r} of {name!r} must have the sizes of the first one activated so"
                    )
                for mine, theirs in pairs:
                    mine.copy_(theirs)
                module = slot
            elif entry is not None:
                module = fixed_copy(module).to(like(self.model.get_submodule(key)))
            modules[key] = module
        if self._live is None:
            live = {key: value.detach().clone() for key, value in self._state().items()}
            self._live = (live, {key: self.model.get_submodule(key) for key in self._per_task})
        self._write(state if state is not None else entry.state if entry is not None else self._live[0])
        for key, module in modules.items():
            current = self.model.get_submodule(key)
            if module is not current:
                self.model.set_submodule(key, module.train(current.training))
        self._live = None if entry is None and state is None else self._live
        self._held = (name, state)

    def _follow(self) -> None:
        """Move the masks to where the model has moved."""
        if self._masks.to(self._weights()):
            self._some, self._prefix, self._slots = ((), {}, {}), (0, {}), {}

    def _write(self, state: Mapping[str, Tensor]) -> None:
        mine = self._state()
        if mine:
            torch._foreach_copy_([value.detach() for value in mine.values()], [state[key] for key in mine])

    def superpose(
        self,
        alphas: Tensor | None = None,
        *,
        over: Sequence[str] | None = None,
        head: str | None = None,
        mean_state: bool = False,
        live: Sequence[str] = (),
    ) -> Tensor:
        """Run the model as many masks at once: every layer's weight is W * sum_k alpha_k M_k.

        alphas: (K,), or (layers, K) with a row for each masked layer, differentiable; None is 1/K each. over: names of the K masks,
        default all; head: the entry whose task state and ``per_task`` modules are used (default the live ones); mean_state: the mean of
        the K masks' task states in place of that one's, so that norms in eval mode take the candidates' mean statistics and not those
        of whoever was last; live: names of layers that run their live mask all the same -> the alphas, a leaf that requires a gradient
        where None was given. Ends with `activate`. Raises ValueError on a bad argument.
        """
        tasks = len(self._masks) if over is None else len(self._check_masks("superpose", over))
        if not tasks:
            raise ValueError("superpose: expected at least one mask, the bank has none")
        equal = alphas is None
        if equal:
            some = self.layers()[0].weight
            alphas = torch.full((tasks,), 1 / tasks, device=some.device, dtype=some.dtype, requires_grad=True)
        self._check_alphas("superpose", alphas, tasks)
        if unknown := set(live) - set(self._layers):
            raise ValueError(f"superpose: live must name layers of {', '.join(self._layers)}, got {', '.join(sorted(unknown))}")
        self._follow()
        counted = equal and self._planes == 1  # counts of two planes are not of one sign: signed masks are read
        with torch.no_grad():
            blocks, counts = self._of(over, counted)
        with torch.no_grad():
            self._hold(head, state=self._mean_state(over) if mean_state else None)
        self.active = None
        for i, (key, layer) in enumerate(self._layers.items()):
            layer._active = layer._rows = layer._mix = None
            if key not in live:
                row = None if alphas.dim() == 1 else i
                layer._mix = (list(blocks[key]), alphas, row, counts[key] if counted else None, alphas._version)
        return alphas

    def substitute(self, weights: Mapping[str, Tensor]) -> None:
        """Run every masked layer with another effective weight, {layer name: tensor like its weight}, in the graph that it comes from,
        until the next `activate` or `superpose`; whose task state is in the model does not change. Raises ValueError where one is missing
        or does not fit.
        """
        for key, layer in self._layers.items():
            if key not in weights or weights[key].shape != layer.weight.shape:
                got = tuple(weights[key].shape) if key in weights else "none"
                raise ValueError(f"substitute: layer {key!r} must have a weight of shape {tuple(layer.weight.shape)}, got {got}")
        for key, layer in self._layers.items():
            layer._mix = layer._rows = None
            layer._active = weights[key]

    def row_alpha_grad(
        self, x: Tensor, objective: Callable[[Tensor], Tensor], *, over: Sequence[str] | None = None, head: str | None = None
    ) -> Tensor:
        """Gradient to the alphas, at equal alphas, of every row's own objective: SupSup's one-shot inference row by row.

        x: (B, ...); objective: logits (B, C) -> (B,), row b depending on row b alone -> (B, K). One forward and backward of the summed
        objective, then `alpha_grad` of every layer. over: names of the K masks, default all; head: the entry whose task state and
        ``per_task`` modules are used (default the mean of the K masks' states, and the live modules). Linear layers and ungrouped
        Conv2d; others raise ValueError.
        """
        check_traceable(self._layers)
        with self.as_task(None):
            alphas = self.superpose(None, over=over, head=head, mean_state=head is None)
            return traced_alpha_grad(self.model, self._layers, x, objective, alphas)

    def _mean_state(self, over: Sequence[str] | None) -> dict[str, Tensor]:
        """The mean of some masks' task states, default all's, rounded once; of tensors of whole numbers the first one's."""
        states = [self._entries[name].state for name in (self._mask_order if over is None else over)]
        return {
            key: torch.stack([state[key] for state in states]).double().mean(0).to(first.dtype)
            if first.is_floating_point()
            else first
            for key, first in states[0].items()
        }

    def _of(self, over: Sequence[str] | None, equal: bool) -> tuple[dict, dict]:
        """Blocks and, for equal alphas, counts of all masks, or of some: of those the last ones asked for are kept."""
        if over is None or list(over) == self._mask_order:
            return self._masks.blocks, self._masks.counts() if equal else {}
        names, blocks, counts = self._some
        if names != tuple(over):
            blocks, counts = self._masks.some(self[name].index for name in over), {}
        if equal and not counts:
            counts = {name: count_masks(blocks[name], layer.weight.shape) for name, layer in self._layers.items()}
        self._some = (tuple(over), blocks, counts)
        return blocks, counts

    def _check_masks(self, where: str, names: Sequence[str]) -> list[str]:
        names = list(names)
        if not names:
            raise ValueError(f"{where}: expected at least one mask, got none")
        for name in names:
            if self[name].index is None:
                raise ValueError(f"{where}: {name!r} must be a mask, it is a combination of masks")
        return names

    def _check_alphas(self, where: str, alphas: Tensor, tasks: int) -> None:
        if alphas.shape not in ((tasks,), (len(self._layers), tasks)):
            raise ValueError(
                f"{where}: alphas must have shape ({tasks},) or ({len(self._layers)}, {tasks}), masked layers by masks, "
                f"got {tuple(alphas.shape)}"
            )
