"""Findings that name a worker, a micro-batch and samples: of what workers have looked into."""

from __future__ import annotations

from collections.abc import Sequence

from ps.step.messages import Failure, Outlier, StepRecord
from steepest.jobs import Finding

SHOWN = 8  # samples in a message


def some(samples: Sequence[int]) -> str:
    """Their numbers, or the first few of many."""
    return ", ".join(map(str, samples[:SHOWN])) + (", …" if len(samples) > SHOWN else "")


def nonfinite(failure: Failure, worker: str) -> Finding:
    """What a failure for a loss or gradient that is not finite comes to."""
    micro_batch = None if failure.micro_batch < 0 else failure.micro_batch
    layer = failure.layer or None
    samples = failure.samples or None
    return Finding("nonfinite", "critical", failure.step, failure.message, layer, worker or None, micro_batch, samples)


def outlier(record: StepRecord) -> Finding:
    """What a record with an outlier comes to."""
    own = Outlier.from_bytes(record.outlier)
    cause = "its samples cannot be told apart"
    if len(own.samples) == 1:
        cause = f"sample {own.samples[0]} of the training data makes it so"
    elif own.samples:
        cause = f"samples {some(own.samples)} of the training data make it so"
    return Finding(
        "outlier", "warning", record.step,
        f"the mean loss of micro-batch {own.micro_batch} is {own.loss:.4g}, {own.times_usual:.0f} times what is usual, "
        f"while others are as before: {cause}. Look at their values and targets; clipping (--clip-norm) bounds what "
        "such samples do",
        worker=own.worker or None, micro_batch=own.micro_batch, samples=own.samples or None,
    )  # fmt: skip
