"""As ps.numerics.reduce_cpu, for gradients on a GPU, in operations of PyTorch.

Sums of squares are made in float32 over rows of ROW elements, and those are added up in float64: one pass over the
gradient at the speed of the GPU's memory. A sum is right to 1e-6 of itself; where squares would overflow or vanish in
float32, the whole shard is measured in float64. Rows begin at multiples of ROW in the layout, and those that two
segments share are measured by lines of 64 bytes. So what is added to what depends on the layout alone, and the number
of shards does not show in the bits. They are not those of the CPU's kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import chain

import numpy as np
import torch
from numpy.typing import NDArray

from ps.numerics.tree import Node
from ps.parameters.layout import BLOCK_NUMEL, PARAMETER_ALIGNMENT_BYTES, Shard

CHUNK_NUMEL = 128 * BLOCK_NUMEL  # is measured in float64 at a time: what that takes memory for
ROW = 1024
# PyTorch's kernels spread fewer rows over their threads in another way, and then add in another order.
MIN_ROWS = 64
MIN_LINES = 1024
MAX_RECORDED = 8
TINY = 1e-30  # smaller sums of squares may lack what vanished in float32


def segment_chunks(
    segments: Sequence[tuple[int, int]], numel: int, device: torch.device
) -> list[tuple[int, int, torch.Tensor]]:
    """The segments by chunks of CHUNK_NUMEL elements, as (start, stop, edges of the segments from there on)."""
    chunks = []
    for start in range(0, numel, CHUNK_NUMEL):
        stop = min(start + CHUNK_NUMEL, numel)
        inside = [segment for segment in segments if start <= segment[0] < stop]
        stop = max([stop, *(end for _, end in inside)])  # of a shard that does not start with a block
        edges = torch.tensor([edge - start for edge in chain(*inside)], dtype=torch.int64, device=device)
        if inside:  # else it is all padding
            chunks.append((start, stop, edges))
    return chunks


class DeviceReducer:
    """Carries out addition plans on one shard. device: where its gradients are."""

    def __init__(self, shard: Shard, device: torch.device) -> None:
        self._shard = shard
        self._device = device
        rows = Rows(shard, device)
        self._squares = Replayed(rows.squares) if device.type == "cuda" else rows.squares

    def __call__(
        self, plan: Sequence[tuple[Node, Node]], root: Node | None, gradients: Mapping[Node, torch.Tensor]
    ) -> NDArray[np.float64]:
        """Add in place and return the sum of squares of each segment of the shard; zeros when `root` is None.

        gradients: for each node, the shard's part of its gradient, shape (shard.numel,), contiguous.
        """
        if root is None or not self._shard.segments:
            return np.zeros(len(self._shard.segments))
        for to, from_ in plan:
            gradients[to].add_(gradients[from_])
        sums: NDArray[np.float64] = self._squares(gradients[root]).cpu().numpy()
        if not np.isfinite(sums).all() or ((sums > 0) & (sums < TINY)).any():
            return wide_squares(self._shard, gradients[root], self._device)
        return sums


def wide_squares(shard: Shard, gradient: torch.Tensor, device: torch.device) -> NDArray[np.float64]:
    """The sum of squares of each segment, in float64 all the way."""
    sums = []
    for start, stop, edges in segment_chunks(shard.segments, shard.numel, device):
        wide = gradient[start:stop].to(torch.float64, copy=True)
        wide.mul_(wide)
        # Every other part of what the edges cut is what lies between two segments.
        sums.append(torch.segment_reduce(wide, "sum", offsets=edges, unsafe=True)[::2])
    return torch.cat(sums).cpu().numpy()


class Replayed:
    """A function of one tensor on a GPU, recorded as a CUDA graph for each address that comes again.

    To launch the kernels one by one takes the host ten times as long as this. `compute` must not wait for the GPU.
    """

    def __init__(self, compute: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self._compute = compute
        self._recorded: dict[int, tuple[torch.cuda.CUDAGraph, torch.Tensor] | None] = {}  # by address; None: seen once

    def __call__(self, flat: torch.Tensor) -> torch.Tensor:
        """What `compute` gives; the next call may overwrite it."""
        address = flat.data_ptr()
        if address not in self._recorded:
            if len(self._recorded) >= MAX_RECORDED:
                self._recorded.clear()
            self._recorded[address] = None
            return self._compute(flat)
        recorded = self._recorded[address]
        if recorded is None:
            recorded = self._recorded[address] = self._record(flat)
        graph, result = recorded
        graph.replay()
        return result

    def _record(self, flat: torch.Tensor) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
        graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            graph.capture_begin(capture_error_mode="thread_local")
            result = self._compute(flat)
            graph.capture_end()
        torch.cuda.current_stream().wait_stream(stream)
        return graph, result


class Rows:
    """Measures the segments of a shard by rows. device: where its tensors are."""

    def __init__(self, shard: Shard, device: torch.device) -> None:
        self._line = PARAMETER_ALIGNMENT_BYTES // shard.layout.itemsize
        self._first = -shard.start % ROW  # from here on there are rows
        self._num_rows = max(shard.numel - self._first, 0) // ROW
        # For each segment its pieces in order: rows that it has alone, and lines before and after them.
        lines: list[int] = []
        places: list[int] = []  # of the pieces, in all rows and then lines
        edges = [0]
        after_rows = max(self._num_rows, MIN_ROWS) if self._num_rows else 0
        for start, stop in shard.segments:
            first, last = -(-(start - self._first) // ROW), (stop - self._first) // ROW
            if first < last:
                parts = [(start, self._first + first * ROW), (self._first + last * ROW, stop)]
            else:
                parts, first, last = [(start, stop), (stop, stop)], 0, 0
            head, tail = ([element // self._line for element in range(*part, self._line)] for part in parts)
            places += range(after_rows + len(lines), after_rows + len(lines) + len(head))
            places += range(first, last)
            lines += head
            places += range(after_rows + len(lines), after_rows + len(lines) + len(tail))
            lines += tail
            edges.append(len(places))
        self._num_lines = len(lines)
        lines += [0] * max(MIN_LINES - len(lines), 0)
        self._lines, self._places, self._edges = (
            torch.tensor(numbers, dtype=torch.int64, device=device) for numbers in (lines, places, edges)
        )
        few = MIN_ROWS if 0 < self._num_rows < MIN_ROWS else 0
        self._few = torch.zeros(few, ROW, dtype=shard.layout.dtype, device=device)

    def norms(self, flat: torch.Tensor, order: float) -> torch.Tensor:
        """The vector norm of each piece, on the device. flat: shape (shard.numel,), contiguous."""
        found = []
        if self._num_rows:
            rows = flat[self._first : self._first + self._num_rows * ROW].view(-1, ROW)
            if len(self._few):
                self._few[: self._num_rows].copy_(rows)
                rows = self._few
            found.append(torch.linalg.vector_norm(rows, order, dim=1))
        if self._num_lines:
            lines = flat.view(-1, self._line).index_select(0, self._lines)
            found.append(torch.linalg.vector_norm(lines, order, dim=1))
        joined = torch.cat(found) if len(found) > 1 else found[0]
        return joined.index_select(0, self._places).double()

    def sums(self, of_pieces: torch.Tensor) -> torch.Tensor:
        """By segment, from the pieces: shape (segments,), float64, on the device."""
        return torch.segment_reduce(of_pieces, "sum", offsets=self._edges, unsafe=True)

    def largest(self, of_pieces: torch.Tensor) -> torch.Tensor:
        """As `sums`."""
        return torch.segment_reduce(of_pieces, "max", offsets=self._edges, unsafe=True)

    def squares(self, flat: torch.Tensor) -> torch.Tensor:
        """The sum of squares of each segment."""
        return self.sums(self.norms(flat, 2).square_())
