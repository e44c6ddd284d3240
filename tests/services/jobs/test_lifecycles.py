"""Random lives of jobs against a model of them: users' requests, deaths of processes, and services that die and return.

Store, operations, admission and controllers are real; rooms and leaders do at once what they are told.
"""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule, run_state_machine_as_test

from ps.checkpoint.files import State, newest_verified, write_checkpoint
from ps.job.config import JobConfig
from ps.memory.segment import SegmentReference
from ps.parameters.description import ModelDescription, TensorDescription
from ps.step.best import Standing
from ps.step.effects import Phase
from ps.step.messages import StepRecord
from ps.wire.address import ServerAddress
from services.cluster.processes import Exit, ExitKind, Started
from services.jobs import admission
from services.jobs.admission import Admission
from services.jobs.code_bundles import CodeStore
from services.jobs.controller import Controller
from services.jobs.leader_client import PhaseReport, Report
from services.jobs.operations import Operations
from services.jobs.running import Running
from services.jobs.task_probe import TaskDescription
from services.settings import Settings
from services.store.history import JobHistory
from services.store.lifecycle import ENDED, MOVES, VERBS, JobState
from services.store.store import Store
from steepest.errors import ConflictError
from steepest.spec import PlacementSpec, TrainingJobSpec, spec_from_dict
from tests.support.choices import full
from tests.support.service import until

SLOTS, STEPS = 7, 20  # workers that the cluster has room for; steps of a job
DIED = Exit(ExitKind.DIED, "was killed by signal 9 (SIGKILL)")
_S = JobState


class Leader:
    """Reports at once what it has done."""

    def __init__(self, config: JobConfig, on_report: Callable[[Report], None]) -> None:
        written = newest_verified(config.checkpoint_directory)
        self.config, self.step = config, 0 if written is None else written.step
        self._on_report = on_report
        self._paused = self._joined = self._over = False

    def send(self, verb: str, worker: str = "") -> None:
        if verb == "retire":
            return  # it works until its step is done, and these have none
        if verb == "cancel":
            self._over = True
            self.report(Phase.CANCELLED)
        else:
            self._paused = verb == "pause"
            if self._joined:
                self.report(Phase.PAUSED if self._paused else Phase.WORKING)

    def acknowledge(self, step: int) -> None:
        pass

    seen = acknowledge

    def close(self) -> None:
        self._over = True

    def joined(self, worker: str) -> None:
        phases = [] if self._joined else [Phase.WORKING, *[Phase.PAUSED] * self._paused]
        self._joined = True
        self.report(*phases, members=[(worker, "joined")])

    def advance(self, steps: int) -> None:
        self.step += steps
        self.report(steps=range(self.step - steps, self.step))

    def report(self, *phases: Phase, steps: Sequence[int] = (), members: Sequence[tuple[str, str]] = ()) -> None:
        records = [
            StepRecord(s, 0.0, 1.5, 0.1, 4.0, 4, 2.0, 1.0, 0.5, True, False, 1, 0.1, 0.1, 0.0, 0.0) for s in steps
        ]
        reports = [PhaseReport(phase, f"said {phase}", 0, None) for phase in phases]
        self._on_report(Report(records, records[-1] if records else None, [], [], list(members), reports, []))


@dataclass
class Room:
    """What a job holds. leader: of its present life."""

    cluster: Cluster
    slots: int
    job: str = ""
    leader: Leader | None = None
    on_server_exit: Callable[[Exit], None] | None = None
    workers: dict[str, Callable[[Exit], None]] = field(default_factory=dict)

    def set_code(self, code: bytes) -> None:
        pass

    def start_servers(self, config: JobConfig, on_exit: Callable[[int, Exit], None]) -> list[Any]:
        self.job = config.job
        self.cluster.rooms[config.job] = self
        self.on_server_exit = lambda end: on_exit(0, end)
        return [(ServerAddress(config.job, "", "", "host", SegmentReference(1, 1, 1, b"")), Started(1, "node-a"))]

    def start_worker(
        self, config: JobConfig, worker: str, generation: int, addresses: Any, on_start: Any, on_exit: Any
    ) -> None:
        self.workers[worker] = on_exit
        on_start(Started(2, "node-b"))
        assert self.leader is not None
        self.leader.joined(worker)

    def has_server(self, worker: str) -> bool:
        return False

    def stop_worker(self, worker: str, *, keep_room: bool) -> None:
        self.workers.pop(worker, None)

    def stop_actors(self) -> None:
        self.workers.clear()

    def wait_stopped(self) -> None: ...

    def release(self) -> None:
        self.cluster.give_back(self)

    leave = release
    is_gone = False


