"""What is due at a step boundary besides the next step: a checkpoint, an evaluation, the end."""

from __future__ import annotations

from collections.abc import Mapping

from ps.step.best import Best, Pursuit
from ps.step.plan import Plan


class Agenda:
    """Of one job. saved: the step of the last checkpoint, -1 without one. best: the best evaluation so far.

    Checkpoints that are due by steps, for a best evaluation or at the end are waited for, so that no more than the
    steps since are ever lost; those that are due by the clock are written while the job goes on, one at a time.
    """

    def __init__(self, plan: Plan, saved: int, best: Best, seconds: float = 0.0) -> None:
        self._plan = plan
        self.seconds = seconds  # that training steps have taken
        self._saved = saved
        self._evaluated = -1
        self._pursuit = Pursuit(plan.aim, best)
        self._saves_best = False
        self._saved_at: float | None = None  # when that checkpoint was, or the job began
        self._is_writing = False

    @property
    def best(self) -> Best:
        """The best evaluation so far."""
        return self._pursuit.best

    def end_reason(self, step: int) -> str:
        """Why the job is over, with `step` steps done, or nothing."""
        if self._pursuit.stop_reason:
            return self._pursuit.stop_reason
        if step >= self._plan.total_steps:
            return f"all {step} steps are done"
        is_late = self.seconds >= self._plan.max_seconds
        return f"stopped at step {step} after {self.seconds:.0f} s of training (max_seconds)" if is_late else ""

    def wants_checkpoint(self, step: int, now: float, *, ends: bool) -> bool | None:
        """Whether to wait for the checkpoint that is due; None when none is. ends: whether the job ends here."""
        if self._saved_at is None:
            self._saved_at = now
        if self._saved >= step:
            return None
        if ends or self._saves_best or _is_due(self._plan.checkpoint_every, step):
            return True
        seconds = self._plan.checkpoint_seconds
        return False if seconds and now - self._saved_at >= seconds and not self._is_writing else None

    def wants_evaluation(self, step: int, *, ends: bool) -> bool:
        """ends: whether all steps are done."""
        is_due = ends or _is_due(self._plan.eval_every, step)
        return bool(self._plan.evaluation_leaves) and self._evaluated < step and is_due

    def saved(self, step: int, now: float) -> None:
        """The checkpoint of a step is on disk, or cannot be had."""
        self._saved, self._saved_at = step, now
        self._saves_best = False

    def copied(self, step: int, now: float) -> None:
        """What a checkpoint takes is copied; `written` follows."""
        self._saved, self._saved_at, self._is_writing = step, now, True

    def written(self) -> None:
        """A checkpoint that was copied is on disk, or cannot be had."""
        self._is_writing = False

    def evaluated(self, step: int, metrics: Mapping[str, float]) -> bool:
        """An evaluation is done; whether it is the best so far. Then it is saved, with what is known of it now."""
        self._evaluated = step
        is_best, is_news = self._pursuit.take(step, metrics)
        if is_news:
            self._saved = min(self._saved, step - 1)
            self._saves_best = True
        return is_best


def _is_due(every: int, step: int) -> bool:
    """every: 0 for never."""
    return bool(every and step and step % every == 0)
