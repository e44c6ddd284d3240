"""Passes of a subject on several processes.

Sums are added along the canonical tree, so that their bits do not depend on the number of processes.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import pairwise
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray

from ps.numerics.tree import Node, addition_plan, maximal_nodes
from worker.analysis.subject import Question, Subject

_subject: Subject | None = None  # of this process

Sum = tuple[Node, NDArray[np.float64] | None, list[float], list[float]]  # a node, its sum, losses and weights of leaves


def _begin(question: Question) -> None:
    global _subject  # a process of a pool has nowhere else to keep it
    torch.set_num_threads(1)
    _subject = Subject(question)


def _call(function: Callable[[Subject, Any], Any], argument: Any) -> Any:
    assert _subject is not None  # noqa: S101  # _begin comes first
    return function(_subject, argument)


class Team:
    """processes: beyond one, passes run in so many others. Raises TaskError, also from these."""

    def __init__(self, question: Question, processes: int = 1) -> None:
        torch.set_num_threads(1)
        self.subject = Subject(question)
        self._processes = max(1, min(processes, len(self.subject.leaves)))
        self._pool: ProcessPoolExecutor | None = None
        if processes > 1:
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(processes, context, initializer=_begin, initargs=(question,))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def map(self, function: Callable[[Subject, Any], Any], arguments: Iterable[Any]) -> Iterable[Any]:
        """Call a function, which can be imported, with the subject and each argument; the results in order."""
        if self._pool is None:
            return (function(self.subject, argument) for argument in arguments)
        given = list(arguments)
        return self._pool.map(_call, [function] * len(given), given)

    def gradient(self) -> tuple[float, NDArray[np.float64]]:
        """(mean loss, its gradient, shape (layout.numel,))."""
        return self._mean(_gradient_sums, None)

    def hessian_product(self, vector: NDArray[np.float64]) -> NDArray[np.float64]:
        """The Hessian of the mean loss times a vector, shape (layout.numel,)."""
        return self._mean(_hessian_sums, vector)[1]

    def gauss_newton_product(self, vector: NDArray[np.float64]) -> NDArray[np.float64]:
        """The Gauss-Newton matrix of the mean loss times a vector, shape (layout.numel,)."""
        return self._mean(_gauss_newton_sums, vector)[1]

    def _mean(self, function: Callable[[Subject, Any], list[Sum]], vector: Any) -> tuple[float, NDArray[np.float64]]:
        num_leaves = len(self.subject.leaves)
        bounds = [num_leaves * i // self._processes for i in range(self._processes + 1)]
        shares = [(low, high, vector) for low, high in pairwise(bounds)]
        sums = [each for part in self.map(function, shares) for each in part]
        held = {node: value for node, value, _, _ in sums}
        plan, root = addition_plan(Node(0, num_leaves), {node: value is not None for node, value in held.items()})
        for to, from_ in plan:
            total, other = held[to], held[from_]
            assert total is not None  # noqa: S101  # the plan leaves out what is absent
            assert other is not None  # noqa: S101
            total += other
        losses = [loss for each in sorted(sums) for loss in each[2]]
        weight = float(np.sum([weight for each in sorted(sums) for weight in each[3]]))
        found = None if root is None else held[root]
        if found is None or weight <= 0:
            raise ValueError("the samples that are looked at weigh nothing")
        return float(np.sum(losses)) / weight, found / weight


def _gradient_sums(subject: Subject, share: tuple[int, int, Any]) -> list[Sum]:
    def leaf(index: int) -> tuple[torch.Tensor, float, float]:
        into = torch.zeros_like(subject.flat)
        loss, weight = subject.gradient(index, into)
        return into, loss, weight

    return _sums(share[0], share[1], len(subject.leaves), leaf)


def _hessian_sums(subject: Subject, share: tuple[int, int, Any]) -> list[Sum]:
    return _products(subject, share, subject.hessian_product)


def _gauss_newton_sums(subject: Subject, share: tuple[int, int, Any]) -> list[Sum]:
    return _products(subject, share, subject.gauss_newton_product)


def _products(
    subject: Subject,
    share: tuple[int, int, Any],
    product_of: Callable[[int, torch.Tensor], tuple[torch.Tensor, float]],
) -> list[Sum]:
    vector = torch.from_numpy(share[2])

    def leaf(index: int) -> tuple[torch.Tensor, float, float]:
        product, weight = product_of(index, vector)
        return product, 0.0, weight

    return _sums(share[0], share[1], len(subject.leaves), leaf)


def _sums(low: int, high: int, num_leaves: int, leaf: Callable[[int], tuple[torch.Tensor, float, float]]) -> list[Sum]:
    """Those of the largest nodes inside [low, high)."""

    def total(node: Node, losses: list[float], weights: list[float]) -> torch.Tensor:
        if node.is_leaf:
            value, loss, weight = leaf(node.low)
            losses.append(loss)
            weights.append(weight)
            return value
        left, right = node.halves()
        return total(left, losses, weights).add_(total(right, losses, weights))

    found: list[Sum] = []
    for node in maximal_nodes(low, high, num_leaves):
        losses: list[float] = []
        weights: list[float] = []
        found.append((node, total(node, losses, weights).numpy(), losses, weights))
    return found


def shares(items: Sequence[Any], count: int) -> list[Sequence[Any]]:
    """Items in so many nearly equal parts, in order."""
    bounds = [len(items) * i // count for i in range(count + 1)]
    return [items[low:high] for low, high in pairwise(bounds) if high > low]
