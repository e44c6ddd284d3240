"""Adds up gradients along the canonical tree and measures the sum, on all threads a server has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from ps.kernel import reduce_and_measure
from ps.layout import Shard
from ps.threads import Threads
from ps.tree import Node


class Reducer:
    """Carries out addition plans on one shard."""

    def __init__(self, shard: Shard, threads: Threads, ranges: Sequence[tuple[int, int]]) -> None:
        self._threads = threads
        self._segments = np.array(shard.segments, dtype=np.int64).reshape(-1, 2)
        starts = self._segments[:, 0]
        self._parts = [slice(*np.searchsorted(starts, range_)) for range_ in ranges]
        self._numel = shard.numel
        self._like = torch.empty(0, dtype=shard.layout.dtype).numpy()

    def __call__(
        self, plan: Sequence[tuple[Node, Node]], root: Node | None, gradients: Mapping[Node, torch.Tensor]
    ) -> NDArray[np.float64]:
        """Add in place and return the sum of squares of each segment of the shard; zeros when `root` is None.

        gradients: for each node, the shard's part of its gradient, shape (shard.numel,), contiguous.
        """
        sums = np.zeros(len(self._segments))
        if root is None:
            return sums
        place = {node: index for index, node in enumerate(gradients)}
        addresses = np.array([gradient.data_ptr() for gradient in gradients.values()], dtype=np.int64)
        additions = np.array([(place[to], place[from_]) for to, from_ in plan], dtype=np.int64).reshape(-1, 2)
        calls = [
            partial(
                reduce_and_measure,
                self._like,
                addresses,
                self._numel,
                additions,
                place[root],
                self._segments[part],
                sums[part],
            )
            for part in self._parts
        ]
        self._threads.run(calls)
        return sums
