"""The canonical tree: in which order micro-batch gradients are added, whoever computes them.

The sum over [low, high) is the sum of its halves, split at the largest power of two below high - low; leaves are single
micro-batches. Floating-point addition does not associate, so a fixed tree is what makes the bits of a sum independent
of the assignment of ranges and of the order of arrival.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple


class Node(NamedTuple):
    """The micro-batches [low, high)."""

    low: int
    high: int

    @property
    def is_leaf(self) -> bool:
        """Whether it is one micro-batch."""
        return self.high - self.low == 1

    @property
    def leaves(self) -> int:
        """Its micro-batches as a set of bits."""
        return (1 << self.high) - (1 << self.low)

    def halves(self) -> tuple[Node, Node]:
        """Its two children. Only for a node that is no leaf."""
        middle = self.low + (1 << ((self.high - self.low - 1).bit_length() - 1))
        return Node(self.low, middle), Node(middle, self.high)


def maximal_nodes(low: int, high: int, num_leaves: int) -> list[Node]:
    """The largest nodes of the tree over [0, num_leaves) that lie inside [low, high), from left to right."""

    def inside(node: Node) -> Iterable[Node]:
        if low <= node.low and node.high <= high:
            yield node
        elif node.low < high and low < node.high:
            for half in node.halves():
                yield from inside(half)

    return list(inside(Node(0, num_leaves))) if low < high else []


def parts_of_step(num_leaves: int, part_leaves: int) -> list[Node]:
    """A step in parts of `part_leaves`, a power of two: nodes of the tree; the last may be short."""
    return [Node(low, min(low + part_leaves, num_leaves)) for low in range(0, num_leaves, part_leaves)]


def addition_plan(node: Node, present: dict[Node, bool]) -> tuple[list[tuple[Node, Node]], Node | None]:
    """The additions that turn the held nodes into the sum of `node`.

    present: for every held node, whether it has a value; one that has none (no samples) is left out of the sum.

    Returns pairs (to, from), in order, each read as `to += from`, and the held node that ends with the sum, or None
    when no value is present. Raises KeyError when `node` is not covered.
    """
    if node in present:
        return [], node if present[node] else None
    if node.is_leaf:
        raise KeyError(node)
    left, right = node.halves()
    left_plan, left_root = addition_plan(left, present)
    right_plan, right_root = addition_plan(right, present)
    plan = left_plan + right_plan
    if left_root is None or right_root is None:
        return plan, left_root if right_root is None else right_root
    plan.append((left_root, right_root))
    return plan, left_root
