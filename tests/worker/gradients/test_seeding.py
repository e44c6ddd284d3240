from __future__ import annotations

import random

import numpy as np
import torch

from worker.gradients.backend import CpuBackend
from worker.gradients.seeding import COMPUTE, DATA, mix, seed_all


def _draw() -> tuple[float, float, float]:
    return float(torch.rand(())), float(np.random.rand()), random.random()


def test_the_same_place_draws_the_same_and_another_does_not() -> None:
    draws = []
    for place in [(0, COMPUTE, 1, 2), (0, COMPUTE, 1, 2), (1, COMPUTE, 1, 2), (0, DATA, 1, 2), (0, COMPUTE, 2, 1)]:
        seed_all(*place, backend=CpuBackend())
        draws.append(_draw())
    assert draws[0] == draws[1]
    assert len(set(draws)) == 4


def test_nearby_seeds_have_nothing_in_common() -> None:
    values = {mix(seed, 0, step, m) for seed in range(10) for step in range(100) for m in range(10)}
    assert len(values) == 10_000
    changed = [(mix(0, 0, step, 0) ^ mix(0, 0, step, 1)).bit_count() for step in range(1000)]
    assert 30 < sum(changed) / len(changed) < 34  # half of 64 bits


def test_the_finalizer_is_that_of_splitmix64() -> None:
    # The first output of Vigna's splitmix64.c seeded with 1234567.
    assert mix(1234567) == 6457827717110365317
