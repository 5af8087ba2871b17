"""What methods over a mask bank share: one converted network, one bank, an entry for every task that has been learnt."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

import subnet_kernels as sk
from subnet_kernels.layers import refresh_seconds
from subnet_pipelines.benchmarks.base import Batch, Benchmark
from subnet_pipelines.capacity import joint_huffman, with_huffman, wsn_cap
from subnet_pipelines.errors import NotLearnt
from subnet_pipelines.methods.base import Clock, Method, MethodConfig, Prediction
from subnet_pipelines.reuse import reuse_report


def entry_name(task: int) -> str:
    """The bank's name of the benchmark's task of that number."""
    return f"task {task}"


SIGNS = (" +", " -")


def by_plane(bits: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The packed bits of a mask, {layer: uint8 (bytes,)}; a signed mask's two, (2, bytes), each by itself."""
    return {
        name + sign: plane
        for name, planes in bits.items()
        for sign, plane in (zip(SIGNS, planes) if planes.dim() == 2 else [("", planes)])
    }


class MaskedMethod(Method):
    """A method whose tasks are entries of a bank, kept in out/bank; subclasses `adopt` a network and say how a task is learnt."""

    forget_free = True

    def __init__(self, config: MethodConfig, benchmark: Benchmark, seed: int):
        super().__init__(config, benchmark, seed)
        self._refreshed = refresh_seconds()

    def adopt(self, model: nn.Module, config: sk.SubnetConfig) -> None:
        """Convert the network and open a bank over it; chance comes from PyTorch's global CPU generator."""
        self.model = sk.convert(model, config).to(self.device)
        self.bank = sk.MaskBank(self.model)

    @property
    def select_seconds(self) -> float:
        return refresh_seconds() - self._refreshed

    def run_live(self) -> None:
        """Leave whatever task is active: training goes through the live masks."""
        if not self.bank.is_live:
            self.bank.activate(None)

    def ready(self, clock: Clock) -> None:
        self.run_live()

    def network(self, x: Tensor) -> Tensor:
        """Logits (B, classes) of x (B, ...) through whatever mask is active."""
        return self.model(x)

    def logits(self, batch: Batch, clock: Clock) -> Tensor:
        self.ready(clock)
        return self.network(batch.x)

    def predict(self, x: Tensor, task: int | None) -> Prediction:
        name = entry_name(task)
        if name not in self.bank:
            raise NotLearnt(f"{name} has no entry in the bank yet")
        if self.bank.active != name:
            self.bank.activate(name)
        return Prediction(self.network(x), torch.full((len(x),), task, device=x.device))

    def report(self) -> dict[str, Any]:
        capacity = self.bank.capacity()
        paper = wsn_cap(capacity["used_fraction"], len(self.bank)) if self.bank.trains_weights and len(self.bank) else None
        return {"capacity": {**capacity, "paper_cap": paper}}

    def final_report(self) -> dict[str, Any]:
        report = self.report()
        sizes = {name: layer.weight.numel() for name, layer in zip(self.bank.layer_names, self.bank.layers())}
        planes = (by_plane(self.bank.bits(name)) for name in self.bank.masks)
        signs = ("",) if all(layer.rule.planes == 1 for layer in self.bank.layers()) else SIGNS
        huffman = joint_huffman(planes, {name + sign: n for name, n in sizes.items() for sign in signs})
        report["capacity"] = with_huffman(report["capacity"], huffman, sum(sizes.values()))
        return {**report, "reuse": reuse_report(self.bank, sizes)}

    def state(self) -> dict[str, Any]:
        if self.out is None:
            raise RuntimeError("a method with a bank needs its run's folder, `out`, to save the bank in")
        self.bank.save(self.out / "bank")
        with self.bank.as_task(None):
            return {"facts": self.facts(), "tensors": dict(self.state_dict()), "entries": self.bank.names}

    def load(self, state: dict[str, Any]) -> None:
        super().load(state)
        self.bank.read(self.out / "bank", state["entries"])
