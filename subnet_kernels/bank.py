"""Many tasks' masks over one backbone: learn one, keep it, run as any of them, or as all at once.

A *task* is a mask over the weights of the masked layers, and its state: every other trainable parameter and persistent buffer, and
the modules named in ``per_task``. What does not require a gradient is shared backbone.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn

from subnet_kernels import ops, reference
from subnet_kernels.convert import matches
from subnet_kernels.files import write_atomic
from subnet_kernels.layers import DENSE, SubnetConv2d, SubnetLayer, SubnetLinear, init_scores_, refresh

FORMAT = "subnet-kernels bank"
VERSION = 1


@dataclass
class Entry:
    """One entry of a bank: a mask (its place among the masks is `index`) or a combination of masks (alphas over names)."""

    index: int | None
    state: dict[str, Tensor]
    modules: dict[str, nn.Module]
    alphas: Tensor | None = None
    over: tuple[str, ...] = ()
    scores: dict[str, Tensor] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    facts: dict = field(default_factory=dict)
    saved: Path | None = None  # its file, where it has been written or read


class MaskBank:
    """All tasks' masks over one converted model.

    model: a module that `convert` went over. Raises ValueError if it has no masked layer.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self._layers = {name: m for name, m in model.named_modules() if isinstance(m, SubnetLayer)}
        if not self._layers:
            raise ValueError(f"MaskBank: expected a converted model, got {type(model).__name__} without a masked layer")
        config = getattr(model, "subnet_config", None)
        self._per_task = [n for n, _ in model.named_modules() if n and config and any(_fits(n, p) for p in config.per_task)]
        self._entries: dict[str, Entry] = {}
        self._blocks: dict[str, list[Tensor]] = {name: [] for name in self._layers}
        self._owned = {name: torch.zeros_like(layer.bits) for name, layer in self._layers.items()}
        self._counts: dict[tuple[str, ...], tuple[dict, dict]] = {}
        self._backbone: str | None = None
        self._initial = {key: value.detach().clone() for key, value in self._state().items()}
        self._live: tuple[dict, dict] | None = None  # state and modules of the live task while another one is active
        self._head: str | None = None  # whose state a superposition runs with
        self.active: str | None = None

    # ---------------------------------------------------------------------------------------------------------- looking

    def layers(self) -> list[SubnetLayer]:
        """The masked layers, in module order."""
        return list(self._layers.values())

    @property
    def layer_names(self) -> list[str]:
        return list(self._layers)

    @property
    def names(self) -> list[str]:
        """Entries in the order of their commits."""
        return list(self._entries)

    @property
    def masks(self) -> list[str]:
        """Names of the entries that are masks."""
        return [name for name, entry in self._entries.items() if entry.index is not None]

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
        """Packed bits of a mask: {layer name: uint8}. Raises ValueError for a combination."""
        index = self[name].index
        if index is None:
            raise ValueError(f"bank: {name!r} must be a mask, it is a combination of masks")
        block, place = divmod(index, reference.BLOCK)
        return {layer: blocks[block][:, place].reshape(-1) for layer, blocks in self._blocks.items()}

    def owned(self) -> dict[str, Tensor]:
        """Packed bits that any committed mask uses: {layer name: uint8}."""
        return self._owned

    def live_bits(self) -> dict[str, Tensor]:
        """Copies of the packed bits in training now: {layer name: uint8}."""
        refresh([layer for layer in self.layers() if layer._seen != layer._now()])
        return {name: layer.bits.clone() for name, layer in self._layers.items()}

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
        if not isinstance(name, str) or not name:
            raise ValueError(f"commit: name must be a non-empty string, got {name!r}")
        if name in self._entries:
            raise ValueError(f"commit: {name!r} must be a new name, the bank has it already")
        if alphas is not None and bits is not None:
            raise ValueError("commit: expected bits or alphas, got both")
        if self._live is not None and alphas is None:
            raise ValueError(f"commit: the live task must be active, got {self.active!r}; call activate(None) first")
        state = {key: value.detach().clone() for key, value in self._state().items()}
        modules = {key: _fixed_copy(self.model.get_submodule(key)) for key in self._per_task}
        kept = {key: layer.scores.detach().clone() for key, layer in self._layers.items()} if scores else {}
        named = {key: value.detach().clone() for key, value in (tensors or {}).items()}
        if alphas is not None:
            over = tuple(over or self.masks)
            self._check_alphas("commit", alphas, len(self._mask_names("commit", over)))
            self._entries[name] = Entry(None, state, modules, alphas.detach().clone(), over, kept, named, facts)
            return
        bits = self.live_bits() if bits is None else {key: value.clone() for key, value in bits.items()}
        if set(bits) != set(self._layers):
            raise ValueError(f"commit: bits must have the layers {', '.join(self._layers)}, got {', '.join(bits)}")
        for key, layer in self._layers.items():
            if bits[key].dtype != torch.uint8 or bits[key].shape != layer.bits.shape:
                raise ValueError(
                    f"commit: bits of layer {key!r} must be uint8 of {tuple(layer.bits.shape)}, "
                    f"got {bits[key].dtype} of {tuple(bits[key].shape)}"
                )
        if self._backbone is None and not self.trains_weights:
            self._backbone = self._hash()
        self._append(bits)
        self._entries[name] = Entry(len(self.masks), state, modules, None, (), kept, named, facts)

    def _append(self, bits: Mapping[str, Tensor]) -> None:
        for key, layer in self._layers.items():
            blocks, row = self._blocks[key], bits[key].view(-1, 1, reference.TILE // 8)
            if blocks and blocks[-1].shape[1] < reference.BLOCK:
                blocks[-1] = torch.cat([blocks[-1], row], 1)
            else:
                blocks.append(row.contiguous())
            ops.union_(self._owned[key], bits[key])
            self._freeze(key, layer)
        self._counts.clear()

    def _freeze(self, key: str, layer: SubnetLayer) -> None:
        if layer.train_weight:
            layer.frozen = self._owned[key].clone()
            layer.frozen_values = layer.weight.detach()[ops.unpack(layer.frozen, layer.weight.shape)]

    def begin(self, scores: str = "keep", per_task: Mapping[str, int] | None = None) -> None:
        """Make the live task ready for the next one: fresh task state, fresh ``per_task`` modules.

        scores: ``"keep"`` or ``"init"`` (drawn anew, from PyTorch's global generator as the modules are); per_task: output widths of
        Linear modules, {name: outputs}. Make a new optimizer after it: the modules are new. Raises ValueError on a bad argument.
        """
        if scores not in ("keep", "init"):
            raise ValueError(f"begin: scores must be 'keep' or 'init', got {scores!r}")
        unknown = set(per_task or {}) - set(self._per_task)
        if unknown:
            raise ValueError(
                f"begin: per_task must name modules of {', '.join(self._per_task) or 'none'}, got {', '.join(sorted(unknown))}"
            )
        self.activate(None)
        with torch.no_grad():
            for key, value in self._state().items():
                value.copy_(self._initial[key])
            if scores == "init":
                for layer in self.layers():
                    init_scores_(layer.scores)
        for key in self._per_task:
            self.model.set_submodule(key, _fresh(self.model.get_submodule(key), key, (per_task or {}).get(key)))
        refresh(self.layers())

    @torch.no_grad()
    def remove(self, name: str) -> None:
        """Forget an entry; what is owned and frozen is computed anew. Raises ValueError if a combination needs it."""
        entry = self[name]
        users = [other for other, e in self._entries.items() if name in e.over]
        if users:
            raise ValueError(f"remove: {name!r} must not be part of a combination, {users[0]!r} uses it")
        self.activate(None)
        kept = [self.bits(other) for other in self.masks if other != name]
        del self._entries[name]
        if entry.index is None:
            return
        for i, other in enumerate(self.masks):
            self._entries[other].index = i
        for e in self._entries.values():
            e.saved = None  # the values that an entry's file holds are those it was the first to own
        self._blocks = {key: [] for key in self._layers}
        for key, layer in self._layers.items():
            self._owned[key].zero_()
            layer.frozen = layer.frozen_values = None
        for bits in kept:
            self._append(bits)
        self._counts.clear()

    # ---------------------------------------------------------------------------------------------------------- running

    @torch.no_grad()
    def activate(self, name: str | None, *, bits: Mapping[str, Tensor] | None = None, in_place: bool = False) -> None:
        """Run the model as a stored task; None is the live one again.

        bits: run as this mask with the live state, {layer name: packed bits}; in_place: copy into the tensors that forward reads
        already (for CUDA graphs). While a task is active weights and scores get no gradient. Raises KeyError for an unknown name.
        """
        entry = self[name] if name is not None else None
        if name is not None and bits is not None:
            raise ValueError(f"activate: expected a name or bits, got both, {name!r}")
        self._head = None
        if entry is None and bits is None:
            self._to_live()
            return
        if entry is not None and self._live is None:
            state = {key: value.detach().clone() for key, value in self._state().items()}
            self._live = (state, {key: self.model.get_submodule(key) for key in self._per_task})
        elif entry is None:
            self._to_live()
        for key, weight in self._effective(entry, bits).items():
            layer = self._layers[key]
            layer._mix = None
            if in_place and layer._active is not None:
                layer._active.copy_(weight)
            else:
                layer._active = weight
        if entry is not None:
            self._put(entry.state, entry.modules, in_place)
        self.active = name

    @property
    def is_live(self) -> bool:
        """Whether forward goes through the live masks: no task is active and nothing superposed."""
        layer = self.layers()[0]
        return layer._active is None and layer._mix is None

    @contextlib.contextmanager
    def as_task(self, name: str | None) -> Iterator[None]:
        """Run the block as a stored task (None: the live one); afterwards the model runs as it did before."""
        active, head, modes = self.active, self._head, [(layer._active, layer._mix) for layer in self.layers()]
        self.activate(name)
        try:
            yield
        finally:
            self.activate(active if head is None else head)
            self.active, self._head = active, head
            for layer, mode in zip(self.layers(), modes):
                layer._active, layer._mix = mode

    def _effective(self, entry: Entry | None, bits: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        weights = {key: layer.weight.detach() for key, layer in self._layers.items()}
        if entry is not None and entry.index is None:
            blocks, _ = self._of(entry.over)
            rows = entry.alphas.expand(len(weights), -1) if entry.alphas.dim() == 1 else entry.alphas
            return {key: ops.superpose(w, blocks[key], row.to(w)) for (key, w), row in zip(weights.items(), rows)}
        if bits is None:
            block, place = divmod(entry.index, reference.BLOCK)
            bits = {key: self._blocks[key][block][:, place].reshape(-1) for key in weights}
        return {key: ops.apply(w, bits[key]) for key, w in weights.items()}

    def _to_live(self) -> None:
        for layer in self.layers():
            layer._active = layer._mix = None
        if self._live is not None:
            self._put(*self._live, False)
            self._live = None
        self.active = None

    def _put(self, state: Mapping[str, Tensor], modules: Mapping[str, nn.Module], in_place: bool) -> None:
        for key, value in self._state().items():
            value.copy_(state[key])
        for key, module in modules.items():
            if in_place:
                for mine, theirs in zip(_tensors(self.model.get_submodule(key)), _tensors(module)):
                    mine.copy_(theirs)
            else:
                self.model.set_submodule(key, module)

    def superpose(self, alphas: Tensor | None = None, *, over: Sequence[str] | None = None, head: str | None = None) -> Tensor:
        """Run the model as many masks at once: every layer's weight is W * sum_k alpha_k M_k.

        alphas: (K,), or (layers, K) with a row for each masked layer, differentiable; None is 1/K each. over: names of the K masks,
        default all; head: the entry whose task state and ``per_task`` modules are used (default the live ones) -> the alphas, a leaf that
        requires a gradient where None was given. Ends with `activate`. Raises ValueError on a bad argument.
        """
        names = self._mask_names("superpose", self.masks if over is None else over)
        self.activate(head)
        self.active, self._head = None, head  # the state is the head's, the weights are nobody's
        blocks, counts = self._of(names)
        equal = alphas is None
        if equal:
            some = self.layers()[0].weight
            alphas = torch.full((len(names),), 1 / len(names), device=some.device, dtype=some.dtype, requires_grad=True)
        self._check_alphas("superpose", alphas, len(names))
        for i, (key, layer) in enumerate(self._layers.items()):
            layer._active = None
            layer._mix = (blocks[key], alphas if alphas.dim() == 1 else alphas[i], equal, counts[key] if equal else None)
        return alphas

    def row_alpha_grad(
        self, x: Tensor, objective: Callable[[Tensor], Tensor], *, over: Sequence[str] | None = None, head: str | None = None
    ) -> Tensor:
        """Gradient to the alphas, at equal alphas, of every row's own objective: SupSup's one-shot inference row by row.

        x: (B, ...); objective: logits (B, C) -> (B,), row b depending on row b alone -> (B, K). One forward and backward of the summed
        objective, then `alpha_grad` of every layer. Linear layers and ungrouped Conv2d; others raise ValueError.
        """
        for key, layer in self._layers.items():
            if not isinstance(layer, SubnetLinear) and not (isinstance(layer, SubnetConv2d) and layer.groups == 1):
                raise ValueError(
                    f"row_alpha_grad: layer {key!r} must be linear or an ungrouped Conv2d, got {type(layer).__name__}"
                )
        alphas = self.superpose(None, over=over, head=head)
        try:
            for layer in self.layers():
                layer._trace = []
            with torch.enable_grad():
                value = objective(self.model(x)).sum()
            calls = [(layer, *call) for layer in self.layers() for call in layer._trace]
            grads = torch.autograd.grad(value, [y for _, _, y in calls])
        finally:
            for layer in self.layers():
                layer._trace = None
        total = x.new_zeros((x.shape[0], alphas.shape[-1]), dtype=alphas.dtype)
        for (layer, inp, _), grad in zip(calls, grads):
            weight, bank = layer.weight.detach().flatten(1), layer._mix[0]
            if isinstance(layer, SubnetConv2d):
                inp, grad = _columns(layer, inp), grad.flatten(2).transpose(1, 2)
            rows = ops.alpha_grad(inp.reshape(-1, weight.shape[1]), grad.reshape(-1, weight.shape[0]), weight, bank)
            total += rows.view(x.shape[0], -1, rows.shape[1]).sum(1)
        return total

    def _of(self, names: Sequence[str]) -> tuple[dict, dict]:
        """Blocks and counts of some masks, cached until a mask is added or removed."""
        key = tuple(names)
        if key not in self._counts:
            if list(key) == self.masks:
                blocks = self._blocks
            else:
                rows = [self.bits(name) for name in key]
                blocks = {layer: _blocks_of([row[layer] for row in rows]) for layer in self._layers}
            counts = {name: _count_masks(blocks[name], layer.weight.shape) for name, layer in self._layers.items()}
            self._counts = {key: (blocks, counts)}
        return self._counts[key]

    def _mask_names(self, where: str, names: Sequence[str]) -> list[str]:
        names = list(names)
        if not names:
            raise ValueError(f"{where}: expected at least one mask, the bank has none")
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

    # -------------------------------------------------------------------------------------------------------- exporting

    def export(self, name: str) -> nn.Module:
        """A plain dense module with the task's effective weights baked in, sharing nothing with the model."""
        with self.as_task(name):
            dense = copy.deepcopy(self.model)
        plain = {masked: kind for kind, masked in DENSE.items()}
        for module in dense.modules():
            if isinstance(module, SubnetLayer):
                module.weight = nn.Parameter(module._active.clone(), requires_grad=False)
                del module._parameters["scores"]
                for key in _INSTALLED:
                    module.__dict__.pop(key, None)
                module.__class__ = plain[type(module)]
        dense.__dict__.pop("subnet_config", None)
        return dense

    def view(self, name: str) -> TaskView:
        """An immutable snapshot of one task for serving, safe to call from many threads."""
        return TaskView(self.export(name))

    # ------------------------------------------------------------------------------------------------------ bookkeeping

    @property
    def trains_weights(self) -> bool:
        return any(layer.train_weight for layer in self.layers())

    def capacity(self) -> dict[str, float | int | None]:
        """What the bank costs.

        used_fraction: share (0-1) of masked weights that a committed mask opens; mask_bytes: packed masks of all entries; bits_per_weight:
        per task; measured_cap: percent of the dense fp32 masked backbone that used values and masks take, where weights do not learn
        100 + the masks; seed_only_cap: the masks alone, for a backbone that is stored as its seed (None where weights learn).
        """
        total = sum(layer.weight.numel() for layer in self.layers())
        used = int(sum(ops.count(bits) for bits in self._owned.values()))
        mask_bytes = sum(layer.bits.numel() for layer in self.layers()) * len(self.masks)
        alphas = sum(e.alphas.numel() * 4 for e in self._entries.values() if e.alphas is not None)
        share = 100 * (mask_bytes + alphas) / (4 * total)
        return {
            "used_fraction": used / total,
            "mask_bytes": mask_bytes,
            "bits_per_weight": 8 * (mask_bytes + alphas) / total / max(len(self), 1),
            "measured_cap": share + 100 * used / total if self.trains_weights else 100 + share,
            "seed_only_cap": None if self.trains_weights else share,
        }

    def verify(self) -> None:
        """Prove that nothing moved that a committed task uses. Raises RuntimeError naming the layer and how many weights did.

        Where weights learn, every frozen weight is compared bit by bit with its value at the commit; else the backbone's hash.
        """
        for key, layer in self._layers.items():
            if layer.frozen is not None:
                now = layer.weight.detach()[ops.unpack(layer.frozen, layer.weight.shape)]
                moved = int((_raw(now) != _raw(layer.frozen_values)).any(-1).sum()) if now.numel() else 0
                if moved:
                    raise RuntimeError(f"verify: layer {key!r} must keep its {now.numel()} frozen weights, {moved} of them moved")
        if self._backbone is not None and self._hash() != self._backbone:
            raise RuntimeError(
                f"verify: the backbone must have hash {self._backbone[:12]}, got {self._hash()[:12]}: its weights changed"
            )

    def _hash(self) -> str:
        digest = hashlib.sha256()
        for key, layer in self._layers.items():
            digest.update(f"{key} {tuple(layer.weight.shape)} {layer.weight.dtype}".encode())
            digest.update(_raw(layer.weight.detach()).cpu().numpy().tobytes())
        return digest.hexdigest()

    def _state(self) -> dict[str, Tensor]:
        """The tensors of the model that belong to a task and not to the backbone or a ``per_task`` module."""
        masked = {id(p) for layer in self._layers.values() for p in (layer.weight, layer.scores)}
        found = {k: p for k, p in self.model.named_parameters() if p.requires_grad and id(p) not in masked}
        kept = self.model.state_dict(keep_vars=True)
        found.update({k: b for k, b in self.model.named_buffers() if k in kept})
        return {key: value for key, value in found.items() if not matches(key, self._per_task)}

    # ---------------------------------------------------------------------------------------------------------- on disk

    def save(self, folder: Path | str) -> None:
        """Write the bank to a folder: one file an entry that is not there yet, then the manifest. Nothing else is touched.

        Raises OSError if the folder cannot be written; what it held before stays valid.
        """
        folder = Path(folder).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        owned = {key: torch.zeros_like(bits) for key, bits in self._owned.items()}
        rows = []
        for number, (name, entry) in enumerate(self._entries.items()):
            tensors = {}
            if entry.index is not None:
                for key, bits in self.bits(name).items():
                    tensors[f"bits/{key}"] = bits
                    if self._layers[key].train_weight:
                        weight = self._layers[key].weight.detach()
                        tensors[f"values/{key}"] = weight[ops.unpack(bits & ~owned[key], weight.shape)]
                        ops.union_(owned[key], bits)
            path = folder / f"{number:05d}-{re.sub(r'[^A-Za-z0-9_.-]', '_', name)[:60]}.safetensors"
            if entry.saved != path or not path.exists():
                tensors |= {f"state/{k}": v for k, v in entry.state.items()} | {f"scores/{k}": v for k, v in entry.scores.items()}
                tensors |= {f"tensors/{k}": v for k, v in entry.tensors.items()}
                tensors |= {f"per_task/{m}/{k}": v for m, module in entry.modules.items() for k, v in module.state_dict().items()}
                if entry.alphas is not None:
                    tensors["alphas"] = entry.alphas
                write_atomic(path, to_safetensors({k: v.detach().cpu().contiguous() for k, v in tensors.items()}))
                entry.saved = path
            kind = "mask" if entry.index is not None else "combination"
            rows.append({"name": name, "file": path.name, "kind": kind, "over": list(entry.over), "facts": entry.facts})
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "torch": torch.__version__,
            "layers": {
                key: {
                    "shape": list(layer.weight.shape),
                    "dtype": str(layer.weight.dtype).removeprefix("torch."),
                    "density": layer.density,
                }
                for key, layer in self._layers.items()
            },
            "trains_weights": self.trains_weights,
            "backbone_sha256": self._backbone,
            "entries": rows,
        }
        write_atomic(folder / "manifest.json", json.dumps(manifest, indent=1) + "\n")

    @classmethod
    def load(cls, folder: Path | str, model: nn.Module, *, restore: bool = False) -> MaskBank:
        """Read a bank over a converted model.

        The model's weights must be those that the masks were learnt on; with restore=True the weights that the bank owns are written into
        the model instead. Raises ValueError in one sentence if a file is missing, damaged or does not fit the model.
        """
        bank = cls(model)
        bank.read(folder, restore=restore)
        return bank

    def read(self, folder: Path | str, names: Sequence[str] | None = None, *, restore: bool = False) -> None:
        """Add the entries of a folder to this bank, which must be empty; names: the first ones, in order (default all). As `load`."""
        if self._entries:
            raise ValueError(f"read: the bank must be empty, it has {len(self)} entries")
        folder = Path(folder).resolve()
        manifest = _read_manifest(folder)
        rows = manifest["entries"] if names is None else manifest["entries"][: len(names)]
        if names is not None and [row["name"] for row in rows] != list(names):
            raise ValueError(
                f"read: {folder} must begin with the entries {', '.join(names)}, got {', '.join(r['name'] for r in rows)}"
            )
        shapes = {key: list(layer.weight.shape) for key, layer in self._layers.items()}
        stored = {key: value["shape"] for key, value in manifest["layers"].items()}
        if shapes != stored:
            wrong = next(key for key in [*shapes, *stored] if shapes.get(key) != stored.get(key))
            raise ValueError(
                f"load: layer {wrong!r} must have shape {stored.get(wrong)} as in {folder}, the model's has {shapes.get(wrong)}"
            )
        for row in rows:
            self._read_entry(folder, row, restore)
        if manifest["backbone_sha256"] and self.masks:
            self._backbone, now = manifest["backbone_sha256"], self._hash()
            if now != self._backbone:
                raise ValueError(f"load: the model's weights must have hash {self._backbone[:12]} as in {folder}, got {now[:12]}")
        refresh(self.layers())

    @torch.no_grad()
    def _read_entry(self, folder: Path, row: Mapping, restore: bool) -> None:
        path = folder / row["file"]
        try:
            with safe_open(path, "pt") as file:
                tensors = {key: file.get_tensor(key) for key in file.keys()}
        except (OSError, SafetensorError) as error:
            raise ValueError(f"load: {path} must be a readable safetensors file: {error}") from None

        def group(prefix: str) -> dict[str, Tensor]:
            return {key[len(prefix) :]: value for key, value in tensors.items() if key.startswith(prefix)}

        device = self.layers()[0].weight.device
        modules = {}
        for key in self._per_task:
            state = {k: v.to(device) for k, v in group(f"per_task/{key}/").items()}
            modules[key] = _from_state(self.model.get_submodule(key), state, path)
        state = {key: value.to(device) for key, value in group("state/").items()}
        mine = {key: tuple(value.shape) for key, value in self._state().items()}
        if mine != {key: tuple(value.shape) for key, value in state.items()}:
            raise ValueError(
                f"load: {path} must hold the task state {', '.join(mine) or '(none)'}, got {', '.join(state) or '(none)'}"
            )
        entry = Entry(
            None, state, modules, None, tuple(row["over"]), group("scores/"), group("tensors/"), dict(row["facts"]), path
        )
        if row["kind"] == "combination":
            entry.alphas = tensors["alphas"].to(device)
            self._check_alphas("load", entry.alphas, len(self._mask_names("load", entry.over)))
        else:
            bits, values = group("bits/"), group("values/")
            for key, layer in self._layers.items():
                n = layer.weight.numel()
                if key not in bits or bits[key].dtype != torch.uint8 or bits[key].shape != layer.bits.shape:
                    raise ValueError(f"load: {path} must hold {layer.bits.numel()} bytes of bits for layer {key!r}")
                bits[key] = bits[key].to(device)
                if not torch.equal(ops.pack(ops.unpack(bits[key], (n,))), bits[key]):
                    raise ValueError(f"load: {path} must have zero padding after the {n} bits of layer {key!r}")
                if layer.train_weight:
                    self._take_values(path, key, layer, bits[key] & ~self._owned[key], values.get(key), restore)
            entry.index = len(self.masks)
            self._append(bits)
        self._entries[row["name"]] = entry

    def _take_values(self, path: Path, key: str, layer: SubnetLayer, new: Tensor, values: Tensor | None, restore: bool) -> None:
        expected = int(ops.count(new))
        if values is None or values.dtype != layer.weight.dtype or values.shape != (expected,):
            raise ValueError(f"load: {path} must hold the {expected} {layer.weight.dtype} values that layer {key!r} owns by it")
        values = values.to(layer.weight.device)
        if restore:
            ops.restore_([layer.weight], [new], [values])
        elif not torch.equal(_raw(layer.weight.detach()[ops.unpack(new, layer.weight.shape)]), _raw(values)):
            raise ValueError(f"load: the model's weights in layer {key!r} must be those that {path} was learnt on, they differ")


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

    def __setattr__(self, name, value):
        if self.__dict__.get("_fixed"):
            raise AttributeError(f"TaskView: attribute {name!r} cannot be set, a view is a snapshot")
        super().__setattr__(name, value)


_INSTALLED = "rule train_weight frozen frozen_values k bits w_eff hints _seen _active _mix _trace".split()


def _fits(name: str, pattern: str) -> bool:
    return name.count(".") == pattern.count(".") and matches(name, [pattern])


def _tensors(module: nn.Module) -> list[Tensor]:
    return list(module.state_dict(keep_vars=True).values())


def _raw(tensor: Tensor) -> Tensor:
    """The bytes of a tensor, a row an element, so that comparison is of bits and NaN equals itself."""
    return tensor.contiguous().view(torch.uint8).view(-1, tensor.element_size())


def _fixed_copy(module: nn.Module) -> nn.Module:
    return copy.deepcopy(module).requires_grad_(False)


def _fresh(module: nn.Module, name: str, outputs: int | None) -> nn.Module:
    if outputs is not None:
        if type(module) is not nn.Linear:
            raise ValueError(f"begin: module {name!r} must be a Linear to be given a width, got {type(module).__name__}")
        weight = module.weight
        return nn.Linear(module.in_features, outputs, module.bias is not None, device=weight.device, dtype=weight.dtype)
    new = copy.deepcopy(module).requires_grad_(True)
    for part in new.modules():
        if hasattr(part, "reset_parameters"):
            part.reset_parameters()
    return new


def _from_state(template: nn.Module, state: Mapping[str, Tensor], path: Path) -> nn.Module:
    """A copy of the template with these tensors; a Linear takes their width."""
    module = _fixed_copy(template)
    if set(module.state_dict()) != set(state):
        raise ValueError(f"load: {path} must hold {', '.join(module.state_dict())} of a per-task module, got {', '.join(state)}")
    if type(module) is nn.Linear and state["weight"].dim() == 2 and state["weight"].shape[1] == module.in_features:
        weight = state["weight"]
        module = nn.Linear(weight.shape[1], weight.shape[0], module.bias is not None, device=weight.device, dtype=weight.dtype)
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"load: {path} does not fit the per-task module: {' '.join(str(error).split())}") from None
    return module.requires_grad_(False)


