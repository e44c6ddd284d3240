"""Micro-batches whose loss is far above what this worker has seen, and the samples that make it so.

Diverging training raises all losses alike, so a micro-batch counts only if one from before it is as it should be with
the present parameters. What is looked at is computed as in an evaluation, which leaves nothing behind.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from statistics import median
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from worker.gradients.guilty import guilty

FACTOR = 10.0  # times the usual loss, or that of the beginning if it was larger
FIRST, RECENT, LEAST = 8, 50, 8  # micro-batches that tell what is usual, and how many must have been seen
PAUSE = 20  # micro-batches that are not looked at after one that was


class MicroBatch(NamedTuple):
    """One that was computed. samples: their numbers in the data."""

    step: int
    leaf: int
    samples: NDArray[np.int64]


MeanLoss = Callable[[MicroBatch], float]  # of a micro-batch, or of some of its samples; may raise anything


class Outliers:
    """Of one worker, whose micro-batches are told in the order in which it computed them."""

    def __init__(self, mean_loss: MeanLoss) -> None:
        self._mean_loss = mean_loss
        self._first: list[float] = []
        self._recent: deque[float] = deque(maxlen=RECENT)
        self._usual = 0.0
        self._seen = self._looked = 0
        self._good: MicroBatch | None = None

    def look(self, micro_batch: MicroBatch, loss: float) -> tuple[float, tuple[int, ...]] | None:
        """(its mean loss to the usual one, the samples that are to blame) of an outlier; else None.

        No samples: they cannot be told apart. All: each of them is far above what is usual.
        """
        self._seen += 1
        limit = FACTOR * self._usual
        if self._seen <= LEAST or not loss > limit > 0.0:
            self._learn(micro_batch, loss)
            return None
        if self._looked and self._seen - self._looked < PAUSE:
            return None
        self._looked = self._seen
        try:
            if self._good is None or not self._mean_loss(self._good) <= limit:
                self._learn(micro_batch, loss)  # it is the model
                return None
        except Exception:
            return None
        return loss / self._usual, self._blamed(micro_batch, limit)

    def _learn(self, micro_batch: MicroBatch, loss: float) -> None:
        if len(self._first) < FIRST:
            self._first.append(loss)
        self._recent.append(loss)
        self._good = micro_batch
        if self._seen <= LEAST or self._seen % FIRST == 0:
            self._usual = max(median(self._first), median(self._recent))

    def _blamed(self, micro_batch: MicroBatch, limit: float) -> tuple[int, ...]:
        def is_usual(samples: NDArray[np.int64]) -> bool:
            return self._mean_loss(micro_batch._replace(samples=samples)) <= limit

        found = guilty(micro_batch.samples, is_usual)
        if found:
            return found
        try:
            every = all(not is_usual(half) for half in np.array_split(micro_batch.samples, 2) if len(half))
        except Exception:
            return ()
        return tuple(micro_batch.samples.tolist()) if every else ()
