"""WSN: winning subnetworks (Kang et al., "Forget-free Continual Learning with Winning Subnetworks", ICML 2022), Algorithm 1.

Weights and scores learn together. A task's mask is the top share of its scores in every layer; weights that an earlier task uses get
no gradient any more, scores always do, and they go on from task to task, which is how later tasks come to reuse earlier weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import subnet_kernels as sk
from subnet_kernels import optim
from subnet_pipelines.benchmarks.base import Batch, Benchmark, Task
from subnet_pipelines.bounds import Count, NotNegative, Positive, Share
from subnet_pipelines.chance import seeded
from subnet_pipelines.errors import Refusal
from subnet_pipelines.methods.base import Clock, MethodConfig, Phase
from subnet_pipelines.methods.masked import MaskedMethod, entry_name
from subnet_pipelines.models import MODELS, batch_norms, use_running_statistics
from subnet_pipelines.schedules import Plateau


@dataclass(frozen=True)
class WSNConfig(MethodConfig):
    """WSN; the defaults are the recipe of the authors' code on Permuted MNIST, for which the paper prints 96.14 +- .03 % at c = .1."""

    model: Literal["mlp", "lenet-300-100", "alexnet", "lenet", "lenet-large", "tinynet", "resnet-18"] = "mlp"
    """The network; the papers' widths."""
    head: Literal["dense", "masked"] = "dense"
    """A dense head of its own for each task (WSN's code), or one head for all, masked as the other layers are."""
    norm: Literal["task", "batch"] = "task"
    """What batch norms use at test: statistics that each task gathers over its training rows at its end and keeps for itself, or those of
    the test batch (WSN's code), by which a row's logits depend on the rows beside it."""
    density: Share | dict[str, Share] = 0.1
    """c, the kept share of every masked layer; the paper's rows are .03, .05, .1, .3 and .5. By layer: body.0=.3,*=.1, names or globs of
    which the first that fits counts."""
    ties: Literal["last", "first", "all"] = "last"
    """Scores equal to the threshold: exactly k are kept, or all of them (WSN's code)."""
    scores: Literal["keep", "init"] = "keep"
    """Scores go on from the task before (WSN's code), or are drawn anew."""
    optimizer: Literal["adam", "adamw", "sgd"] = "adam"
    """Of weights, scores and head; made afresh for each task."""
    lr: Positive = 1e-3
    """Its learning rate."""
    weight_decay: NotNegative = 0.0
    """Its weight decay, which moves no frozen weight: decoupled (adamw), or added to the gradients."""
    clip_norm: Positive | None = None
    """Largest norm of all gradients of a step together; null clips nothing."""
    amp: Literal["none", "bf16"] = "none"
    """Run the network under autocast to bfloat16, in training and at test; weights and scores stay float32."""
    lr_min: float = 1e-6
    """A task ends where the rate falls below it."""
    patience: Count = 6
    """Epochs without a better validation loss before the rate is halved."""
    select: Literal["last", "best"] = "best"
    """Keep the weights of the last epoch, or of the least validation loss."""
    stored_mask: Literal["restored", "last_step"] = "restored"
    """The mask that is validated and kept: of the scores that are kept, or of the last training step (WSN's code)."""


