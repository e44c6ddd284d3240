"""What is told of a step when it is over. Made while the workers compute the next one."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ps.layout import Layout
from ps.messages import Decision, StepRecord


@dataclass(frozen=True, slots=True)
class CompletedStep:
    """What the leader knew when all shards had applied its decision. Norm and loss are of the mean.

    segment_sums: of squares of the summed gradient, for each segment of the layout.
    clipped_sum: of squares of the gradient after a clip by value; None without one.
    began, collected, reported, committed: when the round began, all pushes were there, all shards had reduced, applied.
    """

    decision: Decision
    loss: float
    norm: float
    weight: float
    samples: int
    workers: int
    segment_sums: NDArray[np.float64]
    clipped_sum: float | None
    began: float
    collected: float
    reported: float
    committed: float

    def record(self, layout: Layout | None = None) -> StepRecord:
        """The record of the step. layout: without it there are no parameter_norms."""
        decision = self.decision
        clipped_norm = self.norm * decision.coefficient
        if self.clipped_sum is not None and decision.apply:
            clipped_norm = math.sqrt(self.clipped_sum)
        norms: tuple[float, ...] = ()
        if layout is not None:
            # bincount adds in order, so a parameter's norm has the same bits for any number of shards.
            sums = np.bincount(layout.segment_owners, self.segment_sums, len(layout.parameters))
            norms = tuple((np.sqrt(sums) / self.weight).tolist())
        return StepRecord(
            step=decision.step,
            time=self.committed,
            loss=self.loss,
            lr=decision.lr,
            weight=self.weight,
            samples=self.samples,
            gradient_norm=self.norm,
            clipped_norm=clipped_norm,
            clip_coefficient=clipped_norm / self.norm if self.norm > 0 else 1.0,
            clipped=clipped_norm < self.norm * (1 - 1e-12),
            skipped=not decision.apply,
            workers=self.workers,
            step_seconds=self.committed - self.began,
            compute_seconds=self.collected - self.began,
            reduce_seconds=max(0.0, self.reported - self.collected),
            apply_seconds=self.committed - self.reported,
            parameter_norms=norms,
        )
