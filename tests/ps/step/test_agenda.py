from __future__ import annotations

from ps.step.agenda import Agenda
from ps.step.best import Aim, Best
from ps.step.plan import Plan
from steepest.spec import ScheduleSpec


def agenda(saved: int = -1, best: Best | None = None, **plan: object) -> Agenda:
    made = Plan(total_steps=10, num_leaves=1, num_servers=1, base_lr=0.1, schedule=ScheduleSpec(), **plan)  # type: ignore[arg-type]
    return Agenda(made, saved, best or Best())


def test_a_job_saves_every_so_often_and_at_its_end() -> None:
    it = agenda(checkpoint_every=4)
    assert [step for step in range(11) if it.wants_checkpoint(step, 0.0, ends=step == 10)] == [4, 8, 10]
    it.saved(8, 0.0)
    assert it.wants_checkpoint(8, 0.0, ends=False) is None
    assert it.end_reason(9) == ""
    assert it.end_reason(10) == "all 10 steps are done"


def test_by_the_clock_it_saves_one_at_a_time_while_the_job_goes_on() -> None:
    it = agenda(checkpoint_seconds=60.0)
    due = {now: it.wants_checkpoint(step, now, ends=False) for step, now in ((0, 5.0), (1, 60.0), (2, 65.0))}
    assert due == {5.0: None, 60.0: None, 65.0: False}  # counted from when the job began; it is not waited for
    it.copied(2, 66.0)
    assert it.wants_checkpoint(3, 200.0, ends=False) is None  # the one before is not on disk yet
    assert it.wants_checkpoint(3, 200.0, ends=True) is True
    it.written()
    assert it.wants_checkpoint(3, 125.0, ends=False) is None
    assert it.wants_checkpoint(3, 126.0, ends=False) is False
    assert agenda().wants_checkpoint(3, 1e9, ends=False) is None


def test_it_evaluates_every_so_often_once_and_at_its_end() -> None:
    it = agenda(evaluation_leaves=1, eval_every=3)
    due = []
    for step in range(11):
        if it.wants_evaluation(step, ends=step == 10):
            due.append(step)
            assert not it.evaluated(step, {"loss": 1.0})
            assert not it.wants_evaluation(step, ends=step == 10)
    assert due == [3, 6, 9, 10]
    assert not agenda().wants_evaluation(10, ends=True)  # without data to evaluate on


def test_the_best_evaluation_is_saved_once_more_and_the_job_ends_without_a_better_one() -> None:
    it = agenda(evaluation_leaves=1, eval_every=2, checkpoint_every=2, aim=Aim("loss", patience=2))
    for step, loss, is_best in ((2, 1.0, True), (4, 0.5, True), (6, 0.7, False)):
        assert it.wants_checkpoint(step, 0.0, ends=False)
        it.saved(step, 0.0)
        assert it.evaluated(step, {"loss": loss}) == is_best
        assert (it.wants_checkpoint(step, 0.0, ends=False) is True) == is_best
        it.saved(step, 0.0)
    assert it.end_reason(6) == ""
    assert not it.evaluated(8, {"loss": 0.6})
    assert it.end_reason(8).startswith("stopped early at step 8")
    # A job that goes back to step 6 judges step 6 no second time, and ends at the same step.
    again = agenda(6, Best(4, 0.5, 1, 6), evaluation_leaves=1, eval_every=2, aim=Aim("loss", patience=2))
    assert not again.evaluated(6, {"loss": 0.7})
    assert again.end_reason(6) == ""
    assert not again.evaluated(8, {"loss": 0.6})
    assert again.end_reason(8) == it.end_reason(8)


def test_a_job_ends_after_so_many_seconds_of_training() -> None:
    it = agenda(0, max_seconds=10.0)
    it.seconds += 9.9
    assert it.end_reason(7) == ""
    it.seconds += 0.2
    assert it.end_reason(8) == "stopped at step 8 after 10 s of training (max_seconds)"
    assert it.end_reason(10) == "all 10 steps are done"
