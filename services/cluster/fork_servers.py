"""The fork servers of the cluster's hosts, from which the processes of jobs are started."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from services.cluster.fork_actor import ForkServerActor
from services.cluster.fork_server import PLAIN_PRIORITY, SAME_EVERYWHERE, ForkServer

log = logging.getLogger(__name__)

START_SECONDS = 60.0
STATUS_SECONDS = 3.0


class ForkServers:
    """One for each node. A node without one starts processes the plain way, only slower and larger.

    own: this process's, which serves the node that `use_own` names.
    """

    def __init__(self, own: ForkServer | None = None) -> None:
        self._own = own
        self._own_node = ""
        self._actors: dict[str, Any] = {}
        self._lock = threading.Lock()

    def use_own(self, node: str) -> None:
        """Start the processes of this node, on this machine, from this process's own fork server."""
        self._own_node = node

    def _own_of(self, node: str | None) -> ForkServer | None:
        return self._own if node and node == self._own_node else None

    def start(self, nodes: Iterable[str]) -> None:
        """Begin to start those that are not there."""
        with self._lock:
            for node in nodes:
                if node not in self._actors and self._own_of(node) is None:
                    here = NodeAffinitySchedulingStrategy(node, soft=False)
                    options = ForkServerActor.options(  # type: ignore[attr-defined]
                        num_cpus=0, scheduling_strategy=here, runtime_env={"env_vars": PLAIN_PRIORITY}
                    )
                    self._actors[node] = options.remote()
                    self._actors[node].interpreter.remote()  # starts the server; the answer is not awaited

    def runtime_env(self, node: str | None) -> dict[str, Any]:
        """Of an actor on that node, which its fork server is to start."""
        plain: dict[str, Any] = {"env_vars": SAME_EVERYWHERE}
        if (own := self._own_of(node)) is not None:
            try:
                return {**plain, "py_executable": own.interpreter()}
            except OSError as error:
                log.warning("the fork server does not start, processes start without it: %s", error)
                return plain
        with self._lock:
            actor = self._actors.get(node or "")
        if actor is None:
            return plain
        try:
            interpreter, _ = ray.get(actor.interpreter.remote(), timeout=START_SECONDS)
        except Exception as error:  # what an actor raised has the type of that, too
            log.warning("the fork server of node %s does not answer, processes start without it: %s", node, error)
            with self._lock:
                if self._actors.get(node or "") is actor:
                    del self._actors[node or ""]
            return plain
        return {**plain, "py_executable": interpreter}

    def exit_status(self, node: str | None, pid: int) -> int | None:
        """The wait status of a process that a fork server started and that has ended; None when it is unknown."""
        if (own := self._own_of(node)) is not None:
            return own.exit_status(pid)
        with self._lock:
            actor = self._actors.get(node or "")
        if actor is None or not ray.is_initialized():
            return None
        try:
            status: int | None = ray.get(actor.exit_status.remote(pid), timeout=STATUS_SECONDS)
        except Exception:  # its host is gone, too
            return None
        return status

    def pids(self) -> list[int]:
        """Of those that run, and their actors."""
        own = [self._own.pid] if self._own is not None and self._own_node else []
        answers = ray.get([actor.interpreter.remote() for actor in self._actors.values()], timeout=START_SECONDS)
        return own + [pid for _, pids in answers for pid in pids]
