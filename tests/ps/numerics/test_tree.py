from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ps.numerics.tree import Node, addition_plan, maximal_nodes


def canonical_sum(values: list[np.float32], node: Node) -> np.float32:
    """The definition, said again in the plainest way."""
    if node.high - node.low == 1:
        return values[node.low]
    size = 1
    while size * 2 < node.high - node.low:
        size *= 2
    left, right = Node(node.low, node.low + size), Node(node.low + size, node.high)
    return canonical_sum(values, left) + canonical_sum(values, right)


def test_halves_split_at_the_largest_power_of_two_below_the_length() -> None:
    assert Node(0, 8).halves() == (Node(0, 4), Node(4, 8))
    assert Node(0, 5).halves() == (Node(0, 4), Node(4, 5))
    assert Node(4, 7).halves() == (Node(4, 6), Node(6, 7))


@given(st.integers(1, 200), st.data())
def test_maximal_nodes_tile_the_range_and_no_two_could_be_one(num_leaves: int, data: st.DataObject) -> None:
    low = data.draw(st.integers(0, num_leaves))
    high = data.draw(st.integers(low, num_leaves))
    nodes = maximal_nodes(low, high, num_leaves)
    assert [leaf for n in nodes for leaf in range(n.low, n.high)] == list(range(low, high))
    for left in nodes:
        for right in nodes:
            if right.low == left.high:
                parent = Node(left.low, right.high)
                is_a_node = parent in set(maximal_nodes(parent.low, parent.high, num_leaves))
                assert not is_a_node or parent.halves() != (left, right)


@given(st.integers(1, 64), st.integers(0, 2**32), st.lists(st.integers(0, 64), max_size=6))
def test_any_cut_in_any_order_gives_the_bits_of_the_canonical_sum(num_leaves: int, seed: int, cuts: list[int]) -> None:
    generator = np.random.default_rng(seed)
    leaves = [np.float32(v) for v in generator.normal(size=num_leaves) * 10.0 ** generator.integers(-6, 6, num_leaves)]
    edges = sorted({0, num_leaves, *(c for c in cuts if c < num_leaves)})
    nodes = [n for a, b in itertools.pairwise(edges) for n in maximal_nodes(a, b, num_leaves)]
    random.Random(seed).shuffle(nodes)
    held = {n: canonical_sum(leaves, n) for n in nodes}
    root = Node(0, num_leaves)
    assert sum(n.leaves for n in held) == root.leaves
    plan, last = addition_plan(root, dict.fromkeys(held, True))
    for to, from_ in plan:
        held[to] = held[to] + held[from_]
    assert last is not None
    assert held[last].tobytes() == canonical_sum(leaves, root).tobytes()


def test_a_node_without_samples_is_left_out() -> None:
    plan, last = addition_plan(Node(0, 3), {Node(0, 2): True, Node(2, 3): False})
    assert (plan, last) == ([], Node(0, 2))
    assert addition_plan(Node(0, 1), {Node(0, 1): False}) == ([], None)


def test_what_is_not_covered_has_no_sum() -> None:
    with pytest.raises(KeyError):
        addition_plan(Node(0, 4), {Node(0, 2): True, Node(2, 3): True})
