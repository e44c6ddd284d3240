"""Random lives of jobs against a model of them: users' requests, deaths of processes, and services that die and return.

Store, operations, admission and controllers are real; rooms and leaders do at once what they are told.
"""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule, run_state_machine_as_test

from ps.step.effects import Phase
from services.cluster.processes import Exit, ExitKind
from services.jobs import admission
from services.jobs.admission import Admission
from services.jobs.code_bundles import CodeStore
from services.jobs.controller import Controller
from services.jobs.operations import Operations
from services.jobs.running import Running
from services.settings import Settings
from services.store.history import JobHistory
from services.store.lifecycle import ENDED, MOVES, VERBS, JobState
from services.store.store import JobRow, Store
from steepest.errors import ConflictError
from steepest.spec import spec_from_dict
from tests.support.choices import full
from tests.support.cluster import Cluster, Leader, Probe, kept_step
from tests.support.service import until

SLOTS, STEPS = 7, 20  # workers that the cluster has room for; steps of a job
DIED = Exit(ExitKind.DIED, "was killed by signal 9 (SIGKILL)")
_S = JobState


class CountingAdmission(Admission):
    """passes: that have ended."""

    passes = 0

    def _admit(self) -> None:
        super()._admit()
        self.passes += 1


class Plane:
    """A service without its ports."""

    def __init__(self, directory: Path, cluster: Cluster, *, preemption: bool) -> None:
        self.settings = Settings(data_directory=directory, preemption=preemption)
        self.store = Store(self.settings.database_url)
        self.running, wake = Running(), threading.Event()
        bundles: Any = CodeStore(directory / "code", 1 << 20)
        probe: Any = Probe()
        self.operations = Operations(self.store, bundles, probe, cluster, self.running, self.settings, wake)
        self.admission = CountingAdmission(self.store, bundles, cluster, self.running, self.settings, wake)
        self.admission.start()

    def stop(self) -> None:
        self.admission.stop()
        self.store.close()


@dataclass
class Expected:
    """What a job is to be. wanted: RUNNING, PAUSED or an end."""

    workers: int
    priority: int = 0
    wanted: JobState = _S.RUNNING
    step: int = 0


