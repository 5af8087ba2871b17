"""What is in a saved bank, read without its model: each mask's density, overlap and bits a weight, and what all take in each form."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import subnet_kernels as sk
from subnet_kernels import codec
from subnet_kernels.manifest import open_bank
from subnet_kernels.masks import Masks, opened
from subnet_kernels.storage import context_of, mask_of, sealed
from subnet_pipelines.capacity import joint_huffman
from subnet_pipelines.errors import Refusal
from subnet_pipelines.methods.masked import by_plane
from subnet_pipelines.report import draw_reuse
from subnet_pipelines.reuse import reuse_report
from subnet_pipelines.tables import as_text

MOST = 40  # masks that have a line each; of more the first and the last
SPARSEST = 1 << 17  # weights that a byte of a coded mask can stand for, at most


class SavedMasks:
    """The masks of a saved bank, in the order of their commits. Raises ValueError in one sentence where the files are not a bank's."""

    def __init__(self, path: Path):
        self.stored = open_bank(path)
        manifest = self.stored.manifest
        self.rows = [row for row in manifest["entries"] if row["kind"] == "mask"]
        self.names = self.masks = [row["name"] for row in self.rows]
        self.combinations = len(manifest["entries"]) - len(self.rows)
        tensors = self.stored.tensors(self.rows[0]) if self.rows else {}
        self.planes, self.layers = 1, {}
        for name, about in manifest["layers"].items():
            shape, held = about["shape"], tensors.get(f"coded/{name}", tensors.get(f"bits/{name}"))
            if any(type(size) is not int or size < 0 for size in shape) or math.prod(shape) >= 2**63:
                raise ValueError(f"load: {self.stored.path} must have sizes as the shape of layer {name!r}, got {shape!r:.80}")
            if self.rows and (held is None or math.prod(shape) > SPARSEST * held.numel()):  # before anything of that size is made
                raise ValueError(f"load: {self.stored.place(self.rows[0])} must hold a mask of the weights of layer {name!r}")
            self.layers[name] = (math.prod(shape), about["trains"])
            if f"coded/{name}/minus" in tensors or (held is not None and held.dim() == 2):
                self.planes = 2
        self.sizes = {name: n for name, (n, _) in self.layers.items()}
        flat = {name: torch.zeros(()).expand(n) for name, n in self.sizes.items()}
        self.held = Masks(flat, self.planes)
        self.bytes: list[int] = []  # of each mask as it is stored
        self.sizes_of: list[dict[str, float | None]] = []  # bits of each mask in other forms
        for row in self.rows:
            tensors = self.stored.tensors(row)
            last = [self.held.bits(i) for i in range(len(self.held) - 2, len(self.held)) if i >= 0]
            bits = mask_of(self.stored.place(row), tensors, self.layers, self.planes, self.held.owned, last)
            self.bytes.append(sum(value.nbytes for key, value in tensors.items() if key.startswith(("bits/", "coded/"))))
            self.sizes_of.append(self.measure(bits, last))
            self.held.append(bits)

    def measure(self, bits: dict[str, Tensor], last: list[dict[str, Tensor]]) -> dict[str, float | None]:
        """Bits of the next mask: its entropy layer by layer, alone and given what a decoder knows, and coded (None without the codec)."""
        found: dict[str, float | None] = {"entropy": 0.0, "given": 0.0, "coded": 0.0}
        for name, (n, learns) in self.layers.items():
            context = context_of(self.held.owned[name], [mask[name] for mask in last]) if learns else []
            planes = [bits[name]] if self.planes == 1 else list(bits[name])
            for i, plane in enumerate(planes):
                found["entropy"] += codec.entropy(plane, n)
                found["given"] += codec.entropy(plane, n, planes[:1] if i else context)
            if found["coded"] is not None:
                try:
                    found["coded"] += sum(8 * data.numel() for _, data in sealed(bits[name], n, context))
                except RuntimeError:
                    found["coded"] = None
        return found

    def bits(self, name: str) -> dict[str, Tensor]:
        """As `MaskBank.bits`."""
        return self.held.bits(self.names.index(name))

    def opened(self, name: str) -> dict[str, Tensor]:
        """As `MaskBank.opened`."""
        return {layer: opened(bits) for layer, bits in self.bits(name).items()}

    def overlap(self) -> dict[str, Tensor]:
        """As `MaskBank.overlap`."""
        each = (len(self.held), self.planes)
        return {name: sk.overlap(blocks).view(*each, *each).sum((1, 3)) for name, blocks in self.held.blocks.items()}


