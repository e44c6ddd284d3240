"""Ternary: every element becomes -1, 0 or 1 times a scale that it shares with its 127 neighbours, at 2 bits each.

As in Wen et al. 2017, "TernGrad", but rounded to the nearest instead of at random, for a residual keeps the difference,
and with a scale that describes its group best: from the largest magnitude on, the scale becomes the mean of those
elements that it is nearest to (Lloyd 1982, "Least squares quantization in PCM"). Updates of adaptive optimizers are
alike in size, and such a group needs few values; one with a single large element keeps that exactly.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray

from ps.layout import BLOCK_NUMEL, Layout

GROUP_NUMEL = 128  # elements with one scale
CODE_BYTES = GROUP_NUMEL // 4
ITERATIONS = 4
LANES = 8  # sums of a group are made side by side; its size is a multiple of this


@njit(nogil=True, cache=True)
def _refine(group, scale, sums, counts):
    """The mean magnitude of the elements that are nearer to `scale` than to zero; `scale` when there are none."""
    sums[:] = 0.0
    counts[:] = 0.0
    half = scale / 2
    for start in range(0, group.size, LANES):
        part = group[start : start + LANES]
        for i in range(LANES):
            size = abs(part[i])
            sums[i] += size if size > half else 0.0
            counts[i] += 1.0 if size > half else 0.0
    total, count = 0.0, 0.0
    for i in range(LANES):
        total += sums[i]
        count += counts[i]
    return total / count if count else scale


@njit(
    ["void(float32[::1], float32[::1], uint8[:,::1])", "void(float64[::1], float64[::1], uint8[:,::1])"],
    nogil=True,
    cache=True,
)
def quantize(values: NDArray[np.floating], scales: NDArray[np.floating], codes: NDArray[np.uint8]) -> None:
    """Encode groups of GROUP_NUMEL elements, the last may be short, and leave in `values` what the codes do not say.

    scales: shape (groups,). codes: shape (groups, CODE_BYTES), four elements a byte: 0, 1 for plus, 2 for minus.
    A group with a number that is not finite becomes NaN.
    """
    sums, counts = np.empty(LANES), np.empty(LANES)
    for g in range(len(scales)):
        group = values[g * GROUP_NUMEL : (g + 1) * GROUP_NUMEL]
        largest = abs(group[0])
        broken = False
        for i in range(group.size):
            size = abs(group[i])
            largest = max(largest, size)
            broken |= not np.isfinite(size)
        scale = np.float64(largest)
        if broken:
            scale *= np.nan
        else:
            for _ in range(ITERATIONS):
                scale = _refine(group, scale, sums, counts)
        scales[g] = scale
        rounded = scales[g]
        half = rounded / 2
        codes[g, group.size // 4 :] = 0
        for byte in range(group.size // 4):
            packed = np.uint8(0)
            for i in range(4):
                value = group[4 * byte + i]
                plus, minus = broken or value > half, value < -half
                group[4 * byte + i] = value - (rounded if plus else -rounded if minus else 0 * rounded)
                packed |= np.uint8((plus + 2 * minus) << 2 * i)
            codes[g, byte] = packed


@njit(
    ["void(float32[::1], float32[::1], uint8[:,::1])", "void(float64[::1], float64[::1], uint8[:,::1])"],
    nogil=True,
    cache=True,
)
def add_quantized(into: NDArray[np.floating], scales: NDArray[np.floating], codes: NDArray[np.uint8]) -> None:
    """Add what `quantize` took."""
    for g in range(len(scales)):
        group = into[g * GROUP_NUMEL : (g + 1) * GROUP_NUMEL]
        scale = scales[g]
        for byte in range(group.size // 4):
            packed = codes[g, byte]
            for i in range(4):
                code = packed >> 2 * i & 3
                # Zero is added too: 0 * NaN tells of a group that is not finite.
                group[4 * byte + i] += scale * ((code == 1) - (code == 2))


class Ternary:
    """The codec. A payload has all scales of a block, then all codes."""

    state_numel = 0

    def __init__(self, layout: Layout) -> None:
        self._layout = layout

    def initial_state(self) -> torch.Tensor:
        """See Codec."""
        return torch.empty(0, dtype=self._layout.dtype)

    def _position(self, element: int) -> int:
        """Where the payload of an element at the bounds of a block begins."""
        return -(-element // GROUP_NUMEL) * (self._layout.itemsize + CODE_BYTES)

    def span(self, start: int, stop: int) -> tuple[int, int]:
        """See Codec."""
        return self._position(start), self._position(stop)

    def encode(self, values: torch.Tensor, payload: torch.Tensor, state: torch.Tensor, start: int = 0) -> None:
        """See Codec."""
        flat = values.numpy()
        for block, scales, codes in self._blocks(len(flat), payload):
            quantize(flat[block], scales, codes)

    def decode(self, payload: torch.Tensor, into: torch.Tensor, start: int = 0) -> None:
        """See Codec."""
        flat = into.numpy()
        for block, scales, codes in self._blocks(len(flat), payload):
            add_quantized(flat[block], scales, codes)

    def _blocks(self, numel: int, payload: torch.Tensor) -> list[tuple[slice, NDArray[Any], NDArray[np.uint8]]]:
        data = payload.numpy()
        dtype = np.float32 if self._layout.itemsize == 4 else np.float64
        blocks = []
        for start in range(0, numel, BLOCK_NUMEL):
            block = slice(start, min(start + BLOCK_NUMEL, numel))
            first, last = self._position(block.start), self._position(block.stop)
            middle = first + (last - first) // (self._layout.itemsize + CODE_BYTES) * self._layout.itemsize
            codes = data[middle:last].reshape(-1, CODE_BYTES)
            blocks.append((block, data[first:middle].view(dtype), codes))
        return blocks
