"""Half-open ranges of numbers, and sets of micro-batches as the bits of an integer."""

from __future__ import annotations

from collections.abc import Iterable


def gaps(start: int, stop: int, taken: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """What of [start, stop) is in none of some half-open ranges, in order."""
    found = []
    for first, last in sorted(taken):
        if start < min(first, stop):
            found.append((start, min(first, stop)))
        start = max(start, last)
    if start < stop:
        found.append((start, stop))
    return found


def ranges(leaves: Iterable[int]) -> list[tuple[int, int]]:
    """Sorted numbers as half-open ranges."""
    if isinstance(leaves, range):
        return [(leaves.start, leaves.stop)] if leaves else []
    result: list[tuple[int, int]] = []
    for leaf in leaves:
        if result and result[-1][1] == leaf:
            result[-1] = (result[-1][0], leaf + 1)
        else:
            result.append((leaf, leaf + 1))
    return result


def leaves_of(bits: int) -> list[int]:
    """The members of a set, in order."""
    found = []
    while bits:
        lowest = bits & -bits
        found.append(lowest.bit_length() - 1)
        bits ^= lowest
    return found


def bits_of(parts: Iterable[tuple[int, int]]) -> int:
    """The micro-batches in half-open ranges, as a set."""
    bits = 0
    for low, high in parts:
        bits |= (1 << high) - (1 << low)
    return bits
