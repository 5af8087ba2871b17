"""A batch whose rows are of different tasks: who they are, what tells their tasks apart, and the module of heads that serves them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from subnet_kernels.layers import SubnetLayer
from subnet_kernels.storage import BankFiles, Entry


def distinct(bank: BankFiles, task_ids: Tensor | Sequence[str]) -> tuple[list[str], Tensor]:
    """The distinct entries of a batch, and which of them each row is."""
    if isinstance(task_ids, Tensor):
        if task_ids.dtype != torch.int64 or task_ids.dim() != 1 or not len(task_ids):
            raise ValueError(
                f"rows: task_ids must be int64 (B,) or names, with B >= 1, got {task_ids.dtype} of {tuple(task_ids.shape)}"
            )
        masks = bank.masks
        places, ids = task_ids.unique(return_inverse=True)
        places = places.tolist()
        if places[0] < 0 or places[-1] >= len(masks):
            wrong = places[0] if places[0] < 0 else places[-1]
            raise ValueError(f"rows: task_ids must be between 0 and {len(masks) - 1}, the masks of the bank, got {wrong}")
        return [masks[i] for i in places], ids
    given = list(task_ids)
    if not given:
        raise ValueError("rows: task_ids must be int64 (B,) or names, with B >= 1, got none")
    names = list(dict.fromkeys(given))
    for name in names:
        bank[name]
    return names, torch.tensor([names.index(name) for name in given])


def differing_biases(entries: Sequence[Entry], layers: Mapping[str, SubnetLayer]) -> dict[str, Tensor] | None:
    """The biases of masked layers that differ between some tasks, {layer name: (tasks, O)}; None where anything else differs."""
    if any(entry.index is None for entry in entries):
        return None
    biases = {}
    for key, first in entries[0].state.items():
        if all(torch.equal(first, entry.state[key]) for entry in entries[1:]):
            continue
        layer, _, kind = key.rpartition(".")
        if layer not in layers or kind != "bias":
            return None
        like = layers[layer].weight
        biases[layer] = torch.stack([entry.state[key] for entry in entries]).to(like.device, like.dtype)
    return biases


class HeadOfRows(nn.Module):
    """A ``per_task`` module of a batch whose rows are of different tasks."""

    def __init__(self, heads: Sequence[nn.Module], ids: Tensor):
        super().__init__()
        self.heads, self.ids = nn.ModuleList(heads), ids

    def forward(self, x: Tensor) -> Tensor:
        if len(x) != len(self.ids):
            raise ValueError(f"rows: a per_task module's input must have {len(self.ids)} rows first, got {tuple(x.shape)}")
        rows = [(self.ids == i).nonzero()[:, 0] for i in range(len(self.heads))]
        return join([(r, head(x[r])) for r, head in zip(rows, self.heads)], len(x))


def join(parts: Sequence[tuple[Tensor, object]], rows: int) -> object:
    """Rows of each part to their places; narrower ones end in -inf. Of tuples, lists and mappings, those of every member."""
    first = parts[0][1]
    if first is None and all(y is None for _, y in parts):
        return None
    if isinstance(first, Mapping):  # among them the outputs of transformers
        return type(first)(**{key: join([(r, y[key]) for r, y in parts], rows) for key in first})
    if isinstance(first, (tuple, list)):
        members = (join([(r, y[i]) for r, y in parts], rows) for i in range(len(first)))
        return type(first)(*members) if hasattr(first, "_fields") else type(first)(members)
    if any(not isinstance(y, Tensor) for _, y in parts):
        raise ValueError(
            f"rows: the model must give tensors where it runs once for each task, got {[type(y).__name__ for _, y in parts]}"
        )
    shapes = {y.shape[1:-1] for _, y in parts}
    if len(shapes) > 1 or any(len(y) != len(r) or y.dim() != parts[0][1].dim() for r, y in parts):
        raise ValueError(
            f"rows: the tasks' results must differ in their last dimension only, got {[tuple(y.shape) for _, y in parts]}"
        )
    widest = max(y.shape[-1] for _, y in parts) if parts[0][1].dim() > 1 else 0
    whole = [
        F.pad(y, (0, widest - y.shape[-1]), value=-torch.inf) if y.dim() > 1 and y.shape[-1] < widest else y for _, y in parts
    ]
    order = torch.cat([r for r, _ in parts])
    return torch.cat(whole)[order.argsort()]
