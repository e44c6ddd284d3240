"""What the controller needs of the cluster and of the leader: the seam at which tests put stand-ins."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from ps.job.config import JobConfig
from ps.wire.address import ServerAddress
from services.cluster.processes import Exit, Started
from services.jobs.leader_client import Report


class Room(Protocol):
    """Resources that a job holds, and the processes in them. Callbacks come in other threads."""

    def set_code(self, code: bytes) -> None:
        """The code bundle that every process gets."""

    def start_servers(
        self, config: JobConfig, on_exit: Callable[[int, Exit], None]
    ) -> list[tuple[ServerAddress, Started]]:
        """Start all servers, connected to each other; the leader first."""

    def start_worker(
        self,
        config: JobConfig,
        worker: str,
        generation: int,
        addresses: Sequence[ServerAddress],
        on_start: Callable[[Started], None],
        on_exit: Callable[[Exit], None],
    ) -> None:
        """Start a worker when there is room for it."""

    def has_server(self, worker: str) -> bool:
        """Whether a server shares a worker's GPU."""

    def stop_worker(self, worker: str, *, keep_room: bool) -> None:
        """Kill a worker if it still runs. keep_room: for another one in its place."""

    def stop_actors(self) -> None:
        """Kill all processes, but keep the room."""

    def wait_stopped(self) -> None:
        """Return when the servers that `stop_actors` has killed are gone, or after some seconds."""

    def release(self) -> None:
        """Kill all processes and give the room back."""

    def leave(self) -> None:
        """The service stops: leave all to the next one if it can be kept, else release it."""

    def listen(
        self,
        on_server_exit: Callable[[int, Exit], None],
        on_start: Callable[[str, int, Started], None],
        on_exit: Callable[[str, int, Exit], None],
    ) -> None:
        """Be told of processes that a service before this one has started; of workers with name and generation."""

    @property
    def is_gone(self) -> bool:
        """Whether the room was lost with what kept it: then the job needs another."""


class LeaderLink(Protocol):
    """The controller's stream to the leader."""

    def send(self, verb: str, worker: str = "") -> None:
        """A command: pause, resume, cancel, or retire a worker."""

    def acknowledge(self, step: int) -> None:
        """The records up to this step are stored."""

    def seen(self, number: int) -> None:
        """The reports up to this number have done their work."""

    def close(self) -> None:
        """Hang up."""


Dial = Callable[[str, JobConfig, Callable[[Report], None]], LeaderLink]
