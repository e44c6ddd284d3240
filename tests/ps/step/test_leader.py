"""The leader's named outcomes and decisions, one at a time. What it does under chaos is in test_protocol.py."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from ps.step.effects import Decide, Dismiss, Hung, Phase, PhaseChanged, Save, Send, Stepped
from ps.step.leader import Leader
from ps.step.messages import Assign, Failure, LeafResult, Outcome, Push, PushedNode, Round
from ps.step.plan import Plan
from steepest.spec import ClipSpec, ScheduleSpec


def leader(**changes: Any) -> Leader:
    settings: dict[str, Any] = {
        "total_steps": 3, "num_leaves": 4, "num_servers": 1, "base_lr": 0.5, "schedule": ScheduleSpec(),
        "worker_timeout_seconds": 100.0,
    } | changes  # fmt: skip
    made = Leader(Plan(**settings), initialized=True)
    made._agenda.saved(10, 0.0)  # no checkpoint unless a test asks for one
    return made


def push(assign: Assign, loss: float = 8.0, weight: float = 2.0, seconds: float = 1.0) -> Push:
    leaves = [i for low, high in assign.ranges for i in range(low, high)]
    nodes = tuple(PushedNode(i, i + 1, i) for i in leaves)
    results = tuple(LeafResult(i, loss, weight, 2) for i in leaves)
    return Push(assign.step, assign.kind, nodes, results, seconds=seconds)


def of_kind(effects: list[Any], kind: type) -> list[Any]:
    return [e for e in effects if isinstance(e, kind)]


def finish_step(it: Leader, assigns: list[Send], sums: float = 64.0) -> list[Any]:
    effects: list[Any] = []
    for send in assigns:
        effects += it.push(send.worker, push(send.assign), 1.0)[1]
    effects += it.report(0, it.step, Round.TRAIN, np.array([sums]), 1.0)[1]
    (decide,) = of_kind(effects, Decide)
    return effects + it.applied(0, decide.decision.step, 0.0, 2.0)[1]


def test_one_step() -> None:
    it = leader(clip=ClipSpec(norm=0.5))
    sends = of_kind(it.join("a", 0.0), Send)
    assert sends == [Send("a", Assign(0, Round.TRAIN, ((0, 4),)))]
    effects = finish_step(it, sends)
    (decide,) = of_kind(effects, Decide)
    # Four leaves of loss sum 8 and weight 2; the sum of squares of the summed gradient is 64.
    assert decide.decision.divisor == 8.0
    assert decide.decision.lr == 0.5
    assert decide.decision.coefficient == pytest.approx(0.5 / (8.0 / 8.0 + 1e-6))
    (stepped,) = of_kind(effects, Stepped)
    record = stepped.completed.record()
    assert record.loss == 4.0
    assert record.gradient_norm == 1.0
    assert record.clipped_norm == pytest.approx(0.5, rel=1e-5)
    assert record.clipped
    assert record.samples == 8
    assert it.step == 1


def test_duplicate_and_late_pushes_are_named() -> None:
    it = leader(num_servers=2)
    (first,) = of_kind(it.join("a", 0.0), Send)
    assert it.push("a", push(first.assign), 1.0)[0] == Outcome.ACCEPTED
    assert it.push("a", push(first.assign), 1.0)[0] == Outcome.DUPLICATE
    assert it.push("nobody", push(first.assign), 1.0)[0] == Outcome.LATE
    old = Push(7, Round.TRAIN, (), (), seconds=0.0)
    assert it.push("a", old, 1.0)[0] == Outcome.LATE
    assert it.report(0, 0, Round.TRAIN, np.zeros(1), 1.0)[0] == Outcome.ACCEPTED
    assert it.report(0, 0, Round.TRAIN, np.zeros(1), 1.0)[0] == Outcome.DUPLICATE
    assert it.report(1, 5, Round.TRAIN, np.zeros(1), 1.0)[0] == Outcome.LATE


def test_a_worker_that_joins_gets_work_at_the_next_step() -> None:
    it = leader()
    sends = of_kind(it.join("a", 0.0), Send)
    assert of_kind(it.join("b", 0.0), Send) == []
    following = of_kind(finish_step(it, sends), Send)
    assert {s.worker for s in following} == {"a", "b"}


def test_faster_workers_get_more() -> None:
    it = leader(num_leaves=12)
    it.join("slow", 0.0)
    it.join("fast", 0.0)
    it.members["slow"].speed, it.members["fast"].speed = 1.0, 3.0
    for member in it.members.values():
        member.pushes, member.guessed = 10, False
    it.push("slow", push(Assign(0, Round.TRAIN, ((0, 12),)), seconds=12.0), 1.0)
    it.report(0, 0, Round.TRAIN, np.ones(1), 1.0)
    sends = of_kind(it.applied(0, 0, 0.0, 2.0)[1], Send)
    shares = {s.worker: sum(high - low for low, high in s.assign.ranges) for s in sends}
    assert shares["fast"] > shares["slow"]


def test_what_a_dead_worker_owed_is_dealt_within_the_step() -> None:
    it = leader(num_servers=2)
    finish = finish_step_with_two(it)
    by_worker = {s.worker: s.assign for s in finish}
    it.push("a", push(by_worker["a"]), 3.0)
    again = of_kind(it.leave("b", 3.0), Send)
    assert [s.worker for s in again] == ["a"]
    assert again[0].assign.step == 1
    assert again[0].assign.ranges == by_worker["b"].ranges


def finish_step_with_two(it: Leader) -> list[Send]:
    """Both workers are there from step 1 on."""
    sends = of_kind(it.join("a", 0.0), Send)
    it.join("b", 0.0)
    for send in sends:
        it.push(send.worker, push(send.assign), 1.0)
    for server in range(it.plan.num_servers):
        effects = it.report(server, 0, Round.TRAIN, np.ones(1), 1.0)[1]
    for server in range(it.plan.num_servers):
        effects = it.applied(server, 0, 0.0, 2.0)[1]
    return of_kind(effects, Send)


def test_without_workers_it_waits_and_goes_on() -> None:
    it = leader()
    it.join("a", 0.0)
    (change,) = of_kind(it.leave("a", 1.0), PhaseChanged)
    assert change.phase == Phase.WAITING
    sends = of_kind(it.join("b", 2.0), Send)
    assert sends[0].assign == Assign(0, Round.TRAIN, ((0, 4),))
    assert it.phase == Phase.WORKING


def test_a_straggler_is_helped_and_a_hung_worker_is_reported() -> None:
    it = leader()
    sends = finish_step_with_two(it)
    for member in it.members.values():
        member.speed, member.guessed = 4.0, False
    (slow, quick) = sends if sends[0].worker == "a" else sends[::-1]
    it.push(quick.worker, push(quick.assign), 2.5)
    assert it.tick(3.0) == []
    helped = of_kind(it.tick(20.0), Send)
    assert [(s.worker, s.assign.ranges) for s in helped] == [(quick.worker, slow.assign.ranges)]
    assert of_kind(it.tick(21.0), Send) == []
    assert Hung(slow.worker) in it.tick(200.0)


def test_pause_holds_at_the_boundary_and_resume_goes_on() -> None:
    it = leader()
    sends = of_kind(it.join("a", 0.0), Send)
    assert it.pause(0.5) == []
    effects = finish_step(it, sends)
    assert of_kind(effects, Send) == []
    assert it.phase == Phase.PAUSED
    assert of_kind(it.resume(3.0), Send)[0].assign.step == 1


def test_cancel_saves_first() -> None:
    it = leader()
    sends = of_kind(it.join("a", 0.0), Send)
    it._agenda.saved(0, 0.0)
    it.cancel(0.5)
    effects = finish_step(it, sends)
    assert of_kind(effects, Save) == [Save(1)]
    assert it.phase == Phase.SAVING
    effects = it.saved(it.step, "", 3.0)
    assert it.phase == Phase.CANCELLED
    assert of_kind(effects, Dismiss) == [Dismiss("a", "cancelled at step 1")]


def test_a_retired_worker_ends_its_round_first() -> None:
    it = leader()
    sends = of_kind(it.join("a", 0.0), Send)
    it.join("b", 0.0)
    assert it.retire("a", 0.5) == []
    effects = finish_step(it, sends)
    assert of_kind(effects, Dismiss)[0].worker == "a"
    assert [s.worker for s in of_kind(effects, Send)] == ["b"]


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_fails_the_job_by_name(loss: float) -> None:
    it = leader()
    (send,) = of_kind(it.join("a", 0.0), Send)
    bad = push(send.assign)
    leaves = (*bad.leaves[:2], LeafResult(2, loss, 2.0, 2), bad.leaves[3])
    it.push("a", Push(bad.step, bad.kind, bad.nodes, leaves), 1.0)
    effects = it.report(0, 0, Round.TRAIN, np.array([1.0]), 1.0)[1]
    (again,) = of_kind(effects, Send)
    effects = it.push("a", Push(0, again.assign.kind, (), leaves), 2.0)[1]
    (change,) = of_kind(effects, PhaseChanged)
    assert change.phase == Phase.FAILED
    assert change.failure.micro_batch == 2
    for word in ("step 0", "worker a", "micro-batch 2"):
        assert word in change.reason
    assert of_kind(effects, Decide) == []


def test_a_gradient_that_is_not_finite_is_traced_to_its_micro_batch() -> None:
    it = leader()
    (send,) = of_kind(it.join("a", 0.0), Send)
    it.push("a", push(send.assign), 1.0)
    (again,) = of_kind(it.report(0, 0, Round.TRAIN, np.array([math.nan]), 1.0)[1], Send)
    assert again.assign.kind == Round.DIAGNOSE
    found = push(again.assign)
    leaves = tuple(
        r._replace(nonfinite="layer.weight", bad_samples=(17, 40)) if r.leaf == 3 else r for r in found.leaves
    )
    effects = it.push("a", Push(0, Round.DIAGNOSE, (), leaves), 2.0)[1]
    (change,) = of_kind(effects, PhaseChanged)
    assert (change.failure.reason, change.failure.samples) == ("nonfinite_gradient", (17, 40))
    assert "layer.weight" in change.reason
    assert "samples 17, 40 of the training data" in change.reason
    assert "micro-batch 3" in change.reason


def test_skipping_makes_one_decision_and_keeps_the_schedule_in_step() -> None:
    it = leader(skip_nonfinite=True, schedule=ScheduleSpec(name="exponential", gamma=0.5))
    sends = of_kind(it.join("a", 0.0), Send)
    effects = finish_step(it, sends, sums=math.inf)
    (decide,) = of_kind(effects, Decide)
    assert not decide.decision.apply
    assert of_kind(effects, Stepped)[0].completed.record().skipped
    assert (it.step, it.updates) == (1, 0)
    effects = finish_step(it, of_kind(effects, Send))
    assert of_kind(effects, Decide)[0].decision.lr == 0.5
    assert (it.step, it.updates) == (2, 1)


def test_user_code_that_fails_fails_the_job_but_not_from_a_round_that_is_over() -> None:
    it = leader()
    sends = of_kind(it.join("a", 0.0), Send)
    finish_step(it, sends)
    late = Failure(0, 1, "user_code_raised", "boom")
    assert it.failure("a", late, 3.0)[0] == Outcome.LATE
    now = Failure(1, 1, "user_code_raised", "boom")
    outcome, effects = it.failure("a", now, 3.0)
    assert outcome == Outcome.ACCEPTED
    assert of_kind(effects, PhaseChanged)[0].failure == now
    assert it.phase == Phase.FAILED


def test_the_last_checkpoint_must_succeed() -> None:
    it = leader(total_steps=1)
    it._agenda.saved(-1, 0.0)
    sends = of_kind(it.join("a", 0.0), Send)
    assert of_kind(finish_step(it, sends), Save) == [Save(1)]
    (change, *_) = it.saved(it.step, "the disk is full", 3.0)
    assert change.phase == Phase.FAILED
    assert change.reason == "the disk is full"


def test_a_checkpoint_in_between_may_fail() -> None:
    it = leader(checkpoint_every=1)
    it._agenda.saved(0, 0.0)
    sends = of_kind(it.join("a", 0.0), Send)
    assert of_kind(finish_step(it, sends), Save) == [Save(1)]
    effects = it.saved(it.step, "the disk is full", 3.0)
    assert of_kind(effects, Send)[0].assign.step == 1


def test_a_checkpoint_by_the_clock_does_not_hold_the_job_up() -> None:
    it = leader(checkpoint_seconds=1.0, total_steps=10)
    it._agenda.saved(0, 0.0)
    sends = of_kind(it.join("a", 0.0), Send)
    effects = finish_step(it, sends)
    assert of_kind(effects, Save) == [Save(1, waits=False)]
    assert it.phase == Phase.SAVING  # until all is copied
    sends = of_kind(it.copied(3.0), Send)
    assert sends[0].assign.step == 1
    sends = of_kind(finish_step(it, sends), Send)
    assert sends[0].assign.step == 2  # the one before is still being written
    assert it.saved(1, "the disk is full", 4.0) == []  # said elsewhere; the job goes on
    it._agenda.copied(0, 0.0)
    it._agenda.written()
    assert of_kind(finish_step(it, sends), Save) == [Save(3, waits=False)]


def test_an_idle_worker_is_tried_again_though_it_was_slow() -> None:
    it = leader(num_leaves=2, total_steps=2000)
    sends = finish_step_with_two(it)
    it.members["a"].speed, it.members["b"].speed = 3.0, 1.0
    for member in it.members.values():
        member.guessed = False
    for step in range(1, 200):
        effects: list[Any] = []
        for send in sends:
            effects += it.push(send.worker, Push(step, Round.TRAIN, (), push(send.assign).leaves), float(step))[1]
        it.report(0, step, Round.TRAIN, np.ones(1), float(step))
        sends = of_kind(it.applied(0, step, 0.0, float(step))[1], Send)
        if {s.worker for s in sends} == {"a", "b"}:
            return
    raise AssertionError("b never got work again")


def test_a_worker_that_comes_after_the_end_is_sent_home() -> None:
    it = leader(total_steps=1)
    finish_step(it, of_kind(it.join("a", 0.0), Send))
    assert it.phase == Phase.FINISHED
    assert of_kind(it.join("b", 9.0), Dismiss) == [Dismiss("b", "the job has ended")]


def test_a_worker_that_is_slower_than_the_others_is_told_of() -> None:
    it = leader()
    for name in ("worker-0", "worker-1", "worker-2"):
        it.join(name, 0.0)
    assert it.members.slowest() == (-1, 1.0)
    for number, member in enumerate(it.members.values()):
        member.pushes, member.speed = 20, (2.0, 0.5, 4.0)[number]
    assert it.members.slowest() == (1, 6.0)


def test_an_evaluation_of_the_average_is_between_two_rounds_that_show() -> None:
    it = leader(evaluates_average=True, evaluation_leaves=2, eval_every=1)
    effects = finish_step(it, of_kind(it.join("a", 0.0), Send))
    shows = [decide.decision for decide in of_kind(effects, Decide)][-1]
    assert (shows.step, shows.kind, shows.apply) == (1, Round.SHOW, True)
    assert of_kind(effects, Send) == []  # nobody works until all shards show it
    (send,) = of_kind(it.applied(0, 1, 0.0, 3.0)[1], Send)
    assert (send.assign.kind, send.assign.step, send.assign.version) == (Round.EVALUATE, 1, 2)
    effects = it.push("a", push(send.assign), 4.0)[1]
    (back,) = of_kind(effects, Decide)
    assert (back.decision.kind, back.decision.apply) == (Round.SHOW, False)
    assert of_kind(effects, Send) == []
    (send,) = of_kind(it.applied(0, 1, 0.0, 5.0)[1], Send)
    assert (send.assign.kind, send.assign.step, send.assign.version) == (Round.TRAIN, 1, 3)


def test_a_job_that_is_cancelled_while_nobody_evaluates_saves_its_parameters() -> None:
    it = leader(evaluates_average=True, evaluation_leaves=2, eval_every=1)
    finish_step(it, of_kind(it.join("a", 0.0), Send))
    it.applied(0, 1, 0.0, 3.0)
    it.leave("a", 4.0)
    assert it.phase == Phase.WAITING
    it._agenda.saved(0, 4.0)
    (back,) = of_kind(it.cancel(5.0), Decide)
    assert (back.decision.kind, back.decision.apply) == (Round.SHOW, False)
    (save,) = of_kind(it.applied(0, 1, 0.0, 6.0)[1], Save)
    assert save.step == 1
    assert of_kind(it.saved(1, "", 7.0), PhaseChanged)[0].phase == Phase.CANCELLED


def test_what_is_decided_is_finished_before_a_job_without_workers_is_cancelled() -> None:
    it = leader(num_servers=2, evaluates_average=True, evaluation_leaves=2, eval_every=1)
    (send,) = of_kind(it.join("a", 0.0), Send)
    it.retire("a", 0.5)
    it.push("a", push(send.assign), 1.0)
    for server in range(2):
        it.report(server, 0, Round.TRAIN, np.ones(1), 1.0)
    for server in range(2):
        effects = it.applied(server, 0, 0.0, 2.0)[1]
    assert it.phase == Phase.WAITING
    (show,) = of_kind(effects, Decide)
    assert (show.decision.kind, show.decision.apply) == (Round.SHOW, True)
    it._agenda.saved(0, 2.0)
    it.applied(0, 1, 0.0, 3.0)
    assert it.cancel(4.0) == []  # server 1 shows the average as well when it hears of a checkpoint
    (back,) = of_kind(it.applied(1, 1, 0.0, 5.0)[1], Decide)
    assert (back.decision.kind, back.decision.apply) == (Round.SHOW, False)
    it.applied(0, 1, 0.0, 6.0)
    (save,) = of_kind(it.applied(1, 1, 0.0, 6.0)[1], Save)
    assert save.step == 1


def test_a_direction_goes_to_all_that_train_and_to_nobody_else() -> None:
    it = leader(evaluation_leaves=1, eval_every=1)
    it.direction = b"12345678"
    (first,) = of_kind(it.join("a", 0.0), Send)
    assert first.assign.direction == b"12345678"
    it.join("b", 0.1)
    (again,) = of_kind(it.leave("a", 0.2), Send)  # what the one had goes to the other
    assert (again.worker, again.assign.direction) == ("b", b"12345678")
    (evaluation,) = of_kind(finish_step(it, [again]), Send)
    assert (evaluation.assign.kind, evaluation.assign.direction) == (Round.EVALUATE, b"")
    it.direction = b""
    (following,) = of_kind(it.push("b", push(evaluation.assign), 3.0)[1], Send)
    assert (following.assign.kind, following.assign.direction) == (Round.TRAIN, b"")
