"""Whether a running job has gone long without a step: what is shown of it is old, and nothing else would say so."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from statistics import median

from ps.step.messages import StepRecord
from steepest.jobs import Finding

FACTOR, LEAST_SECONDS = 30.0, 60.0  # times the usual step, and no less than that
WINDOW, LEAST_STEPS = 100, 10  # steps that tell what is usual, and how many must have been seen


class Staleness:
    """Of one job. It speaks once for each time without a step. eval_every, total_steps: evaluations may take long."""

    def __init__(self, eval_every: int, total_steps: int) -> None:
        self._eval_every = eval_every
        self._total_steps = total_steps
        self._seconds: deque[float] = deque(maxlen=WINDOW)
        self._since: float | None = None
        self._step = 0
        self._told = False

    def observe(self, records: Iterable[StepRecord]) -> None:
        """Steps are done."""
        for record in records:
            self._seconds.append(record.step_seconds)
            self._step = record.step + 1
            self._since, self._told = None, False

    def look(self, now: float, *, is_running: bool) -> Finding | None:
        """At the present time, in seconds. is_running: whether steps are to be expected."""
        evaluates = self._eval_every and self._step % self._eval_every == 0
        if not is_running or evaluates or self._step >= self._total_steps:
            self._since = None
            return None
        if self._since is None:
            self._since = now
        usual = median(self._seconds) if len(self._seconds) >= LEAST_STEPS else float("inf")
        waited = now - self._since
        if self._told or waited < max(LEAST_SECONDS, FACTOR * usual):
            return None
        self._told = True
        return Finding(
            "staleness", "warning", self._step,
            f"no step has ended for {waited:.0f} s, where {usual:.3g} s is usual: a worker or its data hang, or its "
            "host is overloaded. Look at the job's log (steepest logs) and at its hosts; a worker that does not answer "
            "within placement.worker_timeout_seconds is replaced",
        )  # fmt: skip
