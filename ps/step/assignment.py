"""Deals micro-batches to workers so that the last of them is done as soon as can be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from heapq import heapify, heapreplace
from operator import truediv

from ps.numerics.ranges import ranges


class Dealer:
    """Remembers the last deal, which is kept for as long as no other would be done sooner."""

    def __init__(self) -> None:
        self._shares: list[int] = []

    def __call__(self, leaves: Sequence[int], speeds: Mapping[str, float]) -> dict[str, list[tuple[int, int]]]:
        """Split sorted `leaves` over workers, a consecutive part each, with the shortest time for the slowest part.

        speeds: micro-batches per second of each worker, any unit, all positive.

        Returns, for every worker that gets any, half-open ranges; a part with gaps in it becomes several ranges.
        """
        if not leaves or not speeds:
            return {}
        rates = list(speeds.values())
        if not is_quickest(self._shares, rates, len(leaves)):
            self._shares = quickest_shares(len(leaves), rates)
        parts = {}
        start = 0
        for worker, count in zip(speeds, self._shares, strict=True):
            if count:
                parts[worker] = ranges(leaves[start : start + count])
                start += count
        return parts


def is_quickest(shares: Sequence[int], speeds: Sequence[float], count: int) -> bool:
    """Whether these shares of `count` leaves end as soon as any can: to relieve the last one would not help."""
    if len(shares) != len(speeds) or sum(shares) != count:
        return False
    last = max(map(truediv, shares, speeds))
    return all(last <= (share + 1) / speed for share, speed in zip(shares, speeds, strict=True))


def quickest_shares(count: int, speeds: Sequence[float]) -> list[int]:
    """How many of `count` leaves each worker gets."""
    shares = [0] * len(speeds)
    # When each worker would be done with one micro-batch more; ties go to the first.
    done = [(1.0 / speed, worker) for worker, speed in enumerate(speeds)]
    heapify(done)
    for _ in range(count):
        worker = done[0][1]
        shares[worker] += 1
        heapreplace(done, ((shares[worker] + 1) / speeds[worker], worker))
    return shares