class Cluster:
    """Has SLOTS places for workers, as jobs begin; what they are scaled to later is not counted."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.free = SLOTS
        self.rooms: dict[str, Room] = {}

    def wait_ready(self) -> None: ...

    def totals(self) -> dict[str, float]:
        return {"CPU": SLOTS, "memory": 1e12}

    def num_hosts(self) -> int:
        return 1

    def shortage(self, placement: PlacementSpec, num_workers: int, users: Sequence[str]) -> str:
        with self._lock:
            return "" if num_workers <= self.free else f"waiting for {num_workers} CPUs"

    def kept(self) -> list[str]:
        return []

    def reserve(self, job: str, spec: TrainingJobSpec, num_workers: int, layout_bytes: int, code: bytes) -> Room | None:
        with self._lock:
            if num_workers > self.free:
                return None
            self.free -= num_workers
            return Room(self, num_workers)

    def give_back(self, room: Room) -> None:
        with self._lock:
            self.free += room.slots
            if self.rooms.get(room.job) is room:
                del self.rooms[room.job]

    def dial(self, address: str, config: JobConfig, on_report: Callable[[Report], None]) -> Leader:
        room = self.rooms[address]
        room.leader = Leader(config, on_report)
        return room.leader


class Probe:
    """Describes every task alike."""

    def describe(self, spec: TrainingJobSpec, code: Path | None, timeout_seconds: float) -> TaskDescription:
        model = ModelDescription((TensorDescription("w", (3,), "float32"),), (), (("w", "w"),))
        return TaskDescription(model, 64, 0, ())


class Plane:
    """A service without its ports."""

    def __init__(self, directory: Path, cluster: Cluster) -> None:
        self.settings = Settings(data_directory=directory)
        self.store = Store(self.settings.database_url)
        self.running, wake = Running(), threading.Event()
        bundles: Any = CodeStore(directory / "code", 1 << 20)
        probe: Any = Probe()
        self.operations = Operations(self.store, bundles, probe, cluster, self.running, self.settings, wake)
        self.admission = Admission(self.store, bundles, cluster, self.running, self.settings, wake)
        self.admission.start()

    def stop(self) -> None:
        self.admission.stop()
        self.store.close()


@dataclass
class Expected:
    """What a job is to be. wanted: RUNNING, PAUSED or an end. kept: the step of its newest checkpoint."""

    workers: int
    priority: int = 0
    wanted: JobState = _S.RUNNING
    step: int = 0
    kept: int = 0


class Lives(RuleBasedStateMachine):
    jobs = Bundle("jobs")

    def __init__(self) -> None:
        super().__init__()
        self._patch = pytest.MonkeyPatch()
        self._patch.setattr(admission, "ADMIT_SECONDS", 0.01)
        self._directory = tempfile.TemporaryDirectory()
        self.cluster = Cluster()

        def controller(*arguments: Any, **named: Any) -> Controller:
            return Controller(*arguments, self.cluster.dial, **named)  # type: ignore[arg-type]

        self._patch.setattr(admission, "Controller", controller)
        self.plane = Plane(Path(self._directory.name), self.cluster)
        self.expected: dict[str, Expected] = {}
        self.created = 0

    def teardown(self) -> None:
        self.plane.stop()
        self._directory.cleanup()
        self._patch.undo()

    # -- what may happen ----------------------------------------------------------------------------------------------

    @rule(target=jobs, workers=st.integers(1, 3))
    def create(self, workers: int) -> str:
        job = f"job-{self.created}"
        self.created += 1
        spec = {
            "task": {"module": "m", "function": "f"},
            "steps": STEPS,
            "placement": {"workers": workers, "max_worker_restarts": 1000},
        }
        for _ in range(2):  # the second time as one who has got no answer
            self.plane.operations.create(job, f"request-{job}", spec_from_dict(spec))
        self.expected[job] = Expected(workers)
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
        own = self.expected[job]
        if leader is None or own.step == own.kept:
            return
        state = State(Standing(own.step, own.step), {"w": torch.full((3,), float(own.step))}, {}, {})
        write_checkpoint(leader.config.checkpoint_directory, state)
        own.kept = own.step

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
            self.expected[job].step = self.expected[job].kept

    @rule()
    def kill_the_service(self) -> None:
        held = set(self.cluster.rooms)
        self.plane.stop()
        for job in held:
            self.expected[job].step = self.expected[job].kept
        self.plane = Plane(Path(self._directory.name), self.cluster)

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

    def _leader(self, job: str) -> Leader | None:
        room = self.cluster.rooms.get(job)
        return None if room is None else room.leader

    # -- what must hold -----------------------------------------------------------------------------------------------

    def _is_settled(self) -> bool:
        rows = {job: self.plane.store.get(job) for job in self.expected}
        waiting = self.plane.store.in_states({_S.QUEUED, _S.RECOVERING})
        waiting = [row for row in waiting if row.id not in self.plane.running]
        if waiting and waiting[0].workers <= self.cluster.free:
            return False
        held = {row.id for row in rows.values() if row.state in (_S.RUNNING, _S.PAUSED)} & set(self.cluster.rooms)
        if {controller.job for controller in self.plane.running.all()} != held:
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

    def _settled(self) -> None:
        until(self._is_settled, 10)

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
        assert self.cluster.free == SLOTS - sum(room.slots for room in self.cluster.rooms.values())
        assert set(self.cluster.rooms) == {controller.job for controller in self.plane.running.all()}


@pytest.mark.parametrize("examples", [10, full(60)])
def test_jobs_live_as_the_model_says(examples: int) -> None:
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        Lives, settings=settings(max_examples=examples, stateful_step_count=30, deadline=None)
    )
