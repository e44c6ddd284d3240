"""Two bits an element: its sign, and which of two magnitudes that it shares with its 255 neighbours.

The magnitudes describe their group best: from the largest on, an element belongs to the nearer of the two, and each
becomes the mean of those that belong to it (Lloyd 1982, "Least squares quantization in PCM"). Updates of adaptive
optimizers are alike in size, and such a group needs few values; one with a single large element keeps that exactly.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray

from ps.parameters.layout import BLOCK_NUMEL, Layout

GROUP_NUMEL = 256  # elements with the same magnitudes; a layout's length is a multiple of LANES
CODE_BYTES = GROUP_NUMEL // 4
ITERATIONS = 3
LANES = 8  # sums of a group are made side by side


@njit(nogil=True, cache=True)
def _refine(group, small, large, sums, counts):
    """The means of the magnitudes that are nearer to `small` and to `large`; what nothing is nearer to stays."""
    sums[:] = 0.0
    counts[:] = 0.0
    middle = (small + large) / 2
    everything = 0.0
    for start in range(0, group.size, LANES):
        part = group[start : start + LANES]
        for i in range(LANES):
            size = np.float64(abs(part[i]))
            sums[i] += size if size > middle else 0.0
            sums[i + LANES] += size
            counts[i] += 1.0 if size > middle else 0.0
    total, count = 0.0, 0.0
    for i in range(LANES):
        total += sums[i]
        everything += sums[i + LANES]
        count += counts[i]
    rest = group.size - count
    return ((everything - total) / rest if rest else small), (total / count if count else large)


@njit(
    ["void(float32[::1], float32[:,::1], uint8[:,::1])", "void(float64[::1], float64[:,::1], uint8[:,::1])"],
    nogil=True,
    cache=True,
)
def quantize(values: NDArray[np.floating], sizes: NDArray[np.floating], codes: NDArray[np.uint8]) -> None:
    """Encode groups of GROUP_NUMEL elements, the last may be short, and leave in `values` what the codes do not say.

    sizes: shape (groups, 2), the smaller magnitude first. codes: shape (groups, CODE_BYTES), four elements a byte; of
    each, bit 0 tells the larger magnitude and bit 1 the minus. A group with a number that is not finite becomes NaN.
    """
    sums, counts = np.empty(2 * LANES), np.empty(LANES)
    for g in range(len(sizes)):
        group = values[g * GROUP_NUMEL : (g + 1) * GROUP_NUMEL]
        largest = abs(group[0])
        broken = False
        for i in range(group.size):
            size = abs(group[i])
            largest = max(largest, size)
            broken |= not np.isfinite(size)
        small, large = 0.0, np.float64(largest)
        if broken:
            small = large = group[0] * np.nan
        else:
            for _ in range(ITERATIONS):
                small, large = _refine(group, small, large, sums, counts)
        sizes[g, 0], sizes[g, 1] = small, large
        low, high = sizes[g, 0], sizes[g, 1]
        middle = (low + high) / 2
        codes[g, group.size // 4 :] = 0
        for byte in range(group.size // 4):
            packed = np.uint8(0)
            for i in range(4):
                value = group[4 * byte + i]
                is_large, is_minus = abs(value) > middle, value < 0
                size = high if is_large else low
                group[4 * byte + i] = value - (-size if is_minus else size)
                packed |= np.uint8((is_large + 2 * is_minus) << 2 * i)
            codes[g, byte] = packed


@njit(
    ["void(float32[::1], float32[:,::1], uint8[:,::1])", "void(float64[::1], float64[:,::1], uint8[:,::1])"],
    nogil=True,
    cache=True,
)
def add_quantized(into: NDArray[np.floating], sizes: NDArray[np.floating], codes: NDArray[np.uint8]) -> None:
    """Add what `quantize` took."""
    values = np.empty(4, into.dtype)
    for g in range(len(sizes)):
        group = into[g * GROUP_NUMEL : (g + 1) * GROUP_NUMEL]
        values[0], values[1], values[2], values[3] = sizes[g, 0], sizes[g, 1], -sizes[g, 0], -sizes[g, 1]
        for byte in range(group.size // 4):
            packed = codes[g, byte]
            for i in range(4):
                group[4 * byte + i] += values[packed >> 2 * i & 3]


class TwoBit:
    """The codec. A payload has all magnitudes of a block, then all codes."""

    state_numel = 0

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._group_bytes = 2 * layout.itemsize + CODE_BYTES

    def initial_state(self) -> torch.Tensor:
        """See Codec."""
        return torch.empty(0, dtype=self._layout.dtype)

    def _position(self, element: int) -> int:
        """Where the payload of an element at the bounds of a block begins."""
        return -(-element // GROUP_NUMEL) * self._group_bytes

    def span(self, start: int, stop: int) -> tuple[int, int]:
        """See Codec."""
        return self._position(start), self._position(stop)

    def encode(self, values: torch.Tensor, payload: torch.Tensor, state: torch.Tensor, start: int = 0) -> None:
        """See Codec."""
        padding = self._padding(start, len(values))
        values[padding] = 0
        for block, sizes, codes in self._blocks(values, payload):
            quantize(block, sizes, codes)
        values[padding] = 0

    def decode(self, payload: torch.Tensor, into: torch.Tensor, start: int = 0) -> None:
        """See Codec."""
        for block, sizes, codes in self._blocks(into, payload):
            add_quantized(block, sizes, codes)
        into[self._padding(start, len(into))] = 0

    def _padding(self, start: int, numel: int) -> torch.Tensor:
        """Elements that no code can leave at zero, and that have to stay there: no checkpoint has them."""
        padding = self._layout.padding
        first, last = torch.searchsorted(padding, torch.tensor([start, start + numel])).tolist()
        return padding[first:last] - start

    def _blocks(
        self, values: torch.Tensor, payload: torch.Tensor
    ) -> Iterator[tuple[NDArray[Any], NDArray[Any], NDArray[np.uint8]]]:
        """Every block with its part of the payload: magnitudes, then codes."""
        flat, data = values.numpy(), payload.numpy()
        for start in range(0, len(flat), BLOCK_NUMEL):
            block = flat[start : start + BLOCK_NUMEL]
            first, last = self.span(start, start + len(block))
            middle = first + (last - first) // self._group_bytes * 2 * flat.itemsize
            sizes, codes = data[first:middle].view(flat.dtype), data[middle:last]
            yield block, sizes.reshape(-1, 2), codes.reshape(-1, CODE_BYTES)