class Lives(RuleBasedStateMachine):
    jobs = Bundle("jobs")
    preemption = False
    slots = SLOTS

    def __init__(self) -> None:
        super().__init__()
        self._patch = pytest.MonkeyPatch()
        self._patch.setattr(admission, "ADMIT_SECONDS", 0.01)
        self._directory = tempfile.TemporaryDirectory()
        self.cluster = Cluster(self.slots)

        def controller(*arguments: Any, **named: Any) -> Controller:
            return Controller(*arguments, self.cluster.dial, **named)  # type: ignore[arg-type]

        self._patch.setattr(admission, "Controller", controller)
        self.plane = Plane(Path(self._directory.name), self.cluster, preemption=self.preemption)
        self.expected: dict[str, Expected] = {}
        self.created = 0

    def teardown(self) -> None:
        self.plane.stop()
        self._directory.cleanup()
        self._patch.undo()

    # -- what may happen ----------------------------------------------------------------------------------------------

    @rule(target=jobs, workers=st.integers(1, 3), priority=st.integers(-2, 2))
    def create(self, workers: int, priority: int) -> str:
        job = f"job-{self.created}"
        self.created += 1
        spec = {
            "task": {"module": "m", "function": "f"},
            "steps": STEPS,
            "placement": {"workers": workers, "max_worker_restarts": 1000},
        }
        for _ in range(2):  # the second time as one who has got no answer
            self.plane.operations.create(job, f"request-{job}", spec_from_dict(spec))
        self.plane.operations.set_priority(job, priority)
        self.expected[job] = Expected(workers, priority)
        return job

    @rule(job=jobs, verb=st.sampled_from(["pause", "resume", "cancel"]))
    def steer(self, job: str, verb: str) -> None:
        state = self.plane.store.get(job).state
        act = getattr(self.plane.operations, verb)
        if state not in VERBS[verb]:
            with pytest.raises(ConflictError, match=f"is {state}; {verb} is possible in"):
                act(job)
            return
        act(job)
        wanted = {"pause": _S.PAUSED, "resume": _S.RUNNING, "cancel": _S.CANCELLED}[verb]
        self.expected[job].wanted = wanted

    @rule(job=jobs, workers=st.integers(1, 3))
    def scale(self, job: str, workers: int) -> None:
        if self.plane.store.get(job).state in ENDED:
            with pytest.raises(ConflictError, match="scale is possible in"):
                self.plane.operations.scale(job, workers)
            return
        self.plane.operations.scale(job, workers)
        self.expected[job].workers = workers

    @rule(job=jobs, priority=st.integers(-2, 2))
    def prioritize(self, job: str, priority: int) -> None:
        if self.plane.store.get(job).state not in ENDED:
            self.plane.operations.set_priority(job, priority)
            self.expected[job].priority = priority

    @rule(job=jobs, steps=st.integers(1, 8))
    def advance(self, job: str, steps: int) -> None:
        leader = self._leader(job)
        own = self.expected[job]
        if leader is None or own.wanted != _S.RUNNING:
            return
        leader.advance(min(steps, STEPS - own.step))
        own.step = leader.step
        if own.step == STEPS:
            leader.report(Phase.FINISHED)
            own.wanted = _S.SUCCEEDED

    @rule(job=jobs)
    def save(self, job: str) -> None:
        leader = self._leader(job)
        if leader is not None:
            leader.save()

    @rule(job=jobs)
    def kill_a_worker(self, job: str) -> None:
        room = self.cluster.rooms.get(job)
        if room is not None and room.workers:
            room.workers[min(room.workers)](DIED)

    @rule(job=jobs)
    def kill_the_server(self, job: str) -> None:
        room = self.cluster.rooms.get(job)
        if room is not None and room.on_server_exit is not None:
            before = room.leader
            room.on_server_exit(DIED)
            until(lambda: room.leader is not before or self.cluster.rooms.get(job) is not room, 10)
            self.expected[job].step = self._kept(job)

    @rule()
    def kill_the_service(self) -> None:
        held = set(self.cluster.rooms)
        self.plane.stop()
        for job in held:
            self.expected[job].step = self._kept(job)
        self.plane = Plane(Path(self._directory.name), self.cluster, preemption=self.preemption)

    @rule(job=consumes(jobs))
    def delete(self, job: str) -> None:
        if self.plane.store.get(job).state not in ENDED:
            with pytest.raises(ConflictError, match="delete is possible in"):
                self.plane.operations.delete(job)
            self.plane.operations.cancel(job)
            self.expected[job].wanted = _S.CANCELLED
            self._settled()
        self.plane.operations.delete(job)
        del self.expected[job]
        assert not self.plane.settings.directory_of(job).exists()

    def _kept(self, job: str) -> int:
        return kept_step(self.plane.settings.checkpoints_of(job))

    def _leader(self, job: str) -> Leader | None:
        room = self.cluster.rooms.get(job)
        return None if room is None else room.leader

    # -- what must hold -----------------------------------------------------------------------------------------------

    def _is_settled(self) -> bool:
        rows = {job: self.plane.store.get(job) for job in self.expected}
        waiting = self.plane.store.in_states({_S.QUEUED, _S.RECOVERING})
        waiting = [row for row in waiting if row.id not in self.plane.running]
        if waiting and waiting[0].workers <= self._room_for(waiting[0], list(rows.values())):
            return False
        held = {row.id for row in rows.values() if row.state in (_S.RUNNING, _S.PAUSED)} & set(self.cluster.rooms)
        if {controller.job for controller in self.plane.running.all()} != held:
            return False
        if any(len(each.team) != each.team.wanted for each in self.plane.running.all()):
            return False
        if self.cluster.slots != self._slots_left():  # somebody is being given room
            return False
        for job, row in rows.items():
            wanted = self.expected[job].wanted
            waits = wanted == _S.RUNNING and row.id in {each.id for each in waiting}
            if row.state != wanted and not waits:
                return False
            controller = self.plane.running.get(job)
            is_live = row.state == _S.RUNNING and controller is not None
            if is_live and controller.ledger.result.step != self.expected[job].step:
                return False
        return True

    def _slots_left(self) -> int:
        return self.slots - sum(room.slots for room in self.cluster.rooms.copy().values())

    def _room_for(self, waiting: JobRow, rows: Sequence[JobRow]) -> int:
        """How many workers it could have."""
        below = [row for row in rows if row.state == _S.RUNNING and row.priority < waiting.priority]
        rooms = [self.cluster.rooms[row.id].slots for row in below if row.id in self.cluster.rooms]
        return self.cluster.slots + (sum(rooms) if self.preemption else 0)

    def _settled(self) -> None:
        until(self._stays_settled, 10)

    def _stays_settled(self) -> bool:
        """A pass of the admission that is under way may know the jobs as they were before, and start one of them."""
        if not self._is_settled():
            return False
        admission = self.plane.admission
        whole = admission.passes + 2  # the first of these may have begun already
        until(lambda: admission.passes >= whole, 10)
        return self._is_settled()

    @invariant()
    def all_is_as_it_should_be(self) -> None:
        self._settled()
        store = self.plane.store
        assert {row.id for row in store.page(1000)[0]} == set(self.expected)
        for job, own in self.expected.items():
            row = store.get(job)
            assert (row.workers, row.priority) == (own.workers, own.priority)
            events = store.events_after(job, 0)
            assert [event.sequence for event in events] == list(range(1, len(events) + 1))
            assert events[0].state == _S.QUEUED
            for before, after in pairwise(events):
                assert after.state == before.state or after.state in MOVES[before.state]
            assert events[-1].state == row.state
            if row.state in (_S.RUNNING, _S.SUCCEEDED):
                history = JobHistory(self.plane.settings.history_of(job))
                assert [record.step for record in history.records()] == list(range(own.step))
        assert self.cluster.slots == self._slots_left()
        assert set(self.cluster.rooms) == {controller.job for controller in self.plane.running.all()}


class PreemptedLives(Lives):
    """Jobs of higher priority do not wait for others, on a small cluster."""

    preemption = True
    slots = 4


@pytest.mark.parametrize(
    ("kind", "examples"), [(Lives, 5), (PreemptedLives, 5), full(Lives, 60), full(PreemptedLives, 60)]
)
def test_jobs_live_as_the_model_says(kind: type[Lives], examples: int) -> None:
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        kind, settings=settings(max_examples=examples, stateful_step_count=30, deadline=None)
    )
