"""Combinations of parameters: a few that cover every pair of values for each run, all of them for `make test-full`."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from itertools import combinations, product
from typing import Any

import pytest


def pairwise_first(*values: Sequence[Hashable]) -> list[Any]:
    """All combinations as pytest parameters; those that are not needed to cover every pair are marked `full`.

    Greedy: always the combination with the most pairs that none before has.
    """
    every = list(product(*values))
    uncovered = {pair for combination in every for pair in _pairs(combination)}
    chosen: set[tuple[Hashable, ...]] = set()
    while uncovered:
        best = max(every, key=lambda combination: len(uncovered & _pairs(combination)))
        chosen.add(best)
        uncovered -= _pairs(best)
    return [pytest.param(*c) if c in chosen else pytest.param(*c, marks=pytest.mark.full) for c in every]


def _pairs(combination: tuple[Hashable, ...]) -> set[tuple[tuple[int, Hashable], ...]]:
    return set(combinations(enumerate(combination), 2))


def full(*values: Any, name: str | None = None) -> Any:
    """A parameter for `make test-full` only. name: in the id of the test."""
    return pytest.param(*values, marks=pytest.mark.full, id=name)
