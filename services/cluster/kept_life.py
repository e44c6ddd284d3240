"""What is known of the processes of a job that went on without a service. Free of Ray."""

from __future__ import annotations

from dataclasses import dataclass

from ps.job.config import JobConfig
from ps.wire.address import ServerAddress
from services.cluster.processes import Exit, Started


@dataclass(frozen=True)
class KeptWorker:
    """A worker that went on without a service. end: how it ended, if it did."""

    generation: int
    started: Started | None
    end: Exit | None = None


@dataclass(frozen=True)
class KeptLife:
    """A life that went on without a service. ends: of servers that ended, by number. workers: by name."""

    config: JobConfig
    addresses: tuple[ServerAddress, ...]
    servers: tuple[Started, ...]
    ends: dict[int, Exit]
    workers: dict[str, KeptWorker]
