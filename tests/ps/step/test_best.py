from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ps.step.best import Aim, Best, judge, reason_to_stop

LOSS = Aim("loss", patience=2)
VALUES = st.lists(st.floats(width=32), max_size=12)


def judged(aim: Aim, values: list[float], best: Best = Best()) -> Best:  # noqa: B008  # immutable
    for step, value in enumerate(values, start=best.last + 1):
        best = judge(aim, best, step, {aim.metric: value})
    return best


@given(VALUES)
def test_the_best_is_the_first_of_the_best_numbers(values: list[float]) -> None:
    finite = [value for value in values if math.isfinite(value)]
    best = judged(LOSS, values)
    assert best.last == len(values) - 1
    if finite:
        assert (best.value, best.step) == (min(finite), values.index(min(finite)))
        assert best.since == best.last - best.step
    most = judged(Aim("accuracy", is_max=True), values)
    assert not finite or most.value == max(finite)


@given(VALUES, st.integers(0, 12))
def test_a_job_that_goes_back_judges_the_same(values: list[float], cut: int) -> None:
    """After a restart, the evaluation of the checkpoint's step comes again, and those after it."""
    before = judged(LOSS, values[:cut])
    again = before
    for step, value in enumerate(values):
        again = judge(LOSS, again, step, {"loss": value})
    assert repr(again) == repr(judged(LOSS, values))


def test_a_little_better_is_not_better() -> None:
    aim = Aim("loss", min_delta=0.1)
    assert judged(aim, [1.0, 0.95, 0.91]).step == 0
    assert judged(aim, [1.0, 0.95, 0.89]).step == 2


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([1.0, 0.5, 0.6], ""),
        (
            [1.0, 0.5, 0.6, 0.5],
            "at step 3: 2 evaluations in a row were no better than loss 0.5 at step 1",
        ),
        ([math.nan, math.inf], "was no number in 2 evaluations"),
    ],
)
def test_patience_ends(values: list[float], words: str) -> None:
    reason = reason_to_stop(LOSS, judged(LOSS, values))
    assert words in reason
    assert bool(reason) == bool(words)
    assert reason_to_stop(Aim("loss"), judged(LOSS, values)) == ""
