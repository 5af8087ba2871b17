"""A task by itself: its masks baked into a dense module, and a snapshot that cannot be changed; all tasks in one plain module."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from subnet_kernels.convert import unconvert
from subnet_kernels.heads import fixed_copy, like
from subnet_kernels.ops import compress, compressed_linear, pack
from subnet_kernels.ops.compressed import Compressed, beats_dense


def baked(
    model: nn.Module, weights: Mapping[str, Tensor], state: Mapping[str, Tensor], modules: Mapping[str, nn.Module]
) -> nn.Module:
    """A dense copy of a converted model with these effective weights, task state and ``per_task`` modules; it shares nothing with them."""
    kept, new = {}, {}
    for key, weight in weights.items():
        layer = model.get_submodule(key)
        new[key] = kept[id(layer.weight)] = nn.Parameter(weight, requires_grad=False)
        for name in "scores bits w_eff hints frozen frozen_values _active".split():  # which the copy is to lose: not copied
            if (tensor := getattr(layer, name)) is not None:
                kept[id(tensor)] = tensor
    dense = unconvert(copy.deepcopy(model, kept))
    for weight in new.values():
        weight.requires_grad_(False)
    tensors = dict([*dense.named_parameters(), *dense.named_buffers()])
    with torch.no_grad():
        for key, value in state.items():
            tensors[key].copy_(value)
    for key, module in modules.items():
        current = dense.get_submodule(key)
        dense.set_submodule(key, fixed_copy(module).to(like(current)).train(current.training))
    return dense


class OpenLinear(nn.Module):
    """The ``nn.Linear`` of one task that holds its open weights alone (`compressed_linear`). They learn nothing."""

    def __init__(self, weight: Tensor, bias: Tensor | None):
        """weight: (O, I), zero where closed; bias: (O,) or None."""
        super().__init__()
        small = compress(weight, pack(weight != 0))
        (self.out_features, self.in_features), self.format = small.shape, small.format
        self.register_buffer("values", small.values)
        self.register_buffer("positions", small.positions)
        self.register_buffer("offsets", small.offsets)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        if self._plainly(x):
            return torch.ops.subnet_kernels.compressed_linear.default(x, self.values, self.positions, self.offsets, self.bias)
        shape = (self.out_features, self.in_features)
        return compressed_linear(x, Compressed(self.values, self.positions, self.offsets, shape, self.format), self.bias)

    def _plainly(self, x: Tensor) -> bool:
        """Whether nothing has to be checked or recorded: a small product would take less time than that."""
        return (
            not torch.is_grad_enabled()
            and type(x) is Tensor
            and x.dtype == self.values.dtype
            and x.device.type == "cpu" == self.values.device.type
            and x.dim() > 0
            and x.shape[-1] == self.in_features
            and not torch.compiler.is_compiling()
            and not torch.is_autocast_enabled("cpu")
            and not torch._C._are_functorch_transforms_active()
        )

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, open={len(self.values)}"


def compress_linears(dense: nn.Module, names: Iterable[str]) -> nn.Module:
    """Put an `OpenLinear` in the place of those plain Linears of a module, named, that are faster so; returns the module."""
    for name in names:
        layer = dense.get_submodule(name)
        if type(layer) is nn.Linear and beats_dense(int(layer.weight.count_nonzero()), layer.weight):
            new = OpenLinear(layer.weight.detach(), layer.bias).train(layer.training)
            if not name:
                return new
            dense.set_submodule(name, new)
    return dense


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

    def _apply(self, *_, **__):
        raise RuntimeError("TaskView: a view cannot be moved or cast, it is a snapshot; do so with what bank.export gives")

    def requires_grad_(self, requires_grad: bool = True) -> TaskView:
        if requires_grad:
            raise RuntimeError("TaskView: a view's parameters learn nothing, it is a snapshot; train the model and commit again")
        return self

    def __setattr__(self, name, value):
        if self.__dict__.get("_fixed"):
            raise AttributeError(f"TaskView: attribute {name!r} cannot be set, a view is a snapshot")
        super().__setattr__(name, value)


class EveryTask(nn.Module):
    """All masks of a bank in one plain module in eval mode, of PyTorch's ops alone: `torch.export` and ONNX make one graph of it.

    forward(task, *args, **kwargs): task: int64 of one element, a place in `names`; the rest as the model has it. Masks stay packed and
    are unpacked as the module runs. A narrower head's logits end in -inf. For one thread at a time; many are for a `Predictor`.
    """

    def __init__(self, module: nn.Module, names: Sequence[str], bits: Mapping[str, Tensor], state: Mapping[str, Tensor]):
        """module: dense, with all weights as they are; bits: {layer name: uint8 (K, planes, bytes)}; state: {tensor's name: (K, ...)}."""
        super().__init__()
        self.module, self.names = module.requires_grad_(False), tuple(names)
        self._weights = [f"{key}.weight" if key else "weight" for key in bits]
        self._state = list(state)
        for i, packed in enumerate(bits.values()):
            self.register_buffer(f"bits_{i}", packed)
        for i, tensors in enumerate(state.values()):
            self.register_buffer(f"state_{i}", tensors)
        where = next(iter(bits.values())).device
        self.register_buffer(
            "powers", torch.tensor([1 << i for i in range(8)], dtype=torch.uint8, device=where)
        )  # a weight's bit
        self.eval()

    def forward(self, task: Tensor, *args, **kwargs):
        task, tensors = task.reshape(1), {}
        for i, name in enumerate(self._weights):
            weight = self.module.get_parameter(name)
            planes = getattr(self, f"bits_{i}").index_select(0, task)[0]
            opened = (planes.unsqueeze(-1) & self.powers != 0).flatten(1)[:, : weight.numel()].reshape(-1, *weight.shape)
            closed = torch.zeros_like(weight)
            if len(opened) == 2:  # signed
                closed = torch.where(opened[1], -weight, closed)
            tensors[name] = torch.where(opened[0], weight, closed)
        for i, name in enumerate(self._state):
            tensors[name] = getattr(self, f"state_{i}").index_select(0, task)[0]
        return torch.func.functional_call(self.module, tensors, args, kwargs)


def one_width(heads: Sequence[nn.Module], key: str) -> list[nn.Module]:
    """The tasks' own modules with parameters of one shape: narrower Linears get outputs that are -inf. Raises ValueError for others."""
    shapes = {tuple((name, tuple(t.shape)) for name, t in head.state_dict().items()) for head in heads}
    if len(shapes) == 1:
        return list(heads)
    if any(type(head) is not nn.Linear for head in heads) or len({head.in_features for head in heads}) > 1:
        raise ValueError(f"export_all: modules {key!r} must be of one shape, or Linears that differ in their outputs")
    wide, widest = [], max(head.out_features for head in heads)
    for head in heads:
        more = widest - head.out_features
        bias = head.weight.new_zeros(head.out_features) if head.bias is None else head.bias
        new = nn.Linear(head.in_features, widest, device="meta")
        new.weight = nn.Parameter(F.pad(head.weight, (0, 0, 0, more)), requires_grad=False)
        new.bias = nn.Parameter(F.pad(bias, (0, more), value=-torch.inf), requires_grad=False)
        wide.append(new)
    return wide
