"""Publishes a gradient sum bucket by bucket, while the backward pass that completes it still runs.

Backward passes end with the first layers, so the last buckets are on their way (to another host, or out of a GPU) while
the first ones are computed.
"""

from __future__ import annotations

import contextlib
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

from ps.numerics.tree import Node
from ps.parameters.layout import Layout
from worker.gradients.slots import Slots

BUCKET_BYTES = 1 << 20  # at least: what costs a message little in comparison


def cut_buckets(layout: Layout, min_bytes: int) -> list[tuple[int, int]]:
    """The layout in ranges of whole parameters, each of `min_bytes` at least but for the last."""
    edges = [0]
    for placed in layout.parameters[1:]:
        if (placed.offset - edges[-1]) * layout.itemsize >= min_bytes:
            edges.append(placed.offset)
    return list(pairwise([*edges, layout.numel]))


class Overlap:
    """Watches over the last backward pass of each sum.

    announce: called with (node, slot, start, stop) when these elements of the layout are published; nothing writes to
    them any more.
    """

    def __init__(self, layout: Layout, slots: Slots, announce: Callable[[Node, int, int, int], None]) -> None:
        self._slots = slots
        self._announce = announce
        self.buckets = cut_buckets(layout, BUCKET_BYTES)
        starts = [start for start, _ in self.buckets]
        self._owner = [bisect_right(starts, p.offset) - 1 for p in layout.parameters]
        self._missing: list[set[int]] = []  # of each bucket, the parameters that are not final
        self._node = Node(0, 0)
        self.slot = -1  # of the newest sum; some of it may be announced
        self._chain: Sequence[int] = ()

    @contextlib.contextmanager
    def last_pass(self, node: Node, chain: Sequence[int]) -> Iterator[None]:
        """Inside, the backward pass is the last one of a sum.

        chain: slots; what the pass leaves in the first is added to the second, that to the third, and so on; the last
        is the sum of `node`.
        """
        self._node, self._chain, self.slot = node, chain, chain[-1]
        self._missing = [set() for _ in self.buckets]
        for index, bucket in enumerate(self._owner):
            self._missing[bucket].add(index)
        try:
            yield
        finally:
            self._chain = ()

    def on_final(self, index: int) -> None:
        """A parameter's gradient is written, in any pass."""
        if not self._chain:
            return
        bucket = self._owner[index]
        self._missing[bucket].remove(index)
        for from_, to in pairwise(self._chain):
            self._slots.views(to)[index].add_(self._slots.views(from_)[index])
        if not self._missing[bucket]:
            start, stop = self.buckets[bucket]
            self._slots.publish_part(self.slot, start, stop)
            self._announce(self._node, self.slot, start, stop)
