"""The masks of ImpressLearn's basis: how they are trained, one by one, at once, or by several processes, or drawn."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

import subnet_kernels as sk
from subnet_kernels import optim
from subnet_pipelines.benchmarks.base import Task
from subnet_pipelines.chance import seeded
from subnet_pipelines.methods.base import Phase
from subnet_pipelines.methods.masked import MaskedMethod, entry_name
from subnet_pipelines.processes import hand_over, shared_folder, taken
from subnet_pipelines.schedules import cosine
from subnet_pipelines.together import own_tensors


class Basis(MaskedMethod):
    """The part of ImpressLearn that makes the masks."""

    def plan_masks(self, task: Task) -> list[Phase]:
        """A phase for each mask of a basis task; further ones of the first task count down from 0 in the place of a task's number.

        Of several processes each trains some of the first task's masks, and the first one then takes all of them, in order.
        """
        c, place, process = self.config, self.basis_tasks.index(task.index), self.process
        several = place == 0 and self.seeds > 1
        shared = several and process.count > 1
        mine = range(self.seeds)[process.rank :: process.count] if shared else range(self.seeds if several else 1)
        numbered = [replace(task, index=-k) for k in mine] if several else [task]
        phases = []
        for i, k in enumerate(mine):
            then = partial(self.hand_over_mask, k) if shared else partial(self.commit_mask, mask_name(task.index, k), task)
            phase = self.mask_phase(numbered[i].index, "mask", then)
            if c.parallel_tasks == 1:
                phase = replace(phase, together=[numbered[i]]) if several else phase
            elif i % c.parallel_tasks:
                phase = self.together.waiting(phase, numbered[i])
            else:
                others = numbered[i + 1 :] if several else map(self.benchmark.task, self.basis_tasks[place + 1 :])
                others = list(itertools.islice(others, c.parallel_tasks - 1))
                phase = self.together.phase(phase, numbered[i], others, self.begin_mask, self.mask_optimizer)
            phases.append(phase)
        if shared and process.rank == 0:
            phases += [Phase("masks taken", steps=0, then=partial(self.take_mask, k, task)) for k in range(self.seeds)]
        return phases

    def mask_file(self, k: int) -> Path:
        """Where the process that trains mask k of the first task leaves it."""
        run = self.process.run_of(self.out)
        return shared_folder(run, "masks", self.config, self.benchmark.config, self.seed) / f"{k}.safetensors"

    def hand_over_mask(self, k: int) -> None:
        hand_over(self.mask_file(k), own_tensors(self.model))

    def take_mask(self, k: int, task: Task) -> None:
        self.run_live()
        self.model.load_state_dict({**self.model.state_dict(), **taken(self.mask_file(k))})
        self.commit_mask(mask_name(task.index, k), task)

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
        tensors = self.live_values() if self.config.mask == "real" else {}
        self.bank.commit(name, tensors={**tensors, "information": self.own_information(task)})

    def draw_masks(self, task: Task) -> None:
        """The masks that nobody trains: the top-k of fresh scores, which is any choice of k weights as likely as any other."""
        for k, name in enumerate(self.random):
            with seeded(self.seed, "random mask", k):
                self.bank.begin(scores="init")
            self.commit_mask(name, task)


def mask_name(task: int, k: int) -> str:
    """The bank's name of a task's mask number k."""
    return entry_name(task) + (f", seed {k}" if k else "")
