"""What a host sends on gives the bits of the canonical sum, in whatever order and pieces its workers push."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st

from ps.numerics.tree import Node, addition_plan, maximal_nodes
from ps.step.host_sum import Forward, Gathering
from ps.step.messages import Round

NUMEL = 32


def leaf(index: int) -> torch.Tensor:
    return torch.randn(NUMEL, generator=torch.Generator().manual_seed(index))


def node_sum(node: Node) -> torch.Tensor:
    if node.is_leaf:
        return leaf(node.low)
    left, right = node.halves()
    return node_sum(left) + node_sum(right)


def values(low: int, high: int, num_leaves: int) -> list[tuple[Node, torch.Tensor | None]]:
    return [(node, node_sum(node)) for node in maximal_nodes(low, high, num_leaves)]


def sent(forwards: list[Forward]) -> dict[Node, torch.Tensor | None]:
    """What a server elsewhere gets, computed as a link does it."""
    received = {}
    for forward in forwards:
        for to, from_ in forward.additions:
            to.add_(from_)
        received[forward.node] = None if forward.total is None else forward.total.clone()
    return received


def test_a_host_sends_one_node_when_all_its_workers_have_pushed() -> None:
    it = Gathering(8)
    assert it.add(0, Round.TRAIN, values(0, 2, 8), [(0, 4)], 1.0) == []
    assert it.waited(3.0) == 2.0
    (forward,) = it.add(0, Round.TRAIN, values(2, 4, 8), [(0, 4)], 2.0)
    assert forward.node == Node(0, 4)
    assert torch.equal(sent([forward])[Node(0, 4)], node_sum(Node(0, 4)))
    assert it.waited(9.0) == 0.0
    assert it.flush() == []


def test_a_worker_that_is_gone_is_not_waited_for() -> None:
    it = Gathering(8)
    it.add(0, Round.TRAIN, values(0, 3, 8), [(0, 6)], 1.0)
    assert [f.node for f in it.flush()] == [Node(0, 2), Node(2, 3)]
    (late,) = it.add(0, Round.TRAIN, values(3, 4, 8), [(3, 4)], 2.0)
    assert late.node == Node(3, 4)


def test_a_round_that_is_over_is_left_out() -> None:
    it = Gathering(4)
    assert len(it.add(0, Round.INITIALIZE, values(0, 1, 1), [(0, 1)], 1.0)) == 1
    assert len(it.add(0, Round.TRAIN, values(0, 4, 4), [(0, 4)], 1.0)) == 1
    assert len(it.add(1, Round.TRAIN, values(0, 4, 4), [(0, 4)], 1.0)) == 1
    assert it.add(0, Round.TRAIN, values(0, 4, 4), [(0, 4)], 1.0) == []
    assert it.add(0, Round.INITIALIZE, values(0, 1, 1), [(0, 1)], 1.0) == []


def test_a_node_to_which_no_other_is_added_goes_alone() -> None:
    it = Gathering(8)
    assert it.goes_alone(1, Node(0, 4), [(0, 4)])
    assert it.goes_alone(1, Node(2, 3), [(0, 3)])
    assert it.goes_alone(1, Node(2, 3), []), "nobody is waited for"
    assert not it.goes_alone(1, Node(0, 2), [(0, 4)]), "another worker of the host has the rest"
    it.add(1, Round.TRAIN, values(0, 4, 8), [(0, 4)], 1.0)
    assert not it.goes_alone(1, Node(0, 4), [(0, 4)]), "it is there already"
    assert it.goes_alone(2, Node(0, 4), [(0, 4)])
    assert not it.goes_alone(1, Node(4, 8), [(4, 8)]), "the round is over"
    assert it.flush() == []
    assert it.add(1, Round.TRAIN, values(4, 8, 8), [(4, 8)], 1.0) == []


def test_nodes_without_samples_are_sent_as_such() -> None:
    it = Gathering(4)
    none: list[tuple[Node, torch.Tensor | None]] = [(Node(2, 3), None), (Node(3, 4), None)]
    it.add(0, Round.TRAIN, values(0, 2, 4), [(0, 4)], 1.0)
    (forward,) = it.add(0, Round.TRAIN, none, [(0, 4)], 1.0)
    assert torch.equal(sent([forward])[Node(0, 4)], node_sum(Node(0, 2)))
    assert it.add(1, Round.TRAIN, none, [(2, 4)], 1.0)[0].total is None


@given(st.integers(1, 20), st.data())
def test_any_history_gives_the_canonical_bits(num_leaves: int, data: st.DataObject) -> None:
    """Workers of two hosts push their parts, some parts twice and cut otherwise; a host may be flushed at any time."""
    cuts = st.lists(st.integers(0, num_leaves), max_size=5)

    def parts(extra: list[int]) -> list[tuple[int, int]]:
        edges = sorted({0, num_leaves, *extra})
        return [(a, b) for a, b in itertools.pairwise(edges)]

    pushes = parts(data.draw(cuts)) + data.draw(st.lists(st.sampled_from(parts(data.draw(cuts))), max_size=3))
    hosts = [Gathering(num_leaves), Gathering(num_leaves)]
    owner = [data.draw(st.integers(0, 1)) for _ in pushes]
    expected: list[list[tuple[int, int]]] = [[p for p, o in zip(pushes, owner, strict=True) if o == h] for h in (0, 1)]
    held: dict[Node, Any] = {}

    def receive(forwards: list[Forward]) -> None:
        covered = 0
        for node in held:
            covered |= node.leaves
        for node, value in sent(forwards).items():
            if node.leaves & ~covered:  # as a shard takes them
                held[node] = value
                covered |= node.leaves

    for number in data.draw(st.permutations(range(len(pushes)))):
        host = hosts[owner[number]]
        receive(host.add(5, Round.TRAIN, values(*pushes[number], num_leaves), expected[owner[number]], 0.0))
        if data.draw(st.booleans()):
            receive(host.flush())
    for host in hosts:
        receive(host.flush())
    root = Node(0, num_leaves)
    plan, last = addition_plan(root, dict.fromkeys(held, True))
    for to, from_ in plan:
        held[to].add_(held[from_])
    assert last is not None
    assert torch.equal(held[last], node_sum(root))
