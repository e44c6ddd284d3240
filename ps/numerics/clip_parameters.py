"""Clipping of every parameter by itself: by the norm of its gradient, or unit by unit against its weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from ps.numerics.clip import NORM_EPSILON
from ps.numerics.kernel import sums_of_squares
from ps.numerics.threads import Threads
from ps.parameters.layout import Placed, Shard
from steepest.step_spec import AdaGcSpec, AgcSpec, ClipSpec


class ParameterClipPolicy(Protocol):
    """Says, at each step, what every parameter's gradient is scaled by. state: as of ClipPolicy."""

    @property
    def state(self) -> tuple[float, ...]:
        """What it has learned."""

    def coefficients(self, norms: NDArray[np.float64]) -> NDArray[np.float64]:
        """One for each parameter, at most 1. norms: of their gradients, finite. It learns from them."""


class ParameterNorm:
    """The largest norm is the same for all parameters: clip_grad_norm_ on each by itself."""

    state = ()

    def __init__(self, max_norm: float) -> None:
        self._max_norm = max_norm

    def coefficients(self, norms: NDArray[np.float64]) -> NDArray[np.float64]:
        """See ParameterClipPolicy."""
        return np.minimum(1.0, self._max_norm / (norms + NORM_EPSILON))


class AdaGc:
    """The largest norm of a parameter's gradient is `relative` times the running mean of its clipped norms.

    Wang, Li, Chen, Zeng, Yang, Yu, Ma, Shen 2025, "AdaGC: improving training stability for large language model
    pretraining", arXiv 2502.11034, algorithm 1: a global clip during the warm-up, whose least norms begin the means.
    Unlike there, a gradient of zero leaves the mean as it is: it would hold the parameter for ever.
    """

    def __init__(self, spec: AdaGcSpec, state: Sequence[float] = ()) -> None:
        self._spec = spec
        self._steps = int(state[0]) if state else 0
        self._means = np.array(state[1:], np.float64)  # 0: there has been no gradient

    @property
    def state(self) -> tuple[float, ...]:
        """The number of steps, and the mean of each parameter."""
        return (float(self._steps), *self._means.tolist())

    def coefficients(self, norms: NDArray[np.float64]) -> NDArray[np.float64]:
        """See ParameterClipPolicy."""
        if not len(self._means):
            self._means = np.zeros_like(norms)
        means, is_known = self._means, self._means > 0.0
        if self._steps < self._spec.warmup_steps:
            total = math.sqrt(math.fsum((norms**2).tolist()))
            found = np.full_like(norms, min(1.0, self._spec.absolute / total) if total > 0.0 else 1.0)
            clipped = norms * found
            following = np.where(is_known, np.minimum(means, clipped), clipped)
        else:
            limits = np.where(is_known, self._spec.relative * means, np.inf)
            with np.errstate(divide="ignore", invalid="ignore"):
                found = np.where(norms > limits, limits / norms, 1.0)
            clipped = norms * found
            decay = self._spec.decay
            following = np.where(is_known, decay * means + (1.0 - decay) * clipped, clipped)
        self._means = np.where(norms > 0.0, following, means)
        self._steps += 1
        return found


def parameter_clip_policy(spec: ClipSpec, state: Sequence[float] = ()) -> ParameterClipPolicy | None:
    """The policy of a spec, going on from a state; None when it clips in another way."""
    if spec.adagc is not None:
        return AdaGc(spec.adagc, state)
    return None if spec.parameter_norm is None else ParameterNorm(spec.parameter_norm)


def scale_parameters(gradient: torch.Tensor, shard: Shard, coefficients: NDArray[np.float64]) -> None:
    """Scale the parts of parameters that lie in a shard. coefficients: of all parameters, in the layout's order."""
    for index in np.flatnonzero(coefficients != 1.0).tolist():
        p = shard.layout.parameters[index]
        start, stop = max(p.offset, shard.start) - shard.start, min(p.offset + p.numel, shard.stop) - shard.start
        if start < stop:
            gradient[start:stop].mul_(float(coefficients[index]))


class Agc:
    """Adaptive gradient clipping, on a shard of whole parameters.

    A unit is a row of a parameter of two dimensions or more, and all of one with fewer. The norm of its mean gradient
    is at most `clipping` times that of its weights, or `eps`. Brock, De, Smith, Simonyan 2021, "High-performance
    large-scale image recognition without normalization", equation 3, where the last layer is left alone.

    threads, ranges: as for the Reducer; None on a GPU.
    """

    def __init__(
        self, spec: AgcSpec, shard: Shard, threads: Threads | None = None, ranges: Sequence[tuple[int, int]] = ()
    ) -> None:
        self._spec = spec
        self._threads = threads
        self._parameters = [p for p in shard.layout.parameters if p.numel and shard.start <= p.offset < shard.stop]
        self._start = shard.start
        rows = [self._rows(p) for p in self._parameters]
        self._segments = np.concatenate(rows) if rows else np.zeros((0, 2), np.int64)
        self._bounds = np.cumsum([0, *map(len, rows)]).tolist()
        is_left = [any(fnmatchcase(p.name, pattern) for pattern in spec.exclude) for p in self._parameters]
        self._is_clipped = ~np.repeat(np.array(is_left, bool), [len(units) for units in rows])
        self._parts = [slice(*np.searchsorted(self._segments[:, 0], range_)) for range_ in ranges]

    def _rows(self, p: Placed) -> NDArray[np.int64]:
        count = p.shape[0] if len(p.shape) > 1 else 1
        starts = p.offset - self._start + np.arange(count, dtype=np.int64) * (p.numel // count)
        return np.stack([starts, starts + p.numel // count], 1)

    def __call__(self, gradient: torch.Tensor, parameters: torch.Tensor, divisor: float) -> float:
        """Clip a gradient in place; the squares of the mean gradient that are gone: 0 exactly where nothing was.

        gradient, parameters: of the shard; the mean gradient is gradient / divisor.
        """
        norms = np.sqrt(self._squares(gradient)) / divisor
        limits = self._spec.clipping * np.maximum(np.sqrt(self._squares(parameters)), self._spec.eps)
        found = np.where(self._is_clipped & (norms > limits), limits / np.maximum(norms, NORM_EPSILON), 1.0)
        for p, first, last in zip(self._parameters, self._bounds[:-1], self._bounds[1:], strict=True):
            own = found[first:last]
            if (own != 1.0).any():
                start = p.offset - self._start
                rows = gradient[start : start + p.numel].view(last - first, -1)
                rows.mul_(torch.from_numpy(own).to(gradient).unsqueeze(1))
        return float((norms**2 * (1.0 - found**2)).sum())

    def _squares(self, values: torch.Tensor) -> NDArray[np.float64]:
        """The sum of squares of each unit."""
        if self._threads is None:
            return self._squares_on_device(values)
        out = np.zeros(len(self._segments))
        flat: Any = values.numpy()
        calls: list[Callable[[], None]] = [
            partial(sums_of_squares, flat, self._segments[part], out[part]) for part in self._parts
        ]
        self._threads.run(calls)
        return out

    def _squares_on_device(self, values: torch.Tensor) -> NDArray[np.float64]:
        norms = [
            torch.linalg.vector_norm(values[p.offset - self._start :][: p.numel].view(last - first, -1), dim=1)
            for p, first, last in zip(self._parameters, self._bounds[:-1], self._bounds[1:], strict=True)
        ]
        found: NDArray[np.float64] = torch.cat(norms).double().square().cpu().numpy() if norms else np.zeros(0)
        return found
