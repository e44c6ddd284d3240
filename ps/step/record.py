"""What is told of steps that are over. Made while the workers compute the next ones, some at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ps.parameters.layout import Layout
from ps.step.messages import Decision, Outlier, StepRecord
from ps.step.signals import StepSignals, parameter_histograms, parameter_norms, parameter_signals


class CompletedStep(NamedTuple):
    """What the leader knew when all shards had applied its decision. Norms and loss are of the mean.

    segment_sums: of squares of the summed gradient, for each segment of the layout.
    clipped_norm: after the clip; clipped_sum: of its squares, where the shards clip; else None.
    logged: means of what the loss function returned besides. data_seconds, slowest_worker, slowest_ratio: see
    StepRecord. signals: None in a step that they are not measured in. activations: see StepRecord. curvature: see Push.
    worker_seconds: that each worker spent on its micro-batches.
    began, collected, reported, committed: when the round began, all pushes were there, all shards had reduced, applied.
    """

    decision: Decision
    loss: float
    norm: float
    weight: float
    samples: int
    workers: int
    segment_sums: NDArray[np.float64]
    clipped_norm: float
    clipped_sum: float | None
    began: float
    collected: float
    reported: float
    committed: float
    logged: tuple[float, ...] = ()
    data_seconds: float = 0.0
    slowest_worker: int = -1
    slowest_ratio: float = 1.0
    signals: StepSignals | None = None
    activations: bytes = b""
    worker_seconds: tuple[float, ...] = ()
    histogram: NDArray[np.uint32] | None = None
    outlier: Outlier | None = None
    curvature: tuple[float, ...] = ()

    def record(self, parameter_norms: bytes = b"", signals: bytes = b"", histograms: bytes = b"") -> StepRecord:
        """The record of the step."""
        decision, norm = self.decision, self.norm
        clipped_norm = self.clipped_norm
        if self.clipped_sum is not None and decision.apply:
            clipped_norm = math.sqrt(self.clipped_sum)
        sharpness, smallest = self.curvature or (math.nan, math.nan)
        return StepRecord(
            step=decision.step,
            time=self.committed,
            loss=self.loss,
            lr=decision.lr,
            weight=self.weight,
            samples=self.samples,
            gradient_norm=norm,
            clipped_norm=clipped_norm,
            clip_coefficient=clipped_norm / norm if norm > 0 else 1.0,
            clipped=decision.apply and clipped_norm < norm * (1 - 1e-12),
            skipped=not decision.apply,
            workers=self.workers,
            step_seconds=self.committed - self.began,
            compute_seconds=self.collected - self.began,
            reduce_seconds=max(0.0, self.reported - self.collected),
            apply_seconds=self.committed - self.reported,
            parameter_norms=parameter_norms,
            data_seconds=self.data_seconds,
            logged=np.array(self.logged, dtype="<f8").tobytes() if self.logged else b"",
            slowest_worker=self.slowest_worker,
            slowest_ratio=self.slowest_ratio,
            signals=signals,
            activations=self.activations,
            worker_seconds=max(self.worker_seconds, default=0.0),
            mean_worker_seconds=sum(self.worker_seconds) / max(1, len(self.worker_seconds)),
            histograms=histograms,
            outlier=b"" if self.outlier is None else self.outlier.to_bytes(),
            sharpness=sharpness,
            smallest_eigenvalue=smallest,
        )


def records_of(steps: Sequence[CompletedStep], layout: Layout | None) -> list[StepRecord]:
    """The records of some steps. layout: without it they have no parameter_norms, and no signals."""
    if layout is None:
        return [step.record() for step in steps]
    owners, num_parameters = layout.segment_owners, len(layout.parameters)
    records = []
    for step in steps:
        norms = parameter_norms(owners, step.segment_sums, step.weight, num_parameters)
        signals = histograms = b""
        if step.signals is not None:
            measured = parameter_signals(step.signals, norms**2, step.weight, layout)
            signals = measured.astype("<f8", copy=False).tobytes()
        if step.histogram is not None:
            counts = parameter_histograms(owners, step.histogram, num_parameters)
            histograms = counts.astype("<u4", copy=False).tobytes()
        records.append(step.record(norms.astype("<f8", copy=False).tobytes(), signals, histograms))
    return records
