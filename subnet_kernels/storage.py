"""A bank on disk: a folder with one safetensors file an entry and a manifest that names them, written so that nothing is ever lost.

An entry's file is written once, under a name that has its content's hash in it; the manifest is replaced last, by rename. So a folder
is valid at every moment, and appending touches nothing that is there. Of many entries the manifest lists the last ones alone, and for
every 256 before them a segment, a file that lists those: one more entry costs the same however many there are. `pack_file` makes one
file of all of it. No pickle. Where no weight learns, an entry's file is opened when something of it is first asked for.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn

from subnet_kernels import codec, ops, reference
from subnet_kernels.files import write_atomic
from subnet_kernels.heads import fixed_copy, from_state, kind_of
from subnet_kernels.layers import SubnetLayer, refresh
from subnet_kernels.manifest import FORMAT, VERSION, BankFolder, PackedBank, digest, open_bank
from subnet_kernels.masks import Masks, opened

SEGMENT = 256  # entries


@dataclass
class Entry:
    """One entry of a bank: a mask (its place among the masks is `index`) or a combination of masks (alphas over names)."""

    index: int | None
    state: dict[str, Tensor]
    modules: dict[str, nn.Module]
    alphas: Tensor | None = field(default_factory=lambda: None)  # of no class, so that a stored entry's can be found missing
    over: tuple[str, ...] = ()
    scores: dict[str, Tensor] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    facts: dict = field(default_factory=dict)
    saved: Path | None = None  # its file, where it has been written or read


class StoredEntry(Entry):
    """An entry that is read, by `read`, when something of it is first asked for that its place does not say."""

    def __init__(self, read: Callable[[], Entry], index: int | None, over: tuple[str, ...], facts: dict, saved: Path | None):
        self.read, self.index, self.over, self.facts, self.saved = read, index, over, facts, saved

    def __getattr__(self, name: str):
        if name not in ("state", "modules", "alphas", "scores", "tensors"):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        self.fetch()
        return self.__dict__[name]

    def fetch(self) -> None:
        """Read it now."""
        entry = self.read()
        for key in ("state", "modules", "alphas", "scores", "tensors"):
            self.__dict__.setdefault(key, getattr(entry, key))  # what has been put in its place stays


class Written(NamedTuple):
    """What `save` wrote last: a manifest in a folder, of so many entries, the first ones in these segments."""

    manifest: tuple[Path, int, int, int]  # the file, with its number, time and size: another one is somebody else's
    entries: int
    segments: list[str]


class BankFiles:
    """The part of a bank that writes and reads its folder."""

    def save(self, folder: Path | str, *, coded: bool = False) -> None:
        """Write the bank to a folder: one file an entry that is not there yet, then the manifest. Nothing else is touched.

        What an entry holds is what its commit was given. coded: masks of the files that are written now are coded near their entropy
        (`subnet_kernels.codec`, which reading them then needs too). Raises OSError if the folder cannot be written, RuntimeError if the
        codec is needed and not compiled; what it held before stays valid.
        """
        folder = Path(folder).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "manifest.json"
        known = self._written is not None and self._written.manifest == _identity(path)
        written, segments = (self._written.entries, self._written.segments) if known else (0, [])
        for number, (name, entry) in itertools.islice(enumerate(self._entries.items()), written, None):
            if entry.saved is None or entry.saved.parent != folder or not entry.saved.exists():
                data = to_safetensors(self._tensors_of(entry, coded))
                slug = re.sub(r"[^A-Za-z0-9_-]", "_", name)[:60]
                # the content is in the name: a file that an earlier manifest speaks of is never written over with another
                file = folder / f"{number:05d}-{slug}-{digest(data)}.safetensors"
                write_atomic(file, data)
                entry.saved = file
        listed = itertools.islice(self._entries.items(), SEGMENT * len(segments), None)
        rows = [_row(name, entry, entry.saved.name) for name, entry in listed]
        while len(rows) >= SEGMENT:
            data = json.dumps(rows[:SEGMENT]) + "\n"
            segment = folder / f"segment-{len(segments):05d}-{digest(data.encode())}.json"
            if not segment.exists():
                write_atomic(segment, data)
            segments, rows = [*segments, segment.name], rows[SEGMENT:]
        write_atomic(path, json.dumps(self._manifest(segments, rows), indent=1) + "\n")
        self._written = Written(_identity(path), len(self._entries), segments)

    def pack_file(self, path: Path | str, *, coded: bool = False) -> None:
        """Write the whole bank as one safetensors file, which `load` reads as it reads a folder; coded: as in `save`.

        It is written anew each time; to go on with what is in one, load it and save that to a folder. Raises OSError where it cannot be
        written; what was there before stays as it was.
        """
        tensors, rows = {}, []
        for number, (name, entry) in enumerate(self._entries.items()):
            tensors |= {f"{number:05d}/{key}": value for key, value in self._tensors_of(entry, coded).items()}
            rows.append(_row(name, entry, f"{number:05d}"))
        write_atomic(path, to_safetensors(tensors, {"manifest": json.dumps(self._manifest([], rows))}))

    def _manifest(self, segments: list[str], rows: list[dict]) -> dict:
        return {
            "format": FORMAT,
            "version": VERSION,
            "torch": torch.__version__,
            "layers": {
                key: {
                    "shape": list(layer.weight.shape),
                    "dtype": str(layer.weight.dtype).removeprefix("torch."),
                    "density": layer.density,
                    "trains": layer.train_weight,
                }
                for key, layer in self._layers.items()
            },
            "state": self._state_names,
            "per_task": self._per_task,
            "backbone_sha256": self._backbone,
            "segments": segments,
            "entries": rows,
        }

    def _tensors_of(self, entry: Entry, coded: bool) -> dict[str, Tensor]:
        """What an entry's file holds; of a mask over weights that learn, the values of those that no earlier mask owns."""
        tensors = {f"state/{key}": value for key, value in entry.state.items()}
        tensors |= {f"scores/{key}": value for key, value in entry.scores.items()}
        tensors |= {f"tensors/{key}": value for key, value in entry.tensors.items()}
        tensors |= {f"per_task/{m}/{k}": v for m, module in entry.modules.items() for k, v in module.state_dict().items()}
        if entry.index is None:
            tensors["alphas"] = entry.alphas
        else:
            owned = self._owned_before(entry.index) if self.trains_weights else {}
            last = [self._masks.bits(i) for i in range(entry.index - 2, entry.index) if i >= 0] if coded and owned else []
            for key, bits in self._masks.bits(entry.index).items():
                layer = self._layers[key]
                if coded:
                    context = context_of(owned[key], [mask[key] for mask in last]) if layer.train_weight else []
                    tensors |= {f"coded/{key}{sign}": data for sign, data in sealed(bits.cpu(), layer.weight.numel(), context)}
                else:
                    tensors[f"bits/{key}"] = bits
                if layer.train_weight:
                    weight = layer.weight.detach()
                    tensors[f"values/{key}"] = weight[ops.unpack(bits & ~owned[key], weight.shape)]
        return {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}

    def _owned_before(self, index: int) -> dict[str, Tensor]:
        """Packed bits that the first `index` masks own, from those of the last call on."""
        start, owned = self._prefix
        if start > index or not owned:
            start, owned = 0, {key: torch.zeros_like(bits) for key, bits in self._masks.owned.items()}
        for i in range(start, index):
            for key, bits in self._masks.bits(i).items():
                ops.union_(owned[key], opened(bits))
        self._prefix = (index, owned)
        return owned

    @classmethod
    def load(cls, path: Path | str, model: nn.Module, *, restore: bool = False) -> BankFiles:
        """Read a bank, a folder or a packed file, over a converted model.

        The model's weights must be those that the masks were learnt on; with restore=True the weights that the bank owns are written into
        the model instead. Where no weight learns, an entry is read when something of it is first asked for, and all masks when something of
        all of them is: a superposition, rows, `capacity`, `overlap` or `owned`, a commit or another change. Where weights learn, each
        mask's own are compared now, so all is read. Raises ValueError in one sentence if a file is missing, damaged or does not fit the
        model, of an entry that is read later when it is read.
        """
        bank = cls(model)
        bank.read(path, restore=restore)
        return bank

    def read(self, path: Path | str, names: Sequence[str] | None = None, *, restore: bool = False) -> None:
        """Add the entries of a saved bank to this bank, which must be empty; names: the first ones, in order (default all). As `load`."""
        if self._entries:
            raise ValueError(f"read: the bank must be empty, it has {len(self)} entries")
        stored = open_bank(Path(path).resolve())
        manifest = stored.manifest
        rows = manifest["entries"] if names is None else manifest["entries"][: len(names)]
        if names is not None and [row["name"] for row in rows] != list(names):
            raise ValueError(
                f"read: {path} must begin with the entries {', '.join(names)}, got {', '.join(r['name'] for r in rows)}"
            )
        self.activate(None)
        self._fit(stored.path, manifest)
        masks = [row for row in rows if row["kind"] == "mask"]
        places = {row["name"]: index for index, row in enumerate(masks)}
        templates = {key: fixed_copy(self.model.get_submodule(key)) for key in self._per_task}
        found = {}
        for row in rows:
            saved = stored.place(row) if isinstance(stored, BankFolder) else None
            read = partial(self._entry, stored, row, templates)
            found[row["name"]] = StoredEntry(read, places.get(row["name"]), tuple(row["over"]), dict(row["facts"]), saved)
        weights, writes = {key: layer.weight for key, layer in self._layers.items()}, []
        if self.trains_weights:
            held = Masks(weights, self._planes)
            for row in masks:
                tensors = stored.tensors(row)
                last = [held.bits(i) for i in range(len(held) - 2, len(held)) if i >= 0]
                bits = self._mask(stored, row, tensors, held.owned, last)
                writes += self._values(stored.place(row), tensors, bits, held.owned, restore)
                held.append(bits)
            for entry in found.values():
                entry.fetch()
        else:
            held = Masks(weights, self._planes, [partial(self._mask, stored, row) for row in masks])
        backbone = manifest["backbone_sha256"] if masks else None
        if backbone is not None and (now := self._hash()) != backbone:
            raise ValueError(f"load: the model's weights must have hash {backbone[:12]} as in {path}, got {str(now)[:12]}")
        for layer, new, values in writes:  # all is checked: from here on the model may change
            ops.restore_([layer.weight], [new], [values])
        self._masks, self._backbone = held, backbone
        for name, entry in found.items():
            self._keep(name, entry)
        if masks and self.trains_weights:
            self._prefix = (len(held), {key: bits.clone() for key, bits in held.owned.items()})
            self._freeze()
        refresh(self.layers())

    def _fit(self, path: Path, manifest: Mapping) -> None:
        """Check a manifest against the model, and take over what a task's state is."""
        shapes = {key: [*layer.weight.shape] for key, layer in self._layers.items()}
        stored = {key: value["shape"] for key, value in manifest["layers"].items()}
        if shapes != stored:
            wrong = next(key for key in [*shapes, *stored] if shapes.get(key) != stored.get(key))
            raise ValueError(
                f"load: layer {wrong!r} must have shape {stored.get(wrong)} as in {path}, the model's has {shapes.get(wrong)}"
            )
        for key, layer in self._layers.items():
            if layer.train_weight != manifest["layers"][key]["trains"]:
                raise ValueError(
                    f"load: layer {key!r} must be converted with train_weights={not layer.train_weight} as in {path}"
                )
        if sorted(manifest["per_task"]) != sorted(self._per_task):
            raise ValueError(f"load: per_task must be {manifest['per_task']} as in {path}, the model's is {self._per_task}")
        tensors = {*dict(self.model.named_parameters()), *dict(self.model.named_buffers())}
        missing = [key for key in manifest["state"] if key not in tensors]
        if missing:
            raise ValueError(f"load: the model must have {missing[0]!r}, a part of the task state in {path}")
        self._state_names = list(manifest["state"])
        # what a fresh task begins with is what the model had when the bank was opened, whatever was loaded into it since
        self._initial = {key: self._initial.get(key, value).detach().clone() for key, value in self._state().items()}

    def _entry(self, stored: BankFolder | PackedBank, row: Mapping, templates: Mapping[str, nn.Module]) -> Entry:
        """The entry of a manifest's row, without its mask; templates: the model's ``per_task`` modules."""
        path, tensors = stored.place(row), stored.tensors(row)

        def group(prefix: str) -> dict[str, Tensor]:
            return {key[len(prefix) :]: value for key, value in tensors.items() if key.startswith(prefix)}

        device = self.layers()[0].weight.device
        state, scores, modules = group("state/"), group("scores/"), {}
        for what, stored_ones, mine in (
            ("task state", state, self._state()),
            ("scores", scores, {key: layer.scores for key, layer in self._layers.items()} if scores else {}),
        ):
            for key in sorted({*stored_ones, *mine}):
                if key not in mine or key not in stored_ones or kind_of(mine[key]) != kind_of(stored_ones[key]):
                    expected, got = (kind_of(t[key]) if key in t else "nothing" for t in (mine, stored_ones))
                    raise ValueError(f"load: {path} must hold {expected} as {what} {key!r}, got {got}")
        for key, template in templates.items():
            modules[key] = from_state(template, group(f"per_task/{key}/"), path, key)
        state, scores = ({key: value.to(device) for key, value in some.items()} for some in (state, scores))
        alphas = self._alphas(path, tensors, len(row["over"])) if row["kind"] == "combination" else None
        return Entry(None, state, modules, alphas, scores=scores, tensors=group("tensors/"))

    def _alphas(self, path: Path | str, tensors: Mapping[str, Tensor], tasks: int) -> Tensor:
        alphas = tensors.get("alphas")
        if alphas is None or not alphas.is_floating_point() or alphas.shape not in ((tasks,), (len(self._layers), tasks)):
            got = "nothing" if alphas is None else kind_of(alphas)
            raise ValueError(f"load: {path} must hold alphas of {tasks} masks, for all layers or for each, got {got}")
        return alphas.to(self.layers()[0].weight.device)

    def _mask(
        self,
        stored: BankFolder | PackedBank,
        row: Mapping,
        tensors: Mapping[str, Tensor] | None = None,
        owned: Mapping[str, Tensor] | None = None,
        last: Sequence[Mapping[str, Tensor]] = (),
    ) -> dict[str, Tensor]:
        """The mask of an entry, as `mask_of`; tensors: what it holds, where that has been read."""
        layers = {key: (layer.weight.numel(), layer.train_weight) for key, layer in self._layers.items()}
        tensors = stored.tensors(row) if tensors is None else tensors
        masks = mask_of(stored.place(row), tensors, layers, self._planes, owned, last)
        return {key: bits.to(self._layers[key].weight.device) for key, bits in masks.items()}

    def _shape_of_bits(self, layer: SubnetLayer) -> tuple[int, ...]:
        """Of a mask of that layer: (bytes,), or (2, bytes) where masks are signed."""
        return tuple(layer.bits.shape) if self._planes == 1 else (self._planes, *layer.bits.shape)

    def _values(
        self,
        path: Path | str,
        tensors: Mapping[str, Tensor],
        bits: Mapping[str, Tensor],
        owned: Mapping[str, Tensor],
        restore: bool,
    ) -> list[tuple[SubnetLayer, Tensor, Tensor]]:
        """Check the values of weights that a mask is the first to own; returns what is to be written."""
        writes = []
        for key, layer in self._layers.items():
            if not layer.train_weight:
                continue
            new = bits[key] & ~owned[key]
            values, expected = tensors.get(f"values/{key}"), int(ops.count(new))
            if values is None or values.dtype != layer.weight.dtype or values.shape != (expected,):
                raise ValueError(
                    f"load: {path} must hold the {expected} {layer.weight.dtype} values that layer {key!r} owns by it"
                )
            values = values.to(layer.weight.device)
            if restore:
                writes.append((layer, new, values))
            elif not torch.equal(raw(layer.weight.detach()[ops.unpack(new, layer.weight.shape)]), raw(values)):
                raise ValueError(
                    f"load: the model's weights in layer {key!r} must be those that {path} was learnt on, they differ"
                )
        return writes


