"""Passes of a subject on several processes.

Sums are added along the canonical tree, so that their bits do not depend on the number of processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from ps.numerics.tree import Node, addition_plan, maximal_nodes
from worker.analysis.question import Refusal
from worker.analysis.subject import Subject
from worker.task.load import TaskError

Sum = tuple[Node, NDArray[np.float64], list[float], list[float]]  # a node, its sum, losses and weights of leaves
Work = Callable[[Subject, Any, Any], Any]  # of a subject, an argument, and what is the same for all arguments


class RefusedError(Exception):
    """Another process of the team could not do its part."""

    def __init__(self, refusal: Refusal) -> None:
        self.refusal = refusal
        super().__init__(refusal.message)


class Hand(Protocol):
    """Another process of a team, with a subject of the same question."""

    def begin(self, work: Work, argument: Any, shared: Any) -> Callable[[], Any]:
        """Begin to work there, after what was begun before; what it returns waits for the result.

        work: a function that can be imported. shared: of `share`. Waiting raises RefusedError.
        """

    def share(self, value: Any) -> Any:
        """Bring a value to where all processes can have it."""


class Team:
    """This process and others, which take turns with the arguments. hands: the others."""

    def __init__(self, subject: Subject, hands: Sequence[Hand] = ()) -> None:
        torch.set_num_threads(1)
        self.subject = subject
        self._hands = hands

    @property
    def size(self) -> int:
        """How many processes there are."""
        return len(self._hands) + 1

    def map(self, work: Work, arguments: Sequence[Any], shared: Any = None) -> Iterator[Any]:
        """Work on each argument; the results in order, as they come."""
        there = self._hands[0].share(shared) if self._hands and shared is not None else shared
        others = {
            index: self._hands[index % self.size - 1].begin(work, argument, there)
            for index, argument in enumerate(arguments)
            if index % self.size
        }
        return (
            others.pop(index)() if index % self.size else work(self.subject, argument, shared)
            for index, argument in enumerate(arguments)
        )

    def gradient(self) -> tuple[float, NDArray[np.float64]]:
        """(mean loss, its gradient, shape (layout.numel,))."""
        return self._mean(_gradient_sums, None)

    def hessian_product(self, vector: NDArray[np.float64]) -> NDArray[np.float64]:
        """The Hessian of the mean loss times a vector, shape (layout.numel,)."""
        return self._mean(_hessian_sums, vector)[1]

    def gauss_newton_product(self, vector: NDArray[np.float64]) -> NDArray[np.float64]:
        """The Gauss-Newton matrix of the mean loss times a vector, shape (layout.numel,)."""
        return self._mean(_gauss_newton_sums, vector)[1]

    def _mean(self, function: Work, vector: Any) -> tuple[float, NDArray[np.float64]]:
        num_leaves = len(self.subject.leaves)
        parts = shares(range(num_leaves), self.size)
        sums = [each for part in self.map(function, parts, vector) for each in part]
        held = {node: value for node, value, _, _ in sums}
        plan, root = addition_plan(Node(0, num_leaves), dict.fromkeys(held, True))
        for to, from_ in plan:
            held[to] = held[to] + held[from_]  # what comes from another process cannot be written to
        losses = [loss for each in sorted(sums) for loss in each[2]]
        weight = float(np.sum([weight for each in sorted(sums) for weight in each[3]]))
        found = None if root is None else held[root]
        if found is None or weight <= 0:
            raise TaskError("task", "the samples that are looked at weigh nothing")
        return float(np.sum(losses)) / weight, found / weight


def _gradient_sums(subject: Subject, share: range, _shared: None) -> list[Sum]:
    def leaf(index: int) -> tuple[torch.Tensor, float, float]:
        into = torch.zeros_like(subject.flat)
        loss, weight = subject.gradient(index, into)
        return into, loss, weight

    return _sums(share, len(subject.leaves), leaf)


def _hessian_sums(subject: Subject, share: range, vector: NDArray[np.float64]) -> list[Sum]:
    return _products(subject, share, vector, subject.hessian_product)


def _gauss_newton_sums(subject: Subject, share: range, vector: NDArray[np.float64]) -> list[Sum]:
    return _products(subject, share, vector, subject.gauss_newton_product)


def _products(
    subject: Subject,
    share: range,
    given: NDArray[np.float64],
    product_of: Callable[[int, torch.Tensor], tuple[torch.Tensor, float]],
) -> list[Sum]:
    vector = torch.tensor(given)  # a copy: what another process shares cannot be written to, of which torch warns

    def leaf(index: int) -> tuple[torch.Tensor, float, float]:
        product, weight = product_of(index, vector)
        return product, 0.0, weight

    return _sums(share, len(subject.leaves), leaf)


def _sums(share: range, num_leaves: int, leaf: Callable[[int], tuple[torch.Tensor, float, float]]) -> list[Sum]:
    """Those of the largest nodes inside a range of leaves."""

    def total(node: Node, losses: list[float], weights: list[float]) -> torch.Tensor:
        if node.is_leaf:
            value, loss, weight = leaf(node.low)
            losses.append(loss)
            weights.append(weight)
            return value
        left, right = node.halves()
        return total(left, losses, weights).add_(total(right, losses, weights))

    found: list[Sum] = []
    for node in maximal_nodes(share.start, share.stop, num_leaves):
        losses: list[float] = []
        weights: list[float] = []
        found.append((node, total(node, losses, weights).numpy(), losses, weights))
    return found


def shares(items: Sequence[Any], count: int) -> list[Sequence[Any]]:
    """Items in so many nearly equal parts, in order."""
    bounds = [len(items) * i // count for i in range(count + 1)]
    return [items[low:high] for low, high in pairwise(bounds) if high > low]
