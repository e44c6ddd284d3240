"""The gradient norms of single micro-batches, where they lie alone: what the gradient noise scale is made of."""

from __future__ import annotations

import numpy as np
import torch

from ps.numerics.kernel import sums_of_squares
from ps.parameters.layout import Layout
from ps.step.signals import FIRST_STEPS, has_own_gradient, is_measured
from worker.gradients.slots import Slots


class LeafNorms:
    """every: steps between two that are measured; see ps.step.signals."""

    def __init__(self, layout: Layout, slots: Slots, every: int) -> None:
        self._slots = slots
        self._every = every
        self._segments = np.array([(p.offset, p.offset + p.numel) for p in layout.parameters], dtype=np.int64)

    def wants(self, step: int, leaf: int) -> bool:
        """Whether a micro-batch is to be measured."""
        return has_own_gradient(leaf) and is_measured(step, self._every)

    def turn(self, step: int) -> int | None:
        """Of a measured step, its number among those at the interval; None: one of the first, which measure all."""
        return None if step < FIRST_STEPS else step // self._every

    def squares(self, slot: int) -> bytes:
        """The sum of squares of each parameter's gradient in a slot: float64, little-endian."""
        flat = self._slots.flat(slot)
        if flat.device.type == "cpu":
            sums = np.empty(len(self._segments))
            sums_of_squares(flat.numpy(), self._segments, sums)
        else:
            norms = torch._foreach_norm(self._slots.views(slot), 2)
            sums = torch.stack(norms).double().square().cpu().numpy()
        return sums.astype("<f8", copy=False).tobytes()
