"""Ternary: every element becomes -1, 0 or 1 times the largest magnitude among its 128 neighbours, at 2 bits each.

As in Wen et al. 2017, "TernGrad", but rounded to the nearest instead of at random, for a residual keeps the difference.
Updates of adaptive optimizers are alike in size, and few values describe them well; see docs/decisions.
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


@njit(
    [
        "void(float32[::1], float32[::1], uint8[:,::1])",
        "void(float64[::1], float64[::1], uint8[:,::1])",
    ],
    nogil=True,
    cache=True,
)
def quantize(values: NDArray[np.floating], scales: NDArray[np.floating], codes: NDArray[np.uint8]) -> None:
    """Encode groups of GROUP_NUMEL elements, the last may be short, and leave in `values` what the codes do not say.

    scales: shape (groups,). codes: shape (groups, CODE_BYTES), four elements a byte: 0, 1 for plus, 2 for minus.
    A group with a number that is not finite becomes NaN.
    """
    for g in range(len(scales)):
        group = values[g * GROUP_NUMEL : (g + 1) * GROUP_NUMEL]
        scale = abs(group[0])
        broken = False
        for i in range(group.size):
            size = abs(group[i])
            scale = max(scale, size)
            broken |= not np.isfinite(size)
        if broken:
            scale = group[0] * np.nan
        scales[g] = scale
        half = scale / 2
        codes[g, :] = 0
        for i in range(group.size):
            code = 0
            if broken or group[i] > half:
                code = 1
                group[i] -= scale
            elif group[i] < -half:
                code = 2
                group[i] += scale
            codes[g, i >> 2] |= np.uint8(code << 2 * (i & 3))


@njit(
    [
        "void(float32[::1], float32[::1], uint8[:,::1])",
        "void(float64[::1], float64[::1], uint8[:,::1])",
    ],
    nogil=True,
    cache=True,
)
def add_quantized(into: NDArray[np.floating], scales: NDArray[np.floating], codes: NDArray[np.uint8]) -> None:
    """Add what `quantize` took."""
    for g in range(len(scales)):
        group = into[g * GROUP_NUMEL : (g + 1) * GROUP_NUMEL]
        scale = scales[g]
        for i in range(group.size):
            code = codes[g, i >> 2] >> 2 * (i & 3) & 3
            if code == 1:
                group[i] += scale
            elif code == 2:
                group[i] -= scale


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
