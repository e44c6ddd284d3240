"""The schedule of a task's own, as a number for every step."""

from __future__ import annotations

import math

from steepest.spec import ScheduleSpec, TrainingJobSpec
from steepest.task import AnalyticTask, Task
from worker.task.load import TaskError, said, user_traceback

MAX_STEPS = 1_000_000


def factors_of(task: Task | AnalyticTask, spec: TrainingJobSpec, num_samples: int) -> list[float]:
    """The factor of the learning rate at every step of a job; none without a schedule of the task's.

    Raises TaskError for one that raises or returns no number from 0 on, and when the spec has another one.
    """
    if isinstance(task, AnalyticTask) or task.schedule is None:
        return []
    if spec.schedule != ScheduleSpec():
        raise TaskError("schedule", "the task has a schedule of its own; leave the spec's out, or the task's")
    steps = spec.total_steps(num_samples)
    if steps > MAX_STEPS:
        raise TaskError("task.schedule", f"a schedule of the task's is for at most {MAX_STEPS:,} steps, not {steps:,}")
    factors = []
    for step in range(steps):
        try:
            factor = float(task.schedule(step))
        except Exception as error:
            problem = f"schedule({step}) raised {said(error)}"
            raise TaskError("task.schedule", problem, user_traceback(error)) from error
        if not math.isfinite(factor) or factor < 0:
            raise TaskError("task.schedule", f"schedule({step}) returned {factor}; allowed: numbers from 0 on")
        factors.append(factor)
    return factors
