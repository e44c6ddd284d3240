"""What is measured of a shard's gradient and update besides norms, segment by segment, at an interval.

Every segment is measured on its own, so the number of shards does not show in the bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from ps.numerics.histogram import BINS, count_by_segment
from ps.numerics.kernel import count_magnitudes, measure_magnitudes, measure_update
from ps.numerics.reduce_gpu import Rows
from ps.numerics.threads import Threads
from ps.parameters.layout import Shard


class Signals(Protocol):
    """Measures one shard. `CpuSignals` and `DeviceSignals` are the two."""

    def of_gradient(self, gradient: torch.Tensor) -> NDArray[np.float64]:
        """Shape (segments, 3): the sum of magnitudes, the largest, and the number of zeros. gradient: (shard.numel,)"""

    def of_update(self, before: torch.Tensor, after: torch.Tensor) -> NDArray[np.float64]:
        """Shape (segments, 2): the sums of squares of `after - before` and of `before`, each (shard.numel,)."""

    def histogram(self, gradient: torch.Tensor, divisor: float) -> NDArray[np.uint32]:
        """Shape (segments, BINS): how many elements of gradient / divisor are how large; see ps.numerics.histogram."""


class CpuSignals:
    """threads, ranges: as for the Reducer."""

    def __init__(self, shard: Shard, threads: Threads, ranges: Sequence[tuple[int, int]]) -> None:
        self._threads = threads
        self._segments = np.array(shard.bare_segments, dtype=np.int64).reshape(-1, 2)
        self._parts = [slice(*np.searchsorted(self._segments[:, 0], range_)) for range_ in ranges]

    def of_gradient(self, gradient: torch.Tensor) -> NDArray[np.float64]:
        """See Signals."""
        return self._measure(3, partial(measure_magnitudes, gradient.numpy()))

    def of_update(self, before: torch.Tensor, after: torch.Tensor) -> NDArray[np.float64]:
        """See Signals."""
        return self._measure(2, partial(measure_update, before.numpy(), after.numpy()))

    def histogram(self, gradient: torch.Tensor, divisor: float) -> NDArray[np.uint32]:
        """See Signals."""

        def count(segments: NDArray[np.int64], out: NDArray[np.uint32]) -> None:
            count_magnitudes(gradient.numpy(), divisor, segments, out)

        return self._measure(BINS, count, np.uint32)

    def _measure(self, width: int, kernel: Callable[[Any, Any], None], dtype: Any = np.float64) -> NDArray[Any]:
        out = np.zeros((len(self._segments), width), dtype)
        self._threads.run([partial(kernel, self._segments[part], out[part]) for part in self._parts])
        return out


class DeviceSignals:
    """In operations of PyTorch, on `device`: in float32 by rows, and then in float64; see ps.numerics.reduce_gpu."""

    def __init__(self, shard: Shard, device: torch.device) -> None:
        self._rows = Rows(shard, device)
        self._segments = np.array(shard.bare_segments, dtype=np.int64).reshape(-1, 2)
        self._numel = np.diff(self._segments)[:, 0].astype(np.float64)

    def of_gradient(self, gradient: torch.Tensor) -> NDArray[np.float64]:
        """See Signals."""
        if not len(self._numel):
            return np.zeros((0, 3))
        rows = self._rows
        sums = rows.sums(rows.norms(gradient, 1))
        nonzero = rows.sums(rows.norms(gradient, 0))  # padding is zero
        found: NDArray[np.float64]
        found = torch.stack([sums, rows.largest(rows.norms(gradient, math.inf)), nonzero], 1).cpu().numpy()
        found[:, 2] = self._numel - found[:, 2]
        return found

    def of_update(self, before: torch.Tensor, after: torch.Tensor) -> NDArray[np.float64]:
        """See Signals."""
        if not len(self._numel):
            return np.zeros((0, 2))
        return torch.stack([self._rows.squares(after - before), self._rows.squares(before)], 1).cpu().numpy()

    def histogram(self, gradient: torch.Tensor, divisor: float) -> NDArray[np.uint32]:
        """See Signals."""
        return count_by_segment(gradient, divisor, self._segments)