def _blocks_of(rows: Sequence[Tensor]) -> list[Tensor]:
    stacked = torch.stack(list(rows))
    return [part.view(len(part), -1, reference.TILE // 8).transpose(0, 1).contiguous() for part in stacked.split(reference.BLOCK)]


def _count_masks(blocks: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
    counts = torch.zeros(tuple(shape), dtype=torch.int32, device=blocks[0].device)
    for block in blocks:
        for j in range(block.shape[1]):
            counts += ops.unpack(block[:, j].reshape(-1), shape)
    return counts


def _columns(layer: SubnetConv2d, x: Tensor) -> Tensor:
    """The input patches of a convolution: (B, C, H, W) -> (B, positions, C * kernel)."""
    padding = layer.padding
    if isinstance(padding, str) or layer.padding_mode != "zeros":
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        x, padding = F.pad(x, layer._reversed_padding_repeated_twice, mode=mode), 0
    return F.unfold(x, layer.kernel_size, layer.dilation, padding, layer.stride).transpose(1, 2)


def _read_manifest(folder: Path) -> dict:
    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"load: {path} must be a readable bank manifest: {error}") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ValueError(f"load: {path} must be the manifest of a {FORMAT}")
    if manifest.get("version") != VERSION:
        raise ValueError(f"load: {path} must be of format version {VERSION}, got {manifest.get('version')!r}")
    for row in manifest.get("entries", ()):
        if not isinstance(row, dict) or Path(str(row.get("file"))).name != row.get("file"):
            raise ValueError(f"load: {path} must name its entries' files without folders, got {row!r:.80}")
    return manifest
