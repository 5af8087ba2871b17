"""ImpressLearn: new tasks as combinations of masks that are there already (Bhardwaj et al., "ImpressLearn: Continual Learning via
Combined Task Impressions").

A basis of K masks over a fixed network is learnt first, or drawn. A new task then learns K coefficients a layer, alpha, over those masks:
W_eff = W * sum_k alpha_k M_k, by cross-entropy and a penalty that keeps sum |alpha| near 1; only alpha is stored.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

import subnet_kernels as sk
from subnet_kernels import optim
from subnet_pipelines.benchmarks.base import Batch, Benchmark, Task
from subnet_pipelines.bounds import Count, NotNegative, Positive, Share, Whole
from subnet_pipelines.chance import seeded, stream
from subnet_pipelines.errors import Refusal
from subnet_pipelines.methods import components
from subnet_pipelines.methods.base import Clock, Phase
from subnet_pipelines.methods.basis import Basis, mask_name
from subnet_pipelines.methods.combinations import CombinationConfig, CombinationMethod
from subnet_pipelines.methods.controls import Controls
from subnet_pipelines.methods.dense import OPTIMIZERS, Network
from subnet_pipelines.methods.masked import entry_name
from subnet_pipelines.methods.real_masks import RealMasks
from subnet_pipelines.methods.supsup import outputs_of, wide
from subnet_pipelines.models import MODELS, batch_norms, use_batch_statistics, use_running_statistics
from subnet_pipelines.schedules import cosine
from subnet_pipelines.together import Together, drops


@dataclass(frozen=True)
class ImpressLearnConfig(CombinationConfig):
    """ImpressLearn; the defaults are the paper's for LeNet-300-100 on Rotated and Permuted MNIST, where it prints them."""

    epochs: int = 20
    """Epochs of alpha for a new task (not printed)."""
    batch_size: int = 128
    """Rows of a training batch."""
    model: Network = "lenet-300-100"
    """The network; all its layers are masked."""
    width: Positive = 1.0
    """Times the network's own width, where it can be had in others (lenet-300-100, fc-1024, gem-resnet-18, resnet-50)."""
    outputs: int | None = None
    """Width of the last layer: the classes, and superfluous neurons beyond them; null is the classes alone (the paper)."""
    norm: Literal["task", "batch"] = "task"
    """What batch norms use at test: statistics that each task gathers over its training rows at its end and keeps for itself, or those of
    the test batch."""
    backbone: Literal["kaiming_normal", "signed_constant", "trained"] = "kaiming_normal"
    """The fixed weights: normal of variance 2 / fan_in (the paper), +-sqrt(2 / fan_in), or those first, then trained densely on the first
    task that is learnt."""
    backbone_epochs: Count = 10
    """Epochs of a trained backbone."""
    backbone_lr: Positive = 1e-3
    """Adam's rate for it."""
    basis: Count = 10
    """Masks of the basis of kind basis_kind."""
    basis_kind: Literal["heterogeneous", "homogeneous", "random"] = "heterogeneous"
    """A mask each for so many tasks, so many masks of the first task from other scores, or so many that nobody trained."""
    basis_seeds: Whole = 0
    """Further masks of the first task, beside a heterogeneous basis."""
    basis_random: Whole = 0
    """Further masks that nobody trained, beside a heterogeneous or homogeneous basis."""
    basis_from: Literal["first", "spread"] = "first"
    """Whose masks a heterogeneous basis has: the first tasks', or those of tasks spread evenly over all but the new ones."""
    new_tasks: Count | None = None
    """The last so many tasks of the stream are new ones, what lies between them and the basis is passed over; null: all but the basis."""
    mask: Literal["topk", "signed", "real"] = "topk"
    """A mask's entries on the top-k of the scores' sizes, 0 elsewhere: 1; the sign of the score; or the score itself, over its initial
    bound 1 / sqrt(fan_in)."""
    real_dtype: Literal["float16", "float32"] = "float16"
    """What the values of real masks are kept in."""
    density: Share = 0.1
    """Kept share of every layer in a mask."""
    erdos_renyi: Positive | None = None
    """s of the Erdos-Renyi rule in place of density (the capstone): a layer keeps min(.5, s (out + in) / (out in kernel))."""
    basis_epochs: Count = 15
    """Epochs of a mask (not printed)."""
    basis_lr: Positive = 1e-3
    """Adam's rate for the scores of a mask (not printed)."""
    basis_weight_decay: NotNegative = 0.0
    """L2 of the scores, in Adam (SupSup's code has 1e-4 on Split CIFAR-100)."""
    basis_schedule: Literal["constant", "cosine"] = "constant"
    """That rate over a mask's epochs: as it is, or down to 0."""
    parallel_tasks: Count = 1
    """Masks of the basis that are trained at once, to the same masks as one by one."""
    sizes: list[int] | None = None
    """Smaller bases, of so many masks each that lie evenly in the whole one: every new task learns coefficients over them too, which are
    measured and not kept."""
    components: Literal["masks", "principal", "nonnegative"] = "masks"
    """What coefficients weigh: the masks, or component_count components of these in each layer, principal ones or non-negative ones
    (convex NMF): fewer numbers learn, and they are kept as the coefficients of masks that they amount to."""
    component_count: Count = 10
    """Components a layer."""
    alpha_init: Literal["equal", "optimal", "previous"] = "equal"
    """Where alpha starts: 1 / K each; 1 for the mask that does best on the task's validation rows and 0 for all others (the capstone's
    start_at_optimal, which for a basis task is its own mask); or the new task before this one, for a task that drifts."""
    optimizer: Literal["rmsprop", "adam", "sgd"] = "rmsprop"
    """Of alpha: the paper's table says RMSprop on MNIST and Adam elsewhere, its text SGD."""
    lr: Positive = 2e-3
    """Its rate."""
    alpha_weight_decay: NotNegative = 0.0
    """L2 of alpha, in the optimizer: .1 in the paper's table where it has Adam, 1e-4 in the capstone's code."""
    schedule: Literal["constant", "cosine"] = "constant"
    """The rate of alpha over a task: as it is, or down to 0 (the capstone)."""
    penalty: NotNegative = 0.0
    """lambda of lambda * sum over layers of (sum_k |alpha_k| - 1)^2; the paper has 0 on MNIST and .005 elsewhere, the capstone none."""
    scale_basis: bool = False
    """Weigh a mask by alpha / K, alpha starting at 1: the capstone's poster has this 1/|B|, its code has it in the start of alpha alone."""
    hybrid: bool = False
    """A new task has a mask of its own in the last layer, trained with the alpha of the others."""
    controls: bool = True
    """Beside each new task measure equal coefficients, the first new task's coefficients, every mask of the basis alone (the first; the
    one that validation chooses; mean and deviation of all, the wrong mask) and, under own_mask, a mask of its own."""
    own_mask: bool = True
    """Under controls train a mask of its own for new tasks, the ceiling, which takes as long as a mask of the basis."""
    own_mask_every: Count = 1
    """That for the first new task and every so many-th after it."""

    def check(self) -> None:
        super().check()
        if self.basis_seeds and self.basis_kind != "heterogeneous":
            raise Refusal(f"basis_seeds goes with a heterogeneous basis; in a {self.basis_kind} one basis counts all masks")
        if self.basis_random and self.basis_kind == "random":
            raise Refusal("basis_random goes with a trained basis; in a random one basis counts all masks")
        if self.basis_from == "spread" and self.new_tasks is None:
            raise Refusal("basis_from spread needs new_tasks, to know the tasks that the basis is spread over")
        if self.sizes is not None and self.alpha_init != "equal":
            raise Refusal(f"alpha_init must be equal where sizes gives smaller bases, got {self.alpha_init}")
        plain = self.mask == "topk" and self.alpha_init == "equal" and self.sizes is None and not self.scale_basis
        if self.components != "masks" and not plain:
            raise Refusal(f"components {self.components} go with mask topk, alpha_init equal, no sizes and scale_basis off")
        if self.mask == "real" and self.basis_passes:
            raise Refusal("basis_passes must be 0 where mask is real: basis-GN runs binary and signed masks at once")
        if self.mask == "real" and (self.hybrid or self.parallel_tasks > 1):
            word = "hybrid must be false" if self.hybrid else "parallel_tasks must be 1"
            raise Refusal(f"{word} where mask is real: its weights are made layer by layer in PyTorch, for one network")


