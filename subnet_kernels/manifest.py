"""Where a saved bank lies, a folder or one file: its manifest, checked, and the tensors of an entry (the layout in docs/bank-format.md)."""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

FORMAT = "subnet-kernels bank"
VERSION = 3  # version 1 had no segments, 2 no coded masks


class BankFolder:
    """A folder with a manifest, and a safetensors file an entry, which is opened when it is asked for.

    Raises ValueError in one sentence where the manifest, or a segment of it, is missing or improper or a file that it names is missing.
    """

    def __init__(self, path: Path):
        self.path = path / "manifest.json"
        try:
            manifest = json.loads(self.path.read_text())
            there = set(os.listdir(path))
        except (OSError, ValueError, RecursionError) as error:
            raise ValueError(f"load: {self.path} must be a readable bank manifest: {error}") from None
        self.manifest = _checked(self.path, manifest, r"[A-Za-z0-9_-]+\.safetensors")
        for row in self.manifest["entries"]:
            if row["file"] not in there:
                raise ValueError(f"load: {path / row['file']} must be a readable safetensors file: there is none")

    def place(self, row: dict) -> Path:
        """Where an entry is, for messages."""
        return self.path.parent / row["file"]

    def tensors(self, row: dict) -> dict[str, Tensor]:
        """All tensors of an entry, mapped from its file. Raises ValueError where it cannot be read."""
        path = self.place(row)
        try:
            with safe_open(path, "pt") as file:
                return {key: file.get_tensor(key) for key in file.keys()}
        except (OSError, SafetensorError) as error:
            raise ValueError(f"load: {path} must be a readable safetensors file: {' '.join(str(error).split())}") from None


class PackedBank:
    """One safetensors file with all entries, which stays open; what a tensor's name begins with says whose it is.

    Raises as `BankFolder`.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            self._file = safe_open(path, "pt")
            manifest = json.loads((self._file.metadata() or {}).get("manifest", "null"))
        except (OSError, SafetensorError, ValueError, RecursionError) as error:
            raise ValueError(f"load: {path} must be a readable packed bank: {' '.join(str(error).split())}") from None
        self.manifest = _checked(path, manifest, r"[0-9]{5,}")
        self._keys: dict[str, list[str]] = {row["file"]: [] for row in self.manifest["entries"]}
        for key in self._file.keys():
            whose, _, name = key.partition("/")
            if whose not in self._keys:
                raise ValueError(f"load: {path} must hold its entries' tensors alone, got {key!r:.80}")
            self._keys[whose].append(name)

    def place(self, row: dict) -> str:
        """As `BankFolder`."""
        return f"{self.path}, entry {row['file']},"

    def tensors(self, row: dict) -> dict[str, Tensor]:
        """As `BankFolder`."""
        return {name: self._file.get_tensor(f"{row['file']}/{name}") for name in self._keys[row["file"]]}


def open_bank(path: Path) -> BankFolder | PackedBank:
    """The bank that was saved there."""
    return PackedBank(path) if path.is_file() else BankFolder(path)


def digest(data: bytes) -> str:
    """What the name of a file says of its content."""
    return hashlib.sha256(data).hexdigest()[:12]


def _need(path: Path, row: object, **kinds: type | tuple[type, ...]) -> None:
    for key, kind in kinds.items():
        if not isinstance(row, dict) or key not in row or not isinstance(row[key], kind):
            raise ValueError(f"load: {path} must have a proper {key!r} in its manifest, got {row!r:.80}")


def _checked(path: Path, manifest: object, names: str) -> dict:
    """A manifest with the rows of its segments, all of it as it must be; names: the pattern of what a row calls its file."""
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ValueError(f"load: {path} must be the manifest of a {FORMAT}")
    if manifest.get("version") not in range(1, VERSION + 1):
        raise ValueError(f"load: {path} must be of a format version up to {VERSION}, got {manifest.get('version')!r:.80}")
    if manifest["version"] == 1:
        manifest["segments"] = []
    _need(path, manifest, layers=dict, state=list, per_task=list, backbone_sha256=(str, type(None)), segments=list, entries=list)
    for layer in manifest["layers"].values():
        _need(path, layer, shape=list, trains=bool)
    manifest["entries"] = [row for name in manifest["segments"] for row in _read_segment(path, name)] + manifest["entries"]
    masks: set[str] = set()
    found: set[str] = set()
    pattern = re.compile(names)
    for row in manifest["entries"]:
        _need(path, row, name=str, file=str, kind=str, over=list, facts=dict)
        if not pattern.fullmatch(row["file"]):
            raise ValueError(f"load: {path} must name its entries' files plainly and without folders, got {row['file']!r:.80}")
        if row["name"] in found or row["kind"] not in ("mask", "combination"):
            raise ValueError(
                f"load: {path} must hold masks and combinations of different names, got {row['kind']!r} {row['name']!r:.80}"
            )
        combines = row["kind"] == "combination"
        if combines != bool(row["over"]) or any(not isinstance(name, str) or name not in masks for name in row["over"]):
            raise ValueError(f"load: {path} must combine masks that come earlier in it, {row['name']!r:.80} does not")
        found.add(row["name"])
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
    if not isinstance(rows, list) or digest(data) != match[1]:
        raise ValueError(f"load: {path} must hold the rows that its name has the hash of, its content is another")
    return rows
