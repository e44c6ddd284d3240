"""Seeds everything random in a micro-batch from (seed, step, micro-batch)."""

from __future__ import annotations

import torch

from worker.data.randomness import seed_python
from worker.gradients.backend import Backend

_MASK = (1 << 64) - 1

COMPUTE, DATA, EVALUATE = range(3)


def mix(*numbers: int) -> int:
    """A 64-bit hash of integers: the finalizer of splitmix64 (Steele, Lea, Flood 2014) over their running sum."""
    state = 0
    for number in numbers:
        state = (state + number + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state


def seed_all(
    seed: int, purpose: int, step: int, micro_batch: int, *, backend: Backend, only_torch: bool = False
) -> None:
    """Seed torch, NumPy's global generator and `random` for one purpose in one micro-batch.

    only_torch: where no code runs that could draw from the others; they take ten times as long to seed.
    """
    value = mix(seed, purpose, step, micro_batch)
    torch.default_generator.manual_seed(value)
    backend.seed(value)
    if only_torch:
        return
    seed_python(value)