class WSN(MaskedMethod):
    """A subnetwork for each task in one network whose used weights are frozen; a dense head for each task, or a masked one for all."""

    name = "wsn"
    Config = WSNConfig
    static_step = True
    FIDELITY = {"sound": {}, "code": {"ties": "all", "stored_mask": "last_step", "norm": "batch"}, "paper": {}}

    def __init__(self, config: WSNConfig, benchmark: Benchmark, seed: int):
        super().__init__(config, benchmark, seed)
        with seeded(seed, "init"):
            network = MODELS[config.model](benchmark.classes, *benchmark.input_shape)
            if config.norm == "task":
                use_running_statistics(network)
            per_task = ["head"] if config.head == "dense" else []
            rule = {"density": densities(network, config, per_task), "k_rule": "kth", "ties": config.ties}
            self.adopt(network, sk.SubnetConfig(**rule, train_weights=True, per_task=per_task))
        self.norms = batch_norms(self.model) if config.norm == "task" else []
        self.last_bits: dict[str, Tensor] = {}  # masks of the last training step, where they are what is kept

    def plan(self, task: Task) -> list[Phase]:
        c = self.config
        return [
            Phase(
                "train",
                epochs=c.epochs,
                steps=c.iterations,
                batch_size=c.batch_size,
                optimizer=self.optimizer,
                schedule=Plateau(c.patience, 2.0, c.lr_min) if task.val is not None else None,
                select=c.select if task.val is not None else "last",
                first=lambda: self.begin(task.index),
                then=lambda: self.commit(task),
            )
        ]

    def begin(self, task: int) -> None:
        with seeded(self.seed, "begin", task):
            self.bank.begin(scores="keep" if task == 0 else self.config.scores)

    def optimizer(self) -> torch.optim.Optimizer:
        c = self.config
        kind = {"adam": optim.Adam, "adamw": optim.AdamW, "sgd": optim.SGD}[c.optimizer]
        # clipping must see each parameter's own gradient, which a fused step makes only after it
        return kind(self.model.parameters(), c.lr, weight_decay=c.weight_decay, fuse_ste=c.clip_norm is None)

    def network(self, x: Tensor) -> Tensor:
        if self.config.amp == "none":
            return super().network(x)
        with torch.autocast(self.device.type, torch.bfloat16):
            return super().network(x).float()

    def gradients(self, clock: Clock) -> None:
        if self.config.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_norm)
        if self.config.stored_mask == "last_step":
            live = {
                name: layer.bits for name, layer in zip(self.bank.layer_names, self.bank.layers())
            }  # current: forward used them
            self.last_bits = self.last_bits or {name: torch.empty_like(bits) for name, bits in live.items()}
            for name, bits in live.items():
                self.last_bits[name].copy_(bits)  # into the same tensors for a whole task, as a replayed step must

    def validate(self, batch: Batch, clock: Clock) -> Tensor:
        for norm in self.norms:
            norm.train()  # by the batch's own statistics: those of the task are gathered at its end
        if not self.last_bits:
            return self.loss(batch, clock)
        self.run_last()
        return F.cross_entropy(self.network(batch.x), batch.y)

    def run_last(self) -> None:
        """Run the masks of the last training step, where they are not active yet: steps leave the live ones active."""
        if self.bank.is_live:
            self.bank.activate(None, bits=self.last_bits)

    def commit(self, task: Task) -> None:
        self.run_live()
        if self.norms:
            self.gather(task)
        self.bank.commit(entry_name(task.index), bits=self.last_bits or None)
        self.last_bits = {}

    def gather(self, task: Task) -> None:
        """The norms' statistics, through the mask that is kept."""
        if self.last_bits:
            self.run_last()
        self.gather_norms(task, self.model, self.network)
        self.run_live()

    def state(self) -> dict[str, Any]:
        return {**super().state(), "last_bits": self.last_bits}

    def load(self, state: dict[str, Any]) -> None:
        super().load(state)
        self.last_bits = {name: bits.to(self.device, copy=True) for name, bits in state["last_bits"].items()}


def densities(network: nn.Module, config: WSNConfig, dense: list[str]) -> float | dict[str, float]:
    """The config's density, by layer where it names layers. Raises Refusal where a layer has none, or a name fits no layer."""
    if not isinstance(config.density, dict):
        return config.density
    layers = [name for name, m in network.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d)) and name not in dense]
    for pattern in config.density:
        if not any(fnmatchcase(name, pattern) for name in layers):
            raise Refusal(f"density names {pattern!r}, which fits no layer of {config.model}: {', '.join(layers)}")
    for name in layers:
        if not any(fnmatchcase(name, pattern) for pattern in config.density):
            raise Refusal(f"density must have a share for layer {name!r} of {config.model}; * stands for all others")
    return config.density
