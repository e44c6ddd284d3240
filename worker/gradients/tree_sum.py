"""Sums of micro-batch gradients along the canonical tree, in the worker's slots."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import nullcontext
from typing import NamedTuple, Protocol

import torch

from ps.numerics.tree import Node
from worker.gradients.buckets import Overlap
from worker.gradients.engine import InPartsError
from worker.gradients.slots import Slots

log = logging.getLogger(__name__)

NOTHING = nullcontext()


class Leaf(Protocol):
    """Computes micro-batches."""

    def has_samples(self, index: int) -> bool:
        """Whether there is anything to compute."""

    def gradient(self, index: int, into: list[torch.Tensor], *, add: bool) -> None:
        """Write (or add) one micro-batch's gradient into one tensor per parameter. Raises InPartsError."""

    def alone(self, index: int, slot: int) -> None:
        """A micro-batch's gradient, and nothing else, is in a slot."""

    def again(self, indices: Sequence[int]) -> None:
        """What was computed of these micro-batches counts no more: they come again."""


class _Rest(NamedTuple):
    """What a sum that is published in buckets still lacks. chain: slots to add to, the innermost first."""

    node: Node
    overlap: Overlap
    chain: tuple[int, ...] = ()

    def after(self, slot: int) -> _Rest:
        """The rest for the right half of a node whose left half lies in `slot`."""
        return self._replace(chain=(slot, *self.chain))


class TreeSum:
    """Adds up nodes of the tree. overlap: publishes sums in buckets while they are completed; None: when they are."""

    def __init__(self, slots: Slots, leaf: Leaf) -> None:
        self._slots = slots
        self._leaf = leaf
        self.overlap: Overlap | None = None

    def published(self, node: Node) -> int | None:
        """Compute a node and begin to publish it. Returns as `whole`."""
        overlap = self.overlap
        # Buckets become final in the pass of the last micro-batch, so there has to be one.
        if overlap is not None and self._leaf.has_samples(node.high - 1):
            return self.whole(node, _Rest(node, overlap))
        slot = self.whole(node)
        if slot is not None:
            self._slots.publish(slot)
        return slot

    def whole(self, node: Node, rest: _Rest | None = None) -> int | None:
        """Compute a node; the slot with its sum, or None when it has no samples. Once more if a gradient came in parts.

        rest: given when the node is the last part of a sum that is published in buckets: its micro-batches end with
        one that has samples, and the sum is added to the slots in `rest` on the way.
        """
        free = self._slots.free()
        try:
            return self._sum(node, rest)
        except InPartsError:
            log.info("a gradient came in parts; the sum of %s is made again", node)
            self._leaf.again(range(node.low, node.high))
            # In another slot if anything was announced of this one.
            self._slots.restore(free, but=None if rest is None else rest.overlap.slot)
            return self.whole(node, rest)

    def _sum(self, node: Node, rest: _Rest | None = None) -> int | None:
        if node.is_leaf:
            return self._add_leaf(node.low, None, rest)
        left_node, right_node = node.halves()
        left = self._sum(left_node)
        if left is not None and right_node.is_leaf:
            self._add_leaf(right_node.low, left, rest)
            return left
        if rest is not None:
            right = self._sum(right_node, rest if left is None else rest.after(left))
            if left is None or right is None:
                return right
        else:
            right = self._sum(right_node)
            if left is None or right is None:
                return left if right is None else right
            self._slots.flat(left).add_(self._slots.flat(right))
        self._slots.release(right)
        return left

    def _add_leaf(self, index: int, add_to: int | None, rest: _Rest | None) -> int | None:
        """Compute a micro-batch in a slot of its own, or add it to what is in `add_to`."""
        if not self._leaf.has_samples(index):
            return None
        slot = self._slots.take() if add_to is None else add_to
        views, add = self._slots.views(slot), add_to is not None
        last_pass = NOTHING if rest is None else rest.overlap.last_pass(rest.node, (slot, *rest.chain))
        with last_pass:
            self._leaf.gradient(index, views, add=add)
        if not add:
            self._leaf.alone(index, slot)
        return slot
