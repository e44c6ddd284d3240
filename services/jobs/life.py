"""A job that runs, and one incarnation of it: its servers and the stream to their leader."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from ps.job.config import JobConfig
from ps.job.credentials import Credentials
from ps.wire.address import ServerAddress
from services.cluster.kept_life import KeptLife
from services.cluster.processes import Started
from services.jobs.health import Health
from services.jobs.inbox import ServerEnded, WorkerEnded
from services.jobs.room import LeaderLink
from services.jobs.secret_files import SecretFiles
from services.jobs.task_probe import TaskDescription
from services.jobs.team import server_name
from services.settings import Settings
from services.store.store import JobRow
from steepest.change_spec import ChangeSpec
from steepest.spec import TrainingJobSpec


@dataclass(frozen=True)
class Assignment:
    """A stored job with what it takes to run it. workers: that it begins with; 0: as many as it is to have."""

    row: JobRow
    spec: TrainingJobSpec
    description: TaskDescription
    code: bytes
    workers: int = 0

    def config(self, incarnation: int, changes: Sequence[ChangeSpec], settings: Settings) -> JobConfig:
        """What the processes of an incarnation are told. changes: what has been decided while the job ran."""
        return JobConfig(
            job=self.row.id,
            incarnation=incarnation,
            token=secrets.token_urlsafe(32),
            spec=self.spec.model_copy(update={"changes": (*self.spec.changes, *changes)}),
            **self.description.known,
            num_servers=self.spec.placement.num_servers,
            checkpoint_directory=settings.checkpoints_of(self.row.id),
            secrets=SecretFiles(settings.secrets_directory).of(self.spec, self.row.owner),
            credentials=Credentials.create() if settings.exchange_tls else None,
        )

    def health(self) -> Health:
        """Rules that have seen nothing of the job yet."""
        parameters = self.description.layout(self.spec).parameters
        names, shapes = [p.name for p in parameters], [p.shape for p in parameters]
        watches = self.spec.optimizer.name != "newton_cg"  # whose steps are mostly products, not gradients and updates
        return Health(names, shapes, self.description.fan_in, self.description.activations, watches)


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
