"""Which samples of a micro-batch make its loss or gradient non-finite: found by computing it in halves."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

MAX_SAMPLES = 16  # with more, the samples are not to blame


def guilty(samples: NDArray[np.int64], is_finite: Callable[[NDArray[np.int64]], bool]) -> tuple[int, ...]:
    """The samples that are not finite by themselves; none when only together they are not, or when all or many are.

    samples: shape (n,), whose result is not finite. is_finite: of some of them; may raise anything, as a batch
    normalization of one sample does, and then those are named that could not be told apart.
    """
    found: list[int] = []

    def search(part: NDArray[np.int64]) -> None:
        if len(part) == 1:
            found.extend(part.tolist())
            return
        middle = len(part) // 2
        for half in (part[:middle], part[middle:]):
            if len(found) > MAX_SAMPLES:
                return
            try:
                finite = is_finite(half)
            except Exception:
                found.extend(part.tolist())
                return
            if not finite:
                search(half)

    search(samples)
    is_few = len(found) <= MAX_SAMPLES and (len(found) < len(samples) or len(samples) == 1)
    return tuple(found) if is_few else ()
