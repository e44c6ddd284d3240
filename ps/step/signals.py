"""Signals of each parameter besides the norm of its gradient, and in which steps they are measured.

The gradient noise scale is that of McCandlish, Kaplan, Amodei 2018, "An Empirical Model of Large-Batch Training",
appendix A.1: E|g_B|^2 = |G|^2 + tr(S) / B for the mean gradient g_B of a batch of B samples, G the true gradient and S
the covariance of one sample's. It takes two sizes of batch: the micro-batches of even number, whose gradients lie alone
in every placement, and the whole step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ps.parameters.layout import Layout

FIRST_STEPS = 20  # each is measured: what is wrong from the start shows at the start
# mean_abs, max_abs: of the magnitudes of the mean gradient's elements. zeros: the share of elements that are 0.
# update_norm: of what the optimizer added; parameter_norm: before that. noise_signal, noise_trace: estimates of |G|^2
# and tr(S), of one step and so very noisy: average both over many steps before dividing.
NAMES = ("mean_abs", "max_abs", "zeros", "update_norm", "parameter_norm", "noise_signal", "noise_trace")


Sums = NDArray[np.float64]  # of segments, or several of each


class StepSignals(NamedTuple):
    """What was measured in one step.

    gradient: of the sum, and update: by segment of the layout, see ps.numerics.signals. leaves: of some micro-batches,
    the weight and the sum of squares of each parameter's gradient sum, float64, little-endian.
    """

    gradient: NDArray[np.float64]
    update: NDArray[np.float64]
    leaves: Sequence[tuple[float, bytes]]


class UpdateSignals(NamedTuple):
    """What a shard measured when it carried out a decision, each in some steps; see ps.numerics.signals.

    squares: of the update, and histogram: of the gradient before the clip, by segment.
    """

    squares: NDArray[np.float64] | None = None
    histogram: NDArray[np.uint32] | None = None


NOTHING_MEASURED = UpdateSignals()


def has_histogram(step: int, every: int) -> bool:
    """Whether a step has. every: of the spec's telemetry.histograms_every."""
    return every > 0 and step % every == 0


def parameter_histograms(owners: NDArray[np.int64], counts: NDArray[np.uint32], count: int) -> NDArray[np.uint32]:
    """The histogram of each parameter's mean gradient, shape (count, BINS). counts: of segments."""
    found = np.zeros((count, counts.shape[1]), np.uint32)
    np.add.at(found, owners, counts)
    return found


def is_measured(step: int, every: int) -> bool:
    """Whether a step is. every: of the spec's telemetry.signals_every."""
    return every > 0 and (step < FIRST_STEPS or step % every == 0)


def has_own_gradient(leaf: int) -> bool:
    """Whether a micro-batch's gradient lies alone before others are added, whoever computes it."""
    return leaf % 2 == 0


def parameter_norms(owners: NDArray[np.int64], sums: Sums, weight: float, count: int = 0) -> NDArray[np.float64]:
    """The norm of each parameter's mean gradient. owners: see Layout. sums: of squares of segments. count: at least."""
    # bincount adds in order, so a parameter's norm has the same bits for any number of shards.
    found: NDArray[np.float64] = np.sqrt(np.bincount(owners, sums, count)) / weight
    return found


def parameter_signals(
    signals: StepSignals, squares: NDArray[np.float64], weight: float, layout: Layout
) -> NDArray[np.float64]:
    """The signals of each parameter in the order of NAMES, shape (len(NAMES), parameters).

    squares: of the norm of each parameter's mean gradient. weight: of the step.
    """
    owners, count = layout.segment_owners, len(layout.parameters)
    numel = np.maximum([p.numel for p in layout.parameters], 1)
    largest = np.zeros(count)
    np.maximum.at(largest, owners, signals.gradient[:, 1])
    out = np.empty((len(NAMES), count))
    # bincount adds in order, so the bits are the same for any number of shards.
    out[0] = np.bincount(owners, signals.gradient[:, 0], count) / numel / weight
    out[1] = largest / weight
    out[2] = np.bincount(owners, signals.gradient[:, 2], count) / numel
    out[3] = np.sqrt(np.bincount(owners, signals.update[:, 0], count))
    out[4] = np.sqrt(np.bincount(owners, signals.update[:, 1], count))
    out[5], out[6] = _noise(signals.leaves, squares, weight)
    return out


def _noise(
    leaves: Sequence[tuple[float, bytes]], squares: NDArray[np.float64], weight: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Unbiased estimates of |G|^2 and tr(S) for each parameter; not a number when there is one size of batch only."""
    own = [(w, np.frombuffer(data, "<f8") / (w * w)) for w, data in leaves if w > 0 and data]
    inverse = float(np.mean([1 / w for w, _ in own])) if own else 0.0
    if inverse <= 1 / weight:
        nothing = np.full(len(squares), np.nan)
        return nothing, nothing
    trace = (np.mean([norms for _, norms in own], axis=0) - squares) / (inverse - 1 / weight)
    return squares - trace / weight, trace


NOISE = NAMES[NAMES.index("noise_signal") :][:2]


class Noise(NamedTuple):
    """What running means of the noise estimates come to, each of shape (steps,).

    scale: tr(S) / |G|^2 of the whole network, in units of the weight (samples or tokens). cosine: how much the
    gradients of two micro-batches point the same way, E[g . h] / E|g|^2 for their mean gradients g and h, which is
    |G|^2 / (|G|^2 + tr(S) / weight): the cosine of the angle between them where their norms are alike. It can be a
    little below 0, as the estimate of |G|^2 can.
    """

    scale: NDArray[np.float64]
    cosine: NDArray[np.float64]


def noise_of(totals: NDArray[np.float64], weight: float, memory: int = 20) -> Noise:
    """The noise by running means of both estimates, each by itself.

    totals: the estimates of all parameters together, in the order of NOISE, shape (steps, 2). weight: of a micro-batch,
    in the units of the scale. memory: how many measured steps the means reach back. Not a number before the first
    estimate; scale also while that of |G|^2 is not positive.
    """
    signal, trace = _running_means(totals, memory)
    with np.errstate(divide="ignore", invalid="ignore"):
        scale = np.where(signal > 0, np.maximum(trace, 0.0) / signal, np.nan)
        whole = signal + trace / weight
        return Noise(scale, np.where(whole > 0, signal / whole, np.nan))


def _running_means(totals: NDArray[np.float64], memory: int) -> NDArray[np.float64]:
    """Running means of both estimates, shape (2, steps); not a number before the first measurement."""
    out = np.full((2, len(totals)), np.nan)
    mean = None
    for step, new in enumerate(totals):
        if np.isfinite(new).all():
            mean = new if mean is None else mean + (new - mean) / min(step + 1, memory)
        if mean is not None:
            out[:, step] = mean
    return out
