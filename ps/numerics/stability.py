"""Up to which curvature an optimizer's steps converge on a quadratic."""

from __future__ import annotations

import math

from steepest.spec import OptimizerSpec

DEFAULT_MOMENTUM = {"sgd": 0.0, "momentum": 0.9, "nesterov": 0.9}


def stable_sharpness(optimizer: OptimizerSpec) -> float:
    """The largest eigenvalue of a Hessian at which full gradient steps do not diverge, times the learning rate.

    Not a number for optimizers other than SGD, with momentum or without. Training by full batches tends to hover there:
    the edge of stability (Cohen et al. 2021, "Gradient descent on neural networks typically occurs at the edge of
    stability", appendix B).
    """
    momentum = DEFAULT_MOMENTUM.get(optimizer.name)
    if momentum is None or getattr(optimizer, "dampening", None):
        return math.nan
    given = getattr(optimizer, "momentum", None)
    beta = momentum if given is None else float(given)
    if optimizer.name == "nesterov":
        return (2 + 2 * beta) / (1 + 2 * beta)
    return 2 + 2 * beta
