"""What the leader's decisions say of clipping; what that has learned is part of the job's state."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ps.numerics.clip import clip_coefficient, clip_policy
from ps.numerics.clip_parameters import parameter_clip_policy
from ps.numerics.explosion import Explosions
from ps.step.signals import parameter_norms
from steepest.step_spec import ClipSpec


class Clip(NamedTuple):
    """What a gradient is scaled by. coefficients: by parameter, float64, little-endian. norm: after all that."""

    coefficient: float
    coefficients: bytes
    norm: float


class Clipping:
    """Of one job. owners: see Layout.segment_owners; needed where every parameter is clipped by itself.

    norms: the last ones, of a job that takes no step whose gradient explodes; else None.
    """

    def __init__(
        self,
        spec: ClipSpec,
        owners: Sequence[int] = (),
        state: Sequence[float] = (),
        norms: Sequence[float] | None = None,
    ) -> None:
        self._max_norm = spec.norm
        self._policy = clip_policy(spec.policy, state)
        self._by_parameter = parameter_clip_policy(spec, state)
        self._owners = np.array(owners, np.int64)
        self._explosions = None if norms is None else Explosions(norms)

    @property
    def state(self) -> tuple[float, ...]:
        """What it has learned."""
        policy = self._policy or self._by_parameter
        return () if policy is None else policy.state

    @property
    def norms(self) -> tuple[float, ...]:
        """The last ones, if they matter."""
        return () if self._explosions is None else self._explosions.state

    def explodes(self, norm: float) -> bool:
        """Whether the step is not to be taken, for its gradient is far above what is usual. Once for each step."""
        return self._explosions is not None and self._explosions.take(norm)

    def __call__(self, norm: float, segment_sums: NDArray[np.float64], weight: float) -> Clip:
        """For a step. norm: of the mean gradient. segment_sums: of squares of the sum. weight: of the sum."""
        if self._by_parameter is not None:
            norms = parameter_norms(self._owners, segment_sums, weight)
            found = self._by_parameter.coefficients(norms)
            after = math.sqrt(math.fsum(((norms * found) ** 2).tolist()))
            return Clip(1.0, found.astype("<f8", copy=False).tobytes(), min(after, norm))
        max_norm = self._max_norm if self._policy is None else self._policy.max_norm(norm)
        coefficient = clip_coefficient(norm, max_norm)
        return Clip(coefficient, b"", norm * coefficient)
