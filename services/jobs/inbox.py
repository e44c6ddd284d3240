"""What can happen to a running job, as typed events; the controller handles them one at a time."""

from __future__ import annotations

from dataclasses import dataclass

from services.cluster.processes import Exit, Started
from services.jobs.leader_client import Report


@dataclass(frozen=True, slots=True)
class Asked:
    """Asked from outside: pause, resume, cancel, scale to `workers`, or vacate the room."""

    verb: str
    workers: int = 0


@dataclass(frozen=True, slots=True)
class Detach:
    """The service is stopping: leave the job as it is, for the next service to take over."""


@dataclass(frozen=True, slots=True)
class ServerEnded:
    """A server process has ended."""

    incarnation: int
    index: int
    end: Exit


@dataclass(frozen=True, slots=True)
class WorkerStarted:
    """A worker process runs."""

    incarnation: int
    name: str
    generation: int
    started: Started


@dataclass(frozen=True, slots=True)
class WorkerEnded:
    """A worker process has ended."""

    incarnation: int
    name: str
    generation: int
    end: Exit


@dataclass(frozen=True, slots=True)
class Reported:
    """The leader reports."""

    incarnation: int
    report: Report


Event = Asked | Detach | ServerEnded | WorkerStarted | WorkerEnded | Reported
