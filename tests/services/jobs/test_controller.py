"""The controller without Ray: a room and a leader that do what the test says, and a real store."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import pytest
import torch

from ps.checkpoint.files import State, write_checkpoint
from ps.job.config import JobConfig
from ps.memory.segment import SegmentReference
from ps.parameters.description import ModelDescription, TensorDescription
from ps.step.best import Standing
from ps.step.effects import Phase
from ps.step.messages import StepRecord
from ps.wire.address import ServerAddress
from services.cluster.processes import Exit, ExitKind, Started
from services.jobs.controller import Controller
from services.jobs.leader_client import PhaseReport, Report
from services.jobs.life import Assignment
from services.jobs.task_probe import TaskDescription
from services.settings import Settings
from services.store.history import JobHistory
from services.store.lifecycle import JobState
from services.store.store import JobRow, Result, Store
from steepest.spec import spec_from_dict
from tests.support.documented import is_documented
from tests.support.service import until

DIED = Exit(ExitKind.DIED, "was killed by signal 9 (SIGKILL)")


class StandInRoom:
    """Starts nothing; the test says what happens to what was started."""

    def __init__(self) -> None:
        self.servers: list[Callable[[Exit], None]] = []
        self.workers: dict[str, tuple[Callable[[Started], None], Callable[[Exit], None]]] = {}
        self.started: list[str] = []
        self.stopped: list[tuple[str, bool]] = []
        self.released = self.left = False
        self.listeners: tuple[Callable[..., None], ...] = ()

    def set_code(self, code: bytes) -> None:
        pass

    def start_servers(
        self, config: JobConfig, on_exit: Callable[[int, Exit], None]
    ) -> list[tuple[ServerAddress, Started]]:
        self.servers.append(lambda end: on_exit(0, end))
        address = ServerAddress("control", "", "", "host", SegmentReference(1, 1, 1, b""))
        return [(address, Started(100 + len(self.servers), "node-a"))]

    def start_worker(
        self,
        config: JobConfig,
        worker: str,
        generation: int,
        addresses: Sequence[ServerAddress],
        on_start: Callable[[Started], None],
        on_exit: Callable[[Exit], None],
    ) -> None:
        self.workers[worker] = (on_start, on_exit)
        self.started.append(worker)

    def has_server(self, worker: str) -> bool:
        return False

    def stop_worker(self, worker: str, *, keep_room: bool) -> None:
        self.stopped.append((worker, keep_room))

    def stop_actors(self) -> None:
        self.stopped.append(("everything", True))

    def wait_stopped(self) -> None:
        self.stopped.append(("waited", True))

    def release(self) -> None:
        self.released = True

    def leave(self) -> None:
        self.left = self.released = True

    def listen(self, *callbacks: Callable[..., None]) -> None:
        self.listeners = callbacks

    is_gone = False


class StandInLeader:
    """Takes commands and reports what the test says."""

    def __init__(self, config: JobConfig, on_report: Callable[[Report], None]) -> None:
        self.incarnation = config.incarnation
        self.commands: list[tuple[str, str]] = []
        self.closed = False
        self.heard = 0
        self._on_report = on_report

    def send(self, verb: str, worker: str = "") -> None:
        self.commands.append((verb, worker))

    def acknowledge(self, step: int) -> None:
        self.commands.append(("stored", str(step)))

    def seen(self, number: int) -> None:
        self.heard = number

    def close(self) -> None:
        self.closed = True

    def report(
        self,
        *phases: Phase,
        steps: Sequence[int] = (),
        members: Sequence[tuple[str, str]] = (),
        loss: Callable[[int], float] = lambda step: 1.5,
    ) -> None:
        records = [
            StepRecord(s, 0.0, loss(s), 0.1, 4.0, 4, 2.0, 1.0, 0.5, True, False, 1, 0.1, 0.1, 0.0, 0.0) for s in steps
        ]
        reports = [PhaseReport(phase, f"said {phase}", 0, None) for phase in phases]
        self._on_report(Report(records, records[-1] if records else None, [], [], list(members), reports, []))


class Play:
    """A controller, its room and its leaders, one for each life."""

    def __init__(
        self,
        directory: Path,
        *,
        workers: int = 2,
        restarts: int = 3,
        grace: float = 20.0,
        actions: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self.store = Store(f"sqlite:///{directory / 'jobs.db'}")
        self.settings = Settings(data_directory=directory, cancel_grace_seconds=grace)
        self.history = JobHistory(self.settings.history_of("j"))
        spec = spec_from_dict(
            {
                "task": {"module": "m", "function": "f"},
                "steps": 100,
                "placement": {"workers": workers, "max_worker_restarts": restarts},
                "health": {"actions": dict(actions)},
            }
        )
        model = ModelDescription((TensorDescription("w", (3,), "float32"),), (), (("w", "w"),))
        description = TaskDescription(model, 64, 0, ())
        row = JobRow(
            "j", "", spec.model_dump_json(), "{}", JobState.QUEUED, "new", workers, 0, 100, 0.0, None, Result()
        )
        self.store.create(row)
        self.store.move("j", JobState.STARTING, "there is room", 0.0)
        self.room = StandInRoom()
        self.leaders: list[StandInLeader] = []
        self.ended: list[str] = []

        def dial(address: str, config: JobConfig, on_report: Callable[[Report], None]) -> StandInLeader:
            self.leaders.append(StandInLeader(config, on_report))
            return self.leaders[-1]

        job = Assignment(self.store.get("j"), spec, description, b"")
        self.controller = Controller(job, self.store, self.settings, self.room, self.ended.append, dial)
        self.controller.start()
        until(lambda: len(self.room.started) == workers)

    @property
    def leader(self) -> StandInLeader:
        return self.leaders[-1]

    @property
    def state(self) -> JobState:
        return self.store.get("j").state

    @property
    def reasons(self) -> list[str]:
        return [event.reason for event in self.store.events_after("j", 0)]

    def run(self) -> None:
        for name, (on_start, _) in list(self.room.workers.items()):
            on_start(Started(7, "node-b"))
            self.leader.report(members=[(name, "joined")])
        self.leader.report(Phase.WORKING)
        until(lambda: self.state == JobState.RUNNING)

    def finish(self) -> None:
        self.controller.join(10)
        assert not self.controller.is_alive()
        assert self.room.released
        assert self.leader.closed
        assert self.ended == ["j"]


@pytest.fixture
def play(tmp_path: Path) -> Iterator[Callable[..., Play]]:
    plays: list[Play] = []

    def begin(**options: float) -> Play:
        plays.append(Play(tmp_path, **options))  # type: ignore[arg-type]
        return plays[-1]

    yield begin
    for each in plays:
        each.controller.detach()
        each.controller.join(10)
        each.store.close()


def checkpoint(play: Play, step: int) -> None:
    state = State(Standing(step, step), {"w": torch.full((3,), float(step))}, {}, {})
    write_checkpoint(play.settings.checkpoints_of("j"), state)


def test_a_job_runs_to_its_end(play: Callable[..., Play]) -> None:
    it = play()
    it.run()
    it.leader.report(steps=[0, 1, 2])
    it.leader.report(Phase.FINISHED)
    it.finish()
    row = it.store.get("j")
    assert (row.state, row.result.step, row.result.loss) == (JobState.SUCCEEDED, 3, 1.5)
    assert ("stored", "2") in it.leader.commands
    assert [r.step for r in it.history.records()] == [0, 1, 2]


def test_a_dead_worker_is_replaced_within_the_life(play: Callable[..., Play]) -> None:
    it = play()
    it.run()
    it.room.workers["worker-1"][1](DIED)
    until(lambda: it.room.started == ["worker-0", "worker-1", "worker-1"])
    assert it.room.stopped == [("worker-1", True)]
    assert len(it.leaders) == 1
    assert it.reasons[-1].startswith("worker-1 (pid 7 on node-b) was killed by signal 9 (SIGKILL); a new process")


def test_a_dead_server_begins_a_life_from_the_checkpoint(play: Callable[..., Play]) -> None:
    it = play()
    it.run()
    it.leader.report(steps=[0, 1, 2, 3])
    until(lambda: it.store.get("j").result.step == 4 or it.controller.ledger.result.step == 4)
    checkpoint(it, 2)
    old = it.leader
    it.room.servers[0](DIED)
    until(lambda: len(it.leaders) == 2)
    assert old.closed
    assert it.leader.incarnation == old.incarnation + 1
    said = "server-0 (pid 101 on node-a) was killed by signal 9 (SIGKILL); returning to the checkpoint of step 2"
    assert said in it.reasons
    until(lambda: it.controller.ledger.result.step == 2)
    assert [r.step for r in it.history.records()] == [0, 1]
    old.report(steps=[9])  # of a life that is over
    it.room.servers[0](DIED)
    it.run()
    assert it.controller.ledger.result.step == 2
    assert len(it.leaders) == 2


def test_a_torn_checkpoint_is_not_what_the_job_goes_back_to(play: Callable[..., Play]) -> None:
    it = play()
    it.run()
    checkpoint(it, 2)
    checkpoint(it, 4)
    newest = it.settings.checkpoints_of("j") / "step-000000000004" / "model.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1] + b"?")
    it.room.servers[0](DIED)
    until(lambda: len(it.leaders) == 2)
    assert it.reasons[-1].endswith("returning to the checkpoint of step 2")


def test_servers_that_keep_dying_end_the_job(play: Callable[..., Play]) -> None:
    it = play(restarts=1)
    it.room.servers[0](DIED)
    until(lambda: len(it.leaders) == 2)
    it.room.servers[1](DIED)
    it.finish()
    row = it.store.get("j")
    assert row.state == JobState.FAILED
    assert is_documented("servers are killed again and again", row.reason)
    assert "server-0 (pid 102 on node-a) was killed by signal 9 (SIGKILL) (2 deaths" in row.result.error


def test_a_cancel_whose_grace_expires_ends_the_job_all_the_same(play: Callable[..., Play]) -> None:
    it = play(grace=0.2)
    it.run()
    it.store.move("j", JobState.CANCELLING, "cancel requested", 0.0)
    it.controller.ask("cancel")
    it.finish()
    row = it.store.get("j")
    assert row.state == JobState.CANCELLED
    assert is_documented("a cancelled job does not end its step", row.reason)
    assert ("cancel", "") in it.leader.commands


def test_a_pause_during_recovery_holds_when_the_job_is_back(play: Callable[..., Play]) -> None:
    it = play()
    it.run()
    it.store.move("j", JobState.PAUSING, "pause requested", 0.0)
    it.controller.ask("pause")
    until(lambda: ("pause", "") in it.leader.commands)
    it.room.servers[0](DIED)
    until(lambda: len(it.leaders) == 2 and it.state == JobState.RECOVERING)
    until(lambda: ("pause", "") in it.leader.commands)
    it.leader.report(Phase.WORKING)
    until(lambda: it.state == JobState.PAUSING)
    it.leader.report(Phase.PAUSED)
    until(lambda: it.state == JobState.PAUSED)
    it.controller.ask("resume")
    until(lambda: ("resume", "") in it.leader.commands)


def test_a_rule_acts_on_the_first_report_too(play: Callable[..., Play]) -> None:
    """It says that the leader works, and what its steps were: the job runs by then, and is paused."""
    it = play(actions={"diverging": "pause"})
    for name, (on_start, _) in list(it.room.workers.items()):
        on_start(Started(7, "node-b"))
        it.leader.report(members=[(name, "joined")])
    it.leader.report(Phase.WAITING, Phase.WORKING, steps=range(40), loss=lambda step: 1.0 if step < 5 else 100.0)
    until(lambda: ("pause", "") in it.leader.commands)
    assert it.state == JobState.PAUSING
    it.leader.report(Phase.PAUSED)
    until(lambda: it.state == JobState.PAUSED)


def test_scaling_starts_and_retires_workers(play: Callable[..., Play]) -> None:
    it = play(workers=1)
    it.run()
    it.controller.ask("scale", 3)
    until(lambda: it.room.started == ["worker-0", "worker-1", "worker-2"])
    it.leader.report(members=[("worker-1", "joined")])
    it.controller.ask("scale", 1)
    until(lambda: ("retire", "worker-1") in it.leader.commands)
    assert it.room.stopped == [("worker-2", False)]  # it had not joined
    it.room.workers["worker-1"][1](Exit(ExitKind.DONE))
    until(lambda: ("worker-1", False) in it.room.stopped)


def test_a_worker_that_hangs_is_killed_and_replaced(play: Callable[..., Play]) -> None:
    it = play(workers=1)
    it.run()
    it.leader.report(members=[("worker-0", "hung")])
    until(lambda: it.room.started == ["worker-0", "worker-0"])
    assert "did not answer within 300 s (placement.worker_timeout_seconds) and was killed" in it.reasons[-1]
    it.leader.report(members=[("worker-0", "hung")])  # still of the one that hung
    it.leader.report(steps=[0])
    until(lambda: it.controller.ledger.result.step == 1)
    assert it.room.started == ["worker-0", "worker-0"]


def test_a_service_that_stops_leaves_the_job_as_it_is(play: Callable[..., Play]) -> None:
    it = play()
    it.run()
    it.controller.detach()
    it.finish()
    it.room.servers[0](DIED)
    assert it.state == JobState.RUNNING
