"""Adds up what the workers of one host push before it leaves the host, as a deterministic state machine.

A host's workers are dealt neighbouring micro-batches, so the maximal nodes of the canonical tree inside their ranges
are few, mostly one: the host sends one gradient to each server elsewhere, however many workers it has. What is sent on
are nodes of the canonical tree, so the bits are those of any other way.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from ps.numerics.ranges import bits_of, leaves_of, ranges
from ps.numerics.tree import Node, addition_plan, maximal_nodes
from ps.step.messages import Round


@dataclass(frozen=True, slots=True)
class Forward:
    """A node to send. additions: read in order as `to += from`; the last one makes `total`, None for no samples.

    Tensors have the whole layout, shape (layout.numel,); a server's part of them is added and sent on its own.
    """

    node: Node
    additions: tuple[tuple[torch.Tensor, torch.Tensor], ...]
    total: torch.Tensor | None


class Gathering:
    """Holds the nodes of one round. num_leaves: micro-batches of a training step."""

    def __init__(self, num_leaves: int) -> None:
        self._num_leaves = num_leaves
        self.round = (-1, Round.TRAIN)
        self._held: dict[Node, torch.Tensor | None] = {}
        self._covered = self._forwarded = self._expected = 0
        self._since = 0.0

    def add(
        self,
        step: int,
        kind: Round,
        nodes: Iterable[tuple[Node, torch.Tensor | None]],
        expected: Iterable[tuple[int, int]],
        now: float,
    ) -> list[Forward]:
        """Add a worker's nodes, whose tensors may be changed from now on. Returns the nodes to send.

        expected: ranges that this host's workers have been given; nothing is sent before all of them are there.
        Ignores pushes of an earlier round: its step is over.
        """
        if not self._enter(step, kind):
            return []
        if self._covered == self._forwarded:
            self._since = now
        for node, value in nodes:
            if node.leaves & ~self._covered:
                self._held[node] = value
                self._covered |= node.leaves
        self._expected |= bits_of(expected)
        return self.flush() if not self._expected & ~self._covered else []

    def goes_alone(self, step: int, node: Node, expected: Iterable[tuple[int, int]]) -> bool:
        """Whether a node of a training step that is still to be added will be sent on as it is, as far as is known.

        expected: as for `add`. If a worker dies it may come to be a part of another node after all.
        """
        if not self._enter(step, Round.TRAIN) or not node.leaves & ~self._covered:
            return False
        parts = list(expected)
        return not parts or any(node in maximal_nodes(low, high, self._num_leaves) for low, high in parts)

    def _enter(self, step: int, kind: Round) -> bool:
        """Go on to a round. False: it is over."""
        if (step, kind == Round.TRAIN) < (self.round[0], self.round[1] == Round.TRAIN):
            return False
        if (step, kind) != self.round:
            self.round = (step, kind)
            self._held.clear()
            self._covered = self._forwarded = self._expected = 0
        return True

    def waited(self, now: float) -> float:
        """For how many seconds something has been held back."""
        return now - self._since if self._covered != self._forwarded else 0.0

    def flush(self) -> list[Forward]:
        """Send what has arrived without waiting for the rest of this host."""
        num_leaves = self._num_leaves if self.round[1] == Round.TRAIN else 1
        fresh = self._covered & ~self._forwarded
        self._forwarded = self._covered
        self._expected &= self._covered
        present = {node: value is not None for node, value in self._held.items()}
        # A node that came late may hold some of what was sent before: it goes as it is.
        region = 0
        for node in present:
            if node.leaves & fresh:
                region |= node.leaves
        forwards = []
        for low, high in ranges(leaves_of(region)):
            for node in maximal_nodes(low, high, num_leaves):
                plan, root = addition_plan(node, present)
                additions = tuple((self._value(to), self._value(from_)) for to, from_ in plan)
                forwards.append(Forward(node, additions, None if root is None else self._value(root)))
        return forwards

    def _value(self, node: Node) -> torch.Tensor:
        value = self._held[node]
        assert value is not None  # noqa: S101  # addition plans name nodes with values only
        return value
