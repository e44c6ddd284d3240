"""Deals micro-batches to workers in proportion to their speed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise


def deal(leaves: Sequence[int], speeds: Mapping[str, float]) -> dict[str, list[tuple[int, int]]]:
    """Split sorted `leaves` over workers, each taking one consecutive part.

    speeds: micro-batches per second of each worker, any unit, all positive.

    Returns, for every worker that gets any, half-open ranges; a part with gaps in it becomes several ranges.
    """
    if not leaves or not speeds:
        return {}
    total = sum(speeds.values())
    edges, reached = [0], 0.0
    for speed in speeds.values():
        reached += speed
        edges.append(round(len(leaves) * reached / total))
    edges[-1] = len(leaves)
    parts = {worker: leaves[a:b] for worker, (a, b) in zip(speeds, pairwise(edges), strict=True)}
    return {worker: ranges(part) for worker, part in parts.items() if part}


def ranges(leaves: Sequence[int]) -> list[tuple[int, int]]:
    """Sorted numbers as half-open ranges."""
    result: list[tuple[int, int]] = []
    for leaf in leaves:
        if result and result[-1][1] == leaf:
            result[-1] = (result[-1][0], leaf + 1)
        else:
            result.append((leaf, leaf + 1))
    return result
