"""Many tasks' masks over one backbone: learn one, keep it, run as any of them, or as all at once.

A *task* is a mask over the weights of the masked layers, and its state: every other trainable parameter and persistent buffer, and
the modules named in ``per_task``. What does not require a gradient is shared backbone.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from subnet_kernels import ops
from subnet_kernels.convert import matches
from subnet_kernels.heads import fixed_copy, fresh, like
from subnet_kernels.layers import SubnetLayer, init_scores_, refresh
from subnet_kernels.masks import Masks, opened
from subnet_kernels.running import BankRuns
from subnet_kernels.storage import BankFiles, Entry, Written, is_one_sign, is_padded, raw
from subnet_kernels.views import EveryTask, TaskView, baked, compress_linears, one_width


class MaskBank(BankRuns, BankFiles):
    """All tasks' masks over one converted model.

    model: a module that `convert` went over; cached: of how many tasks, those activated last, the effective weights are kept, so that going
    back to one moves pointers and computes nothing: each takes the memory of the masked weights. Raises ValueError if the model has no
    masked layer, or none with values.
    """

    def __init__(self, model: nn.Module, *, cached: int = 0):
        self.model = model
        self.cached = cached
        self._layers = {name: m for name, m in model.named_modules() if isinstance(m, SubnetLayer)}
        if not self._layers:
            raise ValueError(f"MaskBank: expected a converted model, got {type(model).__name__} without a masked layer")
        if any(layer._active is not None or layer._mix is not None or layer._rows is not None for layer in self.layers()):
            raise ValueError(
                "MaskBank: the model must run its live masks, another bank has a task active: activate(None) there first"
            )
        if meta := [name for name, layer in self._layers.items() if layer.weight.is_meta]:
            raise ValueError(
                f"MaskBank: layer {meta[0]!r} must have values, it is on the meta device: to_empty and load it first"
            )
        config = getattr(model, "subnet_config", None)
        self._per_task = list(config.per_task) if config else []
        self._entries: dict[str, Entry] = {}
        planes = {layer.rule.planes for layer in self.layers()}
        if len(planes) > 1:
            raise ValueError("MaskBank: either all layers' masks must be signed or none, got both")
        self._planes = planes.pop()
        self._masks = Masks(self._weights(), self._planes)
        self._mask_order: list[str] = []  # names of the masks, by their place
        # names, blocks and counts of the subset that was superposed last
        self._some: tuple[tuple[str, ...], dict, dict] = ((), {}, {})
        self._prefix: tuple[int, dict] = (0, {})  # what the first so many masks own: what `save` last asked for
        self._written: Written | None = None  # what `save` knows of its folder
        self._backbone: str | None = None
        self._state_names = self._trainable()  # decided once: freezing a parameter for serving must not change what a task is
        self._initial = {key: value.detach().clone() for key, value in self._state().items()}
        self._live: tuple[dict, dict] | None = None  # state and modules of the live task while another one's are in the model
        self._held: tuple[str | None, dict | None] = (None, None)  # whose they are, and the state in place of that one's
        self._ready: dict[str, dict[str, Tensor]] = {}  # effective weights of the tasks activated last, the latest at the end
        self._ready_of: list[tuple] = []  # the weights that they were made from, and their versions
        self._slots: dict[str, Tensor] = {}  # effective weights that in_place activation writes
        self._heads: dict[str, nn.Module] = {}  # and its per-task modules
        self.active: str | None = None
        for layer in self.layers():
            layer.frozen = layer.frozen_values = None

    # ---------------------------------------------------------------------------------------------------------- looking

    def layers(self) -> list[SubnetLayer]:
        """The masked layers, in module order."""
        return list(self._layers.values())

    @property
    def layer_names(self) -> list[str]:
        """Their paths in the model, in the same order."""
        return list(self._layers)

    @property
    def names(self) -> list[str]:
        """Entries in the order of their commits."""
        return list(self._entries)

    @property
    def masks(self) -> list[str]:
        """Names of the entries that are masks, in the order of their commits."""
        return list(self._mask_order)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __getitem__(self, name: str) -> Entry:
        if name not in self._entries:
            raise KeyError(
                f"bank: {name!r} must be one of its {len(self)} entries, {', '.join(map(repr, self.names[:8])) or 'of which none'}"
            )
        return self._entries[name]

    def bits(self, name: str) -> dict[str, Tensor]:
        """Packed bits of a mask: {layer name: uint8 (bytes,)}, of a signed one (2, bytes), where it is 1 and where it is -1.

        Raises ValueError for a combination.
        """
        if self[name].index is None:
            raise ValueError(f"bank: {name!r} must be a mask, it is a combination of masks")
        return self._masks.bits(self[name].index)

    def opened(self, name: str) -> dict[str, Tensor]:
        """Packed bits of the weights that a mask opens, with whatever sign: {layer name: uint8 (bytes,)}. Raises as `bits`."""
        return {key: opened(bits) for key, bits in self.bits(name).items()}

    def _weights(self) -> dict[str, Tensor]:
        return {name: layer.weight.detach() for name, layer in self._layers.items()}

    def owned(self) -> dict[str, Tensor]:
        """Copies of the packed bits that any committed mask uses: {layer name: uint8}."""
        return {key: bits.clone() for key, bits in self._masks.owned.items()}

    def live_bits(self) -> dict[str, Tensor]:
        """Copies of the packed bits in training now, as `bits` has them."""
        refresh([layer for layer in self.layers() if layer._seen != layer._now()])
        if self._planes == 1:
            return {name: layer.bits.clone() for name, layer in self._layers.items()}
        signs = {name: (layer.scores.detach() > 0, layer.scores.detach() < 0) for name, layer in self._layers.items()}
        return {name: torch.stack([ops.pack(sign) & self._layers[name].bits for sign in both]) for name, both in signs.items()}

    # --------------------------------------------------------------------------------------------------------- learning

    @torch.no_grad()
    def commit(
        self,
        name: str,
        *,
        bits: Mapping[str, Tensor] | None = None,
        alphas: Tensor | None = None,
        over: Sequence[str] | None = None,
        scores: bool = False,
        tensors: Mapping[str, Tensor] | None = None,
        **facts,
    ) -> None:
        """Keep the live task under a name; where weights learn, own and freeze the weights that its mask opens.

        bits: another mask than the live one, {layer name: packed bits}; alphas: (layers, K) or (K,), keep this combination of the K
        masks named in `over` (default all) in place of a mask; scores: keep the scores too; tensors, facts: named tensors and JSON
        values of the method. Raises ValueError if the name exists, another task is active or an argument does not fit.
        """
        self._check_new("commit", name)
        if alphas is not None and bits is not None:
            raise ValueError("commit: expected bits or alphas, got both")
        if over is not None and alphas is None:
            raise ValueError("commit: over must come with alphas, got masks and nothing to weigh them with")
        if self._live is not None and alphas is None:
            raise ValueError(f"commit: the live task must be active, got {self._held[0]!r}; call activate(None) first")
        self._follow()
        try:
            json.dumps(facts)
        except (TypeError, ValueError) as error:
            raise ValueError(f"commit: facts must be values that JSON has: {error}") from None
        for key, value in (tensors or {}).items():
            if not isinstance(value, Tensor):
                raise ValueError(f"commit: tensors must be named tensors, got {type(value).__name__} for {key!r}")
        if alphas is not None:
            over = tuple(self.masks if over is None else over)
            self._check_alphas("commit", alphas, len(self._check_masks("commit", over)))
        elif bits is not None:
            self._check_bits("commit", bits)
        entry = Entry(None, {key: value.detach().clone() for key, value in self._state().items()}, {}, facts=copy.deepcopy(facts))
        entry.modules = {key: fixed_copy(self.model.get_submodule(key)) for key in self._per_task}
        entry.scores = {key: layer.scores.detach().clone() for key, layer in self._layers.items()} if scores else {}
        entry.tensors = {key: value.detach().clone() for key, value in (tensors or {}).items()}
        if alphas is not None:
            entry.alphas, entry.over = alphas.detach().clone(), over
        else:
            bits = self.live_bits() if bits is None else bits
            self._backbone = self._backbone or self._hash()
            entry.index = len(self._masks)
            self._masks.append(bits)
            self._freeze()
        self._keep(name, entry)

    def _check_new(self, where: str, name: str) -> None:
        if not isinstance(name, str) or not name:
            raise ValueError(f"{where}: name must be a non-empty string, got {name!r}")
        if name in self._entries:
            raise ValueError(f"{where}: {name!r} must be a new name, the bank has it already")

    def _check_bits(self, where: str, bits: Mapping[str, Tensor]) -> None:
        if set(bits) != set(self._layers):
            raise ValueError(f"{where}: bits must have the layers {', '.join(self._layers)}, got {', '.join(bits)}")
        for key, layer in self._layers.items():
            given, n, shape = bits[key], layer.weight.numel(), self._shape_of_bits(layer)
            if given.dtype != torch.uint8 or given.shape != shape or given.device != layer.bits.device:
                raise ValueError(
                    f"{where}: bits of layer {key!r} must be uint8 of {shape} on {layer.bits.device}, "
                    f"got {given.dtype} of {tuple(given.shape)} on {given.device}"
                )
            if not is_padded(given, n):
                raise ValueError(f"{where}: bits of layer {key!r} must have zero padding after its {n} weights")
            if not is_one_sign(given):
                raise ValueError(f"{where}: a signed mask must open a weight with one sign, that of layer {key!r} has both")

    def _keep(self, name: str, entry: Entry) -> None:
        self._entries[name] = entry
        if entry.index is not None:
            self._mask_order.append(name)

    def _freeze(self) -> None:
        """Freeze what is owned, at its present values; what was frozen before keeps the value it had then."""
        learning = [(key, layer) for key, layer in self._layers.items() if layer.train_weight]
        for key, layer in learning:
            if layer.frozen is not None:
                ops.restore_([layer.weight], [layer.frozen], [layer.frozen_values])
            layer.frozen = self._masks.owned[key].clone()
            layer.frozen_values = layer.weight.detach().new_empty(int(ops.count(layer.frozen)))
        # after all that stays is allocated: between it, what does not would leave a hole for every layer
        for _, layer in learning:
            where = ops.unpack(layer.frozen, layer.weight.shape).flatten().nonzero()[:, 0]
            torch.index_select(layer.weight.detach().reshape(-1), 0, where, out=layer.frozen_values)

    def begin(self, scores: str = "keep", per_task: Mapping[str, int] | None = None) -> None:
        """Make the live task ready for the next one: fresh task state, fresh ``per_task`` modules.

        scores: ``"keep"`` or ``"init"`` (drawn anew, from PyTorch's global CPU generator as the modules are, whatever the device);
        per_task: output widths of Linear modules, {name: outputs}. Make a new optimizer after it: the modules are new. Raises ValueError
        on a bad argument.
        """
        if scores not in ("keep", "init"):
            raise ValueError(f"begin: scores must be 'keep' or 'init', got {scores!r}")
        unknown = set(per_task or {}) - set(self._per_task)
        if unknown:
            raise ValueError(
                f"begin: per_task must name modules of {', '.join(self._per_task) or 'none'}, got {', '.join(sorted(unknown))}"
            )
        self.activate(None)
        modules = {key: fresh(self.model.get_submodule(key), key, (per_task or {}).get(key)) for key in self._per_task}
        with torch.no_grad():
            self._write(self._initial)
            if scores == "init":
                for layer in self.layers():
                    init_scores_(layer.scores)
        for key, module in modules.items():
            self.model.set_submodule(key, module)
        refresh(self.layers())

    @torch.no_grad()
    def replace(self, name: str) -> None:
        """Keep the live task in the place of a mask that is there: the entry's name, order, facts and named tensors stay.

        Where weights learn a mask owns some, and there is no replacing it. Raises KeyError for an unknown name, ValueError where weights
        learn, another task is active, or the entry is a combination or part of one.
        """
        entry = self[name]
        if self.trains_weights:
            raise ValueError(f"replace: weights must not learn, {name!r} owns those that its mask opens")
        if entry.index is None:
            raise ValueError(f"replace: {name!r} must be a mask, it is a combination of masks")
        self._check_unused("replace", name)
        if self._live is not None:
            raise ValueError(f"replace: the live task must be active, got {self._held[0]!r}; call activate(None) first")
        self._follow()
        scores = {key: self._layers[key].scores.detach().clone() for key in entry.scores}
        self._masks.replace(entry.index, self.live_bits())
        entry.state = {key: value.detach().clone() for key, value in self._state().items()}
        entry.modules = {key: fixed_copy(self.model.get_submodule(key)) for key in self._per_task}
        entry.scores, entry.saved = scores, None
        self._some, self._written, self._ready = ((), {}, {}), None, {}
        self._prefix = (0, {})

    def _check_unused(self, where: str, name: str) -> None:
        users = [other for other, e in self._entries.items() if name in e.over]
        if users:
            raise ValueError(f"{where}: {name!r} must not be part of a combination, {users[0]!r} uses it")

    def rename(self, name: str, new: str) -> None:
        """Give an entry another name; its place, and that in combinations, stays. Raises KeyError for an unknown name, ValueError for
        one that the bank has or that is none.
        """
        self[name]
        self._check_new("rename", new)
        to = lambda old: new if old == name else old  # noqa: E731
        self._entries = {to(old): entry for old, entry in self._entries.items()}
        self._mask_order = [to(old) for old in self._mask_order]
        for entry in self._entries.values():
            entry.over = tuple(map(to, entry.over))
        self._held, self.active = (to(self._held[0]), self._held[1]), to(self.active)
        self._some, self._written, self._ready = ((), {}, {}), None, {}

    @torch.no_grad()
    def remove(self, name: str) -> None:
        """Forget an entry; what is owned and frozen is computed anew. Raises ValueError if a combination needs it."""
        entry = self[name]
        self._check_unused("remove", name)
        self.activate(None)
        if entry.index is not None:
            self._masks.remove(entry.index)
        del self._entries[name]
        self._some, self._written, self._ready = ((), {}, {}), None, {}
        if entry.index is None:
            return
        del self._mask_order[entry.index]
        for i, other in enumerate(self._mask_order):
            self._entries[other].index = i
        for e in self._entries.values():
            e.saved = None  # the values that an entry's file holds are those it was the first to own
        self._prefix = (0, {})
        if len(self._masks):
            self._freeze()
        else:
            self._backbone = None
            for layer in self.layers():
                layer.frozen = layer.frozen_values = None

    # -------------------------------------------------------------------------------------------------------- exporting

    def copy(self) -> MaskBank:
        """A bank of the same entries over a copy of the model, for whoever runs tasks while this one goes on; no bits are copied."""
        with self.as_task(None):
            other = MaskBank(copy.deepcopy(self.model))
        other._masks, other._mask_order, other._backbone = self._masks.copy(), self.masks, self._backbone
        other._entries = {name: copy.copy(entry) for name, entry in self._entries.items()}
        other._state_names, other._initial = list(self._state_names), dict(self._initial)
        if self.trains_weights and len(self._masks):
            other._freeze()
        return other

    def export(self, name: str, *, compressed: bool = False) -> nn.Module:
        """A plain dense module with the task's effective weights baked in, sharing nothing with the model.

        compressed: linear layers that are faster so, by what was measured (`ops.compressed.BEATS_DENSE`: float32 on the CPU, from 4096 x
        4096 weights on, of which at most .1 are open), hold their open weights alone and multiply by `compressed_linear`; the others stay
        dense.
        Else it multiplies by PyTorch's own product. Its outputs agree with the activated model's up to rounding. Raises KeyError for an
        unknown name.
        """
        self._follow()
        entry = self[name]
        dense = baked(self.model, self._effective(entry, None), entry.state, entry.modules)
        return compress_linears(dense, self._layers) if compressed else dense

    def export_all(self) -> EveryTask:
        """One plain module of all masks, which takes the task as an input: forward(task, *args), task int64 of one element, a place in
        `masks`. For `torch.export` and ONNX: one graph with the packed masks, an eighth of a byte a weight and task, in it.

        In eval mode; it shares nothing with the model, and agrees with the activated model up to rounding, as `export`. Combinations are
        not in it. Raises ValueError where there is no mask or ``per_task`` modules differ in more than a Linear's width.
        """
        if not self.masks:
            raise ValueError("export_all: expected at least one mask, the bank has none")
        self._follow()
        entries = [self[name] for name in self.masks]
        heads = {key: one_width([entry.modules[key] for entry in entries], key) for key in self._per_task}
        weights = {key: weight.clone() for key, weight in self._weights().items()}
        module = baked(self.model, weights, entries[0].state, {key: modules[0] for key, modules in heads.items()})
        state = {key: torch.stack([entry.state[key] for entry in entries]) for key in entries[0].state}
        for key, modules in heads.items():
            to = like(module.get_submodule(key))
            named = [
                {f"{key}.{name}": t.to(to) if t.is_floating_point() else t.to(to.device) for name, t in m.state_dict().items()}
                for m in modules
            ]
            state |= {name: torch.stack([tensors[name] for tensors in named]) for name in named[0]}
        alike = {
            name for name, of in state.items() if not of.numel() or bool((rows := raw(of).view(len(of), -1)).eq(rows[0]).all())
        }
        state = {name: tensors for name, tensors in state.items() if name not in alike}
        bits = {
            key: torch.stack([self._masks.bits(entry.index)[key].view(self._planes, -1) for entry in entries])
            for key in self._layers
        }
        return EveryTask(module, self.masks, bits, state)

    def view(self, name: str) -> TaskView:
        """An immutable snapshot of one task for serving, safe to call from many threads."""
        return TaskView(self.export(name))

    # ------------------------------------------------------------------------------------------------------ bookkeeping

    @property
    def trains_weights(self) -> bool:
        """Whether a masked layer's weight learns, so that commits must freeze what they use."""
        return any(layer.train_weight for layer in self.layers())

    def capacity(self) -> dict[str, float | int | None]:
        """What the bank costs.

        used_fraction: share (0-1) of masked weights that a committed mask opens; mask_bytes: packed masks of all entries; bits_per_weight:
        per task; measured_cap: percent of the dense fp32 masked backbone that used values and masks take, where weights do not learn
        100 + the masks; seed_only_cap: the masks alone, for a backbone that is stored as its seed (None where weights learn).
        """
        total = sum(layer.weight.numel() for layer in self.layers())
        used = int(sum(ops.count(bits) for bits in self._masks.owned.values()))
        mask_bytes = self._planes * sum(layer.bits.numel() for layer in self.layers()) * len(self._masks)
        alphas = 4 * sum(entry.alphas.numel() for entry in self._entries.values() if entry.index is None)
        share = 100 * (mask_bytes + alphas) / (4 * total)
        return {
            "used_fraction": used / total,
            "mask_bytes": mask_bytes,
            "bits_per_weight": 8 * (mask_bytes + alphas) / total / max(len(self), 1),
            "measured_cap": share + 100 * used / total if self.trains_weights else 100 + share,
            "seed_only_cap": None if self.trains_weights else share,
        }

    @torch.no_grad()
    def overlap(self) -> dict[str, Tensor]:
        """Open weights that every pair of masks has in common: {layer name: int64 (K, K)}, in the order of `masks`."""
        none = torch.zeros((0, 0), dtype=torch.int64)
        found = {key: ops.overlap(blocks) if blocks else none for key, blocks in self._masks.blocks.items()}
        each = (len(self._masks), self._planes)
        return {key: pairs.view(*each, *each).sum((1, 3)) for key, pairs in found.items()}

    def verify(self) -> None:
        """Prove that nothing moved that a committed task uses. Raises RuntimeError naming the layer and how many weights did.

        Where weights learn, every frozen weight is compared bit by bit with its value at the commit; else the backbone's hash.
        """
        for key, layer in self._layers.items():
            if layer.train_weight and len(self._masks):
                if layer.frozen is None:
                    raise RuntimeError(
                        f"verify: layer {key!r} must have frozen weights, it has none: another bank took over the model"
                    )
                now = layer.weight.detach()[ops.unpack(layer.frozen, layer.weight.shape)]
                moved = int((raw(now) != raw(layer.frozen_values)).any(-1).sum()) if now.numel() else 0
                if moved:
                    raise RuntimeError(f"verify: layer {key!r} must keep its {now.numel()} frozen weights, {moved} of them moved")
        if self._backbone is not None and (now := self._hash()) != self._backbone:
            raise RuntimeError(f"verify: the backbone must have hash {self._backbone[:12]}, got {now[:12]}: its weights changed")

    def _hash(self) -> str | None:
        """Hash of what all tasks share and none may change: masked weights that do not learn, and unmasked fixed parameters."""
        masked = {id(p) for layer in self.layers() for p in (layer.weight, layer.scores)}
        fixed = [(key, layer.weight) for key, layer in self._layers.items() if not layer.train_weight]
        fixed += [
            (key, p)
            for key, p in self.model.named_parameters()
            if id(p) not in masked and key not in self._state_names and not matches(key, self._per_task)
        ]
        digest = hashlib.sha256()
        for key, value in fixed:
            digest.update(f"{key} {tuple(value.shape)} {value.dtype}".encode())
            digest.update(raw(value.detach()).cpu().numpy().tobytes())
        return digest.hexdigest() if fixed else None

    def _trainable(self) -> list[str]:
        """Names of the tensors of the model that belong to a task and not to the backbone or a ``per_task`` module."""
        masked = {id(p) for layer in self.layers() for p in (layer.weight, layer.scores)}
        names = [key for key, p in self.model.named_parameters() if p.requires_grad and id(p) not in masked]
        kept = self.model.state_dict(keep_vars=True)
        names += [key for key, _ in self.model.named_buffers() if key in kept]
        return [key for key in names if not matches(key, self._per_task)]

    def _state(self) -> dict[str, Tensor]:
        owners, found = {}, {}
        for key in self._state_names:  # looked up and not walked for: most modules have none
            owner, _, name = key.rpartition(".")
            module = owners.get(owner) or owners.setdefault(owner, self.model.get_submodule(owner))
            found[key] = module._parameters[name] if name in module._parameters else module._buffers[name]
        return found
