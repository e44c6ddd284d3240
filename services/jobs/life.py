"""A job that runs, and one incarnation of it: its servers and the stream to their leader."""

from __future__ import annotations

from dataclasses import dataclass

from ps.job.config import JobConfig
from ps.wire.address import ServerAddress
from services.cluster.kept_life import KeptLife
from services.cluster.processes import Started
from services.jobs.inbox import ServerEnded, WorkerEnded
from services.jobs.room import LeaderLink
from services.jobs.task_probe import TaskDescription
from services.jobs.team import server_name
from services.store.store import JobRow
from steepest.spec import TrainingJobSpec


@dataclass(frozen=True)
class Assignment:
    """A stored job with what it takes to run it."""

    row: JobRow
    spec: TrainingJobSpec
    description: TaskDescription
    code: bytes


@dataclass
class Life:
    """One incarnation's servers and the stream to their leader. lost: what happened to the servers, when it is over."""

    config: JobConfig
    addresses: list[ServerAddress]
    servers: list[Started]
    leader: LeaderLink
    lost: str = ""

    def name(self, server: int) -> str:
        """What messages call a server."""
        return server_name(server, self.config.spec.placement.num_servers)

    def members(self) -> list[tuple[str, str, int, str, str]]:
        """(role, id, pid, host, state) of each server."""
        return [("server", self.name(i), s.pid, s.host, "running") for i, s in enumerate(self.servers)]


def ends_of(kept: KeptLife, incarnation: int) -> list[ServerEnded | WorkerEnded]:
    """What ended while there was no service, as events."""
    servers = [ServerEnded(incarnation, index, end) for index, end in kept.ends.items()]
    ends = [(name, worker.generation, worker.end) for name, worker in kept.workers.items()]
    return [*servers, *(WorkerEnded(incarnation, name, number, end) for name, number, end in ends if end is not None)]