def _identity(manifest: Path) -> tuple[Path, int, int, int]:
    """Which file is there now."""
    try:
        found = manifest.stat()
    except OSError:
        return manifest, 0, 0, 0
    return manifest, found.st_ino, found.st_mtime_ns, found.st_size


def _row(name: str, entry: Entry, file: str) -> dict:
    """What the manifest or a segment says of an entry."""
    kind = "mask" if entry.index is not None else "combination"
    return {"name": name, "file": file, "kind": kind, "over": list(entry.over), "facts": entry.facts}


def mask_of(
    where: Path | str,
    tensors: Mapping[str, Tensor],
    layers: Mapping[str, tuple[int, bool]],
    planes: int,
    owned: Mapping[str, Tensor] | None = None,
    last: Sequence[Mapping[str, Tensor]] = (),
) -> dict[str, Tensor]:
    """The mask of an entry with these tensors, {layer name: packed bits on the CPU}, of `planes` planes.

    layers: of each its weights and whether they learn; owned: what the masks before it open, and last: the two before it, by which masks
    of weights that learn are coded. Raises ValueError in one sentence, saying where, if there is no proper mask.
    """
    masks = {}
    for key, (n, learns) in layers.items():
        size = reference.nbytes(n)
        bits, shape = tensors.get(f"bits/{key}"), (size,) if planes == 1 else (planes, size)
        if bits is None and f"coded/{key}" in tensors:
            try:
                bits = _unsealed(tensors, key, n, context_of(owned[key], [mask[key] for mask in last]) if learns else [], planes)
            except (ValueError, KeyError) as error:
                raise ValueError(f"load: {where} must hold a coded mask for layer {key!r}: {error}") from None
        if bits is None or bits.dtype != torch.uint8 or bits.shape != shape:
            raise ValueError(f"load: {where} must hold {' x '.join(map(str, shape))} bytes of bits for layer {key!r}")
        if not is_padded(bits, n):
            raise ValueError(f"load: {where} must have zero padding after the {n} bits of layer {key!r}")
        if not is_one_sign(bits):
            raise ValueError(f"load: {where} must open a weight with one sign, its mask of layer {key!r} has both")
        masks[key] = bits
    return masks


