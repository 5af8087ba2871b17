"""SupSup: supermasks in superposition (Wortsman et al., NeurIPS 2020). Weights stay at their random values; a task is a mask.

Without a task id all masks run at once, and the gradient to their coefficients says whose task it is.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

import subnet_kernels as sk
from subnet_pipelines import calibration, inference
from subnet_pipelines.benchmarks.base import Batch, Benchmark, Task
from subnet_pipelines.bounds import Count, NotNegative, Positive, Several, Share
from subnet_pipelines.capacity import csc_bytes
from subnet_pipelines.chance import seeded
from subnet_pipelines.errors import NotLearnt, Refusal
from subnet_pipelines.methods.base import Clock, MethodConfig, Phase, Prediction
from subnet_pipelines.methods.dense import OPTIMIZERS, Network
from subnet_pipelines.methods.masked import MaskedMethod, entry_name
from subnet_pipelines.models import MODELS, batch_norms, batch_statistics, use_batch_statistics, use_running_statistics
from subnet_pipelines.schedules import cosine
from subnet_pipelines.together import Together


@dataclass(frozen=True)
class SupSupConfig(MethodConfig):
    """SupSup; the defaults are the recipe of the authors' code on Permuted MNIST without task ids."""

    epochs: int = 3
    """Epochs of a task, where iterations is null."""
    iterations: int | None = 1000
    """Steps of a task."""
    batch_size: int = 128
    """Rows of a training batch, and of a unit under inference_unit batch."""
    model: Network = "lenet-300-100"
    """The network."""
    width: Positive = 1.0
    """Times the network's own width, where it can be had in others (lenet-300-100, fc-1024, gem-resnet-18, resnet-50)."""
    head: Literal["masked", "dense"] = "masked"
    """The last layer: fixed and masked as the others are (the authors' code), or learnt, one for each task, as in WSN's comparison."""
    norm: Literal["task", "batch"] = "task"
    """What batch norms use at test: statistics that each task gathers over its training rows at its end and keeps for itself (in the
    authors' code averages over the last steps of training), or those of the test batch."""
    outputs: int | None = 100
    """Width of the last layer: the classes, and superfluous neurons beyond them; null is the classes alone."""
    mask: Literal["threshold", "topk", "signed"] = "threshold"
    """A weight is open where its score is >= 0 (the authors' code on MNIST), or where its size is among the top-k of its layer (the paper);
    signed: the same, and open weights of negative score change their sign."""
    density: Share = 0.5
    """Kept share of every layer under mask topk and signed."""
    erdos_renyi: Positive | None = None
    """s of the Erdos-Renyi rule in place of density: a layer keeps min(.5, s (out + in) / (out in kernel)) of its weights."""
    weight_init: Literal["signed_constant", "kaiming_normal"] = "signed_constant"
    """The fixed weights: +-sqrt(2 / fan), or normal of that deviation."""
    fan: Literal["fan_in", "fan_out"] = "fan_in"
    """The fan of weight_init: weights that an output reads, or that read an input."""
    scale_fan: bool = False
    """Count the kept share of the fan alone, so that outputs keep their size at every density (hidden-networks)."""
    transfer: Literal["none", "scores", "masks"] = "none"
    """From the second task on scores start fresh, from the mean of earlier tasks' scores (the authors' code), or from the mean of their
    masks (the paper)."""
    optimizer: Literal["rmsprop", "adam", "sgd"] = "rmsprop"
    """Of the scores; made afresh for each task."""
    lr: Positive = 1e-4
    """Its learning rate."""
    weight_decay: NotNegative = 0.0
    """L2 of the scores, in the optimizer (the authors' code has 1e-4 on Split CIFAR-100, where its scripts do not name it)."""
    schedule: Literal["constant", "cosine"] = "constant"
    """The rate over a task: as it is, or down to 0 (the authors' code in scenario GG)."""
    objective: Literal["G", "H"] = "G"
    """What one-shot and binary inference differentiate: logsumexp that only superfluous neurons feel (G), or the entropy (H)."""
    inference: Literal["one-shot", "binary", "exhaustive"] = "one-shot"
    """The task of least gradient at equal coefficients; halving the candidates; or every mask tried, that of least entropy winning."""
    log_base: Several = 2
    """Binary inference keeps one in log_base of the candidates each round."""
    inference_unit: Literal["row", "n", "batch"] = "row"
    """Who decides together: every row for itself, unit_rows rows, or a batch of batch_size rows."""
    unit_rows: Count = 16
    """Rows of a unit under inference_unit n."""
    deciding_rows: Count | None = None
    """First rows of a unit that decide for all of it; null is all of them (the authors' code lets one decide for 128)."""
    parallel_tasks: Count = 1
    """Tasks that are trained at once, to the same masks as one by one: their products are their own, selection and update one call."""
    outsiders: Literal["none", "noise", "fashion-mnist"] = "none"
    """At the end of a run compare the confidence on test rows with that on inputs of no task: even noise, or Fashion-MNIST."""

    def check(self) -> None:
        super().check()
        if self.mask == "threshold" and (self.erdos_renyi is not None or self.scale_fan):
            word = "scale_fan" if self.scale_fan else "erdos_renyi"
            raise Refusal(f"{word} needs a kept share, which mask topk or signed has and mask threshold has not")
        if self.transfer != "none" and self.parallel_tasks > 1:
            raise Refusal(
                f"transfer must be none where {self.parallel_tasks} tasks are trained at once: a task then has no earlier ones"
            )


