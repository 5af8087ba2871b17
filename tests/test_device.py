"""Nothing of a training step waits for the device or lies on another one, shown without a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from recording import NoWaiting
from torch.utils import backend_registration

from subnet_kernels import optim, reference
from subnet_pipelines import METHODS
from subnet_pipelines.chance import generators, seeded

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.skipif(
    not (torch.cuda.is_available() or hasattr(backend_registration, "_setup_privateuseone_for_python_backend")),
    reason="this torch can pretend to have neither a GPU nor another device",
)
@pytest.mark.parametrize("name", METHODS)
def test_a_method_on_a_device_without_memory(name):
    """In a process of its own, for the device stays registered."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "python_api"), str(ROOT / "tests")))}
    argv = [sys.executable, str(ROOT / "tests" / "fake_device.py"), name]
    done = subprocess.run(argv, env=env, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout) > 100


def few(seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight, scores, grad = (torch.randn(9, 70, generator=generator) for _ in range(3))
    bits, frozen = (reference.pack(torch.rand(9, 70, generator=generator) < 0.4) for _ in range(2))
    return weight, scores, grad, bits, frozen


def test_the_reference_of_what_a_step_does_waits_for_nothing():
    """Where no kernel serves a GPU the reference does, op by op."""
    weight, scores, grad, bits, frozen = few()
    values = weight[reference.unpack(frozen, weight.shape)]
    w_eff, hints, zeros = torch.zeros_like(weight), torch.zeros(4, dtype=torch.float64), lambda: torch.zeros_like(weight)
    bank = reference.pack_bank(torch.rand(3, 9, 70) < 0.5)
    rate, step, x = torch.tensor(0.1, dtype=torch.float64), torch.zeros(()), torch.randn(5, 70)
    with NoWaiting():
        for ties in ("last", "first", "all"):
            reference.refresh_([scores], [weight], [100], [bits], [w_eff], [hints], "magnitude", ties)
        reference.refresh_threshold_([scores], [weight], 0.1, True, [bits], [w_eff])
        reference.restore_([weight], [frozen], [values])
        reference.straight_through(grad, weight, scores, bits, frozen)
        reference.masked_linear_grad_weight(torch.randn(5, 9), x, weight, scores, bits, frozen)
        reference.update_sgd_([weight], [grad], [zeros()], [frozen], rate, None, None, 0.9, 0.0, 0.1, True, False, False)
        reference.update_rmsprop_(
            [weight],
            [grad],
            [zeros()],
            [zeros()],
            [zeros()],
            [step],
            [frozen],
            rate,
            None,
            None,
            0.9,
            1e-8,
            0.1,
            0.5,
            True,
            False,
        )
        reference.update_adam_(
            [weight, scores], [grad, grad], [zeros(), zeros()], [zeros(), zeros()], [], [step, step.clone()], [frozen, None],
            rate, None, None, 0.9, 0.999, 1e-8, 0.1, False, False, True, [1, 0, 1], [bits],
        )  # fmt: skip
        reference.superpose(weight, bank, torch.rand(3))
        reference.superpose_grad(grad, weight, bank)
        reference.alpha_grad(x, torch.randn(5, 9), weight, bank)
        reference.stats(bits, frozen)
        reference.overlap(bank)


class Bank:
    """As much of a bank as `freeze` asks for: one layer with frozen weights."""

    def __init__(self, weight, frozen):
        self.weight, self.frozen = torch.nn.Parameter(weight), frozen

    def layers(self):
        return [self]


@pytest.mark.parametrize("kind", ["SGD", "Adam", "RMSprop"])
def test_steps_that_make_their_state_wait_for_nothing(kind):
    weight, *_, frozen = few()
    bank = Bank(weight, frozen)
    options = {"momentum": 0.9} if kind == "SGD" else {}
    ours, theirs = getattr(optim, kind)([bank.weight], 0.1, **options), torch.optim.SGD([bank.weight], 0.1, momentum=0.9)
    optim.freeze(theirs, bank)
    for _ in range(2):
        bank.weight.grad = torch.randn_like(weight)
        ours.param_groups[0]["lr"] /= 2
        with NoWaiting():
            ours.step()
            theirs.step()
    ours.grad_scale, ours.found_inf = torch.tensor(2.0), torch.tensor(0.0)  # as GradScaler does
    ours.state.clear()
    with NoWaiting():
        ours.step()


def test_a_seed_moves_no_other_generator():
    before = torch.random.get_rng_state()
    with seeded(1, "purpose"):
        first = torch.rand(3)
    with seeded(1, "purpose"):
        assert torch.equal(torch.rand(3), first)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert ("cuda" in generators()) == torch.cuda.is_initialized()
