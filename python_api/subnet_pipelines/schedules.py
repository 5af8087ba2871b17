"""Learning-rate schedules: functions of progress, and the one that watches validation."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.optim import Optimizer


def set_lr(group: dict[str, Any], lr: float) -> None:
    """Set a parameter group's learning rate, in place where it is a tensor."""
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(lr)
    else:
        group["lr"] = lr


def cosine(warm_up: float = 0.0) -> Callable[[float], float]:
    """From 1 to 0 along half a cosine, after a linear rise over the first `warm_up` share of the steps."""

    def factor(progress: float) -> float:
        if progress < warm_up:
            return progress / warm_up
        return 0.5 * (1 + math.cos(math.pi * (progress - warm_up) / (1 - warm_up)))

    return factor


@dataclass
class Plateau:
    """After `patience` epochs without a better validation loss the rate is divided by `factor`; below lr_min the phase ends.

    The count starts anew at each improvement and each division (the loop of HAT's, GPM's and WSN's code).
    """

    patience: int = 6
    factor: float = 2.0
    lr_min: float = 1e-6
    left: int = field(init=False)

    def __post_init__(self) -> None:
        self.left = self.patience

    def epoch(self, improved: bool, opt: Optimizer) -> bool:
        """Called after each epoch; False where the phase is to end."""
        self.left = self.patience if improved else self.left - 1
        if self.left > 0:
            return True
        self.left = self.patience
        for group in opt.param_groups:
            set_lr(group, float(group["lr"]) / self.factor)
        return max(float(group["lr"]) for group in opt.param_groups) >= self.lr_min
