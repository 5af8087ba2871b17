"""Chance: every use of it has a stream of its own, so that adding one moves no other and a resumed run replays nothing."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator

import torch


def seed_of(seed: int, *purpose: str | int) -> int:
    """A 63-bit seed from the run's seed and what the chance is for: `seed_of(1, "order", task, phase, epoch)`."""
    digest = hashlib.blake2b(repr((seed, *purpose)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def stream(seed: int, *purpose: str | int) -> torch.Generator:
    """A CPU generator of its own for one purpose; draw on the CPU and move, so that every device sees the same numbers."""
    return torch.Generator().manual_seed(seed_of(seed, *purpose))


@contextlib.contextmanager
def seeded(seed: int, *purpose: str | int) -> Iterator[None]:
    """Within the block torch's global CPU generator is the stream of that purpose; outside it is as it was.

    For code that takes no generator, such as the default initialisation of layers built on the CPU.
    """
    before = torch.get_rng_state()
    torch.default_generator.manual_seed(seed_of(seed, *purpose))  # torch.manual_seed would move the GPUs' generators too
    try:
        yield
    finally:
        torch.set_rng_state(before)


def generators(states: dict[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
    """The states of torch's global generators, CPU and the current CUDA device where one is used; set first where they are given."""
    if states is not None:
        torch.set_rng_state(states["cpu"])
        if "cuda" in states and torch.cuda.is_initialized():
            torch.cuda.set_rng_state(states["cuda"])
    cuda = {"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_initialized() else {}
    return {"cpu": torch.get_rng_state(), **cuda}
