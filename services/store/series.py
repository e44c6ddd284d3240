"""Long series in few points: the least, the largest and the mean of each bucket, so that no spike is lost."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray


class Bucketed(NamedTuple):
    """Of each bucket, the first step; by name, (least, largest, mean) of its numbers; nan where it has none."""

    steps: NDArray[np.int64]
    series: dict[str, tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]]


def downsample(columns: Mapping[str, NDArray[Any]], points: int) -> Bucketed:
    """At most `points` buckets of as many steps each. columns: "step" and others of the same length."""
    steps = np.ascontiguousarray(columns["step"], np.int64)
    starts = bucket_starts(len(steps), points)
    series = {}
    for name, values in columns.items():
        if name == "step":
            continue
        numbers = np.ascontiguousarray(values, np.float64)
        series[name] = (least(numbers, starts), largest(numbers, starts), mean(numbers, starts))
    return Bucketed(steps[starts], series)


def bucket_starts(length: int, points: int) -> NDArray[np.int64]:
    """Where buckets begin."""
    return np.linspace(0, length, min(points, length), endpoint=False).astype(np.int64)


def least(values: NDArray[np.float64], starts: NDArray[np.int64]) -> NDArray[np.float64]:
    """The least number of each bucket, along the first axis."""
    return np.fmin.reduceat(values, starts, axis=0) if len(starts) else values[:0]


def largest(values: NDArray[np.float64], starts: NDArray[np.int64]) -> NDArray[np.float64]:
    """The largest number of each bucket, along the first axis."""
    return np.fmax.reduceat(values, starts, axis=0) if len(starts) else values[:0]


def mean(values: NDArray[np.float64], starts: NDArray[np.int64]) -> NDArray[np.float64]:
    """The mean of the finite numbers of each bucket, along the first axis."""
    if not len(starts):
        return values[:0]
    finite = np.isfinite(values)
    counts = np.add.reduceat(finite.astype(np.float64), starts, axis=0)
    with np.errstate(invalid="ignore"):
        return np.add.reduceat(np.where(finite, values, 0.0), starts, axis=0) / counts
