"""What a client sees of a service."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from steepest.v1 import training_jobs_pb2 as pb


@dataclass(frozen=True, slots=True)
class ServerInfo:
    """A service at one moment.

    version: of steepest there. started: seconds since the epoch. not_ready: why no job could start now; empty when one
    could. resources, free_resources: of the cluster by Ray's names, memory in bytes; empty until Ray has started.
    jobs: how many there are in each state. caller, role: of the token that asks. retention_days: how long ended jobs
    are kept; 0: until they are deleted. calls_per_second: of one caller; 0: as many as they like. exchange_tls: whether
    processes of a job on several hosts speak TLS.
    """

    version: str
    started: float
    not_ready: str
    resources: dict[str, float]
    free_resources: dict[str, float]
    hosts: int
    jobs: dict[str, int]
    needs_token: bool
    tls: bool
    caller: str
    role: str
    max_code_bytes: int
    max_page_size: int
    retention_days: float
    calls_per_second: float
    allows_requirements: bool
    exchange_tls: bool

    def to_dict(self) -> dict[str, Any]:
        """The JSON object that --json prints."""
        return asdict(self)


def server_info_from_proto(message: pb.ServerInfo) -> ServerInfo:
    """From the wire."""
    values = {name: getattr(message, name) for name in ServerInfo.__slots__ if name != "started"}
    for name in ("resources", "free_resources", "jobs"):
        values[name] = dict(values[name])
    return ServerInfo(started=message.start_time.ToNanoseconds() / 1e9, **values)
