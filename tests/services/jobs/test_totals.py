"""What is counted of a job's steps, also where only some are recorded."""

from __future__ import annotations

import pytest

from ps.step.messages import StepRecord
from services.jobs.totals import Totals


def record(step: int, *, skipped: bool = False) -> StepRecord:
    return StepRecord(step, 0.0, 1.5, 0.1, 4.0, 4, 2.0, 1.0, 0.5, not skipped, skipped, 1, 0.1, 0.1, 0.0, 0.0)


def test_a_record_of_every_third_step_stands_for_three() -> None:
    every, third = Totals(), Totals(every=3)
    every.count([record(step, skipped=step == 4) for step in range(9)])
    third.count([record(0), record(3)])
    third.count([])
    third.count([record(4, skipped=True), record(6)])  # all that are skipped are recorded
    assert (every.steps, every.samples, every.skipped) == (third.steps, third.samples, third.skipped) == (9, 36, 1)
    assert (every.clipped, third.clipped) == (8, 9)
    assert sum(third.parts.values()) == pytest.approx(sum(every.parts.values()))
