"""Gradient clipping: which coefficient the whole gradient is scaled by."""

from __future__ import annotations

from math import isfinite

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
