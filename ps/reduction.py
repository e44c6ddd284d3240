"""Adds up gradients along the canonical tree and measures them, block by block while they are in cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from ps.layout import BLOCK_NUMEL, Shard
from ps.tree import Node


class Measurer:
    """Sums of squares per segment, in float64. Holds one block of scratch."""

    def __init__(self) -> None:
        self._scratch = torch.empty(BLOCK_NUMEL, dtype=torch.float64)
        self._numpy = self._scratch.numpy()

    def __call__(self, block: torch.Tensor, starts: Sequence[int], out: NDArray[np.float64]) -> None:
        """Write the sum of squares of each segment of `block` to `out`.

        block: at most BLOCK_NUMEL elements, float32 or float64. starts: where its segments start.
        A sum is non-finite exactly when an element is (or, in float64, when its square is beyond range).
        """
        numel = block.numel()
        squares = self._scratch[:numel]
        squares.copy_(block)
        torch.mul(squares, squares, out=squares)
        np.add.reduceat(self._numpy[:numel], starts, out=out)


def reduce_and_measure(
    shard: Shard,
    plan: Sequence[tuple[Node, Node]],
    root: Node | None,
    gradients: Mapping[Node, torch.Tensor],
    measurer: Measurer,
) -> NDArray[np.float64]:
    """Carry out an addition plan on a shard, in place, and return the sum of squares of each of its segments.

    gradients: for each node, the shard's part of its gradient, shape (shard.numel,).
    """
    sums = np.zeros(sum(map(len, shard.segment_starts)))
    position = 0
    for (start, stop), starts in zip(shard.blocks, shard.segment_starts, strict=True):
        part = slice(start - shard.start, stop - shard.start)
        for to, from_ in plan:
            target = gradients[to][part]
            torch.add(target, gradients[from_][part], out=target)
        if root is not None and starts:
            measurer(gradients[root][part], starts, sums[position : position + len(starts)])
        position += len(starts)
    return sums
