"""Update: optimizer steps that leave frozen weights and their state bit-identical. `subnet_kernels.optim` calls them."""

from __future__ import annotations

from subnet_kernels import reference
from subnet_kernels.ops._library import define

_PAIRS = "int[] pairs=[], Tensor[]? beside=None) -> ()"  # weights and scores with one gradient: reference.paired_gradients

update_sgd_ = define(
    "update_sgd_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momentum_buffers, Tensor?[] frozen, Tensor lr, Tensor? grad_scale, "
    "Tensor? found_inf, float momentum, float dampening, float weight_decay, bool nesterov, bool maximize, bool first_step, "
    + _PAIRS,
    reference.update_sgd_,
    lambda *_, **__: None,
)
update_rmsprop_ = define(
    "update_rmsprop_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] square_avgs, Tensor(c!)[] grad_avgs, "
    "Tensor(d!)[] momentum_buffers, Tensor(e!)[] steps, Tensor?[] frozen, Tensor lr, Tensor? grad_scale, Tensor? found_inf, "
    "float alpha, float eps, float weight_decay, float momentum, bool centered, bool maximize, " + _PAIRS,
    reference.update_rmsprop_,
    lambda *_, **__: None,
)
update_adam_ = define(
    "update_adam_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] max_exp_avg_sqs, "
    "Tensor(e!)[] steps, Tensor?[] frozen, Tensor lr, Tensor? grad_scale, Tensor? found_inf, float beta1, float beta2, float eps, "
    "float weight_decay, bool amsgrad, bool maximize, bool decoupled, " + _PAIRS,
    reference.update_adam_,
    lambda *_, **__: None,
)
