"""Which evaluation was the best so far, and whether it is time to stop for want of a better one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True, slots=True)
class Aim:
    """What counts as better.

    metric: of the evaluations. is_max: whether more is better. min_delta: by how much a better value must differ.
    patience: evaluations in a row that are no better, after which the job ends; None: it never does.
    """

    metric: str
    is_max: bool = False
    min_delta: float = 0.0
    patience: int | None = None


class Best(NamedTuple):
    """The best evaluation, its step and value; how many have come since, and the step of the last one."""

    step: int = -1
    value: float = math.nan
    since: int = 0
    last: int = -1


NONE = Best()


@dataclass(frozen=True, slots=True)
class Standing:
    """Where a job's training stands, as its checkpoints keep it.

    updates: of the optimizer, which is less than `step` after skipped steps. best: the best evaluation so far. clip:
    what the job's clip policy has learned, see ClipPolicy. norms: the last ones, of jobs that skip explosions.
    seconds: that the steps have taken.
    """

    step: int = 0
    updates: int = 0
    best: Best = NONE
    clip: tuple[float, ...] = ()
    norms: tuple[float, ...] = ()
    seconds: float = 0.0


class Pursuit:
    """The best evaluation so far of a job, if it asks for one. stop_reason: why it is to end now, or nothing."""

    def __init__(self, aim: Aim | None, best: Best) -> None:
        self._aim = aim
        self.best = best
        self.stop_reason = ""

    def take(self, step: int, metrics: Mapping[str, float]) -> tuple[bool, bool]:
        """Take an evaluation into account: whether it is the best so far, and whether that is news."""
        if self._aim is None:
            return False, False
        before, self.best = self.best, judge(self._aim, self.best, step, metrics)
        self.stop_reason = reason_to_stop(self._aim, self.best)
        is_best = self.best.step == step
        return is_best, is_best and self.best != before


def judge(aim: Aim, best: Best, step: int, metrics: Mapping[str, float]) -> Best:
    """Take an evaluation into account, once. A value that is not a number is never better."""
    if step <= best.last:
        return best
    value = metrics[aim.metric]
    ahead = value - best.value if aim.is_max else best.value - value
    if math.isfinite(value) and (best.step < 0 or ahead > aim.min_delta):
        return Best(step, value, 0, step)
    return best._replace(since=best.since + 1, last=step)


def reason_to_stop(aim: Aim, best: Best) -> str:
    """Why the job is to end now, or nothing."""
    if aim.patience is None or best.since < aim.patience:
        return ""
    if best.step < 0:
        return f"stopped early: {aim.metric} was no number in {best.since} evaluations"
    return (
        f"stopped early at step {best.last}: {best.since} evaluations in a row were no better than {aim.metric} "
        f"{best.value:.6g} at step {best.step}"
    )
