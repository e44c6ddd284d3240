"""Adds up gradients along the canonical tree and measures the sum, on all threads a server has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from ps.numerics.kernel import reduce_and_measure
from ps.numerics.threads import Threads
from ps.numerics.tree import Node
from ps.parameters.layout import Shard


class Reducer:
    """Carries out addition plans on one shard."""

    def __init__(self, shard: Shard, threads: Threads, ranges: Sequence[tuple[int, int]]) -> None:
        self._threads = threads
        self._segments = np.array(shard.segments, dtype=np.int64).reshape(-1, 2)
        starts = self._segments[:, 0]
        self._parts = [slice(*np.searchsorted(starts, range_)) for range_ in ranges]
        self._numel = shard.numel
        self._like = torch.empty(0, dtype=shard.layout.dtype).numpy()
        self._key: tuple[list[int], list[Node], Node] | None = None
        self._kept = (np.empty(0, np.int64), np.empty((0, 2), np.int64), 0)

    def __call__(
        self, plan: Sequence[tuple[Node, Node]], root: Node | None, gradients: Mapping[Node, torch.Tensor]
    ) -> NDArray[np.float64]:
        """Add in place and return the sum of squares of each segment of the shard; zeros when `root` is None.

        gradients: for each node, the shard's part of its gradient, shape (shard.numel,), contiguous.
        """
        sums = np.zeros(len(self._segments))
        if root is None:
            return sums
        addresses, additions, last = self._compiled(plan, root, gradients)
        self._threads.run(
            [
                partial(
                    reduce_and_measure,
                    self._like,
                    addresses,
                    self._numel,
                    additions,
                    last,
                    self._segments[part],
                    sums[part],
                )
                for part in self._parts
            ]
        )
        return sums

    def _compiled(
        self, plan: Sequence[tuple[Node, Node]], root: Node, gradients: Mapping[Node, torch.Tensor]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], int]:
        """The plan as the kernel takes it. Steps are alike, so the last one is kept."""
        addresses = [gradient.data_ptr() for gradient in gradients.values()]
        key = (addresses, list(gradients), root)
        if key != self._key:
            place = {node: index for index, node in enumerate(gradients)}
            additions = np.array([(place[to], place[from_]) for to, from_ in plan], dtype=np.int64).reshape(-1, 2)
            self._kept = np.array(addresses, dtype=np.int64), additions, place[root]
            self._key = key
        return self._kept
