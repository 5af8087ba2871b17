"""ImpressLearn: new tasks as combinations of masks that are there already (Bhardwaj et al., "ImpressLearn: Continual Learning via
Combined Task Impressions").

A basis of K masks over a fixed network is learnt first, or drawn. A new task then learns K coefficients a layer, alpha, over those masks:
W_eff = W * sum_k alpha_k M_k, by cross-entropy and a penalty that keeps sum |alpha| near 1; only alpha is stored.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

import subnet_kernels as sk
from subnet_kernels import optim
from subnet_pipelines.benchmarks.base import Batch, Benchmark, Split, Task, batches
from subnet_pipelines.chance import seeded
from subnet_pipelines.errors import Refusal
from subnet_pipelines.methods.base import Clock, MethodConfig, Phase
from subnet_pipelines.methods.dense import OPTIMIZERS, Network
from subnet_pipelines.methods.masked import MaskedMethod, entry_name
from subnet_pipelines.methods.supsup import wide
from subnet_pipelines.models import MODELS, batch_norms, use_batch_statistics, use_running_statistics
from subnet_pipelines.schedules import cosine
from subnet_pipelines.together import Together


@dataclass(frozen=True)
class ImpressLearnConfig(MethodConfig):
    """ImpressLearn; the defaults are the paper's for LeNet-300-100 on Rotated and Permuted MNIST, where it prints them."""

    epochs: int = 20
    """Epochs of alpha for a new task (not printed)."""
    batch_size: int = 128
    """Rows of a training batch."""
    model: Network = "lenet-300-100"
    """The network; all its layers are masked."""
    width: float = 1.0
    """Times the network's own width, where it can be had in others (lenet-300-100, fc-1024, gem-resnet-18, resnet-50)."""
    norm: Literal["task", "batch"] = "task"
    """What batch norms use at test: statistics that each task gathers over its training rows at its end and keeps for itself, or those of
    the test batch."""
    backbone: Literal["kaiming_normal", "signed_constant", "trained"] = "kaiming_normal"
    """The fixed weights: normal of variance 2 / fan_in (the paper), +-sqrt(2 / fan_in), or those first, then trained densely on the first
    task that is learnt."""
    backbone_epochs: int = 10
    """Epochs of a trained backbone."""
    backbone_lr: float = 1e-3
    """Adam's rate for it."""
    basis: int = 10
    """Masks of the basis of kind basis_kind."""
    basis_kind: Literal["heterogeneous", "homogeneous", "random"] = "heterogeneous"
    """A mask each for so many tasks, so many masks of the first task from other scores, or so many that nobody trained."""
    basis_seeds: int = 0
    """Further masks of the first task, beside a heterogeneous basis."""
    basis_random: int = 0
    """Further masks that nobody trained, beside a heterogeneous or homogeneous basis."""
    basis_from: Literal["first", "spread"] = "first"
    """Whose masks a heterogeneous basis has: the first tasks', or those of tasks spread evenly over all but the new ones."""
    new_tasks: int | None = None
    """The last so many tasks of the stream are new ones, what lies between them and the basis is passed over; null: all but the basis."""
    mask: Literal["topk", "signed", "real"] = "topk"
    """A mask's entries on the top-k of the scores' sizes, 0 elsewhere: 1; the sign of the score; or the score itself, over its initial
    bound 1 / sqrt(fan_in)."""
    real_dtype: Literal["float16", "float32"] = "float16"
    """What the values of real masks are kept in."""
    density: float = 0.1
    """Kept share of every layer in a mask."""
    erdos_renyi: float | None = None
    """s of the Erdos-Renyi rule in place of density (the capstone): a layer keeps min(.5, s (out + in) / (out in kernel))."""
    basis_epochs: int = 15
    """Epochs of a mask (not printed)."""
    basis_lr: float = 1e-3
    """Adam's rate for the scores of a mask (not printed)."""
    basis_weight_decay: float = 0.0
    """L2 of the scores, in Adam (SupSup's code has 1e-4 on Split CIFAR-100)."""
    basis_schedule: Literal["constant", "cosine"] = "constant"
    """That rate over a mask's epochs: as it is, or down to 0."""
    parallel_tasks: int = 1
    """Masks of the basis that are trained at once, to the same masks as one by one."""
    alpha_init: Literal["equal", "optimal"] = "equal"
    """Where alpha starts: 1 / K each, or 1 for the mask that does best on the task's validation rows and 0 for all others (the capstone's
    start_at_optimal, which for a basis task is its own mask)."""
    optimizer: Literal["rmsprop", "adam", "sgd"] = "rmsprop"
    """Of alpha: the paper's table says RMSprop on MNIST and Adam elsewhere, its text SGD."""
    lr: float = 2e-3
    """Its rate."""
    alpha_weight_decay: float = 0.0
    """L2 of alpha, in the optimizer: .1 in the paper's table where it has Adam, 1e-4 in the capstone's code."""
    schedule: Literal["constant", "cosine"] = "constant"
    """The rate of alpha over a task: as it is, or down to 0 (the capstone)."""
    penalty: float = 0.0
    """lambda of lambda * sum over layers of (sum_k |alpha_k| - 1)^2; the paper has 0 on MNIST and .005 elsewhere, the capstone none."""
    scale_basis: bool = False
    """Weigh a mask by alpha / K, alpha starting at 1: the capstone's poster has this 1/|B|, its code has it in the start of alpha alone."""
    hybrid: bool = False
    """A new task has a mask of its own in the last layer, trained with the alpha of the others."""
    controls: bool = True
    """Beside each new task measure equal coefficients, every mask of the basis alone (the one that validation chooses; mean and deviation
    of all, the wrong mask) and, under own_mask, a mask of its own."""
    own_mask: bool = True
    """Under controls train a mask of its own for every new task, the ceiling, which takes as long as a mask of the basis."""

    def check(self) -> None:
        super().check()
        if not 0 < self.density <= 1:
            raise Refusal(f"density must be in (0, 1], got {self.density}")
        for name in ("basis", "basis_epochs", "backbone_epochs", "parallel_tasks"):
            if getattr(self, name) < 1:
                raise Refusal(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("basis_seeds", "basis_random", "penalty", "alpha_weight_decay", "basis_weight_decay"):
            if getattr(self, name) < 0:
                raise Refusal(f"{name} must not be negative, got {getattr(self, name)}")
        for name in ("lr", "basis_lr", "backbone_lr", "width", "erdos_renyi"):
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                raise Refusal(f"{name} must be positive, got {getattr(self, name)}")
        if self.new_tasks is not None and self.new_tasks < 1:
            raise Refusal(f"new_tasks must be at least 1, got {self.new_tasks}")
        if self.basis_seeds and self.basis_kind != "heterogeneous":
            raise Refusal(f"basis_seeds goes with a heterogeneous basis; in a {self.basis_kind} one basis counts all masks")
        if self.basis_random and self.basis_kind == "random":
            raise Refusal("basis_random goes with a trained basis; in a random one basis counts all masks")
        if self.basis_from == "spread" and self.new_tasks is None:
            raise Refusal("basis_from spread needs new_tasks, to know the tasks that the basis is spread over")
        if self.mask == "real" and (self.hybrid or self.parallel_tasks > 1):
            word = "hybrid must be false" if self.hybrid else "parallel_tasks must be 1"
            raise Refusal(f"{word} where mask is real: its weights are made layer by layer in PyTorch, for one network")


class ImpressLearn(MaskedMethod):
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
        self.benchmark = benchmark
        self.basis_tasks, self.new_tasks = tasks_of(config, benchmark)
        self.seeds = {"heterogeneous": 1 + config.basis_seeds, "homogeneous": config.basis, "random": 0}[
            config.basis_kind
        ]  # of task 0
        self.random = [f"random {k}" for k in range(config.basis if config.basis_kind == "random" else config.basis_random)]
        self.basis = [entry_name(task) for task in self.basis_tasks]  # names of its masks, in the order of their coefficients
        self.basis += [mask_name(0, k) for k in range(1, self.seeds)] + self.random
        share = config.density if config.erdos_renyi is None else sk.ErdosRenyi(config.erdos_renyi)
        init = "kaiming_normal" if config.backbone == "trained" else config.backbone
        with seeded(seed, "init"):
            network = self.make_network()
            self.norms = batch_norms(network) if config.norm == "task" else []
            select = "signed" if config.mask == "signed" else "topk"
            self.adopt(network, sk.SubnetConfig(density=share, select=select, weight_init=init))
        if config.parallel_tasks > 1:
            self.together = Together(self.model, self.run_live)
        self.static_step = config.parallel_tasks == 1 and self.seeds <= 1  # else a step has a batch of each mask
        self.alphas: nn.Parameter | None = None
        self.dense: nn.Module | None = None  # the backbone while it is trained
        self.measured: dict[str, dict[str, Any]] = {}  # control -> new task -> percent, or that of each mask
        self.values: dict[str, Tensor] = {}  # of real masks: those of the basis, dense, {layer: float32 (K, *shape)}
        self.made: tuple[str | None, dict[str, Tensor]] = (None, {})  # whose weights of real masks were made last

    def make_network(self) -> nn.Module:
        network = MODELS[self.config.model](self.benchmark.classes, *self.benchmark.input_shape, **wide(self.config))
        return (use_running_statistics if self.config.norm == "task" else use_batch_statistics)(network)

    def plan(self, task: Task) -> list[Phase]:
        i, phases = task.index, []
        if i == min([*self.basis_tasks, *self.new_tasks]):
            phases += self.plan_backbone() if self.config.backbone == "trained" else []
            phases += [Phase("random masks", steps=0, then=lambda: self.draw_masks(task))] if self.random else []
        if i in self.basis_tasks:
            return phases + self.plan_masks(task)
        if i in self.new_tasks:
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

    # ---- the basis --------------------------------------------------------------------------------------------------

    def plan_masks(self, task: Task) -> list[Phase]:
        """A phase for each mask of a basis task; further ones of the first task count down from 0 in the place of a task's number."""
        c, place = self.config, self.basis_tasks.index(task.index)
        several = place == 0 and self.seeds > 1
        numbered = [replace(task, index=-k) for k in range(self.seeds)] if several else [task]
        phases = []
        for k, mine in enumerate(numbered):
            phase = self.mask_phase(mine.index, "mask", lambda k=k: self.commit_mask(mask_name(task.index, k), task))
            if c.parallel_tasks == 1:
                phase = replace(phase, together=[mine]) if several else phase
            elif k % c.parallel_tasks:
                phase = self.together.waiting(phase, mine)
            else:
                others = numbered[k + 1 :] if several else map(self.benchmark.task, self.basis_tasks[place + 1 :])
                others = list(itertools.islice(others, c.parallel_tasks - 1))
                phase = self.together.phase(phase, mine, others, self.begin_mask, self.mask_optimizer)
            phases.append(phase)
        return phases

    def mask_phase(self, number: int, name: str, then: Callable[[], None]) -> Phase:
        """The training of a mask from the scores of that number."""
        c = self.config
        return Phase(
            name,
            epochs=c.basis_epochs,
            batch_size=c.batch_size,
            optimizer=self.mask_optimizer,
            schedule=cosine() if c.basis_schedule == "cosine" else None,
            first=lambda: self.begin_mask(number),
            then=then,
            order=0,
        )

    def mask_optimizer(self, networks: Sequence[nn.Module] | None = None) -> torch.optim.Optimizer:
        c, fuse = self.config, self.config.mask != "real"  # whose straight-through rule is the step's own, or autograd's
        layers = [m for network in networks or [self.model] for m in network.modules() if isinstance(m, sk.SubnetLayer)]
        scores = [layer.scores for layer in layers]
        return optim.Adam(scores, c.basis_lr, weight_decay=c.basis_weight_decay, fuse_ste=fuse)

    def begin_mask(self, number: int) -> None:
        with seeded(self.seed, "scores", number):
            self.bank.begin(scores="init")

    def commit_mask(self, name: str, task: Task) -> None:
        """Keep the live mask, with the statistics of norms over the task's training rows."""
        self.run_live()
        self.gather_norms(task, self.model, self.network)
        self.run_live()
        self.bank.commit(name, tensors=self.live_values() if self.config.mask == "real" else None)

    def draw_masks(self, task: Task) -> None:
        """The masks that nobody trains: the top-k of fresh scores, which is any choice of k weights as likely as any other."""
        for k, name in enumerate(self.random):
            with seeded(self.seed, "random mask", k):
                self.bank.begin(scores="init")
            self.commit_mask(name, task)

    # ---- new tasks: coefficients over the masks ---------------------------------------------------------------------

    def plan_alpha(self, task: Task) -> list[Phase]:
        c = self.config
        own = self.mask_phase(task.index, "control mask", lambda: self.measure_own(task))
        alpha = Phase(
            "alpha",
            epochs=c.epochs,
            steps=c.iterations,
            batch_size=c.batch_size,
            optimizer=self.alpha_optimizer,
            schedule=cosine() if c.schedule == "cosine" else None,
            first=lambda: self.begin_alphas(task),
            then=lambda: self.commit_alphas(task),
            order=1,
        )
        return [own, alpha] if c.controls and c.own_mask else [alpha]

    def alpha_optimizer(self) -> torch.optim.Optimizer:
        """Of alpha, and of the last layer's scores in a hybrid, at the rate of a mask."""
        c = self.config
        groups = [{"params": [self.alphas], "lr": c.lr, "weight_decay": c.alpha_weight_decay}]
        if c.hybrid:
            groups.append({"params": [self.bank.layers()[-1].scores], "lr": c.basis_lr, "weight_decay": c.basis_weight_decay})
        return OPTIMIZERS[c.optimizer](groups, c.lr)

    def begin_alphas(self, task: Task) -> None:
        c = self.config
        if absent := [name for name in self.basis if name not in self.bank.masks]:
            raise Refusal(
                f"the basis must have {absent[0]!r}, which the stream has passed: a spread basis cannot grow with tasks"
            )
        best = self.measure_basis(task) if c.controls or c.alpha_init == "optimal" else None
        self.make_alphas()
        if c.controls:
            self.mix()
            self.gather_norms(task, self.model, self.network)
            self.note("equal", task, self.percent(self.benchmark.test(task.index)))
        with seeded(self.seed, "scores of the last layer", task.index):
            self.bank.begin(scores="init" if c.hybrid else "keep")
        if c.alpha_init == "optimal":
            with torch.no_grad():
                self.alphas.zero_()[:, best] = len(self.basis) if c.scale_basis else 1

    def make_alphas(self) -> None:
        """Equal coefficients (layers, K)."""
        masks = len(self.basis)
        start = 1.0 if self.config.scale_basis else 1 / masks
        self.alphas = nn.Parameter(torch.full((len(self.bank.layers()), masks), start, device=self.device))

    def coefficients(self) -> Tensor:
        """What the masks are weighed by (layers, K); a hybrid's last row means nothing."""
        return self.alphas / len(self.basis) if self.config.scale_basis else self.alphas

    def mix(self) -> None:
        """Run as the combination that is learnt."""
        if self.config.mask == "real":
            self.run_live()  # and `network` does the rest
        else:
            live = self.bank.layer_names[-1:] if self.config.hybrid else ()
            self.bank.activate(None)
            self.bank.superpose(self.coefficients(), over=self.basis, live=live)

    def ready(self, clock: Clock) -> None:
        if clock.phase != "alpha":
            super().ready(clock)
        elif self.bank.is_live or self.bank.active is not None:
            self.mix()

    def logits(self, batch: Batch, clock: Clock) -> Tensor:
        if clock.phase == "backbone":
            return self.dense(batch.x)
        self.ready(clock)
        if clock.phase == "alpha" and self.config.scale_basis:
            self.mix()  # anew, as the coefficients are computed anew
        return self.network(batch.x)

    def loss(self, batch: Batch, clock: Clock) -> Tensor:
        loss = super().loss(batch, clock)
        if clock.phase == "alpha" and self.config.penalty:
            weighed = self.coefficients()[:-1] if self.config.hybrid else self.coefficients()
            loss = loss + self.config.penalty * (weighed.abs().sum(1) - 1).square().sum()
        return loss

    @torch.no_grad()
    def commit_alphas(self, task: Task) -> None:
        self.mix()
        self.gather_norms(task, self.model, self.network)
        name, alphas, over = entry_name(task.index), self.coefficients(), self.basis
        if self.config.hybrid:
            alphas, over = self.with_last_layer(name, alphas)
        self.bank.activate(None)
        self.bank.commit(name, alphas=alphas, over=over)
        self.alphas = None
        if self.config.controls:
            with self.bank.as_task(name):
                self.note("combination", task, self.percent(self.benchmark.test(task.index)))

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

    # ---- real-valued masks ------------------------------------------------------------------------------------------

    def network(self, x: Tensor) -> Tensor:
        if self.config.mask == "real":
            self.bank.substitute(self.real_weights())
        return self.model(x)

    def real_weights(self) -> dict[str, Tensor]:
        """Effective weights of the active entry, of the combination that is learnt, or of the live mask, in the graph of what learns."""
        name, layers = self.bank.active, dict(zip(self.bank.layer_names, self.bank.layers()))
        if name is None and self.alphas is None:
            return {key: layer.weight * live_value(layer) for key, layer in layers.items()}
        if name is not None and self.made[0] == name:
            return self.made[1]
        if name is not None and self.bank[name].alphas is None:
            made = {key: layer.weight * self.value_of(name, key) for key, layer in layers.items()}
        else:
            alphas = self.coefficients() if name is None else self.bank[name].alphas
            made = {
                key: layer.weight * torch.tensordot(row, self.values_of(key), 1)
                for (key, layer), row in zip(layers.items(), alphas)
            }
        if name is not None:
            self.made = name, made
        return made

    def live_values(self) -> dict[str, Tensor]:
        """The values of the live mask on the weights that it opens, {"values/" layer: real_dtype (open,)}."""
        dtype, found = getattr(torch, self.config.real_dtype), {}
        for key, layer in zip(self.bank.layer_names, self.bank.layers()):
            found[f"values/{key}"] = live_value(layer).detach()[unpacked(layer)].to(dtype)
        return found

    def value_of(self, name: str, key: str) -> Tensor:
        """A mask of the basis in one layer, float32 (*shape)."""
        entry, layer = self.bank[name], dict(zip(self.bank.layer_names, self.bank.layers()))[key]
        mask = sk.unpack(self.bank.bits(name)[key], layer.weight.shape)
        return torch.zeros_like(layer.weight).masked_scatter_(mask, entry.tensors[f"values/{key}"].to(layer.weight))

    def values_of(self, key: str) -> Tensor:
        """All masks of the basis in one layer, float32 (K, *shape): made once."""
        if key not in self.values:
            self.values[key] = torch.stack([self.value_of(name, key) for name in self.basis])
        return self.values[key]

    # ---- controls ---------------------------------------------------------------------------------------------------

    def measure_own(self, task: Task) -> None:
        self.run_live()
        self.gather_norms(task, self.model, self.network)
        self.note("own_mask", task, self.percent(self.benchmark.test(task.index)))

    def measure_basis(self, task: Task) -> int:
        """The place of the mask that does best on the validation rows, by default the training rows; under controls all are tested."""
        test, chosen, accuracy = self.benchmark.test(task.index), [], []
        for name in self.basis:
            with self.bank.as_task(name):
                chosen.append(self.percent(task.val or task.train))
                accuracy += [self.percent(test)] if self.config.controls else []
        best = max(range(len(chosen)), key=chosen.__getitem__)
        if self.config.controls:
            self.note("nearest_mask", task, accuracy[best])
            self.note("wrong_mask", task, statistics.fmean(accuracy))
            self.note("wrong_mask_std", task, statistics.stdev(accuracy) if len(accuracy) > 1 else 0.0)
            self.note("each_mask", task, dict(zip(self.basis, accuracy)))
        return best

    def note(self, control: str, task: Task, found: Any) -> None:
        self.measured.setdefault(control, {})[entry_name(task.index)] = found

    @torch.no_grad()
    def percent(self, split: Split) -> float:
        self.eval()
        x, y = split.tensors()
        right = sum((self.network(batch.x).argmax(1) == batch.y).sum() for batch in batches(x, y, None, None, 1000))
        return 100 * right.item() / len(y)

    # ---- what is reported and kept ----------------------------------------------------------------------------------

    def report(self) -> dict[str, Any]:
        report, layers = super().report(), len(self.bank.layers()) - self.config.hybrid
        capacity, total = report["capacity"], sum(layer.weight.numel() for layer in self.bank.layers())
        if self.config.mask == "real":
            values = sum(t.numel() * t.element_size() for name in self.bank.masks for t in self.bank[name].tensors.values())
            capacity["value_bytes"] = values
            capacity["bits_per_weight"] += 8 * values / total / max(len(self.bank), 1)
            for name in ("measured_cap", "seed_only_cap"):
                capacity[name] += 100 * values / (4 * total)
        if self.config.backbone == "trained":
            capacity["seed_only_cap"] = None  # no seed gives these weights
        numbers = {name: tasks for name, tasks in self.measured.items() if name != "each_mask"}
        means = {f"{name}_mean": statistics.fmean(tasks.values()) for name, tasks in numbers.items()}
        stream = {"basis_tasks": self.basis_tasks, "new_tasks": self.new_tasks, "basis_masks": len(self.basis)}
        return {**report, **stream, "alphas_per_task": layers * len(self.basis), **self.measured, **means}

    def facts(self) -> dict[str, Any]:
        return {"alphas": self.alphas is not None, "dense": self.dense is not None, "measured": self.measured}

    def build(self, facts: dict[str, Any]) -> None:
        if facts["alphas"]:
            self.make_alphas()
        if facts["dense"]:
            self.dense = self.make_network().to(self.device)
        self.measured = facts["measured"]


def mask_name(task: int, k: int) -> str:
    """The bank's name of a task's mask number k."""
    return entry_name(task) + (f", seed {k}" if k else "")


def tasks_of(config: ImpressLearnConfig, benchmark: Benchmark) -> tuple[list[int], list[int]]:
    """The tasks of a stream whose masks the basis has, and the new ones. Raises Refusal where it is too short for both."""
    total, count = len(benchmark), {"heterogeneous": config.basis, "homogeneous": 1, "random": 0}[config.basis_kind]
    before = count if config.new_tasks is None else total - config.new_tasks
    if not count <= before < total:
        new = 1 if config.new_tasks is None else config.new_tasks
        raise Refusal(f"basis must leave new tasks: it takes {count} and they {new}, {benchmark.name} has {total} tasks")
    spread = config.basis_from == "spread"
    return [k * before // count if spread else k for k in range(count)], list(range(before, total))


def unpacked(layer: sk.SubnetLayer) -> Tensor:
    """The live mask, bool (*shape)."""
    return sk.unpack(layer.bits, layer.scores.shape)


def live_value(layer: sk.SubnetLayer) -> Tensor:
    """The live real mask (*shape): the score over its initial bound where it is open; gradients go straight through to every score."""
    value = layer.scores * layer.scores[0].numel() ** 0.5
    return value + (value.detach() * unpacked(layer) - value.detach())
