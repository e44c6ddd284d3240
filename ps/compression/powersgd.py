"""PowerSGD: every weight matrix as the product of two thin ones, found by a step of power iteration from the last ones.

Source: Vogels et al. 2019, "PowerSGD: Practical Low-Rank Gradient Compression for Distributed Optimization" (algorithm
1, with the basis kept from step to step). A tensor of more dimensions counts as a matrix of its first one and the rest;
one that two thin matrices would not make smaller is sent as it is.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray

from ps.compression.matrices import thin_shape
from ps.parameters.layout import Layout, Placed, align

FACTORS = torch.bfloat16
ALIGNMENT_BYTES = 8


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

    left: shape (rows, rank). right: shape (rank, columns). Every element is added up in the same order, whichever
    part of the matrix is computed: a library's matrix product does not promise that.
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
    """A parameter's part of payload and state. rows, columns: 0 for one that is sent as it is.

    payload, end: in bytes. basis: where it begins, in elements.
    """

    placed: Placed
    rows: int
    columns: int
    payload: int
    end: int
    basis: int


class LowRank:
    """The codec. rank: of the product. Thin matrices travel as bfloat16: what that rounds off is residual too."""

    def __init__(self, layout: Layout, rank: int, seed: int) -> None:
        self._layout = layout
        self._rank = rank
        self._seed = seed
        self._pieces: list[_Piece] = []
        payload = basis = 0
        for placed in layout.parameters:
            rows, columns = thin_shape(placed, rank)
            thin = rank * (rows + columns) * FACTORS.itemsize
            end = align(payload + (thin if rows else placed.numel * layout.itemsize), ALIGNMENT_BYTES)
            self._pieces.append(_Piece(placed, rows, columns, payload, end, basis))
            payload = end
            basis += rank * columns
        self.state_numel = basis
        self._offsets = [piece.placed.offset for piece in self._pieces]

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
        return (touched[0].payload, touched[-1].end) if touched else (0, 0)

    def _factors(self, piece: _Piece, payload: torch.Tensor, first: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A matrix's two thin ones in a payload of which `first` bytes are missing."""
        numel = self._rank * (piece.rows + piece.columns)
        start = piece.payload - first
        both = payload[start : start + numel * FACTORS.itemsize].view(FACTORS)
        middle = self._rank * piece.rows
        return both[:middle].view(piece.rows, self._rank), both[middle:].view(self._rank, piece.columns)

    def _whole(self, piece: _Piece, payload: torch.Tensor, first: int) -> torch.Tensor:
        """A parameter that is sent as it is, flat, likewise."""
        start = piece.payload - first
        return payload[start : start + piece.placed.numel * self._layout.itemsize].view(self._layout.dtype)

    def encode(self, values: torch.Tensor, payload: torch.Tensor, state: torch.Tensor, start: int = 0) -> None:
        """See Codec. Only whole layouts: a part of a matrix would have another basis."""
        for piece in self._pieces:
            own = values[piece.placed.offset : piece.placed.offset + piece.placed.numel]
            if not piece.rows:
                self._whole(piece, payload, 0).copy_(own)
                own.zero_()
                continue
            matrix = own.view(piece.rows, piece.columns)
            basis = state[piece.basis : piece.basis + self._rank * piece.columns].view(self._rank, piece.columns)
            left, right = self._factors(piece, payload, 0)
            left.copy_(torch.linalg.qr(matrix @ basis.t())[0])
            torch.mm(left.to(own.dtype).t(), matrix, out=basis)
            right.copy_(basis)
            add_product(own.numpy(), _wide(left, own), _wide(right, own), 0, -1)

    def decode(self, payload: torch.Tensor, into: torch.Tensor, start: int = 0) -> None:
        """See Codec."""
        stop = start + len(into)
        touched = self._touched(start, stop)
        for piece in touched:
            first, last = max(piece.placed.offset, start), min(piece.placed.offset + piece.placed.numel, stop)
            if first >= last:
                continue
            target, offset = into[first - start : last - start], first - piece.placed.offset
            if piece.rows:
                left, right = self._factors(piece, payload, touched[0].payload)
                add_product(target.numpy(), _wide(left, into), _wide(right, into), offset, 1)
            else:
                target.add_(self._whole(piece, payload, touched[0].payload)[offset : offset + len(target)])


def _wide(factor: torch.Tensor, like: torch.Tensor) -> NDArray[Any]:
    """A thin matrix in the type it is multiplied in."""
    return factor.to(like.dtype).numpy()
