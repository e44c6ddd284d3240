"""Spreads a shard's work over the cores that waiting workers leave idle.

What is computed does not depend on their number: every thread has whole blocks, and no kernel adds across blocks.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise

import torch

from ps.parameters.layout import BLOCK_NUMEL, Shard

MIN_NUMEL = 32 * BLOCK_NUMEL  # less is done sooner than another core has woken up and fetched it
MAX_COPYING = 4  # threads, which memory keeps busy


def split(shard: Shard, num_threads: int) -> tuple[tuple[int, int], ...]:
    """Cut a shard into ranges of whole blocks, one for each useful thread, in elements from the start of the shard."""
    useful = max(1, min(num_threads, shard.numel // MIN_NUMEL))
    first, last = shard.start // BLOCK_NUMEL, -(-shard.stop // BLOCK_NUMEL)
    blocks = [first + (last - first) * i // useful for i in range(1, useful)]
    edges = [block * BLOCK_NUMEL - shard.start for block in blocks]
    return tuple(pairwise([0, *edges, shard.numel]))


def copy_all(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Copy the second tensor of each pair to the first, on several cores. All are flat; those of a pair are alike."""
    pieces = [
        piece
        for to, from_ in pairs
        for piece in zip(to.split(MIN_NUMEL), from_.split(MIN_NUMEL), strict=True)  # type: ignore[no-untyped-call]
    ]

    def copy(own: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
        for to, from_ in own:
            to.copy_(from_)

    count = max(1, min(MAX_COPYING, os.cpu_count() or 1, sum(to.numel() for to, _ in pieces) // MIN_NUMEL))
    Threads(count).run([partial(copy, pieces[index::count]) for index in range(count)])


class Threads:
    """Runs calls side by side, the first in the caller's own thread. To gain, their code must release the GIL."""

    def __init__(self, num_threads: int) -> None:
        # A thread takes over torch.set_num_threads only when it first asks, and LAPACK does not: it would then share
        # its work with as many threads as are idle, which shows in the bits.
        ask = torch.get_num_threads
        self._pool = ThreadPoolExecutor(num_threads - 1, initializer=ask) if num_threads > 1 else None

    def run(self, calls: Sequence[Callable[[], None]]) -> None:
        """Return when all are done. Raises what the first one to fail raised."""
        if len(calls) == 1:
            calls[0]()
            return
        futures = [self._pool.submit(call) for call in calls[1:]] if self._pool is not None else []
        for call in calls[: len(calls) - len(futures)]:
            call()
        for future in futures:
            future.result()