class SupSup(MaskedMethod):
    """A mask for each task over fixed random weights; given the task, or inferring it."""

    name = "supsup"
    Config = SupSupConfig
    static_step = True
    FIDELITY = {"sound": {}, "code": {"inference_unit": "batch", "deciding_rows": 1}, "paper": {}}
    evaluation = ("objective", "inference", "log_base", "inference_unit", "unit_rows", "deciding_rows", "outsiders")
    scenarios = ("GG", "GNs", "GNu")
    elsewhere = {"NNs": "nns"}

    def __init__(self, config: SupSupConfig, benchmark: Benchmark, seed: int):
        super().__init__(config, benchmark, seed)
        self.classes = benchmark.classes
        outputs = outputs_of(config, benchmark)
        if not benchmark.scenario.test_id and config.objective == "G" and outputs == self.classes:
            raise Refusal(f"outputs must exceed the {self.classes} classes for objective G, which reads the superfluous neurons")
        if not benchmark.scenario.test_id and config.head == "dense":
            raise Refusal(f"head must be 'masked' in scenario {benchmark.config.scenario}, where no task id is given at test")
        if config.outsiders != "none":
            if benchmark.scenario.test_id:
                raise Refusal(
                    f"outsiders asks how sure a task is inferred, scenario {benchmark.config.scenario} gives it at test"
                )
            calibration.pictures(benchmark, config.outsiders, 1)  # what is missing is said before the run and not at its end
        self.benchmark = benchmark
        share = config.density if config.erdos_renyi is None else sk.ErdosRenyi(config.erdos_renyi)
        select = {"select": config.mask} if config.mask == "threshold" else {"select": config.mask, "density": share}
        weights = {"weight_init": config.weight_init, "fan": config.fan, "scale_fan": config.scale_fan}
        with seeded(seed, "init"):
            network = MODELS[config.model](outputs, *benchmark.input_shape, **wide(config))
            (use_running_statistics if config.norm == "task" else use_batch_statistics)(network)
            own = ["head"] if config.head == "dense" else []
            self.norms = batch_norms(network) if config.norm == "task" else []
            self.adopt(network, sk.SubnetConfig(per_task=own, **weights, **select))
        if config.transfer != "none":
            for i, layer in enumerate(self.bank.layers()):
                self.register_buffer(f"total_{i}", torch.zeros_like(layer.scores, requires_grad=False))
        if config.parallel_tasks > 1:
            self.together = Together(self.model, self.run_live)
            self.static_step = False  # a step has a batch of each task

    def plan(self, task: Task) -> list[Phase]:
        c = self.config
        phase = Phase(
            "mask",
            epochs=c.epochs,
            steps=c.iterations,
            batch_size=c.batch_size,
            optimizer=self.optimizer,
            schedule=cosine() if c.schedule == "cosine" else None,
            first=lambda: self.begin(task.index),
            then=lambda: self.commit(task),
        )
        if c.parallel_tasks == 1:
            return [phase]
        last = min(task.index + c.parallel_tasks, len(self.benchmark))
        others = [self.benchmark.task(i) for i in range(task.index + 1, last)]
        return [self.together.phase(phase, task, others, self.begin, self.optimizer)]

    def step(self, batch: Batch | tuple[Batch, ...], opt: torch.optim.Optimizer, clock: Clock) -> dict[str, Tensor]:
        return super().step(batch, opt, clock) if self.config.parallel_tasks == 1 else self.together.step(batch, opt)

    def begin(self, task: int) -> None:
        with seeded(self.seed, "scores", task):
            self.bank.begin(scores="init")
        if self.config.transfer != "none" and self.bank.masks:
            self.take_over()

    def optimizer(self, networks: Sequence[nn.Module] | None = None) -> torch.optim.Optimizer:
        """Of the scores of these networks, and of their heads where those learn; default the method's own."""
        c, networks = self.config, networks or [self.model]
        modules = [module for network in networks for module in network.modules()]
        learning = [module.scores for module in modules if isinstance(module, sk.SubnetLayer)]
        if c.head == "dense":
            learning += [parameter for network in networks for parameter in network.head.parameters()]
        return OPTIMIZERS[c.optimizer](learning, c.lr, weight_decay=c.weight_decay, fuse_ste=True)

    def commit(self, task: Task) -> None:
        self.run_live()
        self.gather_norms(task, self.model, self.model)
        self.bank.commit(entry_name(task.index))
        if self.config.transfer != "none":
            self.remember()

    # ---- what a task takes over from earlier ones -------------------------------------------------------------------

    @property
    def totals(self) -> list[Tensor]:
        """For each layer the sum of the earlier tasks' scores or masks: one tensor, however many tasks there were."""
        return [self.get_buffer(f"total_{i}") for i in range(len(self.bank.layers()))]

    @torch.no_grad()
    def remember(self) -> None:
        for layer, total in zip(self.bank.layers(), self.totals):
            mask = sk.unpack(layer.bits, layer.scores.shape)
            kept = {"threshold": mask, "topk": mask, "signed": layer.scores.sign() * mask}[self.config.mask]
            total += layer.scores if self.config.transfer == "scores" else kept

    @torch.no_grad()
    def take_over(self) -> None:
        """Let the fresh scores start from the mean of earlier ones, or of earlier masks."""
        earlier = len(self.bank.masks)
        for layer, total in zip(self.bank.layers(), self.totals):
            mean, fresh = total / earlier, layer.scores
            if self.config.transfer == "masks":
                mean = scores_of(mean, fresh, earlier, self.config.mask)
            fresh.copy_(mean)

    # ---- whose task is it? ------------------------------------------------------------------------------------------

    def predict(self, x: Tensor, task: int | None) -> Prediction:
        if task is not None:
            return super().predict(x, task)
        if not len(self.bank):
            raise NotLearnt("no task has been learnt that could be inferred")
        tasks = self.infer(x)
        logits = None
        for k in tasks.unique().tolist():
            rows = tasks == k
            part = super().predict(x[rows], k).logits
            logits = part.new_empty((len(x), part.shape[1])) if logits is None else logits
            logits[rows] = part
        return Prediction(logits, tasks)

    def infer(self, x: Tensor) -> Tensor:
        """The task of every row, int64 (B,): x (B, ...)."""
        c = self.config
        if c.inference_unit == "row":
            return self.infer_rows(x)
        size = c.unit_rows if c.inference_unit == "n" else c.batch_size
        if c.inference == "exhaustive":
            entropies = self.entropies(x).split(size)
            return torch.cat([inference.one_shot(unit[: c.deciding_rows].mean(0)).expand(len(unit)) for unit in entropies])
        find = self.one_shot if c.inference == "one-shot" else self.binary
        return torch.cat([find(unit[: c.deciding_rows]).expand(len(unit)) for unit in x.split(size)])

    def objective(self, logits: Tensor) -> Tensor:
        return inference.g_objective(logits, self.classes) if self.config.objective == "G" else inference.entropy(logits)

    # rows together: batch norms take the statistics of the rows that decide

    @torch.enable_grad()
    def gradient(self, x: Tensor, alphas: Tensor | None) -> Tensor:
        """Of the mean objective to the coefficients (K,), at these or at equal ones."""
        alone = len(x) == 1  # and has no statistics
        alphas = self.bank.superpose(None if alphas is None else alphas.requires_grad_(), mean_state=alone)
        with batch_statistics([] if alone else self.norms):
            return torch.autograd.grad(self.objective(self.model(x)).mean(), alphas)[0]

    def one_shot(self, x: Tensor) -> Tensor:
        return inference.one_shot(self.gradient(x, None))

    def binary(self, x: Tensor) -> Tensor:
        ask: Callable[[Tensor], Tensor] = lambda alphas: self.gradient(x, alphas.to(x.dtype))  # noqa: E731
        alive = torch.ones(len(self.bank), dtype=torch.bool, device=x.device)
        return inference.infer_binary(ask, alive, self.config.log_base).task

    # every row for itself: batch norms take the candidates' mean statistics

    def infer_rows(self, x: Tensor) -> Tensor:
        """The task of every row (B,), by what the row says alone."""
        if self.config.inference == "exhaustive":
            return inference.one_shot(self.entropies(x))
        if self.config.inference == "one-shot":
            return inference.one_shot(self.bank.row_alpha_grad(x, self.objective))
        alive = torch.ones((len(x), len(self.bank)), dtype=torch.bool, device=x.device)
        return inference.infer_binary(lambda alphas: self.row_gradients(x, alphas > 0), alive, self.config.log_base).task

    def row_gradients(self, x: Tensor, alive: Tensor) -> Tensor:
        """Of every row's objective to equal coefficients of its own candidates, bool (B, K); rows of the same ones run together.

        A row with one candidate is decided and gets 0, as all get for what is no candidate.
        """
        grads, names = x.new_zeros(alive.shape), self.bank.masks
        sets, which = alive.unique(dim=0, return_inverse=True)
        for i, members in enumerate(sets):
            columns, rows = members.nonzero().flatten(), (which == i).nonzero().flatten()
            if len(columns) > 1:
                over = [names[k] for k in columns.tolist()]
                grads[rows[:, None], columns] = self.bank.row_alpha_grad(x[rows], self.objective, over=over)
        return grads

    def entropies(self, x: Tensor) -> Tensor:
        """Of every row through every learnt mask, each with its own statistics: (B, K)."""
        return torch.stack([inference.entropy(super(SupSup, self).predict(x, k).logits) for k in range(len(self.bank))], 1)

    # ---- what is reported and kept ----------------------------------------------------------------------------------

    def report(self) -> dict[str, Any]:
        return {**super().report(), "outputs": outputs_of(self.config, self.benchmark)}

    def final_report(self) -> dict[str, Any]:
        report, masks = super().final_report(), self.bank.masks
        opened = sum(int(sk.count(bits)) for name in masks for bits in self.bank.opened(name).values())
        numbers = sum(t.numel() for name in masks for t in self.bank[name].state.values() if t.is_floating_point())
        report["capacity"] = {**report["capacity"], "csc_bytes": csc_bytes(opened, numbers)}
        return report if self.config.outsiders == "none" else {**report, "outsiders": self.compare_outsiders()}

    @torch.no_grad()
    def compare_outsiders(self) -> dict[str, Any]:
        """How sure the method is on rows of its tasks and on inputs of none (calibration.py)."""
        self.eval()
        sides = calibration.own_rows(self.benchmark), calibration.outside_rows(self.benchmark, self.config.outsiders)
        sure, ahead = [], []
        for x in sides:
            logits = torch.cat([self.predict(part, None).logits for part in x.split(self.config.batch_size)])
            sure.append(logits.softmax(1).amax(1))
            ahead.append(calibration.gap(self.bank.row_alpha_grad(x, self.objective)))
        found = {"kind": self.config.outsiders, "rows": len(sides[0]), "outside_rows": len(sides[1])}
        return {**found, "confidence": calibration.summary(*sure), "gap": calibration.summary(*ahead)}

    def fixed(self) -> list[str]:
        """Names of the weights, which the seed says: neither the bank nor a checkpoint holds them."""
        return [f"model.{name}.weight" for name in self.bank.layer_names]

    def state(self) -> dict[str, Any]:
        state = super().state()
        for name in self.fixed():
            del state["tensors"][name]
        return state

    def with_fixed(self, state: dict[str, Any]) -> dict[str, Any]:
        """A state with the weights beside, as made of the seed."""
        mine = self.state_dict()
        return {**state, "tensors": {**state["tensors"], **{name: mine[name] for name in self.fixed()}}}

    def load(self, state: dict[str, Any]) -> None:
        super().load(self.with_fixed(state))  # which reads the bank, and compares its hash of the weights


