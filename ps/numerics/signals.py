"""What is measured of a shard's gradient and update besides norms, segment by segment, at an interval.

Every segment is measured on its own, so the number of shards does not show in the bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from ps.numerics.kernel import measure_magnitudes, measure_update
from ps.numerics.reduce_gpu import segment_chunks
from ps.numerics.threads import Threads
from ps.parameters.layout import Shard


class Signals(Protocol):
    """Measures one shard. `CpuSignals` and `DeviceSignals` are the two."""

    def of_gradient(self, gradient: torch.Tensor) -> NDArray[np.float64]:
        """Shape (segments, 3): the sum of magnitudes, the largest, and the number of zeros. gradient: (shard.numel,)"""

    def of_update(self, before: torch.Tensor, after: torch.Tensor) -> NDArray[np.float64]:
        """Shape (segments, 2): the sums of squares of `after - before` and of `before`, each (shard.numel,)."""


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

    def _measure(self, width: int, kernel: Callable[[Any, Any], None]) -> NDArray[np.float64]:
        out = np.zeros((len(self._segments), width))
        self._threads.run([partial(kernel, self._segments[part], out[part]) for part in self._parts])
        return out


class DeviceSignals:
    """In operations of PyTorch, on `device`."""

    def __init__(self, shard: Shard, device: torch.device) -> None:
        self._num_segments = len(shard.bare_segments)
        self._chunks = segment_chunks(shard.bare_segments, shard.numel, device)

    def of_gradient(self, gradient: torch.Tensor) -> NDArray[np.float64]:
        """See Signals."""
        rows = []
        for start, stop, edges in self._chunks:
            magnitudes = gradient[start:stop].to(torch.float64).abs()
            zeros = (magnitudes == 0).to(torch.float64)
            rows.append(
                torch.stack([_by("sum", magnitudes, edges), _by("max", magnitudes, edges), _by("sum", zeros, edges)], 1)
            )
        return self._joined(rows, 3)

    def of_update(self, before: torch.Tensor, after: torch.Tensor) -> NDArray[np.float64]:
        """See Signals."""
        rows = []
        for start, stop, edges in self._chunks:
            old = before[start:stop].to(torch.float64)
            update = after[start:stop].to(torch.float64) - old
            rows.append(torch.stack([_by("sum", update * update, edges), _by("sum", old * old, edges)], 1))
        return self._joined(rows, 2)

    def _joined(self, rows: list[torch.Tensor], width: int) -> NDArray[np.float64]:
        return torch.cat(rows).cpu().numpy() if rows else np.zeros((self._num_segments, width))


def _by(how: str, values: torch.Tensor, edges: torch.Tensor) -> torch.Tensor:
    """Every other part of what the edges cut is what lies between two segments."""
    return torch.segment_reduce(values, how, offsets=edges, unsafe=True)[::2]
