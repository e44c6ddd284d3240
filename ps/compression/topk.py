"""Top-k: of every block of the layout, the elements that are largest by magnitude, exactly and with their places.

Source: Aji & Heafield 2017, "Sparse Communication for Distributed Gradient Descent"; with residuals as in Stich et al.
2018, "Sparsified SGD with Memory".
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray

from ps.parameters.layout import BLOCK_NUMEL, Layout

DIGIT_BITS = 11
MULTIPLE = 4  # of elements of a block, so that values and places stay aligned


@njit(
    [
        "void(float32[::1], uint32[::1], float32[::1], uint16[::1])",
        "void(float64[::1], uint64[::1], float64[::1], uint16[::1])",
    ],
    nogil=True,
    cache=True,
)
def take_largest(
    values: NDArray[np.floating],
    bits: NDArray[np.unsignedinteger],
    taken: NDArray[np.floating],
    places: NDArray[np.uint16],
) -> None:
    """Move the len(taken) elements of largest magnitude out of `values`, in order of place, and leave zeros there.

    bits: the same memory as `values`. Of equal ones the first are taken; NaN is larger than all.

    Magnitudes are ordered as their bits without the sign are: the smallest that is taken is found digit by digit.
    """
    width = 8 * bits.itemsize - 1
    mask = (np.uint64(1) << np.uint64(width)) - np.uint64(1)
    counts = np.empty(1 << DIGIT_BITS, np.int64)
    wanted = len(taken)
    prefix = np.uint64(0)  # of the magnitude that is looked for
    shift = width
    while shift > 0:
        above = np.uint64(shift)
        shift = max(0, shift - DIGIT_BITS)
        digit = (np.uint64(1) << (above - np.uint64(shift))) - np.uint64(1)
        counts[:] = 0
        for i in range(bits.size):
            key = np.uint64(bits[i]) & mask
            if key >> above == prefix:
                counts[(key >> np.uint64(shift)) & digit] += 1
        at = np.int64(digit)
        while counts[at] < wanted:
            wanted -= counts[at]
            at -= 1
        prefix = (prefix << (above - np.uint64(shift))) | np.uint64(at)
    count = 0
    for i in range(bits.size):
        key = np.uint64(bits[i]) & mask
        if key < prefix:
            continue
        if key == prefix:
            if wanted == 0:
                continue
            wanted -= 1
        taken[count] = values[i]
        places[count] = i
        values[i] = 0
        count += 1


@njit(
    ["void(float32[::1], float32[::1], uint16[::1])", "void(float64[::1], float64[::1], uint16[::1])"],
    nogil=True,
    cache=True,
)
def put_back(into: NDArray[np.floating], values: NDArray[np.floating], places: NDArray[np.uint16]) -> None:
    """Add values at their places. Places beyond the end, which only a damaged payload has, are left out."""
    for i in range(len(values)):
        if places[i] < into.size:
            into[places[i]] += values[i]


class TopK:
    """The codec. ratio: of the elements, in (0, 0.5]."""

    state_numel = 0

    def __init__(self, layout: Layout, ratio: float) -> None:
        self._layout = layout
        self._ratio = ratio

    def initial_state(self) -> torch.Tensor:
        """See Codec."""
        return torch.empty(0, dtype=self._layout.dtype)

    def _kept(self, numel: int) -> int:
        """How many elements of a block of `numel` are sent."""
        return min(numel, -(-math.ceil(numel * self._ratio) // MULTIPLE) * MULTIPLE)

    def _block_bytes(self, numel: int) -> int:
        return self._kept(numel) * (self._layout.itemsize + 2)

    def span(self, start: int, stop: int) -> tuple[int, int]:
        """See Codec."""
        whole = self._block_bytes(BLOCK_NUMEL)
        low = start // BLOCK_NUMEL * whole + self._block_bytes(start % BLOCK_NUMEL)
        return low, stop // BLOCK_NUMEL * whole + self._block_bytes(stop % BLOCK_NUMEL)

    def encode(self, values: torch.Tensor, payload: torch.Tensor, state: torch.Tensor, start: int = 0) -> None:
        """See Codec."""
        for block, taken, places in self._blocks(values, payload):
            take_largest(block, block.view(f"u{block.itemsize}"), taken, places)

    def decode(self, payload: torch.Tensor, into: torch.Tensor, start: int = 0) -> None:
        """See Codec."""
        for block, values, places in self._blocks(into, payload):
            put_back(block, values, places)

    def _blocks(
        self, values: torch.Tensor, payload: torch.Tensor
    ) -> Iterator[tuple[NDArray[Any], NDArray[Any], NDArray[np.uint16]]]:
        """Every block with its part of the payload: values, then places."""
        flat, data = values.numpy(), payload.numpy()
        position = 0
        for start in range(0, len(flat), BLOCK_NUMEL):
            block = flat[start : start + BLOCK_NUMEL]
            kept = self._kept(len(block))
            middle, end = position + kept * flat.itemsize, position + kept * (flat.itemsize + 2)
            yield block, data[position:middle].view(flat.dtype), data[middle:end].view(np.uint16)
            position = end
