"""As ps.numerics.reduce_cpu, for gradients on a GPU, in operations of PyTorch.

Every segment is added up on its own, in an order that depends on its length alone, so the number of shards does not
show in the bits. They are not those of the CPU's kernel.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain

import numpy as np
import torch
from numpy.typing import NDArray

from ps.numerics.tree import Node
from ps.parameters.layout import BLOCK_NUMEL, Shard

CHUNK_NUMEL = 128 * BLOCK_NUMEL  # is measured at a time: what the squares, in float64, take memory for


def segment_chunks(
    segments: Sequence[tuple[int, int]], numel: int, device: torch.device
) -> list[tuple[int, int, torch.Tensor]]:
    """The segments by chunks of CHUNK_NUMEL elements, as (start, stop, edges of the segments from there on)."""
    chunks = []
    for start in range(0, numel, CHUNK_NUMEL):
        stop = min(start + CHUNK_NUMEL, numel)
        inside = [segment for segment in segments if start <= segment[0] < stop]
        stop = max([stop, *(end for _, end in inside)])  # of a shard that does not start with a block
        edges = torch.tensor([edge - start for edge in chain(*inside)], dtype=torch.int64, device=device)
        if inside:  # else it is all padding
            chunks.append((start, stop, edges))
    return chunks


class DeviceReducer:
    """Carries out addition plans on one shard. device: where its gradients are."""

    def __init__(self, shard: Shard, device: torch.device) -> None:
        self._num_segments = len(shard.segments)
        self._chunks = segment_chunks(shard.segments, shard.numel, device)

    def __call__(
        self, plan: Sequence[tuple[Node, Node]], root: Node | None, gradients: Mapping[Node, torch.Tensor]
    ) -> NDArray[np.float64]:
        """Add in place and return the sum of squares of each segment of the shard; zeros when `root` is None.

        gradients: for each node, the shard's part of its gradient, shape (shard.numel,), contiguous.
        """
        if root is None or not self._num_segments:
            return np.zeros(self._num_segments)
        for to, from_ in plan:
            gradients[to].add_(gradients[from_])
        sums = []
        for start, stop, edges in self._chunks:
            wide = gradients[root][start:stop].to(torch.float64, copy=True)
            wide.mul_(wide)
            # Every other part of what the edges cut is what lies between two segments.
            sums.append(torch.segment_reduce(wide, "sum", offsets=edges, unsafe=True)[::2])
        return torch.cat(sums).cpu().numpy()