class ImpressLearn(Basis, RealMasks, Controls, CombinationMethod):
    """A basis of masks, and coefficients over them for every new task."""

    name = "impresslearn"
    Config = ImpressLearnConfig
    FIDELITY = {
        "sound": {},
        "code": {"optimizer": "adam", "lr": 1e-3, "alpha_weight_decay": 1e-4, "schedule": "cosine", "penalty": 0.0},
        "paper": {},
    }
    static_step = True

    def __init__(self, config: ImpressLearnConfig, benchmark: Benchmark, seed: int):
        super().__init__(config, benchmark, seed)
        if config.mask == "real" and not benchmark.scenario.test_id:
            raise Refusal(f"mask must be topk or signed in scenario {benchmark.config.scenario}, where combinations run at once")
        self.basis_tasks, self.new_tasks = tasks_of(config, benchmark)
        self.seeds = {"heterogeneous": 1 + config.basis_seeds, "homogeneous": config.basis, "random": 0}[
            config.basis_kind
        ]  # of task 0
        self.random = [f"random {k}" for k in range(config.basis if config.basis_kind == "random" else config.basis_random)]
        self.basis = [entry_name(task) for task in self.basis_tasks]  # names of its masks, in the order of their coefficients
        self.basis += [mask_name(0, k) for k in range(1, self.seeds)] + self.random
        if config.components != "masks" and config.component_count > len(self.basis):
            raise Refusal(
                f"component_count must be at most the {len(self.basis)} masks of the basis, got {config.component_count}"
            )
        for size in config.sizes or ():
            if not 0 < size < len(self.basis):
                raise Refusal(f"sizes must be numbers of masks from 1 to {len(self.basis) - 1}, got {size}")
        share = config.density if config.erdos_renyi is None else sk.ErdosRenyi(config.erdos_renyi)
        init = "kaiming_normal" if config.backbone == "trained" else config.backbone
        with seeded(seed, "init"):
            network = self.make_network()
            self.norms = batch_norms(network) if config.norm == "task" else []
            select = "signed" if config.mask == "signed" else "topk"
            self.adopt(network, sk.SubnetConfig(density=share, select=select, weight_init=init))
        if self.process.count > 1 and drops(self.model):
            raise Refusal(f"{self.name} must be run by one process where the network has dropout, got {self.process.count}")
        if config.parallel_tasks > 1:
            self.together = Together(self.model, self.run_live)
        self.static_step = config.parallel_tasks == 1 and self.seeds <= 1  # else a step has a batch of each mask
        self.alphas: nn.Parameter | None = None
        self.over = self.basis  # the masks that alphas weigh
        self.register_buffer("shares", None)  # of these masks in components, (layers, count, K), where alphas weigh those
        self.dense: nn.Module | None = None  # the backbone while it is trained

    @staticmethod
    def can_share(config: ImpressLearnConfig) -> bool:
        return config.basis_kind == "homogeneous"

    def make_network(self) -> nn.Module:
        outputs = outputs_of(self.config, self.benchmark)
        network = MODELS[self.config.model](outputs, *self.benchmark.input_shape, **wide(self.config))
        return (use_running_statistics if self.config.norm == "task" else use_batch_statistics)(network)

    def plan(self, task: Task) -> list[Phase]:
        i, phases = task.index, []
        if i == min([*self.basis_tasks, *self.new_tasks]):
            phases += self.plan_backbone() if self.config.backbone == "trained" else []
            phases += [Phase("random masks", steps=0, then=lambda: self.draw_masks(task))] if self.random else []
        if i in self.basis_tasks:
            return phases + self.plan_masks(task)
        if i in self.new_tasks and self.process.rank == 0:
            return phases + self.plan_alpha(task)
        return []

    def step(self, batch: Batch | tuple[Batch, ...], opt: torch.optim.Optimizer, clock: Clock) -> dict[str, Tensor]:
        if isinstance(batch, Batch):
            return super().step(batch, opt, clock)
        return super().step(batch[0], opt, clock) if self.config.parallel_tasks == 1 else self.together.step(batch, opt)

    # ---- the backbone -----------------------------------------------------------------------------------------------

    def plan_backbone(self) -> list[Phase]:
        c = self.config
        dense = Phase(
            "backbone",
            epochs=c.backbone_epochs,
            batch_size=c.batch_size,
            optimizer=lambda: optim.Adam(list(self.dense.parameters()), c.backbone_lr),
            first=self.begin_backbone,
            then=self.take_backbone,
            order=2,
        )
        return [dense]

    def begin_backbone(self) -> None:
        with seeded(self.seed, "dense"):
            self.dense = self.make_network().to(self.device)
        self.dense.load_state_dict(sk.dense_state_dict(self.model))

    @torch.no_grad()
    def take_backbone(self) -> None:
        for name, layer in zip(self.bank.layer_names, self.bank.layers()):
            layer.weight.copy_(self.dense.get_submodule(name).weight)
        sk.refresh(self.model)
        self.dense = None

    # ---- new tasks: coefficients over the masks ---------------------------------------------------------------------

    def plan_alpha(self, task: Task) -> list[Phase]:
        """A mask of its own to compare with, coefficients over smaller bases, and those that are kept."""
        c = self.config
        own = self.mask_phase(task.index, "control mask", lambda: self.measure_own(task))
        phases = [own] if c.controls and c.own_mask and self.new_tasks.index(task.index) % c.own_mask_every == 0 else []
        phases += [
            self.alpha_phase(f"alpha over {size}", task, self.some_of_basis(size), partial(self.measure_over, task))
            for size in c.sizes or ()
        ]
        return [*phases, self.alpha_phase("alpha", task, self.basis, partial(self.commit_alphas, task))]

    def alpha_phase(self, name: str, task: Task, over: list[str], then: Callable[[], None]) -> Phase:
        c = self.config
        return Phase(
            name,
            epochs=c.epochs,
            steps=c.iterations,
            batch_size=c.batch_size,
            optimizer=self.alpha_optimizer,
            schedule=cosine() if c.schedule == "cosine" else None,
            first=lambda: self.begin_alphas(task, over),
            then=then,
            order=1,
        )

    def alpha_optimizer(self) -> torch.optim.Optimizer:
        """Of alpha, and of the last layer's scores in a hybrid, at the rate of a mask."""
        c = self.config
        groups = [{"params": [self.alphas], "lr": c.lr, "weight_decay": c.alpha_weight_decay}]
        if c.hybrid:
            groups.append({"params": [self.bank.layers()[-1].scores], "lr": c.basis_lr, "weight_decay": c.basis_weight_decay})
        return OPTIMIZERS[c.optimizer](groups, c.lr)

    def begin_alphas(self, task: Task, over: list[str]) -> None:
        c = self.config
        if absent := [name for name in self.basis if name not in self.bank.masks]:
            raise Refusal(
                f"the basis must have {absent[0]!r}, which the stream has passed: a spread basis cannot grow with tasks"
            )
        whole = len(over) == len(self.basis)
        best = self.measure_basis(task) if whole and (c.controls or c.alpha_init == "optimal") else None
        self.make_alphas(over)
        if c.components != "masks":
            self.make_components()
        if whole and c.controls:
            self.mix()
            self.gather_norms(task, self.model, self.network)
            self.note("equal", task, self.percent(self.benchmark.test(task.index)))
        with seeded(self.seed, "scores of the last layer", task.index):
            self.bank.begin(scores="init" if c.hybrid else "keep")
        with torch.no_grad():
            if c.alpha_init == "optimal":
                self.alphas.zero_()[:, best] = len(over) if c.scale_basis else 1
            elif c.alpha_init == "previous" and task.index > self.new_tasks[0]:
                before = self.bank[entry_name(task.index - 1)].alphas[:, : len(over)]
                self.alphas.copy_(before * len(over) if c.scale_basis else before)

    def make_alphas(self, over: list[str]) -> None:
        """Equal coefficients of these masks (layers, K), or of as many components as these weigh (layers, count)."""
        c, self.over, masks = self.config, over, len(over)
        weighed = masks if c.components == "masks" else c.component_count
        start = 1.0 if c.scale_basis else 1 / masks
        self.alphas = nn.Parameter(torch.full((len(self.bank.layers()), weighed), start, device=self.device))
        if c.components != "masks":
            self.shares = self.alphas.new_zeros((*self.alphas.shape, masks))

    @torch.no_grad()
    def make_components(self) -> None:
        """The components of these masks, and the coefficients of them that come nearest to equal ones of the masks."""
        places = torch.tensor([self.bank.masks.index(name) for name in self.over])
        overlaps = [each.cpu()[places][:, places] for each in self.bank.overlap().values()]
        count, chance = self.config.component_count, stream(self.seed, "components")
        principal = self.config.components == "principal"
        shares = [
            components.principal(each, count) if principal else components.nonnegative(each, count, chance) for each in overlaps
        ]
        equal = torch.full((len(self.over),), 1 / len(self.over))
        self.shares.copy_(torch.stack(shares))
        self.alphas.copy_(torch.stack([components.nearest(each, some, equal) for each, some in zip(overlaps, shares)]))

    def coefficients(self) -> Tensor:
        """What the masks are weighed by (layers, K); a hybrid's last row means nothing."""
        if self.config.components != "masks":
            return torch.einsum("lc,lck->lk", self.alphas, self.shares)
        return self.alphas / len(self.over) if self.config.scale_basis else self.alphas

    def mix(self) -> None:
        """Run as the combination that is learnt."""
        if self.config.mask == "real":
            self.run_live()  # and `network` does the rest
        else:
            live = self.bank.layer_names[-1:] if self.config.hybrid else ()
            self.bank.activate(None)
            self.bank.superpose(self.coefficients(), over=self.over, live=live)

    def ready(self, clock: Clock) -> None:
        if not clock.phase.startswith("alpha"):
            super().ready(clock)
        elif self.bank.is_live or self.bank.active is not None:
            self.mix()

    def logits(self, batch: Batch, clock: Clock) -> Tensor:
        if clock.phase == "backbone":
            return self.dense(batch.x)
        self.ready(clock)
        if clock.phase.startswith("alpha") and (self.config.scale_basis or self.config.components != "masks"):
            self.mix()  # anew, as the coefficients are computed anew
        return self.network(batch.x)

    def loss(self, batch: Batch, clock: Clock) -> Tensor:
        loss = super().loss(batch, clock)
        if clock.phase.startswith("alpha") and self.config.penalty:
            weighed = self.coefficients()[:-1] if self.config.hybrid else self.coefficients()
            loss = loss + self.config.penalty * (weighed.abs().sum(1) - 1).square().sum()
        return loss

    @torch.no_grad()
    def commit_alphas(self, task: Task) -> None:
        self.mix()
        self.gather_norms(task, self.model, self.network)
        name, alphas, over = entry_name(task.index), self.coefficients(), self.basis
        tensors = {"information": self.own_information(task)}
        if self.config.hybrid:
            alphas, over = self.with_last_layer(name, alphas)
        self.bank.activate(None)
        self.bank.commit(name, alphas=alphas, over=over, tensors=tensors)
        self.alphas = None
        if self.config.controls:
            for control, entry in (("combination", name), ("fixed_combination", entry_name(self.new_tasks[0]))):
                with self.bank.as_task(entry):
                    self.note(control, task, self.percent(self.benchmark.test(task.index)))

    @torch.no_grad()
    def measure_over(self, task: Task) -> None:
        """What coefficients over a smaller basis reach."""
        self.mix()
        self.gather_norms(task, self.model, self.network)
        self.note(f"combination_of_{len(self.over)}", task, self.percent(self.benchmark.test(task.index)))
        self.bank.activate(None)
        self.alphas = None

    def with_last_layer(self, name: str, alphas: Tensor) -> tuple[Tensor, list[str]]:
        """A combination whose last layer is the live mask's: that is kept as an entry that is empty elsewhere, and has the last column."""
        self.bank.activate(None)
        last = self.bank.layer_names[-1]
        bits = {key: value if key == last else torch.zeros_like(value) for key, value in self.bank.live_bits().items()}
        self.bank.commit(f"{name}, last layer", bits=bits)
        alphas = torch.cat([alphas, alphas.new_zeros(len(alphas), 1)], 1)
        alphas[-1] = 0
        alphas[-1, -1] = 1
        return alphas, [*self.basis, f"{name}, last layer"]

    # ---- what is reported and kept ----------------------------------------------------------------------------------

    def report(self) -> dict[str, Any]:
        report, layers = super().report(), len(self.bank.layers()) - self.config.hybrid
        capacity, total = report["capacity"], sum(layer.weight.numel() for layer in self.bank.layers())
        if self.config.mask == "real":
            kept = [t for name in self.bank.masks for key, t in self.bank[name].tensors.items() if key.startswith("values/")]
            values = sum(t.numel() * t.element_size() for t in kept)
            capacity["value_bytes"] = values
            capacity["bits_per_weight"] += 8 * values / total / max(len(self.bank), 1)
            for name in ("measured_cap", "seed_only_cap"):
                capacity[name] += 100 * values / (4 * total)
        if self.config.backbone == "trained":
            capacity["seed_only_cap"] = None  # no seed gives these weights
        stream = {"basis_tasks": self.basis_tasks, "new_tasks": self.new_tasks, "basis_masks": len(self.basis)}
        stream["learnt_per_task"] = layers * (
            len(self.basis) if self.config.components == "masks" else self.config.component_count
        )
        return {**report, **stream, "alphas_per_task": layers * len(self.basis), **self.controls_report()}

    def facts(self) -> dict[str, Any]:
        return {"alphas": self.alphas is not None and self.over, "dense": self.dense is not None, "measured": self.measured}

    def build(self, facts: dict[str, Any]) -> None:
        if facts["alphas"]:
            self.make_alphas(facts["alphas"])
        if facts["dense"]:
            self.dense = self.make_network().to(self.device)
        self.measured = facts["measured"]


def tasks_of(config: ImpressLearnConfig, benchmark: Benchmark) -> tuple[list[int], list[int]]:
    """The tasks of a stream whose masks the basis has, and the new ones. Raises Refusal where it is too short for both."""
    total, count = len(benchmark), {"heterogeneous": config.basis, "homogeneous": 1, "random": 0}[config.basis_kind]
    before = count if config.new_tasks is None else total - config.new_tasks
    if not count <= before < total:
        new = 1 if config.new_tasks is None else config.new_tasks
        raise Refusal(f"basis must leave new tasks: it takes {count} and they {new}, {benchmark.name} has {total} tasks")
    spread = config.basis_from == "spread"
    return [k * before // count if spread else k for k in range(count)], list(range(before, total))
