"""The Ray actor around a host's fork server."""

from __future__ import annotations

import os

import ray

from services.cluster.fork_server import ForkServer


@ray.remote
class ForkServerActor:
    """One on each host; it ends with the service, and the fork server with it."""

    def __init__(self) -> None:
        self._server = ForkServer()

    def interpreter(self) -> tuple[str, tuple[int, int]]:
        """(command that starts the Python of a worker or server on this host, pids of this actor and the server)."""
        return self._server.interpreter(), (os.getpid(), self._server.pid)

    def exit_status(self, pid: int) -> int | None:
        """The wait status of a fork that has ended; None when it is none of this server's."""
        return self._server.exit_status(pid)
