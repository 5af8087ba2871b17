"""A bank on disk: a folder with one safetensors file an entry and a manifest that names them, written so that nothing is ever lost.

An entry's file is written once, under a name that has its content's hash in it; the manifest is replaced last, by rename. So a folder
is valid at every moment, and appending touches nothing that is there. Of many entries the manifest lists the last ones alone, and for
every 256 before them a segment, a file that lists those: one more entry costs the same however many there are. No pickle.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn

from subnet_kernels import ops
from subnet_kernels.files import write_atomic
from subnet_kernels.heads import from_state, kind_of
from subnet_kernels.layers import SubnetLayer, refresh
from subnet_kernels.masks import Masks, opened

FORMAT = "subnet-kernels bank"
VERSION = 2  # version 1 had no segments
SEGMENT = 256  # entries


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


class Written(NamedTuple):
    """What `save` wrote last: a manifest in a folder, of so many entries, the first ones in these segments."""

    manifest: tuple[Path, int, int, int]  # the file, with its number, time and size: another one is somebody else's
    entries: int
    segments: list[str]


class BankFiles:
    """The part of a bank that writes and reads its folder."""

    def save(self, folder: Path | str) -> None:
        """Write the bank to a folder: one file an entry that is not there yet, then the manifest. Nothing else is touched.

        What an entry holds is what its commit was given. Raises OSError if the folder cannot be written; what it held before stays valid.
        """
        folder = Path(folder).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "manifest.json"
        known = self._written is not None and self._written.manifest == _identity(path)
        written, segments = (self._written.entries, self._written.segments) if known else (0, [])
        for number, (name, entry) in itertools.islice(enumerate(self._entries.items()), written, None):
            if entry.saved is None or entry.saved.parent != folder or not entry.saved.exists():
                data = to_safetensors(self._tensors_of(entry))
                slug = re.sub(r"[^A-Za-z0-9_-]", "_", name)[:60]
                # the content is in the name: a file that an earlier manifest speaks of is never written over with another
                file = folder / f"{number:05d}-{slug}-{_digest(data)}.safetensors"
                write_atomic(file, data)
                entry.saved = file
        rows = [_row(*item) for item in itertools.islice(self._entries.items(), SEGMENT * len(segments), None)]
        while len(rows) >= SEGMENT:
            data = json.dumps(rows[:SEGMENT]) + "\n"
            segment = folder / f"segment-{len(segments):05d}-{_digest(data.encode())}.json"
            if not segment.exists():
                write_atomic(segment, data)
            segments, rows = [*segments, segment.name], rows[SEGMENT:]
        manifest = {
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
        write_atomic(path, json.dumps(manifest, indent=1) + "\n")
        self._written = Written(_identity(path), len(self._entries), segments)

    def _tensors_of(self, entry: Entry) -> dict[str, Tensor]:
        """What an entry's file holds; of a mask over weights that learn, the values of those that no earlier mask owns."""
        tensors = {f"state/{key}": value for key, value in entry.state.items()}
        tensors |= {f"scores/{key}": value for key, value in entry.scores.items()}
        tensors |= {f"tensors/{key}": value for key, value in entry.tensors.items()}
        tensors |= {f"per_task/{m}/{k}": v for m, module in entry.modules.items() for k, v in module.state_dict().items()}
        if entry.alphas is not None:
            tensors["alphas"] = entry.alphas
        else:
            owned = self._owned_before(entry.index) if self.trains_weights else {}
            for key, bits in self._masks.bits(entry.index).items():
                tensors[f"bits/{key}"] = bits
                if self._layers[key].train_weight:
                    weight = self._layers[key].weight.detach()
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
    def load(cls, folder: Path | str, model: nn.Module, *, restore: bool = False) -> BankFiles:
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
        self.activate(None)
        self._fit(folder / "manifest.json", manifest)
        found, writes = {}, []
        masks = Masks({key: layer.weight for key, layer in self._layers.items()}, self._planes)
        for row in rows:
            path = folder / row["file"]
            tensors = _read_tensors(path)
            found[row["name"]] = entry = self._entry(path, row, tensors)
            if row["kind"] == "combination":
                entry.alphas = self._alphas(path, tensors, len(entry.over))
                continue
            bits, entry.index = self._mask(path, tensors), len(masks)
            writes += self._values(path, tensors, bits, masks.owned, restore)
            masks.append(bits)
        backbone = manifest["backbone_sha256"] if len(masks) else None
        if backbone is not None and (now := self._hash()) != backbone:
            raise ValueError(f"load: the model's weights must have hash {backbone[:12]} as in {folder}, got {str(now)[:12]}")
        for layer, new, values in writes:  # all is checked: from here on the model may change
            ops.restore_([layer.weight], [new], [values])
        self._masks, self._backbone = masks, backbone
        for name, entry in found.items():
            self._keep(name, entry)
        if len(masks):
            self._prefix = (len(masks), {key: bits.clone() for key, bits in masks.owned.items()})
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

    def _entry(self, path: Path, row: Mapping, tensors: Mapping[str, Tensor]) -> Entry:
        """The entry of a manifest's row and its file, without mask or alphas."""

        def group(prefix: str) -> dict[str, Tensor]:
            return {key[len(prefix) :]: value for key, value in tensors.items() if key.startswith(prefix)}

        device = self.layers()[0].weight.device
        state, scores, modules = group("state/"), group("scores/"), {}
        for what, stored, mine in (
            ("task state", state, self._state()),
            ("scores", scores, {key: layer.scores for key, layer in self._layers.items()} if scores else {}),
        ):
            for key in sorted({*stored, *mine}):
                if key not in mine or key not in stored or kind_of(mine[key]) != kind_of(stored[key]):
                    expected, got = (kind_of(t[key]) if key in t else "nothing" for t in (mine, stored))
                    raise ValueError(f"load: {path} must hold {expected} as {what} {key!r}, got {got}")
        for key in self._per_task:
            modules[key] = from_state(self.model.get_submodule(key), group(f"per_task/{key}/"), path, key)
        state, scores = ({key: value.to(device) for key, value in some.items()} for some in (state, scores))
        return Entry(None, state, modules, None, tuple(row["over"]), scores, group("tensors/"), dict(row["facts"]), path)

    def _alphas(self, path: Path, tensors: Mapping[str, Tensor], tasks: int) -> Tensor:
        alphas = tensors.get("alphas")
        if alphas is None or not alphas.is_floating_point() or alphas.shape not in ((tasks,), (len(self._layers), tasks)):
            got = "nothing" if alphas is None else kind_of(alphas)
            raise ValueError(f"load: {path} must hold alphas of {tasks} masks, for all layers or for each, got {got}")
        return alphas.to(self.layers()[0].weight.device)

    def _mask(self, path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        masks = {}
        for key, layer in self._layers.items():
            bits, n, shape = tensors.get(f"bits/{key}"), layer.weight.numel(), self._shape_of_bits(layer)
            if bits is None or bits.dtype != torch.uint8 or bits.shape != shape:
                count = " x ".join(map(str, shape))
                raise ValueError(f"load: {path} must hold {count} bytes of bits for layer {key!r}")
            if not is_padded(bits, n):
                raise ValueError(f"load: {path} must have zero padding after the {n} bits of layer {key!r}")
            if not is_one_sign(bits):
                raise ValueError(f"load: {path} must open a weight with one sign, its mask of layer {key!r} has both")
            masks[key] = bits.to(layer.weight.device)
        return masks

    def _shape_of_bits(self, layer: SubnetLayer) -> tuple[int, ...]:
        """Of a mask of that layer: (bytes,), or (2, bytes) where masks are signed."""
        return tuple(layer.bits.shape) if self._planes == 1 else (self._planes, *layer.bits.shape)

    def _values(
        self, path: Path, tensors: Mapping[str, Tensor], bits: Mapping[str, Tensor], owned: Mapping[str, Tensor], restore: bool
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


def _row(name: str, entry: Entry) -> dict:
    """What the manifest or a segment says of an entry."""
    kind = "mask" if entry.index is not None else "combination"
    return {"name": name, "file": entry.saved.name, "kind": kind, "over": list(entry.over), "facts": entry.facts}


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:12]


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


def _need(path: Path, row: object, **kinds: type | tuple[type, ...]) -> None:
    for key, kind in kinds.items():
        if not isinstance(row, dict) or key not in row or not isinstance(row[key], kind):
            raise ValueError(f"load: {path} must have a proper {key!r} in its manifest, got {row!r:.80}")


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}
    except (OSError, SafetensorError) as error:
        raise ValueError(f"load: {path} must be a readable safetensors file: {' '.join(str(error).split())}") from None