def context_of(owned: Tensor, last: Sequence[Tensor]) -> list[Tensor]:
    """What a mask of weights that learn is coded by: what earlier masks own, the one before it and the one before that."""
    return [plane.cpu() for plane in (owned, *reversed(last), *[torch.zeros_like(owned)] * (2 - len(last)))]


def sealed(bits: Tensor, n: int, context: Sequence[Tensor]) -> list[tuple[str, Tensor]]:
    """A mask, coded, by what its tensor's name ends with; of a signed one where it is 1, and where it is -1 by that."""
    if bits.dim() == 1:
        return [("", codec.seal(bits, n, context))]
    return [("", codec.seal(bits[0], n)), ("/minus", codec.seal(bits[1], n, [bits[0]]))]


def _unsealed(tensors: Mapping[str, Tensor], key: str, n: int, context: Sequence[Tensor], planes: int) -> Tensor:
    first = codec.unseal(tensors[f"coded/{key}"], n, context)
    return first if planes == 1 else torch.stack([first, codec.unseal(tensors[f"coded/{key}/minus"], n, [first])])


def is_padded(bits: Tensor, n: int) -> bool:
    """Whether packed bits (..., bytes) are zero after those of n weights."""
    tail = bits[..., n // 8 :].clone()
    if n % 8:
        tail[..., 0] >>= n % 8
    return not bool(tail.any())


def is_one_sign(bits: Tensor) -> bool:
    """Whether no weight of a mask has both signs: true of masks without signs."""
    return bits.dim() == 1 or not bool((bits[0] & bits[1]).any())


def raw(tensor: Tensor) -> Tensor:
    """The bytes of a tensor, a row an element, so that comparison is of bits and NaN equals itself."""
    return tensor.contiguous().view(torch.uint8).view(-1, tensor.element_size())
