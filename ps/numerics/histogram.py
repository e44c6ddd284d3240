"""Histograms of how large the elements of a gradient are, on a log scale: each bin is a power of four wide.

Counts are whole numbers, so they are the same however a gradient is cut and wherever it is counted.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

BINS, LOWEST_POWER = 32, -24  # bin i has magnitudes from 4 ** (LOWEST_POWER + i) on
COUNTED_NUMEL = 1 << 22  # elements that a GPU looks at together: what that takes memory for


def edges() -> list[float]:
    """The edges of the bins, BINS + 1 of them: bin i has magnitudes from edges[i] up to edges[i + 1].

    What is smaller or larger is in the first or last bin; zeros are in none.
    """
    return [4.0**power for power in range(LOWEST_POWER, LOWEST_POWER + BINS + 1)]


def count_by_segment(values: torch.Tensor, divisor: float, segments: NDArray[np.int64]) -> NDArray[np.uint32]:
    """As ps.numerics.kernel.count_magnitudes, in operations of PyTorch, where `values` is."""
    starts, stops = (torch.from_numpy(segments[:, side].copy()).to(values.device) for side in (0, 1))
    counts = torch.zeros(len(segments) * (BINS + 1), dtype=torch.int64, device=values.device)
    for first in range(0, len(values), COUNTED_NUMEL):
        part = values[first : first + COUNTED_NUMEL]
        magnitudes = part.to(torch.float64, copy=True).abs_().div_(divisor)
        _, exponents = torch.frexp(magnitudes)  # each is 0.5 to 1 times 2 ** exponent
        bins = ((exponents.long() - 1) >> 1).sub_(LOWEST_POWER).clamp_(0, BINS - 1)
        places = torch.arange(first, first + len(part), device=values.device)
        segment = torch.searchsorted(starts, places, right=True).sub_(1)
        counted = (segment >= 0) & (places < stops[segment.clamp(min=0)]) & (part != 0)
        keys = torch.where(counted, segment * (BINS + 1) + bins, BINS)  # of no segment: nowhere
        counts += torch.bincount(keys, minlength=len(counts))
    found: NDArray[np.int64] = counts.view(-1, BINS + 1)[:, :BINS].cpu().numpy()
    return found.astype(np.uint32)
