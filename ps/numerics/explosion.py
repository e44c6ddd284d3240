"""Whether a gradient's norm is far above what is usual: a hundred times the running median."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from statistics import median

EXPLODING = 100.0  # times the running median
WINDOW = 100  # norms that the median is over
LEAST = 10  # norms that must have been seen


class Explosions:
    """Of one job's gradients, told in the order of steps. state: the last norms, as `state` gave them.

    Every norm counts for the median, one that stands out too: so a gradient that stays large is usual after half a
    window, and the median hardly moves for a few that stand out.
    """

    def __init__(self, state: Iterable[float] = ()) -> None:
        self._norms = deque(state, maxlen=WINDOW)
        self.usual = math.nan  # the median before the last norm; not a number while too few are known

    @property
    def state(self) -> tuple[float, ...]:
        """What it has seen, for a checkpoint."""
        return tuple(self._norms)

    def take(self, norm: float) -> bool:
        """Whether this norm, which is finite, stands out from those before."""
        self.usual = median(self._norms) if len(self._norms) >= LEAST else math.nan
        self._norms.append(norm)
        return norm > EXPLODING * self.usual
