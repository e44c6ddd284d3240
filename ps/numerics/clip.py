"""Gradient clipping: which coefficient the whole gradient is scaled by."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from math import isfinite
from typing import Protocol

import numpy as np

from steepest.step_spec import AutoClipSpec, ZClipSpec

# The same small number as torch.nn.utils.clip_grad_norm_ adds to the norm.
NORM_EPSILON = 1e-6


def clip_coefficient(norm: float, max_norm: float | None) -> float:
    """What to multiply a gradient of global L2 norm `norm` by, so that its norm is at most `max_norm`.

    Pascanu, Mikolov, Bengio 2013, "On the difficulty of training recurrent neural networks", algorithm 1, with the
    epsilon of `torch.nn.utils.clip_grad_norm_`. 1.0 when `max_norm` is None or the norm is within it.
    """
    if max_norm is None:
        return 1.0
    if not isfinite(norm):
        raise ValueError(f"a gradient of norm {norm} cannot be clipped")
    return min(1.0, max_norm / (norm + NORM_EPSILON))


class ClipPolicy(Protocol):
    """Sets the largest norm anew at each step, from the norms so far.

    state: all that it has learned, which checkpoints keep; another of the same spec goes on from it.
    """

    @property
    def state(self) -> tuple[float, ...]:
        """What it has learned."""

    def max_norm(self, norm: float) -> float | None:
        """The largest norm for a step whose gradient has this norm, which is finite; it learns from it."""


class AutoClip:
    """The largest norm is a percentile of the last norms, this one among them.

    Seetharaman, Wichern, Pardo, Le Roux 2020, "AutoClip: adaptive gradient clipping for source separation networks",
    there over all norms since the start.
    """

    def __init__(self, spec: AutoClipSpec, state: Sequence[float] = ()) -> None:
        self._percentile = spec.percentile
        self._norms = deque(state, maxlen=spec.window)

    @property
    def state(self) -> tuple[float, ...]:
        """The last norms, the oldest first."""
        return tuple(self._norms)

    def max_norm(self, norm: float) -> float | None:
        """See ClipPolicy."""
        self._norms.append(norm)
        return float(np.percentile(self._norms, self._percentile))


class ZClip:
    """A norm that is more than `threshold` standard deviations above the running mean is brought closer to it.

    For a norm z deviations above the mean the largest is mean + threshold^2 / z deviations; the running mean and
    variance take the norm after that. Kumar, Owen, Chowdhury, Guera 2025, "ZClip: adaptive spike mitigation for LLM
    pre-training", arXiv 2504.02507, sections 3.1 and 3.2, with its reciprocal adjustment.
    """

    def __init__(self, spec: ZClipSpec, state: Sequence[float] = ()) -> None:
        self._spec = spec
        self._first = list(state) if len(state) < spec.warmup_steps else []
        self._mean, self._variance = (math.nan, math.nan)
        if len(state) == spec.warmup_steps + 2:
            self._mean, self._variance = state[-2:]

    @property
    def state(self) -> tuple[float, ...]:
        """The norms of the warm-up, while it lasts; then so many zeros, the mean and the variance."""
        if math.isnan(self._mean):
            return tuple(self._first)
        return (*[0.0] * self._spec.warmup_steps, self._mean, self._variance)

    def max_norm(self, norm: float) -> float | None:
        """See ClipPolicy."""
        if math.isnan(self._mean):
            self._first.append(norm)
            if len(self._first) == self._spec.warmup_steps:
                self._mean = math.fsum(self._first) / len(self._first)
                self._variance = math.fsum((n - self._mean) ** 2 for n in self._first) / len(self._first)
            return None
        limit, taken = None, norm
        deviation = math.sqrt(self._variance)
        if norm - self._mean > self._spec.threshold * deviation:
            z = (norm - self._mean) / (deviation + NORM_EPSILON)
            limit = taken = self._mean + self._spec.threshold**2 / z * deviation
        decay = self._spec.decay
        self._mean = decay * self._mean + (1 - decay) * taken
        self._variance = decay * self._variance + (1 - decay) * (taken - self._mean) ** 2
        return limit


def clip_policy(spec: AutoClipSpec | ZClipSpec | None, state: Sequence[float] = ()) -> ClipPolicy | None:
    """The policy of a spec, going on from a state."""
    if isinstance(spec, AutoClipSpec):
        return AutoClip(spec, state)
    return None if spec is None else ZClip(spec, state)
