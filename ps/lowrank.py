"""PowerSGD: every weight matrix as the product of two thin ones, found by a step of power iteration from the last ones.

Source: Vogels et al. 2019, "PowerSGD: Practical Low-Rank Gradient Compression for Distributed Optimization" (algorithm
1, with the basis kept from step to step). A tensor of more dimensions counts as a matrix of its first one and the rest;
one that two thin matrices would not make smaller is sent as it is.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass

import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray

from ps.layout import Layout, Placed


@njit(
    [
        "void(float32[::1], float32[:,::1], float32[:,::1], int64, int64)",
        "void(float64[::1], float64[:,::1], float64[:,::1], int64, int64)",
    ],
    nogil=True,
    cache=True,
)
def add_product(
    into: NDArray[np.floating], left: NDArray[np.floating], right: NDArray[np.floating], start: int, sign: int
) -> None:
    """Add sign * (left @ right), a matrix in row-major order, from its element `start` on, to `into`.

    left: shape (rows, rank). right: shape (rank, columns). Every element is added up in the same order, whatever part
    of the matrix is asked for: a matrix product of a library does not promise that.
    """
    columns = right.shape[1]
    position = 0
    while position < into.size:
        row, column = (start + position) // columns, (start + position) % columns
        count = min(columns - column, into.size - position)
        target = into[position : position + count]
        rank = left.shape[1]
        whole = rank - rank % 4  # four at a time, in the same order, so that the target is read and written less often
        for k in range(0, whole, 4):
            a, b, c, d = left[row, k] * sign, left[row, k + 1] * sign, left[row, k + 2] * sign, left[row, k + 3] * sign
            p, q = right[k, column : column + count], right[k + 1, column : column + count]
            r, s = right[k + 2, column : column + count], right[k + 3, column : column + count]
            for i in range(count):
                target[i] = (((target[i] + a * p[i]) + b * q[i]) + c * r[i]) + d * s[i]
        for k in range(whole, rank):
            factor = left[row, k] * sign
            source = right[k, column : column + count]
            for i in range(count):
                target[i] += factor * source[i]
        position += count


@dataclass(frozen=True, slots=True)
class _Piece:
    """A parameter's part of payload and state. rows, columns: 0 for one that is sent as it is."""

    placed: Placed
    rows: int
    columns: int
    payload: int  # where it begins, in elements
    basis: int


class LowRank:
    """The codec. rank: of the product."""

    def __init__(self, layout: Layout, rank: int, seed: int) -> None:
        self._layout = layout
        self._rank = rank
        self._seed = seed
        self._pieces: list[_Piece] = []
        payload = basis = 0
        for placed in layout.parameters:
            rows = placed.shape[0] if len(placed.shape) > 1 and placed.numel else 0
            columns = placed.numel // rows if rows else 0
            if rank * (rows + columns) >= placed.numel:
                rows = columns = 0
            self._pieces.append(_Piece(placed, rows, columns, payload, basis))
            payload += rank * (rows + columns) if rows else placed.numel
            basis += rank * columns
        self._payload_numel, self.state_numel = payload, basis
        self._offsets = [piece.placed.offset for piece in self._pieces]

    @property
    def num_matrices(self) -> int:
        """How many parameters it makes smaller."""
        return sum(piece.rows > 0 for piece in self._pieces)

    def initial_state(self) -> torch.Tensor:
        """See Codec: a random basis."""
        generator = torch.Generator().manual_seed(self._seed)
        return torch.randn(self.state_numel, generator=generator, dtype=torch.float64).to(self._layout.dtype)

    def _touched(self, start: int, stop: int) -> list[_Piece]:
        """The parameters that lie in [start, stop), or begin or end there."""
        first = max(bisect_right(self._offsets, start) - 1, 0)
        return [p for p in self._pieces[first:] if p.placed.offset < stop]

    def span(self, start: int, stop: int) -> tuple[int, int]:
        """See Codec."""
        touched = self._touched(start, stop)
        if not touched:
            return 0, 0
        last = self._pieces.index(touched[-1]) + 1
        end = self._pieces[last].payload if last < len(self._pieces) else self._payload_numel
        return touched[0].payload * self._layout.itemsize, end * self._layout.itemsize

    def _factors(self, piece: _Piece, sent: torch.Tensor, first: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Where a matrix's two thin ones lie in a payload that begins at element `first`."""
        start = piece.payload - first
        middle, end = start + piece.rows * self._rank, start + (piece.rows + piece.columns) * self._rank
        return sent[start:middle].view(piece.rows, self._rank), sent[middle:end].view(self._rank, piece.columns)

    def encode(self, values: torch.Tensor, payload: torch.Tensor, state: torch.Tensor, start: int = 0) -> None:
        """See Codec. Only whole layouts: a part of a matrix would have another basis."""
        sent = payload.view(self._layout.dtype)
        for piece in self._pieces:
            own = values[piece.placed.offset : piece.placed.offset + piece.placed.numel]
            if not piece.rows:
                sent[piece.payload : piece.payload + len(own)] = own
                own.zero_()
                continue
            matrix = own.view(piece.rows, piece.columns)
            basis = state[piece.basis : piece.basis + self._rank * piece.columns].view(self._rank, piece.columns)
            left, right = self._factors(piece, sent, 0)
            left.copy_(torch.linalg.qr(matrix @ basis.t())[0])
            torch.mm(left.t(), matrix, out=right)
            basis.copy_(right)
            add_product(own.numpy(), left.numpy(), right.numpy(), 0, -1)

    def decode(self, payload: torch.Tensor, into: torch.Tensor, start: int = 0) -> None:
        """See Codec."""
        stop = start + len(into)
        sent = payload.view(self._layout.dtype)
        touched = self._touched(start, stop)
        for piece in touched:
            first, last = max(piece.placed.offset, start), min(piece.placed.offset + piece.placed.numel, stop)
            if first >= last:
                continue
            target, offset = into[first - start : last - start], first - piece.placed.offset
            if piece.rows:
                left, right = self._factors(piece, sent, touched[0].payload)
                add_product(target.numpy(), left.numpy(), right.numpy(), offset, 1)
            else:
                begin = piece.payload - touched[0].payload + offset
                target.add_(sent[begin : begin + len(target)])