def _read_manifest(folder: Path) -> dict:
    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"load: {path} must be a readable bank manifest: {error}") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ValueError(f"load: {path} must be the manifest of a {FORMAT}")
    if manifest.get("version") not in (1, VERSION):
        raise ValueError(f"load: {path} must be of format version {VERSION} or 1, got {manifest.get('version')!r:.80}")
    if manifest["version"] == 1:
        manifest["segments"] = []
    _need(path, manifest, layers=dict, state=list, per_task=list, backbone_sha256=(str, type(None)), segments=list, entries=list)
    for layer in manifest["layers"].values():
        _need(path, layer, shape=list, trains=bool)
    manifest["entries"] = [row for name in manifest["segments"] for row in _read_segment(path, name)] + manifest["entries"]
    masks: set[str] = set()
    names: set[str] = set()
    for row in manifest["entries"]:
        _need(path, row, name=str, file=str, kind=str, over=list, facts=dict)
        if not re.fullmatch(r"[A-Za-z0-9_-]+\.safetensors", row["file"]):
            raise ValueError(f"load: {path} must name its entries' files plainly and without folders, got {row['file']!r:.80}")
        if row["name"] in names or row["kind"] not in ("mask", "combination"):
            raise ValueError(
                f"load: {path} must hold masks and combinations of different names, got {row['kind']!r} {row['name']!r:.80}"
            )
        combines = row["kind"] == "combination"
        if combines != bool(row["over"]) or any(not isinstance(name, str) or name not in masks for name in row["over"]):
            raise ValueError(f"load: {path} must combine masks that come earlier in it, {row['name']!r:.80} does not")
        names.add(row["name"])
        if row["kind"] == "mask":
            masks.add(row["name"])
    if any(not isinstance(name, str) for key in ("state", "per_task") for name in manifest[key]):
        raise ValueError(f"load: {path} must list the names of its state and per_task as strings")
    return manifest


def _read_segment(manifest: Path, name: object) -> list:
    """The rows that a manifest has in a file of their own."""
    if not isinstance(name, str) or not (match := re.fullmatch(r"segment-[0-9]{5,}-([0-9a-f]{12})\.json", name)):
        raise ValueError(f"load: {manifest} must name its segments plainly and without folders, got {name!r:.80}")
    path = manifest.parent / name
    try:
        data = path.read_bytes()
        rows = json.loads(data)
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"load: {path} must be a readable segment of a bank's manifest: {error}") from None
    if not isinstance(rows, list) or _digest(data) != match[1]:
        raise ValueError(f"load: {path} must hold the rows that its name has the hash of, its content is another")
    return rows
