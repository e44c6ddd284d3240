"""Deals micro-batches to workers so that the last of them is done as soon as can be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from heapq import heapify, heapreplace
from itertools import accumulate, pairwise


def deal(leaves: Sequence[int], speeds: Mapping[str, float]) -> dict[str, list[tuple[int, int]]]:
    """Split sorted `leaves` over workers, a consecutive part each, with the shortest time for the slowest part.

    speeds: micro-batches per second of each worker, any unit, all positive.

    Returns, for every worker that gets any, half-open ranges; a part with gaps in it becomes several ranges.
    """
    if not leaves or not speeds:
        return {}
    counts = dict.fromkeys(speeds, 0)
    # When each worker would be done with one micro-batch more; ties go to the first.
    done = [(1.0 / speed, order, worker) for order, (worker, speed) in enumerate(speeds.items())]
    heapify(done)
    for _ in leaves:
        _, order, worker = done[0]
        counts[worker] += 1
        heapreplace(done, ((counts[worker] + 1) / speeds[worker], order, worker))
    edges = accumulate(counts.values(), initial=0)
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
