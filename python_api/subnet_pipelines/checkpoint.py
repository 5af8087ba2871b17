"""Checkpoints: a tree of numbers and tensors in a folder that is swapped in by rename; two are kept, a torn one is passed over."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from subnet_kernels.files import sync
from subnet_pipelines.errors import Refusal

KEEP = 2


def pack(tree: Any, tensors: dict[str, Tensor], at: str = "") -> Any:
    """The tree as JSON, its tensors moved into `tensors` by their path. Raises TypeError for anything that JSON would not give back."""
    if isinstance(tree, Tensor):
        tensors[at] = tree.detach().to("cpu", copy=True).contiguous()
        return {"$": "tensor", "at": at}
    if isinstance(tree, dict):
        return {"$": "dict", "items": [[pack(k, tensors, at), pack(v, tensors, f"{at}/{k}")] for k, v in tree.items()]}
    if isinstance(tree, (list, tuple)):
        return {"$": type(tree).__name__, "items": [pack(v, tensors, f"{at}/{i}") for i, v in enumerate(tree)]}
    if tree is None or isinstance(tree, (bool, int, float, str)):
        return tree
    raise TypeError(
        f"checkpoint: {at or 'the state'} is a {type(tree).__name__}; only tensors, numbers, strings and containers can be saved"
    )


def unpack(tree: Any, tensors: dict[str, Tensor]) -> Any:
    """The inverse of pack."""
    if not isinstance(tree, dict):
        return tree
    kind = tree["$"]
    if kind == "tensor":
        return tensors[tree["at"]]
    if kind == "dict":
        return {unpack(k, tensors): unpack(v, tensors) for k, v in tree["items"]}
    return {"list": list, "tuple": tuple}[kind](unpack(v, tensors) for v in tree["items"])


def save(folder: Path, tree: Any) -> None:
    """Write the tree as the newest checkpoint of the folder and drop all but the last two."""
    folder.mkdir(parents=True, exist_ok=True)
    numbers = [int(p.name) for p in folder.iterdir() if p.name.isdigit()]
    target = folder / f"{max(numbers, default=0) + 1:08d}"
    temporary = folder / f".{target.name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    tensors: dict[str, Tensor] = {}
    facts = json.dumps(pack(tree, tensors))
    data = safetensors.torch.save(tensors)
    sums = json.dumps({"facts": _sum(facts.encode()), "tensors": _sum(data)})
    for name, content in (("tensors.safetensors", data), ("facts.json", facts.encode()), ("sums.json", sums.encode())):
        (temporary / name).write_bytes(content)
        sync(temporary / name)
    sync(temporary)
    os.replace(temporary, target)
    sync(folder)
    for old in sorted(numbers, reverse=True)[KEEP - 1 :]:
        shutil.rmtree(folder / f"{old:08d}", ignore_errors=True)


def load(folder: Path, say: Callable[[str], None]) -> Any | None:
    """The newest whole checkpoint of the folder, tensors on the CPU, or None where there is none.

    Passes over torn ones, saying so. Raises Refusal where there are some but none is whole.
    """
    found = sorted((p for p in folder.glob("[0-9]*") if p.name.isdigit()), reverse=True) if folder.is_dir() else []
    for path in found:
        try:
            facts, data = (path / "facts.json").read_bytes(), (path / "tensors.safetensors").read_bytes()
            if json.loads((path / "sums.json").read_bytes()) != {"facts": _sum(facts), "tensors": _sum(data)}:
                raise ValueError("its checksum is wrong")
            return unpack(json.loads(facts), safetensors.torch.load(data))
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            say(f"checkpoint {path} is torn ({error}); going back to the one before")
    if found:
        raise Refusal(f"{folder}: no checkpoint is whole; start again with another --out")
    return None


def _sum(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()
