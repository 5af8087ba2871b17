"""Run as a program: training, inference and the bank on a device that has no memory, so that tensors of two devices cannot meet unseen.

    python tests/fake_device.py METHOD

Tensors are PyTorch's fake ones, on a GPU where this torch knows one and else on a device of no kind; what mixes devices, goes from one to
the other within a step or needs a value on the host raises. Prints how many ops the steps made.
"""

import os
import sys
from types import SimpleNamespace

import torch
from recording import NoWaiting
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from subnet_kernels import bank, reference
from subnet_kernels.bank import MaskBank
from subnet_pipelines import METHODS
from subnet_pipelines.benchmarks import SCENARIOS
from subnet_pipelines.benchmarks.base import Split, Visit, batches
from subnet_pipelines.methods.base import Clock
from subnet_pipelines.methods.den import DEN
from subnet_pipelines.methods.lasem import LASEM
from subnet_pipelines.methods.lifelong import Lifelong

FIELDS = {
    "wsn": {"stored_mask": "last_step"},
    "supsup": {"model": "mlp"},
    "hopsupsup": {"width": 64},
    "impresslearn": {"model": "mlp", "basis": 2, "penalty": 0.1, "controls": False},
    "stl": {},
    "mtl": {},
    "finetune": {},
    "ewc": {"clip_norm": 1.0},
    "packnet": {},
    "lasem": {"model": "mlp"},
    "prognn": {"model": "mlp"},
    "apd": {"model": "mlp"},
    "den": {"model": "mlp"},
    "batche": {"model": "mlp"},
    "psp": {"model": "mlp", "momentum": 0.5},
    "separate-heads": {"model": "mlp"},
    "nns": {"model": "mlp"},
}
SERVED = {"supsup": "GNu", "nns": "NNs"}  # what others than GG train and test in


def device() -> str:
    if torch.cuda.is_available():
        return "cuda"
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    _setup_privateuseone_for_python_backend("elsewhere")
    return "elsewhere"


class Stream:
    """As much of a benchmark as a method asks for."""

    name, classes, input_shape = "stream", 10, (784,)

    def __init__(self, scenario: str, on: torch.device):
        self.device, self.scenario = on, SCENARIOS[scenario]
        self.config = SimpleNamespace(scenario=scenario, val_fraction=0.1)

    def __len__(self) -> int:
        return 5

    def visits(self) -> list[Visit]:
        return list(map(Visit, range(5)))


def move(module, fn, recurse=True):
    """``nn.Module._apply`` with new Parameters: the old ones' tensors cannot be swapped where they are fake."""
    for child in module.children():
        child._apply(fn)
    for key, p in module._parameters.items():
        if p is not None:
            module._parameters[key] = torch.nn.Parameter(fn(p.detach()), p.requires_grad)
    for key, buffer in module._buffers.items():
        module._buffers[key] = None if buffer is None else fn(buffer)
    return module


def freeze(masks: MaskBank) -> None:
    """What `_freeze` would do, for a number of frozen weights that is not known without values."""
    for layer in masks.layers():
        if layer.train_weight:
            layer.frozen = torch.empty_like(layer.bits)
            layer.frozen_values = torch.empty(7, device=layer.weight.device)


def main(name: str) -> int:
    on = torch.device(device(), 0)
    ops = 0
    torch.nn.Module._apply = move
    FakeTensorMode.__deepcopy__ = lambda mode, memo: mode  # one mode for a tensor and its copies
    MaskBank._hash, MaskBank._freeze, bank.is_padded = (lambda _: "0"), freeze, (lambda *_: True)  # which need values
    LASEM.best, LASEM.path, Lifelong.measure = (lambda _: (True, False)), (lambda _: []), (lambda _: [None, None])  # so do these
    DEN.training_loss, DEN.dead, DEN.drifted = (lambda _: 1.0), (lambda _: [[101], [100, 102]]), (lambda _: [[0, 3], [1, 2]])
    with FakeTensorMode(shape_env=ShapeEnv()):
        method = METHODS[name](METHODS[name].Config(**FIELDS[name]), Stream(SERVED.get(name, "GG"), on), 1)
        x, y = torch.empty(50, 784, device=on), torch.zeros(50, dtype=torch.int64, device=on)
        for index in range(3):
            rows = Split(x, y, None, lambda rows: rows)
            task = SimpleNamespace(index=index, train=rows, val=rows)
            t = torch.full((1,), index, device=on).expand(50)
            for phase in method.plan(task):
                clock = Clock(task=index, visit=index, phase=phase.name)
                if phase.first is not None:
                    phase.first()
                opt = phase.optimizer()
                method.train()
                order = torch.randperm(50).to(on)
                for number, batch in enumerate(batches(x, y, t, order, 20)):
                    if number == 2:
                        for group in opt.param_groups:
                            group["lr"] /= 2
                    with NoWaiting() as watch:
                        made = method.step(batch, opt, clock)
                    ops += watch.seen
                    assert made["loss"].device == on
                method.eval()
                with torch.no_grad():
                    assert all(method.validate(b, clock).device == on for b in batches(x, y, t, None, 25))
                    kept = method.snapshot()
                    method.restore(kept)
                if phase.then is not None:
                    phase.then()
            if name != "nns":  # which infers the task, and so needs values
                with torch.no_grad():
                    assert method.predict(x, index).logits.device == on
            else:
                method.keep()
                assert method.candidate_gradient(x).device == on
            if name in SERVED:
                assert method.infer(x).device == on
                assert method.one_shot(x).device == on
            if name == "batche":
                assert method.infer(x).device == on
        tensors = [*method.parameters(), *method.buffers()]
        for layer in method.bank.layers() if hasattr(method, "bank") else ():
            tensors += [layer.bits, layer.w_eff, layer.hints]
            assert layer.bits.numel() == reference.nbytes(layer.weight.numel())
        assert all(tensor.device == on for tensor in tensors)
        assert all(v.device == on for state in opt.state.values() for v in state.values())
    print(ops)
    return 0


if __name__ == "__main__":
    status = main(sys.argv[1])
    sys.stdout.flush()
    os._exit(status)  # past the interpreter's end, at which PyTorch's threads of such a device sometimes abort the process
