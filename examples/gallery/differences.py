"""A finite difference has a best step, and it is not the smallest.

A central difference is off by h² times the third derivative, and by the rounding of the function over h. The best h is
about the third root of the precision, 6·10⁻⁶ in float64, with an error of that squared; a forward difference does best
at the square root (Nocedal, Wright 2006, chapter 8). Richardson's extrapolation, as `steepest check-gradients` uses it
with Ridders' tableau (1982), takes the error of several steps out.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from common import Runs, times

STEPS = np.logspace(-14, 0, 57)


def loss(weights: Any) -> Any:
    """The loss of a logistic regression on a few samples, of the precision of its weights."""
    x = np.linspace(-1.0, 1.0, 24).reshape(8, 3).astype(weights.dtype)
    y = (x[:, 0] > 0).astype(weights.dtype)
    z = x @ weights
    return np.mean(np.logaddexp(0, z) - y * z, dtype=weights.dtype)


def gradient(weights: Any) -> Any:
    """Its gradient, by hand."""
    x = np.linspace(-1.0, 1.0, 24).reshape(8, 3)
    y = (x[:, 0] > 0).astype(float)
    return x.T @ (1 / (1 + np.exp(-x @ weights)) - y) / len(y)


def draw(runs: Runs, pyplot: Any) -> str:
    """The error of differences by h."""
    at = np.array([0.3, -0.2, 0.5])
    truth = gradient(at)[0]
    _, axis = pyplot.subplots(figsize=(6, 3.4))
    best = {}
    for label, dtype, is_central in (
        ("forward, float64", np.float64, False),
        ("central, float64", np.float64, True),
        ("central, float32", np.float32, True),
    ):
        errors = []
        for h in STEPS:
            unit = np.array([h, 0.0, 0.0])
            low = at - unit if is_central else at
            rise = float(loss((at + unit).astype(dtype))) - float(loss(low.astype(dtype)))
            errors.append(abs(rise / (2 * h if is_central else h) - truth) / abs(truth))
        least = int(np.argmin(errors))
        best[label] = STEPS[least], errors[least]
        axis.loglog(STEPS, np.maximum(errors, 1e-16), marker=".", markersize=3, label=label)
    axis.set(xlabel="h", ylabel="relative error")
    axis.legend(fontsize=8)
    return (
        "The least error is "
        + "; ".join(f"{times(error)} at h = {times(h)} ({label})" for label, (h, error) in best.items())
        + "."
    )