def outputs_of(config: Any, benchmark: Benchmark) -> int:
    """Width of the last layer. Raises Refusal where that is less than the classes."""
    if config.outputs is not None and config.outputs < benchmark.classes:
        raise Refusal(f"outputs must be at least the {benchmark.classes} classes of {benchmark.name}, got {config.outputs}")
    return benchmark.classes if config.outputs is None else config.outputs


def wide(config: SupSupConfig) -> dict[str, float]:
    """What a network's maker is told of the width. Raises Refusal where it has one alone."""
    if config.width == 1:
        return {}
    if "width" not in inspect.signature(MODELS[config.model]).parameters:
        raise Refusal(f"width must be 1 for model {config.model}, which has one width, got {config.width}")
    return {"width": config.width}


def scores_of(mean: Tensor, fresh: Tensor, earlier: int, mask: str) -> Tensor:
    """Scores that select by the mean of so many earlier masks, of the size of the fresh ones, which decide where the mean does not.

    mean: (*shape), 0 to 1, or -1 to 1 of signed masks; fresh: the same shape, at most 1/sqrt(fan_in) large. The mean itself would be no
    start: a score of 0 has no sign, and through |score| no gradient.
    """
    bound = fresh[0].numel() ** -0.5
    if mask == "threshold":
        return bound * (2 * mean - 1) + fresh / earlier
    return torch.where(mean != 0, mean, fresh).sign() * (bound * mean.abs() + fresh.abs() / earlier)
