"""Learning-rate schedules as pure functions of the number of updates applied so far."""

from __future__ import annotations

from math import cos, pi

from steepest.spec import ScheduleSpec


def learning_rate(base: float, schedule: ScheduleSpec, update: int, total: int) -> float:
    """The learning rate of the update number `update` (from 0) of `total`.

    Warm-up rises linearly: update k of w has (k+1)/w of the base rate. After it, with t updates done of T left:
    constant: base; linear: from base to final_factor*base; cosine: Loshchilov and Hutter 2017, "SGDR", equation 5
    without restarts, from base to final_factor*base; step: base*gamma^(t // step_size); exponential: base*gamma^t.
    """
    if update < schedule.warmup_steps:
        return base * (update + 1) / schedule.warmup_steps
    done = update - schedule.warmup_steps
    left = max(1, total - schedule.warmup_steps)
    progress = min(1.0, done / left)
    match schedule.name:
        case "constant":
            factor = 1.0
        case "linear":
            factor = 1.0 + (schedule.final_factor - 1.0) * progress
        case "cosine":
            factor = schedule.final_factor + (1.0 - schedule.final_factor) * (1.0 + cos(pi * progress)) / 2.0
        case "step":
            factor = schedule.gamma ** (done // schedule.step_size)
        case "exponential":
            factor = schedule.gamma**done
        case other:
            raise ValueError(f"unknown schedule {other!r}")
    return base * factor
