"""A job that has gone long without a step."""

from __future__ import annotations

from services.jobs.staleness import FACTOR, LEAST_SECONDS, LEAST_STEPS, Staleness
from steepest.jobs import Finding
from tests.services.jobs.test_health import record


def watched(eval_every: int = 0, steps: int = LEAST_STEPS, seconds: float = 0.1) -> Staleness:
    staleness = Staleness(eval_every, 1000)
    staleness.observe(record(step)._replace(step_seconds=seconds) for step in range(steps))
    return staleness


def looks(staleness: Staleness, seconds: float, *, is_running: bool = True) -> list[Finding]:
    found = [staleness.look(now / 2, is_running=is_running) for now in range(2 * round(seconds))]
    return [finding for finding in found if finding is not None]


def test_a_long_time_without_a_step_is_told_once_until_there_is_another() -> None:
    staleness = watched()
    assert looks(staleness, LEAST_SECONDS) == []
    [finding] = looks(staleness, 2 * LEAST_SECONDS)
    assert (finding.rule, finding.severity, finding.step) == ("staleness", "warning", LEAST_STEPS)
    assert "no step has ended for 60 s, where 0.1 s is usual" in finding.message
    staleness.observe([record(LEAST_STEPS)])
    assert len(looks(staleness, 2 * LEAST_SECONDS)) == 1


def test_what_takes_long_for_good_reasons_is_left_alone() -> None:
    assert looks(watched(seconds=10.0), FACTOR * 10.0) == []  # such steps are usual
    assert looks(watched(steps=LEAST_STEPS - 1), 1000) == []  # nothing is known of what is usual
    assert looks(watched(eval_every=5), 1000) == []  # an evaluation is due
    assert looks(watched(steps=1000), 1000) == []  # all steps are done
    assert looks(watched(), 1000, is_running=False) == []
    paused = watched()
    assert looks(paused, LEAST_SECONDS - 1) == []
    assert looks(paused, 1, is_running=False) == []
    assert looks(paused, LEAST_SECONDS - 1) == []  # the time before the pause does not count
