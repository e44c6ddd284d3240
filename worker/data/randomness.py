"""Random generators for code that must neither disturb nor be disturbed by what else runs in the process."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def epoch_seed(seed: int, epoch: int) -> int:
    """A seed for an epoch."""
    return int(np.random.SeedSequence([seed, epoch]).generate_state(1, np.uint64)[0] >> 1)


def seed_python(seed: int) -> None:
    """Seed the generators of NumPy and of Python's `random`."""
    np.random.seed(seed & 0xFFFFFFFF)  # user code draws from the global generator
    random.seed(seed)


class OwnRandomness:
    """The global generators of torch, NumPy and Python, as one reader of data sees them."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._states: tuple[Any, Any, Any] | None = None

    @contextmanager
    def used(self) -> Iterator[None]:
        """Code in this context draws from these generators."""
        outside = _states()
        if self._states is None:
            torch.default_generator.manual_seed(self._seed)
            seed_python(self._seed)
        else:
            _restore(self._states)
        try:
            yield
        finally:
            self._states = _states()
            _restore(outside)


def _states() -> tuple[Any, Any, Any]:
    return torch.default_generator.get_state(), np.random.get_state(), random.getstate()


def _restore(states: tuple[Any, Any, Any]) -> None:
    torch.default_generator.set_state(states[0])
    np.random.set_state(states[1])
    random.setstate(states[2])
