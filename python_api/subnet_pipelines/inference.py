"""Which task is this? The arithmetic of SupSup's inference without a task id (Wortsman et al. 2020, "Supermasks in Superposition").

All masks run at once, weighted by coefficients alpha (`subnet_kernels.superpose`); the gradient of an objective of the logits to
alpha says which mask to lean on. Everything here works on tensors alone and knows no model: the caller turns alphas into a gradient.

A candidate may also be a combination of masks (ImpressLearn; Bhardwaj et al.): a coefficient for every layer and mask.

Shape letters: B rows, C logits, K candidate tasks; `...` any leading dimensions, none where one decision serves the whole batch. Of
combinations: J candidates over K masks in L layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor


def entropy(logits: Tensor) -> Tensor:
    """H: the entropy of the softmax of each row. A confident output has little of it.

    logits: (B, C) -> (B,), in nats, differentiable.
    """
    log_p = logits.log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)


def information(logits: Tensor) -> Tensor:
    """Minus the information that rows give about their class: the mean entropy less the entropy of the mean softmax.

    The entropy alone is small too where all rows get the same class; here that gains nothing. logits: (B, C) -> 0-dim, in nats,
    differentiable.
    """
    mean = logits.log_softmax(-1).logsumexp(0) - math.log(len(logits))  # logarithm of the mean softmax
    return entropy(logits).mean() + (mean.exp() * mean).sum()


def g_objective(logits: Tensor, real: int) -> Tensor:
    """G: the logsumexp of each row, in which only the superfluous neurons pass a gradient.

    The network has more outputs than classes. Training pushes the superfluous ones down on data of a task, so G is small for the
    right mask; its value counts all logits, but its gradient sees the superfluous ones alone, because the first `real` are detached.

    logits: (B, C); real: number of classes, 0 <= real <= C -> (B,), differentiable. Raises ValueError if real is out of range.
    """
    if not 0 <= real <= logits.shape[-1]:
        raise ValueError(f"g_objective: real must be between 0 and the {logits.shape[-1]} logits of a row, got {real!r}")
    return torch.cat([logits[..., :real].detach(), logits[..., real:]], -1).logsumexp(-1)


def one_shot(grad: Tensor) -> Tensor:
    """The task whose coefficient would lower the objective most if it grew: argmin of the gradient over the last dimension.

    grad: (..., K), the gradient of the objective at equal alphas, one column for every candidate -> int64 (...). Of equal gradients
    the first wins, and NaN never wins over a number. Every column is a candidate: the authors also pass masks that no task has
    trained yet, whose gradient is exactly 0, so that these win wherever all trained ones are positive; to look at trained tasks
    only, pass their columns only.
    """
    return _nan_last(grad).argmin(-1)


class Whose(NamedTuple):
    """What `whose_batch` decided."""

    new: bool  # no candidate stands out: the batch is of a task that has no mask yet
    mask: int  # the candidate that would lower the objective most; where new, the number of masks allocated, the next one's place
    confidence: float  # the greatest softmax of -gradient, 1/n where all candidates are alike


def whose_batch(grad: Tensor, allocated: int, threshold: float = 1.125) -> Whose:
    """SupSup's rule where nobody tells the task in training: is the batch one of a known mask, and of which?

    grad: (n,), the gradient of the entropy at equal alphas to the `allocated` masks and, after them, to as many untrained ones as make
    n at least 5 in the authors' code. With p the greatest entry of softmax(-grad): new iff p < threshold / n (the paper has "close to
    uniform", the authors' code 1.125). The candidate found may be an untrained one. Reads the result back: a device is waited for.
    Raises ValueError unless 1 <= allocated <= n.
    """
    if grad.dim() != 1 or not 1 <= allocated <= len(grad):
        raise ValueError(
            f"whose_batch: expected a gradient to at least the {allocated!r} masks allocated, got {tuple(grad.shape)}"
        )
    confidence = (-grad).softmax(0).max().item()
    new = confidence < threshold / len(grad)
    return Whose(new, allocated if new else int(one_shot(grad)), confidence)


def binary_survivors(grad: Tensor, alive: Tensor, log_base: int = 2) -> Tensor:
    """One round of the binary rule: the candidates whose gradient is at most the lower median of those alive.

    In general at most the ((n - 1) // log_base)-th (from 0) of the n sorted gradients; log_base = 2 is the lower median. Ties at
    that value all survive, so that a round may eliminate nobody.

    grad: (..., K); alive: bool (..., K), at least one of each row -> bool (..., K). Raises ValueError if shapes differ, if nobody
    is alive, or if log_base < 2.
    """
    if grad.shape != alive.shape or alive.dtype != torch.bool:
        raise ValueError(
            f"binary_survivors: alive must be bool of grad's shape {tuple(grad.shape)}, got {alive.dtype} of {tuple(alive.shape)}"
        )
    if log_base < 2:
        raise ValueError(f"binary_survivors: log_base must be at least 2, got {log_base!r}")
    count = alive.sum(-1, keepdim=True)
    if (count == 0).any():
        raise ValueError("binary_survivors: every row must have a candidate alive, got one without")
    key = torch.where(alive, _nan_last(grad), math.inf)
    cut = key.sort(-1).values.gather(-1, (count - 1) // log_base)
    return alive & (key <= cut)


class Binary(NamedTuple):
    """What `infer_binary` found."""

    alphas: Tensor  # (..., K): equal on the survivors and 0 elsewhere, so one-hot where the search finished
    task: Tensor  # int64 (...): the survivor, or the first of several
    finished: Tensor  # bool (...): whether one candidate was left within the limit of rounds
    rounds: int  # gradients asked for


def infer_binary(
    gradient: Callable[[Tensor], Tensor],
    alive: Tensor,
    log_base: int = 2,
    max_rounds: int | None = None,
    dtype: torch.dtype | None = None,
) -> Binary:
    """Halve the candidates until one is left: SupSup's binary rule.

    gradient: alphas (..., K) -> gradient of the objective to them, (..., K); alive: bool (..., K), the candidates at the start
    (learned tasks); log_base: see `binary_survivors`; max_rounds: the limit, floor(log2(K) + 1) by default as in the authors' code,
    which identical masks would otherwise exceed for ever; dtype: of the alphas, by default torch's default dtype.

    Every round gives equal alphas to the survivors, asks for one gradient, and keeps the better part. With one candidate at the start
    the single round confirms it.
    """
    if max_rounds is None:
        max_rounds = math.floor(math.log2(alive.shape[-1]) + 1)
    dtype = dtype or torch.get_default_dtype()
    rounds = 0
    alphas = _equal(alive, dtype)
    finished = torch.zeros(alive.shape[:-1], dtype=torch.bool, device=alive.device)
    while rounds < max_rounds and not bool(finished.all()):
        alive = binary_survivors(gradient(alphas), alive, log_base)
        alphas = _equal(alive, dtype)
        finished = alive.sum(-1) == 1
        rounds += 1
    return Binary(alphas, alive.to(torch.uint8).argmax(-1), finished, rounds)


def collapse(beta: Tensor, candidates: Tensor) -> Tensor:
    """The coefficients over the masks that combinations weighed by beta come to: sum_j beta_j alpha^j, of which there are K a layer
    however many combinations there are.

    beta: (J,); candidates: (J, L, K) -> (L, K), differentiable.
    """
    return torch.einsum("j,jlk->lk", beta, candidates)


class Weighed(NamedTuple):
    """What `weigh_combinations` found."""

    first: Tensor  # (J,): the gradient to beta of the first batch, at equal beta
    beta: Tensor  # (passes, J): the weights after each pass


Rows = TypeVar("Rows")


def weigh_combinations(
    gradient: Callable[[Tensor, Rows], Tensor],
    candidates: Tensor,
    passes: Iterable[Iterable[Rows]],
    lr: float,
    step: str = "simplex",
) -> Weighed:
    """Whose combination is it? Gradient steps on the weights beta of all of them, from 1/J each, a step a batch of unlabelled rows.

    gradient: coefficients (L, K) and a batch -> the gradient of the objective to them, (L, K); candidates: (J, L, K); passes: the batches
    of each; step: "simplex", exponentiated gradient: beta is the softmax of -lr times the sum of the gradients so far, each less its mean
    and over its deviation over the candidates, so that lr knows no scale; "free": beta <- beta - lr * gradient.

    A step asks for one gradient to K coefficients a layer, whatever J is: by the chain rule that to beta_j is its product with alpha^j.
    Raises ValueError for another step.
    """
    if step not in ("simplex", "free"):
        raise ValueError(f"weigh_combinations: step must be simplex or free, got {step!r}")
    beta, after = candidates.new_full(candidates.shape[:1], 1 / len(candidates)), []
    first, drift = None, torch.zeros_like(beta)
    for batches in passes:
        for rows in batches:
            grad = torch.einsum("lk,jlk->j", gradient(collapse(beta, candidates), rows), candidates)
            first = grad if first is None else first
            if step == "free":
                beta = beta - lr * grad
            else:
                drift = drift - lr * standardised(grad)
                beta = drift.softmax(0)
        after.append(beta)
    return Weighed(first, torch.stack(after))


def standardised(grad: Tensor) -> Tensor:
    """Each row less its mean and over its deviation, 0 where all of it are alike: (..., K) -> (..., K)."""
    centred = grad - grad.mean(-1, keepdim=True)
    deviation = centred.square().mean(-1, keepdim=True).sqrt()
    return torch.where(deviation > 0, centred / deviation, 0)


def _equal(alive: Tensor, dtype: torch.dtype) -> Tensor:
    return alive.to(dtype) / alive.sum(-1, keepdim=True).to(dtype)


def _nan_last(grad: Tensor) -> Tensor:
    return torch.where(grad.isnan(), math.inf, grad)
