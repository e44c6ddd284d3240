"""A cluster and leaders of jobs that do at once what they are told, for tests of what steers them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ps.checkpoint.files import State, newest_verified, write_checkpoint
from ps.job.config import JobConfig
from ps.memory.segment import SegmentReference
from ps.parameters.description import ModelDescription, TensorDescription
from ps.step.best import Standing
from ps.step.effects import Phase
from ps.step.messages import StepRecord
from ps.wire.address import ServerAddress
from services.cluster.processes import Exit, ExitKind, Started
from services.jobs.leader_client import PhaseReport, Report
from services.jobs.task_probe import TaskDescription
from steepest.spec import PlacementSpec, TrainingJobSpec


def kept_step(checkpoints: Path) -> int:
    """The step of the newest checkpoint."""
    written = newest_verified(checkpoints)
    return 0 if written is None else written.step


class Leader:
    """Reports at once what it has done."""

    def __init__(self, config: JobConfig, on_report: Callable[[Report], None], retire: Callable[[str], None]) -> None:
        self.config, self.step = config, kept_step(config.checkpoint_directory)
        self._on_report, self._retire = on_report, retire
        self._paused = self._joined = self._over = False

    def send(self, verb: str, worker: str = "") -> None:
        if verb == "retire":
            self._retire(worker)
            return
        if verb == "cancel":
            self._over = True
            self.save()
            self.report(Phase.CANCELLED)
        else:
            self._paused = verb == "pause"
            if self._joined:
                self.report(Phase.PAUSED if self._paused else Phase.WORKING)

    def save(self) -> None:
        state = State(Standing(self.step, self.step), {"w": torch.full((3,), float(self.step))}, {}, {})
        if self.step and self.step != kept_step(self.config.checkpoint_directory):
            write_checkpoint(self.config.checkpoint_directory, state)

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
        if not keep_room and self.slots > len(self.workers):
            self.cluster.give_back_one(self)

    def stop_actors(self) -> None:
        self.workers.clear()

    def wait_stopped(self) -> None: ...

    def release(self) -> None:
        self.cluster.give_back(self)

    leave = release
    is_gone = False


class Cluster:
    """Has places for workers, as jobs begin; what they are scaled to later is not counted. slots: that are free."""

    def __init__(self, slots: int) -> None:
        self._lock = threading.Lock()
        self.slots = slots
        self.rooms: dict[str, Room] = {}

    def wait_ready(self) -> None: ...

    def totals(self) -> dict[str, float]:
        return {"CPU": self.slots, "memory": 1e12}

    def free(self) -> dict[str, float]:
        return {"CPU": self.slots}

    def num_hosts(self) -> int:
        return 1

    def shortage(self, placement: PlacementSpec, num_workers: int, users: Sequence[str]) -> str:
        with self._lock:
            return "" if num_workers <= self.slots else f"waiting for {num_workers} CPUs"

    def kept(self) -> list[str]:
        return []

    def reserve(self, job: str, spec: TrainingJobSpec, num_workers: int, layout_bytes: int, code: bytes) -> Room | None:
        with self._lock:
            if num_workers > self.slots:
                return None
            self.slots -= num_workers
            return Room(self, num_workers)

    def give_back_one(self, room: Room) -> None:
        with self._lock:
            room.slots, self.slots = room.slots - 1, self.slots + 1

    def give_back(self, room: Room) -> None:
        with self._lock:
            self.slots += room.slots
            if self.rooms.get(room.job) is room:
                del self.rooms[room.job]

    def dial(self, address: str, config: JobConfig, on_report: Callable[[Report], None]) -> Leader:
        room = self.rooms[address]
        room.leader = Leader(config, on_report, lambda worker: room.workers[worker](Exit(ExitKind.DONE)))
        return room.leader


class Probe:
    """Describes every task alike."""

    def describe(
        self, spec: TrainingJobSpec, code: Path | None, timeout_seconds: float, secrets: Mapping[str, str] | None = None
    ) -> TaskDescription:
        model = ModelDescription((TensorDescription("w", (3,), "float32"),), (), (("w", "w"),))
        return TaskDescription(model, 64, 0, ())