def show(path: Path, plot: Path | None = None) -> Iterator[str]:
    """Lines about a saved bank; plot: a folder into which pictures of what its masks share are drawn. Raises Refusal."""
    try:
        saved = SavedMasks(path.resolve())
    except ValueError as error:
        raise Refusal(f"{path}: {error}") from None
    manifest, masks, weights = saved.stored.manifest, len(saved.rows), sum(saved.sizes.values())
    learn = "learn" if any(learns for _, learns in saved.layers.values()) else "are fixed"
    yield (
        f"{path}: {masks} masks{' with signs' if saved.planes == 2 else ''}, {saved.combinations} combinations, over {weights:,} weights "
        f"in {len(saved.layers)} layers that {learn}; format {manifest['version']}, torch {manifest.get('torch')}"
    )
    if not masks or not weights:
        return
    reused = reuse_report(saved, saved.sizes)
    yield ""
    yield from as_text(*lines_of(saved, reused, weights))
    yield ""
    if reused["pairs"]:
        pairs = reused["pairs"]["all"]
        yield (
            f"open in two masks, mean over pairs: {pairs['measured']:.2f} % of the weights; independent ones {pairs['expected']:.2f} %"
        )
    used = sum(int(sk.count(bits)) for bits in saved.held.owned.values())
    yield f"open in any mask: {100 * used / weights:.2f} % of the weights"
    yield ""
    yield from as_text(*totals_of(saved, weights))
    if plot is not None:
        try:
            plot.mkdir(parents=True, exist_ok=True)
            drawn = draw_reuse(reused, plot)
        except OSError as error:
            raise Refusal(f"{plot}: cannot be written ({error.strerror})") from None
        yield ""
        yield f"{plot}: {', '.join(p.name for p in drawn)}"


def lines_of(saved: SavedMasks, reused: dict[str, Any], weights: int) -> tuple[list[str], list[list[str]]]:
    """Headings, and a row a mask."""
    share = lambda value: "–" if value is None else f"{100 * value:.1f}"  # noqa: E731
    rows = []
    for i, name in enumerate(saved.names):
        if MOST // 2 <= i < len(saved.names) - MOST // 2 and len(saved.names) > MOST:
            continue
        if i and i == len(saved.names) - MOST // 2 and len(saved.names) > MOST:
            rows.append([f"({len(saved.names) - MOST} more)", *["…"] * 8])
        opened = sum(int(sk.count(bits)) for bits in saved.opened(name).values())
        found, shares = saved.sizes_of[i], {key: values[i] for key, values in reused["tasks"].items()}
        per = ["–" if bits is None else f"{bits / weights:.4f}" for bits in (found["coded"], found["given"], found["entropy"])]
        label = name if name.isprintable() and len(name) <= 40 else f"{name[:40]!r}"
        stored = f"{8 * saved.bytes[i] / weights:.4f}"
        rows.append([label, share(opened / weights), *map(share, shares.values()), stored, *per])
    heads = ["mask", "open (%)", "of it in all (%)", "some", "none before", "bits a weight", "coded", "entropy, given", "alone"]
    return heads, rows


def totals_of(saved: SavedMasks, weights: int) -> tuple[list[str], list[list[str]]]:
    """What the masks take in each form, over all of them."""
    planes, count = (by_plane(saved.bits(name)) for name in saved.names), len(saved.names)
    first, planes = itertools.tee(planes)
    names = list(next(first))
    layers = list(itertools.chain.from_iterable([name] * saved.planes for name in saved.layers))
    huffman = joint_huffman(planes, {name: saved.sizes[layer] for name, layer in zip(names, layers)})
    sums = {key: [found[key] for found in saved.sizes_of] for key in ("coded", "given", "entropy")}
    floats = 32 * weights * count
    forms = {
        "float32": floats,
        "as stored": 8 * sum(saved.bytes),
        "a bit a weight": saved.planes * weights * count,
        "joint Huffman of 7 tasks": huffman["code_bits"] + huffman["table_bits"],
        "coded": None if None in sums["coded"] else sum(sums["coded"]),
        "entropy, given what the decoder knows": sum(sums["given"]),
        "entropy of each layer alone": sum(sums["entropy"]),
    }
    rows = [
        [name, f"{bits / 8:,.0f}", f"{bits / weights / count:.4f}", f"{floats / bits:,.1f}" if bits else "–"]
        for name, bits in forms.items()
        if bits is not None
    ]
    return ["all masks as", "bytes", "bits a weight and mask", "times smaller than floats"], rows
